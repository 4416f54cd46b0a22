"""Fresh memory holds NaN in every test of an operator, so that reading it shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch fills new tensors with NaN while deterministic algorithms are asked for."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
