"""train.py: what a run leaves behind, and what it refuses before it leaves anything."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation import Settings, evaluate
from models.build import build_model
from records.checkpoints import read_checkpoint
from records.folder import RunFolder
from records.points import SWEEP
from schema.errors import ConfigError
from tests.e2e.runs import TINY, start, train_here
from training.errors import TrainingError

SHORT = (*TINY, "trainer.max_steps=10", "trainer.validate_every=5", "trainer.checkpoint_every=5")


def losses(path: Path) -> list[float]:
    return [row["train/loss"] for row in RunFolder.open(path).metrics()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    path = tmp_path_factory.mktemp("run") / "run"
    train_here(*SHORT, f"run_dir={path}")
    return RunFolder.open(path)


def test_the_folder_has_all_of_a_run(run: RunFolder) -> None:
    record = run.record()
    assert record["status"] == "finished"
    assert record["steps"] == 10
    assert record["tokens"] == 10 * 2 * 4 * 16
    assert record["seed"] == 0
    assert record["data"]["splits"]["train"]["examples"] == 60
    assert record["model"]["parameters"] > 0
    assert record["model"]["flops_per_token"] > 0
    assert record["page_faults_per_step"] >= 0
    assert {"versions", "machine", "git", "command", "started", "finished"} <= record.keys()
    assert "${" not in run.config_path.read_text()
    assert run.checkpoints.steps() == [5, 10]
    best = run.checkpoints.best()
    assert best is not None
    assert best.metric == "validation/accuracy"


def test_rows_have_the_columns_that_the_documentation_names(run: RunFolder) -> None:
    rows = run.metrics()
    measured = {
        "step",
        "tokens",
        "train/loss",
        "train/gradient_norm",
        "train/lr",
        "train/tokens_per_second",
    }
    scored = {"validation/accuracy", "validation/accuracy/L16_K2"}
    for row in rows:
        assert row.keys() == (measured | scored if row["step"] % 5 == 0 else measured)
    assert [row["tokens"] for row in rows] == [128 * step for step in range(1, 11)]
    warm_up = [row["train/lr"] for row in rows][:5]
    lr = run.config().optimizer.lr
    assert warm_up == pytest.approx([lr * step / 5 for step in range(1, 6)])


def test_an_untrained_model_starts_at_the_loss_of_guessing(run: RunFolder) -> None:
    # logits of a fresh model with normal(0, 0.02) embeddings are within 0.1 of each other
    assert run.metrics()[0]["train/loss"] == pytest.approx(math.log(32), abs=0.1)


def test_the_checkpoint_is_the_model_that_was_scored(run: RunFolder) -> None:
    task = instantiate(run.config().task)
    task.prepare()
    model = build_model(run.config(), task.vocab_size)
    weights = read_checkpoint(run.checkpoints.path(10))["state_dict"]
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    result = evaluate(model, task, "test", Settings(samples=0, cost=False))
    assert result["slices"] == run.evaluation("mqar")["slices"]


def test_validating_more_often_changes_nothing_in_training(run: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train_here(*SHORT, "trainer.validate_every=1", f"run_dir={path}")
    assert losses(path) == losses(run.path)


def test_logging_seldom_gives_the_mean_of_what_logging_always_gives(
    run: RunFolder, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    train_here(*SHORT, "trainer.log_every=4", f"run_dir={path}")
    rows = [row for row in RunFolder.open(path).metrics() if "train/loss" in row]
    assert [row["step"] for row in rows] == [4, 8, 10]
    every = losses(run.path)
    means = [sum(every[a:b]) / (b - a) for a, b in ((0, 4), (4, 8), (8, 10))]
    # fp32 sums of up to eight micro-batches
    assert [row["train/loss"] for row in rows] == pytest.approx(means, rel=1e-6)


def test_accumulating_is_a_larger_batch(tmp_path: Path) -> None:
    """Two batches of four that one batch of eight consists of, in an epoch they both fill."""
    common = (*SHORT, "task.train=[{seq_len: 16, num_kv_pairs: 2, num_examples: 64}]")
    still = (*common, "model.dropout=0.0")
    train_here(*still, f"run_dir={tmp_path / 'two'}")
    larger = ("task.recipe.batch_size=8", "trainer.accumulate=1")
    train_here(*still, *larger, f"run_dir={tmp_path / 'one'}")
    # the mean of two fp32 means, over ten updates
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_bf16_keeps_the_parameters_in_fp32(run: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train_here(*SHORT, "trainer.precision=bf16", f"run_dir={path}")
    checkpoint = read_checkpoint(RunFolder.open(path).checkpoints.path(10))
    assert {w.dtype for w in checkpoint["state_dict"].values()} == {torch.float32}
    assert losses(path) != losses(run.path)
    # bf16 has 8 bits: 0.4% of each of the few products behind a logit near 0
    assert losses(path) == pytest.approx(losses(run.path), rel=5e-3)
    assert RunFolder.open(path).evaluation("mqar")["model"]["precision"] == "bfloat16"


def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "run"
    options = ("optimizer.lr=1e38", "trainer.log_every=10", "trainer.checkpoint_every=1")
    where = r"the gradients of \d+ of \d+ tensors with .*weight decay, the first \w+"
    with pytest.raises(TrainingError, match=rf"^step \d: .* is not finite: {where}") as error:
        train_here(*SHORT, *options, f"run_dir={path}")
    stopped = RunFolder.open(path)
    record = stopped.record()
    assert record["status"] == "failed"
    assert str(error.value) in record["error"]
    bad = int(str(error.value).split()[1].rstrip(":"))
    assert stopped.checkpoints.steps()[-1] == bad - 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.recipe.batch_size=61", "batch_size=61 .* 60 examples"),
        ("scheduler.warmup_steps=11", "scheduler.warmup_steps=11: allowed: 0 to"),
        ("objective.auxiliary={balance: 0.1}", "objective.auxiliary.balance: no layer reports"),
        ("optimizer.lr=0", "optimizer.lr=0: allowed: above 0"),
    ],
)
def test_what_is_wrong_is_said_before_there_is_a_folder(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_here(*SHORT, override, f"run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_taken(run: RunFolder) -> None:
    with pytest.raises(ConfigError, match="holds a run already"):
        train_here(*SHORT, f"run_dir={run.path}")


def test_without_a_run_dir_the_folder_is_named_by_time_task_and_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_here(*SHORT)
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name.endswith("_mqar_conv-attention")
    assert RunFolder.open(folder).record()["status"] == "finished"


def test_the_results_are_shown_beside_chance(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train_here(*SHORT, f"run_dir={tmp_path / 'run'}")
    said = capsys.readouterr().out
    for part in (
        "weight decay:",
        "FLOPs per token",
        "step 10/10",
        "L16_K2",
        "chance",
        "run folder:",
    ):
        assert part in said


def test_tensorboard_by_one_key(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train_here(*SHORT, "logger=tensorboard", f"run_dir={path}")
    (events,) = path.rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events.parent)).Reload().Scalars("train/loss")
    assert [each.step for each in scalars] == list(range(1, 11))
    assert [each.value for each in scalars] == pytest.approx(losses(path))
    (written,) = RunFolder.open(path).record()["loggers"]
    assert written == {"kind": "TensorBoardLogger", "folder": str(path)}


@pytest.mark.slow
def test_wandb_offline_by_one_key_groups_the_seeds_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three runs of one process: two seeds, and a named group outside of a sweep."""
    monkeypatch.setenv(SWEEP, "widths")
    told = {"a": ["seed=0"], "b": ["seed=1"], "c": ["logger.group=mine"]}
    found = {}
    for name, own in told.items():
        if name == "c":
            monkeypatch.delenv(SWEEP)
        run = tmp_path / name
        train_here(*SHORT, "logger=wandb", *own, f"run_dir={run}")
        assert len(list(run.rglob("offline-run-*/*.wandb"))) == 1
        (found[name],) = RunFolder.open(run).record()["loggers"]
        assert Path(found[name]["folder"]).is_relative_to(run)
    assert found["a"]["group"] == found["b"]["group"] != found["c"]["group"] == "mine"
    assert found["a"]["id"] != found["b"]["id"]
    assert (found["a"]["tags"], found["c"]["tags"]) == (["sweep:widths"], [])


