"""Tests of exports to Kaldi, lhotse and Hugging Face datasets, which are read back where possible."""

from __future__ import annotations

import gzip
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jahubert.audio import AudioSource
from jahubert.cli.main import main as cli
from jahubert.errors import AudioError, ConfigError, DataError
from jahubert.train.data.export import WRITERS, export_corpus
from jahubert.train.data.manifest import Manifest, Utterance, write_manifest
from jahubert.train.experiment.registry import recipe_module

table = recipe_module("table")
RATE = 16_000


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    """Write a manifest with parts of a recording, a 22.05 kHz recording and a tar member, in two splits."""
    (tmp_path / "corpus").mkdir()
    noise = 0.1 * np.random.default_rng(0).standard_normal(3 * RATE)
    for name, rate in (("talk.wav", RATE), ("word.wav", 22_050), ("member.flac", RATE)):
        soundfile.write(tmp_path / "corpus" / name, noise, rate, subtype="PCM_16")
    with tarfile.open(tmp_path / "corpus" / "a.tar", "w") as archive:
        archive.add(tmp_path / "corpus" / "member.flac", "member.flac")
        member = archive.getmember("member.flac")
    with tarfile.open(tmp_path / "corpus" / "a.tar") as archive:
        member = archive.getmember("member.flac")
    talk, word = (AudioSource(str(tmp_path / "corpus" / name)) for name in ("talk.wav", "word.wav"))
    inside = AudioSource(str(tmp_path / "corpus" / "a.tar"), member.offset_data, member.size)
    words = (("ky", "o:"), ("w", "a"))
    items = [
        Utterance("s1-b", talk, 20_000, 10_000, "s1", "今日は", words),
        Utterance("s1-a", talk, 0, 16_000, "s1", "一つ目"),
        Utterance("w/1", word, 0, round(3 * RATE * RATE / 22_050), "s2", "語", split="eval1"),
        Utterance("t1", inside, 0, 3 * RATE, "", "中", split="eval1"),
    ]
    write_manifest(tmp_path / "m.arrow", items)
    return Manifest(tmp_path / "m.arrow")


def read_back(data: Path) -> list[tuple]:
    """Return the utterances that the table recipe reads, without their splits."""
    items = list(table.prepare(data, Path("unused"), table.Config(), 0))
    return sorted((i.id, i.start, i.n_samples, i.speaker, i.text) for i in items)


def expected(manifest: Manifest, split: str) -> list[tuple]:
    items = [manifest[i] for i in manifest.indices(split)]
    return sorted((i.id, i.start, i.n_samples, i.speaker, i.text) for i in items)


def test_kaldi_directories_are_read_back(manifest, tmp_path):
    assert export_corpus(manifest, tmp_path / "kaldi", "kaldi") == {"eval1": 2, "train": 2}
    assert read_back(tmp_path / "kaldi" / "train") == expected(manifest, "train")
    assert len(read_back(tmp_path / "kaldi")) == 4  # the folder can be read as an ESPnet dump
    assert [item[:3] for item in read_back(tmp_path / "kaldi" / "eval1")] == [
        ("s2-w-1", 0, manifest[2].n_samples),
        ("t1", 0, 3 * RATE),
    ]
    folder = tmp_path / "kaldi" / "train"
    assert (folder / "text.phn").read_text() == "s1-b ky o: | w a\n"
    assert (folder / "spk2utt").read_text() == "s1 s1-a s1-b\n"
    assert [line.split()[0] for line in (folder / "segments").read_text().splitlines()] == ["s1-a", "s1-b"]


def test_kaldi_files_are_sorted_by_speaker_too(tmp_path):
    """Sorted by its second column, utt2spk must not change (Kaldi's validate_data_dir.sh)."""
    soundfile.write(tmp_path / "a.wav", np.ones(4 * RATE) / 10, RATE)
    audio = AudioSource(str(tmp_path / "a.wav"))
    speakers = ("spk1", "spk2", "spk10", "spk1-x")
    items = [Utterance(f"{name}_1", audio, i * RATE, RATE, name, "語") for i, name in enumerate(speakers)]
    write_manifest(tmp_path / "m.arrow", items)
    export_corpus(Manifest(tmp_path / "m.arrow"), tmp_path / "kaldi", "kaldi")
    rows = [line.split() for line in (tmp_path / "kaldi/train/utt2spk").read_text().splitlines()]
    assert len(rows) == 4 and rows == sorted(rows, key=lambda row: row[1])


