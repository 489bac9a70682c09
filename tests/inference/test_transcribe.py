"""Tests of transcription with planted log-probabilities and tiny random models."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile
import torch
from fixtures.sounds import SOUNDS, nonspeech, syllables
from torch.nn import functional as F

import jahubert
from jahubert.errors import AudioError, CheckpointError, ConfigError
from jahubert.formats.bundle import LanguageModel, load_bundle, save_bundle
from jahubert.formats.convert import convert
from jahubert.inference import transcribe
from jahubert.inference.chunking import chunks
from jahubert.inference.confidence import Calibration, WordFeatures
from jahubert.inference.transcribe import (
    CHUNK_SECONDS,
    Decoded,
    Transcriber,
    TranscriptSegment,
    join_cut_words,
    words_of,
)
from jahubert.inference.vad import cut_at_pauses, speech_frames
from jahubert.lm.arpa import write_arpa
from jahubert.lm.kneser_ney import train_ngram
from jahubert.model.heads import HubertForCtc
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.phonemes import PhonemeSet

TINY = HubertConfig(
    conv_dims=(8,) * 7, width=16, layers=2, heads=2, ffn=32, pos_conv_kernel=8, pos_conv_groups=2
)
PHONEMES = PhonemeSet.standard()


@pytest.fixture(scope="module")
def ctc() -> HubertForCtc:
    torch.manual_seed(0)
    model = HubertForCtc(TINY, len(PHONEMES))
    torch.nn.init.normal_(model.lm_head.weight, std=1.5)
    return model.eval()


@pytest.fixture(scope="module")
def random_asr(ctc) -> Transcriber:
    # The test audio is noise.
    return Transcriber(ctc, PHONEMES, beam=5, device="cpu", vad=False, conditioning=False)


class Planted(Transcriber):
    """Transcriber that reads labels from the waveform: sample 320 t is 0.01 times the label of frame t."""

    def __init__(self):
        model = HubertForCtc(TINY, len(PHONEMES))
        super().__init__(model, PHONEMES, beam=4, device="cpu", vad=False, conditioning=False)

    def log_probs(self, wavs):
        logps = []
        for wav in wavs:
            labels = (wav[: TINY.grid.n_frames(len(wav)) * 320 : 320] * 100).round().long()
            logps.append((F.one_hot(labels, len(PHONEMES)) * 12.0).log_softmax(-1))
        return logps


def speech(frames: str, repeat: int = 1) -> torch.Tensor:
    """Return a waveform for `Planted` with one symbol per frame, where `-` is the blank."""
    index = {symbol: i for i, symbol in enumerate(PHONEMES.symbols)} | {"-": 0}
    wav = torch.zeros(len(frames.split()) * repeat * 320 + 80)
    wav[:-80:320] = torch.tensor([index[symbol] for symbol in frames.split()] * repeat) * 0.01
    return wav


def assert_same(a: jahubert.Transcript, b: jahubert.Transcript) -> None:
    assert [w.phonemes for w in a.words] == [w.phonemes for w in b.words]
    assert [w.times for w in a.words] == [w.times for w in b.words]
    assert a.score == pytest.approx(b.score, abs=1e-2, rel=1e-4) and a.duration == b.duration


def test_words_have_kana_and_times():
    transcript = Planted().transcribe(speech("- a a - s a - | - - w - a - a - -"))
    assert transcript.text == "アサ ワア"
    assert transcript.phonemes == ("a", "s", "a", "|", "w", "a", "a")
    assert [word.kana for word in transcript.words] == ["アサ", "ワア"]
    assert [(word.start, word.end) for word in transcript.words] == [(0.02, 0.12), (0.2, 0.3)]
    assert transcript.words[0].times == ((0.02, 0.06), (0.08, 0.1), (0.1, 0.12))
    assert transcript.duration == pytest.approx(17 * 0.02 + 0.005)
    assert -0.1 < transcript.score < 0 and -0.01 < transcript.words[0].score < 0


def test_redundant_boundaries_make_no_words():
    transcript = Planted().transcribe(speech("| - a | - | i - |"))
    assert [word.phonemes for word in transcript.words] == [("a",), ("i",)]


def test_silence_and_too_short_audio_give_no_words():
    for wav in (torch.zeros(16_000), torch.zeros(100)):
        transcript = Planted().transcribe(wav)
        assert transcript.words == () and transcript.text == "" and transcript.phonemes == ()
        assert transcript.duration == len(wav) / 16_000


def test_long_recordings_keep_words_and_times():
    sentence = "- k o - N n i - ch i w a | " + "s - e k a - i - | " + "- " * 40
    n = len(sentence.split())
    transcript = Planted().transcribe(speech(sentence, repeat=60))  # 74 s
    assert len(transcript.words) == 120
    assert [word.kana for word in transcript.words[:2]] == ["コンニチワ", "セカイ"]
    assert {word.kana for word in transcript.words} == {"コンニチワ", "セカイ"}
    starts = [word.start for word in transcript.words[::2]]
    assert starts == pytest.approx([(i * n + 1) * 0.02 for i in range(60)])


def test_segments_are_reported_before_the_transcript():
    sentence = "- k o - N n i - ch i w a | " + "- " * 40
    long = speech(sentence, repeat=80)  # 85 s
    segments: list[TranscriptSegment] = []
    transcripts = Planted().transcribe_many([speech("a -"), long], on_segment=segments.append)
    first = next(transcripts)
    assert not segments and isinstance(first, jahubert.Transcript) and len(first.segments) == 1
    second = next(transcripts)
    assert isinstance(second, jahubert.Transcript) and len(segments) >= 3
    assert tuple(segments) == second.segments
    assert " ".join(segment.text for segment in segments) == second.text
    assert all(0 < segment.end - segment.start <= 30.0 for segment in segments)
    assert Planted().transcribe(torch.zeros(16_000)).segments == ()


def test_word_that_was_cut_belongs_to_the_earlier_segment():
    a, i, boundary = (PHONEMES.symbols.index(symbol) for symbol in ("a", "i", "|"))

    def part(*labels: int, start: int = 0) -> Decoded:
        spans = [jahubert.Span(label, n, n + 1, -0.1) for n, label in enumerate(labels, start)]
        return Decoded(spans, -1.0)

    def joined(*parts):
        return [[span.label for span in result.spans] for result in join_cut_words(parts, boundary, 25)]

    assert joined(part(a, boundary, i), part(a, boundary, i)) == [[a, boundary, i, a], [boundary, i]]
    assert joined(part(a, boundary), part(i)) == [[a, boundary], [i]]
    assert joined(part(a), part(i), part(i, boundary, a)) == [[a, i, i], [boundary, a]]
    assert joined(part(a), part(), part(i)) == [[a], [], [i]]  # a pause ends the word
    assert joined(part(a), part(*[i] * 100), part(i)) == [[a], [i] * 101]
    assert joined(part(a), part(i, start=26), part(a, start=53)) == [[a, i], [a]]  # gaps of 25 and 26 frames
    scores = [result.score for result in join_cut_words([part(a), part(i), part(a)], boundary, 25)]
    assert sum(scores) == -3.0
    assert joined() == []


def test_words_on_both_sides_of_a_pause_are_not_joined():
    """Neither side of the pause at which the recording is cut has a word boundary."""
    words = ["k k k k a a a a"] * 110  # 22 s with the boundaries
    sentence = " | ".join(words) + " -" * 60 + " "
    segments = Planted().transcribe(speech(sentence, repeat=3)).segments
    assert [len(segment.words) for segment in segments] == [110, 110, 110]
    assert {word.kana for segment in segments for word in segment.words} == {"カ"}


def test_long_recordings_are_cut_at_pauses():
    silent = torch.zeros(5000, dtype=torch.bool)
    pauses = [(900, 930), (1350, 1400), (2300, 2340), (2500, 2560), (3600, 3700)]
    for start, end in pauses:
        silent[start:end] = True
    logp = F.one_hot((~silent).long(), 3).float().mul(8).log_softmax(-1)
    whole = list(cut_at_pauses([logp], 1500, 25))
    assert torch.equal(torch.cat([piece.logp_SV for piece in whole]), logp) and len(whole) == 4
    ends = [piece.start + len(piece.logp_SV) for piece in whole]
    assert [piece.start for piece in whole] == [0, *ends[:-1]]
    assert all(0 < len(piece.logp_SV) <= 1500 for piece in whole)
    assert all(any(a <= cut <= b for a, b in pauses) for cut in ends[:-1])
    for bits in (logp.split(1), logp.split(700), logp.split(1501)):
        assert [(piece.start, len(piece.logp_SV)) for piece in cut_at_pauses(bits, 1500, 25)] == [
            (piece.start, len(piece.logp_SV)) for piece in whole
        ]
    assert [len(piece.logp_SV) for piece in cut_at_pauses([logp[:1500]], 1500, 25)] == [1500]
    assert list(cut_at_pauses([logp[:0]], 1500, 25)) == []


@pytest.mark.parametrize("seconds", [0.4, 1.0, 29.99, 30.0, 30.02, 61.3, 200.0])
def test_chunks_keep_every_frame_once(seconds):
    """Each sample is its own index, so the first samples of the kept frames must be 0, 320, 640, etc."""
    grid, n = TINY.grid, round(seconds * 16_000)
    wav = torch.arange(n, dtype=torch.float64)
    for size in (999, 16_000, 10**7):
        kept = []
        for chunk in chunks(wav.split(size), grid, CHUNK_SECONDS):
            assert len(chunk.wav_T) <= 30 * 16_000
            frames = chunk.wav_T[: grid.n_samples(grid.n_frames(len(chunk.wav_T)))].unfold(0, 400, 320)
            kept += frames[chunk.keep : chunk.end, 0].tolist()
        assert kept == [320.0 * frame for frame in range(grid.n_frames(n))]


def test_streaming_equals_one_pass(random_asr, tmp_path):
    """Reading, encoding and decoding in blocks gives the same result as processing the whole recording."""
    generator = torch.Generator().manual_seed(2)
    wav = torch.randn(100 * 16_000, generator=generator) * 0.1
    soundfile.write(tmp_path / "long.wav", wav.numpy(), 16_000, subtype="FLOAT")
    streamed = random_asr.transcribe(tmp_path / "long.wav")
    (logp,) = random_asr.log_probs([wav])  # joins 30 s chunks without streaming
    cut = list(cut_at_pauses([logp], 1500, 25))
    parts = [part.spans for part in join_cut_words(random_asr._decode(cut), PHONEMES.boundary, 25)]
    words = [word for spans in parts for word in words_of(spans, PHONEMES, random_asr.grid)]
    assert streamed.words == tuple(words) and streamed.duration == 100.0
    seconds: list[float] = []
    assert len(list(random_asr.transcribe_many([wav, wav[:16_000]], progress=seconds.append))) == 2
    assert sum(seconds) == pytest.approx(101.0)


@pytest.mark.parametrize("kind", [kind for kind in SOUNDS if kind != "beeps"])  # VAD keeps the first beep
def test_no_words_outside_of_speech(ctc, kind):
    """The random model outputs phones for any sound, but only phones within speech are kept."""
    asr = Transcriber(ctc, PHONEMES, beam=2, device="cpu")
    sound = nonspeech(kind)
    assert asr.transcribe(sound).words == ()
    assert not speech_frames(sound, TINY.grid).any()
    before, after = syllables(3.0), syllables(2.0, seed=1)
    both = torch.cat([before, sound, after])
    found_S = speech_frames(both, TINY.grid)
    start, end = 3 * 50, 11 * 50
    assert found_S[:start].float().mean() > 0.9 and found_S[end:].float().mean() > 0.9
    assert not found_S[start + 65 : end - 65].any()
    words = asr.transcribe(both).words
    assert words and not any(a > 4.3 and b < 9.7 for word in words for a, b in word.times)


def test_real_speech_is_detected(shared_data):
    files = sorted((shared_data / "tofugu" / "lib" / "ogg").glob("*.ogg"))[::100]
    shares = []
    for path in files + sorted((shared_data / "sentences").glob("*.wav")):
        wav = jahubert.load_audio(path)
        level = wav[: len(wav) // 320 * 320].view(-1, 320).square().mean(1).sqrt()
        loud_S = (level > 0.1 * level.max())[: TINY.grid.n_frames(len(wav))]
        shares.append(float(speech_frames(wav, TINY.grid)[: len(loud_S)][loud_S].float().mean()))
    assert len(shares) >= 50 and min(shares) == 1.0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_recording(ctc, tmp_path):
    """The samples of the recordings, 4 and 24 minutes of 44.1 kHz stereo, would need 85 and 508 MB."""
    save_bundle(tmp_path / "ctc", ctc=ctc, phonemes=PHONEMES)
    code = """
