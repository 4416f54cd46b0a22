"""The longest sequence that a model says it can read."""

from models.interface import TokenModel
from schema.errors import ConfigError


def longest(model: TokenModel) -> int | None:
    """Positions that a document may have at most; None where no layer sets a bound.

    A layer sets one by `max_len` when it refuses, rather than forgets, what lies beyond.
    """
    bounds = [m.max_len for m in model.modules() if getattr(m, "beyond", "") == "refuse"]
    return min(bounds, default=None)  # type: ignore[type-var, return-value]


def check_length(model: TokenModel, length: int, key: str) -> None:
    """Return when `model` can read `length` positions.

    Raises:
        ConfigError: it has declared that it cannot; `key` says what would be so long.
    """
    bound = longest(model)
    if bound is not None and length > bound:
        raise ConfigError(f"{key}: {length} positions; this model reads {bound} at most")
