"""Dropout from random bits; attention, feed-forward and positional convolution that keep less for later."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jahubert.model import packing as packing_module
from jahubert.model.hubert import FeedForward, HubertConfig, HubertModel
from jahubert.model.kernels.dropout import Dropout, keep_mask
from jahubert.model.kernels.positional_conv import PositionalConv
from jahubert.model.packing import Packing

CPU = torch.device("cpu")


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_dropout_drops_the_share_keeps_the_mean_and_is_its_own_backward(p):
    torch.manual_seed(0)
    x = torch.rand(400, 1001, requires_grad=True)
    y = Dropout(p)(x)
    dropped = (y == 0).float()
    n = x.numel()
    assert abs(dropped.mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5
    # neighbours come from one random number of 64 bits: they must know nothing of each other
    both = (dropped[:, 1:] * dropped[:, :-1]).mean().item()
    assert abs(both - p * p) < 5 * (p * p / n) ** 0.5
    torch.testing.assert_close(y, (x / (1 - p)) * (1 - dropped), rtol=1e-3, atol=0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, (1 - dropped) / (1 - p), rtol=1e-3, atol=0)
    assert torch.equal(Dropout(p).eval()(x), x)


def test_dropout_follows_the_seed():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(Dropout(0.3)(torch.ones(999)))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("cached", [1, 5000, 2**19])
def test_attention_with_dropout_is_plain_attention_with_the_same_mask(cached, monkeypatch):
    monkeypatch.setattr(packing_module, "CACHED", cached)  # how many heads go together changes nothing
    torch.manual_seed(0)
    packing = Packing([33, 5, 64, 40], 70, CPU)
    q, k, v = (torch.randn(len(packing.index_N), 2, 8, requires_grad=True) for _ in range(3))
    torch.manual_seed(1)
    got = packing.attend(q, k, v, 0.25)[: packing.n_valid]
    torch.manual_seed(1)
    keep = {32: keep_mask((2, 32, 32), 0.25)[0], 64: keep_mask((3 * 2, 64, 64), 0.25)[0]}
    outs, start = [], 0
    for n, (size, first) in zip([33, 5, 64, 40], [(64, 0), (32, 0), (64, 4), (64, 2)], strict=True):
        one_q, one_k, one_v = (x[start : start + n].transpose(0, 1) for x in (q, k, v))
        weights = torch.softmax(one_q @ one_k.transpose(1, 2) / 8**0.5, dim=-1)
        outs.append(((weights * keep[size][first : first + 2, :n, :n] / 0.75) @ one_v).transpose(0, 1))
        start += n
    want = torch.cat(outs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), (q, k, v)),
        torch.autograd.grad((want * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_feed_forward_and_its_gradients_are_those_of_the_plain_layers():
    torch.manual_seed(0)
    block = FeedForward(HubertConfig.base(width=24, ffn=96, heads=4, pos_conv_groups=4)).double()
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    want = block.output_dense(F.gelu(block.intermediate_dense(x)))
    got, weights = block(x), torch.randn_like(want)
    torch.testing.assert_close(got, want)
    inputs = [x, *block.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((want * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kernel", [8, 9, 128])
def test_positional_convolution_by_frequencies_is_the_plain_sum(kernel):
    torch.manual_seed(0)
    module = PositionalConv(width=24, kernel=kernel, groups=4)
    nn.init.normal_(module.conv.bias)
    frames = [300, 7, 128, 256, 129]
    packing = Packing(frames, 300, CPU)
    x_ND = torch.randn(len(packing.index_N), 24, requires_grad=True)
    assert len(x_ND) >= 4 * kernel  # else both would be the plain one
    got = module(x_ND, packing)[: packing.n_valid]
    outs = [module.conv(x.T[None])[0, :, : len(x)].T for x in x_ND[: packing.n_valid].split(frames)]
    want = F.gelu(torch.cat(outs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    weights, inputs = torch.randn_like(want), [x_ND, *module.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((want * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_a_step_is_the_same_with_the_same_seed():
    config = HubertConfig(conv_dims=(24,) * 7, width=48, layers=2, heads=4, ffn=96, pos_conv_groups=4)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = HubertModel(config).train()
        model(torch.randn(2, 16_000), [16_000, 9000]).hidden_BSD.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 40 and all(map(torch.equal, *found))
