"""CTC decoding: greedy search, prefix beam search, forced alignment and grouping of labels into words.

All functions take plain tensors or labels, and are independent of the phoneme set. The searches never use
frames beyond `n_frames_B`, so the result for a row does not depend on the batch.

Shapes: B rows, S frames, V symbols, K beam, C columns (V, or more with a lexicon), N = K * C candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import DataError
from jahubert.inference.fusion import Fusion, RowCache
from jahubert.model.precision import at_least_float32

_LOG_ZERO = -float("inf")


@dataclass(frozen=True)
class Hypothesis:
    """A label sequence without blanks, and the natural logarithm of its CTC probability.

    Greedy search scores a single path, whereas beam search sums over all paths kept in the beam. With fusion,
    the score includes the language model score and the word bonus. With a lexicon, `words` contains the words
    as written there.
    """

    labels: tuple[int, ...]
    score: float
    words: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Span:
    """An aligned label, its frames `[start, end)`, and its mean log-probability in these frames.

    `confidence.align_best` also sets the posterior probability of the word that contains the label, and the
    log-probability of the label according to the language model (0 without one).
    """

    label: int
    start: int
    end: int
    score: float
    posterior: float = 1.0
    lm_logp: float = 0.0


def _frame_counts(logp_BSV: Tensor, n_frames_B: Tensor | Sequence[int], blank: int) -> list[int]:
    """Check the arguments of a search, and return the number of frames in each row."""
    if logp_BSV.dim() != 3:
        raise ValueError(f"log-probabilities must be (batch, frames, symbols), not {tuple(logp_BSV.shape)}")
    n_rows, n_frames, n_symbols = logp_BSV.shape
    counts = [int(n) for n in n_frames_B]
    if len(counts) != n_rows or any(not 0 <= n <= n_frames for n in counts):
        raise ValueError(
            f"frame counts {counts} do not match log-probabilities of shape {tuple(logp_BSV.shape)}"
        )
    if not 0 <= blank < n_symbols:
        raise ValueError(f"blank is {blank}, but must be a symbol index, from 0 to {n_symbols - 1}")
    bad_BS = logp_BSV.isnan().any(-1)
    if bool(bad_BS.any()):
        for row, n in enumerate(counts):
            if bool(bad_BS[row, :n].any()):
                frame = int(bad_BS[row, :n].nonzero()[0, 0])
                raise DataError(
                    f"row {row} has NaN log-probabilities, first in frame {frame} (corrupt weights or input, "
                    "or overflow in low precision); check the checkpoint, or use float32"
                )
    return counts


def greedy(logp_BSV: Tensor, n_frames_B: Tensor | Sequence[int], blank: int = 0) -> list[Hypothesis]:
    """Find the most probable path of each row, merge repeats and remove blanks.

    Args:
        logp_BSV: log-probabilities.
        n_frames_B: number of valid frames in each row.
        blank: index of the blank symbol.

    Raises:
        DataError: a log-probability in a valid frame is NaN.
        ValueError: the shapes, frame counts or blank are invalid.
    """
    counts = _frame_counts(logp_BSV, n_frames_B, blank)
    if logp_BSV.shape[1] == 0:
        return [Hypothesis((), 0.0) for _ in counts]
    best_BS, path_BS = (x.cpu() for x in logp_BSV.max(-1))
    hypotheses = []
    for best_S, path_S, n in zip(best_BS, path_BS, counts, strict=True):
        labels = torch.unique_consecutive(path_S[:n])
        score = float(best_S[:n].double().sum())
        hypotheses.append(Hypothesis(tuple(labels[labels != blank].tolist()), score))
    return hypotheses


def beam_search(
    logp_BSV: Tensor,
    n_frames_B: Tensor | Sequence[int],
    beam: int = 20,
    n_best: int = 1,
    blank: int = 0,
    fusion: Fusion | None = None,
) -> list[list[Hypothesis]]:
    """Run CTC prefix beam search (Hannun et al. 2014, arXiv 1408.2873), optionally with a language model.

    A prefix accumulates the probability of all its paths, whether or not they end in blank, so a sequence is
    scored by its CTC probability and not by its best path. With a sufficiently wide beam and without
    `fusion`, the score equals `-ctc_loss`. The search runs on the device of `logp_BSV` and in its dtype
    (16-bit dtypes are converted to float32). Each frame takes a few operations on tensors (rows, beam,
    symbols), so a row takes several times less time in a batch of 16 or more rows than alone.

    Args:
        logp_BSV: log-probabilities.
        n_frames_B: number of valid frames in each row.
        beam: number of prefixes of each row that are kept after each frame.
        n_best: number of hypotheses to return per row.
        blank: index of the blank symbol.
        fusion: language model, lexicon or both, which affect the ranking at every frame.

    Returns:
        The best `n_best` hypotheses of each row, best first, or fewer if the final beam contains fewer. With
        a lexicon, hypotheses that end within a word are omitted. If all do, the best one is returned without
        its incomplete last word.

    Raises:
        DataError: a log-probability in a valid frame is NaN.
        ValueError: the shapes, frame counts, beam, `n_best` or blank are invalid, or `fusion` was created for
            other symbols.
    """
    if beam < 1 or not 1 <= n_best <= beam:
        raise ValueError(f"beam must be at least 1 and n_best between 1 and beam, not {beam} and {n_best}")
    counts = _frame_counts(logp_BSV, n_frames_B, blank)
    if fusion is not None and (fusion.blank != blank or max(fusion.symbol_C) >= logp_BSV.shape[2]):
        raise ValueError("the fusion was built for other symbols")
    if not counts:
        return []
    if logp_BSV.dtype in (torch.float16, torch.bfloat16):
        logp_BSV = logp_BSV.float()
    # Rows are sorted by length, longest first, so that the active rows come first and padding is never read.
    order = sorted(range(len(counts)), key=lambda row: -counts[row])
    with torch.inference_mode():
        logp_SBV = logp_BSV[order].transpose(0, 1).contiguous()
        results = _search(logp_SBV, [counts[row] for row in order], beam, n_best, blank, fusion)
    in_order: list[list[Hypothesis]] = [[] for _ in counts]
    for row, hypotheses in zip(order, results, strict=True):
        in_order[row] = hypotheses
    return in_order


@dataclass
class _Beam:
    """The prefixes in the beam of each row, best first. All fields have the shape (rows, beam)."""

    blank: Tensor  # log-probability of paths that end in blank, relative to the row's best prefix
    label: Tensor  # log-probability of paths that end in the prefix's last label, likewise relative
    last: Tensor  # last label (with fusion, its column), or blank for the empty prefix
    key: Tensor  # 63-bit hash that identifies the prefix
    parent: Tensor  # key of the prefix without its last label
    lm: Tensor | None = None  # with fusion: score of the prefix, relative to the row's best prefix
    cache_row: Tensor | None = None  # with fusion: row in the `RowCache`

    def first(self, n_rows: int) -> _Beam:
        lm = None if self.lm is None else self.lm[:n_rows]
        cache_row = None if self.cache_row is None else self.cache_row[:n_rows]
        blank, label, last = self.blank[:n_rows], self.label[:n_rows], self.last[:n_rows]
        return _Beam(blank, label, last, self.key[:n_rows], self.parent[:n_rows], lm, cache_row)


# Keys of an unused slot and of its parent. Keys of prefixes are never negative.
_NO_KEY, _NO_PARENT = -1, -2
_KEY_MASK = 2**63 - 1


@dataclass
class _History:
    """Choices and scores of all frames, which are kept for backtracing."""

    chosen: list[Tensor] = field(default_factory=list)  # candidate in each slot, for each frame
    shifts: list[Tensor] = field(default_factory=list)  # value subtracted from all scores, for each frame
    words: list[Tensor] = field(default_factory=list)  # with a lexicon: word completed in each slot
    slots: dict[int, Tensor] = field(default_factory=dict)  # row -> final slots, best first
    scores: dict[int, Tensor] = field(default_factory=dict)  # row -> final scores, without the shifts
    last_words: dict[int, Tensor] = field(default_factory=dict)  # row -> words completed at its end


def _search(
    logp_SBV: Tensor, counts: list[int], beam: int, n_best: int, blank: int, fusion: Fusion | None
) -> list[list[Hypothesis]]:
    """Run the beam search on rows that are sorted by descending length."""
    _, n_rows, n_columns = logp_SBV.shape
    prefixes = _empty_beam(logp_SBV, beam, blank)
    cache = None
    if fusion is not None:
        cache = fusion.cache(logp_SBV.device, logp_SBV.dtype)
        n_columns = cache.n_columns
        prefixes.lm = torch.zeros_like(prefixes.blank)
        prefixes.cache_row = cache.start(n_rows, beam)
    hash_C = torch.tensor(_hash_constants(n_columns), device=logp_SBV.device)
    slot_K = torch.arange(1, beam + 1, device=logp_SBV.device)
    history = _History()
    n_active = n_rows
    for frame in range(counts[0] + 1):
        while n_active and counts[n_active - 1] == frame:
            n_active -= 1
            _end_row(prefixes, n_active, n_best, cache, history)
        if not n_active:
            break
        if n_active < prefixes.last.shape[0]:
            prefixes = prefixes.first(n_active)
        logp_BC = logp_SBV[frame, :n_active]
        if cache is not None and n_columns > logp_SBV.shape[2]:
            logp_BC = logp_BC[:, cache.symbol_C]
        prefixes = _step(prefixes, logp_BC, hash_C, slot_K, blank, cache, history)
    return _backtrace(history, counts, n_columns, n_best, blank, fusion)


def _hash_constants(n_columns: int) -> list[int]:
    """Return fixed odd 62-bit hash constants, one per column (splitmix64)."""
    constants = []
    for column in range(n_columns):
        x = (column + 1) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        constants.append(((x ^ (x >> 31)) >> 2) | 1)
    return constants


def _empty_beam(logp_SBV: Tensor, beam: int, blank: int) -> _Beam:
    """Create a beam with the empty prefix (probability 1) in the first slot and no prefixes in the others."""
    shape = (logp_SBV.shape[1], beam)
    log_zero = logp_SBV.new_full(shape, _LOG_ZERO)
    ends_blank = log_zero.clone()
    ends_blank[:, 0] = 0.0
    last = torch.full(shape, blank, device=logp_SBV.device)
    key = torch.full_like(last, _NO_KEY)
    key[:, 0] = 0
    return _Beam(ends_blank, log_zero, last, key, torch.full_like(last, _NO_PARENT))


def _step(
    prefixes: _Beam,
    logp_BC: Tensor,
    hash_C: Tensor,
    slot_K: Tensor,
    blank: int,
    cache: RowCache | None,
    history: _History,
) -> _Beam:
    """Advance the beam by one frame.

    Candidate `k * C + c` is prefix k with the label of column c appended, or prefix k unchanged if c is
    blank. Without a lexicon, columns are labels.
    """
    n_rows, n_columns = logp_BC.shape
    total_BK = torch.logaddexp(prefixes.blank, prefixes.label)
    repeat_BK = logp_BC.gather(1, prefixes.last)
    candidate_BKC = total_BK[:, :, None] + logp_BC[:, None, :]
    # A repeated label is a new label only after a blank.
    candidate_BKC.scatter_(2, prefixes.last[:, :, None], (prefixes.blank + repeat_BK)[:, :, None])
    flat_BN = candidate_BKC.view(n_rows, -1)

    # If prefix k plus a label equals prefix j in the beam, the probability of the candidate is moved to j. A
    # slot without a parent in the beam points to some candidate of slot 0, which must not change; therefore,
    # scatter_add_ (of 0) is used instead of scatter_. The parent is found with a sum instead of a maximum,
    # because max over a dimension wakes up the thread pool in every frame.
    is_parent_BKK = prefixes.parent[:, :, None] == prefixes.key[:, None, :]
    parent_slot_BK = (is_parent_BKK * slot_K).sum(-1)
    has_parent_BK = parent_slot_BK > 0
    duplicate_BK = (parent_slot_BK - 1).clamp_(min=0) * n_columns + prefixes.last
    drop_BK = torch.where(has_parent_BK, _LOG_ZERO, 0.0).to(logp_BC.dtype)
    gained_BK = flat_BN.gather(1, duplicate_BK).masked_fill_(~has_parent_BK, _LOG_ZERO)
    flat_BN.scatter_add_(1, duplicate_BK, drop_BK)
    stay_label_BK = torch.logaddexp(prefixes.label + repeat_BK, gained_BK)
    stay_blank_BK = candidate_BKC[:, :, blank] = total_BK + logp_BC[:, blank, None]
    candidate_BKC[:, :, blank] = torch.logaddexp(stay_blank_BK, stay_label_BK)

    lm_BN = None
    if cache is None:
        score_BK, chosen_BK = flat_BN.topk(prefixes.last.shape[1], dim=1)
        dead_BK = score_BK == _LOG_ZERO
    else:
        assert prefixes.lm is not None and prefixes.cache_row is not None
        prefixes.cache_row = cache.evict_if_full(prefixes.cache_row)
        lm_BN = (prefixes.lm[:, :, None] + cache.score_RC[prefixes.cache_row]).view(n_rows, -1)
        rank_BK, chosen_BK = (flat_BN + lm_BN).topk(prefixes.last.shape[1], dim=1)
        dead_BK = rank_BK == _LOG_ZERO
        score_BK = flat_BN.gather(1, chosen_BK).masked_fill_(dead_BK, _LOG_ZERO)
    source_BK = torch.div(chosen_BK, n_columns, rounding_mode="floor")
    column_BK = chosen_BK - source_BK * n_columns
    stays_BK = column_BK == blank
    key_BK = prefixes.key.gather(1, source_BK)
    grown_BK = (key_BK ^ (key_BK >> 29)) * 0x2545F4914F6CDD1D + hash_C[column_BK]
    # Scores are relative to the best score, so that long recordings lose no precision.
    best_B1 = score_BK[:, :1].clamp(min=-3e38)
    shift_B = best_B1[:, 0]
    advanced = _Beam(
        torch.where(stays_BK, stay_blank_BK.gather(1, source_BK), _LOG_ZERO) - best_B1,
        torch.where(stays_BK, stay_label_BK.gather(1, source_BK), score_BK) - best_B1,
        torch.where(stays_BK, prefixes.last.gather(1, source_BK), column_BK),
        torch.where(stays_BK, key_BK, grown_BK & _KEY_MASK).masked_fill_(dead_BK, _NO_KEY),
        torch.where(stays_BK, prefixes.parent.gather(1, source_BK), key_BK).masked_fill_(dead_BK, _NO_PARENT),
    )
    if cache is not None:
        assert lm_BN is not None and prefixes.cache_row is not None
        source_row_BK = prefixes.cache_row.gather(1, source_BK)
        lm_BK = lm_BN.gather(1, chosen_BK).masked_fill_(dead_BK, 0.0)
        advanced.lm = lm_BK - lm_BK[:, :1]
        advanced.cache_row = cache.advance(source_row_BK, column_BK)
        shift_B = shift_B + lm_BK[:, 0]
        if cache.fusion.words:
            history.words.append(cache.word_RC[source_row_BK, column_BK])
    history.chosen.append(chosen_BK)
    history.shifts.append(shift_B)
    return advanced


def _end_row(prefixes: _Beam, row: int, n_best: int, cache: RowCache | None, history: _History) -> None:
    """Rank the prefixes of a row that has no more frames."""
    score_K = torch.logaddexp(prefixes.blank[row], prefixes.label[row])
    slot_K = torch.arange(len(score_K), device=score_K.device)
    if cache is not None:
        assert prefixes.lm is not None and prefixes.cache_row is not None
        score_K = score_K + prefixes.lm[row]
        final_K = score_K + cache.final_R[prefixes.cache_row[row]]
        word_K = cache.final_word_R[prefixes.cache_row[row]]
        if bool((final_K > _LOG_ZERO).any()):
            score_K, slot_K = final_K.sort(descending=True, stable=True)
            history.last_words[row] = word_K[slot_K[:n_best]]
        else:  # `_backtrace` drops the incomplete word
            score_K = torch.where(slot_K == 0, score_K, _LOG_ZERO)
    history.slots[row], history.scores[row] = slot_K[:n_best], score_K[:n_best]


def _backtrace(
    history: _History, counts: list[int], n_columns: int, n_best: int, blank: int, fusion: Fusion | None
) -> list[list[Hypothesis]]:
    """Trace back the hypotheses of all rows at once, from the last frame to the first."""
    n_rows, n_frames = len(counts), len(history.chosen)
    # Shorter rows keep their slots until their last frame is reached.
    slots = np.stack([history.slots[row].cpu().numpy() for row in range(n_rows)])
    columns = np.full((n_frames, n_rows, n_best), blank)
    words = np.full((n_frames + 1, n_rows, n_best), -1)
    shift_B = np.zeros(n_rows)  # accumulated score shift of each row
    for frame in range(n_frames - 1, -1, -1):
        chosen_BK = history.chosen[frame].cpu().numpy()
        n = len(chosen_BK)
        shift_B[:n] += history.shifts[frame].cpu().double().numpy()
        if history.words:
            words[frame, :n] = np.take_along_axis(history.words[frame].cpu().numpy(), slots[:n], 1)
        candidates = np.take_along_axis(chosen_BK, slots[:n], 1)
        columns[frame, :n] = candidates % n_columns
        slots[:n] = candidates // n_columns
    for row, last_words in history.last_words.items():
        words[n_frames, row] = last_words.cpu().numpy()
    symbols = columns if fusion is None else fusion.symbol_C[columns]
    results = []
    for row in range(n_rows):
        scores = history.scores[row].cpu().double().numpy() + shift_B[row]
        incomplete = fusion is not None and row not in history.last_words
        hypotheses = []
        for i, score in enumerate(scores.tolist()):
            if score == _LOG_ZERO and n_best > 1:
                continue
            sequence = symbols[:, row, i]
            labels = sequence[sequence != blank].tolist()
            written = None
            if fusion is not None and fusion.words:
                written = tuple(fusion.words[w] for w in words[:, row, i] if w >= 0)
                if incomplete:
                    labels = _complete_words(labels, fusion.boundary)
            hypotheses.append(Hypothesis(tuple(labels), score, written))
        results.append(hypotheses)
    return results


def _complete_words(labels: list[int], boundary: int) -> list[int]:
    """Return the labels before the last boundary, or none without a boundary."""
    if boundary not in labels:
        return []
    return labels[: len(labels) - 1 - labels[::-1].index(boundary)]


def frames_needed(labels: Sequence[int]) -> int:
    """Return the number of frames that CTC needs: one per label, and a blank between equal labels."""
    return len(labels) + sum(a == b for a, b in pairwise(labels))


def forced_align(logp_SV: Tensor, labels: Sequence[int], blank: int = 0) -> list[Span]:
    """Find the frames of each label on the most probable CTC path for `labels` (Viterbi alignment).

    The alignment is computed in float64 on the CPU.

    Args:
        logp_SV: log-probabilities of one utterance.
        labels: labels without blanks.
        blank: index of the blank symbol.

    Returns:
        One span per label. Frames outside the spans are blank.

    Raises:
        DataError: a label is blank or unknown, there are too few frames, or every path is impossible.
        ValueError: `logp_SV` does not have two dimensions.
    """
    if logp_SV.dim() != 2:
        raise ValueError(f"log-probabilities must be (frames, symbols), not {tuple(logp_SV.shape)}")
    n_frames, n_symbols = logp_SV.shape
    labels = [int(label) for label in labels]
    wrong = [label for label in labels if label == blank or not 0 <= label < n_symbols]
    if wrong:
        raise DataError(
            f"labels {wrong[:5]} cannot be aligned: each must be one of the {n_symbols} symbols and not the "
            f"blank ({blank})"
        )
    if n_frames < frames_needed(labels):
        raise DataError(
            f"the audio is too short for its text: the number of frames is {n_frames}, but must be at least "
            f"{frames_needed(labels)} (one per label, and one more between adjacent equal labels)"
        )
    if not labels:
        return []
    logp = at_least_float32(logp_SV.detach()).cpu().numpy()
    path = _viterbi(logp, labels, blank)
    bounds = np.searchsorted(path, np.arange(1, 2 * len(labels) + 1)).reshape(-1, 2).tolist()
    return [
        Span(label, start, end, float(logp[start:end, label].mean(dtype=np.float64)))
        for label, (start, end) in zip(labels, bounds, strict=True)
    ]


def group_words(
    spans: Iterable[Span], boundary: int, *, split_symbols: bool, max_gap: int | None = None
) -> Iterator[list[Span]]:
    """Group aligned labels into words at boundaries, dropping the boundaries and empty words.

    Args:
        spans: labels in the order of their frames.
        boundary: index of the word boundary, negative if the vocabulary has none.
        split_symbols: whether each symbol of a vocabulary without a word boundary is a word; otherwise, all
            symbols are one word.
        max_gap: with a word boundary, largest number of frames between labels of one word; None: no limit.
    """
    word: list[Span] = []
    for span in spans:
        if word and boundary >= 0 and max_gap is not None and span.start - word[-1].end > max_gap:
            yield word
            word = []
        if span.label != boundary:
            word.append(span)
        if word and (span.label == boundary or (split_symbols and boundary < 0)):
            yield word
            word = []
    if word:
        yield word


def _viterbi(logp: np.ndarray, labels: list[int], blank: int) -> np.ndarray:
    """Return the state of each frame on the best path. State 2i + 1 is label i, and even states are blank."""
    n_frames, n_states = len(logp), 2 * len(labels) + 1
    symbols = np.full(n_states, blank)
    symbols[1::2] = labels
    skip_cost = np.full(n_states, _LOG_ZERO)  # the blank between two different labels is optional
    skip_cost[3::2][symbols[3::2] != symbols[1:-2:2]] = 0.0
    # Two columns of `_LOG_ZERO` take the place of the predecessors that the first two states lack.
    score = np.full((n_frames, n_states + 2), _LOG_ZERO)
    score[0, 2:4] = logp[0, symbols[:2]]
    skipped = np.empty(n_states)
    for (before, after), logp_V in zip(pairwise(score), logp[1:], strict=True):
        best = after[2:]
        np.add(before[:-2], skip_cost, out=skipped)
        np.maximum(before[2:], before[1:-1], out=best)
        np.maximum(best, skipped, out=best)
        best += logp_V[symbols]
    state = n_states - 1 if score[-1, -1] >= score[-1, -2] else n_states - 2
    if not score[-1, state + 2] > _LOG_ZERO:
        raise DataError(
            "no path is possible for these labels, because too many log-probabilities are -inf or NaN"
        )
    path = np.empty(n_frames, np.int64)
    path[-1] = state
    for frame in range(n_frames - 2, -1, -1):
        from_two, from_one, from_same = score[frame, state : state + 3].tolist()
        if from_two + skip_cost[state] > max(from_one, from_same):
            state -= 2
        elif from_one > from_same:
            state -= 1
        path[frame] = state
    return path
