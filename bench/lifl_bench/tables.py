"""Results as text: groups of cells that compare, ratios, tables of 80 columns, and the findings in sentences.

The report and the plots are made of the same groups, numbers and tables, so that none of them says another thing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lifl_bench.results import (
    TOLERANCE,
    AblationRow,
    CellResult,
    Results,
    Round,
    TrainingResult,
    median,
    percentile,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 80

_NONE = "-"
_ALIKE = 1.1
"""Ratios up to this one are called alike: neighbours on the host move figures by as much."""
_MODES_ABREAST = 5
_NUMERALS = {1: "one level", 2: "two levels", 3: "three levels"}
_MODELS = {"resnet": "ResNet-"}
_PROSE = {
    "lifl": "LIFL",
    "lifl-unix": "LIFL over UNIX sockets",
    "broker": "the tuned broker",
    "broker-wire": "the broker with a client of its own",
    "broker-stock": "the stock broker",
    "grpc": "gRPC",
}


# --- numbers -------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """A time with its unit: milliseconds below ten seconds."""
    if not math.isfinite(seconds):
        return _NONE
    return f"{_milliseconds(seconds)} ms" if seconds < 10 else f"{_tens(seconds)} s"


def spread(values: Sequence[float]) -> str:
    """`[lowest..highest]` of times, with their unit; empty for fewer than two."""
    known = finite(values)
    if len(known) < 2:
        return ""
    number, unit = (_milliseconds, "ms") if max(known) < 10 else (_tens, "s")
    return f"[{number(min(known))}..{number(max(known))} {unit}]"


def cpu_seconds(seconds: float) -> str:
    """CPU seconds without the unit, to about three digits."""
    if not math.isfinite(seconds):
        return _NONE
    return f"{seconds:.3f}" if seconds < 0.0995 else f"{seconds:.2f}" if seconds < 9.995 else _tens(seconds)


def cpu_spread(values: Sequence[float]) -> str:
    """`[lowest..highest]` of CPU seconds; empty for fewer than two."""
    known = finite(values)
    return f"[{cpu_seconds(min(known))}..{cpu_seconds(max(known))}]" if len(known) > 1 else ""


def megabytes(size: float) -> str:
    """Bytes as MB (10^6 bytes), without the unit."""
    if not math.isfinite(size):
        return _NONE
    return "0" if size == 0 else f"{size / 1e6:.1f}" if size < 99.95e6 else f"{size / 1e6:.0f}"


def times(ratio: float) -> str:
    """A ratio as `5.3x`."""
    if not math.isfinite(ratio):
        return _NONE
    if ratio < 0.0995:
        return f"{ratio:.2g}x"
    return f"{ratio:.2f}x" if ratio < 0.995 else f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"


def ratio_of(value: float, to: float) -> float:
    """The quotient; nan if there is none."""
    return value / to if to > 0 else math.nan


def finite(values: Iterable[float]) -> list[float]:
    """The values that are numbers."""
    return [value for value in values if math.isfinite(value)]


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def _tens(value: float) -> str:
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


# --- names and groups ----------------------------------------------------------------------------------------


def model_name(model: str) -> str:
    """The model's name as papers write it."""
    for prefix, written in _MODELS.items():
        if model.startswith(prefix) and model[len(prefix) :].isdecimal():
            return written + model[len(prefix) :]
    return model


def mode_name(mode: str) -> str:
    """The mode's name in a sentence."""
    return _PROSE.get(mode, mode)


def levels_name(levels: int) -> str:
    """The depth of the tree in words."""
    return _NUMERALS.get(levels, f"{levels} levels")


def is_lifl(mode: str) -> bool:
    """Whether the mode is LIFL in one of its forms."""
    return mode == "lifl" or mode.startswith("lifl-")


def has_figures(cell: CellResult) -> bool:
    """Whether something was measured."""
    return bool(acts(cell)) and bool(cpus(cell))


def acts(cell: CellResult) -> list[float]:
    """The cell's measured ACTs; none if it failed."""
    return [] if cell.failure else finite(cell.acts_s)


def cpus(cell: CellResult) -> list[float]:
    """The cell's measured CPU seconds; none if it failed."""
    return [] if cell.failure else finite(cell.cpus_s)


