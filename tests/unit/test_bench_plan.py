"""What `func bench` finds out before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from lifl.cli.common import CommandError
from lifl_bench import plan
from lifl_bench.deployment import Tree
from lifl_bench.modes import MODES
from lifl_bench.plan import fits_at_once, parse_cells, parse_modes, parse_numbers, plan_cells


@pytest.mark.parametrize("updates", [1, 2, 3, 20, 101])
@pytest.mark.parametrize("leaves", [1, 2, 7])
def test_every_update_has_one_leaf_and_every_input_is_expected(updates: int, leaves: int) -> None:
    tree = Tree(updates, min(leaves, updates))

    by_leaf = [list(tree.clients_of(leaf)) for leaf in range(tree.leaves)]

    assert sorted(client for clients in by_leaf for client in clients) == list(range(updates))
    assert all(tree.leaf_of(client) == leaf for leaf, clients in enumerate(by_leaf) for client in clients)
    assert sum(map(tree.goal_of, range(tree.leaves))) == updates + tree.leaves - 1


@pytest.mark.parametrize(
    ("updates", "levels", "cores", "leaves"), [(20, 1, 8, 1), (20, 2, 2, 2), (20, 2, 64, 10), (1, 2, 8, 1)]
)
def test_the_tree_is_the_one_that_lifls_planner_makes(updates: int, levels: int, cores: int, leaves: int) -> None:
    assert Tree.plan(updates, levels, cores).leaves == leaves


def test_options_are_combined_in_every_way() -> None:
    cells = plan_cells(["4000", "resnet18"], [4, 20], [1, 2])

    assert [(cell.model.name, cell.updates, cell.levels) for cell in cells][:3] == [
        ("4000", 4, 1),
        ("4000", 4, 2),
        ("4000", 20, 1),
    ]
    assert len(cells) == 8


def test_cells_can_be_named_one_by_one() -> None:
    (cell,) = parse_cells(["resnet152:1:1"])

    assert (cell.model.name, cell.updates, cell.levels) == ("resnet152", 1, 1)


def test_a_cell_can_be_for_some_modes_only() -> None:
    (cell,) = parse_cells(["4000:3:1:grpc+lifl"])

    assert [mode.name for mode in cell.select(list(MODES.values()))] == ["lifl", "grpc"]


@pytest.mark.parametrize(
    "text", ["resnet18", "resnet18:4", "resnet18:x:1", "resnet18:4:1:kafka", ":4:1", "resnet18:4:3"]
)
def test_what_is_no_cell_is_refused(text: str) -> None:
    with pytest.raises(CommandError):
        parse_cells([text])


@pytest.mark.parametrize("text", ["", "4,x", "4;20", "-1"])
def test_what_are_no_numbers_is_refused_by_the_options_name(text: str) -> None:
    with pytest.raises(CommandError, match="--updates takes whole numbers"):
        parse_numbers(text, "--updates")


@pytest.mark.parametrize("updates", [0, 1001])
def test_a_round_has_a_possible_number_of_updates(updates: int) -> None:
    with pytest.raises(CommandError, match="1 to 1000"):
        plan_cells(["4000"], [updates], [1])


def test_an_unknown_mode_is_named_with_those_there_are() -> None:
    with pytest.raises(CommandError, match="'kafka': there are lifl, lifl-unix, broker, broker-wire, "):
        parse_modes("lifl,kafka")


def test_modes_keep_the_order_they_were_given_in() -> None:
    assert [mode.name for mode in parse_modes("grpc, lifl,grpc")] == ["grpc", "lifl"]


def test_too_little_memory_is_said_with_the_amount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda: 4 << 30)
    (cell,) = parse_cells(["resnet152:100:2"])

    with pytest.raises(CommandError, match=r"100 updates of resnet152 .* need about 2\d\.\d GB of memory"):
        fits_at_once(cell, [MODES["lifl"]], tmp_path)


def test_too_little_disk_is_said_with_the_amount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100 << 20

    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: Usage)
    (cell,) = parse_cells(["resnet18:20:2"])

    with pytest.raises(CommandError, match=r"mode broker-stock need about .* GB of disk"):
        fits_at_once(cell, [MODES["broker-stock"]], tmp_path)


def test_modes_that_fit_alone_but_not_together_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = parse_cells(["resnet18:20:2"])
    modes = [MODES["lifl"], MODES["broker"], MODES["grpc"]]

    monkeypatch.setattr(plan, "available_memory", lambda: 64 << 30)
    assert fits_at_once(cell, modes, tmp_path)
    monkeypatch.setattr(plan, "available_memory", lambda: 6 << 30)
    assert not fits_at_once(cell, modes, tmp_path)
