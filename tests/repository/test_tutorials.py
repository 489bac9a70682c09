"""Tests that execute the tutorials from top to bottom on small corpora.

Scripts at the front of PATH replace `python`, `jahubert` and the cluster commands, and run this checkout with
small sizes. Apart from this, only paths to the reader's own folders and the Hub name are replaced.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fixtures.shims import REPO, SIZES, SMALL, shim_environment
from fixtures.sounds import syllables

import jahubert
from jahubert.formats.bundle import save_bundle

pytest.importorskip("hydra")
pytestmark = pytest.mark.slow

BLOCK = re.compile(
    r"(?:^#+ \d+\. `(?P<file>[^`]+)`$)"  # a heading with the file name of the next block
    r"|(?:^[^\n]*`(?P<script>[\w.-]+)`:$)"  # or a line that ends with the file name and a colon
    r"|^```(?P<kind>\w+)\n(?P<text>.*?)^```",
    re.S | re.M,
)


def own_corpus(folder: Path) -> dict[str, str]:
    corpus = folder / "mycorpus" / "a"
    corpus.mkdir(parents=True)
    lines = []
    for number in range(24):
        soundfile.write(corpus / f"{number:03d}.wav", syllables(2.0, seed=number).numpy(), 22_050)
        lines.append(f"a/{number:03d}.wav\tspeaker{number % 4}\tこれは音です\n")
    (folder / "mycorpus" / "transcripts.tsv").write_text("".join(lines), encoding="utf-8")
    return {}


def csj(folder: Path) -> dict[str, str]:
    from fixtures.csj_tree import planned, write_talk

    for name in ("A01M0110", "A02M0012", "S00F0019", "A03F0109", "S02F0122", "A01F0055", "S00M0075"):
        write_talk(folder / "CSJ", "usb", planned(name, n_utterances=4), ("sdb",))
    config = jahubert.HubertConfig(**SIZES, pos_conv_groups=2)
    for model in ("rinna/japanese-hubert-base", "exp/reazonspeech/iter2/pretrain"):
        save_bundle(folder / model, model=jahubert.HubertModel(config))
    soundfile.write(folder / "talk.wav", syllables(3.0).numpy(), 16_000)
    return {
        "/path/to/CSJ": str(folder / "CSJ"),
        "rinna/japanese-hubert-base": str(folder / "rinna/japanese-hubert-base"),
    }


def table(folder: Path) -> dict[str, str]:
    words = folder / "tofugu" / "lib" / "ogg"
    words.mkdir(parents=True)
    for number in range(24):
        soundfile.write(words / f"語{number}【おとです】.ogg", syllables(1.0, seed=number).numpy(), 16_000)
    config = jahubert.HubertConfig(**SIZES, pos_conv_groups=2)
    save_bundle(folder / "hubert", model=jahubert.HubertModel(config))
    return {"rinna/japanese-hubert-base": str(folder / "hubert")}


def reazonspeech(folder: Path) -> dict[str, str]:
    from fixtures.reazonspeech_tree import Release

    return {"/path/to/reazonspeech": str(Release(folder / "corpus", shards=3, rows=8).write())}


def model(folder: Path) -> dict[str, str]:
    torch.manual_seed(0)
    config = jahubert.HubertConfig(**SIZES | {"layers": 6}, pos_conv_groups=2)
    phonemes = jahubert.PhonemeSet.standard()
    ctc = jahubert.HubertForCtc(config, len(phonemes))
    save_bundle(
        folder / "bundle", ctc=ctc, phonemes=phonemes, centroids_KD=torch.randn(9, 16), centroid_layer=2
    )
    soundfile.write(folder / "audio.wav", np.asarray(syllables(3.0)), 16_000)
    return {}


TUTORIALS: dict[str, tuple[Callable[[Path], dict[str, str]], tuple[str, ...]]] = {
    "own-corpus": (own_corpus, ("exp/mine/report/report.html", "exp/mine-wider/report/report.html")),
    "csj": (csj, ("exp/csj/report/report.html", "out/talk.TextGrid", "exp/csj-mine/report/table.txt")),
    "reazonspeech": (
        reazonspeech,
        ("exp/first/iter1/label/units.bin", "exp/big/iter2/pretrain/bundle", "exp/big/report"),
    ),
    "table": (table, ("exp/words/report/report.html", "exp/words-characters/report/report.html")),
    "table.ja": (table, ("exp/words/report/report.html", "exp/words-characters/report/report.html")),
    "features": (model, ("features/audio.npy",)),
    "publish": (model, ("published/README.md", "published.pt", "published.onnx")),
}


def test_every_tutorial_is_listed():
    pages = {path.stem for path in (REPO / "docs" / "tutorials").glob("*.md")}
    assert pages == {*TUTORIALS, "README"}


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial_runs(name, tmp_path):
    prepare, leaves = TUTORIALS[name]
    if name == "publish":
        pytest.importorskip("onnxscript", reason="needs the extra onnx")
    replaced = prepare(tmp_path)
    settings = list(SMALL)
    if name == "reazonspeech":
        settings += ["prepare.options.dev=4", "prepare.options.test=4"]
    env = shim_environment(tmp_path, settings)
    text = (REPO / "docs" / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
    for old, new in replaced.items():
        text = re.sub(re.escape(old) + r"(?=[\s\"'`]|$)", lambda _, new=new: new, text)
    session, file = "", None
    for block in BLOCK.finditer(text):
        file = block["file"] or block["script"] or file
        if not block["kind"]:
            continue
        kind, content = block["kind"], block["text"]
        if kind in ("python", "yaml", "bash") and file is not None:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(content, encoding="utf-8")
        elif kind == "python":
            session += content
            run([sys.executable, "-c", session], tmp_path, env)
        elif kind == "sh" and "recipe=demo" not in content:  # recipe=demo is an alternative in own-corpus.md
            run(["bash", "-e", "-c", content], tmp_path, env)
        file = None
    for leaf in leaves:
        assert (tmp_path / leaf).exists(), leaf


def run(command: list[str], folder: Path, env: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
