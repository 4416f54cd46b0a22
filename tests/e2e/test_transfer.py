"""A trained softmax model becomes Hedgehog by configuration alone, stage by stage."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from records.checkpoints import read_checkpoint
from records.folder import RunFolder
from schema.check import check, check_here
from schema.compose import compose
from schema.errors import ConfigError
from tests.e2e.runs import ROOT, train_here, without_timing
from train import train

STEPS = 40
CONVERT = ("pattern=hedgehog", "objective=attention_transfer", "optimizer.lr=1e-2")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def text(place) -> tuple[str, ...]:
    """Options of a tiny task: lines whose last word is their first, for attention to find."""
    words = ["north", "south", "east", "west", "up", "down"]
    lines = [f"{words[i % 6]} is not {words[i * 5 % 6]} but {words[i % 6]}\n" for i in range(900)]
    path = place / "text.txt"
    path.write_text("".join(lines))
    return (
        "task=text",
        f"files=[{path}]",
        "task.tokenizer=bytes",
        "task.seq_len=48",
        "task.recipe.batch_size=8",
        f"data.cache={place / 'cache'}",
        "model.d_model=32",
        "model.num_layers=2",
        "model.num_heads=2",
        "scheduler.warmup_steps=5",
        f"scheduler.total_steps={STEPS}",
        "trainer.validate_every=20",
        "trainer.checkpoint_every=10",
        f"trainer.max_steps={STEPS}",
    )


def run(path: Path, *options: str) -> RunFolder:
    train_here(*options, f"run_dir={path}")
    return RunFolder.open(path)


@pytest.fixture(scope="module")
def teacher(place, text) -> RunFolder:
    return run(place / "teacher", *text, "pattern=attention", "optimizer.lr=1e-2")


@pytest.fixture(scope="module")
def stage_1(place, text, teacher) -> RunFolder:
    return run(place / "one", *text, *CONVERT, f"objective.teacher={teacher.path}")


@pytest.fixture(scope="module")
def stage_2(place, text, stage_1) -> RunFolder:
    options = (*text, *CONVERT, "objective.stage=2", "optimizer.lr=1e-3")
    return run(place / "two", *options, f"init_from={stage_1.path}")


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    newest = run.checkpoints.newest()
    assert newest is not None
    return read_checkpoint(newest)["state_dict"]


def checked_and_trained(*overrides: str) -> None:
    """What the command does."""
    cfg = compose("config", overrides)
    check(cfg)
    check_here(cfg)
    train(cfg, overrides)


def scored(run: RunFolder) -> list[dict[str, float]]:
    return [row for row in run.metrics() if "validation/kl" in row]


def test_stage_1_teaches_the_maps_and_leaves_the_rest(teacher, stage_1):
    before, after = scored(stage_1)[0], scored(stage_1)[-1]
    assert (before["step"], after["step"]) == (0, STEPS)
    assert after["validation/kl"] < before["validation/kl"] / 2
    assert after["validation/token_perplexity"] < before["validation/token_perplexity"]
    assert after["validation/teacher_entropy"] == before["validation/teacher_entropy"]
    theirs, own = weights(teacher), weights(stage_1)
    assert all(torch.equal(own[name], weight) for name, weight in theirs.items())
    assert {name.rpartition(".mixer.")[2] for name in own.keys() - theirs.keys()} == {
        "query_map.weight",
        "key_map.weight",
    }


@pytest.mark.slow
def test_stage_2_goes_on_from_stage_1_and_finetunes_all(teacher, stage_1, stage_2):
    before, after = scored(stage_2)[0], scored(stage_2)[-1]
    best = min(scored(stage_1)[1:], key=lambda row: row["validation/loss"])
    for name in ("validation/kl", "validation/loss"):
        assert before[name] == best[name], "the first step starts where stage 1 was best"
    assert after["validation/token_perplexity"] < before["validation/token_perplexity"]
    start = weights(stage_1)
    for name, weight in weights(stage_2).items():
        assert not torch.equal(weight, start[name]), f"{name} was not finetuned"


def test_the_record_names_where_a_run_comes_from(teacher, stage_1, stage_2):
    newest = teacher.checkpoints.best()
    assert newest is not None
    for each in (stage_1, stage_2):
        named = each.record()["teacher"]
        assert named["run"] == str(teacher.path)
        assert named["checkpoint"] == teacher.checkpoints.path(newest.step).name
        assert len(named["sha256"]) == 64
    assert "init_from" not in stage_1.record()
    assert stage_2.record()["init_from"]["run"] == str(stage_1.path)
    assert "teacher" not in teacher.record()


@pytest.mark.slow
def test_a_resumed_transfer_has_the_same_teacher_and_the_same_numbers(
    place, text, teacher, stage_1
):
    options = (*text, *CONVERT, f"objective.teacher={teacher.path}", "trainer.max_steps=10")
    parts = run(place / "parts", *options)
    record = parts.record()["teacher"]
    parts.update_record(teacher={**record, "sha256": "0" * 64})
    with pytest.raises(ConfigError, match="the teacher is not the one the run began with"):
        train_here(f"resume={parts.path}", f"trainer.max_steps={STEPS}")
    parts.update_record(teacher=record)
    train_here(f"resume={parts.path}", f"trainer.max_steps={STEPS}")
    skipped = {10}  # its last step at first, and so a row with a validation
    rows, expected = (
        [row for row in without_timing(each) if row["step"] not in skipped]
        for each in (parts, stage_1)
    )
    assert rows == expected
    ours, theirs = weights(parts), weights(stage_1)
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_a_run_of_next_tokens_starts_from_another(place, text, stage_1, capsys):
    options = (*text, "pattern=hedgehog", f"init_from={stage_1.path}", "trainer.max_steps=10")
    rows = run(place / "plain", *options).metrics()
    assert rows[0]["step"] == 0
    best = min(scored(stage_1)[1:], key=lambda row: row["validation/loss"])
    assert rows[0]["validation/loss"] == best["validation/loss"]
    assert "validation/kl" not in rows[0]
    assert "step 0/10  validation loss" in capsys.readouterr().out


@pytest.mark.slow
def test_the_window_hybrid_is_converted_and_its_parts_are_scored(place, text, teacher):
    window = ("pattern=hedgehog_window", "mixers.hedgehog_window.window=8")
    options = (*text, *CONVERT, *window, f"objective.teacher={teacher.path}")
    rows = scored(run(place / "window", *options, "trainer.max_steps=20"))
    assert rows[-1]["validation/kl"] < rows[0]["validation/kl"]
    both, *parts = (
        rows[-1][f"validation/{name}_loss"] for name in ("both_parts", "window_only", "linear_only")
    )
    assert both < max(parts)


def test_what_cannot_be_transferred_is_one_line(place, text, teacher, stage_1):
    given = f"objective.teacher={teacher.path}"
    cases = [
        ((*CONVERT,), "objective.teacher=null: stage 1 needs the run folder"),
        ((*CONVERT, "objective.teacher=nowhere"), "objective.teacher=nowhere: there is no such"),
        ((*CONVERT, given, "init_from=nowhere"), "init_from=nowhere: there is no such folder"),
        ((*CONVERT, given, "model.num_heads=4"), "num_heads=4; expected the teacher's 2"),
        ((*CONVERT, given, f"init_from={stage_1.path}"), "init_from=.* with objective.stage=1"),
        ((*CONVERT, "objective.stage=2"), "stage 2 needs init_from="),
        ((*CONVERT, "objective.stage=2", f"init_from={teacher.path}"), "a run without a teacher"),
        (("pattern=mamba", f"init_from={stage_1.path}"), "init_from=.* is of another network"),
        ((*CONVERT, given, "task.tokenizer=word"), "gives another tokeniser than the run's"),
    ]
    for options, message in cases:
        path = place / "refused"
        overrides = (*text, *options, f"run_dir={path}")
        with pytest.raises(ConfigError, match=message) as error:
            checked_and_trained(*overrides)
        assert "\n" not in str(error.value)
        assert not path.exists()


@pytest.mark.slow  # a process of its own
def test_the_command_ends_with_code_2(place, text, teacher):
    options = (*text, *CONVERT, f"objective.teacher={teacher.path}", "pattern=mamba")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *options, f"run_dir={place / 'refused'}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: objective.teacher=")
