"""Speech recognition, from audio of any length to phonemes, kana and words with times."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jahubert.audio import AudioLike, AudioSource, stream_audio
from jahubert.errors import CheckpointError, ConfigError, DataError
from jahubert.formats.bundle import CALIBRATION_KEY, load_bundle
from jahubert.formats.hub import model_name
from jahubert.frames import SAMPLE_RATE, FrameGrid
from jahubert.inference.chunking import Chunk, batched, chunks, encode_all
from jahubert.inference.conditioning import prepare_speech
from jahubert.inference.confidence import Calibration, align_best, confidence, word_features
from jahubert.inference.ctc import Hypothesis, Span, beam_search, group_words
from jahubert.inference.fusion import DEFAULT_LM_WEIGHT, load_fusion
from jahubert.inference.reading import check_many, read_ahead, run_batch
from jahubert.inference.silero import check_silero
from jahubert.inference.vad import Segment, cut_at_pauses, suppress_nonspeech
from jahubert.inference.writers import join_words
from jahubert.model.device import pick_device
from jahubert.model.heads import HubertForCtc
from jahubert.model.precision import (
    PRECISIONS,
    autocast,
    check_parameter_dtypes,
    preferred_dtype,
    quantize_int8,
)
from jahubert.phonemes import BOUNDARY, PhonemeSet, phones_to_kana

CHUNK_SECONDS = 30.0  # longer recordings are encoded in overlapping chunks of this length
CHUNKS_PER_BATCH = 4
DEFAULT_BEAM = 20  # beam for which the calibration of a model holds
PAUSE_SECONDS = 0.5  # length of the window for finding the clearest pause, where a long recording is cut
MAX_CUT_WORD = 40  # maximum number of labels that can continue a word from the previous part
# Maximum gap between two labels of a word. With the built-in model, gaps inside the words of 40
# recordings were at most 0.34 s, and gaps between words at the cuts of longer recordings at least 0.66 s.
MAX_WORD_GAP_SECONDS = 0.5
PREFETCH = 16  # number of recordings to open ahead; of each, up to 60 s are decoded and kept in memory
BEAM_ROWS = 32  # number of segments per beam search
SILENCE = 1e-3  # peak amplitude (-60 dBFS) below which no warning about missing speech is logged

log = logging.getLogger(__name__)

Progress = Callable[[float], None]  # called with the seconds of audio completed since the last call


@dataclass(frozen=True)
class Word:
    """A recognized word with its times in seconds from the start of the recording."""

    kana: str
    phonemes: tuple[str, ...]
    start: float
    end: float
    score: float  # mean natural log-probability per frame
    times: tuple[tuple[float, float], ...]  # start and end of each phoneme
    confidence: float = math.nan  # probability that the word is correct; without boundaries: see `words_of`
    written: str = ""  # the word as written in the lexicon, or empty without a lexicon

    @property
    def text(self) -> str:
        """The word as written in the lexicon, or in kana without a lexicon."""
        return self.written or self.kana


@dataclass(frozen=True)
class Decoded:
    """Aligned labels of part of a recording, their log-probability and, if there is a lexicon, the words."""

    spans: list[Span]
    score: float
    words: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Short:
    """A recording of up to one chunk that has been read."""

    wav_T: Tensor

    @property
    def n_samples(self) -> int:
        """Number of samples that have been read."""
        return len(self.wav_T)


@dataclass(frozen=True)
class _Long:
    """A recording of several chunks whose beginning has been read."""

    head: list[Chunk]
    rest: Iterator[Chunk]  # chunks that are still to be read

    @property
    def n_samples(self) -> int:
        """Number of samples in the chunks that have been read."""
        return sum(len(chunk.wav_T) for chunk in self.head)


@dataclass(frozen=True)
class TranscriptSegment:
    """One or more consecutive words of a recording, usually between two pauses."""

    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        """Kana with a space between words; with a lexicon, the written words without spaces."""
        return join_words(self.words)

    @property
    def start(self) -> float:
        """Start of the first word in seconds."""
        return self.words[0].start

    @property
    def end(self) -> float:
        """End of the last word in seconds."""
        return self.words[-1].end


@dataclass(frozen=True)
class Transcript:
    """Recognition result for one recording."""

    words: tuple[Word, ...]
    duration: float  # duration in seconds
    score: float  # natural log-probability of all labels, plus any language model score and word bonus
    audio: str = ""  # file name, or empty for arrays and streams
    segment_starts: tuple[int, ...] = (0,)  # index of the first word of each segment
    calibrated: bool = False  # whether the confidences are calibrated

    @property
    def text(self) -> str:
        """Kana with a space between words; with a lexicon, the written words without spaces."""
        return join_words(self.words)

    @property
    def confidence(self) -> float | None:
        """Mean confidence of the words, weighted by their numbers of phonemes. None if there are no words."""
        if not self.words:
            return None
        lengths = [len(word.phonemes) for word in self.words]
        total = sum(n * word.confidence for n, word in zip(lengths, self.words, strict=True))
        return total / sum(lengths)

    @property
    def segments(self) -> tuple[TranscriptSegment, ...]:
        """Words grouped at pauses. Recordings of up to 30 s have one segment, or none without words."""
        ends = (*self.segment_starts[1:], len(self.words))
        ranges = zip(self.segment_starts, ends, strict=True)
        return tuple(TranscriptSegment(self.words[start:end]) for start, end in ranges if start < end)

    @property
    def phonemes(self) -> tuple[str, ...]:
        """All phonemes in the transcript, with `|` between words."""
        out: list[str] = []
        for word in self.words:
            if out:
                out.append(BOUNDARY)
            out += word.phonemes
        return tuple(out)


class Transcriber:
    """CTC speech recognizer: `Transcriber.from_pretrained("bundle/").transcribe("a.wav")`.

    Args:
        model: encoder with a CTC head, which is set to eval mode and moved to `device`; int8 uses a copy.
        phonemes: symbols of the head.
        beam: width of the beam search.
        device: device of the model (default: a GPU if available).
        vad: whether to detect speech and suppress phones outside speech. "silero" keeps only the speech that
            silero-vad also detects (extra `vad`).
        conditioning: whether to remove DC offset and hum and normalize the level of speech
            (`conditioning.prepare_speech`).
        dtype: torch.float32, bfloat16, float16 (autocast), or int8 (only on a CPU). By default, bfloat16
            where the hardware is faster with it, otherwise float32.
        lm: path of an ARPA file with an n-gram model over the symbols, or over the words in `lexicon` if
            given. If neither `lm` nor a lexicon is given, `from_pretrained` uses the n-gram, weight and bonus
            of the model, if it has an n-gram; lm=None prevents this.
        lexicon: path of a file with the words to recognize, one word and its symbols per line.
        lm_weight: factor for the log-probability of the language model (default: 0.5).
        word_bonus: score added per word, or per symbol without a lexicon (default: 0).
        calibration: coefficients of the word confidences. By default, `from_pretrained` uses those of the
            model, if it has any and the search is its own: with its n-gram, if any, and without a lexicon.

    Raises:
        CheckpointError: the head and the phoneme set differ in size.
        ConfigError: the beam, vad, device or dtype is invalid, the model is not float32 (or, with
            dtype=torch.float32, float64), a weight or bonus has no effect or is not finite, or a lexicon is
            given for symbols without a word boundary.
        DataError: the language model or lexicon is invalid.
        MissingExtraError: silero-vad is not installed.
    """

    def __init__(
        self,
        model: HubertForCtc,
        phonemes: PhonemeSet,
        *,
        beam: int = DEFAULT_BEAM,
        device: str | torch.device | None = None,
        vad: bool | Literal["silero"] = True,
        conditioning: bool = True,
        dtype: torch.dtype | None = None,
        lm: str | os.PathLike[str] | None = None,
        lexicon: str | os.PathLike[str] | None = None,
        lm_weight: float | None = None,
        word_bonus: float | None = None,
        calibration: Calibration | None = None,
    ):
        if model.lm_head.out_features != len(phonemes):
            raise CheckpointError(
                f"the CTC head has {model.lm_head.out_features} outputs, but the phoneme set has "
                f"{len(phonemes)} symbols"
            )
        if beam < 1:
            raise ConfigError(f"beam is {beam}, but must be at least 1; the published results use 20")
        if dtype not in (None, torch.int8, *PRECISIONS):
            raise ConfigError(f"dtype is {dtype}; choose torch.float32, bfloat16, float16 or int8")
        if vad not in (True, False, "silero"):
            raise ConfigError(f"vad is {vad!r}, but must be True, False or 'silero'")
        if vad == "silero":
            check_silero()
        if lm_weight is not None and lm is None:
            raise ConfigError("lm_weight has no effect without lm; set lm or omit lm_weight")
        if word_bonus is not None and lm is None and lexicon is None:
            raise ConfigError("word_bonus has no effect without lm or lexicon; set one or omit word_bonus")
        self.fusion = load_fusion(
            phonemes,
            None if lm is None else Path(lm),
            None if lexicon is None else Path(lexicon),
            DEFAULT_LM_WEIGHT if lm_weight is None else lm_weight,
            0.0 if word_bonus is None else word_bonus,
        )
        self.calibration = calibration
        self.device = pick_device(device)
        self.dtype = preferred_dtype(self.device) if dtype is None else dtype
        exact = self.dtype is torch.float32
        check_parameter_dtypes(model, (torch.float32, torch.float64) if exact else (torch.float32,))
        if self.dtype is torch.int8:
            self.model = quantize_int8(model, self.device)
        else:
            self.model = model.eval().to(self.device)
        self.phonemes = phonemes
        self.beam = beam
        self.vad = vad
        self.conditioning = conditioning

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] | None = None, **options: Any) -> Transcriber:
        """Load a fine-tuned model (default: the built-in one), and pass `options` to the constructor."""
        bundle = load_bundle(source)
        if bundle.ctc is None or bundle.phonemes is None:
            missing = "CTC head" if bundle.ctc is None else "symbols (vocab.json)"
            raise CheckpointError(
                f"{model_name(source)} has no {missing}, so it cannot transcribe; use a bundle written by "
                "the finetune stage, or another CTC model"
            )
        for name in ("lm_weight", "word_bonus"):  # None is the default
            if options.get(name, 0.0) is None:
                del options[name]
        own: dict[str, Any] = {}  # language model options of the model itself
        if (ngram := bundle.language_model) is not None:
            own = {"lm": ngram.path, "lm_weight": ngram.weight, "word_bonus": ngram.word_bonus}
        if "lm" not in options and options.get("lexicon") is None:
            options = own | options
        # The stored calibration does not hold for another search.
        is_calibrated_search = options.get("beam", DEFAULT_BEAM) == DEFAULT_BEAM and all(
            options.get(name) == own.get(name) for name in ("lm", "lm_weight", "word_bonus", "lexicon")
        )
        if is_calibrated_search and (stored := bundle.info.get(CALIBRATION_KEY)) is not None:
            options = {"calibration": Calibration.from_json(stored)} | options
        return cls(bundle.ctc, bundle.phonemes, **options)

    @property
    def _max_gap(self) -> int:
        """Maximum number of frames between two labels of a word."""
        return round(MAX_WORD_GAP_SECONDS * self.grid.rate)

    @property
    def _is_calibrated(self) -> bool:
        return self.calibration is not None

    @property
    def grid(self) -> FrameGrid:
        """Mapping between frames and samples."""
        return self.model.config.grid

    def to(self, device: str | torch.device) -> Transcriber:
        """Move the model to another device, in place.

        Raises:
            ConfigError: the device is unavailable, or the model is int8 and the device is not the CPU.
        """
        picked = pick_device(device)
        if self.dtype is torch.int8 and picked.type != "cpu":
            raise ConfigError(f"an int8 model runs on the CPU only, not on {picked}")
        self.device = picked
        self.model.to(picked)
        return self

    def transcribe(self, audio: AudioLike, sample_rate: int | None = None) -> Transcript:
        """Transcribe one recording.

        Args:
            audio: any input of `load_audio`.
            sample_rate: sampling rate of an array in Hz (default: the rate in `audio`, or 16,000).
        """
        (transcript,) = self.transcribe_many([audio], sample_rate)
        assert isinstance(transcript, Transcript)  # errors="raise"
        return transcript

    def transcribe_many(
        self,
        audio: Iterable[AudioLike],
        sample_rate: int | None = None,
        *,
        batch_seconds: float = 60.0,
        errors: Literal["raise", "return"] = "raise",
        progress: Progress | None = None,
        on_segment: Callable[[TranscriptSegment], None] | None = None,
    ) -> Iterator[Transcript | Exception]:
        """Transcribe many recordings, in order, while reading the next ones in the background.

        Recordings of up to 30 s are batched. Longer ones are read and recognized in chunks, and longer files
        are not loaded as a whole.

        Args:
            audio: inputs of `load_audio`. Items of an iterator are taken in advance: those of the current
                batch, and up to 16 more.
            sample_rate: sampling rate of arrays in Hz (default: the rates in `audio`, or 16,000).
            batch_seconds: seconds of audio at which a batch of short recordings is complete.
            errors: "return" yields the exception for a failed recording in its place and continues.
            progress: function that is called with the seconds of audio completed since the last call.
            on_segment: function that is called with each segment of a recording longer than 30 s as soon as
                the segment is recognized, before the transcript of the recording is yielded.

        Raises:
            AudioError: `audio` is a single recording.
            ConfigError: `errors` is invalid.
        """
        check_many(audio, errors)
        recordings = read_ahead(
            lambda item: self._open(item, sample_rate),
            audio,
            PREFETCH,
            lambda opened: 0 if isinstance(opened, Exception) else opened.n_samples,
        )
        return self._transcribe_opened(recordings, batch_seconds, errors, progress, on_segment)

    def _transcribe_opened(
        self,
        recordings: Generator[tuple[AudioLike, _Short | _Long | Exception], None, None],
        batch_seconds: float,
        errors: str,
        progress: Progress | None,
        on_segment: Callable[[TranscriptSegment], None] | None,
    ) -> Iterator[Transcript | Exception]:
        """Transcribe opened recordings, in order. The arguments are those of `transcribe_many`."""
        batch: list[tuple[str, Tensor]] = []
        with closing(recordings):
            for item, opened in recordings:
                if isinstance(opened, _Short):
                    batch.append((_name(item), opened.wav_T))
                    if sum(len(wav_T) for _, wav_T in batch) < batch_seconds * SAMPLE_RATE:
                        continue
                yield from self._transcribe_batch(batch, errors, progress)
                batch = []
                if isinstance(opened, _Short):
                    continue
                result: Transcript | Exception
                try:
                    if isinstance(opened, Exception):
                        raise opened
                    recording = chain(opened.head, opened.rest)
                    result = self._transcribe_long(_name(item), recording, progress, on_segment)
                except Exception as error:
                    if errors == "raise":
                        raise
                    result = error
                yield result
        yield from self._transcribe_batch(batch, errors, progress)

    def _open(self, item: AudioLike, sample_rate: int | None) -> _Short | _Long | Exception:
        """Read the beginning of a recording, and return the exception if this fails."""
        try:
            parts = chunks(stream_audio(item, sample_rate), self.grid, CHUNK_SECONDS)
            head = list(islice(parts, 2))
        except Exception as error:
            return error
        return _Short(head[0].wav_T) if len(head) == 1 else _Long(head, parts)

    def log_probs(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Return float32 log-probabilities (S, V) on the CPU for 16 kHz waveforms (T,) of any length.

        Raises:
            AudioError: an item is not a finite floating-point tensor (T,).
        """

        def encode(wav_BT: Tensor, n_samples: list[int]) -> tuple[Tensor, Tensor]:
            with autocast(self.dtype, self.device):
                encoded: tuple[Tensor, Tensor] = self.model(wav_BT.to(self.device), n_samples)
            return encoded

        # The scales of int8 activations are computed per batch, so results would depend on the batch.
        one_by_one = self.dtype is torch.int8
        shape = (len(self.phonemes),)
        return encode_all(wavs, encode, self.grid, shape, CHUNK_SECONDS, one_by_one=one_by_one)

    def _transcribe_batch(
        self, recordings: list[tuple[str, Tensor]], errors: str, progress: Progress | None
    ) -> Iterator[Transcript | Exception]:
        """Transcribe short recordings (name, waveform) in one batch, or one by one if the batch fails."""
        if not recordings:
            return
        results = run_batch(recordings, self._transcribe_short, errors)
        if progress is not None:
            progress(sum(len(wav_T) for _, wav_T in recordings) / SAMPLE_RATE)
        yield from results

    def _transcribe_short(self, recordings: list[tuple[str, Tensor]]) -> list[Transcript]:
        logps, has_speech = self._speech_log_probs([wav_T for _, wav_T in recordings])
        decoded = self._decode([Segment(0, logp_SV) for logp_SV in logps])
        transcripts = []
        for (name, wav_T), part, speech in zip(recordings, decoded, has_speech, strict=True):
            if not speech:
                peak = float(wav_T.abs().max()) if len(wav_T) else 0.0
                _report_no_speech(name, len(wav_T), self.grid.window, peak)
            words, seconds = self._words(part), len(wav_T) / SAMPLE_RATE
            transcripts.append(Transcript(words, seconds, part.score, name, calibrated=self._is_calibrated))
        return transcripts

    def _transcribe_long(
        self,
        name: str,
        recording: Iterable[Chunk],
        progress: Progress | None,
        on_segment: Callable[[TranscriptSegment], None] | None,
    ) -> Transcript:
        n_samples = 0
        peak = 0.0
        any_speech = False

        def log_probs() -> Iterator[Tensor]:
            nonlocal n_samples, peak, any_speech
            for batch in batched(recording, CHUNKS_PER_BATCH):
                logps, has_speech = self._speech_log_probs([chunk.wav_T for chunk in batch])
                any_speech |= any(has_speech)
                for chunk, logp_SV in zip(batch, logps, strict=True):
                    peak = max(peak, float(chunk.wav_T.abs().max()))
                    yield logp_SV[chunk.keep : chunk.end]
                end = batch[-1].start + len(batch[-1].wav_T)
                if progress is not None:
                    progress((end - n_samples) / SAMPLE_RATE)
                n_samples = end

        max_frames = round(CHUNK_SECONDS * self.grid.rate)
        pause = round(PAUSE_SECONDS * self.grid.rate)
        parts = cut_at_pauses(log_probs(), max_frames, pause, self.phonemes.blank)
        decoded = (result for batch in batched(parts, CHUNKS_PER_BATCH) for result in self._decode(batch))
        words: list[Word] = []
        starts: list[int] = []
        total_score = 0.0
        for part in join_cut_words(decoded, self.phonemes.boundary, self._max_gap):
            total_score += part.score
            segment = TranscriptSegment(self._words(part))
            if segment.words:
                starts.append(len(words))
                words += segment.words
                if on_segment is not None:
                    on_segment(segment)
        if not any_speech:
            _report_no_speech(name, n_samples, self.grid.window, peak)
        return Transcript(
            tuple(words),
            n_samples / SAMPLE_RATE,
            total_score,
            name,
            tuple(starts or [0]),
            self._is_calibrated,
        )

    def _speech_log_probs(self, wavs: list[Tensor]) -> tuple[list[Tensor], list[bool]]:
        """Return log-probabilities with phones suppressed outside speech, and whether there is any speech."""
        prepared = [prepare_speech(wav_T, self.grid, self.vad, self.conditioning) for wav_T in wavs]
        logps = self.log_probs([wav_T for wav_T, _ in prepared])
        gated = [
            suppress_nonspeech(logp_SV, speech_S, self.phonemes)
            for logp_SV, (_, speech_S) in zip(logps, prepared, strict=True)
        ]
        return gated, [bool(speech_S.any()) for _, speech_S in prepared]

    def _decode(self, segments: list[Segment]) -> list[Decoded]:
        """Decode segments into labels that are aligned to the frames of the recording."""
        results = []
        beams = self._search([segment.logp_SV for segment in segments])
        blank, boundary = self.phonemes.blank, self.phonemes.boundary
        for segment, beam in zip(segments, beams, strict=True):
            spans = align_best(segment.logp_SV, beam, blank, boundary, self.fusion)
            offset = segment.start
            spans = [replace(s, start=offset + s.start, end=offset + s.end) for s in spans]
            results.append(Decoded(spans, beam[0].score, beam[0].words))
        return results

    def _words(self, part: Decoded) -> tuple[Word, ...]:
        max_gap = self._max_gap if part.words is None else None  # a word of a lexicon is never divided
        words = words_of(part.spans, self.phonemes, self.grid, self.calibration, max_gap)
        if part.words is None:
            return tuple(words)
        return tuple(replace(word, written=written) for word, written in zip(words, part.words, strict=True))

    def _search(self, logps: list[Tensor]) -> list[list[Hypothesis]]:
        """Return the final beam of each segment, searching segments of similar length together."""
        order = sorted(range(len(logps)), key=lambda i: len(logps[i]))
        beams: dict[int, list[Hypothesis]] = {}
        for rows in batched(order, BEAM_ROWS):
            padded = torch.nn.utils.rnn.pad_sequence([logps[i] for i in rows], batch_first=True)
            found = beam_search(
                padded,
                [len(logps[i]) for i in rows],
                self.beam,
                n_best=self.beam,
                blank=self.phonemes.blank,
                fusion=self.fusion,
            )
            beams.update(zip(rows, found, strict=True))
        return [beams[i] for i in range(len(logps))]


