#!/usr/bin/env bash
# Compiles the C++ with clang for the systems that a Linux machine cannot test, warnings being errors.
#   bash tools/cross_compile.sh [python with the packages ziglang and nanobind]
set -euo pipefail
python=${1:-python3}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
object=$(mktemp)
trap 'rm -f "$object"' EXIT
read -r nanobind headers < <("$python" -c "
import nanobind, sysconfig
print(nanobind.include_dir(), sysconfig.get_path('include'))")
for target in aarch64-macos x86_64-macos aarch64-linux-gnu; do
  for file in engine/luma.cpp engine/jpeg.cpp engine/bus_error.cpp kernels/*.cpp kernels/*/cpu.cpp; do
    "$python" -m ziglang c++ -target "$target" -std=c++17 -O0 -Wall -Wextra -Werror -c -o "$object" \
      -I . -I kernels -isystem "$nanobind" -isystem "$headers" "$file"
  done
done
