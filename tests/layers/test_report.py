"""Reports: names by scope, losses with gradients, statistics without."""

import pytest
import torch

from layers.report import Report


def test_scopes_prefix_names_and_end_with_the_block():
    report = Report()
    report.stat("outside", 1.5)
    with report.scope("block0"), report.scope("mixer"):
        report.loss("balance", torch.tensor(2.0))
    with pytest.raises(KeyError), report.scope("block1"):
        raise KeyError
    report.stat("after", torch.tensor(3))
    assert set(report.losses) == {"block0/mixer/balance"}
    assert set(report.stats) == {"outside", "after"}


def test_losses_carry_gradients_and_statistics_do_not():
    x = torch.ones((), requires_grad=True)
    report = Report()
    report.loss("a", x * 2)
    report.stat("b", x * 3)
    assert report.losses["a"].requires_grad
    assert not report.stats["b"].requires_grad
    assert report.stats["b"].item() == 3