def join_cut_words(decoded: Iterable[Decoded], boundary: int, max_gap: int) -> Iterator[Decoded]:
    """Rejoin words that were cut between two parts of a recording.

    The rest of such a word is moved to the earlier part, unless it has more than `MAX_CUT_WORD` labels or
    starts more than `max_gap` frames after the end of that part's last label. Such a gap is a pause between
    words, where a model often has no boundary. Each part is yielded as soon as the beginning of the next part
    is known. A part without labels (a long pause) ends the preceding word. With a lexicon, parts consist of
    complete words and are not changed.
    """
    waiting: Decoded | None = None
    for part in decoded:
        if part.words is not None:
            yield part
            continue
        if waiting is None:
            waiting = part
            continue
        n_moved = 0
        if (
            waiting.spans
            and part.spans
            and waiting.spans[-1].label != boundary
            and part.spans[0].start - waiting.spans[-1].end <= max_gap
        ):
            labels = [span.label for span in part.spans]
            n_moved = labels.index(boundary) if boundary in labels else len(labels)
            n_moved = 0 if n_moved > MAX_CUT_WORD else n_moved
        joined = waiting.spans + part.spans[:n_moved]
        if n_moved and n_moved == len(part.spans):
            waiting = Decoded(joined, waiting.score + part.score)  # the word may continue in the next part
        else:
            yield Decoded(joined, waiting.score)
            waiting = Decoded(part.spans[n_moved:], part.score)
    if waiting is not None:
        yield waiting


