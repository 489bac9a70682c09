"""Benchmark of 39-dim MFCCs against fairseq's recipe (torchaudio's Kaldi MFCC and two deltas, per utterance).

    python tools/bench/mfcc.py                     # 600 s of modulated noise, one thread
    python tools/bench/mfcc.py --seconds 1932 --device cuda

The script prints medians of interleaved runs. If torchaudio is not installed, the peer is librosa with
similar features (23 HTK filters, two deltas). The parity check compares the features with a float64
implementation of Kaldi's MFCCs in this file.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from peers import importable
from torch import Tensor

from jahubert.frames import SAMPLE_RATE
from jahubert.train.clustering.features import Mfcc

WINDOW, HOP, FFT, BINS, CEPSTRA = 400, 160, 512, 23, 13


def mel(hz):
    return 1127 * np.log1p(np.asarray(hz, np.float64) / 700)


def reference(wav_T: np.ndarray) -> np.ndarray:
    """Compute Kaldi's MFCCs with first and second deltas, float64 (frames, 39), from samples in [-1, 1]."""
    frames = np.lib.stride_tricks.sliding_window_view(wav_T.astype(np.float64), WINDOW)[::HOP]
    frames = frames - frames.mean(1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / (WINDOW - 1))) ** 0.85
    power = np.abs(np.fft.rfft(frames * window, FFT)) ** 2
    edges = np.linspace(mel(20), mel(SAMPLE_RATE / 2), BINS + 2)
    at = mel(np.arange(FFT // 2) * SAMPLE_RATE / FFT)[:, None]
    rising = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    energy = power[:, :-1] @ np.maximum(0, np.minimum(rising, falling))
    logs = np.log(np.maximum(energy, np.finfo(np.float32).eps))
    order = np.arange(CEPSTRA)
    dct = np.sqrt(2 / BINS) * np.cos(np.pi / BINS * (np.arange(BINS)[:, None] + 0.5) * order)
    dct[:, 0] = np.sqrt(1 / BINS)
    static = logs @ dct * (1 + 11 * np.sin(np.pi * order / 22))
    delta = slope(static)
    return np.concatenate([static, delta, slope(delta)], axis=1)


def slope(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((2, 2), (0, 0)), mode="edge")
    return (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / 10


def peer() -> tuple[str, Callable[[Tensor], Tensor]]:
    """Return the name of the peer, and a function that computes its features for a waveform."""
    if importable("torchaudio"):
        import torchaudio

        def fairseq(wav_T: Tensor) -> Tensor:
            static = torchaudio.compliance.kaldi.mfcc(
                wav_T[None], sample_frequency=SAMPLE_RATE, use_energy=False
            ).T
            delta = torchaudio.functional.compute_deltas(static)
            return torch.cat([static, delta, torchaudio.functional.compute_deltas(delta)]).T.contiguous()

        return "torchaudio, fairseq's recipe", fairseq
    import librosa

    def librosa_mfcc(wav_T: Tensor) -> Tensor:
        sizes = {"n_fft": FFT, "win_length": WINDOW, "hop_length": HOP, "n_mels": BINS, "htk": True}
        static = librosa.feature.mfcc(y=wav_T.numpy(), sr=SAMPLE_RATE, n_mfcc=CEPSTRA, center=False, **sizes)
        delta = librosa.feature.delta(static, width=5, mode="nearest")
        both = [static, delta, librosa.feature.delta(delta, width=5, mode="nearest")]
        return torch.from_numpy(np.concatenate(both)).T.contiguous()

    return "librosa, similar features", librosa_mfcc


def waveforms(seconds: float) -> list[Tensor]:
    """Generate waveforms of 1 to 15 s of noise with a sinusoidal envelope, about `seconds` in total."""
    rng, wavs = np.random.default_rng(0), []
    while seconds > 0:
        n_samples = int(SAMPLE_RATE * min(max(seconds, 1.0), rng.uniform(2, 15)))
        envelope = 0.1 * (1.001 + np.sin(np.arange(n_samples) / 1500))
        wavs.append(torch.from_numpy((envelope * rng.standard_normal(n_samples)).astype(np.float32)))
        seconds -= n_samples / SAMPLE_RATE
    return wavs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    wavs, own_mfcc, (name, peer_mfcc) = waveforms(args.seconds), Mfcc(args.device), peer()
    seconds = sum(map(len, wavs)) / SAMPLE_RATE
    exact = reference(wavs[0].numpy())
    for label, features in (("jahubert", own_mfcc(wavs[:1])[0].cpu()), (name, peer_mfcc(wavs[0]))):
        if (
            features.shape != exact.shape
        ):  # librosa returns fewer frames, because its frames are as long as the FFT
            continue
        error = np.abs(features.numpy() - exact).max()
        print(f"largest difference from Kaldi: {error:.2g}  {label}")
        if label == "jahubert" and not error < 1e-3:
            raise SystemExit("parity check failed")
    times = []
    for _ in range(args.repeats + 1):
        pair = []
        for compute in (
            lambda: [x.cpu() for x in own_mfcc(wavs)],
            lambda: [peer_mfcc(wav_T) for wav_T in wavs],
        ):
            started = time.perf_counter()
            compute()
            pair.append(time.perf_counter() - started)
        times.append(pair)
    own_s, peer_s = (statistics.median(column) for column in zip(*times[1:], strict=True))
    ratio = statistics.median(b / a for a, b in times[1:])
    print(f"{len(wavs)} utterances, {seconds:.0f} s, {args.threads} threads, {args.device}; times real time")
    print(f"jahubert {seconds / own_s:.0f}   {name} {seconds / peer_s:.0f}   speedup {ratio:.2f}")


if __name__ == "__main__":
    main()
