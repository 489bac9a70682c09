"""HTML building blocks for the report page: tables, figures, collapsible sections and localized text."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_LANGUAGES = ("en", "ja")
Row = tuple[str, Sequence[str]]  # (CSS class of a table row, its cells as HTML)


class Strings:
    """Localized text of the page in one language, from strings.json."""

    def __init__(self, language: str):
        column = _LANGUAGES.index(language)
        content = Path(__file__).with_name("strings.json").read_text(encoding="utf-8")
        self.language = language
        self._texts: dict[str, str] = {key: texts[column] for key, texts in json.loads(content).items()}

    def __call__(self, key: str, *values: Any, **named: Any) -> str:
        """Return the text for a key, with placeholders filled in."""
        text = self._texts[key]
        return text.format(*values, **named) if values or named else text

    def get(self, key: str, default: str) -> str:
        return self._texts.get(key, default)

    def duration(self, seconds: float) -> str:
        if seconds < 60:
            return self("seconds", f"{seconds:.0f}")
        return self("minutes", f"{seconds / 60:.0f}") if seconds < 7200 else self.hours(seconds / 3600)

    def hours(self, hours: float) -> str:
        return self("hours", f"{hours:,.1f}" if hours < 1000 else f"{hours:,.0f}")


def escape(text: str) -> str:
    return html.escape(text, quote=True)


def table(header: Sequence[str], rows: Iterable[Row], style: str = "stack") -> str:
    """Render a table of HTML cells. With style "stack", the cells of a row are stacked on narrow screens."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    labels = [*header, *[""] * 1000]
    lines = []
    for kind, cells in rows:
        columns = [
            f'<td data-label="{label}">{cell}</td>' for label, cell in zip(labels, cells, strict=False)
        ]
        lines.append(
            f'<tr class="{kind}">{"".join(columns)}</tr>' if kind else f"<tr>{''.join(columns)}</tr>"
        )
    thead = f"<thead><tr>{head}</tr></thead>" if header else ""
    return f'<div class="scroll"><table class="{style}">{thead}<tbody>{"".join(lines)}</tbody></table></div>'


def details(summary: str, body: str, note: str = "") -> str:
    """Render a collapsible section, or return an empty string if the body is empty."""
    small = f" <small>{note}</small>" if note else ""
    return f"<details><summary>{summary}{small}</summary>{body}</details>" if body else ""


def definitions(items: Mapping[str, str]) -> str:
    """Render a definition list of terms and values, both given as HTML."""
    rows = "".join(f"<dt>{term}</dt><dd>{value}</dd>" for term, value in items.items())
    return f"<dl>{rows}</dl>"


def figure(uri: str, caption: str, style: str = "plot") -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{image(uri, caption, style)}</figure>"


def image(uri: str, alt: str, style: str = "plot") -> str:
    """Render an image. In dark mode, colors are inverted with style "plot" but not with style "photo"."""
    return f'<img class="{style}" alt="{escape(alt)}" src="{uri}">'


def note(text: str) -> str:
    return f'<p class="note">{text}</p>'