import resource, sys, jahubert
asr = jahubert.Transcriber.from_pretrained(sys.argv[1], beam=1, device="cpu")
found = asr.transcribe(sys.argv[2])
print(found.duration, len(found.phonemes), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    minute = np.repeat(syllables(60.0).numpy(), 3)[: 60 * 44_100]
    megabytes = []
    for minutes in (4, 24):
        with soundfile.SoundFile(tmp_path / "a.wav", "w", 44_100, 2) as file:
            for _ in range(minutes):
                file.write(np.stack([minute, minute], axis=1))
        arguments = [sys.executable, "-c", code, str(tmp_path / "ctc"), str(tmp_path / "a.wav")]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=1200)
        duration, phones, used = map(float, done.stdout.split())
        assert duration == 60 * minutes and phones > 10 * minutes, done.stderr
        megabytes.append(used)
    assert megabytes[1] - megabytes[0] < 60, megabytes


def test_results_do_not_depend_on_the_batch(random_asr, tmp_path):
    generator = torch.Generator().manual_seed(1)
    wavs = [torch.randn(n, generator=generator) * 0.1 for n in (16_000, 7_001, 399, 30_000, 560_000)]
    soundfile.write(tmp_path / "a b.flac", wavs[0].numpy(), 16_000)
    sources = [*wavs, tmp_path / "a b.flac", wavs[1].numpy().astype(np.float64)]
    separate = [random_asr.transcribe(source) for source in sources]
    assert len(separate[4].phonemes) > 3
    assert separate[5].audio == str(tmp_path / "a b.flac") and separate[0].audio == ""
    for seconds in (0.0, 2.0, 1000.0):
        together = list(random_asr.transcribe_many(sources, batch_seconds=seconds))
        for one, other in zip(together, separate, strict=True):
            assert_same(one, other)