@pytest.mark.slow
def test_compiled_training_follows_eager_training(run: RunFolder, tmp_path: Path) -> None:
    common = (*SHORT, "model.dropout=0.0")  # compiled code draws its dropout in another order
    train_here(*common, f"run_dir={tmp_path / 'eager'}")
    train_here(*common, "compile=true", f"run_dir={tmp_path / 'compiled'}")
    # fused fp32 kernels round elsewhere, over ten updates
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one_of_twice_the_batch(tmp_path: Path) -> None:
    common = (*SHORT, "model.dropout=0.0", "trainer.accumulate=1")
    two, one = tmp_path / "two", tmp_path / "one"
    process = start(*common, "trainer.devices=2", f"run_dir={two}")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert output.count("run folder:") == 1
    train_here(*common, "task.recipe.batch_size=8", f"run_dir={one}")
    # an fp32 mean over two processes instead of one sum
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert RunFolder.open(two).record()["tokens"] == RunFolder.open(one).record()["tokens"]


@pytest.mark.slow
def test_two_processes_resume_with_the_generators_of_each(tmp_path: Path) -> None:
    common = (*SHORT, "trainer.devices=2", "scheduler.total_steps=10")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for arguments in (
        (*common, f"run_dir={whole}"),
        (*common, f"run_dir={parts}", "trainer.max_steps=6"),
        (f"resume={parts}", "trainer.max_steps=10"),
    ):
        process = start(*arguments)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    assert losses(parts) == losses(whole)


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_point_that_diverged(tmp_path: Path) -> None:
    process = start("-m", *SHORT, "optimizer.lr=1e38,1e-3", f"hydra.sweep.dir={tmp_path}")
    output = process.communicate(timeout=300)[0]
    assert process.returncode != 0, output
    runs = [RunFolder.open(path) for path in tmp_path.iterdir() if path.is_dir()]
    status = {run.config().optimizer.lr: run.record()["status"] for run in runs}
    assert status == {1e38: "failed", 1e-3: "finished"}


@pytest.mark.slow
def test_the_command_says_in_one_line_why_a_run_cannot_go_on(tmp_path: Path) -> None:
    process = start(*SHORT, "optimizer.lr=1e38", f"run_dir={tmp_path / 'run'}")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("error: step ")
    assert "Traceback" not in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_cannot_be_tuned_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^callbacks=autotune: there is no GPU to measure on$"):
        train_here(*SHORT, "callbacks=autotune", f"run_dir={tmp_path / 'run'}")
