#!/usr/bin/env python3
"""Reference models, gradients and Adam trajectories for the tests of `common`.

This is the independent oracle of the training engine: PyTorch's float64 kernels and autograd,
arranged to follow the semantics of Keras 3 on TensorFlow. The Rust tests only read the files it
writes; Python is not needed to run them.


How to run
----------

    python3 -m venv venv && venv/bin/pip install torch numpy safetensors    # Python 3.11 or later
    venv/bin/python generate.py                                    # rewrite the files next to this one
    venv/bin/python generate.py --only article                     # just one of them
    venv/bin/python generate.py --out DIR                          # the same, elsewhere
    venv/bin/python generate.py --random 50 --seed 7 --out DIR     # 50 random models, for soak tests

All randomness comes from numpy generators with fixed seeds and everything runs on one thread. A
different version of torch may still change the last bit of a stored number.


What is in the files
--------------------

`NAME.toml` is a model: `name`, `input` (height, width, channels, or just features), and the layers
in `[[encoder]]` and `[[decoder]]`. `NAME.safetensors` is one training run of it, as an autoencoder
(the target is the input), on one batch of n samples. Its metadata has one entry, `loss`, which is
"mse" or "binary_crossentropy". Its tensors are:

    input             f32 [n, ...]   the batch, channels last
    parameters/P      f32            parameter P before training
    output            f32 [n, ...]   the model's output at these parameters
    gradients/P       f32            gradient of the mean loss at these parameters
    adam10/P          f32            parameter P after ten steps of Adam, all on this batch
    losses            f64 [11]       the loss before step 1, before step 2, ..., after step 10

P is `encoder.I.LAYER.kernel` (or `.bias`, or `decoder...`), with I counting all layers of that
list from 0, as in `encoder.0.conv2d.kernel`. The kernel layouts are

    conv2d             (height, width, in, out)
    conv2d_transpose   (height, width, out, in)
    dense              (in, out)

The input and the initial parameters are exactly the stored float32 values. Everything else is
computed from them in float64, and rounded once, when it is stored.


Which runs are accepted
-----------------------

Only runs whose result is well determined in float32 are written (`check` has the details):
along all ten steps no pre-activation is close to a kink of its activation, no window of a max
pooling has two almost equal maxima, and no prediction is close to being clipped by the binary
cross-entropy. On top of that the run is repeated in float32 and has to agree with the float64
run. So a test may compare all tensors with one tight tolerance.


Differences to Keras
--------------------

None, but for constants which Keras 3 on TensorFlow rounds to float32 even when it computes in
float64: the slope of leaky_relu, and Adam's betas in the bias correction. The latter changes its
steps by a few parts in a million: as much as 7e-6, relatively, in the stored losses. Here both
are exact.
"""

import argparse
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from torch import Tensor

Layer = dict
Shape = tuple[int, ...]
Parameters = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------
# Activations


@dataclass(frozen=True)
class Activation:
    function: Callable[[Tensor], Tensor]
    kinks: tuple[float, ...] = ()  # where the derivative jumps


SELU_ALPHA = 1.6732632423543772
SELU_SCALE = 1.0507009873554805


def softplus(x: Tensor) -> Tensor:
    # Not torch's softplus, which is the identity above 20.
    return torch.logaddexp(x, torch.zeros_like(x))


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    # The clamp keeps the unused branch finite, whose infinite gradient would otherwise be 0 * inf.
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


ACTIVATIONS = {
    "linear": Activation(lambda x: x),
    "relu": Activation(lambda x: x.clamp(min=0), (0,)),
    "relu6": Activation(lambda x: x.clamp(0, 6), (0, 6)),
    "leaky_relu": Activation(lambda x: torch.where(x > 0, x, 0.2 * x), (0,)),
    "elu": Activation(elu),
    "selu": Activation(lambda x: SELU_SCALE * elu(x, SELU_ALPHA), (0,)),
    "softplus": Activation(softplus),
    "softsign": Activation(lambda x: x / (1 + x.abs())),
    "sigmoid": Activation(torch.sigmoid),
    "hard_sigmoid": Activation(lambda x: (x + 3).clamp(0, 6) / 6, (-3, 3)),
    "tanh": Activation(torch.tanh),
    "silu": Activation(lambda x: x * torch.sigmoid(x)),
    "gelu": Activation(lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2),
    "mish": Activation(lambda x: x * torch.tanh(softplus(x))),
    "exponential": Activation(torch.exp),
}


# ---------------------------------------------------------------------------------------------
# Geometry of windows: what Keras calls kernel_size (or pool_size), strides and padding


