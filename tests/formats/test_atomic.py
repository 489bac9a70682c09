"""Tests that atomic writes leave either the old or the new content and no temporary files."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from jahubert.errors import DataError, exit_status
from jahubert.formats import atomic
from jahubert.formats.atomic import (
    PREFIX,
    atomic_folder,
    atomic_path,
    atomic_write,
    remove_folder,
    remove_leftovers,
    temporary_path,
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as file:
        file.write("あ")
        assert not path.exists()
    assert path.read_bytes() == "あ".encode()
    with atomic_write(path, "wb") as file:
        file.write(b"\x00")
    assert path.read_bytes() == b"\x00"
    assert names(tmp_path) == ["a.txt"]


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_longest_file_name_can_be_written(tmp_path):
    path = tmp_path / ("n" * 255)
    with atomic_write(path) as file:
        file.write("x")
    with atomic_path(path) as temporary:
        assert len(temporary.name) < 30
        temporary.write_text("y")
    assert path.read_text() == "y" and names(tmp_path) == [path.name]


def test_files_get_ordinary_permissions(tmp_path):
    """safetensors makes its files readable only for their owner."""
    umask = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(2)}, temporary)
        with atomic_folder(tmp_path / "b") as folder:
            save_file({"a": torch.zeros(2)}, folder / "a.safetensors")
    finally:
        os.umask(umask)
    for path in (tmp_path / "a.safetensors", tmp_path / "b" / "a.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o640


def test_temporary_files_of_a_library_are_removed(tmp_path):
    """A killed process leaves the temporary file that safetensors creates next to its target."""
    program = """
        import os, signal, sys
        from pathlib import Path
        from jahubert.formats.atomic import atomic_path
        with atomic_path(Path(sys.argv[1])) as path:
            (path.parent / ".tmpABC").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "a.bin")]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    with atomic_path(tmp_path / "a.bin") as path:
        path.write_text("ok")
    assert names(tmp_path) == ["a.bin"]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a.bin"]


class CheckpointError(BaseException):
    """Error like torch's CheckpointException, which contains the errors of all ranks."""

    failures: ClassVar = {0: (OSError(errno.EIO, "Input/output error"), None)}


