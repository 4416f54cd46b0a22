"""Whether a composed configuration can work, told before any data is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, get_method, get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from records.folder import RunFolder, check_free
from schema.errors import ConfigError
from schema.groups import SCHEMAS
from schema.names import check_pattern
from schema.types import faults


def check(cfg: DictConfig, config_name: str = "config") -> None:
    """Return when `cfg`, composed from conf/<config_name>.yaml, is one that can be run.

    Every value has the type its group or its constructor says; task, network, objective, optimizer
    and schedule can be built, the network without memory for it. Looks at the configuration only;
    `check_here` looks around.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    values = plain(cfg)
    for line in faults(values, SCHEMAS[config_name], ""):
        raise ConfigError(line)
    if cfg.get("resume") is not None:
        return  # the run has a configuration of its own, of which a few values are replaced
    if cfg.get("task") is not None:
        with _named("task"):
            instantiate(cfg.task)
    if config_name == "eval":
        for key in ("eval", "lm_eval", *(["probe"] if cfg.get("probe") else [])):
            with _named(key):
                instantiate(cfg[key])
    elif config_name == "config":
        check_pattern(values["pattern"], values["mixers"])
        _check_depth(values["pattern"], values["model"]["num_layers"])
        _check_training(cfg)


def check_here(cfg: DictConfig) -> None:
    """Return when this machine has what `cfg` needs: its folders, its data and its device.

    Raises:
        ConfigError: the first thing that is missing.
    """
    for key in ("resume",) if cfg.get("resume") else ("run", "init_from", "objective.teacher"):
        path = OmegaConf.select(cfg, key)
        if path is not None:
            _run_folder(key, path)
    if cfg.get("run_dir") is not None and cfg.resume is None:
        check_free(cfg.run_dir)
    # An evaluation reads one split of its task, which need not have the others.
    if cfg.get("task") is not None and cfg.get("resume") is None and cfg.get("run") is None:
        with _named("task"):
            instantiate(cfg.task).check()
    if "accelerator" not in cfg and "trainer" not in cfg:
        return
    machine, key = (cfg, "") if "accelerator" in cfg else (cfg.trainer, "trainer.")
    if machine.accelerator == "gpu":
        found = torch.accelerator.device_count()
        if found < machine.get("devices", 1):
            raise ConfigError(
                f"{key}accelerator='gpu' with {machine.get('devices', 1)} devices: "
                f"this machine has {found}; {key}accelerator=cpu needs none"
            )


def plain(cfg: DictConfig) -> dict[str, Any]:
    """`cfg` as plain values, references followed.

    Raises:
        ConfigError: a value that has to be given is not, or a reference leads nowhere.
    """
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: missing; give {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        said = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: {said}") from None


def _run_folder(key: str, path: str) -> None:
    try:
        RunFolder.open(path)
    except ConfigError as error:
        raise ConfigError(f"{key}={error}") from None


def _check_depth(pattern: str | list[str], num_layers: int) -> None:
    if isinstance(pattern, list) and not 0 < len(pattern) <= num_layers:
        raise ConfigError(
            f"pattern={pattern}: expected 1 to model.num_layers={num_layers} names; it repeats"
        )


def _check_training(cfg: DictConfig) -> None:
    """Build what trains, the network on torch's device without memory."""
    with torch.device("meta"), _named():
        model = get_method("models.build.build_model")(cfg, vocab_size=1)
        groups = get_object("training.optim.ParameterGroups").of(model)
    needed = get_class(cfg.task._target_).io  # type: ignore[attr-defined]
    if model.io != needed:
        raise ConfigError(f"io={model.io}: this task is for io={needed}")
    with _named("objective"):
        instantiate(cfg.objective)
    with _named("optimizer"):
        instantiate(cfg.optimizer)(groups)
    with _named("scheduler"):
        instantiate(cfg.scheduler)(0)
    if cfg.task.get("documents") == "separate" and not model.supports_segments:
        raise ConfigError(
            "task.documents='separate': a mixer of the pattern does not keep documents apart; "
            "allowed: 'concatenated'"
        )


@contextmanager
def _named(key: str = "") -> Iterator[None]:
    """What a constructor does not allow, as a ConfigError; `key` where it names none itself."""
    try:
        yield
    except (InstantiationException, ValueError, TypeError) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(cause, ConfigError):
            raise cause from None
        if not isinstance(cause, (ValueError, TypeError)):
            raise
        said = " ".join(str(cause).split())
        raise ConfigError(f"{key}: {said}" if key else said) from error
