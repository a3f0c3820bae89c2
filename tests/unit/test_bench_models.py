"""The generated ResNets have the parameters that their papers and torchvision give."""

from __future__ import annotations

import numpy as np
import pytest
from lifl_bench import models


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("resnet18", 11_173_962, 62), ("resnet34", 21_282_122, 110), ("resnet152", 58_156_618, 467)],
)
def test_the_cifar_variants_have_the_known_size(name: models.ModelName, parameters: int, tensors: int) -> None:
    shapes = models.resnet_shapes(name)

    assert (models.parameter_count(shapes), len(shapes)) == (parameters, tensors)


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet152", 60_192_808)]
)
def test_the_imagenet_variants_have_torchvisions_size(name: models.ModelName, parameters: int) -> None:
    assert models.parameter_count(models.resnet_shapes(name, classes=1000, stem=7)) == parameters


def test_a_flat_array_is_split_into_views_and_joined_again() -> None:
    shapes: models.Shapes = {"a": (2, 3), "b": (), "c": (4,)}
    flat = np.arange(11, dtype=np.float32)

    tensors = models.split_flat(flat, shapes)

    assert {name: array.shape for name, array in tensors.items()} == shapes
    assert all(np.shares_memory(array, flat) for array in tensors.values())
    assert np.array_equal(models.join_flat(tensors, shapes), flat)
    with pytest.raises(ValueError, match="11"):
        models.split_flat(flat[:10], shapes)
