#!/usr/bin/env bash
# What checkpoints cost: the training time of the same run with checkpoints every few seconds and without any.
#
#   scripts/checkpoint-cost.sh [PRESET] [ROUNDS] [SECONDS] [REPEATS]       default: wide 200 5 3
#
# The two kinds take turns, so that whatever else the machine does meets both. Prints the training time and the processor
# time (of all threads) of every run, the medians and their ratio, how large a checkpoint is, and how long the writing of
# each took in the background. Where the machine's speed changes by more than checkpoints cost, the last line is the one
# to look at: by how much the rounds after each checkpoint were longer than those before it, of the same run.
# Exit codes: 0 done, 1 a run failed, 2 bad arguments.
#
# $LOCKSTEP names the binary; without it, `cargo build --release` makes one.
set -euo pipefail

preset=${1:-wide}
rounds=${2:-200}
seconds=${3:-5}
repeats=${4:-3}
case $rounds$seconds$repeats in
    *[!0-9]*) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

source "$(dirname "$0")/turns.sh"

# What each checkpoint of the run cost, in milliseconds, a line each: from one round's end to the next one's, for the
# seven after it, less the median of the ten before it and the four after those.
cost_of_each() {
    python3 - "$work/run/events.jsonl" "$work/stderr" <<'PYTHON'
import json, re, statistics, sys

events, log = (open(path).read() for path in sys.argv[1:])
ends = [event["unix_ms"] for event in map(json.loads, events.splitlines()) if event["event"] == "round"]
took = [after - before for before, after in zip(ends, ends[1:])]
for rounds in map(int, re.findall(r"checkpoint after round (\d+) written", log)):
    first = rounds - 1
    before, slowed, after = took[max(0, first - 10) : first], took[first : first + 7], took[first + 7 : first + 11]
    if len(before) == 10 and len(after) == 4:
        print(sum(slowed) - 7 * statistics.median(before + after))
PYTHON
}

# one KIND SECONDS: one run with a checkpoint every so many seconds, none for 0.
one() {
    train "$1" --preset "$preset" --max-rounds "$rounds" --set "checkpoint.every_seconds=$2"
    sed -n 's/.*checkpoint after round [0-9]* written in \([0-9.]*\) s.*/\1/p' "$work/stderr" >>"$work/$1.written"
    cost_of_each >>"$work/$1.each"
    echo "$1: training $wall s, processor $cpu s, $(grep -c 'written in' "$work/stderr") checkpoints"
}

for ((repeat = 0; repeat < repeats; repeat++)); do
    one with "$seconds"
    one without 0
done
ratios "checkpoints every $seconds s"
each=$(median "$work/with.each")
echo "a checkpoint has $(stat -c %s "$work"/run/checkpoints/*.checkpoint | tail -1) bytes; written in $(median "$work/with.written") s (median), in the background"
echo "each made the rounds around it $each ms longer (median of $(wc -l <"$work/with.each")): $(awk "BEGIN { printf \"%.2f\", $each / 10 / $seconds }") % of $seconds s"
