"""Plots of the results, as PNG files: the same numbers as the tables, one figure for each model and depth of tree.

A mode and a component have one colour in all figures. Colours are told apart by colour-blind eyes, and where they
are not (in grey) by labels, hatches, markers or line styles.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lifl_bench import tables
from lifl_bench.results import AblationRow, CellResult, Results, TrainingResult, median
from lifl_bench.tables import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 8.0
DPI = 160
_MOST_ROWS = 44
"""Bars in one figure; a run with more gets more figures."""
_MOST_PANELS = 6
_LOG_FROM = 20.0
"""Ratio of the largest to the smallest value from which on the smallest bar would be a line."""
_ROW_INCHES = 0.235
_AXIS_INCHES = 0.5
"""Ticks and name of an x axis."""
_CHARACTER_INCHES = 0.072
_NAME_INCHES = 0.062
"""Of a character of a segment's name."""
_PANEL_INCHES = WIDTH_INCHES / 2 - 0.7
"""Width of one of two panels, roughly."""
_STEPS = (1, 2, 2.5, 5, 10)
"""Between the ticks of an axis that is not logarithmic."""
_GREY = "#5a5a5a"
_TEXT = "#222222"

_TITLE_INCHES, _TITLE_CHARACTERS = 0.25, 72
_LEGEND_INCHES, _LEGEND_COLUMNS, _LEGEND_HANDLE_INCHES = 0.24, 6, 0.62
_NOTE_INCHES, _NOTE_CHARACTERS = 0.18, 128
_MARGIN_INCHES = 0.09
_STEP_CHARACTERS = 24

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": "#9a9a9a",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": _TEXT,
    "text.parse_math": False,  # names may have a $ in them
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.linewidth": 0.7,
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Plot:
    """A figure on disk."""

    file: str
    """Name within the directory; chosen when it is saved."""
    title: str
    alt: str
    """Its figures in words, for who cannot see it."""
    section: str
    """Heading of the tables that it belongs to; see `tables.sections`."""
    caption: str = ""
    """How to read it; the figure says so too."""


@dataclass(frozen=True)
class _Look:
    """How a mode appears: LIFL in solid blue with a thick line, baselines hatched."""

    colour: str
    hatch: str = ""
    marker: str = "o"
    line: Any = "-"
    width: float = 1.6


_LOOKS = {
    "lifl": _Look("#0072b2", width=2.6),
    "lifl-unix": _Look("#56b4e9", marker="s", line=(0, (5, 1)), width=2.2),
    "broker": _Look("#d55e00", hatch="////", marker="^", line="--"),
    "broker-wire": _Look("#cc79a7", hatch="\\\\\\\\", marker="P", line=(0, (3, 1, 1, 1))),
    "broker-stock": _Look("#e69f00", hatch="xxxx", marker="v", line="-."),
    "grpc": _Look("#009e73", hatch="....", marker="D", line=":"),
}
_OTHER_LOOKS = (
    _Look("#882255", hatch="++++", marker="X", line="-."),
    _Look("#999933", hatch="oooo", marker="*", line=":"),
    _Look("#777777", hatch="----", marker="h", line="--"),
)
_BETWEEN = _Look("#8fa3b0")
"""Neither a baseline nor LIFL: the steps between them."""
_COMPONENTS = {
    # What every mode has, then who receives, who keeps and passes on, who folds, and who looks after them.
    "clients": "#c4c4c4",
    "gateway": "#0072b2",
    "ingress": "#56b4e9",
    "nats-server": "#d55e00",
    "filter": "#f0e442",
    "sidecar": "#e69f00",
    "worker": "#009e73",
    "function": "#5cc8a4",
    "server": "#1b7f5f",
    "coordinator": "#cc79a7",
    "agent": "#882255",
    "zygote": "#e3b5d0",
    "supervisor": "#6a4c7d",
}
_OTHER_COMPONENTS = ("#332288", "#999933", "#7a5230", "#444444", "#aa4499", "#ddcc77")
_REST = "other"
_REST_COLOUR = "#8c8c8c"


