"""Beam search over the evaluation splits, and phone times by forced alignment where they are wanted.

Reads   a fine-tuned model, the manifest and its targets
Writes  <split>.jsonl: id, reference and hypothesis words as phones, log-probability; alignment.jsonl

    python -m jahubert.run recipe=demo stage=decode system=pretrained decode.beam=20
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jahubert.checkpoint import load_bundle
from jahubert.decode import Hypothesis, beam_search, forced_align
from jahubert.errors import CheckpointError, ConfigError, DataError
from jahubert.frames import HUBERT, SAMPLE_RATE
from jahubert.heads import HubertForCtc
from jahubert.phonemes import PhonemeSet
from jahubert.train import ranks
from jahubert.train.batches import CtcData
from jahubert.train.config import free
from jahubert.train.manifest import Manifest
from jahubert.train.provenance import written_beside
from jahubert.train.targets import TargetStore

VERSION = 1
_REACH = 5  # frames, 100 ms


@dataclass(frozen=True)
class Config:
    manifest: Path
    targets: Path
    model: Path  # the folder of a fine-tuning, or a CTC bundle
    splits: tuple[str, ...] = ("eval1", "eval2", "eval3")
    align_splits: tuple[str, ...] = ()  # splits whose references get phone times
    beam: int = 20
    device: str = free("auto")
    batch_seconds: float = free(80.0)

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise ConfigError(f"beam is {self.beam}, but must be at least 1")


def run(config: Config, out: Path) -> dict[str, Any]:
    manifest, targets = Manifest(config.manifest), TargetStore(config.targets)
    bundle = load_bundle(config.model)
    if bundle.ctc is None:
        raise CheckpointError(f"{config.model}: this model has no CTC head; give a fine-tuned one")
    if bundle.phonemes != targets.phonemes:
        raise CheckpointError(f"{config.model}: its symbols are not those of {config.targets}")
    device = ranks.pick_device(config.device)
    bundle.ctc.to(device)
    counts = {}
    for split in config.splits:
        rows = np.intersect1d(manifest.indices(split=split), targets.labelled)
        if not len(rows):
            raise DataError(f"{config.manifest}: no labelled utterance in split {split!r}")
        counts[split] = len(rows)
        lines = []
        for rows_B, logp_BSV, n_frames_B in batches(bundle.ctc, manifest, targets, rows, config, device):
            answers = beam_search(logp_BSV, n_frames_B, beam=config.beam)
            lines.append(
                [
                    _line(manifest, targets, row, answer[0])
                    for row, answer in zip(rows_B, answers, strict=True)
                ]
            )
        _write(out / f"{split}.jsonl", lines)
    if config.align_splits:
        rows = np.concatenate([manifest.indices(split=split) for split in config.align_splits])
        rows, lines = np.intersect1d(rows, targets.labelled), []
        for rows_B, logp_BSV, n_frames_B in batches(bundle.ctc, manifest, targets, rows, config, device):
            aligned = []
            for row, logp_SV, n_frames in zip(rows_B, logp_BSV, n_frames_B.tolist(), strict=True):
                phones = phone_times(logp_SV[:n_frames], targets[row].tolist(), targets.phonemes)
                aligned.append({"id": manifest[row].id, "row": row, "phones": phones})
            lines.append([json.dumps(line, ensure_ascii=False) + "\n" for line in aligned])
        _write(out / "alignment.jsonl", lines)
    ranks.barrier()
    return {"utterances": counts, "beam": config.beam}


def batches(
    model: HubertForCtc,
    manifest: Manifest,
    targets: TargetStore,
    rows: np.ndarray,
    config: Config,
    device: torch.device,
) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
    """(rows, log-probabilities (B, S, V), valid frames (B,)) of this process's batches of similar lengths."""
    longest = float(manifest.n_samples[rows].max()) / SAMPLE_RATE
    data = CtcData(
        manifest,
        targets,
        rows,
        mask=None,
        width=1,
        micro_seconds=max(config.batch_seconds, longest + 1),
        per_step=1,
        seed=0,
        keep_in_memory_hours=0,
    )
    with torch.inference_mode():
        for micro in data.sampler.epoch(0).share(ranks.rank(), ranks.world()):
            batch = data.load(micro).to(device)
            logp_BSV, n_frames_B = model(batch.wav_BT, batch.n_samples_B)
            yield micro.rows, logp_BSV.cpu(), n_frames_B.cpu()


def _write(path: Path, lines: list[list[str]]) -> None:
    """Write the lines that the processes made of their batches, in the order of the batches."""
    batches = ranks.in_turn(lines)
    if ranks.rank() == 0:
        with written_beside(path) as file:
            file.writelines(line for batch in batches for line in batch)


def _line(manifest: Manifest, targets: TargetStore, row: int, best: Hypothesis) -> str:
    line = {
        "id": manifest[row].id,
        "reference": [" ".join(word) for word in targets.words(row)],
        "hypothesis": [" ".join(word) for word in targets.phonemes.decode(best.labels)],
        "score": best.score,
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def phone_times(logp_SV: Tensor, target: list[int], phonemes: PhonemeSet) -> list[tuple[str, int, int]]:
    """(phone, first sample, end sample) over the whole utterance, "pau" where nothing is said.

    CTC marks a phone by a spike: each frame goes to the nearest spike within `_REACH` frames.
    """
    spans = forced_align(logp_SV, target)
    owner_S = [
        min(spans, key=lambda span: max(span.start - frame, frame - span.end + 1, 0))
        for frame in range(len(logp_SV))
    ]
    times: list[tuple[str, int, int]] = []
    for frame, span in enumerate(owner_S):
        near = max(span.start - frame, frame - span.end + 1, 0) <= _REACH
        said = near and span.label != phonemes.boundary
        name, end = phonemes.symbols[span.label] if said else "pau", HUBERT.start(frame + 1)
        if frame and span is owner_S[frame - 1] and times[-1][0] == name:
            times[-1] = (name, times[-1][1], end)
        else:
            times.append((name, HUBERT.start(frame), end))
    return times
