"""Every kind of function and of update through HTTP and a whole node, against references in numpy."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lifl.model_layout import encode_header, parse_header
from numpy.typing import NDArray

from tests.e2e.node_harness import (
    LiveNode,
    Tensors,
    assert_mean,
    create_job,
    encode,
    flat,
    headers_of_update,
    make_round,
    model_after,
    post_update,
    random_like,
    submit_all,
)

pytestmark = pytest.mark.timeout(60)

MODEL: Tensors = {"a": np.full((40, 50), 0.5, np.float32), "b": np.full(77, -0.25, np.float32)}

Stack = NDArray[np.float64]
"""One row for each client."""


def like_model(values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {"a": values[:2000].reshape(40, 50), "b": values[2000:]}


# --- the functions -------------------------------------------------------------------------------------------


class FedAvg:
    tolerance = 1e-6

    def step(self, previous: Stack, updates: Stack, weights: list[float]) -> Stack:
        return np.average(updates, axis=0, weights=weights)


class FedAdam:
    """Algorithm 2 of arXiv:2003.00295 with the settings of functions/fedadam.py."""

    tolerance = 1e-5
    moment: Any = 0.0
    square: Any = 1e-3**2

    def step(self, previous: Stack, updates: Stack, weights: list[float]) -> Stack:
        delta = np.average(updates, axis=0, weights=weights) - previous
        self.moment = 0.9 * self.moment + 0.1 * delta
        self.square = 0.99 * self.square + 0.01 * delta**2
        return previous + 0.1 * self.moment / (np.sqrt(self.square) + 1e-3)


class Median:
    tolerance = 1e-6

    def step(self, previous: Stack, updates: Stack, weights: list[float]) -> Stack:
        return np.median(updates, axis=0)


class TrimmedMean:
    tolerance = 1e-6

    def step(self, previous: Stack, updates: Stack, weights: list[float]) -> Stack:
        cut = len(updates) // 5
        return np.sort(updates, axis=0)[cut : len(updates) - cut].mean(axis=0)


class Krum:
    tolerance = 0.0

    def step(self, previous: Stack, updates: Stack, weights: list[float]) -> Stack:
        distances = ((updates[:, None, :] - updates[None, :, :]) ** 2).sum(axis=2)
        neighbours = len(updates) - 1 - 2
        scores = np.sort(distances, axis=1)[:, 1 : neighbours + 1].sum(axis=1)
        return updates[int(scores.argmin())]


@pytest.mark.parametrize(
    ("function", "make_reference"),
    [("fedavg", FedAvg), ("fedadam", FedAdam), ("median", Median), ("trimmed_mean", TrimmedMean), ("krum", Krum)],
)
def test_two_rounds_agree_with_the_definition(
    shared_node: LiveNode, function: str, make_reference: Callable[[], Any]
) -> None:
    job = function.replace("_", "-")
    create_job(shared_node, job, MODEL, goal=7, function=function)
    reference, expected = make_reference(), flat(MODEL)
    for number in (1, 2):
        round_ = make_round(MODEL, 7, seed=number)
        submit_all(shared_node, job, round_, number=number)
        updates = np.stack([flat(update) for update in round_.updates])
        expected = reference.step(expected, updates, round_.weights)
        result = flat(model_after(shared_node, job, number))
        np.testing.assert_allclose(result, expected, rtol=reference.tolerance, atol=reference.tolerance)
    shared_node.assert_all_slots_free(job)


def test_the_median_is_not_moved_by_two_clients_of_five_that_lie(shared_node: LiveNode) -> None:
    create_job(shared_node, "liars", MODEL, goal=5, function="median")
    for client in range(5):
        value = 1e30 if client < 2 else float(client)
        body = encode({name: np.full_like(array, value) for name, array in MODEL.items()})
        assert post_update(shared_node, "liars", body, headers_of_update(f"c{client}")).status == 202
    assert np.all(flat(model_after(shared_node, "liars", 1)) == 4.0)


# --- the kinds of updates ------------------------------------------------------------------------------------


def file_of(tensors: list[tuple[str, str, tuple[int, ...], bytes]]) -> bytes:
    """A safetensors file with the tensors (name, dtype, shape, bytes) in the order given."""
    entries, offset = {}, 0
    for name, dtype, shape, data in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + b"".join(data for *_, data in tensors)


def bfloat16(tensors: Tensors) -> tuple[dict[str, NDArray[Any]], bytes]:
    """Values that bfloat16 can hold, and the file that holds them so."""
    high = {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in tensors.items()}
    values = {name: (bits.astype(np.uint32) << 16).view(np.float32) for name, bits in high.items()}
    parts = [(name, "BF16", bits.shape, bits.tobytes()) for name, bits in high.items()]
    return values, file_of(parts)


def float16(tensors: Tensors) -> tuple[dict[str, NDArray[Any]], bytes]:
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    return half, encode(half)


def post(node: LiveNode, job: str, bodies: list[bytes], weights: list[float], **headers: str) -> None:
    for client, (body, weight) in enumerate(zip(bodies, weights, strict=True)):
        attributes = headers_of_update(f"client-{client}", samples=str(weight), **headers)
        answer = post_update(node, job, body, attributes)
        assert answer.status == 202, answer


@pytest.mark.parametrize("compress", [float16, bfloat16])
def test_compressed_updates_count_with_the_values_that_they_hold(
    shared_node: LiveNode, compress: Callable[[Tensors], tuple[dict[str, NDArray[Any]], bytes]]
) -> None:
    job = compress.__name__
    create_job(shared_node, job, MODEL, goal=6)
    full = [random_like(MODEL, seed) for seed in range(6)]
    held = [compress(update) for update in full[:4]]
    bodies = [body for _, body in held] + [encode(update) for update in full[4:]]
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    post(shared_node, job, bodies, weights)
    assert_mean(model_after(shared_node, job, 1), [*(values for values, _ in held), *full[4:]], weights)


def test_differences_and_whole_models_mix(shared_node: LiveNode) -> None:
    create_job(shared_node, "deltas", MODEL, goal=4)
    start = MODEL
    for number in (1, 2):
        updates = [random_like(MODEL, 10 * number + seed) for seed in range(4)]
        for client, update in enumerate(updates):
            with shared_node.client("deltas", f"client-{client}") as connection:
                is_delta = client < 3
                connection.submit(update, num_samples=client + 1.0, round=number, delta=is_delta)
        whole = [{name: update[name] + np.float64(start[name]) for name in start} for update in updates[:3]]
        result = model_after(shared_node, "deltas", number)
        expected = np.average([flat(model) for model in (*whole, updates[3])], axis=0, weights=[1, 2, 3, 4])
        np.testing.assert_allclose(flat(result), expected, rtol=1e-6, atol=1e-6)
        start = result


def test_integer_and_bool_buffers_become_the_rounded_mean(shared_node: LiveNode) -> None:
    model: dict[str, Any] = {
        "weight": np.zeros(9, np.float32),
        "num_batches_tracked": np.array(0, np.int64),
        "counts": np.zeros(4, np.int32),
        "small": np.zeros(3, np.uint8),
        "mask": np.zeros(4, np.bool_),
    }
    updates: list[dict[str, Any]] = [
        {
            "weight": np.full(9, float(client), np.float32),
            "num_batches_tracked": np.array(batches, np.int64),
            "counts": np.array([client, 2 * client, -client, 7], np.int32),
            "small": np.array([255, 0, client], np.uint8),
            "mask": np.array([True, False, client == 0, client != 0]),
        }
        for client, batches in enumerate((10, 11, 11, 12))
    ]
    weights = [1.0, 1.0, 2.0, 2.0]
    create_job(shared_node, "buffers", model, goal=4)
    post(shared_node, "buffers", [encode(update) for update in updates], weights)
    result = model_after(shared_node, "buffers", 1)
    for name in ("num_batches_tracked", "counts", "small"):
        mean = np.average(
            np.stack([update[name] for update in updates]).astype(np.float64), axis=0, weights=weights
        )
        assert result[name].dtype == model[name].dtype
        assert np.array_equal(result[name], np.rint(mean)), name
    assert result["mask"].tolist() == [True, False, False, True]
    np.testing.assert_allclose(result["weight"], 11 / 6, rtol=1e-6)


def test_tensors_without_dimensions_and_without_items_are_kept(shared_node: LiveNode) -> None:
    model = {
        "scale": np.array(2.0, np.float32),
        "none": np.zeros((0, 7), np.float32),
        "w": np.zeros((3, 1, 2), np.float32),
    }
    create_job(shared_node, "odd-shapes", model, goal=3)
    updates = [random_like(model, seed) for seed in range(3)]
    post(shared_node, "odd-shapes", [encode(update) for update in updates], [1.0, 2.0, 3.0])
    result = model_after(shared_node, "odd-shapes", 1)
    assert {name: array.shape for name, array in result.items()} == {"scale": (), "none": (0, 7), "w": (3, 1, 2)}
    assert_mean(result, updates, [1.0, 2.0, 3.0])


def test_tensors_may_come_in_any_order(shared_node: LiveNode) -> None:
    shapes = {"a": (5, 7), "b": (300,), "c": (), "d": (64, 2), "e": (1,)}
    model = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    create_job(shared_node, "orders", model, goal=5)
    updates = [random_like(model, seed) for seed in range(5)]
    bodies = []
    for seed, update in enumerate(updates):
        order = np.random.default_rng(seed).permutation(sorted(shapes))
        bodies.append(file_of([(name, "F32", update[name].shape, update[name].tobytes()) for name in order]))
    post(shared_node, "orders", bodies, [3.0, 1.0, 4.0, 1.0, 5.0])
    assert_mean(model_after(shared_node, "orders", 1), updates, [3.0, 1.0, 4.0, 1.0, 5.0])


def test_a_model_keeps_its_own_order_and_names(shared_node: LiveNode) -> None:
    header = encode_header({"ünïcode/名": ("F32", [4]), "plain": ("F32", [2, 2])}, {"format": "pt"})
    layout = parse_header(header)
    payload = np.arange(8, dtype=np.float32).tobytes()
    with shared_node.client("names") as client:
        client.create_job(function="fedavg", goal=1)
        client.upload_model(len(header).to_bytes(8, "little") + header + payload)
        fetched = client.fetch_model()
        assert bytes(fetched.data[8 : 8 + len(header)]) == header
        assert set(fetched.tensors) == {spec.name for spec in layout.tensors}
        assert client.submit(bytes(fetched.data), num_samples=1.0, round=1).status == "accepted"
        assert client.wait_for_round(after=1, timeout=30).data == fetched.data


def test_structured_events_count_as_binary_ones_do(shared_node: LiveNode) -> None:
    create_job(shared_node, "structured", MODEL, goal=3)
    updates = [random_like(MODEL, seed) for seed in range(3)]
    for client, update in enumerate(updates):
        event = {
            "specversion": "1.0",
            "type": "dev.lifl.update.v1",
            "source": f"client-{client}",
            "id": f"{client}",
            "round": 1,
            "numsamples": client + 1,
            "datacontenttype": "application/vnd.safetensors",
            "data_base64": base64.b64encode(encode(update)).decode(),
        }
        body = json.dumps(event).encode()
        headers = {"Content-Type": "application/cloudevents+json; charset=utf-8"}
        assert post_update(shared_node, "structured", body, headers).status == 202
        if client < 2:
            assert post_update(shared_node, "structured", body, headers).status == 200  # a duplicate
        broken = body.replace(b"data_base64", b"data_base46")
        assert post_update(shared_node, "structured", broken, headers).status == 400
    assert_mean(model_after(shared_node, "structured", 1), updates, [1.0, 2.0, 3.0])
    shared_node.assert_all_slots_free("structured")
