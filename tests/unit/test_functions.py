from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lifl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifl import Aggregate, AggregatorFunction, GatheredUpdates, InvalidFunction, ModelUpdate, load_function
from lifl.aggregate import Contribution
from lifl.fold import Fold
from lifl.model_layout import AccumulatorLayout, ModelLayout, parse_header, plan_update
from lifl.tensors import Encoder, split
from numpy.typing import NDArray

FUNCTIONS = Path(__file__).parents[2] / "functions"
STREAMING = ["fedavg", "fedadam", "fedyogi", "fedadagrad", "fedavgm"]
GATHERING = ["median", "trimmed_mean", "krum"]

Tensors = dict[str, NDArray[Any]]


def make_tensors(seed: int, size: int = 1000) -> Tensors:
    random = np.random.default_rng(seed)
    return {
        "bias": random.normal(size=7).astype(np.float32),
        "counter": np.array(random.integers(0, 100)),
        "double": random.normal(size=(3, 5)),
        "half": random.normal(size=11).astype(np.float16),
        "weight": random.normal(size=size).astype(np.float32),
    }


def make_update(tensors: Tensors, client: str = "a", samples: float = 1.0, **attributes: Any) -> ModelUpdate:
    layout, payload = split(bytes(Encoder().encode(tensors)))
    model = attributes.pop("model", layout)
    plan = plan_update(model, layout)
    return ModelUpdate(payload, layout, plan, client=client, round=1, num_samples=samples, **attributes)


def fold_all(layout: ModelLayout, contributions: Sequence[Contribution]) -> tuple[Any, float]:
    """A partial aggregate as a worker makes it: (accumulator, weight)."""
    accumulators = AccumulatorLayout(layout)
    fold = Fold(accumulators)
    out = np.zeros(accumulators.nbytes, np.uint8)
    inputs = [fold.update(c.update.payload, c.update.plan, c.weight * c.scale) for c in contributions]
    if inputs:
        assert fold.fold(out, inputs)
    return out, sum(c.weight for c in contributions)


def gather(
    function: Callable[[GatheredUpdates], None], updates: list[ModelUpdate], previous: Any = None, **options: Any
) -> Tensors:
    """The model that a gathering function makes of these updates, by tensor name."""
    layout = options.get("layout", updates[0].layout)
    accumulators = AccumulatorLayout(layout)
    sums = np.zeros(accumulators.nbytes, np.uint8)
    gathered = GatheredUpdates(updates, accumulators, sums, previous)
    function(gathered)
    assert gathered.complete
    model = np.empty(layout.payload_bytes, np.uint8)
    assert Fold(accumulators).finish(model, [sums], 1.0)
    view = ModelUpdate(model, layout, plan_update(layout, layout), client="", round=1, num_samples=1)
    return {name: view.array(name) for name in view.names}


# --- the package ---------------------------------------------------------------------------------------------


