#!/usr/bin/env bash
# Runs the benchmark gpu.py on one GPU in less than four minutes. It prints a table and writes gpu_bench.json.
#   tools/bench/gpu.sh                  # on the first GPU
#   tools/bench/gpu.sh --small          # a quick check of the script on a CPU
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" "$root/tools/bench/gpu.py" "$@"
