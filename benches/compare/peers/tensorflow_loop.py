"""TensorFlow: Keras layers in a custom training loop, one tf.function for a step, which is faster than Keras' fit."""

import os

from peer import arguments, batches, samples, serve

args = arguments(__doc__)
os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", KERAS_BACKEND="tensorflow", CUDA_VISIBLE_DEVICES="-1")

import keras
import tensorflow as tf
from keras import layers as kl

from model import Layer, Model, read


def layer_of(layer: Layer) -> kl.Layer:
    """The Keras layer."""
    windowed = {
        "filters": layer.filters,
        "kernel_size": layer.kernel_size,
        "strides": layer.strides,
        "padding": layer.padding,
        "activation": layer.activation,
    }
    match layer.kind:
        case "dense":
            return kl.Dense(layer.units, activation=layer.activation)
        case "conv2d":
            return kl.Conv2D(**windowed)
        case "conv2d_transpose":
            return kl.Conv2DTranspose(**windowed)
        case "max_pool2d":
            return kl.MaxPooling2D(layer.pool_size)
        case "flatten":
            return kl.Flatten()
        case "reshape":
            return kl.Reshape(layer.target_shape)
        case other:
            raise ValueError(f"layer {other} is not compared")


def build(model: Model) -> keras.Sequential:
    """The model with Keras' own initial weights."""
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(model.input), *map(layer_of, model.layers)])


def main() -> None:
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    model = read(args.model)
    network = build(model)
    optimizer = keras.optimizers.Adam(1e-3, epsilon=1e-7)
    optimizer.build(network.trainable_variables)
    data = samples(args.data, model.input)
    order = batches(len(data), args.batch)

    @tf.function
    def train(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(network(x, training=True) - x))
        gradients = tape.gradient(loss, network.trainable_variables)
        optimizer.apply_gradients(zip(gradients, network.trainable_variables))
        return loss

    def step():
        # The conversion waits for the step to end.
        return train(tf.constant(data[next(order)])).numpy()

    serve(step, version=f"TensorFlow {tf.__version__}", parameters=network.count_params())


main()
