"""Tests of the published sizes base and large against Hugging Face's models with the same random weights.

The tests cover every hidden state, masked frames, padded batches and the CTC head, for recordings of 25 ms to
15 s.
"""

from __future__ import annotations

import pytest
import torch
from transformers import HubertConfig as HfConfig
from transformers import HubertForCTC as HfForCtc

from jahubert.frames import HUBERT
from jahubert.model.heads import HubertForCtc
from jahubert.model.hubert import HubertConfig

SYMBOLS = 42
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=["base", "large"])
def pair(request) -> tuple[HubertForCtc, HfForCtc]:
    """Return the model of this package and Hugging Face's model with the same weights."""
    # Hugging Face normalizes waveforms in the processor, not in the model.
    changes = {"conv_bias": True, "normalize": False} if request.param == "large" else {}
    config: HubertConfig = getattr(HubertConfig, request.param)(**changes)
    torch.manual_seed(0)
    model = HubertForCtc(config, SYMBOLS).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # these are ones or zeros by default
            parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.device("meta"):
        reference = HfForCtc(
            HfConfig(
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.ffn,
                conv_bias=config.conv_bias,
                feat_extract_norm=config.conv_norm,
                do_stable_layer_norm=config.pre_norm,
                vocab_size=SYMBOLS,
            )
        )
    reference.load_state_dict(model.state_dict(), assign=True)
    return model, reference.eval()


def waveforms(*lengths: int) -> torch.Tensor:
    """Return random waveforms (B, T), padded with zeros."""
    generator = torch.Generator().manual_seed(1)
    wavs = [0.1 * torch.randn(n, generator=generator) for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("n_samples", [400, 16_123, pytest.param(240_000, marks=pytest.mark.slow)])
def test_every_hidden_state_equals_hugging_face(pair, n_samples):
    model, reference = pair
    config, wav_BT = model.config, waveforms(n_samples)
    mask_BS = torch.rand(1, HUBERT.n_frames(n_samples), generator=torch.Generator().manual_seed(2)) < 0.4
    with torch.inference_mode():
        actual = model.hubert(wav_BT, mask_BS=mask_BS, keep_layers=range(config.layers + 1))
        expected = reference.hubert(wav_BT, mask_time_indices=mask_BS, output_hidden_states=True)
    # Hugging Face applies the final norm of pre-norm models to the last hidden state.
    for number in range(config.layers + (not config.pre_norm)):
        assert difference(actual.layers[number], expected.hidden_states[number]) < 1e-5, number
    assert difference(actual.hidden_BSD, expected.last_hidden_state) < 1e-5


@pytest.mark.parametrize("padding", ["masked", "unmasked"])
def test_log_probabilities_of_a_padded_batch_equal_hugging_face(pair, padding):
    model, reference = pair
    lengths = [30_000, 400, 16_123]
    wav_BT = waveforms(*lengths)
    valid_BT = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    with torch.inference_mode():
        actual, n_frames_B = model(wav_BT, lengths, padding=padding)
        attention_mask = valid_BT if padding == "masked" else None
        expected = reference(wav_BT, attention_mask=attention_mask).logits.log_softmax(-1)
    for row, n in enumerate(n_frames_B.tolist()):
        assert difference(actual[row, :n], expected[row, :n]) < 1e-5


def test_log_probabilities_do_not_depend_on_the_batch(pair):
    model, reference = pair
    lengths = [16_123, 400, 30_000]
    wav_BT = waveforms(*lengths)
    with torch.inference_mode():
        together, n_frames_B = model(wav_BT, lengths)
        for row, n in enumerate(lengths):
            expected = reference(wav_BT[row : row + 1, :n]).logits.log_softmax(-1)[0]
            assert difference(together[row, : n_frames_B[row]], expected) < 1e-5
