"""Going on with a run: what may be changed, where it starts, and that its data are the same."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from records.checkpoints import step_of
from records.folder import RunFolder, now
from records.machine import machine, versions
from schema.errors import ConfigError
from training.data import share_of
from training.scores import scores

# What a resumed run may be given anew: its length and what it says and keeps, never what decides
# the numbers of the steps already made.
CHANGEABLE = (
    "trainer.max_steps",
    "trainer.strategy",
    "trainer.devices",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    "trainer.num_workers",
    "trainer.keep_pages",
    "scheduler.total_steps",
    "logger",
)


@dataclass(frozen=True)
class Resumed:
    """A run to go on with: its configuration, and the checkpoint (None: from its start)."""

    folder: RunFolder
    cfg: DictConfig
    checkpoint: Path | None

    @property
    def step(self) -> int:
        """Steps made before."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)

    @property
    def scores(self) -> dict[str, float]:
        """Of the evaluation that ended the run."""
        return scores(self.folder.evaluation(self.folder.record()["data"]["name"]))

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        done = self.folder.record()["status"] == "finished"
        return done and self.step >= self.cfg.trainer.max_steps


def open_run(cfg: DictConfig, overrides: Sequence[str]) -> Resumed:
    """The run at cfg.resume, with those of its options replaced that `overrides` name.

    Args:
        cfg: what the command line composed to; the new values are taken from it.
        overrides: the command line, key=value each.

    Raises:
        ConfigError: there is no run, an override is not among CHANGEABLE, max_steps lies before
            the checkpoint, or a batch would be another.
    """
    folder = RunFolder.open(cfg.resume)
    own = folder.config()
    shares = share_of(own.trainer).world_size
    given = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    for key in _changed(overrides):
        OmegaConf.update(own, key, OmegaConf.select(given, key), merge=False)
    resumed = Resumed(folder, own, folder.checkpoints.newest())
    if resumed.step > own.trainer.max_steps:
        raise ConfigError(
            f"trainer.max_steps={own.trainer.max_steps}: the run has made {resumed.step} steps; "
            "allowed: at least as many"
        )
    if share_of(own.trainer).world_size != shares:
        raise ConfigError(
            f"trainer.strategy={own.trainer.strategy} with trainer.devices={own.trainer.devices}: "
            f"a batch would be of {share_of(own.trainer).world_size} shares of examples; expected "
            f"{shares}, as in the run"
        )
    return resumed


def check_data(folder: RunFolder, facts: dict[str, Any]) -> None:
    """Return when the data is what the run was trained on.

    Raises:
        ConfigError: a split differs from the one in the run's record.
    """
    recorded = folder.record()["data"]["splits"]
    for split, found in facts["splits"].items():
        if json.loads(json.dumps(found)) != recorded.get(split):
            raise ConfigError(
                f"resume={folder.path}: the {split} data is not what the run was trained on; "
                f"expected {recorded.get(split)}, found {found}"
            )


def differences(record: dict[str, Any]) -> Iterator[str]:
    """A line for each thing that may round otherwise here than where the run was started."""
    here = {**versions(), **{key: machine()[key] for key in ("cpu", "threads", "accelerators")}}
    there = {**record["versions"], **record["machine"]}
    for key in ("torch", "cpu", "threads", "accelerators"):
        if here.get(key) != there.get(key):
            yield (
                f"{key} is {here.get(key)}, was {there.get(key)} when the run started: its numbers "
                "may differ in their last bits from those of a run that was not stopped"
            )


def reopen(resumed: Resumed) -> RunFolder:
    """The folder, made ready to be written on from the checkpoint."""
    folder = resumed.folder
    folder.write_config(resumed.cfg)
    folder.checkpoints.forget_after(resumed.step)
    history = folder.record().get("resumed_from", [])
    folder.update_record(
        status="running",
        finished=None,
        resumed_from=[*history, {"step": resumed.step, "at": now()}],
    )
    return folder


def _changed(overrides: Sequence[str]) -> list[str]:
    """Keys that the overrides name, all of them changeable."""
    keys = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key == "resume":
            continue
        if key not in CHANGEABLE and key.split(".")[0] not in CHANGEABLE:
            raise ConfigError(
                f"{override.input_line}: a resumed run keeps its configuration; allowed with "
                f"resume: {', '.join(CHANGEABLE)}"
            )
        keys.append(key)
    return keys
