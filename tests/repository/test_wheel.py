"""Tests of the wheel: contents, metadata, and use of ring 1 with only the declared dependencies."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from fixtures.ring1 import BLOCKER, CORE
from packaging.requirements import Requirement

import jahubert

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO / "tools" / "wheel_check.py"
INFO = f"jahubert-{jahubert.__version__}.dist-info"
# Folder in the checkout -> folder in the wheel.
PACKAGED = {"jahubert": "jahubert", "conf": "jahubert/_conf", "recipes": "jahubert/_recipes"}

spec = importlib.util.spec_from_file_location("wheel_check", TOOL)
assert spec and spec.loader
wheel_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wheel_check)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    try:
        return wheel_check.build_wheel(tmp_path_factory.mktemp("wheel"))
    except wheel_check.CheckFailed as error:
        if "install build dependencies did not run successfully" in str(error):
            pytest.skip("hatchling is not installed and no package index is available")
        raise


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(unpacked) -> Message:
    return message_from_string((unpacked / INFO / "METADATA").read_text(encoding="utf-8"))


def from_wheel(unpacked: Path, code: str) -> str:
    """Run `code` in a new interpreter with the unpacked wheel, and return the standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=unpacked, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_contains_package_conf_and_recipes_only(unpacked):
    contents = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    expected = {
        f"{target}/{path.relative_to(REPO / source).as_posix()}"
        for source, target in PACKAGED.items()
        for path in (REPO / source).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {
        "jahubert/_conf/config.yaml",
        "jahubert/_recipes/demo/prepare.py",
        "jahubert/py.typed",
    } <= expected
    about = {f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    assert contents == expected | about | {f"{INFO}/licenses/LICENSE"}


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(wheel, tmp_path):
    """The sdist also contains tests, tools and documentation. Building requires a package index."""
    sdist = wheel_check.build_sdist(tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/conftest.py", "tools/wheel_check.py", "docs/api.md", "README.md", "LICENSE"} <= names
    assert {"README.ja.md", ".ci/run", "jahubert/assets/japanese-small/model.safetensors"} <= names
    (tmp_path / "again").mkdir()
    again = wheel_check.build_wheel(tmp_path / "again", sdist)
    one, other = (zipfile.ZipFile(path) for path in (wheel, again))
    assert {i.filename: i.CRC for i in one.infolist()} == {i.filename: i.CRC for i in other.infolist()}


def test_metadata_is_complete(metadata, unpacked):
    assert metadata["Name"] == "jahubert"
    assert metadata["Version"] == jahubert.__version__
    assert metadata["License-Expression"] == "Apache-2.0 AND CC-BY-SA-4.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Root-Is-Purelib: true" in (unpacked / INFO / "WHEEL").read_text()
    assert f"\nversion: {jahubert.__version__}\n" in (REPO / "CITATION.cff").read_text(encoding="utf-8")
    entries = (unpacked / INFO / "entry_points.txt").read_text().split("\n")
    assert "jahubert = jahubert.cli.main:main" in entries


def test_plain_install_requires_only_the_core_packages(metadata):
    requires = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    core = {r.name: r for r in requires if "extra" not in str(r.marker)}
    assert set(core) == set(CORE) == set(wheel_check.CORE)
    for version in ("2.6.0", "2.13.0", "99.0"):  # there is no upper bound
        assert core["torch"].specifier.contains(version)
    assert not core["torch"].specifier.contains("2.5.1")
    assert {"train", "onnx", "fairseq2"} <= set(metadata.get_all("Provides-Extra"))


def test_ring_1_runs_from_the_wheel_with_core_packages_only(unpacked, tmp_path):
    wheel_check.make_material(tmp_path)
    code = f"""
import runpy
from pathlib import Path
tool = runpy.run_path({str(TOOL)!r})
tool["check_package"]()
print(tool["check_results"](Path({str(tmp_path)!r})))
"""
    assert float(from_wheel(unpacked, BLOCKER + code)) < wheel_check.TOLERANCE


def test_wheel_finds_its_settings_and_recipes(unpacked):
    pytest.importorskip("hydra")
    code = """
from jahubert.train.pipeline.compose import compose
from jahubert.train.experiment.registry import data_folder, recipe_folder
print(data_folder("conf"), recipe_folder("demo"), compose(["recipe=demo"])["name"], sep="\\n")
"""
    conf, recipe, name = from_wheel(unpacked, code).splitlines()
    assert (conf, recipe) == (str(unpacked / "jahubert/_conf"), str(unpacked / "jahubert/_recipes/demo"))
    assert name == "demo"


def test_wheel_check_detects_deviations(tmp_path):
    import numpy as np

    with pytest.raises(wheel_check.CheckFailed, match="imported from the checkout"):
        wheel_check.check_package()
    wheel_check.make_material(tmp_path)
    expected = dict(np.load(tmp_path / "expected.npz"))
    assert wheel_check.check_results(tmp_path) == 0
    for name, change in (("base.features.last", np.float32(2e-5)), ("large.units", 1)):
        np.savez(tmp_path / "expected.npz", **expected | {name: expected[name] + change})
        with pytest.raises(wheel_check.CheckFailed, match=f"{name} differs by"):
            wheel_check.check_results(tmp_path)


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment():
    """The test requires a package index that has torch."""
    done = subprocess.run(
        [sys.executable, TOOL, "torch==2.13.0"], capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr
    assert "2.13.0" in done.stdout


def test_dockerfile_copies_existing_files_that_the_context_includes():
    included = {line[1:] for line in (REPO / ".dockerignore").read_text().split() if line.startswith("!")}
    lines = (REPO / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert copied and all((REPO / name).exists() for name in copied)
    assert set(copied) == included


def test_docker_image_has_pinned_versions_and_runs_the_command_without_root():
    instructions = [line for line in (REPO / "Dockerfile").read_text(encoding="utf-8").splitlines() if line]
    values = dict(line.split(" ", 1) for line in instructions)  # keeps the last instruction of each kind
    assert int(values["USER"].partition(":")[0]) > 0
    assert json.loads(values["ENTRYPOINT"]) == ["jahubert"]
    assert not values["FROM"].endswith("latest") and ":" in values["FROM"]
    installs = [line for line in instructions if line.startswith("RUN pip install")]
    assert installs and all("--constraint constraints.txt" in line for line in installs)


def has_docker() -> bool:
    """Return whether a Docker client and its engine are available."""
    return (
        bool(shutil.which("docker"))
        and not subprocess.run(["docker", "info"], capture_output=True).returncode
    )


@pytest.mark.slow
def test_docker_image_builds_and_runs():
    """The test requires a package index."""
    if not has_docker():
        pytest.skip("no Docker engine is running")
    tag = "jahubert:test"
    subprocess.run(["docker", "build", "--tag", tag, REPO], check=True, timeout=3600)
    done = subprocess.run(["docker", "run", "--rm", tag, "--version"], capture_output=True, text=True)
    assert jahubert.__version__ in done.stdout
