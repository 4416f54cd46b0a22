"""Routing attention as a layer: its definition, its centroids, what it reports, its cost.

B batch, T time, D model width, H routing heads, K clusters, W window, Dh head width.
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import peak_bytes
from kernels import linear_cross_entropy
from layers.channel_mixer import SwiGLU
from layers.kmeans_router import KMeansRouter
from layers.norm import RMSNorm
from layers.report import Report
from layers.rotary import rotate, rotation
from layers.routing import RoutingAttention
from layers.routing_heads import RoutingHeads
from layers.routing_topw import TopWRoutingAttention
from models.language_model import LanguageModel
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
D, K, W = 16, 3, 5
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums of up to a hundred terms
BOTH = pytest.mark.parametrize("kind", [RoutingAttention, TopWRoutingAttention])


def small(kind: type[RoutingHeads] = RoutingAttention, **options) -> RoutingHeads:
    """One routing head and one local head of 8 features."""
    torch.manual_seed(0)
    options = {"num_clusters": K, "window": W, "local_window": 4, **options}
    return kind(D, num_heads=2, **options).double()


def tokens(T: int, B: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, D, generator=generator, dtype=torch.float64)


def train_once(layer: RoutingHeads, x: Tensor, **context) -> None:
    layer.train()(x, **context)[0].sum().backward()


def centroids(layer: RoutingHeads) -> Tensor:
    return layer.router.centroids.clone()


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("rule", ["allowed", "last_resort"])
@pytest.mark.parametrize("shared", [True, False])
def test_strict_is_its_definition(shared, rule, rotary):
    layer = small(shared_qk=shared, self_rule=rule, rotary=rotary, num_routing_heads=2)
    x, T = tokens(23), 23
    with torch.no_grad():
        y, _ = layer.eval()(x)
        q, v = (p(x).view(2, T, 2, 8).transpose(1, 2) for p in (layer.q_proj, layer.v_proj))
        k = layer.k_proj(x).view(2, T, 2, 8).transpose(1, 2) if layer.k_proj else q
        mu = layer.router.centroids
        q_label, k_label = ((z @ mu.mT).argmax(-1) for z in (q, k))
        seen = torch.zeros(2, 2, T, T, dtype=torch.bool)
        for b, h, i in [(b, h, i) for b in range(2) for h in range(2) for i in range(T)]:
            same = [j for j in range(i + 1) if k_label[b, h, j] == q_label[b, h, i]][-W:]
            others = [j for j in same if j != i]
            seen[b, h, i, others] = True
            seen[b, h, i, i] = rule == "allowed" or not others
        k = normalize(k, dim=-1) if shared else k
        if rotary:
            by = rotation(torch.arange(T), 8, dtype=torch.float64)
            q, k = (rotate(z.transpose(1, 2), by).transpose(1, 2) for z in (q, k))
        heads = scaled_dot_product_attention(q, k, v, attn_mask=seen)
        expected = layer.o_proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, expected, **EXACT)


@BOTH
def test_local_heads_are_beside_the_routing_heads(kind):
    layer, x = small(kind).eval(), tokens(11)
    y, _ = layer(x)
    local, _ = layer.local(x)
    layer.local = None
    torch.testing.assert_close(y, layer(x)[0] + local, **EXACT)


@pytest.mark.parametrize("shared", [True, False])
def test_decoding_far_beyond_the_buffers(shared):
    """Rings go round many times; a chunk longer than a ring, one token, chunks again."""
    layer, x = small(shared_qk=shared).eval(), tokens(90)
    with torch.no_grad():
        expected, end = layer(x, want_state=True)
        outputs, state, start = [], None, 0
        for size in (40, *[1] * 20, 7, 23):
            y, state = layer(x[:, start : start + size], state, want_state=True)
            outputs.append(y)
            start += size
    torch.testing.assert_close(torch.cat(outputs, 1), expected, **EXACT)
    assert torch.equal(state.buffer.count, end.buffer.count)
    torch.testing.assert_close(state.buffer.k, end.buffer.k, **EXACT)


def changed_share(name: str, last: int, T: int = 96) -> float:
    """Share of a whole model's logits before the `last` tokens that change with these."""
    model = tiny_model(name).double().eval()
    ids = torch.randint(31, (2, T), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, T - last :] = (ids[:, T - last :] + 7) % 31
    with torch.no_grad():
        first, second = (model(each)[0][:, : T - last] for each in (ids, other))
    # Beyond the order of float64 sums, relative to logits of size 10.
    return ((first - second).abs().amax(-1) > 1e-10).double().mean().item()


