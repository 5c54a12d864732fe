#!/usr/bin/env bash
# Set up and pass all tests: bash tools/test.sh [arguments for pytest]
set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
export TRITON_INTERPRET=1  # Triton kernels run without a GPU
"$python" -m ruff check .
"$python" -m ruff format --check .
# A file of tests to each core at a time; PyTorch's threads would only wait for each other.
export OMP_NUM_THREADS=1
"$python" -m pytest --numprocesses "$(getconf _NPROCESSORS_ONLN)" --dist loadfile --no-loadscope-reorder "$@"
