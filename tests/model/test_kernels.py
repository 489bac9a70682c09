"""Tests of the outputs and gradients of all kernels, together and one by one, against plain modules."""

from __future__ import annotations

import pytest
import torch
from fixtures.traceable_flash import by_mask
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from jahubert.model import kernels
from jahubert.model.hubert import (
    Attention,
    ConvFrontEnd,
    FeedForward,
    HubertConfig,
    HubertModel,
    PositionalConv,
)
from jahubert.model.kernels import attention, conv_frontend, products
from jahubert.model.kernels import positional_conv as positional_conv_kernel
from jahubert.model.kernels.attention import attend, self_attention
from jahubert.model.kernels.conv_frontend import front_end
from jahubert.model.kernels.dropout import dropout, keep_mask
from jahubert.model.kernels.encoder import normalized
from jahubert.model.kernels.feed_forward import feed_forward
from jahubert.model.kernels.layer_norm import same_dtype_layer_norm
from jahubert.model.kernels.packing import Packing, Sequences
from jahubert.model.kernels.positional_conv import frequency_domain_conv, positional_conv

CPU = torch.device("cpu")
SIZES = {"conv_dims": (24,) * 7, "width": 48, "layers": 3, "heads": 4, "ffn": 96, "pos_conv_groups": 4}
NO_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "input_dropout", "layer_drop"), 0.0)
CONFIGS = {
    "base": HubertConfig.base(**SIZES, **NO_DROPOUT, pos_conv_kernel=16),
    "large": HubertConfig.large(**SIZES, conv_bias=True, pos_conv_kernel=17),
    "group norm, pre-norm": HubertConfig(**SIZES, **NO_DROPOUT, pre_norm=True, pos_conv_kernel=128),
}
HUBERT_CONVS = ((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))
ODD_CONVS = ((7, 2, 5, 1), (3, 3, 2, 2))  # wide, narrow and one-tap kernels


def randomized(module: nn.Module) -> nn.Module:
    """Randomize the norms and biases of a module, which are ones and zeros by default."""
    for name, parameter in module.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.normal_(parameter, 0.5, 0.3)
    return module


