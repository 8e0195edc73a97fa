#!/usr/bin/env bash
# What spot checks cost: the same run with two workers, with about one leaf in 256 computed twice, and with none.
#
#   scripts/spot-check-cost.sh [PRESET] [ROUNDS] [REPEATS]       default: article 150 3
#
# The two kinds take turns, so that whatever else the machine does meets both. Prints the training time and the processor
# time (of all processes) of every run, how many leaves were checked, the medians and their ratio. Exit codes: 0 done, 1 a
# run failed or the hashes differ, 2 bad arguments.
#
# $LOCKSTEP names the binary; without it, `cargo build --release` makes one.
set -euo pipefail

preset=${1:-article}
rounds=${2:-150}
repeats=${3:-3}
case $rounds$repeats in
    *[!0-9]*) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${LOCKSTEP:-}" ]; then
    (cd "$root" && cargo build --release --locked)
    LOCKSTEP=${CARGO_TARGET_DIR:-$root/target}/release/lockstep
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# train NAME LEAVES: one run in which one leaf in so many is checked, none for 0; appends to NAME.wall and NAME.cpu.
train() {
    local out=$work/run TIMEFORMAT='%U %S' wall cpu
    rm -rf "$out"
    { time "$LOCKSTEP" train --workers 2 --preset "$preset" --max-rounds "$rounds" --out "$out" --json \
        --set "cluster.spot_check=$2" --set checkpoint.every_seconds=0 >"$work/stdout" 2>"$work/stderr"; } 2>"$work/time" ||
        { cat "$work/stderr"; exit 1; }
    wall=$(sed -n 's/.*"wall_seconds": \([0-9.]*\).*/\1/p' "$out/summary.json")
    cpu=$(awk '{ print $1 + $2 }' "$work/time")
    echo "$wall" >>"$work/$1.wall"
    echo "$cpu" >>"$work/$1.cpu"
    sed -n 's/.*"params_sha256": "\([0-9a-f]*\)".*/\1/p' "$out/summary.json" >>"$work/hashes"
    echo "$1: training $wall s, processor $cpu s, rounds with a checked leaf: $(grep -c '"checked":\[[^]]' "$out/ledger.jsonl" || true)"
}

median() {
    sort -n "$1" | awk '{ value[NR] = $1 } END { print (value[int((NR + 1) / 2)] + value[int((NR + 2) / 2)]) / 2 }'
}

for ((repeat = 0; repeat < repeats; repeat++)); do
    train with 256
    train without 0
done
[ "$(sort -u "$work/hashes" | wc -l)" -eq 1 ] || { echo "DIFFERENT:"; cat "$work/hashes"; exit 1; }
for kind in wall cpu; do
    with=$(median "$work/with.$kind") without=$(median "$work/without.$kind")
    echo "median $kind time: $with s with spot checks, $without s without: $(awk "BEGIN { printf \"%+.2f\", ($with / $without - 1) * 100 }") %"
done
