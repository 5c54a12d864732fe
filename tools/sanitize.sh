#!/usr/bin/env bash
# Fuzz the compiled augmentation under AddressSanitizer and UBSan, then its threads under TSan,
# then compare every instruction set with the first: bash tools/sanitize.sh [runs]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
runs=${1:-300}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
compiler=${CXX:-g++}
flags=(-std=c++17 -g -Wall -Wextra -pthread "-I$root/kernels")

fuzz() { # name, runs, flags: the dispatch by processor starts before a sanitizer does, so not both
  echo "== $1"
  "$compiler" "${flags[@]}" "${@:3}" "$root/kernels/augment/fuzz.cpp" -o "$build/fuzz"
  "$build/fuzz" "$build/views" "$2"
}

fuzz "address and undefined behaviour" "$runs" -O1 -DSSLUS_NO_CLONES \
  -fsanitize=address,undefined -fno-sanitize-recover=all
fuzz "threads" "$((runs / 10))" -O1 -DSSLUS_NO_CLONES -fsanitize=thread
fuzz "baseline" "$runs" -O3 -DSSLUS_NO_CLONES
fuzz "this processor" "$runs" -O3
echo "nothing found"
