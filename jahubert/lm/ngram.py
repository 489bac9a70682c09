"""Back-off n-gram language model, stored in sorted arrays.

The n-grams form a prefix tree. Node 0 is the empty context, and every other node is an n-gram, that is, a
word appended to the node of its context. A node is found by binary search for its key, `context * V + word`.
A language model state is the node of the longest context that affects the next word.

Shapes: V words, N n-grams, M = N + 1 nodes, R rows (queries). All probabilities are natural logarithms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jahubert.errors import DataError, quote

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
UNKNOWNS = (UNKNOWN, "<UNK>")  # names of the unknown word in ARPA files of different toolkits
# Log-probability of an unknown word if the model has no <unk>, as in KenLM.
UNSEEN_LOGP = -100.0 * np.log(10.0)


class NGramError(DataError):
    """Raised if an n-gram is inconsistent with the others; `order` and `row` locate it in `entries`."""

    def __init__(self, message: str, order: int, row: int):
        super().__init__(message)
        self.order = order
        self.row = row


@dataclass(frozen=True)
class Entries:
    """The n-grams of one order.

    Attributes:
        words_Nn: word indices of each n-gram, int (N, order).
        logp_N: log-probability of the last word after the preceding words.
        backoff_N: log back-off weight of the n-gram as a context.
    """

    words_Nn: np.ndarray
    logp_N: np.ndarray
    backoff_N: np.ndarray


class NGram:
    """Back-off language model with batched queries, in which states and words are integers.

    Args:
        words: vocabulary. The indices in `entries` are positions in this list.
        entries: the n-grams of each order, starting with order 1. Every word requires a unigram.

    Raises:
        NGramError: an n-gram occurs twice, or its context is missing.
        DataError: a word has no unigram.
    """

    def __init__(self, words: Sequence[str], entries: Sequence[Entries]):
        self.words = tuple(words)
        self.order = len(entries)
        self.counts = tuple(len(entry.logp_N) for entry in entries)
        self.index = {word: i for i, word in enumerate(self.words)}
        self.start_word = self.index.get(START, -1)
        self.end_word = self.index.get(END, -1)
        self.unknown_word = next((self.index[name] for name in UNKNOWNS if name in self.index), -1)
        if self.counts[0] != len(self.words):
            raise DataError(
                f"the number of words in the vocabulary ({len(self.words)}) differs from the number of "
                f"unigrams ({self.counts[0]})"
            )
        self.key_N = np.empty(0, np.int64)
        logps, backoffs = [], [np.zeros(1, np.float32)]
        for order, entry in enumerate(entries, 1):
            key_N, sort_N = self._keys(entry.words_Nn, order)
            logps.append(entry.logp_N[sort_N].astype(np.float32))
            backoffs.append(entry.backoff_N[sort_N].astype(np.float32))
            self.key_N = np.concatenate([self.key_N, key_N])
        self.logp_N = np.concatenate(logps)
        self.backoff_M = np.concatenate(backoffs)
        n_nodes = len(self.key_N) + 1
        firsts = np.arange(n_nodes + 1, dtype=np.int64) * len(self.words)
        self.first_child_M = np.searchsorted(self.key_N, firsts)  # children of m: [first[m], first[m + 1])
        self.suffix_M = self._suffixes()
        self.state_M = self._states()
        self.start_state = int(self.state_M[1 + self.start_word]) if self.start_word >= 0 else 0

    def _keys(self, words_Nn: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sorted keys of the n-grams of an order, and the sorting permutation."""
        node_N = np.zeros(len(words_Nn), np.int64)
        for column in range(order - 1):
            node_N = self._find(node_N, words_Nn[:, column])
            if len(missing := np.flatnonzero(node_N < 0)):
                row = int(missing[0])
                context = " ".join(self.words[w] for w in words_Nn[row, : column + 1])
                raise NGramError(f"the context {quote(context)} of this n-gram is missing", order, row)
        key_N = node_N * len(self.words) + words_Nn[:, order - 1]
        sort_N = np.argsort(key_N, kind="stable")
        key_N = key_N[sort_N]
        if len(repeated := np.flatnonzero(key_N[1:] == key_N[:-1])):
            raise NGramError("this n-gram is a duplicate", order, int(sort_N[repeated[0] + 1]))
        return key_N, sort_N

    def _find(self, context_R: np.ndarray, word_R: np.ndarray) -> np.ndarray:
        """Return the node of each context with a word appended, or -1 if the model lacks this n-gram."""
        if not len(self.key_N):
            return np.full(len(context_R), -1, np.int64)
        key_R = context_R * len(self.words) + word_R
        position_R = np.searchsorted(self.key_N, key_R)
        position_R[position_R == len(self.key_N)] = 0
        return np.where(self.key_N[position_R] == key_R, position_R + 1, -1)

    def _suffixes(self) -> np.ndarray:
        """Return, for each node, the node of its longest proper suffix that is in the model."""
        suffix_M = np.zeros(len(self.key_N) + 1, np.int64)
        start = 1 + self.counts[0]
        for count in self.counts[1:]:
            node_R = np.arange(start, start + count)
            context_R, word_R = np.divmod(self.key_N[node_R - 1], len(self.words))
            while len(node_R):
                context_R = suffix_M[context_R]
                match_R = self._find(context_R, word_R)
                found_R = match_R >= 0
                suffix_M[node_R[found_R]] = match_R[found_R]
                node_R, context_R, word_R = node_R[~found_R], context_R[~found_R], word_R[~found_R]
            start += count
        return suffix_M

    def _states(self) -> np.ndarray:
        """Return the state of each node: the node if it affects the next word, or else its suffix's state."""
        matters_M = (np.diff(self.first_child_M) > 0) | (self.backoff_M != 0)
        n_contexts = len(self.key_N) + 1 - self.counts[-1]
        matters_M[n_contexts:] = False
        state_M = np.arange(len(matters_M))
        start = 1
        for count in self.counts:  # suffixes have lower orders, so their states are already known
            nodes = np.arange(start, start + count)
            replaced = nodes[~matters_M[nodes]]
            state_M[replaced] = state_M[self.suffix_M[replaced]]
            start += count
        return state_M

    @property
    def n_states(self) -> int:
        """Exclusive upper bound on state numbers."""
        return len(self.state_M)

    def word_ids(self, words: Iterable[str]) -> np.ndarray:
        """Return the indices of words. Unknown words get the index of `<unk>`, or -1 without `<unk>`."""
        return np.array([self.index.get(word, self.unknown_word) for word in words], np.int64)

    def score(self, state_R: np.ndarray, word_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-probability of a word after each state, and the state after the word.

        The word index -1 has the log-probability `UNSEEN_LOGP` and leads to the empty context.
        """
        logp_R = np.zeros(len(state_R))
        next_R = np.zeros(len(state_R), np.int64)
        logp_R[word_R < 0] = UNSEEN_LOGP
        pending = np.flatnonzero(word_R >= 0)
        context_R, word_R = state_R[pending], word_R[pending]
        while len(pending):
            node_R = self._find(context_R, word_R)
            found_R = node_R >= 0
            match_R = node_R[found_R]
            logp_R[pending[found_R]] += self.logp_N[match_R - 1]
            next_R[pending[found_R]] = self.state_M[match_R]
            rest_R = ~found_R
            pending, context_R, word_R = pending[rest_R], context_R[rest_R], word_R[rest_R]
            logp_R[pending] += self.backoff_M[context_R]
            context_R = self.suffix_M[context_R]
        return logp_R, next_R

    def rows(self, state_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log-probabilities (R, V) of all words after each state, and the next states (R, V)."""
        n_words = len(self.words)
        logp_RV = np.repeat(self.logp_N[None, :n_words], len(state_R), 0)
        next_RV = np.repeat(self.state_M[None, 1 : 1 + n_words], len(state_R), 0)
        chain = [np.asarray(state_R)]
        while chain[-1].any():
            chain.append(self.suffix_M[chain[-1]])
        for state_R in reversed(chain):  # in order of increasing context length
            row_R = np.flatnonzero(state_R)
            node_R = state_R[row_R]
            logp_RV[row_R] += self.backoff_M[node_R, None]
            first_R, last_R = self.first_child_M[node_R], self.first_child_M[node_R + 1]
            child = concatenate_ranges(first_R, last_R)
            row = np.repeat(row_R, last_R - first_R)
            word = self.key_N[child] % n_words
            logp_RV[row, word] = self.logp_N[child]
            next_RV[row, word] = self.state_M[child + 1]
        return logp_RV, next_RV

    def sentence_logp(self, words: Sequence[str]) -> np.ndarray:
        """Return the log-probability of each word in a sentence and of the sentence end."""
        ids = self.word_ids([*words, END])
        logps = np.empty(len(ids))
        state = np.array([self.start_state])
        for position in range(len(ids)):
            logp, state = self.score(state, ids[position : position + 1])
            logps[position] = logp[0]
        return logps


def concatenate_ranges(first_R: np.ndarray, last_R: np.ndarray) -> np.ndarray:
    """Concatenate the ranges [first, last)."""
    length_R = last_R - first_R
    offset_R = np.cumsum(length_R) - length_R
    index_N: np.ndarray = np.arange(int(length_R.sum())) + np.repeat(first_R - offset_R, length_R)
    return index_N


@dataclass(frozen=True)
class Perplexity:
    """Total log-probability of a text, and its token counts.

    Attributes:
        logp: sum of the natural log-probabilities of all words and sentence ends.
        sentences, words: number of sentences, and number of words without sentence ends.
        unknown: number of words that are `<unk>` or not in the vocabulary.
        unknown_logp: part of `logp` contributed by unknown words.
    """

    logp: float
    sentences: int
    words: int
    unknown: int
    unknown_logp: float

    @property
    def including_unknown(self) -> float:
        """Perplexity per word and sentence end."""
        return float(np.exp(-self.logp / (self.words + self.sentences)))

    @property
    def excluding_unknown(self) -> float:
        """Perplexity per word and sentence end, without unknown words."""
        return float(np.exp(-(self.logp - self.unknown_logp) / (self.words + self.sentences - self.unknown)))


def perplexity(model: NGram, sentences: Iterable[Sequence[str]]) -> Perplexity:
    """Score a text, given as one sequence of words per sentence.

    Raises:
        DataError: there are no sentences, or the model has no sentence end.
    """
    if model.end_word < 0:
        raise DataError(f"the language model lacks {END}, so it cannot score sentences; train it with {END}")
    logp = unknown_logp = 0.0
    n_sentences = n_words = n_unknown = 0
    for sentence in sentences:
        logps = model.sentence_logp(sentence)
        is_unknown = [word not in model.index or word in UNKNOWNS for word in sentence]
        logp += float(logps.sum())
        unknown_logp += float(logps[:-1][is_unknown].sum())
        n_sentences += 1
        n_words += len(sentence)
        n_unknown += sum(is_unknown)
    if not n_sentences:
        raise DataError("the text has no sentences")
    return Perplexity(logp, n_sentences, n_words, n_unknown, unknown_logp)
