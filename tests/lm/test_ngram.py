"""Tests of n-gram models: Kneser-Ney estimation against a reference, queries, and ARPA files."""

from __future__ import annotations

import gzip
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jahubert.errors import ConfigError, DataError
from jahubert.limits import GZIP_BYTES
from jahubert.lm.arpa import read_arpa, write_arpa
from jahubert.lm.kneser_ney import FALLBACK_DISCOUNTS, train_ngram
from jahubert.lm.ngram import END, START, UNKNOWN, perplexity

ARPA = """\
written by hand

\\data\\
ngram 1=5
ngram 2=3
ngram 3=1

\\1-grams:
-2.0\t<unk>
-99\t<s>\t-0.5
-1.0\t</s>
-0.5\tア\t-0.25
-0.75\tカ\t-0.125

\\2-grams:
-0.125\t<s> ア\t-0.0625
-0.25\tア カ\t-0.375
-0.5\tカ ア

\\3-grams:
-0.03125\t<s> ア カ

\\end\\
"""


def random_text(seed: int, n_sentences: int, n_words: int = 12) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, n_sentences)
    return [[f"w{int(w)}" for w in np.minimum(rng.geometric(0.3, n), n_words)] for n in lengths]


class DirectKneserNey:
    """Reference implementation of interpolated modified Kneser-Ney smoothing that uses dictionaries."""

    def __init__(self, sentences: list[list[str]], order: int):
        padded = [(START, *sentence, END) for sentence in sentences]
        self.vocabulary = {END, UNKNOWN, *(w for sentence in sentences for w in sentence)}
        raw = [
            Counter(s[i : i + n] for s in padded for i in range(len(s) - n + 1)) for n in range(1, order + 1)
        ]
        self.counts: list[dict[tuple, int]] = []
        for n in range(1, order + 1):
            if n == order:
                adjusted = dict(raw[n - 1])
            else:
                before = Counter(gram[1:] for gram in raw[n])
                adjusted = {g: c if g[0] == START else before[g] for g, c in raw[n - 1].items()}
            adjusted.pop((START,), None)
            self.counts.append(adjusted)
        self.discounts = [self._discounts(counts) for counts in self.counts]

    @staticmethod
    def _discounts(counts: dict[tuple, int]) -> tuple[float, ...]:
        n = [sum(c == k for c in counts.values()) for k in range(5)]
        if n[1] and n[2] and n[3]:
            y = n[1] / (n[1] + 2 * n[2])
            found = tuple(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))
            if all(0 < d <= k for k, d in enumerate(found, 1)):
                return found
        return FALLBACK_DISCOUNTS

    def probability(self, context: tuple[str, ...], word: str) -> float:
        if not context:
            lower = 1 / len(self.vocabulary)
        else:
            lower = self.probability(context[1:], word)
        counts = {g[-1]: c for g, c in self.counts[len(context)].items() if g[:-1] == context}
        total = sum(counts.values())
        if not total:
            return lower
        d = (0.0, *self.discounts[len(context)])
        weight = sum(d[min(c, 3)] for c in counts.values()) / total
        count = counts.get(word, 0)
        return (count - d[min(count, 3)]) / total + weight * lower


@pytest.mark.parametrize(("seed", "n_sentences", "order"), [(0, 40, 3), (1, 300, 4), (2, 4, 2), (3, 60, 1)])
def test_estimates_equal_the_definition(seed, n_sentences, order):
    text = random_text(seed, n_sentences)
    model, direct = train_ngram(text, order), DirectKneserNey(text, order)
    for sentence in [*text[:10], ["w1", "unseen", "w2", "w2", "w1"]]:
        padded = [START, *(w if w in direct.vocabulary else UNKNOWN for w in sentence), END]
        expected = [
            math.log(direct.probability(tuple(padded[max(0, i - order + 1) : i]), padded[i]))
            for i in range(1, len(padded))
        ]
        assert model.sentence_logp(sentence) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("order", "min_gain"), [(1, 0.0), (2, 0.0), (4, 0.0), (1, 2.0), (4, 0.5), (4, 1e9)])