def test_int8_results_do_not_depend_on_the_batch(ctc):
    """The scale of quantized activations depends on all recordings that are encoded together."""
    asr = Transcriber(ctc, PHONEMES, beam=5, device="cpu", vad=False, conditioning=False, dtype=torch.int8)
    generator = torch.Generator().manual_seed(1)
    wavs = [
        torch.randn(n, generator=generator) * level
        for n, level in ((16_000, 0.1), (9_001, 0.9), (560_000, 0.01))
    ]
    together = asr.log_probs(wavs)
    for wav, logp_SV in zip(wavs, together, strict=True):
        assert logp_SV.equal(asr.log_probs([wav])[0])
    first_chunk = next(chunks([wavs[2]], asr.grid, CHUNK_SECONDS))
    assert together[2][: first_chunk.end].equal(asr.log_probs([first_chunk.wav_T])[0][: first_chunk.end])


def test_arrays_are_resampled(random_asr):
    wav = np.random.default_rng(0).normal(0, 0.1, 8_000).astype(np.float32)
    assert random_asr.transcribe(wav, sample_rate=8_000).duration == pytest.approx(1.0)


def test_errors_are_raised_or_returned(random_asr, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF not really")
    wav = torch.randn(8_000) * 0.1
    sources = [wav, tmp_path / "bad.wav", wav, tmp_path / "missing.wav"]
    results = list(random_asr.transcribe_many(sources, errors="return"))
    assert [type(x) for x in results] == [jahubert.Transcript, AudioError, jahubert.Transcript, AudioError]
    stream = random_asr.transcribe_many(sources)
    assert isinstance(next(stream), jahubert.Transcript)
    with pytest.raises(AudioError, match=r"bad\.wav"):
        next(stream)


@pytest.mark.parametrize(
    ("own", "dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.bfloat16),
        (torch.float64, torch.int8),
    ],
)
def test_models_of_unsupported_dtypes_are_rejected(ctc, own, dtype):
    with pytest.raises(ConfigError, match=str(own)):
        Transcriber(copy.deepcopy(ctc).to(own), PHONEMES, device="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_results_do_not_depend_on_the_default_dtype(ctc, tmp_path, dtype):
    bundle = save_bundle(tmp_path / "b", ctc=ctc, phonemes=PHONEMES)
    wav = torch.randn(40_000, generator=torch.Generator().manual_seed(0)) * 0.1
    asr = Transcriber.from_pretrained(bundle, beam=5, device="cpu", vad=False, dtype=dtype)
    expected, logps = asr.transcribe(wav), asr.log_probs([wav, wav[:399]])
    torch.set_default_dtype(torch.float64)
    try:
        asr = Transcriber.from_pretrained(bundle, beam=5, device="cpu", vad=False, dtype=dtype)
        found, found_logps = asr.transcribe(wav), asr.log_probs([wav, wav[:399]])
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found_logps, logps)  # compares dtypes also
    assert_same(found, expected)


def test_invalid_lists_of_recordings_are_rejected(random_asr):
    wav = torch.randn(8_000) * 0.1
    for single in ("a.wav", wav, (wav, 16_000)):
        with pytest.raises(AudioError, match="list of recordings"):
            random_asr.transcribe_many(single, errors="return")
    with pytest.raises(ConfigError, match="'ignore'"):
        random_asr.transcribe_many([wav], errors="ignore")
    with pytest.raises(AudioError, match="waveform 0"):
        random_asr.log_probs([wav[None]])


def test_recordings_are_opened_ahead_in_order(random_asr, tmp_path, monkeypatch):
    """Results equal those of single files, and the files of an unfinished iteration are closed."""
    monkeypatch.setattr("jahubert.inference.transcribe.PREFETCH", 3)
    paths = []
    for i in range(8):
        path = tmp_path / f"{i}.flac"
        length = 8_000 + 1_000 * (7 * i % 5) if i != 4 else 35 * 16_000
        soundfile.write(path, np.random.default_rng(i).normal(0, 0.1, length), 16_000)
        paths.append(path)
    paths.insert(2, tmp_path / "missing.wav")
    opened, before, n_files = [], set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    stream_audio = transcribe.stream_audio

    def recorded(item, *arguments):
        opened.append(item)
        return stream_audio(item, *arguments)

    monkeypatch.setattr(transcribe, "stream_audio", recorded)
    results = list(random_asr.transcribe_many(paths, batch_seconds=1.0, errors="return"))
    assert sorted(opened) == sorted(paths)
    monkeypatch.setattr(transcribe, "stream_audio", stream_audio)
    for path, result in zip(paths, results, strict=True):
        if path.exists():
            assert_same(result, random_asr.transcribe(path))
        else:
            assert isinstance(result, AudioError)
    stream = random_asr.transcribe_many((path for path in paths), batch_seconds=0.1, errors="return")
    next(stream)
    stream.close()
    assert set(threading.enumerate()) == before
    assert len(os.listdir("/proc/self/fd")) == n_files


def test_failure_in_a_batch_affects_one_recording():
    class FailsOnLength9000(Planted):
        def log_probs(self, wavs):
            if any(len(wav) == 9_000 for wav in wavs):
                raise RuntimeError("out of memory")
            return super().log_probs(wavs)

    wavs = [torch.zeros(8_000), torch.zeros(9_000), torch.zeros(10_000)]
    results = list(FailsOnLength9000().transcribe_many(wavs, errors="return"))
    assert [type(x) for x in results] == [jahubert.Transcript, RuntimeError, jahubert.Transcript]
    with pytest.raises(RuntimeError):
        list(FailsOnLength9000().transcribe_many(wavs))


def test_from_pretrained_opens_ctc_bundles_only(ctc, random_asr, tmp_path):
    save_bundle(tmp_path / "ctc", ctc=ctc, phonemes=PHONEMES)
    save_bundle(tmp_path / "plain", model=HubertModel(TINY))
    wav = torch.randn(20_000) * 0.1
    assert_same(
        Transcriber.from_pretrained(
            tmp_path / "ctc", beam=5, device="cpu", vad=False, conditioning=False
        ).transcribe(wav),
        random_asr.transcribe(wav),
    )
    with pytest.raises(CheckpointError, match="no CTC head"):
        Transcriber.from_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="missing"):
        Transcriber.from_pretrained(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="42 outputs"):
        Transcriber(ctc, PhonemeSet(PHONEMES.symbols[:10]))
    with pytest.raises(ConfigError, match="beam is 0"):
        Transcriber(ctc, PHONEMES, beam=0)


