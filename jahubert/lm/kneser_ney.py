"""Estimation of n-gram models with interpolated modified Kneser-Ney smoothing.

The method is that of Chen and Goodman 1998, "An empirical study of smoothing techniques for language
modeling", with the conventions of KenLM's lmplz (Heafield et al. 2013): n-grams that start with `<s>` keep
their counts at all orders, and unigrams are interpolated with a uniform distribution over the words, `</s>`
and `<unk>`.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jahubert.errors import ConfigError, DataError
from jahubert.lm.arpa import MAX_ORDER
from jahubert.lm.ngram import END, START, UNKNOWN, Entries, NGram

log = logging.getLogger(__name__)

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # those of lmplz, used if a text is too small for an estimate
_START_LOGP = -99.0 * np.log(10.0)  # <s> is never predicted


@dataclass(frozen=True)
class _Counts:
    """The distinct n-grams of one order, sorted by context and word.

    Attributes:
        position_N: one position in the text at which each n-gram starts (unused for unigrams).
        context_N, suffix_N: row, in the counts of the next lower order, of each n-gram without its last word
            (context) or without its first word (suffix). For unigrams, all rows are 0.
        count_N: number of occurrences of each n-gram.
    """

    position_N: np.ndarray
    context_N: np.ndarray
    suffix_N: np.ndarray
    count_N: np.ndarray


def train_ngram(sentences: Iterable[Sequence[str]], order: int = 3, min_gain: float = 0.0) -> NGram:
    """Estimate an n-gram model.

    Args:
        sentences: the words of each sentence, without `<s>` and `</s>`.
        order: length of the longest n-grams.
        min_gain: threshold for pruning in nats (see `_prune`). 0: no pruning.

    Raises:
        ConfigError: `order` or `min_gain` is out of range.
        DataError: the text has no words, or contains a reserved word (`<s>`, `</s>`).
    """
    if not 1 <= order <= MAX_ORDER:
        raise ConfigError(f"order is {order}, but must be between 1 and {MAX_ORDER}")
    if not 0 <= min_gain < np.inf:
        raise ConfigError(f"min_gain is {min_gain}, but must be at least 0 and finite")
    words, token_T = _encode(sentences)
    all_counts = _count(token_T, len(words), order)
    probs: list[np.ndarray] = []  # for each order, the probabilities of the n-grams
    weights: list[np.ndarray] = []  # for each order but the last, the back-off weights of the n-grams
    lower_N = np.full(len(words), 1.0 / (len(words) - 1))  # uniform distribution over all words but <s>
    for n, counts in enumerate(all_counts, 1):
        adjusted_N = counts.count_N
        if n < len(all_counts):  # use the continuation count, the number of distinct words before the n-gram
            adjusted_N = np.bincount(all_counts[n].suffix_N, minlength=len(adjusted_N))
            if n > 1:
                starts_N = token_T[counts.position_N] == 0
                adjusted_N = np.where(starts_N, counts.count_N, adjusted_N)
        if n == 1:
            adjusted_N[0] = 0  # <s> is never predicted
        lower_N, weight_C = _interpolate(counts, adjusted_N, lower_N, n)
        probs.append(lower_N)
        if n > 1:
            weights.append(weight_C)
    kept = _prune(all_counts, probs, weights, min_gain)
    while not kept[-1].any():  # all n-grams of the highest order were pruned
        del kept[-1], weights[-1]
    entries = []
    for n, (counts, prob_N, keep_N) in enumerate(zip(all_counts, probs, kept, strict=False), 1):
        logp_N = np.log(prob_N)
        if n == 1:
            logp_N[0] = _START_LOGP
            words_Nn = np.arange(len(words))[:, None]
        else:
            words_Nn = token_T[counts.position_N[:, None] + np.arange(n)]
        backoff_N = np.log(weights[n - 1]) if n < len(kept) else np.zeros(len(logp_N))
        entries.append(Entries(words_Nn[keep_N], logp_N[keep_N], backoff_N[keep_N]))
    return NGram(words, entries)


def _prune(
    all_counts: list[_Counts], probs: list[np.ndarray], weights: list[np.ndarray], min_gain: float
) -> list[np.ndarray]:
    """Return which n-grams of each order to keep, and update `weights` in place.

    The criterion is the weighted difference (Seymore and Rosenfeld 1996, "Scalable backoff language models").
    The gain of an n-gram is its count times the difference between its log-probability and the one that the
    lower order gives it. It estimates by how much the n-gram raises the log-probability of the text. An
    n-gram is pruned if its gain is less than `min_gain`, unless it is a unigram, or the context or suffix of
    a kept n-gram. The new weight of a context is (1 - sum of p) / (1 - sum of lower p) over its kept n-grams.
    """
    kept = [np.ones(len(counts.count_N), bool) for counts in all_counts]
    if min_gain == 0:
        return kept
    needed = [np.zeros(len(counts.count_N), bool) for counts in all_counts]
    for n in range(len(all_counts) - 1, 0, -1):
        counts, prob_N, lower_N = all_counts[n], probs[n], probs[n - 1][all_counts[n].suffix_N]
        context_N = counts.context_N
        gain_N = counts.count_N * np.log(prob_N / (weights[n - 1][context_N] * lower_N))
        kept[n] = keep_N = needed[n] | (gain_N >= min_gain)
        for rows_N in (context_N, counts.suffix_N):
            needed[n - 1][rows_N[keep_N]] = True
        n_contexts = len(weights[n - 1])
        sum_C, lower_sum_C = (
            np.bincount(context_N[keep_N], values_N[keep_N], n_contexts) for values_N in (prob_N, lower_N)
        )
        pruned_C = np.bincount(context_N[~keep_N], minlength=n_contexts) > 0
        weights[n - 1] = np.divide(1 - sum_C, 1 - lower_sum_C, out=weights[n - 1].copy(), where=pruned_C)
    return kept


def _encode(sentences: Iterable[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """Return the vocabulary (`<s>`, `</s>`, `<unk>`, words by first occurrence) and the text as indices."""
    index = {START: 0, END: 1, UNKNOWN: 2}
    tokens = array("i")
    for number, sentence in enumerate(sentences, 1):
        if not sentence:
            continue
        if START in sentence or END in sentence:
            raise DataError(f"sentence {number} contains {START} or {END}, which are reserved")
        tokens.append(0)
        tokens.extend([index.setdefault(word, len(index)) for word in sentence])
        tokens.append(1)
    if not tokens:
        raise DataError("the text has no words")
    return list(index), np.array(tokens, np.int64)


def _count(token_T: np.ndarray, n_words: int, order: int) -> list[_Counts]:
    """Count the distinct n-grams of each order, up to `order` or the length of the longest sentence."""
    counts = []
    row_T = np.zeros(len(token_T), np.int64)  # row of the n-gram that starts at each position
    start_T = np.arange(len(token_T))
    for n in range(1, order + 1):
        if n > 1:  # n-grams do not cross sentence boundaries
            start_T = start_T[token_T[start_T + n - 2] != 1]
        if not len(start_T):
            break
        if n == 1:
            count_N = np.bincount(token_T, minlength=n_words)
            rows = np.arange(n_words)
            counts.append(_Counts(rows, np.zeros_like(rows), np.zeros_like(rows), count_N))
            row_T = token_T.copy()
            continue
        key_T = row_T[start_T] * n_words + token_T[start_T + n - 1]
        _, first_N, inverse_T, count_N = np.unique(
            key_T, return_index=True, return_inverse=True, return_counts=True
        )
        position_N = start_T[first_N]
        counts.append(_Counts(position_N, row_T[position_N], row_T[position_N + 1], count_N))
        new_row_T = np.full_like(row_T, -1)
        new_row_T[start_T] = inverse_T
        row_T = new_row_T
    return counts


def _interpolate(
    counts: _Counts, adjusted_N: np.ndarray, lower_N: np.ndarray, order: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute smoothed probabilities of n-grams, and the weight of the lower order in each context.

    Args:
        adjusted_N: counts or continuation counts.
        lower_N: probabilities of the n-grams of the next lower order, or the uniform distribution for
            unigrams.
    """
    discount_N = np.array([0.0, *_discounts(adjusted_N, order)])[np.minimum(adjusted_N, 3)]
    n_contexts = len(lower_N) if order > 1 else 1
    total_C = np.bincount(counts.context_N, adjusted_N, n_contexts)
    discounted_C = np.bincount(counts.context_N, discount_N, n_contexts)
    weight_C = np.divide(discounted_C, total_C, out=np.ones(n_contexts), where=total_C > 0)
    lower_N = lower_N[counts.suffix_N] if order > 1 else lower_N
    prob_N = (adjusted_N - discount_N) / total_C[counts.context_N] + weight_C[counts.context_N] * lower_N
    return prob_N, weight_C


def _discounts(adjusted_N: np.ndarray, order: int) -> tuple[float, float, float]:
    """Compute the discounts for counts of one, two, and three or more (Chen and Goodman, eq. 26)."""
    n1, n2, n3, n4 = (int((adjusted_N == k).sum()) for k in range(1, 5))
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        discounts = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if all(0 < discount <= k for k, discount in enumerate(discounts, 1)):
            return discounts
    log.warning(
        "%d-grams: the text is too small to estimate the discounts; using %s",
        order, "/".join(map(str, FALLBACK_DISCOUNTS)),
    )  # fmt: skip
    return FALLBACK_DISCOUNTS
