"""Tests of phones, kana and characters from targets to scores, and of the options of the decode stage."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from fixtures import FIXTURES

from jahubert.audio import AudioSource
from jahubert.cli import main as cli
from jahubert.errors import ConfigError, DataError
from jahubert.frames import HUBERT
from jahubert.inference.confidence import Calibration
from jahubert.inference.ctc import Span
from jahubert.phonemes import PhonemeSet
from jahubert.train.data.manifest import Manifest, Utterance
from jahubert.train.data.targets import (
    UNKNOWN,
    TargetStore,
    character_set,
    kana_set,
    split_words,
    vocabulary_kind,
)
from jahubert.train.evaluation.metrics import error_rate
from jahubert.train.pipeline import runner
from jahubert.train.pipeline.compose import compose
from jahubert.train.pipeline.jobs import configure_job, plan_stages
from jahubert.train.stages import decode, score, targets

TONES = FIXTURES / "tones"
STEPS = {"characters": 140, "phones": 600, "kana": 600}  # characters have no word boundaries to learn
LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("phones", "kana")]


def command(exp: Path, vocabulary: str, steps: int, *overrides: str) -> list[str]:
    train = [f"finetune.train.{name}" for name in (f"max_steps={steps}", f"valid_every={steps}", "lr=4e-3")]
    asked = [f"recipe={TONES}", f"exp={exp}", f"targets.vocabulary={vocabulary}", "finetune.pretrained=null"]
    return [*asked, *train, "decode.align_splits=[test]", *overrides]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a cached function that trains an experiment with the given vocabulary."""

    @cache
    def make(vocabulary: str, steps: int = 0) -> Path:
        exp = tmp_path_factory.mktemp(vocabulary) / "exp"
        for stage in ("prepare", "targets", "finetune", "decode", "score"):
            runner.run([*command(exp, vocabulary, steps or STEPS[vocabulary]), f"stage={stage}"])
        return exp

    return make


def hypotheses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("vocabulary", ["characters", *LONG])
def test_vocabulary_is_trained_and_scored(trained, vocabulary):
    exp = trained(vocabulary)
    measure = {"characters": "cer", "phones": "per", "kana": "kana_cer"}[vocabulary]
    store = TargetStore(exp / "targets")
    assert vocabulary_kind(store.phonemes) == vocabulary
    scores = json.loads((exp / "systems/pretrained/score/scores.json").read_text())["test"]
    assert scores[measure]["rate"] < 0.1
    manifest = Manifest(exp / "prepare/manifest.arrow")
    for line in hypotheses(exp / "systems/pretrained/decode"):
        row = next(i for i in range(len(manifest)) if manifest[i].id == line["id"])
        item, reference = manifest[row], [tuple(word.split()) for word in line["reference"]]
        if vocabulary == "phones":
            assert tuple(reference) == item.words
        elif vocabulary == "characters":
            assert "".join(symbol for word in reference for symbol in word) == item.text
        else:
            assert len(reference) == len(item.words)
        assert line["talk"] == Path(item.audio.path).stem


@pytest.mark.slow
def test_aligned_words_contain_their_phones(trained):
    exp = trained("phones")
    manifest = Manifest(exp / "prepare/manifest.arrow")
    close = n_words = 0
    for line in map(
        json.loads,
        (exp / "systems/pretrained/decode/alignment.jsonl").read_text(encoding="utf-8").splitlines(),
    ):
        item = manifest[line["row"]]
        assert [tuple(word.split()) for word, _, _ in line["words"]] == list(item.words)
        assert all(a[2] <= b[1] for a, b in pairwise(line["words"]))
        first = 0
        for (_, start, end), word in zip(line["words"], item.words, strict=True):
            planted = [phone for phone in item.alignment if phone.symbol != "pau"][first : first + len(word)]
            first += len(word)
            close += abs(start - planted[0].start) < 2400 and abs(end - planted[-1].end) < 2400
            n_words += 1
    assert close / n_words > 0.8


