"""Tests of fairseq's .tsv, .km and dictionary files: exact round trips, and mismatched files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jahubert.audio import AudioSource
from jahubert.cli.main import main as cli
from jahubert.errors import ConfigError, DataError
from jahubert.frames import HUBERT, MFCC
from jahubert.train.data import utterances
from jahubert.train.data.fairseq_files import export, import_units, read_dict, read_tsv
from jahubert.train.data.labels import LabelHeader, LabelStore, LabelWriter
from jahubert.train.data.manifest import Manifest, Utterance, write_manifest
from jahubert.train.pipeline import runner

# The stem of the first name has ideographic spaces at both ends. Two names contain characters at which
# `str.splitlines` splits.
NAMES = ("話者 一/\u3000朝\u2028の声\u3000.wav", "話者 一/日本語 名前.wav", "b\x85.wav", "c:1.wav", "d.wav")
LENGTHS = (4000, 8000, 12_345, 720, 32_000)
SPLITS = ("train", "train", "valid", "train", "valid")


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Write audio files to `audio/`, a manifest and a label store."""
    items = []
    for name, n_samples, split in zip(NAMES, LENGTHS, SPLITS, strict=True):
        path = tmp_path / "audio" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * np.random.default_rng(n_samples).standard_normal(n_samples), 16_000)
        items.append(Utterance(name, AudioSource(str(path)), 0, n_samples, split=split))
    write_manifest(tmp_path / "m.arrow", items)
    manifest = Manifest(tmp_path / "m.arrow")
    header = LabelHeader(100, "mfcc", None, "c" * 64, None, manifest.fingerprint, False)
    n_frames = HUBERT.n_frames(manifest.n_samples)
    writer = LabelWriter(tmp_path / "label", header, n_frames)
    writer.write(0, [np.random.default_rng(n).integers(0, 100, n) for n in n_frames])
    writer.finish()
    return tmp_path


def exported(corpus: Path) -> Path:
    export(Manifest(corpus / "m.arrow"), LabelStore(corpus / "label"), corpus / "fairseq")
    return corpus / "fairseq"


def test_convert_command_writes_the_files_of_export(corpus, capsys):
    expected = {path.name: path.read_bytes() for path in exported(corpus).iterdir()}
    options = ["--to", "fairseq", "--manifest", str(corpus / "m.arrow")]
    assert cli(["convert", str(corpus / "label"), str(corpus / "again"), *options]) == 0
    assert "train: 3 utterances\nvalid: 2 utterances\n" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (corpus / "again").iterdir()} == expected
    (corpus / "exp" / "prepare").mkdir(parents=True)  # the standard layout does not require --manifest
    (corpus / "audio").rename(corpus / "exp" / "prepare" / "audio")
    (corpus / "m.arrow").rename(corpus / "exp" / "prepare" / "manifest.arrow")
    (corpus / "exp" / "iter1").mkdir()
    label = (corpus / "label").rename(corpus / "exp" / "iter1" / "label")
    assert cli(["convert", str(label), str(corpus / "third"), "--to", "fairseq"]) == 0
    capsys.readouterr()
    assert cli(["convert", str(label), str(corpus / "hf"), "--to", "hf"]) == 2
    assert "--to fairseq" in capsys.readouterr().err


def prepared(folder: Path, exp: Path, *overrides: str) -> Manifest:
    runner.run(["recipe=fairseq", "stage=prepare", f"data={folder}", f"exp={exp}", *overrides])
    return Manifest(exp / "prepare" / "manifest.arrow")


def test_exported_files_have_the_format_of_fairseq(corpus):
    folder = exported(corpus)
    assert sorted(path.name for path in folder.iterdir()) == [
        "dict.km.txt", "train.km", "train.tsv", "valid.km", "valid.tsv",
    ]  # fmt: skip
    assert (folder / "dict.km.txt").read_text().splitlines() == [f"{unit} 1" for unit in range(100)]
    root, *lines = (folder / "train.tsv").read_bytes().decode().rstrip("\n").split("\n")
    assert root == str(corpus / "audio")
    assert lines == [f"{NAMES[i]}\t{LENGTHS[i]}" for i in (0, 1, 3)]
    labels = LabelStore(corpus / "label")
    assert (folder / "valid.km").read_text().split("\n")[1] == " ".join(map(str, labels[4].tolist()))


def test_round_trip_keeps_the_units(corpus):
    folder = exported(corpus)
    manifest = prepared(folder, corpus / "exp")
    assert manifest.ids() == [f"{SPLITS[i]}/{NAMES[i]}" for i in (0, 1, 3, 2, 4)]
    assert manifest.n_samples.tolist() == [LENGTHS[i] for i in (0, 1, 3, 2, 4)]
    store, before = (
        import_units(manifest, folder, corpus / "back", shard_size=2),
        LabelStore(corpus / "label"),
    )
    store.check(manifest)
    assert store.header.n_units == 100 and store.header.feature == "fairseq"
    for row, i in enumerate((0, 1, 3, 2, 4)):
        assert store[row].tolist() == before[i].tolist()
    again = import_units(manifest, folder, corpus / "back")  # the store is already finished
    assert again.header == store.header


