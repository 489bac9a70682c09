"""Tests of recomputation, compilation, precision and processes in training a small HuBERT model."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures import FIXTURES
from fixtures.small_training import CONFIG, MODEL, QUIET, UNITS, Noise
from fixtures.toy import Data as ToyData
from fixtures.toy import Toy
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from jahubert.errors import ConfigError, JahubertError
from jahubert.model import precision
from jahubert.model.hubert import EncoderLayer, HubertConfig
from jahubert.model.kernels.packing import Packing
from jahubert.train.data import workers
from jahubert.train.experiment import distributed
from jahubert.train.pipeline import runner
from jahubert.train.stages.pretrain import Pretrainer
from jahubert.train.trainer import loader, optim, trainer
from jahubert.train.trainer.loader import DataState
from jahubert.train.trainer.metric_log import duration
from jahubert.train.trainer.optim import TrainConfig, pick_precision
from jahubert.train.trainer.parallel import wrap_blocks
from jahubert.train.trainer.trainer import train

TONES = FIXTURES / "tones"


def pretrain(out: Path, model: HubertConfig = MODEL, **changes) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Pretrain for a few steps, and return the weights and metrics."""
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    module = Pretrainer(model, UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3)
    train(module, Noise(), replace(CONFIG, **changes), out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return module.state_dict(), [{k: v for k, v in row.items() if k != "timing"} for row in rows]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return pretrain(tmp_path_factory.mktemp("plain"))


def test_activation_checkpointing_does_not_change_the_result(plain, tmp_path):
    """With dropout and layer drop, recomputation must draw the same random numbers."""
    weights, metrics = pretrain(tmp_path, recompute=True)
    assert all(torch.equal(weights[name], value) for name, value in plain[0].items())
    assert weights.keys() == plain[0].keys() and metrics == plain[1]


def saved_bytes(recompute: bool) -> int:
    """Return the number of bytes that a forward pass saves, counting each storage once."""
    torch.manual_seed(0)
    module = Pretrainer(
        replace(MODEL, layers=6, layer_drop=0.0), UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3
    )
    wrap_blocks(module.blocks, recompute, False)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        encoded = module.hubert(torch.randn(2, 32_000))
        loss = encoded.hidden_BSD.sum()
    loss.backward()
    return sum(size for address, size in saved.items() if address not in parameters)


def test_activation_checkpointing_saves_memory():
    assert saved_bytes(recompute=True) < 0.5 * saved_bytes(recompute=False)


def test_compiled_block_is_not_recompiled_for_every_batch_of_another_shape():
    """On the CPU, the test uses the attention path that a GPU takes in float32."""
    still = replace(MODEL, dropout=0.0, attention_dropout=0.0)
    block, counter, rng = EncoderLayer(still), CompileCounter(), np.random.default_rng(0)
    block.compile(backend=counter)
    for number in range(16):
        n_frames = rng.integers(20, 90, size=number % 9 + 1).tolist()
        packing = Packing(n_frames, max(n_frames), torch.device("cpu"))
        packing.fused_attention = True
        packing.mask_B11S = (torch.arange(max(n_frames)) < torch.tensor(n_frames)[:, None])[:, None, None]
        block(torch.randn(packing.n_rows, still.width), packing)
    assert counter.frame_count <= 4  # first shape, any other shape, and batches of one row


@pytest.mark.slow
def test_compilation_does_not_change_the_result(plain, tmp_path):
    """Dropout is disabled, because inductor draws different random numbers."""
    eager = pretrain(tmp_path / "eager", QUIET)
    compiled = pretrain(tmp_path / "compiled", QUIET, compile=True)
    assert compiled[0].keys() == plain[0].keys()  # the parameter names in a checkpoint are equal
    for name, value in eager[0].items():
        torch.testing.assert_close(compiled[0][name], value, rtol=1e-3, atol=1e-4)
    for one, other in zip(eager[1], compiled[1], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_resuming_in_a_late_epoch_reads_only_its_own_batches(tmp_path, monkeypatch):
    reached = DataState(Noise().sampler)
    reached.advance(5_000)
    assert reached.epoch > 1_000

    def late(self) -> None:
        self.step, self.data_state = 5_000, reached

    monkeypatch.setattr(trainer._TrainingRun, "restore", late)
    data = Noise()
    module = Pretrainer(MODEL, UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3)
    train(module, data, replace(CONFIG, max_steps=5_001), tmp_path)
    epoch = (
        data.sampler.epoch(reached.epoch) if reached.cursor >= 2 else data.sampler.epoch(reached.epoch - 1)
    )
    assert len(data.read) == 2 and (data.read[0].epoch, data.read[0].index)[0] == epoch.number
    assert data.read[0] == epoch[data.read[0].index]


def test_keep_every_keeps_checkpoints(tmp_path):
    train(Toy(), ToyData(), replace(CONFIG, max_steps=11, save_every=2, keep_every=4, keep_last=1), tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_0000004", "step_0000008", "step_0000011"]
    with pytest.raises(ConfigError, match=r"keep_every is 5.*save_every"):
        replace(CONFIG, keep_every=5)


def test_progress_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    _, metrics = pretrain(tmp_path)
    messages = [record.message for record in caplog.records if record.message.startswith("step 2/4")]
    for part in (
        "loss ",
        "accuracy ",
        "grad_norm ",
        "padding ",
        " audio-h/h",
        "waiting for data ",
        " s left",
    ):
        assert part in messages[0], messages[0]
    assert all(0 <= row["padding"] < 0.2 and row["grad_norm"] > 0 for row in metrics)
    timing = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["timing"]
    assert timing["steps"] == 2 and timing["audio_hours_per_hour"] > 0 and 0 <= timing["waiting"] <= 1


def test_settings_without_effect_are_warned_about(tmp_path, caplog):
    train(Toy(), ToyData(), replace(CONFIG, sharded=True), tmp_path)
    messages = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 1 and "sharded=true" in messages[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (600, "10 min"), (7_260, "2 h 01 min"), (180_000, "2 d 2 h"), (345_500, "4 d 0 h")],
)
def test_durations_are_rounded(seconds, text):
    assert duration(seconds) == text


def test_non_finite_gradient_stops_before_the_update(tmp_path):
    module = Toy()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.net[0].weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(JahubertError, match=r"step 1: non-finite gradient norm (nan|inf)"):
        train(module, ToyData(), CONFIG, tmp_path)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_precision_follows_the_device(monkeypatch):
    cpu, auto = torch.device("cpu"), TrainConfig()
    for has, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "_cpu_is_faster_in_bf16", lambda has=has: has)
        assert pick_precision(auto, cpu) is wanted
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated, has=has: has and not emulated)
        assert pick_precision(auto, torch.device("cuda")) is wanted
    assert pick_precision(TrainConfig(precision="fp16"), torch.device("cuda")) is torch.float16


