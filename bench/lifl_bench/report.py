"""Results in files: JSON that results can be had back from, and a report of one HTML page with its plots.

The page needs nothing else: pictures and style are in it, it has no scripts and refers to nothing outside.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lifl.cli.common import CommandError

from lifl_bench import tables
from lifl_bench.plots import Plot, draw_all
from lifl_bench.results import AblationRow, CellResult, Results, TrainingResult, median, percentile
from lifl_bench.tables import Group, Section

FORMAT: Final = "lifl-bench-results/1"
PAGE: Final = "report.html"

_TEMPLATE = "report.html.j2"
_INSTALL = ("pip install 'lifl[bench]'", "what the report is drawn with")
_DEFINITIONS: Final = (
    (
        "ACT",
        "Aggregation completion time: from the first byte of a round's first update being sent until a client "
        "could fetch the new model. One clock serves all processes.",
    ),
    (
        "Latency",
        "Of each update: from its client's first byte being sent until it had become part of a sum. p50 is the "
        "median; 95 % of the updates took no longer than p95.",
    ),
    (
        "CPU",
        "CPU seconds, in user space and in the kernel, of all processes on the path together: clients, proxies, "
        "brokers, sidecars and servers. Counted from before the first byte until all is quiet again, so work put "
        "off until after the round counts too.",
    ),
    (
        "Memory",
        "Peak of all the mode's processes together (proportional set size: shared pages count once), in a further "
        "round that was not timed. The clients' own memory is not part of it.",
    ),
    (
        "Copies",
        "How often an update is copied, in user space or across a socket, from the client's buffer to the fold. "
        "Known from how the mode is built, not measured.",
    ),
    ("Disk", "Bytes that all processes had written to block devices, median of the rounds. MB is 10^6 bytes."),
    (
        "Ratios",
        "5.3x beside a mode: its median is 5.3 times that of the first LIFL mode of the same table; below 1x it "
        "is better than LIFL. The findings call medians alike that differ by less than a tenth.",
    ),
    (
        "Rounds",
        "Each mode ran a warm-up round, which is not counted. Then the modes took turns, so that whatever else "
        "happens on the machine meets all of them.",
    ),
)


# --- JSON ----------------------------------------------------------------------------------------------------


def to_json(results: Results) -> str:
    """The results with summaries beside the raw rounds, as one line. What is not a finite number is null."""
    document: dict[str, Any] = {"format": FORMAT, **asdict(results)}
    group_of = {id(cell): group for group in tables.groups_of(results) for cell in group.cells}
    for position, cell in enumerate(results.cells):
        document["cells"][position]["summary"] = _cell_summary(cell) | _ratios(group_of[id(cell)], cell)
    steps = {
        id(row): _steps(ablation, number)
        for ablation in tables.ablations_of(results)
        for number, row in enumerate(ablation)
    }
    for position, row in enumerate(results.ablation):
        document["ablation"][position]["summary"] = _cell_summary(row.result) | steps[id(row)]
    for position, training in enumerate(results.training):
        document["training"][position]["summary"] = _training_summary(training)
    document["summary"] = {
        "findings": tables.findings(results),
        "correctness": tables.correctness(results),
        "correct": tables.is_correct(results),
        "failures": tables.failures(results),
    }
    return json.dumps(_without_nan(document), allow_nan=False)


def from_json(text: str) -> Results:
    """The results that `to_json` wrote; numbers that were null are nan. Raises ValueError for anything else."""
    import msgspec

    document = json.loads(text)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    return msgspec.convert(_with_nan(document), Results)


def _cell_summary(cell: CellResult) -> dict[str, Any]:
    return {
        "act_s": _distribution(cell.acts_s),
        "latency_s": _distribution(cell.latencies_s),
        "cpu_s": _distribution(cell.cpus_s),
        "component_cpu_s": tables.component_cpu(cell),
        "written_bytes": median([round_.written_bytes for round_ in cell.rounds]),
        "largest_error": max((round_.error for round_ in cell.rounds), default=math.nan),
    }


def _distribution(values: Sequence[float]) -> dict[str, float]:
    known = tables.finite(values)
    return {
        "median": median(known),
        "p95": percentile(known, 0.95),
        "lowest": min(known, default=math.nan),
        "highest": max(known, default=math.nan),
    }


def _ratios(group: Group, cell: CellResult) -> dict[str, Any]:
    return {
        "ratio_to": group.reference.mode if group.reference else None,
        "act_ratio": group.act_ratio(cell),
        "cpu_ratio": group.cpu_ratio(cell),
    }


def _steps(ablation: Sequence[AblationRow], number: int) -> dict[str, float]:
    """How many times smaller the medians are than in the row before and in the first."""
    if number == 0:
        return {}
    before, first, this = ablation[number - 1].result, ablation[0].result, ablation[number].result
    return {
        "act_step": tables.factor(before, this, tables.acts),
        "act_total": tables.factor(first, this, tables.acts),
        "cpu_step": tables.factor(before, this, tables.cpus),
        "cpu_total": tables.factor(first, this, tables.cpus),
    }


def _training_summary(training: TrainingResult) -> dict[str, Any]:
    reached = training.reached()
    return {
        "rounds_to_target": training.rounds.index(reached) + 1 if reached else None,
        "seconds_to_target": reached.elapsed_s if reached else None,
        "cpu_s_to_target": reached.cpu_s if reached else None,
        "final_accuracy": training.rounds[-1].accuracy if training.rounds else None,
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    """Undoes `_without_nan`, and leaves out the summaries."""
    if isinstance(value, dict):
        return {name: _with_nan(member) for name, member in value.items() if name != "summary"}
    if isinstance(value, list):
        return [_with_nan(member) for member in value]
    return math.nan if value is None else value


# --- the report ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mode:
    """A mode as the page explains it."""

    name: str
    summary: str
    copies: str


def write_report(results: Results, directory: Path) -> Path:
    """Write report.html, report.txt, results.json and the plots to `directory`, which is made; returns the page.

    Figures come first, so that what was measured is kept even if nothing can be drawn. Raises CommandError if the
    directory cannot be written to, or if matplotlib or jinja2 are missing.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "results.json").write_text(to_json(results) + "\n", encoding="utf-8")
        (directory / "report.txt").write_text(to_text(results), encoding="utf-8")
        plots = draw_all(results, directory)
        page = directory / PAGE
        page.write_text(_render(results, plots, directory), encoding="utf-8")
    except OSError as error:
        cause = (error.strerror or str(error)).lower()
        raise CommandError(f"the report cannot be written to '{directory}': {cause}") from None
    except ImportError as error:
        raise CommandError(f"the report cannot be drawn: {error}", [_INSTALL]) from None
    return page


