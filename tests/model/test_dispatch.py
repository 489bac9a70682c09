"""Tests that adapters, hooks, transforms, export and pickling work as for an ordinary nn.Module."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from jahubert.model import kernels
from jahubert.model.heads import HubertForCtc, UnitHead
from jahubert.model.hubert import ConvFrontEnd, Encoded, HubertConfig, HubertModel
from jahubert.model.kernels import dispatch
from jahubert.model.precision import quantize_int8

SIZES = {"conv_dims": (24,) * 7, "width": 48, "layers": 2, "heads": 4, "ffn": 96, "pos_conv_groups": 4}
NO_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "input_dropout", "layer_drop"), 0.0)
CONFIGS = {"base": HubertConfig.base(**SIZES, **NO_DROPOUT), "large": HubertConfig.large(**SIZES)}
LENGTHS = [8000, 4000]
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


@pytest.fixture(params=CONFIGS)
def model(request) -> HubertModel:
    torch.manual_seed(0)
    return HubertModel(CONFIGS[request.param]).train()


@pytest.fixture
def base() -> HubertModel:
    torch.manual_seed(0)
    return HubertModel(CONFIGS["base"]).eval()


@pytest.fixture
def wav_BT() -> Tensor:
    return torch.randn(2, 8000, generator=torch.Generator().manual_seed(1))


class Lora(nn.Module):
    """A frozen linear layer with a low-rank update."""

    def __init__(self, linear: nn.Linear, rank: int = 2):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(0.3 * torch.randn(rank, linear.in_features))
        self.up = nn.Parameter(0.3 * torch.randn(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.down.T @ self.up.T

    def merged(self) -> nn.Linear:
        linear = copy.deepcopy(self.linear)
        linear.weight.data += self.up.detach() @ self.down.detach()
        return linear


def replace_modules(model: nn.Module, kind: type, replacement) -> int:
    """Replace every module whose type is exactly `kind`, and return the number of replacements."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, replacement(child))
                count += 1
    return count


def test_lora_on_every_linear_layer_learns_and_equals_merged_weights(model, wav_BT):
    ctc = HubertForCtc(model.config, 11, model).requires_grad_(False)
    assert replace_modules(ctc, nn.Linear, Lora) == 2 + 6 * model.config.layers
    assert not kernels.usable(ctc.hubert) and kernels.usable(ctc.hubert.feature_extractor)
    logp_BSV, _ = ctc(wav_BT, LENGTHS)
    with torch.no_grad():
        torch.testing.assert_close(ctc(wav_BT, LENGTHS)[0], logp_BSV, **TOLERANCE)
    (logp_BSV * torch.randn_like(logp_BSV)).sum().backward()
    for name, parameter in ctc.named_parameters():
        if name.endswith((".down", ".up")):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None
    replace_modules(ctc, Lora, Lora.merged)
    assert kernels.usable(ctc.hubert)
    torch.testing.assert_close(ctc(wav_BT, LENGTHS)[0], logp_BSV, **TOLERANCE)


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_of_every_module_are_called_and_change_nothing(model, wav_BT, register):
    expected = model(wav_BT, LENGTHS)
    called: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}

    def hook(name: str, module: nn.Module, args, output=None) -> None:
        called.append(name)
        if register == "register_forward_hook" and isinstance(output, Tensor):
            shapes[name] = tuple(output.shape)

    names = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            names.append(name)
            getattr(module, register)(partial(hook, name))
    wav_BT.requires_grad_(True)  # gives the model's own backward hook an input gradient
    encoded = model(wav_BT, LENGTHS)
    encoded.hidden_BSD.sum().backward()
    assert set(names) - {""} <= set(called)
    torch.testing.assert_close(encoded.hidden_BSD, expected.hidden_BSD, **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(model(wav_BT, LENGTHS).hidden_BSD, encoded.hidden_BSD, **TOLERANCE)
    if shapes:
        assert shapes["encoder.layers.1.attention"] == tuple(encoded.hidden_BSD.shape)


def test_encoder_hook_keeps_the_front_end_kernels(base):
    handle = base.encoder.layers[1].register_forward_hook(lambda *_: None)
    assert not kernels.usable(base) and kernels.usable(base.feature_extractor)
    handle.remove()
    assert kernels.usable(base)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class OwnFrontEnd(ConvFrontEnd):
    pass


class OwnTensor(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs)


def double_weight(model: HubertModel) -> None:
    parametrize.register_parametrization(
        model.encoder.layers[0].feed_forward.output_dense, "weight", Doubled()
    )


def patch_forward(model: HubertModel) -> None:
    feed_forward = model.encoder.layers[0].feed_forward
    feed_forward.forward = partial(feed_forward.forward)


def subclass_module(model: HubertModel) -> None:
    front_end = OwnFrontEnd(model.config)
    front_end.load_state_dict(model.feature_extractor.state_dict())
    model.feature_extractor = front_end


def subclass_tensor(model: HubertModel) -> None:
    linear = model.encoder.layers[0].attention.q_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(OwnTensor))


