"""Channel mixers: formulas, widths, FLOPs, configs."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from layers.channel_mixer import GELU, SwiGLU, hidden_width

CONF = Path(__file__).parents[2] / "conf" / "channel_mixer"


def test_swiglu_is_the_formula():
    torch.manual_seed(0)
    layer, x = SwiGLU(6, hidden=5, bias=True).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    gate = x @ layer.gate_proj.weight.T + layer.gate_proj.bias
    up = x @ layer.up_proj.weight.T + layer.up_proj.bias
    expected = (gate * gate.sigmoid() * up) @ layer.down_proj.weight.T + layer.down_proj.bias
    torch.testing.assert_close(layer(x), expected)


def test_gelu_is_the_formula():
    torch.manual_seed(0)
    layer, x = GELU(6, hidden=5).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    up = x @ layer.up_proj.weight.T + layer.up_proj.bias
    gelu = up * 0.5 * (1 + torch.erf(up / 2**0.5))
    torch.testing.assert_close(layer(x), gelu @ layer.down_proj.weight.T + layer.down_proj.bias)


@pytest.mark.parametrize(
    ("d_model", "expand", "hidden", "width"),
    [(768, 8 / 3, None, 2048), (256, 8 / 3, None, 688), (64, 4.0, None, 256), (64, 4.0, 99, 99)],
)
def test_hidden_width(d_model, expand, hidden, width):
    assert hidden_width(d_model, expand, hidden) == width


@pytest.mark.parametrize("arguments", [(0, 4.0, None), (8, -1.0, None), (8, 4.0, 0)])
def test_hidden_width_below_one_is_named(arguments):
    with pytest.raises(ValueError, match="expected >= 1"):
        hidden_width(*arguments)


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_configs_build_and_count_their_flops(name):
    node = OmegaConf.load(CONF / f"{name}.yaml")
    layer = instantiate(OmegaConf.create({"model": {"d_model": 24}, "layer": node}).layer)
    with FlopCounterMode(display=False) as counter:
        y = layer(torch.randn(2, 7, 24))
    assert y.shape == (2, 7, 24)
    assert counter.get_total_flops() == layer.flops(14)
