"""Tests that both engines give bit-identical weights, uninterrupted or resumed, in one or two processes.

The tests also run this file as a script: `torchrun --nproc-per-node 2 FILE FOLDER`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jahubert.errors import JahubertError, StaleError
from jahubert.frames import HUBERT
from jahubert.model.heads import UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.train.data.masking import seeded_rng, span_mask
from jahubert.train.data.sampler import BatchSizes, MicroBatch, Sampler
from jahubert.train.experiment import distributed
from jahubert.train.trainer.losses import unit_loss
from jahubert.train.trainer.optim import TrainConfig
from jahubert.train.trainer.trainer import Loss, Stopped
from jahubert.train.trainer.trainer import train as train_torch

MODEL = HubertConfig(
    conv_dims=(8,) * 7,
    width=16,
    layers=3,
    heads=2,
    ffn=32,
    pos_conv_kernel=16,
    pos_conv_groups=4,
    layer_drop=0.2,
)
CONFIG = TrainConfig(
    max_steps=6,
    batch_seconds=8.0,  # a step has four micro-batches
    groups=4,
    lr=3e-3,
    clip_norm=0.5,
    precision="fp32",
    device="cpu",
    log_every=2,
    save_every=3,
    valid_every=2,
)
UNITS = 5


@dataclass
class Batch:
    wav_BT: Tensor
    n_samples_B: Tensor
    mask_BS: Tensor
    unit_N: Tensor

    def to(self, device: torch.device) -> Batch:
        return self


class Tones:
    """Data source of utterances made of short tones, where the unit of a frame is its pitch."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.units = [rng.integers(UNITS, size=rng.integers(6, 20)).repeat(4) for _ in range(24)]
        n_samples = np.array([HUBERT.window + HUBERT.hop * (len(units) - 1) for units in self.units])
        self.sampler = Sampler(
            np.arange(len(n_samples)),
            n_samples,
            BatchSizes(2.0, 4),
            seed=1,
        )

    def name(self, row: int) -> str:
        return f"row {row}"

    def load(self, micro: MicroBatch) -> Batch:
        wavs, masks, units = [], [], []
        for row in micro.rows:
            rng = seeded_rng(1, micro.epoch, row)
            pitch_T = self.units[row].repeat(HUBERT.hop)[: self.sampler.n_samples[row] - HUBERT.hop]
            wav_T = np.sin(np.cumsum(0.1 + 0.2 * pitch_T)) + 0.1 * rng.standard_normal(len(pitch_T))
            wavs.append(torch.from_numpy(np.pad(wav_T, (0, HUBERT.hop))).float())
            mask_S = span_mask(len(self.units[row]), 0.5, 4, rng, min_spans=1)
            masks.append(torch.from_numpy(mask_S))
            units.append(torch.from_numpy(self.units[row][mask_S]))
        pad = nn.utils.rnn.pad_sequence
        n_samples_B = torch.tensor([len(wav) for wav in wavs])
        return Batch(pad(wavs, True), n_samples_B, pad(masks, True), torch.cat(units))


class Learner(nn.Module):
    """Masked prediction model that sends a signal to the last process in step `stop_at`."""

    seed = 7
    has_unused_parameters = True

    def __init__(self, stop_at: int | None = None, stop_signal: signal.Signals = signal.SIGTERM):
        super().__init__()
        self.stop_at, self.stop_signal = stop_at, stop_signal
        torch.manual_seed(3)
        self.hubert = HubertModel(MODEL)
        self.head = UnitHead(MODEL.width, UNITS, 8)
        self.blocks = list(self.hubert.encoder.layers)

    def forward(self, batch: Batch, step: int) -> Loss:
        if step + 1 == self.stop_at and distributed.rank() == distributed.world() - 1:
            signal.raise_signal(self.stop_signal)
        encoded = self.hubert(batch.wav_BT, batch.n_samples_B, mask_BS=batch.mask_BS)
        logits_NK = self.head(encoded.hidden_BSD[batch.mask_BS])
        loss = unit_loss(logits_NK, batch.unit_N)
        correct = (logits_NK.argmax(-1) == batch.unit_N).sum()
        return Loss(loss, len(batch.unit_N), {"correct": correct, "seconds": len(batch.unit_N) / 50})

    def metrics(self, sums: dict[str, float], count: float) -> dict[str, float]:
        return {"loss": sums["total"] / count, "accuracy": sums["correct"] / count}