def assert_same_gradients(output: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float) -> None:
    """Compare the gradients of two randomly weighted outputs, relative to the largest value of each gradient.

    The scale is at least 1 % of the largest value of all gradients, because the gradients of a bias before a
    group norm and of the key bias in attention are zero except for rounding.
    """
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad((output * weights).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    largest = max(float(grad.abs().max()) for grad in expected_grads)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        scale = max(float(expected_grad.abs().max()), 1e-2 * largest)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("lengths", [[16_000, 400, 9_999, 20_000], [20_000, 20_000], None], ids=str)
@pytest.mark.parametrize("padding", ["ignored", "masked", "unmasked"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_model_with_kernels_equals_the_plain_model(config, training, padding, lengths):
    torch.manual_seed(0)
    model = randomized(HubertModel(config)).train(training)
    wav_BT = torch.randn(2 if lengths is None else len(lengths), 20_000)
    masks = {
        "mask_BS": torch.rand(len(wav_BT), config.grid.n_frames(20_000)) < 0.4,
        "channel_mask_BD": torch.rand(len(wav_BT), config.width) < 0.2,
    }
    assert kernels.usable(model)
    outputs = []
    for context in (torch.enable_grad, kernels.disabled):
        with context():
            encoded = model(wav_BT, lengths, **masks, keep_layers=[0, 2], padding=padding)
        outputs.append(encoded)
    fast, plain = outputs
    assert torch.equal(fast.n_frames_B, plain.n_frames_B) and fast.n_frames_B.dtype == torch.int64
    assert fast.layers.keys() == plain.layers.keys() == {0, 2}
    pairs = [(fast.hidden_BSD, plain.hidden_BSD), *((fast.layers[n], plain.layers[n]) for n in (0, 2))]
    if training:
        pairs.append((fast.conv_penalty_B, plain.conv_penalty_B))
    else:
        assert fast.conv_penalty_B is None and plain.conv_penalty_B is None
    for output, expected in pairs:
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-5)
    parameters = [p for name, p in model.named_parameters() if name != "masked_spec_embed"]
    joined = [torch.cat([x[i].flatten() for x in pairs]) for i in (0, 1)]
    assert_same_gradients(*joined, parameters, 5e-4)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_autocast_with_and_without_kernels_is_equally_close_to_float32(config, precision):
    torch.manual_seed(0)
    model = randomized(HubertModel(config)).eval()
    wav_BT, lengths = torch.randn(2, 20_000), [20_000, 9_999]
    with torch.no_grad():
        exact_BSD = model(wav_BT, lengths).hidden_BSD
        for context in (torch.no_grad, kernels.disabled):
            with context(), torch.autocast("cpu", precision):
                near_BSD = model(wav_BT, lengths).hidden_BSD
            assert 0 < float((near_BSD - exact_BSD).norm() / exact_BSD.norm()) < 0.05


def packed_front_end(stack: ConvFrontEnd, wavs: list[Tensor]) -> Tensor:
    """Apply the front end to a padded batch with NaN after the end of each waveform."""
    wav_BT = nn.utils.rnn.pad_sequence(wavs, batch_first=True, padding_value=float("nan"))
    return front_end(stack, wav_BT, [len(wav_T) for wav_T in wavs])


def front_end_config(norm: str, bias: bool, convs) -> HubertConfig:
    dims = (8, 6, 10, 4, 6, 8, 12)[: len(convs[0])]
    return HubertConfig(
        conv_dims=dims, conv_kernels=convs[0], conv_strides=convs[1], conv_bias=bias, conv_norm=norm
    )


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("convs", [HUBERT_CONVS, ODD_CONVS], ids=["hubert", "odd"])
@pytest.mark.parametrize("cached", [1, 2**20], ids=["parts", ""])
def test_front_end_equals_the_plain_modules(norm, bias, convs, cached, monkeypatch):
    monkeypatch.setattr(conv_frontend, "CACHED", cached)  # computes one row at a time, or all rows at once
    torch.manual_seed(0)
    stack = randomized(ConvFrontEnd(front_end_config(norm, bias, convs)))
    wavs = [torch.randn(n, requires_grad=True) for n in (5000, 400, 12_345, 719, 3201)]
    with kernels.disabled():
        expected = torch.cat([stack(wav_T[None])[0] for wav_T in wavs])
    output = packed_front_end(stack, wavs)[: len(expected)]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(output, expected, [*wavs, *stack.parameters()], 1e-3)


class CountCalls(TorchDispatchMode):
    """Mode that counts the calls of operators."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_number_of_operators_does_not_depend_on_the_number_of_utterances(norm, monkeypatch):
    monkeypatch.setattr(conv_frontend, "CACHED", 2**30)  # computes all rows at once, as on a GPU
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", 0)  # uses the same library for all sizes
    stack, counts = ConvFrontEnd(front_end_config(norm, False, HUBERT_CONVS)), set()
    for n_utterances in (2, 30):
        lengths = [3_000 + 100 * i for i in range(n_utterances)]
        wav_BT = torch.randn(n_utterances, lengths[-1])
        stack.zero_grad()
        with CountCalls() as count:
            front_end(stack, wav_BT, lengths).sum().backward()
        counts.add(count.calls)
    assert len(counts) == 1


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_front_end_of_a_padded_batch_has_zeros_after_each_utterance(norm):
    torch.manual_seed(0)
    stack = randomized(ConvFrontEnd(front_end_config(norm, False, HUBERT_CONVS)))
    grid, lengths = HubertConfig().grid, [8_000, 4_000]
    wav_BT = torch.randn(2, 8_000)
    output_BSC = stack(wav_BT, lengths)
    for wav_T, features_SC, n in zip(wav_BT, output_BSC, lengths, strict=True):
        torch.testing.assert_close(features_SC[: grid.n_frames(n)], stack(wav_T[None, :n])[0])
        assert not features_SC[grid.n_frames(n) :].any()


def test_group_norm_is_exact_for_quiet_sound_on_a_loud_offset():
    torch.manual_seed(0)
    config = HubertConfig(conv_dims=(8,), conv_kernels=(10,), conv_strides=(5,))
    stack, exact = ConvFrontEnd(config), ConvFrontEnd(config).double()
    exact.load_state_dict(stack.state_dict())
    quiet = (1e-3 * torch.randn(4000, dtype=torch.float64)).float()
    for offset in (0.0, 0.5):
        wav_T = quiet + offset
        with kernels.disabled():
            expected = exact(wav_T.double()[None])[0].float()
        torch.testing.assert_close(
            packed_front_end(stack, [wav_T])[: len(expected)], expected, rtol=0, atol=2e-3
        )


def test_silence_stays_finite():
    torch.manual_seed(0)
    stack = ConvFrontEnd(HubertConfig(conv_dims=(8, 8), conv_kernels=(10, 3), conv_strides=(5, 2)))
    output = packed_front_end(stack, [torch.zeros(1000), torch.full((1000,), 0.25)])
    assert output.isfinite().all()
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in stack.parameters())


def test_normalization_on_a_gpu_is_one_computation():
    """The meta device, which has no data, stands for a GPU."""
    model, counts = HubertModel(HubertConfig.large(**SIZES)), set()
    for n in (2, 20):
        with CountCalls() as mode:
            wav_BT = torch.empty(n, 9_000, device="meta")
            assert normalized(model, wav_BT, [9_000, *[400] * (n - 1)]).shape == (n, 9_000)
        counts.add(mode.calls)
    assert len(counts) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_normalization_of_a_batch_equals_that_of_each_waveform(dtype):
    torch.manual_seed(0)
    model, lengths = HubertModel(HubertConfig.large(**SIZES)), [400, 300_000, 90_000]
    wav_BT = 0.5 + torch.randn(3, 310_000)
    expected_BT = normalized(model, wav_BT, lengths)
    actual_BT = model.normalize_padded(wav_BT.to(dtype), torch.tensor(lengths))
    assert actual_BT.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(actual_BT.float(), expected_BT, rtol=tolerance, atol=tolerance)


def test_gradient_of_a_long_utterance_is_summed_in_float32():
    """A bfloat16 sum over many tiles would stop growing at 256 times the summand."""
    torch.manual_seed(0)
    stack = ConvFrontEnd(HubertConfig(conv_dims=(64,), conv_kernels=(10,), conv_strides=(5,)))
    wav_T, grads = torch.randn(480_000), []
    for lower in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            total = packed_front_end(stack, [wav_T]).float().sum()
        grads.append(torch.autograd.grad(total, stack.conv_layers[0].layer_norm.bias)[0])
    assert (grads[1] - grads[0]).norm() < 5e-4 * grads[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_equals_the_plain_module(dtype):
    torch.manual_seed(0)
    n_frames = [33, 5, 64, 40, 64, 1]
    packing = Packing(n_frames, 70, CPU)
    assert packing.n_rows == 256 and packing.n_valid == sum(n_frames)
    module = randomized(Attention(HubertConfig(width=16, heads=2, pos_conv_groups=1))).eval()
    x_ND = torch.randn(packing.n_rows, 16, requires_grad=True)
    valid_BS = torch.arange(70) < torch.tensor(n_frames)[:, None]
    expected = packing.pack(module(packing.unpack(x_ND), valid_BS))[: packing.n_valid]
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        output = self_attention(module, x_ND, packing)[: packing.n_valid].float()
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    assert_same_gradients(output, expected, [x_ND, *module.parameters()], 2 * tolerance)


@pytest.mark.parametrize("cached", [1, 5000, 2**19])
def test_attention_with_dropout_is_plain_attention_with_the_same_mask(cached, monkeypatch):
    monkeypatch.setattr(attention, "CACHED", cached)  # limits the number of heads computed at once
    torch.manual_seed(0)
    packing = Packing([33, 5, 64, 40], 70, CPU)
    q, k, v = (torch.randn(packing.n_rows, 2, 8, requires_grad=True) for _ in range(3))
    torch.manual_seed(1)
    output = attend(q, k, v, packing, 0.25)[: packing.n_valid]
    torch.manual_seed(1)
    keep = {32: keep_mask((2, 32, 32), 0.25), 64: keep_mask((3 * 2, 64, 64), 0.25)}
    outs, start = [], 0
    for n, (size, first) in zip([33, 5, 64, 40], [(64, 0), (32, 0), (64, 4), (64, 2)], strict=True):
        one_q, one_k, one_v = (x[start : start + n].transpose(0, 1) for x in (q, k, v))
        weights = torch.softmax(one_q @ one_k.transpose(1, 2) / 8**0.5, dim=-1)
        outs.append(((weights * keep[size][first : first + 2, :n, :n] / 0.75) @ one_v).transpose(0, 1))
        start += n
    expected = torch.cat(outs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(output, expected, [q, k, v], 1e-5)


@pytest.mark.parametrize("n_frames", [[33, 5, 64, 40, 64, 1], [64, 64]], ids=["mixed", "no filler"])
def test_flash_attention_gets_the_utterances_as_sequences(n_frames, monkeypatch):
    """A CPU implementation replaces torch's CUDA-only operator."""

    def reference(q_NHE, k_NHE, v_NHE, offsets, longest, dropout):
        assert offsets.dtype is torch.int32 and longest == 64 and dropout == 0.0
        lengths = offsets.diff().tolist()
        assert all(lengths) and sum(lengths) == len(q_NHE)
        parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q_NHE, k_NHE, v_NHE)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 1).transpose(0, 1)

    monkeypatch.setattr(attention, "flash_attention", reference)
    torch.manual_seed(0)
    packing = Packing(n_frames, 70, CPU)
    inputs = [torch.randn(packing.n_rows, 2, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    expected = attend(*inputs, packing, 0.0)[: packing.n_valid].float()
    packing.flash = Sequences.of(packing)
    output = attend(*inputs, packing, 0.0)[: packing.n_valid].float()
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
    assert_same_gradients(output, expected, inputs, 0.02)
    in_float32 = [x.detach().float() for x in inputs]
    monkeypatch.setattr(attention, "flash_attention", None)  # must not be called in float32
    assert attend(*in_float32, packing, 0.0).dtype == torch.float32


@pytest.mark.parametrize("n_frames", [[33, 5, 64, 40, 64, 1], [64, 64]], ids=["mixed", "no filler"])
def test_float32_inference_uses_efficient_attention(n_frames, monkeypatch):
    """A CPU implementation replaces torch's CUDA-only operator."""
    calls = []

    def reference(q_NHE, k_NHE, v_NHE, offsets, longest, dropout):
        assert offsets.dtype is torch.int32
        calls.append((longest, dropout))
        return by_mask(q_NHE, k_NHE, v_NHE, offsets, longest, dropout)

    monkeypatch.setattr(attention, "efficient_attention", reference)
    torch.manual_seed(0)
    packing = Packing(n_frames, 70, CPU)
    inputs = [torch.randn(packing.n_rows, 2, 8) for _ in range(3)]
    expected = attend(*inputs, packing, 0.0)[: packing.n_valid]
    packing.efficient = Sequences.of(packing)
    with torch.no_grad():
        output = attend(*inputs, packing, 0.0)[: packing.n_valid]
        attend(*inputs, packing, 0.1)
        for other in (torch.bfloat16, torch.float64):
            attend(*(x.to(other) for x in inputs), packing, 0.0)
        attend(*(x[..., :6] for x in inputs), packing, 0.0)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    attend(*(x.requires_grad_() for x in inputs), packing, 0.0).sum().backward()
    assert calls == [(64, 0.0), (64, 0.1)] and inputs[0].grad is not None


def test_efficient_attention_of_torch_accepts_the_sequences():
    """Only GPUs have the operator, but its arguments can be checked on the meta device."""
    packing = Packing([33, 5, 64], 70, torch.device("meta"))
    inputs = [torch.empty(packing.n_rows, 2, 8, device="meta") for _ in range(3)]
    output = attention.efficient_attention(*inputs, *Sequences.of(packing), 0.0)
    assert output.shape == inputs[0].shape and output.dtype is torch.float32


def test_unpacking_restores_the_packed_batch():
    packing = Packing([3, 5, 1], 6, CPU)
    x_BSD = torch.arange(3 * 6 * 2.0).view(3, 6, 2)
    unpacked = packing.unpack(packing.pack(x_BSD))
    for row, n in enumerate([3, 5, 1]):
        torch.testing.assert_close(unpacked[row, :n], x_BSD[row, :n])
        assert (unpacked[row, n:] == 0).all()


def test_feed_forward_equals_the_plain_module():
    torch.manual_seed(0)
    module = FeedForward(HubertConfig.base(width=24, ffn=96, heads=4, pos_conv_groups=4)).double()
    x_ND = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    output, expected = feed_forward(module, x_ND), module(x_ND)
    torch.testing.assert_close(output, expected)
    assert_same_gradients(output, expected, [x_ND, *module.parameters()], 1e-7)


@pytest.mark.parametrize("kernel", [8, 9, 128])
@pytest.mark.parametrize("function", [positional_conv, frequency_domain_conv])
def test_positional_convolution_equals_the_plain_module(kernel, function):
    torch.manual_seed(0)
    module = randomized(
        PositionalConv(HubertConfig(width=24, heads=4, pos_conv_kernel=kernel, pos_conv_groups=4))
    )
    n_frames = [300, 7, 128, 256, 129] if function is frequency_domain_conv else [30, 7, 12]
    packing = Packing(n_frames, max(n_frames), CPU)
    x_ND = torch.randn(packing.n_rows, 24, requires_grad=True)
    output = function(module, x_ND, packing)[: packing.n_valid]
    expected = packing.pack(module(packing.unpack(x_ND)))[: packing.n_valid]
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(output, expected, [x_ND, *module.parameters()], 1e-5)


@pytest.mark.parametrize("has_amx", [True, False])
def test_positional_convolution_in_bfloat16_is_close_to_float32(has_amx, monkeypatch):
    monkeypatch.setattr(positional_conv_kernel, "cpu_has_amx", lambda: has_amx)
    torch.manual_seed(0)
    module = randomized(
        PositionalConv(HubertConfig(width=64, heads=4, pos_conv_kernel=16, pos_conv_groups=4))
    )
    packing = Packing([70, 9, 40], 70, CPU)
    x_ND = torch.randn(packing.n_rows, 64).bfloat16().requires_grad_()
    grad_ND = torch.randn(packing.n_valid, 64)

    def with_gradients(output: Tensor) -> list[Tensor]:
        output = output[: packing.n_valid]
        return [output, *torch.autograd.grad(output, [x_ND, *module.parameters()], grad_ND.to(output.dtype))]

    with torch.autocast("cpu", torch.bfloat16):
        results = with_gradients(positional_conv(module, x_ND, packing))
        with torch.no_grad():
            inferred = positional_conv(module, x_ND, packing)[: packing.n_valid]
    assert results[0].dtype is inferred.dtype is torch.bfloat16
    assert (inferred.float() - results[0].float()).norm() < 0.015 * inferred.float().norm()
    expected = with_gradients(packing.pack(module(packing.unpack(x_ND.float()))))
    for lower, exact in zip(results, expected, strict=True):
        assert (lower.float() - exact.float()).norm() < 0.015 * exact.float().norm()


def test_layer_norm_in_bfloat16_is_close_to_float32():
    torch.manual_seed(0)
    norm, x_ND, grad_ND = nn.LayerNorm(48), torch.randn(70, 48) + 5, torch.randn(70, 48)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        x = x_ND.bfloat16().to(dtype).requires_grad_()
        y = same_dtype_layer_norm(norm, x)
        assert y.dtype is dtype
        results.append([y, *torch.autograd.grad(y, [x, norm.weight, norm.bias], grad_ND.to(dtype))])
    for exact, lower in zip(*results, strict=True):
        error = (lower.float() - exact).norm() / exact.norm()
        assert error < 0.02


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_dropout_has_the_right_rate_mean_and_gradient(p):
    torch.manual_seed(0)
    x = torch.rand(400, 1001, requires_grad=True)
    y = dropout(nn.Dropout(p), x)
    dropped = (y == 0).float()
    n = x.numel()
    assert abs(dropped.mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5
    # Neighboring values share a 64-bit random number, but must be independent.
    both = (dropped[:, 1:] * dropped[:, :-1]).mean().item()
    assert abs(both - p * p) < 5 * (p * p / n) ** 0.5
    torch.testing.assert_close(y, (x / (1 - p)) * (1 - dropped), rtol=1e-3, atol=0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, (1 - dropped) / (1 - p), rtol=1e-3, atol=0)
    assert torch.equal(dropout(nn.Dropout(p).eval(), x), x)


def test_dropout_follows_the_seed():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(nn.Dropout(0.3), torch.ones(999)))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_training_step_follows_the_seed():
    config = HubertConfig(**SIZES | {"layers": 2})
    grads = []
    for _ in range(2):
        torch.manual_seed(0)
        model = HubertModel(config).train()
        model(torch.randn(2, 16_000), [16_000, 9000]).hidden_BSD.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 40 and all(map(torch.equal, *grads))