def pair(value: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a layer which slides a window over an image."""

    size: int
    stride: int
    padding: str

    def forward(self, length: int) -> int:
        """The output length of a convolution or a pooling."""
        if self.padding == "same":
            return -(-length // self.stride)
        return (length - self.size) // self.stride + 1

    def transpose(self, length: int) -> int:
        """The output length of a transposed convolution."""
        if self.padding == "same":
            return length * self.stride
        return length * self.stride + max(self.size - self.stride, 0)

    def pad(self, length: int) -> tuple[int, int]:
        """Padding before and after an image of this length; the smaller half comes first."""
        if self.padding == "valid":
            return 0, 0
        total = max((self.forward(length) - 1) * self.stride + self.size - length, 0)
        return total // 2, total - total // 2


def axes(layer: Layer) -> tuple[Axis, Axis]:
    """The vertical and the horizontal axis of a convolution or pooling layer."""
    pooling = layer["layer"].endswith("pool2d")
    sizes = pair(layer["pool_size"] if pooling else layer["kernel_size"])
    strides = pair(layer.get("strides", sizes if pooling else 1))
    padding = layer.get("padding", "valid")
    return Axis(sizes[0], strides[0], padding), Axis(sizes[1], strides[1], padding)


def pad_image(x: Tensor, layer: Layer, value: float) -> Tensor:
    """Pads the image x (n, channels, height, width) as the layer's padding wants it."""
    vertical, horizontal = axes(layer)
    above, below = vertical.pad(x.shape[2])
    left, right = horizontal.pad(x.shape[3])
    return F.pad(x, (left, right, above, below), value=value)


# ---------------------------------------------------------------------------------------------
# Layers. Values between layers are channels last; torch's kernels want channels first.


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def torch_layout(kernel: Tensor) -> Tensor:
    """From (height, width, a, b) to (b, a, height, width)."""
    return kernel.permute(3, 2, 0, 1).contiguous()


def conv2d(x: Tensor, kernel: Tensor, layer: Layer) -> Tensor:
    strides = [axis.stride for axis in axes(layer)]
    x = pad_image(channels_first(x), layer, 0.0)
    return channels_last(F.conv2d(x, torch_layout(kernel), stride=strides))


def conv2d_transpose(x: Tensor, kernel: Tensor, layer: Layer) -> Tensor:
    """The adjoint of the convolution with the same kernel, strides and padding."""
    x = channels_first(x)
    strides = [axis.stride for axis in axes(layer)]
    y = F.conv_transpose2d(x, torch_layout(kernel), stride=strides)
    for dimension, axis in zip((2, 3), axes(layer), strict=True):
        # y holds all the places a window touches. Those that fall into the convolution's padding
        # are cut off, and rows that no window reaches are zero.
        length = axis.transpose(x.shape[dimension])
        before, _ = axis.pad(length)
        y = y.narrow(dimension, before, min(length, y.shape[dimension] - before))
        missing = length - y.shape[dimension]
        y = F.pad(y, (0, 0, 0, missing) if dimension == 2 else (0, missing))
    return channels_last(y)


def windows(x: Tensor, layer: Layer, value: float) -> Tensor:
    """All pooling windows of x, as (n, height, width, channels, elements of the window)."""
    vertical, horizontal = axes(layer)
    x = pad_image(channels_first(x), layer, value)
    x = x.unfold(2, vertical.size, vertical.stride).unfold(3, horizontal.size, horizontal.stride)
    return x.flatten(-2).permute(0, 2, 3, 1, 4)


def average_pool2d(x: Tensor, layer: Layer) -> Tensor:
    """Padding counts neither in the sum nor in the number of elements."""
    counts = windows(torch.ones_like(x), layer, 0.0).sum(-1)
    return windows(x, layer, 0.0).sum(-1) / counts


def up_sampling2d(x: Tensor, layer: Layer) -> Tensor:
    vertical, horizontal = pair(layer["size"])
    return x.repeat_interleave(vertical, dim=1).repeat_interleave(horizontal, dim=2)


@dataclass
class Margins:
    """How close a forward pass came to a point where its derivative jumps."""

    kink: float = math.inf  # smallest distance of a pre-activation to a kink
    tie: float = math.inf  # smallest difference of the two largest elements of a max pool window

    def see_activation(self, x: Tensor, activation: Activation) -> None:
        for kink in activation.kinks:
            self.kink = min(self.kink, (x - kink).abs().min().item())

    def see_windows(self, elements: Tensor) -> None:
        if elements.shape[-1] > 1:
            largest = elements.topk(2, dim=-1).values
            gaps = largest[..., 0] - largest[..., 1]
            # Equal elements are harmless: they come from where an activation is flat, or they
            # are copies of one value (up_sampling2d), so their gradients end up in one place.
            gaps = gaps[gaps > 0]
            if gaps.numel() > 0:
                self.tie = min(self.tie, gaps.min().item())


def apply_layer(
    x: Tensor, layer: Layer, kernel: Tensor | None, bias: Tensor | None, margins: Margins
) -> Tensor:
    match layer["layer"]:
        case "dense":
            x = x @ kernel
        case "conv2d":
            x = conv2d(x, kernel, layer)
        case "conv2d_transpose":
            x = conv2d_transpose(x, kernel, layer)
        case "max_pool2d":
            elements = windows(x, layer, -math.inf)
            margins.see_windows(elements.detach())
            x = elements.max(-1).values
        case "average_pool2d":
            x = average_pool2d(x, layer)
        case "up_sampling2d":
            x = up_sampling2d(x, layer)
        case "flatten":
            x = x.flatten(1)
        case "reshape":
            x = x.reshape(x.shape[0], *layer["target_shape"])
        case "activation":
            pass
        case unknown:
            raise ValueError(f"unknown layer {unknown!r}")
    if bias is not None:
        x = x + bias
    activation = ACTIVATIONS[layer.get("activation", "linear")]
    margins.see_activation(x.detach(), activation)
    return activation.function(x)


def layer_shape(layer: Layer, shape: Shape) -> Shape:
    """The shape a layer makes of this input shape, both without the batch."""
    match layer["layer"]:
        case "dense":
            return (*shape[:-1], layer["units"])
        case "conv2d" | "conv2d_transpose":
            name = "forward" if layer["layer"] == "conv2d" else "transpose"
            height, width = (getattr(a, name)(n) for a, n in zip(axes(layer), shape[:2], strict=True))
            return (height, width, layer["filters"])
        case "max_pool2d" | "average_pool2d":
            height, width = (a.forward(n) for a, n in zip(axes(layer), shape[:2], strict=True))
            return (height, width, shape[2])
        case "up_sampling2d":
            vertical, horizontal = pair(layer["size"])
            return (shape[0] * vertical, shape[1] * horizontal, shape[2])
        case "flatten":
            return (math.prod(shape),)
        case "reshape":
            return tuple(layer["target_shape"])
        case "activation":
            return shape
        case unknown:
            raise ValueError(f"unknown layer {unknown!r}")


def kernel_shape(layer: Layer, shape: Shape) -> Shape | None:
    """The shape of the layer's kernel, if it has one, for this input shape."""
    match layer["layer"]:
        case "dense":
            return (shape[-1], layer["units"])
        case "conv2d":
            return (*pair(layer["kernel_size"]), shape[-1], layer["filters"])
        case "conv2d_transpose":
            return (*pair(layer["kernel_size"]), layer["filters"], shape[-1])
        case _:
            return None


# ---------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class Model:
    name: str
    input: list[int]
    encoder: list[Layer]
    decoder: list[Layer]

    def layers(self) -> list[tuple[str, Layer]]:
        """All layers from the input to the output, with the prefix of their parameters' names."""
        return [
            (f"{part}.{index}.{layer['layer']}", layer)
            for part, layers in (("encoder", self.encoder), ("decoder", self.decoder))
            for index, layer in enumerate(layers)
        ]

    def initial(self, rng: np.random.Generator, gain: float) -> dict[str, np.ndarray]:
        """Random parameters: Glorot's uniform kernels times a gain, and biases which are not 0."""
        parameters = {}
        shape = tuple(self.input)
        for prefix, layer in self.layers():
            dimensions = kernel_shape(layer, shape)
            shape = layer_shape(layer, shape)
            assert min(shape) >= 1, f"{self.name}: {prefix} makes an empty image"
            if dimensions is not None:
                fans = math.prod(dimensions[:-2]) * sum(dimensions[-2:])
                limit = gain * math.sqrt(6 / fans)
                parameters[f"{prefix}.kernel"] = rng.uniform(-limit, limit, dimensions)
                if layer.get("use_bias", True):
                    parameters[f"{prefix}.bias"] = rng.uniform(-0.3, 0.3, shape[-1])
        assert shape == tuple(self.input), f"{self.name}: makes {shape} of {self.input}"
        return {name: value.astype(np.float32) for name, value in parameters.items()}

    def forward(self, parameters: Parameters, x: Tensor, margins: Margins) -> Tensor:
        for prefix, layer in self.layers():
            kernel = parameters.get(f"{prefix}.kernel")
            bias = parameters.get(f"{prefix}.bias")
            x = apply_layer(x, layer, kernel, bias, margins)
        return x

    def toml(self) -> str:
        def value(v: object) -> str:
            if isinstance(v, bool):
                return "true" if v else "false"
            return f'"{v}"' if isinstance(v, str) else str(v)

        lines = [f'name = "{self.name}"', f"input = {self.input}"]
        for part, layers in (("encoder", self.encoder), ("decoder", self.decoder)):
            for layer in layers:
                lines += ["", f"[[{part}]]", *(f"{key} = {value(v)}" for key, v in layer.items())]
        text = "\n".join(lines) + "\n"
        assert Model(**tomllib.loads(text)) == self
        return text


# ---------------------------------------------------------------------------------------------
# Losses, Adam, and a training run

STEPS = 10
LEARNING_RATE, BETA_1, BETA_2, EPSILON = 1e-3, 0.9, 0.999, 1e-7
CLIP = 1e-7


def mse(target: Tensor, output: Tensor) -> Tensor:
    return (output - target).square().mean()


def binary_crossentropy(target: Tensor, output: Tensor) -> Tensor:
    y = output.clamp(CLIP, 1 - CLIP)
    return -(target * y.log() + (1 - target) * (1 - y).log()).mean()


LOSSES = {"mse": mse, "binary_crossentropy": binary_crossentropy}


class Adam:
    """Adam as Keras does it: the bias correction is in the learning rate, not in the moments."""

    def __init__(self, parameters: Parameters) -> None:
        self.steps = 0
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def step(self, parameters: Parameters, gradients: Parameters) -> Parameters:
        self.steps += 1
        rate = LEARNING_RATE * math.sqrt(1 - BETA_2**self.steps) / (1 - BETA_1**self.steps)
        updated = {}
        for name, g in gradients.items():
            m = self.first[name] = BETA_1 * self.first[name] + (1 - BETA_1) * g
            v = self.second[name] = BETA_2 * self.second[name] + (1 - BETA_2) * g * g
            updated[name] = parameters[name] - rate * m / (v.sqrt() + EPSILON)
        return updated


@dataclass
class Run:
    """What a training run gave, and how close it came to trouble."""

    output: np.ndarray
    gradients: dict[str, np.ndarray]
    trained: dict[str, np.ndarray]
    losses: np.ndarray
    margins: Margins  # of the first forward pass
    all_margins: Margins  # of all of them
    extremes: tuple[float, float]  # smallest and largest element of all outputs


def evaluate(
    model: Model, loss: Callable, parameters: Parameters, x: Tensor, margins: Margins
) -> tuple[Tensor, float, Parameters]:
    """Output, loss and gradients of the autoencoder, whose target is its input."""
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    output = model.forward(leaves, x, margins)
    value = loss(x, output)
    gradients = torch.autograd.grad(value, list(leaves.values()))
    return output.detach(), value.item(), dict(zip(leaves, gradients, strict=True))


def train(
    model: Model, loss: str, x: np.ndarray, initial: dict[str, np.ndarray], dtype: torch.dtype
) -> Run:
    batch = torch.tensor(x, dtype=dtype)
    parameters = {name: torch.tensor(p, dtype=dtype) for name, p in initial.items()}
    adam = Adam(parameters)
    passes = []
    for step in range(STEPS + 1):
        margins = Margins()
        output, value, gradients = evaluate(model, LOSSES[loss], parameters, batch, margins)
        passes.append((output, value, gradients, margins))
        if step < STEPS:
            parameters = adam.step(parameters, gradients)

    def arrays(tensors: Parameters) -> dict[str, np.ndarray]:
        return {name: t.numpy() for name, t in tensors.items()}

    outputs, losses, gradients, margins = zip(*passes, strict=True)
    return Run(
        output=outputs[0].numpy(),
        gradients=arrays(gradients[0]),
        trained=arrays(parameters),
        losses=np.array(losses, dtype=np.float64),
        margins=margins[0],
        all_margins=Margins(min(m.kink for m in margins), min(m.tie for m in margins)),
        extremes=(min(o.min().item() for o in outputs), max(o.max().item() for o in outputs)),
    )


# ---------------------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True)
class Case:
    model: Model
    loss: str = "mse"
    samples: int = 3
    seed: int = 0  # of the input and of the initial parameters
    gain: float = 1.0  # scales the kernels, to reach all pieces of the activations
    margin: float = 1e-5  # the first forward pass stays this far away from all kinks

    def data(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        rng = np.random.default_rng(self.seed)
        initial = self.model.initial(rng, self.gain)
        x = rng.uniform(0, 1, (self.samples, *self.model.input)).astype(np.float32)
        return x, initial


class IllConditioned(Exception):
    """The results of this run are not well determined in float32."""


@dataclass
class Deviation:
    """Largest differences of a float32 run from the float64 run."""

    output: float  # relative to the largest element
    losses: float  # relative
    gradients: float  # relative to the largest element of the parameter's gradient
    trained: float  # relative to the largest element of the parameter, or to 1 if that is more

    def acceptable(self) -> bool:
        return (
            self.output < 2e-6 and self.losses < 2e-6
            and self.gradients < 1e-5 and self.trained < 2e-6
        )  # fmt: skip


def deviation(single: Run, double: Run) -> Deviation:
    def relative(a: np.ndarray, b: np.ndarray, least: float = 0.0) -> float:
        return float(np.abs(a - b).max() / max(np.abs(b).max(), least))

    return Deviation(
        output=relative(single.output, double.output),
        losses=float((np.abs(single.losses - double.losses) / double.losses).max()),
        gradients=max(relative(single.gradients[k], g) for k, g in double.gradients.items()),
        trained=max(relative(single.trained[k], p, 1.0) for k, p in double.trained.items()),
    )


def check(case: Case, double: Run, single: Run) -> Deviation:
    """Raises IllConditioned unless a good float32 implementation has to get these results."""

    def require(condition: bool, complaint: str) -> None:
        if not condition:
            raise IllConditioned(f"{case.model.name}, seed {case.seed}: {complaint}")

    numbers = [double.output, double.losses, *double.gradients.values(), *double.trained.values()]
    require(all(np.isfinite(a).all() for a in numbers), "not finite")
    require(np.abs(double.output).max() < 100, "large output")
    require(double.margins.kink > case.margin, "starts at a kink")
    require(double.all_margins.kink > 1e-5, "comes too close to a kink")
    require(double.all_margins.tie > 1e-6, "almost a tie in a max pooling")
    for name, gradient in double.gradients.items():
        require(np.abs(gradient).max() > 1e-5, f"no gradient for {name}")
    if case.loss == "binary_crossentropy":
        low, high = double.extremes
        require(low > 1e-3 and high < 1 - 1e-3, "the cross-entropy may clip")
    result = deviation(single, double)
    require(result.acceptable(), f"float32 deviates: {result}")
    return result


def generate(case: Case, folder: Path) -> Deviation:
    """Writes the two files of a case; raises IllConditioned, and writes nothing, if it is one."""
    x, initial = case.data()
    double = train(case.model, case.loss, x, initial, torch.float64)
    single = train(case.model, case.loss, x, initial, torch.float32)
    result = check(case, double, single)

    tensors = {"input": x, "output": double.output.astype(np.float32), "losses": double.losses}
    groups = {"parameters": initial, "gradients": double.gradients, "adam10": double.trained}
    for group, arrays in groups.items():
        for name, array in arrays.items():
            tensors[f"{group}/{name}"] = array.astype(np.float32)
    # save_file writes an array's memory as it lies.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}

    path = folder / case.model.name
    path.with_suffix(".toml").write_text(case.model.toml())
    file = path.with_suffix(".safetensors")
    save_file(tensors, file, metadata={"loss": case.loss})
    file.chmod(0o644)
    return result


# Short names for the layers of the cases below. Options are written to the model file only if
# they are given, so the cases also test their defaults.


def conv(filters: int, kernel_size, **options) -> Layer:
    return {"layer": "conv2d", "filters": filters, "kernel_size": kernel_size, **options}


def conv_transpose(filters: int, kernel_size, **options) -> Layer:
    return {"layer": "conv2d_transpose", "filters": filters, "kernel_size": kernel_size, **options}


def max_pool(pool_size, **options) -> Layer:
    return {"layer": "max_pool2d", "pool_size": pool_size, **options}


def average_pool(pool_size, **options) -> Layer:
    return {"layer": "average_pool2d", "pool_size": pool_size, **options}


def dense(units: int, activation: str | None = None, **options) -> Layer:
    named = {} if activation is None else {"activation": activation}
    return {"layer": "dense", "units": units, **named, **options}


def up_sampling(size) -> Layer:
    return {"layer": "up_sampling2d", "size": size}


def activation(name: str) -> Layer:
    return {"layer": "activation", "activation": name}


def reshape(*shape: int) -> Layer:
    return {"layer": "reshape", "target_shape": list(shape)}


FLATTEN = {"layer": "flatten"}


def golden_cases() -> list[Case]:
    return [
        # The network of the article, scaled down. The second pooling drops a row of its 7 x 9
        # image, and one column.
        Case(
            Model(
                "article",
                [14, 18, 1],
                [
                    conv(8, 3, padding="same", activation="relu"),
                    max_pool(2),
                    conv(4, 3, padding="same", activation="relu"),
                    max_pool(2),
                ],
                [
                    conv_transpose(4, 3, strides=2, activation="relu"),
                    conv_transpose(8, 3, strides=2, padding="same", activation="relu"),
                    conv(1, 3, padding="same", activation="sigmoid"),
                ],
            ),
            samples=4,
            seed=5,
        ),
        Case(
            Model(
                "binary_crossentropy",
                [9, 7, 2],
                [
                    conv(6, 3, strides=2, padding="same", activation="relu"),
                    FLATTEN,
                    dense(10, "tanh"),
                ],
                [
                    dense(60, "relu"),
                    reshape(4, 3, 5),
                    conv_transpose(2, 3, strides=2, activation="sigmoid"),
                ],
            ),
            loss="binary_crossentropy",
            samples=5,
        ),
        Case(
            Model(
                "conv_valid",
                [23, 19, 2],
                [
                    conv(4, [3, 2], strides=[2, 1], padding="valid", activation="tanh"),
                    conv(5, [1, 4], strides=[1, 3]),
                    conv(3, 5, activation="softsign"),
                    conv(4, [2, 1], strides=[3, 1], activation="relu"),
                ],
                [FLATTEN, dense(23 * 19 * 2), reshape(23, 19, 2)],
            ),
        ),
        Case(
            Model(
                "conv_same",
                [13, 17, 2],
                [
                    conv(4, 5, strides=[2, 3], padding="same", activation="tanh"),
                    conv(5, [2, 3], strides=1, padding="same", activation="relu"),
                    conv(3, [4, 1], strides=[3, 2], padding="same"),
                    # A kernel smaller than its stride: some columns are never seen.
                    conv(6, [3, 1], strides=[1, 2], padding="same", activation="softsign"),
                ],
                [
                    # From 3 x 2 to 3 x 4, 12 x 16 and 13 x 17.
                    conv_transpose(4, [1, 3], strides=[1, 2], padding="same"),
                    up_sampling(4),
                    conv_transpose(2, 2),
                ],
            ),
        ),
        Case(
            Model(
                "conv_transpose_valid",
                [21, 22, 2],
                [conv(3, [5, 4], strides=[7, 11], activation="tanh")],
                [
                    # From 3 x 2 to 7 x 4, 10 x 20 and 21 x 22.
                    conv_transpose(4, 3, strides=[2, 1], padding="valid", activation="tanh"),
                    conv_transpose(3, [4, 5], strides=[1, 5], activation="relu"),
                    conv_transpose(2, [3, 3], strides=[2, 1]),
                ],
            ),
            seed=1,
        ),
        Case(
            Model(
                "conv_transpose_same",
                [18, 12, 2],
                [
                    conv(3, 3, strides=3, padding="same", activation="tanh"),
                    max_pool([2, 4]),
                ],
                [
                    # From 3 x 1 to 9 x 2, 9 x 6 and 18 x 12.
                    conv_transpose(4, 5, strides=[3, 2], padding="same", activation="softsign"),
                    conv_transpose(5, [2, 4], strides=[1, 3], padding="same", activation="relu"),
                    conv_transpose(2, [3, 2], strides=2, padding="same"),
                ],
            ),
        ),
        # Transposed convolutions whose kernel is smaller than their stride: between (and after)
        # the windows there is nothing but the bias.
        Case(
            Model(
                "conv_transpose_gaps",
                [19, 12, 2],
                [conv(3, [4, 3], strides=[4, 3], activation="tanh"), conv(4, [2, 3])],
                [
                    # From 3 x 2 to 9 x 4, 9 x 12 and 19 x 12.
                    conv_transpose(3, [1, 2], strides=[3, 2], activation="elu"),
                    conv_transpose(4, [3, 1], strides=[1, 3], padding="same", activation="tanh"),
                    conv_transpose(2, [3, 1], strides=[2, 1]),
                ],
            ),
        ),
        Case(
            Model(
                "average_pool",
                [13, 11, 2],
                [
                    conv(4, 2, activation="tanh"),
                    average_pool([3, 2], strides=[2, 1], padding="same"),
                    conv(5, 1, activation="relu"),
                    average_pool([2, 3]),
                    average_pool(3, strides=2, padding="same"),
                ],
                [
                    # From 2 x 2 to 12 x 12, 13 x 12 and 13 x 11.
                    conv_transpose(4, 3, strides=[6, 3], padding="same", activation="tanh"),
                    up_sampling([1, 2]),
                    conv_transpose(3, [2, 1]),
                    average_pool([1, 2], strides=1, padding="valid"),
                    conv(2, [3, 2], padding="same"),
                ],
            ),
        ),
        Case(
            Model(
                "max_pool",
                [13, 11, 2],
                [
                    conv(4, 2, activation="tanh"),
                    max_pool([3, 2], strides=[2, 1], padding="same"),
                    conv(5, 1),
                    max_pool([2, 3]),
                    max_pool(3, strides=2, padding="same"),
                ],
                [
                    # From 2 x 2 to 14 x 12, 13 x 12 and 13 x 11.
                    conv_transpose(4, 3, strides=[7, 6], padding="same", activation="tanh"),
                    max_pool([2, 1], strides=1),
                    conv(2, [3, 2], padding="same"),
                    max_pool([1, 2], strides=1, padding="valid"),
                ],
            ),
            seed=1,
        ),
        Case(
            Model(
                "up_sampling",
                [10, 9, 2],
                [
                    conv(4, 3, strides=[2, 3], padding="same", activation="relu"),
                    average_pool([5, 1], strides=1),
                ],
                [
                    up_sampling([5, 1]),
                    conv(3, [2, 3], padding="same", activation="tanh"),
                    up_sampling([1, 3]),
                    up_sampling(2),
                    conv(2, [1, 10]),
                ],
            ),
        ),
        *activation_cases(),
        # Dense layers act on the last axis of an image.
        Case(
            Model(
                "image_dense",
                [5, 6, 3],
                [
                    dense(7, "relu"),
                    dense(4, "tanh"),
                    reshape(3, 10, 4),
                    dense(2),
                    activation("softsign"),
                    reshape(60),
                ],
                [
                    reshape(6, 5, 2),
                    dense(9, "silu"),
                    FLATTEN,
                    reshape(5, 6, 9),
                    dense(3),
                    activation("sigmoid"),
                ],
            ),
            loss="binary_crossentropy",
        ),
        # Channel counts just above multiples of vector widths, and a single channel.
        Case(
            Model(
                "wide_channels",
                [5, 4, 1],
                [
                    conv(17, 2, activation="tanh"),
                    conv(33, 2, padding="same", activation="relu"),
                    max_pool(2, strides=[2, 1]),
                    conv(1, 2, padding="same", activation="tanh"),
                ],
                [
                    conv_transpose(65, [2, 1], strides=[2, 1], activation="tanh"),
                    conv_transpose(9, 2, activation="relu"),
                    dense(17, "tanh"),
                    conv_transpose(1, [1, 2], padding="valid"),
                ],
            ),
        ),
        # A batch of one sample.
        Case(
            Model(
                "no_bias",
                [8, 6, 3],
                [
                    conv(5, 3, activation="relu", use_bias=False),
                    max_pool(2),
                    FLATTEN,
                    dense(8, "tanh", use_bias=False),
                ],
                [
                    dense(30, use_bias=False),
                    reshape(3, 2, 5),
                    conv_transpose(4, 4, strides=2, activation="tanh", use_bias=False),
                    conv(3, 1, use_bias=True),
                ],
            ),
            samples=1,
        ),
        # Kernels and windows larger than the image, down to a single pixel.
        Case(
            Model(
                "one_pixel",
                [2, 3, 2],
                [
                    conv(4, 5, strides=3, padding="same", activation="tanh"),
                    conv(3, [4, 3], padding="same", activation="relu"),
                    max_pool(3, strides=1, padding="same"),
                    average_pool(4, padding="same"),
                ],
                [
                    conv_transpose(5, 4, padding="same", activation="tanh"),
                    conv_transpose(2, [2, 3]),
                ],
            ),
        ),
        # Nothing but matrix products, with sizes around blocks of 8 and 16.
        Case(
            Model(
                "dense",
                [17],
                [dense(33, "relu"), dense(7)],
                [dense(16, "relu"), dense(31, "tanh"), dense(17, "sigmoid")],
            ),
            samples=5,
        ),
    ]


def activation_cases() -> list[Case]:
    """Each activation once as part of a dense layer and once as a layer of its own."""

    def case(name: str, names: list[str], **options) -> Case:
        decoder = [layer for name in names for layer in (dense(11), activation(name))]
        model = Model(name, [9], [dense(12, name) for name in names], [*decoder, dense(9)])
        return Case(model, samples=5, margin=1e-3, **options)

    return [
        # With a gain that takes the pre-activations over all kinks.
        case("activations_clipped", ["leaky_relu", "hard_sigmoid", "relu6", "relu"], gain=4.0),
        case("activations_exponential", ["elu", "selu", "softplus", "exponential"]),
        case("activations_bounded", ["sigmoid", "softsign", "tanh", "linear"], gain=2.0),
        case("activations_gated", ["silu", "gelu", "mish"], gain=2.0, seed=1),
    ]


# ---------------------------------------------------------------------------------------------
# Random models


class Random:
    """Makes random autoencoders: image models that go back through the sizes they came from, or
    through a dense layer where no single layer leads back, and now and then a dense model."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def integer(self, low: int, high: int) -> int:
        """Between low and high, both included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def choose(self, options: list):
        return options[self.integer(0, len(options) - 1)]

    def short(self, values: tuple[int, int]) -> int | list[int]:
        """A pair as it may be written in a model file."""
        return values[0] if values[0] == values[1] and self.chance(0.7) else list(values)

    def channels(self) -> int:
        return self.choose([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33])

    def trimmings(self) -> Layer:
        """Activation and bias of a layer."""
        options = {}
        if self.chance(0.8):
            options["activation"] = self.choose(list(ACTIVATIONS))
        if self.chance(0.15):
            options["use_bias"] = self.chance(0.1)
        return options

    def sliding(self, kind: str, shape: Shape) -> Layer:
        """A convolution or pooling that makes the image smaller (or not)."""
        padding = self.choose(["valid", "same"])
        size = [self.integer(1, 5 if kind == "conv2d" else 3) for _ in range(2)]
        if padding == "valid":
            size = [min(k, n) for k, n in zip(size, shape[:2], strict=True)]
        options = {}
        if self.chance(0.8):
            options["strides"] = self.short((self.integer(1, 3), self.integer(1, 3)))
        if padding == "same" or self.chance(0.5):
            options["padding"] = padding
        if kind == "conv2d":
            return conv(self.channels(), self.short(tuple(size)), **options, **self.trimmings())
        return {"layer": kind, "pool_size": self.short(tuple(size)), **options}

    def shrinking(self, shape: Shape) -> Layer:
        kind = self.choose(["conv2d", "conv2d", "conv2d", "max_pool2d", "average_pool2d"])
        return self.sliding(kind, shape)

    def keeping(self, shape: Shape) -> Layer:
        """A layer that keeps height and width."""
        match self.integer(0, 4):
            case 0:
                return dense(self.channels(), **self.trimmings())
            case 1:
                return activation(self.choose(["tanh", "relu", "elu", "softsign", "gelu"]))
            case 2:
                pool = self.choose([max_pool, average_pool])
                size = (self.integer(1, 3), self.integer(1, 3))
                return pool(self.short(size), strides=1, padding="same")
            case 3:
                size = self.short((self.integer(1, 5), self.integer(1, 5)))
                return conv(self.channels(), size, padding="same", **self.trimmings())
            case _:
                size = self.short((self.integer(1, 5), self.integer(1, 5)))
                return conv_transpose(self.channels(), size, padding="same", **self.trimmings())

    def leading(self, shape: Shape, height: int, width: int, channels: int) -> Layer | None:
        """A layer with weights that turns the image into one of this size, if there is any."""

        def solutions(method: str, padding: str, length: int, target: int) -> list[Axis]:
            candidates = [Axis(k, s, padding) for k in range(1, 6) for s in range(1, 4)]
            if method == "forward" and padding == "valid":
                candidates = [axis for axis in candidates if axis.size <= length]
            return [axis for axis in candidates if getattr(axis, method)(length) == target]

        layers = []
        for kind, method in (("conv2d_transpose", "transpose"), ("conv2d", "forward")):
            for padding in ("valid", "same"):
                vertical = solutions(method, padding, shape[0], height)
                horizontal = solutions(method, padding, shape[1], width)
                if vertical and horizontal:
                    v, h = self.choose(vertical), self.choose(horizontal)
                    layers.append(
                        {
                            "layer": kind,
                            "filters": channels,
                            "kernel_size": self.short((v.size, h.size)),
                            "strides": self.short((v.stride, h.stride)),
                            "padding": padding,
                        }
                    )
        return self.choose(layers) if layers else None

    def image_model(self, name: str) -> Model:
        shape = (self.integer(3, 20), self.integer(3, 20), self.choose([1, 2, 3, 4]))
        start = shape
        encoder, sizes = [], []
        for _ in range(self.integer(1, 3)):
            sizes.append(shape[:2])
            encoder.append(self.shrinking(shape))
            shape = layer_shape(encoder[-1], shape)
            if self.chance(0.3):
                encoder.append(self.keeping(shape))
                shape = layer_shape(encoder[-1], shape)

        decoder = []
        if self.chance(0.3):
            encoder += [FLATTEN, dense(self.integer(2, 24), **self.trimmings())]
            shape = (*shape[:2], self.integer(1, 8))
            decoder += [dense(math.prod(shape), **self.trimmings()), reshape(*shape)]

        def add(layer: Layer) -> None:
            nonlocal shape
            decoder.append(layer)
            shape = layer_shape(layer, shape)

        for index, (height, width) in reversed(list(enumerate(sizes))):
            factors = height // shape[0], width // shape[1]
            if layer_shape(up_sampling(factors), shape)[:2] == (height, width) and self.chance(0.3):
                add(up_sampling(self.short(factors)))
            else:
                channels = start[2] if index == 0 and self.chance(0.5) else self.channels()
                layer = self.leading(shape, height, width, channels)
                # If no layer leads there, a later one may.
                if layer is not None:
                    add(layer | self.trimmings())
            if index > 0 and self.chance(0.2):
                add(self.keeping(shape))
        if shape != start:
            layer = self.leading(shape, *start)
            if layer is not None and self.chance(0.9):
                add(layer)
            else:
                add(FLATTEN)
                add(dense(math.prod(start)))
                add(reshape(*start))
        return Model(name, list(start), encoder, decoder)

    def dense_model(self, name: str) -> Model:
        features = self.integer(1, 40)
        encoder = [dense(self.integer(1, 70), **self.trimmings()) for _ in range(self.integer(1, 3))]
        decoder = [dense(self.integer(1, 70), **self.trimmings()) for _ in range(self.integer(0, 2))]
        return Model(name, [features], encoder, [*decoder, dense(features)])

    def case(self, name: str) -> Case:
        model = self.dense_model(name) if self.chance(0.1) else self.image_model(name)
        loss = self.choose(["mse", "binary_crossentropy"])
        if loss == "binary_crossentropy":
            model.decoder.append(activation("sigmoid"))
        elif self.chance(0.3):
            model.decoder.append(activation(self.choose(["tanh", "sigmoid", "softplus"])))
        samples = self.choose([1, 2, 3, 4, 5])
        return Case(model, loss, samples, seed=self.integer(0, 2**31))


def generate_random(count: int, seed: int, folder: Path) -> None:
    for index in range(count):
        # Each model depends on the seed and its index only.
        source = Random(np.random.default_rng([seed, index]))
        rejected = 0
        while True:
            case = source.case(f"random_{seed}_{index}")
            if not case.data()[1]:
                continue  # nothing to train
            try:
                report(case, generate(case, folder))
                break
            except IllConditioned:
                rejected += 1
                if rejected == 200:
                    raise


# ---------------------------------------------------------------------------------------------


def report(case: Case, result: Deviation) -> None:
    print(
        f"{case.model.name:24} float32 deviates by"
        f" {result.output:.0e} (output), {result.losses:.0e} (losses),"
        f" {result.gradients:.0e} (gradients), {result.trained:.0e} (adam10)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=None, help="folder (default: next to the script)")
    parser.add_argument("--only", metavar="NAME", help="generate just this golden case")
    parser.add_argument("--random", type=int, metavar="N", help="generate N random models instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random models")
    arguments = parser.parse_args()
    if arguments.random is not None and arguments.out is None:
        parser.error("--random needs --out")

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    folder = arguments.out or here
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.random is not None:
        generate_random(arguments.random, arguments.seed, folder)
        return
    cases = [c for c in golden_cases() if arguments.only in (None, c.model.name)]
    if not cases:
        parser.error(f"there is no case {arguments.only}")
    for case in cases:
        report(case, generate(case, folder))


if __name__ == "__main__":
    main()
