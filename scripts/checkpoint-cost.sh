#!/usr/bin/env bash
# What checkpoints cost: the training time of the same run with checkpoints every few seconds and without any.
#
#   scripts/checkpoint-cost.sh [PRESET] [ROUNDS] [SECONDS] [REPEATS]       default: wide 200 5 3
#
# The two kinds take turns, so that whatever else the machine does meets both. Prints the training time and the processor
# time (of all threads) of every run, the medians and their ratio, how large a checkpoint is, and how long the writing of
# each took in the background. Exit codes: 0 done, 1 a run failed, 2 bad arguments.
#
# $LOCKSTEP names the binary; without it, `cargo build --release` makes one.
set -euo pipefail

preset=${1:-wide}
rounds=${2:-200}
seconds=${3:-5}
repeats=${4:-3}
case $rounds$seconds$repeats in
    *[!0-9]*) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${LOCKSTEP:-}" ]; then
    (cd "$root" && cargo build --release --locked)
    LOCKSTEP=${CARGO_TARGET_DIR:-$root/target}/release/lockstep
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# train NAME SECONDS: one run; appends its training time and its processor time to NAME.wall and NAME.cpu.
train() {
    local out=$work/run TIMEFORMAT='%U %S' wall cpu
    rm -rf "$out"
    { time LOCKSTEP_LOG=info "$LOCKSTEP" train --preset "$preset" --max-rounds "$rounds" --out "$out" --json \
        --set "checkpoint.every_seconds=$2" >"$work/stdout" 2>"$work/stderr"; } 2>"$work/time" || { cat "$work/stderr"; exit 1; }
    wall=$(sed -n 's/.*"wall_seconds": \([0-9.]*\).*/\1/p' "$out/summary.json")
    cpu=$(awk '{ print $1 + $2 }' "$work/time")
    echo "$wall" >>"$work/$1.wall"
    echo "$cpu" >>"$work/$1.cpu"
    sed -n 's/.*checkpoint after round [0-9]* written in \([0-9.]*\) s.*/\1/p' "$work/stderr" >>"$work/$1.written"
    echo "$1: training $wall s, processor $cpu s, $(grep -c 'written in' "$work/stderr") checkpoints"
}

median() {
    sort -n "$1" | awk '{ value[NR] = $1 } END { print (value[int((NR + 1) / 2)] + value[int((NR + 2) / 2)]) / 2 }'
}

for ((repeat = 0; repeat < repeats; repeat++)); do
    train with "$seconds"
    train without 0
done
for kind in wall cpu; do
    with=$(median "$work/with.$kind") without=$(median "$work/without.$kind")
    echo "median $kind time: $with s with checkpoints every $seconds s, $without s without: $(awk "BEGIN { printf \"%+.2f\", ($with / $without - 1) * 100 }") %"
done
echo "a checkpoint has $(stat -c %s "$work"/run/checkpoints/*.checkpoint | tail -1) bytes; written in $(median "$work/with.written") s (median), in the background"
