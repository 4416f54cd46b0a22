"""metrics.csv: rows, new columns, interrupted writers, resumed runs."""

import math
from pathlib import Path

import pytest

from records.metrics import MetricsFile, read_metrics


def test_values_read_back_exactly_and_missing_ones_are_missing(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.append(1, {"loss": 1 / 3, "tokens": 7})
    file.append(2, {"loss": math.inf})
    assert read_metrics(file.path) == [
        {"step": 1.0, "loss": 1 / 3, "tokens": 7.0},
        {"step": 2.0, "loss": math.inf},
    ]


def test_a_new_column_joins_the_header_and_keeps_the_rows(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.append(1, {"loss": 2.0})
    file.append(2, {"loss": 1.0, "validation/loss": 3.0})
    file.append(3, {"loss": 0.5})
    assert file.path.read_text() == "step,loss,validation/loss\n1,2.0,\n2,1.0,3.0\n3,0.5,\n"


def test_a_step_cannot_be_written_twice(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.append(5, {"loss": 2.0})
    with pytest.raises(ValueError, match="has step 5 already; got 5"):
        file.append(5, {"loss": 2.0})


def test_resuming_drops_later_rows_and_a_half_written_one(tmp_path: Path) -> None:
    whole, cut = MetricsFile(tmp_path / "whole.csv"), MetricsFile(tmp_path / "cut.csv")
    rows = [{"loss": 1 / step, "v": step / 7} if step == 4 else {"loss": 1 / step} for step in
            range(1, 7)]  # fmt: skip
    for step, row in enumerate(rows, 1):
        whole.append(step, row)
        if step <= 5:
            cut.append(step, row)
    with cut.path.open("a") as file:
        file.write("6,0.16")
    assert [row["step"] for row in read_metrics(cut.path)] == [1, 2, 3, 4, 5]
    resumed = MetricsFile(cut.path, after_step=3)
    assert resumed.last_step == 3
    for step, row in enumerate(rows[3:], 4):
        resumed.append(step, row)
    assert cut.path.read_text() == whole.path.read_text()