def draw_all(results: Results, directory: Path) -> list[Plot]:
    """Write every figure there is something to show in, to `directory`, which has to exist.

    Needs matplotlib: ImportError without. Raises OSError if a file cannot be written.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        studio = _Studio(directory, _looks_of(results), _component_colours(results))
        for groups in _pages(results):
            _draw_acts(studio, groups)
        for series in _series(results):
            _draw_scaling(studio, series)
        for groups in _pages(results):
            _draw_latencies(studio, groups)
        for groups in _pages(results):
            _draw_components(studio, groups)
        for ablation in tables.ablations_of(results):
            _draw_ablation(studio, ablation)
        _draw_training(studio, results.training)
    return studio.plots


# --- what belongs together -----------------------------------------------------------------------------------


@dataclass
class _Studio:
    """Where figures go, and the colours that all of them share."""

    directory: Path
    looks: dict[str, _Look]
    components: dict[str, str]
    plots: list[Plot] = field(default_factory=list)

    def save(self, drawing: _Drawing, name: str, plot: Plot) -> None:
        """Write the drawing to a file whose name is made of `name`."""
        drawing.frame(plot.title)
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        taken = {each.file for each in self.plots}
        file = next(file for file in _file_names(stem) if file not in taken)
        drawing.figure.savefig(self.directory / file, dpi=DPI)
        self.plots.append(replace(plot, file=file, caption=drawing.note.strip()))


@dataclass
class _Drawing:
    """A figure before it has its frame: title and legend above the panels, a note below."""

    figure: Figure
    height: float
    """Inches that the panels take."""
    legend: dict[str, Any] = field(default_factory=dict)
    """Handles by label, in reading order."""
    note: str = ""

    def frame(self, title: str) -> None:
        """Add what is around the panels, and make the figure as high as all needs."""
        title_lines = textwrap.wrap(title, _TITLE_CHARACTERS)
        note_lines = textwrap.wrap(self.note, _NOTE_CHARACTERS)
        title_height = _MARGIN_INCHES + _TITLE_INCHES * len(title_lines)
        columns = _legend_columns(list(self.legend))
        top = title_height + _LEGEND_INCHES * math.ceil(len(self.legend) / columns)
        bottom = _MARGIN_INCHES + _NOTE_INCHES * len(note_lines)
        height = self.height + top + bottom
        left = _MARGIN_INCHES / WIDTH_INCHES
        self.figure.set_figheight(height)
        self.figure.set_layout_engine("constrained", rect=(0, bottom / height, 1, self.height / height))
        self.figure.text(
            left,
            1 - _MARGIN_INCHES / height,
            "\n".join(title_lines),
            va="top",
            fontsize=12.5,
            fontweight="bold",
        )
        self.figure.text(
            left,
            _MARGIN_INCHES / height,
            "\n".join(note_lines),
            va="bottom",
            fontsize=8.5,
            color=_GREY,
        )
        if self.legend:
            self._add_legend((left, 1 - title_height / height), columns)

    def _add_legend(self, corner: tuple[float, float], columns: int) -> None:
        # Legends are filled column by column; this order makes them read row by row.
        labels = [name for first in range(columns) for name in list(self.legend)[first::columns]]
        self.figure.legend(
            [self.legend[label] for label in labels],
            labels,
            loc="upper left",
            bbox_to_anchor=corner,
            borderaxespad=0,
            borderpad=0.2,
            ncols=columns,
            columnspacing=1.6,
            handlelength=2.6,
        )


def _legend_columns(labels: Sequence[str]) -> int:
    """The most columns that fit into the figure's width."""
    for columns in range(_LEGEND_COLUMNS, 1, -1):
        longest = [max(map(len, labels[first::columns]), default=0) for first in range(columns)]
        if sum(_LEGEND_HANDLE_INCHES + _CHARACTER_INCHES * length for length in longest) < WIDTH_INCHES:
            return columns
    return 1


def _file_names(stem: str) -> Iterator[str]:
    yield f"{stem}.png"
    number = 2
    while True:
        yield f"{stem}-{number}.png"
        number += 1


