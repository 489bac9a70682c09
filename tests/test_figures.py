"""Figures are whole PNGs, and the matrix of phones and units is put in an order that shows a diagonal."""

from __future__ import annotations

import base64

import numpy as np

from jahubert.train.figures import curves, layer_curves, phone_matrix, phone_order, unit_usage


def size(address: str) -> tuple[int, int]:
    """Width and height that the PNG in a data address says it has."""
    head, _, data = address.partition(",")
    content = base64.b64decode(data)
    assert (
        head == "data:image/png;base64" and content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    )
    width, height = np.frombuffer(content[16:24], ">u4")
    return int(width), int(height)


def test_matrix_is_ordered_by_hand():
    # unit         0   1   2   3   4
    count_PK = np.array([[0, 1, 0, 0, 2], [9, 0, 0, 3, 0], [1, 4, 0, 3, 0]])
    phones_P, units_K = phone_order(count_PK)
    assert phones_P.tolist() == [1, 2, 0]
    assert units_K.tolist() == [0, 3, 1, 4, 2]  # unit 2 never occurs
    planted = np.diag(np.arange(10, 0, -1))[np.random.default_rng(0).permutation(10)]
    phones_P, units_K = phone_order(planted)
    assert np.all(np.diag(planted[phones_P][:, units_K]) == np.arange(10, 0, -1))


def test_figures_are_drawn():
    count_PK = np.random.default_rng(0).integers(0, 9, (42, 100))
    count_PK[:, 7] = 0
    assert size(phone_matrix(count_PK, [f"p{i}" for i in range(42)]))[0] == 990
    assert size(unit_usage(count_PK.sum(0)))[0] == 990
    assert size(unit_usage(np.zeros(4, int)))[0] == 990
    rows = [{"step": i, "loss": 1 / i, "timing": {}} for i in range(1, 4)] + [{"step": 3, "valid_loss": 0.5}]
    assert size(curves(rows))[0] == 352
    layers = {"frames": 900, "mfcc": [{"n_units": 9, "pnmi": 0.4}], "iter1": [{"pnmi": 0.5}, {"pnmi": 0.6}]}
    assert size(layer_curves(layers)) == (550, 330)
