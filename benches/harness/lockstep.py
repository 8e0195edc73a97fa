"""The program under test: how it is built, and what its runs say."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Rounds at the start of a run that do not count: memory is touched for the first time, shards arrive.
WARM_UP_ROUNDS = 20
# Seconds between two looks at the memory of a run. Each takes a fraction of a millisecond. The first ones are close
# together, for runs that end before a tenth of a second; then the pauses grow with the run, up to the longest.
SHORTEST_MEMORY_INTERVAL, LONGEST_MEMORY_INTERVAL = 0.005, 0.2


def build() -> Path:
    """Builds the release binary and returns its path."""
    subprocess.run(["cargo", "build", "--release", "--locked", "--quiet"], cwd=ROOT, check=True)
    return ROOT / "target" / "release" / "lockstep"


def bench(program: Path, *arguments: str) -> dict[str, Any]:
    """The document that `lockstep bench --json` prints."""
    command = [str(program), "bench", "--json", *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output)


def fma_gflops(program: Path, threads: int) -> float:
    """What the machine's cores can do at this moment: multiply-adds on `threads` threads, in GFLOP/s."""
    peaks = bench(program, "--quick", "--parts", "peak", "--threads", str(threads))["peaks"]
    return next(peak["gflops"]["median"] for peak in peaks if peak["threads"] == threads)


@dataclass(frozen=True)
class Run:
    """What one run of `lockstep train` took."""

    rounds: int
    # Over the rounds after the first ones, with everything that lies between two rounds of an epoch.
    steady_samples_per_second: float
    # From the start of the process to the last round's end, evaluations between epochs included.
    samples_per_second_with_start: float
    seconds_to_first_round: float
    seconds: float
    # Sum over all processes of the most that each of them used until the last round.
    peak_memory_mb: float


def train(program: Path, arguments: list[str], rounds: int, directory: Path) -> Run:
    """Runs `lockstep train` for some rounds in `directory`, which is emptied, and reads its events when it has ended.

    Nobody reads them meanwhile: with rounds of a few milliseconds, a reader would take part of a core all the time.
    """
    shutil.rmtree(directory, ignore_errors=True)
    # In the form for programs, a run ends with its last round and no baseline.
    command = [str(program), "train", "--json", *arguments]
    command += ["--epochs", "1000000", "--max-rounds", str(rounds), "--out", str(directory)]
    started, started_unix = time.monotonic(), time.time()
    memory: list[tuple[float, float]] = []
    with tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages, text=True)
        while process.poll() is None:
            memory.append((time.time() - started_unix, peak_memory_mb(process.pid)))
            time.sleep(memory_interval(time.monotonic() - started))
        seconds = time.monotonic() - started
        if process.returncode != 0:
            messages.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {messages.read().strip()}")
    events = [event for event in read_events(directory) if event.get("event") == "round"]
    first, last = (event["unix_ms"] / 1000 - started_unix for event in (events[0], events[-1]))
    samples = sum(event["samples"] for event in events)
    steady = steady_samples_per_second(events)
    # Of the training alone: peers do nothing after it.
    peak = max((mb for second, mb in memory if second <= last), default=0.0)
    return Run(len(events), steady, samples / last, first, seconds, peak)


def memory_interval(seconds: float) -> float:
    """How long to wait for the next look at the memory of a run that has taken so many seconds."""
    return min(max(0.1 * seconds, SHORTEST_MEMORY_INTERVAL), LONGEST_MEMORY_INTERVAL)


def read_events(directory: Path) -> list[dict[str, Any]]:
    """All events of a run that has ended."""
    with open(directory / "events.jsonl") as lines:
        return [json.loads(line) for line in lines]


def steady_samples_per_second(events: list[dict[str, Any]]) -> float:
    """Samples of the rounds after the first ones, by the time from one round's end to the next one's end.

    Between two epochs there is an evaluation, which is no part of a round: that time and the round after it do not
    count.
    """
    samples = milliseconds = 0
    counted = events[min(WARM_UP_ROUNDS, len(events) // 2) :]
    for before, event in zip(counted, counted[1:]):
        if before["epoch"] == event["epoch"]:
            samples += event["samples"]
            milliseconds += event["unix_ms"] - before["unix_ms"]
    return 1000 * samples / max(milliseconds, 1)


def peak_memory_mb(pid: int) -> float:
    """The most resident memory that a process and its descendants ever had, added up, in MB (10^6 bytes)."""
    total = 0.0
    for process in [pid, *descendants(pid)]:
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            continue  # It has just ended.
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024 / 1e6
    return total


def descendants(pid: int) -> list[int]:
    """Children of all the threads of a process, and theirs."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in children.read_text().split()]
        except OSError:
            continue
    return found + [grandchild for child in found for grandchild in descendants(child)]