def test_aligned_characters_are_words():
    symbols = character_set("ab")
    labels = symbols.encode([["a"], ["b"]])
    spans = [Span(label, start, start + 2, -0.5) for label, start in zip(labels, (0, 5), strict=True)]
    assert decode.word_times(spans, symbols) == [
        ("a", HUBERT.start(0), HUBERT.start(2)),
        ("b", HUBERT.start(5), HUBERT.start(7)),
    ]


# --- decode -----------------------------------------------------------------------------------------------


def decoded(exp: Path, out: Path, **settings) -> list[dict]:
    out.mkdir()
    paths = {"manifest": exp / "prepare/manifest.arrow", "targets": exp / "targets"}
    model = exp / "systems/pretrained/finetune"
    # Detection and conditioning of speech are disabled, because the recordings contain tones instead.
    config = decode.Config(
        **paths, model=model, splits=("test",), device="cpu", vad=False, conditioning=False
    )
    decode.run(replace(config, **settings), out)
    return sorted(hypotheses(out), key=lambda line: line["id"])


def test_hypotheses_do_not_depend_on_batch_size(trained, tmp_path):
    exp, rows_by_batch = trained("characters"), {}
    for seconds in (0.1, 4.0, 80.0):
        rows_by_batch[seconds] = decoded(exp, tmp_path / str(seconds), batch_seconds=seconds, n_best=3)
    for other in (4.0, 80.0):
        for a, b in zip(rows_by_batch[0.1], rows_by_batch[other], strict=True):
            assert (a["id"], a["hypothesis"]) == (b["id"], b["hypothesis"])
            assert a["score"] == pytest.approx(b["score"], abs=1e-3)
            assert a["n_best"][0]["words"] == b["n_best"][0]["words"]
    rates = {
        error_rate([x["reference"] for x in rows], [x["hypothesis"] for x in rows]).rate
        for rows in rows_by_batch.values()
    }
    assert len(rates) == 1


def test_n_best_are_unique_and_sorted(trained, tmp_path):
    exp = trained("characters")
    for line in decoded(exp, tmp_path / "beam", n_best=5):
        answers = line["n_best"]
        assert 2 <= len(answers) <= 5 and answers[0]["words"] == line["hypothesis"]
        assert len({tuple(answer["words"]) for answer in answers}) == len(answers)
        assert all(a["score"] >= b["score"] for a, b in pairwise(answers))
    best = decoded(exp, tmp_path / "best")
    greedy = decoded(exp, tmp_path / "greedy", search="greedy")
    assert "n_best" not in best[0] and len(greedy) == len(best)
    assert all(a["score"] <= b["score"] + 1e-3 for a, b in zip(greedy, best, strict=True))


def test_lexicon_restricts_hypotheses(trained, tmp_path):
    exp = trained("phones", 2)
    manifest = Manifest(exp / "prepare/manifest.arrow")
    words = {word for i in manifest.indices(split="test") for word in manifest[int(i)].words}
    (tmp_path / "words.txt").write_text(
        "".join(f"w{i} {' '.join(word)}\n" for i, word in enumerate(sorted(words)))
    )
    settings = {"lexicon": tmp_path / "words.txt", "n_best": 2, "batch_seconds": 3.0}
    rows = decoded(exp, tmp_path / "lexicon", **settings)
    assert all(tuple(word.split()) in words for line in rows for word in line["hypothesis"])
    assert all(len(line["written"]) == len(line["hypothesis"]) for line in rows)
    texts = {manifest[int(i)].id: manifest[int(i)].text for i in manifest.indices(split="test")}
    assert {line["id"]: line["reference_text"] for line in rows} == texts
    assert [line["reference"] for line in rows] == [
        line["reference"] for line in decoded(exp, tmp_path / "free")
    ]


