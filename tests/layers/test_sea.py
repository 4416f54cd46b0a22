"""SEA: its features, estimator and decoder, causality stage by stage, losses, maps, cost.

B batch, T time, D model width, H heads, K head width, M cells.
"""

import copy
from pathlib import Path
from time import process_time

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, conv2d
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import peak_bytes
from kernels import estimated_sparse_attention, linear_attention, linear_cross_entropy
from kernels.causal_conv1d.documents import Documents
from kernels.estimated_sparse_attention import cell_of_token
from layers.attention import Attention
from layers.channel_mixer import SwiGLU
from layers.feature_maps import PerformerFeatureMap
from layers.marks import marked_parameters
from layers.norm import RMSNorm
from layers.report import Report
from layers.running_mean import running_mean
from layers.sea import SEA
from layers.sea_decoder import CausalDecoder, RowConv, pool_columns
from layers.sea_estimator import EPS
from layers.segments import place
from layers.state import state_nbytes
from models.language_model import LanguageModel
from tests.kernels.compare import documents

GOLDEN = Path(__file__).parents[1] / "golden"
EXACT = 1e-12  # relative to the largest value: float64, sums of up to a thousand terms
D, H, M = 16, 2, 8


def golden(name: str) -> dict[str, Tensor]:
    return {n: torch.from_numpy(a) for n, a in np.load(GOLDEN / f"{name}.npz").items()}


def assert_near(got: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    """No element further off than tolerance * max |expected|."""
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"off by {error:.1e} of the maximum, allowed {tolerance:.1e}"


def small_layer(dtype: torch.dtype = torch.float64, **options) -> SEA:
    """Two heads of 8, 8 cells, 2 tokens per query and head; in evaluation mode."""
    torch.manual_seed(0)
    options = {"num_heads": H, "num_cells": M, "k_cells": 2, "max_len": 64} | options
    return SEA(D, **options).to(dtype).eval()


def small_teacher(dtype: torch.dtype = torch.float64) -> Attention:
    torch.manual_seed(1)
    teacher = Attention(D, num_heads=H).to(dtype)
    teacher.q_proj.weight.data.mul_(4)  # attention that is not flat
    return teacher


def tokens(T: int, dtype: torch.dtype = torch.float64, B: int = 2) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(T)).to(dtype)


# -- features and context, against the public code


def golden_map(projection: Tensor, heads: int, kernel: str, dtype: torch.dtype):
    feature_map = PerformerFeatureMap(heads, projection.shape[1], len(projection), kernel=kernel)
    feature_map.projection.copy_(projection)
    return feature_map.to(dtype)


@pytest.mark.golden("sea_favor_features", mixers=["sea", "sea_bidirectional"])
def test_golden_features():
    data = golden("sea_favor_features")
    q, k = (data[n].transpose(1, 2) for n in "qk")
    relu = golden_map(data["proj"], 2, "relu", torch.float32)
    exp = golden_map(data["proj"], 2, "exp", torch.float64)

    def check(got: Tensor, name: str) -> None:
        torch.testing.assert_close(got.transpose(1, 2), data[name], rtol=0, atol=1e-5)

    check(relu(q), "relu_q")
    check(relu(k), "relu_k")
    check(exp(q.double()), "fav_q_exact")
    check(exp(k.double()), "fav_k_exact")
    check(relu.stabilised(q, (3,)), "fav_q_stab")
    check(relu.stabilised(k, (1, 3)), "fav_k_stab")


@pytest.mark.golden("sea_favor_features", mixers=["sea", "sea_bidirectional"])
def test_exp_features_estimate_the_softmax_kernel_without_bias():
    """The mean over 500 projections, within 4 of its standard errors.

    Of short vectors: for long ones the mean is carried by projections too rare to be drawn.
    """
    data, short = golden("sea_favor_features"), 0.3
    q, k = (short * data[n][:1, :1, :4].transpose(1, 2).double() for n in "qk")
    torch.manual_seed(0)
    estimates = []
    for _ in range(500):
        feature_map = PerformerFeatureMap(1, 16, 44, kernel="exp").double()
        estimates.append(torch.einsum("bthf,bshf->ts", feature_map(q), feature_map(k)))
    found = torch.stack(estimates)
    error = found.mean(0) - data["softmax_kernel_true"][0, 0, :4, :4] ** short**2
    assert (error.abs() < 4 * found.std(0) / 500**0.5).all()


