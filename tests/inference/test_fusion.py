"""Tests of beam search with language models and lexicons against enumeration of all label sequences."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from jahubert.errors import ConfigError, DataError
from jahubert.inference import fusion as fusion_module
from jahubert.inference.ctc import beam_search
from jahubert.inference.fusion import Lexicon, LexiconFusion, SymbolFusion, load_fusion
from jahubert.lm.arpa import read_arpa, write_arpa
from jahubert.lm.kneser_ney import train_ngram
from jahubert.lm.lexicon import read_lexicon, write_lexicon
from jahubert.phonemes import BLANK, BOUNDARY, PhonemeSet

SYMBOLS = PhonemeSet((BLANK, "|", "a", "k", "i"))
ENTRIES = [
    ("蚊", ("k", "a")),
    ("課", ("k", "a")),
    ("木", ("k", "i")),
    ("愛", ("a", "i")),
    ("ア", ("a",)),
    ("秋", ("a", "k", "i")),
    ("藍", ("a", "i")),
]
WEIGHTS = [(0.7, 0.3), (-0.5, 1.0), (2.0, -1.0)]
N_FRAMES = [5, 4, 2]


def random_logp(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, len(SYMBOLS), generator=generator, dtype=torch.float64)).log_softmax(-1)


@pytest.fixture(scope="module")
def symbol_model():
    rng = np.random.default_rng(0)
    return train_ngram(
        [[SYMBOLS.symbols[i] for i in rng.integers(1, 5, rng.integers(1, 6))] for _ in range(50)], 3
    )


@pytest.fixture(scope="module")
def word_model():
    rng = np.random.default_rng(1)
    known = [word for word, _ in ENTRIES[:-1]]  # the last word is <unk>
    return train_ngram([[known[i] for i in rng.integers(0, 6, rng.integers(1, 4))] for _ in range(60)], 3)


def every_sequence(logp_SV: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Return the CTC log-probability of every label sequence, by enumeration of all paths."""
    rows = logp_SV.tolist()
    scores: dict[tuple[int, ...], float] = defaultdict(lambda: -math.inf)
    for path in itertools.product(range(len(SYMBOLS)), repeat=len(rows)):
        labels = tuple(label for label, _ in itertools.groupby(path) if label)
        scores[labels] = np.logaddexp(scores[labels], sum(row[v] for row, v in zip(rows, path, strict=True)))
    return scores


