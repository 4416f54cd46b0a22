"""The paper's Hedgehog at full size, built without memory for it."""

import pytest
import torch

from models.build import build_model
from schema.compose import compose


@pytest.mark.parametrize(
    ("vocab_size", "parameters", "flops"),
    # 32768 tokens of our own, and GPT-2's, of which the paper says 125M
    [(32768, 111_364_608, 231e6), (50257, 124_796_160, 258e6)],
)
def test_size_and_cost_are_what_its_comment_says(vocab_size, parameters, flops):
    cfg = compose("config", ["experiment=wikitext103_hedgehog"])
    with torch.device("meta"):
        model = build_model(cfg, vocab_size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    maps = [p.numel() for name, p in model.named_parameters() if "_map." in name]
    assert sum(maps) == 12 * 12 * 2 * 64 * 64
    assert model.flops(1, 1024) / 1024 == pytest.approx(flops, rel=2e-3)
    # S and z of 12 layers of 12 heads in float32, and two integers of each layer
    assert model.state_bytes(1, 1024) == 12 * (12 * (128 * 64 + 128) * 4 + 16)
    assert model.bounded_state
    assert model.causal == "strict"
