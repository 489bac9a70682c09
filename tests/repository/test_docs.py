"""What the documentation shows works: examples run, commands compose, links lead somewhere.

Every block marked ```python in README.md and docs/ runs, those of one file in one namespace, in a folder
with a tiny random model as `bundle/` and noise as `audio.wav`. Blocks marked ```py are shown only.

Of README.md every line is run, here or elsewhere: `test_lines_of_the_readme_are_run`.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import shutil
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from fixtures.sounds import syllables

import jahubert
from jahubert import errors, run
from jahubert.cli import main as cli
from jahubert.errors import ConfigError
from jahubert.formats.bundle import save_bundle
from jahubert.inference import transcribe
from jahubert.model.heads import HubertForCtc, UnitHead
from jahubert.model.hubert import HubertConfig
from jahubert.phonemes import PhonemeSet
from jahubert.train.experiment.config import input_fields

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "recipes/*/*.md")
    for path in REPO.glob(pattern)
    if path.name not in ("LOG.md", "CHANGELOG.md")  # they tell of what was, not of what is
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    found = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [content for marked, content in found if marked == language]


def commands(path: Path, door: str) -> list[tuple[str, ...]]:
    """What stands behind `door` in the command lines of a page; for the stages also those inside a text."""
    lines = "".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
    if door == "jahubert.run":
        lines += re.findall(r"`(python -m jahubert\.run [^`\n]*)`", path.read_text(encoding="utf-8"))
    split = [shlex.split(line, comments=True) for line in lines]
    found = [words[words.index(door) + 1 :] for words in split if door in words]
    return [tuple(words) for words in found if words != ["..."]]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what the examples call bundle/ and audio.wav."""
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