def _looks_of(results: Results) -> dict[str, _Look]:
    """Of every mode, the ones nobody has heard of included."""
    modes = tables.modes_of(results)
    others = [mode for mode in modes if mode not in _LOOKS]
    return _LOOKS | {mode: _OTHER_LOOKS[number % len(_OTHER_LOOKS)] for number, mode in enumerate(others)}


def _component_colours(results: Results) -> dict[str, str]:
    """Of every component, in the order in which bars are stacked."""
    names = dict.fromkeys(name for cell in results.cells for round_ in cell.rounds for name in round_.cpu_s)
    others = [name for name in names if name not in _COMPONENTS]
    colours = {name: _OTHER_COMPONENTS[number % len(_OTHER_COMPONENTS)] for number, name in enumerate(others)}
    return _COMPONENTS | colours | {_REST: _REST_COLOUR}


def _series(results: Results) -> list[list[Group]]:
    """Groups with figures that differ in the number of updates alone."""
    found: dict[tuple[str, int], list[Group]] = {}
    for group in tables.groups_of(results):
        if any(tables.has_figures(cell) for cell in group.cells):
            found.setdefault((group.model, group.levels), []).append(group)
    return [sorted(groups, key=lambda group: group.updates) for groups in found.values()]


def _pages(results: Results) -> Iterator[list[Group]]:
    """The series, cut where a figure would become too long."""
    for groups in _series(results):
        page: list[Group] = []
        for group in groups:
            if page and (len(page) == _MOST_PANELS or _row_count([*page, group]) > _MOST_ROWS):
                yield page
                page = []
            page.append(group)
        yield page


def _row_count(groups: Sequence[Group]) -> int:
    return sum(1 + len(group.cells) for group in groups)


def _subject(groups: Sequence[Group]) -> str:
    """`20 x ResNet-18, two levels`, without the number where it varies."""
    first = groups[0]
    if len(groups) == 1:
        return first.setting
    numbers = ", ".join(str(group.updates) for group in groups[:-1]) + f" and {groups[-1].updates}"
    return f"{numbers} x {tables.model_name(first.model)}, {tables.levels_name(first.levels)}"


def _stem(kind: str, groups: Sequence[Group]) -> str:
    return f"{kind}-{groups[0].model}-{groups[0].levels}-levels"


# --- figures and axes ----------------------------------------------------------------------------------------


def _figure() -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, WIDTH_INCHES))  # its height is known when it is framed
    FigureCanvasAgg(figure)
    return figure


def _set_scale(axes: Axes, lowest: float, highest: float, room_inches: float, width_inches: float) -> bool:
    """Make the x axis reach from below the lowest bar to above the highest with room for text; whether it is
    logarithmic."""
    from matplotlib.ticker import MaxNLocator

    share = min(0.6, room_inches / width_inches)
    if _needs_log([lowest, highest]):
        # From a third below the lowest: a bar of it is still seen, and longer for larger values.
        start = lowest / 3
        axes.set_xscale("log")
        axes.set_xlim(start, start * (highest / start) ** (1 / (1 - share)))
        _plain_ticks(axes, "x")
        return True
    axes.set_xlim(0, (highest or 1) / (1 - share))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=max(4, int(1.6 * width_inches)), steps=_STEPS))
    return False


def _needs_log(values: Sequence[float]) -> bool:
    """Whether the smallest would hardly be seen beside the largest."""
    return min(values) > 0 and max(values) / min(values) >= _LOG_FROM


def _axis_name(name: str, is_log: bool) -> str:
    return f"{name} (logarithmic)" if is_log else name


