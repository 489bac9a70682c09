"""Tests of float32 matrix products by oneDNN against torch's products."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from jahubert.model import kernels
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.model.kernels import products

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="torch was built without oneDNN",
)


@pytest.fixture
def onednn(monkeypatch):
    """Use oneDNN for all products that are not empty, and return the list of products that it computes."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", 1)
    compute, computed = products._onednn_linear, []

    def counted(x, weight, bias=None):
        computed.append((x.shape, weight.shape))
        return compute(x, weight, bias)

    monkeypatch.setattr(products, "_onednn_linear", counted)
    return computed


@needs_onednn
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("n", [0, 1, 65])
def test_products_and_derivatives_equal_those_of_torch(onednn, has_bias, n):
    torch.manual_seed(0)
    inputs = [torch.randn(n, 48), torch.randn(24, 48), *([torch.randn(24)] if has_bias else [])]
    inputs = [x.requires_grad_() for x in inputs]
    bias = inputs[2] if has_bias else None
    weights = torch.randn(n, 24)

    def derivatives(output):
        grads = torch.autograd.grad((output.square() * weights).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)
        return [output, *grads, *second]

    found = derivatives(products.product(inputs[0], inputs[1], bias))
    assert bool(onednn) == (n > 0)
    for ours, expected in zip(found, derivatives(F.linear(inputs[0], inputs[1], bias)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@needs_onednn
def test_products_of_views_are_written_and_added(onednn):
    torch.manual_seed(0)
    a, b, out = torch.randn(40, 30).T, torch.randn(40, 20), torch.randn(60, 40)
    part = out[::2, 5:25]
    expected = a @ b
    torch.testing.assert_close(products.matmul(a, b), expected)
    products.matmul_into(part, a, b)
    torch.testing.assert_close(part, expected)
    products.matmul_into(part, a, b, add=True)
    torch.testing.assert_close(part, 2 * expected)
    bias = torch.randn(20)
    products.addmm_into(part, bias, a, b)
    torch.testing.assert_close(part, bias + expected)
    assert len(onednn) == 4


@needs_onednn
def test_other_dtypes_autocast_and_small_products_use_torch(onednn, monkeypatch):
    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    assert products.product(x.double(), weight.double(), None).dtype is torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert products.product(x, weight, None).dtype is torch.bfloat16
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", 8 * 16 * 4 + 1)
    products.product(x, weight, None)
    assert not onednn


@needs_onednn
@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("training", [True, False])
def test_model_with_onednn_equals_the_plain_modules(onednn, size, training):
    torch.manual_seed(0)
    sizes = {"conv_dims": (24,) * 7, "width": 48, "layers": 2, "heads": 4, "ffn": 96, "pos_conv_groups": 4}
    dropout = dict.fromkeys(("dropout", "attention_dropout", "input_dropout", "layer_drop"), 0.0)
    model = HubertModel(getattr(HubertConfig, size)(**sizes, **dropout, pos_conv_kernel=16)).train(training)
    wav_BT = torch.randn(2, 8_000)

    def results():
        with torch.set_grad_enabled(training):
            hidden_BSD = model(wav_BT, [8_000, 6_000]).hidden_BSD
        if not training:
            return [hidden_BSD]
        return [hidden_BSD, *torch.autograd.grad(hidden_BSD[..., :9].sum(), list(model.encoder.parameters()))]

    with kernels.disabled():
        expected = results()
    assert not onednn
    found = results()
    assert len(onednn) > 2 * 6
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