@dataclass(frozen=True)
class Group:
    """Cells that differ in their mode alone."""

    model: str
    model_bytes: int
    updates: int
    levels: int
    leaves: int
    cells: tuple[CellResult, ...]

    @property
    def setting(self) -> str:
        """`20 x ResNet-18, two levels`."""
        return f"{self.updates} x {model_name(self.model)}, {levels_name(self.levels)}"

    @property
    def title(self) -> str:
        """The setting with the model's size and the leaves."""
        leaves = f" ({self.leaves} leaves)" if self.levels > 1 else ""
        return f"{self.setting}{leaves}, {megabytes(self.model_bytes)} MB each"

    @property
    def reference(self) -> CellResult | None:
        """The first LIFL mode with figures: what the others are compared with."""
        return next((cell for cell in self.cells if is_lifl(cell.mode) and has_figures(cell)), None)

    def act_ratio(self, cell: CellResult) -> float:
        """The cell's median ACT over the reference's; nan without either."""
        return self._ratio(cell, acts)

    def cpu_ratio(self, cell: CellResult) -> float:
        """The cell's median CPU over the reference's; nan without either."""
        return self._ratio(cell, cpus)

    def _ratio(self, cell: CellResult, values: Callable[[CellResult], list[float]]) -> float:
        if self.reference is None or not has_figures(cell):
            return math.nan
        return ratio_of(median(values(cell)), median(values(self.reference)))


def groups_of(results: Results) -> list[Group]:
    """The cells by model, updates and levels, each in the order of its first appearance."""
    found: dict[tuple[str, int, int], list[CellResult]] = {}
    for cell in results.cells:
        found.setdefault((cell.model, cell.updates, cell.levels), []).append(cell)
    return [
        Group(model, cells[0].model_bytes, updates, levels, cells[0].leaves, tuple(cells))
        for (model, updates, levels), cells in found.items()
    ]


def modes_of(results: Results) -> list[str]:
    """All modes in the order of their first appearance."""
    modes = [cell.mode for cell in results.cells] + [training.mode for training in results.training]
    return list(dict.fromkeys(modes))


def component_cpu(cell: CellResult) -> dict[str, float]:
    """Median CPU seconds of each component; a round in which it is not mentioned counts as none."""
    names = dict.fromkeys(name for round_ in cell.rounds for name in round_.cpu_s)
    return {name: median(finite(round_.cpu_s.get(name, 0.0) for round_ in cell.rounds)) for name in names}


# --- tables --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column's head, and its least width in text, which lines tables up that follow each other."""

    head: str
    width: int = 0
    left: bool = False


@dataclass(frozen=True)
class Row:
    """Texts of one row; `strong` ones are LIFL's, or sums."""

    texts: tuple[str, ...]
    strong: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table, to be printed or made HTML of."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Section:
    """Tables of the same kind under one heading, with what has to be known to read them."""

    title: str
    explanation: str
    sheets: tuple[Sheet, ...]


def sections(results: Results) -> list[Section]:
    """All tables there is something to show in."""
    groups = groups_of(results)
    found = [
        Section("Time", _time_explanation(results), tuple(_time_sheet(group) for group in groups)),
        Section("Cost", _COST_EXPLANATION, tuple(_cost_sheet(group) for group in groups)),
        Section(
            "CPU seconds by component",
            "Medians over the rounds, so a column need not add up to its total exactly. "
            "clients are the sending processes, which every mode has.",
            tuple(sheet for group in groups for sheet in _component_sheets(group)),
        ),
    ]
    if results.ablation:
        sheets = tuple(_ablation_sheet(rows) for rows in ablations_of(results))
        is_cluster = any(row.nodes > 1 for row in results.ablation)
        explanation = _ABLATION_EXPLANATION + (_NODES_EXPLANATION if is_cluster else "")
        found.append(Section("Ablation", explanation, sheets))
    if results.training:
        found.append(Section("Training", _training_explanation(results), (_training_sheet(results.training),)))
    return [section for section in found if section.sheets]


_COST_EXPLANATION = (
    "CPU is that of all processes together, clients included, to when all is quiet again. "
    "MEMORY is the peak of the mode's processes, DISK what a round writes."
)
_ABLATION_EXPLANATION = (
    "Each row adds one mechanism to the row before. "
    "STEP: times less than in the row before; TOTAL: times less than in the first."
)
_NODES_EXPLANATION = (
    " On several nodes the first row has LIFL's data plane already: updates go to one node after another, each "
    "has one aggregator, started anew for each round, which folds once all inputs are there."
)


def _time_explanation(results: Results) -> str:
    return (
        f"Medians [lowest..highest] of N rounds after a warm-up; arrival of the updates: {results.arrival}. "
        "ACT: first byte sent to new model ready. LATENCY: of each update, first byte sent to folded."
    )


