"""The files that `func bench --report` writes."""

from __future__ import annotations

import base64
import json
import math
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from lifl.cli.common import CommandError
from lifl_bench.plots import draw_all
from lifl_bench.report import from_json, to_json, to_text, write_report
from lifl_bench.results import AblationRow, CellResult, Results, Round, TrainingResult, TrainingRound
from PIL import Image

MODES = {
    "lifl": (0.16, ("clients", "gateway", "coordinator", "worker")),
    "broker": (1.9, ("clients", "ingress", "nats-server", "filter", "sidecar", "function")),
    "broker-wire": (1.2, ("clients", "ingress", "nats-server", "filter", "sidecar", "function")),
    "broker-stock": (70.0, ("clients", "ingress", "nats-server", "filter", "sidecar", "function")),
    "grpc": (0.6, ("clients", "server")),
}


def make_cell(
    mode: str, model: str = "resnet18", updates: int = 20, levels: int = 2, rounds: int = 3
) -> CellResult:
    chance = random.Random(f"{mode}{model}{updates}{levels}")
    act, components = MODES.get(mode, (0.3, ("clients", "something new")))
    measured = []
    for _ in range(rounds):
        act_s = act * updates / 20 * chance.uniform(0.9, 1.1)
        cpu_s = {name: act_s / len(components) for name in components}
        measured.append(Round(act_s, [act_s * chance.random() for _ in range(updates)], cpu_s, 1 << 20, 2e-7))
    return CellResult(mode, model, 44_700_000, updates, levels, 2, measured, 1 << 30, 2, f"copies of {mode}")


def make_results(
    modes: Sequence[str] = tuple(MODES),
    models: Sequence[str] = ("resnet18",),
    updates: Sequence[int] = (20,),
    levels: Sequence[int] = (2,),
    rounds: int = 3,
) -> Results:
    results = Results(
        "func bench", "2026-11-22T12:00:00Z", {"processor": "a fast one"}, {"lifl": "0.1.0"}, "burst", 3
    )
    for model in models:
        for level in levels:
            for number in updates:
                results.cells += [make_cell(mode, model, number, level, rounds) for mode in modes]
    return results


def with_everything() -> Results:
    results = make_results(updates=(4, 20))
    for name in ("broker", "+ shared memory", "+ eager"):
        results.ablation.append(AblationRow(name, replace(make_cell("lifl"), mode=name)))
    for mode, pace in (("lifl", 0.2), ("broker", 0.9)):
        rounds = [TrainingRound(0.1 * n, pace * n, pace * n, float(n)) for n in range(1, 10)]
        results.training.append(TrainingResult(mode, 0.8, rounds, "ab" * 32))
    results.notes.append("mode grpc left out")
    results.seconds = 12.5
    return results


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a report of everything."""
    return write_report(with_everything(), tmp_path_factory.mktemp("made") / "new" / "report")


class Page(HTMLParser):
    """What a page consists of; raises if tags are not closed in order."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def assert_is_a_picture(file: Path) -> None:
    """It has the usual width, something is on it, and nothing is cut off at its edges."""
    with Image.open(file) as image:
        picture = image.convert("RGB")
    pixels = np.asarray(picture)
    height, width, _ = pixels.shape
    assert width == 1280 and 150 < height < 2600
    inked = np.any(pixels < 245, axis=2)
    assert 0.005 < inked.mean() < 0.9
    assert len(picture.getcolors(1 << 24)) > 20
    border = np.concatenate([inked[:2].ravel(), inked[-2:].ravel(), inked[:, :2].ravel(), inked[:, -2:].ravel()])
    assert not border.any()


# --- JSON ----------------------------------------------------------------------------------------------------


def test_results_come_back_from_json_exactly() -> None:
    results = with_everything()

    assert from_json(to_json(results)) == results


def test_json_has_summaries_beside_the_raw_rounds() -> None:
    results = make_results(modes=("lifl", "grpc"))
    for cell, acts in zip(results.cells, ([0.1, 0.2, 0.3], [0.4, 0.8, 1.0]), strict=True):
        for round_, act in zip(cell.rounds, acts, strict=True):
            round_.act_s = act

    document = json.loads(to_json(results))

    grpc = document["cells"][1]
    assert [round_["act_s"] for round_ in grpc["rounds"]] == [0.4, 0.8, 1.0]
    assert grpc["summary"]["act_s"] == {"median": 0.8, "p95": 1.0, "lowest": 0.4, "highest": 1.0}
    assert grpc["summary"]["ratio_to"] == "lifl" and grpc["summary"]["act_ratio"] == pytest.approx(4.0)
    assert document["summary"]["correct"] is True and len(document["summary"]["findings"]) == 1


