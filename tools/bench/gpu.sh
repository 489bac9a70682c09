#!/usr/bin/env bash
# All measurements on one GPU in under four minutes: one table and gpu_bench.json (see gpu.py for options).
#   tools/bench/gpu.sh                  # on the first GPU
#   tools/bench/gpu.sh --small          # a quick check of the script on a CPU
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" "$root/tools/bench/gpu.py" "$@"