def word_sequences(labels: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Return all word sequences that have the given labels, ignoring one word boundary at each end."""
    if labels in ((), (SYMBOLS.boundary,)):
        return [()]
    spelled = " ".join(SYMBOLS.symbols[label] for label in labels).removeprefix("| ").removesuffix(" |")
    groups = [tuple(group.split()) for group in spelled.split("|")]
    return list(itertools.product(*([w for w, spelling in ENTRIES if spelling == g] for g in groups)))


@pytest.mark.parametrize(("weight", "bonus"), WEIGHTS)
@pytest.mark.parametrize("seed", range(3))
def test_symbol_fusion_finds_every_sequence_in_order(symbol_model, seed, weight, bonus):
    logp = random_logp(seed, 3, 5)
    fusion = SymbolFusion(symbol_model, SYMBOLS, weight, bonus)
    results = beam_search(logp, N_FRAMES, beam=1000, n_best=40, fusion=fusion)
    for row, n in enumerate(N_FRAMES):
        expected = {}
        for labels, score in every_sequence(logp[row, :n]).items():
            lm = symbol_model.sentence_logp([SYMBOLS.symbols[label] for label in labels]).sum()
            expected[labels] = score + weight * lm + bonus * len(labels)
        found = {h.labels: h.score for h in results[row]}
        assert found == pytest.approx({labels: expected[labels] for labels in found}, abs=1e-4)
        assert list(found.values()) == pytest.approx(sorted(expected.values())[::-1][: len(found)], abs=1e-4)
        assert all(h.words is None for h in results[row])


@pytest.mark.parametrize(("weight", "bonus"), WEIGHTS)
@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_lexicon_fusion_finds_every_word_sequence_in_order(word_model, seed, with_model, weight, bonus):
    logp = random_logp(seed, 3, 5)
    fusion = LexiconFusion(Lexicon(ENTRIES, SYMBOLS), word_model if with_model else None, weight, bonus)
    results = beam_search(logp, N_FRAMES, beam=1000, n_best=20, fusion=fusion)
    for row, n in enumerate(N_FRAMES):
        expected = {}
        for labels, score in every_sequence(logp[row, :n]).items():
            for words in word_sequences(labels):
                lm = word_model.sentence_logp(words).sum() if with_model else 0.0
                expected[labels, words] = score + weight * lm + bonus * len(words)
        # If no boundary follows the last word, the search lists only the best of its homophones.
        listed: dict[tuple, float] = {}
        for (labels, words), score in expected.items():
            open_end = words and labels[-1] != SYMBOLS.boundary
            key = (labels, words[:-1], "end") if open_end else (labels, words)
            listed[key] = max(score, listed.get(key, -math.inf))
        found = {(h.labels, h.words): h.score for h in results[row]}
        assert found == pytest.approx({key: expected[key] for key in found}, abs=1e-4)
        assert list(found.values()) == pytest.approx(sorted(listed.values())[::-1][: len(found)], abs=1e-4)
        assert len(found) == min(20, len(listed))


def test_results_do_not_depend_on_batch_or_cache(symbol_model, word_model, monkeypatch):
    logp = random_logp(7, 5, 30).float()
    counts = [30, 12, 0, 21, 1]
    for make in (
        lambda: SymbolFusion(symbol_model, SYMBOLS, 0.6, 0.1),
        lambda: LexiconFusion(Lexicon(ENTRIES, SYMBOLS), word_model, 0.6, 0.1),
    ):
        together = beam_search(logp, counts, beam=8, fusion=make())
        copied = pickle.loads(pickle.dumps(make()))
        monkeypatch.setattr(fusion_module, "MAX_CACHED", 0)  # empties the cache repeatedly
        for row, n in enumerate(counts):
            (alone,) = beam_search(logp[row : row + 1], [n], beam=8, fusion=copied)
            assert [(h.labels, h.words) for h in alone] == [(h.labels, h.words) for h in together[row]]
            assert alone[0].score == pytest.approx(together[row][0].score, abs=1e-3)
        monkeypatch.undo()


def test_threads_may_share_a_fusion(word_model):
    fusion = LexiconFusion(Lexicon(ENTRIES, SYMBOLS), word_model, 0.6, 0.1)
    inputs = [random_logp(seed, 4, 20) for seed in range(6)]
    expected = [beam_search(logp, [20] * 4, beam=8, fusion=copy.deepcopy(fusion)) for logp in inputs]
    with ThreadPoolExecutor(3) as pool:
        assert (
            list(pool.map(lambda logp: beam_search(logp, [20] * 4, beam=8, fusion=fusion), inputs))
            == expected
        )


def test_zero_weight_changes_nothing(symbol_model):
    logp = random_logp(3, 4, 25)
    plain = beam_search(logp, [25] * 4, beam=10, n_best=3)
    fused = beam_search(logp, [25] * 4, beam=10, n_best=3, fusion=SymbolFusion(symbol_model, SYMBOLS, 0.0))
    for a, b in zip(plain, fused, strict=True):
        assert [h.labels for h in a] == [h.labels for h in b]
        assert [h.score for h in a] == pytest.approx([h.score for h in b], abs=1e-6)


def test_only_words_of_the_lexicon_come_out_of_a_narrow_beam(word_model):
    fusion = LexiconFusion(Lexicon(ENTRIES, SYMBOLS), word_model, 0.5)
    spellings = {spelling for _, spelling in ENTRIES}
    for beam in (1, 2, 5):
        for (best,) in beam_search(random_logp(beam, 20, 15), [15] * 20, beam=beam, fusion=fusion):
            assert set(SYMBOLS.decode(best.labels)) <= spellings
            assert len(SYMBOLS.decode(best.labels)) == len(best.words or ())
            assert math.isfinite(best.score)


def test_reweighting_equals_a_new_fusion(word_model):
    logp = random_logp(5, 2, 12)
    lexicon = Lexicon(ENTRIES, SYMBOLS)
    changed = LexiconFusion(lexicon, word_model, 0.1, 0.1).reweighted(1.5, -0.5)
    assert beam_search(logp, [12, 12], fusion=changed) == beam_search(
        logp, [12, 12], fusion=LexiconFusion(lexicon, word_model, 1.5, -0.5)
    )


def test_files_are_loaded_and_checked(tmp_path, symbol_model, word_model):
    words, symbols, lexicon = tmp_path / "w.arpa", tmp_path / "s.arpa", tmp_path / "lexicon.txt"
    write_arpa(word_model, words)
    write_arpa(symbol_model, symbols)
    assert write_lexicon(ENTRIES, lexicon) == len(ENTRIES)
    assert load_fusion(SYMBOLS) is None
    assert isinstance(load_fusion(SYMBOLS, symbols), SymbolFusion)
    assert isinstance(load_fusion(SYMBOLS, words, lexicon), LexiconFusion)
    assert isinstance(load_fusion(SYMBOLS, None, lexicon), LexiconFusion)
    for arguments, name in (((words,), "w.arpa"), ((symbols, lexicon), "s.arpa")):
        with pytest.raises(DataError, match=name):
            load_fusion(SYMBOLS, *arguments)
    with pytest.raises(ConfigError, match="word boundaries"):
        load_fusion(PhonemeSet((BLANK, "a", "k", "i")), None, lexicon)
    with pytest.raises(ConfigError, match="word_bonus"):
        load_fusion(SYMBOLS, symbols, word_bonus=math.nan)
    with pytest.raises(ValueError, match="symbols"):
        beam_search(random_logp(0, 1, 4)[..., :3], [4], fusion=load_fusion(SYMBOLS, symbols))


def test_errors_in_a_lexicon_name_the_lexicon(tmp_path, word_model):
    words, lexicon = tmp_path / "w.arpa", tmp_path / "lexicon.txt"
    write_arpa(word_model, words)
    lexicon.write_text("word unknown-symbol\n")
    with pytest.raises(DataError) as raised:
        load_fusion(SYMBOLS, words, lexicon)
    assert str(raised.value).startswith(f"{lexicon}:1:") and "w.arpa" not in str(raised.value)


def test_language_model_of_another_unit_is_rejected(tmp_path):
    path = tmp_path / "kana.arpa"
    write_arpa(train_ngram([["ア", "|", "イ"], ["ウ", "|", "エ"]], 2), path)  # shares only the boundary
    with pytest.raises(DataError, match=r"kana\.arpa"):
        load_fusion(SYMBOLS, path)


@pytest.mark.parametrize("weight", [1.0, 0.0, -0.5])
def test_words_of_probability_zero_have_finite_scores(tmp_path, word_model, weight):
    """Neither the end of a sentence nor any word below one node of the lexicon has a positive probability."""
    write_arpa(word_model, tmp_path / "words.arpa")
    rows = (tmp_path / "words.arpa").read_text(encoding="utf-8").split("\n")
    models = []
    for zero in ("-99", "-inf"):
        path = tmp_path / "zero.arpa"
        path.write_text(
            "\n".join(
                "\t".join([zero, *row.split("\t")[1:]])
                if row.split("\t")[1:2] in (["蚊"], ["課"], ["</s>"])
                else row
                for row in rows
            ),
            encoding="utf-8",
        )
        models.append(read_arpa(path))
    results = [
        beam_search(
            random_logp(3, 2, 6), [6, 5], 20, n_best=5,
            fusion=LexiconFusion(Lexicon(ENTRIES, SYMBOLS), model, weight),
        )
        for model in models
    ]  # fmt: skip
    assert results[0] == results[1]
    assert all(math.isfinite(hypothesis.score) for row in results[1] for hypothesis in row)


@pytest.mark.parametrize(("missing", "level"), [(1, "INFO"), (20, "WARNING")])
def test_many_missing_symbols_cause_a_warning(tmp_path, caplog, missing, level):
    symbols = PhonemeSet.standard()
    names = [name for name in symbols.symbols if name not in (BLANK, BOUNDARY)]
    write_arpa(train_ngram([[BOUNDARY, *names[missing:]]], 1), tmp_path / "a.arpa")
    with caplog.at_level("INFO"):
        load_fusion(symbols, tmp_path / "a.arpa")
    assert [record.levelname for record in caplog.records if "symbols" in record.message] == [level]


def test_ngram_without_the_word_boundary_is_reported(tmp_path, caplog):
    """It scores every word boundary as unknown, so that the output has no words."""
    symbols = PhonemeSet.standard()
    names = [name for name in symbols.symbols if name not in (BLANK, BOUNDARY)]
    write_arpa(train_ngram([names], 1), tmp_path / "a.arpa")
    load_fusion(symbols, tmp_path / "a.arpa")
    assert [record.levelname for record in caplog.records if "word boundary" in record.message] == ["WARNING"]


def test_byte_order_mark_is_skipped(tmp_path, symbol_model):
    lexicon, arpa = tmp_path / "words.txt", tmp_path / "lm.arpa"
    lexicon.write_bytes("\ufeffア a\r\nキ k i\r\n".encode())
    assert read_lexicon(lexicon, SYMBOLS) == [("ア", ("a",)), ("キ", ("k", "i"))]
    write_arpa(symbol_model, arpa)
    arpa.write_bytes("\ufeff".encode() + arpa.read_bytes())
    assert read_arpa(arpa).words == symbol_model.words


@pytest.mark.parametrize("encoding", ["cp932", "utf-16"])
def test_lexicon_in_another_encoding_is_rejected_with_its_line(tmp_path, encoding):
    path = tmp_path / "words.txt"
    path.write_bytes("ア a\n".encode(encoding))
    with pytest.raises(DataError, match=r"words\.txt:1: not UTF-8"):
        read_lexicon(path, SYMBOLS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ア a\nイ\n", r"words.txt:2: 'イ'"),
        ("ア\u2028 a\nイ\n", r"words.txt:2: 'イ'"),
        ("ア a\nウ u\n", r"words.txt:2: 'u'"),
        ("\n", "words.txt"),
    ],
)
def test_invalid_lexicon_is_rejected(tmp_path, text, message):
    path = tmp_path / "words.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_lexicon(path, SYMBOLS)
    with pytest.raises(DataError, match="none"):
        read_lexicon(tmp_path / "none.txt", SYMBOLS)
