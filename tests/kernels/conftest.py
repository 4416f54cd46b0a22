"""Fresh memory holds NaN in every test of an operator, so that reading it shows."""

import pytest
import torch
from torch.utils import deterministic


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch fills new tensors with NaN while deterministic algorithms are asked for."""
    # A training in the same process switches the filling off, for speed.
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
