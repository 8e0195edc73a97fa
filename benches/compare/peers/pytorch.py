"""PyTorch, eager; with --processes, DistributedDataParallel over gloo.

Best settings found: convolutions in channels_last, the fused Adam, gradients as views into DDP's buckets.
"""

from peer import arguments, batches, samples, serve

args = arguments(__doc__)

import torch
from torch import nn
from torch.nn import functional as F

from model import Layer, Model, cropped, output_of, padded, read

ACTIVATIONS = {"linear": nn.Identity, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}


class SameConv2d(nn.Conv2d):
    """A convolution with Keras' `same` padding, whose larger half comes last."""

    def forward(self, x):
        kernel, strides = self.kernel_size[0], self.stride[0]
        rows, columns = (padded(size, kernel, strides, "same") for size in x.shape[2:])
        return super().forward(F.pad(x, (*columns, *rows)))


class SameConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution whose output is cropped as Keras' `same` crops it."""

    def forward(self, x):
        y = super().forward(x)
        before, after = cropped(self.kernel_size[0], self.stride[0], "same")
        return y[:, :, before : y.shape[2] - after, before : y.shape[3] - after]


class Flatten(nn.Module):
    """An image as one axis, in the order (height, width, channels)."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


class Reshape(nn.Module):
    """One axis as an image (height, width, channels)."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.view(-1, *self.shape).permute(0, 3, 1, 2)


def module_of(layer: Layer, channels: int) -> nn.Module:
    """The module of a layer without its activation."""
    match layer.kind:
        case "dense":
            return nn.Linear(channels, layer.units)
        case "conv2d":
            kind = SameConv2d if layer.padding == "same" else nn.Conv2d
            return kind(channels, layer.filters, layer.kernel_size, layer.strides)
        case "conv2d_transpose":
            kind = SameConvTranspose2d if layer.padding == "same" else nn.ConvTranspose2d
            return kind(channels, layer.filters, layer.kernel_size, layer.strides)
        case "max_pool2d":
            return nn.MaxPool2d(layer.pool_size)
        case "flatten":
            return Flatten()
        case "reshape":
            return Reshape(layer.target_shape)
        case other:
            raise ValueError(f"layer {other} is not compared")


def build(model: Model) -> nn.Sequential:
    """The model with Keras' initial weights: Glorot uniform, zero biases."""
    torch.manual_seed(0)
    modules, shape = [], model.input
    for layer in model.layers:
        modules += [module_of(layer, shape[-1]), ACTIVATIONS[layer.activation]()]
        shape = output_of(layer, shape)
    network = nn.Sequential(*modules)
    for parameter in network.parameters():
        nn.init.xavier_uniform_(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)
    return network.to(memory_format=torch.channels_last) if model.is_image else network


def main() -> None:
    torch.set_num_threads(args.threads)
    model = read(args.model)
    network = build(model)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-7, fused=True)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if args.processes > 1:
        meet = f"tcp://127.0.0.1:{args.port}"
        torch.distributed.init_process_group("gloo", meet, rank=args.rank, world_size=args.processes)
        network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    data = torch.from_numpy(samples(args.data, model.input))
    share = args.batch // args.processes
    order = batches(len(data), args.batch)

    def step():
        indices = next(order)[args.rank * share : (args.rank + 1) * share]
        x = data[torch.from_numpy(indices)]
        # Samples are stored (height, width, channels): as NCHW, that is channels_last already.
        x = x.permute(0, 3, 1, 2) if model.is_image else x
        optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(network(x), x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    serve(step, version=f"PyTorch {torch.__version__}", parameters=parameters)
    if args.processes > 1:
        torch.distributed.destroy_process_group()


main()
