"""Benchmark of the overlap of reading and computing in `stream_features`, at simulated speeds.

    python tools/bench/labels.py                         # a slow device: 1,000 audio-s/s
    python tools/bench/labels.py --device-rate 1e9       # a fast device: reading alone
    python tools/bench/labels.py --read-delay 0.02       # a slow file system: 20 ms per utterance
    python tools/bench/labels.py --utterances 40         # a quick check

FLAC files with 6 s of synthetic noise each are read and decoded while a simulated GPU computes. This GPU
sleeps 0.12 s for 120 s of audio at 1,000 audio-s/s. The script prints the speed in audio-seconds per second
for reading alone, for computing alone, for both in sequence (calculated from the first two), and for both
overlapped, with threads (the default) and with worker processes. It also prints the overlapped speed relative
to the slower part.
"""

import argparse
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from jahubert.audio import AudioSource
from jahubert.frames import MFCC, SAMPLE_RATE
from jahubert.train.clustering.streaming import stream_features, to_host
from jahubert.train.data.manifest import Manifest, Utterance, write_manifest

SECONDS = 6.0  # length of an utterance


class SleepingFeature:
    """Simulated feature whose computation takes time but no CPU time, as on a GPU."""

    name, dim, grid = "sleep", 1, MFCC

    def __init__(self, rate: float):
        self.rate = rate  # seconds of audio per second

    def __call__(self, wavs: list[Tensor]) -> list[Tensor]:
        time.sleep(sum(map(len, wavs)) / SAMPLE_RATE / self.rate)
        return [torch.zeros(self.grid.n_frames(len(wav_T)), 1) for wav_T in wavs]


class SlowManifest(Manifest):
    """A manifest whose audio is on a simulated slow file system."""

    delay = 0.0

    def load(self, row: int, start: int = 0, n_samples: int | None = None) -> Tensor:
        time.sleep(self.delay)
        return super().load(row, start, n_samples)


def make_corpus(folder: Path, utterances: int) -> Path:
    rng, items = np.random.default_rng(0), []
    for number in range(utterances):
        path, n_samples = folder / f"{number}.flac", int(SECONDS * SAMPLE_RATE)
        soundfile.write(path, 0.05 * rng.standard_normal(n_samples), SAMPLE_RATE)
        items.append(Utterance(id=str(number), audio=AudioSource(str(path)), n_samples=n_samples))
    write_manifest(folder / "manifest.arrow", items)
    return folder / "manifest.arrow"


def rate(manifest: Manifest, device_rate: float, workers: int) -> float:
    """Measure the speed of a pass in seconds of audio per second, excluding the start of the workers."""
    started, after_first = time.perf_counter(), 0.0
    stream = stream_features(manifest, SleepingFeature(device_rate), [range(len(manifest))], 80.0, workers)
    with closing(stream):
        for _ in to_host(stream):
            after_first = after_first or time.perf_counter()
    first_batch = int(80.0 / SECONDS)
    seconds = time.perf_counter() - (after_first if workers else started)
    return (len(manifest) - (first_batch if workers else 0)) * SECONDS / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--utterances", type=int, default=400)
    parser.add_argument("--device-rate", type=float, default=1000.0, help="seconds of audio per second")
    parser.add_argument("--read-delay", type=float, default=0.0, help="delay per utterance in seconds")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="0: threads")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = SlowManifest(make_corpus(Path(folder), args.utterances))
        SlowManifest.delay = args.read_delay
        started = time.perf_counter()
        for row in range(args.utterances):
            manifest.load(row)
        reading = args.utterances * SECONDS / (time.perf_counter() - started)
        sequential = 1 / (1 / reading + 1 / args.device_rate)
        print(f"{'':>22}{'audio-s/s':>12}{'of the slower part':>20}")
        print(f"{'reading, one process':>22}{reading:>12.0f}")
        print(f"{'computing':>22}{args.device_rate:>12.0f}")
        print(f"{'one after the other':>22}{sequential:>12.0f}")
        for workers in args.workers:
            together = rate(manifest, args.device_rate, workers)
            bound = min(args.device_rate, reading * max(1, workers))
            name = f"{workers} workers" if workers else "threads"
            print(f"{name:>22}{together:>12.0f}{together / bound:>20.0%}", flush=True)


if __name__ == "__main__":
    main()
