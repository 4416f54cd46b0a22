"""Triton's kernels, interpreted: between guards, and only where they can run."""

import pytest
import torch

from kernels.launch import why_not_triton
from tests.kernels.guard import guarded_memory


def pytest_collection_modifyitems(items):
    for item in items:
        if "kernels/triton/" in item.nodeid:
            item.add_marker(pytest.mark.triton)


@pytest.fixture(autouse=True)
def guards():
    reason = why_not_triton(torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    with guarded_memory() as launched:
        yield launched