def test_json_has_null_where_there_is_no_number() -> None:
    results = make_results(modes=("grpc",))
    results.cells[0].rounds[0].error = math.nan
    results.cells.append(CellResult("lifl", "resnet18", 1, 20, 2, 1, failure="it broke"))

    text = to_json(results)

    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["cells"][1]["summary"]["act_s"]["median"] is None
    assert math.isnan(from_json(text).cells[0].rounds[0].error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "other"}',
        '{"format": "lifl-bench-results/1"}',
        to_json(make_results()).replace('"updates": 20', '"updates": "x"'),
    ],
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        from_json(text)


# --- plots ---------------------------------------------------------------------------------------------------


def test_every_plot_shows_something_and_is_described(tmp_path: Path) -> None:
    plots = draw_all(with_everything(), tmp_path)

    kinds = [plot.file.partition("-")[0].removesuffix(".png") for plot in plots]
    assert kinds == ["act", "scaling", "latency", "cpu", "ablation", "training"]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(plot.file for plot in plots)
    for plot in plots:
        assert_is_a_picture(tmp_path / plot.file)
        assert plot.title and plot.alt and plot.caption
    assert "lifl 1" in plots[0].alt and "20 x ResNet-18" in plots[0].title


def test_an_ablation_on_several_nodes_has_a_plot_and_steps_of_its_own(tmp_path: Path) -> None:
    results = with_everything()
    results.ablation += [
        AblationRow(name, replace(make_cell("lifl"), mode=name), nodes=2) for name in ("2 nodes", "+ placement")
    ]

    files = [plot.file for plot in draw_all(results, tmp_path)]
    rows = json.loads(to_json(results))["ablation"]

    assert [file for file in files if file.startswith("ablation")] == ["ablation.png", "ablation-2-nodes.png"]
    assert "act_step" not in rows[-2]["summary"] and rows[-1]["summary"]["act_step"] == 1


def test_a_single_mode_with_a_single_round_can_be_drawn(tmp_path: Path) -> None:
    plots = draw_all(make_results(modes=("grpc",), rounds=1), tmp_path)

    assert [plot.section for plot in plots] == ["Time", "Time", "CPU seconds by component"]
    for plot in plots:
        assert_is_a_picture(tmp_path / plot.file)


def test_modes_and_components_that_nobody_knows_can_be_drawn(tmp_path: Path) -> None:
    names = ["lifl", "$uper-mode", *(f"a-long-mode-name-{number}" for number in range(5))]

    results = make_results(modes=names, models=("../a model.safetensors",), updates=(2, 4))

    for plot in draw_all(results, tmp_path):
        assert_is_a_picture(tmp_path / plot.file)


def test_failed_cells_have_their_place_in_the_plots(tmp_path: Path) -> None:
    results = with_everything()
    results.cells[1] = replace(results.cells[1], failure="it broke")
    results.cells[6].rounds = []
    results.ablation[1].result.rounds = []

    plots = draw_all(results, tmp_path)

    assert "broker failed" in plots[0].alt and "+ shared memory: failed" in plots[-2].alt
    for plot in plots:
        assert_is_a_picture(tmp_path / plot.file)


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    results = make_results()
    results.cells = [replace(cell, rounds=[], failure="it broke") for cell in results.cells]
    results.ablation = [AblationRow("broker", results.cells[0])]
    results.training = [TrainingResult("lifl", 0.9, failure="no torch")]

    assert draw_all(results, tmp_path) == []


