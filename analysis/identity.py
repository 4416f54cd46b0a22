"""Which runs are the same configuration under other seeds, and what to call it."""

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

# What does not change what a run computes or what it is meant to show.
_APART = {"seed", "run_dir", "resume", "files"}
_APART_PREFIXES = (
    "data.",
    "logger.",
    "callbacks.",
    "hydra.",
    "trainer.num_workers",
    "trainer.keep_",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.threads",
    "task.cache",
    "task.corpus.files",  # the hash of the data says what was read from where
    "task.corpus.root",
    # Defaults of the optimizer, the schedule and the trainer, which say themselves what they took.
    "task.recipe.lr",
    "task.recipe.max_steps",
    "task.recipe.warmup_steps",
    "task.recipe.eval_interval",
)


def identity(config: Mapping[str, Any], tuned: Iterable[str]) -> dict[str, Hashable]:
    """The keys of a flat `config` that make a row, with values that can be compared.

    Left out are the seed, the `tuned` keys, mixers that the pattern does not name, and what says
    where and how a run is done and not what it is.
    """
    names = _names(config)
    tuned = set(tuned)

    def belongs(key: str) -> bool:
        if key in tuned or key in _APART or key.startswith(_APART_PREFIXES):
            return False
        parts = key.split(".")
        return parts[0] != "mixers" or len(parts) < 2 or parts[1] in names

    return {key: plain(value) for key, value in config.items() if belongs(key)}


def row_names(identities: Sequence[Mapping[str, Hashable]]) -> list[str]:
    """A short name for each: its pattern, and whatever else tells rows of one pattern apart."""
    patterns = [_pattern(each) for each in identities]
    names = []
    for own, pattern in zip(identities, patterns, strict=True):
        same = [i for i, p in zip(identities, patterns, strict=True) if p == pattern]
        keys = differing(same)
        names.append(" ".join([pattern, *(f"{key}={own.get(key)}" for key in keys)]))
    return names


def differing(identities: Sequence[Mapping[str, Hashable]]) -> list[str]:
    """Keys that are not the same in all, one for each set of keys that go together.

    A width that is an option of the model and, by reference, of its mixers, is one difference.
    """
    keys = sorted({k for each in identities for k in each}, key=lambda k: (k.count("."), k))
    seen: dict[tuple, str] = {}
    for key in keys:
        values = tuple(each.get(key) for each in identities)
        if any(value != values[0] for value in values):
            seen.setdefault(values, key)
    return list(seen.values())


def plain(value: Any) -> Hashable:
    """A value as it is written: what can be compared, hashed and shown."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _names(config: Mapping[str, Any]) -> set[str]:
    pattern = config.get("pattern", [])
    return {pattern} if isinstance(pattern, str) else set(pattern)


def _pattern(identity: Mapping[str, Hashable]) -> str:
    pattern = identity.get("pattern", "?")
    if isinstance(pattern, str) and pattern.startswith("["):
        return "-".join(json.loads(pattern))
    return str(pattern)
