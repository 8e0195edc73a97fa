#!/usr/bin/env bash
# The coordinator is killed at random instants, in the middle of a checkpoint's writing too, and started again: the
# trained parameters have the SHA-256 of a run that nothing happened to, and the ledger proves every round.
#
#   scripts/kill-coordinator.sh [KILLS] [SEED]       default: 50 1
#
# Each kill has a run of its own: a coordinator and two workers, SIGKILL to the coordinator after a random time, and
# `lockstep coordinator --resume` at the same address. The workers come back by themselves. Prints one line a run. Exit
# codes: 0 all hashes are equal, 1 two differ, a run failed or an audit did not hold, 2 bad arguments.
#
# $LOCKSTEP names the binary; without it, `cargo build --release` makes one.
set -euo pipefail

kills=${1:-50}
RANDOM=${2:-1}
case $kills${2:-} in
    *[!0-9]*) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${LOCKSTEP:-}" ]; then
    (cd "$root" && cargo build --release --locked)
    LOCKSTEP=${CARGO_TARGET_DIR:-$root/target}/release/lockstep
fi
work=$(mktemp -d)
started=()
cleanup() {
    [ ${#started[@]} -eq 0 ] || kill -9 "${started[@]}" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

# Checkpoints come so thick that a kill often meets one being written.
settings=(--preset dense --max-rounds 60 --batch-size 128 --set checkpoint.every_rounds=2)

sha256_of() {
    sed -n 's/.*"params_sha256": "\([0-9a-f]\{64\}\)".*/\1/p' "$1/summary.json"
}

# coordinator OUT ADDRESS OPTION...: starts one in the background and waits until it listens. Sets $coordinator, $address.
coordinator() {
    local log=$1.log
    "$LOCKSTEP" coordinator --listen "$2" "${@:3}" >"$log" 2>&1 &
    coordinator=$!
    started+=("$coordinator")
    until address=$(grep -o '127.0.0.1:[0-9]*$' "$log"); do
        kill -0 "$coordinator" 2>/dev/null || { cat "$log" >&2; return 1; }
        sleep 0.02
    done
}

begun=$(date +%s%N)
"$LOCKSTEP" train "${settings[@]}" --workers 2 --out "$work/calm" >"$work/calm.log" 2>&1 || { cat "$work/calm.log"; exit 1; }
calm_ms=$((($(date +%s%N) - begun) / 1000000))
expected=$(sha256_of "$work/calm")
echo "calm: $calm_ms ms, sha256 $expected"

for ((kill = 1; kill <= kills; kill++)); do
    out=$work/$kill
    coordinator "$out" 127.0.0.1:0 "${settings[@]}" --out "$out"
    workers=()
    for name in a b; do
        "$LOCKSTEP" worker --coordinator "$address" --threads 1 --patience 60 --name "$name" >"$work/$name.log" 2>&1 &
        workers+=($!)
    done
    started+=("${workers[@]}")
    after_ms=$(((RANDOM * 32768 + RANDOM) % calm_ms))
    sleep "$((after_ms / 1000)).$(printf '%03d' $((after_ms % 1000)))"
    kill -9 "$coordinator" 2>/dev/null || true
    wait "$coordinator" 2>/dev/null || true
    rounds=$(grep -c '"chain"' "$out/ledger.jsonl" || true)
    partial=$(find "$out" -name '*.partial' | wc -l)
    coordinator "$out" "$address" --resume "$out"
    from=$(sed -n 's/^going on with .* after round //p' "$out.log")
    wait "$coordinator" || { cat "$out.log" >&2; exit 1; }
    for worker in "${workers[@]}"; do
        wait "$worker" || { cat "$work"/[ab].log >&2; exit 1; }
    done
    started=()
    "$LOCKSTEP" audit "$out" >"$work/audit" || exit 1
    sha256=$(sha256_of "$out")
    echo "kill $kill after $after_ms ms: about $rounds rounds on record, $partial files unfinished, resumed after round ${from:-0}: sha256 $sha256"
    [ "$sha256" = "$expected" ] || { echo "DIFFERENT from $expected"; exit 1; }
    rm -rf "$out"
done
echo "$kills kills, $kills equal hashes"
