"""Who is compared: Lockstep, by whole runs, and peers, which are processes that stay and take steps on request."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from harness import lockstep

PEERS = Path(__file__).resolve().parent / "peers"

# What made the peers fastest: freed memory is kept, so that no pass meets fresh pages.
PEER_ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}

# A library for other processors, or for other caches, would be slower.
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


@dataclass(frozen=True)
class Task:
    """What all contenders of one comparison train, on which cores."""

    model: Path
    data: Path
    batch: int
    cores: list[int]
    # None: in one process, with a thread for each core. Else so many processes, each with its share of the cores.
    processes: int | None

    @property
    def threads(self) -> int:
        """Threads of each process."""
        return max(len(self.cores) // (self.processes or 1), 1)


@dataclass
class Ours:
    """`lockstep train`: every block is a whole run, of which the steady rounds count."""

    program: Path
    task: Task
    directory: Path
    name: str = "Lockstep"
    rounds: int = 60
    runs: list[lockstep.Run] = field(default_factory=list)

    def prepare(self, seconds: float) -> None:
        """Finds out how many rounds take about so many seconds."""
        run = self._run(self.rounds)
        rounds_per_second = run.steady_samples_per_second / self.task.batch
        self.rounds = lockstep.WARM_UP_ROUNDS + max(int(seconds * rounds_per_second), 10)

    def block(self) -> float:
        """Samples a second."""
        self.runs.append(self._run(self.rounds))
        return self.runs[-1].steady_samples_per_second

    def _run(self, rounds: int) -> lockstep.Run:
        task = self.task
        arguments = ["--model", str(task.model), "--data", str(task.data), "--batch-size", str(task.batch)]
        arguments += ["--threads", str(task.threads), "--seed", "0"]
        if task.batch < 16:
            arguments += ["--shards", str(1 << (task.batch.bit_length() - 1))]
        if task.processes:
            arguments += ["--workers", str(task.processes)]
        return lockstep.train(self.program, arguments, rounds, self.directory)

    def facts(self) -> dict[str, Any]:
        """What else is known after the blocks."""
        return {
            "version": "Lockstep",
            "peak_memory_mb": max(run.peak_memory_mb for run in self.runs),
            "seconds_to_first_step": sorted(run.seconds_to_first_round for run in self.runs)[len(self.runs) // 2],
            "samples_per_second_with_start": max(run.samples_per_second_with_start for run in self.runs),
        }

    def close(self) -> None:
        """Nothing stays."""


@dataclass
class Peer:
    """A framework: one process, or as many as work together."""

    name: str
    script: str
    python: Path
    task: Task
    steps: int = 10
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    # What the processes complain of; a pipe that nobody reads would fill up.
    complaints: IO[str] = field(default_factory=lambda: tempfile.TemporaryFile("w+"))
    first: dict[str, Any] = field(default_factory=dict)
    seconds_to_first_step: float = 0.0

    def prepare(self, seconds: float) -> None:
        """Starts, warms up, and finds out how many steps take about so many seconds."""
        started = time.monotonic()
        self._start()
        self.first = self._answer("ready")
        self.seconds_to_first_step = time.monotonic() - started
        self._steps(self.steps)
        took = self._steps(self.steps)
        self.steps = max(int(seconds * self.steps / took), 5)

    def block(self) -> float:
        """Samples a second."""
        return self.steps * self.task.batch / self._steps(self.steps)

    def facts(self) -> dict[str, Any]:
        """What else is known after the blocks."""
        return {
            "version": self.first["version"],
            "parameters": self.first["parameters"],
            "peak_memory_mb": sum(lockstep.peak_memory_mb(process.pid) for process in self.processes),
            "seconds_to_first_step": self.seconds_to_first_step,
        }

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            try:
                self._tell(process, "quit")
                process.wait(timeout=10)
            except (OSError, subprocess.TimeoutExpired):
                process.kill()

    def _start(self) -> None:
        task, count = self.task, self.task.processes or 1
        environment = {key: value for key, value in os.environ.items() if key not in UNSET} | PEER_ENVIRONMENT
        port = _free_port() if count > 1 else 0
        for rank in range(count):
            cores = task.cores[rank * task.threads :][: task.threads]
            command = [str(self.python), str(PEERS / self.script), "--model", str(task.model), "--data", str(task.data)]
            command += ["--batch", str(task.batch), "--threads", str(task.threads), "--cores", *map(str, cores)]
            command += ["--rank", str(rank), "--processes", str(count), "--port", str(port)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.complaints}
            self.processes.append(subprocess.Popen(command, text=True, env=environment, **pipes))

    def _steps(self, count: int) -> float:
        for process in self.processes:
            self._tell(process, f"steps {count}")
        return self._answer("done")["seconds"]

    def _tell(self, process: subprocess.Popen[str], command: str) -> None:
        assert process.stdin
        process.stdin.write(command + "\n")
        process.stdin.flush()

    def _answer(self, event: str) -> dict[str, Any]:
        """One answer of every process; returns the first one's."""
        answers = []
        for process in self.processes:
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                self.complaints.seek(0)
                complaint = self.complaints.read().strip()[-2000:]
                raise RuntimeError(f"{self.name} ended with {process.wait()}: {complaint}")
            answers.append(json.loads(line))
            if answers[-1]["event"] != event:
                raise RuntimeError(f"{self.name} says {line.strip()} instead of {event}")
        return answers[0]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
