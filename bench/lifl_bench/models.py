"""Tensor names and shapes of the ResNets that the benchmarks send, generated, so that no torchvision is needed.

The names are torchvision's. The head has 10 classes and ResNet-18 and -34 the 3x3 first convolution that is
usual for CIFAR, so that ResNet-18 has 11,173,962 parameters in 62 tensors (44.7 MB as float32). Buffers
(running means and variances) are left out: they are not trained.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Shapes = dict[str, tuple[int, ...]]
ModelName = Literal["resnet18", "resnet34", "resnet152"]

_BLOCKS: dict[ModelName, tuple[Literal["basic", "bottleneck"], tuple[int, int, int, int]]] = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}


def resnet_shapes(name: ModelName, *, classes: int = 10, stem: int = 3) -> Shapes:
    """Name and shape of every trained tensor, in the order of the state dict.

    `stem` is the side of the first convolution's kernel: 3 as used for CIFAR, 7 as used for ImageNet.
    """
    kind, depths = _BLOCKS[name]
    shapes: Shapes = {"conv1.weight": (64, 3, stem, stem), **_batch_norm("bn1", 64)}
    inputs = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        outputs = width if kind == "basic" else 4 * width
        for block in range(depth):
            prefix = f"layer{stage + 1}.{block}"
            if kind == "basic":
                convolutions = [(width, inputs, 3), (width, width, 3)]
            else:
                convolutions = [(width, inputs, 1), (width, width, 3), (outputs, width, 1)]
            for number, (to, of, side) in enumerate(convolutions, start=1):
                shapes[f"{prefix}.conv{number}.weight"] = (to, of, side, side)
                shapes |= _batch_norm(f"{prefix}.bn{number}", to)
            if block == 0 and (stage > 0 or inputs != outputs):
                shapes[f"{prefix}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                shapes |= _batch_norm(f"{prefix}.downsample.1", outputs)
            inputs = outputs
    return {**shapes, "fc.weight": (classes, inputs), "fc.bias": (classes,)}


def _batch_norm(prefix: str, channels: int) -> Shapes:
    return {f"{prefix}.weight": (channels,), f"{prefix}.bias": (channels,)}


def parameter_count(shapes: Shapes) -> int:
    """Number of elements of all tensors together."""
    return sum(math.prod(shape) for shape in shapes.values())


def split_flat(flat: npt.NDArray[np.float32], shapes: Shapes) -> dict[str, npt.NDArray[np.float32]]:
    """Views of `flat`, one for each tensor of `shapes`, in that order; nothing is copied.

    Raises ValueError if `flat` has another number of elements than the model.
    """
    if flat.size != parameter_count(shapes):
        raise ValueError(f"the model has {parameter_count(shapes)} elements, the array {flat.size}")
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    start = 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        tensors[name] = flat[start:stop].reshape(shape)
        start = stop
    return tensors


def join_flat(tensors: dict[str, npt.NDArray[np.float32]], shapes: Shapes) -> npt.NDArray[np.float32]:
    """The inverse of `split_flat`: one new array with the tensors in the order of `shapes`."""
    return np.concatenate([np.asarray(tensors[name], dtype=np.float32).reshape(-1) for name in shapes])
