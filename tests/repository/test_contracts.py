"""Tests of the import contracts, the dependencies of ring 1, and the rules for every file."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fixtures.ring1 import BLOCKER

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "jahubert"

# Window and hop lengths belong in frames.py. OTHER_NUMBERS lists other meanings of the same numbers.
FRAME_NUMBERS = {160, 320, 400}
OTHER_NUMBERS = {("jahubert/audio/mpeg.py", number): "bit rate, kbit/s" for number in FRAME_NUMBERS - {400}}

RING1 = sorted(
    ".".join(path.relative_to(REPO).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.relative_to(PACKAGE).parts[0] not in ("train", "cli", "run.py", "__main__.py", "__init__.py")
    # The only module that imports triton, which torch's CUDA builds install; `dispatch` imports it on a GPU.
    and path.name != "triton_kernels.py"
)
ENTRY_POINTS = [PACKAGE / "run.py", PACKAGE / "__main__.py", *sorted((PACKAGE / "cli").glob("*.py"))]

SOURCES = sorted(
    path
    for top in ("jahubert", "recipes", "tools", "tests")
    for path in (REPO / top).rglob("*.py")
    if "__pycache__" not in path.parts
)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with a new interpreter in the checkout."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=REPO, timeout=120
    )


def test_blocker_rejects_other_packages() -> None:
    done = python(BLOCKER + "\nimport numpy, torch, safetensors.torch, soundfile, soxr\nimport pyarrow")
    assert "blocked by the test: pyarrow" in done.stderr
    done = python(BLOCKER + "\nimport jahubert.train.experiment.config")
    assert "blocked by the test: jahubert.train" in done.stderr


def test_ring_1_needs_only_the_core() -> None:
    imports = "\n".join(f"import {module.removesuffix('.__init__')}" for module in RING1)
    public = "\nimport jahubert\nfor name in getattr(jahubert, '__all__', ()): getattr(jahubert, name)"
    done = python(BLOCKER + "\n" + imports + public)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_modules_of_the_model_can_be_imported_in_any_order() -> None:
    """Each module is the first that a process imports, so circular imports are found."""
    modules = [module for module in RING1 if module.startswith("jahubert.model.")]
    code = f"""
        import importlib, os, sys
        import torch
        for module in {modules}:
            process = os.fork()
            if not process:
                importlib.import_module(module)
                os._exit(0)
            if os.waitpid(process, 0)[1]:
                sys.exit(module)
        """
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=name_of)
def test_entry_points_import_ring_2_only_inside_functions(path: Path) -> None:
    for node in tree_of(path).body:
        for name in imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
            assert not name.startswith("jahubert.train"), f"{name_of(path)}:{node.lineno} imports {name}"


def test_command_line_starts_without_torch() -> None:
    done = python("import sys, jahubert.cli.main; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return the full dotted names in an import statement."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]


def test_nothing_imports_recipes_tools_or_tests() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno} imports {name}"
        for path in SOURCES
        if not name_of(path).startswith("tests/")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in imported(node)
        if name.partition(".")[0] in {"recipes", "tools", "conf", "tests"}
    ]
    assert not wrong, "\n".join(wrong)


def test_import_is_quick_and_changes_no_global_state() -> None:
    done = python(
        """
        import logging, os, signal, sys, time, warnings
        start = time.perf_counter()
        import torch
        torch_s = time.perf_counter() - start

        def state():
            loggers = {n: (l.level, list(l.handlers)) for n, l in logging.root.manager.loggerDict.items()
                       if isinstance(l, logging.Logger) and (l.level or l.handlers)}
            return {
                "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
                "dtype": torch.get_default_dtype(),
                "determinism": torch.are_deterministic_algorithms_enabled(),
                "random": torch.get_rng_state().sum().item(),
                "logging": (logging.root.level, list(logging.root.handlers), loggers),
                "warnings": list(warnings.filters),
                "environment": dict(os.environ),
                "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
                "excepthook": sys.excepthook,
            }

        before = state()
        start = time.perf_counter()
        import jahubert
        ours_s = time.perf_counter() - start
        changed = [k for k, v in state().items() if v != before[k]]
        assert not changed, changed
        assert ours_s < 0.2, f"jahubert {ours_s:.2f} s after torch {torch_s:.2f} s"
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    if tool is None:
        pytest.skip("import-linter is not installed (extra dev)")
    return subprocess.run(
        [tool, "--no-cache", "--no-logo"], capture_output=True, text=True, cwd=folder, timeout=120
    )


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("frames.py", "import jahubert.train.experiment.config"),
        ("audio.py", "def f():\n    from jahubert import train"),
        ("train/losses.py", "import hydra"),
        ("train/losses.py", "import fairseq2.nn"),
        ("train/provenance.py", "import jahubert.train.trainer.losses"),
        ("stray.py", "pass"),
    ],
)
def test_import_contracts_detect_violations(path: str, line: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "jahubert", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    with open(tmp_path / "jahubert" / path, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    assert lint_imports(tmp_path).returncode != 0


def test_window_and_hop_lengths_are_only_in_frames() -> None:
    numbers = {
        (name_of(path), node.value): node.lineno
        for path in SOURCES
        if name_of(path).startswith("jahubert/") and path.name != "frames.py"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value in FRAME_NUMBERS
    }
    unknown = {key: line for key, line in numbers.items() if key not in OTHER_NUMBERS}
    stray = [f"{path}:{line} has {n}" for (path, n), line in unknown.items()]
    assert not stray, f"use a FrameGrid, or add the meaning to OTHER_NUMBERS: {stray}"
    unused = set(OTHER_NUMBERS) - set(numbers)
    assert not unused, f"remove from OTHER_NUMBERS: {unused}"


# Paths and addresses that exist only on one machine or network.
MACHINE = re.compile(
    r"""(?<![\w.$~}/-])/(?:home|root|Users|work|opt|mnt|tmp|scratch|nfs)/\w
    |\bfile://|\bhttps?://(?:localhost|127\.|10\.|192\.168\.)|--find-links
    |--(?:extra-)?index-url""",
    re.VERBOSE,
)
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".html", ""}


def test_no_file_names_a_machine() -> None:
    paths = [p for top in ("jahubert", "recipes", "conf", "docs", "tools") for p in (REPO / top).rglob("*")]
    paths += [p for p in REPO.iterdir() if p.suffix in {".md", ".toml", ".txt"} or p.name == "Makefile"]
    matches = [
        f"{name_of(path)}:{number}: {line.strip()[:100]}"
        for path in paths
        if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not matches, "\n".join(matches)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-stack.txt"])
def test_constraints_hold_only_pins(name: str) -> None:
    lines = (REPO / name).read_text(encoding="utf-8").splitlines()
    wrong = [line for line in lines if not re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.!]+|", line)]
    assert not wrong  # most package indexes lack local versions such as +cpu


def stages() -> list[Path]:
    return sorted(p for p in (PACKAGE / "train" / "stages").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("path", stages(), ids=lambda p: p.stem)
def test_stage_defines_version_frozen_config_and_run(path: Path) -> None:
    tree = tree_of(path)
    assert "python -m jahubert.run" in (ast.get_docstring(tree) or ""), "the docstring has no example command"
    top = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    top |= {n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    assert {"VERSION", "Config", "run"} <= top
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    assert any("frozen=True" in ast.unparse(d) for d in config.decorator_list), "Config is not frozen"


@pytest.mark.stack
def test_full_stack_has_the_pinned_versions() -> None:
    done = python(
        """
        import importlib.metadata as md
        import soundfile  # must precede fairseq2, which then finds soundfile's libsndfile
        import fairseq2, fairseq2.recipe, torch, torchaudio, faiss
        from fairseq2.trainer import Trainer

        for name, version in {"torch": "2.9.1", "torchaudio": "2.9.1", "fairseq2": "0.8.1"}.items():
            assert md.version(name).partition("+")[0] == version, (name, md.version(name))
        assert md.version("faiss-gpu").startswith("1.15.")
        faiss.IndexFlatL2(4).add(torch.zeros(3, 4).numpy())
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["Makefile", "docs/install.md"])
def test_named_extras_are_declared(name: str) -> None:
    table = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    table = table.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    declared = set(re.findall(r"^([\w-]+) = \[", table, re.M))
    named = re.findall(
        r"install [^\n]*(?:'\.|jahubert)\[([\w,-]+)\]", (REPO / name).read_text(encoding="utf-8")
    )
    assert {extra for extras in named for extra in extras.split(",")} <= declared
