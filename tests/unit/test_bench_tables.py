"""What `func bench` prints, and the numbers behind it."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import replace

import pytest
from lifl_bench import tables
from lifl_bench.results import AblationRow, CellResult, Results, Round, TrainingResult, TrainingRound
from rich.console import Console


def make_cell(
    mode: str, act_s: float, cpu_s: float, *, updates: int = 20, levels: int = 2, rounds: int = 3
) -> CellResult:
    """A cell whose rounds are 10 % apart, the middle one having these figures."""
    shares = {"clients": 0.4 * cpu_s, "server" if mode == "grpc" else "worker": 0.6 * cpu_s}
    measured = []
    for number in range(rounds):
        scale = 1 + 0.1 * (number - rounds // 2)
        cpu = {name: scale * value for name, value in shares.items()}
        measured.append(Round(scale * act_s, [0.5 * scale * act_s] * updates, cpu, 44_700_000, 2e-7))
    leaves = 10 if levels > 1 else 1
    return CellResult(
        mode, "resnet18", 44_700_000, updates, levels, leaves, measured, 1_000_000_000, 2, "two of them"
    )


def make_results(*cells: CellResult, notes: tuple[str, ...] = ()) -> Results:
    return Results("func bench", "2026-11-22T12:00:00Z", {}, {}, "burst", 3, list(cells), notes=list(notes))


def printed(results: Results, width: int = 80) -> str:
    stream = io.StringIO()
    tables.print_results(results, Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def make_training(mode: str, seconds: float, sha256: str = "ab" * 32, difference: float = 0.0) -> TrainingResult:
    rounds = [TrainingRound(0.5 + 0.1 * n, seconds * n, seconds * n / 2, 3.0 * n) for n in range(1, 6)]
    return TrainingResult(mode, 0.9, rounds, sha256, difference)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0042, "4.2 ms"),
        (0.16, "160 ms"),
        (9.4, "9400 ms"),
        (10.0, "10.0 s"),
        (70.06, "70.1 s"),
        (312.4, "312 s"),
    ],
)
def test_times_are_milliseconds_below_ten_seconds(seconds: float, text: str) -> None:
    assert tables.duration(seconds) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0.0031, "0.0031x"), (0.5, "0.50x"), (1.0, "1.0x"), (5.34, "5.3x"), (9.96, "10x"), (437.6, "438x")],
)
def test_ratios_have_as_many_digits_as_they_deserve(ratio: float, text: str) -> None:
    assert tables.times(ratio) == text


def test_what_is_not_known_is_a_dash() -> None:
    unknown = [text(math.nan) for text in (tables.duration, tables.cpu_seconds, tables.megabytes, tables.times)]

    assert unknown == ["-"] * 4


def test_modes_are_compared_with_the_first_lifl_mode_of_the_same_setting() -> None:
    results = make_results(
        make_cell("grpc", 0.6, 1.0),
        make_cell("lifl", 0.2, 0.5),
        make_cell("grpc", 0.3, 1.0, updates=4),
        make_cell("lifl", 0.2, 0.5, updates=4),
    )

    twenty, four = tables.groups_of(results)

    assert twenty.act_ratio(results.cells[0]) == pytest.approx(3.0)
    assert twenty.cpu_ratio(results.cells[0]) == pytest.approx(2.0)
    assert four.act_ratio(results.cells[2]) == pytest.approx(1.5)
    assert twenty.setting == "20 x ResNet-18, two levels"


def test_tables_show_medians_spread_and_ratios() -> None:
    text = printed(make_results(make_cell("lifl", 0.2, 0.5), make_cell("broker", 1.0, 4.5)))

    row = next(line for line in text.splitlines() if line.startswith("broker"))
    assert row.split() == ["broker", "3", "1000", "ms", "[900..1100", "ms]", "5.0x", "500", "ms", "550", "ms"]
    assert "[4.05..4.95]" in text and "9.0x" in text
    assert [line.split() for line in text.splitlines() if line.startswith("total")] == [["total", "0.50", "4.50"]]


@pytest.mark.parametrize("width", [200, 80, 60])
def test_nothing_is_wider_than_80_columns_or_cut_off(width: int) -> None:
    cells = [make_cell(f"a-mode-with-a-rather-long-name-{n}", 10.0**n, 10.0**n, rounds=9) for n in range(-3, 6)]
    results = make_results(*cells, make_cell("lifl", 0.16, 0.3), notes=("all of it " * 30,))
    results.ablation = [
        AblationRow(f"{number} and a mechanism that takes long to name", cell) for number, cell in enumerate(cells)
    ]
    results.training = [make_training(cell.mode, 1e4) for cell in cells]

    text = printed(results, width)

    assert max(len(line) for line in text.splitlines()) <= min(width, 80)
    sheets = [sheet for section in tables.sections(results) for sheet in section.sheets]
    shown = [column.head for sheet in sheets for column in sheet.columns]
    shown += [part for sheet in sheets for row in sheet.rows for part in row.texts]
    assert not Counter("".join("".join(shown).split())) - Counter(text)


def test_a_failed_mode_is_named_with_its_reason_and_spoils_nothing() -> None:
    failed = replace(make_cell("broker", 1.0, 1.0), failure="no space left [bold]on[/bold] device")

    text = printed(make_results(make_cell("lifl", 0.2, 0.5), failed))

    row = next(line for line in text.splitlines() if line.startswith("broker"))
    assert row.split() == ["broker", "failed"]
    assert "broker, 20 x ResNet-18, two levels: no space left [bold]on[/bold] device" in text
    assert "nan" not in text


def test_notes_are_printed_as_they_are() -> None:
    assert "mode [grpc] left out" in printed(make_results(notes=("mode [grpc] left out",)))


def test_without_a_lifl_mode_there_are_no_ratios() -> None:
    results = make_results(make_cell("grpc", 0.6, 1.0), make_cell("broker", 1.0, 1.0))

    assert tables.findings(results) == []
    assert "1.7x" not in printed(results)


def test_one_round_has_no_spread() -> None:
    text = printed(make_results(make_cell("lifl", 0.2, 0.5, rounds=1)))

    assert "200 ms" in text and ".." not in text.replace("[lowest..highest]", "").replace("LOWEST..HIGHEST", "")


def test_the_findings_say_how_many_times_faster_lifl_is() -> None:
    (finding,) = tables.findings(make_results(make_cell("lifl", 0.2, 0.5), make_cell("broker", 1.0, 4.5)))

    assert finding == (
        "20 x ResNet-18, two levels: LIFL is 5.0 times faster than the tuned broker (ACT 200 ms against 1000 ms) "
        "and uses 9.0 times less CPU (0.50 s against 4.50 s)."
    )


def test_the_findings_say_where_a_baseline_is_better() -> None:
    (finding,) = tables.findings(make_results(make_cell("lifl", 0.5, 0.5), make_cell("grpc", 0.25, 1.0)))

    assert "LIFL is 2.0 times slower than gRPC" in finding
    assert "but uses 2.0 times less CPU" in finding


def test_small_differences_are_not_called_differences() -> None:
    (finding,) = tables.findings(make_results(make_cell("lifl", 0.5, 0.5), make_cell("grpc", 0.52, 0.48)))

    assert "LIFL is about as fast as gRPC" in finding
    assert "uses about as much CPU" in finding


def test_findings_over_several_settings_count_those_that_contradict() -> None:
    results = make_results(
        make_cell("lifl", 0.2, 0.5, updates=20),
        make_cell("grpc", 1.0, 1.0, updates=20),
        make_cell("lifl", 0.2, 0.5, updates=4),
        make_cell("grpc", 0.1, 0.5, updates=4),
    )

    largest, overall = tables.findings(results)

    assert largest.startswith("20 x ResNet-18")
    assert overall == (
        "LIFL against gRPC over 2 settings: faster in 1 of 2 (5.0 times), slower in 1 of 2 (2.0 times); "
        "less CPU in 1 of 2 (2.0 times), about as much CPU in 1 of 2."
    )


def test_findings_admit_that_single_rounds_overlap() -> None:
    ours, theirs = make_cell("lifl", 0.2, 0.5), make_cell("grpc", 0.3, 5.0)
    theirs.rounds[0].act_s = 0.19

    (finding,) = tables.findings(make_results(ours, theirs))

    assert "(ACT 200 ms against 300 ms; single rounds overlap)" in finding


def test_ablation_rows_are_compared_with_the_one_before_and_the_first() -> None:
    results = make_results()
    steps = [("broker", 1.0), ("+ shared memory", 0.5), ("+ eBPF routing", 0.1)]
    results.ablation = [AblationRow(name, make_cell(name, act, act)) for name, act in steps]

    text = printed(results)

    row = next(line for line in text.splitlines() if line.startswith("+ eBPF routing"))
    assert row.split() == ["+", "eBPF", "routing", "100", "ms", "5.0x", "10x", "0.10", "5.0x", "10x"]
    assert "the step that lowers ACT most is '+ eBPF routing' (5.0 times)" in " ".join(text.split())


def test_rows_on_several_nodes_are_compared_with_each_other_only() -> None:
    results = make_results()
    results.ablation = [
        AblationRow("broker", make_cell("a", 8.0, 8.0)),
        AblationRow("last", make_cell("b", 4.0, 4.0)),
    ]
    steps = [("2 nodes, round-robin", 1.0), ("+ placement", 0.5), ("+ eager", 0.1)]
    results.ablation += [AblationRow(name, make_cell(name, act, act), nodes=2) for name, act in steps]

    text = printed(results)

    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["2 nodes, round-robin"][3:] == ["1000", "ms", "1.00"]
    assert rows["+ eager"][2:] == ["100", "ms", "5.0x", "10x", "0.10", "5.0x", "10x"]
    assert "20 x ResNet-18, 2 nodes, 44.7 MB each" in text
    assert "From '2 nodes, round-robin' to '+ eager', ACT goes" in " ".join(text.split())


def test_a_failed_step_gets_no_credit_for_those_around_it() -> None:
    results = make_results()
    failed = replace(make_cell("b", 0.5, 0.5), failure="broken")
    results.ablation = [AblationRow("a", make_cell("a", 1.0, 1.0)), AblationRow("b", failed)]
    results.ablation.append(AblationRow("c", make_cell("c", 0.1, 0.1)))

    assert "no step lowers ACT" in tables.findings(results)[0]
    assert "ablation, b: broken" in tables.failures(results)


def test_training_shows_rounds_time_and_the_model() -> None:
    results = make_results()
    results.training = [make_training("lifl", 1.0), make_training("broker", 4.0)]
    slow = make_training("grpc", 2.0)
    slow.target = 0.99
    slow.rounds[-1].accuracy = 0.98
    results.training.append(slow)

    text = printed(results)

    rows = {line.split()[0]: line.split() for line in text.splitlines() if "abababababab" in line}
    assert rows["lifl"] == ["lifl", "4", "4.00", "2.00", "12.0", "100.0%", "abababababab", "0"]
    assert rows["grpc"][1] == ">5"
    assert "All 3 modes end with the same model, bit for bit." in text
    assert "not reached by gRPC" in text


def test_models_that_differ_are_said_to_differ() -> None:
    results = make_results()
    results.training = [make_training("lifl", 1.0), make_training("grpc", 1.0, "cd" * 32, 2.5e-7)]

    assert tables.findings(results)[-1] == (
        "The last models of 2 modes: no parameter differs from that of LIFL by more than 2.5e-07."
    )


def test_correctness_is_of_the_worst_round_and_wrong_ones_are_counted() -> None:
    results = make_results(make_cell("lifl", 0.2, 0.5))
    assert tables.is_correct(results) and "the largest error is 2.0e-07" in tables.correctness(results)

    results.cells[0].rounds[1].error = 0.5
    assert not tables.is_correct(results) and "WRONG in 1 round of 3" in tables.correctness(results)

    results.cells[0].rounds[1].error = math.nan
    assert not tables.is_correct(results) and tables.correctness(results).startswith("WRONG: 1 of 3 rounds")


def test_an_empty_run_can_be_printed() -> None:
    assert "Nothing was measured" in printed(make_results())
