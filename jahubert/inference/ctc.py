"""From CTC log-probabilities to labels: greedy, prefix beam search, forced alignment.

All three are functions of plain tensors, know nothing of phonemes, and give a row the same result
whatever it is batched with: frames behind `n_frames_B` are never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import DataError

_NEVER = -float("inf")


@dataclass(frozen=True)
class Hypothesis:
    """A label sequence without blanks, and the natural log of the CTC probability found for it.

    Greedy search finds the probability of one path; beam search sums all paths that stayed in its beam.
    """

    labels: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class Span:
    """The frames `[start, end)` in which an alignment says `label`; `score` is their mean log-probability."""

    label: int
    start: int
    end: int
    score: float


def _frame_counts(logp_BSV: Tensor, n_frames_B: Tensor | Sequence[int], blank: int) -> list[int]:
    """The checked number of frames of each row."""
    if logp_BSV.dim() != 3:
        raise ValueError(f"log-probabilities must be (batch, frames, symbols), not {tuple(logp_BSV.shape)}")
    n_rows, n_frames, n_symbols = logp_BSV.shape
    counts = [int(n) for n in n_frames_B]
    if len(counts) != n_rows or any(not 0 <= n <= n_frames for n in counts):
        raise ValueError(
            f"frame counts {counts} do not fit log-probabilities of shape {tuple(logp_BSV.shape)}"
        )
    if not 0 <= blank < n_symbols:
        raise ValueError(f"blank is {blank}, but there are {n_symbols} symbols")
    bad_BS = logp_BSV.isnan().any(-1)
    if bool(bad_BS.any()):  # rare, so the search for the row is paid only then
        for row, n in enumerate(counts):
            if bool(bad_BS[row, :n].any()):
                frame = int(bad_BS[row, :n].nonzero()[0, 0])
                raise DataError(
                    f"row {row} has NaN log-probabilities from frame {frame} on: the model's weights or its "
                    "input are broken; check the checkpoint, or run in float32"
                )
    return counts


def greedy(logp_BSV: Tensor, n_frames_B: Tensor | Sequence[int], blank: int = 0) -> list[Hypothesis]:
    """The most probable path of each row, repeats merged and blanks dropped; the score is that path's."""
    counts = _frame_counts(logp_BSV, n_frames_B, blank)
    if logp_BSV.shape[1] == 0:
        return [Hypothesis((), 0.0) for _ in counts]
    best_BS, path_BS = (x.cpu() for x in logp_BSV.max(-1))
    found = []
    for best_S, path_S, n in zip(best_BS, path_BS, counts, strict=True):
        labels = torch.unique_consecutive(path_S[:n])
        score = float(best_S[:n].double().sum())
        found.append(Hypothesis(tuple(labels[labels != blank].tolist()), score))
    return found


