"""Decoding of the evaluation splits with beam or greedy search, and forced alignment of phones and words.

Reads   a fine-tuned model, the manifest, its targets, and a language model and lexicon if configured
Writes  <split>.jsonl: id, talk, speaker, reference and hypothesis words as symbols, the score of the
        hypothesis (including the weighted score of the n-gram, if any), the features of each word for the
        calibration of confidences, and, if configured, the n-best list, and with a lexicon, the reference
        text and the words as written in the lexicon;
        phonemes.json: the vocabulary; with `align_splits`, also alignment.jsonl: phone and word times; with
        `tune_splits`, also tuning.json: the error rate for each weight and bonus tried

    python -m jahubert.run recipe=demo stage=decode system=pretrained decode.beam=20
    python -m jahubert.run recipe=demo stage=decode system=pretrained decoding=greedy decode.search=greedy
    python -m jahubert.run recipe=demo stage=decode system=pretrained decoding=lm decode.lm=phones.arpa
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import CheckpointError, DataError
from jahubert.formats.atomic import atomic_write
from jahubert.formats.bundle import load_bundle
from jahubert.frames import HUBERT, SAMPLE_RATE, hubert_grid_errors
from jahubert.inference.conditioning import prepare_speech
from jahubert.inference.confidence import align_best, word_features
from jahubert.inference.ctc import Hypothesis, Span, beam_search, forced_align, greedy, group_words
from jahubert.inference.fusion import DEFAULT_LM_WEIGHT, Fusion, load_fusion
from jahubert.inference.vad import suppress_nonspeech
from jahubert.model.heads import HubertForCtc
from jahubert.phonemes import PhonemeSet
from jahubert.prefetch import prefetch
from jahubert.train.data.batches import CtcData, pad
from jahubert.train.data.manifest import Manifest, Utterance
from jahubert.train.data.sampler import BatchSizes, MicroBatch
from jahubert.train.data.targets import TargetStore, labeled_in, split_words
from jahubert.train.evaluation.tuning import TuningBatch, search_grid
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import (
    model_field,
    raise_config_errors,
    range_errors,
    runtime_field,
    split_field,
)
from jahubert.train.experiment.progress import progress
from jahubert.train.experiment.provenance import write_json

log = logging.getLogger(__name__)

VERSION = 8
_MAX_DISTANCE = 5  # maximum distance (frames; 100 ms) between a CTC spike and a frame of its phone


@dataclass(frozen=True)
class Config:
    manifest: Path  # manifest.arrow of the prepare stage
    targets: Path  # output folder of the targets stage
    model: Path = model_field()  # output folder of the finetune stage, or another model with a CTC head
    splits: tuple[str, ...] = split_field(("test",))  # splits to decode
    align_splits: tuple[str, ...] = split_field(())  # splits for forced alignment of the references
    search: Literal["beam", "greedy"] = "beam"  # kind of search; greedy: use the best symbol of each frame
    beam: int = 20  # width of the beam search
    n_best: int = 1  # maximum number of hypotheses to write per utterance
    lm: Path | None = None  # n-gram model (ARPA, plain or gzip) over symbols, or over words of the lexicon
    lexicon: Path | None = None  # file of the allowed words, with one word and its symbols per line
    lm_weight: float = DEFAULT_LM_WEIGHT  # factor for the log-probability of the language model
    word_bonus: float = 0.0  # score added per word with a lexicon, otherwise per symbol
    tune_splits: tuple[str, ...] = split_field(())  # splits on which to choose lm_weight and word_bonus
    tune_lm_weights: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.3)  # values of lm_weight to try
    tune_word_bonuses: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)  # values of word_bonus to try
    vad: bool = True  # whether to detect speech and, except for alignment, suppress symbols outside speech
    conditioning: bool = True  # whether to remove DC offset and hum and normalize the level of speech
    device: str = runtime_field("auto")  # cpu, cuda, cuda:1, ...; auto: cuda if available, otherwise cpu
    # Maximum seconds of audio per batch, including padding. A longer utterance is a batch of its own.
    batch_seconds: float = runtime_field(80.0)

    def __post_init__(self) -> None:
        errors = range_errors(self, {"at least 1": ("beam", "n_best"), "positive": ("batch_seconds",)})
        if self.n_best > self.beam:
            errors.append(f"n_best is {self.n_best}, but must be at most beam ({self.beam})")
        fused = self.lm is not None or self.lexicon is not None
        if self.search == "greedy" and (self.n_best > 1 or fused):
            errors.append("search=greedy does not support n_best > 1, lm or lexicon; set search=beam")
        tuned = bool(self.tune_splits)
        for is_ignored, reason, names in (
            (self.lm is None, "without lm; set lm", ("lm_weight", "tune_lm_weights")),
            (not fused, "without lm or lexicon; set one", ("word_bonus", "tune_splits")),
            (not tuned, "without tune_splits; set it", ("tune_lm_weights", "tune_word_bonuses")),
            (tuned, "with tune_splits; remove that", ("lm_weight", "word_bonus")),
        ):
            changed = [name for name in names if getattr(self, name) != getattr(Config, name)]
            errors += [f"{name} has no effect {reason} or remove {name}" for name in changed if is_ignored]
        if self.tune_splits and not (self.tune_lm_weights and self.tune_word_bonuses):
            errors.append(
                "tune_splits requires at least one value in tune_lm_weights and one in tune_word_bonuses"
            )
        raise_config_errors(errors)

    @property
    def description(self) -> str:
        """Short description of the search, for tables."""
        if self.search == "greedy":
            return "greedy"
        parts = [f"beam {self.beam}"]
        if self.lexicon is not None:
            parts.append("lexicon" if self.lm is None else "lexicon and n-gram")
        elif self.lm is not None:
            parts.append("n-gram")
        return ", ".join(parts)


Search = Callable[[Tensor, Tensor], Sequence[Sequence[Hypothesis]]]


def make_search(config: Config, symbols: PhonemeSet, fusion: Fusion | None = None) -> Search:
    """Create a function that maps log-probabilities (B, S, V) and frame counts (B,) to ranked hypotheses.

    Beam search returns the whole beam: the features of words depend on all hypotheses, and entries of n-best
    lists that differ only in word boundaries at the start or end are merged later.
    """
    if config.search == "greedy":
        return lambda logp_BSV, n_frames_B: [[best] for best in greedy(logp_BSV, n_frames_B, symbols.blank)]
    return partial(beam_search, beam=config.beam, n_best=config.beam, blank=symbols.blank, fusion=fusion)


def run(config: Config, out: Path) -> dict[str, Any]:
    manifest, targets = Manifest(config.manifest), TargetStore(config.targets)
    targets.check(manifest)
    bundle = load_bundle(config.model)
    if bundle.ctc is None:
        raise CheckpointError(f"decode.model: {config.model} has no CTC head; use a fine-tuned model")
    raise_config_errors(hubert_grid_errors(bundle.config.grid, f"decode.model={config.model}"))
    if bundle.phonemes != targets.phonemes:
        raise CheckpointError(
            f"decode.model: {config.model} and {config.targets} have different symbols; set decode.targets "
            "to targets with the symbols of the model"
        )
    device = distributed.process_device(config.device)
    bundle.ctc.to(device)
    fusion = load_fusion(targets.phonemes, config.lm, config.lexicon, config.lm_weight, config.word_bonus)
    log_probs = partial(log_probabilities, bundle.ctc, manifest, targets, config=config, device=device)
    if fusion is not None and config.tune_splits:
        fusion = tune(fusion, log_probs, manifest, targets, config, out)
    search = make_search(config, targets.phonemes, fusion)
    counts = {}
    for split in config.splits:
        n_utterances = len(manifest.indices(split=split))
        rows = labeled_in([split], manifest, targets)
        if not len(rows):
            raise DataError(
                f"decode.splits: no utterance of split {split!r} in {config.manifest} has a target; "
                "choose other splits"
            )
        if len(rows) < n_utterances:
            log.warning(
                "%s: utterances that are not decoded because they have no target: %d of %d (see %s)",
                split, n_utterances - len(rows), n_utterances, config.targets / "rejected.jsonl",
            )  # fmt: skip
        counts[split] = len(rows)
        lines = []
        for rows_B, logp_BSV, n_frames_B in log_probs(rows, f"decoding {split}", suppress=config.vad):
            hypotheses_B = search(logp_BSV, n_frames_B)
            results = zip(rows_B, hypotheses_B, logp_BSV, n_frames_B.tolist(), strict=True)
            lines.append(
                [
                    _hypothesis_line(
                        manifest[row], targets, row, hypotheses, logp_SV[:n], config.n_best, fusion
                    )
                    for row, hypotheses, logp_SV, n in results
                ]
            )
        _write(out / f"{split}.jsonl", lines)
    if config.align_splits:
        rows = labeled_in(config.align_splits, manifest, targets)
        lines = []
        for rows_B, logp_BSV, n_frames_B in log_probs(rows, "alignment", suppress=False):
            batch = zip(rows_B, logp_BSV, n_frames_B.tolist(), strict=True)
            lines.append([_alignment_line(manifest, targets, row, logp_SV[:n]) for row, logp_SV, n in batch])
        _write(out / "alignment.jsonl", lines)
    if distributed.rank() == 0:
        write_json(out / "phonemes.json", targets.phonemes.to_json())
    distributed.barrier()
    metrics: dict[str, Any] = {"utterances": counts, "search": config.description}
    if fusion is not None:
        metrics |= {"lm_weight": fusion.lm_weight, "word_bonus": fusion.word_bonus}
    return metrics


def tune(
    fusion: Fusion,
    log_probs: Callable[..., Iterator[tuple[tuple[int, ...], Tensor, Tensor]]],
    manifest: Manifest,
    targets: TargetStore,
    config: Config,
    out: Path,
) -> Fusion:
    """Choose the weight and the bonus with the lowest error rate on `config.tune_splits`."""
    rows = labeled_in(config.tune_splits, manifest, targets)
    if not len(rows):
        raise DataError(
            f"decode.tune_splits: no utterance of {', '.join(config.tune_splits)} has a target; "
            "choose other splits"
        )
    batches = [
        TuningBatch(logp_BSV, n_frames_B, [targets[row].tolist() for row in rows_B])
        for rows_B, logp_BSV, n_frames_B in log_probs(rows, "tuning", suppress=config.vad)
    ]
    lm_weights = config.tune_lm_weights if config.lm is not None else (0.0,)
    points = search_grid(fusion, batches, targets.phonemes, config.beam, lm_weights, config.tune_word_bonuses)
    best = points[0]
    log.info(
        "lm_weight %g and word_bonus %g have the lowest error rate, %.2f %%, of %d combinations on %s",
        best.lm_weight, best.word_bonus, 100 * best.rate, len(points), ", ".join(config.tune_splits),
    )  # fmt: skip
    if distributed.rank() == 0:
        write_json(out / "tuning.json", [asdict(point) for point in points])
    return fusion.reweighted(best.lm_weight, best.word_bonus)


def log_probabilities(
    model: HubertForCtc,
    manifest: Manifest,
    targets: TargetStore,
    rows: np.ndarray,
    description: str,
    config: Config,
    device: torch.device,
    suppress: bool,
) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
    """Yield (rows, log-probabilities (B, S, V), frame counts (B,)) for each batch of this process.

    The audio is conditioned as in `Transcriber` if configured. With `suppress`, which requires `config.vad`,
    phones outside speech are suppressed as well.
    """
    seconds = manifest.n_samples[rows] / SAMPLE_RATE
    is_long = seconds > config.batch_seconds
    parts = [(rows[~is_long], config.batch_seconds)]
    # An utterance that is longer than a batch is decoded alone, so that it does not enlarge other batches.
    parts += [(rows[[i]], seconds[i] + 1) for i in np.flatnonzero(is_long)]
    sources = [
        CtcData(
            manifest,
            targets,
            part,
            mask=None,
            width=1,
            sizes=BatchSizes(float(batch_seconds)),
            seed=0,
            keep_in_memory_hours=0,
        )
        for part, batch_seconds in parts
        if len(part)
    ]
    all_batches = [(data, micro) for data in sources for micro in data.sampler.single_pass()]
    batches = all_batches[distributed.rank() :: distributed.world()]
    n_rows = sum(len(micro.rows) for _, micro in batches)

    def load(item: tuple[CtcData, MicroBatch]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Load a batch as padded waveforms, their lengths, and the speech mask of each waveform."""
        data, micro = item
        batch = data.load(micro)
        if not config.vad and not config.conditioning:
            return batch.wav_BT, batch.n_samples_B, []
        wavs = [wav_T[:n] for wav_T, n in zip(batch.wav_BT, batch.n_samples_B.tolist(), strict=True)]
        prepared = [
            prepare_speech(wav_T, model.config.grid, config.vad, config.conditioning) for wav_T in wavs
        ]
        return pad([wav_T for wav_T, _ in prepared]), batch.n_samples_B, [mask for _, mask in prepared]

    with torch.inference_mode(), progress(description, "utterances", n_rows) as done:
        for (_, micro), (wav_BT, n_samples_B, speech) in prefetch(load, batches):
            logp_BSV, n_frames_B = model(wav_BT.to(device), n_samples_B)
            logp_BSV = logp_BSV.cpu()
            if suppress:
                for logp_SV, speech_S in zip(logp_BSV, speech, strict=True):
                    n = len(speech_S)
                    logp_SV[:n] = suppress_nonspeech(logp_SV[:n], speech_S, targets.phonemes)
            yield micro.rows, logp_BSV, n_frames_B.cpu()
            done(len(micro.rows))


