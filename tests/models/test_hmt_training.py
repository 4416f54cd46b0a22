"""HMT as it is trained and paid for: gradients, reports, FLOPs, bytes, parameters, recall."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from layers.attention import Attention
from layers.channel_mixer import SwiGLU
from layers.marks import marked_parameters
from layers.report import Report
from layers.state import state_nbytes
from models.build import build_model
from models.hmt import HMT
from models.language_model import LanguageModel
from schema.check import check
from schema.compose import compose
from tests.models.hmt import DOCUMENTS, SIZES, D, V, assert_near, small, tokens

L, K, N = (SIZES[name] for name in ("segment_len", "sensory_len", "max_memories"))
LENGTHS = (1, 2, L - 1, L, L + 1, 2 * L, 2 * L + 1, 17, 5 * L + 3)


def reached(model: HMT, length: int) -> list[bool]:
    """By segment: does the loss in the last segment reach its embedded tokens?

    Every position has a token of its own, so that its gradient is a row of the embedding.
    """
    model.zero_grad()
    logits, _ = model(torch.arange(length)[None])
    logits[0, -1].square().sum().backward()
    rows = model.embedding.weight.grad.abs().sum(1)
    return [bool(part.any()) for part in rows[:length].split(L)]


@pytest.mark.parametrize("depth", [1, 2, 3, None])
def test_bptt_depth_cuts_gradients_and_nothing_else(depth):
    options = {"query": "current_prefix", "sensory_len": 0, "vocab_size": 6 * L}
    model = small(bptt_depth=depth, **options)
    far = 6 if depth is None else depth
    assert reached(model, 6 * L) == [n > 5 - far for n in range(6)]
    ids = torch.arange(6 * L)[None]
    assert torch.equal(model(ids)[0], small(**options)(ids)[0])


def test_the_last_loss_reaches_every_parameter_once_there_is_a_choice():
    model = small()
    memory = model.memory
    for length, choice in ((2 * L, False), (3 * L, True)):
        model.zero_grad()
        logits, _ = model(tokens(1, length))
        logits[0, -1].square().sum().backward()
        assert memory.initial_memory.grad.any()
        for parameter in (memory.summary_prompt, *memory.recall.parameters()):
            assert (parameter.grad is not None and bool(parameter.grad.any())) == choice


def test_in_training_every_parameter_has_a_gradient_however_short_the_text():
    model = small().train()
    model(tokens(1, 2))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_gradients_of_packed_documents_are_those_of_each_alone():
    model = small("attention")
    ids = tokens(1, DOCUMENTS.shape[1])
    segments = DOCUMENTS[:1]
    weights = torch.randn(DOCUMENTS.shape[1], V, dtype=torch.float64)

    def gradients(*parts: tuple[Tensor, Tensor | None, Tensor]) -> list[Tensor]:
        model.zero_grad()
        for part, numbers, own in parts:
            (model(part, segments=numbers)[0][0] * own).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    valid = (segments[0] >= 0)[:, None]
    packed = gradients((ids, segments, weights * valid))
    where = [(segments[0] == n).nonzero().flatten() for n in (0, 3)]
    alone = gradients(*((ids[:, w], None, weights[w]) for w in where))
    for got, expected in zip(packed, alone, strict=True):
        assert_near(got, expected, 1e-8 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize(
    "options",
    [{}, {"query": "current_prefix"}, {"kind": "recurrent"}, {"kind": "off"}, {"sensory_len": 0}],
    ids=str,
)
@torch.no_grad()
def test_flops_and_state_bytes_are_what_is_measured(options):
    model = small("attention", "mamba", **options)
    for length in LENGTHS:
        ids = tokens(2, length)
        with FlopCounterMode(display=False) as counter:
            model(ids)
        assert counter.get_total_flops() == model.flops(2, length)
        _, state = model(ids, want_state=True)
        assert state_nbytes(state) == model.state_bytes(2, length)
    assert state_nbytes(model.new_state(2, 99)) == model.state_bytes(2, 0)


def test_cost_is_linear_in_time_and_the_state_is_bounded():
    model = small()
    per_segment = model.flops(1, 90 * L) - model.flops(1, 89 * L)
    assert model.flops(1, 900 * L) - model.flops(1, 899 * L) == per_segment
    assert model.bounded_state
    sizes = [model.state_bytes(1, length) for length in range((N + 1) * L + 1, (N + 5) * L + 1)]
    assert max(sizes[:L]) == max(sizes[-L:])
    # Full segments, as most lengths that are reported are, hold the most.
    assert max(sizes) == model.state_bytes(1, 100 * L)


class Wide(Attention):
    """Reports how many positions it was given."""

    def forward(self, x, state=None, *, report=None, **options):
        if report is not None:
            report.loss("width", x.new_tensor(x.shape[1]))
        return super().forward(x, state, report=report, **options)


def test_what_layers_report_is_a_mean_over_tokens_whatever_the_segments():
    backbone = LanguageModel(V, D, [Wide(D, num_heads=2)], [None], nn.RMSNorm)
    model = HMT(backbone, **SIZES)
    report = Report()
    model(tokens(2, 4 * L + 1), report=report)
    widths = [(L, L + 2)] + [(L, L + K + 2)] * 3 + [(1, 1 + K + 1)]
    expected = sum(own * width for own, width in widths) / (4 * L + 1)
    assert report.losses["block0/width"].item() == pytest.approx(expected)
    # Of up to three memories: between one and three segments back.
    assert 1 <= report.stats["memory/recall_age"] <= N


def test_the_parameters_that_it_adds():
    model = small(recall_dim=24)
    assert sum(p.numel() for p in model.memory.parameters()) == 2 * D * 24 + 2 * D
    marks = {name: marks for name, _, marks in marked_parameters(model)}
    assert not marks["memory.initial_memory"].decay
    assert not marks["memory.summary_prompt"].decay
    assert marks["memory.recall.q_proj.weight"].decay
    embedded = model.embedding.weight.std()
    for vector in (model.memory.initial_memory, model.memory.summary_prompt):
        # The standard deviation of 16 normal numbers is right to 18%; three times that.
        assert vector.std().item() == pytest.approx(embedded.item(), rel=0.55)


def test_full_size_adds_one_percent():
    cfg = compose("config", ["experiment=wikitext103_hmt"])
    check(cfg)
    with torch.device("meta"):
        model = build_model(cfg, cfg.task.bpe_vocab_size)
    assert isinstance(model, HMT)
    extra = sum(p.numel() for p in model.memory.parameters())
    share = extra / sum(p.numel() for p in model.backbone.parameters())
    assert 0.005 < share < 0.02  # the paper's range
    # Of long texts, over segments alone: 1 + (j + k + 4) / L times the positions, and a little
    # less in FLOPs, as attention over the half of a segment costs less than half.
    L, n = 990, 200
    head = 2 * n * L * model.d_model * model.vocab_size
    times = (model.flops(1, n * L) - head) / model.backbone.hidden_flops(n, L)
    assert 1.45 < times < 1 + (495 + 32 + 4) / L


@pytest.mark.slow
def test_a_value_four_segments_back_is_recalled():
    """Planted in the first segment, asked for in the fifth, among tokens that say nothing."""
    values, size, steps = 8, 32, 120

    def accuracy(kind: str) -> float:
        torch.manual_seed(0)
        layers = [Attention(size, num_heads=2) for _ in range(2)]
        backbone = LanguageModel(
            20, size, layers, [SwiGLU(size) for _ in layers], nn.RMSNorm, tie_embeddings=False
        )
        model = HMT(backbone, segment_len=6, kind=kind)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        right: list[Tensor] = []
        for _ in range(steps):
            ids = torch.randint(10, 18, (32, 25))
            value = torch.randint(2, 2 + values, (32,))
            ids[:, 2], ids[:, 3] = 1, value
            ids[:, 23] = ids[:, 24] = 18  # the question, which the query of the fifth reads
            logits = model(ids)[0][:, -1]
            right.append(logits.argmax(-1) == value)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, value).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return torch.cat(right[-10:]).float().mean().item()

    assert accuracy("hierarchical") > 0.95
    # Of 320 questions at chance, 1/8, a share of 0.125 + 4 standard errors is 0.2.
    assert accuracy("off") < 0.2
