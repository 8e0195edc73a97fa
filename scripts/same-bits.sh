#!/usr/bin/env bash
# The promise, checked at full size: the trained parameters have one SHA-256, whatever computed them.
#
#   scripts/same-bits.sh [PRESET...] [ROUNDS]        default: dense article 20
#
# Trains each preset for ROUNDS rounds (batch 256, 16 shards, the bundled images) with one worker inside the process for
# 1 and 2 threads and for every instruction set of this machine, and with 1, 2, 3, 5 and 8 worker processes. Prints a
# table. Exit codes: 0 all hashes of a preset are equal, 1 two differ or a run failed, 2 bad arguments.
#
# $LOCKSTEP names the binary to check; without it, `cargo build --release` makes one.
set -euo pipefail

presets=()
rounds=20
for argument in "$@"; do
    case $argument in
        -*) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
        *[!0-9]*) presets+=("$argument") ;;
        *) rounds=$argument ;;
    esac
done
[ ${#presets[@]} -gt 0 ] || presets=(dense article)
if [ "$rounds" -lt 1 ]; then
    echo "error: rounds is $rounds; it must be at least 1" >&2
    exit 2
fi

root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${LOCKSTEP:-}" ]; then
    (cd "$root" && cargo build --release --locked)
    LOCKSTEP=${CARGO_TARGET_DIR:-$root/target}/release/lockstep
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The error for a name that no instruction set has lists those of this machine.
instruction_sets=$("$LOCKSTEP" train --simd none 2>&1 | sed -n 's/.*this machine has: //p' | tr -d ',') || true
if [ -z "$instruction_sets" ]; then
    echo "error: $LOCKSTEP does not say which instruction sets this machine has" >&2
    exit 1
fi

runs=0
# train PRESET WORKERS OPTION...: one run and its line of the table. WORKERS is 0 for a worker inside the process.
train() {
    local preset=$1 workers=$2
    shift 2
    runs=$((runs + 1))
    local out=$work/$runs options=("$@") start=$SECONDS sha256
    [ "$workers" = 0 ] || options+=(--workers "$workers")
    if ! "$LOCKSTEP" train --preset "$preset" --batch-size 256 --shards 16 --epochs 1000000 --max-rounds "$rounds" \
        --out "$out" "${options[@]}" >"$work/log" 2>&1; then
        cat "$work/log" >&2
        echo "error: preset $preset with ${options[*]} failed" >&2
        exit 1
    fi
    sha256=$(sed -n 's/.*"params_sha256": "\([0-9a-f]\{64\}\)".*/\1/p' "$out/summary.json")
    printf '%-8s  %-36s  %4d s  %s\n' "$preset" "${options[*]}" "$((SECONDS - start))" "$sha256"
    echo "$sha256" >>"$work/$preset.hashes"
}

printf '%-8s  %-36s  %6s  %s\n' preset options time "params_sha256 after $rounds rounds"
for preset in "${presets[@]}"; do
    for threads in 1 2; do
        train "$preset" 0 --threads "$threads"
    done
    for simd in $instruction_sets; do
        train "$preset" 0 --simd "$simd"
    done
    for workers in 1 2 3 5 8; do
        train "$preset" "$workers"
    done
    train "$preset" 2 --threads 2 --simd scalar
done

failed=0
for preset in "${presets[@]}"; do
    different=$(sort -u "$work/$preset.hashes" | wc -l)
    if [ "$different" -ne 1 ]; then
        echo "DIFFERENT: preset $preset has $different hashes"
        failed=1
    fi
done
[ "$failed" = 1 ] || echo "the same bits: $runs runs, one hash for each of: ${presets[*]}"
exit "$failed"
