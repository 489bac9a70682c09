"""Tests that torchaudio's state dicts can be loaded, and that exported ones load into torchaudio's models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from jahubert.formats.bundle import load_bundle, save_bundle
from jahubert.formats.convert import convert
from jahubert.model.heads import HubertForCtc, UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.phonemes import PhonemeSet

SMALL = {"conv_dims": (24,) * 7, "width": 128, "layers": 2, "heads": 2, "ffn": 96, "pos_conv_groups": 4}
KINDS = {
    "base": HubertConfig(**SMALL, normalize_eps=1e-5),
    "large": HubertConfig(**SMALL, conv_norm="layer", pre_norm=True, normalize=True, normalize_eps=1e-5),
}
UNITS = 11


def load_torchaudio_model(path):
    """Build the torchaudio model that a state dict's JSON file describes, and load the weights."""
    import torchaudio

    settings = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    factory = getattr(torchaudio.models, settings["factory"].rpartition(".")[2])
    model = factory(**settings["arguments"]).eval()
    model.load_state_dict(torch.load(path, weights_only=True))  # loading is strict
    return model


def waveforms(config: HubertConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise as input for this package and, normalized if `config.normalize` is set, for torchaudio."""
    wav_BT = 0.1 * torch.randn(2, 16_000)
    return wav_BT, torch.stack([F.layer_norm(w, w.shape) for w in wav_BT]) if config.normalize else wav_BT


@pytest.mark.stack
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("ctc", [False, True])
def test_exported_model_loads_into_torchaudio(tmp_path, config, ctc):
    torch.manual_seed(0)
    model, phonemes = HubertModel(config).eval(), PhonemeSet.standard()
    head = HubertForCtc(config, len(phonemes), model).eval()
    save_bundle(tmp_path / "ours", **({"ctc": head, "phonemes": phonemes} if ctc else {"model": model}))
    convert(tmp_path / "ours", tmp_path / "theirs.pt", "torchaudio")
    wav_BT, input_BT = waveforms(config)
    with torch.no_grad():
        want, _ = load_torchaudio_model(tmp_path / "theirs.pt")(input_BT)
        got = head(wav_BT)[0] if ctc else model(wav_BT).hidden_BSD
    torch.testing.assert_close(got, want.log_softmax(-1) if ctc else want, rtol=1e-5, atol=1e-5)


@pytest.mark.stack
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_exported_pretraining_head_and_loss_equal_torchaudio(tmp_path, config):
    torch.manual_seed(0)
    model, head = HubertModel(config).eval(), UnitHead(config.width, UNITS, 16)
    save_bundle(tmp_path / "ours", model=model, unit_head=head)
    convert(tmp_path / "ours", tmp_path / "theirs.pt", "torchaudio")
    theirs = load_torchaudio_model(tmp_path / "theirs.pt")
    wav_BT, input_BT = waveforms(config)
    with torch.no_grad():
        hidden_BSD = model(wav_BT).hidden_BSD
        torch.testing.assert_close(hidden_BSD, theirs.wav2vec2(input_BT)[0], rtol=1e-5, atol=1e-5)
        unit_BS = torch.randint(UNITS, hidden_BSD.shape[:2])
        mask_BS = torch.rand(unit_BS.shape) < 0.5
        logit_m, _ = theirs.logit_generator(hidden_BSD, unit_BS, mask_BS, ~mask_BS)
        want = F.cross_entropy(logit_m, torch.zeros(len(logit_m), dtype=torch.int64), reduction="sum")
        logit_NK = head(hidden_BSD[mask_BS])
        got = F.cross_entropy(logit_NK, unit_BS[mask_BS], reduction="sum")
    # torchaudio returns the target logit first, followed by all logits with the target masked.
    right_N1 = unit_BS[mask_BS][:, None]
    again = logit_NK.scatter(1, right_N1, float("-inf"))
    torch.testing.assert_close(
        logit_m, torch.cat([logit_NK.gather(1, right_N1), again], 1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.stack
@pytest.mark.parametrize("name", ["hubert_base", "hubert_large"])
def test_torchaudio_model_loads(tmp_path, name):
    """State dicts of the published sizes need no metadata."""
    import torchaudio

    torch.manual_seed(0)
    theirs = getattr(torchaudio.models, name)().eval()
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    bundle = load_bundle(tmp_path / "model.pt")
    wanted = HubertConfig.base() if name == "hubert_base" else HubertConfig.large()
    sizes = ("width", "layers", "heads", "ffn", "pre_norm", "conv_norm", "conv_strides", "normalize")
    assert all(getattr(bundle.config, field) == getattr(wanted, field) for field in sizes)
    wav_BT, input_BT = waveforms(bundle.config)
    with torch.no_grad():
        got = bundle.model(wav_BT, keep_layers=range(1, wanted.layers + 1))
        want, (layers, _) = theirs(input_BT)[0], theirs.extract_features(input_BT)
    for actual, expected in zip([got.hidden_BSD, *got.layers.values()], [want, *layers], strict=True):
        assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.stack
def test_torchaudio_pretraining_state_dict_loads(tmp_path):
    import torchaudio

    theirs = torchaudio.models.hubert_pretrain_base(num_classes=100).eval()
    torch.save(
        {"state_dict": {f"model.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "epoch.ckpt"
    )
    bundle = load_bundle(tmp_path / "epoch.ckpt")
    assert bundle.unit_head is not None and bundle.unit_head.n_units == 100
    assert bundle.model.masked_spec_embed.equal(theirs.mask_generator.mask_embedding)
    assert replace(bundle.config, normalize_eps=1e-7).width == 768
