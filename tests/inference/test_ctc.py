"""Tests of CTC decoding against brute force, a reference implementation, CTC loss and planted paths."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
from torch.nn import functional as F

from jahubert.errors import DataError
from jahubert.inference.ctc import Hypothesis, Span, beam_search, forced_align, greedy, group_words


def random_logp(*shape: int, seed: int, sharpness: float = 1.0, dtype=torch.float32) -> torch.Tensor:
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise * sharpness).log_softmax(-1).to(dtype)


def peaky_logp(n_rows: int, n_frames: int, n_symbols: int, seed: int) -> torch.Tensor:
    """Return log-probabilities like a trained model's: mostly blank, with isolated confident labels."""
    generator = torch.Generator().manual_seed(seed)
    winner = torch.randint(1, n_symbols, (n_rows, n_frames), generator=generator)
    winner[torch.rand(n_rows, n_frames, generator=generator) < 0.6] = 0
    logits = torch.randn(n_rows, n_frames, n_symbols, generator=generator)
    return (logits + 6 * F.one_hot(winner, n_symbols)).log_softmax(-1)


def add_log(*values: float) -> float:
    top = max(values)
    return top if top == -math.inf else top + math.log(sum(math.exp(v - top) for v in values))


def ctc_score(logp_SV: torch.Tensor, labels, blank: int = 0) -> float:
    target = torch.tensor([labels], dtype=torch.long)
    n_frames = torch.tensor([len(logp_SV)])
    loss = F.ctc_loss(
        logp_SV.double()[:, None], target, n_frames, torch.tensor([len(labels)]), blank=blank, reduction="sum"
    )
    return -float(loss)


def every_sequence(logp_SV: torch.Tensor, blank: int) -> list[Hypothesis]:
    """Enumerate all paths, and return every label sequence with its log-probability."""
    scores = defaultdict(list)
    n_frames, n_symbols = logp_SV.shape
    values = logp_SV.double().tolist()
    for path in itertools.product(range(n_symbols), repeat=n_frames):
        labels = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != blank)
        scores[labels].append(sum(values[t][v] for t, v in enumerate(path)))
    hypotheses = [Hypothesis(labels, add_log(*parts)) for labels, parts in scores.items()]
    return sorted(hypotheses, key=lambda h: -h.score)


def dictionary_search(logp_SV: torch.Tensor, beam: int) -> list[Hypothesis]:
    """Run a reference prefix beam search, which uses dictionaries and float64."""
    prefixes = {(): (0.0, -math.inf)}
    for frame in logp_SV.double().tolist():
        grown = defaultdict(lambda: [-math.inf, -math.inf])
        for prefix, (ends_blank, ends_label) in prefixes.items():
            both = add_log(ends_blank, ends_label)
            for symbol, logp in enumerate(frame):
                if symbol == 0:
                    grown[prefix][0] = add_log(grown[prefix][0], both + logp)
                elif prefix and symbol == prefix[-1]:
                    grown[prefix][1] = add_log(grown[prefix][1], ends_label + logp)
                    longer = grown[(*prefix, symbol)]
                    longer[1] = add_log(longer[1], ends_blank + logp)
                else:
                    longer = grown[(*prefix, symbol)]
                    longer[1] = add_log(longer[1], both + logp)
        ranked = sorted(grown.items(), key=lambda item: -add_log(*item[1]))
        prefixes = {prefix: tuple(scores) for prefix, scores in ranked[:beam]}
    return sorted((Hypothesis(p, add_log(*s)) for p, s in prefixes.items()), key=lambda h: -h.score)


