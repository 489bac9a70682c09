"""Benchmark of the stages features, kmeans and label on corpora of different sizes: time and peak memory.

    python tools/bench/units_scale.py exp/tofugu --hours 2 20  # MFCC, 100 units
    python tools/bench/units_scale.py exp/tofugu --hours 2 20 --layer 3  # HuBERT layer 3, 500 units

The corpora consist of the training utterances of a finished `prepare` stage and, if these are too short, of
random crops of them. Each stage runs in a separate process; set OMP_NUM_THREADS=1 for one thread. The script
prints the wall time, CPU time, peak memory and disk usage of each stage. The CPU time depends least on the
load of the machine.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jahubert.train.data.manifest import Manifest, Utterance, write_manifest

SHORTEST = 8_000  # minimum crop length in samples


def repeated(source: Manifest, hours: float):
    """Yield the training utterances of a corpus, and then random crops of them, `hours` in total."""
    rng, left, number = np.random.default_rng(0), hours * 3600 * 16_000, 0
    rows = source.indices(split="train")
    while left > 0:
        item = source[int(rows[number % len(rows)])]
        spare = max(0, item.n_samples - SHORTEST) if number >= len(rows) else 0
        start = int(rng.integers(spare // 2 + 1))
        n_samples = item.n_samples - start - int(rng.integers(spare // 2 + 1))
        yield Utterance(id=f"{number:07d}", audio=item.audio, start=item.start + start, n_samples=n_samples)
        left -= n_samples
        number += 1


def run_stage(stage: str, out: str, settings: str) -> None:
    """Run a stage, and print its wall time, CPU time, peak memory and disk usage as JSON."""
    from jahubert.train.experiment.config import structure
    from jahubert.train.experiment.registry import STAGES, resolve

    module = resolve(stage, STAGES, "stage")
    config = structure(json.loads(settings), module.Config, stage)
    folder = Path(out)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    module.run(config, folder)
    seconds = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(json.dumps([seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, disk / 1e6]))


def main() -> None:
    if sys.argv[1] == "--stage":
        run_stage(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exp", type=Path)
    parser.add_argument("--hours", type=float, nargs="+", default=[2.0, 20.0])
    parser.add_argument("--layer", type=int, help="layer of the model from iteration 1 (default: MFCC)")
    parser.add_argument("--frames", type=int, default=200_000, help="number of frames sampled for k-means")
    args = parser.parse_args()
    source = Manifest(args.exp / "prepare" / "manifest.arrow")
    model = None if args.layer is None else str(args.exp / "iter1" / "pretrain" / "bundle")
    print(f"{'hours':>6}{'stage':>10}{'seconds':>9}{'CPU s':>8}{'CPU s/h':>9}{'peak MB':>9}{'disk MB':>9}")
    for hours in args.hours:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            write_manifest(path / "manifest.arrow", repeated(source, hours))
            manifest = {"manifest": str(path / "manifest.arrow"), "device": "cpu"}
            features = manifest | {"sample_frames": args.frames}
            if model is not None:
                features |= {"kind": "hubert", "model": model, "layer": args.layer}
            stages = {
                "features": features,
                "kmeans": {
                    "features": str(path / "features"),
                    "n_clusters": 500 if model else 100,
                    "device": "cpu",
                },
                "label": manifest | {"centroids": str(path / "kmeans")} | ({"model": model} if model else {}),
            }
            for stage, settings in stages.items():
                done = subprocess.run(
                    [sys.executable, __file__, "--stage", stage, str(path / stage), json.dumps(settings)],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                seconds, cpu, peak, disk = json.loads(done.stdout.splitlines()[-1])
                times = f"{hours:>6.0f}{stage:>10}{seconds:>9.1f}{cpu:>8.1f}{cpu / hours:>9.2f}"
                print(f"{times}{peak:>9.0f}{disk:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