def test_share_of_earlier_outputs_that_change():
    assert changed_share("routing", 20) == changed_share("routing", 1) == 0.0
    assert changed_share("routing_topw", 20) > 0.05
    assert RoutingAttention.causal == "strict"
    assert TopWRoutingAttention.causal == "leaky"
    assert tiny_model(["routing", "routing_topw"]).leak_reason.startswith("later tokens decide")


def test_topw_decodes_by_prefixes():
    """Token by token is the last row of every prefix, and not the parallel pass."""
    layer, x = small(TopWRoutingAttention).eval(), tokens(30)
    with torch.no_grad():
        whole, _ = layer(x)
        prefixes = [layer(x[:, : t + 1])[0][:, -1:] for t in range(30)]
        outputs, state = [], None
        for t in range(30):
            y, state = layer(x[:, t : t + 1], state, want_state=True)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), torch.cat(prefixes, 1), **EXACT)
    assert not torch.allclose(torch.cat(outputs, 1), whole, atol=1e-3)


@BOTH
def test_centroids_come_from_the_first_training_batch(kind):
    layer = small(kind)
    fresh, x = centroids(layer), tokens(40)
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)  # a rehearsal
    assert torch.equal(centroids(layer), fresh)
    assert not layer.router.initialised
    train_once(layer, x[:1, : K - 1])
    assert not layer.router.initialised, "too few tokens"
    train_once(layer, x)
    assert layer.router.initialised
    drawn = centroids(layer)
    assert not torch.equal(drawn, fresh)
    torch.testing.assert_close(drawn.norm(dim=-1), torch.ones(1, K, dtype=torch.float64), **EXACT)
    train_once(layer, tokens(40, seed=3))
    assert torch.equal(centroids(layer), drawn), "drawn once, moved by after_step only"


@BOTH
def test_centroids_move_once_per_update_by_all_micro_batches(kind):
    x = tokens(40, B=4)
    whole, parts = small(kind, decay=0.5), small(kind, decay=0.5)
    for layer in (whole, parts):
        torch.manual_seed(0)
        train_once(layer, x)
        layer.router.after_step()
    before = centroids(whole)
    train_once(whole, x)
    for rows in (x[:1], x[1:]):
        train_once(parts, rows)
    assert torch.equal(centroids(parts), before)
    for layer in (whole, parts):
        layer.router.after_step()
    moved = centroids(whole)
    assert not torch.equal(moved, before)
    torch.testing.assert_close(centroids(parts), moved, **EXACT)
    torch.testing.assert_close(moved.norm(dim=-1), torch.ones(1, K, dtype=torch.float64), **EXACT)
    whole.router.after_step()
    assert torch.equal(centroids(whole), moved), "nothing was observed since"


@BOTH
def test_what_leaves_no_trace(kind):
    """Evaluation, decoding, passes without gradients, padding; activations made again."""
    layer, x = small(kind, decay=0.5), tokens(40)
    train_once(layer, x)
    layer.router.after_step()
    before = centroids(layer)
    _, state = layer.eval()(x, want_state=True)
    layer(x[:, :1], state)[0].sum().backward()
    with torch.no_grad():
        layer.train()(x)
    layer(x, segments=torch.full((2, 40), -1))
    layer.router.after_step()
    assert torch.equal(centroids(layer), before)
    again, x = copy.deepcopy(layer), tokens(40, seed=3)
    train_once(layer, x)
    z = x.clone().requires_grad_()
    checkpoint(lambda z: again(z)[0], z, use_reentrant=False).sum().backward()
    for each in (layer, again):
        each.router.after_step()
    assert not torch.equal(centroids(layer), before)
    assert torch.equal(centroids(again), centroids(layer))


