"""Tests of the languages recipe: training splits by language and duration, and the compared systems."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jahubert.errors import ConfigError, DataError
from jahubert.train.data.manifest import Rejected, Utterance
from jahubert.train.experiment import provenance
from jahubert.train.experiment.registry import recipe_module
from jahubert.train.pipeline.compose import compose
from jahubert.train.pipeline.jobs import configure_jobs
from jahubert.train.stages import finetune
from jahubert.train.trainer.optim import TrainConfig

languages = recipe_module("languages")
compare = recipe_module("languages", "compare")
RATE = 16_000
KANA = "かきくけこさしすせそ"
CLIPS = languages.Clips(test_speakers=2, dev_speakers=2, speeds=())


def tone(hz: float) -> np.ndarray:
    return 0.2 * np.sin(2 * np.pi * hz * np.arange(RATE) / RATE)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> tuple[Path, Path]:
    """Write five sentences by each of ten speakers, and thirty recordings without text."""
    japanese, other = tmp_path_factory.mktemp("japanese"), tmp_path_factory.mktemp("other")
    lines = ["file\ttext\tspeaker"]
    for speaker in range(10):
        for number in range(5):
            name = f"{speaker}-{number}.wav"
            soundfile.write(japanese / name, tone(100 + 20 * speaker + number), RATE)
            lines.append(f"{name}\t{KANA[speaker]}{KANA[number]}\tspeaker{speaker}")
    (japanese / "transcripts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = ["file\tlanguage\tspeaker"]
    for number in range(30):
        soundfile.write(other / f"o{number}.wav", tone(400 + number), RATE)
        lines.append(f"o{number}.wav\tfr\tother{max(0, number - 5)}")
    (other / "clips.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return japanese, other


def prepare(corpora: tuple[Path, Path], work: Path, **options) -> list[Utterance | Rejected]:
    config = languages.Config(other_languages=str(corpora[1]), clips=CLIPS, **options)
    return list(languages.prepare(corpora[0], work, config, 0))


def test_training_splits_differ_and_test_splits_agree(corpora, tmp_path):
    splits = {}
    for language in ("japanese", "other"):
        items = prepare(corpora, tmp_path, language=language, minutes=0.3)
        for item in items:
            if isinstance(item, Utterance):
                splits.setdefault((language, item.split), set()).add(item.id)
        assert {item.split for item in items if isinstance(item, Utterance)} == {"train", "dev_cv", "test_cv"}
    for split in ("dev_cv", "test_cv"):
        assert len(splits["japanese", split]) == 10
        assert splits["japanese", split] == splits["other", split]
    assert all(id.startswith("cv") for id in splits["japanese", "train"])
    assert all(id.startswith("other") for id in splits["other", "train"])
    assert len(splits["japanese", "train"]) == len(splits["other", "train"]) == 18  # 0.3 minutes


def test_utterances_beyond_the_duration_are_rejected_with_a_reason(corpora, tmp_path):
    items = prepare(corpora, tmp_path, language="other", minutes=0.3)
    assert sum(isinstance(item, Rejected) for item in items) == 30 - 18


def test_only_the_speakers_with_the_longest_recordings_are_used(corpora, tmp_path):
    items = prepare(corpora, tmp_path, language="other", minutes=0.1, speakers=1)
    train = [item for item in items if isinstance(item, Utterance) and item.split == "train"]
    assert {item.speaker for item in train} == {"other0"} and len(train) == 6
    with pytest.raises(DataError, match="minutes"):
        prepare(corpora, tmp_path, language="other", minutes=0.2, speakers=1)


def test_pretraining_and_finetuning_groups_have_no_common_speakers(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(languages, "_LONGEST_MINUTES", 0.1)
    speakers = {}
    for group in ("all", "pretraining", "finetuning"):
        items = prepare(corpora, tmp_path, minutes=0.2, group=group)
        used = [item for item in items if isinstance(item, Utterance)]
        speakers[group] = {item.speaker for item in used if item.split == "train"}
        assert {item.split for item in used} == {"train", "dev_cv", "test_cv"}
    assert len(speakers["pretraining"]) == len(speakers["finetuning"]) == 3
    assert not speakers["pretraining"] & speakers["finetuning"]
    monkeypatch.setattr(languages, "_LONGEST_MINUTES", 0.01)
    with pytest.raises(DataError, match=r"0\.0 minutes"):
        prepare(corpora, tmp_path, minutes=0.2, group="finetuning")


def test_too_little_audio_and_wrong_options_are_reported(corpora, tmp_path):
    with pytest.raises(DataError, match=r"0\.5 minutes.*minutes=5"):
        prepare(corpora, tmp_path, language="other", minutes=5)
    with pytest.raises(ConfigError, match="language"):
        languages.Config(language="english")
    with pytest.raises(ConfigError, match="other_languages"):
        languages.Config(language="other")
    for options in ({"speakers": 3}, {"language": "other", "other_languages": "folder", "speakers": 0}):
        with pytest.raises(ConfigError, match="speakers"):
            languages.Config(**options)
    other = {"language": "other", "other_languages": "folder"}
    for options in ({"group": "others"}, {"group": "pretraining", **other}):
        with pytest.raises(ConfigError, match="group"):
            languages.Config(**options)
    with pytest.raises(ConfigError, match="speeds"):
        languages.Config(clips=languages.read_speech.Config())
    with pytest.raises(DataError, match="data="):
        list(languages.prepare(None, tmp_path, languages.Config(), 0))


def test_every_system_has_a_paired_baseline_and_the_same_schedule_per_share():
    systems = compose(["recipe=languages"])["systems"]
    for suffix in ("", "-30", "-10"):
        ours, *others = (systems[f"{name}{suffix}"] for name in ("japanese", "other", "few", "scratch"))
        for other in others:
            assert other["score"]["baseline"].endswith(f"/systems/japanese{suffix}/decode")
        without_model = [
            {key: value for key, value in system.get("finetune", {}).items() if key != "pretrained"}
            for system in (ours, *others)
        ]
        assert all(settings == without_model[0] for settings in without_model)


@pytest.mark.parametrize(
    ("comparison", "names"),
    [(compare.SAME_SPEAKERS, ["japanese", "other", "few"]), (compare.DISJOINT, ["japanese", "few"])],
)
def test_all_jobs_have_valid_settings_and_their_own_folders(tmp_path, comparison, names):
    settings = ["recipe=languages", f"data={tmp_path}", f"other_languages={tmp_path}", f"exp={tmp_path}/x"]
    jobs = compare.pretraining_jobs(compose(settings), comparison)
    assert len(jobs) == len(names) * (1 + 2 * 4)
    folders = {configure_jobs([*settings, *job])[0].out for job in jobs}
    assert len(folders) == len(jobs)
    assert {folder.relative_to(tmp_path).parts[0] for folder in folders} == {f"x-{name}" for name in names}
    for job in compare.finetuning_jobs(names, comparison):
        stages = {one.stage: one for one in configure_jobs([*settings, *job])}
        assert {"finetune", "decode", "score"} <= set(stages)
        assert stages["finetune"].config.pretrained.parts[-3] in {f"x-{name}" for name in names}


def test_table_shows_the_difference_from_the_baseline(tmp_path):
    rate = {"rate": 0.5, "low": 0.4, "high": 0.6}
    against = {"per": {"difference": 0.25, "low": 0.2, "high": 0.3, "p": 0.001}}
    for system in ("japanese", "scratch"):
        score = {"per": rate, "kana_cer": rate} | ({"against": against} if system == "scratch" else {})
        folder = tmp_path / "systems" / system
        (folder / "score").mkdir(parents=True)
        (folder / "score" / "scores.json").write_text(json.dumps({"test_cv": score}))
        (folder / "finetune").mkdir()
        train = TrainConfig(max_steps=2500)
        config = finetune.Config(tmp_path, tmp_path, head_only_steps=0, freeze_conv=False, train=train)
        inputs = provenance.stage_inputs("finetune", finetune.VERSION, config)
        provenance.finish(folder / "finetune", inputs, {"hours": 1.5}, seconds=1.0)
    rows = compare.table(tmp_path, ["japanese", "scratch"]).splitlines()[2:]
    first, second = ([cell.strip() for cell in row.split("|")] for row in rows)
    assert first[1:5] == ["`japanese`", "90", "2,500", "50.0 [40.0, 60.0]"]
    assert second[5:7] == ["+25.0 [20.0, 30.0]", "0.001"]


def test_recordings_with_the_same_file_name_are_not_confused(tmp_path):
    """Files in different folders or formats are converted separately."""
    rows = ["a/x.wav", "b/x.wav", "b/x.flac", "y.wav"]
    for number, name in enumerate(rows):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, tone(100 * (number + 1)), RATE)
    lines = ["file\tspeaker", *(f"{name}\ts" for name in rows)]
    (tmp_path / "clips.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    items = list(languages.read_speech.other_languages(tmp_path, tmp_path / "work"))
    assert len({item.id for item in items}) == 4 and items[3].id == "other-y"
    for number, item in enumerate(items):
        wave_T = soundfile.read(item.audio.path)[0]
        assert np.abs(np.fft.rfft(wave_T)).argmax() == 100 * (number + 1)
