"""Settings of the whole suite."""

import logging
import os

import pytest
import torch

from tests.kernels.coverage import table

# Several test processes with several threads each wait for one another most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # which torch has read by now
# Read when a kernel is defined. With a GPU the same tests run the compiled kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def log_as_before():
    """A command run in this process sends the log where pytest's standard error was at the time."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def pytest_terminal_summary(terminalreporter):
    """What the kernels' tests covered; asked of the process that gathers the reports."""
    reports = (r for kind in terminalreporter.stats.values() for r in kind)
    terminalreporter.write(table(r for r in reports if isinstance(r, pytest.TestReport)))
