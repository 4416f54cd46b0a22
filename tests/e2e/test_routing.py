"""A run whose layers keep centroids: they move once per update, and resume to the bit."""

from pathlib import Path

import pytest
import torch

from layers.kmeans_router import KMeansRouter
from records.checkpoints import read_checkpoint
from records.folder import RunFolder
from tests.e2e.runs import TINY, assert_same, start, train_here, without_timing

STEPS = 8
ROUTING = (
    *TINY,  # two micro-batches a step
    "pattern=[routing,routing_topw]",
    "mixers.routing={num_clusters: 3, window: 4, decay: 0.5}",
    "mixers.routing_topw={num_clusters: 3, window: 4, decay: 0.5, update: unit_ema}",
    f"scheduler.total_steps={STEPS}",
    f"trainer.max_steps={STEPS}",
    f"trainer.validate_every={STEPS}",
    "trainer.checkpoint_every=2",
)


def weights(path: Path, step: int) -> dict[str, torch.Tensor]:
    return read_checkpoint(RunFolder.open(path).checkpoints.path(step))["state_dict"]


def test_resumed_centroids_are_those_of_a_run_that_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = 0
    after_step = KMeansRouter.after_step

    def counted(self: KMeansRouter) -> None:
        nonlocal updates
        updates += 1
        after_step(self)

    monkeypatch.setattr(KMeansRouter, "after_step", counted)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_here(*ROUTING, f"run_dir={whole}")
    assert updates == 2 * STEPS, "two layers, once per update of the parameters"
    train_here(*ROUTING, f"run_dir={parts}", "trainer.max_steps=4")
    train_here(f"resume={parts}", f"trainer.max_steps={STEPS}")
    assert_same(weights(parts, STEPS), weights(whole, STEPS), "state_dict")
    ours, theirs = (without_timing(RunFolder.open(each)) for each in (parts, whole))
    losses = [[row["train/loss"] for row in rows] for rows in (ours, theirs)]
    assert losses[0] == losses[1]
    name = "model.blocks.0.mixer.router.centroids"
    assert not torch.equal(weights(parts, 4)[name], weights(parts, STEPS)[name])
    assert {"layer/block1/in_no_cluster", "train/commitment"} <= ours[-1].keys()


@pytest.mark.slow
def test_two_processes_count_the_tokens_of_both_and_of_every_micro_batch(tmp_path: Path) -> None:
    """One cluster that remembers nothing: its count is the number of tokens of the last update."""
    path = tmp_path / "run"
    options = ("pattern=[routing,conv]", "mixers.routing={num_clusters: 1, decay: 0.0}")
    process = start(*ROUTING, *options, "trainer.devices=2", f"run_dir={path}")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    counts = weights(path, STEPS)["model.blocks.0.mixer.router.mean_counts"]
    assert counts.unique().item() == 2 * 2 * 4 * 16
