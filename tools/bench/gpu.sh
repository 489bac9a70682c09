#!/usr/bin/env bash
# Runs the benchmark gpu.py on one GPU in less than four minutes. It prints a table and writes gpu_bench.json.
#   tools/bench/gpu.sh                  # on the first GPU
#   tools/bench/gpu.sh --small          # a quick check of the script on a CPU
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
# The same options of torch's allocator as in jahubert.run, for all models.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
PYTHONPATH="$root:$root/tests${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-$(command -v python || echo python3)}" "$root/tools/bench/gpu.py" "$@"
