"""Attention transfer: the losses by hand, what gradients reach, and that maps learn to imitate."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from layers.attention import Attention
from layers.attention_transfer import (
    attention_transfer_loss,
    feature_rows,
    softmax_rows,
    transfer_losses,
    window_rows,
)
from layers.feature_maps import EluFeatureMap, FeatureMap, HedgehogFeatureMap, ReluFeatureMap
from layers.hedgehog import HedgehogAttention
from layers.hedgehog_window import HedgehogWindowAttention
from tests.kernels.compare import LargestTensor, bytes_kept_for_backward

B, T, H, D, V = 2, 37, 2, 8, 5
WHOLE = slice(0, T)
NAMES = ["xent", "kl", "mse", "teacher_entropy", "student_entropy"]


def qkv(length: int = T) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(B, length, H, w, dtype=torch.float64, generator=generator) for w in (D, D, V)
    ]


def maps(**options) -> list[HedgehogFeatureMap]:
    torch.manual_seed(0)
    return [HedgehogFeatureMap(H, D, init="kaiming_per_head", **options).double() for _ in "qk"]


def by_hand(teacher: Tensor, student: Tensor, v: Tensor) -> dict[str, float]:
    """The definitions, from whole matrices (B, H, T, T)."""
    entropy = -(teacher * teacher.clamp(min=1e-300).log()).sum(-1).mean()
    xent = -(teacher * student.clamp(min=1e-12).log()).sum(-1).mean()
    error = torch.einsum("bhij,bjhv->bhiv", student - teacher, v).square().mean()
    own = -(student * student.clamp(min=1e-300).log()).sum(-1).mean()
    return dict(zip(NAMES, (xent, xent - entropy, error, entropy, own), strict=True))


@pytest.mark.parametrize("chunk", [1, 16, T - 1, T, 64])
@torch.no_grad()
def test_losses_are_the_definitions_in_any_chunks(chunk):
    q, k, v = qkv()
    query_map, key_map = maps()
    got = attention_transfer_loss(q, k, v, query_map, key_map, chunk=chunk)
    teacher = softmax_rows(q, k)(WHOLE)
    student = feature_rows(query_map(q), key_map(k), eps=1e-12)(WHOLE)
    assert list(got) == NAMES
    for name, value in by_hand(teacher, student, v).items():
        # float64 means of 10,000 terms in another order
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_cross_entropy_is_that_of_the_library():
    q, k, v = qkv()
    query_map, key_map = maps()
    got = attention_transfer_loss(q, k, v, query_map, key_map)["xent"]
    teacher, student = softmax_rows(q, k)(WHOLE), feature_rows(query_map(q), key_map(k), eps=0.0)
    log_student = student(WHOLE).clamp(min=1e-12).log()
    expected = cross_entropy(log_student.flatten(0, 2), teacher.flatten(0, 2))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)  # its rows sum to 1 + T 1e-12


@pytest.mark.parametrize("kind", ["softmax", "features", "window", "wide window", "no window"])
@torch.no_grad()
def test_rows_are_distributions_over_the_past_of_their_document(kind):
    q, k, _ = qkv()
    phi = [module(t) for module, t in zip(maps(), (q, k), strict=True)]
    segments = torch.tensor(
        [[0] * 11 + [2] * 26, [-1] * 3 + [0] * 9 + [-1] * 2 + [0] * 5 + [1] * 18]
    )
    width = {"window": 6, "wide window": T, "no window": 0}.get(kind)
    if kind == "softmax":
        rows = softmax_rows(q, k, segments=segments)
    elif kind == "features":
        rows = feature_rows(*phi, eps=1e-12, segments=segments)
    else:
        options = {"window": width, "window_weight": torch.tensor([0.1, 0.9]), "linear_weight": 1.0}
        rows = window_rows(q, k, *phi, eps=1e-12, segments=segments, **options)
    P = rows(WHOLE)
    valid = segments >= 0
    past = torch.ones(T, T).tril().bool() & (segments[:, :, None] == segments[:, None])
    assert (P >= 0).all()
    assert not P.masked_fill(past[:, None], 0).any()
    sums = P.sum(-1).transpose(1, 2)[valid]
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-9)
    torch.testing.assert_close(rows(slice(9, 20)), P[:, :, 9:20, :20], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_window_of_everything_has_the_teachers_weights():
    q, k, v = qkv()
    phi = [module(t) for module, t in zip(maps(), (q, k), strict=True)]
    teacher = softmax_rows(q, k)
    student = window_rows(q, k, *phi, window=T, window_weight=0.1, linear_weight=1.0, eps=0.0)
    got = transfer_losses(teacher, student, v, v)
    assert abs(got["kl"]) < 1e-9, "the cross entropy is at its minimum, the entropy of the teacher"
    assert got["mse"] < 1e-20


@torch.no_grad()
def test_cross_entropy_is_never_below_the_teachers_entropy():
    q, k, v = qkv()
    for seed in range(5):
        torch.manual_seed(seed)
        drawn = [HedgehogFeatureMap(H, D, init="kaiming_per_head").double() for _ in "qk"]
        for scale in (0.1, 1, 10):
            assert attention_transfer_loss(q * scale, k, v, *drawn)["kl"] >= 0


@torch.no_grad()
def test_padding_and_documents_count_as_separate_runs():
    q, k, v = qkv(20)
    query_map, key_map = maps()
    segments = torch.tensor([[0] * 8 + [1] * 12, [-1] * 2 + [0] * 5 + [-1] * 3 + [0] * 10])
    got = attention_transfer_loss(q, k, v, query_map, key_map, segments=segments, chunk=7)
    parts = [(0, segments[0] == 0), (0, segments[0] == 1), (1, segments[1] == 0)]
    total = dict.fromkeys(NAMES, torch.zeros(()).double())
    for row, keep in parts:
        alone = attention_transfer_loss(
            *(t[row : row + 1, keep] for t in (q, k, v)), query_map, key_map
        )
        for name in NAMES:
            total[name] = total[name] + alone[name] * keep.sum()
    for name in NAMES:
        torch.testing.assert_close(got[name], total[name] / 35, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_given_weights_take_the_place_of_softmax():
    q, k, v = qkv()
    given = softmax_rows(q, k)(WHOLE)
    losses = [attention_transfer_loss(q, k, v, *maps(), teacher=t) for t in (None, given)]
    for name in NAMES:
        torch.testing.assert_close(losses[0][name], losses[1][name])


@pytest.mark.parametrize("make", [HedgehogAttention, HedgehogWindowAttention])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_layers_imitate_a_layer(make, kv_heads):
    """The same projections: only the maps differ, and only they get a gradient if only they may."""
    torch.manual_seed(0)
    heads = {"num_heads": 2, "num_kv_heads": kv_heads}
    teacher, student = Attention(16, **heads).double(), make(16, **heads).double()
    student.load_state_dict(teacher.state_dict(), strict=False)
    new = dict(student.named_parameters()).keys() - dict(teacher.named_parameters()).keys()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in new)
    x = torch.randn(2, 70, 16, dtype=torch.float64) * 3
    losses = student.imitation_loss(x, teacher)
    assert list(losses) == ["loss", *NAMES]
    assert torch.equal(losses["loss"], losses["xent"])
    assert losses["kl"] > 0
    losses["loss"].backward()
    with_gradient = {name for name, p in student.named_parameters() if p.grad is not None}
    assert with_gradient == new
    assert not any(p.grad is not None for p in teacher.parameters())
    if make is HedgehogAttention:
        q, k, v = teacher.project(x, torch.arange(70))
        k, v = teacher.to_all_heads(k), teacher.to_all_heads(v)
        expected = attention_transfer_loss(q, k, v, student.query_map, student.key_map)
        torch.testing.assert_close(losses["kl"], expected["kl"])
    with torch.no_grad():  # the error is that of the outputs before they are projected back
        for layer in (student, teacher):
            layer.o_proj.weight.copy_(torch.eye(16))
        error = (student(x)[0] - teacher(x)[0]).square().mean()
    torch.testing.assert_close(losses["mse"].detach(), error)


def test_what_cannot_imitate():
    teacher, x = Attention(16, num_heads=2), torch.randn(1, 5, 16)
    with pytest.raises(ValueError, match="num_heads=4: expected the teacher's 2"):
        HedgehogAttention(16, num_heads=4).imitation_loss(x, teacher)
    with pytest.raises(ValueError, match="normalize=False"):
        HedgehogAttention(16, num_heads=2, normalize=False).imitation_loss(x, teacher)


def test_memory_is_linear_in_the_length():
    """No tensor is larger than a chunk of weights, and no chunk of them waits for backward."""
    kept, chunk = [], 16
    for length in (64, 256):
        q, k, v = qkv(length)
        drawn = maps()
        with LargestTensor() as largest:
            attention_transfer_loss(q, k, v, *drawn, chunk=chunk)["xent"].backward()
        assert largest.numel <= max(B * H * chunk * length, q.numel() * 2)
        kept.append(
            bytes_kept_for_backward(
                lambda q=q, k=k, v=v, drawn=drawn: attention_transfer_loss(
                    q, k, v, *drawn, chunk=chunk
                )["xent"]
            )
        )
    assert kept[1] <= 4.2 * kept[0]


def toy(seed: int = 0) -> list[Tensor]:
    """Queries and keys of two heads of width 32 whose scores have rank 4, 128 positions."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(1, 128, 2, 4, generator=generator)
    mix = torch.randn(2, 2, 4, 32, generator=generator)
    q, k = (torch.einsum("bthr,hrd->bthd", source, m) / 2 for m in mix)
    return [q, k, torch.randn(1, 128, 2, 32, generator=generator)]


