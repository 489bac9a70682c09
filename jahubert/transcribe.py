"""Speech to text: audio of any length -> phones, kana, words with times."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from jahubert.audio import AudioLike, AudioSource, load_audio
from jahubert.checkpoint import load_bundle
from jahubert.chunks import encode_all
from jahubert.decode import Hypothesis, Span, beam_search, forced_align
from jahubert.errors import CheckpointError, ConfigError, DataError
from jahubert.extract import pick_device
from jahubert.frames import SAMPLE_RATE, FrameGrid
from jahubert.heads import HubertForCtc
from jahubert.phonemes import BOUNDARY, PhonemeSet, phones_to_kana

CHUNK_SECONDS = (
    30.0  # longer recordings are encoded in overlapping chunks and decoded in pieces of this length
)
BEAM_ROWS = 32  # pieces in one beam search
PAUSE_SECONDS = 0.5  # of blanks around the place where a long recording is cut for decoding


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
    found = sorted((Path(__file__).parent / "assets").glob("*/config.json"))
    return found[0].parent if found else None


class Transcriber:
    """Recognises speech with a CTC model: `Transcriber.from_pretrained("bundle/").transcribe("a.wav")`.

    Args:
        model: encoder with a CTC head; it is put into eval mode and moved to `device`.
        phonemes: the symbols of the head.
        beam: width of the beam search.
        device: default is the GPU where there is one.
    """

    def __init__(
        self,
        model: HubertForCtc,
        phonemes: PhonemeSet,
        *,
        beam: int = 20,
        device: str | torch.device | None = None,
    ):
        if model.lm_head.out_features != len(phonemes):
            raise CheckpointError(
                f"the model's head has {model.lm_head.out_features} symbols, but its phoneme set has "
                f"{len(phonemes)}"
            )
        if beam < 1:
            raise ConfigError(f"beam is {beam}, but must be at least 1; the published results use 20")
        self.device = pick_device(device)
        self.model = model.eval().to(self.device)
        self.phonemes, self.beam = phonemes, beam

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
        return self._finish([(_name(audio), load_audio(audio, sample_rate))])[0]

    def transcribe_many(
        self,
        audio: Iterable[AudioLike],
        sample_rate: int | None = None,
        *,
        batch_seconds: float = 60.0,
        errors: Literal["raise", "return"] = "raise",
    ) -> Iterator[Transcript | Exception]:
        """Transcripts of many files or arrays, in order, several recordings at a time.

        Recordings are read until they last `batch_seconds` together. With `errors="return"` a recording
        that fails gives its exception in place of a transcript, and the others go on.
        """
        waiting: list[tuple[str, Tensor]] = []
        for item in audio:
            trouble = None
            try:
                waiting.append((_name(item), load_audio(item, sample_rate)))
            except Exception as error:
                trouble = error
            if trouble is not None:  # behind those that were read before it
                yield from self._flush(waiting, errors)
                waiting = []
                if errors == "raise":
                    raise trouble
                yield trouble
            if sum(len(wav) for _, wav in waiting) >= batch_seconds * SAMPLE_RATE:
                yield from self._flush(waiting, errors)
                waiting = []
        yield from self._flush(waiting, errors)

    def log_probs(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Log-probabilities (S, V), float32 on the CPU, of 16 kHz waveforms of any length."""

        def encode(wav_BT: Tensor, n_samples: list[int]) -> tuple[Tensor, Tensor]:
            return self.model(wav_BT.to(self.device), n_samples)

        return encode_all(wavs, encode, self.grid, (len(self.phonemes),), CHUNK_SECONDS)

    def _flush(self, waiting: list[tuple[str, Tensor]], errors: str) -> Iterator[Transcript | Exception]:
        if not waiting:
            return
        done: Sequence[Transcript | Exception]
        try:
            done = self._finish(waiting)
        except Exception as error:
            if errors == "raise":
                raise
            done = [error] if len(waiting) == 1 else []
        # If several failed together, one of them did it and the others are not to suffer.
        yield from done or (result for one in waiting for result in self._flush([one], errors))

    def _finish(self, recordings: list[tuple[str, Tensor]]) -> list[Transcript]:
        """Encode, search, align and spell a few recordings together."""
        logps = self.log_probs([wav for _, wav in recordings])
        longest = round(CHUNK_SECONDS * self.grid.rate)
        pause = round(PAUSE_SECONDS * self.grid.rate)
        cuts = [cut_at_pauses(logp, longest, pause, self.phonemes.blank) for logp in logps]
        pieces = [logp[a:b] for logp, cut in zip(logps, cuts, strict=True) for a, b in cut]
        found = iter(self._search(pieces))
        transcripts = []
        for (name, wav), logp, cut in zip(recordings, logps, cuts, strict=True):
            spans: list[Span] = []
            score = 0.0
            for start, end in cut:
                best = next(found)
                score += best.score
                for span in forced_align(logp[start:end], best.labels, self.phonemes.blank):
                    spans.append(Span(span.label, start + span.start, start + span.end, span.score))
            duration = len(wav) / SAMPLE_RATE
            words = tuple(words_of(spans, self.phonemes, self.grid))
            transcripts.append(Transcript(words, duration, score, name))
        return transcripts

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


def cut_at_pauses(logp_SV: Tensor, longest: int, pause: int, blank: int = 0) -> list[tuple[int, int]]:
    """Pieces [start, end) of at most `longest` frames, cut in the middle of the clearest pauses.

    What fits stays whole. A pause is `pause` frames that are most likely blank.
    """
    n_frames, start, pieces = len(logp_SV), 0, []
    while n_frames - start > longest:
        first = start + longest * 2 // 3
        around = logp_SV[first - pause // 2 : start + longest, blank].exp()
        quiet = torch.nn.functional.avg_pool1d(around[None, None], max(1, pause), stride=1)[0, 0]
        end = first + int(quiet.argmax())
        pieces.append((start, end))
        start = end
    return [*pieces, (start, n_frames)]


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