def test_importing_lifl_or_the_decorator_imports_no_numpy() -> None:
    code = "import sys, lifl; lifl.aggregator; lifl.FedAdam; assert not {'numpy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_can_be_imported() -> None:
    for name in lifl.__all__:
        assert getattr(lifl, name) is not None
        assert name in dir(lifl)
    assert lifl.__all__ == sorted(lifl.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lifl.no_such_name


# --- model updates -------------------------------------------------------------------------------------------


def test_arrays_are_read_only_views_of_the_payload() -> None:
    tensors = make_tensors(1)
    update = make_update(tensors)
    for name, expected in tensors.items():
        array = update.array(name)
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype
        assert not array.flags.writeable
        assert not array.flags.owndata
    with pytest.raises(KeyError):
        update.array("missing")


def test_torch_tensors_share_the_payload_and_warn_of_nothing() -> None:
    torch = pytest.importorskip("torch")
    tensors = make_tensors(2)
    update = make_update(tensors)
    for name, tensor in update.tensors().items():
        np.testing.assert_array_equal(tensor.numpy(), tensors[name])
    base = np.frombuffer(update.payload, np.uint8).__array_interface__["data"][0]
    address = update.tensor("weight").data_ptr()
    assert base <= address < base + len(update.payload)
    assert isinstance(update.tensor("weight"), torch.Tensor)


def test_a_torch_tensor_keeps_the_memory_of_its_update_alive() -> None:
    pytest.importorskip("torch")
    expected = make_tensors(3)["weight"]
    tensor = make_update(make_tensors(3)).tensor("weight")
    _ = [bytearray(50_000) for _ in range(20)]
    np.testing.assert_array_equal(tensor.numpy(), expected)


def test_bfloat16_is_a_float32_copy_to_numpy_and_itself_to_torch() -> None:
    torch = pytest.importorskip("torch")
    source = torch.linspace(-3, 3, 33).to(torch.bfloat16)
    update = make_update({"x": source, "flag": torch.tensor([True, False, True])})
    np.testing.assert_array_equal(update.array("x"), source.float().numpy())
    assert update.tensor("x").dtype == torch.bfloat16
    assert torch.equal(update.tensor("x"), source)
    assert update.array("flag").tolist() == [True, False, True]
    assert update.tensor("flag").tolist() == [True, False, True]


def test_bytes_other_than_0_and_1_are_true() -> None:
    layout, payload = split(bytes(Encoder().encode({"flag": np.array([True, False, True])})))
    odd = bytearray(payload)
    odd[0] = 7
    update = ModelUpdate(odd, layout, plan_update(layout, layout), client="a", round=1, num_samples=1)
    assert update.array("flag").tolist() == [True, False, True]
    assert update.tensor("flag").tolist() == [True, False, True]


def test_the_norm_is_over_all_float_tensors_together() -> None:
    tensors = make_tensors(4, size=100_000)
    floats = [array.astype(np.float64).ravel() for name, array in tensors.items() if name != "counter"]
    expected = float(np.linalg.norm(np.concatenate(floats)))
    assert make_update(tensors).norm() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [1e30, 1e-30, 0.0])
def test_the_norm_neither_overflows_nor_vanishes_in_float32(value: float) -> None:
    update = make_update({"x": np.full(100, value, np.float32)})
    assert update.norm() == pytest.approx(10 * value, rel=1e-6)


def test_the_norm_of_bfloat16_is_that_of_its_values() -> None:
    torch = pytest.importorskip("torch")
    source = torch.linspace(-3, 3, 33).to(torch.bfloat16)
    assert make_update({"x": source}).norm() == pytest.approx(float(source.double().norm()))


def test_a_payload_that_is_too_short_is_refused() -> None:
    layout, payload = split(bytes(Encoder().encode(make_tensors(1))))
    with pytest.raises(ValueError, match="are needed"):
        ModelUpdate(payload[:-1], layout, plan_update(layout, layout), client="a", round=1, num_samples=1)


# --- aggregates ----------------------------------------------------------------------------------------------


def test_adding_notes_weight_and_scale() -> None:
    total = Aggregate(3, weight=10.0)
    first, second = make_update(make_tensors(1), samples=4.0), make_update(make_tensors(2))
    total.add(first)
    total.add(second, weight=2.0, scale=0.5)
    assert total.round == 3
    assert total.weight == 16.0
    assert total.take() == [(first, 4.0, 1.0), (second, 2.0, 0.5)]
    assert total.contributions == ()
    assert total.weight == 16.0


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_cannot_count_is_refused(weight: float) -> None:
    total = Aggregate(1)
    with pytest.raises(ValueError, match="weight"):
        total.add(make_update(make_tensors(1)), weight=weight)
    assert total.contributions == ()


def test_a_scale_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="scale"):
        Aggregate(1).add(make_update(make_tensors(1)), scale=float("inf"))
    with pytest.raises(ValueError, match="scale"):
        Aggregate(1).add(make_update(make_tensors(1)), weight=1e300, scale=1e300)


def test_an_update_counts_once() -> None:
    total, update = Aggregate(1), make_update(make_tensors(1))
    total.add(update)
    with pytest.raises(ValueError, match="already"):
        total.add(update)


