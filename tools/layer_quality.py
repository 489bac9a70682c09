"""Which block's units tell phones apart best: PNMI and purities of each layer of a run's models.

    python tools/layer_quality.py exp/demo --iterations 1 2 --clusters 100 500

Phone times are the corpus's own or, where it has none, those that `decode.align_splits` had made.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from jahubert.checkpoint import load_bundle
from jahubert.frames import HUBERT
from jahubert.train.features import HubertLayer
from jahubert.train.kmeans import assign, fit_kmeans
from jahubert.train.manifest import Manifest
from jahubert.train.metrics import cluster_quality, joint_counts, phone_frames
from jahubert.train.report import phone_times
from jahubert.train.streaming import stream_features


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exp", type=Path)
    parser.add_argument("--iterations", type=int, nargs="+", default=[1])
    parser.add_argument("--clusters", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--every", type=int, default=2, help="take every n-th utterance")
    args = parser.parse_args()
    manifest = Manifest(args.exp / "prepare" / "manifest.arrow")
    times, source = phone_times(args.exp, manifest)
    if not times:
        parser.error(f"{args.exp}: no phone times, neither in the manifest nor from decode.align_splits")
    rows = sorted(times)[:: args.every]
    said = [phone_frames(times[r], HUBERT.n_frames(manifest[r].n_samples), HUBERT) for r in rows]
    flat = [phone for phones in said for phone in phones]
    known = np.array([phone is not None for phone in flat])
    names = sorted({phone for phone in flat if phone is not None})
    phone_N = np.array([names.index(phone) for phone in flat if phone is not None])
    print(f"{len(rows)} utterances, phone times: {source}")
    print(f"{'iteration':>9}{'layer':>7}{'K':>6}{'PNMI':>8}{'phone purity':>14}{'cluster purity':>16}")
    for iteration in args.iterations:
        model = load_bundle(args.exp / f"iter{iteration}" / "pretrain").model
        for layer in range(1, model.config.layers + 1):
            frames = stream_features(manifest, HubertLayer(model, layer), rows, batch_seconds=40.0)
            frame_ND = torch.cat([frame_SD for _, frame_SD in frames])
            for n_clusters in args.clusters:
                fitted = fit_kmeans(frame_ND, n_clusters, n_init=1, max_iter=30, seed=0)
                unit_N = assign(frame_ND, fitted.centroids_KD).numpy()[known]
                got = cluster_quality(joint_counts(phone_N, unit_N, len(names), n_clusters))
                print(
                    f"{iteration:>9}{layer:>7}{n_clusters:>6}{got['pnmi']:>8.3f}"
                    f"{got['phone_purity']:>14.3f}{got['cluster_purity']:>16.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
