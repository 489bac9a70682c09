"""PNMI and purities of units from MFCCs and from every layer of pretrained models, on the same frames.

    python tools/layer_quality.py exp/demo --clusters 100 500 --frames 100000

The experiment report contains the same measures for at most 100 units and 20,000 frames. Phone times come
from the corpus or, if the corpus has none, from the forced alignment of `decode.align_splits`.
"""

import argparse
from pathlib import Path

import torch

from jahubert.formats.bundle import load_bundle
from jahubert.train.data.manifest import Manifest
from jahubert.train.evaluation.layer_quality import PhoneFrames
from jahubert.train.experiment.provenance import DONE
from jahubert.train.report.units import phone_times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exp", type=Path, help="folder of the experiment with manifest and phone times")
    parser.add_argument(
        "--models", type=Path, nargs="+", help="folders of models (default: all iterations of the experiment)"
    )
    parser.add_argument("--clusters", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folders = args.models or sorted(path.parent for path in args.exp.glob(f"iter*/pretrain/{DONE}"))
    manifest = Manifest(args.exp / "prepare" / "manifest.arrow")
    times, source = phone_times(args.exp, manifest)
    if not times:
        parser.error(f"{args.exp}: no phone times in the manifest or from decode.align_splits")
    frames = PhoneFrames(manifest, times, args.frames, args.seed)
    print(f"{len(frames)} frames of {len(frames.frames_of_row)} utterances, phone times: {source}")
    width = max(len(str(folder)) for folder in ("MFCC", *folders))
    print(f"{'model':<{width}}{'layer':>7}{'K':>6}{'PNMI':>8}{'phone purity':>14}{'cluster purity':>16}")
    for folder in (None, *folders):
        if folder:
            layers = frames.layers(load_bundle(folder).model, torch.device("cpu"))
        else:
            layers = frames.mfcc()[None]
        for layer, frame_ND in enumerate(layers, start=1):
            for n_clusters in args.clusters:
                quality = frames.quality(frame_ND, n_clusters, args.seed)
                print(
                    f"{folder or 'MFCC'!s:<{width}}{layer if folder else '':>7}{quality['n_units']:>6}"
                    f"{quality['pnmi']:>8.3f}{quality['phone_purity']:>14.3f}"
                    f"{quality['cluster_purity']:>16.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
