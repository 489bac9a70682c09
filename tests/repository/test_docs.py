"""Tests that documentation examples run, commands parse, links resolve, and generated pages are current.

The pages are the Markdown files in the root folder, docs/ and the folders of the recipes, except LOG.md and
CHANGELOG.md. Every ```python block is executed in a folder with a tiny random model (`bundle/`) and noise
(`audio.wav`), except in the tutorials that test_tutorials.py executes. The blocks on a page share a
namespace. Blocks marked ```py are not executed. The `jahubert` commands on all pages are parsed, and those in
README.md are executed as well.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml
from fixtures.sounds import syllables

import jahubert
from jahubert.cli import main as cli
from jahubert.errors import ConfigError
from jahubert.formats import hub
from jahubert.formats.bundle import save_bundle
from jahubert.model.heads import HubertForCtc, UnitHead
from jahubert.model.hubert import HubertConfig
from jahubert.phonemes import PhonemeSet
from jahubert.train.experiment.config import input_fields
from jahubert.train.pipeline import jobs, runner
from jahubert.train.pipeline.compose import compose

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "recipes/*/*.md")
    for path in REPO.glob(pattern)
    if path.name not in ("LOG.md", "CHANGELOG.md")  # these pages describe earlier versions
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    matches = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [content for marked, content in matches if marked == language]


def commands(path: Path, program: str) -> list[tuple[str, ...]]:
    """Return the arguments of every `program` command on a page, including stage commands in inline code."""
    lines = "".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
    if program == "jahubert.run":
        lines += re.findall(r"`(python -m jahubert\.run [^`\n]*)`", path.read_text(encoding="utf-8"))
    split = [shlex.split(line, comments=True) for line in lines]
    matches = [words[words.index(program) + 1 :] for words in split if program in words]
    return [tuple(words) for words in matches if words != ["..."]]


@pytest.fixture
def builtin_model(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a missing built-in model, which a recipe builds, with the one of the examples."""
    if hub.builtin_model() is None:
        monkeypatch.setattr(hub, "builtin_model", lambda: examples / "bundle")


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    """Return a folder with the `bundle/` and `audio.wav` that the examples use."""
    folder = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    config = HubertConfig(
        conv_dims=(16,) * 7, width=32, layers=6, heads=2, ffn=32, pos_conv_kernel=8, pos_conv_groups=2
    )
    phonemes = PhonemeSet.standard()
    save_bundle(
        folder / "bundle",
        ctc=HubertForCtc(config, len(phonemes)),
        phonemes=phonemes,
        unit_head=UnitHead(config.width, 20),
        centroids_KD=torch.randn(20, config.width),
        centroid_layer=2,
    )
    soundfile.write(folder / "audio.wav", 0.1 * torch.randn(32_000).numpy(), 16_000)
    return folder


# test_tutorials.py executes these pages completely.
TUTORIALS = [path for path in PAGES if path.parent.name == "tutorials" and path.name != "features.md"]


