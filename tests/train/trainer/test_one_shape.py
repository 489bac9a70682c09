"""Tests of micro-batches that are padded to one shape: results, shapes and compilations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from fixtures.small_training import CONFIG, QUIET, UNITS, noise_corpus, noise_pretraining
from fixtures.traceable_flash import by_mask
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from jahubert.errors import ConfigError
from jahubert.frames import HUBERT
from jahubert.model.hubert import EncoderLayer, HubertConfig, HubertModel
from jahubert.model.kernels import PackedShape, attention, encoder, packing, weights
from jahubert.model.kernels.packing import Packing, Sequences
from jahubert.train.data.sampler import BatchSizes, Sampler
from jahubert.train.stages.pretrain import Pretrainer, evaluate
from jahubert.train.trainer.parallel import failed_compilations, wrap_blocks
from jahubert.train.trainer.trainer import train

CPU = torch.device("cpu")
LARGE = HubertConfig.large(
    conv_dims=(8,) * 7, width=32, layers=2, heads=2, ffn=32, pos_conv_kernel=8, pos_conv_groups=2
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return noise_corpus(tmp_path_factory.mktemp("corpus"))


def pretrainer(model: HubertConfig = QUIET) -> Pretrainer:
    torch.manual_seed(0)
    return Pretrainer(model, UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3)


@pytest.fixture
def flash(monkeypatch) -> None:
    """Use the attention path of a GPU on the CPU."""
    monkeypatch.setattr(packing, "has_flash_attention", lambda device: True)
    monkeypatch.setattr(attention, "flash_attention", by_mask)


def test_the_largest_shape_holds_every_batch():
    rng = np.random.default_rng(0)
    for shortest, longest, capacity in (
        (400, 3_000, 30_000),
        (32_000, 250_000, 1_400_000),
        (5_000, 5_000, 5_000),
    ):
        shape = PackedShape.largest(HUBERT, shortest, longest, capacity)
        fullest = np.zeros(4, int)
        for _ in range(2_000):
            most = int(rng.integers(shortest, longest + 1))
            lengths = rng.integers(max(shortest, int(0.95 * most)), most + 1, capacity // most)
            lengths[0] = most
            n_frames = HUBERT.n_frames(lengths)
            tiles = int((-(-lengths // (HUBERT.hop * packing.TILE))).sum())
            sizes = np.array([len(lengths), int(n_frames.sum()), tiles, int(n_frames.max())])
            assert (sizes <= np.array(shape)).all()
            fullest = np.maximum(fullest, sizes)
        assert (fullest >= 0.85 * np.array(shape) - packing.BLOCK).all()


def test_the_shape_adds_little_padding():
    """The fractions of rows and tiles that contain speech are those in docs/performance.md."""
    rng, sizes = np.random.default_rng(0), BatchSizes(350.0, 8, None, one_shape=True)
    length = np.clip(rng.lognormal(1.5, 0.5, 12_000) * 16_000, 32_000, 250_000).astype(int)
    for micro_seconds, rows, tiles in ((None, 0.95, 0.91), (700.0, 0.95, 0.91), (175.0, 0.78, 0.74)):
        sampler = Sampler(np.arange(12_000), length, replace(sizes, micro_seconds=micro_seconds), seed=1)
        micro_batches, shape = list(sampler.single_pass()), sampler.shape
        n_tiles = -(-length // (HUBERT.hop * packing.TILE))
        capacity = np.array([shape.n_rows, shape.n_tiles]) * len(micro_batches)
        shares = np.array([HUBERT.n_frames(length).sum(), n_tiles.sum()]) / capacity
        assert shares == pytest.approx([rows, tiles], abs=0.01)


def test_a_batch_that_does_not_fit_is_rejected():
    model, wav_BT = HubertModel(QUIET), torch.randn(3, 8_000)
    fits = PackedShape(n_utterances=3, n_rows=128, n_tiles=16, longest=24)
    assert model(wav_BT, shape=fits).hidden_BSD.shape == (3, 24, 32)
    for name, size in (("n_utterances", 2), ("n_rows", 64), ("n_tiles", 8)):
        with pytest.raises(ConfigError, match="room for only"):
            model(wav_BT, shape=fits._replace(**{name: size}))


def test_sequences_of_attention_have_one_shape():
    shape = PackedShape(n_utterances=5, n_rows=256, n_tiles=32, longest=60)
    for n_frames in ([60, 60, 60, 60], [50, 41, 60, 7, 33], [1], [60]):
        sequences = Sequences.of(Packing(n_frames, 60, CPU, shape), shape)
        assert sequences.offsets.shape == (1 + 5 + 5,) and sequences.longest == 60
        lengths = sequences.offsets.diff().tolist()
        assert lengths[: len(n_frames)] == n_frames
        assert sum(lengths) == 256 and min(lengths) >= 0 and max(lengths) <= 60
    with pytest.raises(ConfigError, match="61 frames"):
        Sequences.of(Packing([61], 61, CPU, shape), shape)


@pytest.mark.parametrize("model", [QUIET, LARGE], ids=["base", "large"])
@pytest.mark.parametrize(
    ("precision", "micro_seconds"),
    [(torch.float32, 3.0), (torch.float32, 24.0), (torch.bfloat16, 3.0)],
    ids=str,
)
def test_loss_and_gradients_equal_those_without_a_fixed_shape(corpus, model, precision, micro_seconds, flash):
    results = []
    for one_shape in (False, True):
        module, values = pretrainer(model), []
        for micro in noise_pretraining(corpus, micro_seconds, one_shape).sampler.update(0, 1):
            batch = noise_pretraining(corpus, micro_seconds, one_shape).load(micro)
            assert (batch.shape is not None) == one_shape
            with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
                loss = module(batch, 0)
            loss.total.backward()
            values += [
                loss.total.detach(),
                *(torch.as_tensor(value).detach() for value in loss.sums.values()),
            ]
        results.append((torch.stack([value.double() for value in values]), gradient(module)))
    (values, grads), (filled_values, filled_grads) = results
    tolerance = 1e-5 if precision is torch.float32 else 2e-2
    torch.testing.assert_close(filled_values, values, rtol=tolerance, atol=0)
    assert float((filled_grads - grads).norm() / grads.norm()) < tolerance


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in module.parameters() if p.grad is not None])


class Shapes(TorchDispatchMode):
    """Dispatch mode that records the output shapes of the operators in `NAMES`."""

    NAMES = ("mm", "addmm", "addmm_", "bmm", "gelu", "gelu_backward", "native_layer_norm", "native_dropout")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in self.NAMES:
            first = result[0] if isinstance(result, tuple) else result
            self.seen.append((name, tuple(first.shape)))
        return result


@pytest.mark.parametrize("model", [QUIET, LARGE], ids=["base", "large"])
def test_all_micro_batches_have_one_shape(corpus, model, flash, monkeypatch):
    """The shapes are compared from the front end to the last block, without the positional convolution."""
    monkeypatch.setattr(encoder, "positional_conv", lambda module, x_ND, packing: torch.zeros_like(x_ND))
    hubert, data, shapes, sizes = HubertModel(model).train(), noise_pretraining(corpus, 3.0, True), [], set()
    for micro in data.sampler.update(0, 0):
        batch = data.load(micro)
        sizes.add(tuple(batch.n_samples_B.tolist()))
        with torch.autocast("cpu", torch.bfloat16), Shapes() as recorded:
            encoded = hubert(batch.wav_BT, batch.n_samples_B, mask_BS=batch.mask_BS, shape=batch.shape)
            encoded.hidden_BSD.float().square().mean().backward()
        shapes.append(recorded.seen)
    assert len({len(lengths) for lengths in sizes}) > 1 and len(shapes) > 3
    assert len(shapes[0]) > 50 and all(other == shapes[0] for other in shapes)


@pytest.fixture
def counter(monkeypatch) -> Iterator[CompileCounterWithBackend]:
    """Count graphs, and compile them without inductor, which would take minutes."""
    counter, compile = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend=counter))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_are_compiled_once_and_results_do_not_change(corpus, recompute, flash, counter):
    results = []
    for compiled in (False, True):
        module, losses = pretrainer().train(), []
        wrap_blocks(module.blocks, recompute, compiled)
        data, graphs = noise_pretraining(corpus, 3.0, one_shape=True), []
        for micro in data.sampler.update(0, 0):
            with torch.autocast("cpu", torch.bfloat16):
                loss = module(data.load(micro), 0)
            loss.total.backward()
            losses.append(float(loss.total.detach()))
            graphs.append(counter.frame_count)
        results.append((losses, gradient(module)))
        assert len(graphs) > 5 and graphs == [graphs[0]] * len(graphs) and graphs[0] == int(compiled)
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3)
    torch.testing.assert_close(
        results[1][1], results[0][1], rtol=0.02, atol=0.02 * float(results[0][1].abs().max())
    )


def test_flash_attention_of_torch_is_compiled_once(counter, monkeypatch):
    """Only GPUs have the operator, but it can be traced on the meta device, where autocast does not exist."""
    monkeypatch.setattr(packing, "has_flash_attention", lambda device: True)
    for module in (attention, weights):
        monkeypatch.setattr(module, "autocast_dtype", lambda tensor: torch.bfloat16)
    meta, shape = torch.device("meta"), PackedShape(n_utterances=5, n_rows=256, n_tiles=32, longest=60)
    config = replace(QUIET, dropout=0.1, attention_dropout=0.1, heads=4)
    blocks = [EncoderLayer(config).to(meta, torch.bfloat16).train() for _ in range(2)]
    wrap_blocks(blocks, recompute=False, compiled=True)
    for n_frames in ([60, 30], [60, 2, 60, 17]):
        x_ND = hidden_ND = torch.empty(
            256, config.width, device=meta, dtype=torch.bfloat16, requires_grad=True
        )
        packed = Packing(n_frames, 60, meta, shape)
        for block in blocks:
            hidden_ND = block(hidden_ND, packed)
        hidden_ND.sum().backward()
        assert x_ND.grad is not None and x_ND.grad.shape == x_ND.shape
    assert counter.frame_count == 1
    calls = [node for node in counter.graphs[0].graph.nodes if "_flash_attention_forward" in str(node.target)]
    assert len(calls) == 1 and calls[0].args[5:] == (60, 60, 0.1, False, False)


def test_another_run_in_the_process_is_compiled_for_its_own_shape(counter, monkeypatch):
    """torch.compile makes sizes dynamic that differ from those of an earlier compilation."""
    monkeypatch.setattr(packing, "has_flash_attention", lambda device: True)
    for module in (attention, weights):
        monkeypatch.setattr(module, "autocast_dtype", lambda tensor: torch.bfloat16)
    meta = torch.device("meta")
    for n_rows in (128, 256):
        shape = PackedShape(n_utterances=3, n_rows=n_rows, n_tiles=32, longest=60)
        block = EncoderLayer(replace(QUIET, heads=4)).to(meta, torch.bfloat16).train()
        wrap_blocks([block], recompute=False, compiled=True)
        x_ND = torch.empty(n_rows, QUIET.width, device=meta, dtype=torch.bfloat16, requires_grad=True)
        block(x_ND, Packing([60, 30], 60, meta, shape)).sum().backward()
    inputs = [
        [n.meta["example_value"] for n in g.graph.nodes if n.op == "placeholder"] for g in counter.graphs
    ]
    assert len(inputs) == 2
    assert not any(isinstance(value, torch.SymInt) for values in inputs for value in values)


def test_float32_blocks_are_compiled_only_a_few_times(counter, monkeypatch):
    """In float32, a GPU computes attention on padded batches, whose sizes are not fixed."""
    monkeypatch.setattr(packing, "has_flash_attention", lambda device: False)
    for module in (attention, weights):  # the meta device has no autocast
        monkeypatch.setattr(module, "autocast_dtype", lambda tensor: torch.float32)
    meta, shape = torch.device("meta"), PackedShape(n_utterances=6, n_rows=256, n_tiles=32, longest=60)
    block = EncoderLayer(replace(QUIET, dropout=0.1, attention_dropout=0.1)).to(meta).train()
    wrap_blocks([block], recompute=False, compiled=True)
    failures = failed_compilations()
    for n_frames in ([60] * 4, [50, 49, 50], [33], [20] * 5, [41, 40, 17], [12]):
        x_ND = torch.empty(256, QUIET.width, device=meta, requires_grad=True)
        block(x_ND, Packing(n_frames, max(n_frames), meta, shape)).sum().backward()
    assert 1 < counter.frame_count < torch._dynamo.config.recompile_limit
    assert failed_compilations() == failures


def test_compilations_are_logged(corpus, tmp_path, flash, counter, caplog):
    caplog.set_level("INFO")
    config = replace(CONFIG, batch_seconds=24.0, groups=2, micro_seconds=3.0, precision="bf16", compile=True)
    data = noise_pretraining(corpus, 3.0, config.batch_sizes.one_shape)
    module = pretrainer(replace(QUIET, layer_drop=0.3))
    config = replace(config, log_every=1, valid_every=1)
    train(module, data, config, tmp_path, validate=lambda: evaluate(module, data))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["timing"]["compiled_graphs"] for row in rows if "timing" in row] == [1, 0, 0, 0]
    assert sum("valid_loss" in row for row in rows) == 4
    messages = [record.message for record in caplog.records if "audio-h/h" in record.message]
    assert ["compiled graphs: " in message for message in messages] == [True, False, False, False]
    assert not any("compile=true" in record.message for record in caplog.records)


@torch._dynamo.config.patch(recompile_limit=1)  # pytest's monkeypatch would remove the option afterwards
def test_blocks_that_run_uncompiled_cause_a_warning(corpus, tmp_path, counter, caplog):
    """In float32 on a CPU, the sizes of a block differ between micro-batches."""
    config = replace(CONFIG, batch_seconds=24.0, groups=2, micro_seconds=3.0, compile=True, log_every=1)
    data = noise_pretraining(corpus, 3.0, config.batch_sizes.one_shape)
    train(pretrainer(), data, config, tmp_path)
    warnings = [record.message for record in caplog.records if "compile=true" in record.message]
    assert len(warnings) == 1 and "uncompiled" in warnings[0]