def test_probabilities_sum_to_one_in_every_context(order, min_gain):
    model = train_ngram(random_text(5, 200), order, min_gain)
    states = np.unique(model.state_M)
    logp_RV, next_RV = model.rows(states)
    logp_RV[:, model.start_word] = -math.inf
    assert np.exp(logp_RV.astype(float)).sum(1) == pytest.approx(np.ones(len(states)), abs=1e-5)
    for row, state in enumerate(states.tolist()):
        words = np.flatnonzero(np.isfinite(logp_RV[row]))
        logp_R, next_R = model.score(np.full(len(words), state), words)
        assert logp_R == pytest.approx(logp_RV[row, words], abs=1e-5)
        assert (next_R == next_RV[row, words]).all()


def ngrams(model) -> dict[tuple[str, ...], float]:
    """Return the log-probability of every n-gram in a model."""
    grams: list[tuple[str, ...]] = [()]
    for key in model.key_N.tolist():
        context, word = divmod(key, len(model.words))
        grams.append((*grams[context], model.words[word]))
    return dict(zip(grams[1:], model.logp_N.tolist(), strict=True))


def test_pruning_omits_exactly_the_ngrams_with_little_gain():
    text = random_text(6, 300)
    order, min_gain = 4, 1.0
    direct, full = DirectKneserNey(text, order), ngrams(train_ngram(text, order))
    pruned = ngrams(train_ngram(text, order, min_gain))
    counts = Counter(
        tuple(s[i : i + n])
        for s in ([START, *sentence, END] for sentence in text)
        for n in range(1, order + 1)
        for i in range(len(s) - n + 1)
    )
    needed: set[tuple[str, ...]] = set()
    for gram in sorted(full, key=len, reverse=True):
        *context, word = gram
        if len(gram) > 1:
            discounted = {g[-1]: c for g, c in direct.counts[len(context)].items() if g[:-1] == (*context,)}
            d = (0.0, *direct.discounts[len(context)])
            weight = sum(d[min(c, 3)] for c in discounted.values()) / sum(discounted.values())
            lower = weight * direct.probability((*context[1:],), word)
            gain = counts[gram] * (full[gram] - math.log(lower))
            assert abs(gain - min_gain) > 1e-4  # otherwise, rounding could decide
            expected = gram in needed or gain >= min_gain
        else:
            expected = True
        assert (gram in pruned) == expected, gram
        if expected:
            assert pruned[gram] == full[gram]
            needed |= {gram[:-1], gram[1:]}
    assert len(full) / 4 < len(pruned) < len(full) / 1.5


@pytest.mark.parametrize("seed", range(3))
def test_pruned_model_is_smaller_and_not_worse(seed):
    text, other = random_text(10 + seed, 2000), random_text(20 + seed, 200)
    full, pruned = train_ngram(text, 4), train_ngram(text, 4, 2.0)
    assert sum(pruned.counts) < 0.5 * sum(full.counts)
    # The words are drawn independently, so that longer contexts only cause overfitting.
    assert perplexity(pruned, other).including_unknown < perplexity(full, other).including_unknown


def test_orders_whose_ngrams_are_all_pruned_are_omitted(tmp_path):
    model = train_ngram(random_text(5, 200), 4, 1e9)
    assert model.order == 1
    write_arpa(model, tmp_path / "a.arpa")
    assert read_arpa(tmp_path / "a.arpa").counts == model.counts


def test_digits_of_an_arpa_file_limit_its_precision(tmp_path):
    model = train_ngram(random_text(6, 300), 3)
    for digits in (2, 4, 7):
        write_arpa(model, tmp_path / f"{digits}.arpa", digits)
        read = read_arpa(tmp_path / f"{digits}.arpa")
        assert (read.key_N == model.key_N).all()
        assert read.logp_N[2:] == pytest.approx(model.logp_N[2:], rel=10.0 ** (1 - digits))
    sizes = [(tmp_path / f"{digits}.arpa").stat().st_size for digits in (2, 4, 7)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]
    with pytest.raises(ValueError, match="digits"):
        write_arpa(model, tmp_path / "a.arpa", 0)


@pytest.mark.parametrize("min_gain", [-1.0, math.inf, math.nan])
def test_invalid_threshold_is_rejected(min_gain):
    with pytest.raises(ConfigError, match="min_gain"):
        train_ngram([["a"]], 2, min_gain)


def test_orders_without_ngrams_are_omitted():
    assert train_ngram([["a"], ["b"]], 5).order == 3  # the longest n-grams are <s> a </s> and <s> b </s>