def patch_block(model: HubertModel) -> None:
    model.encoder.layers[0].forward = partial(model.encoder.layers[0].forward)


CHANGES = [double_weight, patch_forward, subclass_module, subclass_tensor, patch_block]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_modules_are_not_bypassed(base, wav_BT, change):
    expected_BSD = base(wav_BT, LENGTHS).hidden_BSD
    change(base)
    assert not kernels.usable(base)
    hidden_BSD = base(wav_BT, LENGTHS).hidden_BSD
    if change is double_weight:
        assert float((hidden_BSD - expected_BSD).detach().abs().max()) > 1e-3
    else:
        torch.testing.assert_close(hidden_BSD.as_subclass(Tensor), expected_BSD, **TOLERANCE)


def test_pruned_layers_are_not_bypassed(base, wav_BT):
    for module in list(base.modules()):
        if isinstance(module, nn.Linear | nn.Conv1d):
            prune.l1_unstructured(module, "weight", amount=0.5)
    pruned_BSD = base(wav_BT, LENGTHS).hidden_BSD
    pruned_BSD.sum().backward()
    assert base.encoder.layers[0].feed_forward.output_dense.weight_orig.grad is not None
    for module in list(base.modules()):
        if isinstance(module, nn.Linear | nn.Conv1d):
            prune.remove(module, "weight")
    assert kernels.usable(base)
    torch.testing.assert_close(base(wav_BT, LENGTHS).hidden_BSD, pruned_BSD, **TOLERANCE)


def test_int8_output_is_close(base, wav_BT):
    quantized = quantize_int8(base, torch.device("cpu"))
    with torch.inference_mode():
        exact_BSD, hidden_BSD = (m(wav_BT, LENGTHS).hidden_BSD for m in (base, quantized))
    assert 0 < float((hidden_BSD - exact_BSD).norm() / exact_BSD.norm()) < 0.1


def test_wrapped_blocks_keep_the_kernels(base):
    """Activation checkpointing and FSDP2 wrap the blocks in training."""
    for block in base.encoder.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert kernels.usable(base)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for block in base.encoder.layers:
            fully_shard(block)
        assert kernels.usable(base)
    finally:
        torch.distributed.destroy_process_group()