@pytest.mark.golden("sea_performer_context", mixers=["sea"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden_causal_context(backend, dtype):
    """As the estimator calls it, and the sums that decoding goes on from."""
    data = golden("sea_performer_context")
    q, k, v = (data[n].transpose(1, 2).to(dtype) for n in "qkv")
    relu = golden_map(data["proj"], 2, "relu", dtype)
    y, (S, z) = linear_attention(
        relu.normalised(q), relu(k), v, eps=EPS, return_state=True, backend=backend
    )
    y = y.transpose(1, 2)
    torch.testing.assert_close(y, data["relu_causal"].to(dtype), rtol=0, atol=1e-5)
    exact = 1e-6 if dtype is torch.float64 else 1e-5  # the projection is a float32 array
    torch.testing.assert_close(y, data["relu_causal_f64"].to(dtype), rtol=0, atol=exact)
    for got, name in ((S, "relu_state_S_end"), (z, "relu_state_z_end")):
        torch.testing.assert_close(got.double(), data[name], rtol=1e-5, atol=1e-5)
    exp = golden_map(data["proj"], 2, "exp", dtype)
    y = linear_attention(exp.normalised(q), exp(k), v, eps=0.0, backend=backend)
    expected = data["favor_causal_exact_f64"].to(dtype)
    torch.testing.assert_close(y.transpose(1, 2), expected, rtol=0, atol=1e-5)


def test_projection_is_orthogonal_in_blocks():
    torch.manual_seed(0)
    W = PerformerFeatureMap(1, 64, 150).projection
    for block in W.split(64):
        unit = block / block.norm(dim=1, keepdim=True)
        torch.testing.assert_close(unit @ unit.mT, torch.eye(len(block)), rtol=0, atol=1e-5)
    # Norms of Gaussian 64-vectors: 8 in the mean, with a deviation of 0.7.
    assert W.norm(dim=1).mean().item() == pytest.approx(8, abs=0.3)
    assert W.norm(dim=1).std().item() == pytest.approx(0.7, abs=0.2)
    assert PerformerFeatureMap(1, 64).num_features == 33


# -- the decoder, against its definition


def test_pooling_is_adaptive_average_pooling():
    for cells in (4, 8, 12, 64, 256):
        x, edge = torch.randn(3, 2, cells, dtype=torch.float64), torch.randn(2).double()
        side = edge[:, None].expand(3, 2, 1)
        expected = adaptive_avg_pool1d(torch.cat([side, x, side], -1), cells)
        assert_near(pool_columns(x, edge), expected)


def test_row_conv_is_a_masked_convolution():
    """The public code's: five rows stored, two of the future masked; that weight loads."""
    torch.manual_seed(0)
    conv = RowConv(4).double()
    stored = torch.randn(4, 4, 5, 3, dtype=torch.float64)
    conv.load_state_dict({"weight": stored, "bias": torch.randn(4)})
    x = torch.randn(2, 11, 4, 6, dtype=torch.float64)
    y = conv(x, x.new_zeros(2, 4, 4, 6), Documents(None, 5))
    stored[:, :, 3:] = 0
    picture = x.transpose(1, 2)  # (B, C, T, P)
    expected = conv2d(picture, stored, conv.bias, padding=(4, 2), dilation=2)
    assert_near(y, expected.transpose(1, 2))


def test_decoder_is_the_public_order_of_operations():
    """Repeat, then a 1 x 1 convolution padded by one column, then pooling."""
    torch.manual_seed(0)
    decoder = CausalDecoder(H, 8, 16).double()
    decoder.conv3.load_state_dict({"weight": torch.randn(H, 2 * H, 1, 1), "bias": torch.randn(H)})
    e = torch.randn(2, 9, H, 16, dtype=torch.float64)
    got, _ = decoder(e, decoder.no_rows(e), None, False)
    x = decoder.row_norm(decoder.rows(e).unflatten(-1, (2, 4)).flatten(2, 3))  # (B, T, 2H, P)
    for conv in (decoder.conv1, decoder.conv2):
        x = conv(x, x.new_zeros(2, 4, 2 * H, 4), Documents(None, 5)).relu()
    x = x.transpose(1, 2).repeat_interleave(4, -1)  # (B, 2H, T, M)
    x = conv2d(x, decoder.conv3.weight[..., None, None], decoder.conv3.bias, padding=(0, 1))
    x = adaptive_avg_pool1d(x.flatten(0, 1), 16).view(2, H, 9, 16)
    assert_near(got, decoder.score_norm(x))


def test_decoder_reads_eight_rows_back():
    layer = small_layer()
    e = torch.randn(1, 20, H, 16, dtype=torch.float64, requires_grad=True)
    scores, _ = layer.estimator.decoder(e, layer.estimator.decoder.no_rows(e), None, False)
    (grad,) = torch.autograd.grad(scores[:, :, 15].square().sum(), e)
    assert grad[0].abs().sum((1, 2)).nonzero().flatten().tolist() == [7, 9, 11, 13, 15]


# -- causality, stage by stage


def stages(layer: SEA, x: Tensor) -> dict[str, Tensor]:
    """What every stage of the layer makes of x, time second."""
    where = place(x, None, None)
    q, k, v = layer.project(x, where.positions)
    scaled = q * layer.key_dim**-0.5
    context, _ = layer.estimator.context(scaled, k, v, where, None, None, False)
    mixed = layer._mix(q, k, v, where, None, None)
    mean, _ = running_mean(v, None, segments=None, want_state=False, backend="auto")
    maps = layer.attention_maps(x)
    return {
        "features": layer.estimator.feature_map(k),
        "context": context,
        "gates": torch.cat(mixed.gates, -1),
        "scores": mixed.scores.transpose(1, 2),
        "cells": mixed.cells.transpose(1, 2),
        "mask": maps.mask.transpose(1, 2),
        "mean": mean,
        "output": layer(x)[0],
    }


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["relu", "exp"])
def test_no_stage_sees_what_follows(kernel):
    """Bit for bit, with fewer tokens than cells, as many, and more; keys grow tenfold."""
    layer = small_layer(torch.float32, kernel=kernel)
    T = 24
    x = tokens(T, torch.float32)
    expected = stages(layer, x)
    for t in (1, M - 1, M, M + 1, 20):
        changed = x.clone()
        changed[:, t:] = 10 * torch.randn(2, T - t, D)
        for name, got in stages(layer, changed).items():
            assert torch.equal(got[:, :t], expected[name][:, :t]), f"{name} before {t}"


@torch.no_grad()
def test_a_prefix_alone_is_the_beginning_of_the_whole():
    """Masks too, exactly; values to the rounding of other tile sizes."""
    layer = small_layer()
    x = tokens(40)
    expected = stages(layer, x)
    for n in (1, 5, M, 30):
        for name, got in stages(layer, x[:, :n]).items():
            whole = expected[name][:, :n]
            if name == "mask":
                assert torch.equal(got, whole[..., :n])
            elif got.dtype is torch.bool:
                assert torch.equal(got, whole)
            else:
                assert_near(got, whole)


@torch.no_grad()
def test_share_of_earlier_outputs_that_later_tokens_change():
    """The leak, as a number: 0 of all outputs before the last 8 tokens."""
    layer = small_layer(torch.float32)
    x = tokens(64, torch.float32, B=4)
    changed = x.clone()
    changed[:, -8:] = 4 * torch.randn(4, 8, D)
    before, after = layer(x)[0][:, :-8], layer(changed)[0][:, :-8]
    assert (before != after).double().mean().item() == 0.0


# -- what it computes


@torch.no_grad()
def test_is_softmax_attention_when_k_covers_all_and_gates_are_open():
    layer = small_layer(k_cells=40)
    layer.estimator.encoder.gate.weight.zero_()
    layer.estimator.encoder.gate.bias.fill_(1e3)  # sigmoid is 1 exactly
    dense = Attention(D, num_heads=H).double()
    dense.load_state_dict({n: p for n, p in layer.state_dict().items() if "proj." in n})
    x = tokens(40)
    assert_near(layer(x)[0], dense(x)[0])


@torch.no_grad()
def test_estimate_of_the_true_map_finds_the_true_output():
    """Cells as fine as tokens and the dense map as the estimate: the error goes to 0 with k."""
    T = 48
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, T, H, 8, dtype=torch.float64) for _ in range(3))
    q = 2 * q  # some tokens matter, most do not
    scores = torch.einsum("bthd,bshd->bhts", q, k).masked_fill(
        torch.ones(T, T).triu(1).bool(), float("-inf")
    )
    weights = scores.softmax(-1)
    exact = torch.einsum("bhts,bshd->bthd", weights, v)
    # Of the T cells of a row of L < T tokens, L cover one each.
    t, s = torch.arange(T)[:, None], torch.arange(T)
    cell = cell_of_token(s.clamp(max=t), t + 1, T).expand_as(weights)
    probs = torch.zeros_like(weights).scatter_reduce(-1, cell, weights, "sum")
    errors = []
    for k_cells in (1, 4, 16, 48):
        y = estimated_sparse_attention(q, k, v, probs, k_cells=k_cells, scale=1.0)
        errors.append((y - exact).square().mean().sqrt().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.1 * errors[0]
    assert errors[3] < 1e-12
    random = estimated_sparse_attention(q, k, v, torch.rand_like(probs), k_cells=4, scale=1.0)
    assert (random - exact).square().mean().sqrt() > 2 * errors[1]


@torch.no_grad()
def test_k_may_be_raised_after_training():
    layer, x = small_layer(), tokens(50)
    reports = []
    for layer.k_cells in (2, 8, 50):
        reports.append(Report())
        layer(x, report=reports[-1])
    attended = [r.stats["tokens_attended"].item() for r in reports]
    assert attended == sorted(attended)
    assert attended[-1] == pytest.approx(51 / 2)  # every token of every prefix
    assert reports[-1].stats["empty_rows"] == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "padded"])
