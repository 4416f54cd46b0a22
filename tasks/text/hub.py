"""WikiText through the `datasets` library: from its cache, else from the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from tasks.base import Split

REPOSITORY = "Salesforce/wikitext"
_TIMEOUT = 5.0  # seconds for the one question whether the hub can be reached


class UnavailableError(Exception):
    """Neither the library's cache nor the hub has the corpus; the message says why."""


def check(config: str) -> None:
    """Look whether a configuration of the repository can be loaded, without loading it.

    Raises:
        UnavailableError: it cannot.
    """
    _open(config)


def rows(config: str, split: Split) -> Iterator[str]:
    """The lines of a split with their ends; the empty lines of the official files are "" here.

    Raises:
        UnavailableError: see `check`.
    """
    import datasets

    with _offline(_open(config)):
        data: Any = datasets.load_dataset(REPOSITORY, config, split=split)
    for batch in data.iter(batch_size=1024):
        yield from batch["text"]


@cache
def _open(config: str) -> bool:
    """Whether the library's cache has it; if not, the hub does."""
    # Imported here since it takes a second or two, and most runs do without.
    import datasets
    import huggingface_hub

    try:
        with _offline(True):
            datasets.load_dataset_builder(REPOSITORY, config)
        return True
    except (OSError, ValueError):  # not cached, or another configuration of it is
        pass
    try:
        # One question with a short limit first: the library itself retries for half a minute.
        huggingface_hub.HfApi().dataset_info(REPOSITORY, timeout=_TIMEOUT)
        datasets.load_dataset_builder(REPOSITORY, config)
    except Exception as error:  # whatever the network stack raises: it cannot be loaded
        raise UnavailableError(
            f"not in its cache, and the hub cannot be reached ({' '.join(str(error).split())})"
        ) from error
    return False


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Keep `datasets` from asking the hub, and from warning that it does not.

    Its environment variable for this counts at import only.
    """
    from datasets import config, logging
    from huggingface_hub import constants

    if not wanted:
        yield
        return
    switches = (config, "HF_HUB_OFFLINE"), (constants, "HF_HUB_OFFLINE")
    before = [getattr(module, name) for module, name in switches]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    for module, name in switches:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)
        logging.set_verbosity(verbosity)