def test_a_function_that_fails_adds_nothing() -> None:
    def fails(total: Aggregate, update: ModelUpdate) -> None:
        total.add(update)
        raise RuntimeError("no")

    total, update = Aggregate(1), make_update(make_tensors(1))
    with pytest.raises(RuntimeError):
        total.offer(fails, update)
    assert total.contributions == ()
    total.add(update)


def test_offer_tells_whether_the_update_was_added() -> None:
    total = Aggregate(1)
    assert total.offer(lambda total, update: total.add(update), make_update(make_tensors(1)))
    assert not total.offer(lambda total, update: None, make_update(make_tensors(1)))


def test_an_update_cannot_be_kept_for_a_later_call() -> None:
    total, kept = Aggregate(1), make_update(make_tensors(1))
    with pytest.raises(ValueError, match="not the update of this call"):
        total.offer(lambda total, update: total.add(kept), make_update(make_tensors(2)))


# --- the functions of this repository: streaming -------------------------------------------------------------


@pytest.mark.parametrize("name", STREAMING)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_any_tree_and_any_order_gives_the_same_mean(name: str, data: st.DataObject) -> None:
    function = load_function(FUNCTIONS / f"{name}.py")
    count = data.draw(st.integers(1, 8))
    samples = data.draw(st.lists(st.floats(0.5, 1000), min_size=count, max_size=count))
    models = [make_tensors(seed, size=50) for seed in range(count)]
    layout = make_update(models[0]).layout
    updates = [make_update(m, str(i), samples[i], model=layout) for i, m in enumerate(models)]
    order = data.draw(st.permutations(range(count)))
    leaf_of = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    partials = []
    for leaf in range(4):
        total = Aggregate(1)
        for i in order:
            if leaf_of[i] == leaf:
                assert total.offer(function, updates[i])
        contributions = total.take()
        if contributions:
            partials.append(fold_all(layout, contributions))
    model = np.empty(layout.payload_bytes, np.uint8)
    fold = Fold(AccumulatorLayout(layout))
    assert fold.finish(model, [sums for sums, _ in partials], sum(weight for _, weight in partials))
    result = ModelUpdate(model, layout, plan_update(layout, layout), client="", round=1, num_samples=1)
    for tensor in models[0]:
        stack = np.stack([m[tensor].astype(np.float64) for m in models])
        expected = np.average(stack, axis=0, weights=samples)
        if tensor == "counter":
            assert abs(float(result.array(tensor)) - expected) <= 0.5 + 1e-9
        else:
            tolerance = 2e-3 if tensor == "half" else 1e-5
            np.testing.assert_allclose(result.array(tensor), expected, rtol=tolerance, atol=tolerance)


# --- the functions of this repository: gathering --------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16])
def test_the_median_is_that_of_each_parameter(count: int) -> None:
    models = [make_tensors(seed) for seed in range(count)]
    result = gather(load_function(FUNCTIONS / "median.py"), [make_update(m) for m in models])
    for name in models[0]:
        expected = np.median(np.stack([m[name].astype(np.float64) for m in models]), axis=0)
        if name == "counter":
            expected = np.rint(expected)
        np.testing.assert_allclose(
            result[name].astype(np.float64), expected, rtol=2e-3 if name == "half" else 1e-6
        )


def test_the_trimmed_mean_leaves_out_the_extremes() -> None:
    models = [{"x": np.float32([value, -value])} for value in (-1e9, 1, 2, 3, 1e9)]
    result = gather(load_function(FUNCTIONS / "trimmed_mean.py"), [make_update(m) for m in models])
    np.testing.assert_allclose(result["x"], [2, -2])


def test_krum_chooses_an_honest_model() -> None:
    honest = [make_tensors(0) for _ in range(5)]
    for seed, model in enumerate(honest):
        model["weight"] = model["weight"] + np.random.default_rng(seed).normal(size=1000, scale=0.01).astype("f4")
    hostile = make_tensors(99)
    result = gather(load_function(FUNCTIONS / "krum.py"), [make_update(m) for m in [hostile, *honest]])
    assert any(np.array_equal(result["weight"], model["weight"]) for model in honest)


