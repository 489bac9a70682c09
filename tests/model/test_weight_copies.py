"""Tests of low-precision and joined copies of weights, which the micro-batches of an update share."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from jahubert.model import kernels
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.model.kernels.attention import self_attention
from jahubert.model.kernels.packing import Packing

SIZES = {"conv_dims": (24,) * 7, "width": 48, "layers": 2, "heads": 4, "ffn": 96, "pos_conv_groups": 4}
NO_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "input_dropout", "layer_drop"), 0.0)
CONFIGS = {"base": HubertConfig.base(**SIZES, **NO_DROPOUT), "large": HubertConfig.large(**SIZES)}
LENGTHS = [8000, 5000]
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def waveforms(number: int) -> Tensor:
    return torch.randn(2, 8000, generator=torch.Generator().manual_seed(number))


def backward(model: HubertModel, precision: torch.dtype, number: int) -> Tensor:
    with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
        hidden_BSD = model(waveforms(number), LENGTHS).hidden_BSD
    hidden_BSD.float().square().mean().backward()
    return hidden_BSD.detach()


@pytest.fixture(params=CONFIGS)
def model(request) -> HubertModel:
    torch.manual_seed(0)
    return HubertModel(CONFIGS[request.param]).train()


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_shared_copies_give_the_same_bits(model, precision):
    results = []
    for context in (nullcontext, kernels.shared_weight_copies):
        model.zero_grad()
        with context():
            outputs = [backward(model, precision, number) for number in range(3)]
        results.append([*outputs, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 3
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


class Operations(TorchDispatchMode):
    """Mode that counts matrix products, and copies of parameters to another dtype or a joined tensor."""

    def __init__(self, model: HubertModel):
        super().__init__()
        self.storages = {p.untyped_storage().data_ptr() for p in model.encoder.layers.parameters()}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        source = args[0][0] if name == "cat" else args[0] if args else None
        if name in ("_to_copy", "cat") and source.untyped_storage().data_ptr() in self.storages:
            self.counts["copies"] += 1
        self.counts["products"] += name in ("addmm", "mm")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shared", [False, True])
def test_weights_of_the_blocks_are_copied_once_per_update(model, shared):
    """A block copies one joined weight, one joined bias, and the weights and biases of three other layers."""
    counts = []
    with kernels.shared_weight_copies(shared):
        for number in range(3):
            with Operations(model) as operations:
                backward(model, torch.bfloat16, number)
            counts.append(operations.counts["copies"])
    per_pass = (2 + 3 * 2) * model.config.layers
    assert counts == ([per_pass, 0, 0] if shared else [per_pass] * 3)


def test_queries_keys_and_values_are_one_product_in_training(model):
    packing = Packing([20, 12], 20, torch.device("cpu"))
    module, x_ND = model.encoder.layers[0].attention, torch.randn(packing.n_rows, 48)
    products, outputs = [], []
    for context in (torch.enable_grad, torch.no_grad):
        with context(), Operations(model) as operations:
            outputs.append(self_attention(module, x_ND, packing))
        products.append(operations.counts["products"])
    assert products == [2, 4]
    torch.testing.assert_close(*outputs)


def test_a_changed_weight_is_copied_again(model):
    with torch.no_grad(), kernels.shared_weight_copies(), torch.autocast("cpu", torch.bfloat16):
        before_BSD = model(waveforms(0), LENGTHS).hidden_BSD
        model.encoder.layers[1].feed_forward.intermediate_dense.weight.mul_(2.0)
        shared_BSD = model(waveforms(0), LENGTHS).hidden_BSD
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected_BSD = model(waveforms(0), LENGTHS).hidden_BSD
    assert torch.equal(shared_BSD, expected_BSD) and not torch.equal(shared_BSD, before_BSD)


def test_a_copy_made_without_gradients_is_not_used_with_gradients(model):
    with kernels.shared_weight_copies():
        with torch.no_grad():
            model(waveforms(0), LENGTHS)
        backward(model, torch.float32, 0)
    assert model.encoder.layers[0].attention.q_proj.weight.grad.abs().sum() > 0


def test_gradient_penalty_with_shared_copies(model):
    model.double()
    parameters = [p for name, p in model.named_parameters() if name != "masked_spec_embed"]
    weights_BSD = torch.randn_like(model(waveforms(0).double(), LENGTHS).hidden_BSD)
    results = []
    for context in (nullcontext, kernels.shared_weight_copies, kernels.disabled):
        wav_BT = waveforms(0).double().requires_grad_(True)
        with context():
            loss = (model(wav_BT, LENGTHS).hidden_BSD * weights_BSD).sum()
            (grad_BT,) = torch.autograd.grad(loss, wav_BT, create_graph=True)
            grads = torch.autograd.grad(grad_BT.square().sum(), parameters, materialize_grads=True)
        results.append(torch.cat([grad.flatten() for grad in grads]))
    plain = results.pop()
    for result in results:
        torch.testing.assert_close(result, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


def test_compiled_blocks_are_not_recompiled_for_shared_copies(model):
    """A compiled block makes separate copies, which the compiler can fuse."""
    block, counter = model.encoder.layers[0], CompileCounter()
    block.compile(backend=counter)
    packing = Packing([20, 12], 20, torch.device("cpu"))
    packing.fused_attention = True  # selects the code path of a GPU
    for shared in (False, True, False):
        with kernels.shared_weight_copies(shared):
            block(torch.randn(packing.n_rows, 48), packing)
    assert counter.frame_count == 1
