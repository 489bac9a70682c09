"""Comparison of the CTC beam search with flashlight's (torchaudio) by exact CTC probability."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from jahubert.inference.ctc import beam_search

pytestmark = pytest.mark.stack
SYMBOLS, FRAMES, CASES, BEAM = 42, 60, 100, 20


def log_probs(peaky: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3 + peaky)
    logits = torch.randn(CASES, FRAMES, SYMBOLS, generator=generator)
    if peaky:
        winner = torch.randint(1, SYMBOLS, (CASES, FRAMES), generator=generator)
        winner[torch.rand(CASES, FRAMES, generator=generator) < 0.6] = 0
        logits += 6 * F.one_hot(winner, SYMBOLS)
    return logits.log_softmax(-1)


def true_scores(logp_BSV: torch.Tensor, answers: list[tuple[int, ...]]) -> torch.Tensor:
    lengths = torch.tensor([len(answer) for answer in answers])
    target = torch.tensor([label for answer in answers for label in answer], dtype=torch.long)
    frames = torch.full((len(answers),), logp_BSV.shape[1])
    return -F.ctc_loss(logp_BSV.double().transpose(0, 1), target, frames, lengths, reduction="none")


def test_hypotheses_are_at_least_as_probable_as_flashlights():
    """Our hypothesis is at least as probable in at least 95 % of 200 random and peaked cases."""
    decoder = pytest.importorskip("torchaudio.models.decoder")
    pytest.importorskip("flashlight.lib.text.decoder")
    tokens = [
        "-",
        *(f"t{symbol}" for symbol in range(1, SYMBOLS)),
        "|",
    ]  # flashlight requires a silence token
    theirs = decoder.ctc_decoder(
        None, tokens, nbest=1, beam_size=BEAM, blank_token="-", sil_token="|", log_add=True
    )
    not_less = 0
    for peaky in (False, True):
        logp_BSV = log_probs(peaky)
        ours = [h[0].labels for h in beam_search(logp_BSV, [FRAMES] * CASES, beam=BEAM)]
        silent = F.pad(logp_BSV, (0, 1), value=-1e4).contiguous()
        answers = [tuple(v for v in h[0].tokens.tolist() if v < SYMBOLS) for h in theirs(silent)]
        better = true_scores(logp_BSV, ours) >= true_scores(logp_BSV, answers) - 1e-6
        not_less += int(better.sum())
    assert not_less >= 0.95 * 2 * CASES