def rewrite(path: Path, number: int, change) -> None:
    """Modify the units in one line."""
    lines = path.read_text().split("\n")
    lines[number] = " ".join(map(str, change(list(map(int, lines[number].split())))))
    path.write_text("\n".join(lines))


def test_every_second_unit_is_taken_at_100_hz(corpus):
    folder = exported(corpus)
    manifest = prepared(folder, corpus / "exp")
    for split, rows in (("train", (0, 1, 3)), ("valid", (2, 4))):
        lines = [np.random.default_rng(i).integers(0, 100, MFCC.n_frames(LENGTHS[i])) for i in rows]
        (folder / f"{split}.km").write_text("".join(" ".join(map(str, line)) + "\n" for line in lines))
    store = import_units(manifest, folder, corpus / "back")
    for row, i in enumerate((0, 1, 3, 2, 4)):
        unit_N = np.random.default_rng(i).integers(0, 100, MFCC.n_frames(LENGTHS[i]))
        assert store[row].tolist() == unit_N[::2].tolist()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "change", [lambda u: u[:-1], lambda u: [*u, 5], lambda u: [x for x in u for _ in "ab"]]
)
def test_frame_mismatch_names_the_utterance(corpus, number, change):
    folder = exported(corpus)
    manifest = prepared(folder, corpus / "exp")
    rewrite(folder / "train.km", number, change)
    with pytest.raises(DataError) as caught:
        import_units(manifest, folder, corpus / "back")
    assert f"utterance {'train/' + NAMES[number]!r} (train.km, line {number + 1}): " in str(caught.value)


def test_mismatched_files_are_rejected(corpus):
    folder = exported(corpus)
    manifest = prepared(folder, corpus / "exp")
    good = {path: path.read_bytes() for path in folder.iterdir()}
    tsv, km, words = folder / "train.tsv", folder / "train.km", folder / "dict.km.txt"

    def assert_rejected(path: Path, content: bytes | None, match: str) -> None:
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(DataError, match=match):
            import_units(manifest, folder, corpus / "back")
        path.write_bytes(good[path])

    assert_rejected(km, None, "train.km")
    for digits in (b"9" * 30, b"9" * 5000):
        assert_rejected(km, good[km].replace(b" ", b" " + digits + b" ", 1), "train.km, line 1.*integers")
        assert_rejected(words, digits + b" 1\n" + good[words], "dict.km.txt")
        assert_rejected(tsv, good[tsv].replace(b"\t8000", b"\t" + digits), "train.tsv, line 3")
    assert_rejected(words, None, "dict.km.txt")
    assert_rejected(words, good[words] * 2, "dict.km.txt.* 199 ")
    assert_rejected(words, good[words] + b"<unk> 1\n", "dict.km.txt.* 0 to 100 ")
    assert_rejected(words, good[words][: good[words].index(b"50 1")], "dict.km.txt has units 0 to 49")
    assert_rejected(km, good[km].replace(b" ", b" x ", 1), "train.km, line 1.*integers")
    assert_rejected(
        km,
        good[km].split(b"\n")[0] + b"\n",
        r"train.km: line 2 \(units of 'train/話者 一/日本語",
    )
    assert_rejected(km, good[km] + b"1 2 3\n", "more lines than train.tsv has utterances")
    assert_rejected(tsv, good[tsv].replace(b"8000", b"8320"), "8320 samples in train.tsv.* 8000")
    assert_rejected(tsv, good[tsv].replace(b"d.wav", b"e.wav").replace("日本語".encode(), b"e"), "is missing")
    assert_rejected(
        tsv, good[tsv].replace(b"\t8000", b" 8000"), r"train.tsv, line 3: expected path<TAB>samples"
    )
    assert len(import_units(manifest, folder, corpus / "back")) == 5


def test_unreadable_audio_is_skipped_together_with_its_units(corpus):
    folder = exported(corpus)
    (corpus / "audio" / NAMES[1]).write_bytes(b"no audio")
    manifest = prepared(folder, corpus / "exp")
    assert manifest.counts["rejected"] == {"unusable audio": 1}
    store = import_units(manifest, folder, corpus / "back")
    assert store[1].tolist() == LabelStore(corpus / "label")[3].tolist()


def test_root_option_finds_moved_audio(corpus):
    folder = exported(corpus)
    os.rename(corpus / "audio", corpus / "moved")
    manifest = prepared(folder, corpus / "exp", f"prepare.options.root={corpus}/moved")
    assert len(manifest) == 5 and Path(manifest[0].audio.path).is_file()


