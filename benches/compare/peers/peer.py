"""What all peers share: the dialogue with the harness, arguments, data, shuffled batches.

A peer is a process that stays. It takes one training step and says `ready`; then it reads commands, one a line:
`steps N` takes N steps and tells how long they took, `quit` ends it. Every answer is one line of JSON on the standard
output.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def arguments(description: str) -> argparse.Namespace:
    """Reads the command line, and keeps the process on the cores that it names."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="model file (TOML)")
    parser.add_argument("--data", type=Path, required=True, help="IDX (gzip) or NPY file with 8-bit samples")
    parser.add_argument("--batch", type=int, default=256, help="samples in a global batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cores", type=int, nargs="+", help="the cores to stay on")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int, default=0, help="where the processes meet")
    args = parser.parse_args()
    if args.cores:
        os.sched_setaffinity(0, args.cores)
    # Before a framework is imported: it reads these once.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)
    return args


def samples(path: Path, shape: tuple[int, ...]) -> Any:
    """All samples as 32-bit floats from 0 to 1, in one array (samples, ...shape)."""
    import numpy as np

    if path.suffix == ".npy":
        values = np.load(path)
    else:
        with gzip.open(path) as file:
            values = np.frombuffer(file.read(), np.uint8, offset=16)
    return values.reshape(-1, *shape).astype(np.float32) / np.float32(255)


def batches(count: int, batch: int) -> Iterator[Any]:
    """Endless batches of indices in random order. Every process draws the same ones."""
    import numpy as np

    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(count)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]


def serve(step: Callable[[], Any], **facts: Any) -> None:
    """Takes the first step, then obeys. `step` takes an optimizer step and returns its loss, or what float() takes."""
    step()
    _say(event="ready", **facts)
    for line in sys.stdin:
        match line.split():
            case ["steps", count]:
                started = time.perf_counter()
                for _ in range(int(count)):
                    loss = step()
                loss = float(loss)
                _say(event="done", steps=int(count), seconds=time.perf_counter() - started, loss=loss)
            case ["quit"]:
                return
            case _:
                sys.exit(f"unknown command {line!r}")


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)