@pytest.mark.parametrize("sentences", [[], [[]], [["a", "</s>"]], [["<s>"]]])
def test_text_without_words_or_with_reserved_words_is_rejected(sentences):
    with pytest.raises(DataError):
        train_ngram(sentences)


@pytest.mark.parametrize("order", [0, 21])
def test_order_out_of_range_is_rejected(order):
    with pytest.raises(ConfigError, match="order"):
        train_ngram([["a"]], order)


@pytest.fixture
def arpa(tmp_path) -> Path:
    path = tmp_path / "hand.arpa"
    path.write_text(ARPA, encoding="utf-8")
    return path


@pytest.mark.parametrize("damage", ["flip", "zero", "cut"])
def test_damage_to_a_compressed_file_is_detected(tmp_path, damage):
    """The checksum at the end of a gzip file is compared."""
    path, rng = tmp_path / "lm.arpa.gz", np.random.default_rng(0)
    write_arpa(train_ngram(random_text(0, 40), 3), path)
    content = path.read_bytes()
    for position in rng.integers(10, len(content), 40).tolist():  # damage in the header may be harmless
        damaged = bytearray(content)
        if damage == "cut":
            del damaged[position:]
        else:
            damaged[position] = 0 if damage == "zero" else damaged[position] ^ 1
        path.write_bytes(damaged)
        if damaged != content:
            with pytest.raises(DataError, match=re.escape(str(path))):
                read_arpa(path)


@pytest.mark.parametrize(
    "content", ["\n" * 30_000, ARPA + "more", ARPA + ARPA, ARPA.replace("\n", "\n" * 20_000)]
)
def test_other_content_is_rejected(tmp_path, content):
    path = tmp_path / "lm.arpa"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_arpa(path)
    path.write_text(ARPA + "\n \n", encoding="utf-8")
    assert read_arpa(path).order == 3


def test_backoff_weights_of_the_file_are_used(arpa):
    model = read_arpa(arpa)
    assert (model.order, model.counts) == (3, (5, 3, 1))
    logps = model.sentence_logp(["ア", "カ", "カ", "x"]) / math.log(10)
    # <s> ア and <s> ア カ are in the file. The other words back off to bigrams, unigrams or <unk>.
    assert logps == pytest.approx([-0.125, -0.03125, -0.375 - 0.125 - 0.75, -0.125 - 2.0, -1.0], abs=1e-5)


@pytest.mark.parametrize("name", ["model.arpa", "model.arpa.gz"])
def test_written_model_is_read_back(tmp_path, name):
    model = train_ngram(random_text(7, 100), 3)
    write_arpa(model, tmp_path / name)
    assert (tmp_path / name).read_bytes()[:2] == (b"\x1f\x8b" if name.endswith("gz") else b"\\d")
    again = read_arpa(tmp_path / name)
    assert again.counts == model.counts and again.words == model.words
    for sentence in random_text(8, 20):
        assert again.sentence_logp(sentence) == pytest.approx(model.sentence_logp(sentence), abs=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("ngram 2=3", "ngram 2=4", 19),
        ("ngram 2=3", "ngram 3=3", 5),
        ("-0.5\tア\t-0.25", "-0.5\tア\tx", 12),
        ("-0.5\tア\t-0.25", "0.5\tア", 12),
        ("-0.5\tア\t-0.25", "nan\tア", 12),
        ("-0.5\tア\t-0.25", "-0.5\tア\tinf", 12),
        ("-0.5\tア\t-0.25", "-0.5\tア\t1e38", 12),
        ("-0.75\tカ", "-0.75\tア", 13),
        ("-0.25\tア カ", "-0.25\tア キ", 17),
        ("-0.25\tア カ", "-0.25\tア", 17),
        ("-0.25\tア カ\t-0.375", "-0.25\t<s> ア", 17),
        ("-0.03125\t<s> ア カ", "-0.03125\tカ カ カ", 21),
        ("\\3-grams:", "\\4-grams:", 20),
        ("\\end\\\n", "", 23),
        ("\\data\\", "data", 24),
    ],
)
def test_invalid_file_is_rejected_with_its_line(tmp_path, old, new, line):
    assert ARPA.count(old) == 1
    path = tmp_path / "bad.arpa"
    path.write_text(ARPA.replace(old, new), encoding="utf-8")
    with pytest.raises(DataError, match=rf"bad\.arpa:{line}: "):
        read_arpa(path)


