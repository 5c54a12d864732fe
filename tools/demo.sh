#!/usr/bin/env bash
# The whole way on synthetic data, on a fresh machine: set up, make videos, shard, train, evaluate.
# Run it again and it goes on where it was, or shows the result again.
#   DEMO_DIR     where everything goes (default: demo in the checkout)
#   DEMO_VIDEOS  clips to make (default 40)     DEMO_SECONDS  their length (default "2 4")
#   DEMO_STEPS   training steps (default 150)
set -euo pipefail
# shellcheck source=tools/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
demo=${DEMO_DIR:-$root/demo}
videos=${DEMO_VIDEOS:-40}
steps=${DEMO_STEPS:-150}
read -r shortest longest <<<"${DEMO_SECONDS:-2 4}"
mkdir -p "$demo"
cd "$demo"

bold="" plain=""
if [ -t 1 ]; then bold=$'\033[1m' plain=$'\033[0m'; fi  # no codes in a log file
say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
step() {
  say "\$ sslus $*"
  "$sslus" "$@"
}

step synth videos --videos "$videos" --patients 10 --seed 0 --seconds "$shortest" "$longest"
step shard videos --stride 2
if [ -e run/config.json ]; then
  step train --run run --resume
else
  # Small enough for two cores; on a GPU leave these out.
  # So few steps do not make up for residual blocks that start at 0 (ssl/README.md).
  step train --method vicreg --max-steps "$steps" --run run --no-zero-init-residual \
    --image-size 64 --projector 512-512-512 --lr 1e-3
fi
step evaluate run --labels videos/labels.csv -o report

say "Done. Everything is in $demo:"
cat <<END
  videos/               synthetic clips and labels.csv: no patient data
  shards/               their frames, ready for training
  run/curves.png        loss, learning rate and health of the training
  run/backbone.safetensors
  report/               the table above, confusion matrices
With your own videos: $sslus shard PATH/TO/VIDEOS
END