def test_names_that_a_format_cannot_represent_are_reported(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.ones(RATE) / 10, RATE)
    audio = AudioSource(str(tmp_path / "a.wav"))
    items = [Utterance(id, audio, 0, RATE, speaker, "語") for id, speaker in (("A-C", "A"), ("x", "A-B"))]
    write_manifest(tmp_path / "m.arrow", items)
    with pytest.raises(DataError, match="speakers 'A' and 'A-B'"):
        export_corpus(Manifest(tmp_path / "m.arrow"), tmp_path / "kaldi", "kaldi")
    write_manifest(tmp_path / "n.arrow", [replace(items[0], split="a/b")])
    for kind in WRITERS:
        with pytest.raises(DataError, match="split 'a/b'"):
            export_corpus(Manifest(tmp_path / "n.arrow"), tmp_path / kind, kind)


@pytest.mark.parametrize("kind", ["kaldi", "datasets"])
def test_existing_files_are_not_replaced(manifest, tmp_path, kind):
    """The folder of the corpus itself, for example, contains the original recordings."""
    before = {path: path.read_bytes() for path in (tmp_path / "corpus").iterdir()}
    with pytest.raises(ConfigError, match="corpus"):
        export_corpus(manifest, tmp_path / "corpus", kind)
    assert {path: path.read_bytes() for path in (tmp_path / "corpus").iterdir()} == before


