#!/usr/bin/env bash
# What CI cannot check without a GPU: bash tools/gpu_check.sh [--minutes 9] [--only STEP,...] [...]
#
# Builds and installs this checkout into a temporary folder without a network, runs the tests that
# need a GPU (there, one that would skip fails), trains every method on synthetic shards, evaluates,
# and measures. Every step runs, whatever became of the ones before, and has a share of the minutes;
# what it leaves, the ones after it share. A stage that is cut keeps the rows it has. Python and the
# packages that sslus needs must be there (PYTHON, PYTHONPATH); without DALI, or without PyAV and
# simplejpeg, what needs them is left out, and said.
#
#   --minutes N   for everything (default 9)
#   --only A,B    these steps alone, and build; *: any letters (kernels,bench-*). blocks, which
#                 times other block sizes for the losses, takes minutes and wants to be named
#   --out DIR     log, summary.tsv, bench.json, blocks.json, roofline.png, metrics.jsonl
#                 (default $OUT or build/gpu_check)
#   --device cpu  the same steps without a GPU, small, to try this script out
#   --dry-run     only print the steps
# Exits with 1 if a step failed.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
minutes=9 out=${OUT:-$root/build/gpu_check} device=cuda dry= only='*'

usage() {
  sed -n '2,/^# Exits/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit "$1"
}
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=${2:?--minutes wants a number}; shift 2 ;;
    --only) only=${2:?--only wants names of steps}; shift 2 ;;
    --out) out=${2:?--out wants a folder}; shift 2 ;;
    --device) device=${2:?--device wants cuda or cpu}; shift 2 ;;
    --dry-run) dry=1; shift ;;
    -h | --help) usage 0 ;;
    *) echo "gpu_check: unknown option $1" >&2; usage 2 >&2 ;;
  esac
done
case $minutes in
  '' | *[!0-9]*) echo "gpu_check: --minutes wants a whole number, got $minutes" >&2; exit 2 ;;
esac
case $device in
  cuda) export SSLUS_REQUIRE_GPU=1; small=() ;;
  cpu) small=(--quick) ;;
  *) echo "gpu_check: --device wants cuda or cpu, got $device" >&2; exit 2 ;;
esac