def _plain_ticks(axes: Axes, which: str) -> None:
    """0.1, 1, 10 in place of powers of ten, and a label in between where there is one decade only."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=15))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True)
class _Bars:
    """The rows of a figure of horizontal bars: a heading for each group, then a bar for each mode."""

    groups: Sequence[Group]

    def place(self) -> Iterator[tuple[float, Group, CellResult | None]]:
        """From the top down: y, group, and its cell, or None for the heading."""
        y = 0.0
        for group in self.groups:
            if len(self.groups) > 1:
                yield y, group, None
                y += 1
            for cell in group.cells:
                yield y, group, cell
                y += 1
            y += 0.35

    def label(self, axes: Axes) -> None:
        """Write headings and modes beside the y axis, the first on top."""
        places = list(self.place())
        texts = [f"{group.updates} updates" if cell is None else cell.mode for _, group, cell in places]
        axes.set_yticks([y for y, _, _ in places], texts)
        for text, (_, _, cell) in zip(axes.get_yticklabels(), places, strict=True):
            strong = cell is None or tables.is_lifl(cell.mode)
            text.set_fontweight("bold" if strong else "normal")
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(places[-1][0] + 0.7, -0.7)
        axes.grid(False, axis="y")

    @property
    def height(self) -> float:
        """Inches that the rows take."""
        return _ROW_INCHES * (list(self.place())[-1][0] + 1.4)


# --- ACT -----------------------------------------------------------------------------------------------------


def _draw_acts(studio: _Studio, groups: Sequence[Group]) -> None:
    """A bar for each cell, from the lowest to the highest round a whisker."""
    bars = _Bars(groups)
    figure = _figure()
    axes = figure.add_subplot()
    values = [value for group in groups for cell in group.cells for value in tables.acts(cell)]
    is_log = _set_scale(axes, min(values), max(values), 17 * _CHARACTER_INCHES, WIDTH_INCHES - 1.5)
    for y, group, cell in bars.place():
        if cell is not None:
            _draw_act(axes, studio.looks, y, group, cell)
    bars.label(axes)
    axes.set_xlabel(_axis_name("ACT, seconds", is_log))
    alt = _in_words(
        "Aggregation completion time, median", groups, lambda each: tables.duration(median(tables.acts(each)))
    )
    note = _spread_note(groups, "Aggregation completion time") + _ratio_note(groups)
    drawing = _Drawing(figure, bars.height + _AXIS_INCHES, note=note)
    studio.save(drawing, _stem("act", groups), Plot("", f"{_subject(groups)}: ACT", alt, "Time"))


def _draw_act(axes: Axes, looks: dict[str, _Look], y: float, group: Group, cell: CellResult) -> None:
    if not tables.has_figures(cell):
        _write_failed(axes, y)
        return
    values = tables.acts(cell)
    middle = median(values)
    _draw_bar(axes, y, middle, looks[cell.mode])
    if len(values) > 1:
        axes.plot([min(values), max(values)], [y, y], color=_TEXT, linewidth=1.3, marker="|", markersize=6)
    _write_value(axes, y, max(values), tables.duration(middle), group.act_ratio(cell), cell is group.reference)


def _draw_bar(axes: Axes, y: float, value: float, look: _Look) -> None:
    axes.barh(y, value, height=0.74, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0)


def _write_value(axes: Axes, y: float, x: float, text: str, ratio: float, is_reference: bool) -> None:
    if math.isfinite(ratio) and not is_reference:
        text += f"  ({tables.times(ratio)})"
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5)


def _write_failed(axes: Axes, y: float) -> None:
    place = axes.get_yaxis_transform()
    axes.text(0.01, y, "failed", transform=place, va="center", fontsize=8.5, fontstyle="italic", color=_GREY)


def _spread_note(groups: Sequence[Group], what: str) -> str:
    rounds = max((len(cell.rounds) for group in groups for cell in group.cells), default=0)
    if rounds < 2:
        return f"{what} of one round. "
    return f"{what}, median; whiskers from the lowest to the highest of up to {rounds} rounds. "


def _ratio_note(groups: Sequence[Group]) -> str:
    names = dict.fromkeys(group.reference.mode for group in groups if group.reference is not None)
    return f"In brackets: times {' or '.join(names)}." if names else ""


def _in_words(what: str, groups: Sequence[Group], text: Callable[[CellResult], str]) -> str:
    """The figures in words."""
    parts = [
        f"{group.setting}: "
        + ", ".join(f"{cell.mode} {text(cell) if tables.has_figures(cell) else 'failed'}" for cell in group.cells)
        for group in groups
    ]
    return f"{what}. {'; '.join(parts)}."


# --- CPU by component ----------------------------------------------------------------------------------------


def _draw_components(studio: _Studio, groups: Sequence[Group]) -> None:
    """What CPU each component takes: in seconds on the left, as shares of the mode's total on the right."""
    cells = [cell for group in groups for cell in group.cells if tables.has_figures(cell)]
    names = _worth_showing([tables.component_cpu(cell) for cell in cells], studio.components)
    figure = _figure()
    panels = figure.subplots(
        len(groups), 2, squeeze=False, height_ratios=[_Bars([group]).height for group in groups]
    )
    for (left, right), group in zip(panels, groups, strict=True):
        _draw_component_panels(left, right, group, names, studio.components)
        if len(groups) > 1:
            left.set_title(f"{group.updates} updates", fontweight="bold")
    panels[-1][0].set_xlabel("CPU seconds of a round")
    panels[-1][1].set_xlabel("share of the mode's own total, %")
    height = sum(_Bars([group]).height + 0.55 for group in groups) + 0.2
    note = f"Medians; all processes of the mode, and the sending clients. {_ratio_note(groups)}"
    drawing = _Drawing(figure, height, _component_legend(names, studio.components), note)
    title = f"{_subject(groups)}: where the CPU time goes"
    alt = _in_words(
        "CPU seconds of a round, median", groups, lambda each: _shares_text(tables.component_cpu(each))
    )
    studio.save(drawing, _stem("cpu", groups), Plot("", title, alt, "CPU seconds by component"))


