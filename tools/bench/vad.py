"""Benchmark of voice activity detection: speed, and robustness of transcripts to offset, hum and gain.

    python tools/bench/vad.py /path/to/sentences /path/to/words

The script transcribes `--files` evenly spaced recordings from each folder with the built-in model (or
`--model`), with and without distortions. For each distortion, it prints the phoneme error rate against the
transcripts without distortion, the number of empty transcripts, and the lowest fraction of the loud frames of
a recording that are detected as speech. It also prints the fraction of frames that are detected as speech in
generated sounds, and the speed on one thread as a multiple of real time.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import jahubert
from jahubert.frames import SAMPLE_RATE
from jahubert.inference.conditioning import condition, prepare_speech
from jahubert.inference.vad import speech_frames
from jahubert.train.evaluation.metrics import error_rate

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from fixtures.sounds import SOUNDS, nonspeech

SUFFIXES = (".wav", ".ogg", ".mp3", ".flac")


def distortions(wav_T: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each distortion with a distorted copy of a waveform."""
    time_T = torch.arange(len(wav_T), dtype=torch.float64) / SAMPLE_RATE
    for offset in (0.03, 0.1, 0.3):
        yield f"DC offset {offset}", wav_T + offset
    for hz in (50, 100):
        hum_T = torch.sin(2 * math.pi * hz * time_T).float()
        for level in (-40, -30, -20):
            yield f"hum {hz} Hz, {level} dB", wav_T + 10 ** (level / 20) * hum_T
    for gain in (-40, -20, -10, 6):
        yield f"gain {gain} dB", wav_T * 10 ** (gain / 20)


def phones(transcript: jahubert.Transcript) -> list[str]:
    return [phone for phone in transcript.phonemes if phone != "|"]


def detected(asr: jahubert.Transcriber, wav_T: Tensor, original_T: Tensor) -> float:
    """Return the fraction of loud frames (within 20 dB of the loudest) that are detected as speech."""
    _, speech_S = prepare_speech(wav_T, asr.grid, asr.vad)
    level_S = original_T.unfold(0, asr.grid.window, asr.grid.hop).square().mean(1)[: len(speech_S)]
    return float(speech_S[level_S > 0.01 * level_S.max()].float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--files", type=int, default=20, help="recordings per folder")
    parser.add_argument("--model", help="CTC model (default: the built-in model)")
    parser.add_argument("--silero", action="store_true", help="use silero-vad after the built-in detector")
    args = parser.parse_args()
    torch.set_num_threads(1)
    asr = jahubert.Transcriber.from_pretrained(
        args.model, device="cpu", dtype=torch.float32, vad="silero" if args.silero else True, lm=None
    )
    for folder in args.folders:
        files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
        files = files[:: max(1, len(files) // args.files)][: args.files]
        wavs = [jahubert.load_audio(path) for path in files]
        references = [phones(t) for t in asr.transcribe_many(wavs) if isinstance(t, jahubert.Transcript)]
        print(f"{folder}: {len(files)} recordings, {sum(map(len, references))} phonemes")
        distorted: dict[str, list[Tensor]] = {"none": wavs}
        for wav_T in wavs:
            for name, changed_T in distortions(wav_T):
                distorted.setdefault(name, []).append(changed_T)
        for name, changed in distorted.items():
            hypotheses = [
                phones(t) for t in asr.transcribe_many(changed) if isinstance(t, jahubert.Transcript)
            ]
            shares = [detected(asr, c, w) for c, w in zip(changed, wavs, strict=True)]
            rate = 100 * error_rate(references, hypotheses).rate
            empty = sum(not hypothesis for hypothesis in hypotheses)
            minimum = 100 * min(shares)
            print(f"  {name:18} PER {rate:5.1f} %   empty {empty:2}   detected {minimum:5.1f} % (least)")
    for kind in SOUNDS:
        _, speech_S = prepare_speech(nonspeech(kind, 10.0), asr.grid, asr.vad)
        share = float(speech_S.float().mean())
        print(f"{kind:28} {100 * share:5.1f} % of the frames detected as speech")
    wav_T = torch.cat(wavs)[: 30 * SAMPLE_RATE]
    started = time.perf_counter()
    for _ in range(5):
        speech_frames(wav_T, asr.grid)
    detection = (time.perf_counter() - started) / 5
    speech_S = speech_frames(wav_T, asr.grid)
    started = time.perf_counter()
    for _ in range(5):
        condition(wav_T, speech_S, asr.grid)
    conditioning = (time.perf_counter() - started) / 5
    started = time.perf_counter()
    for _ in range(5):
        prepare_speech(wav_T, asr.grid, asr.vad)
    both = (time.perf_counter() - started) / 5
    duration = len(wav_T) / SAMPLE_RATE
    print(
        f"cost: detection {duration / detection:.0f}, conditioning {duration / conditioning:.0f}, "
        f"both{' with silero-vad' if args.silero else ''} {duration / both:.0f} x real time"
    )


if __name__ == "__main__":
    main()
