"""JRT-RNN's mixer beyond the contract: its prefix. B batch, T time, M prefix."""

import pytest
import torch

from layers.jrt import PrefixLinearAttention
from layers.linear_attention import LinearAttention

D, H, K = 12, 2, 4


@pytest.fixture
def layer() -> PrefixLinearAttention:
    torch.manual_seed(0)
    return PrefixLinearAttention(D, num_heads=H, key_dim=K).double()


def sequence(B: int, T: int) -> torch.Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(T))


def by_definition(layer: PrefixLinearAttention, x: torch.Tensor, M: int) -> torch.Tensor:
    """Weights 1 + s + s^2/2 of the causal and of the prefix part, under one denominator."""

    def heads(projection: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
        return projection(y).unflatten(-1, (H, -1)).transpose(1, 2)

    def weights(k: torch.Tensor) -> torch.Tensor:
        s = heads(layer.q_proj, x) @ k.mT / K**0.5
        return 1 + s + s * s / 2

    causal = weights(heads(layer.k_proj, x)).tril()
    prefix = weights(heads(layer.k_prefix_proj, x[:, :M]))
    top = causal @ heads(layer.v_proj, x) + prefix @ heads(layer.v_prefix_proj, x[:, :M])
    y = top / (causal.sum(-1, keepdim=True) + prefix.sum(-1, keepdim=True))
    return layer.o_proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    ("T", "M"), [(1, 1), (16, 8), (16, 16), (16, 5), (12, 32), (16, 0), (70, 65)]
)
def test_is_its_definition(T, M, compressed):
    torch.manual_seed(1)
    layer = PrefixLinearAttention(D, num_heads=H, key_dim=K, compressed=compressed).double()
    x = sequence(2, T)
    y, _ = layer(x, prefix_len=torch.full((2,), M))
    torch.testing.assert_close(y, by_definition(layer, x, M), rtol=1e-9, atol=1e-10)


def test_without_a_prefix_it_is_based(layer):
    based = LinearAttention(
        D, num_heads=H, feature_map="taylor", key_dim=K, rotary=False, eps=1e-12
    )
    based.double().load_state_dict(layer.state_dict(), strict=False)
    x = sequence(2, 20)
    expected, _ = based(x)
    assert torch.equal(layer(x)[0], expected)
    layer(x)[0].sum().backward()
    assert layer.k_prefix_proj.weight.grad is None
    torch.testing.assert_close(layer(x, prefix_len=torch.zeros(2, dtype=torch.long))[0], expected)


def test_which_tokens_each_token_reads(layer):
    T, M = 16, 8
    x = sequence(1, T).requires_grad_()
    y, _ = layer(x, prefix_len=torch.tensor([M]))
    position = torch.arange(T)
    for t in range(T):
        (gradient,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(-1) > 0, position <= max(t, M - 1)), t


def test_permuting_the_prefix_leaves_what_follows(layer):
    T, M = 20, 9
    x = sequence(2, T)
    order = torch.cat([torch.randperm(M), torch.arange(M, T)])
    prefix_len = torch.full((2,), M)
    straight, permuted = (layer(y, prefix_len=prefix_len)[0] for y in (x, x[:, order]))
    torch.testing.assert_close(straight[:, M:], permuted[:, M:])


@pytest.mark.parametrize(("P", "M"), [(8, 8), (11, 8), (5, 8)])
def test_prefill_then_decode_is_one_pass(layer, P, M):
    T = 18
    x = sequence(2, T)
    whole, end = layer(x, prefix_len=torch.full((2,), min(M, P)), want_state=True)
    y, state = layer(x[:, :P], prefix_len=torch.full((2,), M), want_state=True)
    outputs = [y]
    for t in range(P, T):
        y, state = layer(x[:, t : t + 1], state, want_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state.S, end.S)


def test_rows_have_prefixes_of_their_own_and_left_padding_is_invisible(layer):
    lengths, T = [4, 9, 7], 9
    x = sequence(3, T)
    padded = torch.randn(3, T, D, dtype=torch.float64)
    segments = torch.full((3, T), -1)
    for row, length in enumerate(lengths):
        padded[row, T - length :] = x[row, :length]
        segments[row, T - length :] = 0
    prefix_len = torch.tensor([2, 5, 30])
    y, state = layer(padded, segments=segments, prefix_len=prefix_len, want_state=True)
    for row, length in enumerate(lengths):
        alone, after = layer(
            x[row : row + 1, :length], prefix_len=prefix_len[row : row + 1], want_state=True
        )
        torch.testing.assert_close(y[row, T - length :], alone[0])
        torch.testing.assert_close(state.S[row], after.S[0])
        torch.testing.assert_close(state.z[row], after.z[0])


def test_prefix_ends_with_the_first_document(layer):
    x = sequence(1, 12)
    segments = torch.tensor([[0] * 5 + [1] * 7])
    y, _ = layer(x, segments=segments, prefix_len=torch.tensor([8]))
    first, _ = layer(x[:, :5], prefix_len=torch.tensor([5]))
    second, _ = layer(x[:, 5:])
    torch.testing.assert_close(y, torch.cat([first, second], 1))


def test_decoder_loss_trains_the_prefix_projections(layer):
    y, _ = layer(sequence(2, 12), prefix_len=torch.tensor([6, 6]))
    y[:, 6:].square().sum().backward()
    assert layer.k_prefix_proj.weight.grad.abs().sum() > 0
    assert layer.v_prefix_proj.weight.grad.abs().sum() > 0


def test_half_precision_stays_close():
    torch.manual_seed(0)
    layer = PrefixLinearAttention(64, num_heads=2, key_dim=16)
    x = torch.randn(1, 2048, 64)
    prefix_len = torch.tensor([1024])
    with torch.no_grad():
        exact, _ = layer.double()(x.double(), prefix_len=prefix_len)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough, _ = layer.float()(x, prefix_len=prefix_len)
    error = (rough.double() - exact).norm() / exact.norm()
    assert error < 2e-2  # five bf16 roundings of 2^-9 each along the way, sums in float32


def test_wrong_prefixes_are_refused(layer):
    x = sequence(2, 6)
    _, state = layer(x, want_state=True)
    with pytest.raises(ValueError, match="a prefix opens a sequence"):
        layer(x, state, prefix_len=torch.tensor([2, 2]))
    for wrong in (torch.tensor([2]), torch.tensor([2.0, 2.0]), torch.tensor([-1, 2])):
        with pytest.raises(ValueError, match=r"expected integers \(2,\) of at least 0"):
            layer(x, prefix_len=wrong)
