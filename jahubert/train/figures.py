"""Figures of a report, each a PNG in a data address: a page of them needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jahubert.errors import MissingExtraError


def curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every metric against the step, training and validation together; `rows` are lines of metrics.jsonl."""
    skip = ("step", "timing")
    names = list(dict.fromkeys(key.removeprefix("valid_") for row in rows for key in row if key not in skip))
    width, height = min(4, len(names)), -(-len(names) // 4)

    def draw(figure: Any) -> None:
        for number, name in enumerate(names):
            axes = figure.add_subplot(height, width, number + 1)
            for key, label in ((name, "training"), (f"valid_{name}", "validation")):
                points = [(row["step"], row[key]) for row in rows if key in row]
                if points:
                    axes.plot(*zip(*points, strict=True), label=label)
            axes.set_title(name)
            axes.set_xlabel("step")
            axes.legend(fontsize="small")

    return _png(draw, 3.2 * width, 2.6 * height)


def phone_order(count_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns in which a matrix of phones and units shows a diagonal.

    Phones (P,), the most frequent first; units (K,) by their most frequent phone, those that say it most
    surely first, and units that never occur at the end.
    """
    phones_P = np.argsort(-count_PK.sum(1), kind="stable")
    sorted_PK = count_PK[phones_P]
    total_K = sorted_PK.sum(0)
    sure_K = sorted_PK.max(0) / np.maximum(1, total_K)
    phone_K = np.where(total_K > 0, sorted_PK.argmax(0), len(phones_P))
    return phones_P, np.lexsort((-sure_K, phone_K))


def phone_matrix(count_PK: np.ndarray, phones: Sequence[str]) -> str:
    """How probable each phone is, given the unit: columns sum to 1 (HuBERT paper, figure 2, transposed)."""
    phones_P, units_K = phone_order(count_PK)
    share_PK = count_PK / np.maximum(1, count_PK.sum(0))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(share_PK[phones_P][:, units_K], aspect="auto", cmap="magma", vmin=0, vmax=1)
        axes.set_yticks(range(len(phones)), [phones[i] for i in phones_P], fontsize=6)
        axes.set_xlabel("units, by their most frequent phone")
        figure.colorbar(image, label="P(phone | unit)")

    return _png(draw, 9.0, 1.5 + 0.11 * len(phones))


def unit_usage(count_K: np.ndarray) -> str:
    """The share of frames of each unit, the most frequent first, beside that of even use."""
    share_K = np.sort(count_K)[::-1] / max(1, int(count_K.sum()))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.bar(np.arange(len(share_K)), 100 * share_K, width=1.0)
        axes.axhline(100 / len(share_K), color="black", linewidth=0.8, linestyle="--", label="even use")
        axes.set_xlabel("units, the most frequent first")
        axes.set_ylabel("% of frames")
        axes.legend(fontsize="small")

    return _png(draw, 9.0, 2.4)


def layer_curves(layers: Mapping[str, Any]) -> str:
    """PNMI of units of every block of each model, beside that of MFCC units on the same frames."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, blocks in layers.items():
            if name == "mfcc":
                axes.axhline(blocks[0]["pnmi"], color="black", linewidth=0.8, linestyle="--", label="MFCC")
            elif name != "frames":
                axes.plot(range(1, len(blocks) + 1), [block["pnmi"] for block in blocks], "o-", label=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel(f"PNMI of {layers['mfcc'][0]['n_units']} units")
        axes.legend(fontsize="small")

    return _png(draw, 5.0, 3.0)


def _png(draw: Callable[[Any], None], width: float, height: float) -> str:
    """What `draw` puts into a figure of so many inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