def _draw_component_panels(
    left: Axes, right: Axes, group: Group, names: Sequence[str], colours: dict[str, str]
) -> None:
    bars = _Bars([group])
    totals = [sum(tables.component_cpu(cell).values()) for cell in group.cells if tables.has_figures(cell)]
    _set_scale(left, 0, max(totals), 15 * _CHARACTER_INCHES, _PANEL_INCHES)
    right.set_xlim(0, 100)
    for y, cell in enumerate(group.cells):
        if not tables.has_figures(cell):
            _write_failed(left, y)
            continue
        share = _merged(tables.component_cpu(cell), names)
        total = sum(share.values())
        _stack(left, y, share, colours, 1.0)
        _stack(right, y, share, colours, 100 / (total or 1.0), named=True)
        text = f"{tables.cpu_seconds(median(tables.cpus(cell)))} s"
        _write_value(left, y, total, text, group.cpu_ratio(cell), cell is group.reference)
    bars.label(left)
    right.set_ylim(left.get_ylim())
    right.set_yticks([])
    right.grid(False, axis="y")


def _worth_showing(shares: Sequence[dict[str, float]], colours: Iterable[str]) -> list[str]:
    """Components with a hundredth of some bar, in stacking order; the rest of them are one."""
    large = {
        name for share in shares for name, value in share.items() if value >= 0.01 * max(sum(share.values()), 1e-9)
    }
    names = [name for name in colours if name in large]
    small = any(name not in large and value > 0 for share in shares for name, value in share.items())
    return [*names, _REST] if small else names


