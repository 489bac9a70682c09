"""Shallow fusion of n-gram language models and lexicons with CTC beam search.

A fusion is an automaton over the symbols of the CTC head. Each state has a row with the score and the next
state of every possible continuation. Rows are computed in batches when the search first reaches their states,
and are then cached, so that the search only indexes a table at each frame.

Shapes: R rows (states), C columns. Column v is symbol v. With a lexicon, additional columns are alternatives
to the word boundary that complete other words with the same symbols. A arcs and E word ends of the prefix
tree, W words, N cells of the rows.
"""

from __future__ import annotations

import logging
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import ConfigError, DataError, quote
from jahubert.lm.arpa import read_arpa
from jahubert.lm.lexicon import Entry, read_lexicon
from jahubert.lm.ngram import NGram, concatenate_ranges
from jahubert.phonemes import BLANK, PhonemeSet

log = logging.getLogger(__name__)

DEFAULT_LM_WEIGHT = 0.5

# Number of cells (rows x columns) in a full cache. A cell takes 16 bytes on the device and 8 on the host.
MAX_CACHED = 1 << 24


@dataclass(frozen=True)
class Rows:
    """The rows of a set of states.

    Attributes:
        score_RC: score that each continuation adds to the log-probability, or -inf if it is impossible.
        next_state_RC: state after each continuation.
        word_RC: index of the word that each continuation completes, or -1; None without a lexicon.
        final_R: score added at the end of the utterance, or -inf if a word is incomplete.
        final_word_R: index of the word that the end of the utterance completes, or -1.
    """

    score_RC: np.ndarray
    next_state_RC: np.ndarray
    word_RC: np.ndarray | None
    final_R: np.ndarray
    final_word_R: np.ndarray


class Fusion(ABC):
    """Base class of language model and lexicon scores for `beam_search`.

    Args:
        lm_weight: factor for the log-probability of the language model.
        word_bonus: score added per word with a lexicon, otherwise per symbol.

    Raises:
        ConfigError: the weight or bonus is not finite.

    Attributes:
        start: the initial state.
        blank, boundary: columns of the blank and of the word boundary (-1 if the head has no boundary).
        symbol_C: symbol of each column.
        words: the words to which the indices in `Rows` refer; empty without a lexicon.
    """

    start: int
    blank: int
    boundary: int
    symbol_C: np.ndarray
    words: tuple[str, ...]

    def __init__(self, lm_weight: float, word_bonus: float):
        if not (math.isfinite(lm_weight) and math.isfinite(word_bonus)):
            raise ConfigError(f"lm_weight ({lm_weight}) and word_bonus ({word_bonus}) must be finite")
        self.lm_weight = lm_weight
        self.word_bonus = word_bonus
        self._local = threading.local()  # each thread fills its own cache

    @abstractmethod
    def expand(self, state_R: np.ndarray) -> Rows:
        """Compute the rows of the given states."""

    @abstractmethod
    def reweighted(self, lm_weight: float, word_bonus: float) -> Fusion:
        """Return a copy of this fusion with another weight and bonus."""

    @abstractmethod
    def label_logp(self, labels: Sequence[int], words: Sequence[str] | None) -> np.ndarray:
        """Return the log-probability of each label of a hypothesis according to the language model.

        That of a boundary is added to the preceding label, and with a lexicon, the last label of a word has
        that of the word. Without a language model, all values are 0.
        """

    def cache(self, device: torch.device, dtype: torch.dtype) -> RowCache:
        """Return this thread's cache of rows, which is kept between searches."""
        cache = getattr(self._local, "cache", None)
        if cache is None or (cache.device, cache.dtype) != (device, dtype):
            cache = self._local.cache = RowCache(self, device, dtype)
        return cache

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