@pytest.mark.parametrize("name", GATHERING)
@given(order=st.permutations(range(6)))
@settings(deadline=None, max_examples=10)
def test_gathering_functions_do_not_depend_on_the_order(name: str, order: list[int]) -> None:
    function = load_function(FUNCTIONS / f"{name}.py")
    updates = [make_update(make_tensors(seed, size=40)) for seed in range(6)]
    straight, permuted = gather(function, updates), gather(function, [updates[i] for i in order])
    for tensor, array in straight.items():
        np.testing.assert_allclose(permuted[tensor], array, rtol=1e-6, atol=1e-7)


def test_tiles_read_updates_of_another_order_and_compressed_dtypes() -> None:
    torch = pytest.importorskip("torch")
    model = {"b": np.float32([1, 2, 3]), "a": np.arange(100, dtype=np.float32), "n": np.array(3)}
    layout = make_update(model).layout
    compressed = {
        "a": torch.arange(100).to(torch.bfloat16),
        "b": np.float16([1, 2, 3]),
        "n": np.array(5),
    }
    updates = [make_update(model), make_update(compressed, model=layout)]

    def mean(updates: GatheredUpdates) -> None:
        for inputs, output in updates.tiles(size=7):
            assert inputs.shape[1] == output.size <= 7
            inputs.mean(axis=0, out=output)

    result = gather(mean, updates, layout=layout)
    np.testing.assert_array_equal(result["a"], model["a"])
    np.testing.assert_array_equal(result["b"], model["b"])
    assert result["n"] == 4


def test_deltas_are_added_to_the_previous_model() -> None:
    previous = make_update({"x": np.float32([10, 20])})
    delta = make_update({"x": np.float32([1, -1])}, is_delta=True)
    result = gather(load_function(FUNCTIONS / "median.py"), [delta], previous.payload)
    np.testing.assert_array_equal(result["x"], [11, 19])
    with pytest.raises(ValueError, match="previous model"):
        gather(load_function(FUNCTIONS / "median.py"), [delta])


def test_what_a_function_forgets_to_fill_is_not_finite() -> None:
    update = make_update({"x": np.ones(5, np.float32)})
    accumulators = AccumulatorLayout(update.layout)
    sums = np.zeros(accumulators.nbytes, np.uint8)
    gathered = GatheredUpdates([update], accumulators, sums)
    for _ in gathered.tiles():
        pass
    assert not Fold(accumulators).finish(np.empty(20, np.uint8), [sums], 1.0)


def test_a_later_pass_leaves_the_result_as_it_is() -> None:
    def twice(updates: GatheredUpdates) -> None:
        for inputs, output in updates.tiles():
            output[:] = inputs[0]
        for _ in updates.tiles():
            pass

    update = make_update({"x": np.ones(5, np.float32)})
    np.testing.assert_array_equal(gather(twice, [update])["x"], 1)


def test_an_unfinished_pass_is_not_complete() -> None:
    update = make_update(make_tensors(1))
    accumulators = AccumulatorLayout(update.layout)
    gathered = GatheredUpdates([update], accumulators, np.zeros(accumulators.nbytes, np.uint8))
    next(iter(gathered.tiles()))
    assert not gathered.complete


