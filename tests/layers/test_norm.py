"""Norms as modules."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from layers.norm import RMSNorm

CONF = Path(__file__).parents[2] / "conf" / "norm"


def test_rms_norm_is_the_formula():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(8, eps=1e-3).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert torch.autograd.gradcheck(norm, x)


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm"])
def test_configs_make_norms_of_any_width(name):
    norm = instantiate(OmegaConf.load(CONF / f"{name}.yaml"))(12)
    y = norm(torch.randn(2, 3, 12) * 7)
    # The mean square of a normalised row is 1 up to eps / 49.
    torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 3), rtol=1e-4, atol=0)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="d_model=0"):
        RMSNorm(0)
