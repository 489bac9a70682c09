"""Test that runs the GPU benchmark on a CPU with tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def test_gpu_benchmark_ends_with_a_table_and_a_json_file(tmp_path):
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
    assert values["base, mixed, 350 s: jahubert"] > 0 and values["engine: waiting for data"] >= 0
    assert (
        values["compiled engine: waiting for data"] >= 0 and values["compiled engine: compiled graphs"] == 0
    )
    assert result["environment"]["device"] == "CPU"
    table = done.stdout[done.stdout.rindex("measurement ") :]
    assert all(name in table for name in values)
