"""Benchmark of feature extraction from layers 6 and 12 of HuBERT base against transformers and torchaudio.

    python tools/bench/extract.py                      # six recordings of 10 s, fp32, two threads
    python tools/bench/extract.py --device cuda --precision bf16
    python tools/bench/extract.py --blocks 2 --layers 1 2 --lengths 2 3 --rounds 1     # quick check

All models have the same random weights. Each measurement runs in a separate process, so that the peak memory
(above the memory of the loaded model) belongs to a single model. The processes are interleaved. The outputs
for the longest recording, which has no padding, must agree. transformers computes the hidden states of all
layers, whereas torchaudio, with `num_layers`, and jahubert stop early.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peers import importable
from torch import Tensor, nn

from jahubert.model.hubert import HubertConfig, HubertModel


def build_jahubert(args) -> nn.Module:
    return HubertModel(HubertConfig.base(layers=args.blocks))


def build_transformers(args) -> nn.Module:
    from transformers import HubertConfig as Config
    from transformers import HubertModel as Model

    return Model(Config(num_hidden_layers=args.blocks))


def build_torchaudio(args) -> nn.Module:
    from torchaudio.models import hubert_base

    model = hubert_base()
    model.encoder.transformer.layers = model.encoder.transformer.layers[: args.blocks]
    return model


BUILDERS = {
    "jahubert": build_jahubert,
    "transformers": build_transformers,
    "torchaudio": build_torchaudio,
}


def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load jahubert's weights into a model. torchaudio nests the encoder one level deeper."""
    names = set(model.state_dict())
    renamed = {}
    for name, value in weights.items():
        if name not in names:
            name = name.replace("encoder.", "encoder.transformer.", 1)
            name = name.replace("feature_projection.", "encoder.feature_projection.", 1)
        if name not in names:  # older names of the weight norm parameters
            name = name.replace("parametrizations.weight.original0", "weight_g")
            name = name.replace("parametrizations.weight.original1", "weight_v")
        if name in names:
            renamed[name] = value
    missing = names - set(renamed)
    if missing:
        raise SystemExit(f"no weights for {sorted(missing)[:3]}")
    model.load_state_dict(renamed)


def features(kind: str, model: nn.Module, wav_BT: Tensor, n_samples: list[int], layer: int) -> Tensor:
    if kind == "jahubert":
        return model(wav_BT, n_samples, last_layer=layer).hidden_BSD
    if kind == "transformers":
        return model(wav_BT, output_hidden_states=True).hidden_states[layer]
    return model.extract_features(wav_BT, torch.tensor(n_samples).to(wav_BT.device), num_layers=layer)[0][-1]


def resident(field: str) -> float:
    """Return the current (VmRSS) or peak (VmHWM) memory of this process in MB; only on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def reset_peak(device: torch.device) -> float:
    """Reset the peak memory counter, and return the memory in use in MB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident("VmHWM")


def work(kind: str, layer: int, folder: Path, args) -> None:
    """Measure one model, and print the result as JSON on the last line."""
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision for all models
    device = torch.device(args.device)
    model = BUILDERS[kind](args).eval()
    load(model, torch.load(folder / "weights.pt"))
    model.to(device)
    n_samples = [round(16_000 * seconds) for seconds in sorted(args.lengths, reverse=True)]
    generator = torch.Generator().manual_seed(0)
    wavs = [0.1 * torch.randn(n, generator=generator) for n in n_samples]
    wav_BT = nn.utils.rnn.pad_sequence(wavs, batch_first=True).to(device)
    seconds, base = [], reset_peak(device)
    for _ in range(args.repeats + 1):
        started = time.perf_counter()
        with (
            torch.inference_mode(),
            torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"),
        ):
            out = features(kind, model, wav_BT, n_samples, layer)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    torch.save(out[0].float().cpu(), folder / f"{kind}_{layer}.pt")
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "memory": peak(device) - base}))


def measure(kind: str, layer: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", kind, str(layer), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(layer: int, kinds: list[str], folder: Path, args) -> None:
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for kind in kinds:
            runs[kind].append(measure(kind, layer, folder))
    expected_SD = torch.load(folder / f"jahubert_{layer}.pt")
    for kind in kinds:
        other = torch.load(folder / f"{kind}_{layer}.pt")
        difference = float((expected_SD - other).abs().max() / expected_SD.abs().max())
        seconds, memory = (statistics.median(run[key] for run in runs[kind]) for key in ("seconds", "memory"))
        pairs = zip(runs[kind], runs["jahubert"], strict=True)
        ratio = statistics.median(peer["seconds"] / own["seconds"] for peer, own in pairs)
        print(
            f"{layer:>6}{kind:>14}{1000 * seconds:>10.0f}{ratio:>8.2f}{memory:>10.0f}{difference:>12.1e}",
            flush=True,
        )
        if difference > (1e-3 if args.precision == "fp32" else 0.1):
            raise SystemExit("parity check failed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths", type=float, nargs="+", default=[10.0] * 6, help="length of each recording in seconds"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12])
    parser.add_argument("--blocks", type=int, default=12, help="Transformer blocks; fewer for quick checks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="measurements per process after a warm-up")
    parser.add_argument("--rounds", type=int, default=5, help="processes per model")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, layer, folder = args.worker
        return work(kind, int(layer), Path(folder), args)
    kinds = ["jahubert", *(name for name in ("transformers", "torchaudio") if importable(name))]
    print(f"{args.lengths} s, {args.precision}, {args.device}, {args.threads} threads")
    print(f"{'layer':>6}{'':>14}{'ms':>10}{'ratio':>8}{'MB':>10}{'difference':>12}")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        torch.save(build_jahubert(args).state_dict(), Path(folder) / "weights.pt")
        for layer in args.layers:
            if layer <= args.blocks:
                compare(layer, kinds, Path(folder), args)


if __name__ == "__main__":
    main()