def test_character_ngram_is_used_in_decoding(trained, tmp_path):
    exp, lm = trained("characters"), tmp_path / "characters.arpa"
    assert cli.main(["ngram", str(exp), "--unit", "character", "--order", "2", "-o", str(lm)]) == 0
    plain, fused = decoded(exp, tmp_path / "plain"), decoded(exp, tmp_path / "fused", lm=lm, lm_weight=0.2)
    assert [line["id"] for line in plain] == [line["id"] for line in fused]
    assert all(a["score"] > b["score"] for a, b in zip(plain, fused, strict=True))
    for line in fused:
        assert len(line["word_features"]) == len(line["hypothesis"])


def test_confidences_are_calibrated_on_a_split(trained, tmp_path):
    exp = trained("characters")
    decoded(exp, tmp_path / "decode")
    (tmp_path / "score").mkdir()
    config = score.Config(tmp_path / "decode", calibration_splits=("test",), samples=10)
    score.run(config, tmp_path / "score")
    assert Calibration.from_json(json.loads((tmp_path / "score/calibration.json").read_text()))
    measured = json.loads((tmp_path / "score/scores.json").read_text())["test"]["confidence"]
    assert measured["confidence"] == pytest.approx(measured["accuracy"], abs=0.05)
    assert measured["calibrated_on"] == ["test"] and measured["words"] > 0
    table = (tmp_path / "score/table.txt").read_text(encoding="utf-8")
    assert f"confidence: mean {100 * measured['confidence']:.1f} % of {measured['words']} words" in table
    with pytest.raises(DataError, match=r"score\.calibration_splits"):
        score.run(replace(config, calibration_splits=("test", "dev")), tmp_path / "score")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beam": 0}, "beam is 0"),
        ({"n_best": 21}, "n_best is 21"),
        ({"search": "greedy", "n_best": 2}, "search=greedy"),
        ({"search": "greedy", "lm": Path("a.arpa")}, "search=greedy"),
        ({"lm_weight": 0.7}, "lm_weight"),
        ({"lm_weight": 0.7, "lexicon": Path("words.txt")}, "lm_weight"),
        ({"word_bonus": 1.0}, "word_bonus"),
        ({"tune_splits": ("dev",)}, "tune_splits"),
        ({"tune_lm_weights": (0.1,), "lm": Path("a.arpa")}, "tune_lm_weights"),
        (
            {"tune_splits": ("dev",), "lexicon": Path("words.txt"), "tune_lm_weights": (0.1,)},
            "tune_lm_weights",
        ),
        ({"tune_splits": ("dev",), "lm": Path("a.arpa"), "lm_weight": 0.7}, "lm_weight"),
        ({"tune_splits": ("dev",), "lm": Path("a.arpa"), "word_bonus": 1.0}, "word_bonus"),
        ({"tune_splits": ("dev",), "lm": Path("a.arpa"), "tune_lm_weights": ()}, "tune_lm_weights"),
    ],
)
def test_invalid_decode_settings_are_rejected(settings, message):
    with pytest.raises(ConfigError, match=message):
        decode.Config(Path("m"), Path("t"), Path("b"), **settings)


def test_language_model_is_set_on_the_command_line():
    overrides = [f"recipe={TONES}", "stage=decode", "decode.lexicon=/a/words.txt"]
    (job,) = plan_stages(compose([*overrides, "system=pretrained"]))
    tuning = ["decode.tune_splits=[dev]", "decode.tune_lm_weights=[0.5,1]"]
    _, configured, *_ = configure_job(job, [*overrides, "decode.lm=/a/3.arpa", *tuning])
    assert (configured.lexicon, configured.lm) == (Path("/a/words.txt"), Path("/a/3.arpa"))
    assert configured.tune_lm_weights == (0.5, 1.0)


# --- targets ----------------------------------------------------------------------------------------------


def utterance(**fields) -> Utterance:
    return Utterance("u", AudioSource("a.wav"), n_samples=16_000, **fields)


def config(**settings) -> targets.Config:
    return targets.Config(Path("m"), **settings)


