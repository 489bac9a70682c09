"""Tests of the files that `jahubert features` writes, continues and rejects."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fixtures.lock_holder import start_lock_holder

import jahubert
from jahubert.cli import feature_files
from jahubert.cli.feature_files import FeatureFiles
from jahubert.cli.main import main
from jahubert.formats.atomic import temporary_path
from jahubert.formats.lock import LOCK_NAME


def test_features_of_several_layers_match_the_python_api(bundle, folder, capsys):
    soundfile.write("long.wav", np.random.default_rng(1).normal(0, 0.1, 160_000), 8_000)
    chunks = {"chunk_seconds": 8}
    for options, layer, more in (
        (["--layer", "0,2"], [0, 2], {}),
        (
            ["--layer", "all", "--weights", "0.5,0,2", "--chunk", "8"],
            "all",
            {"weights": [0.5, 0, 2], **chunks},
        ),
    ):
        out = f"out{len(options)}"
        assert main(["features", "--model", bundle, *options, "-o", out, "long.wav"]) == 0
        expected = jahubert.FeatureExtractor.from_pretrained(bundle, layer, **more)("long.wav")
        np.testing.assert_allclose(np.load(f"{out}/long.npy"), expected.numpy(), atol=1e-5)
    assert capsys.readouterr() == ("", "")


def test_interrupted_features_are_continued_and_never_mixed(bundle, folder, capsys, monkeypatch):
    """Complete files are kept. Missing files, partial files and files of changed recordings are written."""
    run = ["features", "--model", bundle, "-o", "out", "data"]
    assert main(run) == 0
    first, second = Path("out/a.npy"), Path("out/sub/日本語 名前.npy")
    first.write_bytes(b"kept as it is")
    second.rename(temporary_path(second))
    assert main(run) == 0
    assert "1 of 2 recordings" in capsys.readouterr().err
    assert first.read_bytes() == b"kept as it is" and np.load(second).shape[1] == 16
    os.utime("data/a.wav", (1, 1))  # simulates a replacement by an older file
    assert main(run) == 0
    assert np.load(first).shape[1] == 16
    soundfile.write("data/a.wav", np.ones(8_000) * 0.1, 16_000)
    os.utime("data/a.wav", (1, 1))
    assert main(run) == 0
    assert len(np.load(first)) == 24
    capsys.readouterr()
    assert main([*run, "--layer", "1"]) == 2
    assert "layer=None" in capsys.readouterr().err


def test_features_of_another_recording_of_the_same_name_are_refused(bundle, folder, capsys):
    Path("b").mkdir()
    soundfile.write("b/a.wav", np.random.default_rng(0).normal(0, 0.1, 8_000), 16_000)
    run = ["features", "--model", bundle, "-o", "out"]
    assert main([*run, "data/a.wav"]) == 0
    content = Path("out/a.npy").read_bytes()
    assert main([*run, "b/a.wav"]) == 2
    err = capsys.readouterr().err
    assert "out/a.npy" in err and str(folder / "data/a.wav") in err and str(folder / "b/a.wav") in err
    assert Path("out/a.npy").read_bytes() == content
    Path("out/a.npy").unlink()
    assert main([*run, "b/a.wav"]) == 0
    extractor = jahubert.FeatureExtractor.from_pretrained(bundle)
    np.testing.assert_allclose(np.load("out/a.npy"), extractor("b/a.wav").numpy(), atol=1e-5)


def test_recordings_are_recognized_through_links_and_after_they_were_moved(bundle, folder, capsys):
    run = ["features", "--model", bundle, "-o", "out"]
    assert main([*run, "data/a.wav"]) == 0
    Path("out/a.npy").write_bytes(b"kept as it is")
    Path("link").symlink_to("data")
    assert main([*run, "link/a.wav"]) == 0
    Path("data").rename("moved")
    assert main([*run, "moved/a.wav"]) == 0
    assert capsys.readouterr().err.count("1 of 1 recordings") == 2
    assert Path("out/a.npy").read_bytes() == b"kept as it is"
    os.utime("moved/a.wav", (1, 1))  # the new path is known, so this is a change of the same recording
    assert main([*run, "moved/a.wav"]) == 0
    assert np.load("out/a.npy").shape[1] == 16


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full not found")
def test_full_disk_names_the_list_of_sources(bundle, folder, capsys, monkeypatch):
    run = ["features", "--model", bundle, "-o", "out"]
    assert main([*run, "data/a.wav"]) == 0
    Path("data").rename("moved")
    sources, read = Path("out/sources.jsonl"), feature_files._read_sources
    sources.rename("kept")
    sources.symlink_to("/dev/full")
    monkeypatch.setattr(feature_files, "_read_sources", lambda path: read(Path("kept")))
    assert main([*run, "moved/a.wav"]) == 1
    err = capsys.readouterr().err
    assert str(sources) in err and "standard output" not in err


def test_recordings_with_equal_sizes_and_times_are_distinguished(bundle, folder, capsys):
    """All recordings of a corpus may have the same length and, if unpacked from an archive, the same time."""
    Path("b").mkdir()
    Path("b/a.wav").write_bytes(Path("data/a.wav").read_bytes())
    for path in ("data/a.wav", "b/a.wav"):
        os.utime(path, (1, 1))
    run = ["features", "--model", bundle, "-o", "out"]
    assert main([*run, "data/a.wav"]) == 0
    assert main([*run, "b/a.wav"]) == 2
    assert "remove out" in capsys.readouterr().err


def test_features_without_a_complete_record_of_their_source_are_computed_again(bundle, folder, capsys):
    run = ["features", "--model", bundle, "-o", "out", "data"]
    assert main(run) == 0
    sources = Path("out/sources.jsonl")
    lines = sources.read_text().splitlines()
    for damaged in (
        lines[0] + "\n" + lines[1][:-5],
        lines[0] + "\n[]\n\xff",
        lines[0] + "\n" + "[" * 100_000,
    ):
        sources.write_text(damaged)
        capsys.readouterr()
        assert main(run) == 0
        assert "1 of 2 recordings" in capsys.readouterr().err
        assert sources.read_text().splitlines() == lines
        assert main(run) == 0
        assert "2 of 2 recordings" in capsys.readouterr().err


def test_features_of_standard_input_are_kept_apart_from_those_of_files(bundle, folder, capsys, monkeypatch):
    wav = Path("data/a.wav").read_bytes()
    Path("stdin.wav").write_bytes(wav)
    run = ["features", "--model", bundle, "-o", "out"]
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(wav)))
        assert main([*run, "-"]) == 0
        assert np.load("out/stdin.npy").shape[1] == 16  # computed again in the second run
        Path("out/stdin.npy").write_bytes(b"old")
    assert main([*run, "stdin.wav"]) == 2
    assert "out/stdin.npy" in capsys.readouterr().err


def test_units_are_not_written_into_a_folder_of_features(bundle, folder, capsys):
    assert main(["features", "--model", bundle, "-o", "out", "data/a.wav"]) == 0
    assert main(["units", "--model", bundle, "-o", "out", "data/a.wav"]) == 2
    assert "-o out" in capsys.readouterr().err
    assert np.load("out/a.npy").shape[1] == 16


@pytest.mark.parametrize("audio", ["data/a.wav", "data"])
def test_features_are_not_written_over_units(bundle, folder, capsys, audio):
    assert main(["units", "--model", bundle, "--unique", "-o", "out", "data/a.wav"]) == 0
    content = Path("out/a.npy").read_bytes()
    for _ in range(2):
        assert main(["features", "--model", bundle, "-o", "out", audio]) == 2
        assert "out/a.npy" in capsys.readouterr().err
    assert os.listdir("out") == ["a.npy"] and Path("out/a.npy").read_bytes() == content


def test_features_are_written_to_one_safetensors_file(bundle, folder, capsys):
    from safetensors.numpy import load_file

    run = ["features", "--model", bundle, "--layer", "1", "-o", "all.safetensors", "data"]
    assert main(run) == 0
    features = load_file("all.safetensors")
    assert sorted(features) == ["a", "sub/日本語 名前"] and not Path("all.safetensors.parts").exists()
    extractor = jahubert.FeatureExtractor.from_pretrained(bundle, 1)
    for name, path in (("a", "data/a.wav"), ("sub/日本語 名前", "data/sub/日本語 名前.flac")):
        np.testing.assert_allclose(features[name], extractor(path).numpy(), atol=1e-6)
    capsys.readouterr()
    assert main(run) == 2
    assert "all.safetensors" in capsys.readouterr().err


def test_unwritable_output_leaves_no_partial_files(bundle, folder, capsys):
    assert main(["features", "--model", bundle, "-o", "/proc/out", "data/a.wav"]) == 2
    assert "-o /proc/out cannot be written" in capsys.readouterr().err
    assert main(["features", "--model", bundle, "--chunk", "8", "-o", "out", "data/notes.txt"]) == 2
    assert [p.name for p in Path("out").iterdir()] == ["features.json"]  # there is no partial file


def test_parts_left_next_to_a_complete_file_are_deleted_by_the_next_run(bundle, folder, monkeypatch):
    run = ["features", "--model", bundle, "-o", "all.safetensors", "data/a.wav"]
    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if path.name == feature_files.RECORD:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert main(run) == 2
    content = Path("all.safetensors").read_bytes()
    assert main(run) == 0 and Path("all.safetensors").read_bytes() == content
    assert not Path("all.safetensors.parts").exists()
    assert main(run) == 2


def test_lock_left_next_to_a_complete_file_does_not_allow_another_run(bundle, folder, capsys):
    """A killed run may leave the lock file after it has deleted the record of the settings."""
    run = ["features", "--model", bundle, "-o", "all.safetensors", "data/a.wav"]
    assert main(run) == 0
    content = Path("all.safetensors").read_bytes()
    Path("all.safetensors.parts").mkdir()
    Path("all.safetensors.parts", LOCK_NAME).write_text("process 1 on host")
    assert main([*run, "--layer", "1"]) == 2
    assert "all.safetensors already exists" in capsys.readouterr().err
    assert Path("all.safetensors").read_bytes() == content
    assert sorted(os.listdir()) == ["all.safetensors", "data"]


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000])
def test_damaged_record_is_named(bundle, folder, capsys, content):
    run = ["features", "--model", bundle, "-o", "out", "data/a.wav"]
    assert main(run) == 0
    Path("out/features.json").write_text(content)
    assert main(run) == 2
    assert "features.json" in capsys.readouterr().err


@pytest.mark.parametrize("cause", ["write", "encode", "damaged", "missing", "pattern"])
def test_single_file_is_assembled_only_if_all_inputs_succeed(bundle, folder, capsys, monkeypatch, cause):
    """If an input fails, the features of the other recordings are kept and not computed again."""
    from safetensors.numpy import load_file

    run = ["features", "--model", bundle, "-o", "all.safetensors", "data"]
    write = FeatureFiles.write

    def failing(self, base, chunks, shape):
        if base.name == "a":
            raise OSError(errno.EIO, "I/O error", str(base)) if cause == "write" else RuntimeError("encode")
        write(self, base, chunks, shape)

    with monkeypatch.context() as patch:
        if cause in ("write", "encode"):
            patch.setattr(FeatureFiles, "write", failing)
        elif cause == "damaged":
            Path("data/bad.wav").write_bytes(b"RIFFnothing")
        unusable = {"missing": ["missing.wav"], "pattern": ["none*.wav"]}.get(cause, [])
        assert main([*run, *unusable]) == (1 if cause == "encode" else 2)
    assert not Path("all.safetensors").exists()
    kept = Path("all.safetensors.parts/sub/日本語 名前.npy")
    err = capsys.readouterr().err
    assert kept.exists() and str(kept.parents[1]) in err and "input failed" in err
    Path("data/bad.wav").unlink(missing_ok=True)
    assert main(run) == 0
    assert f"{1 if cause in ('write', 'encode') else 2} of 2 recordings" in capsys.readouterr().err
    assert sorted(load_file("all.safetensors")) == ["a", "sub/日本語 名前"]
    assert not Path("all.safetensors.parts").exists()


def test_single_file_contains_only_the_given_recordings(bundle, folder):
    from safetensors.numpy import load_file

    run = ["features", "--model", bundle, "-o", "all.safetensors"]
    assert main([*run, "data", "missing.wav"]) == 2
    assert main([*run, "data/a.wav"]) == 0
    assert list(load_file("all.safetensors")) == ["a"]


def test_single_file_is_assembled_from_more_files_than_may_be_open(tmp_path):
    from safetensors.numpy import load_file

    resource = pytest.importorskip("resource")
    output, bases = tmp_path / "all.safetensors", [Path(f"a{number}") for number in range(100)]
    with feature_files.feature_files(output, {}) as files:
        for number, base in enumerate(bases):
            files.has(base, f"{base}.wav")
            files.write(base, [torch.full((number, 3), float(number))], (3,))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        unused = os.open(os.devnull, os.O_RDONLY)  # the lowest free descriptor
        os.close(unused)
        resource.setrlimit(resource.RLIMIT_NOFILE, (unused + 50, hard))
        try:
            files.finish(bases)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    features = load_file(output)
    assert {name: array.shape for name, array in features.items()} == {
        f"a{number}": (number, 3) for number in range(100)
    }
    assert all((array == int(name[1:])).all() for name, array in features.items())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no POSIX locks")
@pytest.mark.parametrize("output", ["out", "all.safetensors"])
def test_second_run_with_the_same_output_is_rejected(bundle, folder, capsys, output):
    """Otherwise, one of two runs with different settings would not notice the features of the other."""
    run = ["features", "--model", bundle, "data/a.wav", "-o", output]
    used = feature_files.parts_folder(Path(output))
    used.mkdir()
    child = start_lock_holder(used)
    try:
        assert main(run) == 2
        assert f"process {child.pid}" in capsys.readouterr().err
        assert os.listdir(used) == [LOCK_NAME]
    finally:
        child.kill()
        child.wait()
    assert main(run) == 0  # the lock file of the killed run is reused and removed
    assert sorted(os.listdir()) == sorted(["data", output])
    assert output == "all.safetensors" or sorted(os.listdir(output)) == [
        "a.npy",
        "features.json",
        "sources.jsonl",
    ]


def test_run_that_is_killed_while_it_removes_parts_keeps_their_settings(bundle, folder, capsys, monkeypatch):
    run = ["features", "--model", bundle, "data/a.wav", "-o", "all.safetensors"]
    unlink = Path.unlink

    def killed(self, missing_ok=False):
        if self.suffix == ".npy":
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        assert main(run) == 130
    assert main([*run, "--layer", "1"]) == 2
    assert "layer" in capsys.readouterr().err
    assert main(run) == 0
    assert sorted(os.listdir()) == ["all.safetensors", "data"]


@pytest.mark.parametrize("names", [["__metadata__"], ["b\udcff", "b\\udcff"]])
def test_names_that_a_safetensors_file_cannot_contain_are_rejected(bundle, folder, capsys, names):
    for name in names:
        Path(f"{name}.wav").write_bytes(Path("data/a.wav").read_bytes())
    run = ["features", "--model", bundle, *(f"{name}.wav" for name in names)]
    assert main([*run, "-o", "all.safetensors"]) == 2
    assert names[-1] in capsys.readouterr().err and not Path("all.safetensors.parts").exists()
    assert main([*run, "-o", "out"]) == 0
    assert len(list(Path("out").glob("*.npy"))) == len(names)
