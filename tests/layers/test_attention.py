"""Softmax attention and its cache: the formula, grouped heads, what appending costs and shows.

B batch, T time, S slots, H heads, G key heads, D head width.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from layers.attention import Attention
from layers.kv_cache import newest
from layers.rotary import rotate, rotation
from layers.sliding_window import SlidingWindowAttention
from layers.state import select_batch, tensors

ROUNDING = 1e-12  # float64, sums of a few dozen terms


def formula(layer: Attention | SlidingWindowAttention, x: Tensor, window: int) -> Tensor:
    """Softmax attention with a dense mask, head by head, from the layer's parameters."""
    B, T, _ = x.shape
    H, G, D = layer.num_heads, layer.num_kv_heads, layer.key_dim
    project = (layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (p(x).view(B, T, n, D) for p, n in zip(project, (H, G, G), strict=True))
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if layer.rotary:
        by = rotation(torch.arange(T), D, dtype=x.dtype)
        q, k = rotate(q, by), rotate(k, by)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (distance < 0) | (distance >= window)
    heads = []
    for h in range(H):
        g = h * G // H
        scores = q[:, :, h] @ k[:, :, g].mT / D**0.5
        heads.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[:, :, g])
    return layer.o_proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "head_dim": 6, "bias": True},
        {"rotary": False, "head_dim": 3},
        {"qk_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [1, 5, 17, 40])
def test_equals_the_formula(options, window):
    torch.manual_seed(0)
    layer = SlidingWindowAttention(16, num_heads=4, window=window, **options).double()
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], formula(layer, x, window), rtol=0, atol=ROUNDING)
    if window >= 17:
        full = Attention(16, num_heads=4, **options).double()
        full.load_state_dict(layer.state_dict())
        torch.testing.assert_close(full(x)[0], layer(x)[0], rtol=0, atol=ROUNDING)


def test_gradients_in_float64():
    torch.manual_seed(0)
    layer = Attention(8, num_heads=2, num_kv_heads=1, qk_norm=True).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(16, num_heads=4, num_kv_heads=2).double().eval()


def memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


@torch.no_grad()
def test_appending_writes_the_new_token_only():
    layer, x = attention(), torch.randn(2, 300, 16, dtype=torch.float64)
    _, state = layer(x[:, :10], want_state=True)
    homes = []
    for t in range(10, 300):
        _, state = layer(x[:, t : t + 1], state, want_state=True)
        homes.append(memory(state.k))
    assert len(set(homes)) == 5, "copied at 10, 20, 40, 80, 160: amortised one copy per token"
    assert state.k.shape[1] == 300


@torch.no_grad()
def test_room_asked_for_is_taken_once():
    layer, x = attention(), torch.randn(2, 40, 16, dtype=torch.float64)
    state, homes = layer.new_state(2, 40), set()
    for t in range(40):
        _, state = layer(x[:, t : t + 1], state, want_state=True)
        homes.add(memory(state.k))
    assert len(homes) == 1
    assert state.k.untyped_storage().nbytes() == 2 * 40 * 2 * 4 * 8
    torch.testing.assert_close(state.k, layer(x, want_state=True)[1].k, rtol=0, atol=ROUNDING)
    _, state = layer(x, state, want_state=True)  # beyond what was asked for
    assert state.k.shape[1] == 80


@torch.no_grad()
def test_only_the_newest_cache_grows_in_place():
    layer, x = attention(), torch.randn(2, 9, 16, dtype=torch.float64)
    _, start = layer(x[:, :3], want_state=True)
    _, first = layer(x[:, 3:4], start, want_state=True)
    _, second = layer(x[:, 4:5], first, want_state=True)
    _, branch = layer(x[:, 5:6], first, want_state=True)
    assert memory(second.k) == memory(first.k)
    assert memory(branch.k) != memory(first.k)
    for cache, rows in ((second, [0, 1, 2, 3, 4]), (branch, [0, 1, 2, 3, 5])):
        positions = torch.arange(5)
        expected = layer.project(x[:, rows], positions)[1]
        torch.testing.assert_close(cache.k, expected, rtol=0, atol=ROUNDING)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda s: select_batch(s, torch.tensor([1, 0])),
        lambda s: replace(s, k=s.k + 1),
        copy.deepcopy,
    ],
    ids=["select", "replace", "deepcopy"],
)
def test_a_changed_state_shares_no_room_with_its_origin(change):
    layer, x = attention(), torch.randn(2, 9, 16, dtype=torch.float64)
    _, start = layer(x[:, :4], want_state=True)
    _, state = layer(x[:, 4:5], start, want_state=True)
    changed = change(state)
    before = [t.clone() for t in tensors(changed)]
    _, onward = layer(x[:, 5:6], state, want_state=True)
    _, other = layer(x[:, 6:7], changed, want_state=True)
    assert memory(other.k) != memory(onward.k)
    assert torch.equal(other.k[:, :5], before[0])
    assert all(torch.equal(a, b) for a, b in zip(tensors(changed), before, strict=True))


