"""Tests of the YAML header in model cards, from which the Hub reads language, task and metrics."""

from __future__ import annotations

import pytest
import torch

from jahubert.formats.bundle import save_bundle
from jahubert.model.heads import HubertForCtc
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.phonemes import PhonemeSet

hub = pytest.importorskip("huggingface_hub")
CONFIG = HubertConfig(
    conv_dims=(8,) * 7, width=16, layers=2, heads=2, ffn=32, pos_conv_kernel=8, pos_conv_groups=2
)


def card(folder):
    return hub.ModelCard.load(folder / "README.md")


def test_ctc_model_has_language_task_and_results(tmp_path):
    torch.manual_seed(0)
    phonemes = PhonemeSet.standard()
    finetuning = {"metrics": {"wer": 0.25, "per": 0.1}, "base_model": "rinna/japanese-hubert-base"}
    ctc = HubertForCtc(CONFIG, len(phonemes))
    save_bundle(tmp_path / "asr", ctc=ctc, phonemes=phonemes, info={"finetuning": finetuning})
    data = card(tmp_path / "asr").data
    assert data.language == "ja" and data.pipeline_tag == "automatic-speech-recognition"
    assert data.base_model == "rinna/japanese-hubert-base" and data.license == "other"
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"wer": 0.25, "per": 0.1} and data.model_name == "asr"


def test_pretrained_model_is_for_feature_extraction(tmp_path):
    save_bundle(tmp_path / "bundle", model=HubertModel(CONFIG))
    data = card(tmp_path / "bundle").data
    assert data.pipeline_tag == "feature-extraction" and data.language is None and "hubert" in data.tags
    assert data.eval_results is None


def test_character_model_has_a_cer(tmp_path):
    phonemes = PhonemeSet(("<blank>", "今", "日", "は"))
    info = {"finetuning": {"metrics": {"wer": 0.2, "per": 0.2}}}
    save_bundle(tmp_path / "c", ctc=HubertForCtc(CONFIG, len(phonemes)), phonemes=phonemes, info=info)
    data = card(tmp_path / "c").data
    assert [result.metric_type for result in data.eval_results] == ["cer"] and data.language == "ja"