def test_lexicon_writes_kanji(ctc, tmp_path):
    lexicon, text = tmp_path / "words.txt", tmp_path / "words.arpa"
    lexicon.write_text("雨 a m e\n飴 a m e\n朝 a s a\nは w a\n", encoding="utf-8")
    write_arpa(train_ngram([["朝", "は", "飴"], ["朝", "は", "飴"], ["雨"]], 2), text)

    class PlantedWords(Planted):
        def __init__(self, **options):
            model = HubertForCtc(TINY, len(PHONEMES))
            Transcriber.__init__(
                self, model, PHONEMES, beam=8, device="cpu", vad=False, conditioning=False, **options
            )

    wav = speech("- a s a | w a | a m e -")
    with_lexicon = PlantedWords(lexicon=lexicon, lm=text).transcribe(wav)
    assert with_lexicon.text == "朝は飴"
    assert [word.kana for word in with_lexicon.words] == ["アサ", "ワ", "アメ"]
    assert PlantedWords(lexicon=lexicon).transcribe(wav).phonemes == with_lexicon.phonemes
    assert PlantedWords().transcribe(wav).text == "アサ ワ アメ"
    assert pickle.loads(pickle.dumps(Transcriber(ctc, PHONEMES, lexicon=lexicon))).fusion.words


