"""Tests that tensors stay on the selected device, and that the results equal those on the CPU.

The device is simulated on the CPU (`fixtures.fake_device`), unless JAHUBERT_TEST_CUDA names a GPU.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.sounds import syllables
from fixtures.traceable_flash import by_mask
from torch import Tensor, nn
from torch.nn import functional as F

import jahubert
from jahubert.frames import HUBERT
from jahubert.inference.ctc import beam_search, forced_align, greedy
from jahubert.model import centroids
from jahubert.model.heads import HubertForCtc
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.model.kernels import PackedShape, attention, dispatch, packing
from jahubert.model.kernels.packing import Packing
from jahubert.model.precision import autocast
from jahubert.train.clustering import lloyd as lloyd_module
from jahubert.train.clustering.features import HubertLayer, Mfcc
from jahubert.train.clustering.kmeans import assign, fit_kmeans
from jahubert.train.clustering.lloyd import KmeansOptions
from jahubert.train.data.batches import CtcBatch, PretrainBatch, pad
from jahubert.train.data.masking import seeded_rng, span_mask
from jahubert.train.data.sampler import BatchSizes, MicroBatch, Sampler
from jahubert.train.stages.finetune import FineTuner
from jahubert.train.stages.pretrain import Pretrainer
from jahubert.train.trainer.loader import DeviceCopy
from jahubert.train.trainer.optim import TrainConfig
from jahubert.train.trainer.parallel import (
    can_compile,
    compiled_graphs,
    failed_compilations,
    wrap_blocks,
)
from jahubert.train.trainer.trainer import train

UNITS = 7
STILL = dict.fromkeys(("dropout", "attention_dropout", "input_dropout", "layer_drop"), 0.0)
SMALL = {"conv_dims": (32,) * 7, "width": 64, "layers": 2, "heads": 4, "ffn": 96, "pos_conv_groups": 4}
MODELS = {"base": HubertConfig.base(**SMALL, **STILL), "large": HubertConfig.large(**SMALL, **STILL)}


@pytest.fixture
def device(monkeypatch) -> Iterator[torch.device]:
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield torch.device("cuda", 0)
        return
    fake_device = pytest.importorskip(
        "fixtures.fake_device", reason="this torch has no Python device backends", exc_type=ImportError
    )
    # Views created in inference mode do not support tensor subclasses.
    monkeypatch.setattr(torch, "inference_mode", lambda on=True: torch.no_grad() if on else nullcontext())
    with fake_device.FakeDeviceMode():
        yield fake_device.DEVICE


def wavs() -> list[Tensor]:
    return [syllables(seconds, seed) for seed, seconds in enumerate((1.6, 0.7, 1.1))]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach().cpu(), expected.detach(), rtol=1e-4, atol=1e-5)


def gradients(module: nn.Module, batch: PretrainBatch | CtcBatch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = module(batch, 0)
    loss.total.backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return loss.total, grads


def assert_same_step(module: nn.Module, batch: PretrainBatch | CtcBatch, device: torch.device) -> None:
    on_device = copy.deepcopy(module).to(device)
    expected_loss, expected_grads = gradients(module, batch)
    loss, grads = gradients(on_device, batch.to(device))
    assert_close(loss, expected_loss)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert grad.device.type == device.type
        expected = expected_grads[name]
        atol = 1e-3 * float(expected.abs().max()) + 1e-6
        torch.testing.assert_close(grad.cpu(), expected, rtol=0, atol=atol, msg=name)


def pretrain_batch(seed: int = 0) -> PretrainBatch:
    masks, units = [], []
    for i, wav_T in enumerate(wavs()):
        rng, n_frames = seeded_rng(seed, i), HUBERT.n_frames(len(wav_T))
        masks.append(torch.from_numpy(span_mask(n_frames, 0.5, 5, rng, 1)))
        units.append(torch.from_numpy(rng.integers(UNITS, size=int(masks[-1].sum()))))
    return PretrainBatch(pad(wavs()), torch.tensor([len(w) for w in wavs()]), pad(masks), torch.cat(units))


@pytest.mark.parametrize("name", MODELS)
def test_pretraining_step_equals_that_on_the_cpu(name, device):
    assert_same_step(pretrainer(MODELS[name]), pretrain_batch(), device)


@pytest.fixture
def flash_calls(device, monkeypatch) -> list[float]:
    """Return a list to which calls of flash attention append their dropout.

    Without a GPU, `by_mask` computes flash attention.
    """
    compute, calls = attention.flash_attention, []
    if device.type != "cuda":
        monkeypatch.setattr(packing, "has_flash_attention", lambda device: device.type != "cpu")
        compute = by_mask
    elif not packing.has_flash_attention(device):
        pytest.skip("this GPU has no flash attention")

    def recorded(q_NHE, k_NHE, v_NHE, offsets, longest, dropout):
        assert offsets.dtype is torch.int32 and offsets.device == q_NHE.device
        calls.append(dropout)
        return compute(q_NHE, k_NHE, v_NHE, offsets, longest, dropout)

    monkeypatch.setattr(attention, "flash_attention", recorded)
    return calls


def pretrainer(config: HubertConfig) -> Pretrainer:
    torch.manual_seed(0)
    return Pretrainer(config, UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3).train()


@pytest.mark.parametrize("one_shape", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_step_is_close_to_the_float32_step(name, one_shape, device, flash_calls):
    module, batch = pretrainer(MODELS[name]), pretrain_batch()
    on_device = copy.deepcopy(module).to(device)
    expected_loss, expected_grads = gradients(module, batch)
    shape = PackedShape.largest(HUBERT, 8_000, 30_000, 120_000) if one_shape else None
    batch = replace(batch, shape=shape).to(device)
    with autocast(torch.bfloat16, device):
        loss = on_device(batch, 0).total
    loss.backward()
    assert flash_calls == [0.0] * 2
    assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=0.01)
    grads = {name: p.grad for name, p in on_device.named_parameters() if p.grad is not None}
    assert grads.keys() == expected_grads.keys()
    grad, expected = (
        torch.cat([g.flatten().cpu() for g in each.values()]) for each in (grads, expected_grads)
    )
    assert float((grad - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flash_attention_equals_attention_on_padded_batches(dtype, device, flash_calls):
    """The outputs and the gradients are compared for utterances of different lengths and without dropout."""
    n_frames = [300, 1, 49, 130]
    shape = PackedShape(n_utterances=6, n_rows=640, n_tiles=80, longest=400)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 640, 4, 64, generator=generator).to(dtype)
    grad_NHE, results = values[3, : sum(n_frames)].to(device), []
    for flash in (True, False):
        inputs = [x.to(device).requires_grad_() for x in values[:3]]
        packed = Packing(n_frames, 300, device, shape)
        packed.flash = packed.flash if flash else None
        out_NHE = attention.attend(*inputs, packed, 0.0)[: sum(n_frames)]
        grads = torch.autograd.grad(out_NHE, inputs, grad_NHE)
        results.append([out_NHE.detach(), *(grad[: sum(n_frames)] for grad in grads)])
    assert flash_calls == [0.0]
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype == dtype
        difference = (actual.cpu().float() - expected.cpu().float()).norm()
        assert float(difference / expected.cpu().float().norm()) < (2e-2 if dtype is torch.bfloat16 else 4e-3)


@pytest.fixture
def compiling_device(monkeypatch) -> Iterator[torch.device]:
    """Return a GPU, or a CPU that uses the attention of a GPU and compiles without inductor."""
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        if not (packing.has_flash_attention(device) and can_compile(device)):
            pytest.skip("needs a GPU with flash attention and a C compiler")
        yield device
    else:
        monkeypatch.setattr(packing, "has_flash_attention", lambda device: True)
        monkeypatch.setattr(attention, "flash_attention", by_mask)
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        yield torch.device("cpu")
    torch.compiler.reset()


def parts_of_one_shape() -> list[PretrainBatch]:
    """Return three micro-batches with one, two and three utterances that are padded to one shape."""
    shape = PackedShape.largest(HUBERT, 8_000, 30_000, 120_000)
    whole, parts = pretrain_batch(), []
    n_masked = [0, *whole.mask_BS.sum(1).cumsum(0).tolist()]
    for n in (1, 2, 3):
        parts.append(
            PretrainBatch(
                whole.wav_BT[:n],
                whole.n_samples_B[:n],
                whole.mask_BS[:n],
                whole.unit_N[: n_masked[n]],
                shape=shape,
            )
        )
    return parts


@pytest.mark.parametrize("name", MODELS)
def test_compiled_blocks_equal_eager_ones(name, compiling_device):
    device, results = compiling_device, []
    for compiled in (False, True):
        module, losses = pretrainer(MODELS[name]).to(device), []
        wrap_blocks(module.blocks, recompute=False, compiled=compiled)
        graphs, failures = compiled_graphs(), failed_compilations()
        for batch in parts_of_one_shape():
            with autocast(torch.bfloat16, device):
                loss = module(batch.to(device), 0).total
            loss.backward()
            losses.append(float(loss.detach()))
            assert compiled_graphs() - graphs == int(compiled)
        assert failed_compilations() == failures
        grad = torch.cat([p.grad.flatten().cpu() for p in module.parameters() if p.grad is not None])
        results.append((losses, grad))
    (losses, grad), (compiled_losses, compiled_grad) = results
    assert compiled_losses == pytest.approx(losses, rel=0.01)
    assert float((compiled_grad - grad).norm() / grad.norm()) < 0.05


def test_blocks_with_dropout_are_compiled_once(compiling_device):
    """The same seed yields the same loss, and another seed, with other dropout masks, another loss."""
    device, losses = compiling_device, []
    module = pretrainer(replace(MODELS["base"], dropout=0.1, attention_dropout=0.1)).to(device)
    wrap_blocks(module.blocks, recompute=False, compiled=True)
    graphs = compiled_graphs()
    for seed in (4, 5, 5, 6):
        torch.manual_seed(seed)
        for batch in parts_of_one_shape():
            with autocast(torch.bfloat16, device):
                loss = module(batch.to(device), 0).total
            loss.backward()
        losses.append(float(loss.detach()))
        if device.type == "cuda":  # the dropout of a CPU cannot be compiled
            assert compiled_graphs() - graphs == 1
    assert losses[1] == pytest.approx(losses[2], rel=1e-5) != losses[3]
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MODELS)
def test_residual_stream_has_the_precision_of_the_products(name, device, flash_calls):
    model = HubertModel(MODELS[name]).to(device).train()
    with autocast(torch.bfloat16, device):
        encoded = model(pad(wavs()).to(device), [len(w) for w in wavs()], keep_layers=range(3))
    outputs = encoded.hidden_BSD, *encoded.layers.values()
    assert [output.dtype for output in outputs] == [torch.bfloat16] * 4


@pytest.mark.parametrize("name", MODELS)
def test_step_with_triton_kernels_is_close_to_that_with_torchs_operators(name, device, monkeypatch):
    if device.type != "cuda":
        pytest.skip("Triton needs a GPU; triton_checks.py tests the kernels on a CPU")
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        pytest.skip("Triton needs a C compiler")
    assert dispatch._load_triton_kernels(device, torch.bfloat16) is not None
    module, batch = pretrainer(MODELS[name]).to(device), pretrain_batch().to(device)
    results = []
    for _ in range(2):
        module.zero_grad()
        with autocast(torch.bfloat16, device):
            loss = module(batch, 0).total
        loss.backward()
        results.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
        monkeypatch.setattr(dispatch, "_load_triton_kernels", lambda device, dtype: None)
    assert float((results[0] - results[1]).norm() / results[1].norm()) < 0.03


def test_pretraining_step_with_dropout_does_not_synchronize(device, flash_calls):
    dropout = dict.fromkeys(("dropout", "attention_dropout", "input_dropout"), 0.1)
    module = pretrainer(replace(MODELS["base"], **dropout)).to(device)
    batch, losses = pretrain_batch().to(device), []
    for _ in range(2):  # kernels may be loaded in the first step, which can synchronize
        torch.manual_seed(5)
        with no_synchronization(device) if losses else nullcontext():
            with autocast(torch.bfloat16, device):
                loss = module(batch, 0).total
            loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and flash_calls == [0.1] * 4
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@contextmanager
def no_synchronization(device: torch.device) -> Iterator[None]:
    """Fail if the host waits for the device in the `with` block."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    from fixtures.fake_device import SYNCS

    SYNCS.clear()
    yield
    assert SYNCS == []


