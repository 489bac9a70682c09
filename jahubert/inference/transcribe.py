"""Speech to text: audio of any length -> phones, kana, words with times."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from jahubert.audio import AudioLike, AudioSource, stream_audio
from jahubert.errors import CheckpointError, ConfigError, DataError
from jahubert.formats.bundle import load_bundle
from jahubert.frames import SAMPLE_RATE, FrameGrid
from jahubert.inference.chunking import Chunk, chunks, encode_all
from jahubert.inference.ctc import Hypothesis, Span, beam_search, forced_align
from jahubert.inference.vad import (
    AT_ONCE,
    CHUNK_SECONDS,
    PAUSE_SECONDS,
    Segment,
    decoding_segments,
    merge_spans,
    speech_frames,
)  # fmt: skip
from jahubert.model.device import pick_device
from jahubert.model.heads import HubertForCtc
from jahubert.model.precision import PRECISIONS, autocast, preferred_dtype, quantize_int8
from jahubert.phonemes import BOUNDARY, PhonemeSet, phones_to_kana

BEAM_ROWS = 32  # pieces in one beam search
NEVER = -1e4  # log-probability of a phone where nobody speaks


@dataclass(frozen=True)
class Word:
    """One word: what was said, and when (seconds from the start of the recording)."""

    kana: str
    phonemes: tuple[str, ...]
    start: float
    end: float
    score: float  # mean natural log-probability of its frames
    times: tuple[tuple[float, float], ...]  # start and end of each phoneme


@dataclass(frozen=True)
class Transcript:
    """What was said in one recording."""

    words: tuple[Word, ...]
    duration: float  # seconds
    score: float  # natural log of the CTC probability of the labels found
    audio: str = ""  # file name, where there is one

    @property
    def text(self) -> str:
        """Kana, a space between words."""
        return " ".join(word.kana for word in self.words)

    @property
    def phonemes(self) -> tuple[str, ...]:
        """All phonemes, with `|` between words."""
        out: list[str] = []
        for word in self.words:
            out += [BOUNDARY, *word.phonemes] if out else word.phonemes
        return tuple(out)


def builtin_model() -> Path | None:
    """The folder of the model that came with the package, if one did."""
    found = sorted((Path(__file__).parents[1] / "assets").glob("*/config.json"))
    return found[0].parent if found else None


class Transcriber:
    """Recognises speech with a CTC model: `Transcriber.from_pretrained("bundle/").transcribe("a.wav")`.

    Args:
        model: encoder with a CTC head; it is put into eval mode and moved to `device`.
        phonemes: the symbols of the head.
        beam: width of the beam search.
        device: default is the GPU where there is one.
        vad: find no words where nobody speaks (`longform.speech_frames`).
        dtype: of the matrix products: torch.float32, bfloat16, float16, or on a CPU int8; default is bfloat16
            where the device has it in hardware, else float32.
    """

    def __init__(
        self,
        model: HubertForCtc,
        phonemes: PhonemeSet,
        *,
        beam: int = 20,
        device: str | torch.device | None = None,
        vad: bool = True,
        dtype: torch.dtype | None = None,
    ):
        if model.lm_head.out_features != len(phonemes):
            raise CheckpointError(
                f"the model's head has {model.lm_head.out_features} symbols, but its phoneme set has "
                f"{len(phonemes)}"
            )
        if beam < 1:
            raise ConfigError(f"beam is {beam}, but must be at least 1; the published results use 20")
        if dtype not in (None, torch.int8, *PRECISIONS):
            raise ConfigError(f"dtype is {dtype}; choose torch.float32, bfloat16, float16 or int8")
        self.device = pick_device(device)
        self.dtype = preferred_dtype(self.device) if dtype is None else dtype
        int8 = self.dtype is torch.int8
        self.model = quantize_int8(model, self.device) if int8 else model.eval().to(self.device)
        self.phonemes, self.beam, self.vad = phonemes, beam, vad

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike | None = None, **options) -> Transcriber:
        """From a fine-tuned bundle (default: the built-in model); `options` as in the constructor."""
        source = builtin_model() if source is None else source
        if source is None:
            raise CheckpointError(
                "this installation has no built-in model; name a fine-tuned one "
                "(on the command line --model): a bundle folder or a Hub name"
            )
        bundle = load_bundle(source)
        if bundle.ctc is None or bundle.phonemes is None:
            lacks = "no CTC head" if bundle.ctc is None else "no symbols (vocab.json)"
            raise CheckpointError(
                f"{os.fspath(source)} has {lacks}, so it cannot transcribe; take a bundle that "
                "stage finetune wrote, or another CTC model"
            )
        return cls(bundle.ctc, bundle.phonemes, **options)

    @property
    def grid(self) -> FrameGrid:
        """Which samples each frame sees."""
        return self.model.config.grid

    def transcribe(self, audio: AudioLike, sample_rate: int | None = None) -> Transcript:
        """One file or array; `sample_rate` is that of an array (16 kHz if not given)."""
        (found,) = self.transcribe_many([audio], sample_rate)
        if isinstance(found, Exception):
            raise found
        return found

    def transcribe_many(
        self,
        audio: Iterable[AudioLike],
        sample_rate: int | None = None,
        *,
        batch_seconds: float = 60.0,
        errors: Literal["raise", "return"] = "raise",
        progress: Callable[[float], None] | None = None,
    ) -> Iterator[Transcript | Exception]:
        """Transcripts of many files or arrays, in order, several short recordings at a time.

        Recordings up to 30 s are read until they last `batch_seconds` together; longer ones are read and
        recognised bit by bit, in memory that does not grow with them. With `errors="return"` a recording that
        fails gives its exception in place of a transcript, and the others go on. `progress` is told the
        seconds of audio done since it was last called.
        """
        tell = progress or (lambda seconds: None)
        waiting: list[tuple[str, Tensor]] = []
        for item in audio:
            head: list[Chunk] = []
            found: Transcript | Exception | None = None
            try:
                parts = chunks(stream_audio(item, sample_rate), self.grid, CHUNK_SECONDS)
                head = list(islice(parts, 2))
            except Exception as error:
                found = error
            if len(head) == 1:
                waiting.append((_name(item), head[0].wav_T))
                if sum(len(wav) for _, wav in waiting) < batch_seconds * SAMPLE_RATE:
                    continue
            yield from self._flush(waiting, errors, tell)
            waiting = []
            if len(head) == 1:
                continue
            try:
                found = found or self._long(_name(item), chain(head, parts), tell)
            except Exception as error:
                found = error
            if errors == "raise" and isinstance(found, Exception):
                raise found
            yield found
        yield from self._flush(waiting, errors, tell)

    def log_probs(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Log-probabilities (S, V), float32 on the CPU, of 16 kHz waveforms of any length."""

        def encode(wav_BT: Tensor, n_samples: list[int]) -> tuple[Tensor, Tensor]:
            with autocast(self.dtype, self.device):
                return self.model(wav_BT.to(self.device), n_samples)

        return encode_all(wavs, encode, self.grid, (len(self.phonemes),), CHUNK_SECONDS)

    def _flush(
        self, waiting: list[tuple[str, Tensor]], errors: str, tell: Callable[[float], None]
    ) -> Iterator[Transcript | Exception]:
        """The transcripts of a few short recordings, made together."""
        if not waiting:
            return
        done: Sequence[Transcript | Exception]
        try:
            done = self._short(waiting)
        except Exception as error:
            if errors == "raise":
                raise
            done = [error] if len(waiting) == 1 else []
        if done:
            tell(sum(len(wav) for _, wav in waiting) / SAMPLE_RATE)
        # If several failed together, one of them did it and the others are not to suffer.
        yield from done or (result for one in waiting for result in self._flush([one], errors, tell))

    def _short(self, recordings: list[tuple[str, Tensor]]) -> list[Transcript]:
        wavs = [wav for _, wav in recordings]
        logps = [self._gated(logp, wav) for logp, wav in zip(self.log_probs(wavs), wavs, strict=True)]
        found = self._decode([Segment(0, logp) for logp in logps])
        return [
            self._transcript(name, len(wav), [answer])
            for (name, wav), answer in zip(recordings, found, strict=True)
        ]

    def _long(self, name: str, parts: Iterable[Chunk], tell: Callable[[float], None]) -> Transcript:
        """One recording, chunk by chunk."""
        n_samples = 0

        def frames() -> Iterator[Tensor]:
            nonlocal n_samples
            for group in merge_spans(parts, AT_ONCE):
                for chunk, logp in zip(group, self.log_probs([c.wav_T for c in group]), strict=True):
                    yield self._gated(logp, chunk.wav_T)[chunk.keep : chunk.end]
                before, n_samples = n_samples, group[-1].start + len(group[-1].wav_T)
                tell((n_samples - before) / SAMPLE_RATE)

        longest, pause = (round(seconds * self.grid.rate) for seconds in (CHUNK_SECONDS, PAUSE_SECONDS))
        cut = decoding_segments(frames(), longest, pause, self.phonemes.blank)
        found = [answer for group in merge_spans(cut, AT_ONCE) for answer in self._decode(group)]
        return self._transcript(name, n_samples, found)

    def _gated(self, logp_SV: Tensor, wav_T: Tensor) -> Tensor:
        """No phones where nobody speaks; blank and word boundary stay as they are."""
        if not self.vad:
            return logp_SV
        silent_S = ~speech_frames(wav_T, self.grid)
        phone_V = torch.ones(len(self.phonemes), dtype=torch.bool)
        phone_V[[self.phonemes.blank, max(self.phonemes.boundary, self.phonemes.blank)]] = False
        return logp_SV.masked_fill(silent_S[:, None] & phone_V, NEVER)

    def _decode(self, cut: list[Segment]) -> list[tuple[list[Span], float]]:
        """Aligned labels of each piece, at frames of the recording, and their log-probability."""
        found = []
        for piece, best in zip(cut, self._search([piece.logp_SV for piece in cut]), strict=True):
            spans = forced_align(piece.logp_SV, best.labels, self.phonemes.blank)
            moved = [Span(s.label, piece.start + s.start, piece.start + s.end, s.score) for s in spans]
            found.append((moved, best.score))
        return found

    def _transcript(self, name: str, n_samples: int, found: list[tuple[list[Span], float]]) -> Transcript:
        spans = (span for aligned, _ in found for span in aligned)
        words = tuple(words_of(spans, self.phonemes, self.grid))
        return Transcript(words, n_samples / SAMPLE_RATE, sum(score for _, score in found), name)

    def _search(self, pieces: list[Tensor]) -> list[Hypothesis]:
        """The best hypothesis of each piece; pieces of like length share a beam search."""
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
        best: dict[int, Hypothesis] = {}
        for begin in range(0, len(order), BEAM_ROWS):
            rows = order[begin : begin + BEAM_ROWS]
            padded = torch.nn.utils.rnn.pad_sequence([pieces[i] for i in rows], batch_first=True)
            lengths = [len(pieces[i]) for i in rows]
            found = beam_search(padded, lengths, self.beam, blank=self.phonemes.blank)
            best.update({i: hypotheses[0] for i, hypotheses in zip(rows, found, strict=True)})
        return [best[i] for i in range(len(pieces))]