@pytest.fixture(scope="module")
def with_ngram(ctc, tmp_path_factory):
    """Return a bundle with a bigram model that was trained on two sentences."""
    folder = tmp_path_factory.mktemp("ngram")
    write_arpa(train_ngram([["k", "a", "s", "a"], ["a", "|", "a"]], 2), folder / "phones.arpa.gz")
    ngram = LanguageModel(folder / "phones.arpa.gz", weight=0.7, word_bonus=1.5)
    return save_bundle(folder / "bundle", ctc=ctc, phonemes=PHONEMES, language_model=ngram)


def test_ngram_of_the_model_is_used_unless_another_is_given(with_ngram, tmp_path):
    fusion = Transcriber.from_pretrained(with_ngram, device="cpu").fusion
    assert (fusion.lm_weight, fusion.word_bonus) == (0.7, 1.5)
    fusion = Transcriber.from_pretrained(with_ngram, device="cpu", lm_weight=0.2).fusion
    assert (fusion.lm_weight, fusion.word_bonus) == (0.2, 1.5)
    defaults = {"lm_weight": None, "word_bonus": None}
    fusion = Transcriber.from_pretrained(with_ngram, device="cpu", **defaults).fusion
    assert (fusion.lm_weight, fusion.word_bonus) == (0.7, 1.5)
    assert Transcriber.from_pretrained(with_ngram, device="cpu", lm=None).fusion is None
    write_arpa(train_ngram([["a", "|", "k", "a"]], 2), tmp_path / "other.arpa")
    fusion = Transcriber.from_pretrained(with_ngram, device="cpu", lm=tmp_path / "other.arpa").fusion
    assert (fusion.lm_weight, fusion.word_bonus) == (0.5, 0.0)
    (tmp_path / "words.txt").write_text("雨 a m e\n", encoding="utf-8")
    with_lexicon = Transcriber.from_pretrained(with_ngram, device="cpu", lexicon=tmp_path / "words.txt")
    assert with_lexicon.fusion.words == ("雨",)