def test_a_hundred_cells_are_split_by_model_and_into_pages(tmp_path: Path) -> None:
    modes = [*MODES, *(f"mode-{number}" for number in range(5))]
    results = make_results(modes, models=("resnet18", "resnet34"), updates=(1, 2, 4, 8, 16), rounds=1)
    assert len(results.cells) == 100

    plots = draw_all(results, tmp_path)

    acts = [plot for plot in plots if plot.file.startswith("act")]
    assert [plot.title for plot in acts] == [
        "1, 2, 4 and 8 x ResNet-18, two levels: ACT",
        "16 x ResNet-18, two levels: ACT",
        "1, 2, 4 and 8 x ResNet-34, two levels: ACT",
        "16 x ResNet-34, two levels: ACT",
    ]
    assert len({plot.file for plot in plots}) == len(plots)
    for plot in plots:
        assert_is_a_picture(tmp_path / plot.file)


def test_plots_leave_the_style_of_others_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_all(make_results(), tmp_path)

    assert dict(matplotlib.rcParams) == before


# --- the report ----------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself(report: Path) -> None:
    text = report.read_text(encoding="utf-8")

    page = Page(text)
    assert report.name == "report.html" and not re.search(r"https?://|url\(|@import", text)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert all(str(link["href"]).startswith("#") for link in page.all("a"))
    pictures = {str(image["src"]).removeprefix("data:image/png;base64,") for image in page.all("img")}
    assert {base64.b64decode(picture, validate=True) for picture in pictures} == {
        png.read_bytes() for png in report.parent.glob("*.png")
    }


def test_the_page_can_be_read_without_seeing_it(report: Path) -> None:
    page = Page(report.read_text(encoding="utf-8"))

    assert page.all("html")[0]["lang"] == "en" and page.all("title")
    assert all(len(str(image["alt"])) > 40 for image in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(head["scope"] in ("col", "row") for head in page.all("th"))
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {str(link["href"])[1:] for link in page.all("a")} <= anchors


def test_the_page_says_what_was_found_and_how(report: Path) -> None:
    page = Page(report.read_text(encoding="utf-8"))

    for part in (
        "times faster than the tuned broker",
        "Right in every round",
        "copies of broker-stock",
        "Aggregation completion time",
        "mode grpc left out",
        "a fast one",
        "0.1.0",
        "2026-11-22T12:00:00Z",
        "func bench",
    ):
        assert part in page.text, part


def test_the_page_shows_markup_and_does_not_obey_it(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>'
    results = with_everything()
    results.training = []
    results.command = results.notes[0] = results.machine[evil] = results.versions[evil] = evil
    results.date = results.arrival = evil
    results.cells[1] = replace(results.cells[1], mode=evil, copies_detail=evil)
    results.cells[2] = replace(results.cells[2], failure=evil)
    results.ablation[0] = AblationRow(evil, results.ablation[0].result)

    page = Page(write_report(results, tmp_path).read_text(encoding="utf-8"))

    assert not page.all("script")
    assert page.text.count("<script>alert(1)</script>") > 5


def test_the_text_stays_within_80_columns() -> None:
    results = with_everything()
    results.command = "func bench " + "--updates 4 " * 30
    results.machine["processor"] = "a processor with many words in its name " * 5

    lines = to_text(results).splitlines()

    assert max(map(len, lines)) <= 80
    assert "VERSIONS" in lines and not any(line.endswith(" ") for line in lines)


def test_the_report_holds_what_it_is_made_from(report: Path) -> None:
    results = with_everything()

    assert from_json((report.parent / "results.json").read_text(encoding="utf-8")) == results
    assert (report.parent / "report.txt").read_text(encoding="utf-8") == to_text(results)


def test_a_report_of_failures_can_be_written(tmp_path: Path) -> None:
    results = make_results()
    results.cells = [replace(cell, rounds=[], failure=f"no {cell.mode} here") for cell in results.cells]

    page = Page(write_report(results, tmp_path).read_text(encoding="utf-8"))

    assert "no broker here" in page.text and "nothing to compare" in page.text
    assert "nan" not in page.text.split()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(CommandError, match=r"the report cannot be written to '.*file/report': not a directory"):
        write_report(make_results(), tmp_path / "file" / "report")


def test_a_directory_without_permission_is_refused() -> None:
    with pytest.raises(CommandError, match=r"the report cannot be written to .*: permission denied"):
        write_report(make_results(), Path("/sys/kernel"))  # where not even root may make a file


def test_without_matplotlib_the_figures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(CommandError, match="the report cannot be drawn") as refusal:
        write_report(make_results(), tmp_path)

    assert refusal.value.hints and (tmp_path / "results.json").exists() and (tmp_path / "report.txt").exists()
