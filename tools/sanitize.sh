#!/usr/bin/env bash
# Fuzz the decoders of JPEG and of DICOM's run lengths and the compiled augmentation under
# AddressSanitizer and UBSan, then the latter's threads under TSan; then compare every instruction
# set with the first: bash tools/sanitize.sh [runs]
# Compiling takes most of the time, so all compile at once.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
runs=${1:-300}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
compiler=${CXX:-g++}
flags=(-std=c++17 -g1 -Wall -Wextra -pthread "-I$root/kernels")
names=() pids=()

compile() { # name, source, flags: dispatch by processor starts before a sanitizer does, so not both
  "$compiler" "${flags[@]}" "${@:3}" "$root/$2" -o "$build/$1" &
  names+=("$1") pids+=($!)
}

views=kernels/augment/fuzz.cpp
checks=(-O1 -fsanitize=address,undefined -fno-sanitize-recover=all)
compile jpeg engine/jpeg_fuzz.cpp "${checks[@]}"
compile packbits engine/packbits_fuzz.cpp "${checks[@]}"
compile address $views -DSSLUS_NO_CLONES "${checks[@]}"
compile threads $views -O1 -DSSLUS_NO_CLONES -fsanitize=thread
compile baseline $views -O3 -DSSLUS_NO_CLONES -DSSLUS_OLD_COMPILER # and without their newer builtins
compile processor $views -O3
for pid in "${pids[@]}"; do wait "$pid"; done
for name in "${names[@]}"; do
  echo "== $name"
  count=$runs
  if [[ $name == jpeg || $name == packbits ]]; then
    "$build/$name" $((runs * 30))
    continue
  fi
  if [[ $name == threads ]]; then count=$((runs / 10)); fi # TSan is 20 times slower
  "$build/$name" "$build/views" "$count"
done
echo "nothing found"