def test_ngram_changes_the_transcript(ctc, with_ngram):
    fused = Transcriber.from_pretrained(
        with_ngram, device="cpu", vad=False, conditioning=False, lm_weight=30.0
    )
    plain = Transcriber.from_pretrained(with_ngram, device="cpu", vad=False, conditioning=False, lm=None)
    audio = torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    assert fused.transcribe(audio).phonemes != plain.transcribe(audio).phonemes


def test_converted_bundle_keeps_the_ngram(with_ngram, tmp_path):
    convert(with_ngram, tmp_path / "copy", "hf")
    ngram = load_bundle(tmp_path / "copy").language_model
    assert (ngram.weight, ngram.word_bonus) == (0.7, 1.5) and ngram.path.parent == tmp_path / "copy"


@pytest.mark.parametrize("content", [{"weight": "big", "word_bonus": 0}, {"weight": 1.0}, [0.5, 1.0]])
def test_invalid_parameters_of_the_ngram_are_reported(with_ngram, tmp_path, content):
    folder = shutil.copytree(with_ngram, tmp_path / "bundle")
    info = json.loads((folder / "jahubert.json").read_text(encoding="utf-8"))
    info = {key: value for key, value in info.items() if key not in ("files", "checksum")}
    info["language_model"] = content
    (folder / "jahubert.json").write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"jahubert\.json"):
        load_bundle(folder)