def test_maps_are_what_the_layer_does(kind, tmp_path):
    layer, T = small_layer(), 21
    x, segments = tokens(T), documents(2, T, kind)
    maps = layer.attention_maps(x, segments=segments)
    where = place(x, None, segments)
    _, _, v = layer.project(x, where.positions)
    out = torch.einsum("bhts,bshd->bthd", maps.effective, v)
    y = layer(x, segments=segments)[0]
    valid = slice(None) if segments is None else segments >= 0
    assert_near(layer.merge(out)[valid], y[valid])
    assert ((maps.sparse > 0) == maps.mask).all()
    rows = maps.sparse.sum(-1)
    assert ((rows - 1).abs().minimum(rows.abs()) < 1e-12).all()
    sees = torch.ones_like(rows, dtype=torch.bool)
    if segments is not None:
        sees &= (segments >= 0)[:, None]
    torch.testing.assert_close(maps.estimate.sum(-1), sees.double())
    torch.testing.assert_close(maps.compressed.sum(-1), torch.ones_like(rows))
    if kind is None:
        for causal in (maps.estimate, maps.sparse, maps.effective):
            assert not causal.triu(1).any()
    maps.draw(tmp_path / "maps.png", heads=1)
    assert (tmp_path / "maps.png").stat().st_size > 1000