def _write(path: Path, lines: list[list[str]]) -> None:
    """Gather the lines of all processes, and write them in batch order."""
    batches = distributed.gather_interleaved(lines)
    if distributed.rank() == 0:
        with atomic_write(path) as file:
            file.writelines(line for batch in batches for line in batch)


def _hypothesis_line(
    utterance: Utterance,
    targets: TargetStore,
    row: int,
    hypotheses: Sequence[Hypothesis],
    logp_SV: Tensor,
    n_best: int,
    fusion: Fusion | None,
) -> str:
    symbols = targets.phonemes
    spans = align_best(logp_SV, hypotheses, symbols.blank, symbols.boundary, fusion)
    words = list(group_words(spans, symbols.boundary, split_symbols=True))

    def to_words(labels: Sequence[int]) -> tuple[str, ...]:
        return tuple(" ".join(word) for word in split_words(symbols, labels))

    line: dict[str, Any] = {
        "id": utterance.id,
        "talk": talk_of(utterance),
        "speaker": utterance.speaker,
        "reference": to_words(targets[row].tolist()),
        "hypothesis": to_words(hypotheses[0].labels),
        "score": hypotheses[0].score,
        "word_features": [[round(value, 4) for value in features] for features in word_features(words)],
    }
    if hypotheses[0].words is not None:
        line |= {"reference_text": utterance.text, "written": hypotheses[0].words}
    if n_best > 1:
        unique: dict[tuple[str, ...], float] = {}
        for hypothesis in hypotheses:
            unique.setdefault(to_words(hypothesis.labels), hypothesis.score)
        line["n_best"] = [{"words": words, "score": score} for words, score in unique.items()][:n_best]
    return json.dumps(line, ensure_ascii=False) + "\n"


