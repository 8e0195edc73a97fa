#!/usr/bin/env python3
"""Peak memory of a coordinator and its worker processes.

  scripts/peak-memory.py [WORKERS [PRESET [SOURCE [ROUNDS]]]]        default: 2 article fashion-mnist 40

Trains, and reads each process' VmHWM (peak resident set), RssShmem and RssFile (shared memory, and pages of the program
and its libraries, in it) from /proc until it ends. The total counts memory that processes share once: it is the sum of the
peaks, less the workers' shared memory and program pages, which the coordinator has mapped as well. $LOCKSTEP names the
binary; without it, target/release/lockstep is used.
Exit codes: 0 done, 1 the run failed. Linux only.
"""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

INTERVAL_SECONDS = 0.02


def fields(pid):
    """VmHWM and RssShmem in KiB; None when the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = dict(line.split(":", 1) for line in lines)
    if "VmHWM" not in found:
        return None
    return tuple(int(found[name].split()[0]) for name in ("VmHWM", "RssShmem", "RssFile"))


def descendants(pid):
    """Workers are started by any thread of the coordinator."""
    found = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        try:
            found += [int(child) for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split()]
        except OSError:
            pass
    return found


def main(arguments):
    defaults = ["2", "article", "fashion-mnist", "40"]
    workers, preset, source, rounds = arguments + defaults[len(arguments):]
    binary = os.environ.get("LOCKSTEP", "target/release/lockstep")
    with tempfile.TemporaryDirectory() as directory:
        command = [binary, "train", "--json", "--preset", preset, "--data", source, "--workers", workers]
        command += ["--set", "batch_size=256", "--max-rounds", rounds, "--out", f"{directory}/run"]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peaks = {}
        while run.poll() is None:
            for pid in [run.pid, *descendants(run.pid)]:
                now = fields(pid)
                if now:
                    peaks[pid] = tuple(map(max, now, peaks.get(pid, now)))
            time.sleep(INTERVAL_SECONDS)
    if run.returncode != 0 or not peaks:
        print(f"the run failed with {run.returncode}", file=sys.stderr)
        return 1
    total = 0
    for pid, (peak, shared, program) in peaks.items():
        coordinator = pid == run.pid
        total += peak if coordinator else peak - shared - program
        role = "coordinator" if coordinator else "worker"
        print(f"{role:12} {peak / 1024:7.1f} MiB, of which shared {shared / 1024:5.1f}, program {program / 1024:5.1f}")
    print(f"{'total':12} {total / 1024:7.1f} MiB, what is shared counted once")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
