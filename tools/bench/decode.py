"""Benchmark of the CTC prefix beam search against flashlight (torchaudio) or a dictionary-based search.

    python tools/bench/decode.py                   # 32 rows of 500 frames, beam 20, 42 symbols, two threads
    python tools/bench/decode.py --frames 1500 --threads 1

Prints the median milliseconds per utterance of interleaved runs, on random and on peaky log-probabilities
(mostly blank, like those of a trained model). The ratio is the speedup of the batched search over the peer.
The peer always uses one thread; `per thread` is the ratio divided by `--threads`. The script first checks
that short rows give the same labels as the dictionary search. It also prints the share of `--cases` rows in
which jahubert's labels have at least the CTC probability of the peer's, by `ctc_loss`. Flashlight sums the
paths of a sequence (`log_add`), as jahubert does, and uses neither a lexicon nor a language model.
"""

import argparse
import math
import statistics
import time
from collections import defaultdict

import torch
from peers import importable
from torch import Tensor
from torch.nn import functional as F

from jahubert.inference.ctc import beam_search


def log_probs(rows: int, frames: int, symbols: int, peaky: bool, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, frames, symbols, generator=generator)
    if peaky:
        winner = torch.randint(1, symbols, (rows, frames), generator=generator)
        winner[torch.rand(rows, frames, generator=generator) < 0.6] = 0
        logits += 6 * F.one_hot(winner, symbols)
    return logits.log_softmax(-1)


def log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def dictionary_search(logp_SV: Tensor, beam: int) -> tuple[int, ...]:
    """Return the best labels; each prefix stores the log-probabilities of ending in blank and in a label."""
    kept: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    for frame in logp_SV.double().tolist():
        blank: dict[tuple[int, ...], float] = defaultdict(lambda: -math.inf)
        label: dict[tuple[int, ...], float] = defaultdict(lambda: -math.inf)
        for prefix, (in_blank, in_label) in kept.items():
            either = log_add(in_blank, in_label)
            blank[prefix] = log_add(blank[prefix], either + frame[0])
            for symbol in range(1, len(frame)):
                grown, source = (*prefix, symbol), either
                if prefix and symbol == prefix[-1]:  # continued label, or repeated after a blank
                    label[prefix] = log_add(label[prefix], in_label + frame[symbol])
                    source = in_blank
                label[grown] = log_add(label[grown], source + frame[symbol])
        total = {prefix: log_add(blank[prefix], label[prefix]) for prefix in {*blank, *label}}
        best = sorted(total, key=total.__getitem__, reverse=True)[:beam]
        kept = {prefix: (blank[prefix], label[prefix]) for prefix in best}
    return max(kept, key=lambda prefix: log_add(*kept[prefix]))


def flashlight(beam: int, symbols: int):
    """Return torchaudio's decoder as a function; its required silence token gets probability zero."""
    from torchaudio.models.decoder import ctc_decoder

    tokens = ["-", *(f"t{symbol}" for symbol in range(1, symbols)), "|"]
    decoder = ctc_decoder(None, tokens, nbest=1, beam_size=beam, blank_token="-", sil_token="|", log_add=True)

    def search(logp_BSV: Tensor) -> list[tuple[int, ...]]:
        silent = F.pad(logp_BSV, (0, 1), value=-1e4).contiguous()
        return [tuple(v for v in best[0].tokens.tolist() if v < symbols) for best in decoder(silent)]

    return search


def true_scores(logp_BSV: Tensor, answers: list[tuple[int, ...]]) -> Tensor:
    n_B = torch.tensor([len(answer) for answer in answers])
    target = torch.tensor([label for answer in answers for label in answer], dtype=torch.long)
    frames = torch.full((len(answers),), logp_BSV.shape[1])
    return -F.ctc_loss(logp_BSV.double().transpose(0, 1), target, frames, n_B, reduction="none")


def check(symbols: int, beam: int) -> None:
    """Exit with an error unless short rows give the labels of the dictionary search."""
    for seed, peaky in enumerate((False, True)):
        logp_BSV = log_probs(6, 25, symbols, peaky, seed).double()
        labels = [hypotheses[0].labels for hypotheses in beam_search(logp_BSV, [25] * 6, beam=beam)]
        if labels != [dictionary_search(logp_SV, beam) for logp_SV in logp_BSV]:
            raise SystemExit("parity check failed: the labels differ from the dictionary search")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {
        "rows": 32,
        "frames": 500,
        "symbols": 42,
        "beam": 20,
        "repeats": 5,
        "threads": 2,
        "cases": 200,
        "case_frames": 100,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", help="device of jahubert; the peer runs on the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    check(args.symbols, args.beam)
    if importable("torchaudio") and importable("flashlight.lib.text.decoder"):
        name, peer = "flashlight", flashlight(args.beam, args.symbols)
    else:
        name, peer = "dictionaries", lambda x_BSV: [dictionary_search(x_SV, args.beam) for x_SV in x_BSV]

    def batched(x_BSV: Tensor) -> list[tuple[int, ...]]:
        frames = [x_BSV.shape[1]] * len(x_BSV)
        return [
            hypotheses[0].labels for hypotheses in beam_search(x_BSV.to(args.device), frames, beam=args.beam)
        ]

    def single(x_BSV: Tensor) -> list[tuple[int, ...]]:
        return [batched(x_BSV[row : row + 1])[0] for row in range(len(x_BSV))]

    print(
        f"{args.rows} rows of {args.frames} frames, beam {args.beam}, {args.threads} threads, {args.device}; "
        "ms per utterance"
    )
    share = f"at least as probable ({args.cases})"
    print(f"{'log-probs':>10}{'batched':>9}{'single':>9}{name:>14}{'ratio':>8}{'per thread':>12}{share:>30}")
    for peaky in (False, True):
        x_BSV = log_probs(args.rows, args.frames, args.symbols, peaky, seed=7)
        times = []
        for _ in range(args.repeats):
            row = []
            for search in (batched, single, peer):
                started = time.perf_counter()
                search(x_BSV)
                row.append(1000 * (time.perf_counter() - started) / args.rows)
            times.append(row)
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        ratio = statistics.median(row[2] / row[0] for row in times)
        cases_BSV = log_probs(args.cases, args.case_frames, args.symbols, peaky, seed=11)
        scores, peer_scores = (true_scores(cases_BSV, search(cases_BSV)) for search in (batched, peer))
        not_less = float((scores >= peer_scores - 1e-6).double().mean())
        print(
            f"{'peaky' if peaky else 'random':>10}{medians[0]:>9.2f}{medians[1]:>9.2f}{medians[2]:>14.2f}"
            f"{ratio:>8.2f}{ratio / args.threads:>12.2f}{not_less:>30.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
