"""Small HMTs for tests, and HMT as its equations say it, segment by segment.

B batch, T time, D model width, L tokens of a segment, j summarised, k sensory, N memories.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from models.hmt import HMT
from models.language_model import LanguageModel
from tests.contract.subjects import make_mixer

V, D = 29, 16
SIZES = {"segment_len": 5, "summary_len": 3, "sensory_len": 2, "max_memories": 3}
# In float64 sums of a few hundred terms differ by 1e-13 in another order; with weights this large
# a recurrent backbone amplifies that. Mistakes are larger than 1e-4.
EXACT = 1e-9
# By row: documents of unlike length, padding before, between, behind and inside them.
DOCUMENTS = torch.full((3, 34), -1)
DOCUMENTS[0, 2:14], DOCUMENTS[0, 16:31] = 0, 3
DOCUMENTS[1, :7], DOCUMENTS[1, 7:8], DOCUMENTS[1, 9::2] = 1, 2, 5


def assert_near(got: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def small(*mixers: str, vocab_size: int = V, **options) -> HMT:
    """In float64, with weights so large that every part of the input shows in the output."""
    torch.manual_seed(0)
    layers = [make_mixer(name) for name in mixers or ("attention", "attention")]
    backbone = LanguageModel(
        vocab_size, D, layers, [None] * len(layers), nn.RMSNorm, tie_embeddings=False
    )
    with torch.no_grad():
        for name, weight in backbone.named_parameters():
            if name.startswith(("embedding", "head")) or name.endswith("proj.weight"):
                weight.mul_(10)
    return HMT(backbone, **(SIZES | options)).double().eval()


def tokens(batch: int, length: int, seed: int = 1, vocab_size: int = V) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


class ByHand(NamedTuple):
    """Logits (B, T, V); of every segment P, and of every closed one M, (B, D) each."""

    logits: Tensor
    prompts: list[Tensor]
    memories: list[Tensor]


def by_hand(model: HMT, ids: Tensor) -> ByHand:
    """The loop of the definition, one segment and one summary at a time, nothing cached."""
    memory, backbone = model.memory, model.backbone
    L, j, k, N = memory.segment_len, memory.summary_len, memory.sensory_len, memory.max_memories
    logits, prompts, memories = [], [], []
    for begin in range(0, ids.shape[1], L):
        own = ids[:, begin : begin + L]
        if not memories:
            p = memory.initial_memory.expand(len(ids), -1)
        elif memory.kind == "recurrent":
            p = memories[-1]
        else:
            strict = memory.query == "previous_tail"
            source = ids[:, begin - j : begin] if strict else own[:, :j]
            end = memory.summary_prompt.expand(len(ids), 1, -1)
            h, _ = backbone.read(torch.cat([end, backbone.embed(source), end], 1))
            cache = torch.stack(memories[-N:], 1)  # (B, c, D)
            q = linear(h[:, -1], memory.recall.q_proj.weight)
            keys = linear(cache, memory.recall.k_proj.weight)
            a = (keys @ q[:, :, None] / math.sqrt(q.shape[1])).softmax(1)  # (B, c, 1)
            p = (a * cache).sum(1)
        prompts.append(p)
        sensory = ids[:, max(0, begin - k) : begin]
        x = [p[:, None], backbone.embed(torch.cat([sensory, own], 1)), p[:, None]]
        y, _ = backbone.read(torch.cat(x, 1))
        start = 1 + sensory.shape[1]
        logits.append(linear(y[:, start : start + own.shape[1]], backbone.head_weight))
        memories.append(y[:, -1])
    return ByHand(torch.cat(logits, 1), prompts, memories)
