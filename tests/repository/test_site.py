"""Tests of the hooks that adapt pages for the documentation site."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

REPO = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("site_hooks", REPO / "tools" / "site_hooks.py")
assert spec and spec.loader
site_hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site_hooks)


def converted(markdown: str, source: str = "stages.md", pages: tuple[str, ...] = ()) -> str:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=source))
    files = SimpleNamespace(get_file_from_path=lambda path: path in pages)
    return site_hooks.on_page_markdown(markdown, page, files)


def test_japanese_lines_are_joined_without_a_space():
    assert converted("- 音声の\n  認識\n- WER の\n順\n") == "- 音声の認識\n- WER の順\n"
    for unchanged in ("音声は\nlhotse の", "見出し\n\n本文", "```\n音声\n認識\n```\n", "| 列 |\n| 値 |\n"):
        assert converted(unchanged) == unchanged


def test_links_to_files_that_are_not_pages_become_text():
    pages = ("about/recipes/demo/README.md",)
    assert converted("[demo](../recipes/demo) and [code](../jahubert/run.py)", pages=pages) == (
        "[demo](about/recipes/demo/README.md) and code"
    )
