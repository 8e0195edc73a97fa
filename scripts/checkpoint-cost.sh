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

source "$(dirname "$0")/turns.sh"

# one KIND SECONDS: one run with a checkpoint every so many seconds, none for 0.
one() {
    train "$1" --preset "$preset" --max-rounds "$rounds" --set "checkpoint.every_seconds=$2"
    sed -n 's/.*checkpoint after round [0-9]* written in \([0-9.]*\) s.*/\1/p' "$work/stderr" >>"$work/$1.written"
    echo "$1: training $wall s, processor $cpu s, $(grep -c 'written in' "$work/stderr") checkpoints"
}

for ((repeat = 0; repeat < repeats; repeat++)); do
    one with "$seconds"
    one without 0
done
ratios "checkpoints every $seconds s"
echo "a checkpoint has $(stat -c %s "$work"/run/checkpoints/*.checkpoint | tail -1) bytes; written in $(median "$work/with.written") s (median), in the background"
