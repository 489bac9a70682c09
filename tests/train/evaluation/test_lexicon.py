"""Tests of lexicon search against exhaustive search, with an n-gram model, and with invalid files."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from jahubert.errors import ConfigError, DataError
from jahubert.phonemes import BLANK, PhonemeSet
from jahubert.train.data.targets import kana_set
from jahubert.train.evaluation.lexicon import LexiconConfig, LexiconSearch, read_lexicon

SYMBOLS = PhonemeSet((BLANK, "|", "a", "k", "i"))
WORDS = "ア a\nカ k a\nキ k i\nア2 a\n\nアイ a i\n"
ARPA = """\\data\\
ngram 1=6
ngram 2=2

\\1-grams:
-2.0	<unk>
-99	<s>	-0.1
-1.0	</s>
-0.5	ア	-0.2
-1.2	カ	-0.2
-1.2	キ	-0.2

\\2-grams:
-0.1	<s> カ
-0.1	カ キ

\\end\\
"""


def log_probs(seed: int, frames: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(1, frames, len(SYMBOLS), generator=generator)).log_softmax(-1)


def exhaustive_search(logp_SV: torch.Tensor, allowed: set[tuple[str, ...]]) -> dict[tuple, float]:
    """Return the log-probability of every word sequence, summed over paths and outer boundaries."""
    rows = logp_SV.double().tolist()
    scores: dict[tuple, float] = defaultdict(lambda: -np.inf)
    for path in itertools.product(range(len(SYMBOLS)), repeat=len(rows)):
        labels = [label for label, _ in itertools.groupby(path) if label]
        words = tuple(SYMBOLS.decode(labels))
        if set(words) <= allowed:
            logp = sum(row[v] for row, v in zip(rows, path, strict=True))
            scores[words] = np.logaddexp(scores[words], logp)
    return scores


@pytest.fixture
def words(tmp_path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS, encoding="utf-8")
    return path


@pytest.fixture
def ngram(tmp_path) -> Path:
    path = tmp_path / "words.arpa"
    path.write_text(ARPA, encoding="utf-8")
    return path


def test_search_finds_the_most_probable_word_sequences(words):
    pytest.importorskip("flashlight.lib.text.decoder")
    search = LexiconSearch(LexiconConfig(words), SYMBOLS, beam=2000, n_best=3)
    allowed = {spelling for _, spelling in read_lexicon(words, SYMBOLS)}
    for seed in range(12):
        logp = log_probs(seed)
        truth = sorted(exhaustive_search(logp[0], allowed).items(), key=lambda item: -item[1])
        hypotheses = search(logp, [5])[0]
        decoded = [tuple(SYMBOLS.decode(h.labels)) for h in hypotheses]
        assert decoded == [sequence for sequence, _ in truth[:3]]
        assert [h.score for h in hypotheses] == pytest.approx([score for _, score in truth[:3]], abs=1e-3)


def test_result_does_not_depend_on_the_batch(words):
    pytest.importorskip("flashlight.lib.text.decoder")
    search = LexiconSearch(LexiconConfig(words), SYMBOLS, beam=20, n_best=2)
    logp = torch.cat([log_probs(seed, 9) for seed in range(4)])
    counts = [9, 4, 0, 7]
    together = search(logp, torch.tensor(counts))
    assert together == [search(logp[row : row + 1, :n], [n])[0] for row, n in enumerate(counts)]
    assert together[2][0].labels == ()


def test_ngram_decides_between_equally_probable_words(words, ngram):
    pytest.importorskip("flashlight.lib.text.decoder")
    logp = torch.full((1, 3, 5), -1e4)
    logp[0, 0, SYMBOLS.encode(["k"])] = 0.0  # k, then a or i with equal probability
    logp[0, 1, [2, 4]] = np.log(0.5)
    logp[0, 2, 0] = 0.0

    def best(**settings) -> list[tuple[str, ...]]:
        search = LexiconSearch(LexiconConfig(words, ngram, **settings), SYMBOLS, beam=20, n_best=1)
        return SYMBOLS.decode(search(logp, [3])[0][0].labels)

    assert best() == [("k", "a")]  # the n-gram prefers カ after <s>
    assert best(ngram_weight=-1.0) == [("k", "i")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ア a\nイ\n", r"words.txt:2: 'イ'"),
        ("ア a\nウ u\n", r"words.txt:2: 'u'"),
        ("\n", "words.txt"),
    ],
)
def test_invalid_word_list_is_rejected(tmp_path, text, message):
    path = tmp_path / "words.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_lexicon(path, SYMBOLS)
    with pytest.raises(DataError, match="none"):
        read_lexicon(tmp_path / "none.txt", SYMBOLS)


def test_incompatible_settings_are_rejected(words, tmp_path):
    with pytest.raises(ConfigError, match="ngram_weight"):
        LexiconConfig(words, ngram_weight=2.0)
    pytest.importorskip("flashlight.lib.text.decoder")
    with pytest.raises(ConfigError, match="word boundaries"):
        LexiconSearch(LexiconConfig(words), PhonemeSet((BLANK, "a", "k", "i")), 20, 1)
    with pytest.raises(DataError, match="arpa"):
        LexiconSearch(LexiconConfig(words, tmp_path / "none.arpa"), SYMBOLS, 20, 1)
    assert kana_set().boundary == 1