def train_model(engine: str, out: Path, *, config: TrainConfig = CONFIG, best=None, **stop):
    """Train with validation, and return the state dict and the metrics, which are None for a stopped run."""
    out.mkdir(parents=True, exist_ok=True)
    module, data = Learner(**stop), Tones()

    def validate() -> dict[str, float]:
        sums = {"total": 0.0, "count": 0.0, "correct": 0.0}
        for micro in data.sampler.single_pass(distributed.rank(), distributed.world()):
            loss = module(data.load(micro), 99)
            sums["total"] += float(loss.total)
            sums["correct"] += float(loss.sums["correct"])
            sums["count"] += loss.count
        totals = distributed.all_reduce_sums(sums, torch.device("cpu"))
        return module.metrics(totals, totals["count"])

    if engine == "torch":
        train = train_torch
    else:
        from jahubert.train.trainer.fairseq2 import train
    try:
        result = train(module, data, config, out, validate=validate, best=best)
    except Stopped:
        result = None
    return module.state_dict(), result


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metric_rows(out: Path) -> list[dict]:
    """Return the logged metrics without the `timing` entries."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


def assert_close_metrics(a: Path, b: Path) -> None:
    """Compare metrics with a tolerance for sums in a different order."""
    assert [list(row) for row in metric_rows(a)] == [list(row) for row in metric_rows(b)]
    for row_a, row_b in zip(metric_rows(a), metric_rows(b), strict=True):
        assert row_a == pytest.approx(row_b, rel=1e-6)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("_")[2]) for path in folder.glob("step_*"))


@pytest.mark.stack
def test_import_restores_conda_prefix():
    code = "import os, jahubert.train.trainer.fairseq2; assert os.environ['CONDA_PREFIX'] == '/nowhere'"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "CONDA_PREFIX": "/nowhere"}, check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Run six steps of the torch engine in one process, as a reference."""
    folder = tmp_path_factory.mktemp("torch")
    state, result = train_model("torch", folder)
    save_file(state, folder / "end.safetensors")
    assert result is not None and not same(state, Learner().state_dict())
    return folder


@pytest.mark.stack
def test_weights_and_metrics_equal_the_torch_engine(whole, tmp_path):
    state, result = train_model("fairseq2", tmp_path)
    assert same(state, load_file(whole / "end.safetensors"))
    assert_close_metrics(tmp_path, whole)
    assert result == pytest.approx({name: metric_rows(whole)[-2][name] for name in ("loss", "accuracy")})
    assert [row["step"] for row in metric_rows(tmp_path)] == [2, 2, 4, 4, 6, 6]
    assert steps_in(tmp_path / "checkpoints_fairseq2") == [3, 6]


@pytest.mark.stack
def test_activation_checkpointing_and_keep_every(whole, tmp_path):
    config = replace(CONFIG, recompute=True, save_every=1, keep_every=2, keep_last=1)
    state, _ = train_model("fairseq2", tmp_path, config=config)
    assert same(state, load_file(whole / "end.safetensors"))
    assert steps_in(tmp_path / "checkpoints_fairseq2") == [2, 4, 6]