@torch.no_grad()
def test_positions_beyond_the_table():
    x = tokens(30)
    with pytest.raises(ValueError, match="a document of 30 tokens; expected at most max_len=20"):
        small_layer(max_len=20)(x)
    layer = small_layer(max_len=20, beyond="last")
    y, state = layer(x[:, :25], want_state=True)
    later, _ = layer(x[:, 25:], state)
    assert_near(torch.cat([y, later], 1), layer(x)[0])
    wide = small_layer(max_len=64)
    wide.estimator.position_table[:20] = layer.estimator.position_table
    wide.load_state_dict(
        {n: p for n, p in layer.state_dict().items() if "position_table" not in n}, strict=False
    )
    assert_near(wide(x[:, :20])[0], layer(x[:, :20])[0])


@torch.no_grad()
def test_grouped_heads_share_keys():
    layer = small_layer(num_kv_heads=1)
    full = small_layer()
    state = layer.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].repeat(2, 1)
    full.load_state_dict(state)
    x = tokens(20)
    assert_near(layer(x)[0], full(x)[0])


@torch.no_grad()
def test_only_the_cache_grows():
    layer = small_layer(torch.float32)
    sizes = []
    for T in (16, 48):
        _, state = layer(tokens(T, torch.float32), want_state=True)
        assert state is not None
        sizes.append(state_nbytes(state) - state_nbytes(state.cache))
    assert sizes[0] == sizes[1]


