"""Figures for the report as data URIs, so that the HTML page needs no other files.

Figures contain only numbers, phones and names, and therefore do not depend on the language of the page. The
page contains the captions.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jahubert.errors import MissingExtraError
from jahubert.frames import HUBERT, SAMPLE_RATE
from jahubert.train.data.manifest import Phone
from jahubert.train.report.units import LayerQuality

TRAINING, VALIDATION = "#1f6fb2", "#d1603d"
_RUN_COLORS = (TRAINING, "#c2452d", "#2e8b57", "#8a5cb8", "#b8860b", "#4a4a4a")
_FFT = 512  # FFT length in samples
_INCHES_PER_SECOND = 3.0  # enough for the labels of short phones
_PALETTE = 37  # number of colors for units; consecutive units get distant colors


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Plot each metric against the step, with one color per run and dashed lines for validation.

    Args:
        runs: mapping from run names to the lines of metrics.jsonl. The `timing` of a line is plotted as
            `speed` (updates per second) and `waiting` (fraction of the time spent waiting for data).
    """
    series: dict[str, dict[tuple[str, bool], list[tuple[float, float]]]] = {}
    for run, rows in runs.items():
        for row in rows:
            values = {key: value for key, value in row.items() if key not in ("step", "timing")}
            timing = row.get("timing")
            if timing and timing["seconds"] > 0:
                values |= {"speed": timing["steps"] / timing["seconds"], "waiting": timing["waiting"]}
            for key, value in values.items():
                lines = series.setdefault(key.removeprefix("valid_"), {})
                lines.setdefault((run, key.startswith("valid_")), []).append((row["step"], value))
    colors = run_colors(runs)
    return {name: _curve(lines, colors) for name, lines in series.items()}


def run_colors(runs: Iterable[str]) -> dict[str, str]:
    """Assign a color to each run for its curves."""
    return {run: _RUN_COLORS[number % len(_RUN_COLORS)] for number, run in enumerate(runs)}


def _curve(lines: Mapping[tuple[str, bool], Sequence[tuple[float, float]]], colors: Mapping[str, str]) -> str:
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for (run, is_validation), points in lines.items():
            color = VALIDATION if is_validation and len(colors) == 1 else colors[run]
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                linewidth=1.4,
                linestyle="--" if is_validation else "-",
                marker="o" if len(points) < 30 else None,
                markersize=3,
            )
        _style(axes)

    return _svg(draw, 3.4, 2.1)


def layer_curves(layers: LayerQuality) -> str:
    """Plot the PNMI of units from every layer of each model, and from MFCCs on the same frames."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.axhline(layers.mfcc["pnmi"], color="black", linewidth=0.8, linestyle="--", label="MFCC")
        for model, qualities in layers.models.items():
            line = [quality["pnmi"] for quality in qualities]
            axes.plot(range(1, len(line) + 1), line, marker="o", markersize=4, label=model)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small", frameon=False)
        _style(axes)

    return _svg(draw, 5.0, 2.8)


def reliability(bins: Sequence[tuple[float, float, int]]) -> str:
    """Plot the fraction of correct words against confidence, with larger points for more words.

    Args:
        bins: tuples (mean confidence, fraction of correct words, number of words).
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
        confidences, accuracies, words = zip(*bins, strict=True)
        most = max(words)
        axes.plot(confidences, accuracies, linewidth=1.0)
        axes.scatter(confidences, accuracies, s=[10 + 60 * n / most for n in words])
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        _style(axes)

    return _svg(draw, 2.8, 2.6)


