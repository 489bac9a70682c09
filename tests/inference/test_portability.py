"""Tests of public objects under pickling, deep copies, spawned workers and other default devices."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import jahubert
from jahubert.model.heads import HubertForCtc
from jahubert.model.hubert import HubertConfig, HubertModel

TINY = HubertConfig(
    conv_dims=(8,) * 7, width=16, layers=2, heads=2, ffn=32, pos_conv_kernel=8, pos_conv_groups=2
)
WAV = torch.randn(16_000, generator=torch.Generator().manual_seed(0)) * 0.1
KINDS = ("features", "layers", "units", "transcriber", "int8 transcriber")


def make_extractor(kind: str):
    """Return a public object, or a wrapper around one, that maps a waveform to a result."""
    torch.manual_seed(0)
    encoder = HubertModel(TINY).eval()
    if kind == "layers":
        return jahubert.LayerFeatures(encoder, "all", "learn").eval()
    if kind == "features":
        return jahubert.FeatureExtractor(encoder, 1, device="cpu")
    if kind == "units":
        return jahubert.UnitExtractor(jahubert.FeatureExtractor(encoder, 1, device="cpu"), torch.randn(5, 16))
    ctc = HubertForCtc(TINY, 42)
    torch.nn.init.normal_(ctc.lm_head.weight, std=1.5)
    dtype = torch.int8 if kind.startswith("int8") else torch.float32
    phonemes = jahubert.PhonemeSet.standard()
    return jahubert.Transcriber(
        ctc, phonemes, beam=2, device="cpu", vad=False, conditioning=False, dtype=dtype
    )


def result(item):
    if isinstance(item, jahubert.Transcriber):
        return item.transcribe(WAV)
    if isinstance(item, jahubert.LayerFeatures):
        with torch.no_grad():
            return item(WAV[None].cpu())[0]
    return item(WAV)


def assert_same(a, b) -> None:
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    else:
        assert a.words and a.phonemes == b.phonemes


class Extracted(Dataset):
    """Dataset whose items are computed in DataLoader workers."""

    def __init__(self, item):
        self.item = item

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int):
        return result(self.item)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_give_the_same_result(kind):
    item = make_extractor(kind)
    expected = result(item)
    assert_same(result(copy.deepcopy(item)), expected)
    assert_same(result(pickle.loads(pickle.dumps(item))), expected)


@pytest.mark.parametrize("kind", ["units", "transcriber"])
def test_spawned_workers_give_the_same_result(kind):
    item = make_extractor(kind)
    expected = result(item)
    loader = DataLoader(Extracted(item), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for computed in loader:
        assert_same(computed, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_default_device_does_not_change_the_result(kind):
    item = make_extractor(kind)
    expected = result(item)
    torch.set_default_device("meta")  # any use of a meta tensor fails, because it has no data
    try:
        assert_same(result(item), expected)
        if kind == "transcriber":
            item.vad = item.conditioning = True
            item.transcribe(WAV)
    finally:
        torch.set_default_device(None)
