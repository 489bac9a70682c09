"""Tests that Triton kernels equal torch's operators, on a GPU or, with TRITON_INTERPRET=1, on the CPU.

Run this file in a separate process, because triton reads TRITON_INTERPRET when the kernels are imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from jahubert.model.hubert import ConvFrontEnd, EncoderLayer, HubertConfig
from jahubert.model.kernels import Packing, dispatch, layer_norm, triton_kernels
from jahubert.model.kernels.conv_frontend import front_end
from jahubert.model.kernels.layer_norm import residual_norm
from jahubert.model.kernels.products import product
from jahubert.model.precision import autocast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16]
SIZES = [(1, 768), (7, 1024), (50, 100), (2, 1920)]
SMALL = {"conv_dims": (16,) * 7, "width": 48, "layers": 1, "heads": 4, "ffn": 96, "pos_conv_groups": 4}
STILL = dict.fromkeys(("dropout", "attention_dropout", "input_dropout", "layer_drop"), 0.0)
CONFIGS = {"base": HubertConfig.base, "large": HubertConfig.large}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def select(monkeypatch) -> Callable[[bool], None]:
    """Return a function that makes the rule select or reject the Triton kernels on `DEVICE`."""
    monkeypatch.setattr(layer_norm, "_UNCHANGED", ())

    def set_(used: bool) -> None:
        module = triton_kernels if used else None
        monkeypatch.setattr(dispatch, "_load_triton_kernels", lambda device, dtype: module)

    set_(True)
    return set_


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_rounded(actual: Tensor, expected: Tensor) -> None:
    """Check that a tensor equals float32 values up to rounding. The interpreter truncates bfloat16."""
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.float(), expected.float(), rtol=eps, atol=eps / 8)


def draw_seed() -> Tensor:
    return torch.randint(2**63 - 1, (1,), device=DEVICE)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width"), SIZES)
def test_norm_of_a_residual_sum(n, width, dtype, p):
    x, residual, grad_normed, grad_sum = (normal(n, width, dtype=dtype) for _ in range(4))
    weight, bias, seed = normal(width).requires_grad_(True), normal(width).requires_grad_(True), draw_seed()
    scale = triton_kernels.dropout_scale(x, seed, p)
    sum_, normed, moments = triton_kernels.residual_norm(x, residual, weight, bias, 1e-5, seed, p)
    assert sum_.dtype is normed.dtype is dtype
    assert_rounded(sum_, residual.float() + x.float() * scale)
    exact = sum_.float().requires_grad_(True)
    expected = F.layer_norm(exact, (width,), weight, bias, 1e-5)
    assert_rounded(normed, expected)
    expected.backward(grad_normed.float())
    for added in (None, grad_sum):
        grad_x, grad_residual, grad_weights = triton_kernels.residual_norm_backward(
            grad_normed, added, sum_, weight.detach(), moments, seed, p
        )
        total = exact.grad if added is None else exact.grad + added.float()
        assert_rounded(grad_residual, total)
        assert_rounded(grad_x, total * scale)
        torch.testing.assert_close(grad_weights, torch.stack([weight.grad, bias.grad]), rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_expected_share_and_differs_between_rows_and_seeds():
    like = normal(64, 1024)
    seeds = [draw_seed() for _ in range(2)]
    scales = [triton_kernels.dropout_scale(like, seed, 0.1) for seed in seeds]
    for scale in scales:
        kept = scale != 0
        assert float(kept.float().mean()) == pytest.approx(0.9, abs=5e-3)
        assert float(scale[kept].min()) == float(scale.max()) == pytest.approx(1 / 0.9, rel=1e-4)
        for one, other in (kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]):
            assert float((one & other).float().mean()) == pytest.approx(0.81, abs=1e-2)
    both = (scales[0] != 0) & (scales[1] != 0)
    assert float(both.float().mean()) == pytest.approx(0.81, abs=1e-2)
    assert torch.equal(triton_kernels.dropout_scale(like, seeds[0], 0.1), scales[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1024), (37, 100)])
def test_gelu_and_its_gradient(shape, dtype):
    x, grad = 3 * normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    exact = x.float().requires_grad_(True)
    expected = F.gelu(exact)
    expected.backward(grad.float())
    activated = triton_kernels.gelu_backward(x, grad)
    assert_rounded(activated, expected)
    assert_rounded(grad, exact.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width"), [(1, 768), (37, 100), (2100, 130)])
def test_column_sum(n, width, dtype):
    x = normal(n, width, dtype=dtype)
    assert_rounded(triton_kernels.column_sum(x), x.double().sum(0))


def step(forward: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the output of a function, and the gradients of its inputs."""
    output = forward()
    weights = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output.float() * weights).sum(), inputs)]