def test_errors_that_libraries_hide_name_the_file(tmp_path):
    archive = RuntimeError("unexpected pos 704 vs 598")
    archive.__context__ = OSError(errno.EIO, "Input/output error")
    rust = SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")
    expected = {CheckpointError(): errno.EIO, archive: errno.EIO, rust: errno.EACCES}
    expected[OSError(errno.EIO, "Input/output error")] = errno.EIO
    expected[OSError("117000 requested and 64480 written")] = errno.ENOSPC
    for error, number in expected.items():
        with pytest.raises(OSError) as caught, atomic_path(tmp_path / "a.bin"):
            raise error
        assert caught.value.errno == number and caught.value.filename == str(tmp_path / "a.bin")
        assert exit_status(caught.value) == (1 if number == errno.ENOSPC else 2)
    for other in (
        KeyError("a"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        DataError("x (os error 2)"),
    ):
        with pytest.raises(type(other)), atomic_path(tmp_path / "a.bin"):
            raise other
    assert not names(tmp_path)


def test_error_names_the_file_and_not_the_temporary_one(tmp_path):
    path = tmp_path / "missing" / "a.txt"
    with pytest.raises(FileNotFoundError) as caught, atomic_write(path):
        pass
    assert caught.value.filename == str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and FIFOs")
@pytest.mark.parametrize("kind", ["symbolic link", "broken link", "hard link", "FIFO", "folder"])
def test_temporary_name_in_use_is_left_alone(tmp_path, kind):
    """Another user of a shared folder may have created a link at the predictable temporary name."""
    path, other = tmp_path / "a.txt", tmp_path / "other"
    other.write_text("other")
    create = {
        "symbolic link": lambda temporary: temporary.symlink_to(other),
        "broken link": lambda temporary: temporary.symlink_to(tmp_path / "missing"),
        "hard link": lambda temporary: temporary.hardlink_to(other),
        "FIFO": os.mkfifo,
        "folder": Path.mkdir,
    }
    create[kind](temporary_path(path))
    for write in (atomic_write(path), atomic_path(path)):
        with write as target:
            target.write("new") if hasattr(target, "write") else target.write_text("new")
        assert path.read_text() == "new" and other.read_text() == "other"
        assert names(tmp_path) == sorted([temporary_path(path).name, "a.txt", "other"])


def test_link_at_the_name_of_a_temporary_folder_is_not_followed(tmp_path):
    other, path = tmp_path / "other", tmp_path / "a"
    other.mkdir()
    (other / "file").write_text("other")
    temporary_path(path).with_suffix(".new").symlink_to(other)
    with atomic_folder(path) as folder:
        (folder / "file").write_text("new")
    assert (other / "file").read_text() == "other" and (path / "file").read_text() == "new"
    assert names(tmp_path) == ["a", "other"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs")
def test_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/null"), Path("/dev/stdout")):
        before = path.lstat().st_ino
        with pytest.raises(OSError) as caught, atomic_write(path):
            pass
        assert caught.value.filename == str(path) and path.lstat().st_ino == before


def test_leftover_of_a_killed_process_is_reused(tmp_path):
    program = """
        import os, signal, sys
        from pathlib import Path
        from jahubert.formats.atomic import atomic_folder, atomic_write
        out = Path(sys.argv[1])
        with atomic_write(out / "a.txt") as file, atomic_folder(out / "b") as folder:
            file.write("half")
            file.flush()
            (folder / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 3 and all(name.startswith(PREFIX) for name in names(tmp_path))
    with atomic_write(tmp_path / "a.txt") as file:
        file.write("ok")
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "whole").touch()
    assert (tmp_path / "a.txt").read_text() == "ok"
    assert names(tmp_path) == ["a.txt", "b"] and names(tmp_path / "b") == ["whole"]

    assert subprocess.run(command).returncode == -signal.SIGKILL
    with atomic_write(tmp_path / "c.txt") as file:
        remove_leftovers(tmp_path)
        file.write("still written")
    assert names(tmp_path) == ["a.txt", "b", "c.txt"] and names(tmp_path / "b") == ["whole"]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "a.bin"

    def write(number: int) -> None:
        for _ in range(50):
            with atomic_write(path, "wb") as file:
                for _ in range(20):
                    file.write(bytes([number]) * 1000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = path.read_bytes()
    assert len(content) == 20_000 and len(set(content)) == 1
    assert names(tmp_path) == ["a.bin"]


def test_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("b.tmp", "b.old", "b.new"):  # folders of the user with similar names
        (tmp_path / name).mkdir()
    for content in ("1", "2"):
        with atomic_folder(tmp_path / "b") as folder:
            (folder / content).touch()
    assert names(tmp_path / "b") == ["2"]
    with pytest.raises(ValueError), atomic_folder(tmp_path / "b") as folder:
        (folder / "3").touch()
        raise ValueError
    assert names(tmp_path / "b") == ["2"] and names(tmp_path) == ["b", "b.new", "b.old", "b.tmp"]


def test_folder_replaced_by_a_killed_process_is_restored(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "1").touch()
    pid = os.fork()
    if not pid:
        rename = os.rename

        def kill_at_second(*names, count=[0]):  # noqa: B006
            count[0] += 1
            if count[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*names)

        os.rename = kill_at_second
        with atomic_folder(tmp_path / "b"):
            pass
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError), atomic_folder(tmp_path / "b"):
        raise ValueError
    assert names(tmp_path / "b") == ["1"] and names(tmp_path) == ["b"]


@pytest.mark.parametrize("name", [None, "b"])
@pytest.mark.parametrize("complete", [True, False])
def test_replaced_content_is_removed_only_next_to_the_new_one(tmp_path, name, complete):
    """A process that is killed before it deletes the replaced folder leaves it with the suffix `.old`."""
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "2").touch()
    temporary = temporary_path(tmp_path / "b")
    temporary.touch()
    replaced = temporary.with_name(temporary.name + ".old")
    if complete:
        replaced.mkdir()
        (replaced / "1").touch()
    else:
        (tmp_path / "b").rename(replaced)
    remove_leftovers(tmp_path, name)
    if not complete:
        assert names(replaced) == ["2"]
        with pytest.raises(ValueError), atomic_folder(tmp_path / "b"):
            raise ValueError  # restores the old content
    assert names(tmp_path) == ["b"] and names(tmp_path / "b") == ["2"]


def test_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "b").write_text("a user's")
    with pytest.raises(NotADirectoryError), atomic_folder(tmp_path / "b"):
        pass
    assert (tmp_path / "b").read_text() == "a user's"


def test_folder_that_cannot_be_deleted_is_an_error(tmp_path, monkeypatch):
    remove_folder(tmp_path / "missing")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.bin").touch()

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "0.bin")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(PermissionError) as caught:
            remove_folder(tmp_path / "shards")
    assert caught.value.filename == str(tmp_path / "shards")
    remove_folder(tmp_path / "shards")
    assert not names(tmp_path)


def test_link_to_a_folder_is_removed_without_its_target(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "0.bin").touch()
    (tmp_path / "shards").symlink_to("scratch")
    remove_folder(tmp_path / "shards")
    assert names(tmp_path) == ["scratch"] and names(tmp_path / "scratch") == ["0.bin"]


def test_files_are_closed_before_they_are_renamed_on_windows(tmp_path, monkeypatch):
    """Windows renames and removes only closed files."""

    def open_files():
        links = (path for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
        return [path for path in links if PREFIX in os.path.realpath(path)]

    class ClosedPath(type(tmp_path)):
        def replace(self, target):
            assert not open_files()
            return super().replace(target)

    monkeypatch.setattr(atomic, "sys", SimpleNamespace(platform="win32"))
    path = ClosedPath(tmp_path / "a.txt")
    for content in ("first", "second"):
        with atomic_write(path) as file:
            file.write(content)
    with atomic_path(ClosedPath(tmp_path / "b.bin")) as temporary:
        temporary.write_bytes(b"content")
        assert not open_files()
    with pytest.raises(ValueError, match="stop"), atomic_write(path):
        raise ValueError("stop")
    assert path.read_text() == "second" and (tmp_path / "b.bin").read_bytes() == b"content"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.bin"]
