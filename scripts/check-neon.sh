#!/usr/bin/env bash
# The NEON path, checked without an ARM machine: tests are built for 64-bit ARM and run in an emulator.
#
#   scripts/check-neon.sh [TEST...]       tests of lockstep-common by file name; default: golden_hash, contraction,
#                                         sparse_products, bf16_products, blocked_products, same_bits
#   scripts/check-neon.sh train           a whole run, there and here: one hash
#
# The toolchain of the ordinary build has no standard library for ARM. So this uses Debian's rustc-web, whose library
# for arm64 is a package. It is unpacked below target/neon and not installed: it would conflict with other compilers.
# The cross linker, the C library and QEMU are installed if they are missing, which takes root.
#
# Exit codes: 0 passed, or the packages cannot be had (the last line says so), 1 failed, 2 bad arguments.
set -euo pipefail
cd "$(dirname "$0")/.."

tests=("$@")
[ ${#tests[@]} -gt 0 ] || tests=(golden_hash contraction sparse_products bf16_products blocked_products same_bits)
options=()
train=false
for test in "${tests[@]}"; do
    case $test in
        -*) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
        train) train=true ;;
        *) options+=(--test "$test") ;;
    esac
done

tools=$PWD/target/neon
target=aarch64-unknown-linux-gnu

skip() {
    echo "skipped: $1; the NEON path is not checked"
    exit 0
}

# Lists and packages of our own, so that the machine's architectures stay as they are.
apt() {
    apt-get --quiet=2 -o APT::Architecture=amd64 -o APT::Architectures::=amd64 -o APT::Architectures::=arm64 \
        -o Dir::State::lists="$tools/lists" -o Dir::Cache="$tools/cache" -o Acquire::Languages=none \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o APT::Sandbox::User=root "$@"
}

find_compiler() {
    [ ! -x "$tools/rustc" ] || return 0
    command -v apt-get >/dev/null || skip "no apt-get"
    [ "$(dpkg --print-architecture)" = amd64 ] || skip "the packages are for an amd64 host"
    mkdir -p "$tools"/{lists,cache/archives}/partial "$tools/root"
    apt update || skip "no package lists"
    apt install --download-only --no-install-recommends --yes rustc-web >"$tools/log" 2>&1 ||
        skip "rustc-web cannot be had: $(tail -n 1 "$tools/log")"
    (cd "$tools/cache/archives" && apt download libstd-rust-web-dev:arm64) || skip "no standard library for arm64"
    local package
    for package in "$tools"/cache/archives/*.deb; do
        dpkg --extract "$package" "$tools/root"
    done
    # The compiler finds its own libraries, and nothing else does.
    cat >"$tools/rustc" <<'SCRIPT'
#!/bin/sh
root=$(dirname "$0")/root/usr
LD_LIBRARY_PATH=$root/lib/x86_64-linux-gnu exec "$root/bin/rustc" "$@"
SCRIPT
    chmod +x "$tools/rustc"
}

find_emulator() {
    if command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64 >/dev/null; then
        return
    fi
    [ "$(id -u)" = 0 ] || skip "install gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user, or run this as root"
    apt-get --quiet=2 update || skip "no package lists"
    apt-get --quiet=2 install --no-install-recommends --yes gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user \
        >"$tools/log" 2>&1 || skip "the cross linker and QEMU cannot be installed: $(tail -n 1 "$tools/log")"
}

find_compiler
find_emulator

host_target=${CARGO_TARGET_DIR:-$PWD/target}
host_rustc=${RUSTC:-rustc}
export RUSTC=$tools/rustc CARGO_TARGET_DIR=$tools/build
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"

if [ ${#options[@]} -gt 0 ]; then
    cargo test --locked --target $target -p lockstep-common "${options[@]}"
fi
if $train; then
    cargo build --release --locked --target $target
    RUSTC=$host_rustc CARGO_TARGET_DIR=$host_target cargo build --release --locked
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # Small enough for an emulator: every layer of the convolutional preset, and some rounds of Adam.
    arguments=(train --json --preset conv --batch-size 32 --shards 8 --max-rounds 6 --set data.validation_fraction=0.01)
    hash() {
        grep -o '"params_sha256": "[0-9a-f]*"' "$work/$1/summary.json"
    }
    "$host_target/release/lockstep" "${arguments[@]}" --out "$work/here" >/dev/null
    qemu-aarch64 -L /usr/aarch64-linux-gnu "$tools/build/$target/release/lockstep" "${arguments[@]}" --out "$work/arm" >/dev/null
    echo "here: $(hash here)"
    echo "NEON: $(hash arm)"
    [ "$(hash here)" = "$(hash arm)" ] || { echo "the two differ"; exit 1; }
fi