# Pages that are run from top to bottom, commands too, by test_tutorials.py.
WHOLE = [path for path in PAGES if path.parent.name == "tutorials" and path.name != "features.md"]


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "python") and p not in WHOLE], ids=name_of)
def test_examples_run(path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    namespace: dict = {"__name__": __name__}  # a dataclass looks up its module
    for number, code in enumerate(blocks(path, "python"), start=1):
        exec(compile(code, f"{name_of(path)}, example {number}", "exec"), namespace)


def recipe_of_the_guide(folder: Path) -> Path:
    """The recipe that docs/tutorials/own-corpus.md writes, as files."""
    guide = REPO / "docs/tutorials/own-corpus.md"
    recipe = folder / "mine"
    recipe.mkdir()
    (recipe / "prepare.py").write_text(blocks(guide, "python")[0], encoding="utf-8")
    (recipe / "recipe.yaml").write_text(blocks(guide, "yaml")[0], encoding="utf-8")
    return recipe


@pytest.mark.usefixtures("composed_once")
def test_the_recipe_of_the_guide_reads_a_corpus(tmp_path: Path) -> None:
    from jahubert.train.data.manifest import Manifest

    recipe, corpus = recipe_of_the_guide(tmp_path), tmp_path / "corpus"
    corpus.mkdir()
    texts = ["これは音です"] * 5 + ["", "これは"]
    lines = [f"{n}.wav\tspeaker{n % 3}\t{text}" for n, text in enumerate(texts)]
    (corpus / "transcripts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for n in range(6):  # the seventh is missing
        soundfile.write(corpus / f"{n}.wav", 0.1 * torch.randn(16_000).numpy(), 8_000)
    command = [f"recipe={recipe}", f"data={corpus}", f"exp={tmp_path}/exp"]
    run.run([*command, "stage=prepare"])
    run.run([*command, "stage=targets"])
    manifest = Manifest(tmp_path / "exp/prepare/manifest.arrow")
    assert manifest.counts["rejected"] == {"no text": 1, "unusable audio": 1}
    assert sorted(manifest.counts["splits"]) == ["dev", "test", "train"]
    assert len(manifest.load(0)) == 32_000
    assert not checked([*command, "stage=all"])


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composing a tree is what takes the time, and the stages of one iteration or system share theirs."""

    def compose(asked: Sequence[str], system: str | None = None) -> dict[str, Any]:
        shared = tuple(word for word in asked if not word.startswith(("stage=", "processes=")))
        stage = next((word.removeprefix("stage=") for word in asked if word.startswith("stage=")), None)
        return {**_compose(shared, system), "stage": stage}

    monkeypatch.setattr(run, "compose", compose)


_compose = cache(run.compose)


def checked(arguments: Sequence[str]) -> list[str]:
    """What is wrong with the settings of the stages that a command line asks for."""
    overrides = [word for word in arguments if not word.startswith(("-", "hydra"))]  # Hydra's own
    jobs = [run.configured(*job, overrides) for job in run.plan(run.compose(overrides))]
    return [str(job) for job in jobs if isinstance(job, ConfigError)]


def lines_of(door: str) -> dict[tuple[str, ...], str]:
    """Every different command line, and the first page that it is on."""
    found = [(words, name_of(path)) for path in PAGES for words in commands(path, door)]
    return dict(reversed(found))


STAGE_LINES, CLI_LINES = lines_of("jahubert.run"), lines_of("jahubert")


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize("arguments", STAGE_LINES, ids=" ".join)
def test_commands_of_stages_compose(arguments: tuple[str, ...], tmp_path: Path, monkeypatch) -> None:
    recipe_of_the_guide(tmp_path)
    monkeypatch.chdir(tmp_path)  # for `recipe=mine`, in docs/tutorials/own-corpus.md
    # Several seeds are one run each.
    overrides = [re.sub(r"^(seed=\d+),.*", r"\1", word) for word in arguments]
    assert not checked(overrides), f"in {STAGE_LINES[arguments]}"


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize("path", sorted(REPO.glob("recipes/*/README.md")), ids=name_of)
def test_commands_of_a_recipe_can_be_run_in_their_order(path: Path) -> None:
    """What a command reads of the page's experiments, a command above it has made, or it makes itself."""
    made: list[Path] = []
    for arguments in commands(path, "jahubert.run"):
        tree = run.compose(list(arguments))
        planned = run.plan(tree)
        made += [run.folder_of(tree, *job) for job in planned]
        experiments = {folder.parts[:2] for folder in made}  # others come from other pages
        for job in planned:
            _, config, _ = run.configured(*job, arguments)  # type: ignore[misc]
            for name, read, _ in input_fields(config):
                by_a_tool = "words" in read.parts
                if name != "exp" and read.parts[:2] in experiments and not by_a_tool:
                    there = any(folder in (read, *read.parents) for folder in made)
                    assert there, f"{' '.join(arguments)}: no command before it makes {name}={read}"


@pytest.mark.parametrize("arguments", CLI_LINES, ids=" ".join)
def test_commands_parse(arguments: tuple[str, ...]) -> None:
    cli.build_parser().parse_args(arguments[: arguments.index("<")] if "<" in arguments else arguments)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), f"{name_of(path)} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{name_of(path)} links to {target}"


# README.md: nothing in it that nobody runs.

README = REPO / "README.md"
LINES = [
    line for block in blocks(README, "sh") for line in block.splitlines() if shlex.split(line, comments=True)
]
# What a command begins with, where it stands in a sentence.
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:jahubert|python|make|pip|torchrun|srun|git|cd)\s")