def test_torch_func_grad_and_vmap_equal_autograd(model, wav_BT):
    parameters = dict(model.eval().named_parameters())
    weights = torch.randn(2, model.config.grid.n_frames(8000), model.config.width)

    def loss(parameters: dict[str, Tensor], wav_BT: Tensor, weights: Tensor) -> Tensor:
        return (torch.func.functional_call(model, parameters, (wav_BT,)).hidden_BSD * weights).sum()

    expected = torch.autograd.grad(
        loss(parameters, wav_BT, weights), list(parameters.values()), allow_unused=True
    )
    grads = torch.func.grad(loss)(parameters, wav_BT, weights)
    per_utterance = torch.func.vmap(
        torch.func.grad(lambda p, wav_T, weight_SD: loss(p, wav_T[None], weight_SD[None])), (None, 0, 0)
    )(parameters, wav_BT, weights)
    for name, expected_grad in zip(parameters, expected, strict=True):
        if name == "masked_spec_embed":
            assert expected_grad is None
            continue
        atol = 5e-4 * float(expected_grad.abs().max()) + 1e-3
        torch.testing.assert_close(grads[name], expected_grad, rtol=0, atol=atol)
        torch.testing.assert_close(per_utterance[name].sum(0), expected_grad, rtol=0, atol=atol)


