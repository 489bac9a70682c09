"""Benchmark of the CPU time that each effect of the training data augmentation takes on one thread.

    python tools/bench/augmentation.py

The script prints milliseconds of CPU time per second of audio. The utterances are modulated noise in memory.
"""

import argparse
import time

import numpy as np
import torch

from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.augmentation import EFFECTS, AugmentConfig, Augmenter


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="length of an utterance")
    parser.add_argument("--utterances", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    n_samples = int(arguments.seconds * SAMPLE_RATE)
    envelope_T = 0.1 * np.abs(np.sin(np.arange(n_samples) * 12 / SAMPLE_RATE))
    wavs = [
        torch.from_numpy((rng.standard_normal(n_samples) * envelope_T).astype(np.float32))
        for _ in range(arguments.utterances)
    ]

    def read(row: int, start: int, length: int) -> torch.Tensor:
        return wavs[row][start : start + length]

    def cost(**probabilities: float) -> float:
        rows = np.arange(len(wavs))
        augment = Augmenter(AugmentConfig(**probabilities), 0, rows, np.full(len(wavs), n_samples), read)
        started = time.process_time()
        for row in rows.tolist():
            augment(wavs[row], 0, row)
        return 1000 * (time.process_time() - started) / (len(wavs) * arguments.seconds)

    for effect in EFFECTS:
        print(f"{effect:8}{cost(**{f'{effect}_prob': 1.0}):7.3f} ms/s")
    print(f"{'all':8}{cost(**{f'{effect}_prob': 1.0 for effect in EFFECTS}):7.3f} ms/s")


if __name__ == "__main__":
    main()
