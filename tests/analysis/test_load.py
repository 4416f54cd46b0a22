"""Reading folders that are whole, half and not there."""

import pytest

from analysis.load import load
from schema.errors import ConfigError
from tests.analysis.sweeps import recall_evaluation, text_evaluation, write_point, write_run


def test_every_run_below_is_found_in_the_order_of_its_path(tmp_path):
    for name in ("b/1", "a", "b/0"):
        write_run(tmp_path / name, "conv", 0, text_evaluation(3.0))
    (tmp_path / "b" / "report").mkdir()
    (tmp_path / "b" / "report" / "report.html").write_text("")
    loaded = load([str(tmp_path)])
    assert [run.path for run in loaded.runs] == [tmp_path / n for n in ("a", "b/0", "b/1")]
    assert loaded.problems == []
    assert loaded.runs[0].config["model.d_model"] == 64
    assert len(load([str(tmp_path / "b"), str(tmp_path / "*")]).runs) == 3  # each once


def test_what_is_wrong_with_a_folder_is_one_line_and_the_rest_is_read(tmp_path):
    write_run(tmp_path / "whole", "conv", 0, text_evaluation(3.0))
    (tmp_path / "empty").mkdir()
    half = write_run(tmp_path / "half", "conv", 1, text_evaluation(3.0))
    half.record_path.unlink()
    torn = write_run(tmp_path / "torn", "conv", 2, text_evaluation(3.0))
    torn.record_path.write_text('{"status": "fini')
    config = write_run(tmp_path / "yaml", "conv", 3, text_evaluation(3.0))
    config.config_path.write_text("a: [")
    scores = write_run(tmp_path / "scores", "conv", 4, text_evaluation(3.0))
    (scores.path / "eval" / "text.json").write_text("")
    write_run(tmp_path / "unscored", "conv", 5, None)
    loaded = load([str(tmp_path)])
    lines = {line.split(":")[0].rpartition("/")[2]: line for line in loaded.problems}
    assert lines.keys() == {"empty", "half", "torn", "yaml", "scores", "unscored"}
    assert "left out, it is empty" in lines["empty"]
    assert "it has no run.json" in lines["half"]
    assert "no result, it was not evaluated on the test split" in lines["unscored"]
    assert all("\n" not in line for line in loaded.problems)
    assert [run.seed for run in loaded.runs] == [5, 0]


def test_how_a_run_ended(tmp_path):
    nan = float("nan")
    cases = {
        "diverged": {"status": "failed", "error": "TrainingError: step 30", "losses": [6, 5, nan]},
        "said": {"status": "failed", "error": "step 3: loss or gradient is not finite"},
        "failed": {"status": "failed", "error": "OutOfMemoryError:\n no memory"},
        "stopped": {"status": "stopped"},
    }
    for name, how in cases.items():
        write_run(tmp_path / name, "conv", 0, None, **how)
    runs = {run.path.name: run for run in load([str(tmp_path)]).runs}
    assert {name for name, run in runs.items() if run.diverged} == {"diverged", "said"}
    assert runs["failed"].failure == "failed: OutOfMemoryError: no memory"
    assert runs["stopped"].failure == "not finished: its status is stopped"


def test_points_of_a_sweep(tmp_path):
    """One that was killed while its run went on, one that left no run, one that is done."""
    write_run(tmp_path / "0", "conv", 0, None, status="running")
    write_point(tmp_path / "0", "failed", "killed by signal 9", ["pattern=conv", "seed=0"])
    write_point(tmp_path / "1", "failed", "ImportError:\nno such thing", ["pattern=conv", "seed=1"])
    write_run(tmp_path / "2", "conv", 2, text_evaluation(3.0))
    write_point(tmp_path / "2", "finished", None, ["pattern=conv", "seed=2"])
    loaded = load([str(tmp_path)])
    assert [run.failure for run in loaded.runs] == ["failed: killed by signal 9", ""]
    assert loaded.lost[0].overrides == ("pattern=conv", "seed=1")
    assert loaded.lost[0].failure == "failed: ImportError: no such thing"


def test_only_the_test_of_the_own_task_counts(tmp_path):
    run = write_run(tmp_path / "run", "conv", 0, text_evaluation(3.0))
    run.write_evaluation("text_validation", {**text_evaluation(2.0), "split": "validation"})
    run.write_evaluation("mqar", recall_evaluation(0.5))
    (found,) = load([str(tmp_path)]).runs
    assert found.evaluation is not None
    assert (found.evaluation["task"], found.evaluation["split"]) == ("text", "test")


def test_nothing_to_read(tmp_path):
    with pytest.raises(ConfigError, match=r"runs=.*nowhere: there is no such folder"):
        load([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match=r"there is no run in it; .*: left out, it is empty"):
        load([str(tmp_path)])