def second_order_gradients(module: nn.Module, output, inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Return the gradients of a gradient penalty: the squared norm of the gradients of a weighted output."""
    grads = torch.autograd.grad((output() * weights).sum(), inputs, create_graph=True)
    penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
    parameters = [p for name, p in module.named_parameters() if name != "masked_spec_embed"]
    return list(torch.autograd.grad(penalty, [*inputs, *parameters], materialize_grads=True))


def assert_equal_to_scale(grads: list[Tensor], expected_grads: list[Tensor], tolerance: float) -> None:
    """Compare each gradient with a tolerance relative to its largest value.

    The scale is at least 1 % of the largest value of all gradients, as some are zero except for rounding.
    """
    largest = max(float(grad.abs().max()) for grad in expected_grads)
    for grad, expected in zip(grads, expected_grads, strict=True):
        scale = max(float(expected.abs().max()), 1e-2 * largest)
        torch.testing.assert_close(grad, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("head", [False, True], ids=["HubertModel", "HubertForCtc"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["", "lengths"])
def test_gradient_penalty_with_kernels_equals_the_plain_model(model, wav_BT, head, lengths):
    module = (HubertForCtc(model.config, 11, model) if head else model).double()
    wav_BT = wav_BT.double().requires_grad_(True)

    def output() -> Tensor:
        return module(wav_BT, lengths)[0] if head else module(wav_BT, lengths).hidden_BSD

    assert kernels.usable(model)
    weights = torch.randn_like(output())
    grads = second_order_gradients(module, output, [wav_BT], weights)
    with kernels.disabled():
        expected = second_order_gradients(module, output, [wav_BT], weights)
    assert_equal_to_scale(grads, expected, 1e-5)


def test_gradient_penalty_with_adapters_equals_the_unfused_model(model, wav_BT):
    module = model.double()
    replace_modules(module, nn.Linear, Lora)
    module.double()
    wav_BT = wav_BT.double().requires_grad_(True)

    def output() -> Tensor:
        return module(wav_BT, LENGTHS).hidden_BSD

    weights = torch.randn_like(output())
    grads = second_order_gradients(module.requires_grad_(True), output, [wav_BT], weights)
    with kernels.disabled():
        expected = second_order_gradients(module, output, [wav_BT], weights)
    assert_equal_to_scale(grads, expected, 1e-5)


def test_loss_with_gradient_penalty_has_finite_gradients(model, wav_BT):
    """The loss has first-order and second-order terms, and the model uses dropout."""
    config = HubertConfig(**{**vars(model.config), "dropout": 0.1, "attention_dropout": 0.1})
    module = HubertModel(config).train()
    wav_BT.requires_grad_(True)
    loss = module(wav_BT, LENGTHS).hidden_BSD.square().mean()
    (grad_BT,) = torch.autograd.grad(loss, wav_BT, create_graph=True)
    (loss + grad_BT.square().sum()).backward()
    for name, parameter in module.named_parameters():
        assert name == "masked_spec_embed" or parameter.grad.isfinite().all(), name


def test_vectorized_jacobian_equals_the_rowwise_one(base, wav_BT):
    def output(wav_BT: Tensor) -> Tensor:
        return base(wav_BT, LENGTHS).hidden_BSD[0, :2, :3]

    jacobians = [
        torch.autograd.functional.jacobian(output, wav_BT, vectorize=vectorize) for vectorize in (False, True)
    ]
    torch.testing.assert_close(*jacobians, rtol=1e-3, atol=1e-4)


def test_torch_func_jvp_equals_jacrev_and_finite_differences(wav_BT):
    torch.manual_seed(0)
    # In this model, the gradient into the conv stack is not scaled.
    model = HubertModel(CONFIGS["large"]).eval()
    direction_BT = torch.randn_like(wav_BT)

    def output(wav_BT: Tensor) -> Tensor:
        return model(wav_BT, LENGTHS).hidden_BSD[..., 0]

    value_BS, derivative_BS = torch.func.jvp(output, (wav_BT,), (direction_BT,))
    torch.testing.assert_close(value_BS, output(wav_BT), **TOLERANCE)
    step = 1e-2
    difference_BS = (output(wav_BT + step * direction_BT) - output(wav_BT - step * direction_BT)) / (2 * step)
    torch.testing.assert_close(
        derivative_BS, difference_BS, rtol=0, atol=0.05 * float(derivative_BS.abs().max())
    )
    jacobian = torch.func.jacrev(lambda wav_BT: output(wav_BT)[:, :3])(wav_BT)
    product = (jacobian * direction_BT).sum((-1, -2))
    torch.testing.assert_close(product, derivative_BS[:, :3], rtol=1e-3, atol=1e-3)


def test_hessian_by_torch_func_equals_double_backward(base, wav_BT):
    """torch.func uses the plain modules, and double backward goes through the kernels."""
    mask_BS = torch.arange(24).expand(2, -1) < 4

    def loss(embedding_D: Tensor) -> Tensor:
        parameters = {"masked_spec_embed": embedding_D}
        encoded = torch.func.functional_call(base, parameters, (wav_BT, LENGTHS), {"mask_BS": mask_BS})
        return encoded.hidden_BSD[..., 0].square().sum()

    embedding_D = base.masked_spec_embed.detach()
    hessian_DD = torch.func.hessian(loss)(embedding_D)
    torch.testing.assert_close(hessian_DD, hessian_DD.T, rtol=1e-3, atol=1e-4)
    by_kernels_DD = torch.autograd.functional.hessian(loss, embedding_D)
    torch.testing.assert_close(by_kernels_DD, hessian_DD, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["", "lengths"])
def test_exported_program_equals_the_model(base, wav_BT, lengths):
    with torch.no_grad():
        program = torch.export.export(base, (wav_BT, lengths))
        exported = program.module()(wav_BT, lengths)
        expected = base(wav_BT, lengths)
    assert isinstance(exported, Encoded)
    torch.testing.assert_close(exported.hidden_BSD, expected.hidden_BSD, **TOLERANCE)
    assert torch.equal(exported.n_frames_B, expected.n_frames_B)


@pytest.mark.parametrize("padded", [False, True], ids=["", "lengths"])
def test_one_exported_program_serves_all_sizes(model, wav_BT, padded):
    """The program works for any number of utterances and samples, and for any lengths."""
    model.eval()
    sizes = {0: torch.export.Dim("utterances", max=64), 1: torch.export.Dim("samples", min=720)}
    lengths = torch.tensor(LENGTHS) if padded else None
    dynamic = (sizes, {0: sizes[0]} if padded else None)
    with torch.no_grad():
        program = torch.export.export(model, (wav_BT, lengths), dynamic_shapes=dynamic).module()
        for batch, n_samples in ((2, 8000), (3, 12_345), (5, 720)):
            other_BT = torch.randn(batch, n_samples)
            if padded:
                lengths = torch.linspace(400, n_samples, batch).long()
            exported, expected = program(other_BT, lengths), model(other_BT, lengths)
            torch.testing.assert_close(exported.hidden_BSD, expected.hidden_BSD, **TOLERANCE)
            assert torch.equal(exported.n_frames_B, expected.n_frames_B)


def test_traced_model_equals_the_model(base, wav_BT):
    ctc = HubertForCtc(base.config, 11, base).eval()
    traced = torch.jit.trace(ctc, (wav_BT,), check_trace=False)
    torch.testing.assert_close(traced(wav_BT)[0], ctc(wav_BT)[0], **TOLERANCE)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same(model, wav_BT, copied):
    ctc = HubertForCtc(model.config, 11, model)
    other = copied(ctc)
    assert kernels.usable(other.hubert)
    assert torch.equal(other(wav_BT, LENGTHS)[0], ctc(wav_BT, LENGTHS)[0])
    assert other.state_dict().keys() == ctc.state_dict().keys()


class FramesOf(Dataset):
    """Dataset of model outputs that a worker process computes."""

    def __init__(self, model: nn.Module, wav_BT: Tensor):
        self.model, self.wav_BT = model, wav_BT

    def __len__(self) -> int:
        return len(self.wav_BT)

    def __getitem__(self, row: int) -> Tensor:
        with torch.inference_mode():
            output = self.model(self.wav_BT[row : row + 1])
        frames_SD = output.hidden_BSD[0] if isinstance(output, Encoded) else output[0][0]
        return frames_SD.clone()


def test_models_run_in_spawned_workers(base, wav_BT):
    ctc = HubertForCtc(base.config, 11, base).eval()
    for model in (base, ctc):
        frames = FramesOf(model, wav_BT)
        loader = DataLoader(
            frames,
            batch_size=None,
            num_workers=1,
            multiprocessing_context=multiprocessing.get_context("spawn"),
        )
        outputs = list(loader)
        for output, expected in zip(outputs, map(frames.__getitem__, range(2)), strict=True):
            torch.testing.assert_close(output, expected, **TOLERANCE)


@pytest.fixture
def default_meta_device():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("default_meta_device")
@pytest.mark.parametrize("context", [torch.enable_grad, kernels.disabled])
def test_default_device_does_not_change_the_result(context):
    """A step creates all tensors on the device of the model or explicitly on the CPU."""
    assert HubertModel(CONFIGS["base"]).masked_spec_embed.is_meta
    with torch.device("cpu"):
        torch.manual_seed(0)
        model, head = HubertModel(HubertConfig.base(**SIZES)).train(), UnitHead(48, 5)
        wav_BT, mask_BS = torch.randn(2, 8000), torch.rand(2, 24) < 0.5
    with context():
        hidden_BSD = model(wav_BT, LENGTHS, mask_BS=mask_BS).hidden_BSD
    head(hidden_BSD.flatten(0, 1)).sum().backward()
    assert model.masked_spec_embed.grad.device.type == "cpu"


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_hook_for_all_modules_switches_kernels_off_in_every_version_of_torch(model, register, monkeypatch):
    """torch 2.6 has the same dictionaries of global hooks, but not the function that checks all of them."""
    monkeypatch.delattr(nn.modules.module, "_has_any_global_hook", raising=False)
    assert kernels.usable(model)
    handle = register(lambda *_: None)
    try:
        assert not kernels.usable(model)
    finally:
        handle.remove()
    assert kernels.usable(model)


def test_without_triton_a_warning_states_the_cause_once(caplog):
    """The device does not exist, so compilation fails even if triton is installed."""
    device = torch.device("cuda", 63)
    dispatch._load_triton_kernels.cache_clear()
    assert [dispatch._load_triton_kernels(device, torch.bfloat16) for _ in range(3)] == [None] * 3
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "cuda:63" in record.message and "Error" in record.message


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_triton_is_not_needed_on_other_devices(device, caplog):
    x = torch.zeros(2, 3, dtype=torch.bfloat16, device=device)
    assert dispatch.triton_kernels_for(x) is None and not caplog.records
