"""Tuning of the language model weight and the word bonus on a development set."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jahubert.inference.ctc import beam_search
from jahubert.inference.fusion import Fusion
from jahubert.phonemes import PhonemeSet
from jahubert.train.evaluation.metrics import count_errors
from jahubert.train.experiment import distributed


@dataclass(frozen=True)
class TuningBatch:
    """Log-probabilities (B, S, V), numbers of valid frames (B,) and reference labels for one batch."""

    logp_BSV: Tensor
    n_frames_B: Tensor
    references: Sequence[Sequence[int]]


@dataclass(frozen=True)
class GridPoint:
    """Error rate of the symbols, excluding word boundaries, for one weight and one bonus."""

    lm_weight: float
    word_bonus: float
    rate: float


def search_grid(
    fusion: Fusion,
    batches: Sequence[TuningBatch],
    symbols: PhonemeSet,
    beam: int,
    lm_weights: Sequence[float],
    word_bonuses: Sequence[float],
) -> list[GridPoint]:
    """Decode all batches with each combination of weight and bonus, and sort the results by error rate."""
    grid = list(itertools.product(lm_weights, word_bonuses))
    counts = torch.zeros(len(grid), 2, dtype=torch.float64)  # number of errors, number of reference symbols
    for point, (lm_weight, word_bonus) in enumerate(grid):
        weighted = fusion.reweighted(lm_weight, word_bonus)
        for batch in batches:
            results = beam_search(
                batch.logp_BSV, batch.n_frames_B, beam=beam, blank=symbols.blank, fusion=weighted
            )
            for (best,), reference in zip(results, batch.references, strict=True):
                errors = count_errors(
                    _without_boundaries(reference, symbols), _without_boundaries(best.labels, symbols)
                )
                counts[point, 0] += errors.errors
                counts[point, 1] += errors.length
            distributed.tick()
    distributed.all_reduce_(counts)
    rates = (counts[:, 0] / counts[:, 1].clamp(min=1)).tolist()
    points = [GridPoint(*weights, rate) for weights, rate in zip(grid, rates, strict=True)]
    return sorted(points, key=lambda point: point.rate)


def _without_boundaries(labels: Sequence[int], symbols: PhonemeSet) -> list[int]:
    """Return the labels without word boundaries."""
    return [label for label in labels if label != symbols.boundary]