def _time_sheet(group: Group) -> Sheet:
    columns = (
        Column("MODE", 12, left=True),
        Column("N", 3),
        Column("ACT", 7),
        Column("LOWEST..HIGHEST", 18, left=True),
        Column(f"VS {_reference_name(group)}", 8),
        Column("LATENCY p50", 11),
        Column("p95", 7),
    )
    return Sheet(group.title, columns, tuple(_time_row(group, cell) for cell in group.cells))


def _time_row(group: Group, cell: CellResult) -> Row:
    if not has_figures(cell):
        return Row((cell.mode, "", "failed", *[""] * 4), is_lifl(cell.mode))
    latencies = finite(cell.latencies_s)
    texts = (
        cell.mode,
        str(len(cell.rounds)),
        duration(median(acts(cell))),
        spread(cell.acts_s),
        times(group.act_ratio(cell)),
        duration(median(latencies)),
        duration(percentile(latencies, 0.95)),
    )
    return Row(texts, is_lifl(cell.mode))


def _cost_sheet(group: Group) -> Sheet:
    columns = (
        Column("MODE", 14, left=True),
        Column("CPU s", 6),
        Column("LOWEST..HIGHEST", 15, left=True),
        Column(f"VS {_reference_name(group)}", 9),
        Column("MEMORY MB", 9),
        Column("COPIES", 6),
        Column("DISK MB", 7),
    )
    return Sheet(group.title, columns, tuple(_cost_row(group, cell) for cell in group.cells))


def _cost_row(group: Group, cell: CellResult) -> Row:
    if not has_figures(cell):
        return Row((cell.mode, "failed", *[""] * 5), is_lifl(cell.mode))
    texts = (
        cell.mode,
        cpu_seconds(median(cpus(cell))),
        cpu_spread(cell.cpus_s),
        times(group.cpu_ratio(cell)),
        megabytes(cell.peak_memory_bytes) if cell.peak_memory_bytes else _NONE,
        f"{cell.copies:g}" if cell.copies else _NONE,
        megabytes(median([round_.written_bytes for round_ in cell.rounds])),
    )
    return Row(texts, is_lifl(cell.mode))


def _reference_name(group: Group) -> str:
    return (group.reference.mode if group.reference else "lifl").upper()


def _component_sheets(group: Group) -> Iterator[Sheet]:
    """A few modes abreast, so that the table stays within its width."""
    cells = [cell for cell in group.cells if has_figures(cell)]
    for start in range(0, len(cells), _MODES_ABREAST):
        abreast = cells[start : start + _MODES_ABREAST]
        shares = [component_cpu(cell) for cell in abreast]
        names = dict.fromkeys(name for share in shares for name in share)
        rows = [
            Row((name, *(cpu_seconds(share[name]) if name in share else "" for share in shares))) for name in names
        ]
        total = (cpu_seconds(median(cpus(cell))) for cell in abreast)
        rows.append(Row(("total", *total), strong=True))
        columns = (Column("COMPONENT", 14, left=True), *(Column(cell.mode, 11) for cell in abreast))
        yield Sheet(group.title, columns, tuple(rows))


def ablations_of(results: Results) -> list[list[AblationRow]]:
    """The rows of the ablation that build on each other: those of one node, then those of several."""
    found: dict[int, list[AblationRow]] = {}
    for row in results.ablation:
        found.setdefault(row.nodes, []).append(row)
    return list(found.values())


def _ablation_sheet(ablation: Sequence[AblationRow]) -> Sheet:
    columns = (
        Column("MECHANISM", 26, left=True),
        Column("ACT", 8),
        Column("STEP", 5),
        Column("TOTAL", 6),
        Column("CPU s", 7),
        Column("STEP", 5),
        Column("TOTAL", 6),
    )
    rows = tuple(_ablation_row(ablation, number) for number in range(len(ablation)))
    return Sheet(_ablation_title(ablation), columns, rows)


def ablation_setting(ablation: Sequence[AblationRow]) -> str:
    """What rows of the ablation that build on each other have in common: `20 x ResNet-18, two levels`."""
    cell, nodes = ablation[0].result, ablation[0].nodes
    if nodes > 1:  # in levels and leaves some of the rows differ
        return f"{cell.updates} x {model_name(cell.model)}, {nodes} nodes"
    return Group(cell.model, cell.model_bytes, cell.updates, cell.levels, cell.leaves, (cell,)).setting