def to_text(results: Results) -> str:
    """The report in 80 columns."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=tables.WIDTH, force_terminal=False, color_system=None)
    for line in ("LIFL BENCHMARK", results.command, results.date, ""):
        console.print(line, markup=False, highlight=False)
    tables.print_results(results, console)
    for title, facts in (("MACHINE", results.machine), ("VERSIONS", results.versions)):
        if facts:
            console.print(f"\n{title}", highlight=False)
            console.print(tables.fact_table(facts))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _render(results: Results, plots: Sequence[Plot], directory: Path) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lifl_bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        results=results,
        findings=tables.findings(results),
        correctness=tables.correctness(results),
        is_correct=tables.is_correct(results),
        failures=tables.failures(results),
        sections=_with_plots(tables.sections(results), plots),
        pictures={plot.file: _picture(directory / plot.file) for plot in plots},
        definitions=_DEFINITIONS,
        modes=_modes(results),
    )


def _with_plots(sections: Iterable[Section], plots: Iterable[Plot]) -> list[tuple[Section, list[Plot]]]:
    plots = list(plots)
    return [(section, [plot for plot in plots if plot.section == section.title]) for section in sections]


def _picture(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")


def _modes(results: Results) -> list[_Mode]:
    """What each mode is, and which copies it makes; those may differ between cells."""
    found = []
    for mode in tables.modes_of(results):
        cells = [cell for cell in results.cells if cell.mode == mode and cell.copies]
        copies = dict.fromkeys(f"{cell.copies:g}: {cell.copies_detail}".removesuffix(": ") for cell in cells)
        found.append(_Mode(mode, results.modes.get(mode, ""), "; or ".join(copies)))
    return found
