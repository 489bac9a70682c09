"""README.md and README.ja.md say the same, and what both say is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
ENGLISH, JAPANESE = "README.md", "README.ja.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def text_of(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    return BLOCK.sub("", text_of(name))


def code(name: str) -> list[tuple[str, list[str]]]:
    """Every block as (language, lines), without comments; of the tree the names."""
    comment = {"": r"(?<=\S)  .*", "sh": r"\s*#.*", "python": r"\s*#.*"}
    return [
        (language, [re.sub(comment[language], "", line).rstrip() for line in content.splitlines()])
        for language, content in BLOCK.findall(text_of(name))
    ]


def tables(name: str) -> list[list[list[str]]]:
    """Tables of rows of cells."""
    found = re.findall(r"(?:^\|.*\n)+", prose(name), re.M)
    return [[row.strip("| ").split(" | ") for row in table.splitlines()] for table in found]


def links(name: str) -> list[str]:
    return sorted({*re.findall(r"\]\(([^)\s]+)\)", prose(name))} - {ENGLISH, JAPANESE})


def headings(name: str) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", prose(name), re.M)]


@pytest.mark.parametrize("part", [code, links, headings])
def test_both_languages_have_the_same(part) -> None:
    assert part(ENGLISH) == part(JAPANESE)


def test_both_languages_have_the_same_numbers_in_tables() -> None:
    def numbers(name: str) -> list[list[list[str]]]:
        return [[sorted(NUMBER.findall(" ".join(row))) for row in table] for table in tables(name)]

    assert numbers(ENGLISH) == numbers(JAPANESE)


def test_each_language_leads_to_the_other() -> None:
    assert f"]({JAPANESE})" in text_of(ENGLISH) and f"]({ENGLISH})" in text_of(JAPANESE)


def test_lines_are_short() -> None:
    assert not [line for line in text_of(ENGLISH).splitlines() if len(line) > 120]


def section(title: str) -> str:
    return text_of(ENGLISH).partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_results_are_those_of_the_recipes() -> None:
    """Every row of the table stands, number by number, in one page that the section links to."""
    pages = [text_of(link) for link in re.findall(r"\]\(([^)\s]+\.md)\)", section("Results"))]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (\d.*) \|$", section("Results"), re.M)
    assert len(rows) >= 6
    for corpus, system, cells in rows:
        numbers = [re.escape(number) for number in re.findall(r"[\d.]+", cells)]
        in_order = re.compile(r"[^\d\n][^\n]*?\b".join(numbers))
        assert any(in_order.search(page) for page in pages), f"{corpus}, {system}"


def test_speed_is_what_was_measured() -> None:
    measured = text_of("docs/performance.md")
    rows = [row.split(" | ")[2:] for row in section("Speed").splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 7
    known = set(NUMBER.findall(measured))
    for row in rows:
        found = set(NUMBER.findall(re.sub(r"fp32|bf16", "", " ".join(row))))
        assert found and found <= known, f"not in docs/performance.md: {found - known}"


def test_the_tree_is_that_of_the_folders() -> None:
    """A line for each file of jahubert/ and jahubert/train/, none for a file that is gone."""
    ((_, lines),) = [block for block in code(ENGLISH) if not block[0]]
    there: dict[str, set[str]] = {}
    folders: list[str] = []
    for line in lines:
        depth, name = (len(line) - len(line.lstrip())) // 2, line.strip()
        folders[depth:] = [name] if name.endswith("/") else []
        if depth:
            there.setdefault("".join(folders[:depth]), set()).add(name)
        else:
            assert (REPO / name).is_dir()
    assert set(there) == {"jahubert/", "jahubert/train/"}
    for folder, names in there.items():
        found = [path for path in (REPO / folder).iterdir() if path.name != "__pycache__"]
        real = {path.name + "/" * path.is_dir() for path in found}
        assert names - {"assets/"} == real - {"assets/"}, folder  # not every checkout has the built-in model