def phone_order(count_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order the rows and columns of a phone-unit matrix so that it becomes nearly diagonal.

    Returns:
        The order of the phones (P,), most frequent first, and the order of the units (K,). Units are sorted
        by their most frequent phone, then by the fraction of their frames with this phone. Units that never
        occur are last.
    """
    phones_P = np.argsort(-count_PK.sum(1), kind="stable")
    sorted_PK = count_PK[phones_P]
    total_K = sorted_PK.sum(0)
    purity_K = sorted_PK.max(0) / np.maximum(1, total_K)
    phone_K = np.where(total_K > 0, sorted_PK.argmax(0), len(phones_P))
    return phones_P, np.lexsort((-purity_K, phone_K))


def phone_matrix(count_PK: np.ndarray, phones: Sequence[str]) -> str:
    """Plot P(phone | unit) as a matrix whose columns sum to 1 (HuBERT paper, figure 2, transposed)."""
    phones_P, units_K = phone_order(count_PK)
    share_PK = count_PK / np.maximum(1, count_PK.sum(0))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        shown = share_PK[phones_P][:, units_K]
        image = axes.imshow(shown, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axes.set_yticks(range(len(phones)), [phones[i] for i in phones_P], fontsize=6)
        axes.tick_params(length=2, labelsize=6)
        figure.colorbar(image, pad=0.01, aspect=40).ax.tick_params(labelsize=6)

    return _png(draw, 9.0, 1.0 + 0.12 * len(phones))


def unit_usage(count_K: np.ndarray) -> str:
    """Plot the percentage of frames with each unit, most frequent first, and a line for uniform usage."""
    share_K = 100 * np.sort(count_K)[::-1] / max(1, int(count_K.sum()))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.fill_between(np.arange(len(share_K) + 1), np.append(share_K, 0), step="post", color=TRAINING)
        axes.axhline(100 / len(share_K), color="black", linewidth=0.8, linestyle="--")
        axes.set_xlim(0, len(share_K))
        _style(axes)

    return _svg(draw, 5.0, 2.1)


def utterance(wav_T: np.ndarray, phones: Sequence[Phone], unit_S: np.ndarray | None) -> str:
    """Plot the waveform, any phones, the spectrogram (kHz), and any units over time (seconds)."""
    seconds = len(wav_T) / SAMPLE_RATE
    heights = [1, 3.2] + ([0.5] if unit_S is not None else [])
    if phones:
        heights.insert(1, 0.5)

    def draw(figure: Any) -> None:
        rows = figure.subplots(
            len(heights), 1, sharex=True, height_ratios=heights, gridspec_kw={"hspace": 0.06}
        )
        spectrogram = rows[2 if phones else 1]
        time_T = np.arange(len(wav_T)) / SAMPLE_RATE
        rows[0].plot(time_T, wav_T, color=TRAINING, linewidth=0.4)
        rows[0].set_yticks([])
        floor = 1e-10  # makes the logarithm of digital silence finite
        noise_T = np.sqrt(floor) * np.random.default_rng(0).standard_normal(max(len(wav_T), 2 * _FFT))
        noise_T[: len(wav_T)] += wav_T
        spectrum = spectrogram.specgram(
            noise_T, NFFT=_FFT, noverlap=_FFT * 3 // 4, Fs=SAMPLE_RATE / 1000, cmap="gray_r",
            xextent=(0, len(noise_T) / SAMPLE_RATE),
        )[0]  # fmt: skip
        level = 10 * np.log10(spectrum.max() + floor)
        spectrogram.images[0].set_clim(level - 70, level)
        spectrogram.set_ylim(0, SAMPLE_RATE / 2000)
        for phone in phones:
            start, end = phone.start / SAMPLE_RATE, phone.end / SAMPLE_RATE
            for axes in rows[1:3]:
                axes.axvline(start, color=VALIDATION, linewidth=0.5)
            if phone.symbol != "pau" and end <= seconds:
                rows[1].text((start + end) / 2, 0.5, phone.symbol, **_LABEL)
        if phones:
            rows[1].set_yticks([])
        if unit_S is not None:
            extent = (0, len(unit_S) * HUBERT.hop / SAMPLE_RATE, 0, 1)
            color_S = unit_S[None].astype(np.int64) * 11 % _PALETTE
            rows[-1].imshow(
                color_S, aspect="auto", cmap="nipy_spectral", extent=extent, interpolation="nearest"
            )
            rows[-1].set_yticks([])
        for axes in rows:
            axes.tick_params(labelsize=7, length=2)
            axes.set_xlim(0, seconds)

    return _png(
        draw, float(np.clip(_INCHES_PER_SECOND * seconds, 4.5, 30)), 2.8 if phones else 2.6, layout=None
    )


_LABEL = {"fontsize": 7, "ha": "center", "va": "center"}


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7, length=3)
    axes.grid(alpha=0.25, linewidth=0.5)


def _png(draw: Callable[[Any], None], width: float, height: float, layout: Any = "constrained") -> str:
    """Render a figure (size in inches) as a PNG data URI, for figures with very many elements."""
    content = _render(draw, (width, height), layout, "png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _svg(draw: Callable[[Any], None], width: float, height: float) -> str:
    """Render a figure (size in inches) as an SVG data URI."""
    content = _render(draw, (width, height), "constrained", "svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content).decode()


def _render(
    draw: Callable[[Any], None], size: tuple[float, float], layout: Any, format: str, **options: Any
) -> bytes:
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train") from error
    # These settings keep text as SVG text and make equal figures byte-identical.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jahubert"}):
        figure = Figure(figsize=size, layout=layout)
        FigureCanvasAgg(figure)
        draw(figure)
        stream = io.BytesIO()
        tight: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.02} if layout is None else {}
        figure.savefig(stream, format=format, **tight, **options)
    return stream.getvalue()
