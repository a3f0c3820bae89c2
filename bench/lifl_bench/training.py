"""The training half of the demo: handwritten digits, unevenly spread over clients, and a small CNN.

Everything here is what a user of LIFL brings along; none of it knows of the platform. Seeds are fixed, so that a
run is repeatable up to the order in which updates arrive.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

Tensors = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Shard:
    """Labelled images: `images` float32 (n, 1, 8, 8) in 0..1, `labels` int64 (n,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Federation:
    """The shards of all clients, which nobody else sees, and the test set."""

    clients: tuple[Shard, ...]
    test: Shard


@dataclass(frozen=True)
class Training:
    """Hyper-parameters of one client's local training."""

    epochs: int = 5
    batch_size: int = 16
    learning_rate: float = 0.05
    momentum: float = 0.9


def make_clients(count: int = 20, *, alpha: float = 0.5, seed: int = 0, minimum: int = 10) -> Federation:
    """Split scikit-learn's digits (1797 images) into 20 % for testing and `count` non-IID shards.

    Each class is spread over the clients by a Dirichlet distribution with concentration `alpha`: the smaller,
    the fewer classes a client sees. The draw is repeated until every client has at least `minimum` images.
    """
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    random = np.random.default_rng(seed)
    for _ in range(1000):
        members = _dirichlet_split(train_y, count, alpha, random)
        if min(map(len, members)) >= minimum:
            break
    else:
        raise ValueError(f"no split of {len(train_y)} images gives {count} clients {minimum} images each")
    return Federation(
        clients=tuple(_shard(train_x[index], train_y[index]) for index in members),
        test=_shard(test_x, test_y),
    )


def _dirichlet_split(
    labels: npt.NDArray[np.int64], count: int, alpha: float, random: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    members: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(count)]
    for label in np.unique(labels):
        index = random.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(random.dirichlet(np.full(count, alpha)))[:-1] * len(index)).astype(np.int64)
        for part, chosen in zip(members, np.split(index, cuts), strict=True):
            part.append(chosen)
    return [np.concatenate(part) for part in members]


def _shard(images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Shard:
    return Shard(torch.from_numpy(images.copy()), torch.from_numpy(labels.copy()))


def make_model(seed: int = 0) -> nn.Module:
    """A CNN for 8x8 images with 13,706 parameters, initialised from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def get_tensors(model: nn.Module) -> Tensors:
    """Copies of the model's parameters by name, as float32 arrays."""
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def set_tensors(model: nn.Module, tensors: Tensors) -> None:
    """Overwrite the model's parameters; raises RuntimeError if names or shapes differ."""
    model.load_state_dict({name: torch.tensor(np.asarray(array)) for name, array in tensors.items()})


def train_client(model: nn.Module, shard: Shard, *, seed: int, training: Training | None = None) -> float:
    """Train `model` in place on one client's images with SGD; returns the mean loss of the last epoch.

    `seed` decides the order of the images; give each (client, round) its own.
    """
    training = training or Training()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=training.learning_rate, momentum=training.momentum)
    model.train()
    loss_sum = 0.0
    for _ in range(training.epochs):
        loss_sum = 0.0
        for batch in torch.randperm(len(shard), generator=generator).split(training.batch_size):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(shard.images[batch]), shard.labels[batch])
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(batch)
    return loss_sum / len(shard)


def evaluate(model: nn.Module, shard: Shard) -> float:
    """Share of the shard's images, 0..1, that the model recognises."""
    model.eval()
    with torch.no_grad():
        return float((model(shard.images).argmax(1) == shard.labels).float().mean())
