"""Tests of voice activity detection and conditioning with offset, hum, gain and non-speech sounds."""

from __future__ import annotations

import logging
import math
import sys

import pytest
import torch
from fixtures.sounds import SOUNDS, nonspeech, syllables

import jahubert
from jahubert.errors import MissingExtraError
from jahubert.frames import HUBERT
from jahubert.inference.conditioning import SPEECH_LEVEL, _downsample, condition, prepare_speech
from jahubert.inference.transcribe import Transcriber
from jahubert.inference.vad import _periodicity, speech_frames


def hum(wav_T: torch.Tensor, hz: float, level: float) -> torch.Tensor:
    time_T = torch.arange(len(wav_T), dtype=torch.float64) / 16_000
    return wav_T + (10 ** (level / 20) * torch.sin(2 * math.pi * hz * time_T + 1)).float()


DISTORTIONS = {
    "offset 0.3": lambda wav_T: wav_T + 0.3,
    "offset -0.1": lambda wav_T: wav_T - 0.1,
    "hum 50 Hz": lambda wav_T: hum(wav_T, 50, -20),
    "hum 100 Hz": lambda wav_T: hum(wav_T, 100, -20),
    "hum 60.05 Hz": lambda wav_T: hum(wav_T, 60.05, -30),
    "quiet": lambda wav_T: wav_T * 0.01,
    "loud": lambda wav_T: wav_T * 2,
    "quiet, offset and hum": lambda wav_T: hum(wav_T * 0.1 + 0.05, 50, -40),
}
PAUSE = torch.zeros(12_000)


