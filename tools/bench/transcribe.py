"""Benchmark of transcription with jahubert in several precisions against transformers' HubertForCTC.

    python tools/bench/transcribe.py audio.wav                        # base size, random weights, two threads
    python tools/bench/transcribe.py --model MODEL audio.wav          # another model
    python tools/bench/transcribe.py --model exp/tofugu/systems/pretrained/finetune \\
        --exp exp/tofugu --splits test test_joined                    # PER of each precision

All variants transcribe the recording with the same weights in interleaved rounds, and medians are printed.
jahubert reads the file, detects speech, encodes chunks of 30 s with an overlap of 4 s, and decodes with a
beam of 20. transformers encodes chunks of 30 s without overlap and decodes greedily, which is less work. With
`--exp`, jahubert transcribes whole splits in each precision, without detecting speech.
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

CHUNK = 30 * 16_000  # chunk length of transformers in samples
DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # int8 runs on the CPU only


def base(folder: Path) -> Path:
    """Write a bundle with a HuBERT base model that has random weights."""
    torch.manual_seed(0)
    phonemes = jahubert.PhonemeSet.standard()
    ctc = jahubert.HubertForCtc(jahubert.HubertConfig.base(), len(phonemes))
    return jahubert.save_bundle(folder / "base", ctc=ctc, phonemes=phonemes)


def transformers_transcriber(source: Path, dtype: torch.dtype, device: str) -> Callable[[str], object]:
    """Return a function that reads an audio file and decodes it greedily with transformers."""
    from transformers import HubertForCTC

    model = HubertForCTC.from_pretrained(source, dtype=dtype).eval().to(device)

    @torch.inference_mode()
    def run(audio: str) -> list[list[int]]:
        chunks = []
        for wav_T in jahubert.load_audio(audio).split(CHUNK):
            labels = model(wav_T[None].to(device, dtype)).logits[0].argmax(-1).unique_consecutive()
            chunks.append(labels[labels != 0].tolist())
        return chunks

    return run


def speed(source: Path, audio: str, rounds: int, device: str) -> None:
    variants: dict[str, Callable[[str], object]] = {}
    for dtype in dtypes(device):
        asr = jahubert.Transcriber.from_pretrained(source, device=device, dtype=dtype, lm=None)
        variants[f"jahubert, {name(dtype)}"] = asr.transcribe
    if jahubert.load_bundle(source).language_model is not None:
        with_ngram = jahubert.Transcriber.from_pretrained(source, device=device)
        variants[f"jahubert, {name(with_ngram.dtype)}, n-gram"] = with_ngram.transcribe
    for dtype in DTYPES[:2]:
        variants[f"transformers, {name(dtype)}"] = transformers_transcriber(source, dtype, device)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for number in range(rounds + 1):
        for variant, run in variants.items():
            started = time.perf_counter()
            run(audio)
            if number:  # the first round is a warm-up
                times[variant].append(time.perf_counter() - started)
    seconds = len(jahubert.load_audio(audio)) / 16_000
    print(f"{seconds:.1f} s of audio, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    peer = statistics.median(times["transformers, float32"])
    for variant in variants:
        took = statistics.median(times[variant])
        rate = f"{seconds / took:7.1f} times real time  {peer / took:5.2f} times transformers in float32"
        print(f"{variant:26} {took:8.2f} s  {rate}")


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    return DTYPES if device == "cpu" else DTYPES[:2]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cost(source: Path, exp: Path, splits: list[str], device: str) -> None:
    """Print the PER and the speed on splits of an experiment for every precision."""
    manifest, targets = Manifest(exp / "prepare" / "manifest.arrow"), TargetStore(exp / "targets")
    for dtype in dtypes(device):
        asr = jahubert.Transcriber.from_pretrained(
            source, device=device, vad=False, conditioning=False, dtype=dtype, lm=None
        )
        for split in splits:
            rows = [int(row) for row in manifest.indices(split=split)]
            started = time.perf_counter()
            transcripts = asr.transcribe_many(manifest.load(row) for row in rows)
            hypotheses = [[p for p in transcript.phonemes if p != "|"] for transcript in transcripts]
            took = time.perf_counter() - started
            references = [[phone for word in targets.words(row) for phone in word] for row in rows]
            errors, seconds = error_rate(references, hypotheses), manifest.n_samples[rows].sum() / 16_000
            print(
                f"{split:12} {name(dtype):8} PER {100 * errors.rate:6.2f} %  "
                f"{seconds / took:6.1f} times real time  ({len(rows)} utterances)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("audio", nargs="?", help="recording of a few minutes")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--exp", type=Path, help="experiment that contains the splits to transcribe")
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