@pytest.mark.parametrize(
    ("instructions", "is_amd", "wanted"),
    [
        ({"_is_amx_tile_supported", "_is_avx512_bf16_supported"}, False, torch.bfloat16),
        ({"_is_avx512_bf16_supported"}, True, torch.bfloat16),
        ({"_is_avx512_bf16_supported"}, False, torch.float32),
        (set(), True, torch.float32),
    ],
)
def test_bf16_is_chosen_on_cpus_that_are_faster_with_it(monkeypatch, instructions, is_amd, wanted):
    monkeypatch.setattr(precision, "_cpu_supports", lambda function: function in instructions)
    monkeypatch.setattr(precision, "cpu_is_amd", lambda: is_amd)
    assert precision.preferred_dtype(torch.device("cpu")) is wanted


def test_bf16_loss_is_close_to_fp32(tmp_path):
    """Dropout is disabled, because it draws different random numbers in bfloat16."""
    (_, exactly), (_, metrics) = (
        pretrain(tmp_path / precision, QUIET, precision=precision) for precision in ("fp32", "bf16")
    )
    for row, exact in zip(metrics, exactly, strict=True):
        assert row["loss"] == pytest.approx(exact["loss"], rel=0.02) and row != exact


def test_fp16_skips_overflows_and_resumes_with_its_scale(tmp_path, monkeypatch, caplog):
    """The test bypasses the check that rejects fp16 on the CPU. The loss scaler works as on a GPU."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(trainer, "pick_precision", lambda config, device: torch.float16)
    config = replace(CONFIG, max_steps=6, save_every=3, log_every=3)
    ends, scales = {}, []
    update = torch.amp.GradScaler.update

    def seen(self, *args):
        update(self, *args)
        scales.append(self.get_scale())

    monkeypatch.setattr(torch.amp.GradScaler, "update", seen)
    for name, stops in (("whole", [6]), ("resumed", [3, 6])):
        (tmp_path / name).mkdir()
        for stop in stops:
            torch.manual_seed(0)
            module = Toy()
            train_step = trainer._TrainingRun.train_step

            def until(self, stop=stop, train_step=train_step):
                if self.step == stop:
                    raise KeyboardInterrupt
                train_step(self)

            with monkeypatch.context() as patch:
                if stop < 6:
                    patch.setattr(trainer._TrainingRun, "train_step", until)
                    with pytest.raises(KeyboardInterrupt):
                        train(module, ToyData(), config, tmp_path / name)
                else:
                    train(module, ToyData(), config, tmp_path / name)
        ends[name] = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    assert scales[0] < 65_536.0  # with these losses, the initial scale overflows
    assert scales[6:] == scales[:6] and torch.equal(ends["whole"], ends["resumed"])
    assert ends["whole"].isfinite().all()
    first = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[0])
    assert math.isfinite(first["grad_norm"])
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    fell = [now < before for before, now in zip([65_536.0, *scales[:5]], scales[:6], strict=True)]
    assert [row.get("overflows", 0) for row in rows] == [sum(fell[:3]), sum(fell[3:])]
    messages = [record.message for record in caplog.records if record.message.startswith("step 3/6")]
    assert f"  overflows {sum(fell[:3])}  " in messages[0]


def test_resumed_run_keeps_the_precision_in_which_it_was_started(tmp_path, monkeypatch, caplog):
    """The machine that resumes a run may prefer another precision than the one that started it."""
    auto, names = TrainConfig(), []
    for preferred in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(optim, "preferred_dtype", lambda device, dtype=preferred: dtype)
        names.append(optim.with_precision(auto, tmp_path).precision)
        assert optim.with_precision(TrainConfig(precision="fp16"), tmp_path).precision == "fp16"
    assert names == ["bf16", "bf16"]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "bf16" in record.message and "fp32" in record.message


def test_fewest_utterances_of_an_update_tolerate_rounding():
    """In floating point, 14.7 / 2.1 is slightly below 7."""
    sizes = TrainConfig(batch_seconds=14.7, groups=1)
    sizes.check_processes(7, 2.1)
    with pytest.raises(ConfigError):
        sizes.check_processes(8, 2.1)


def test_fp16_that_always_overflows_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "pick_precision", lambda config, device: torch.float16)
    module = Toy()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    module.net[0].weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(JahubertError, match=r"step 30: float16 .*train.precision=bf16"):
        train(module, ToyData(), replace(CONFIG, max_steps=99, save_every=9, log_every=9), tmp_path)
    assert all(torch.equal(*pair) for pair in zip(module.parameters(), before, strict=True))


def pretrained(exp: Path, *settings: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Pretrain the first iteration of the tones recipe, and return the weights and the metrics."""
    command = [f"recipe={TONES}", "stage=pretrain", f"exp={exp}", "pretrain.train.micro_seconds=5", *settings]
    done = subprocess.run([sys.executable, "-m", "jahubert.run", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = exp / "iter1" / "pretrain"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k != "timing"} for row in rows]
    return load_file(out / "bundle" / "model.safetensors"), rows