@pytest.fixture(scope="module")
def desk(place: Path, whole: Path) -> Path:
    """`place` as a reader of README.md has it: with recordings, and an experiment that lacks a few stages."""
    shutil.copytree(whole, place / "exp" / "demo")
    for undone in ("prepare", "systems/pretrained/score", "report"):
        shutil.rmtree(place / "exp" / "demo" / undone)
    (place / "recordings" / "monday").mkdir(parents=True)
    for seed, name in enumerate(
        ("talk.wav", "interview.flac", "recordings/a.mp3", "recordings/monday/b.mp3")
    ):
        soundfile.write(place / name, syllables(2.0, seed).numpy(), 16_000)
    return place


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.partition("#")[0].strip())
def test_lines_of_the_readme_are_run(line: str, desk: Path, monkeypatch, request) -> None:
    """Here, in order, with `tests/fixtures/tones` as the demo's corpus; or by `.ci/run` or a tool."""
    monkeypatch.chdir(desk)
    match shlex.split(line, comments=True):
        case ["jahubert", *words]:
            request.getfixturevalue("composed_once")  # for `plan`
            if transcribe.builtin_model() is None:  # not every checkout has it
                monkeypatch.setattr(transcribe, "builtin_model", lambda: desk / "bundle")
            assert cli.main(words) == 0
            for option, folder in pairwise(words):
                assert option != "-o" or list((desk / folder).iterdir())
        case ["python", "-m", "jahubert.run", *words]:
            tones = [f"recipe={REPO / 'tests' / 'tones'}", "name=demo"]
            assert "recipe=demo" in words
            assert run.main([*tones, *(word for word in words if word != "recipe=demo")]) == 0
        case ["make", target]:
            made = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (REPO / "Makefile").read_text(), re.M)
            in_ci = f"step {target}\n" in (REPO / ".ci" / "run").read_text()
            assert made and (in_ci or any(f"$(VENV)/bin/{each} $(ARGS)" in made[1] for each in LINES))
        case ["pip", "install", what]:
            assert installed(what)
        case [_, "python", tool, *options] if tool.startswith("tools/bench/"):
            measured = line.partition("#")[0].strip()
            assert f"`{measured}`" in (REPO / "docs" / "performance.md").read_text(encoding="utf-8")
            assert {word for word in options if word.startswith("--")} <= options_of(REPO / tool)
        case _:
            pytest.fail(f"nobody runs this line of README.md: {line}")


def installed(what: str) -> bool:
    """Whether the environments of `.ci/run`, or for a plain install tools/wheel_check.py, hold `what`."""
    asked = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
    assert asked, f"{what}: only a clone can be installed"
    if asked[1] is None:
        return "[*pip, *requirements, wheel]" in (REPO / "tools" / "wheel_check.py").read_text(
            encoding="utf-8"
        )
    made = re.findall(r"-e '\.\[([\w,]+)\]'", (REPO / "Makefile").read_text())
    return any(set(asked[1].split(",")) <= set(extras.split(",")) for extras in made)


def options_of(tool: Path) -> set[str]:
    """The options that a script declares; a measurement itself takes minutes, and a quiet machine."""
    calls = (
        node for node in ast.walk(ast.parse(tool.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    )
    return {
        call.args[0].value
        for call in calls
        if getattr(call.func, "attr", "") == "add_argument" and isinstance(call.args[0], ast.Constant)
    }


def test_the_readme_shows_nothing_else() -> None:
    """No block of another kind, and no command in a sentence that stands in no block."""
    text = README.read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert {marked for marked, _ in found} <= {"sh", "python", ""}
    plain = [line for marked, content in found if not marked for line in content.splitlines()]
    assert not [line for line in plain if COMMAND.match(line)]
    spans = re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    unseen = [
        span for span in spans if COMMAND.match(span) and not any(line.startswith(span) for line in LINES)
    ]
    assert not unseen, f"nobody runs these: {unseen}"


API = REPO / "docs" / "api.md"


def test_every_command_is_described() -> None:
    choices = next(action.choices for action in cli.build_parser()._actions if action.choices)
    described = re.findall(r"^\| `(\w+)[^`]*` \| ", API.read_text(encoding="utf-8"), re.M)
    assert set(choices or ()) <= set(described)


def test_every_public_name_is_described() -> None:
    """docs/api.md has a row for each: its arguments, what it gives, its errors, the file that it is in."""
    text = API.read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in row.split(" | ")] for row in re.findall(r"^\| (`.*) \|$", text, re.M)]
    rows = {re.match(r"`(\w+)", row[0])[1]: row for row in cells if len(row) == 4}  # type: ignore[index]
    assert set(rows) == set(jahubert.__all__)
    for name, (shown, gives, raised, source) in rows.items():
        module = jahubert._MODULE_OF.get(name, "__init__")
        assert source == f"[{module}.py](../jahubert/{module}.py)"
        thing = getattr(jahubert, name)
        asked = set(re.findall(r"\w+", shown.partition("(")[2]))
        assert not asked or asked <= set(inspect.signature(thing).parameters), name
        members = {*dir(thing), *getattr(thing, "__annotations__", ())}
        assert gives and set(re.findall(r"`\.(\w+)", gives)) <= members, name
        kinds = re.findall(r"`(\w+Error)`", raised)
        assert all(hasattr(errors, kind) for kind in kinds if kind != "ValueError")
        assert kinds or raised == "none"