@pytest.mark.usefixtures("builtin_model")
@pytest.mark.parametrize(
    "path", [p for p in PAGES if blocks(p, "python") and p not in TUTORIALS], ids=name_of
)
def test_examples_run(path: Path, examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(examples)
    namespace: dict = {"__name__": __name__}  # dataclasses look up their module by this name
    for number, code in enumerate(blocks(path, "python"), start=1):
        exec(compile(code, f"{name_of(path)}, example {number}", "exec"), namespace)


def tutorial_recipe(folder: Path) -> Path:
    """Write the recipe from docs/tutorials/own-corpus.md to files."""
    guide = REPO / "docs/tutorials/own-corpus.md"
    recipe = folder / "mine"
    recipe.mkdir()
    (recipe / "prepare.py").write_text(blocks(guide, "python")[0], encoding="utf-8")
    (recipe / "recipe.yaml").write_text(blocks(guide, "yaml")[0], encoding="utf-8")
    return recipe


@pytest.mark.usefixtures("composed_once")
def test_tutorial_recipe_reads_a_corpus(tmp_path: Path) -> None:
    from jahubert.train.data.manifest import Manifest

    recipe, corpus = tutorial_recipe(tmp_path), tmp_path / "corpus"
    corpus.mkdir()
    texts = ["これは音です"] * 5 + ["", "これは"]
    lines = [f"{n}.wav\tspeaker{n % 3}\t{text}" for n, text in enumerate(texts)]
    (corpus / "transcripts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for n in range(6):  # the seventh file remains missing
        soundfile.write(corpus / f"{n}.wav", 0.1 * torch.randn(16_000).numpy(), 8_000)
    command = [f"recipe={recipe}", f"data={corpus}", f"exp={tmp_path}/exp"]
    runner.run([*command, "stage=prepare"])
    runner.run([*command, "stage=targets"])
    manifest = Manifest(tmp_path / "exp/prepare/manifest.arrow")
    assert manifest.counts["rejected"] == {"no text": 1, "unusable audio": 1}
    assert sorted(manifest.counts["splits"]) == ["dev", "test", "train"]
    assert len(manifest.load(0)) == 32_000
    assert not checked([*command, "stage=all"])


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache composed settings, because composing takes most of the time."""

    def compose_shared(asked: Sequence[str], system: str | None = None) -> dict[str, Any]:
        shared = tuple(word for word in asked if not word.startswith(("stage=", "processes=")))
        stage = next((word.removeprefix("stage=") for word in asked if word.startswith("stage=")), None)
        return {**_compose(shared, system), "stage": stage}

    monkeypatch.setattr(jobs, "compose", compose_shared)


_compose = cache(compose)


def checked(arguments: Sequence[str]) -> list[str]:
    """Return the configuration errors of the stages that a command runs."""
    overrides = [word for word in arguments if not word.startswith(("-", "hydra"))]  # drops Hydra's options
    try:
        jobs.configure_jobs(overrides)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def lines_of(program: str) -> dict[tuple[str, ...], str]:
    """Return every distinct command, with the first page that contains it."""
    lines = [(words, name_of(path)) for path in PAGES for words in commands(path, program)]
    return dict(reversed(lines))


STAGE_LINES, CLI_LINES = lines_of("jahubert.run"), lines_of("jahubert")


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize("arguments", STAGE_LINES, ids=" ".join)
def test_stage_commands_compose(arguments: tuple[str, ...], tmp_path: Path, monkeypatch) -> None:
    tutorial_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)  # docs/tutorials/own-corpus.md uses `recipe=mine`
    # A sweep over seeds starts one run per seed.
    overrides = [re.sub(r"^(seed=\d+),.*", r"\1", word) for word in arguments]
    assert not checked(overrides), f"in {STAGE_LINES[arguments]}"


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize("path", sorted(REPO.glob("recipes/*/README.md")), ids=name_of)
def test_commands_of_a_page_can_run_in_order(path: Path) -> None:
    """Every output that is read in an experiment of the page is created by the same or an earlier command."""
    made: list[Path] = []
    for arguments in commands(path, "jahubert.run"):
        tree = compose(list(arguments))
        planned = jobs.plan_stages(tree)
        made += [jobs.output_folder(tree, job) for job in planned]
        experiments = {folder.parts[:2] for folder in made}  # all other experiments belong to other pages
        for job in planned:
            _, config, _ = jobs.configure_job(job, arguments)
            for name, read, _ in input_fields(config):
                if name != "exp" and read.parts[:2] in experiments:
                    is_made = any(folder in (read, *read.parents) for folder in made)
                    assert is_made, f"{' '.join(arguments)}: no earlier command creates {name}={read}"


@pytest.mark.parametrize("arguments", CLI_LINES, ids=" ".join)
def test_commands_parse(arguments: tuple[str, ...]) -> None:
    cli.build_parser().parse_args(arguments[: arguments.index("<")] if "<" in arguments else arguments)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_resolve(path: Path) -> None:
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{name_of(path)} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{name_of(path)} links to {target}"


README_LINES = [
    line
    for block in blocks(REPO / "README.md", "sh")
    for line in block.splitlines()
    if shlex.split(line, comments=True)[:1] in (["jahubert"], ["pip"])
    and "--model exp/" not in line  # a model that the user trains
]


@pytest.fixture
def readme_folder(examples: Path) -> Path:
    """Add the recordings that README.md mentions to the `examples` folder, and return the folder."""
    (examples / "recordings").mkdir(exist_ok=True)
    soundfile.write(examples / "recordings" / "talk.wav", syllables(2.0, 0).numpy(), 16_000)
    return examples


@pytest.mark.usefixtures("builtin_model")
@pytest.mark.parametrize("line", README_LINES, ids=lambda line: line.partition("#")[0].strip())
def test_command_of_the_readme_runs(line: str, readme_folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(readme_folder)
    words = shlex.split(line, comments=True)
    if words[0] == "pip":
        declared = (REPO / "pyproject.toml").read_text(encoding="utf-8")
        for extra in re.findall(r"\w+", words[-1].partition("[")[2]):
            assert re.search(rf"^{extra} = \[", declared, re.M), f"no extra {extra}"
        return
    assert cli.main(words[1:]) == 0
    for option, folder in pairwise(words):
        assert option != "-o" or list((readme_folder / folder).iterdir())


def test_every_command_and_public_name_is_documented() -> None:
    text = (REPO / "docs" / "api.md").read_text(encoding="utf-8")
    commands = next(action.choices for action in cli.build_parser()._actions if action.choices)
    missing = [name for name in (*(commands or ()), *jahubert.__all__) if not re.search(rf"\b{name}\b", text)]
    assert not missing, f"not in docs/api.md: {missing}"


def test_settings_reference_is_current() -> None:
    """Run `python tools/settings_reference.py` to update the page."""
    done = subprocess.run(
        [sys.executable, REPO / "tools" / "settings_reference.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_settings_reference_has_every_common_setting() -> None:
    """Defaults may contain references in the middle, as in `${exp}/iter${iterations}/pretrain`."""
    conf = yaml.safe_load((REPO / "conf" / "config.yaml").read_text(encoding="utf-8"))
    common = {key for key, value in conf.items() if not isinstance(value, dict | list)}
    page = (REPO / "docs" / "settings.md").read_text(encoding="utf-8")
    section = page.partition("## Common settings")[2].partition("\n## ")[0]
    assert not [key for key in common if f"| `{key}` |" not in section]


def test_every_setting_has_a_description() -> None:
    """The description of a setting is a comment at its field."""
    rows = (REPO / "docs" / "settings.md").read_text(encoding="utf-8").splitlines()
    assert not [row for row in rows if row.endswith("|  |")]
