"""Two processes train as one does: the same rows, the same losses, the same weights."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from records.checkpoints import read_checkpoint
from records.folder import RunFolder
from schema.errors import ConfigError
from tests.e2e.runs import ROOT, TINY, train_here, wait_for
from tests.tiny import MIXERS, SHORT, tiny_model

STEPS = 20
RUN = (
    *TINY,
    "model.dropout=0",
    "model.num_layers=3",
    f"trainer.max_steps={STEPS}",
    f"scheduler.total_steps={STEPS}",
    "trainer.validate_every=10",
    "mixers.mamba2.head_dim=16",
    # No loss at rows of a sequence that each process draws by itself.
    "mixers.sea.estimation_rows=0",
    "mixers.sea_bidirectional.estimation_rows=0",
    # Adam makes whole steps of gradients that are nothing but rounding, and Hyena's filters more of
    # these: small steps.
    "optimizer.lr=1e-4",
    # Fewer than there are different tokens: centroids on one spot take them by the last bit.
    "mixers.routing.num_clusters=3",
    "mixers.routing_topw.num_clusters=3",
    *(
        f"mixers.{name}.{key}={value}"
        for name, node in SHORT.items()
        for key, value in node.items()
    ),
)
MIXED = "pattern=[conv,routing,attention]"
GROUPS = [MIXERS[i : i + 3] for i in range(0, len(MIXERS), 3)]
HANDED_ON = [  # by a process to the one that has the next part of time
    name
    for name in MIXERS
    if (mixer := tiny_model([name], num_layers=1).mixers[0]).bounded_state
    if mixer.causal == "strict" and not name.startswith("routing")
]
IN_TIME = [HANDED_ON[i : i + 3] for i in range(0, len(HANDED_ON), 3)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(path: Path, *overrides: str, processes: int = 2) -> list[str]:
    """Of some processes, which share the batch that one would have, or its time."""
    batch = 4 if "trainer.strategy=sequence" in overrides else 4 // processes
    return [
        sys.executable, "train.py", *RUN, *overrides, f"run_dir={path}",
        f"trainer.devices={processes}", f"task.recipe.batch_size={batch}",
    ]  # fmt: skip


def together(path: Path, *overrides: str) -> RunFolder:
    """The run of two processes."""
    done = subprocess.run(
        command(path, *overrides), cwd=ROOT, env=ENVIRONMENT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("run folder: ") == 1, "one process speaks for all"
    return RunFolder.open(path)


def assert_same_training(run: RunFolder, other: RunFolder) -> None:
    """Losses and scores to 1e-5; weights and what layers keep to what Adam makes of that."""
    rows, others = run.metrics(), other.metrics()
    assert len(rows) == len(others) == STEPS
    for row, its in zip(rows, others, strict=True):
        assert row.keys() == its.keys()
        assert row["tokens"] == its["tokens"]
        for name in {"train/loss", "validation/accuracy"} & row.keys():
            assert row[name] == pytest.approx(its[name], rel=1e-5, abs=1e-5), (row, its)
        norm = "train/gradient_norm"
        assert row[norm] == pytest.approx(its[norm], rel=1e-2), (row, its)
    ours, theirs = (
        read_checkpoint(each.checkpoints.path(STEPS))["state_dict"] for each in (run, other)
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
        else:
            assert torch.equal(value, theirs[name]), name


def check(tmp_path: Path, pattern: list[str], *strategies: str) -> None:
    told = f"pattern=[{','.join(pattern)}]"
    train_here(*RUN, told, f"run_dir={tmp_path / 'one'}")
    for strategy in strategies:
        run = together(tmp_path / strategy, told, f"trainer.strategy={strategy}")
        assert_same_training(run, RunFolder.open(tmp_path / "one"))


def test_attention_convolution_and_centroids(tmp_path: Path) -> None:
    check(tmp_path, ["conv", "routing", "attention"], "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", GROUPS, ids="-".join)
def test_every_mixer(tmp_path: Path, pattern: list[str]) -> None:
    check(tmp_path, pattern, "ddp", "fsdp")


def test_processes_that_divide_time(tmp_path: Path) -> None:
    check(tmp_path, ["conv", "hedgehog", "mamba"], "sequence")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", IN_TIME, ids="-".join)
def test_every_mixer_whose_state_is_handed_on(tmp_path: Path, pattern: list[str]) -> None:
    check(tmp_path, pattern, "sequence")


@pytest.mark.slow
def test_a_run_in_parts_of_time_goes_on_in_one_process(tmp_path: Path) -> None:
    told = ("pattern=[conv,mamba2]", "trainer.strategy=sequence")
    whole = together(tmp_path / "whole", *told)
    run = together(tmp_path / "run", *told, "trainer.max_steps=10")
    resume = (f"resume={run.path}", "trainer.strategy=ddp", "trainer.devices=1")
    train_here(*resume, f"trainer.max_steps={STEPS}", f"scheduler.total_steps={STEPS}")
    assert_same_training(run, whole)


def test_a_batch_stays_what_it_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_here(*RUN, "pattern=conv", "trainer.max_steps=10", f"run_dir={run}")
    with pytest.raises(ConfigError, match=r"devices=2: a batch would be of 2 shares .* expected 1"):
        train_here(f"resume={run}", "trainer.devices=2", f"trainer.max_steps={STEPS}")


SEQUENCE = ("trainer.strategy=sequence", "trainer.devices=2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pattern=[conv,attention]"], "Attention has no state of bounded size to hand on"),
        (["pattern=routing"], "RoutingAttention learns from what all processes see"),
        (["pattern=mamba", "compile=true"], "with compile=true"),
        (
            ["pattern=mamba", "trainer.devices=3"],
            "16 tokens on trainer.devices=3 processes; expected a multiple",
        ),
    ],
)
def test_what_cannot_be_divided_in_time(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^trainer.strategy=sequence.*{message}"):
        train_here(*RUN, *SEQUENCE, *overrides, f"run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategies", [("ddp", "fsdp"), ("fsdp", "ddp")], ids="-".join)
def test_one_strategy_goes_on_from_the_others_checkpoint(
    tmp_path: Path, strategies: tuple[str, str]
) -> None:
    first, second = strategies
    whole = together(tmp_path / "whole", MIXED, f"trainer.strategy={first}")
    half = (f"trainer.strategy={first}", "trainer.max_steps=10")
    run = together(tmp_path / "run", MIXED, *half)
    told = [f"resume={run.path}", f"trainer.strategy={second}", f"trainer.max_steps={STEPS}"]
    done = subprocess.run(
        [sys.executable, "train.py", *told, f"scheduler.total_steps={STEPS}"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_training(run, whole)
    ours, theirs = (
        read_checkpoint(each.checkpoints.path(STEPS))["optimizer_states"][0]["state"]
        for each in (run, whole)
    )
    assert ours.keys() == theirs.keys()
    for number, state in ours.items():
        for name, value in state.items():
            torch.testing.assert_close(value, theirs[number][name], rtol=1e-2, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_of_two_is_evaluated_by_one(tmp_path: Path, strategy: str) -> None:
    """A checkpoint has one layout, however many processes wrote it."""
    run = together(tmp_path / "run", MIXED, f"trainer.strategy={strategy}")
    scored = run.evaluation("mqar")["slices"]
    done = subprocess.run(
        [sys.executable, "eval.py", f"run={run.path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.evaluation("mqar")["slices"] == scored


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_process_ends_the_run_which_goes_on(tmp_path: Path, number: int) -> None:
    whole = together(tmp_path / "whole", MIXED)
    path = tmp_path / "run"
    process = subprocess.Popen(
        command(path, MIXED), cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(RunFolder(path).checkpoints.path(10), process)
    os.kill(processes(path)[number], signal.SIGKILL)
    process.wait(timeout=60)
    deadline = time.monotonic() + 60
    while processes(path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes(path), "the other one has ended too"
    done = subprocess.run(
        [sys.executable, "train.py", f"resume={path}"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_training(RunFolder.open(path), whole)


def processes(path: Path) -> list[int]:
    """Those that train the run at `path`, the first one first."""
    found = subprocess.run(["pgrep", "-f", f"run_dir={path}"], capture_output=True, text=True)
    return sorted(int(pid) for pid in found.stdout.split())