def words_of(spans: Iterable[Span], phonemes: PhonemeSet, grid: FrameGrid) -> Iterator[Word]:
    """Aligned labels gathered into words at the boundary symbol."""
    group: list[Span] = []
    for span in [*spans, None]:
        if span is not None and span.label != phonemes.boundary:
            group.append(span)
        elif group:
            yield _word(group, phonemes, grid)
            group = []


def _word(spans: list[Span], phonemes: PhonemeSet, grid: FrameGrid) -> Word:
    phones = tuple(phonemes.symbols[span.label] for span in spans)
    times = tuple((grid.start(s.start) / SAMPLE_RATE, grid.start(s.end) / SAMPLE_RATE) for s in spans)
    n_frames = sum(s.end - s.start for s in spans)
    score = sum(s.score * (s.end - s.start) for s in spans) / n_frames
    try:
        kana = phones_to_kana(phones) if phonemes.spells_phones else "".join(phones)
    except DataError:  # a model with symbols of its own has no kana
        kana = "".join(phones)
    return Word(kana, phones, times[0][0], times[-1][1], score, times)


def _name(audio: AudioLike) -> str:
    """The file name of a source, or nothing for arrays and streams."""
    return str(audio) if isinstance(audio, str | os.PathLike | AudioSource) else ""