def test_tsv_and_dictionary_are_parsed(tmp_path):
    (tmp_path / "train.tsv").write_bytes("/根\r\na.zip:10:400\t4000\r\n/other/b.wav\t5\r\n".encode())
    one, two = read_tsv(tmp_path / "train.tsv")
    assert one.audio == AudioSource("/根/a.zip", 10, 400) and one.id == "train/a.zip:10:400"
    assert two.audio == AudioSource("/other/b.wav") and two.n_samples == 5
    (tmp_path / "dict.km.txt").write_text("2 90\n0 40\n1 3\n\n")  # the units are sorted by frequency
    assert read_dict(tmp_path / "dict.km.txt") == 3


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (Utterance("u", AudioSource("{}/d.wav"), 160, 8000), "part of its recording"),
        (Utterance("u", AudioSource("{}/d.wav"), 0, 8000), "part of its recording"),
        (Utterance("u", AudioSource("{}/d.tar", 0, 64_044), 0, 32_000), "inside an archive"),
        (Utterance("u", AudioSource("{}/d\t.wav"), 0, 32_000), "has a tab"),
    ],
)
def test_utterances_that_a_tsv_cannot_represent_are_rejected(corpus, item, problem):
    content = (corpus / "audio" / "d.wav").read_bytes()
    for name in ("d.tar", "d\t.wav"):
        (corpus / "audio" / name).write_bytes(content)
    path = item.audio.path.format(corpus / "audio")
    item = Utterance(
        item.id, AudioSource(path, item.audio.offset, item.audio.length), item.start, item.n_samples
    )
    write_manifest(corpus / "part.arrow", [item])
    manifest = Manifest(corpus / "part.arrow")
    n_frames = HUBERT.n_frames(manifest.n_samples)
    header = LabelHeader(3, "mfcc", None, "c" * 64, None, manifest.fingerprint, False)
    writer = LabelWriter(corpus / "part", header, n_frames)
    writer.write(0, [np.zeros(n_frames[0], int)])
    writer.finish()
    with pytest.raises(DataError, match=rf"utterance 'u' .*{problem}"):
        export(manifest, LabelStore(corpus / "part"), corpus / "out")
    assert not (corpus / "out").exists()


def test_imported_units_train(corpus):
    """The test runs the commands in the README of the recipe, with small sizes."""
    folder = exported(corpus)
    settings = [
        f"data={folder}", f"exp={corpus}/exp", "model=tiny", "device=cpu",
        *(f"model.{key}" for key in ("layers=2", "width=24", "heads=2", "ffn=32", "pos_conv_groups=4")),
        "model.conv_dims=[8,8,8,8,8,8,16]", "pretrain.crop.min_seconds=0.2", "pretrain.crop.max_seconds=2",
        "pretrain.train.max_steps=2", "pretrain.train.batch_seconds=4",
        "pretrain.train.valid_every=2", "pretrain.train.precision=fp32",
    ]  # fmt: skip
    runner.run(["recipe=fairseq", "stage=prepare", *settings])
    # The frames are too few to contain every unit.
    with pytest.raises(DataError, match=r"iter1/label: .* \d\d of 100 occur"):
        runner.run(["recipe=fairseq", "stage=label", "label.on_bad_units=error", *settings])
    with pytest.raises(ConfigError, match="iter1/label is not finished"):
        runner.run(["recipe=fairseq", "stage=pretrain", *settings])
    for stage in ("label", "pretrain"):
        runner.run(["recipe=fairseq", f"stage={stage}", *settings])
    assert (corpus / "exp/iter1/pretrain/bundle/model.safetensors").is_file()


def test_units_are_read_again_after_an_error_of_the_file_system(corpus, monkeypatch):
    folder = exported(corpus)
    manifest = prepared(folder, corpus / "exp")
    monkeypatch.setattr(utterances, "_BLOCK", 64)  # the end of a block is within a line
    delays: list[float] = []
    monkeypatch.setattr(utterances.time, "sleep", delays.append)
    failed: dict[str, int] = {}

    def flaky(path, *args):
        name = Path(path).name
        failed[name] = failed.get(name, 0) + 1
        if failed[name] == 2 and name.endswith((".km", ".tsv")):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return open(path, *args)

    monkeypatch.setattr(utterances, "open", flaky, raising=False)
    store = import_units(manifest, folder, corpus / "back")
    expected = LabelStore(corpus / "label")
    order = [Manifest(corpus / "m.arrow").ids().index(id.partition("/")[2]) for id in manifest.ids()]
    assert [store[row].tolist() for row in range(5)] == [expected[row].tolist() for row in order]
    assert delays == [1.0] * 4