@pytest.mark.slow
def test_ddp_and_fsdp_equal_one_process(tmp_path):
    """Two processes train with DDP and with FSDP2. Another FSDP2 run is killed and resumed by one process."""
    labeled = tmp_path / "labeled"
    for stage in ("prepare", "features", "kmeans", "label"):
        runner.run([f"recipe={TONES}", f"stage={stage}", f"exp={labeled}"])
    for name in ("one", "ddp", "fsdp", "moved"):
        shutil.copytree(labeled, tmp_path / name)
    weights, curve = pretrained(tmp_path / "one")
    sharded = "pretrain.train.sharded=true"
    ends = {
        "ddp": pretrained(tmp_path / "ddp", "processes=2"),
        "fsdp": pretrained(tmp_path / "fsdp", "processes=2", sharded),
    }
    moved = [
        f"recipe={TONES}",
        "stage=pretrain",
        f"exp={tmp_path / 'moved'}",
        "pretrain.train.micro_seconds=5",
    ]
    two = subprocess.Popen(
        [sys.executable, "-m", "jahubert.run", *moved, "processes=2", sharded], start_new_session=True
    )
    while not (tmp_path / "moved/iter1/pretrain/checkpoints/step_0000005").exists():
        assert two.poll() is None
        time.sleep(0.02)
    os.killpg(two.pid, signal.SIGKILL)
    two.wait()
    ends["moved"] = pretrained(tmp_path / "moved")
    for end, rows in ends.values():
        for row, wanted in zip(rows, curve, strict=True):
            assert row == pytest.approx(wanted, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(end[name], value, rtol=1e-3, atol=2e-5)


def test_more_processes_than_gpus_are_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.process_device("auto") == torch.device("cuda", 1)
    assert distributed.process_device("cuda:0") == torch.device("cuda", 0)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ConfigError, match="device=cuda:0: 2 processes would sh"),
    ):
        patch.setattr(distributed, "world", lambda: 2)
        distributed.process_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"process 2 .* GPU 2.* 2;"):
        distributed.process_device("auto")
    assert distributed.process_device("cpu") == torch.device("cpu")


