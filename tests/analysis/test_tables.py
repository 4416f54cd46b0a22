"""Tables: what stands in them, and that the formats hold it."""

import csv
import io

import pytest

from analysis.comparison import compare
from analysis.numbers import rounded, short, with_interval
from analysis.statistics import Estimate, mean
from analysis.tables import caption, columns, latex, markdown, rows_csv, runs_csv
from tests.analysis.sweeps import recall_evaluation, text_evaluation, text_sweep, write_run


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    text_sweep(root, {"attention": 3.2, "hedgehog": 3.1})
    for lr in (1e-3, 1e-2):
        options = {"optimizer.lr": lr}
        for seed in range(2):
            path = root / f"conv_{lr}_{seed}"
            write_run(path, "conv", seed, text_evaluation(3.3 + 0.01 * seed, seed), options=options)
    write_run(root / "x", "attention", 3, None, status="failed", error="loss is not finite")
    write_run(root / "only", ["conv", "a_b"], 0, recall_evaluation(0.5))
    return compare([str(root)])


def test_numbers_have_the_figures_of_their_interval():
    assert with_interval(Estimate(21.3456, 3, 0.1, 20.9, 21.8)) == "21.35 ± 0.45"
    assert with_interval(Estimate(-1234.5, 3, 1, -1300.0, -1169.0)) == "−1,234 ± 66"
    assert with_interval(Estimate(0.5, 3, 0.1, 0.4, 0.6), signed=True) == "+0.50 ± 0.10"
    assert with_interval(Estimate(-0.5, 3, 0.1, -0.6, -0.4), magnitude=True) == "0.50 ± 0.10"
    assert with_interval(mean([0.123456])) == "0.1235"
    assert with_interval(mean([1.0, 1.0])) == "1.000 ± 0.000"
    assert [rounded(x) for x in (0.0, 123456.0, 1e-6)] == ["0.00", "123,456", "1.000e−06"]
    assert [short(x, "B") for x in (0, 999, 999.6, 131072, 3e9)] == [
        "0 B",
        "999 B",
        "1 kB",
        "131 kB",
        "3 GB",
    ]
    assert (short(None), short(1234), short(2e16)) == ("-", "1.23 k", "20 P")


def test_markdown_has_every_row_and_column(comparison):
    text = markdown(comparison)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    per_table = {line.count("|") for line in lines}
    assert per_table == {13}
    own = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    assert "| 3 of 4; 1 diverged |" in own["attention"]
    assert "| lr=0.001 (of 2) |" in own["conv"]
    assert "parameters" in next(line for line in lines if line.startswith("| row |"))
    assert "tuned over 1, others over 2" in text
    assert comparison.sections[0].headline in text
    assert "fewer than two seeds" in text


def test_latex_is_balanced_and_escaped(comparison):
    text = latex(comparison)
    for name in ("table", "tabular"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}") == 2
    assert "conv-a\\_b" in text
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert {line.replace("\\&", "").count("&") for line in rows} == {11}
    assert not {"±", "−", "×"} & set(text)
    assert text.count("{") == text.count("}")


def test_csv_has_numbers_as_they_are(comparison):
    rows = list(csv.DictReader(io.StringIO(rows_csv(comparison))))
    own = {row["row"]: row for row in rows}
    hedgehog = next(r for r in comparison.sections[1].section.rows if r.name == "hedgehog")
    assert float(own["hedgehog"]["mean"]) == hedgehog.estimate.mean
    assert own["attention"]["reference"] == "hedgehog"
    assert float(own["attention"]["p_holm"]) > float(own["attention"]["p"])
    assert [own["attention"][key] for key in ("n", "runs", "diverged")] == ["3", "4", "1"]
    assert own["conv"]["grid"] == "lr=0.001; lr=0.01"
    runs = list(csv.DictReader(io.StringIO(runs_csv(comparison))))
    assert len(runs) == 12
    assert all(run["command"].startswith("python train.py") for run in runs)
    assert sum(run["test"] == "" for run in runs) == 1


def test_the_caption_says_what_the_numbers_are(comparison):
    text = caption(comparison.sections[1])
    assert "lower is better" in text
    assert "Holm for 3 comparisons" in text
    assert "higher is better" in caption(comparison.sections[0])
    assert [column.title for column in columns(comparison.sections[1])][:3] == [
        "row",
        "token perplexity",
        "n",
    ]
