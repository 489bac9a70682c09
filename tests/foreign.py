"""Small random models in the layouts of other projects.

Written down from the descriptions of those files, and not from the code that reads them.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import replace

import torch

from jahubert.heads import UnitHead
from jahubert.hubert import HubertConfig, HubertModel

SIZES = {"conv_dims": (24,) * 7, "width": 48, "layers": 2, "heads": 4, "ffn": 96}
SIZES |= {"pos_conv_groups": 4, "pos_conv_kernel": 16}
KINDS = {
    "base": HubertConfig(**SIZES),
    "large": HubertConfig(**SIZES, conv_norm="layer", pre_norm=True, normalize=True),
}
FAIRSEQ_EPS = 1e-5
UNITS = 11


def model_of(config: HubertConfig) -> HubertModel:
    """Random, with norms and biases that do something."""
    torch.manual_seed(3)
    model = HubertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def fairseq_state(model: HubertModel, final_dim: int = 8) -> tuple[dict, UnitHead, torch.Tensor]:
    """The state dict fairseq would save of this model; its unit head; the four special rows."""
    state = model.state_dict()
    out = OrderedDict()
    torch.manual_seed(4)
    head, special = UnitHead(model.config.width, UNITS, final_dim), torch.rand(4, final_dim)
    out["label_embs_concat"] = torch.cat([special, head.label_embeddings.data])
    out["mask_emb"] = state["masked_spec_embed"]
    for part in ("weight", "bias"):
        out[f"layer_norm.{part}"] = state[f"feature_projection.layer_norm.{part}"]
        out[f"post_extract_proj.{part}"] = state[f"feature_projection.projection.{part}"]
        out[f"final_proj.{part}"] = getattr(head.final_proj, part).data
        out[f"encoder.layer_norm.{part}"] = state[f"encoder.layer_norm.{part}"]
    for i in range(7):
        ours, theirs = f"feature_extractor.conv_layers.{i}", f"feature_extractor.conv_layers.{i}"
        out[f"{theirs}.0.weight"] = state[f"{ours}.conv.weight"]
        if model.config.conv_bias:
            out[f"{theirs}.0.bias"] = state[f"{ours}.conv.bias"]
        if model.config.conv_norm == "layer" or i == 0:
            place = "2.1" if model.config.conv_norm == "layer" else "2"
            out[f"{theirs}.{place}.weight"] = state[f"{ours}.layer_norm.weight"]
            out[f"{theirs}.{place}.bias"] = state[f"{ours}.layer_norm.bias"]
    position = "encoder.pos_conv_embed.conv."
    out["encoder.pos_conv.0.bias"] = state[position + "bias"]
    out["encoder.pos_conv.0.weight_g"] = state[position + "parametrizations.weight.original0"]
    out["encoder.pos_conv.0.weight_v"] = state[position + "parametrizations.weight.original1"]
    for i in range(model.config.layers):
        for part in ("weight", "bias"):
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                key = f"{name}.{part}"
                out[f"encoder.layers.{i}.self_attn.{key}"] = state[f"encoder.layers.{i}.attention.{key}"]
            for theirs, ours in {
                "self_attn_layer_norm": "layer_norm",
                "fc1": "feed_forward.intermediate_dense",
                "fc2": "feed_forward.output_dense",
                "final_layer_norm": "final_layer_norm",
            }.items():
                out[f"encoder.layers.{i}.{theirs}.{part}"] = state[f"encoder.layers.{i}.{ours}.{part}"]
    return out, head, special


def fairseq_settings(config: HubertConfig) -> tuple[dict, dict]:
    model = {
        "_name": "hubert",
        "extractor_mode": {"group": "default", "layer": "layer_norm"}[config.conv_norm],
        "encoder_layers": config.layers,
        "encoder_embed_dim": config.width,
        "encoder_ffn_embed_dim": config.ffn,
        "encoder_attention_heads": config.heads,
        "activation_fn": "gelu",
        "layer_norm_first": config.pre_norm,
        "dropout": 0.25,
        "attention_dropout": 0.125,
        "activation_dropout": 0.0,
        "dropout_input": 0.0,
        "encoder_layerdrop": 0.0625,
        "feature_grad_mult": 0.5,
        "conv_feature_layers": "[(24,10,5)] + [(24,3,2)] * 4 + [(24,2,2)] * 2",
        "conv_bias": config.conv_bias,
        "conv_pos": config.pos_conv_kernel,
        "conv_pos_groups": config.pos_conv_groups,
        "final_dim": 8,
        "logit_temp": 0.1,
        "untie_final_proj": True,
        "label_rate": "${task.label_rate}",
    }
    task = {"_name": "hubert_pretraining", "normalize": config.normalize, "label_rate": 50, "labels": ["km"]}
    return model, task


def expected(config: HubertConfig) -> HubertConfig:
    """What the settings of `fairseq_settings` mean."""
    return replace(
        config, dropout=0.25, attention_dropout=0.125, input_dropout=0.0, layer_drop=0.0625,
        conv_grad_scale=0.5, normalize_eps=FAIRSEQ_EPS,
    )  # fmt: skip


def torchaudio_state(model: HubertModel) -> dict:
    out = {}
    for name, value in model.state_dict().items():
        if name.startswith("feature_projection."):
            name = "encoder." + name
        elif name.startswith("encoder."):
            name = "encoder.transformer." + name.removeprefix("encoder.")
        name = name.replace("parametrizations.weight.original0", "weight_g")
        out[name.replace("parametrizations.weight.original1", "weight_v")] = value
    del out["masked_spec_embed"]
    return out


def dictionary_class(monkeypatch) -> type:
    """fairseq's Dictionary as pickles name it, in modules that are gone after the test."""
    package = {}
    for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
        package[name] = type(sys)(name)
        monkeypatch.setitem(sys.modules, name, package[name])

    class Dictionary:
        def __init__(self, symbols=()):
            self.symbols = ["<s>", "<pad>", "</s>", "<unk>", *symbols]
            self.count = [1] * len(self.symbols)
            self.indices = {symbol: i for i, symbol in enumerate(self.symbols)}

    Dictionary.__module__, Dictionary.__qualname__ = "fairseq.data.dictionary", "Dictionary"
    package["fairseq.data.dictionary"].Dictionary = Dictionary
    return Dictionary