def beam_search(
    logp_BSV: Tensor, n_frames_B: Tensor | Sequence[int], beam: int = 20, n_best: int = 1, blank: int = 0
) -> list[list[Hypothesis]]:
    """Prefix beam search without a language model: per row its `n_best` label sequences, best first.

    A prefix holds the probability of all its paths, those that end in blank and those that do not, so a
    sequence is scored by its CTC probability and not by its best path; with a beam that is wide enough
    the score is exactly `-ctc_loss`. Fewer than `n_best` come back only if fewer sequences are possible.

    Runs where `logp_BSV` is, in its dtype (half precision becomes float32). Each frame is a few tensor
    operations on (rows, beam, symbols), so batches of 16 or more are several times faster than single rows.
    """
    if beam < 1 or not 1 <= n_best <= beam:
        raise ValueError(f"beam must be at least 1 and n_best between 1 and beam, not {beam} and {n_best}")
    counts = _frame_counts(logp_BSV, n_frames_B, blank)
    if not counts:
        return []
    if logp_BSV.dtype in (torch.float16, torch.bfloat16):
        logp_BSV = logp_BSV.float()
    # Longest first: at every frame the rows that still run are the first ones, and padding is not touched.
    order = sorted(range(len(counts)), key=lambda row: -counts[row])
    with torch.inference_mode():
        logp_SBV = logp_BSV[order].transpose(0, 1).contiguous()
        found = _search(logp_SBV, [counts[row] for row in order], beam, n_best, blank)
    return [hypotheses for _, hypotheses in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


@dataclass
class _Beam:
    """The prefixes of each row, best first: all fields are (rows, beam)."""

    blank: Tensor  # log-probability of the paths that end in blank, relative to the row's best prefix
    label: Tensor  # the same for the paths that end in the prefix's last label
    last: Tensor  # last label; blank for the empty prefix
    key: Tensor  # 63-bit hash of the prefix: prefixes are equal where keys are equal
    parent: Tensor  # key of the prefix without its last label

    def first(self, n_rows: int) -> _Beam:
        return _Beam(*(field[:n_rows] for field in vars(self).values()))


# A key of a dead or missing prefix, and of its parent: equal to no key, which are never negative.
_NO_KEY, _NO_PARENT = -1, -2
_KEY_MASK = 2**63 - 1


def _search(
    logp_SBV: Tensor, counts: list[int], beam: int, n_best: int, blank: int
) -> list[list[Hypothesis]]:
    """Beam search over rows sorted by falling length."""
    _, n_rows, n_symbols = logp_SBV.shape
    state = _empty_beam(logp_SBV, beam, blank)
    salt_V = torch.tensor(_salts(n_symbols), device=logp_SBV.device)
    number_K = torch.arange(1, beam + 1, device=logp_SBV.device)
    steps, bests, ends = [], [], {}
    running = n_rows
    for frame in range(counts[0] + 1):
        while running and counts[running - 1] == frame:
            running -= 1
            ends[running] = torch.logaddexp(state.blank[running], state.label[running])
        if not running:
            break
        if running < state.last.shape[0]:
            state = state.first(running)
        state, chosen_BK, best_B = _step(state, logp_SBV[frame, :running], salt_V, number_K, blank)
        steps.append(chosen_BK)
        bests.append(best_B)
    return _trace(steps, bests, ends, counts, n_symbols, n_best, blank)


def _salts(n_symbols: int) -> list[int]:
    """Fixed odd 62-bit numbers, one for each symbol (a Weyl sequence, stirred)."""
    salts = []
    for symbol in range(n_symbols):
        x = (symbol + 1) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        salts.append(((x ^ (x >> 31)) >> 2) | 1)
    return salts


def _empty_beam(logp_SBV: Tensor, beam: int, blank: int) -> _Beam:
    """One empty prefix of probability 1; the other places are dead."""
    shape = (logp_SBV.shape[1], beam)
    never = logp_SBV.new_full(shape, _NEVER)
    ends_blank = never.clone()
    ends_blank[:, 0] = 0.0
    last = torch.full(shape, blank, device=logp_SBV.device)
    key = torch.full_like(last, _NO_KEY)
    key[:, 0] = 0
    return _Beam(ends_blank, never, last, key, torch.full_like(last, _NO_PARENT))


def _step(
    state: _Beam, logp_BV: Tensor, salt_V: Tensor, number_K: Tensor, blank: int
) -> tuple[_Beam, Tensor, Tensor]:
    """One frame. Returns the next beam, the candidate each place came from, and the shift of the scores.

    Candidate `k * V + v` is prefix k with label v appended, or prefix k unchanged where v is blank.
    """
    n_rows, n_symbols = logp_BV.shape
    total_BK = torch.logaddexp(state.blank, state.label)
    repeat_BK = logp_BV.gather(1, state.last)
    candidate_BKV = total_BK[:, :, None] + logp_BV[:, None, :]
    # A label after itself is a new label only behind a blank.
    candidate_BKV.scatter_(2, state.last[:, :, None], (state.blank + repeat_BK)[:, :, None])
    flat_BC = candidate_BKV.view(n_rows, -1)

    # Where k plus a label is a prefix j of the beam, its probability goes to j and the candidate is dropped.
    # Several j may point at candidate 0 for want of a parent, hence adding and not writing.
    # (`max` over a dimension would wake the thread pool at every frame, which a busy machine punishes.)
    is_parent_BKK = state.parent[:, :, None] == state.key[:, None, :]
    place_BK = (is_parent_BKK * number_K).sum(-1)
    has_parent_BK = place_BK > 0
    twin_BK = (place_BK - 1).clamp_(min=0) * n_symbols + state.last
    drop_BK = torch.where(has_parent_BK, _NEVER, 0.0).to(logp_BV.dtype)
    gained_BK = flat_BC.gather(1, twin_BK).masked_fill_(~has_parent_BK, _NEVER)
    flat_BC.scatter_add_(1, twin_BK, drop_BK)
    stay_label_BK = torch.logaddexp(state.label + repeat_BK, gained_BK)
    stay_blank_BK = candidate_BKV[:, :, blank] = total_BK + logp_BV[:, blank, None]
    candidate_BKV[:, :, blank] = torch.logaddexp(stay_blank_BK, stay_label_BK)

    score_BK, chosen_BK = flat_BC.topk(state.last.shape[1], dim=1)
    source_BK = torch.div(chosen_BK, n_symbols, rounding_mode="floor")
    symbol_BK = chosen_BK - source_BK * n_symbols
    stays_BK = symbol_BK == blank
    dead_BK = score_BK == _NEVER
    key_BK = state.key.gather(1, source_BK)
    grown_BK = (key_BK ^ (key_BK >> 29)) * 0x2545F4914F6CDD1D + salt_V[symbol_BK]
    # Scores are kept relative to the best one: a long recording loses no digits.
    best_B1 = score_BK[:, :1].clamp(min=-3e38)
    return (
        _Beam(
            torch.where(stays_BK, stay_blank_BK.gather(1, source_BK), _NEVER) - best_B1,
            torch.where(stays_BK, stay_label_BK.gather(1, source_BK), score_BK) - best_B1,
            torch.where(stays_BK, state.last.gather(1, source_BK), symbol_BK),
            torch.where(stays_BK, key_BK, grown_BK & _KEY_MASK).masked_fill_(dead_BK, _NO_KEY),
            torch.where(stays_BK, state.parent.gather(1, source_BK), key_BK).masked_fill_(
                dead_BK, _NO_PARENT
            ),
        ),
        chosen_BK,
        best_B1[:, 0],
    )


def _trace(
    steps: list[Tensor],
    bests: list[Tensor],
    ends: dict[int, Tensor],
    counts: list[int],
    n_symbols: int,
    n_best: int,
    blank: int,
) -> list[list[Hypothesis]]:
    """Follow the back-pointers of all rows at once, from the last frame to the first."""
    n_rows = len(counts)
    places = np.tile(np.arange(n_best), (n_rows, 1))  # rows that have not begun yet are still at their end
    symbols = np.full((len(steps), n_rows, n_best), blank)
    shift_B = np.zeros(n_rows)
    for frame in range(len(steps) - 1, -1, -1):
        chosen_BK = steps[frame].cpu().numpy()
        n = len(chosen_BK)
        shift_B[:n] += bests[frame].cpu().double().numpy()
        picked = np.take_along_axis(chosen_BK, places[:n], 1)
        symbols[frame, :n] = picked % n_symbols
        places[:n] = picked // n_symbols
    found = []
    for row in range(n_rows):
        scores = ends[row][:n_best].cpu().double().numpy() + shift_B[row]
        labels = (symbols[:, row, i] for i in range(n_best))
        found.append(
            [
                Hypothesis(tuple(int(v) for v in sequence[sequence != blank]), float(score))
                for sequence, score in zip(labels, scores, strict=True)
                if score > _NEVER or n_best == 1
            ]
        )
    return found


def forced_align(logp_SV: Tensor, labels: Sequence[int], blank: int = 0) -> list[Span]:
    """The frames of each label on the most probable CTC path that spells `labels` (Viterbi).

    Returns one span for each label; frames between spans are blank. Computed in float64 on the CPU.

    Raises:
        DataError: a label is blank or unknown, the frames are too few for the labels, or no path is possible.
    """
    if logp_SV.dim() != 2:
        raise ValueError(f"log-probabilities must be (frames, symbols), not {tuple(logp_SV.shape)}")
    n_frames, n_symbols = logp_SV.shape
    labels = [int(label) for label in labels]
    wrong = [label for label in labels if label == blank or not 0 <= label < n_symbols]
    if wrong:
        raise DataError(
            f"labels {wrong[:5]} cannot be aligned: not one of the {n_symbols} symbols, or blank ({blank})"
        )
    repeats = sum(a == b for a, b in pairwise(labels))
    if n_frames < len(labels) + repeats:
        raise DataError(
            f"{len(labels)} labels need at least {len(labels) + repeats} frames (one more for each repeated "
            f"label), but there are {n_frames}: the audio is too short for its text"
        )
    if not labels:
        return []
    logp = logp_SV.detach().cpu().double().numpy()
    path = _viterbi(logp, labels, blank)
    spans = []
    for index, label in enumerate(labels):
        frames = np.flatnonzero(path == 2 * index + 1)
        score = float(logp[frames, label].mean())
        spans.append(Span(label, int(frames[0]), int(frames[-1]) + 1, score))
    return spans


def _viterbi(logp: np.ndarray, labels: list[int], blank: int) -> np.ndarray:
    """The state of each frame: state 2i + 1 is label i, even states are the blanks around the labels."""
    n_frames, n_states = len(logp), 2 * len(labels) + 1
    symbols = np.full(n_states, blank)
    symbols[1::2] = labels
    may_skip = np.zeros(n_states, bool)  # from the label before, past the blank between them
    may_skip[3::2] = symbols[3::2] != symbols[1:-2:2]
    skip_cost = np.where(may_skip, 0.0, _NEVER)[2:]
    emit = logp[:, symbols]
    moves = np.zeros((n_frames, n_states), np.int8)
    score = np.full(n_states, _NEVER)
    score[:2] = emit[0, :2]
    for frame in range(1, n_frames):
        step, best = moves[frame], score.copy()
        from_one = score[:-1] > best[1:]
        np.copyto(best[1:], score[:-1], where=from_one)
        step[1:] = from_one
        skipped = score[:-2] + skip_cost
        from_two = skipped > best[2:]
        np.copyto(best[2:], skipped, where=from_two)
        step[2:][from_two] = 2
        score = best + emit[frame]
    state = n_states - 1 if score[-1] >= score[-2] else n_states - 2
    if not score[state] > _NEVER:
        raise DataError(
            "no path spells these labels: some of their log-probabilities are -inf or NaN everywhere"
        )
    path = np.empty(n_frames, np.int64)
    for frame in range(n_frames - 1, -1, -1):
        path[frame] = state
        state -= int(moves[frame, state])
    return path
