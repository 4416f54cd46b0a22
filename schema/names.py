"""How a wrong name is answered: with the nearest valid one and with all that are allowed.

Imports nothing heavy, so that the answer is quick.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from schema.errors import ConfigError


def suggest(name: str, allowed: Iterable[object]) -> str:
    """`did you mean x? allowed: x, y, z`, the question only where a name is near.

    >>> suggest("hedghog", ["attention", "hedgehog"])
    'did you mean hedgehog? allowed: attention, hedgehog'
    """
    names = sorted(str(each) for each in allowed)
    by_folded = {each.casefold(): each for each in names}
    near = get_close_matches(name.casefold(), by_folded, n=1)
    question = f"did you mean {by_folded[near[0]]}? " if near else ""
    return f"{question}allowed: {', '.join(names) or 'nothing'}"


def check_pattern(pattern: str | Iterable[object], mixers: Iterable[str]) -> None:
    """Return when every name in `pattern`, one or a list, is one of `mixers`.

    Raises:
        ConfigError: a name that is not.
    """
    for name in [pattern] if isinstance(pattern, str) else pattern:
        if isinstance(name, str) and name not in mixers:
            raise ConfigError(f"pattern={pattern}: no mixer {name!r}; {suggest(name, mixers)}")
