"""Lockstep's model files, for peers to build the same model from: Keras' vocabulary and defaults."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Layer:
    """One layer with its arguments, defaults filled in. Sizes are the same down and across."""

    kind: str
    filters: int = 0
    kernel_size: int = 0
    strides: int = 1
    padding: str = "valid"
    activation: str = "linear"
    units: int = 0
    pool_size: int = 2
    target_shape: tuple[int, ...] = field(default=())


@dataclass(frozen=True)
class Model:
    """An autoencoder: the shape of a sample, and all layers in order."""

    name: str
    input: tuple[int, ...]
    layers: tuple[Layer, ...]

    @property
    def is_image(self) -> bool:
        """Whether samples are (height, width, channels)."""
        return len(self.input) == 3


def read(path: Path) -> Model:
    """Reads a model file."""
    table = tomllib.loads(path.read_text())
    layers = tuple(_layer(layer) for layer in [*table["encoder"], *table["decoder"]])
    return Model(table["name"], tuple(table["input"]), layers)


def _layer(table: dict[str, Any]) -> Layer:
    arguments = dict(table)
    kind = arguments.pop("layer")
    if "target_shape" in arguments:
        arguments["target_shape"] = tuple(arguments["target_shape"])
    if kind == "max_pool2d" and arguments.get("strides", arguments.get("pool_size", 2)) != arguments.get(
        "pool_size", 2
    ):
        raise ValueError(f"{kind} with other strides than its window is not compared")
    return Layer(kind, **arguments)


def output_of(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a layer's output for an input of `shape`: (features) or (height, width, channels)."""
    kernel, strides = layer.kernel_size, layer.strides
    match layer.kind:
        case "dense":
            return *shape[:-1], layer.units
        case "conv2d":
            rows = (
                (size + sum(padded(size, kernel, strides, layer.padding)) - kernel) // strides + 1 for size in shape[:2]
            )
            return *rows, layer.filters
        case "conv2d_transpose":
            crop = sum(cropped(kernel, strides, layer.padding))
            return *((size - 1) * strides + kernel - crop for size in shape[:2]), layer.filters
        case "max_pool2d":
            return *(size // layer.pool_size for size in shape[:2]), shape[2]
        case "flatten":
            return (shape[0] * shape[1] * shape[2],)
        case "reshape":
            return layer.target_shape
        case other:
            raise ValueError(f"layer {other} is not compared")


def parameters_of(model: Model) -> int:
    """Number of parameters, biases included."""
    total, shape = 0, model.input
    for layer in model.layers:
        output = output_of(layer, shape)
        if layer.units or layer.filters:
            total += output[-1] * (max(layer.kernel_size, 1) ** 2 * shape[-1] + 1)
        shape = output
    return total


def cropped(kernel_size: int, strides: int, padding: str) -> tuple[int, int]:
    """Rows that Keras' transposed convolution drops at the start and at the end of its full output."""
    if padding == "valid":
        return 0, 0
    if kernel_size < strides:
        raise ValueError(f"a kernel of {kernel_size} with strides {strides} is not compared")
    total = kernel_size - strides
    return total // 2, total - total // 2


def padded(size: int, kernel_size: int, strides: int, padding: str) -> tuple[int, int]:
    """Rows of zeros that Keras' convolution adds before and after an image of `size` rows."""
    if padding == "valid":
        return 0, 0
    total = max((-(-size // strides) - 1) * strides + kernel_size - size, 0)
    return total // 2, total - total // 2
