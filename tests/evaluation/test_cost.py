"""The cost summary."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from evaluation.cost import measure_cost, parameters
from tests.tiny import tiny_model


def test_parameters_add_up_whether_the_head_is_tied_or_not():
    model = tiny_model("conv", vocab_size=50)
    counts = parameters(model)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["embedding"] == 2 * 50 * 32
    assert counts["non_embedding"] == sum(p.numel() for p in model.blocks.parameters()) + 32
    model.head = None
    assert parameters(model)["embedding"] == 50 * 32


@pytest.mark.parametrize("pattern", ["attention", "linear_attention"])
def test_the_summary_holds_what_is_measured(pattern):
    model = tiny_model(pattern)
    summary = measure_cost(model, batch_size=2, context=16, decode_tokens=3, repeats=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 1024, dtype=torch.int64))
    assert summary["flops_per_token"]["1024"] == counter.get_total_flops() / 1024
    sizes = summary["state_bytes"]
    assert list(sizes) == ["1024", "8192", "65536"]
    assert (sizes["1024"] == sizes["65536"]) == summary["bounded_state"] == model.bounded_state
    speed = summary["speed"]
    assert speed["prefill_tokens_per_second"] > 0
    assert speed["decode_tokens_per_second"] > 0
    assert (speed["batch_size"], speed["context"], speed["device"]) == (2, 16, "cpu")