def _merged(share: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    merged = {name: share.get(name, 0.0) for name in names}
    if _REST in merged:
        merged[_REST] = sum(value for name, value in share.items() if name not in names)
    return merged


def _stack(
    axes: Axes, y: float, share: dict[str, float], colours: dict[str, str], scale: float, *, named: bool = False
) -> None:
    """Segments from left to right; `named` ones carry their names where there is room."""
    inches = _PANEL_INCHES / axes.get_xlim()[1]
    start = 0.0
    for name, value in share.items():
        width = scale * value
        axes.barh(y, width, left=start, height=0.74, color=colours[name], linewidth=0)
        if start and inches * width > 0.04:  # of a narrow segment the line would leave nothing
            axes.plot([start, start], [y - 0.37, y + 0.37], color="white", linewidth=0.8, solid_capstyle="butt")
        if named and inches * width > _NAME_INCHES * (len(name) + 1):
            colour = "white" if _is_dark(colours[name]) else _TEXT
            axes.text(start + width / 2, y, name, ha="center", va="center_baseline", fontsize=7.5, color=colour)
        start += width


def _is_dark(colour: str) -> bool:
    """Whether white is easier to read on it than black."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.52


def _component_legend(names: Sequence[str], colours: dict[str, str]) -> dict[str, Any]:
    from matplotlib.patches import Patch

    return {name: Patch(color=colours[name]) for name in names}


def _shares_text(share: dict[str, float]) -> str:
    parts = [f"{name} {tables.cpu_seconds(value)}" for name, value in share.items()]
    return f"{tables.cpu_seconds(sum(share.values()))} ({', '.join(parts)})"


# --- over the number of updates ------------------------------------------------------------------------------


def _draw_scaling(studio: _Studio, groups: Sequence[Group]) -> None:
    """ACT and CPU over the number of updates, a line for each mode, its band from lowest to highest."""
    if len(groups) < 2:
        return
    figure = _figure()
    panels = figure.subplots(1, 2)
    modes = list(dict.fromkeys(cell.mode for group in groups for cell in group.cells if tables.has_figures(cell)))
    handles: dict[str, Any] = {}
    for axes, values, name in zip(panels, (tables.acts, tables.cpus), ("ACT", "CPU"), strict=True):
        handles = {mode: _draw_line(axes, studio.looks[mode], mode, groups, values) for mode in modes}
        is_log = _set_both_scales(axes, groups, values)
        axes.set_xlabel("updates in a round")
        axes.set_ylabel(_axis_name(f"{name}, seconds", is_log))
    subject = f"{tables.model_name(groups[0].model)}, {tables.levels_name(groups[0].levels)}"
    alt = _in_words(
        "Medians of ACT and CPU",
        groups,
        lambda each: (
            f"{tables.duration(median(tables.acts(each)))} and {tables.cpu_seconds(median(tables.cpus(each)))} s"
        ),
    )
    drawing = _Drawing(figure, 3.6, handles, "Lines: medians. Bands: from the lowest to the highest round.")
    title = f"{subject}: ACT and CPU over the number of updates"
    studio.save(drawing, _stem("scaling", groups), Plot("", title, alt, "Time"))


def _draw_line(
    axes: Axes, look: _Look, mode: str, groups: Sequence[Group], values: Callable[[CellResult], list[float]]
) -> Any:
    """Returns the line, for the legend."""
    points = [
        (group.updates, values(cell))
        for group in groups
        for cell in group.cells
        if cell.mode == mode and tables.has_figures(cell)
    ]
    numbers = [number for number, _ in points]
    axes.fill_between(
        numbers,
        [min(found) for _, found in points],
        [max(found) for _, found in points],
        color=look.colour,
        alpha=0.2,
    )
    return axes.plot(numbers, [median(found) for _, found in points], **_line_style(look, 5.5))[0]


def _line_style(look: _Look, marker_size: float) -> dict[str, Any]:
    return {
        "color": look.colour,
        "linestyle": look.line,
        "linewidth": look.width,
        "marker": look.marker,
        "markersize": marker_size,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _set_both_scales(axes: Axes, groups: Sequence[Group], values: Callable[[CellResult], list[float]]) -> bool:
    """Returns whether the y axis is logarithmic."""
    from matplotlib.ticker import NullLocator

    found = [value for group in groups for cell in group.cells for value in values(cell)]
    numbers = [group.updates for group in groups]
    is_log = _needs_log(found)
    if is_log:
        axes.set_yscale("log")
        _plain_ticks(axes, "y")
    else:
        axes.set_ylim(bottom=0)
    if max(numbers) / max(min(numbers), 1) >= 8:
        axes.set_xscale("log")
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.xaxis.set_minor_locator(NullLocator())
    return is_log


# --- latency -------------------------------------------------------------------------------------------------


def _draw_latencies(studio: _Studio, groups: Sequence[Group]) -> None:
    """The share of updates that were folded by a time, a panel for each number of updates."""
    groups = [group for group in groups if any(_latencies(cell) for cell in group.cells)]
    if not groups:
        return
    columns = min(2, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = _figure()
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for number, axes in enumerate(panels.flat):
        if number >= len(groups):
            axes.remove()
            continue
        handles |= _draw_latency_panel(axes, studio.looks, groups[number])
        if len(groups) > 1:
            axes.set_title(f"{groups[number].updates} updates", fontweight="bold")
        if number % columns == 0:
            axes.set_ylabel("updates folded, %")
    alt = _in_words(
        "Latency of an update, median",
        groups,
        lambda each: tables.duration(median(_latencies(each))),
    )
    note = "Of all updates of all measured rounds, the share that had been folded. Further left is better."
    legend = {mode: handles[mode] for mode in studio.looks if mode in handles}
    drawing = _Drawing(figure, 0.3 + 2.2 * rows, legend, note)
    title = f"{_subject(groups)}: latency of the updates"
    studio.save(drawing, _stem("latency", groups), Plot("", title, alt, "Time"))


def _draw_latency_panel(axes: Axes, looks: dict[str, _Look], group: Group) -> dict[str, Any]:
    """Returns the lines by mode, for the legend."""
    handles: dict[str, Any] = {}
    known = {cell.mode: _latencies(cell) for cell in group.cells}
    for mode, values in known.items():
        if values:
            look = looks[mode]
            handles[mode] = axes.ecdf(values, color=look.colour, linestyle=look.line, linewidth=look.width)
    is_log = _needs_log([value for values in known.values() for value in values])
    if is_log:
        axes.set_xscale("log")
        _plain_ticks(axes, "x")
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel(_axis_name("seconds since its first byte", is_log))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    return handles


def _latencies(cell: CellResult) -> list[float]:
    return tables.finite(cell.latencies_s) if tables.has_figures(cell) else []


# --- ablation ------------------------------------------------------------------------------------------------


def _draw_ablation(studio: _Studio, ablation: Sequence[AblationRow]) -> None:
    """A bar for each step, and in outline what the step before it took."""
    if not any(tables.has_figures(row.result) for row in ablation):
        return
    figure = _figure()
    panels = figure.subplots(1, 2, sharey=True)
    texts: list[Callable[[float], str]] = [tables.duration, lambda value: f"{tables.cpu_seconds(value)} s"]
    for axes, values, text in zip(panels, (tables.acts, tables.cpus), texts, strict=True):
        _draw_steps(axes, studio.looks, ablation, values, text)
    names = ["\n".join(textwrap.wrap(row.name, _STEP_CHARACTERS)) or row.name for row in ablation]
    panels[0].set_yticks(range(len(ablation)), names)
    panels[0].set_ylim(len(ablation) - 0.4, -0.6)
    panels[0].set_xlabel("ACT, seconds")
    panels[1].set_xlabel("CPU seconds of a round")
    lines = max(name.count("\n") + 1 for name in names)
    note = "Each row adds one mechanism to the row above. Outline: the row above. In brackets: change from it."
    drawing = _Drawing(figure, _AXIS_INCHES + (0.17 + 0.17 * lines) * len(ablation), note=note)
    parts = [f"{row.name}: {_step_text(row.result)}" for row in ablation]
    alt = f"Medians of ACT and CPU, step by step. {'; '.join(parts)}."
    title = f"{tables.ablation_setting(ablation)}: what each mechanism contributes"
    name = "ablation" if ablation[0].nodes == 1 else f"ablation-{ablation[0].nodes}-nodes"
    studio.save(drawing, name, Plot("", title, alt, "Ablation"))


def _step_text(cell: CellResult) -> str:
    if not tables.has_figures(cell):
        return "failed"
    return f"{tables.duration(median(tables.acts(cell)))}, {tables.cpu_seconds(median(tables.cpus(cell)))} s"


def _draw_steps(
    axes: Axes,
    looks: dict[str, _Look],
    ablation: Sequence[AblationRow],
    values: Callable[[CellResult], list[float]],
    text: Callable[[float], str],
) -> None:
    middles = [median(values(row.result)) if tables.has_figures(row.result) else math.nan for row in ablation]
    highest = max((value for row in ablation for value in values(row.result)), default=1.0)
    _set_scale(axes, 0, highest, 15 * _CHARACTER_INCHES, _PANEL_INCHES - 0.3)
    for y, middle in enumerate(middles):
        before = middles[y - 1] if y else math.nan
        if not math.isfinite(middle):
            _write_failed(axes, y)
            continue
        _draw_bar(axes, y, middle, _step_look(looks, ablation, y))
        end = middle
        if math.isfinite(before):
            axes.barh(y, before, height=0.74, fill=False, edgecolor=_GREY, linewidth=0.9, linestyle=(0, (2, 2)))
            end = max(middle, before)
        change = f"  ({_change(before, middle)})" if before > 0 else ""
        axes.annotate(
            text(middle) + change, (end, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")


def _change(before: float, after: float) -> str:
    percent = round(100 * (after / before - 1))
    return f"{percent:+d} %" if percent else "0 %"


def _step_look(looks: dict[str, _Look], ablation: Sequence[AblationRow], number: int) -> _Look:
    """The last bar is LIFL's, the first one that of its mode; what is in between is neither."""
    if number == len(ablation) - 1:
        return looks["lifl"]
    return looks.get(ablation[0].result.mode, _BETWEEN) if number == 0 else _BETWEEN


# --- training ------------------------------------------------------------------------------------------------


def _draw_training(studio: _Studio, trainings: Sequence[TrainingResult]) -> None:
    """Accuracy over time and over CPU, a line for each mode."""
    shown = [training for training in trainings if training.rounds and not training.failure]
    if not shown:
        return
    figure = _figure()
    panels = figure.subplots(1, 2, sharey=True)
    times = [[[round_.elapsed_s for round_ in training.rounds] for training in shown]]
    times.append([[round_.cpu_s for round_ in training.rounds] for training in shown])
    names = ("seconds since the start", "CPU seconds of the mode's processes")
    handles: dict[str, Any] = {}
    for axes, values, name in zip(panels, times, names, strict=True):
        handles = _draw_accuracies(axes, studio.looks, shown, values)
        is_log = _needs_log([series[-1] for series in values])
        if is_log:
            axes.set_xscale("log")
            _plain_ticks(axes, "x")
        else:
            axes.set_xlim(left=0)
        axes.set_xlabel(_axis_name(name, is_log))
    panels[0].set_ylabel("accuracy on the test set, %")
    _write_target(panels[0], shown[0].target)
    note = "A marker for each round. CPU is that of the mode's own processes, without the clients."
    parts = [f"{each.mode} {_arrival_text(each)}" for each in shown]
    alt = f"Accuracy on the test set, round by round. To the target: {', '.join(parts)}."
    title = f"Training to {shown[0].target:.0%} accuracy: time and CPU that it takes"
    studio.save(_Drawing(figure, 3.6, handles, note), "training", Plot("", title, alt, "Training"))


def _draw_accuracies(
    axes: Axes, looks: dict[str, _Look], shown: Sequence[TrainingResult], values: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Returns the lines by mode, for the legend."""
    axes.axhline(100 * shown[0].target, color=_GREY, linewidth=1, linestyle=(0, (1, 2)))
    handles: dict[str, Any] = {}
    for training, series in zip(shown, values, strict=True):
        accuracies = [100 * round_.accuracy for round_ in training.rounds]
        handles[training.mode] = axes.plot(series, accuracies, **_line_style(looks[training.mode], 4.5))[0]
    return handles


def _write_target(axes: Axes, target: float) -> None:
    axes.annotate(
        f"target {target:.0%}",
        (1, 100 * target),
        (-2, -3),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8.5,
        color=_GREY,
    )


def _arrival_text(training: TrainingResult) -> str:
    reached = training.reached()
    return f"{reached.elapsed_s:.3g} s and {reached.cpu_s:.3g} CPU s" if reached else "not reached"