# -- what it learns from


def test_gradients_of_the_task_and_of_the_estimate():
    """The choice of cells passes none: the task leaves the decoder alone, the estimate does not."""
    layer, x = small_layer(), tokens(30)
    named = dict(layer.estimator.named_parameters())
    names = list(named)
    report = Report()
    y, _ = layer(x, report=report)
    for loss, reaches_decoder in ((y.square().mean(), False), (report.losses["estimation"], True)):
        found = torch.autograd.grad(
            loss, list(named.values()), allow_unused=True, retain_graph=True
        )
        for name, grad in zip(names, found, strict=True):
            got = grad is not None and bool(grad.abs().max() > 0)
            if name.startswith("decoder"):
                assert got == reaches_decoder, name
            elif name.startswith("encoder.gate"):
                assert got != reaches_decoder, name
            else:
                assert got, name


def plain_imitation(layer: SEA, teacher: Attention, x: Tensor) -> dict[str, Tensor]:
    """The losses from whole matrices, as the definition has them."""
    T = x.shape[1]
    future = torch.ones(T, T).triu(1).bool()
    where = place(x, None, None)

    def log_softmax(s: Tensor) -> Tensor:
        return s.masked_fill(future, float("-inf")).log_softmax(-1)

    def scores(mixer: SEA | Attention) -> Tensor:
        q, k, _ = mixer.project(x, where.positions)
        return torch.einsum("bthd,bshd->bhts", q, k) * 8**-0.5

    q, k, v = layer.project(x, where.positions)
    mixed = layer._mix(q, k, v, where, None, None, learn=True)
    cells = (torch.arange(T) + 0.5) / torch.arange(1, T + 1)[:, None] * M - 1e-4
    stretched = mixed.scores.take_along_dim(cells.clamp(0, M - 1).long()[None, None], -1)
    target = log_softmax(scores(teacher))
    parts = {}
    for name, other in (("", log_softmax(stretched)), ("student_", log_softmax(scores(layer)))):
        p, s = target.exp(), other.exp()
        difference = (target - other).masked_fill(future, 0)
        parts[name + "kl"] = (p * difference).sum(-1).mean()
        parts[name + "mse"] = (p - s).square().mean()
    _, _, teacher_v = teacher.project(x, where.positions)
    context = torch.einsum("bhts,bshd->bthd", target.exp(), teacher_v)
    parts["context_mse"] = (mixed.out - context).square().mean()
    kl = 0.1 * (parts["kl"] + parts["student_kl"])
    parts["loss"] = kl + parts["mse"] + parts["student_mse"] + parts["context_mse"]
    return parts


