"""Tests of damaged copies of CSJ: damage affects only the talk of the file, and every loss is reported.

Most tests change one file of a corpus of five talks. The run must then continue, the utterances of the other
talks must stay the same, and those of the damaged talk must be unchanged, or missing and reported.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.csj_tree import planned, sdb_lines, write_file_list, write_talk
from fixtures.damage import DAMAGES, flip_bit

from jahubert.errors import DataError, ReadError
from jahubert.train.data import utterances
from jahubert.train.data.manifest import Rejected, Utterance
from jahubert.train.experiment.registry import recipe_module

csj = recipe_module("csj")
IDS = ("A01F0055", "S00M0075", "A01F0067", "A01F0122", "A01F0132")
DAMAGED = IDS[1]
KINDS = ("sdb", "xml", "trn")

Content = dict[str, tuple]


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, Path]:
    """Write one corpus per kind of transcript, with core talks only."""
    roots = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, root in roots.items():
        talks = [planned(id, n_utterances=2) for id in IDS]
        for talk in talks:
            write_talk(root, "usb", talk, kinds=(kind,))
        write_file_list(root, talks)
    return roots


@pytest.fixture(scope="module")
def intact(trees) -> dict[str, Content]:
    return {kind: prepared(root)[0] for kind, root in trees.items()}


@pytest.fixture(autouse=True)
def no_delays(monkeypatch):
    monkeypatch.setattr(utterances, "RETRY_DELAYS", (0.0,))


def prepared(root: Path, **options) -> tuple[Content, list[Rejected]]:
    """Return the content of each utterance, with the audio path relative to root, and the rejected items."""
    items = list(csj.prepare(root, root, csj.Config(**options), 0))
    content = {
        item.id: (os.path.relpath(item.audio.path, root), item.start, item.n_samples, item.words, item.text)
        for item in items
        if isinstance(item, Utterance)
    }
    return content, [item for item in items if isinstance(item, Rejected)]


def copy_of(tree: Path, root: Path) -> Path:
    return shutil.copytree(tree, root, copy_function=os.link)


def path_of(root: Path, kind: str, id: str = DAMAGED) -> Path:
    folders = {"sdb": "MORPH/SDB", "xml": "XML/BaseXML", "trn": "TRN/Form1", "wav": "WAV"}
    return root / folders[kind] / "core" / f"{id}.{kind}"


def check(root: Path, intact: Content, changes: int = 0, **options) -> list[Rejected]:
    """Check that only the talk DAMAGED loses utterances and that they are reported, and return the reports.

    Args:
        changes: maximum number of utterances whose text or words may differ.
    """
    found, rejected = prepared(root, **options)
    lost = {id for id in intact if found.get(id) != intact[id]}
    changed = {id for id in found if id in lost or id not in intact}
    assert all(id.startswith(DAMAGED) for id in lost | changed)
    assert len(changed) <= changes, {id: (found[id], intact.get(id)) for id in changed}
    reports = [
        item
        for item in rejected
        if DAMAGED in item.id + item.detail and item.reason not in ("masked name", "no words")
    ]
    assert reports or not lost - changed
    return reports


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()  # the file is a hard link to the original
    path.write_bytes(content)


def decoded(raw: bytes, kind: str) -> str:
    return raw.decode("utf-8" if kind == "xml" else "cp932")


# --- whole files ------------------------------------------------------------------------------------------

FILES: dict[str, Callable[[bytes], bytes]] = {
    **DAMAGES,
    "last byte missing": lambda raw: raw[:-1],
    "lines end with LF": lambda raw: raw.replace(b"\r\n", b"\n"),
}


@pytest.mark.parametrize("kind", [*KINDS, "wav"])
@pytest.mark.parametrize("damage", FILES)
def test_damaged_file_costs_utterances_of_its_talk(trees, intact, tmp_path, kind, damage):
    tree = "sdb" if kind == "wav" else kind
    root = copy_of(trees[tree], tmp_path / "csj")
    path = path_of(root, kind)
    rewrite(path, FILES[damage](path.read_bytes()))
    reports = check(root, intact[tree], changes=_changes(kind, damage))
    if damage in ("empty", "one byte", "html page"):
        assert any(path.name in item.detail for item in reports)


def _changes(kind: str, damage: str) -> int:
    """Return how many utterances may differ. A truncated text file may lose the end of one utterance."""
    return 1 if kind in ("sdb", "trn") and damage in ("half", "zeros at the end", "second half only") else 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "euc_jp", "iso2022_jp", "cp932"])
def test_converted_transcript_is_read_or_rejected(trees, intact, tmp_path, kind, encoding):
    root = copy_of(trees[kind], tmp_path / "csj")
    path = path_of(root, kind)
    text = decoded(path.read_bytes(), kind)
    rewrite(path, text.encode(encoding, errors="replace"))
    reports = check(root, intact[kind])
    readable = {"xml": ("utf-8", "utf-8-sig", "utf-16")}.get(kind, ("utf-8", "utf-8-sig", "cp932"))
    assert (encoding in readable) == (not reports)


@pytest.mark.parametrize("kind", [*KINDS, "wav"])
def test_missing_file_or_folder_or_link_rejects_its_talk(trees, intact, tmp_path, kind):
    tree = "sdb" if kind == "wav" else kind
    for name, replace in (
        ("missing", lambda path: None),
        ("folder", lambda path: path.mkdir()),
        ("broken link", lambda path: path.symlink_to("none")),
        ("looping link", lambda path: path.symlink_to(path.name)),
    ):
        root = copy_of(trees[tree], tmp_path / name)
        path = path_of(root, kind)
        path.unlink()
        replace(path)
        reports = check(root, intact[tree])
        reason = {
            "missing": "no audio" if kind == "wav" else "no transcript",
        }.get(name, "unusable audio" if kind == "wav" else "broken transcript")
        assert [(item.id, item.reason) for item in reports] == [(DAMAGED, reason)]


@pytest.mark.parametrize("kind", [*KINDS, "wav"])
def test_renamed_file_is_not_taken_for_another_talk(trees, intact, tmp_path, kind):
    tree = "sdb" if kind == "wav" else kind
    root = copy_of(trees[tree], tmp_path / "csj")
    path_of(root, kind).rename(path_of(root, kind, "A01F0143"))
    reports = check(root, intact[tree], max_broken=0.5)  # both talks are incomplete
    if kind == "wav":
        assert [(item.id, item.reason) for item in reports] == [(DAMAGED, "no audio")]
    else:
        expected = {("A01F0143", "broken transcript"), (DAMAGED, "no transcript")}
        assert {(item.id, item.reason) for item in reports} == expected
    # A talk whose transcript was replaced by that of another talk is rejected, too.
    if kind != "wav":
        root = copy_of(trees[tree], tmp_path / "replaced")
        rewrite(path_of(root, kind), path_of(root, kind, IDS[0]).read_bytes())
        reports = check(root, intact[tree])
        assert [(item.id, item.reason) for item in reports] == [(DAMAGED, "broken transcript")]
        assert path_of(root, kind).name in reports[0].detail and IDS[0] in reports[0].detail


@pytest.mark.parametrize("kind", [*KINDS, "wav"])
def test_identical_copy_is_counted_and_different_copy_rejects_the_talk(trees, intact, tmp_path, kind):
    tree = "sdb" if kind == "wav" else kind
    for folder in ("CSJ2004/SPEECH/{id}", "dvd3/{id}", "WAV/noncore" if kind == "wav" else "dvd4/{id}"):
        root = copy_of(trees[tree], tmp_path / folder.partition("/")[0])
        path = path_of(root, kind)
        other = root / folder.format(id=DAMAGED) / path.name
        other.parent.mkdir(parents=True)
        shutil.copy(path, other)
        reports = check(root, intact[tree])
        assert [(item.id, item.reason) for item in reports] == [(str(other), "duplicate file")]
        other.write_bytes(path.read_bytes()[:-2])
        reports = check(root, intact[tree])
        assert [(item.id, item.reason) for item in reports] == [(DAMAGED, "different copies")]
        assert str(path) in reports[0].detail and str(other) in reports[0].detail


def test_sidecars_and_other_files_are_ignored(trees, intact, tmp_path):
    root = copy_of(trees["sdb"], tmp_path / "csj")
    for path in [path for path in root.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7" + bytes(100))
        path.with_name(f"{path.name}.bak").write_bytes(path.read_bytes())
    (root / "WAV" / "core" / ".DS_Store").write_bytes(b"\0")
    (root / "WAV" / "core" / "00README.txt").write_bytes(b"x")
    assert not check(root, intact["sdb"])


def test_many_damaged_talks_end_the_run(trees, tmp_path):
    for kind, content in (("sdb", b""), ("wav", b""), ("wav", None)):
        root = copy_of(trees["sdb"], tmp_path / f"{kind} {content}")
        for id in IDS[:2]:
            path = path_of(root, kind, id)
            path.unlink()
            if content is not None:
                path.write_bytes(content)
        with pytest.raises(DataError, match=r"damaged talks \(2 of 5\)(.|\n)*A01F0055(.|\n)*max_broken"):
            prepared(root)
        found, rejected = prepared(root, max_broken=0.5)
        assert {id[:8] for id in found} == set(IDS[2:])
        assert {item.id for item in rejected if item.reason not in ("masked name", "no words")} == {*IDS[:2]}
        with pytest.raises(DataError, match="max_broken"):
            prepared(root, max_broken=0.0)


@pytest.mark.parametrize("kind", [*KINDS, "wav"])
def test_file_that_cannot_be_read_ends_the_run(trees, tmp_path, monkeypatch, kind):
    """The content of such a file is unknown, and the next run may be able to read it."""
    root = trees["sdb" if kind == "wav" else kind]
    path = path_of(root, kind)
    read_bytes, open_ = Path.read_bytes, open

    def check_access(file) -> None:
        if not isinstance(file, int) and os.fspath(file) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def checked_read_bytes(self):
        check_access(self)
        return read_bytes(self)

    def checked_open(file, *args, **kwargs):
        check_access(file)
        return open_(file, *args, **kwargs)

    monkeypatch.setattr(Path, "read_bytes", checked_read_bytes)
    monkeypatch.setattr("builtins.open", checked_open)
    with pytest.raises(ReadError, match=re.escape(path.name)):
        prepared(root)


# --- single bytes and lines -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_change_at_most_one_utterance(trees, intact, tmp_path, kind):
    rng = random.Random(kind)
    root = copy_of(trees[kind], tmp_path / "csj")
    path = path_of(root, kind)
    raw = path.read_bytes()
    for _ in range(25):
        rewrite(path, flip_bit(raw, rng))
        check(root, intact[kind], changes=1)


def test_flipped_bits_in_the_header_of_a_wav_file_are_detected(trees, intact, tmp_path):
    root = copy_of(trees["sdb"], tmp_path / "csj")
    path = path_of(root, "wav")
    raw = path.read_bytes()
    for position in (*range(12), *range(16, 28), *range(34, 44)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        rewrite(path, bytes(damaged))
        check(root, intact["sdb"])


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_line_is_rejected(trees, intact, tmp_path, kind):
    root = copy_of(trees[kind], tmp_path / "csj")
    path = path_of(root, kind)
    lines = path.read_bytes().splitlines(keepends=True)
    patterns = {"sdb": "ホン|キッテ|ワ", "xml": "<IPU", "trn": r"^0002 "}
    row = next(i for i, line in enumerate(lines) if re.search(patterns[kind], decoded(line, kind)))
    last = row + 1
    if kind == "xml":
        last = next(i for i in range(row, len(lines)) if b"</IPU>" in lines[i]) + 1
    rewrite(path, b"".join([*lines[:last], *lines[row:last], *lines[last:]]))
    reports = check(root, intact[kind])
    assert reports and f"{path.name}:{last + 1}" in reports[0].detail


def test_different_times_in_a_segment_are_rejected(trees, intact, tmp_path):
    root = copy_of(trees["sdb"], tmp_path / "csj")
    path = path_of(root, "sdb")
    lines = sdb_lines(planned(DAMAGED, n_utterances=2))
    assert lines[0].split("\t")[3][:5] == lines[1].split("\t")[3][:5]
    lines[0] = lines[0].replace(" 0000", " 0001", 1)
    rewrite(path, "\r\n".join(lines).encode("cp932"))
    reports = check(root, intact["sdb"])
    assert reports and f"{path.name}:2" in reports[0].detail


# --- fileList.csv -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [*FILES, "utf-8", "euc_jp", "folder"])
def test_damaged_file_list_is_reported_and_replaced_by_the_list(trees, intact, tmp_path, caplog, damage):
    root = copy_of(trees["sdb"], tmp_path / "csj")
    path = root / "fileList.csv"
    raw = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage in FILES:
        path.write_bytes(FILES[damage](raw))
    else:
        path.write_bytes(raw.decode("cp932").encode(damage))
    assert not check(root, intact["sdb"])
    if damage in ("empty", "zeros", "noise", "html page", "euc_jp", "second half only"):
        assert "fileList.csv" in caplog.text
