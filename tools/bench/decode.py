"""Benchmark of CTC prefix beam search against flashlight-text, with and without an n-gram and a lexicon.

    python tools/bench/decode.py                   # 32 rows of 500 frames, beam 20, 42 symbols, two threads
    python tools/bench/decode.py --frames 1500 --threads 1

The script prints median milliseconds per utterance from runs that alternate between jahubert in batches,
jahubert row by row, and flashlight, which uses one thread. The log-probabilities resemble the output of a
trained model: most frames are blank, the others have confident labels from random sentences, and noise is
added. The symbol n-gram (order 6) and the word n-gram (order 3, with a lexicon of 5,000 words) are trained on
other random sentences. flashlight reads the n-grams from ARPA files through KenLM.

`at least as good` is the fraction of utterances for which the exact score of jahubert's answer (CTC
probability by `ctc_loss`, plus the weighted n-gram and the word bonus, if any) is not lower than that of
flashlight's answer. Both decoders sum over the alignments of a label sequence. Without flashlight
(`pip install flashlight-text kenlm`, Python up to 3.12), only jahubert is timed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peers import importable
from torch import Tensor
from torch.nn import functional as F

from jahubert.inference.ctc import beam_search
from jahubert.inference.fusion import Fusion, Lexicon, LexiconFusion, SymbolFusion
from jahubert.lm.arpa import write_arpa
from jahubert.lm.kneser_ney import train_ngram
from jahubert.lm.ngram import NGram
from jahubert.phonemes import PhonemeSet

SYMBOLS = PhonemeSet.standard()
N_WORDS, N_SENTENCES = 5000, 20_000
LM_WEIGHT, WORD_BONUS = 0.6, 0.5
Answer = tuple[tuple[int, ...], tuple[str, ...]]  # (labels, words)


@dataclass(frozen=True)
class Task:
    """A search task, with jahubert's models and the files from which flashlight reads the same models."""

    name: str
    fusion: Fusion | None
    model: NGram | None
    arpa: Path | None


def random_words(rng: np.random.Generator) -> dict[str, tuple[str, ...]]:
    phones = [symbol for symbol in SYMBOLS.symbols if symbol not in ("<blank>", "|")]
    spellings = {tuple(rng.choice(phones, rng.integers(2, 9)).tolist()) for _ in range(2 * N_WORDS)}
    return {f"w{i}": spelling for i, spelling in enumerate(sorted(spellings)[:N_WORDS])}


def random_sentences(words: dict[str, tuple[str, ...]], n: int, rng: np.random.Generator) -> list[list[str]]:
    names = list(words)
    ranks = np.minimum(rng.zipf(1.3, (n, 12)), len(names)) - 1
    return [[names[rank] for rank in row[: rng.integers(3, 13)]] for row in ranks]


