# For scripts that compare two kinds of runs, `with` something and `without`, which take turns. To be sourced.
#
# Sets $LOCKSTEP (built if need be) and $work, a directory that goes when the script ends.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${LOCKSTEP:-}" ]; then
    (cd "$root" && cargo build --release --locked)
    LOCKSTEP=${CARGO_TARGET_DIR:-$root/target}/release/lockstep
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# train KIND OPTION...: one run in $work/run, its log in $work/stderr; appends its training time and its processor time to
# KIND.wall and KIND.cpu, which are then in $wall and $cpu.
train() {
    local kind=$1 TIMEFORMAT='%U %S'
    shift
    rm -rf "$work/run"
    { time LOCKSTEP_LOG=info "$LOCKSTEP" train --out "$work/run" --json "$@" >"$work/stdout" 2>"$work/stderr"; } 2>"$work/time" ||
        { cat "$work/stderr"; exit 1; }
    wall=$(sed -n 's/.*"wall_seconds": \([0-9.]*\).*/\1/p' "$work/run/summary.json")
    cpu=$(awk '{ print $1 + $2 }' "$work/time")
    echo "$wall" >>"$work/$kind.wall"
    echo "$cpu" >>"$work/$kind.cpu"
}

median() {
    sort -n "$1" | awk '{ value[NR] = $1 } END { print (value[int((NR + 1) / 2)] + value[int((NR + 2) / 2)]) / 2 }'
}

# ratios WHAT: the medians of both kinds, and how much more time it is with it.
ratios() {
    local kind with without
    for kind in wall cpu; do
        with=$(median "$work/with.$kind") without=$(median "$work/without.$kind")
        echo "median $kind time: $with s with $1, $without s without: $(awk "BEGIN { printf \"%+.2f\", ($with / $without - 1) * 100 }") %"
    done
}
