"""Tests of the builtin recipe: voices, speeds, synthetic readings, recordings, and packing for the wheel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("pyopenjtalk")

from fixtures.unit_stages import make_corpus

import jahubert
from jahubert.audio import AudioSource
from jahubert.errors import ConfigError, DataError
from jahubert.formats.model_files import LANGUAGE_MODEL
from jahubert.lm.arpa import read_arpa, write_arpa
from jahubert.lm.kneser_ney import train_ngram
from jahubert.train.data.manifest import Rejected, Utterance, write_manifest
from jahubert.train.evaluation.scoring import ScoredUtterance
from jahubert.train.experiment import checksums
from jahubert.train.experiment.provenance import DONE
from jahubert.train.experiment.registry import recipe_module
from jahubert.train.stages import targets
from jahubert.train.text.normalization import recognized_characters

builtin, build = recipe_module("builtin"), recipe_module("builtin", "build")
by_group = recipe_module("builtin", "by_group")
read_speech = builtin.read_speech
language_model = recipe_module("builtin", "language_model")
cluster_units = build.cluster_units
KANA = "かきくけこさしすせそたちつてとなにぬねの"
RATE = 16_000


def buzz(hz: float, seconds: float = 0.6) -> np.ndarray:
    """Return harmonics of `hz` between two silences."""
    time_T = np.arange(round(seconds * RATE)) / RATE
    wav_T = sum(np.sin(2 * np.pi * hz * k * time_T) / k for k in range(1, 12)) * np.hanning(len(time_T))
    return np.concatenate([np.zeros(2000), 0.2 * wav_T, np.zeros(2000)])


def word(path: Path, hz: float) -> Utterance:
    soundfile.write(path, buzz(hz), RATE)
    return Utterance("word", AudioSource(str(path)), n_samples=len(buzz(hz)), text="か", split="test")


def test_voices_are_classified_by_pitch(tmp_path):
    for hz, voice in ((90, "low"), (125, "low"), (160, "low"), (190, "high"), (240, "high"), (320, "high")):
        assert builtin._voice(word(tmp_path / "a.wav", hz)) == voice


def test_speed_changes_length_and_pitch(tmp_path):
    item = word(tmp_path / "a.wav", 160)
    fast, slow = (read_speech.at_speed(item, speed, tmp_path / "speeds") for speed in (1.25, 0.8))
    assert (fast.n_samples, slow.n_samples) == (round(item.n_samples / 1.25), round(item.n_samples / 0.8))
    assert len({item.id, fast.id, slow.id}) == 3 and fast.text == item.text
    assert (builtin._voice(fast), builtin._voice(slow)) == ("high", "low")
    spectrum = np.abs(np.fft.rfft(soundfile.read(fast.audio.path)[0]))
    assert spectrum.argmax() * RATE / fast.n_samples == pytest.approx(200, abs=4)
    stamp = Path(fast.audio.path).stat().st_mtime_ns
    assert read_speech.at_speed(item, 1.25, tmp_path / "speeds") == fast
    assert Path(fast.audio.path).stat().st_mtime_ns == stamp


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[Utterance]:
    """Prepare a synthetic corpus of one sentence, and of 40 words in two voices."""
    root = tmp_path_factory.mktemp("corpus")
    ogg = root / "lib" / "ogg"
    ogg.mkdir(parents=True)
    for i in range(40):
        kana = KANA[i % 20] + KANA[(i * 7 + i // 20) % 20]
        soundfile.write(ogg / f"{kana}【{kana}】.ogg", buzz(120 if i % 2 else 240), RATE)
    sentences = root / "sentences"
    sentences.mkdir()
    soundfile.write(sentences / "one.wav", buzz(200, 3.0), RATE)
    (sentences / "transcripts.tsv").write_text("file\ttext\tnote\none.wav\t雨が降る。\tx\n", encoding="utf-8")
    texts = root / "texts.txt"
    texts.write_text("雨が降る！\n雨　が降る\n雪が積もる。\n", encoding="utf-8")
    config = builtin.Config(
        sentences=str(sentences),
        texts=str(texts),
        words=builtin.Words(dev_share=0.1, test_share=0.4, uses=1),
        voices=builtin.Voices(minutes=0.6, dev_share=0.2, test_share=0.2),
        speakers=builtin.Speakers(minutes=0.6, dev_share=0.2, test_share=0.0, own_share=0.9),
        reading=0.3,
    )
    return list(builtin.prepare(root, tmp_path_factory.mktemp("work"), config, 0))


def test_splits_are_complete_and_disjoint(corpus):
    splits = {item.split for item in corpus}
    tests = {"test_low", "test_high", "test_joined", "test_made", "test_real"}
    common_voice = {"test_cv", "test_cv_phone", "test_cv_noise"}
    assert splits == {"train", "dev", "dev_joined", "dev_made", *tests}
    assert len({item.id for item in corpus}) == len(corpus)
    assert tests | common_voice == set(build.SETS)
    held_out = {item.words for item in corpus if item.split in ("test_low", "test_high")}
    singles = {item.words for item in corpus if item.split == "train" and item.id.startswith("word")}
    assert held_out and singles and not held_out & singles
    for item in corpus:
        if item.split in ("test_low", "test_high"):
            number = next(k for k in range(40) if KANA[k % 20] + KANA[(k * 7 + k // 20) % 20] == item.text)
            assert item.split == ("test_low" if number % 2 else "test_high")


def test_training_words_are_repeated_at_other_speeds(corpus):
    words = {item.id: item for item in corpus if item.id.startswith("word")}
    recorded = [item for item in words.values() if item.id.count("-") == 2]
    training = [item for item in recorded if item.split == "train"]
    assert training and training != recorded
    expected = {item.id for item in recorded}
    voices = {"low": (0.8, 0.87, 0.93, 1.07, 1.15, 1.25), "high": (0.87, 1.15)}
    for item in training:
        expected |= {f"{item.id}-{speed}" for speed in voices[builtin._voice(item)]}
    assert words.keys() == expected
    assert {builtin._voice(item) for item in training} == voices.keys()
    for item in training:
        if builtin._voice(item) == "low":
            fast = words[f"{item.id}-1.25"]
            assert (fast.split, fast.n_samples) == ("train", round(item.n_samples / 1.25))


def test_no_held_out_sentence_is_synthesized_for_training(corpus):
    sentences = {"train": set(), "held out": set()}
    for item in corpus:
        if not item.id.startswith(("word", "joined")):
            group = "train" if item.split == "train" else "held out"
            sentences[group].add(recognized_characters(item.text))
    assert "雪が積もる" in sentences["train"] | sentences["held out"]
    assert "雨が降る" in sentences["held out"]
    assert not sentences["train"] & sentences["held out"]


def test_synthetic_voices_read_training_words_with_exact_times(corpus):
    singles = {item.text for item in corpus if item.split == "train" and item.id.startswith("word")}
    reading = [item for item in corpus if item.id.startswith("reading")]
    assert reading
    for item in reading:
        assert item.split == "train" and item.alignment[-1].end == item.n_samples
        spoken = tuple(phone.symbol for phone in item.alignment if phone.symbol != "pau")
        assert spoken == tuple(phone for word in item.words for phone in word)
        assert sum(item.text.count(single) > 0 for single in singles) >= 2


def test_real_sentences_are_a_test_split(corpus):
    (item,) = (item for item in corpus if item.id.startswith("real"))
    assert (item.split, item.text, item.id) == ("test_real", "雨が降る。", "real-one")


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> list[Utterance | Rejected]:
    """Prepare sentences by ten known speakers and a guessed one, all of whom also read a common sentence."""
    root = tmp_path_factory.mktemp("common_voice")
    lines = ["file\ttext\tspeaker"]
    for speaker in range(11):
        name = f"speaker{speaker}" if speaker < 10 else "block001"
        for number in range(6):
            path = root / f"{speaker}-{number}.wav"
            soundfile.write(path, buzz(120 + 10 * speaker + number), RATE)
            text = f"{KANA[speaker]}{KANA[number]}" if number else "あ２" if speaker % 2 else "あ、2。"
            lines.append(f"{path.name}\t{text}\t{name}")
    (root / "transcripts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = read_speech.Config(test_speakers=2, dev_speakers=2, cap_minutes=0.04, speeds=(0.9, 1.1))
    work = tmp_path_factory.mktemp("work")
    return list(read_speech.sentences(root, work, config, 0, {"さき！"}))


def test_no_speaker_or_sentence_is_in_two_splits(read):
    items = [item for item in read if isinstance(item, Utterance)]
    by_split = {
        split: [item for item in items if item.split == split] for split in ("train", "dev_cv", "test_cv")
    }
    speakers = {split: {item.speaker for item in part} for split, part in by_split.items()}
    texts = {split: {recognized_characters(item.text) for item in part} for split, part in by_split.items()}
    assert {split: len(names) for split, names in speakers.items()} == {"train": 7, "dev_cv": 2, "test_cv": 2}
    assert "block001" in speakers["train"]
    for one, other in (("train", "dev_cv"), ("train", "test_cv"), ("dev_cv", "test_cv")):
        assert not speakers[one] & speakers[other] and not texts[one] & texts[other]
    assert all(item.text != "さき" for item in items if item.split in ("train", "dev_cv"))
    assert len({item.id for item in items}) == len(items)


def test_one_speaker_is_capped(read):
    minutes = dict.fromkeys((item.speaker for item in read if isinstance(item, Utterance)), 0.0)
    for item in read:
        if isinstance(item, Utterance) and item.split == "train" and not item.id.endswith(("-0.9", "-1.1")):
            minutes[item.speaker] += item.n_samples / RATE / 60
    assert max(minutes.values()) <= 0.04
    assert any(isinstance(item, Rejected) and "cap_minutes" in item.reason for item in read)


def test_other_languages_keep_the_order_of_their_table(tmp_path):
    names = [f"{number}.wav" for number in (3, 1, 4, 0, 5, 2)]
    for number, name in enumerate(names):
        soundfile.write(tmp_path / name, buzz(200, 0.2 + 0.1 * number), RATE)
    (tmp_path / "4.wav").write_bytes(b"RIFF")
    lines = ["file\tlanguage\tspeaker", *(f"{name}\tfr\tx" for name in [*names, "missing.wav"])]
    (tmp_path / "clips.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    items = list(read_speech.other_languages(tmp_path, tmp_path / "work"))
    assert [item.id for item in items] == [f"other-{Path(name).stem}" for name in [*names, "missing.wav"]]
    assert [item.id for item in items if isinstance(item, Rejected)] == ["other-4", "other-missing"]
    for item in items:
        if isinstance(item, Utterance):
            audio, rate = soundfile.read(item.audio.path)
            assert rate == RATE and len(audio) == item.n_samples
            assert (item.split, item.text) == ("train", "")
    assert list(read_speech.other_languages(tmp_path, tmp_path / "work")) == items


def test_telephone_and_noise_versions_are_added(read):
    items = {item.id: item for item in read if isinstance(item, Utterance)}
    clean = [item for item in items.values() if item.split == "test_cv"]
    assert len(clean) == 12
    for item in clean:
        wave_T, _ = soundfile.read(item.audio.path)
        phone_T, _ = soundfile.read(items[f"test_cv_phone-{item.id}"].audio.path)
        noisy_T, _ = soundfile.read(items[f"test_cv_noise-{item.id}"].audio.path)
        assert len(phone_T) == len(noisy_T) == len(wave_T)
        power = np.abs(np.fft.rfft(phone_T)) ** 2
        hertz = np.fft.rfftfreq(len(phone_T), 1 / RATE)
        assert power[hertz < 150].sum() + power[hertz > 4000].sum() < 0.01 * power.sum()
        scale = np.dot(noisy_T, wave_T) / np.dot(wave_T, wave_T)
        noise_T = noisy_T / scale - wave_T
        assert 10 * np.log10(np.mean(wave_T**2) / np.mean(noise_T**2)) == pytest.approx(10, abs=1)


def test_too_few_speakers_and_a_missing_column_are_reported(tmp_path):
    table = tmp_path / "transcripts.tsv"
    table.write_text("file\ttext\tspeaker\na.wav\tあ\t\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"transcripts\.tsv:2: .*speaker"):
        list(read_speech.sentences(tmp_path, tmp_path, read_speech.Config(), 0, set()))
    table.write_text("file\ttext\tspeaker\na.wav\tあ\tx\n", encoding="utf-8")
    with pytest.raises(DataError, match="test_speakers"):
        list(read_speech.sentences(tmp_path, tmp_path, read_speech.Config(), 0, set()))


def test_common_voice_releases_are_read_like_folders_with_transcripts(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    text_of = {}
    lines = ["client_id\tpath\tsentence\tgender\tage"]
    for number in range(24):
        name, text = f"common_voice_ja_{number}.wav", f"{KANA[number % 20]}いう{number}"
        soundfile.write(clips / name, buzz(200, 0.3), RATE)
        text_of[f"cv-common_voice_ja_{number}"] = text
        lines.append(f"speaker{number // 6}\t{name}\t{text}\tfemale\t")
    (tmp_path / "validated.tsv").write_text(
        "\n".join([*lines, "x\tmissing.wav\t\t\t", "x"]), encoding="utf-8"
    )
    config = read_speech.Config(test_speakers=1, dev_speakers=1, speeds=())
    items = list(read_speech.sentences(tmp_path, tmp_path / "work", config, 0, set()))
    original = {item.id: item for item in items if isinstance(item, Utterance) and item.id in text_of}
    assert {id: item.text for id, item in original.items()} == text_of
    speakers = {item.split: set() for item in original.values()}
    for id, item in original.items():
        assert item.speaker == f"speaker{int(id.rpartition('_')[2]) // 6}"
        speakers[item.split].add(item.speaker)
    assert {split: len(names) for split, names in speakers.items()} == {"train": 2, "dev_cv": 1, "test_cv": 1}
    rejected = [item.id for item in items if isinstance(item, Rejected)]
    assert rejected == [f"{tmp_path / 'validated.tsv'}:{line}" for line in (26, 27)]
    assert set(by_group.first_values(tmp_path, "gender").items()) == {
        (f"speaker{number}", "female") for number in range(4)
    }


def utterances(wrong: dict[str, int]) -> list[ScoredUtterance]:
    """Return 20 utterances of 10 phones for each speaker, each with the given number of wrong phones."""
    reference = [("a",) * 10]
    return [
        ScoredUtterance(f"{speaker}-{i}", "", speaker, reference, [("a",) * (10 - n) + ("o",) * n])
        for speaker, n in wrong.items()
        for i in range(20)
    ]


def test_per_by_gender_and_age_has_intervals_over_utterances_and_speakers(tmp_path):
    rows = ["x\tfemale\ttwenties", "y\t\t", "y\tmale\t", "z\t\t", "other\tmale\tteens"]
    table = "\n".join(["speaker\tgender\tage", *rows])
    (tmp_path / "transcripts.tsv").write_text(table, encoding="utf-8")
    scores = by_group.group_scores(utterances({"x": 1, "y": 2, "z": 6}), tmp_path)
    assert {
        name: (score["speakers"], score["utterances"], score["rate"]) for name, score in scores.items()
    } == {
        "all": (3, 60, 0.3),
        "all, interval over speakers": (3, 60, 0.3),
        "gender: female": (1, 20, 0.1),
        "gender: male": (1, 20, 0.2),
        "gender: not stated": (1, 20, 0.6),
        "age: not stated": (2, 40, 0.4),
        "age: twenties": (1, 20, 0.1),
    }
    over_utterances, over_speakers = list(scores.values())[:2]
    assert over_speakers["low"] == 0.1 and over_speakers["high"] == 0.6  # samples of a single speaker
    assert 0.2 < over_utterances["low"] < 0.3 < over_utterances["high"] < 0.4


def test_sets_without_speakers_are_scored_together(tmp_path, capsys):
    for name, wrong in (("low", 4), ("high", 0)):
        item = {"id": name, "talk": "", "speaker": "", "reference": ["a a a a"], "hypothesis": ["a a a a"]}
        if wrong:
            item["hypothesis"] = ["o o o o"]
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(item), encoding="utf-8")
    assert by_group.main([str(tmp_path / "low.jsonl"), str(tmp_path / "high.jsonl")]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[2:] == ["| all | not stated | 2 | 50.00 [0.00, 100.00] |"]


@pytest.mark.parametrize("options", [{"speeds": (3.0,)}, {"low_speeds": (0.4,)}, {"reading": -1.0}])
def test_invalid_settings_are_rejected(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        builtin.Config(**options)


def test_sentences_folder_without_its_table_is_rejected(tmp_path):
    with pytest.raises(DataError, match=r"transcripts\.tsv"):
        list(builtin._test_recordings(tmp_path))


def write_record(folder: Path, metrics: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    record = {"fingerprint": "abcdef", "metrics": metrics, "outputs": checksums.describe_outputs(folder)}
    (folder / DONE).write_text(json.dumps(record | {"record_crc32": checksums.content_crc32(record)}))


@pytest.fixture
def finished(tmp_path, monkeypatch) -> Path:
    """Create an experiment folder with the files that packing reads."""
    torch.manual_seed(0)
    monkeypatch.setattr(build, "cluster_units", lambda exp: (torch.randn(5, 16), 1))
    sizes = {"conv_dims": (8,) * 7, "width": 16, "layers": 2, "heads": 2, "ffn": 16, "pos_conv_kernel": 8}
    ctc = jahubert.HubertForCtc(jahubert.HubertConfig(**sizes, pos_conv_groups=2), 42)
    system = tmp_path / "exp" / "systems" / "main"
    jahubert.save_bundle(system / "finetune" / "bundle", ctc=ctc, phonemes=jahubert.PhonemeSet.standard())
    rate = {"rate": 0.1234, "low": 0.1, "high": 0.2}
    against = {"per": {"baseline": 0.1567}}
    measured = {"words": 31, "accuracy": 0.71, "confidence": 0.69, "calibration_error": 0.043, "auc": 0.87654}
    score = {"utterances": 17, "per": rate, "wer": rate, "kana_cer": rate, "against": against}
    score["confidence"] = measured
    metrics = {
        "finetune": {"hours": 12.34},
        "score-ngram": {},
        "decode-ngram": {"lm_weight": 0.4, "word_bonus": 2},
    }
    (system / "score-ngram").mkdir()
    (system / "score-ngram" / "scores.json").write_text(json.dumps({"test_low": score, "test_made": score}))
    write_record(tmp_path / "exp" / "prepare", {})
    for stage, values in metrics.items():
        write_record(system / stage, values)
    write_arpa(train_ngram([["a", "m", "e"]], 2), tmp_path / "exp" / LANGUAGE_MODEL)
    return tmp_path / "exp"


def test_packing_adds_units_of_a_layer(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "cluster_units", cluster_units)
    monkeypatch.setattr(build, "UNITS", 5)
    monkeypatch.setattr(build, "UNIT_LAYER", 1)
    make_corpus(finished / "prepare")
    target = tmp_path / "assets" / build.NAME
    assert build.main(["--pack", str(finished), "--to", str(target)]) == 0
    bundle = jahubert.load_bundle(target)
    assert bundle.centroids_KD.shape == (5, 16) and bundle.centroid_layer == 1
    units = jahubert.UnitExtractor.from_pretrained(target)(finished / "prepare" / "8.wav")
    assert len(units) == 124 and int(units.max()) < 5


def test_packing_keeps_the_model_and_writes_a_card(finished, tmp_path, capsys):
    target = tmp_path / "assets" / build.NAME
    arguments = ["--pack", str(finished), "--to", str(target), "data=/home/somebody/x", "seed=3"]
    assert build.main(arguments) == 0
    before = jahubert.load_bundle(finished / "systems/main/finetune").ctc.state_dict()
    bundle = jahubert.load_bundle(target)
    for name, tensor in bundle.ctc.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name].half().float()), name
    assert bundle.centroids_KD.shape == (5, 16) and bundle.centroid_layer == 1
    assert (bundle.language_model.weight, bundle.language_model.word_bonus) == (0.4, 2)
    assert jahubert.Transcriber.from_pretrained(target).fusion is not None
    assert bundle.info["license"] == "CC-BY-SA-4.0" and "Tofugu and WaniKani" in bundle.info["attribution"]
    assert bundle.info["weights"] == jahubert.formats.bundle.weights_hash(bundle.model)
    page = (target / "README.md").read_text(encoding="utf-8")
    assert "12.3 [10.0, 20.0]" in page and "| 15.7 |" in page and "| 17 |" in page and "12.3 hours" in page
    assert "| 31 | 71.0 | 69.0 | 4.3 | 0.877 |" in page and build.NOT_CALIBRATED in page
    assert "CC BY-SA 4.0" in page and "## Intended use" in page
    assert "seed=3" in page and "somebody" not in page
    size = sum(path.stat().st_size for path in target.iterdir())
    assert f"{size / 1e6:.1f} MB" in capsys.readouterr().out
    assert build.main(arguments) == 0  # replaces the existing model
    assert sorted(path.name for path in target.parent.iterdir()) == [build.NAME]


def test_card_has_evenly_spaced_transcripts(finished, tmp_path):
    items, lines = [], []
    for number in range(25):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, buzz(200), RATE)
        items.append(
            Utterance(
                f"cv-{number:02d}", AudioSource(str(path)), n_samples=100, text=f"雨{number}", split="test_cv"
            )
        )
        lines.append({"id": items[-1].id, "hypothesis": ["a m e", "g a"]})
    write_manifest(finished / "prepare" / "manifest.arrow", items)
    decode = finished / "systems" / "main" / "decode-ngram"
    (decode / "test_cv.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    table = build.examples(finished)
    assert (
        table.count("アメ ガ |") == 9
        and "| 雨0 |" in table
        and "| 雨24 |" in table
        and "| 雨1 |" not in table
    )
    build.main(["--pack", str(finished), "--to", str(tmp_path / "model")])
    assert table.strip() in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


def test_card_has_a_table_by_gender_and_age(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "examples", lambda exp: "")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "transcripts.tsv").write_text(
        "speaker\tgender\tage\nx\tfemale\t\ny\tmale\t\n", encoding="utf-8"
    )
    item = {"talk": "", "reference": ["a m e"]}
    lines = [
        item | {"id": "cv-1", "speaker": "x", "hypothesis": ["a m e"]},
        item | {"id": "cv-2", "speaker": "y", "hypothesis": ["a m o"]},
    ]
    decode = finished / "systems" / "main" / "decode-ngram"
    (decode / "test_cv.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    pages = []
    for settings in ([], [f"common_voice={corpus}"]):
        target = tmp_path / "model"
        assert build.main(["--pack", str(finished), "--to", str(target), *settings]) == 0
        pages.append((target / "README.md").read_text(encoding="utf-8"))
    rows = ("| all | 2 | 2 | 16.7 [0.0, 33.3] |", "| gender: male | 1 | 1 | 33.3 [33.3, 33.3] |")
    for row in rows:
        assert row not in pages[0] and row in pages[1]


def test_large_model_is_not_packed(finished, tmp_path, capsys, monkeypatch):
    target = tmp_path / "assets" / build.NAME
    monkeypatch.setattr(build, "LIMIT", 1000)
    assert build.main(["--pack", str(finished), "--to", str(target)]) == 2
    assert " MB" in capsys.readouterr().err and not target.exists()


@pytest.mark.parametrize("stage", build.FINISHED)
def test_unfinished_stage_is_reported_before_clustering(stage, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "cluster_units", lambda exp: pytest.fail("units were clustered"))
    (finished / stage / DONE).unlink()
    assert build.main(["--pack", str(finished), "--to", str(tmp_path / "model")]) == 2
    assert str(finished / stage) in capsys.readouterr().err


def test_pretraining_runs_on_recordings_unless_a_model_is_given(monkeypatch):
    commands: list[list[str]] = []

    def fake_run(overrides):
        commands.append(list(overrides))
        return 0

    monkeypatch.setattr(build.run, "main", fake_run)
    settings = ["data=/corpus", "processes=2", "exp=other", "finetune.train.max_steps=7"]
    status, folder = build.pretrained(settings)
    assert (status, folder) == (0, "exp/builtin-pretraining/iter2/pretrain")
    assert commands[0][:2] == ["recipe=builtin", "name=builtin-pretraining"]
    assert (
        commands[0][-1] == "stage=prepare"
        and "data=/corpus" in commands[0]
        and "exp=other" not in commands[0]
    )
    assert "prepare.options.synthetic=false" in commands[0]
    assert commands[-1][-2:] == ["stage=pretrain", "iteration=2"] and len(commands) == 9
    assert build.pretrained([*settings, "pretrained=mine"]) == (0, "mine") and len(commands) == 9
    monkeypatch.setattr(build.run, "main", lambda overrides: 2 if "stage=kmeans" in overrides else 0)
    assert build.pretrained(settings)[0] == 2


@pytest.mark.parametrize("options", [["data=/c", "common_voice=/c"], ["--pack", "exp"]])
def test_unusable_texts_are_reported_before_the_training(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build.run, "main", None)
    assert build.main(["--lm-texts", str(tmp_path / "missing.txt"), *options]) == 2
    assert ("missing.txt" in capsys.readouterr().err) == ("--pack" not in options)


def test_sentences_are_decoded_only_if_given(monkeypatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(build.run, "main", lambda overrides: commands.append(overrides) or 2)
    settings = ["data=/corpus", "common_voice=/cv", "pretrained=mine"]
    assert build.main(settings) == 2
    assert any(
        "decode.splits=[dev,dev_joined,dev_cv,dev_made,test_low" in item and "test_real" not in item
        for item in commands[0]
    )
    assert build.main([*settings, "sentences=/s"]) == 2
    assert not any(item.startswith("decode.splits") for item in commands[1])


def test_missing_common_voice_corpus_is_reported(capsys):
    assert build.main(["data=/corpus"]) == 2
    assert "common_voice=" in capsys.readouterr().err


def test_ngram_counts_distinct_sentences_without_held_out_ones(tmp_path, monkeypatch):
    """A test sentence that is also in the training split and in the file of texts is not counted."""
    soundfile.write(tmp_path / "a.wav", buzz(200), RATE)
    audio = AudioSource(str(tmp_path / "a.wav"))
    ame, kasa = (("a", "m", "e"),), (("k", "a", "s", "a"),)
    items = [
        Utterance("one", audio, n_samples=16_000, text="雨", split="train", words=ame),
        Utterance("copy", audio, n_samples=16_000, text="雨", split="train", words=ame),
        Utterance("leak", audio, n_samples=16_000, text="傘", split="train", words=kasa),
        Utterance("test", audio, n_samples=16_000, text="傘。", split="test_cv", words=kasa),
    ]
    (tmp_path / "prepare").mkdir()
    write_manifest(tmp_path / "prepare" / "manifest.arrow", items)
    (tmp_path / "targets").mkdir()
    targets.run(targets.Config(tmp_path / "prepare" / "manifest.arrow"), tmp_path / "targets")
    texts = tmp_path / "texts.txt"
    texts.write_text("傘\n犬\n", encoding="utf-8")
    more = tmp_path / "more.tsv"
    more.write_text("id\ttext\n1\t帆\n2\t犬\n", encoding="utf-8")
    monkeypatch.setattr(language_model, "ORDER", 2)
    monkeypatch.setattr(language_model, "MIN_GAIN", 0.0)
    language_model.write_language_model(tmp_path, [texts, more], tmp_path / "a.arpa.gz")
    assert set(read_arpa(tmp_path / "a.arpa.gz").words) == {"<s>", "</s>", "<unk>", *"ameinho", "u"}


def test_decoding_with_the_ngram_is_tuned_and_scored_against_the_plain_one(monkeypatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(build, "write_language_model", lambda exp, texts, target: commands.append([texts]))
    monkeypatch.setattr(build.run, "main", lambda overrides: commands.append(list(overrides)) or 0)
    assert build.decode_with_ngram(["recipe=builtin", "exp=e", "texts=/t.txt"], Path("/l.txt")) == 0
    (texts,), decode, score = commands
    assert texts == [Path("/t.txt"), Path("/l.txt")]
    assert {"stage=decode", "decoding=ngram", "decode.tune_splits=[dev,dev_joined,dev_cv,dev_made]"} <= set(
        decode
    )
    assert "decode.lm=e/language_model.arpa.gz" in decode
    assert {"stage=score", "decoding=ngram", "score.baseline=e/systems/main/decode"} <= set(score)