def _ablation_title(ablation: Sequence[AblationRow]) -> str:
    cell = ablation[0].result
    if ablation[0].nodes > 1:
        return f"{ablation_setting(ablation)}, {megabytes(cell.model_bytes)} MB each"
    return Group(cell.model, cell.model_bytes, cell.updates, cell.levels, cell.leaves, (cell,)).title


def _ablation_row(ablation: Sequence[AblationRow], number: int) -> Row:
    row = ablation[number]
    if not has_figures(row.result):
        return Row((row.name, "failed", *[""] * 5))
    steps = [""] * 4
    if number > 0:
        steps = [
            times(factor(ablation[other].result, row.result, values))
            for values in (acts, cpus)
            for other in (number - 1, 0)
        ]
    act, cpu = median(acts(row.result)), median(cpus(row.result))
    return Row((row.name, duration(act), *steps[:2], cpu_seconds(cpu), *steps[2:]))


def factor(before: CellResult, after: CellResult, values: Callable[[CellResult], list[float]]) -> float:
    """How many times smaller the median has become; nan if one of them has none."""
    if not (has_figures(before) and has_figures(after)):
        return math.nan
    return ratio_of(median(values(before)), median(values(after)))


def _training_explanation(results: Results) -> str:
    target = max(training.target for training in results.training)
    return (
        f"To the first round with {target:.0%} accuracy. CPU s is that of the mode's own processes, CLIENTS s "
        f"that of the clients with their training. DIFFERENCE: of any parameter of the last model, from "
        f"{results.training[0].mode}'s."
    )


def _training_sheet(trainings: Sequence[TrainingResult]) -> Sheet:
    columns = (
        Column("MODE", 12, left=True),
        Column("ROUNDS", 6),
        Column("WALL s", 7),
        Column("CPU s", 7),
        Column("CLIENTS s", 9),
        Column("ACCURACY", 8),
        Column("MODEL", 12, left=True),
        Column("DIFFERENCE", 10),
    )
    return Sheet("Rounds, time and CPU to the target", columns, tuple(_training_row(each) for each in trainings))


def _training_row(training: TrainingResult) -> Row:
    if training.failure or not training.rounds:
        return Row((training.mode, "failed", *[""] * 6), is_lifl(training.mode))
    reached = training.reached()
    end = reached or training.rounds[-1]
    texts = (
        training.mode,
        str(training.rounds.index(reached) + 1) if reached else f">{len(training.rounds)}",
        cpu_seconds(end.elapsed_s),
        cpu_seconds(end.cpu_s),
        cpu_seconds(end.client_cpu_s),
        f"{training.rounds[-1].accuracy:.1%}",
        training.model_sha256[:12] or _NONE,
        f"{training.largest_difference:.1e}" if training.largest_difference else "0",
    )
    return Row(texts, is_lifl(training.mode))


# --- sentences -----------------------------------------------------------------------------------------------


def findings(results: Results) -> list[str]:
    """What the run says, in sentences, whoever is better; most important first."""
    return [*_mode_findings(results), *_ablation_findings(results), *_training_findings(results)]


def correctness(results: Results) -> str:
    """What the comparison of the rounds' results with the exact ones found."""
    errors = [round_.error for round_ in _all_rounds(results)]
    if not errors:
        return "Nothing was measured, so no result was checked."
    known = finite(errors)
    if len(known) < len(errors):
        return (
            f"WRONG: {len(errors) - len(known)} of {_count(len(errors), 'round')} had a result that is no number."
        )
    wrong = sum(error > TOLERANCE for error in errors)
    verdict = f"WRONG in {_count(wrong, 'round')} of {len(errors)}" if wrong else "Right in every round"
    return (
        f"{verdict}: the results of all {_count(len(errors), 'measured round')} were compared with the weighted "
        f"mean in float64, and the largest error is {max(errors):.1e} of the mean magnitude of the summands "
        f"(tolerance {TOLERANCE:.0e})."
    )


def is_correct(results: Results) -> bool:
    """Whether every measured round's result was right."""
    return all(round_.error <= TOLERANCE for round_ in _all_rounds(results))


def failures(results: Results) -> list[str]:
    """What has no figures, and why."""
    cells = [
        (f"{cell.mode}, {group.setting}", cell.failure)
        for group in groups_of(results)
        for cell in group.cells
        if not has_figures(cell)
    ]
    steps = [
        (f"ablation{f' on {row.nodes} nodes' if row.nodes > 1 else ''}, {row.name}", row.result.failure)
        for row in results.ablation
        if not has_figures(row.result)
    ]
    trainings = [
        (f"training, {each.mode}", each.failure) for each in results.training if each.failure or not each.rounds
    ]
    return [f"{what}: {why.strip() or 'no round was measured'}" for what, why in cells + steps + trainings]


