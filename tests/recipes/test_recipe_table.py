"""Tests of the table recipe: all kinds of input, malformed input, splits, and long recordings."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from fixtures.shims import SMALL
from fixtures.sounds import syllables

from jahubert import run
from jahubert.audio import AudioSource
from jahubert.errors import ConfigError, DataError
from jahubert.formats.bundle import save_bundle
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.train.data.manifest import Manifest, Rejected, Utterance, write_manifest
from jahubert.train.experiment.registry import recipe_module
from jahubert.train.pipeline.jobs import configure_jobs

table = recipe_module("table")
RATE = 16_000
TEXTS = ("今日は晴れです", "明日は雨", "駅へ行く", "水を飲む", "本を読む")
SPLITS = ("train", "train", "train", "dev", "test")


def recordings() -> list[dict]:
    """Return 100 recordings by 10 speakers with unique file names."""
    return [
        {"id": f"s{i % 10}-{i:03d}", "speaker": f"s{i % 10}", "text": TEXTS[i % 5], "split": SPLITS[i % 5]}
        for i in range(100)
    ]


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audio")
    for i, item in enumerate(recordings()):
        path = folder / item["speaker"] / f"{item['id']}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, 0.1 * np.random.default_rng(i).standard_normal(4000 + 16 * i), RATE)
    return folder


def path_of(audio: Path, item: dict) -> Path:
    return audio / item["speaker"] / f"{item['id']}.wav"


def write_delimited(root: Path, audio: Path, suffix: str, encoding: str = "utf-8") -> Path:
    mark = {".csv": ",", ".tsv": "\t"}[suffix]
    lines = [mark.join(("path", "sentence", "speaker", "split"))]
    lines += [mark.join((str(path_of(audio, r)), r["text"], r["speaker"], r["split"])) for r in recordings()]
    (root / f"corpus{suffix}").write_text("\n".join(lines) + "\n", encoding=encoding)
    return root / f"corpus{suffix}"


def write_jsonl(root: Path, audio: Path) -> Path:
    rows = [r | {"audio_filepath": str(path_of(audio, r))} for r in recordings()]
    (root / "a.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return root / "a.jsonl"


def write_parquet(root: Path, audio: Path) -> Path:
    rows = [r | {"audio": {"path": str(path_of(audio, r)), "bytes": None}} for r in recordings()]
    pq.write_table(pa.Table.from_pylist(rows), root / "a.parquet")
    return root / "a.parquet"


def write_common_voice(root: Path, audio: Path) -> Path:
    (root / "cv" / "clips").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        lines = ["client_id\tpath\tsentence\tup_votes"]
        for r in recordings():
            if r["split"] == split:
                (root / "cv" / "clips" / f"{r['id']}.wav").symlink_to(path_of(audio, r))
                lines.append(f"{r['speaker']}\t{r['id']}.wav\t{r['text']}\t2")
        (root / "cv" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root / "cv"


def write_kaldi(folder: Path, audio: Path, rows: list[dict], segments: bool = False) -> Path:
    folder.mkdir(parents=True)
    recording = "rec-{}" if segments else "{}"
    scp = [f"{recording.format(r['id'])} {path_of(audio, r)}" for r in rows]
    (folder / "wav.scp").write_text("\n".join(scp) + "\n")
    (folder / "text").write_text("".join(f"{r['id']} {r['text']}\n" for r in rows), encoding="utf-8")
    (folder / "utt2spk").write_text("".join(f"{r['id']} {r['speaker']}\n" for r in rows))
    if segments:
        lengths = [soundfile.info(path_of(audio, r)).frames / RATE for r in rows]
        lines = [f"{r['id']} rec-{r['id']} 0.00 {n:.4f}" for r, n in zip(rows, lengths, strict=True)]
        (folder / "segments").write_text("\n".join(lines) + "\n")
    return folder


def write_espnet(root: Path, audio: Path, segments: bool = False) -> Path:
    for split in ("train", "dev", "test"):
        rows = [r for r in recordings() if r["split"] == split]
        write_kaldi(root / "dump" / "raw" / split, audio, rows, segments)
    return root / "dump"


def write_cuts(root: Path, audio: Path) -> Path:
    cuts = []
    for r in recordings():
        path = path_of(audio, r)
        length = soundfile.info(path).frames / RATE
        source = {"type": "file", "channels": [0], "source": str(path)}
        recording = {"id": r["id"], "sources": [source], "sampling_rate": RATE, "duration": length}
        supervision = {"id": r["id"], "text": r["text"], "speaker": r["speaker"]}
        cut = {"id": r["id"], "start": 0.0, "duration": length, "channel": 0, "type": "MonoCut"}
        cut |= {"supervisions": [supervision], "recording": recording, "custom": {"split": r["split"]}}
        cuts.append(json.dumps(cut, ensure_ascii=False))
    with gzip.open(root / "cuts.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(cuts) + "\n")
    return root / "cuts.jsonl.gz"


def prepared(data: Path | None, **options) -> tuple[list[Utterance], list[Rejected]]:
    items = list(table.prepare(data, Path("unused"), table.Config(**options), 0))
    return [i for i in items if isinstance(i, Utterance)], [i for i in items if isinstance(i, Rejected)]


def content(items: list[Utterance]) -> list[tuple]:
    return [(i.id, i.start, i.n_samples, i.speaker, i.text, i.split) for i in items]


KINDS = {
    "csv": lambda root, audio: write_delimited(root, audio, ".csv"),
    "tsv with a byte order mark": lambda root, audio: write_delimited(root, audio, ".tsv", "utf-8-sig"),
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "Common Voice": write_common_voice,
    "ESPnet": write_espnet,
    "ESPnet with segments": lambda root, audio: write_espnet(root, audio, segments=True),
    "lhotse": write_cuts,
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_input_kinds_yield_the_same_utterances(tmp_path, audio, kind):
    items, rejected = prepared(KINDS[kind](tmp_path, audio))
    assert not rejected
    expected = [
        (r["id"], 0, 4000 + 16 * i, r["speaker"], r["text"], r["split"]) for i, r in enumerate(recordings())
    ]
    assert content(items) == sorted(expected)
    real = [replace(i, audio=AudioSource(os.path.realpath(i.audio.path))) for i in items]
    reference = [
        Utterance(id, AudioSource(str(audio / speaker / f"{id}.wav")), *times, speaker, text, split=split)
        for id, *times, speaker, text, split in sorted(expected)
    ]
    write_manifest(tmp_path / "manifest.arrow", real)
    write_manifest(tmp_path / "reference.arrow", reference)
    manifests = [Manifest(tmp_path / f"{name}.arrow") for name in ("manifest", "reference")]
    assert manifests[0].fingerprint == manifests[1].fingerprint


def test_inputs_without_splits_yield_the_same_utterances(tmp_path, audio):
    """For Kaldi data directories and folders with .txt or .lab files, speakers are assigned to splits."""
    kaldi, rejected = prepared(write_kaldi(tmp_path / "kaldi", audio, recordings()))
    assert not rejected and len(kaldi) == 100
    folder = tmp_path / "folder"
    for i, r in enumerate(recordings()):
        path = folder / r["speaker"] / f"{r['id']}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(path_of(audio, r))
        path.with_suffix(".txt" if i % 2 else ".lab").write_text(r["text"] + "\n", encoding="utf-8")
    assert content(prepared(folder)[0]) == content(kaldi)
    splits = {split: {i.speaker for i in kaldi if i.split == split} for split in ("train", "dev", "test")}
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [8, 1, 1]
    assert not splits["train"] & splits["dev"] and not splits["train"] & splits["test"]


def test_folders_named_after_splits_are_not_speakers(tmp_path, audio):
    for split in ("train", "valid", "test"):
        for r in recordings()[:2]:
            path = tmp_path / "data" / split / f"{split}-speaker" / "session" / f"{split}-{r['id']}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(path_of(audio, r))
    items, _ = prepared(tmp_path / "data")
    assert {(i.speaker, i.split) for i in items} == {
        ("train-speaker", "train"),
        ("valid-speaker", "dev"),
        ("test-speaker", "test"),
    }


def test_sessions_of_a_speaker_are_not_separate_speakers(tmp_path, audio):
    for i, r in enumerate(recordings()[:20]):
        path = tmp_path / "data" / f"speaker{i % 10}" / f"session{i // 10}" / f"{r['id']}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(path_of(audio, r))
    items, _ = prepared(tmp_path / "data")
    assert len({i.speaker for i in items}) == 10
    splits_of = {(i.speaker, i.split) for i in items}
    assert len(splits_of) == 10 and {split for _, split in splits_of} == {"train", "dev", "test"}


def test_single_folder_with_subfolders_is_reported(tmp_path, audio, caplog):
    for i, r in enumerate(recordings()[:4]):
        path = tmp_path / "data" / "wav" / f"speaker{i}" / f"{r['id']}.wav"
        path.parent.mkdir(parents=True)
        path.symlink_to(path_of(audio, r))
    prepared(tmp_path / "data")
    assert "data/wav" in caplog.text


def test_label_files_with_times_are_not_transcripts(tmp_path, audio):
    shutil.copy(path_of(audio, recordings()[0]), tmp_path / "a.wav")
    shutil.copy(path_of(audio, recordings()[1]), tmp_path / "b.wav")
    write(tmp_path / "a.lab", ["0 3125000 silB", "3125000 4000000 k"])
    write(tmp_path / "b.lab", ["3 4 人が来た"])
    items, rejected = prepared(tmp_path, max_rejected=1.0)
    assert [i.id for i in rejected] == [str(tmp_path / "a.wav")] and "times" in rejected[0].reason
    assert [i.text for i in items] == ["3 4 人が来た"]


def test_names_of_espnet_folders_determine_the_split(tmp_path, audio):
    folders = ["train_nodup", "tr_no_dev", "train_dev", "dev_clean", "eval1", "test_clean"]
    for i, name in enumerate(folders):
        write_kaldi(tmp_path / "dump" / "raw" / name, audio, recordings()[2 * i : 2 * i + 2])
    items, _ = prepared(tmp_path / "dump")
    of = {item.id: item.split for item in items}
    splits = [of[r["id"]] for r in recordings()[:12:2]]
    assert splits == ["train", "train", "dev", "dev", "eval1", "test_clean"]


def test_missing_training_split_is_reported(tmp_path, audio, caplog):
    write_kaldi(tmp_path / "dump" / "raw" / "eval1", audio, recordings()[:2])
    prepared(tmp_path / "dump")
    assert "split train" in caplog.text


def test_end_of_minus_one_in_kaldi_segments_is_the_end_of_the_recording(tmp_path, audio):
    write_kaldi(tmp_path / "kaldi", audio, recordings()[:1])
    id = recordings()[0]["id"]
    write(tmp_path / "kaldi" / "segments", [f"{id}-part {id} 0.1 -1.00"])
    items, _ = prepared(tmp_path / "kaldi", max_rejected=1.0)
    assert [(i.id, i.start, i.n_samples) for i in items] == [(f"{id}-part", 1600, 4000 - 1600)]


def cut(audio: Path, channels: list[int], channel: int | list[int], **supervision) -> dict:
    source = {"type": "file", "channels": channels, "source": str(audio)}
    recording = {"id": "r", "sources": [source], "sampling_rate": RATE, "duration": 2.0}
    one = {"id": "s", "text": "語", "speaker": "x", **supervision}
    return {
        "id": f"{audio.stem}-{channel}",
        "start": 0.5,
        "duration": 1.0,
        "channel": channel,
        "supervisions": [one],
        "recording": recording,
    }


def test_cuts_of_one_channel_of_several_are_rejected(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full((2 * RATE, 2), 0.1), RATE)
    cuts = [cut(tmp_path / "a.wav", [0, 1], channel) for channel in (0, 1, [0, 1])]
    items, rejected = prepared(write(tmp_path / "c.jsonl", list(map(json.dumps, cuts))), max_rejected=1.0)
    assert [i.id for i in items] == ["a-[0, 1]"] and [i.id for i in rejected] == ["a-0", "a-1"]
    assert all("channel" in i.reason for i in rejected)


def test_times_of_a_supervision_are_relative_to_its_cut(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(2 * RATE, 0.1), RATE)
    times = [{"start": 0.25, "duration": 0.5}, {"start": -0.25, "duration": 9.0}, {}]
    cuts = [cut(tmp_path / "a.wav", [0], 0, **one) | {"id": str(i)} for i, one in enumerate(times)]
    items, _ = prepared(write(tmp_path / "c.jsonl", list(map(json.dumps, cuts))))
    assert [(i.start, i.n_samples) for i in items] == [(12_000, 8000), (8000, 16_000), (8000, 16_000)]


def write_validated(root: Path, audio: Path, speakers: list[str]) -> Path:
    """Write a Common Voice release with only validated.tsv."""
    (root / "clips").mkdir(parents=True)
    lines = ["client_id\tpath\tsentence"]
    for r, speaker in zip(recordings(), speakers, strict=True):
        (root / "clips" / f"{r['id']}.wav").symlink_to(path_of(audio, r))
        lines.append(f"{speaker}\t{r['id']}.wav\t{r['text']}")
    write(root / "validated.tsv", lines)
    return root


@pytest.mark.parametrize("seed", range(6))
def test_common_voice_is_split_by_speaker_and_the_largest_speaker_stays_in_training(tmp_path, audio, seed):
    speakers = ["large"] * 40 + [f"s{i % 12}" for i in range(50)] + [""] * 10  # the last ten are unknown
    release = write_validated(tmp_path / "cv", audio, speakers)
    items = [i for i in table.prepare(release, tmp_path, table.Config(), seed) if isinstance(i, Utterance)]
    of = {split: [i.speaker for i in items if i.split == split] for split in ("train", "dev", "test")}
    assert len(items) == 100 and "large" in of["train"]
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not set(of[one]) & set(of[other])
    assert 10 <= len(of["dev"]) <= 20 and 10 <= len(of["test"]) <= 20


def test_speakers_in_training_and_test_are_reported(tmp_path, audio, caplog):
    lines = ["path,speaker,split", *(f"{path_of(audio, r)},same,{r['split']}" for r in recordings())]
    prepared(write(tmp_path / "a.csv", lines))
    assert "unseen speakers" in caplog.text


def test_few_speakers_are_split_by_utterance(tmp_path, audio, caplog):
    rows = [r for r in recordings() if r["speaker"] in ("s0", "s1")]
    items, _ = prepared(write_kaldi(tmp_path / "kaldi", audio, rows))
    assert sorted({i.split for i in items}) == ["dev", "test", "train"]
    assert "unseen speakers" in caplog.text


def test_missing_dev_split_is_taken_from_training_speakers(tmp_path, audio):
    lines = ["path,speaker,split"]
    for r in recordings():
        lines.append(f"{path_of(audio, r)},{r['speaker']},{'test' if r['speaker'] == 's0' else 'train'}")
    items, _ = prepared(write(tmp_path / "a.csv", lines))
    speakers = {split: {i.speaker for i in items if i.split == split} for split in ("train", "dev", "test")}
    assert speakers["test"] == {"s0"} and len(speakers["dev"]) == 1 and len(speakers["train"]) == 8
    assert not speakers["dev"] & speakers["train"]
    lines = [line.replace(",test", ",eval1") for line in lines]  # the test set has another name
    assert {i.split for i in prepared(write(tmp_path / "b.csv", lines))[0]} == {"train", "dev", "eval1"}


def test_folder_with_unusual_entries_is_read_or_named(tmp_path, audio, caplog):
    data = tmp_path / "data"
    for speaker in ("a", "b", "c", "d"):
        (data / speaker).mkdir(parents=True)
        for r in recordings()[:3]:
            shutil.copy(path_of(audio, r), data / speaker / f"{r['id']}.WAV")
    for name in ("._a.wav", "__MACOSX/a.wav", "notes.txt"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text("no audio")
    soundfile.write(data / "a" / "b.aiff", np.zeros(RATE), RATE)
    (data / "folder.wav").mkdir()
    os.mkfifo(data / "pipe.wav")
    (data / "dangling.wav").symlink_to("nowhere")
    shutil.copy(data / "a" / "b.aiff", data / os.fsdecode(b"bad\xff.wav"))
    command = ["recipe=table", "stage=prepare", f"data={data}", f"exp={tmp_path / 'exp'}"]
    assert run.main(command) == 0
    manifest = Manifest(tmp_path / "exp" / "prepare" / "manifest.arrow")
    assert len(manifest) == 13 and "b" in {manifest[row].id.rpartition("/")[2] for row in range(13)}
    lines = (tmp_path / "exp" / "prepare" / "rejected.jsonl").read_text().splitlines()
    ids = {Path(json.loads(line)["id"]).stem for line in lines}
    assert ids == {"dangling", os.fsdecode(b"bad\xff")}


def test_audio_inside_parquet_is_extracted(tmp_path, audio):
    rows = [
        {"audio": {"bytes": path_of(audio, r).read_bytes(), "path": f"{r['id']}.wav"}, "text": r["text"]}
        for r in recordings()[:5]
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub.parquet")
    items = list(table.prepare(tmp_path / "hub.parquet", tmp_path / "work", table.Config(), 0))
    assert [(i.id, i.n_samples, i.text) for i in items] == [
        (f"{n + 1:07d}-{r['id']}", 4000 + 16 * n, r["text"]) for n, r in enumerate(recordings()[:5])
    ]
    assert {Path(i.audio.path).parent for i in items} == {tmp_path / "work" / "audio" / "hub"}


def write(path: Path, lines: list[str], encoding: str = "utf-8") -> Path:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def test_malformed_rows_are_rejected_with_their_line(tmp_path, audio):
    good = path_of(audio, recordings()[0])
    lines = ["path,text,start,end,id", f"{good},良い,,,good", f"{good},二度,,,good", "none.wav,無い,,,none"]
    lines += [
        f"{good},逆,0.2,0.1,reversed",
        f"{good},数,x,0.1,number",
        f"{good},長い,0,99,late",
        ",無名,,,empty",
    ]
    lines += [f"{good},多い,,,many,fields", f"{good},部分,0.05,0.15,part"]
    items, rejected = prepared(write(tmp_path / "a.csv", lines), max_rejected=1.0)
    assert [(i.id, i.start, i.n_samples) for i in items] == [("good", 0, 4000), ("part", 800, 1600)]
    details = {item.reason: item.detail for item in rejected}
    for reason, line in {
        "duplicate id": 3,
        "audio file not found": 4,
        "negative start, or end not after start": 5,
        "invalid time": 6,
        "time after the end of the audio": 7,
        "no audio path": 8,
        "malformed line": 9,
    }.items():
        assert f"a.csv:{line}" in details.pop(reason), reason
    assert not details


def test_negative_start_without_an_end_is_rejected(tmp_path, audio):
    lines = ["path,text,start,end", f"{path_of(audio, recordings()[0])},負,-1,"]
    lines += [f"{path_of(audio, r)},良い,," for r in recordings()[1:3]]
    _, rejected = prepared(write(tmp_path / "a.csv", lines), max_rejected=1.0)
    assert ["start -1 s" in item.detail and "None" not in item.detail for item in rejected] == [True]


@pytest.mark.parametrize(
    ("name", "lines", "encoding", "problem"),
    [
        (
            "a.csv",
            ["sentence,speaker", "今日,s"],
            "utf-8",
            r"a.csv:2: no column with the audio.*sentence, speaker",
        ),
        ("a.tsv", ["path\tsentence", "a.wav\t今日"], "cp932", r"a.tsv:2: not UTF-8.*Shift_JIS"),
        ("a.json", ["[", '{"audio": "a.wav"}]'], "utf-8", r"a.json:1: .*one object per line"),
        ("a.xlsx", ["path"], "utf-8", r"a.xlsx.*\.csv"),
        ("a.parquet", ["path"], "utf-8", r"a.parquet.*parquet"),
    ],
)
def test_malformed_files_are_reported(tmp_path, name, lines, encoding, problem):
    with pytest.raises(DataError, match=problem):
        prepared(write(tmp_path / name, lines, encoding))


def test_missing_input_is_reported(tmp_path):
    with pytest.raises(DataError, match="data="):
        prepared(None)
    with pytest.raises(DataError, match=r"none.*not found"):
        prepared(tmp_path / "none")
    with pytest.raises(DataError, match="no audio found"):
        prepared(tmp_path)
    for options in ({"dev_share": 0.0}, {"dev_share": 0.6, "test_share": 0.4}, {"max_seconds": 0.1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            table.Config(**options)


def test_kaldi_commands_and_archives_are_rejected(tmp_path, audio):
    good = path_of(audio, recordings()[0])
    (tmp_path / "wav.scp").write_text(f"a {good}\nb sox x.wav -t wav - |\nc raw.ark:123\n")
    items, rejected = prepared(tmp_path, max_rejected=1.0)
    assert [item.id for item in items] == ["a"] and [item.id for item in rejected] == ["b", "c"]
    assert "wav.scp:2" in rejected[0].detail and "wav.scp:3" in rejected[1].detail


def test_kana_become_words(tmp_path, audio):
    good = path_of(audio, recordings()[0])
    lines = ["path\tid\tkana", f"{good}\ta\tきょう わ", f"{good}\tb\t漢字"]
    items, rejected = prepared(write(tmp_path / "a.tsv", lines))
    assert items[0].words == (("ky", "o:"), ("w", "a")) and items[0].text == "きょう わ"
    assert [item.reason for item in rejected] == ["invalid kana"]


def test_long_recordings_are_cut_at_pauses(tmp_path):
    """The recording has six bursts of 3 s with pauses of 0.5 s. With a text, it is rejected and not cut."""
    noise = np.random.default_rng(0).standard_normal(3 * RATE) * 0.1
    wav = np.concatenate([part for _ in range(6) for part in (noise, np.zeros(RATE // 2))])
    soundfile.write(tmp_path / "long.wav", wav, RATE)
    items, rejected = prepared(write(tmp_path / "a.csv", ["path", "long.wav"]), max_seconds=8.0)
    assert not rejected and len(items) == 3
    assert [i.start for i in items] == [0, *(i.start + i.n_samples for i in items[:-1])]
    assert items[-1].start + items[-1].n_samples == len(wav)
    for item in items[1:]:
        assert 3 * RATE < item.start % (3.5 * RATE) < 3.5 * RATE  # the cut is within a pause
    soundfile.write(tmp_path / "short.wav", wav[: 2 * RATE], RATE)
    lines = ["path,text", "long.wav,長い", "short.wav,短い"]
    items, rejected = prepared(write(tmp_path / "b.csv", lines), max_seconds=8.0)
    assert [item.id for item in items] == ["short"]
    assert [item.reason for item in rejected] == ["text for a recording longer than max_seconds"]


@pytest.mark.parametrize("vocabulary", ["kana", "characters"])
def test_one_command_runs_from_a_table_to_a_score(tmp_path, capsys, caplog, vocabulary):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    lines = ["path,text,speaker"]
    for i in range(12):
        wav = 0.1 * np.random.default_rng(i).standard_normal(2 * RATE)
        soundfile.write(tmp_path / f"{i}.wav", wav, RATE)
        lines.append(f"{i}.wav,{TEXTS[i % 5]},s{i % 4}")
    data = write(tmp_path / "my.csv", lines)
    sizes = {"width": 16, "layers": 2, "heads": 2, "ffn": 16, "pos_conv_kernel": 8, "pos_conv_groups": 2}
    save_bundle(tmp_path / "hubert", model=HubertModel(HubertConfig(conv_dims=(8,) * 7, **sizes)))
    capsys.readouterr()
    command = ["recipe=table", f"data={data}", "stage=all", f"pretrained={tmp_path / 'hubert'}"]
    command += [f"exp={tmp_path / 'exp'}", f"vocabulary={vocabulary}", "device=cpu", "decode.beam=2"]
    train = {"max_steps": 2, "batch_seconds": 20, "valid_every": 1, "precision": "fp32"}
    command += [f"finetune.train.{name}={value}" for name, value in train.items()]
    command += ["finetune.head_only_steps=1", "score.samples=10"]
    assert run.main(command) == 0, capsys.readouterr().err
    assert "Recognition on test" in capsys.readouterr().out
    assert "table test:" in caplog.text
    manifest = Manifest(tmp_path / "exp/prepare/manifest.arrow")
    assert len(manifest) == 12 and set(manifest.counts["splits"]) == {"train", "dev", "test"}
    assert (
        json.loads((tmp_path / "exp/systems/main/score/scores.json").read_text())["test"]["utterances"] == 3
    )


def test_single_words_are_long_enough_for_pretraining(tmp_path, capsys, caplog):
    """Words of 0.8 s are used, and a word of 0.3 s is skipped. The stage fails if all words are too short."""
    caplog.set_level(logging.INFO)
    lines = ["path,kana,split"]
    for i in range(20):
        wav_T = syllables(0.3 if i == 0 else 0.8, seed=i)
        soundfile.write(tmp_path / f"{i}.wav", wav_T.numpy(), RATE)
        lines.append(f"{i}.wav,おと,{SPLITS[i % 5]}")
    small = [setting for setting in SMALL if "min_seconds" not in setting]
    command = ["recipe=table", f"data={write(tmp_path / 'words.csv', lines)}", "iterations=2", *small]
    command.append(f"exp={tmp_path / 'exp'}")
    for stage in ("prepare", "features", "kmeans", "label", "pretrain"):
        assert run.main([*command, f"stage={stage}"]) == 0
    assert (tmp_path / "exp/iter1/pretrain/bundle/model.safetensors").is_file()
    assert ": 1 of 12" in caplog.text
    too_long = ["pretrain.crop.min_seconds=1", f"exp={tmp_path / 'other'}"]
    too_long += [f"pretrain.{name}={tmp_path / 'exp'}/{path}" for name, path in (
        ("manifest", "prepare/manifest.arrow"), ("labels", "iter1/label"),
    )]  # fmt: skip
    assert run.main([*command, "stage=pretrain", *too_long]) == 2
    error = capsys.readouterr().err
    assert "min_seconds" in error and "0.80 s" in error and "Traceback" not in error


def test_machine_preset_keeps_the_minimum_length_of_the_recipe():
    (job,) = configure_jobs(["recipe=table", "stage=pretrain", "iterations=2", "machine=laptop"])
    assert job.config.crop.min_seconds == 0.5 and job.config.crop.max_seconds == 7.5