def assert_same(actual: list[Hypothesis], expected: list[Hypothesis], tolerance: float = 1e-4) -> None:
    assert [h.labels for h in actual] == [h.labels for h in expected]
    assert [h.score for h in actual] == pytest.approx([h.score for h in expected], abs=tolerance)


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("seed", range(4))
def test_wide_beam_finds_every_sequence_in_order(seed, blank):
    logp = random_logp(1, 6, 3, seed=seed, sharpness=1.5, dtype=torch.float64)
    expected = every_sequence(logp[0], blank)
    hypotheses = beam_search(logp, [6], beam=200, n_best=200, blank=blank)[0]
    assert_same(hypotheses, expected, 1e-9)  # all sequences are returned
    assert add_log(*(h.score for h in hypotheses)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("beam", [1, 2, 5, 20])
@pytest.mark.parametrize("kind", ["random", "sharp", "peaky"])
def test_beam_search_equals_dictionary_search(kind, beam):
    n_rows, n_frames, n_symbols = 6, 30, 7  # 216 cases for all kinds and beams together
    for seed in range(3):
        if kind == "peaky":
            logp = peaky_logp(n_rows, n_frames, n_symbols, seed)
        else:
            logp = random_logp(n_rows, n_frames, n_symbols, seed=seed, sharpness=4 if kind == "sharp" else 1)
        hypotheses = beam_search(logp, [n_frames] * n_rows, beam=beam, n_best=min(3, beam))
        for row in range(n_rows):
            assert_same(hypotheses[row], dictionary_search(logp[row], beam)[: min(3, beam)])


def test_score_of_wide_beam_is_the_ctc_probability():
    logp = peaky_logp(3, 14, 8, seed=5)
    for row, (best,) in enumerate(beam_search(logp, [14] * 3, beam=500)):
        assert best.score == pytest.approx(ctc_score(logp[row], best.labels), abs=1e-3)
    for row, (best,) in enumerate(beam_search(logp, [14] * 3, beam=3)):
        assert best.score <= ctc_score(logp[row], best.labels) + 1e-5


def test_scores_keep_precision_on_long_input():
    logp = random_logp(1, 3000, 6, seed=1, sharpness=2)
    single = beam_search(logp, [3000], beam=8)[0][0]
    double = beam_search(logp.double(), [3000], beam=8)[0][0]
    assert single.labels == double.labels
    assert single.score == pytest.approx(double.score, abs=2e-2) and abs(double.score) > 1000


def test_rows_do_not_depend_on_their_batch():
    counts = [17, 40, 0, 33, 1]
    logp = random_logp(len(counts), 40, 9, seed=2, sharpness=2)
    for row, n in enumerate(counts):
        logp[row, n:] = float("nan")  # padding, which must not be read
    for decode in (greedy, lambda x, n: [h for row in beam_search(x, n, beam=6, n_best=4) for h in row]):
        together = decode(logp, torch.tensor(counts))
        separate = [h for row, n in enumerate(counts) for h in decode(logp[row : row + 1, :n], [n])]
        assert_same(together, separate, 1e-5)


def test_empty_input_gives_the_empty_hypothesis():
    assert beam_search(torch.zeros(2, 0, 4), [0, 0]) == [[Hypothesis((), 0.0)]] * 2
    assert greedy(torch.zeros(1, 0, 4), [0]) == [Hypothesis((), 0.0)]
    assert beam_search(torch.zeros(0, 5, 4), []) == [] == greedy(torch.zeros(0, 5, 4), [])


def test_impossible_symbols_never_appear():
    logp = random_logp(1, 12, 6, seed=3)
    logp[:, :, [2, 4]] = -math.inf
    logp[:, 5:8, 1:] = -math.inf
    for hypothesis in beam_search(logp, [12], beam=50, n_best=50)[0]:
        assert math.isfinite(hypothesis.score) and not {2, 4} & set(hypothesis.labels)


def test_greedy_merges_repeats_and_drops_blanks():
    path = [0, 1, 1, 0, 1, 2, 2, 0]
    logp = (F.one_hot(torch.tensor([path]), 4) * 8.0).log_softmax(-1)
    best = greedy(logp, [8])[0]
    assert best.labels == (1, 1, 2)
    assert best.score == pytest.approx(8 * float(logp.max()), abs=1e-5)


def test_nan_is_located():
    logp = random_logp(2, 5, 4, seed=0)
    logp[1, 3] = float("nan")
    with pytest.raises(DataError, match=r"row 1 .* frame 3"):
        beam_search(logp, [5, 5])
    assert len(beam_search(logp, [5, 3])) == 2


@pytest.mark.parametrize("arguments", [{"beam": 0}, {"n_best": 0}, {"beam": 2, "n_best": 3}, {"blank": 4}])
def test_invalid_arguments_are_rejected(arguments):
    with pytest.raises(ValueError):
        beam_search(random_logp(1, 5, 4, seed=0), [5], **arguments)


def test_alignment_finds_a_planted_path():
    path = [0, 0, 3, 3, 3, 0, 3, 1, 1, 2, 0, 0]
    logp = (F.one_hot(torch.tensor(path), 5) * 6.0).log_softmax(-1)
    spans = forced_align(logp, [3, 3, 1, 2])
    assert [(s.label, s.start, s.end) for s in spans] == [(3, 2, 5), (3, 6, 7), (1, 7, 9), (2, 9, 10)]
    assert all(s.score == pytest.approx(float(logp.max()), abs=1e-6) for s in spans)


def test_alignment_finds_a_long_planted_path():
    labels = [1 + i % 3 for i in range(300)]
    path = [symbol for label in labels for symbol in (0, label, label)]
    spans = forced_align((F.one_hot(torch.tensor(path), 4) * 6.0).log_softmax(-1), labels)
    assert [(s.label, s.start, s.end) for s in spans] == [
        (v, 3 * i + 1, 3 * i + 3) for i, v in enumerate(labels)
    ]


@pytest.mark.parametrize("labels", [(1,), (1, 1), (2, 1, 2), (1, 2, 2)])
def test_alignment_is_the_most_probable_path(labels):
    for seed in range(5):
        logp = random_logp(6, 3, seed=seed, sharpness=2, dtype=torch.float64)
        rows = logp.tolist()
        fitting = [
            sum(rows[t][v] for t, v in enumerate(path))
            for path in itertools.product(range(3), repeat=6)
            if tuple(v for v, _ in itertools.groupby(path) if v) == labels
        ]
        spans = forced_align(logp, labels)
        in_label = {t: s.label for s in spans for t in range(s.start, s.end)}
        score = sum(rows[t][in_label.get(t, 0)] for t in range(6))
        assert score == pytest.approx(max(fitting), abs=1e-9)
        assert [s.label for s in spans] == list(labels)


@pytest.mark.parametrize(
    ("labels", "boundary", "split_symbols", "expected"),
    [
        ([2, 3, 1, 4], 1, True, [[2, 3], [4]]),
        ([2, 3, 1, 4], 1, False, [[2, 3], [4]]),
        ([1, 2, 1, 1, 3, 1], 1, True, [[2], [3]]),  # empty words are dropped
        ([2, 1, 3], -1, True, [[2], [1], [3]]),
        ([2, 1, 3], -1, False, [[2, 1, 3]]),
        ([1], 1, True, []),
        ([], -1, True, []),
        ([], -1, False, []),
    ],
)
def test_labels_are_grouped_into_words(labels, boundary, split_symbols, expected):
    spans = [Span(label, frame, frame + 1, -0.5) for frame, label in enumerate(labels)]
    words = list(group_words(spans, boundary, split_symbols=split_symbols))
    assert [[span.label for span in word] for word in words] == expected
    assert [span for word in words for span in word] == [span for span in spans if span.label != boundary]


@pytest.mark.parametrize(("boundary", "expected"), [(1, [[2, 3], [4], [5]]), (-1, [[2, 3, 4, 5]])])
def test_a_pause_ends_a_word(boundary, expected):
    spans = [Span(2, 0, 2, -0.5), Span(3, 5, 6, -0.5), Span(4, 10, 11, -0.5), Span(5, 15, 16, -0.5)]
    words = list(group_words(spans, boundary, split_symbols=False, max_gap=3))
    assert [[span.label for span in word] for word in words] == expected


def test_alignment_needs_enough_frames():
    logp = random_logp(4, 3, seed=0)
    assert [(s.start, s.end) for s in forced_align(logp, [1, 1, 2])] == [(0, 1), (2, 3), (3, 4)]
    with pytest.raises(DataError, match=r"too short .* 4, .* at least 5"):
        forced_align(logp, [1, 1, 2, 1])
    assert forced_align(logp, []) == []


def test_alignment_rejects_invalid_labels():
    logp = random_logp(4, 3, seed=0)
    for labels in ([0], [3], [-1]):
        with pytest.raises(DataError, match="cannot be aligned"):
            forced_align(logp, labels)
    logp[:, 1] = -math.inf
    with pytest.raises(DataError, match="no path"):
        forced_align(logp, [1])
