"""Tests of reading text files line by line."""

import gzip

import pytest

from jahubert.errors import DataError
from jahubert.formats.text_lines import MAX_LINE, read_lines
from jahubert.limits import GZIP_BYTES, GZIP_EXPANSION, VARIABLE


def test_lines_are_numbered(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffあ\r\n\nb".encode())
    assert list(read_lines(path, "text")) == [(1, "あ"), (2, ""), (3, "b")]
    with gzip.open(tmp_path / "text.txt.gz", "wb") as file:
        file.write(path.read_bytes())
    assert list(read_lines(tmp_path / "text.txt.gz", "text")) == [(1, "あ"), (2, ""), (3, "b")]


def test_line_of_unlimited_length_is_rejected(tmp_path):
    path = tmp_path / "text.txt.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"a\n" + bytes(8 * MAX_LINE))
    with pytest.raises(DataError, match=r"text\.txt\.gz:2: "):
        list(read_lines(path, "text"))


def test_gzip_bomb_is_rejected(tmp_path, monkeypatch):
    path = tmp_path / "text.txt.gz"
    content = b"a\n" * (GZIP_BYTES // 2 + 1)
    path.write_bytes(gzip.compress(content))
    assert len(content) > GZIP_EXPANSION * path.stat().st_size
    with pytest.raises(DataError, match=rf"text\.txt\.gz.*{VARIABLE}"):
        sum(1 for _ in read_lines(path, "text"))
    monkeypatch.setenv(VARIABLE, "2")
    assert sum(1 for _ in read_lines(path, "text")) == len(content) // 2


def test_gzip_file_of_several_members_is_read(tmp_path):
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(b"a\nb") + gzip.compress(b"\nc\n"))
    assert [line for _, line in read_lines(path, "text")] == ["a", "b", "c"]
