"""JAX: one jitted function for a step, Adam in Keras' form written out.

A transposed convolution is a convolution of the dilated input, which was the faster way.
"""

import os

from peer import arguments, batches, samples, serve

args = arguments(__doc__)
os.environ["JAX_PLATFORMS"] = "cpu"

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from model import Layer, Model, cropped, read

ACTIVATIONS = {"linear": lambda x: x, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}
LAYOUT = ("NHWC", "HWIO", "NHWC")
RATE, DECAY_1, DECAY_2, EPSILON = 1e-3, 0.9, 0.999, 1e-7


def weights_of(layer: Layer, channels: int, generator: np.random.Generator):
    """Kernel (Glorot uniform) and bias (zero) of a layer, and its output's channels; without weights, `None`."""
    match layer.kind:
        case "dense":
            window, out = (), layer.units
        case "conv2d" | "conv2d_transpose":
            window, out = (layer.kernel_size,) * 2, layer.filters
        case _:
            return None
    limit = np.sqrt(6 / (np.prod(window) * (channels + out)))
    kernel = generator.uniform(-limit, limit, (*window, channels, out))
    return jnp.asarray(kernel, jnp.float32), jnp.zeros(out)


def apply(layer: Layer, weights, x):
    """The output of a layer."""
    strides = (layer.strides, layer.strides)
    match layer.kind:
        case "dense":
            x = x @ weights[0] + weights[1]
        case "conv2d":
            x = lax.conv_general_dilated(x, weights[0], strides, layer.padding.upper(), dimension_numbers=LAYOUT)
            x = x + weights[1]
        case "conv2d_transpose":
            before, after = cropped(layer.kernel_size, layer.strides, layer.padding)
            padding = [(layer.kernel_size - 1 - before, layer.kernel_size - 1 - after)] * 2
            kernel = weights[0][::-1, ::-1]
            x = lax.conv_general_dilated(x, kernel, (1, 1), padding, lhs_dilation=strides, dimension_numbers=LAYOUT)
            x = x + weights[1]
        case "max_pool2d":
            window = (1, layer.pool_size, layer.pool_size, 1)
            x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
        case "flatten":
            x = x.reshape(x.shape[0], -1)
        case "reshape":
            x = x.reshape(x.shape[0], *layer.target_shape)
        case other:
            raise ValueError(f"layer {other} is not compared")
    return ACTIVATIONS[layer.activation](x)


def initial(model: Model):
    """The weights of every layer."""
    generator = np.random.default_rng(0)
    weights = []
    x = jnp.zeros((1, *model.input))
    for layer in model.layers:
        weights.append(weights_of(layer, x.shape[-1], generator))
        x = apply(layer, weights[-1], x)
    return weights


def main() -> None:
    model = read(args.model)

    def loss_of(weights, x):
        y = x
        for layer, of_layer in zip(model.layers, weights):
            y = apply(layer, of_layer, y)
        return jnp.mean((y - x) ** 2)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state, x):
        weights, first, second, t = state
        t = t + 1
        loss, gradient = jax.value_and_grad(loss_of)(weights, x)
        first = jax.tree.map(lambda m, g: DECAY_1 * m + (1 - DECAY_1) * g, first, gradient)
        second = jax.tree.map(lambda v, g: DECAY_2 * v + (1 - DECAY_2) * g * g, second, gradient)
        rate = RATE * jnp.sqrt(1 - DECAY_2**t) / (1 - DECAY_1**t)
        weights = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + EPSILON), weights, first, second)
        return (weights, first, second, t), loss

    weights = initial(model)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights))
    state = (weights, jax.tree.map(jnp.zeros_like, weights), jax.tree.map(jnp.zeros_like, weights), jnp.float32(0))
    data = samples(args.data, model.input)
    order = batches(len(data), args.batch)

    def step():
        nonlocal state
        state, loss = train(state, data[next(order)])
        return loss.block_until_ready()

    serve(step, version=f"JAX {jax.__version__}", parameters=parameters)


main()