def test_missing_ngram_file_is_reported(with_ngram, tmp_path):
    folder = shutil.copytree(with_ngram, tmp_path / "bundle")
    (folder / "language_model.arpa.gz").unlink()
    with pytest.raises(CheckpointError, match=r"language_model\.arpa\.gz"):
        load_bundle(folder)


@pytest.mark.parametrize("option", ["lm_weight", "word_bonus"])
def test_weights_without_a_language_model_are_refused(ctc, option):
    with pytest.raises(ConfigError, match=option):
        Transcriber(ctc, PHONEMES, **{option: 0.5})


CALIBRATION = Calibration(0.5, WordFeatures(mean=1.0, utterance=0.25, posterior=0.1, lm=0.2))


def test_calibration_is_read_from_the_model(ctc, tmp_path):
    info = {"confidence": CALIBRATION.to_json()}
    save_bundle(tmp_path / "bundle", ctc=ctc, phonemes=PHONEMES, info=info)
    options = {"dtype": torch.float32, "vad": False}
    asr = Transcriber.from_pretrained(tmp_path / "bundle", **options)
    assert asr.calibration == CALIBRATION
    transcript = asr.transcribe(syllables(1.0))
    plain = Transcriber(ctc, PHONEMES, **options).transcribe(syllables(1.0))
    assert transcript.calibrated and not plain.calibrated
    assert transcript.phonemes == plain.phonemes and transcript.confidence != plain.confidence
    other = Calibration(0.0, WordFeatures(0.0, 0.0, 0.0, 0.0))
    assert Transcriber.from_pretrained(tmp_path / "bundle", calibration=other).calibration == other
    assert Transcriber.from_pretrained(tmp_path / "bundle", calibration=None).calibration is None


def test_calibration_of_the_model_does_not_hold_for_another_search(with_ngram, tmp_path):
    info = {"confidence": CALIBRATION.to_json()}
    bundle = load_bundle(with_ngram)
    ngram = bundle.language_model
    parts = {"ctc": bundle.ctc, "phonemes": PHONEMES, "info": info}
    save_bundle(tmp_path / "ngram", language_model=ngram, **parts)
    save_bundle(tmp_path / "plain", **parts)
    (tmp_path / "words.txt").write_text("愛\ta i\n", encoding="utf-8")
    lexicon = {"lexicon": tmp_path / "words.txt"}
    own = {
        "lm": tmp_path / "ngram" / ngram.path.name,
        "lm_weight": ngram.weight,
        "word_bonus": ngram.word_bonus,
    }
    for name, options, is_calibrated in (
        ("ngram", {}, True),
        ("ngram", {"lm_weight": None, "word_bonus": None}, True),
        ("ngram", {"lm": None}, False),
        ("ngram", {"lm_weight": ngram.weight + 0.1}, False),
        ("ngram", {"beam": 2}, False),
        ("ngram", lexicon, False),
        ("plain", {}, True),
        ("plain", {"lm": None}, True),
        ("plain", own, False),
        ("plain", lexicon, False),
        ("plain", own | {"calibration": CALIBRATION}, True),
    ):
        asr = Transcriber.from_pretrained(tmp_path / name, **options)
        assert (asr.calibration == CALIBRATION) == is_calibrated, (name, options)
        assert (asr.calibration is None) != is_calibrated
