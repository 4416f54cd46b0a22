"""The slices of a recall task, from the plain mappings of a configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, get_type_hints

from schema.errors import ConfigError
from schema.types import faults, unknown_key
from tasks.recall.difficulty import Difficulty

_OWN = {"num_examples": int, "stage": int | None}  # keys of a slice beside its difficulty's


@dataclass(frozen=True)
class Slice:
    """Examples of one difficulty.

    Attributes:
        name: of the difficulty, made of the options that the slice itself gives: "L32_K4".
        config: the difficulty.
        given: the options that the slice itself gives.
        num_examples: how many.
        stage: of a curriculum. The training set shows the stages in ascending order and mixes the
            slices of a stage. Given for every slice or for none: then each is a stage of its own.
    """

    name: str
    config: Difficulty
    given: Mapping[str, Any]
    num_examples: int
    stage: int | None = None

    def facts(self) -> dict[str, Any]:
        """For the run's record."""
        return {
            **self.given,
            "num_examples": self.num_examples,
            "stage": self.stage,
            "name": self.name,
            "chance": self.config.chance,
        }


def read_slices(
    difficulty: type[Difficulty],
    slices: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    key: str,
) -> list[Slice]:
    """The slices that a configuration gives under `key`, with the `options` of all.

    Raises:
        ConfigError: an option that is unknown, missing, of a wrong type or out of its range; no
            slice, or a stage for some only.
    """
    hints = get_type_hints(difficulty)
    known = {f.name: hints[f.name] for f in fields(difficulty) if f.init}  # type: ignore[arg-type]
    _check_keys(options, known, "task")
    if not slices:
        raise ConfigError(f"{key}=[]: expected at least one slice")
    read = [_read(difficulty, each, options, known, f"{key}[{i}]") for i, each in enumerate(slices)]
    if len({each.stage is None for each in read}) > 1:
        raise ConfigError(f"{key}: expected a stage for every slice or for none")
    return read


def _read(
    difficulty: type[Difficulty],
    values: Mapping[str, Any],
    options: Mapping[str, Any],
    known: Mapping[str, Any],
    key: str,
) -> Slice:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key}={values!r}: expected a mapping")
    _check_keys(values, {**known, **_OWN}, key)
    given = {name: values[name] for name in known if name in values}
    needed = [f.name for f in fields(difficulty) if f.init and f.default is MISSING]  # type: ignore
    for name in needed:
        if name not in given and name not in options:
            raise ConfigError(f"{key}.{name}: missing")
    if "num_examples" not in values:
        raise ConfigError(f"{key}.num_examples: missing")
    if values["num_examples"] < 1:
        raise ConfigError(f"{key}.num_examples={values['num_examples']}: expected at least 1")
    config = _made(difficulty, {**options, **given}, key)
    return Slice(
        _name(difficulty, given), config, given, values["num_examples"], values.get("stage")
    )


def changed(each: Slice, options: Mapping[str, Any], changes: Mapping[str, Any], key: str) -> Slice:
    """`each` with some options of its difficulty replaced.

    Raises:
        ConfigError: no example can have these; begins with `key`.
    """
    difficulty = type(each.config)
    given = {**each.given, **changes}
    config = _made(difficulty, {**options, **given}, key)
    return replace(each, name=_name(difficulty, given), config=config, given=given)


def _made(difficulty: type[Difficulty], options: Mapping[str, Any], key: str) -> Difficulty:
    try:
        return difficulty(**options)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _name(difficulty: type[Difficulty], given: Mapping[str, Any]) -> str:
    return "_".join(f"{difficulty.letters.get(n, n)}{_text(given[n])}" for n in given)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_keys(values: Mapping[str, Any], hints: Mapping[str, Any], key: str) -> None:
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(unknown_key(f"{key}.{name}", value, list(hints)))
        for line in faults(value, hints[name], f"{key}.{name}"):
            raise ConfigError(line)
