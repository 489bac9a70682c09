"""Tests that the encoder equals torchaudio's with the same random weights."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from jahubert.model.hubert import HubertConfig, HubertModel

SMALL = {"conv_dims": (24,) * 7, "width": 48, "layers": 3, "heads": 4, "ffn": 96, "pos_conv_groups": 4}
# The two settings are independent. The first and the last combination are those of base and large.
CONFIGS = {
    f"{conv_norm} norm, {'pre' if pre_norm else 'post'}-norm": HubertConfig(
        **SMALL, conv_norm=conv_norm, pre_norm=pre_norm, conv_bias=conv_norm == "layer"
    )
    for conv_norm in ("group", "layer")
    for pre_norm in (False, True)
}
# Mapping from Hugging Face's parameter names, which this package uses, to torchaudio's.
NAMES = [
    (r"^feature_projection\.", "encoder.feature_projection."),
    (r"^encoder\.(pos_conv_embed|layer_norm|layers)\b", r"encoder.transformer.\1"),
    (r"conv\.parametrizations\.weight\.original0$", "conv.weight_g"),
    (r"conv\.parametrizations\.weight\.original1$", "conv.weight_v"),
]


def renamed(ours: HubertModel) -> dict[str, Tensor]:
    state = ours.state_dict()
    del state["masked_spec_embed"]  # torchaudio stores this tensor in the pretraining wrapper
    result = {}
    for name, value in state.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def theirs(config: HubertConfig, ours: HubertModel):
    from torchaudio.models import wav2vec2_model

    convs = zip(config.conv_dims, config.conv_kernels, config.conv_strides, strict=True)
    model = wav2vec2_model(
        extractor_mode={"group": "group_norm", "layer": "layer_norm"}[config.conv_norm],
        extractor_conv_layer_config=list(convs),
        extractor_conv_bias=config.conv_bias,
        encoder_embed_dim=config.width,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=config.pos_conv_kernel,
        encoder_pos_conv_groups=config.pos_conv_groups,
        encoder_num_layers=config.layers,
        encoder_num_heads=config.heads,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=config.ffn,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=config.pre_norm,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    ).eval()
    model.load_state_dict(renamed(ours))  # loading is strict
    return model


def model_of(config: HubertConfig) -> HubertModel:
    """Return a model with random norm weights and biases instead of ones and zeros."""
    torch.manual_seed(0)
    model = HubertModel(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.stack
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_equals_torchaudio(config):
    ours = model_of(config)
    model = theirs(config, ours)
    for n_samples in (400, 719, 720, 16_000, 40_123, 400_000):
        wav_BT = 0.3 * torch.randn(2, n_samples)
        with torch.no_grad():
            got = ours(wav_BT, keep_layers=range(config.layers + 1))
            want_BSD, _ = model(wav_BT)
            want_layers, _ = model.extract_features(wav_BT)
        torch.testing.assert_close(got.hidden_BSD, want_BSD, rtol=1e-5, atol=1e-5)
        assert len(want_layers) == config.layers
        for number, want in enumerate(want_layers, start=1):
            torch.testing.assert_close(got.layers[number], want, rtol=1e-5, atol=1e-5)


@pytest.mark.stack
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_padded_batch_equals_torchaudio(config):
    """torchaudio's group norm includes padding, whereas this package includes it only on request."""
    ours = model_of(config)
    lengths = torch.tensor([16_000, 4_567, 401])
    wav_BT = torch.randn(3, 16_000) * (torch.arange(16_000) < lengths[:, None])
    with torch.no_grad():
        want_BSD, n_frames_B = theirs(config, ours)(wav_BT, lengths)
        outputs = {"masked": ours(wav_BT, lengths, padding="masked")}
        if config.conv_norm == "layer":
            outputs["ignored"] = ours(wav_BT, lengths)
    for got in outputs.values():
        assert got.n_frames_B.tolist() == n_frames_B.tolist()
        for row, n_frames in enumerate(n_frames_B.tolist()):
            torch.testing.assert_close(
                got.hidden_BSD[row, :n_frames], want_BSD[row, :n_frames], rtol=1e-5, atol=1e-5
            )
