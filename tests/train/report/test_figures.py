"""Tests of the figures in the report."""

from __future__ import annotations

import base64
from xml.etree import ElementTree

import numpy as np

from jahubert.train.data.manifest import Phone
from jahubert.train.report.figures import (
    curves,
    layer_curves,
    phone_matrix,
    phone_order,
    unit_usage,
    utterance,
)
from jahubert.train.report.units import LayerQuality


def png_size(address: str) -> tuple[int, int]:
    """Return the width and height of the PNG in a data URI."""
    head, _, data = address.partition(",")
    content = base64.b64decode(data)
    assert (
        head == "data:image/png;base64" and content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    )
    width, height = np.frombuffer(content[16:24], ">u4")
    return int(width), int(height)


def test_phone_matrix_is_sorted_along_a_diagonal():
    # unit         0   1   2   3   4
    count_PK = np.array([[0, 1, 0, 0, 2], [9, 0, 0, 3, 0], [1, 4, 0, 3, 0]])
    phones_P, units_K = phone_order(count_PK)
    assert phones_P.tolist() == [1, 2, 0]
    assert units_K.tolist() == [0, 3, 1, 4, 2]  # unit 2 never occurs
    planted = np.diag(np.arange(10, 0, -1))[np.random.default_rng(0).permutation(10)]
    phones_P, units_K = phone_order(planted)
    assert np.all(np.diag(planted[phones_P][:, units_K]) == np.arange(10, 0, -1))


def svg_root(address: str) -> ElementTree.Element:
    """Return the root element of the SVG in a data URI."""
    head, _, data = address.partition(",")
    assert head == "data:image/svg+xml;base64"
    root = ElementTree.fromstring(base64.b64decode(data))
    assert root.tag.endswith("svg")
    return root


def points_per_curve(address: str) -> list[int]:
    """Return the number of points of each curve, ignoring axes and grid lines."""
    lines = [path for path in svg_root(address).iter() if path.get("clip-path") and path.get("d")]
    return [path.get("d", "").count("L") + 1 for path in lines if "#b0b0b0" not in path.get("style", "")]


def test_unit_figures_are_valid_images():
    count_PK = np.random.default_rng(0).integers(0, 9, (42, 100))
    count_PK[:, 7] = 0
    assert png_size(phone_matrix(count_PK, [f"p{i}" for i in range(42)]))[0] == 990
    for counts in (count_PK.sum(0), np.zeros(4, int)):
        svg_root(unit_usage(counts))
    layers = LayerQuality(900, {"pnmi": 0.4}, {"iter1": [{"pnmi": x} for x in (0.1, 0.3, 0.2)]})
    assert sorted(points_per_curve(layer_curves(layers))) == [2, 3]
    assert phone_matrix(count_PK, ["p"] * 42) == phone_matrix(count_PK, ["p"] * 42)


def test_curves_show_every_metric_speed_and_waiting():
    timing = {"seconds": 2.0, "steps": 10, "waiting": 0.25}
    rows = [{"step": i, "loss": 1 / i, "timing": timing} for i in range(1, 6)]
    rows += [{"step": 3, "valid_loss": 0.5}, {"step": 5, "valid_loss": 0.4, "valid_per": 1.0}]
    plots = curves({"a": rows})
    assert set(plots) == {"loss", "per", "speed", "waiting"}
    assert points_per_curve(plots["loss"]) == [5, 2]
    assert points_per_curve(plots["speed"]) == [5]


def test_curves_of_several_runs_share_a_figure():
    rows = [{"step": i, "loss": 1 / i} for i in range(1, 6)]
    plots = curves({"a": rows, "b": rows[:3]})
    assert points_per_curve(plots["loss"]) == [5, 3]


def test_width_of_utterance_figure_follows_its_duration():
    rng = np.random.default_rng(0)
    phones = (Phone("a", 0, 3200), Phone("pau", 3200, 20_000))
    short, long = (
        png_size(utterance(0.1 * rng.standard_normal(n).astype(np.float32), phones, np.arange(n // 320)))
        for n in (40_000, 120_000)
    )
    assert 2.5 < long[0] / short[0] < 3.5 and abs(long[1] - short[1]) < 5
    for wav_T in (np.zeros(16_000, np.float32), np.ones(450, np.float32)):
        png_size(utterance(wav_T, (), None))  # digital silence, and audio shorter than a window
