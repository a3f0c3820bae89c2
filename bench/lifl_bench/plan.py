"""What a run consists of, and whether this machine can do it: found out before anything starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lifl
from lifl.cli.common import CommandError
from lifl_gateway.pool_memory import available_memory

from lifl_bench.deployment import Cell, Tree
from lifl_bench.modes import MODES, Mode, Needs
from lifl_bench.workload import DISTINCT_UPDATES, Model, parse_model

LEVELS = (1, 2)
MOST_UPDATES = 1000
_SPARE_BYTES = 512 << 20
_SHARE = 0.9  # of the memory: estimates are rough


@dataclass(frozen=True)
class CellPlan:
    """One comparison: the same for all modes."""

    model: Model
    updates: int
    levels: int
    only: tuple[str, ...] = ()
    """Names of the modes that run this cell; all that were chosen if there are none."""

    def select(self, modes: Sequence[Mode]) -> list[Mode]:
        """Those of the modes that run this cell."""
        return [mode for mode in modes if not self.only or mode.name in self.only]

    @property
    def tree(self) -> Tree:
        """Who folds what."""
        return Tree.plan(self.updates, self.levels, os.cpu_count() or 1)

    def outline(self) -> Cell:
        """The cell as far as it is known before anything is made, to ask modes what they need."""
        header, nbytes = self.model.header, self.model.payload_bytes
        return Cell(self.updates, self.tree, header, nbytes, b"", function_file(), Path(), {})

    def client_memory(self) -> int:
        """Bytes the clients' side takes: values and encoded updates, and a model being compared."""
        return (2 * min(self.updates, DISTINCT_UPDATES) + 2) * self.model.nbytes + self.updates * (8 << 20)


def parse_cells(texts: Iterable[str]) -> list[CellPlan]:
    """Cells from `MODEL:UPDATES:LEVELS` or `MODEL:UPDATES:LEVELS:MODE+MODE`. Raises CommandError."""
    cells = []
    for text in texts:
        name, *rest = text.split(":")
        if len(rest) not in (2, 3) or not all(number.isdecimal() for number in rest[:2]):
            hint = (
                "func bench --cell resnet152:1:1 --cell resnet18:20:2:lifl+grpc",
                "model, updates, levels, modes",
            )
            raise CommandError(f"'{text}' is no cell", [hint])
        only = tuple(mode.name for mode in parse_modes(rest[2].replace("+", ","))) if len(rest) == 3 else ()
        cells += [replace(cell, only=only) for cell in plan_cells([name], [int(rest[0])], [int(rest[1])])]
    return cells


def plan_cells(models: Sequence[str], updates: Sequence[int], levels: Sequence[int]) -> list[CellPlan]:
    """Every combination. Raises CommandError for values that cannot be run."""
    for count in updates:
        if not 1 <= count <= MOST_UPDATES:
            raise CommandError(f"{count} updates: a round can have 1 to {MOST_UPDATES}")
    for level in levels:
        if level not in LEVELS:
            raise CommandError(
                f"{level} levels: the tree has 1 (one aggregator) or 2 (leaves, one of them on top)"
            )
    parsed = [parse_model(text) for text in models]
    return [CellPlan(model, count, level) for model in parsed for count in updates for level in levels]


def parse_modes(text: str) -> list[Mode]:
    """Modes from a comma-separated list of names, in its order. Raises CommandError for an unknown one."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in MODES:
            known = ", ".join(MODES)
            hint = (f"func bench --modes {','.join(MODES)}", "all of them")
            raise CommandError(f"unknown mode '{name}': there are {known}", [hint])
    if not names:
        raise CommandError(f"no mode given: there are {', '.join(MODES)}")
    return [MODES[name] for name in names]


def parse_numbers(text: str, option: str) -> list[int]:
    """Whole numbers from a comma-separated list. Raises CommandError naming the option."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise CommandError(f"{option} takes whole numbers separated by commas, not '{text}'")
    return list(dict.fromkeys(int(part) for part in parts))


def function_file() -> Path:
    """The function that is compared: FedAvg, from the checkout or as it is installed."""
    package = Path(lifl.__file__).parent
    for candidate in (package.parents[1] / "functions", package / "templates" / "functions"):
        if (candidate / "fedavg.py").is_file():
            return candidate / "fedavg.py"
    raise CommandError("functions/fedavg.py is not there: LIFL is not installed completely")


# --- does it fit? --------------------------------------------------------------------------------------------


def fits_at_once(plan: CellPlan, modes: Sequence[Mode], directory: Path) -> bool:
    """Whether all modes can stay deployed together for this cell.

    Raises CommandError if not even each alone has the memory, or the disk at `directory`, that it needs.
    """
    needs = [mode.needs(plan.outline()) for mode in modes]
    memory = int(_SHARE * available_memory()) - _SPARE_BYTES - plan.client_memory()
    disk = int(_SHARE * shutil.disk_usage(directory).free)
    for mode, need in zip(modes, needs, strict=True):
        _check_one(plan, mode, need, memory, disk)
    together = Needs(sum(need.memory for need in needs), sum(need.disk for need in needs))
    return together.memory <= memory and together.disk <= disk


def _check_one(plan: CellPlan, mode: Mode, need: Needs, memory: int, disk: int) -> None:
    what = (
        f"{plan.updates} updates of {plan.model.name} ({plan.model.nbytes / 1e6:,.1f} MB each) in mode {mode.name}"
    )
    hints = [("func bench --updates 4 --models resnet18", "something smaller")]
    if need.memory > memory:
        total = (need.memory + plan.client_memory()) / 1e9
        have = max(0, memory + plan.client_memory()) / 1e9
        raise CommandError(f"{what} need about {total:.1f} GB of memory, and {have:.1f} GB can be used", hints)
    if need.disk > disk:
        text = f"{what} need about {need.disk / 1e9:.1f} GB of disk, and {disk / 1e9:.1f} GB are free"
        raise CommandError(text, [*hints, ("TMPDIR=/larger/disk func bench", "another place for temporary files")])
