"""The front end and the packed attention against plain convolutions, norms and attention, gradients too."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jahubert.model.kernels import conv_frontend as frontend
from jahubert.model.kernels.conv_frontend import ConvFrontEnd
from jahubert.model.packing import Packing

HUBERTS = ((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))
ODD = ((7, 2, 5, 1), (3, 3, 2, 2))  # kernels over three strides, below one stride, of one tap


def plain(stack: ConvFrontEnd, wav_T: torch.Tensor) -> torch.Tensor:
    """One waveform through torch's own layers: (frames, channels)."""
    x = wav_T[None, None]
    for layer in stack.conv_layers:
        x = layer.conv(x)
        if isinstance(getattr(layer, "layer_norm", None), nn.GroupNorm):
            x = layer.layer_norm(x)
        elif layer.norm == "layer":
            x = layer.layer_norm(x.transpose(1, 2)).transpose(1, 2)
        x = F.gelu(x)
    return x[0].T


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [HUBERTS, ODD], ids=["hubert", "odd"])
@pytest.mark.parametrize("cached", [1, 2**20], ids=["parts", ""])
def test_equals_plain_convolutions_and_their_gradients(norm, bias, shape, cached, monkeypatch):
    monkeypatch.setattr(frontend, "CACHED", cached)  # the smallest parts, or all rows at once
    torch.manual_seed(0)
    stack = ConvFrontEnd((8, 6, 10, 4, 6, 8, 12)[: len(shape[0])], *shape, bias=bias, norm=norm)
    for name, parameter in stack.named_parameters():
        if "layer_norm" in name or "bias" in name:
            nn.init.normal_(parameter, 0.5, 0.3)
    wavs = [torch.randn(n, requires_grad=True) for n in (5000, 400, 12_345, 719, 3201)]
    want = [plain(stack, wav) for wav in wavs]
    flat = torch.cat(want)
    weights = torch.randn_like(flat)
    inputs = [*wavs, *stack.parameters()]
    want_grads = torch.autograd.grad((flat * weights).sum(), inputs)
    got = stack(wavs)[: len(flat)]
    torch.testing.assert_close(got, flat, rtol=1e-4, atol=1e-5)
    got_grads = torch.autograd.grad((got * weights).sum(), inputs)
    for ours, theirs in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item() + 1e-4)


def test_group_norm_is_exact_for_quiet_sound_on_a_loud_offset():
    torch.manual_seed(0)
    stack = ConvFrontEnd((8,), (10,), (5,), bias=False, norm="group")
    quiet = (1e-3 * torch.randn(4000, dtype=torch.float64)).float()
    exact = ConvFrontEnd((8,), (10,), (5,), bias=False, norm="group").double()
    exact.load_state_dict(stack.state_dict())
    for offset in (0.0, 0.5):
        wav_T = quiet + offset
        want = plain(exact, wav_T.double())
        torch.testing.assert_close(stack([wav_T])[: len(want)], want.float(), rtol=0, atol=2e-3)


def test_silence_stays_finite():
    torch.manual_seed(0)
    stack = ConvFrontEnd((8, 8), (10, 3), (5, 2), bias=False, norm="group")
    got = stack([torch.zeros(1000), torch.full((1000,), 0.25)])
    assert got.isfinite().all()
    got.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in stack.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_attention_is_attention_of_each_utterance(dtype):
    torch.manual_seed(0)
    frames = [33, 5, 64, 40, 64, 1]
    packing = Packing(frames, 70, torch.device("cpu"))
    rows = len(packing.index_N)
    assert rows == 256 and packing.n_valid == sum(frames)
    q, k, v = (torch.randn(rows, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    got = packing.attend(q, k, v, 0.0)[: packing.n_valid]
    starts = torch.tensor([0, *frames]).cumsum(0)
    want = torch.cat(
        [
            F.scaled_dot_product_attention(
                *(x[start : start + n].float().transpose(0, 1)[None] for x in (q, k, v))
            )[0].transpose(0, 1)
            for start, n in zip(starts, frames, strict=False)
        ]
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(got.float(), want, **tolerance)
    weights = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad((got.float() * weights).sum(), (q, k, v)),
        torch.autograd.grad((want * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **{name: 2 * value for name, value in tolerance.items()})


def test_packing_there_and_back():
    packing = Packing([3, 5, 1], 6, torch.device("cpu"))
    x_BSD = torch.arange(3 * 6 * 2.0).view(3, 6, 2)
    back = packing.unpack(packing.pack(x_BSD))
    for row, n in enumerate([3, 5, 1]):
        torch.testing.assert_close(back[row, :n], x_BSD[row, :n])
        assert (back[row, n:] == 0).all()


def test_the_gradient_of_a_long_utterance_is_summed_in_float32():
    """Its first layer is many tiles, and a sum in bfloat16 stops growing when it is 256 times what comes."""
    torch.manual_seed(0)
    stack, wav_T = ConvFrontEnd((64,), (10,), (5,), bias=False, norm="group"), torch.randn(480_000)
    found = []
    for few_bits in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=few_bits):
            total = stack([wav_T]).float().sum()
        found.append(torch.autograd.grad(total, stack.conv_layers[0].layer_norm.bias)[0])
    assert (found[1] - found[0]).norm() < 5e-4 * found[0].norm()
