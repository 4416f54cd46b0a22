"""Parameter groups follow the marks of the layers, and AdamW decays one group only."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from layers.marks import mark
from schema.errors import ConfigError
from training.optim import ParameterGroups, adamw


class StateSpace(nn.Module):
    """A layer with parameters that must not decay although they are matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.ones(4, 4))
        self.gain = nn.Parameter(torch.ones(4))
        self.theta = nn.Parameter(torch.ones(4))
        self.proj = nn.Linear(4, 4)
        mark(self, "A_log", decay=False, own_init=True)
        mark(self, "theta", decay=True)


def tied_model() -> nn.Module:
    model = nn.Sequential(nn.Embedding(8, 4), StateSpace(), nn.LayerNorm(4), nn.Linear(4, 8, False))
    model[3].weight = model[0].weight
    return model


def test_groups_follow_marks_then_dimensions_and_count_shared_ones_once() -> None:
    groups = ParameterGroups.of(tied_model())
    assert set(groups.decay) == {"0.weight", "1.theta", "1.proj.weight"}
    assert set(groups.no_decay) == {"1.A_log", "1.gain", "1.proj.bias", "2.weight", "2.bias"}


def test_frozen_parameters_are_in_no_group() -> None:
    model = tied_model()
    model[1].requires_grad_(False)
    groups = ParameterGroups.of(model)
    assert set(groups.decay) == {"0.weight"}
    assert set(groups.no_decay) == {"2.weight", "2.bias"}


def test_the_description_counts_both_groups() -> None:
    decay, no_decay = ParameterGroups.of(tied_model()).describe().splitlines()
    assert decay.startswith("weight decay: 52 parameters in 3 tensors (")
    assert no_decay.startswith("no weight decay: 32 parameters in 5 tensors (")
    assert "A_log" in no_decay


def test_only_the_decay_group_shrinks_without_a_gradient() -> None:
    model = tied_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(ParameterGroups.of(model), lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    groups = ParameterGroups.of(model)
    for name, p in groups.decay.items():
        # 1 - lr * weight_decay; fp32 rounds the product
        torch.testing.assert_close(p, before[name] * 0.95, rtol=1e-6, atol=0)
    for name, p in groups.no_decay.items():
        assert torch.equal(p, before[name])


def test_a_layer_bounds_the_rate_of_its_own_parameters() -> None:
    model = tied_model()
    mark(model[1], "A_log", decay=False, own_init=True, max_lr=1e-3)
    groups = ParameterGroups.of(model)
    assert groups.max_lr == {"1.A_log": 1e-3}
    assert groups.describe().splitlines()[2] == (
        "learning rate at most 0.001: 16 parameters in 1 tensors (1.A_log)"
    )
    for lr, expected in ((1e-2, 1e-3), (1e-4, 1e-4)):
        optimizer = adamw(groups, lr=lr)
        assert optimizer.param_groups[0]["lr"] == lr  # the one that is logged
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert len(rates) == 8
        assert rates.pop(id(model[1].A_log)) == expected
        assert set(rates.values()) == {lr}
        LambdaLR(optimizer, lambda step: 0.5)  # a schedule multiplies both
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert rates.pop(id(model[1].A_log)) == 0.5 * expected
        assert set(rates.values()) == {0.5 * lr}


def test_fused_where_torch_has_it() -> None:
    assert adamw(ParameterGroups.of(tied_model()), lr=0.1).defaults["fused"]
    complex_model = nn.ParameterList([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    assert not adamw(ParameterGroups.of(complex_model), lr=0.1).defaults["fused"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "optimizer.lr=0.0: allowed: above 0"),
        ({"lr": 1.0, "betas": [0.9, 1.0]}, r"optimizer.betas=\[0.9, 1.0\]"),
        ({"lr": 1.0, "weight_decay": -1.0}, "optimizer.weight_decay=-1.0"),
    ],
)
def test_impossible_options_are_named(options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adamw(ParameterGroups.of(tied_model()), **options)