def test_targets_follow_the_vocabulary():
    item = utterance(words=(("ky", "o:"), ("w", "a")), text="今日は、①番！")
    for symbols, settings, expected in (
        (PhonemeSet.standard(), {}, ["ky o:", "w a"]),
        (kana_set(), {"vocabulary": "kana"}, ["キ ョ ー", "ワ"]),
        (character_set("今日は番"), {"vocabulary": "characters"}, ["今", "日", "は", UNKNOWN, "番"]),
    ):
        labels = targets.target_of(item, symbols, config(**settings))
        assert [" ".join(word) for word in split_words(symbols, labels)] == expected
    marks = character_set("今日は、番!")
    labels = targets.target_of(item, marks, config(vocabulary="characters", punctuation=True))
    assert marks.decode(labels) == [("今", "日", "は", "、", UNKNOWN, "番", "!")]
    with pytest.raises(ConfigError, match="punctuation"):
        config(vocabulary="kana", punctuation=True)
    read = targets.target_of(utterance(text="東京へ"), kana_set(), config(vocabulary="kana"))
    assert [" ".join(word) for word in split_words(kana_set(), read)] == ["ト ー キ ョ ー", "エ"]


@pytest.mark.parametrize(
    ("item", "settings", "message"),
    [
        (utterance(words=(("k", "x"),)), {}, "symbol outside the vocabulary: 'x' in the word 'k x'"),
        (utterance(text="…"), {"vocabulary": "characters"}, "text without letters: '…'"),
        (utterance(text="Привет"), {}, "text without a reading: "),
        (
            utterance(words=(("a", "i") * 40,)),
            {},
            "target longer than its audio: 80 .* 49",
        ),
        (utterance(words=(("a",) * 30,)), {}, "target longer than its audio: 59"),
    ],
)
def test_invalid_target_has_a_reason(item, settings, message):
    symbols = PhonemeSet.standard() if not settings else character_set("あ")
    with pytest.raises(DataError, match=message):
        targets.target_of(item, symbols, config(**settings))


def test_too_long_targets_are_rejected_and_counted(tmp_path, caplog):
    """Utterances with more phones than frames are rejected, and the others keep their rows."""
    import numpy as np
    import soundfile

    from jahubert.train.stages import prepare

    recipe = tmp_path / "mine"
    recipe.mkdir()
    soundfile.write(tmp_path / "a.wav", 0.1 * np.ones(16_000), 16_000)
    (recipe / "recipe.yaml").write_text("{}\n")
    (recipe / "prepare.py").write_text(
        "from dataclasses import dataclass\n"
        "from jahubert.audio import AudioSource\n"
        "from jahubert.train.data.manifest import Utterance\n"
        "@dataclass(frozen=True)\nclass Config:\n    pass\n"
        "def prepare(data, work, config, seed):\n"
        "    for n in (10, 49, 50, 120):\n"
        "        words = (tuple('ai'[i % 2] for i in range(n)),)\n"
        f"        yield Utterance(f'n{{n}}', AudioSource({str(tmp_path / 'a.wav')!r}), words=words)\n"
    )
    for name in ("prepare", "targets"):
        (tmp_path / name).mkdir()
    prepare.run(prepare.Config(recipe=str(recipe)), tmp_path / "prepare")
    manifest = tmp_path / "prepare/manifest.arrow"
    metrics = targets.run(targets.Config(manifest), tmp_path / "targets")
    assert HUBERT.n_frames(16_000) == 49
    assert metrics["rejected"] == {"target longer than its audio": 2} and metrics["utterances"] == 2
    assert "rejected utterances: 2 (target longer than its audio)" in caplog.text
    lines = (tmp_path / "targets/rejected.jsonl").read_text().splitlines()
    assert Counter(json.loads(line)["id"] for line in lines) == {"n50": 1, "n120": 1}
    assert TargetStore(tmp_path / "targets").labeled_rows.tolist() == [0, 1]
