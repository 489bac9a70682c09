"""Tests that all public names are documented and typed."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jahubert

REPO = Path(__file__).resolve().parents[2]
PUBLIC = [name for name in jahubert.__all__ if name != "__version__"]

PROGRAM = """\
import numpy as np
import torch

import jahubert
from jahubert.audio import load_audio
from jahubert.errors import UserError
from jahubert.formats.convert import convert
from jahubert.inference.writers import srt


def main() -> None:
    extractor: jahubert.FeatureExtractor = jahubert.FeatureExtractor.from_pretrained("bundle/", layer=6)
    builtin: jahubert.FeatureExtractor = jahubert.FeatureExtractor.from_pretrained(layer=4)
    one: torch.Tensor = extractor("audio.wav")
    many: list[torch.Tensor] = extractor(["a.wav", "b.wav"])
    units: torch.Tensor = jahubert.UnitExtractor.from_pretrained("bundle/")(np.zeros(16_000, np.float32))
    transcript: jahubert.Transcript = jahubert.Transcriber.from_pretrained().transcribe("audio.wav")
    text: str = transcript.text
    starts: list[float] = [word.start for segment in transcript.segments for word in segment.words]
    model: jahubert.HubertModel = jahubert.HubertModel.from_pretrained("bundle/")
    config: jahubert.HubertConfig = model.config
    frames: int = config.grid.n_frames(16_000)
    wav_T: torch.Tensor = load_audio("audio.wav")
    encoded: jahubert.Encoded = model(wav_T[None], torch.tensor([len(wav_T)]))
    phonemes = jahubert.PhonemeSet.standard()
    labels: list[int] = phonemes.encode([jahubert.kana_to_phones("カナ")])
    try:
        jahubert.load_bundle("bundle/")
    except UserError:
        pass
    print(builtin, one, many, units, text, starts, frames, encoded.hidden_BSD, labels, convert, srt)
"""


def members(name: str) -> Iterator[tuple[str, Any]]:
    """Yield the public object with the given name and, for a class, its own methods and properties."""
    value = getattr(jahubert, name)
    yield name, value
    for member, attribute in vars(value).items() if inspect.isclass(value) else ():
        function = getattr(attribute, "__func__", getattr(attribute, "fget", attribute))
        if not member.startswith("_") and inspect.isfunction(function):
            yield f"{name}.{member}", function


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name: str) -> None:
    missing = [
        path
        for path, value in members(name)
        # A dataclass without a docstring gets its signature as its docstring.
        if not (value.__doc__ or "").strip() or value.__doc__.startswith(f"{name}(")
    ]
    assert not missing


@pytest.mark.parametrize("name", PUBLIC)
def test_documented_arguments_are_parameters(name: str) -> None:
    """The API reference is built from the `Args` sections; an unknown name fails the build of the site."""
    unknown = []
    for path, value in members(name):
        section = re.search(r"^Args:\n((?:[ ]{4}.*\n|\n)+)", f"{inspect.getdoc(value)}\n", re.MULTILINE)
        named = re.findall(r"^ {4}(\S[^:(]*)(?: \(.*\))?:", section[1], re.MULTILINE) if section else []
        if named:
            unknown += [
                f"{path}: {argument}" for argument in {*named} - {*inspect.signature(value).parameters}
            ]
    assert not unknown


@pytest.mark.slow
def test_strict_type_check_of_a_user_program(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--config-file=",
        "program.py",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(REPO)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