@pytest.mark.parametrize("update", ["count_ema", "unit_ema"])
def test_an_empty_cluster_keeps_every_bit(update):
    router = KMeansRouter(2, 4, 8, decay=0.5, update=update)
    before = router.centroids.clone()
    x = before[None, None, :, 1] + 0.01 * torch.randn(3, 7, 2, 8)
    router.initialised.fill_(True)
    router.observe(x, router.labels(x), None)
    router.after_step()
    assert torch.equal(router.centroids[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert not torch.equal(router.centroids[:, 1], before[:, 1])


@BOTH
def test_centroids_survive_the_state_dict(kind, tmp_path):
    layer, x = small(kind, decay=0.5), tokens(40)
    train_once(layer, x)
    layer.router.after_step()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    twin = small(kind, decay=0.5)
    twin.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    for each in (layer, twin):
        train_once(each, x)
        each.router.after_step()
    for (name, a), b in zip(layer.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert twin.router.initialised


WORKER = """
import sys
import torch
import torch.distributed as dist
from layers.kmeans_router import KMeansRouter

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(rank)  # fresh centroids and draws differ
router = KMeansRouter(2, 4, 8, decay=0.5).double()
x = torch.randn(4, 30, 2, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
mine = x[2 * rank : 2 * rank + 2]
router.prepare([mine], None)
drawn = router.state_dict()
torch.save({n: t.clone() for n, t in drawn.items()}, f"{out}.drawn.{rank}")
for part in mine.split(1):  # two micro-batches
    router.observe(part, router.labels(part), None)
router.after_step()
torch.save(router.state_dict(), f"{out}.moved.{rank}")
dist.destroy_process_group()
"""


def test_two_processes_move_as_one(tmp_path):
    """gloo: the first process's draw for both, then the sums of both."""
    arguments = [str(tmp_path / "store"), str(tmp_path / "out")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), *arguments],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 0, error

    def saved(what: str, rank: int) -> dict[str, Tensor]:
        return torch.load(tmp_path / f"out.{what}.{rank}", weights_only=True)

    for what in ("drawn", "moved"):
        for name, value in saved(what, 0).items():
            assert torch.equal(value, saved(what, 1)[name]), f"{name} {what}"
    alone = KMeansRouter(2, 4, 8, decay=0.5).double()
    alone.load_state_dict(saved("drawn", 0))
    x = torch.randn(4, 30, 2, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    alone.observe(x, alone.labels(x), None)
    alone.after_step()
    torch.testing.assert_close(alone.centroids, saved("moved", 0)["centroids"], **EXACT)
    assert not torch.equal(alone.centroids, saved("drawn", 0)["centroids"])


@pytest.mark.parametrize("shared", [True, False])
def test_commitment_trains_the_routed_projections_alone(shared):
    layer, report, x = small(shared_qk=shared), Report(), tokens(20)
    layer.eval()(x, report=report)
    (loss,) = report.losses.values()
    loss.backward()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert trained == ({"q_proj.weight"} if shared else {"q_proj.weight", "k_proj.weight"})
    q = normalize(layer.q_proj(x).view(2, 20, 1, 8), dim=-1)
    nearest = (q @ layer.router.centroids.mT).amax(-1)
    if shared:  # (x - mu)^2 over D_h numbers, of two unit vectors
        torch.testing.assert_close(loss, 1e-4 * (2 - 2 * nearest).mean() / 8, **EXACT)
    silent = Report()
    small(commitment=0.0).eval()(x, report=silent)
    assert not silent.losses


@BOTH
def test_what_is_logged(kind):
    layer, report = small(kind).eval(), Report()
    layer(tokens(50), report=report)
    shares = [report.stats[f"cluster_share/{r:03d}"] for r in range(K)]
    assert sum(shares).item() == pytest.approx(1, abs=1e-6)
    assert shares == sorted(shares, reverse=True)
    assert 1 <= report.stats["effective_clusters"] <= K
    assert report.stats["empty_clusters"] == 0
    assert ("in_no_cluster" in report.stats) == (kind is TopWRoutingAttention)
    assert all(value.ndim == 0 for value in report.stats.values())
    layer.router.centroids[:] = layer.router.centroids[:, :1]  # ties go to the first
    report = Report()
    layer(tokens(50), report=report)
    assert report.stats["empty_clusters"] == K - 1
    if kind is TopWRoutingAttention:
        assert report.stats["in_no_cluster"].item() == pytest.approx(1 - W / 50)


@BOTH
@torch.no_grad()
def test_bf16_autocast_routes_in_fp32(kind):
    layer, x = small(kind).float().eval(), tokens(40).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, want_state=True)
        scores = layer.router.similarities(layer.q_proj(x).view(2, 40, 1, 8))
    assert y.isfinite().all()
    assert scores.dtype is torch.float32
    assert layer.router.centroids.dtype is torch.float32
    if kind is RoutingAttention:
        assert state.buffer.k.dtype is torch.bfloat16


def test_names_and_sizes_of_parameters():
    layer = RoutingAttention(64, num_heads=4, num_routing_heads=3, shared_qk=False)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "q_proj.weight": (48, 64),
        "k_proj.weight": (48, 64),
        "v_proj.weight": (48, 64),
        "o_proj.weight": (64, 48),
        **{f"local.{n}_proj.weight": (16, 64) for n in "qkv"},
        "local.o_proj.weight": (64, 16),
    }
    assert RoutingAttention(64, num_heads=1).local is None
    assert RoutingAttention(64, num_heads=4).k_proj is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3: expected a divisor of d_model=16"),
        ({"num_routing_heads": 0}, "num_routing_heads=0: allowed: 1 to num_heads=2"),
        ({"num_routing_heads": 3}, "num_routing_heads=3: allowed: 1 to num_heads=2"),
        ({"head_dim": 0}, "head_dim=0: expected at least 1"),
        ({"head_dim": 3}, "rotary=True with 3 features per head"),
        ({"num_clusters": 0}, "num_clusters=0: expected at least 1"),
        ({"window": 0}, "window=0: expected at least 1"),
        ({"local_window": 0}, "window=0: expected at least 1"),
        ({"self_rule": "never"}, "self_rule='never': allowed: allowed, last_resort"),
        ({"decay": 1.0}, "decay=1.0: allowed: from 0 up to, but not, 1"),
        ({"update": "sum"}, "update='sum': allowed: count_ema, unit_ema"),
        ({"commitment": -1.0}, "commitment=-1.0: expected at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RoutingAttention(D, **{"num_heads": 2, **options})


def test_training_memory_grows_by_three_halves_at_most():
    def peak(T: int) -> int:
        W = int(T**0.5)
        layer = RoutingAttention(32, num_heads=2, num_clusters=W, window=W)
        x = torch.randn(1, T, 32, requires_grad=True)
        return peak_bytes(lambda: layer(x)[0].sum().backward())

    assert peak(4096) / peak(1024) < 4**1.5


@pytest.mark.slow
@BOTH
def test_a_tiny_model_trains_on_16384_tokens_in_6_gib(kind):
    """Four layers of width 256, K = W = sqrt(T), loss without logits, float32."""
    torch.manual_seed(0)
    mixers = [kind(256, num_heads=4, num_clusters=128, window=128) for _ in range(4)]
    model = LanguageModel(8192, 256, mixers, [SwiGLU(256) for _ in mixers], RMSNorm)
    ids = torch.randint(8192, (1, 16385))

    def step() -> None:
        report = Report()
        h, _ = model.hidden(ids[:, :-1], report=report)
        loss = linear_cross_entropy(h.flatten(0, 1), model.head_weight, ids[0, 1:])
        (loss + sum(report.losses.values())).backward()
        for mixer in mixers:
            mixer.router.after_step()

    assert peak_bytes(step) < 6 * 2**30
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
