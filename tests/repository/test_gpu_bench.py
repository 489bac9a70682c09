"""Tests of the GPU benchmark on a CPU with tiny sizes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

REPO = Path(__file__).resolve().parents[2]


def test_gpu_benchmark_ends_with_a_table_and_a_json_file(bench_folder, tmp_path):
    from gpu_report import GOALS

    out = tmp_path / "gpu.json"
    done = subprocess.run(
        ["bash", REPO / "tools/bench/gpu.sh", "--small", "--out", str(out)],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(out.read_text())
    outcomes = {name: section["outcome"] for name, section in result["sections"].items()}
    assert outcomes.pop("tests").startswith("skipped: needs a GPU")
    assert outcomes and set(outcomes.values()) == {"done"}
    values = {row["name"]: row["value"] for row in result["rows"]}
    assert values["base, micro-batch: jahubert"] > 0 and values["base, micro-batch: kernels, products"] > 0
    assert values["base, micro-batch, compiled: kernels, products"] > 0
    assert values["engine: waiting for data"] >= 0 and values["compiled engine: waiting for data"] >= 0
    rows = {row["name"]: row for row in result["rows"]}
    for name, warm_up in {
        "engine": 0, "compiled engine": 1, "base, micro-batch, compiled": 1, "base, two groups, compiled": 1
    }.items():  # fmt: skip
        recompilations = rows[f"{name}: recompilations"]
        assert (recompilations["value"], recompilations["warm_up"]) == (0, str(warm_up)), name
        assert values[f"{name}: not compiled"] == 0
    assert result["environment"]["device"] == "CPU"
    not_measured = {name for name in GOALS if name not in values}
    assert {re.sub(r"transformers|torchaudio", "peer", name) for name in not_measured} == {
        "base, micro-batch: speedup over peer",
        "base, micro-batch: memory of peer",
        "device tests failed",
    }
    table = done.stdout[done.stdout.rindex("measurement ") :]
    assert all(name in table for name in values)


@pytest.fixture
def bench_folder(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "tools/bench"))


def test_only_kernels_are_counted_as_time_of_the_gpu(bench_folder):
    from kernel_profile import by_group, kernel_times

    def event(key: str, device: int, microseconds: float, is_range: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key,
            device_type=DeviceType(device),  # a new object, as in the profiler's events
            is_user_annotation=is_range,
            self_device_time_total=microseconds,
            self_cpu_time_total=7_000.0,
        )

    cpu, cuda = int(DeviceType.CPU), int(DeviceType.CUDA)
    events = [
        event("aten::mm", cpu, 0.0),
        event("nvjet_tst_192x192", cuda, 2_000.0),
        event("void pytorch_flash::flash_fwd_kernel<cutlass>", cuda, 500.0),
        event("void at::native::vectorized_elementwise_kernel<gelu>", cuda, 1_500.0),
        event("triton_poi_fused_addmm_gelu_3", cuda, 100.0),
        event("triton_red_fused__flash_attention_forward_sum_view_7", cuda, 200.0),
        event("triton_tem_fused_addmm_2", cuda, 300.0),
        event("_residual_norm_backward", cuda, 400.0),
        event("void at::native::(anonymous namespace)::elementwise_of_an_unknown_kind", cuda, 300.0),
        event("Optimizer.step#AdamW.step", cuda, 9_000.0, is_range=True),
    ]
    groups = {"products": 2.3, "attention": 0.5, "between products": 2.5}
    assert by_group(kernel_times(events, on_gpu=True)) == pytest.approx(groups)
    assert kernel_times(events, on_gpu=False) == {"aten::mm": 7.0}


def test_goals_are_listed_as_reached_not_reached_and_not_measured(bench_folder, monkeypatch):
    import gpu_report

    monkeypatch.setattr(
        gpu_report,
        "GOALS",
        {"rate": (">=", 7.0), "waiting": ("<=", 1.0), "peer": (">=", 4.0), "late": ("<=", 0)},
    )
    report = gpu_report.Report(has_goals=True)
    for name, value in {"rate": 7.5, "waiting": 1.5, "peer": None, "other": 3.0}.items():
        report.add(name, value, "")
    assert [row.get("reached") for row in report.rows] == [True, False, None, None]
    assert [re.search(r"(not )?\w+$", line).group() for line in report.goals()] == [
        "reached", "not reached", "not measured", "not measured"
    ]  # fmt: skip


def test_gpu_benchmark_keeps_earlier_results_if_a_section_fails(bench_folder, monkeypatch, tmp_path, capsys):
    import gpu

    def measured(report, run) -> None:
        report.add("features, layer 1, fp32", 5.0, "audio-s/s")

    def exits(report, run) -> None:
        raise SystemExit("no weights")

    written = []
    sections = {
        "features": gpu.Section(measured, 1, 1),
        "kmeans": gpu.Section(exits, 1, 1),
        "beam": gpu.Section(lambda *_: written.append(out.read_text()), 1, 1),
    }
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--only", *sections, "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    result = json.loads(out.read_text())
    outcomes = [section["outcome"] for section in result["sections"].values()]
    assert outcomes == ["done", "failed: SystemExit: no weights", "done"]
    assert json.loads(written[0])["rows"] == result["rows"]
    assert "kmeans: failed: SystemExit: no weights" in capsys.readouterr().out


def test_sections_are_shortened_before_others_are_skipped(bench_folder, monkeypatch, tmp_path, capsys):
    import gpu

    assert sum(section.shortened for section in gpu.SECTIONS.values()) <= 240  # all fit in four minutes
    sections = {name: gpu.Section(lambda *_: None, 60, 20) for name in ("step", "engine", "labels")}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    names = list(sections)
    assert [gpu.schedule(names, 0, budget) for budget in (100, 99, 20, 19)] == [
        "in full", "shortened", "shortened", "skipped"
    ]  # fmt: skip
    assert gpu.schedule(names[2:], 120, 180) == "in full" and gpu.schedule(names[2:], 121, 180) == "shortened"

    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--minutes", "0.9", "--out", str(out)])
    monkeypatch.setattr(gpu, "SECTIONS", sections | {"engine": gpu.Section(lambda *_: None, 90, 90)})
    gpu.main()
    outcomes = {name: row["outcome"] for name, row in json.loads(out.read_text())["sections"].items()}
    assert outcomes["step"] == outcomes["labels"] == "done with fewer repetitions"
    assert outcomes["engine"].startswith("skipped")
    table = capsys.readouterr().out
    assert f"engine: {outcomes['engine']}" in table[table.rindex("measurement ") :]


def test_share_of_the_peak_counts_the_flops_of_the_plan(bench_folder):
    from pretrain_step import flops

    from jahubert.model.hubert import HubertConfig
    from jahubert.train.plan.flops import forward_flops, step_flops

    lengths = [32_000, 249_600]
    for config in (HubertConfig.base(layer_drop=0.0), HubertConfig.large(layer_drop=0.0)):
        expected = sum(n / 16_000 * step_flops(config, n / 16_000, recompute=False) for n in lengths)
        assert flops(config, lengths) == pytest.approx(expected, rel=1e-12)
    dropped = HubertConfig.base(layer_drop=0.25)
    front_end, blocks = forward_flops(dropped, 2.0)
    assert flops(dropped, lengths[:1]) == pytest.approx(2.0 * 3 * (front_end + 0.75 * blocks))


def test_a_peer_with_too_little_memory_computes_a_part_of_the_batch(bench_folder, monkeypatch, tmp_path):
    import gpu_steps
    import pretrain_step
    import torch
    from gpu_report import Report, Settings

    class LittleMemory(pretrain_step.Jahubert):
        def forward(self, batch):
            if batch.seconds > 2.0:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(batch)

    class Incompatible(pretrain_step.Jahubert):
        def forward(self, batch):
            raise TypeError("no such argument")

    kinds = {"jahubert": pretrain_step.Jahubert, "transformers": LittleMemory, "torchaudio": Incompatible}
    monkeypatch.setattr(pretrain_step, "KINDS", kinds)
    monkeypatch.setattr(Settings, "peers", ["transformers", "torchaudio"])
    report, run = Report(has_goals=False), Settings(torch.device("cpu"), True, tmp_path, tmp_path)
    models = gpu_steps.build_trainers(run, run.model("base"))
    gpu_steps.compare_steps(report, run, "step", models, [1.0, 0.5, 0.8])
    rows = {row["name"]: row for row in report.rows}
    assert rows["step: jahubert"]["seconds"] == pytest.approx(2.3)
    assert rows["step: transformers"]["seconds"] == pytest.approx(1.8)
    rates = rows["step: jahubert"]["value"], rows["step: transformers"]["value"]
    assert rows["step: speedup over transformers"]["value"] == pytest.approx(rates[0] / rates[1])
    assert rows["step: torchaudio"]["value"] is None and "TypeError" in rows["step: torchaudio"]["reason"]
