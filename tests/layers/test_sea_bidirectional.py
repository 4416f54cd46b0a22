"""SEA in both directions: the public code's context, its definition, what it sees, documents.

B batch, T time, D model width, H heads, K head width, M cells.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, scaled_dot_product_attention

from kernels.estimated_sparse_attention import GROUPINGS, stretch_cells
from layers.feature_maps import PerformerFeatureMap
from layers.report import Report
from layers.sea_bidirectional import BidirectionalSEA, favor_context, positions_as_bins

GOLDEN = Path(__file__).parents[1] / "golden"
D, H, M = 16, 2, 8


def small_layer(dtype: torch.dtype = torch.float64, **options) -> BidirectionalSEA:
    torch.manual_seed(0)
    options = {"num_heads": H, "num_cells": M, "k_cells": 2, "num_features": 6} | options
    return BidirectionalSEA(D, **options).to(dtype).eval()


def tokens(T: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, T, D, generator=torch.Generator().manual_seed(T)).to(dtype)


@pytest.mark.golden("sea_performer_context", mixers=["sea_bidirectional"])
def test_golden_context():
    data = {
        n: torch.from_numpy(a) for n, a in np.load(GOLDEN / "sea_performer_context.npz").items()
    }
    q, k, v = (data[n].transpose(1, 2) for n in "qkv")
    feature_map = PerformerFeatureMap(2, 16, 44, kernel="exp")
    feature_map.projection.copy_(data["proj"])
    got = favor_context(feature_map, q, k, v).transpose(1, 2)
    torch.testing.assert_close(got, data["favor_bidir"], rtol=0, atol=1e-5)


def test_positions_run_through_the_identity():
    P = positions_as_bins(9, 5, torch.zeros(()))
    assert torch.equal(P[::2], torch.eye(5))
    assert torch.equal(P[1], torch.tensor([0.5, 0.5, 0, 0, 0]))
    assert torch.equal(positions_as_bins(1, 5, torch.zeros(())), torch.eye(5)[:1])
    torch.testing.assert_close(positions_as_bins(23, 5, torch.zeros(())).sum(1), torch.ones(23))


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 2, 7, 20])
def test_is_its_definition(T):
    """From dense matrices; lengths below and above the cells, odd and even."""
    layer, x = small_layer(), tokens(T)
    q, k, v = layer.project(x, torch.arange(T))
    e, gates = layer.encoder(torch.cat([layer.context(q, k, v), v], -1))
    decoder = layer.decoder
    rows = decoder.rows(e).view(2, T, 4 * H, M // 2).transpose(1, 2)
    picture = decoder.conv2(decoder.conv1(rows).relu()).relu()
    picture = decoder.conv3(torch.stack([picture, picture], 3).flatten(2, 3))
    scores = interpolate(picture, (T, M), mode="bilinear", align_corners=False)
    probs = scores.softmax(-1)
    budget = min(max(1, round(H * 2 * M / T)), H * M)
    flat = probs.transpose(1, 2).flatten(2)
    cells = torch.zeros_like(flat).scatter(-1, flat.topk(budget).indices, 1).bool()
    cells = cells.view(2, T, H, M).transpose(1, 2)
    mask = stretch_cells(cells, causal=False)
    dense = torch.einsum("bthk,bshk->bhts", q, k) * 8**-0.5
    weights = dense.masked_fill(~mask, -1e300).softmax(-1) * mask
    profile = stretch_cells(probs.mean(2, keepdim=True), keys=T, causal=False)[:, :, 0]
    average = torch.einsum("bhs,bshv->bhv", profile, v)[:, None]
    attended = torch.einsum("bhts,bshv->bthv", weights, v)
    out = gates.mix * gates.prob * attended + (1 - gates.mix) * average
    torch.testing.assert_close(layer(x)[0], layer.merge(out), rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_is_softmax_attention_when_k_covers_all_and_gates_are_open(grouping):
    layer, x = small_layer(k_cells=20, grouping=grouping), tokens(20)
    layer.encoder.gate.weight.zero_()
    layer.encoder.gate.bias.fill_(1e3)  # sigmoid is 1 exactly
    q, k, v = layer.project(x, torch.arange(20))
    dense = scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
    expected = layer.merge(dense.transpose(1, 2))
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_share_of_earlier_outputs_that_later_tokens_change():
    """The leak, as a number: all of the outputs before the last 8 of 64 tokens."""
    layer, x = small_layer(torch.float32), tokens(64, torch.float32)
    changed = x.clone()
    changed[:, -8:] = torch.randn(2, 8, D)
    share = (layer(x)[0][:, :-8] != layer(changed)[0][:, :-8]).double().mean().item()
    assert share > 0.99, f"{share:.3f}"
    assert layer.causal == "leaky"


@torch.no_grad()
def test_a_later_call_computes_from_the_whole_document():
    layer, x = small_layer(), tokens(20)
    whole, _ = layer(x)
    _, state = layer(x[:, :13], want_state=True)
    later, _ = layer(x[:, 13:], state)
    torch.testing.assert_close(later, whole[:, 13:], rtol=1e-10, atol=1e-12)


def test_gradients_reach_the_decoder():
    """Through the average of values, which the causal form does not have, and the estimate."""
    layer, x = small_layer(), tokens(20)
    report = Report()
    y, _ = layer(x, report=report)
    for loss in (y.square().mean(), report.losses["estimation"]):
        found = torch.autograd.grad(loss, list(layer.decoder.parameters()), retain_graph=True)
        assert all(g.abs().max() > 0 for g in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3: expected a divisor of d_model=16"),
        ({"num_cells": 7}, "num_cells=7: expected a positive multiple of 2"),
        ({"k_cells": 0}, "k_cells=0"),
        ({"grouping": "all"}, "grouping='all': allowed: causal_batch, query, head, batch"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small_layer(**options)
