"""Tests of the demo recipe: exact phone times, disjoint splits, and reproducible audio."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("pyopenjtalk")

from jahubert.errors import ConfigError
from jahubert.phonemes import PHONES
from jahubert.train.data.manifest import Utterance
from jahubert.train.experiment import script_processes
from jahubert.train.experiment.registry import recipe_module
from jahubert.train.pipeline.jobs import configure_jobs

demo = recipe_module("demo")
MINUTES = 0.5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, list[Utterance]]:
    work = tmp_path_factory.mktemp("demo")
    return work, list(demo.prepare(None, work, demo.Config(minutes=MINUTES), 3))


def levels(item: Utterance) -> dict[str, list[float]]:
    """Return the level in the middle half of every phone, in dB relative to the whole utterance."""
    wave, rate = soundfile.read(item.audio.path)
    assert rate == 16_000
    assert len(wave) == item.n_samples
    result: dict[str, list[float]] = {}
    for phone in item.alignment:
        quarter = (phone.end - phone.start) // 4
        part = wave[phone.start + quarter : phone.end - quarter]
        result.setdefault(phone.symbol, []).append(10 * np.log10(np.mean(part**2) / np.mean(wave**2) + 1e-12))
    return result


def test_alignment_covers_the_audio_with_the_words_and_pauses(corpus):
    for item in corpus[1]:
        ends = [phone.end for phone in item.alignment]
        assert [phone.start for phone in item.alignment] == [0, *ends[:-1]]
        assert ends[-1] == item.n_samples
        spoken = [phone.symbol for phone in item.alignment if phone.symbol != "pau"]
        assert spoken == [phone for word in item.words for phone in word]
        assert item.alignment[0].symbol == item.alignment[-1].symbol == "pau"


def test_phone_times_match_the_audio(corpus):
    """Silence and closures are quiet, and vowels are loud."""
    all_levels: dict[str, list[float]] = {}
    for item in corpus[1]:
        for symbol, values in levels(item).items():
            all_levels.setdefault(symbol, []).extend(values)
    median = {symbol: float(np.median(values)) for symbol, values in all_levels.items()}
    assert median["pau"] < -18
    assert max(median["q"], median["t"]) < -12
    assert min(median[vowel] for vowel in ("a", "o", "e")) > -3
    assert max(all_levels["pau"]) < -12  # no pause contains speech


def test_frames_per_label_sum_to_the_utterance_length():
    for i, text in enumerate(
        ["昨日、東京で新しいパソコンを買いましょう。", "ヴィクトルさんはピューレを食べます。"]
    ):
        labels = demo._labels(text)[1]
        frames = demo.frames_of(labels)
        for speaker in demo.SPEAKERS[i::2]:
            engine = demo._engine(speaker.frame, speaker.warping)
            engine.add_half_tone(speaker.half_tones)
            assert len(engine.synthesize(labels)) == sum(frames) * speaker.frame


def test_splits_are_disjoint_and_have_the_configured_size(corpus):
    plan = [item for _, item in demo._plan(demo.sentences(0), Path("x"), demo.Config(minutes=6.0), 0)]
    texts: dict[str, set[str]] = {}
    seconds: dict[str, float] = {}
    for item in plan:
        texts.setdefault(item.split, set()).add(item.text)
        seconds[item.split] = seconds.get(item.split, 0) + item.n_samples / 16_000
    assert sum(len(group) for group in texts.values()) == len(plan) == len({item.id for item in plan})
    assert 360 <= sum(seconds.values()) < 375
    assert seconds["test"] == pytest.approx(0.115 * 360, abs=6)
    assert seconds["dev"] == pytest.approx(0.085 * 360, abs=6)
    assert {item.speaker for item in plan} == {speaker.name for speaker in demo.SPEAKERS}
    assert {phone for item in plan for word in item.words for phone in word} == set(PHONES) - {"dy"}


def test_second_run_is_identical_and_keeps_existing_files(corpus, tmp_path):
    work, items = corpus
    files = sorted(path.relative_to(work) for path in work.rglob("*.flac"))
    assert len(files) == len(items)
    lines = [line for line, _ in demo._plan(demo.sentences(3), tmp_path, demo.Config(minutes=MINUTES), 3)]
    for line in lines[:2]:
        demo._write(line, tmp_path)
        assert line.path(tmp_path).read_bytes() == line.path(work).read_bytes()

    stamp = (work / files[1]).stat().st_mtime_ns
    (work / files[0]).unlink()
    again = list(demo.prepare(None, work, demo.Config(minutes=MINUTES), 3))
    assert again == items
    assert soundfile.info(str(work / files[0])).frames > 0
    assert (work / files[1]).stat().st_mtime_ns == stamp


def test_seed_changes_the_corpus():
    first, second = (
        {line.text for line, _ in demo._plan(demo.sentences(seed), Path("x"), demo.Config(minutes=0.5), seed)}
        for seed in (0, 1)
    )
    assert len(first & second) < len(first) / 2


def test_two_processes_write_the_same_audio_as_one(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(script_processes, "_MIN_SHARE", 2)
    lines = [line for line, _ in demo._plan(demo.sentences(3), tmp_path, demo.Config(minutes=MINUTES), 3)][:4]
    monkeypatch.setattr(demo, "_write", lambda *_: pytest.fail("a line was written in this process"))
    script_processes.run_in_processes(Path(demo.__file__), lines, tmp_path, 2, demo._write)
    for line in lines:
        assert line.path(tmp_path).read_bytes() == line.path(corpus[0]).read_bytes()


@pytest.mark.parametrize(
    "options", [{"minutes": 0}, {"dev_share": -0.1}, {"dev_share": 0.5, "test_share": 0.5}]
)
def test_inconsistent_sizes_are_rejected(options, tmp_path):
    with pytest.raises(ConfigError, match="minutes"):
        list(demo.prepare(None, tmp_path, demo.Config(**options), 0))


def test_data_of_a_generated_corpus_is_refused(tmp_path):
    configure_jobs(["recipe=demo", "stage=prepare"])
    with pytest.raises(ConfigError, match=r"data is .*demo"):
        configure_jobs(["recipe=demo", "stage=prepare", f"data={tmp_path}"])