class SymbolFusion(Fusion):
    """Fusion with an n-gram model over symbols: phones or kana (with `|` between words), or characters.

    Raises:
        ConfigError: the weight or bonus is not finite.
        DataError: the symbols of the head have less than half of the model's unigram probability.
    """

    def __init__(self, model: NGram, symbols: PhonemeSet, lm_weight: float, word_bonus: float = 0.0):
        super().__init__(lm_weight, word_bonus)
        self.model = model
        self.symbols = symbols
        self.start = model.start_state
        self.blank, self.boundary = symbols.blank, symbols.boundary
        self.symbol_C = np.arange(len(symbols))
        self.words = ()
        labels = [label for label in range(len(symbols)) if label != symbols.blank]
        self.label_C = np.array(labels)
        names = [symbols.symbols[label] for label in labels]
        self.word_C = model.word_ids(names)
        share = _unigram_share(model, self.word_C)
        if share < 0.5:
            raise DataError(
                f"the symbols of the CTC head, such as {quote(names[0])}, account for only "
                f"{100 * share:.0f} % of the unigram probability of the language model; train it on text in "
                "these symbols (a word-level model needs a lexicon)"
            )

    def reweighted(self, lm_weight: float, word_bonus: float) -> SymbolFusion:
        return SymbolFusion(self.model, self.symbols, lm_weight, word_bonus)

    def label_logp(self, labels: Sequence[int], words: Sequence[str] | None) -> np.ndarray:
        logps = self.model.sentence_logp([self.symbols.symbols[label] for label in labels])[:-1]
        for index in range(len(labels) - 1, 0, -1):
            if labels[index] == self.boundary:
                logps[index - 1] += logps[index]
        return logps

    def expand(self, state_R: np.ndarray) -> Rows:
        shape = (len(state_R), len(self.symbols))
        score_RC = np.zeros(shape, np.float32)
        next_state_RC = np.repeat(state_R[:, None], shape[1], 1)
        logp_RV, next_RV = self.model.rows(state_R)
        known = self.word_C >= 0
        columns, words = self.label_C[known], self.word_C[known]
        score_RC[:, columns] = self.lm_weight * logp_RV[:, words] + self.word_bonus
        next_state_RC[:, columns] = next_RV[:, words]
        for column in self.label_C[~known]:
            logp_R, next_state_RC[:, column] = self.model.score(state_R, np.full(shape[0], -1))
            score_RC[:, column] = self.lm_weight * logp_R + self.word_bonus
        final_R = self.lm_weight * _end_logp(self.model, state_R)
        return Rows(score_RC, next_state_RC, None, final_R, np.full(shape[0], -1))


# Root nodes of the prefix tree: at the start of the utterance, where a boundary is allowed, and after a
# boundary.
_BEGIN, _ROOT = 0, 1


class Lexicon:
    """Prefix tree of words that are spelled in the symbols of a head with a word boundary.

    Args:
        entries: words with their symbols. A word may have several spellings, and a spelling several words.

    Raises:
        ConfigError: the symbols have no word boundary.
        DataError: a word has a symbol that is not in `symbols`.
    """

    def __init__(self, entries: Sequence[Entry], symbols: PhonemeSet):
        if symbols.boundary < 0:
            raise ConfigError("a lexicon needs a vocabulary with word boundaries: phones or kana")
        n_symbols = len(symbols)
        arcs: dict[int, int] = {}  # node * V + symbol -> next node
        depths = [0, 0]
        ends, words = [], []
        self.words = tuple(dict.fromkeys(word for word, _ in entries))
        index = {word: i for i, word in enumerate(self.words)}
        for word, spelling in entries:
            node = _ROOT
            for label in symbols.encode([spelling]):
                arc = node * n_symbols + label
                child = arcs.get(arc)
                if child is None:
                    child = arcs[arc] = len(depths)
                    depths.append(depths[node] + 1)
                node = child
            ends.append(node)
            words.append(index[word])
        self.symbols = symbols
        self.n_nodes = len(depths)
        arc_A = np.fromiter(arcs, np.int64, len(arcs))
        child_A = np.fromiter(arcs.values(), np.int64, len(arcs))
        sort_A = np.argsort(arc_A)
        self.arc_A, self.child_A = arc_A[sort_A], child_A[sort_A]
        firsts = np.arange(self.n_nodes + 1, dtype=np.int64) * n_symbols
        self.first_arc = np.searchsorted(self.arc_A, firsts)
        self.depth = np.array(depths)
        self.parent = np.zeros(self.n_nodes, np.int64)
        self.parent[self.child_A] = self.arc_A // n_symbols
        end_E, word_E = np.array(ends), np.array(words)
        sort_E = np.argsort(end_E, kind="stable")
        self.end_E, self.word_E = end_E[sort_E], word_E[sort_E]
        self.first_end = np.searchsorted(self.end_E, np.arange(self.n_nodes + 1))
        self.max_homophones = int(np.diff(self.first_end).max())

    def best_below(self, score_W: np.ndarray) -> np.ndarray:
        """Return the highest score of the words that end at or below each node; roots get 0."""
        best = np.full(self.n_nodes, -np.inf)
        np.maximum.at(best, self.end_E, score_W[self.word_E])
        order = np.argsort(-self.depth, kind="stable")
        for nodes in np.split(order, np.flatnonzero(np.diff(self.depth[order])) + 1):
            np.maximum.at(best, self.parent[nodes], best[nodes])
        best[: _ROOT + 1] = 0.0
        return best