def test_blank_lines_between_sections_are_optional(tmp_path, arpa):
    (tmp_path / "dense.arpa").write_text(ARPA.replace("\n\n", "\n"), encoding="utf-8")
    dense, plain = read_arpa(tmp_path / "dense.arpa"), read_arpa(arpa)
    assert dense.counts == plain.counts and dense.words == plain.words
    assert dense.sentence_logp(["ア", "カ"]) == pytest.approx(plain.sentence_logp(["ア", "カ"]))


def test_unknown_word_may_be_in_capitals(tmp_path, arpa):
    (tmp_path / "capitals.arpa").write_text(ARPA.replace("<unk>", "<UNK>"), encoding="utf-8")
    capitals, plain = read_arpa(tmp_path / "capitals.arpa"), read_arpa(arpa)
    assert capitals.sentence_logp(["x"]) == pytest.approx(plain.sentence_logp(["x"]))
    assert perplexity(capitals, [["<UNK>", "x", "ア"]]).unknown == 2


@pytest.mark.parametrize("zero", ["-99", "-inf", "-1e38", "-1e300"])
def test_probabilities_of_zero_are_read_as_the_lowest_finite_one(tmp_path, zero):
    """Probabilities and back-off weights of zero become 1e-99, as in SRILM."""
    path = tmp_path / "zero.arpa"
    text = ARPA.replace("-0.75\tカ\t-0.125", f"{zero}\tカ\t{zero}").replace("-0.25\tア カ", f"{zero}\tア カ")
    path.write_text(text, encoding="utf-8")
    model = read_arpa(path)
    logps = model.sentence_logp(["カ", "カ", "ア", "カ"]) / math.log(10)
    expected = [-0.5 - 99, -99 - 99, -0.5, -99, -0.375 - 99 - 1]
    assert logps == pytest.approx(expected, abs=1e-4)
    assert np.isfinite(perplexity(model, [["カ", "x"]]).excluding_unknown)
    write_arpa(model, tmp_path / "again.arpa")
    again = read_arpa(tmp_path / "again.arpa")
    assert again.logp_N.tolist() == pytest.approx(model.logp_N.tolist())


def test_hostile_files_are_rejected(tmp_path):
    path = tmp_path / "bad.arpa"
    for content in (
        b"\\data\\\n" + b"x" * 100_000,
        b"\\data\\\nngram 1=999999999999999\n\n\\1-grams:\n-1\ta\n\n\\end\\\n",
        b"\\data\\\n\n\\1-grams:\n-1\t\xff\n\n\\end\\\n",
        b"\x00" * 1000,
        b"\\data\\\nngram " + b"1" * 5000 + b"=1\n\n\\1-grams:\n",
        gzip.compress(ARPA.encode())[:-30],
        b"\x1f\x8bnothing",
        gzip.compress(ARPA.encode() + b" " * GZIP_BYTES),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.arpa"):
            read_arpa(path)
    with pytest.raises(DataError, match=r"none\.arpa"):
        read_arpa(tmp_path / "none.arpa")


def test_perplexity_includes_or_excludes_unknown_words(arpa):
    found = perplexity(read_arpa(arpa), [["ア", "x"], ["カ"]])
    logps = [-0.125, -0.0625 - 0.25 - 2.0, -1.0, -0.5 - 0.75, -0.125 - 1.0]  # of ア, x, </s>, カ and </s>
    assert (found.sentences, found.words, found.unknown) == (2, 3, 1)
    assert found.including_unknown == pytest.approx(10 ** (-sum(logps) / 5), rel=1e-4)
    assert found.excluding_unknown == pytest.approx(10 ** (-(sum(logps) - logps[1]) / 4), rel=1e-4)
    with pytest.raises(DataError):
        perplexity(read_arpa(arpa), [])


def test_perplexity_needs_a_sentence_end(tmp_path):
    path = tmp_path / "a.arpa"
    path.write_text("\\data\\\nngram 1=1\n\n\\1-grams:\n-0.5\ta\n\n\\end\\\n")
    with pytest.raises(DataError, match="</s>"):
        perplexity(read_arpa(path), [["a"]])


def test_unknown_words_have_kenlms_floor_without_unk():
    model = train_ngram([["a", "b"]], 2)
    logp_R, next_R = model.score(np.array([model.start_state]), np.array([-1]))
    assert logp_R[0] == pytest.approx(-100 * math.log(10)) and next_R[0] == 0
