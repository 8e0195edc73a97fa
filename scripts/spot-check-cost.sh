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

source "$(dirname "$0")/turns.sh"

# one KIND LEAVES: one run in which one leaf in so many is checked, none for 0.
one() {
    train "$1" --workers 2 --preset "$preset" --max-rounds "$rounds" --set "cluster.spot_check=$2" --set checkpoint.every_seconds=0
    sed -n 's/.*"params_sha256": "\([0-9a-f]*\)".*/\1/p' "$work/run/summary.json" >>"$work/hashes"
    echo "$1: training $wall s, processor $cpu s, rounds with a checked leaf: $(grep -c '"checked":\[[^]]' "$work/run/ledger.jsonl" || true)"
}

for ((repeat = 0; repeat < repeats; repeat++)); do
    one with 256
    one without 0
done
[ "$(sort -u "$work/hashes" | wc -l)" -eq 1 ] || { echo "DIFFERENT:"; cat "$work/hashes"; exit 1; }
ratios "spot checks"
