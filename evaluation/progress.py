"""Progress bars of a long evaluation."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Advance = Callable[[int], None]  # is told how much more has been done
Show = Callable[[str, int], AbstractContextManager[Advance]]  # what is done, and how much of it


def bars(console: Console) -> Show:
    """Makes one bar after the other on `console`; none where it is no terminal."""

    @contextmanager
    def show(title: str, total: int) -> Iterator[Advance]:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.advance(task, done)

    return show