def speech_with_pauses() -> torch.Tensor:
    wav_T = torch.cat([PAUSE, syllables(3.0), PAUSE, PAUSE, syllables(2.0, seed=1), PAUSE])
    return wav_T + 1e-4 * torch.randn(len(wav_T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", DISTORTIONS)
def test_detection_does_not_depend_on_offset_hum_and_gain(name):
    wav_T = speech_with_pauses()
    expected = speech_frames(wav_T, HUBERT)
    assert 0.5 < float(expected.float().mean()) < 0.95
    detected = speech_frames(DISTORTIONS[name](wav_T), HUBERT)
    assert float((detected != expected).float().mean()) < 0.02


@pytest.mark.parametrize("name", DISTORTIONS)
def test_conditioning_removes_offset_and_hum_and_sets_the_level(name):
    wav_T = speech_with_pauses()
    speech_S = speech_frames(wav_T, HUBERT)
    expected = condition(wav_T, speech_S, HUBERT)
    conditioned = condition(DISTORTIONS[name](wav_T), speech_S, HUBERT)
    assert float((conditioned - expected).std() / expected.std()) < 0.02
    level = 10 * math.log10(float(expected.square().mean()))
    assert level == pytest.approx(SPEECH_LEVEL, abs=6)  # `level` is the average over speech and pauses


def test_conditioning_changes_only_the_level_of_clean_speech():
    wav_T = syllables(2.0)
    wav_T = wav_T - wav_T.mean()
    conditioned = condition(wav_T, speech_frames(wav_T, HUBERT), HUBERT)
    torch.testing.assert_close(conditioned / conditioned.std(), wav_T / wav_T.std(), atol=0.01, rtol=0)
    silence = torch.zeros(16_000)
    assert condition(silence, speech_frames(silence, HUBERT), HUBERT) is silence


@pytest.mark.parametrize("gain", [1e-3, 0.05, 1.0])
@pytest.mark.parametrize("kind", SOUNDS)
def test_sounds_without_speech_are_not_detected(kind, gain):
    assert not speech_frames(gain * nonspeech(kind, 10.0), HUBERT).any()


def test_missing_speech_is_reported_unless_the_audio_is_silent(caplog):
    asr = Transcriber.from_pretrained(device="cpu")
    caplog.set_level(logging.WARNING)
    for seconds in (3.0, 35.0):
        caplog.clear()
        assert asr.transcribe(nonspeech("white noise", seconds)).text == ""
        assert len(caplog.messages) == 1 and "no speech" in caplog.messages[0]
    caplog.clear()
    asr.transcribe(0.1 * torch.ones(320))  # shorter than a frame, so other settings would not help
    assert len(caplog.messages) == 1 and "no speech" not in caplog.messages[0]
    caplog.clear()
    asr.transcribe(torch.zeros(16_000))
    asr.transcribe(syllables(1.0))
    assert not caplog.messages


def test_periodicity_is_the_normalized_autocorrelation_of_the_pitch_band():
    wav_T = syllables(2.0)
    n_frames = int(HUBERT.n_frames(len(wav_T)))
    selected_S = torch.arange(n_frames) % 3 > 0
    padded_T = torch.nn.functional.pad(wav_T.double(), (120, 640))
    frames_SW = padded_T.unfold(0, 640, 320)[:n_frames]
    window_W = torch.hann_window(640, dtype=torch.float64)
    spectrum_SK = torch.fft.rfft((frames_SW - frames_SW.mean(1, keepdim=True)) * window_W, 1024)
    hz = torch.arange(513) * 16_000 / 1024
    autocorrelation_SL = torch.fft.irfft(spectrum_SK.abs().square() * ((hz > 250) & (hz < 3000)), 1024)
    of_window_L = torch.fft.irfft(torch.fft.rfft(window_W, 1024).abs().square(), 1024)
    normalized_SL = autocorrelation_SL / autocorrelation_SL[:, :1] / (of_window_L / of_window_L[0])
    expected_S = normalized_SL[:, round(16_000 / 420) : round(16_000 / 80)].amax(1) * selected_S
    periodicity_S = _periodicity(wav_T, selected_S, HUBERT)
    torch.testing.assert_close(periodicity_S.double(), expected_S, atol=1e-4, rtol=1e-4)
    assert not _periodicity(wav_T, selected_S & False, HUBERT).any()


def test_downsampling_is_a_strided_convolution():
    for n_samples in (128, 400, 5_003):
        wav_T = torch.randn(n_samples, generator=torch.Generator().manual_seed(0))
        taps_W = torch.hann_window(64, periodic=False)
        expected = torch.conv1d(wav_T[None, None], (taps_W / taps_W.sum())[None, None], stride=16)[0, 0]
        torch.testing.assert_close(_downsample(wav_T).float(), expected)


@pytest.mark.parametrize("name", ["offset 0.3", "hum 50 Hz", "hum 100 Hz", "quiet", "loud"])
def test_transcripts_of_real_speech_do_not_change(shared_data, name):
    from jahubert.train.evaluation.metrics import error_rate

    files = sorted((shared_data / "sentences").glob("*.wav"))[:2]
    files += sorted((shared_data / "tofugu" / "lib" / "ogg").glob("*.ogg"))[::500]
    asr = Transcriber.from_pretrained(device="cpu", dtype=torch.float32)
    wavs = [jahubert.load_audio(path) for path in files]
    expected = [list(t.phonemes) for t in asr.transcribe_many(wavs)]
    distorted = [list(t.phonemes) for t in asr.transcribe_many(DISTORTIONS[name](wav_T) for wav_T in wavs)]
    assert error_rate(expected, distorted).rate <= 0.05


@pytest.mark.parametrize("conditioning", [True, False])
def test_without_vad_all_frames_are_selected_and_the_audio_is_the_same(conditioning):
    wav_T = 0.01 * syllables(2.0) + 0.1
    expected_T, speech_S = prepare_speech(wav_T, HUBERT, conditioning=conditioning)
    prepared_T, all_S = prepare_speech(wav_T, HUBERT, vad=False, conditioning=conditioning)
    assert torch.equal(prepared_T, expected_T) and torch.equal(prepared_T, wav_T) == (not conditioning)
    assert all_S.all() and len(all_S) == len(speech_S)


def test_without_vad_audio_without_detected_speech_is_conditioned():
    wav_T = 0.01 * nonspeech("key clicks", 3.0) + 0.1
    unchanged_T, speech_S = prepare_speech(wav_T, HUBERT)
    assert torch.equal(unchanged_T, wav_T) and not speech_S.any()
    conditioned_T, all_S = prepare_speech(wav_T, HUBERT, vad=False)
    assert abs(float(conditioned_T.mean())) < 0.01 and conditioned_T.std() > 10 * wav_T.std() and all_S.all()


def test_silero_keeps_only_the_speech_that_it_detects(shared_data):
    pytest.importorskip("silero_vad", reason="needs the extra vad")
    n_threads = torch.get_num_threads()
    wav_T = jahubert.load_audio(sorted((shared_data / "sentences").glob("*.wav"))[0])
    _, builtin_S = prepare_speech(0.01 * wav_T + 0.1, HUBERT)
    conditioned_T, speech_S = prepare_speech(0.01 * wav_T + 0.1, HUBERT, "silero")
    level_S = conditioned_T.unfold(0, 400, 320).square().mean(1)
    assert speech_S[level_S > 0.01 * level_S.max()].float().mean() > 0.95
    assert not (speech_S & ~builtin_S).any() and torch.get_num_threads() == n_threads


def test_missing_silero_names_the_extra(monkeypatch):
    from jahubert.inference import silero

    silero._load.cache_clear()
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    with pytest.raises(MissingExtraError, match=r"\.\[vad\]"):
        Transcriber.from_pretrained(vad="silero")