def train(query_map: FeatureMap, key_map: FeatureMap, steps: int) -> tuple[float, float]:
    """KL in the toy before and after `steps` steps."""
    q, k, v = toy()
    parameters = [*query_map.parameters(), *key_map.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    before = float(attention_transfer_loss(q, k, v, query_map, key_map)["kl"].detach())
    for _ in range(steps):
        optimizer.zero_grad()
        attention_transfer_loss(q, k, v, query_map, key_map)["xent"].backward()
        optimizer.step()
    return before, float(attention_transfer_loss(q, k, v, query_map, key_map)["kl"].detach())


def spearman(a: Tensor, b: Tensor) -> float:
    """Mean rank correlation of the rows' weights over the past, rows of at least 8 keys."""
    found = []
    for i in range(8, a.shape[2]):
        ranks = [x[..., i, : i + 1].argsort(-1).argsort(-1).double() for x in (a, b)]
        ranks = [r - r.mean(-1, keepdim=True) for r in ranks]
        found.append((ranks[0] * ranks[1]).sum(-1) / ranks[0].square().sum(-1))
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("activation", ["softmax", "exp", "joint"])
def test_maps_learn_to_imitate_softmax(activation):
    """KL 0.55, 0.47, 0.51 at the identity; 0.075, 0.046, 0.065 after 200 steps."""
    drawn = [HedgehogFeatureMap(2, 32, activation=activation) for _ in "qk"]
    before, after = train(*drawn, steps=200)
    assert after < before / 4


@pytest.mark.slow
def test_what_was_learned_is_softmax_in_rank_and_in_entropy():
    """After 400 steps: rank correlation 0.956, entropy 3.32 for the teacher's 3.18."""
    drawn = [HedgehogFeatureMap(2, 32) for _ in "qk"]
    train(*drawn, steps=400)
    q, k, v = toy()
    with torch.no_grad():
        teacher = softmax_rows(q, k)(slice(0, 128))
        student = feature_rows(drawn[0](q), drawn[1](k), eps=1e-12)(slice(0, 128))
        learned = attention_transfer_loss(q, k, v, *drawn)
        others = [
            attention_transfer_loss(q, k, v, other, other)["student_entropy"]
            for other in (EluFeatureMap(32), ReluFeatureMap(32))
        ]
    assert spearman(teacher, student) > 0.95
    goal = learned["teacher_entropy"]
    distance = (learned["student_entropy"] - goal).abs()
    assert all(distance < (other - goal).abs() for other in others), "1 + elu and relu are flatter"