def talk_of(utterance: Utterance) -> str:
    """Return the name of the audio file without suffix, or the utterance id if the file is an archive."""
    return utterance.id if utterance.audio.offset else Path(utterance.audio.path).stem


def _alignment_line(manifest: Manifest, targets: TargetStore, row: int, logp_SV: Tensor) -> str:
    symbols, target = targets.phonemes, targets[row].tolist()
    spans = forced_align(logp_SV, target, symbols.blank)
    line = {
        "id": manifest[row].id,
        "row": row,
        "phones": phone_times(spans, len(logp_SV), symbols),
        "words": word_times(spans, symbols),
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def word_times(spans: Sequence[Span], symbols: PhonemeSet) -> list[tuple[str, int, int]]:
    """Return (word, first sample, end sample) for each word.

    A word extends from the first to the last frame of its symbols.
    """
    return [
        (
            " ".join(symbols.symbols[span.label] for span in word),
            HUBERT.start(word[0].start),
            HUBERT.start(word[-1].end),
        )
        for word in group_words(spans, symbols.boundary, split_symbols=True)
    ]


def phone_times(spans: Sequence[Span], n_frames: int, phonemes: PhonemeSet) -> list[tuple[str, int, int]]:
    """Return (phone, first sample, end sample) for the whole utterance; pauses are called "pau".

    Because CTC emits each phone as a spike, every frame is assigned to the nearest spike. A frame whose
    nearest spike is more than `_MAX_DISTANCE` frames away, or is a word boundary, belongs to a pause.
    """
    # Frames from edges[i] on are nearer to span i + 1 than to span i.
    edges = [(span.end + following.start + 1) // 2 for span, following in pairwise(spans)]
    nearest_S = [spans[i] for i in np.searchsorted(edges, np.arange(n_frames), side="right")]
    times: list[tuple[str, int, int]] = []
    for frame, span in enumerate(nearest_S):
        is_near = max(span.start - frame, frame - span.end + 1, 0) <= _MAX_DISTANCE
        is_phone = is_near and span.label != phonemes.boundary
        name = phonemes.symbols[span.label] if is_phone else "pau"
        end = HUBERT.start(frame + 1)
        is_same = frame > 0 and times[-1][0] == name and (name == "pau" or span is nearest_S[frame - 1])
        if is_same:
            times[-1] = (name, times[-1][1], end)
        else:
            times.append((name, HUBERT.start(frame), end))
    return times