def test_autograd_and_inference_mode_take_turns():
    layer, x = attention(), torch.randn(2, 8, 16, dtype=torch.float64)
    with torch.inference_mode():
        _, state = layer(x[:, :3], want_state=True)
        _, state = layer(x[:, 3:4], state, want_state=True)
    with torch.no_grad():
        _, state = layer(x[:, 4:5], state, want_state=True)
    y, state = layer(x[:, 5:6], state, want_state=True)
    with torch.no_grad():
        layer(x[:, 6:7], state, want_state=True)
    y.sum().backward()  # what backward saved was not written to
    expected = layer(x)[0][:, 5:6]
    torch.testing.assert_close(y, expected, rtol=0, atol=ROUNDING)


def test_frozen_keys_keep_what_backward_needs():
    layer, x = attention(), torch.randn(2, 8, 16, dtype=torch.float64)
    layer.k_proj.requires_grad_(False)
    layer.v_proj.requires_grad_(False)
    with torch.no_grad():
        _, state = layer(x[:, :3], want_state=True)
        _, state = layer(x[:, 3:4], state, want_state=True)
    y, after = layer(x[:, 4:6], state, want_state=True)
    with torch.no_grad():
        layer(x[:, 6:7], after, want_state=True)
        layer(x[:, 6:7], state, want_state=True)
    y.sum().backward()
    assert layer.q_proj.weight.grad is not None


@torch.no_grad()
def test_caches_of_rows_of_different_length_decode_without_copying():
    layer, x = attention(), torch.randn(2, 30, 16, dtype=torch.float64)
    left_padded = torch.tensor([[0] * 10, [-1] * 6 + [0] * 4])
    _, state = layer(x[:, :10], segments=left_padded, want_state=True)
    assert state.ragged
    assert state.length.tolist() == [10, 4]
    homes = set()
    for t in range(10, 20):
        y, state = layer(x[:, t : t + 1], state, want_state=True)
        homes.add(memory(state.k))
    assert len(homes) == 1
    alone, _ = layer(x[1:, 6:20])
    torch.testing.assert_close(y[1, 0], alone[0, -1], rtol=0, atol=ROUNDING)


def test_cache_of_bfloat16_under_autocast():
    torch.manual_seed(0)
    layer, x = Attention(16, num_heads=4), torch.randn(2, 8, 16)
    expected, _ = layer(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state, outputs = layer.new_state(2, 8, dtype=torch.bfloat16), []
        for t in range(8):
            y, state = layer(x[:, t : t + 1], state, want_state=True)
            outputs.append(y)
        _, wide = layer(x[:, :1], layer.new_state(2, 8), want_state=True)
    assert state.k.dtype is torch.bfloat16
    assert wide.k.dtype is torch.float32, "the cache keeps the dtype it was made with"
    # bfloat16 rounds at 2^-9; four products of it in a row, on values of order one.
    assert (torch.cat(outputs, 1).float() - expected).abs().max() < 2e-2


@torch.no_grad()
def test_window_state_holds_the_newest_keys():
    torch.manual_seed(0)
    layer = SlidingWindowAttention(16, num_heads=4, window=5).double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    keys = layer.project(x, torch.arange(12))[1]
    for T in (3, 5, 12):
        _, state = layer(x[:, :T], want_state=True)
        held = min(T, 5)
        expected = torch.cat([torch.zeros_like(keys[:, : 5 - held]), keys[:, T - held : T]], 1)
        torch.testing.assert_close(state.k, expected, rtol=0, atol=ROUNDING)
        assert state.k.untyped_storage().nbytes() == state.k.nbytes, "no view of a long past"
        assert state.length.tolist() == [T, T]
    assert layer(x[:, :3], layer.new_state(2, 0))[0].shape == (2, 3, 16)


def test_newest_keeps_order_and_fills_with_zeros():
    x = torch.arange(10.0).view(2, 5, 1, 1) + 1
    keep = torch.tensor([[True, False, True, True, False], [False, False, False, True, False]])
    (got,) = newest(keep, 3, x)
    assert got.flatten().tolist() == [1, 3, 4, 0, 0, 9]
    (none,) = newest(keep, 0, x)
    assert none.shape == (2, 0, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3: expected a divisor of d_model=16"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3: expected a divisor of num_heads=4"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 4, "head_dim": 5}, "rotary=True with 5 features per head"),
        ({"num_heads": 4, "head_dim": 0}, "0 features per head"),
        ({"num_heads": 4, "window": 0}, "window=0: expected at least 1"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindowAttention(16, **({"window": 4} | options))


def test_projections_are_made_by_the_given_choice():
    made: list[tuple[int, int, bool]] = []

    def projection(d_in: int, d_out: int, bias: bool = False) -> nn.Module:
        made.append((d_in, d_out, bias))
        return nn.Linear(d_in, d_out, bias=bias)

    Attention(16, num_heads=4, num_kv_heads=2, head_dim=6, bias=True, projection=projection)
    assert made == [(16, 24, True), (16, 12, True), (16, 12, True), (24, 16, True)]