def test_micro_batch_is_copied_to_a_gpu_in_its_own_stream(monkeypatch):
    """The computation waits for the copy, and the memory is not reused before the computation has read it."""
    events = []

    class Stream:
        def __init__(self, device):
            assert device.type == "cuda"

        def wait_stream(self, other):
            events.append(("wait", self, other))

    class GpuTensor(torch.Tensor):
        is_cuda = True

        def record_stream(self, stream):
            events.append(("record", stream))

    def to(device):
        assert device.type == "cuda" and current == [computation, copy.stream]
        events.append("copy")
        return SimpleNamespace(wav_BT=torch.ones(2).as_subclass(GpuTensor), n_samples_B=torch.ones(2), seed=1)

    @contextmanager
    def stream(entered):
        current.append(entered)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    device = torch.device("cuda", 1)
    copy, computation = loader.DeviceCopy(device), Stream(device)
    current = [computation]
    assert copy(SimpleNamespace(to=to)).seed == 1
    assert events == ["copy", ("wait", computation, copy.stream), ("record", computation)]


def test_gpu_is_made_current_before_batches_are_pinned(monkeypatch):
    """Pinned memory is allocated through the current GPU, by default GPU 0, and occupies memory on it."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    device = torch.device("cuda", 1)
    monkeypatch.setattr(workers, "DataLoader", lambda *args, **options: [(len(current), options)])
    stream = loader.micro_batches(ToyData(), CONFIG, device, epoch=0, cursor=0)
    before, options = next(stream)
    assert before == 1 and current == [device] and options["pin_memory"]
    stream.close()