class LexiconFusion(Fusion):
    """Fusion that restricts the output to the words of a lexicon and scores them with an optional n-gram.

    A word is scored when the boundary after it, or the end of the utterance, completes it. Before that, a
    prefix is ranked by the unigram score of its best completion (look-ahead). A boundary is also possible
    before the first word and after the last one.

    Raises:
        ConfigError: the weight or bonus is not finite.
        DataError: the n-gram contains none of the words.
    """

    def __init__(self, lexicon: Lexicon, model: NGram | None, lm_weight: float, word_bonus: float = 0.0):
        super().__init__(lm_weight, word_bonus)
        self.lexicon = lexicon
        self.model = model
        self.words = lexicon.words
        symbols = lexicon.symbols
        self.blank, self.boundary = symbols.blank, symbols.boundary
        self.symbol_C = np.concatenate(
            [np.arange(len(symbols)), np.full(lexicon.max_homophones - 1, symbols.boundary)]
        )
        self.n_states = 1 if model is None else model.n_states  # states of the language model
        self.start = self._states(_BEGIN, 0 if model is None else model.start_state)
        if model is None:
            unigram_W = np.zeros(len(self.words))
        else:
            self.model_word_W = model.word_ids(self.words)
            if not any(word in model.index for word in self.words):
                raise DataError(
                    "the language model contains none of the lexicon's words; use an n-gram model trained on "
                    "text with these words"
                )

            unigram_W, _ = model.score(np.zeros(len(self.words), np.int64), self.model_word_W)
        self.look_ahead = lexicon.best_below(lm_weight * unigram_W + word_bonus)

    def reweighted(self, lm_weight: float, word_bonus: float) -> LexiconFusion:
        return LexiconFusion(self.lexicon, self.model, lm_weight, word_bonus)

    def label_logp(self, labels: Sequence[int], words: Sequence[str] | None) -> np.ndarray:
        logps = np.zeros(len(labels))
        if self.model is not None and words:
            following = [*labels[1:], self.boundary]
            is_last = [
                a != self.boundary and b == self.boundary for a, b in zip(labels, following, strict=True)
            ]
            logps[is_last] = self.model.sentence_logp(words)[:-1]
        return logps

    def expand(self, state_R: np.ndarray) -> Rows:
        node_R, lm_R = self._split_states(state_R)
        n_rows, n_columns = len(state_R), len(self.symbol_C)
        rows = Rows(
            score_RC=np.full((n_rows, n_columns), -np.inf, np.float32),
            next_state_RC=np.repeat(state_R[:, None], n_columns, 1),
            word_RC=np.full((n_rows, n_columns), -1, np.int32),
            final_R=np.full(n_rows, -np.inf),
            final_word_R=np.full(n_rows, -1),
        )
        rows.score_RC[:, self.blank] = 0.0
        self._add_symbols(rows, node_R, lm_R)
        self._add_word_gaps(rows, node_R, lm_R)
        self._add_word_ends(rows, node_R, lm_R)
        return rows

    def _add_symbols(self, rows: Rows, node_R: np.ndarray, lm_R: np.ndarray) -> None:
        """Add the symbols that start or continue a word, one for each arc of the prefix tree.

        The score is the change of the look-ahead. The state of the language model remains the same.
        """
        lexicon = self.lexicon
        tree_R = np.maximum(node_R, _ROOT)  # words at the start of the utterance start at the root as well
        first_R, last_R = lexicon.first_arc[tree_R], lexicon.first_arc[tree_R + 1]
        arc_N = concatenate_ranges(first_R, last_R)
        row_N = np.repeat(np.arange(len(node_R)), last_R - first_R)
        symbol_N, child_N = lexicon.arc_A[arc_N] % len(lexicon.symbols), lexicon.child_A[arc_N]
        rows.score_RC[row_N, symbol_N] = self.look_ahead[child_N] - self.look_ahead[node_R[row_N]]
        rows.next_state_RC[row_N, symbol_N] = self._states(child_N, lm_R[row_N])

    def _add_word_gaps(self, rows: Rows, node_R: np.ndarray, lm_R: np.ndarray) -> None:
        """Add the boundary before the first word, and the end of the utterance between words."""
        begin_R = np.flatnonzero(node_R == _BEGIN)
        rows.score_RC[begin_R, self.boundary] = 0.0
        rows.next_state_RC[begin_R, self.boundary] = self._states(_ROOT, lm_R[begin_R])
        between_R = np.flatnonzero(node_R <= _ROOT)
        rows.final_R[between_R] = self._final(lm_R[between_R])

    def _add_word_ends(self, rows: Rows, node_R: np.ndarray, lm_R: np.ndarray) -> None:
        """Add the boundaries and the ends of the utterance that complete a word, which is scored here.

        The first homophone of a node has the column of the boundary, and each other one a column of its own.
        At the end of the utterance, the best homophone is chosen.
        """
        assert rows.word_RC is not None
        lexicon, n_symbols = self.lexicon, len(self.lexicon.symbols)
        first_R, last_R = lexicon.first_end[node_R], lexicon.first_end[node_R + 1]
        end_N = concatenate_ranges(first_R, last_R)
        row_N = np.repeat(np.arange(len(node_R)), last_R - first_R)
        rank_N = end_N - first_R[row_N]  # position among the homophones of the node
        column_N = np.where(rank_N == 0, self.boundary, n_symbols + rank_N - 1)
        word_N = lexicon.word_E[end_N]
        logp_N, next_lm_N = np.zeros(len(word_N)), np.zeros(len(word_N), np.int64)
        if self.model is not None:
            logp_N, next_lm_N = self.model.score(lm_R[row_N], self.model_word_W[word_N])
        score_N = self.lm_weight * logp_N + self.word_bonus - self.look_ahead[node_R[row_N]]
        rows.score_RC[row_N, column_N] = score_N
        rows.next_state_RC[row_N, column_N] = self._states(_ROOT, next_lm_N)
        rows.word_RC[row_N, column_N] = word_N
        final_N = score_N + self._final(next_lm_N)
        order_N = np.argsort(final_N, kind="stable")  # ascending: the best word of a row is assigned last
        rows.final_R[row_N[order_N]] = final_N[order_N]
        rows.final_word_R[row_N[order_N]] = word_N[order_N]

    def _states(self, node: np.ndarray | int, lm: np.ndarray | int) -> Any:
        """Encode pairs of a node of the prefix tree and a state of the language model as states."""
        return node * self.n_states + lm

    def _split_states(self, state_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decode states into nodes of the prefix tree and states of the language model."""
        return np.divmod(state_R, self.n_states)

    def _final(self, lm_R: np.ndarray) -> np.ndarray:
        """Return the score of the sentence end after each language model state."""
        if self.model is None:
            return np.zeros(len(lm_R))
        return self.lm_weight * _end_logp(self.model, lm_R)


def _unigram_share(model: NGram, word_C: np.ndarray) -> float:
    """Return the share of the given words in the unigram probability of all words but the special ones."""
    special = (model.start_word, model.end_word, model.unknown_word)
    words = np.array([word for word in range(len(model.words)) if word not in special], np.int64)
    if not len(words):
        return 0.0
    probability = np.exp(model.score(np.zeros(len(words), np.int64), words)[0])
    return float(probability[np.isin(words, word_C)].sum() / max(probability.sum(), 1e-30))


def _end_logp(model: NGram, state_R: np.ndarray) -> np.ndarray:
    """Return the log-probability of the sentence end, or 0 if the model has no sentence end."""
    if model.end_word < 0:
        return np.zeros(len(state_R))
    return model.score(state_R, np.full(len(state_R), model.end_word))[0]


def _report_unknown(model: NGram | None, names: Sequence[str], kind: str) -> None:
    """Log how many names the model lacks (more than 5 %: a warning), unless it lacks none or all of them."""
    unknown = [name for name in names if model is not None and name not in model.index]
    if 0 < len(unknown) < len(names):
        log.log(
            logging.WARNING if len(unknown) > 0.05 * len(names) else logging.INFO,
            "%s that the language model lacks and scores as unknown: %d of %d, for example %r",
            kind, len(unknown), len(names), unknown[0],
        )  # fmt: skip


def load_fusion(
    symbols: PhonemeSet,
    lm: Path | None = None,
    lexicon: Path | None = None,
    lm_weight: float = DEFAULT_LM_WEIGHT,
    word_bonus: float = 0.0,
) -> Fusion | None:
    """Read a language model, a lexicon or both for `beam_search`.

    Args:
        symbols: the symbols of the CTC head.
        lm: path of an ARPA file. Its tokens are words if a lexicon is given, and otherwise symbols.
        lexicon: path of a lexicon (see `read_lexicon`). The output is restricted to its words.
        lm_weight, word_bonus: see `Fusion`.

    Returns:
        The fusion, or None if neither a language model nor a lexicon is given.

    Raises:
        DataError: a file is invalid, or the language model does not match the lexicon or the symbols.
        ConfigError: a lexicon is given, but the symbols have no word boundary; or the weight or bonus is not
            finite.
    """
    model = None if lm is None else read_arpa(lm)
    tree = None if lexicon is None else Lexicon(read_lexicon(lexicon, symbols), symbols)
    try:
        if tree is not None:
            _report_unknown(model, tree.words, "words of the lexicon")
            return LexiconFusion(tree, model, lm_weight, word_bonus)
        if model is not None:
            _report_unknown(model, [name for name in symbols.symbols if name != BLANK], "symbols")
            boundary = symbols.symbols[symbols.boundary] if symbols.boundary >= 0 else ""
            if boundary and boundary not in model.index:
                log.warning(
                    "%s: the language model lacks the word boundary %s and scores it as unknown, so words "
                    "will not be separated; unless your recordings are single words, train it on text with "
                    "%s between words, for example with jahubert ngram --unit phone",
                    lm, boundary, boundary,
                )  # fmt: skip
            return SymbolFusion(model, symbols, lm_weight, word_bonus)
    except DataError as error:  # only the language model can be wrong here
        raise DataError(f"{lm}: {error}") from error
    return None


class RowCache:
    """Cache of the rows of all states that searches have reached, addressed by row number.

    Args:
        fusion: fusion that computes missing rows.
        device, dtype: device and dtype of the scores.

    Attributes:
        next_state_RC: state after each continuation, as in `Rows`.
        next_row_RC: row of this state, or -1 if the row has not been computed.
    """

    def __init__(self, fusion: Fusion, device: torch.device, dtype: torch.dtype):
        self.fusion = fusion
        self.device = device
        self.dtype = dtype
        self.n_columns = len(fusion.symbol_C)
        self.max_rows = MAX_CACHED // self.n_columns
        self.symbol_C = torch.from_numpy(fusion.symbol_C).to(device)
        self._clear()

    def _clear(self) -> None:
        self._row_of: dict[int, int] = {}
        self.state_R = np.empty(0, np.int64)
        self.next_state_RC = np.empty((0, self.n_columns), np.int64)
        self.score_RC = torch.empty(0, self.n_columns, dtype=self.dtype, device=self.device)
        self.next_row_RC = torch.empty(0, self.n_columns, dtype=torch.int64, device=self.device)
        self.word_RC = torch.empty(0, self.n_columns, dtype=torch.int32, device=self.device)
        self.final_R = torch.empty(0, dtype=self.dtype, device=self.device)
        self.final_word_R = torch.empty(0, dtype=torch.int64, device=self.device)

    def start(self, n_rows: int, beam: int) -> Tensor:
        """Return the row of the initial state for every slot of the beam, (B, K)."""
        row = int(self.rows(np.array([self.fusion.start]))[0])
        return torch.full((n_rows, beam), row, device=self.device)

    def rows(self, states: np.ndarray) -> np.ndarray:
        """Return the row of each state, computing missing rows."""
        keys = states.tolist()
        missing = [key for key in dict.fromkeys(keys) if key not in self._row_of]
        if missing:
            self._add(np.array(missing))
        return np.array([self._row_of[key] for key in keys])

    def advance(self, row_BK: Tensor, column_BK: Tensor) -> Tensor:
        """Return the rows after the continuations `column_BK` of the states in `row_BK`."""
        next_BK = self.next_row_RC[row_BK, column_BK]
        pending_BK = next_BK < 0
        if bool(pending_BK.any()):
            row, column = row_BK[pending_BK], column_BK[pending_BK]
            states = self.next_state_RC[row.cpu().numpy(), column.cpu().numpy()]
            new = torch.from_numpy(self.rows(states)).to(self.device)
            self.next_row_RC[row, column] = new
            next_BK[pending_BK] = new
        return next_BK

    def evict_if_full(self, row_BK: Tensor) -> Tensor:
        """Keep only the given rows if the cache is full, and return their new numbers."""
        if len(self._row_of) <= max(self.max_rows, 2 * row_BK.numel()):
            return row_BK
        states = self.state_R[row_BK.cpu().numpy().ravel()]
        self._clear()
        return torch.from_numpy(self.rows(states)).to(self.device).view_as(row_BK)

    def _add(self, states: np.ndarray) -> None:
        rows = self.fusion.expand(states)
        first, last = len(self._row_of), len(self._row_of) + len(states)
        if last > len(self.state_R):
            self._grow(max(256, 2 * last))
        self._row_of.update(zip(states.tolist(), range(first, last), strict=True))
        self.state_R[first:last] = states
        self.next_state_RC[first:last] = rows.next_state_RC
        score_RC = torch.from_numpy(rows.score_RC).to(self.device, self.dtype)
        self.score_RC[first:last] = score_RC
        # The blank and impossible continuations do not change the state.
        own_R = torch.arange(first, last, device=self.device)
        next_row_RC = torch.where(score_RC.isinf(), own_R[:, None], -1)
        next_row_RC[:, self.fusion.blank] = own_R
        self.next_row_RC[first:last] = next_row_RC
        if rows.word_RC is not None:
            self.word_RC[first:last] = torch.from_numpy(rows.word_RC).to(self.device)
        self.final_R[first:last] = torch.from_numpy(rows.final_R).to(self.device, self.dtype)
        self.final_word_R[first:last] = torch.from_numpy(rows.final_word_R).to(self.device)

    def _grow(self, n_rows: int) -> None:
        n_old = len(self.state_R)
        for name in ("state_R", "next_state_RC"):
            old = getattr(self, name)
            new = np.empty((n_rows, *old.shape[1:]), old.dtype)
            new[:n_old] = old
            setattr(self, name, new)
        for name in ("score_RC", "next_row_RC", "word_RC", "final_R", "final_word_R"):
            tensor = getattr(self, name)
            larger = tensor.new_empty((n_rows, *tensor.shape[1:]))
            larger[:n_old] = tensor
            setattr(self, name, larger)
