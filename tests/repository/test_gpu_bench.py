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
    assert values["base, micro-batch: jahubert"] > 0 and values["kernels: products"] > 0
    assert values["engine: waiting for data"] >= 0 and values["compiled engine: waiting for data"] >= 0
    assert values["compiled engine: graphs compiled later"] == 0
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
        event("Optimizer.step#AdamW.step", cuda, 9_000.0, is_range=True),
    ]
    groups = {"products": 2.0, "attention": 0.5, "between products": 1.5}
    assert by_group(kernel_times(events, on_gpu=True)) == groups
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
        "features": (measured, 1),
        "kmeans": (exits, 1),
        "beam": (lambda *_: written.append(out.read_text()), 1),
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