def test_imitation_loss_is_its_definition(monkeypatch):
    """Values and all gradients, in chunks of three queries."""
    monkeypatch.setattr("layers.sea_losses._CHUNK", 3 * 2 * H * 19)
    layer, teacher, x = small_layer(), small_teacher(), tokens(19)
    got, expected = layer.imitation_loss(x, teacher), plain_imitation(layer, teacher, x)
    assert next(iter(got)) == "loss"
    assert set(got) == {*expected, "entropy", "teacher_entropy"}
    for name, value in expected.items():
        assert_near(got[name], value)
    assert 0 < got["teacher_entropy"] < np.log(19)
    assert 0 < got["entropy"] < np.log(19)
    parameters = [p for p in layer.parameters() if p is not layer.o_proj.weight]
    assert all(p.grad is None for p in teacher.parameters())
    for a, b in zip(
        torch.autograd.grad(got["loss"], parameters),
        torch.autograd.grad(expected["loss"], parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_imitation_loss_of_packed_documents_is_that_of_each():
    layer, teacher, x = small_layer(), small_teacher(), tokens(20)
    segments = torch.tensor([[0] * 7 + [3] * 11 + [-1] * 2, [-1] + [1] * 19])
    got = layer.imitation_loss(x, teacher, segments=segments)
    total = {name: torch.zeros(()).double() for name in got}
    for b, start, end in ((0, 0, 7), (0, 7, 18), (1, 1, 20)):
        one = layer.imitation_loss(x[b : b + 1, start:end], teacher)
        for name, value in one.items():
            total[name] = total[name] + value * (end - start) / 37
    for name, value in got.items():
        assert_near(value, total[name])
    nothing = layer.imitation_loss(x, teacher, segments=torch.full((2, 20), -1))
    nothing["loss"].backward()
    assert nothing["loss"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.slow
def test_imitation_learns_where_the_teacher_looks():
    """The estimate's KL falls by more than half in 30 steps; the teacher stays as it is."""
    torch.manual_seed(1)
    teacher = Attention(64, num_heads=2)
    teacher.q_proj.weight.data.mul_(4)  # attention that is not flat
    layer = SEA(64, num_heads=2, num_cells=32, max_len=64, num_features=64)
    layer.load_state_dict(teacher.state_dict(), strict=False)
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.Adam(layer.estimator.parameters(), 5e-3)
    x = torch.randn(8, 32, 64)
    kls = []
    for _ in range(30):
        losses = layer.imitation_loss(x, teacher)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        kls.append(losses["kl"].item())
    assert kls[-1] < 0.5 * kls[0], f"{kls[0]:.3f} -> {kls[-1]:.3f}"
    assert losses["student_kl"] < 1e-6
    assert all(torch.equal(p, before[n]) for n, p in teacher.state_dict().items())


def test_estimation_needs_no_teacher():
    """Its target is the layer's own dense attention; in training the queries are drawn."""
    layer, x = small_layer(estimation_rows=40), tokens(40)
    report = Report()
    layer(x, report=report)
    own = Attention(D, num_heads=H).double()
    own.load_state_dict({n: p for n, p in layer.state_dict().items() if "proj." in n})
    parts = layer.imitation_loss(x, own)  # all queries, in evaluation mode
    assert_near(report.losses["estimation"], 0.1 * parts["kl"] + parts["mse"])
    silent = Report()
    small_layer(estimation_rows=0)(x, report=silent)
    assert not silent.losses
    layer.train()
    drawn = [Report() for _ in range(2)]
    for r in drawn:
        layer(x, report=r)
    assert drawn[0].losses["estimation"] != drawn[1].losses["estimation"]


# -- parameters


def test_initialisation_survives_the_model():
    torch.manual_seed(0)
    layer = SEA(32, num_heads=2)
    chosen = {name: p.detach().clone() for name, p in layer.named_parameters()}
    LanguageModel(11, 32, [layer], [None], RMSNorm)
    for name, p in layer.named_parameters():
        assert torch.equal(p, chosen[name]) == name.startswith("estimator"), name
    table = layer.estimator.position_table
    assert table.std().item() == pytest.approx(1, abs=0.02)
    # torch's own: uniform within fan_in^-1/2.
    decoder = layer.estimator.decoder
    for weight, fan_in in ((decoder.conv1.weight, 36), (layer.estimator.encoder.linear.weight, 48)):
        assert 0.9 * fan_in**-0.5 < weight.abs().max() <= fan_in**-0.5


def test_what_decays():
    decays = {n for n, _, m in marked_parameters(SEA(16, num_heads=2, bias=True)) if m.decay}
    estimator = ("encoder.linear", "encoder.gate", "decoder.rows")
    convolutions = ("conv1", "conv2", "conv3")
    assert decays == {
        *(f"{name}_proj.weight" for name in "qkvo"),
        *(f"estimator.{name}.weight" for name in estimator),
        *(f"estimator.decoder.{name}.weight" for name in convolutions),
        "estimator.position_table",
    }


def test_sizes_are_the_public_codes():
    """H = 12, K = 64, M = 256, 2048 positions: what it uses, less its taps into the future."""
    with torch.device("meta"):
        layer = SEA(768, num_heads=12, num_cells=256)
    assert sum(p.numel() for p in layer.estimator.parameters()) == 191_070 - 6_912
    assert layer.estimator.feature_map.num_features == 33


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3: expected a divisor of d_model=16"),
        ({"num_cells": 10}, "num_cells=10: expected a positive multiple of 4"),
        ({"num_cells": 0}, "num_cells=0: expected a positive multiple of 4"),
        ({"num_cells": 128}, "num_cells=128: expected at most max_len=64, the tokens"),
        ({"k_cells": 0}, "k_cells=0: expected at least 1"),
        ({"num_features": 0}, "num_features=0"),
        ({"kernel": "softmax"}, "kernel='softmax': allowed: relu, exp"),
        ({"grouping": "batch"}, "grouping='batch': allowed: causal_batch, query"),
        ({"beyond": "wrap"}, "beyond='wrap': allowed: refuse, last"),
        ({"estimation_rows": -1}, "estimation_rows=-1: expected at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small_layer(**options)


def test_bad_teacher():
    with pytest.raises(ValueError, match="teacher has 4 heads of 4; expected 2 of 8"):
        small_layer().imitation_loss(tokens(5), Attention(D, num_heads=4).double())


# -- cost


@torch.no_grad()
def test_flops_are_linear_in_time():
    """At the paper's sizes, whose budget stays above one cell up to 200 thousand tokens."""
    layer = SEA(64, num_heads=4, num_cells=32, k_cells=16, max_len=256)
    x = torch.randn(1, 256, 64)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == layer.flops(1, 256)
    with torch.device("meta"):
        paper = SEA(768, num_heads=12, num_cells=256, k_cells=64)
    assert np.log2(paper.flops(1, 32768) / paper.flops(1, 4096)) / 3 == pytest.approx(1, abs=0.01)


def training_peak(length: int) -> int:
    """Bytes that a step of one layer takes at its worst, the estimate's loss included."""
    torch.manual_seed(0)
    layer = SEA(32, num_heads=2, num_cells=32, k_cells=32, max_len=4096)
    x = torch.randn(1, length, 32, requires_grad=True)

    def step() -> None:
        report = Report()
        y, _ = layer(x, report=report)
        (y.sum() + report.losses["estimation"]).backward()

    return peak_bytes(step)


def test_training_memory_is_linear():
    short, middle, long = (training_peak(length) for length in (512, 1024, 2048))
    assert (long - middle) / (middle - short) == pytest.approx(2, rel=0.15)  # tiles are constant


def test_memory_of_imitation_is_linear(monkeypatch):
    """Twice the length, about twice the memory: queries go in chunks, here of 64 and 32."""
    monkeypatch.setattr("layers.sea_losses._CHUNK", 64 * H * 512)
    layer = small_layer(torch.float32, max_len=1024, num_cells=32)
    teacher = small_teacher(torch.float32)
    peaks = []
    for T in (512, 1024):
        x = torch.randn(1, T, D)
        peaks.append(peak_bytes(lambda x=x: layer.imitation_loss(x, teacher)["loss"].backward()))
    assert peaks[1] < 2.2 * peaks[0]


@pytest.mark.slow
def test_time_and_memory_exponents():
    """A forward pass between 4 and 32 thousand tokens: T to the power of 1, in CPU time."""
    torch.manual_seed(0)
    layer = SEA(64, num_heads=2, num_cells=256, k_cells=64, max_len=32768)
    lengths, seconds, peaks = (4096, 8192, 16384, 32768), [], []
    with torch.inference_mode():
        for T in lengths:
            x = torch.randn(1, T, 64)
            layer(x)
            times = []
            for _ in range(3):
                start = process_time()
                layer(x)
                times.append(process_time() - start)
            seconds.append(min(times))
            peaks.append(peak_bytes(lambda x=x: layer(x)))
    for what, values in (("time", seconds), ("memory", peaks)):
        slope = np.polyfit(np.log(lengths), np.log(values), 1)[0]
        print(f"{what}: exponent {slope:.3f}")
        assert slope == pytest.approx(1.0, abs=0.1), f"{what}: {slope:.3f}"


@pytest.mark.slow
def test_a_tiny_model_trains_on_16384_tokens_in_6_gib():
    """Four layers of width 256 with their channel mixers, the estimate's loss too, float32."""
    torch.manual_seed(0)
    mixers = [SEA(256, num_heads=4, max_len=16384) for _ in range(4)]
    model = LanguageModel(8192, 256, mixers, [SwiGLU(256) for _ in mixers], RMSNorm)
    ids = torch.randint(8192, (1, 16385))

    def step() -> None:
        report = Report()
        h, _ = model.hidden(ids[:, :-1], report=report)
        loss = linear_cross_entropy(h.flatten(0, 1), model.head_weight, ids[0, 1:])
        sum(report.losses.values(), loss).backward()

    peak = peak_bytes(step)
    print(f"peak {peak / 2**30:.2f} GiB")
    assert peak < 6 * 2**30
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
