"""The public code's forward pass over a tiny backbone, and gradients by finite differences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layers.attention import Attention
from models.hmt import HMT
from models.language_model import LanguageModel

GOLDEN = Path(__file__).parents[1] / "golden" / "hmt_forward.npz"
# The bound that the array was published with, absolute, logits being of size 1 to 10.
BOUND = 1e-5


class Tanh(nn.Module):
    """tanh(x W1) W2, the array's channel mixer."""

    def __init__(self, w1: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(w1), nn.Parameter(w2)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w1).tanh() @ self.w2


def arrays() -> dict[str, Tensor]:
    found = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}
    return found | {"ids": found["ids"].long()}  # stored as floats


def public_model(a: dict[str, Tensor]) -> HMT:
    """The array's model: one head without positions, no norms, an untied head.

    Its weights multiply from the right, x W, and nn.Linear's from the left: they are transposed,
    but for those of recall, which are stored as nn.Linear's.
    """
    V, D = a["emb"].shape
    attention = Attention(D, num_heads=1, rotary=False)
    backbone = LanguageModel(
        V,
        D,
        [attention],
        [Tanh(a["W1"], a["W2"])],
        lambda width: nn.Identity(),
        tie_embeddings=False,
    )
    model = HMT(
        backbone,
        segment_len=int(a["seg_len"]),
        summary_len=int(a["summary_len"]),
        sensory_len=int(a["sensory"]),
        max_memories=int(a["cache_limit"]),
        recall_dim=len(a["recall_wq"]),
        query="current_prefix",
    )
    assert backbone.head is not None
    values = [
        (backbone.embedding.weight, a["emb"]),
        (backbone.head.weight, a["Wlm"].T),
        *((getattr(attention, f"{n}_proj").weight, a[f"W{n}"].T) for n in "qkvo"),
        (model.memory.initial_memory, a["init_memory"][0]),
        (model.memory.summary_prompt, a["summary_prompt"]),
        (model.memory.recall.q_proj.weight, a["recall_wq"]),
        (model.memory.recall.k_proj.weight, a["recall_wk"]),
    ]
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)
    return model.eval()


@pytest.mark.golden("hmt_forward", mixers=[])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_golden_forward(dtype):
    """Five segments, the last of half its length, and two memories: eviction from the fourth on."""
    a = arrays()
    model = public_model(a).to(dtype)
    memory, backbone = model.memory, model.backbone
    logits, _ = model(a["ids"])
    assert (logits - a["logits"]).abs().max() < BOUND
    state = None
    for n, ids in enumerate(a["ids"].split(memory.segment_len, dim=1)):
        _, state = model(ids, state, want_state=True)
        assert (state.prompt - a["prompts"][:, n]).abs().max() < BOUND
        summary = memory.summarise(backbone, ids[:, : memory.summary_len])
        assert (summary - a["summaries"][:, n]).abs().max() < BOUND
        # The segment is still open: what would be its memory if it ended here.
        made, _ = backbone.read(state.prompt[:, None], state.backbone)
        assert (made[:, 0] - a["memories"][:, n]).abs().max() < BOUND
        if n:
            kept = a["memories"][:, max(0, n - memory.max_memories) : n]
            assert (state.memories - kept).abs().max() < BOUND


def test_gradients_of_the_public_model_by_finite_differences():
    """The array has no gradients. In float64, along random directions, of a random scalar."""
    torch.manual_seed(0)
    a = arrays()
    model = public_model(a).double()
    cotangent = torch.randn(a["logits"].shape, dtype=torch.float64)

    def scalar() -> Tensor:
        return (model(a["ids"])[0] * cotangent).sum()

    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(scalar(), list(parameters.values()))
    step = 1e-6
    for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = scalar()
            parameter.sub_(direction, alpha=2 * step)
            below = scalar()
            parameter.add_(direction, alpha=step)
        slope = ((above - below) / (2 * step)).item()
        # Central differences are right to step^2 times the third derivative, and to rounding.
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-4), name