def _all_rounds(results: Results) -> Iterator[Round]:
    for cell in [*results.cells, *(row.result for row in results.ablation)]:
        if has_figures(cell):
            yield from cell.rounds


def _mode_findings(results: Results) -> Iterator[str]:
    groups = groups_of(results)
    for mode in sorted(modes_of(results), key=is_lifl):  # the baselines first
        pairs = [
            (group, cell)
            for group in groups
            for cell in group.cells
            if cell.mode == mode and cell is not group.reference and math.isfinite(group.act_ratio(cell))
        ]
        if pairs:
            yield _largest_finding(*max(pairs, key=lambda pair: pair[0].updates * pair[0].model_bytes))
        if len(pairs) > 1:
            yield _overall_finding(mode, pairs)


def _largest_finding(group: Group, cell: CellResult) -> str:
    ours = group.reference
    assert ours is not None
    act, cpu = _sign(group.act_ratio(cell)), _sign(group.cpu_ratio(cell))
    speed = _clause(
        group.act_ratio(cell), ("is {} times faster than", "is {} times slower than", "is about as fast as")
    )
    use = _clause(
        group.cpu_ratio(cell), ("uses {} times less CPU", "uses {} times more CPU", "uses about as much CPU")
    )
    return (
        f"{group.setting}: {mode_name(ours.mode)} {speed} {mode_name(cell.mode)} "
        f"(ACT {duration(median(acts(ours)))} against {duration(median(acts(cell)))}{_overlap(ours, cell, acts)}) "
        f"{'but' if act * cpu < 0 else 'and'} {use} "
        f"({cpu_seconds(median(cpus(ours)))} s against {cpu_seconds(median(cpus(cell)))} s"
        f"{_overlap(ours, cell, cpus)})."
    )


def _overall_finding(mode: str, pairs: Sequence[tuple[Group, CellResult]]) -> str:
    ours = pairs[0][0].reference
    assert ours is not None
    act = _tally([group.act_ratio(cell) for group, cell in pairs], ("faster", "slower", "about as fast"))
    cpu = _tally([group.cpu_ratio(cell) for group, cell in pairs], ("less CPU", "more CPU", "about as much CPU"))
    return f"{mode_name(ours.mode)} against {mode_name(mode)} over {len(pairs)} settings: {act}; {cpu}."


def _clause(ratio: float, words: tuple[str, str, str]) -> str:
    """The words for more, less and alike, with the factor."""
    more, less, alike = words
    sign = _sign(ratio)
    return alike if sign == 0 else (more if sign > 0 else less).format(_plain(max(ratio, 1 / ratio)))


def _tally(ratios: Sequence[float], words: tuple[str, str, str]) -> str:
    """`faster in 3 of 4 (2.0 to 5.1 times), slower in 1 of 4 (1.3 times)`."""
    parts = []
    for sign, word in zip((1, -1, 0), words, strict=True):
        those = sorted(max(ratio, 1 / ratio) for ratio in ratios if _sign(ratio) == sign and ratio > 0)
        if those:
            share = "all" if len(those) == len(ratios) else f"{len(those)} of {len(ratios)}"
            ends = dict.fromkeys((_plain(those[0]), _plain(those[-1])))
            parts.append(f"{word} in {share}" + (f" ({' to '.join(ends)} times)" if sign else ""))
    return ", ".join(parts)


def _overlap(ours: CellResult, other: CellResult, values: Callable[[CellResult], list[float]]) -> str:
    """Said where single rounds contradict the medians, which a difference that matters does not have."""
    first, second = values(ours), values(other)
    alike = _sign(ratio_of(median(second), median(first))) == 0
    if alike or max(first) < min(second) or max(second) < min(first):
        return ""
    return "; single rounds overlap"


def _ablation_findings(results: Results) -> Iterator[str]:
    for ablation in ablations_of(results):
        rows = [row for row in ablation if has_figures(row.result)]
        if len(rows) > 1:
            yield _ablation_finding(ablation, rows[0], rows[-1])