@given(rows=st.integers(1, 24), seed=st.integers(0, 100))
@settings(deadline=None)
def test_sorted_tiles_are_sorted(rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    models = [{"x": random.integers(-5, 5, size=9).astype(np.float32)} for _ in range(rows)]
    expected = np.sort(np.stack([m["x"] for m in models]), axis=0)

    def check(updates: GatheredUpdates) -> None:
        for inputs, output in updates.sorted_tiles():
            np.testing.assert_array_equal(inputs, expected)
            output[:] = 0

    gather(check, [make_update(m) for m in models])


def test_squared_distances_do_not_cancel_between_close_models() -> None:
    base = np.full(50_000, 1000, np.float32)
    models = [{"x": base + np.float32(i)} for i in range(3)]
    distances: list[Any] = []

    def measure(updates: GatheredUpdates) -> None:
        distances.append(updates.squared_distances())
        for inputs, output in updates.tiles():
            output[:] = inputs[0]

    gather(measure, [make_update(m) for m in models])
    expected = 50_000 * np.array([[0, 1, 4], [1, 0, 1], [4, 1, 0]])
    np.testing.assert_allclose(distances[0], expected, rtol=1e-4)


def test_gathered_updates_are_a_sequence() -> None:
    updates = [make_update(make_tensors(i), str(i), samples=i + 1.0) for i in range(3)]
    accumulators = AccumulatorLayout(updates[0].layout)
    gathered = GatheredUpdates(updates, accumulators, bytearray(accumulators.nbytes))
    assert [update.client for update in gathered] == ["0", "1", "2"]
    assert gathered[1] is updates[1]
    assert len(gathered[:2]) == 2
    np.testing.assert_array_equal(gathered.weights, [1, 2, 3])


# --- the decorator -------------------------------------------------------------------------------------------


def test_every_function_of_the_repository_loads_and_says_what_it_is() -> None:
    for name in STREAMING + GATHERING:
        function = load_function(FUNCTIONS / f"{name}.py")
        assert function.name == name
        assert function.gather == (name in GATHERING)
        assert (function.server_optimizer is not None) == (name in STREAMING[1:])
        assert function.doc
        module = sys.modules[function.__module__]
        assert module.new.__name__ == "new"
        for method in ("handle", "start", "stop", "alive", "ready"):
            assert callable(getattr(module.new(), method))


def test_functions_import_nothing_but_lifl() -> None:
    for path in FUNCTIONS.glob("*.py"):
        imports = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert imports
        assert all(line.startswith("from lifl import ") for line in imports), path


def test_a_decorated_function_is_still_the_function() -> None:
    calls = []

    @lifl.aggregator
    def plain(total: Aggregate, update: ModelUpdate) -> None:
        """What it does.

        More.
        """
        calls.append((total, update))

    assert isinstance(plain, AggregatorFunction)
    plain("total", "update")
    assert calls == [("total", "update")]
    assert plain.doc == "What it does."
    assert (plain.name, plain.gather, plain.server_optimizer) == ("plain", False, None)


def test_functions_that_cannot_be_called_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"wrong\(total, update\)"):

        @lifl.aggregator  # type: ignore[arg-type]
        def wrong(total: Aggregate) -> None: ...

    with pytest.raises(TypeError, match=r"gatherer\(updates\)"):

        @lifl.aggregator(gather=True)
        def gatherer(total: Aggregate, update: ModelUpdate) -> None: ...

    with pytest.raises(TypeError, match="async"):

        @lifl.aggregator  # type: ignore[arg-type]
        async def coroutine(total: Aggregate, update: ModelUpdate) -> None: ...

    with pytest.raises(TypeError, match="server_optimizer"):

        @lifl.aggregator(server_optimizer="adam")  # type: ignore[arg-type]
        def optimized(total: Aggregate, update: ModelUpdate) -> None: ...


# --- loading -------------------------------------------------------------------------------------------------

GOOD = "from lifl import aggregator\n\n@aggregator\ndef {}(total, update):\n    total.add(update)\n"


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(GOOD.format(folder))
    first, second = load_function(tmp_path / "a" / "mine.py"), load_function(tmp_path / "b" / "mine.py")
    assert (first.name, second.name) == ("a", "b")
    assert first.__module__ != second.__module__


