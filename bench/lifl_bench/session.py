"""A whole run: cells, ablation and training, one after the other, into one `Results`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lifl.cli.common import CommandError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lifl_bench.ablation import STEPS, Step, cluster_mode, cluster_steps
from lifl_bench.deployment import Cell, Deployment
from lifl_bench.hosts import why_not
from lifl_bench.lifl_mode import LiflDeployment
from lifl_bench.modes import Mode, Setting
from lifl_bench.plan import CellPlan, fits_at_once, function_file
from lifl_bench.results import AblationRow, CellResult, Results, TrainingResult
from lifl_bench.runner import Contestant, Options, run_cell
from lifl_bench.workload import Workload


@dataclass(frozen=True)
class Training:
    """What `--train` asks for."""

    clients: int
    rounds: int
    target: float


@dataclass
class Session:
    """Everything that is to be run."""

    modes: Sequence[Mode]
    setting: Setting
    cells: Sequence[CellPlan]
    options: Options
    ablation: CellPlan | None
    training: Training | None
    environment: Mapping[str, str]
    results: Results
    has_broker: bool = True
    """Whether the parts of the broker are there."""
    ablation_nodes: int = 2
    """Nodes of the ablation's second half; below 2 it is left out."""
    _steps: list[Step] = field(default_factory=list)
    _cluster_steps: Sequence[Step] = ()

    def check(self) -> None:
        """Raises CommandError if something does not fit on this machine."""
        directory = Path(tempfile.gettempdir())
        for plan in self.cells:
            if not plan.select(self.modes):
                raise CommandError(f"none of the modes runs {plan.updates} x {plan.model.name}")
            fits_at_once(plan, plan.select(self.modes), directory)
        if self.ablation is not None:
            self._steps = [step for step in STEPS if self.has_broker or not step.needs_broker]
            fits_at_once(self.ablation, [mode for mode in self.modes if mode.name == "lifl"], directory)
            self._cluster_steps = self._find_cluster_steps(self.ablation, directory)

    def _find_cluster_steps(self, plan: CellPlan, directory: Path) -> Sequence[Step]:
        """The rows of the ablation on several nodes; none, and a note, where they cannot be run."""
        if self.ablation_nodes < 2:
            return ()
        reason = why_not()
        if not reason:
            try:
                fits_at_once(plan, [cluster_mode(self.ablation_nodes)], directory)
            except CommandError as error:
                reason = str(error)
        if reason:
            self._note(f"the ablation's rows on {self.ablation_nodes} nodes are left out: {reason}")
            return ()
        return cluster_steps(self.ablation_nodes)

    def run(self, console: Console) -> None:
        """Run it all; the results grow meanwhile, so that what was measured is there after Ctrl-C."""
        progress = _ProgressBar(console, self._count_steps())
        with progress, tempfile.TemporaryDirectory(prefix="lifl-bench-") as directory:
            for number, plan in enumerate(self.cells):
                self._run_cell(plan, Path(directory) / f"cell-{number}", progress)
            if self.ablation is not None:
                place = Path(directory)
                self._run_ablation(self.ablation, self._steps, 1, place / "ablation", progress)
                nodes = self.ablation_nodes
                self._run_ablation(self.ablation, self._cluster_steps, nodes, place / "cluster", progress)
            if self.training is not None:
                self._run_training(self.training, Path(directory) / "training", progress)

    def _count_steps(self) -> int:
        contests = sum(len(plan.select(self.modes)) for plan in self.cells)
        contests += len(self._steps) + len(self._cluster_steps)
        turns = self.options.repeat * contests
        return turns + (self.training.rounds * len(self.modes) if self.training else 0)

    # --- cells -------------------------------------------------------------------------------------------------

    def _run_cell(self, plan: CellPlan, directory: Path, progress: _ProgressBar) -> None:
        workload = Workload(plan.model, plan.updates)
        initial = workload.initial_model()
        contestants = []
        modes = plan.select(self.modes)
        for mode in modes:
            cell = self._cell(plan, directory / mode.name, initial)
            result = _blank_result(mode.name, plan)
            result.copies, result.copies_detail = mode.copies(cell)
            self.results.cells.append(result)
            contestants.append(Contestant(mode.deploy(cell, self.setting), workload, result))
        at_once = fits_at_once(plan, modes, directory)
        if not at_once:
            self._note(f"{plan.updates} x {plan.model.name}: deployed one at a time, for want of memory for all")
        progress.title = f"{plan.updates} x {plan.model.name}"
        run_cell(contestants, self.options, progress, at_once=at_once)
        for contestant in contestants:
            self._note_data_plane(contestant.deployment)

    def _cell(self, plan: CellPlan, directory: Path, initial: memoryview) -> Cell:
        directory.mkdir(parents=True)
        header, nbytes = plan.model.header, plan.model.payload_bytes
        return Cell(plan.updates, plan.tree, header, nbytes, initial, function_file(), directory, self.environment)

    def _note_data_plane(self, deployment: Deployment) -> None:
        if (
            deployment.mode == "lifl"
            and isinstance(deployment, LiflDeployment)
            and deployment.data_plane == "unix"
        ):
            self._note("mode lifl ran over UNIX sockets, because eBPF is not allowed here (see func doctor)")

    def _note(self, text: str) -> None:
        if text not in self.results.notes:
            self.results.notes.append(text)

    # --- ablation ----------------------------------------------------------------------------------------------

    def _run_ablation(
        self, plan: CellPlan, steps: Sequence[Step], nodes: int, directory: Path, progress: _ProgressBar
    ) -> None:
        if not steps:
            return
        workload = Workload(plan.model, plan.updates)
        initial = workload.initial_model()
        contestants = []
        for number, step in enumerate(steps):
            cell = self._cell(plan, directory / str(number), initial)
            result = _blank_result(step.name, plan)
            self.results.ablation.append(AblationRow(step.name, result, nodes))
            contestants.append(Contestant(step.deploy(cell, self.setting), workload, result))
        progress.title = "ablation" if nodes == 1 else f"ablation, {nodes} nodes"
        modes = self.modes if nodes == 1 else [cluster_mode(nodes)] * len(steps)
        run_cell(contestants, self.options, progress, at_once=fits_at_once(plan, modes, directory))

    # --- training ----------------------------------------------------------------------------------------------

    def _run_training(self, plan: Training, directory: Path, progress: _ProgressBar) -> None:
        # torch's compiler, which nothing here uses, makes its cache directory when torch is imported.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory / "torch"))
        from lifl_bench import train

        task = train.Task(train.Plan(plan.clients, plan.rounds, plan.target))
        cell_plan = CellPlan(task.model, plan.clients, 2)
        last: dict[str, npt.NDArray[np.float32]] = {}
        for mode in self.modes:
            result = TrainingResult(mode.name, plan.target)
            self.results.training.append(result)
            cell = replace(self._cell(cell_plan, directory / mode.name, task.initial), precision="float64")
            progress.title = f"training, {mode.name}"
            try:
                last[mode.name] = train.run_training(
                    task, mode.deploy(cell, self.setting), result, progress.advance
                )
            except (RuntimeError, OSError, TimeoutError) as error:
                result.failure = str(error) or type(error).__name__
                continue
            result.largest_difference = float(np.max(np.abs(last[mode.name] - next(iter(last.values())))))
            if result.largest_difference > train.TOLERANCE:
                result.failure = (
                    f"the last model differs from mode {next(iter(last))} by {result.largest_difference}"
                )


def _blank_result(mode: str, plan: CellPlan) -> CellResult:
    tree = plan.tree
    return CellResult(mode, plan.model.name, plan.model.nbytes, plan.updates, plan.levels, tree.leaves)


class _ProgressBar:
    """A bar on stderr, drawn when something happens: a thread of its own would not survive the forks."""

    def __init__(self, console: Console, steps: int) -> None:
        self.title = ""
        self._bar = Progress(
            TextColumn("{task.description:<40}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("", total=steps)

    def begin(self, contestant: Contestant, what: str) -> None:
        """Show what happens now."""
        self._show(f"{self.title}: {contestant.result.mode}, {what}")

    def done(self, contestant: Contestant) -> None:
        """One turn further."""
        self._bar.advance(self._task)
        self._bar.refresh()

    def advance(self, text: str) -> None:
        """One round of training further."""
        self._bar.advance(self._task)
        self._show(f"{self.title}: {text}")

    def _show(self, text: str) -> None:
        self._bar.update(self._task, description=text[:40])
        self._bar.refresh()

    def __enter__(self) -> _ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