def assert_similar(actual: list[Tensor], expected: list[Tensor], tolerance: float = 0.03) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).detach().float().norm() <= tolerance * other.detach().float().norm()


def block_and_input(name: str, **options: float) -> tuple[EncoderLayer, Tensor, Packing]:
    block = EncoderLayer(CONFIGS[name](**SMALL, **STILL | options)).to(DEVICE).train()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    packing = Packing([20, 12], 20, DEVICE)
    return block, normal(packing.n_rows, 48, dtype=torch.bfloat16).requires_grad_(True), packing


def in_bfloat16(forward: Callable[..., Tensor], *args) -> Tensor:
    with autocast(torch.bfloat16, DEVICE):
        return forward(*args)


@pytest.mark.parametrize("name", CONFIGS)
def test_block_is_close_to_that_of_torchs_operators_in_float32(name, select):
    block, x_ND, packing = block_and_input(name)
    block.attention.k_proj.bias.requires_grad_(False)  # the gradient would be zero, apart from rounding
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    exact_ND = x_ND.detach().float().requires_grad_(True)
    expected = step(lambda: block(exact_ND, packing)[: packing.n_valid], [exact_ND, *parameters])
    actual = step(lambda: in_bfloat16(block, x_ND, packing)[: packing.n_valid], [x_ND, *parameters])
    assert_similar(actual, expected, 0.04)


def test_front_end_equals_that_of_torchs_operators(select):
    stack = ConvFrontEnd(HubertConfig.base(**SMALL)).to(DEVICE)
    wav_BT, results = normal(1, 1200), []
    for used in (False, True):
        select(used)
        results.append(step(lambda: in_bfloat16(front_end, stack, wav_BT, [1200]), [*stack.parameters()]))
    assert_similar(*results)


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_follows_torchs_generator_and_is_reproduced_by_checkpoints(name, select):
    block, x_ND, packing = block_and_input(name, dropout=0.3)
    forwards = [block, block, partial(checkpoint, block, use_reentrant=False)]
    results = []
    for forward in forwards:
        torch.manual_seed(3)
        output = partial(in_bfloat16, forward, x_ND, packing)
        results.append(step(lambda output=output: output()[: packing.n_valid], [x_ND, *block.parameters()]))
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))
    assert not torch.equal(in_bfloat16(block, x_ND, packing), in_bfloat16(block, x_ND, packing))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_double_backward_of_the_norm(p, select):
    x, residual = (normal(6, 32, dtype=torch.bfloat16).requires_grad_(True) for _ in range(2))
    norm, drop = nn.LayerNorm(32).to(DEVICE), nn.Dropout(p)
    inputs = x, residual, norm.weight, norm.bias
    torch.manual_seed(1)
    scale = triton_kernels.dropout_scale(x, draw_seed(), p) if p else 1.0

    def penalty(compute: Callable[[], tuple[Tensor, Tensor]]) -> list[Tensor]:
        torch.manual_seed(1)
        normed, sum_ = compute()
        loss = (normed.float() ** 3).sum() + (sum_.float() ** 2).sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        return [
            *grads,
            *torch.autograd.grad(sum(grad.float().square().sum() for grad in grads), inputs[:3]),
        ]

    def plain() -> tuple[Tensor, Tensor]:
        sum_ = residual + (x * scale).to(x.dtype)
        return F.layer_norm(sum_, (32,), norm.weight.bfloat16(), norm.bias.bfloat16()), sum_

    assert_similar(penalty(lambda: residual_norm(norm, drop, x, residual)), penalty(plain), 0.05)


def test_double_backward_of_a_linear_layer(select):
    inputs = [normal(*shape, dtype=torch.bfloat16).requires_grad_(True) for shape in ((6, 8), (5, 8), (5,))]
    results = []
    for compute in (product, F.linear):
        grads = torch.autograd.grad((compute(*inputs).float() ** 3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(grad.float().square().sum() for grad in grads), inputs)
        results.append([*grads, *second])
    assert_similar(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kernel_runs_before_the_kernels_are_used(dtype):
    triton_kernels.run_all(DEVICE, dtype)


def test_kernels_are_not_used_in_other_precisions_or_in_transforms(select):
    assert dispatch.triton_kernels_for(normal(2, 3, dtype=torch.bfloat16)) is triton_kernels
    assert dispatch.triton_kernels_for(normal(2, 3)) is None
    assert dispatch.triton_kernels_for(normal(2, 3, dtype=torch.bfloat16).T) is None
    used = []

    def record(x: Tensor) -> Tensor:
        used.append(dispatch.triton_kernels_for(torch.zeros(2, 3, dtype=torch.bfloat16, device=DEVICE)))
        return x.sum()

    torch.func.grad(record)(normal(3))
    assert used == [None]