def _ablation_finding(ablation: Sequence[AblationRow], first: AblationRow, last: AblationRow) -> str:
    return (
        f"From '{first.name}' to '{last.name}', ACT goes from {duration(median(acts(first.result)))} to "
        f"{duration(median(acts(last.result)))} and CPU from {cpu_seconds(median(cpus(first.result)))} s to "
        f"{cpu_seconds(median(cpus(last.result)))} s; {_largest_step(ablation, acts, 'ACT')} and "
        f"{_largest_step(ablation, cpus, 'CPU')}."
    )


def _largest_step(rows: Sequence[AblationRow], values: Callable[[CellResult], list[float]], what: str) -> str:
    steps = [(factor(old.result, new.result, values), new.name) for old, new in itertools.pairwise(rows)]
    known = [step for step in steps if math.isfinite(step[0])]
    if not known or max(known)[0] <= 1:
        return f"no step lowers {what}"
    ratio, name = max(known)
    return f"the step that lowers {what} most is '{name}' ({_plain(ratio)} times)"


def _training_findings(results: Results) -> Iterator[str]:
    ended = [training for training in results.training if training.rounds and not training.failure]
    arrivals = [(training, reached) for training in ended if (reached := training.reached())]
    if arrivals:
        parts = [f"{mode_name(each.mode)} after {cpu_seconds(reached.elapsed_s)} s" for each, reached in arrivals]
        yield f"Trained to {arrivals[0][0].target:.0%} accuracy: {', '.join(parts)}."
    if missed := [mode_name(training.mode) for training in ended if not training.reached()]:
        yield f"The target accuracy was not reached by {', '.join(missed)}."
    if len(ended) > 1:
        hashes = {training.model_sha256 for training in ended}
        if len(hashes) == 1 and "" not in hashes:
            yield f"All {len(ended)} modes end with the same model, bit for bit."
        else:
            most = max(training.largest_difference for training in ended)
            yield (
                f"The last models of {len(ended)} modes: no parameter differs from that of "
                f"{mode_name(ended[0].mode)} by more than {most:.1e}."
            )


def _sign(ratio: float) -> int:
    """1 if the other one needs more, -1 if less, 0 if they are alike or unknown."""
    return 1 if ratio > _ALIKE else -1 if 0 < ratio < 1 / _ALIKE else 0


def _plain(ratio: float) -> str:
    return times(ratio).removesuffix("x")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


# --- printing ------------------------------------------------------------------------------------------------


def print_results(results: Results, console: Console) -> None:
    """Tables, findings, failures and notes, in 80 columns or a narrower terminal's width."""
    width = min(console.width, WIDTH)

    def say(text: str = "", style: str = "") -> None:
        console.print(text, style=style or None, width=width, markup=False, highlight=False, soft_wrap=False)

    for section in sections(results):
        say(section.title.upper(), "bold")
        say(section.explanation)
        for sheet in section.sheets:
            say()
            console.print(_rich_table(sheet, width), width=width)
        say()
    for title, texts in (
        ("Findings", findings(results)),
        ("Correctness", [correctness(results)]),
        ("Failures", failures(results)),
        ("Notes", results.notes),
    ):
        if texts:
            say(title.upper(), "bold")
            for text in texts:
                console.print(_bullet(text), width=width)
            say()
    if results.seconds:
        say(f"Took {results.seconds:.0f} s.")


def _rich_table(sheet: Sheet, width: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    # Least widths and gaps come before the table's own: where all cannot be had, no text may be cut off.
    least = sum(_column_widths(sheet))
    gap = 2 if least + 2 * (len(sheet.columns) - 1) <= width else 1
    fits = least + gap * (len(sheet.columns) - 1) <= width
    table = Table(
        title=Text(sheet.title),
        title_justify="left",
        title_style="",  # dim or italic titles are hard to find again among many
        box=None,
        padding=(0, gap, 0, 0),
        pad_edge=False,
    )
    for column in sheet.columns:
        table.add_column(
            Text(column.head),
            justify="left" if column.left else "right",
            min_width=column.width if fits else None,
            overflow="fold",
            header_style="dim",
        )
    for row in sheet.rows:
        table.add_row(*(Text(text) for text in row.texts), style="bold" if row.strong else None)
    return table


def _column_widths(sheet: Sheet) -> list[int]:
    return [
        max(column.width, len(column.head), *(len(row.texts[number]) for row in sheet.rows))
        for number, column in enumerate(sheet.columns)
    ]


def _bullet(text: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=1)
    grid.add_column(overflow="fold")
    grid.add_row("*", Text(text.strip()))
    return grid


def fact_table(facts: Mapping[str, str]) -> Table:
    """Names and values side by side."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(Text(name), Text(value))
    return grid
