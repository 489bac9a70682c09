"""Tests that every command in the documentation is executed, or marked with what it requires.

A comment `<!-- needs: corpus -->` before a ```sh block marks commands that cannot run in a test. All other
blocks run from top to bottom in a folder with a tiny model (`bundle/`), recordings and a small finished
experiment (`exp/demo`), except those in the tutorials, which test_tutorials.py runs.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile
import torch
from fixtures.shims import REPO, SIZES, SMALL, shim_environment
from fixtures.sounds import syllables

import jahubert

pytest.importorskip("hydra")
pytest.importorskip("pyopenjtalk")

NEEDS = {
    "benchmark": "minutes to hours on an otherwise idle machine",
    "cluster": "a job scheduler or several machines",
    "corpus": "a corpus or a model that is not part of the repository",
    "gpu": "a GPU",
    "network": "packages or files from the internet",
}
BLOCK = re.compile(r"(?:^<!-- needs: (?P<need>.*?) -->\n)?^```sh\n(?P<text>.*?)^```", re.S | re.M)
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "recipes/*/*.md", "tests/*.md", "tools/*/*.md")
    for path in REPO.glob(pattern)
    if path.name not in ("LOG.md", "CHANGELOG.md") and path.parent.name != "tutorials"
)
ITERATION_STAGES = ("features", "kmeans", "label", "pretrain")
SYSTEM_STAGES = ("finetune", "decode", "score")


def unmarked(path: Path) -> list[str]:
    matches = BLOCK.finditer(path.read_text(encoding="utf-8"))
    return [match["text"] for match in matches if match["need"] is None]


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_marks_are_known(path):
    text = path.read_text(encoding="utf-8")
    needs = re.findall(r"^<!-- needs: (.*) -->$", text, re.M)
    assert set(needs) <= set(NEEDS)
    marked = [match["need"] for match in BLOCK.finditer(text) if match["need"]]
    assert len(marked) == len(needs), "a mark is not directly before a ```sh block"
    assert not re.search(r"/path/to|you/your-model", "".join(unmarked(path))), "a mark is missing"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Return a folder with the files that the commands mention, and the environment for running them."""
    folder = tmp_path_factory.mktemp("commands")
    torch.manual_seed(0)
    config = jahubert.HubertConfig(**SIZES | {"layers": 6}, pos_conv_groups=2)
    phonemes = jahubert.PhonemeSet.standard()
    ctc = jahubert.HubertForCtc(config, len(phonemes))
    jahubert.save_bundle(
        folder / "bundle", ctc=ctc, phonemes=phonemes, centroids_KD=torch.randn(9, 16), centroid_layer=2
    )
    (folder / "tools").symlink_to(REPO / "tools")
    (folder / "recordings" / "deep").mkdir(parents=True)
    for name in ("audio.wav", "talk.wav", "recordings/a.wav", "recordings/deep/b.mp3"):
        soundfile.write(folder / name, syllables(2.0).numpy(), 16_000)
    contributing = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", contributing, re.S | re.M):
        if "class LogSpectrum" in code:
            (folder / "my_feature.py").write_text(code, encoding="utf-8")
    settings = [*SMALL, "model.layers=3", "decode.beam=5", "prepare.options.minutes=0.5"]
    env = shim_environment(folder, settings, defaults=True)
    run("python -m jahubert.run recipe=demo stage=all", folder, env)
    return folder, env


def run(script: str, folder: Path, env: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def copy_experiment(words: list[str], folder: Path) -> None:
    """Create the inputs for a single stage of a new experiment as a copy of exp/demo."""
    settings = dict(word.partition("=")[::2] for word in words if "=" in word)
    name, stage = settings.get("name"), settings.get("stage", "all")
    if name is None or stage in ("all", "prepare") or (folder / "exp" / name).exists():
        return
    exp = folder / "exp" / name
    shutil.copytree(folder / "exp" / "demo", exp)
    iteration = exp / f"iter{settings.get('iteration', 1)}"
    for outputs, parent in ((ITERATION_STAGES, iteration), (SYSTEM_STAGES, exp / "systems" / "pretrained")):
        for output in outputs[outputs.index(stage) :] if stage in outputs else ():
            shutil.rmtree(parent / output)
    if stage == "targets":
        shutil.rmtree(exp / "targets")


@pytest.mark.slow
@pytest.mark.parametrize("path", [page for page in PAGES if unmarked(page)], ids=name_of)
def test_commands_run(path, sandbox):
    folder, env = sandbox
    for block in unmarked(path):
        for line in block.replace("\\\n", " ").splitlines():
            copy_experiment(shlex.split(line, comments=True), folder)
            run(line, folder, env)
        for result in ("model.pt", "model.onnx", "fairseq", "kaldi", "lhotse", "datasets"):
            target = folder / result  # another page may use the same target
            if target.exists():
                shutil.rmtree(target) if target.is_dir() else target.unlink()
