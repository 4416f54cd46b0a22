"""Triton's kernels, interpreted: between guards, and only where they can run."""

import pytest
import torch

from kernels.launch import why_not_triton
from tests.kernels.compare import COMPARED
from tests.kernels.coverage import PROPERTY
from tests.kernels.guard import guarded_memory


def pytest_collection_modifyitems(items):
    """Of every test the last case stays with the fast ones: the interpreter takes minutes for all.

    The last ones are the longest ragged lengths, with padding.
    """
    own = [item for item in items if "kernels/triton/" in item.nodeid]
    last = {item.nodeid.split("[")[0]: item for item in own}
    for item in own:
        item.add_marker(pytest.mark.triton)
        if last[item.nodeid.split("[")[0]] is not item:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def guards(request):
    reason = why_not_triton(torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    before = len(COMPARED)
    with guarded_memory() as launched:
        yield launched
    request.node.user_properties.append(
        (PROPERTY, (sorted(launched.shapes), len(COMPARED) - before))
    )
