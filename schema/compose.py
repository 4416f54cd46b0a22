"""Configurations from the files of conf/, and Hydra's exceptions as one line each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from schema.errors import ConfigError
from schema.names import suggest
from schema.types import HYDRA_KEYS

CONF = Path(__file__).resolve().parents[1] / "conf"
VERSION_BASE = "1.3"


def compose(config_name: str = "config", overrides: Sequence[str] = ()) -> DictConfig:
    """What the command line `overrides` makes of conf/<config_name>.yaml; values are unchecked.

    Raises:
        ConfigError: an override that cannot be read, or that names an unknown key or choice.
    """
    return _without_hydra(compose_with_hydra(config_name, overrides))


def compose_with_hydra(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """As `compose`, with Hydra's own settings under the key hydra."""
    with _initialised():
        try:
            return hydra.compose(config_name, list(overrides), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(_diagnose(config_name, overrides, error)) from error


def compose_all(
    config_name: str, overrides: Sequence[str], multirun: bool = False
) -> Iterator[DictConfig]:
    """Every configuration that a command line asks for: one, or one for each point of a sweep.

    A sweep that is not Hydra's grid draws its points itself, one after the other: of such a one
    only what all points share is composed.
    """
    with _initialised() as loader:
        parsed = _parse(overrides, loader)
    if config_name == "eval":
        _refuse_network(parsed)
    swept = [each for each in parsed if each.is_sweep_override()]
    shared = [str(each.input_line) for each in parsed if not each.is_sweep_override()]
    base = compose_with_hydra(config_name, shared)
    if not (multirun or base.hydra.mode is RunMode.MULTIRUN):
        if swept:
            raise ConfigError(
                f"{swept[0].input_line}: several values; -m runs each of them, "
                f"{swept[0].key_or_group}=[...] is one list"
            )
        yield _without_hydra(base)
    elif base.hydra.sweeper._target_.endswith(".BasicSweeper"):
        grid = [f"{key}={value}" for key, value in (base.hydra.sweeper.params or {}).items()]
        for point in _grid([*grid, *overrides]):
            yield compose(config_name, point)
    else:
        yield _without_hydra(base)


def register_mixers() -> None:
    """Put every file of conf/mixer/ at mixers.<name>, whichever of them the pattern names."""
    names = sorted(path.stem for path in (CONF / "mixer").glob("*.yaml"))
    defaults = [{f"mixer@mixers.{name}": name} for name in names]
    ConfigStore.instance().store("every_mixer", {"defaults": defaults})


def _without_hydra(cfg: DictConfig) -> DictConfig:
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


@contextmanager
def _initialised() -> Iterator[ConfigLoader]:
    register_mixers()
    # A command that composes further configurations runs inside a Hydra of its own.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base=VERSION_BASE):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


def _parse(overrides: Sequence[str], loader: ConfigLoader) -> list[Override]:
    parser = OverridesParser.create(config_loader=loader)
    parsed = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException:
            parsed.append(None)
        if not (parsed[-1] and parsed[-1].key_or_group):
            raise ConfigError(
                f"{text!r} cannot be read as an override: expected key=value; quote the whole "
                "for the shell, and inside it any value with spaces or commas"
            )
    return parsed


def _refuse_network(overrides: Sequence[Override]) -> None:
    """eval.yaml has these groups only because a task chooses among them."""
    for each in overrides:
        if each.key_or_group.split(".")[0] in ("model", "channel_mixer", "io"):
            raise ConfigError(f"{each.input_line}: eval.py takes the network of the run as it is")


def _grid(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of every point, in Hydra's order; a later override of a key replaces it."""
    with _initialised() as loader:
        parsed = _parse(overrides, loader)
    choices: dict[str, list[str]] = {}
    for each in parsed:
        key = each.get_key_element()
        if each.is_sweep_override():
            choices[key] = [f"{key}={value}" for value in each.sweep_string_iterator()]
        else:
            choices[key] = [f"{key}={each.get_value_element_as_str()}"]
    yield from map(list, product(*choices.values()))


def _diagnose(config_name: str, overrides: Sequence[str], error: Exception) -> str:
    """Which override is to blame for `error`, in one line; called inside an initialised Hydra."""
    loader = GlobalHydra.instance().config_loader()
    choices, values = [], []
    for each in _parse(overrides, loader):
        options = loader.get_group_options(each.key_or_group)
        if not options:
            values.append(each)
            continue
        wrong = [o for o in _chosen(each) if o not in options]
        if wrong:
            line = f"{each.key_or_group}={wrong[0]}: no such choice; {suggest(wrong[0], options)}"
            extra = each.key_or_group == "hydra/launcher"
            return f"{line}; seqmix[sweep] installs joblib and submitit" if extra else line
        choices.append(each.input_line)
    try:
        base = hydra.compose(config_name, choices, return_hydra_config=True)
    except HydraException as deeper:
        return " ".join(str(deeper).split())
    for each in values:
        if each.is_add() or each.is_force_add():
            continue
        line = _unknown(base, each)
        if line:
            return line
    return " ".join(str(error).split())


def _chosen(override: Override) -> list[str]:
    value = override.value()
    values = value if isinstance(value, list) else [value]
    return ["null" if each is None else str(each) for each in values]


def _unknown(base: DictConfig, override: Override) -> str | None:
    """The line about the first part of the override's key that `base` does not have."""
    node = OmegaConf.to_container(base, resolve=False)
    parts = override.key_or_group.split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, dict) and part in node:
            node = node[part]
            continue
        allowed = set(node) - HYDRA_KEYS if isinstance(node, dict) else set()
        if depth == 0:
            allowed |= {group for group in base.hydra.runtime.choices if group.isidentifier()}
        which = "key" if depth == len(parts) - 1 else f"key {'.'.join(parts[: depth + 1])}"
        return f"{override.input_line}: unknown {which}; {suggest(part, allowed)}"
    return None