@pytest.mark.parametrize("kind", ["kaldi", "datasets"])
def test_failed_export_can_be_repeated(manifest, tmp_path, kind):
    recording = tmp_path / "corpus" / "word.wav"
    content = recording.read_bytes()
    recording.unlink()
    with pytest.raises(AudioError):
        export_corpus(manifest, tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()
    recording.write_bytes(content)
    assert export_corpus(manifest, tmp_path / "out", kind) == {"eval1": 2, "train": 2}


def test_damaged_manifest_is_not_exported(manifest, tmp_path, capsys):
    content = manifest.path.read_bytes()
    manifest.path.write_bytes(content.replace("一つ目".encode(), "二つ目".encode()))
    assert cli(["convert", str(manifest.path), str(tmp_path / "kaldi"), "--to", "kaldi"]) == 2
    assert str(manifest.path) in capsys.readouterr().err and not (tmp_path / "kaldi").exists()


def test_lhotse_cuts_are_read_back(manifest, tmp_path):
    export_corpus(manifest, tmp_path / "lhotse", "lhotse")
    assert read_back(tmp_path / "lhotse" / "cuts_train.jsonl.gz") == expected(manifest, "train")
    assert [item[:3] for item in read_back(tmp_path / "lhotse" / "cuts_eval1.jsonl.gz")] == [
        ("t1", 0, 3 * RATE),
        ("w/1", 0, manifest[2].n_samples),
    ]


def test_lhotse_recordings_of_equal_names_have_different_ids(tmp_path):
    items = []
    for speaker in ("s1", "s2"):
        (tmp_path / speaker).mkdir()
        path = tmp_path / speaker / "001.wav"
        soundfile.write(path, 0.1 * np.ones(RATE), RATE, subtype="PCM_16")
        for start in (0, 8_000):
            items.append(Utterance(f"{speaker}-{start}", AudioSource(str(path)), start, 8_000, speaker, "あ"))
    write_manifest(tmp_path / "m.arrow", items)
    export_corpus(Manifest(tmp_path / "m.arrow"), tmp_path / "lhotse", "lhotse")
    with gzip.open(tmp_path / "lhotse" / "cuts_train.jsonl.gz", "rt", encoding="utf-8") as file:
        cuts = [json.loads(line) for line in file]
    ids = {cut["recording"]["sources"][0]["source"]: cut["recording"]["id"] for cut in cuts}
    assert len(ids) == len(set(ids.values())) == 2
    assert all(cut["supervisions"][0]["recording_id"] == cut["recording"]["id"] for cut in cuts)


def test_datasets_folder_has_one_file_per_utterance(manifest, tmp_path):
    export_corpus(manifest, tmp_path / "hf", "datasets")
    lines = (tmp_path / "hf" / "train" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert records[0] == {
        "file_name": "s1-b.flac", "id": "s1-b", "text": "今日は", "phones": "ky o: | w a", "speaker": "s1",
    }  # fmt: skip
    wav, rate = soundfile.read(tmp_path / "hf" / "train" / "s1-b.flac")
    assert rate == RATE and np.allclose(wav, manifest.load(0).numpy(), atol=1e-4)
    assert soundfile.info(tmp_path / "hf" / "eval1" / "w-1.flac").frames == manifest[2].n_samples


def test_convert_command_exports_a_corpus(manifest, tmp_path, capsys):
    for kind, path in (("kaldi", "train/segments"), ("lhotse", "cuts_train.jsonl.gz"), ("datasets", "train")):
        assert cli(["convert", str(manifest.path), str(tmp_path / kind), "--to", kind]) == 0
        assert (tmp_path / kind / path).exists()
        assert "eval1: 2 utterances" in capsys.readouterr().out
    assert cli(["convert", str(manifest.path), str(tmp_path / "x"), "--to", "hf"]) == 2


def test_unrepresentable_utterances_are_rejected(tmp_path):
    wav = np.zeros((RATE, 2))
    soundfile.write(tmp_path / "stereo.wav", wav, RATE)
    write_manifest(
        tmp_path / "m.arrow", [Utterance("a b", AudioSource(str(tmp_path / "stereo.wav")), 0, RATE)]
    )
    manifest = Manifest(tmp_path / "m.arrow")
    with pytest.raises(DataError, match=r"'a b'.*white space"):
        export_corpus(manifest, tmp_path / "k", "kaldi")
    export_corpus(manifest, tmp_path / "l", "lhotse")  # mixes the channels down to one
    assert soundfile.info(tmp_path / "l" / "audio" / "train" / "a b.flac").channels == 1
    with pytest.raises(DataError, match="espnet"):
        export_corpus(manifest, tmp_path / "x", "espnet")


def test_ids_that_become_one_file_name_are_rejected(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE), 8000)
    audio = AudioSource(str(tmp_path / "a.wav"))
    write_manifest(tmp_path / "m.arrow", [Utterance(id, audio, 0, RATE) for id in ("w/1", "w-1")])
    for kind in ("kaldi", "lhotse", "datasets"):
        with pytest.raises(DataError, match="'w-1'"):
            export_corpus(Manifest(tmp_path / "m.arrow"), tmp_path / kind, kind)


def with_audio(manifest: Manifest, split: str) -> dict[str, tuple]:
    """Return the speaker and the samples of the utterances of a split, keyed by text."""
    return {
        manifest[i].text: (manifest[i].speaker, manifest.load(i).numpy()) for i in manifest.indices(split)
    }


def assert_equal(actual: dict[str, tuple], expected: dict[str, tuple]) -> None:
    assert actual.keys() == expected.keys()
    for text, (speaker, wav_T) in expected.items():
        assert actual[text][0] == speaker
        assert actual[text][1].shape == wav_T.shape and np.allclose(actual[text][1], wav_T, atol=1e-4)


@pytest.mark.parametrize("split", ["train", "eval1"])
def test_lhotse_reads_the_same_utterances(manifest, tmp_path, split):
    lhotse = pytest.importorskip("lhotse")
    kaldi = pytest.importorskip("lhotse.kaldi")
    expected = with_audio(manifest, split)
    export_corpus(manifest, tmp_path / "lhotse", "lhotse")
    cuts = lhotse.load_manifest(tmp_path / "lhotse" / f"cuts_{split}.jsonl.gz")
    lhotse.validate(cuts)
    actual = {}
    for cut in cuts:
        (supervision,) = cut.supervisions
        actual[supervision.text] = (supervision.speaker or "", cut.load_audio()[0])
    assert_equal(actual, expected)
    export_corpus(manifest, tmp_path / "kaldi", "kaldi")
    recordings, segments, _ = kaldi.load_kaldi_data_dir(tmp_path / "kaldi" / split, sampling_rate=RATE)
    actual = {}
    for segment in segments:
        recording = recordings[segment.recording_id]
        wav_T = recording.load_audio(offset=segment.start, duration=segment.duration)[0]
        speaker = "" if segment.speaker == segment.id else segment.speaker  # in Kaldi, speakers are required
        actual[segment.text] = (speaker, wav_T)
    assert_equal(actual, expected)


def test_datasets_reads_the_same_utterances(manifest, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    if int(datasets.__version__.split(".")[0]) >= 4:
        pytest.importorskip("torchcodec", reason="datasets 4 and later cannot build audio folders without it")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    export_corpus(manifest, tmp_path / "hf", "datasets")
    for split in ("train", "eval1"):
        loaded = datasets.load_dataset(
            "audiofolder", data_dir=str(tmp_path / "hf" / split), cache_dir=str(tmp_path / "cache" / split)
        )
        (rows,) = loaded.cast_column("audio", datasets.Audio(decode=False)).values()
        actual = {}
        for row in rows:
            wav_T, rate = soundfile.read(row["audio"]["path"], dtype="float32")
            assert rate == RATE
            actual[row["text"]] = (row["speaker"] or "", wav_T)
        assert_equal(actual, with_audio(manifest, split))
