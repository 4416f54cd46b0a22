"""The report: the same bytes each time, in one file, and what a reader sees in a browser."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from analysis.comparison import compare
from analysis.figures import draw, plotting
from analysis.figures.pareto import frontier
from analysis.report import report_command, report_folder, write_report
from analysis.sections import Settings
from tests.analysis.sweeps import recall_evaluation, text_sweep, write_point, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Text and recall, with a leaky model, a diverged run, a lost point and a tuned rate."""
    root = tmp_path_factory.mktemp("sweep")
    text_sweep(root / "text", {"attention": 3.2, "hedgehog": 3.1, "conv": 3.3, "routing_topw": 2.9})
    losses = [6.0, 5.0, 7.0, float("nan")]
    error = "TrainingError: step 40: loss or gradient is not finite"
    write_run(root / "text" / "x", "conv", 3, None, status="failed", error=error, losses=losses)
    write_point(root / "text" / "y", "failed", "<b>killed</b>", ["pattern=conv", "seed=4"])
    for pattern, accuracy in {"attention": 0.9, "mamba": 0.7}.items():
        for seed in range(3):
            for lr in (1e-3, 1e-2):
                noise = np.random.default_rng((seed, len(pattern))).normal(0, 0.02)
                write_run(
                    root / "recall" / f"{pattern}_{seed}_{lr}",
                    pattern,
                    seed,
                    recall_evaluation(accuracy + noise - lr),
                    options={"optimizer.lr": lr},
                    validation=accuracy - lr,
                )
    return root


@pytest.fixture(scope="module")
def report(sweep) -> Path:
    return write_report(compare([str(sweep)]), report_folder([str(sweep)]))


def test_made_again_it_is_the_same_bytes(sweep, report, tmp_path):
    """Elsewhere, and with the first report lying among the runs."""
    write_report(compare([str(sweep)]), tmp_path)
    first = {p.relative_to(report.parent): p.read_bytes() for p in report.parent.rglob("*.*")}
    second = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.*")}
    assert first == second
    assert {"report.html", "tables.md", "tables.tex", "rows.csv", "runs.csv"} <= set(
        map(str, first)
    )
    assert sum(path.suffix == ".pdf" for path in first) == 7


def test_it_is_one_file(report):
    text = report.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", text)


def test_it_has_the_command_of_every_number(sweep, report):
    text = report.read_text()
    for path in sweep.rglob("run.json"):
        assert str(path.parent) in text
    assert "python train.py pattern=mamba seed=2" in text
    assert f"python compare.py runs={sweep}" in text
    assert "&lt;b&gt;killed" in text  # what others wrote is text
    assert "<b>killed" not in text


def test_the_command_names_what_was_chosen(sweep):
    settings = Settings(baseline="attention", tuned=(), metric="loss")
    command = report_command(compare([str(sweep / "text"), str(sweep / "recall")], settings))
    assert command == (
        f"python compare.py 'runs=[{sweep / 'text'},{sweep / 'recall'}]' metric=loss "
        "baseline=attention 'tuned=[]'"
    )


def test_the_report_is_put_beside_the_runs(sweep):
    assert report_folder([str(sweep)]) == sweep / "report"
    assert report_folder([str(sweep / "te*")]) == sweep / "report"


def test_the_frontier():
    points = [(1.0, 5.0), (2.0, 6.0), (3.0, 3.0), (3.0, 4.0), (0.5, 9.0)]
    assert frontier(points, more_is_better=False, higher_is_better=False) == [4, 0, 2]
    assert frontier(points, more_is_better=False, higher_is_better=True) == [4]
    assert frontier(points, more_is_better=True, higher_is_better=False) == [2]
    assert frontier(points, more_is_better=True, higher_is_better=True) == [3, 1, 4]
    assert frontier([], more_is_better=True, higher_is_better=True) == []


def test_nothing_in_a_figure_is_cut_off(sweep):
    """Every text, legend entries and tick labels included, lies inside of its figure."""
    with plotting():
        for compared in compare([str(sweep)]).sections:
            for drawn in draw(compared):
                drawn.figure.draw_without_rendering()
                renderer = drawn.figure.canvas.get_renderer()  # type: ignore[attr-defined]
                box = drawn.figure.get_tightbbox(renderer)
                width, height = drawn.figure.get_size_inches()
                assert box.x0 > -0.01, drawn.name
                assert box.y0 > -0.01, drawn.name
                assert box.x1 < width + 0.01, drawn.name
                assert box.y1 < height + 0.01, drawn.name


@pytest.fixture(scope="module")
def page(report) -> Iterator:
    """The report in Chromium, which may not reach any network."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (seqmix[dev])"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(offline=True)
        page = context.new_page()
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("requestfailed", lambda request: page.said.append(request.url))
        page.goto(report.as_uri())
        yield page
        browser.close()


def names(page) -> list[str]:
    return page.locator("table.rows").nth(1).locator("button.row-name").all_inner_texts()


def test_a_click_sorts_the_table(page):
    by_score = ["routing_topw", "hedgehog", "attention", "conv"]
    assert names(page) == by_score
    table = page.locator("table.rows").nth(1)

    def sort_by(title: str) -> str | None:
        head = table.locator("thead th", has_text=title)
        head.locator("button").click()
        return head.get_attribute("aria-sort")

    assert sort_by("FLOPs/token") == "ascending"
    assert names(page) == ["conv", "attention", "routing_topw", "hedgehog"]
    assert sort_by("FLOPs/token") == "descending"
    assert names(page) == ["hedgehog", "routing_topw", "attention", "conv"]
    assert sort_by("row") == "ascending"
    assert names(page) == sorted(by_score)
    assert sort_by("p (Holm)") == "ascending"
    assert names(page)[-1] == "hedgehog"  # the reference, which has no p
    assert sort_by("token perplexity") == "ascending"
    assert names(page) == by_score


def test_every_figure_is_there(page):
    figures = page.locator("figure img")
    assert figures.count() == 7
    for i in range(7):
        image = figures.nth(i)
        image.scroll_into_view_if_needed()
        assert image.is_visible()
        assert image.evaluate("i => i.complete && i.naturalWidth > 300 && i.naturalHeight > 100")


def test_a_row_opens_its_runs_and_configuration(page):
    body = page.locator("table.rows").first.locator("tbody", has_text="mamba").first
    button, configuration = body.locator("button.row-name"), body.locator("pre.config")
    assert button.get_attribute("aria-expanded") == "false"
    assert not configuration.is_visible()
    button.click()
    assert configuration.is_visible()
    assert "optimizer.lr: 0.001" in configuration.inner_text()
    assert "python train.py pattern=mamba seed=1" in body.inner_text()
    assert "lr=0.01" in body.inner_text()  # the grid
    button.click()
    assert not configuration.is_visible()


def test_it_fits_the_window_and_asks_nobody_for_anything(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.said == []
