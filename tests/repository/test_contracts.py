"""The rules of the house: who may import whom, how long a file may be, where a number may appear."""

from __future__ import annotations

import ast
import functools
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

MAX_FILE = 400  # lines
MAX_FUNCTION = 60  # lines, decorators not counted
# path or path:function -> why it may be longer. An entry that is no longer needed fails the test.
LONGER: dict[str, str] = {}

# Window and hop lengths live in frames.py. (path, number) -> what the number is there, if not that.
FRAME_NUMBERS = {160, 320, 400}
OTHER_NUMBERS: dict[tuple[str, int], str] = {}

RING1 = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "run", "compose"))
DOORS = ("cli", "run", "compose")

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
    """Run `code` in a fresh interpreter, in the checkout."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=REPO, timeout=120
    )


def test_blocker_blocks() -> None:
    done = python(BLOCKER + "\nimport numpy, torch, safetensors.torch, soundfile, soxr\nimport pyarrow")
    assert "blocked by the test: pyarrow" in done.stderr
    done = python(BLOCKER + "\nimport jahubert.train.experiment.config")
    assert "blocked by the test: jahubert.train" in done.stderr


def test_ring_1_needs_only_the_core() -> None:
    imports = "\n".join(f"import jahubert.{module}" for module in RING1)
    public = "\nimport jahubert\nfor name in getattr(jahubert, '__all__', ()): getattr(jahubert, name)"
    done = python(BLOCKER + "\n" + imports + public)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("door", DOORS)
def test_doors_reach_ring_2_only_inside_functions(door: str) -> None:
    path = PACKAGE / f"{door}.py"
    if not path.exists():
        pytest.skip(f"no {door}.py")
    for node in tree_of(path).body:
        for name in imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
            assert not name.startswith("jahubert.train"), (
                f"{name_of(path)}:{node.lineno} imports {name} at the top"
            )


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Full dotted names that an import statement asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]


@pytest.mark.parametrize("path", [p for p in SOURCES if not name_of(p).startswith("tests/")], ids=name_of)
def test_leaves_are_imported_by_nobody(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            tops = {name.partition(".")[0] for name in imported(node)}
            assert not tops & {"recipes", "tools", "conf", "tests"}, f"{name_of(path)}:{node.lineno}"


def test_import_configures_nothing_and_is_quick() -> None:
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


def test_import_contracts_hold() -> None:
    done = lint_imports(REPO)
    assert done.returncode == 0, done.stdout + done.stderr


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
def test_import_contracts_can_break(path: str, line: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "jahubert", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    with open(tmp_path / "jahubert" / path, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    assert lint_imports(tmp_path).returncode != 0


def lengths(path: Path) -> dict[str, int]:
    """Lines of a file and of each function in it: {path: n, path:function: n}."""
    found = {name_of(path): len(path.read_text(encoding="utf-8").splitlines())}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            key = f"{name_of(path)}:{node.name}"
            found[key] = max(found.get(key, 0), n_lines)
    return found


def test_files_and_functions_are_short() -> None:
    long = {
        what: n_lines
        for path in SOURCES
        for what, n_lines in lengths(path).items()
        if n_lines >= (MAX_FUNCTION if ":" in what else MAX_FILE)
    }
    grown = {what: n for what, n in long.items() if what not in LONGER}
    assert not grown, f"split these, or say in LONGER why not: {grown}"
    assert not set(LONGER) - set(long), "these are short again: remove them from LONGER"


def test_no_drawer_for_everything() -> None:
    drawers = {"utils", "util", "common", "misc", "helpers"}
    assert not [name_of(path) for path in SOURCES if path.stem in drawers]


def test_frame_numbers_live_in_frames() -> None:
    found = {
        (name_of(path), node.value): node.lineno
        for path in SOURCES
        if name_of(path).startswith("jahubert/") and path.name != "frames.py"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value in FRAME_NUMBERS
    }
    stray = [f"{path}:{line} has {n}" for (path, n), line in found.items() if (path, n) not in OTHER_NUMBERS]
    assert not stray, f"use a FrameGrid, or say in OTHER_NUMBERS what else it is: {stray}"
    assert not set(OTHER_NUMBERS) - set(found), "remove these from OTHER_NUMBERS"


# Folders of somebody's machine and addresses that exist on one machine only.
MACHINE = re.compile(
    r"""(?<![\w.$~}/-])/(?:home|root|Users|work|opt|mnt|tmp|scratch|nfs)/\w
    |\bfile://|\bhttps?://(?:localhost|127\.|10\.|192\.168\.)|--(?:extra-)?index-url|--find-links""",
    re.VERBOSE,
)
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".html", ""}


def test_nothing_names_a_machine() -> None:
    places = [p for top in ("jahubert", "recipes", "conf", "docs", "tools") for p in (REPO / top).rglob("*")]
    places += [p for p in REPO.iterdir() if p.suffix in {".md", ".toml", ".txt"} or p.name == "Makefile"]
    hits = [
        f"{name_of(path)}:{number}: {line.strip()[:100]}"
        for path in places
        if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-stack.txt"])
def test_constraints_are_pins_and_nothing_else(name: str) -> None:
    lines = (REPO / name).read_text(encoding="utf-8").splitlines()
    wrong = [line for line in lines if not re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.!]+|", line)]
    assert not wrong  # so also no local version such as +cpu, which an index may not have


def stages() -> list[Path]:
    return sorted(p for p in (PACKAGE / "train" / "stages").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("path", stages(), ids=lambda p: p.stem)
def test_all_stages_look_alike(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), "what it reads, what it writes, an example command"
    assert "python -m jahubert.run" in (ast.get_docstring(tree) or ""), "the docstring shows no command"
    top = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    top |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    top |= {n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    assert {"VERSION", "Config", "run"} <= top
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    assert any("frozen=True" in ast.unparse(d) for d in config.decorator_list), "Config is a frozen dataclass"


@pytest.mark.stack
def test_the_stack_is_the_pinned_one() -> None:
    done = python(
        """
        import importlib.metadata as md
        import soundfile  # before fairseq2, which finds its libsndfile
        import fairseq2, fairseq2.recipe, torch, torchaudio, faiss
        from fairseq2.trainer import Trainer

        for name, version in {"torch": "2.9.1", "torchaudio": "2.9.1", "fairseq2": "0.8.1"}.items():
            assert md.version(name).partition("+")[0] == version, (name, md.version(name))
        assert md.version("faiss-gpu").startswith("1.15.")
        faiss.IndexFlatL2(4).add(torch.zeros(3, 4).numpy())
        """
    )
    assert done.returncode == 0, done.stderr
