"""Tests of the decode stage: agreement with `Transcriber`, batches, and phone times."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fixtures.sounds import nonspeech, syllables

import jahubert
from jahubert.audio import AudioSource
from jahubert.frames import HUBERT
from jahubert.inference.confidence import Calibration, WordFeatures
from jahubert.inference.ctc import Span
from jahubert.train.data.manifest import Utterance, write_manifest
from jahubert.train.stages import decode, targets

TINY = jahubert.HubertConfig(
    conv_dims=(8,) * 7, width=16, layers=2, heads=2, ffn=32, pos_conv_kernel=8, pos_conv_groups=2
)


@pytest.fixture
def recognizer(tmp_path) -> Path:
    torch.manual_seed(0)
    phonemes = jahubert.PhonemeSet.standard()
    ctc = jahubert.HubertForCtc(TINY, len(phonemes))
    torch.nn.init.normal_(ctc.lm_head.weight, std=1.5)
    return jahubert.save_bundle(tmp_path / "model", ctc=ctc, phonemes=phonemes)


def recordings() -> dict[str, torch.Tensor]:
    speech_T = syllables(2.0)
    quiet_T = torch.cat([syllables(1.5, seed=1), torch.zeros(24_000)])
    time_T = torch.arange(len(speech_T)) / 16_000
    return {
        "clean": speech_T,
        "offset": speech_T + 0.2,
        "hum": speech_T + 0.05 * torch.sin(2 * torch.pi * 50 * time_T),
        "quiet": 0.05 * quiet_T + 0.1,
        "clicks": nonspeech("key clicks", 3.0),
        "long": syllables(7.0, seed=2),
    }


@pytest.fixture
def corpus(tmp_path) -> dict[str, Path]:
    """Write a manifest and targets for the recordings."""
    items = []
    for name, wav_T in recordings().items():
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, wav_T.numpy(), 16_000, subtype="FLOAT")
        words = (("a", "s", "a"),)
        items.append(Utterance(name, AudioSource(str(path)), n_samples=len(wav_T), words=words, split="test"))
    (tmp_path / "targets").mkdir()
    write_manifest(tmp_path / "manifest.arrow", items)
    targets.run(targets.Config(tmp_path / "manifest.arrow"), tmp_path / "targets")
    return {"manifest": tmp_path / "manifest.arrow", "targets": tmp_path / "targets"}


@pytest.mark.parametrize(
    ("vad", "conditioning"), [(True, True), (False, True), (True, False), (False, False)]
)
def test_stage_and_transcriber_agree(recognizer, corpus, tmp_path, vad, conditioning):
    """The recordings include some with DC offset, hum and low level, and one without speech."""
    (tmp_path / "out").mkdir()
    options = {"beam": 5, "device": "cpu", "vad": vad, "conditioning": conditioning}
    config = decode.Config(**corpus, model=recognizer, splits=("test",), **options)
    decode.run(config, tmp_path / "out")
    calibration = Calibration(0.1, WordFeatures(mean=0.4, utterance=0.3, posterior=1.0, lm=0.2))
    asr = jahubert.Transcriber.from_pretrained(
        recognizer, dtype=torch.float32, calibration=calibration, **options
    )
    lines = (tmp_path / "out" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(recordings())
    for line in map(json.loads, lines):
        transcript = asr.transcribe(tmp_path / f"{line['id']}.wav")
        assert tuple(line["hypothesis"]) == tuple(" ".join(word.phonemes) for word in transcript.words)
        assert line["score"] == pytest.approx(transcript.score, abs=1e-2)
        estimates = [calibration.confidence(WordFeatures(*values)) for values in line["word_features"]]
        assert [word.confidence for word in transcript.words] == pytest.approx(estimates, abs=1e-3)
        assert bool(transcript.words) == (line["id"] != "clicks" or not vad)


def test_long_recordings_do_not_enlarge_other_batches(recognizer, corpus, tmp_path, monkeypatch):
    shapes = []
    forward = jahubert.HubertForCtc.forward

    def recorded(self, wav_BT, *args):
        shapes.append(tuple(wav_BT.shape))
        return forward(self, wav_BT, *args)

    monkeypatch.setattr(jahubert.HubertForCtc, "forward", recorded)
    (tmp_path / "out").mkdir()
    config = decode.Config(
        **corpus, model=recognizer, splits=("test",), beam=5, device="cpu", batch_seconds=2.5, vad=False
    )
    decode.run(config, tmp_path / "out")
    assert sorted(shapes) == [(1, 32_000)] * 3 + [(1, 48_000)] * 2 + [(1, 112_000)]


def test_frames_belong_to_the_nearest_phone():
    phonemes, rng = jahubert.PhonemeSet.standard(), np.random.default_rng(0)
    for _ in range(20):
        edges = np.sort(rng.choice(200, 12, replace=False)).tolist()
        spans = [
            Span(int(label), start, end, 0.0)
            for label, start, end in zip(rng.integers(1, 6, 6), edges[::2], edges[1::2], strict=True)
        ]
        times = decode.phone_times(spans, 200, phonemes)
        assert not any(a[0] == b[0] == "pau" for a, b in itertools.pairwise(times))
        assert times[0][1] == 0 and [t[1] for t in times[1:]] == [t[2] for t in times[:-1]]
        for frame in range(200):
            distance, nearest = min(
                (max(s.start - frame, frame - s.end + 1, 0), i) for i, s in enumerate(spans)
            )
            (name,) = (n for n, start, end in times if start <= HUBERT.start(frame) < end)
            is_phone = distance <= decode._MAX_DISTANCE and spans[nearest].label != phonemes.boundary
            assert name == (phonemes.symbols[spans[nearest].label] if is_phone else "pau")
