"""Time to accuracy: the demo's federated training through each mode, with the same seeds.

Every mode has to end with the same bytes. Two things make that possible, whatever the order in which updates
arrive: sums are kept in float64, and clients round their parameters to multiples of 2^-20. Such sums are exact;
without the rounding the last bit of a parameter differs now and then, and training soon makes much of it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt
import torch
from lifl.model_layout import encode_header

from lifl_bench import training
from lifl_bench.deployment import Deployment, Sender
from lifl_bench.measure import usage_of
from lifl_bench.processes import Team
from lifl_bench.results import TrainingResult, TrainingRound
from lifl_bench.workload import Model

MODEL_SEED = 0
TOLERANCE = 1e-6
"""Largest difference of any parameter between the models of two modes."""
_GRID = np.float32(2**20)
_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Plan:
    """What is trained."""

    clients: int
    rounds: int
    target: float
    """Accuracy to reach, 0..1."""
    seed: int = 0


class Task:
    """The training that every mode gets: the clients' data, the first model, and how good a model is."""

    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(1)
        self.plan = plan
        self._federation = training.make_clients(plan.clients, seed=plan.seed)
        self._network = training.make_model(MODEL_SEED)
        tensors = training.get_tensors(self._network)
        header = encode_header({name: ("F32", array.shape) for name, array in tensors.items()})
        self.model = Model("digits", header, sum(array.nbytes for array in tensors.values()))
        self.initial = self.pack(tensors)
        # The first step of torch's optimiser takes a second. Taken here, no fork has to take it.
        warm_up = training.Training(epochs=1)
        training.train_client(training.make_model(), self._federation.test, seed=0, training=warm_up)

    def pack(self, tensors: training.Tensors) -> memoryview:
        """Safetensors bytes of a model."""
        return self.model.encode(np.concatenate([tensors[name].ravel() for name in self._names()]))

    def unpack(self, data: memoryview) -> training.Tensors:
        """The tensors in safetensors bytes."""
        values = self.model.decode(data)
        tensors: training.Tensors = {}
        start = 0
        shapes = {name: tensor.shape for name, tensor in self._network.state_dict().items()}
        for name in self._names():
            stop = start + int(np.prod(shapes[name]))
            tensors[name] = values[start:stop].reshape(shapes[name])
            start = stop
        return tensors

    def _names(self) -> list[str]:
        """Names of the tensors in the order in which they lie: safetensors sorts them."""
        return sorted(self._network.state_dict())

    def samples_of(self, client: int) -> int:
        """Images this client has."""
        return len(self._federation.clients[client])

    def train(self, client: int, round_: int, model: memoryview) -> memoryview:
        """One client's update for a round."""
        network = training.make_model(MODEL_SEED)
        training.set_tensors(network, self.unpack(model))
        seed = self.plan.seed + 1000 * round_ + client
        training.train_client(network, self._federation.clients[client], seed=seed)
        tensors = training.get_tensors(network)
        return self.pack({name: np.rint(array * _GRID) / _GRID for name, array in tensors.items()})

    def accuracy(self, model: memoryview) -> float:
        """Share of the test images that a model recognises."""
        training.set_tensors(self._network, self.unpack(model))
        return training.evaluate(self._network, self._federation.test)


def run_training(
    task: Task, deployment: Deployment, result: TrainingResult, advance: Callable[[str], None]
) -> npt.NDArray[np.float32]:
    """Train through one mode, whose deployment is not started yet; returns the values of its last model.

    `advance` is called after each round with what to tell the user. Raises RuntimeError if the mode fails.
    """
    try:
        deployment.start()
        with Team(task.plan.clients + 1, _Work(task, deployment)) as team:
            return _watch(task, deployment, team, result, advance)
    finally:
        deployment.stop()


class _Work:
    """What the processes of clients and observer do."""

    def __init__(self, task: Task, deployment: Deployment) -> None:
        self._task = task
        self._deployment = deployment

    def __call__(self, number: int, link: Connection) -> None:
        if number == self._task.plan.clients:
            self._observe(link)
        else:
            self._train(self._deployment.sender(number), number, link)

    def _train(self, sender: Sender, client: int, link: Connection) -> None:
        sender.connect()
        link.send(None)
        link.recv()
        begin = time.process_time()
        for round_ in range(1, self._task.plan.rounds + 1):
            update = self._task.train(client, round_, sender.fetch_model(round_))
            sender.send(update, num_samples=float(self._task.samples_of(client)), round=round_)
            link.send(time.process_time() - begin)
        sender.close()
        link.recv()

    def _observe(self, link: Connection) -> None:
        observer = self._deployment.observer()
        observer.connect()
        link.send(None)
        link.recv()
        for round_ in range(1, self._task.plan.rounds + 1):
            ready = observer.wait(round_, _TIMEOUT_SECONDS)
            link.send((ready, bytes(observer.fetch(round_))))
        observer.close()
        link.recv()


def _watch(
    task: Task, deployment: Deployment, team: Team, result: TrainingResult, advance: Callable[[str], None]
) -> npt.NDArray[np.float32]:
    clients = task.plan.clients
    list(team.receive(clients + 1, _TIMEOUT_SECONDS))
    cpu_before = _cpu(deployment)
    begin = time.monotonic()
    team.send_all("begin")
    tally = _Tally(team, clients)
    for round_ in range(1, task.plan.rounds + 1):
        ready, model = tally.wait_for(round_)
        cpu = _cpu(deployment) - cpu_before
        accuracy = task.accuracy(model)
        result.rounds.append(TrainingRound(accuracy, ready - begin, cpu, sum(tally.cpu)))
        advance(f"round {round_}, accuracy {accuracy:.1%}")
    values = task.model.decode(model)
    result.model_sha256 = hashlib.sha256(values.tobytes()).hexdigest()
    return values


class _Tally:
    """Keeps what clients and observer say apart by rounds: a fast client may be ahead of the others' words."""

    def __init__(self, team: Team, clients: int) -> None:
        self._team = team
        self._sent = [0] * clients
        self._models: dict[int, tuple[float, memoryview]] = {}
        self.cpu = [0.0] * clients
        """CPU seconds of each client so far."""

    def wait_for(self, round_: int) -> tuple[float, memoryview]:
        """When the round's model was there, and the model, once all clients have spoken too."""
        while round_ not in self._models or min(self._sent) < round_:
            for number, message in self._team.receive(1, _TIMEOUT_SECONDS):
                if number < len(self._sent):
                    self._sent[number] += 1
                    self.cpu[number] = message
                else:
                    ready, data = message
                    self._models[len(self._models) + 1] = ready, memoryview(data)
        return self._models[round_]


def _cpu(deployment: Deployment) -> float:
    return sum(usage.cpu for usage in usage_of(deployment.components()).values())