def log_probs(labels: list[list[int]], n_frames: int, seed: int) -> Tensor:
    """Create peaked log-probabilities (B, S, V) for the labels, at most one per four frames."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(len(labels), n_frames, len(SYMBOLS), generator=generator)
    for row, sequence in enumerate(labels):
        chosen = sequence[: n_frames // 4]
        frames = torch.randperm(n_frames // 2, generator=generator)[: len(chosen)].sort().values * 2
        path = torch.full((n_frames,), SYMBOLS.blank)
        path[frames] = torch.tensor(chosen)
        logits[row] += 6 * F.one_hot(path, len(SYMBOLS))
    return logits.log_softmax(-1)


def make_tasks(folder: Path) -> tuple[list[Task], list[list[int]]]:
    """Create the tasks, and the labels of additional random sentences."""
    rng = np.random.default_rng(0)
    words = random_words(rng)
    text = random_sentences(words, N_SENTENCES, rng)
    labels = [SYMBOLS.encode([words[word] for word in sentence]) for sentence in text]
    symbol_model = train_ngram(([SYMBOLS.symbols[label] for label in row] for row in labels), 6)
    word_model = train_ngram(text, 3)
    for name, model in (("symbols", symbol_model), ("words", word_model)):
        write_arpa(model, folder / f"{name}.arpa")
    lexicon = Lexicon(list(words.items()), SYMBOLS)
    tasks = [
        Task("no language model", None, None, None),
        Task(
            "symbol 6-gram",
            SymbolFusion(symbol_model, SYMBOLS, LM_WEIGHT),
            symbol_model,
            folder / "symbols.arpa",
        ),
        Task(
            "lexicon, word 3-gram",
            LexiconFusion(lexicon, word_model, LM_WEIGHT, WORD_BONUS),
            word_model,
            folder / "words.arpa",
        ),
    ]
    (folder / "lexicon.txt").write_text("".join(f"{w} {' '.join(s)}\n" for w, s in words.items()))
    spoken = random_sentences(words, 2000, rng)
    return tasks, [SYMBOLS.encode([words[word] for word in sentence]) for sentence in spoken]


def flashlight(task: Task, folder: Path, beam: int) -> Callable[[Tensor], list[Answer]]:
    """Create a function that runs the search of a task with flashlight-text."""
    from flashlight.lib.text import decoder
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    common = {
        "beam_size": beam,
        "beam_size_token": len(SYMBOLS),
        "beam_threshold": 100.0,
        "lm_weight": LM_WEIGHT,
        "sil_score": 0.0,
        "log_add": True,
        "criterion_type": decoder.CriterionType.CTC,
    }
    blank, boundary = SYMBOLS.blank, SYMBOLS.boundary
    if isinstance(task.fusion, LexiconFusion):
        entries = [line.split() for line in (folder / "lexicon.txt").read_text().splitlines()]
        dictionary = Dictionary()
        for word in ("<unk>", *(entry[0] for entry in entries)):
            dictionary.add_entry(word)
        lm = KenLM(str(task.arpa), dictionary)
        trie = decoder.Trie(len(SYMBOLS), boundary)
        start = lm.start(False)
        for word, *spelling in entries:
            index = dictionary.get_index(word)
            trie.insert([*SYMBOLS.encode([spelling]), boundary], index, lm.score(start, index)[1])
        trie.smear(decoder.SmearingMode.MAX)
        options = decoder.LexiconDecoderOptions(**common, word_score=WORD_BONUS, unk_score=-np.inf)
        search = decoder.LexiconDecoder(
            options, trie, lm, boundary, blank, dictionary.get_index("<unk>"), [], False
        )
    else:
        dictionary = Dictionary()
        for symbol in SYMBOLS.symbols:
            dictionary.add_entry(symbol)
        lm = KenLM(str(task.arpa), dictionary) if task.arpa else decoder.ZeroLM()
        search = decoder.LexiconFreeDecoder(
            decoder.LexiconFreeDecoderOptions(**common), lm, boundary, blank, []
        )

    def decode(logp_BSV: Tensor) -> list[Answer]:
        answers = []
        for logp_SV in logp_BSV:
            padded_SV = logp_SV
            if isinstance(task.fusion, LexiconFusion):  # every word ends with a boundary
                last = torch.full((1, len(SYMBOLS)), -1e4)
                last[0, boundary] = 0.0
                padded_SV = torch.cat([logp_SV, last])
            padded_SV = padded_SV.contiguous()
            best = search.decode(padded_SV.data_ptr(), *padded_SV.shape)[0]
            labels = [label for label, _ in itertools.groupby(best.tokens) if label != blank]
            words = tuple(dictionary.get_entry(w) for w in best.words if w >= 0) if task.arpa else ()
            if isinstance(task.fusion, LexiconFusion):
                labels = SYMBOLS.encode(SYMBOLS.decode(labels))  # removes boundaries at the start and the end
            answers.append((tuple(labels), words))
        return answers

    return decode


def exact_scores(logp_BSV: Tensor, answers: list[Answer], task: Task) -> Tensor:
    """Compute the CTC log-probability of each answer, plus the weighted n-gram score and the word bonus."""
    n_B = torch.tensor([len(labels) for labels, _ in answers])
    target = torch.tensor([label for labels, _ in answers for label in labels], dtype=torch.long)
    frames = torch.full((len(answers),), logp_BSV.shape[1])
    scores = -F.ctc_loss(logp_BSV.double().transpose(0, 1), target, frames, n_B, reduction="none")
    if task.model is None:
        return scores
    for row, (labels, words) in enumerate(answers):
        is_words = isinstance(task.fusion, LexiconFusion)
        tokens = words if is_words else [SYMBOLS.symbols[label] for label in labels]
        bonus = WORD_BONUS * len(tokens) if is_words else 0.0
        scores[row] += LM_WEIGHT * float(task.model.sentence_logp(tokens).sum()) + bonus
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {"rows": 32, "frames": 500, "beam": 20, "repeats": 5, "threads": 2}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", help="device for jahubert; the peer runs on the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with_peer = importable("flashlight.lib.text.decoder")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks, labels = make_tasks(folder)
        print(
            f"{args.rows} rows of {args.frames} frames, beam {args.beam}, {args.threads} threads, "
            f"{args.device}; ms per utterance"
        )
        print(f"{'':<22}{'batched':>9}{'single':>9}{'flashlight':>12}{'speedup':>9}{'at least as good':>18}")
        joined = [list(itertools.chain(*labels[8 * row : 8 * row + 8])) for row in range(args.rows)]
        logp_BSV = log_probs(joined, args.frames, seed=7)
        for task in tasks:
            measure(task, folder, logp_BSV, args, with_peer)


def measure(task: Task, folder: Path, logp_BSV: Tensor, args: argparse.Namespace, with_peer: bool) -> None:
    def batched(x_BSV: Tensor) -> list[Answer]:
        frames = [x_BSV.shape[1]] * len(x_BSV)
        results = beam_search(x_BSV.to(args.device), frames, beam=args.beam, fusion=task.fusion)
        return [(best[0].labels, best[0].words or ()) for best in results]

    def single(x_BSV: Tensor) -> list[Answer]:
        return [batched(x_BSV[row : row + 1])[0] for row in range(len(x_BSV))]

    searches = [batched, single]
    if with_peer:
        searches.append(flashlight(task, folder, args.beam))
    times = []
    for _ in range(args.repeats):
        row = []
        for search in searches:
            started = time.perf_counter()
            search(logp_BSV)
            row.append(1000 * (time.perf_counter() - started) / len(logp_BSV))
        times.append(row)
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    line = f"{task.name:<22}{medians[0]:>9.2f}{medians[1]:>9.2f}"
    if with_peer:
        ratio = statistics.median(row[2] / row[0] for row in times)
        scores, peer_scores = (
            exact_scores(logp_BSV, search(logp_BSV), task) for search in (batched, searches[2])
        )
        share = float((scores >= peer_scores - 1e-4).double().mean())
        line += f"{medians[2]:>12.2f}{ratio:>9.2f}{share:>18.1%}"
    print(line, flush=True)


if __name__ == "__main__":
    main()