end=$((SECONDS + 60 * minutes))
failed=0
work=\$work # only shown, until it is made
[[ $out == /* ]] || out=$PWD/$out
cd "$root" || exit 1

has() { "$python" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$1'))" 2>/dev/null; }
missing=
for package in av simplejpeg nvidia.dali; do has "$package" || missing+=" $package"; done

wanted() {
  local name names
  IFS=, read -ra names <<<"build,$only"
  for name in "${names[@]}"; do
    # shellcheck disable=SC2053 # a pattern
    [[ $1 == $name ]] && return
  done
  return 1
}

# step NAME SHARE COMMAND...: within its share of the time that is left. `total` is the shares of
# the steps to come; while they are added up (`adding`), nothing else is done. `needs`: packages.
# `known`: the names of all steps.
total=0 adding=1 needs= known=()
step() {
  local name=$1 share=$2 left=$((end - SECONDS)) start=$SECONDS limit status result package
  shift 2
  [ -z "$adding" ] || known+=("$name")
  wanted "$name" || return
  for package in $needs; do
    [[ " $missing " == *" $package "* ]] || continue
    [ -z "$adding" ] || return
    if [ -n "$dry" ]; then
      printf '%-14s left out: no %s\n' "$name" "$package"
    else
      printf '%s\tleft out: no %s\t0\n' "$name" "$package" >>"$out/summary.tsv"
    fi
    return
  done
  if [ -n "$adding" ]; then
    total=$((total + share))
    return
  fi
  limit=$((left > 0 ? left * share / total : 0))
  total=$((total - share))
  if [ -n "$dry" ]; then
    printf '%-14s %4s s  %s\n' "$name" "$limit" "$*"
    end=$((end - limit))
    return
  fi
  printf '\n=== %s (at most %s s): %s\n' "$name" "$limit" "$*" | tee -a "$out/gpu_check.log"
  if [ "$limit" -lt 5 ]; then
    result="no time left"
  else
    # As Ctrl-C does it: pytest then tells what has failed so far.
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/gpu_check.log"
    status=${PIPESTATUS[0]}
    case $status in
      0) result=ok ;;
      124 | 137) result="ran past $limit s" ;;
      *) result="failed ($status)" ;;
    esac
  fi
  [ "$result" = ok ] || failed=$((failed + 1))
  printf '%s\t%s\t%s\n' "$name" "$result" "$((SECONDS - start))" >>"$out/summary.tsv"
}

sslus=("$python" -m sslus.tools)
if [ "$device" = cuda ]; then
  clips=(--videos 42 --patients 14) steps=(--max-steps 100) few=(--max-steps 20) captured=graph
else
  clips=(--videos 8 --patients 2 --size 128 --seconds 1 1) captured=eager
  steps=(--max-steps 4 --batch-size 8 --image-size 32) few=("${steps[@]}")
fi
# The kernels' tests mostly wait for Triton's compiler: on all cores, if pytest-xdist is there.
# Those that only compile need no GPU: CI runs them. A test file that cannot be read is one error.
pytest=("$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors)
spread=()
if has xdist; then spread=(--numprocesses "$(nproc)"); fi
kernels="gpu and not compiles_without_spills and not test_bench"

# The rows of all stages so far, in one file.
gather() {
  [ -z "$adding$dry" ] && wanted "bench-$name" || return
  "$python" - "$out/bench.json" "$work"/bench-*.json <<'PYTHON'
import json, pathlib, sys

out, *parts = map(pathlib.Path, sys.argv[1:])
found = [json.loads(part.read_text()) for part in parts if part.exists()]
merged = {key: [x for part in found for x in part[key]] for key in ("rows", "ratios")}
out.write_text(json.dumps(merged, indent=1) + "\n")
PYTHON
}

all() {
  local files="av simplejpeg" shard_on=$device
  [[ $missing != *nvidia.dali* ]] || shard_on=cpu
  needs=
  # All others need it; what it leaves is theirs.
  step build 150 "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation \
    --disable-pip-version-check --target "$work/site" .
  step doctor 15 "${sslus[@]}" doctor
  step kernels 110 "${pytest[@]}" -k "$kernels" -m 'not gpu' "${spread[@]}"
  step tests 50 "${pytest[@]}" -m gpu "${spread[@]}"
  needs=$files
  step synth 20 "${sslus[@]}" synth "$work/videos" "${clips[@]}"
  step shard 12 "${sslus[@]}" shard "$work/videos" -o "$work/shards" --device "$shard_on" \
    --labels "$work/videos/labels.csv"
  step train 30 "${sslus[@]}" train "$work/shards" --method vicreg "${steps[@]}" \
    --step "$captured" --device "$device" --run "$work/run"
  [ ! -f "$work/run/metrics.jsonl" ] || cp "$work/run/metrics.jsonl" "$out/metrics.jsonl"
  step evaluate 20 "${sslus[@]}" evaluate "$work/run" --labels "$work/videos/labels.csv" \
    --protocol knn,finetune --fractions 100 --seeds 1 --steps 20 --device "$device"
  # Every method: as it is, and as a graph.
  step train-eager 50 "${sslus[@]}" train "$work/shards" --method all "${few[@]}" --step eager \
    --device "$device" --run "$work/eager"
  step train-graph 50 "${sslus[@]}" train "$work/shards" --method all "${few[@]}" \
    --step "$captured" --device "$device" --run "$work/graph"
  # It compiles the step, which takes a minute for a small backbone.
  step train-auto 60 "${sslus[@]}" train "$work/shards" --method vicreg "${few[@]}" \
    --backbone resnet18 --image-size 96 --device "$device" --run "$work/auto"
  # The last two have nothing on the GPU.
  for stage in losses:90 augment:25 train:40 decode:30 shard:30 loader:8 store:8; do
    # With the clips just made; without them (synth failed) bench/run.py makes its own.
    data=()
    { [ -z "$dry" ] && [ ! -f "$work/videos/labels.csv" ]; } || data=(--data "$work/videos")
    name=${stage%:*}
    case $name in
      losses) needs= ;;
      decode) needs="$files nvidia.dali" ;; # a peer of it even on the CPU
      shard) needs=$files; [ "$device" = cpu ] || needs+=" nvidia.dali" ;;
      *) needs=$files ;;
    esac
    step "bench-$name" "${stage#*:}" "$python" bench/run.py --stage "$name" --device "$device" \
      "${small[@]}" "${data[@]}" --json "$work/bench-$name.json"
    gather
  done
  needs=
  [[ ,$only, != *,blocks,* ]] || step blocks 400 "$python" bench/blocks.py -o "$out/blocks.json"
  step roofline 8 "$python" bench/roofline.py "$out/bench.json" -o "$out/roofline.png"
}
all
adding=
# Before anything is built, or removed.
IFS=, read -ra patterns <<<"$only"
for pattern in "${patterns[@]}"; do
  for name in "${known[@]}"; do
    # shellcheck disable=SC2053 # a pattern
    [[ $name == $pattern ]] && continue 2
  done
  echo "gpu_check: --only: no step matches '$pattern'; want some of ${known[*]}" >&2
  exit 2
done
if [ -z "$dry" ]; then
  work=$(mktemp -d) || exit 1
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$out" || exit 1
  # What an earlier run left would pass for this one's.
  rm -f "$out"/{gpu_check.log,summary.tsv,metrics.jsonl,bench.json,blocks.json,roofline.png}
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
fi
all

if [ -z "$dry" ]; then
  printf '\n%-14s %-26s %8s\n' step result seconds | tee -a "$out/gpu_check.log"
  while IFS=$'\t' read -r name result seconds; do
    printf '%-14s %-26s %8s\n' "$name" "$result" "$seconds"
  done <"$out/summary.tsv" | tee -a "$out/gpu_check.log"
fi
[ "$failed" = 0 ]
