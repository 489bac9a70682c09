"""Fixtures for the command-line tests: a tiny bundle and a folder of recordings."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import torch
from fixtures.sounds import syllables

from jahubert.formats.bundle import save_bundle
from jahubert.model.heads import HubertForCtc
from jahubert.model.hubert import HubertConfig
from jahubert.phonemes import PhonemeSet

TINY = HubertConfig(
    conv_dims=(8,) * 7, width=16, layers=2, heads=2, ffn=32, pos_conv_kernel=8, pos_conv_groups=2
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> str:
    torch.manual_seed(0)
    ctc = HubertForCtc(TINY, 42)
    torch.nn.init.normal_(ctc.lm_head.weight, std=1.5)
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_bundle(
        path, ctc=ctc, phonemes=PhonemeSet.standard(), centroids_KD=torch.randn(9, 16), centroid_layer=1
    )
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a working directory with data/a.wav, data/sub/日本語 名前.flac and data/notes.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/sub").mkdir(parents=True)
    noise = syllables(0.75).numpy()  # voice activity detection would discard steady noise
    soundfile.write("data/a.wav", noise, 16_000)
    soundfile.write("data/sub/日本語 名前.flac", noise[:7_000], 16_000)
    Path("data/notes.txt").write_text("no audio")
    return tmp_path
