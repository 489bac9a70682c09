"""MkDocs hooks that add the API reference and pages from outside docs/, and adapt links.

Markdown files outside docs/ (README, recipes, CONTRIBUTING, ...) become pages below about/. Links to files
that are not pages, such as source code, become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import jahubert

REPO = Path(__file__).resolve().parents[1]
OUTSIDE = "about"  # folder for the pages from outside docs/
PATTERNS = ("README.md", "README.ja.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md", "SECURITY.md")
PATTERNS += ("tests/README.md", "recipes/*/*.md")
LINK = re.compile(r"(!?)\[((?:[^\]\\]|\\.)*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
CJK = r"[\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]"
CJK_BREAK = re.compile(f"(?<={CJK})\n *(?={CJK})")
FENCE = re.compile(r"^(```.*?^```)", re.S | re.M)


def on_files(files: Any, config: Any) -> Any:
    """Add the API reference and the pages from outside docs/ to the files of the site."""
    from mkdocs.structure.files import File

    for pattern in PATTERNS:
        for path in sorted(REPO.glob(pattern)):
            name = f"{OUTSIDE}/{path.relative_to(REPO).as_posix()}"
            files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def reference() -> str:
    """Return a page with one mkdocstrings directive per public name."""
    intro = "Generated from docstrings. All names are imported from `jahubert`."
    sections = [f"# API reference\n\n{intro} See [Python and the command line](api.md).\n"]
    for name in jahubert.__all__:
        if name in jahubert._MODULE_OF:
            sections.append(f"::: jahubert.{jahubert._MODULE_OF[name]}.{name}\n")
    return "\n".join(sections)


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Rewrite the relative links (see `redirect`) and join Japanese lines, outside of code blocks.

    Browsers show a line break within Japanese text as a space.
    """
    source = page.file.src_uri
    parts = FENCE.split(markdown)
    return "".join(
        part if part.startswith("```") else CJK_BREAK.sub("", redirect(part, source, files)) for part in parts
    )


def redirect(markdown: str, source: str, files: Any) -> str:
    """Make the relative links in the page `source` refer to pages of the site.

    Links to files that are not pages become plain text. URLs remain unchanged.
    """
    outside = source.startswith(f"{OUTSIDE}/")
    # The folder of the page in the repository.
    folder = posixpath.dirname(source.removeprefix(f"{OUTSIDE}/") if outside else f"docs/{source}")

    def replaced(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        for name in (path, f"{path}/README.md"):
            page = name.removeprefix("docs/") if name.startswith("docs/") else f"{OUTSIDE}/{name}"
            if files.get_file_from_path(page):
                relative = posixpath.relpath(page, posixpath.dirname(source) or ".")
                return f"{image}[{text}]({relative}{anchor or ''})"
        return text

    return LINK.sub(replaced, markdown)