def words_of(
    spans: Iterable[Span],
    phonemes: PhonemeSet,
    grid: FrameGrid,
    calibration: Calibration | None = None,
    max_gap: int | None = None,
) -> Iterator[Word]:
    """Group aligned labels into words at the boundary symbol, and at gaps of more than `max_gap` frames.

    Without a boundary symbol, all labels are one word, because the text has no spaces. As each symbol is
    scored as a word, the confidence is the mean of the confidences of the symbols.
    """
    units = list(group_words(spans, phonemes.boundary, split_symbols=True, max_gap=max_gap))
    confidences = [confidence(features, calibration) for features in word_features(units)]
    if phonemes.boundary >= 0:
        for unit, estimate in zip(units, confidences, strict=True):
            yield _word(unit, phonemes, grid, estimate)
    elif units:
        yield _word(list(chain(*units)), phonemes, grid, sum(confidences) / len(units))


def _word(spans: list[Span], phonemes: PhonemeSet, grid: FrameGrid, estimate: float) -> Word:
    phones = tuple(phonemes.symbols[span.label] for span in spans)
    times = tuple((grid.start(s.start) / SAMPLE_RATE, grid.start(s.end) / SAMPLE_RATE) for s in spans)
    n_frames = sum(s.end - s.start for s in spans)
    score = sum(s.score * (s.end - s.start) for s in spans) / n_frames
    try:
        kana = phones_to_kana(phones) if phonemes.are_phones else "".join(phones)
    except DataError:  # special symbols such as <unk> have no kana
        kana = "".join(phones)
    return Word(kana, phones, times[0][0], times[-1][1], score, times, estimate)


def _report_no_speech(name: str, n_samples: int, window: int, peak: float) -> None:
    """Log a warning if a recording without detected speech is shorter than a frame or not silent."""
    if 0 < n_samples < window:
        seconds = (n_samples / SAMPLE_RATE, window / SAMPLE_RATE)
        log.warning("%s: %.4f s of audio is less than a frame (%.3f s)", name or "the audio", *seconds)
        return
    if peak < SILENCE:
        return
    log.warning(
        "%s: no speech detected in %.1f s of audio with a peak of %.0f dBFS; use "
        "Transcriber(vad=False) or --no-vad to transcribe it anyway",
        name or "the audio",
        n_samples / SAMPLE_RATE,
        20 * math.log10(peak),
    )


def _name(audio: AudioLike) -> str:
    """Return the file name of a source, or an empty string for arrays and streams."""
    return str(audio) if isinstance(audio, str | os.PathLike | AudioSource) else ""
