"""The samples that all contenders train on, as files that all of them read."""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import model as models

# Where Debian's package dataset-fashion-mnist and `lockstep data fetch` put it, then what the repository has.
FASHION_MNIST = (
    Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz"),
    Path.home() / ".cache/lockstep/fashion-mnist/train-images-idx3-ubyte.gz",
    Path(__file__).resolve().parents[2] / "data/fashion-mnist/t10k-images-idx3-ubyte.gz",
)

# So many random samples, in bytes: enough that no contender can keep them in a cache.
RANDOM_BYTES = 32 << 20


def fashion_mnist() -> Path:
    """60,000 images of Fashion-MNIST, or the 10,000 that the repository has."""
    return next(path for path in FASHION_MNIST if path.exists())


def random_samples(model: Path, directory: Path) -> Path:
    """A file of random 8-bit samples for a model. Half of the values are 0, as in pictures."""
    shape = models.read(model).input
    size = 1
    for axis in shape:
        size *= axis
    count = max(RANDOM_BYTES // size, 4096)
    count = min(count, 60_000)
    path = directory / f"{model.stem}.npy"
    halved = bytes(max(value - 128, 0) * 2 for value in range(256))
    write_npy(path, (count, *shape), random.Random(0).randbytes(count * size).translate(halved))
    return path


def write_npy(path: Path, shape: tuple[int, ...], values: bytes) -> None:
    """Writes bytes as a NumPy file, version 1.0, without NumPy."""
    header = repr({"descr": "|u1", "fortran_order": False, "shape": shape})
    # Magic, version, length and header fill a multiple of 64 bytes, the last of which is a newline.
    header += " " * (-(10 + len(header) + 1) % 64) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + values)