def fine_tuner() -> FineTuner:
    torch.manual_seed(0)
    return FineTuner(HubertForCtc(MODELS["base"], 12), freeze_conv=True, head_only_steps=0, seed=3).train()


def ctc_batch(masked: bool) -> CtcBatch:
    frames = [HUBERT.n_frames(len(wav_T)) for wav_T in wavs()]
    mask_BS = pad([torch.arange(n) % 7 < 2 for n in frames]) if masked else None
    channels_BD = torch.arange(64).expand(3, -1) % 9 == 0 if masked else None
    target_L, n_target_B = torch.tensor([3, 4, 5, 1, 2, 2, 9]), torch.tensor([3, 2, 2])
    lengths = torch.tensor([len(wav_T) for wav_T in wavs()])
    return CtcBatch(pad(wavs()), lengths, mask_BS, channels_BD, target_L, n_target_B)


@pytest.mark.parametrize("masked", [False, True])
def test_fine_tuning_step_equals_that_on_the_cpu(masked, device):
    assert_same_step(fine_tuner(), ctc_batch(masked), device)


def test_fine_tuning_step_synchronizes_in_ctc_loss_only(device, monkeypatch):
    """Lengths are computed on the host. On CUDA, `F.ctc_loss` copies them and synchronizes in any case."""
    module, batch = fine_tuner().to(device), ctc_batch(masked=False)
    expected, device_batch = fine_tuner()(batch, 0), batch.to(device)
    if device.type == "cuda":
        ctc_loss = F.ctc_loss

        def unchecked(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("default")
            try:
                return ctc_loss(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        monkeypatch.setattr(F, "ctc_loss", unchecked)
    with no_synchronization(device):
        loss = module(device_batch, 0)
    assert {name: float(value) for name, value in loss.sums.items()} == {
        name: float(value) for name, value in expected.sums.items()
    }


class Speech:
    """A data source that repeats one micro-batch with new masks in every epoch."""

    def __init__(self, micro_seconds: float | None = None) -> None:
        lengths = np.array([len(wav_T) for wav_T in wavs()])
        self.sampler = Sampler(np.arange(3), lengths, BatchSizes(8.0, 1, micro_seconds), seed=1)

    def name(self, row: int) -> str:
        return f"row-{row}"

    def load(self, micro: MicroBatch) -> PretrainBatch:
        return pretrain_batch(micro.epoch)


def train_briefly(out: Path, device: torch.device | str) -> dict[str, Tensor]:
    """Train for a few steps, or resume the run in `out`, and return the weights."""
    module = pretrainer(MODELS["base"])
    every = {"save_every": 3, "valid_every": 3, "log_every": 1}
    size = {"max_steps": 6, "batch_seconds": 8.0, "micro_seconds": 8.0}
    config = TrainConfig(**size, **every, precision="fp32", device=str(device))
    out.mkdir(exist_ok=True)
    train(module, Speech(), config, out, validate=lambda: {"loss": -float(module.updates)}, best="loss")
    return {name: value.cpu() for name, value in module.state_dict().items()}


def test_additional_micro_batches_do_not_synchronize(device, tmp_path):
    if device.type == "cuda":
        pytest.skip("the test counts synchronizations of the simulated device")
    from fixtures.fake_device import SYNCS

    n_parts, n_syncs = [], []
    for micro_seconds in (8.0, 1.6):
        data, out = Speech(micro_seconds), tmp_path / str(micro_seconds)
        config = TrainConfig(
            max_steps=1, batch_seconds=8.0, micro_seconds=micro_seconds, valid_every=0, device=str(device)
        )
        out.mkdir()
        SYNCS.clear()
        train(pretrainer(MODELS["base"]), data, config, out)
        n_parts.append(len(data.sampler.update(0, 0)))
        n_syncs.append(len(SYNCS))
    assert n_parts == [1, 3] and n_syncs[0] == n_syncs[1]


def test_copy_of_a_micro_batch_does_not_wait_for_the_computation(device):
    if device.type != "cuda":
        pytest.skip("the simulated device has no streams")
    copy_to_device, batch, computed = DeviceCopy(device), pretrain_batch().pin_memory(), torch.cuda.Event()
    copy_to_device(batch)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(2_000_000_000)  # about a second
    computed.record()
    on_device = copy_to_device(batch)
    copy_to_device.stream.synchronize()
    assert not computed.query()
    for name in ("wav_BT", "mask_BS", "unit_N", "masked_index_N"):
        assert torch.equal(getattr(on_device, name).cpu(), getattr(batch, name))


def test_resumed_training_equals_that_on_the_cpu(device, tmp_path):
    expected = train_briefly(tmp_path / "cpu", "cpu")
    for name, value in train_briefly(tmp_path / "device", device).items():
        assert_close(value, expected[name])
    shutil.rmtree(tmp_path / "device" / "checkpoints" / "step_0000006")  # as after a kill
    for name, value in train_briefly(tmp_path / "device", device).items():
        assert_close(value, expected[name])


@pytest.mark.parametrize("name", MODELS)
def test_features_equal_those_on_the_cpu(name, device):
    torch.manual_seed(0)
    model = HubertModel(MODELS[name]).eval()
    pair = [jahubert.FeatureExtractor(copy.deepcopy(model), layer=2, device=name) for name in ("cpu", device)]
    for expected, actual in zip(*(extractor(wavs(), sample_rate=16_000) for extractor in pair), strict=True):
        assert_close(actual, expected)
    outputs = (extractor.many(wavs(), sample_rate=16_000) for extractor in pair)
    for expected, actual in zip(*outputs, strict=True):
        assert_close(actual, expected)
    for kind in (Mfcc, lambda name: HubertLayer(copy.deepcopy(model), 2, name)):
        for expected, actual in zip(kind("cpu")(wavs()), kind(str(device))(wavs()), strict=True):
            assert actual.device.type == device.type
            torch.testing.assert_close(actual.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_float32_features_equal_those_of_padded_attention(name, device, monkeypatch):
    compute, calls, features = attention.efficient_attention, [], []
    if device.type != "cuda":
        compute = by_mask
    elif not packing.has_efficient_attention(device):
        pytest.skip("this GPU has no memory-efficient attention")

    def recorded(q_NHE, k_NHE, v_NHE, offsets, longest, dropout):
        assert offsets.dtype is torch.int32 and offsets.device == q_NHE.device
        calls.append(longest)
        return compute(q_NHE, k_NHE, v_NHE, offsets, longest, dropout)

    monkeypatch.setattr(attention, "efficient_attention", recorded)
    torch.manual_seed(0)
    extractor = jahubert.FeatureExtractor(HubertModel(MODELS[name]).eval(), layer=2, device=device)
    for efficient in (False, True):
        monkeypatch.setattr(
            packing, "has_efficient_attention", lambda device, on=efficient: on and device.type != "cpu"
        )
        features.append(extractor(wavs(), sample_rate=16_000))
    assert calls == [HUBERT.n_frames(max(map(len, wavs())))] * 2
    for expected, actual in zip(*features, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "sklearn"])
def test_kmeans_and_assignment_equal_those_on_the_cpu(backend, device):
    if backend == "sklearn":
        pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    frames_ND = torch.from_numpy(rng.standard_normal((3000, 6)) + 8 * rng.integers(3, size=(3000, 1))).float()
    expected, result = (
        fit_kmeans(frames_ND, KmeansOptions(3, backend=backend, device=name)) for name in ("cpu", device)
    )
    assert_close(result.centroids_KD, expected.centroids_KD)
    labels_N = assign(frames_ND.to(device), result.centroids_KD.to(device))
    assert torch.equal(labels_N.cpu(), assign(frames_ND, expected.centroids_KD))


class CountingFrames:
    """Array of frames that counts the rows that are read from it."""

    ndim = 2

    def __init__(self, frames_ND: np.ndarray):
        self.frames_ND, self.shape, self.rows = frames_ND, frames_ND.shape, 0

    def __len__(self) -> int:
        return len(self.frames_ND)

    def __getitem__(self, index) -> np.ndarray:
        self.rows += len(self.frames_ND[index])
        return self.frames_ND[index]


@pytest.mark.parametrize(("n_cached", "rows"), [(12, 3000), (4, 3000 + 3 * 1976), (0, 4 * 3000)])
def test_frames_that_fit_on_the_device_are_read_once(device, monkeypatch, n_cached, rows):
    """K-means makes four passes over 12 blocks of 256 frames, of which the device caches `n_cached`."""
    monkeypatch.setattr(centroids, "_block_rows", lambda shape, device: 256)
    monkeypatch.setattr(lloyd_module, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(lloyd_module, "_cache_bytes", lambda device: 4 * 6 * 256 * n_cached)
    frames_ND = np.random.default_rng(0).standard_normal((3000, 6)).astype(np.float32)
    start_KD, frames = torch.from_numpy(frames_ND[:9].copy()), CountingFrames(frames_ND)
    result = lloyd_module.lloyd(frames, start_KD.to(device), 4, tol=0.0)
    expected = lloyd_module.lloyd(torch.from_numpy(frames_ND), start_KD, 4, tol=0.0)
    assert_close(result.statistics.means_KD, expected.statistics.means_KD)
    assert len(result.history) == 4 and result.history == pytest.approx(expected.history)
    assert frames.rows == rows


def test_decoding_equals_that_on_the_cpu(device):
    torch.manual_seed(0)
    logp_BSV, n_frames_B = torch.randn(3, 40, 6).log_softmax(-1), torch.tensor([40, 31, 8])
    assert greedy(logp_BSV.to(device), n_frames_B) == greedy(logp_BSV, n_frames_B)
    expected, result = beam_search(logp_BSV, n_frames_B), beam_search(logp_BSV.to(device), n_frames_B)
    assert [h.labels for hyps in result for h in hyps] == [h.labels for hyps in expected for h in hyps]
    assert forced_align(logp_BSV[0].to(device), [1, 2, 3]) == forced_align(logp_BSV[0], [1, 2, 3])


def test_transcript_equals_that_on_the_cpu(device):
    transcribers = [
        jahubert.Transcriber.from_pretrained(device=name, dtype=torch.float32) for name in ("cpu", device)
    ]
    expected, result = (t.transcribe(syllables(4.0), sample_rate=16_000) for t in transcribers)
    assert result.text == expected.text and result.phonemes == expected.phonemes
