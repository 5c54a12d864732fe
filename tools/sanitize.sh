#!/usr/bin/env bash
# Fuzz the compiled augmentation under AddressSanitizer and UBSan, then its threads under TSan,
# then compare every instruction set with the first: bash tools/sanitize.sh [runs]
# Compiling takes most of the time, so all four compile at once.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
runs=${1:-300}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
compiler=${CXX:-g++}
flags=(-std=c++17 -g1 -Wall -Wextra -pthread "-I$root/kernels")
names=() pids=()

compile() { # name, flags: the dispatch by processor starts before a sanitizer does, so not both
  "$compiler" "${flags[@]}" "${@:2}" "$root/kernels/augment/fuzz.cpp" -o "$build/$1" &
  names+=("$1") pids+=($!)
}

compile address -O1 -DSSLUS_NO_CLONES -fsanitize=address,undefined -fno-sanitize-recover=all
compile threads -O1 -DSSLUS_NO_CLONES -fsanitize=thread
compile baseline -O3 -DSSLUS_NO_CLONES -DSSLUS_NO_BIT_CAST # also what old compilers make of it
compile processor -O3
for pid in "${pids[@]}"; do wait "$pid"; done
for name in "${names[@]}"; do
  echo "== $name"
  count=$runs
  if [[ $name == threads ]]; then count=$((runs / 10)); fi # TSan is 20 times slower
  "$build/$name" "$build/views" "$count"
done
echo "nothing found"