def test_a_changed_file_is_loaded_anew(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    for name in ("aaa", "bbb"):
        path.write_text(GOOD.format(name))
        assert load_function(path).name == name


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("import lifl\n\ndef broken(:\n", r"mine\.py:3: "),
        ("import lifl\n\nimport no_such_module_anywhere\n", r"mine\.py:3: ModuleNotFoundError"),
        ("x = 1\n\ndef f():\n    return 1 / 0\n\nf()\n", r"mine\.py:4: ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", r"mine\.py:2: SystemExit"),
        ("x = 1\n", r"mine\.py: defines no @aggregator"),
        (GOOD.format("a") + GOOD.format("b"), r"mine\.py: defines several aggregators \(a, b\)"),
        ("from lifl import aggregator\n@aggregator\ndef f(x): ...\n", r"mine\.py:2: TypeError"),
        ("\0", r"mine\.py"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_explained(tmp_path: Path, text: str, pattern: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    before = set(sys.modules)
    with pytest.raises(InvalidFunction, match=pattern):
        load_function(path)
    assert not [name for name in set(sys.modules) - before if "lifl_function" in name and "no @" not in pattern][
        1:
    ]


def test_a_missing_file_or_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidFunction, match=r"none\.py: does not exist"):
        load_function(tmp_path / "none.py")
    with pytest.raises(InvalidFunction, match="is a folder"):
        load_function(tmp_path)
    with pytest.raises(InvalidFunction, match="no such module"):
        load_function("no_such_package.fedavg")


def test_a_name_chooses_between_several(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(GOOD.format("a") + GOOD.format("b"))
    assert load_function(path, "b").name == "b"
    with pytest.raises(InvalidFunction, match="no aggregator 'c', only a, b"):
        load_function(path, "c")


def test_a_module_is_loaded_by_its_dotted_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_functions_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text(GOOD.format("mine"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_function("some_functions_package.mine").name == "mine"


def test_a_new_of_ones_own_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def new():\n    return 7\n\n" + GOOD.format("mine"))
    assert sys.modules[load_function(path).__module__].new() == 7


# --- encoding ------------------------------------------------------------------------------------------------


def test_the_encoder_writes_what_safetensors_reads() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = make_tensors(5) | {"strided": np.arange(10.0)[::2], "swapped": np.arange(3, dtype=">f4")}
    read = safetensors.load(bytes(Encoder().encode(tensors)))
    assert read.keys() == tensors.keys()
    for name, array in read.items():
        np.testing.assert_array_equal(array, tensors[name])


def test_the_encoder_uses_its_buffer_again() -> None:
    encoder = Encoder()
    first = encoder.encode({"x": np.float32([1, 2])})
    second = encoder.encode({"x": np.float32([3, 4])})
    address = np.frombuffer(first, np.uint8).__array_interface__["data"][0]
    assert np.frombuffer(second, np.uint8).__array_interface__["data"][0] == address
    np.testing.assert_array_equal(split(second)[1].cast("f"), [3, 4])


def test_the_encoder_takes_torch_tensors_of_any_strides_that_need_gradients() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(6.0, requires_grad=True).reshape(2, 3).t()
    layout, payload = split(Encoder().encode({"x": tensor, "y": torch.ones(2, dtype=torch.bfloat16)}))
    update = ModelUpdate(payload, layout, plan_update(layout, layout), client="", round=1, num_samples=1)
    np.testing.assert_array_equal(update.array("x"), tensor.detach().numpy())
    np.testing.assert_array_equal(update.array("y"), [1, 1])


@pytest.mark.parametrize("value", [np.array(["text"]), np.array([1j]), [1.0], None])
def test_the_encoder_refuses_what_cannot_be_averaged(value: Any) -> None:
    with pytest.raises(lifl.InvalidModel, match="'x'"):
        Encoder().encode({"x": value})


@pytest.mark.parametrize(
    "data", [b"", b"1234567", (2**63).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"{}"]
)
def test_bytes_that_are_no_safetensors_are_refused(data: bytes) -> None:
    with pytest.raises(lifl.InvalidModel):
        split(data)


def test_a_header_is_encoded_as_the_layout_reads_it() -> None:
    layout, payload = split(bytes(Encoder().encode(make_tensors(6))))
    assert parse_header(layout.header, len(payload)) == layout