@pytest.mark.stack
def test_importing_fairseq2_trainer_first_is_still_a_circular_import():
    """If this test fails, the workaround in the engine can be removed."""
    code = "import soundfile; from fairseq2.trainer import Trainer"
    environment = {name: value for name, value in os.environ.items() if name != "CONDA_PREFIX"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode and "circular import" in done.stderr


@pytest.mark.stack
def test_stopped_run_is_resumed(whole, tmp_path):
    _, result = train_model("fairseq2", tmp_path, stop_at=3)
    assert result is None and steps_in(tmp_path / "checkpoints_fairseq2") == [3]
    state, result = train_model("fairseq2", tmp_path)
    assert same(state, load_file(whole / "end.safetensors"))
    assert_close_metrics(tmp_path, whole)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    again, result_again = train_model("fairseq2", tmp_path)
    assert same(again, state) and result_again == result  # no more steps were run
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert_close_metrics(tmp_path, whole)


@pytest.mark.stack
def test_run_stopped_in_the_last_step_is_resumed(whole, tmp_path):
    _, result = train_model("fairseq2", tmp_path, stop_at=CONFIG.max_steps)
    assert result is None and CONFIG.max_steps in steps_in(tmp_path / "checkpoints_fairseq2")
    state, _ = train_model("fairseq2", tmp_path)
    assert same(state, load_file(whole / "end.safetensors"))
    assert_close_metrics(tmp_path, whole)


@pytest.mark.stack
def test_stop_between_log_steps_is_resumed(whole, tmp_path):
    odd = replace(CONFIG, log_every=4, save_every=3, valid_every=3)
    train_model("torch", tmp_path / "torch", config=odd)
    train_model("fairseq2", tmp_path / "ours", config=odd, stop_at=3)
    assert not (tmp_path / "ours" / "metrics.jsonl").exists()  # step 3 has not been validated yet
    state, _ = train_model("fairseq2", tmp_path / "ours", config=odd)
    assert same(state, load_file(whole / "end.safetensors"))
    assert_close_metrics(tmp_path / "ours", tmp_path / "torch")


@pytest.mark.stack
def test_killed_run_is_resumed(whole, tmp_path):
    killed = subprocess.run([sys.executable, __file__, str(tmp_path), "kill"], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    # Step 3 is saved in the background during step 4, so its checkpoint may be missing.
    assert [row["step"] for row in metric_rows(tmp_path)] == [2, 2, 4, 4]
    state, _ = train_model("fairseq2", tmp_path)
    assert same(state, load_file(whole / "end.safetensors"))
    assert_close_metrics(tmp_path, whole)


@pytest.mark.stack
def test_best_weights_are_kept(tmp_path):
    config = replace(CONFIG, valid_every=1)
    best = "accuracy"  # `best` is minimized, so the best step comes early
    wanted, metrics = train_model("torch", tmp_path / "torch", config=config, best=best)
    assert metrics["best_step"] < 6
    train_model("fairseq2", tmp_path / "ours", config=config, best=best, stop_at=4)
    for _ in range(2):  # the second call finds a finished run
        state, result = train_model("fairseq2", tmp_path / "ours", config=config, best=best)
        assert same(state, wanted) and result == pytest.approx(metrics)
    assert_close_metrics(tmp_path / "ours", tmp_path / "torch")


@pytest.mark.stack
def test_checkpoints_of_another_engine_are_rejected(tmp_path):
    for engine, other in (("torch", "fairseq2"), ("fairseq2", "torch")):
        train_model(engine, tmp_path / engine, stop_at=1)
        with pytest.raises(StaleError, match=f"engine={engine}"):
            train_model(other, tmp_path / engine)


@pytest.mark.stack
def test_non_finite_loss_stops_before_the_update(tmp_path, monkeypatch):
    load = Tones.load

    def broken(self: Tones, micro: MicroBatch) -> Batch:
        batch = load(self, micro)
        if self.sampler.epoch(micro.epoch)[micro.index] == self.sampler.epoch(0)[6]:
            batch.wav_BT[:] = torch.nan
        return batch

    monkeypatch.setattr(Tones, "load", broken)
    errors = []
    for engine in ("torch", "fairseq2"):
        with pytest.raises(
            JahubertError,
            match=r"step 2: non-finite loss nan in micro-batch 6 of epoch 0.*'row \d",
        ) as error:
            train_model(engine, tmp_path / engine)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.stack
def test_fp16_overflows_are_counted_and_end_a_run_without_other_steps(tmp_path, monkeypatch):
    """The test runs on the CPU, where fairseq2's loss scaler must be enabled explicitly."""
    from jahubert.train.trainer import fairseq2 as engine_fairseq2
    from jahubert.train.trainer import trainer as engine

    def scaler(gangs):
        made = StandardFloat16LossScaler(gangs)
        made._grad_scaler = torch.amp.GradScaler("cpu")
        return made

    StandardFloat16LossScaler = engine_fairseq2.StandardFloat16LossScaler
    monkeypatch.setattr(engine_fairseq2, "StandardFloat16LossScaler", scaler)
    for module in (engine, engine_fairseq2):
        monkeypatch.setattr(module, "pick_precision", lambda config, device: torch.float16)
    train_model("fairseq2", tmp_path / "some")
    overflows = [row.get("overflows", 0) for row in metric_rows(tmp_path / "some") if "loss" in row]
    assert overflows[0] > 0 and len(overflows) == 3
    timing = json.loads((tmp_path / "some" / "metrics.jsonl").read_text().splitlines()[-2])["timing"]
    assert timing["steps"] == 2 + overflows[-1]

    monkeypatch.setattr(torch.amp.GradScaler, "_unscale_grads_", _infinite)
    errors = []
    for each in ("torch", "fairseq2"):
        with pytest.raises(JahubertError, match="float16 gradients overflow") as error:
            train_model(each, tmp_path / each, config=replace(CONFIG, max_steps=99, valid_every=0))
        errors.append(str(error.value).partition(": ")[2])
    assert errors[0] == errors[1]


def _infinite(self, optimizer, inv_scale, found_inf, allow_fp16) -> dict[torch.device, Tensor]:
    return {torch.device("cpu"): torch.ones(())}


@pytest.mark.stack
def test_two_processes_equal_the_torch_engine(whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        torchrun = subprocess.Popen(
            [*command, __file__, str(tmp_path)], env=environment, stdout=log, stderr=log
        )
        try:
            status = torchrun.wait(timeout=120)
        except subprocess.TimeoutExpired:
            torchrun.terminate()  # also ends its processes, which `kill` would leave running
            status = torchrun.wait(timeout=60)
    assert status == 0, (tmp_path / "log").read_text()[-3000:]
    wanted = load_file(tmp_path / "torch.safetensors")
    for name in ("fairseq2", "torch-stopped", "fairseq2-stopped"):
        assert same(load_file(tmp_path / f"{name}.safetensors"), wanted), name
        assert_close_metrics(tmp_path / name, tmp_path / "torch")
    # A single process sums the gradients in a different order.
    for name, value in load_file(whole / "end.safetensors").items():
        torch.testing.assert_close(wanted[name], value, rtol=1e-3, atol=1e-4)
    with pytest.raises(StaleError, match=r"was 2 when step \d+ was saved"):
        train_model("fairseq2", tmp_path / "fairseq2")


def main(folder: Path) -> None:
    """Run all cases of the two-process test, which hangs if one process stops a step before the other."""
    with distributed.process_group():
        for engine in ("torch", "fairseq2"):
            runs = {engine: train_model(engine, folder / engine)}
            assert train_model(engine, folder / f"{engine}-stopped", stop_at=3)[1] is None
            runs[f"{engine}-stopped"] = train_model(engine, folder / f"{engine}-stopped")
            assert len({str(result) for _, result in runs.values()}) == 1
            for name, (state, _) in runs.items():
                if distributed.rank() == 0:
                    save_file(state, folder / f"{name}.safetensors")


if __name__ == "__main__":
    if sys.argv[2:] == ["kill"]:
        train_model("fairseq2", Path(sys.argv[1]), stop_at=5, stop_signal=signal.SIGKILL)
    else:
        main(Path(sys.argv[1]))
