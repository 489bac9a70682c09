"""Benchmark of transcription: jahubert in several precisions against transformers' HubertForCTC.

    python tools/bench/transcribe.py audio.wav                        # base size, random weights, two threads
    python tools/bench/transcribe.py --model MODEL audio.wav          # another model
    python tools/bench/transcribe.py --model exp/tofugu/systems/pretrained/finetune \\
        --exp exp/tofugu --splits test test_joined                    # PER of each precision

All get the same recording with the same weights, interleaved; reported are medians of the rounds. jahubert
reads the file, detects speech, encodes chunks of 30 s with 4 s of overlap and decodes with a beam of 20;
transformers gets the samples in chunks of 30 s without overlap and decodes greedily, which is less work.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import jahubert
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.targets import TargetStore
from jahubert.train.evaluation.metrics import error_rate

STRETCH = 30 * 16_000  # samples
DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # the last one only on a CPU


def base(folder: Path) -> Path:
    """A bundle of HuBERT base with random weights."""
    torch.manual_seed(0)
    phonemes = jahubert.PhonemeSet.standard()
    ctc = jahubert.HubertForCtc(jahubert.HubertConfig.base(), len(phonemes))
    return jahubert.save_bundle(folder / "base", ctc=ctc, phonemes=phonemes)


def theirs(source: Path, dtype: torch.dtype, device: str) -> Callable[[str], object]:
    """Reading and greedy decoding with transformers."""
    from transformers import HubertForCTC

    model = HubertForCTC.from_pretrained(source, dtype=dtype).eval().to(device)

    @torch.inference_mode()
    def run(audio: str) -> list[list[int]]:
        stretches = jahubert.load_audio(audio).split(STRETCH)
        found = []
        for wav_T in stretches:
            labels = model(wav_T[None].to(device, dtype)).logits[0].argmax(-1).unique_consecutive()
            found.append(labels[labels != 0].tolist())
        return found

    return run


def speed(source: Path, audio: str, rounds: int, device: str) -> None:
    ways: dict[str, Callable[[str], object]] = {}
    for dtype in dtypes(device):
        ways[f"ours, {name(dtype)}"] = jahubert.Transcriber.from_pretrained(
            source, device=device, dtype=dtype
        ).transcribe
    for dtype in DTYPES[:2]:
        ways[f"transformers, {name(dtype)}"] = theirs(source, dtype, device)
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            started = time.perf_counter()
            run(audio)
            if number:  # the first round warms up
                taken[way].append(time.perf_counter() - started)
    seconds = len(jahubert.load_audio(audio)) / 16_000
    print(f"{seconds:.1f} s of audio, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    peer = statistics.median(taken["transformers, float32"])
    for way, times in taken.items():
        took = statistics.median(times)
        rate = f"{seconds / took:7.1f} times real time  {peer / took:5.2f} times transformers in float32"
        print(f"{way:22} {took:8.2f} s  {rate}")


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    return DTYPES if device == "cpu" else DTYPES[:2]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cost(source: Path, exp: Path, splits: list[str], device: str) -> None:
    """PER on splits of an experiment in every precision."""
    manifest, targets = Manifest(exp / "prepare" / "manifest.arrow"), TargetStore(exp / "targets")
    for dtype in dtypes(device):
        asr = jahubert.Transcriber.from_pretrained(source, device=device, vad=False, dtype=dtype)
        for split in splits:
            rows = [int(row) for row in manifest.indices(split=split)]
            started = time.perf_counter()
            heard = asr.transcribe_many(manifest.load(row) for row in rows)
            hypotheses = [[p for p in found.phonemes if p != "|"] for found in heard]
            took = time.perf_counter() - started
            said = [[phone for word in targets.words(row) for phone in word] for row in rows]
            found, seconds = error_rate(said, hypotheses), manifest.n_samples[rows].sum() / 16_000
            print(
                f"{split:12} {name(dtype):8} PER {100 * found.rate:6.2f} %  "
                f"{seconds / took:6.1f} times real time  ({len(rows)} utterances)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("audio", nargs="?", help="a recording of some minutes")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--exp", type=Path, help="an experiment whose splits are to be transcribed")
    parser.add_argument("--splits", nargs="+", default=["test"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.audio:
        with tempfile.TemporaryDirectory() as folder:
            speed(args.model or base(Path(folder)), args.audio, args.rounds, args.device)
    if args.exp:
        cost(args.model, args.exp, args.splits, args.device)


if __name__ == "__main__":
    main()
