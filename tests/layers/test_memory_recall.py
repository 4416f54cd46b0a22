"""Memory recall: the public code's array, the definition, order, hull, gradients, cost."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from layers.memory_recall import MemoryRecall

GOLDEN = Path(__file__).parents[1] / "golden" / "hmt_recall.npz"
R, C, D, K = 3, 5, 8, 12


def made() -> tuple[MemoryRecall, torch.Tensor, torch.Tensor]:
    """A recall, summaries (R, D) and memories (R, C, D), in float64."""
    torch.manual_seed(0)
    recall = MemoryRecall(D, K).double()
    return recall, *(torch.randn(size, dtype=torch.float64) for size in ((R, D), (R, C, D)))


@pytest.mark.golden("hmt_recall", mixers=[])
def test_golden():
    arrays = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}
    recall = MemoryRecall(16, 24)
    recall.load_state_dict({"q_proj.weight": arrays["wq"], "k_proj.weight": arrays["wk"]})
    # The array's own bound for float32; in float64 the weights are the only rounded numbers.
    for dtype, name, bound in ((torch.float32, "out_f32", 1e-5), (torch.float64, "out_f64", 1e-9)):
        recall.to(dtype)
        memories = arrays["memory"].to(dtype)
        p, weights = recall(recall.queries(arrays["summary"][:, 0].to(dtype)), memories)
        assert (p - arrays[name][:, 0]).abs().max() < bound
        assert (weights - arrays["scores"][:, 0]).abs().max() < bound
        assert torch.equal(5 - weights.argmax(1), arrays["distance"])


def test_weights_are_convex_and_follow_the_memories():
    recall, summaries, memories = made()
    q = recall.queries(summaries)
    p, weights = recall(q, memories)
    scores = (recall.q_proj(summaries)[:, None] * recall.k_proj(memories)).sum(-1) / math.sqrt(K)
    torch.testing.assert_close(weights, scores.softmax(1))
    torch.testing.assert_close(p, (weights[..., None] * memories).sum(1))
    torch.testing.assert_close(weights.sum(1), torch.ones(R, dtype=torch.float64))
    assert (weights > 0).all()
    order = torch.tensor([3, 1, 4, 0, 2])
    other, moved = recall(q, memories[:, order])
    torch.testing.assert_close(other, p)
    torch.testing.assert_close(moved, weights[:, order])


def test_slots_before_a_rows_own_are_not_there():
    recall, summaries, memories = made()
    q = recall.queries(summaries)
    held = torch.tensor([5, 1, 3])
    p, weights = recall(q, memories, held)
    for row, own in enumerate(held.tolist()):
        alone, expected = recall(q[row : row + 1], memories[row : row + 1, C - own :])
        torch.testing.assert_close(p[row], alone[0])
        torch.testing.assert_close(weights[row, C - own :], expected[0])
        assert not weights[row, : C - own].any()
    assert torch.equal(p[1], memories[1, -1]), "of one memory all is recalled, exactly"


def test_gradients():
    recall, summaries, memories = made()
    held = torch.tensor([5, 2, 3])

    def run(s, c, wq, wk):
        weights = {"q_proj.weight": wq, "k_proj.weight": wk}
        q = torch.func.functional_call(
            _Queries(recall), {f"0.{n}": w for n, w in weights.items()}, s
        )
        return recall(q, c, held)[0]

    inputs = (summaries, memories, *recall.parameters())
    assert torch.autograd.gradcheck(run, [x.detach().requires_grad_() for x in inputs])


class _Queries(torch.nn.Sequential):
    """`queries` as a forward pass, for functional_call."""

    def forward(self, s):
        return self[0].queries(s)


def test_flops_and_precision():
    recall, summaries, _ = made()
    with FlopCounterMode(display=False) as counter:
        recall.queries(summaries)
    assert counter.get_total_flops() == recall.flops(R)
    recall.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert recall.queries(summaries.bfloat16()).dtype == torch.float32
