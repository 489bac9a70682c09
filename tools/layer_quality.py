"""PNMI and purities of units from every layer of an experiment's models.

    python tools/layer_quality.py exp/demo --iterations 1 2 --clusters 100 500 --frames 100000

The experiment report contains the same measures for 100 units and 20,000 frames. Phone times come from the
corpus or, if the corpus has none, from the forced alignment of `decode.align_splits`.
"""

import argparse
from pathlib import Path

import torch

from jahubert.formats.bundle import load_bundle
from jahubert.train.data.manifest import Manifest
from jahubert.train.evaluation.layer_quality import PhoneFrames
from jahubert.train.report.units import phone_times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exp", type=Path)
    parser.add_argument("--iterations", type=int, nargs="+", default=[1])
    parser.add_argument("--clusters", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    manifest = Manifest(args.exp / "prepare" / "manifest.arrow")
    times, source = phone_times(args.exp, manifest)
    if not times:
        parser.error(f"{args.exp}: no phone times in the manifest or from decode.align_splits")
    frames = PhoneFrames(manifest, times, args.frames, args.seed)
    print(f"{len(frames)} frames of {len(frames.frames_of_row)} utterances, phone times: {source}")
    print(f"{'model':>9}{'layer':>7}{'K':>6}{'PNMI':>8}{'phone purity':>14}{'cluster purity':>16}")
    for iteration in (0, *args.iterations):
        if iteration:
            model = load_bundle(args.exp / f"iter{iteration}" / "pretrain").model
            layers = frames.layers(model, torch.device("cpu"))
        else:
            layers = frames.mfcc()[None]
        for layer, frame_ND in enumerate(layers, start=1):
            for n_clusters in args.clusters:
                quality = frames.quality(frame_ND, n_clusters, args.seed)
                name = f"{f'iter{iteration}':>9}{layer:>7}" if iteration else f"{'mfcc':>9}{'':>7}"
                print(
                    f"{name}{quality['n_units']:>6}{quality['pnmi']:>8.3f}"
                    f"{quality['phone_purity']:>14.3f}{quality['cluster_purity']:>16.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
