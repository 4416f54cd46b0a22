"""The Mamba-2 layer: against its equations step by step, initialisation, documents, memory.

B batch, T time, D model width, S width of the state space, H heads of width P, N state, G groups.
"""

import pytest
import torch
from scipy.stats import kstest, uniform
from torch.nn.functional import linear, pad, silu, softplus
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import peak_bytes
from layers.mamba2 import Mamba2
from layers.marks import marked_parameters
from layers.norm import RMSNorm
from models.language_model import LanguageModel
from tests.tiny import tiny_model

EXACT = 1e-12  # relative to the largest value: float64, sums of up to a hundred terms


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float = EXACT) -> None:
    """No element further off than tolerance * max |expected|."""
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance, f"off by {error:.1e} of the maximum, allowed {tolerance:.1e}"


def small_layer(dtype: torch.dtype = torch.float64, **options) -> Mamba2:
    """D = 8, S = 16 in 4 heads of width 4, N = 5, chunks of 8; every parameter random."""
    torch.manual_seed(0)
    layer = Mamba2(8, **({"d_state": 5, "head_dim": 4, "chunk_size": 8} | options)).to(dtype)
    for parameter in (layer.D, *([layer.norm.weight] if layer.norm is not None else [])):
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return layer


def by_the_equations(
    layer: Mamba2, x: torch.Tensor, *, before_gate: bool = False, limit: float = float("inf")
) -> torch.Tensor:
    """The layer's output from its parameters, one step, head and group at a time."""
    H, P, G, N = layer.num_heads, layer.head_dim, layer.num_groups, layer.d_state
    width, taps = H * P, layer.conv1d.weight.shape[1]
    rows = [layer.splits[0]] * 2 + [width, width, G * N, G * N, H]
    z0, x0, z, u, B, C, dt = linear(x, layer.in_proj.weight, layer.in_proj.bias).split(rows, -1)
    padded = pad(torch.cat([u, B, C], -1), (0, 0, taps - 1, 0))
    conv = sum(layer.conv1d.weight[:, k] * padded[:, k : k + x.shape[1]] for k in range(taps))
    u, B, C = silu(conv + layer.conv1d.bias).split([width, G * N, G * N], -1)
    step = softplus(dt + layer.dt_bias).clamp(max=limit)
    skip = layer.D.view(H, -1).expand(H, P)
    out = []
    S = x.new_zeros(len(x), H, P, N)
    for t in range(x.shape[1]):
        heads = []
        for h in range(H):
            g = h // (H // G)
            b, c = (M[:, t, g * N : (g + 1) * N] for M in (B, C))
            u_h, d = u[:, t, h * P : (h + 1) * P], step[:, t, h, None]
            decay = torch.exp(-layer.A_log[h].exp() * d)[..., None]
            S_h = decay * S[:, h] + (d * u_h)[..., None] * b[:, None]
            S = torch.cat([S[:, :h], S_h[:, None], S[:, h + 1 :]], 1)
            heads.append((S_h * c[:, None]).sum(-1) + skip[h] * u_h)
        out.append(torch.cat(heads, -1))
    y = torch.stack(out, 1)
    if layer.norm is None:
        y = y * silu(z)
    else:
        y = y if before_gate else y * silu(z)
        groups = y.unflatten(-1, (G, -1))
        y = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2)
        y = y * layer.norm.weight * (silu(z) if before_gate else 1)
    return linear(torch.cat([silu(z0) * x0, y], -1), layer.out_proj.weight, layer.out_proj.bias)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        ({}, {}),
        ({"num_groups": 2}, {}),
        ({"norm_before_gate": True, "num_groups": 2}, {"before_gate": True}),
        ({"norm": False, "D_has_head_dim": True}, {}),
        ({"d_ssm": 8, "num_groups": 2, "bias": True}, {}),
        ({"dt_limit_max": 0.02, "conv_size": 3}, {"limit": 0.02}),
    ],
    ids=["default", "groups", "norm before gate", "no norm, wide D", "beside an MLP", "limit"],
)
def test_equals_the_equations(options, oracle, backend):
    layer = small_layer(backend=backend, **options)
    x = torch.randn(2, 19, 8, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x)[0], by_the_equations(layer, x, **oracle)
    assert_near(y, expected)
    wanted = [x, *layer.parameters()]
    weights = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, wanted, weights),
        torch.autograd.grad(expected, wanted, weights),
        strict=True,
    ):
        assert_near(got, want)


def test_weights_of_the_public_code_load():
    """Its convolution's weight has a dimension more."""
    layer, twin = small_layer(), Mamba2(8, d_state=5, head_dim=4).double()
    saved = layer.state_dict()
    saved["conv1d.weight"] = saved["conv1d.weight"][:, None]
    twin.load_state_dict(saved)
    assert set(saved) == {
        "in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight",
        "out_proj.weight",
    }  # fmt: skip
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter, layer.get_parameter(name))
    assert saved["conv1d.weight"].ndim == 3, "loading changed the caller's dictionary"


@pytest.mark.parametrize("prefill", [1, 2, 3, 4, 7, 8, 9])
@torch.no_grad()
def test_prefill_then_steps_equal_one_run(prefill):
    layer, x = small_layer(), torch.randn(2, 12, 8, dtype=torch.float64)
    whole, end = layer(x, want_state=True)
    y, state = layer(x[:, :prefill], want_state=True)
    outputs = [y]
    for t in range(prefill, 12):
        y, state = layer(x[:, t : t + 1], state, want_state=True)
        outputs.append(y)
    assert_near(torch.cat(outputs, 1), whole)
    assert_near(state.conv, end.conv)
    assert_near(state.ssm, end.ssm)


def test_packed_documents_are_apart_with_gradients():
    layer = small_layer(num_groups=2)
    x = torch.randn(1, 20, 8, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0] * 5 + [1] * 15])
    packed, _ = layer(x, segments=segments)
    alone = torch.cat([layer(x[:, :5])[0], layer(x[:, 5:])[0]], dim=1)
    assert_near(packed, alone)
    wanted = [x, *layer.parameters()]
    weights = torch.randn_like(packed)
    for got, expected in zip(
        torch.autograd.grad(packed, wanted, weights),
        torch.autograd.grad(alone, wanted, weights),
        strict=True,
    ):
        assert_near(got, expected)
    whole, _ = layer(x)
    assert not torch.allclose(whole[:, 5:], packed[:, 5:], rtol=1e-3), "documents changed nothing"


@torch.no_grad()
def test_chunk_size_changes_rounding_only():
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, 1e-5)):
        x = torch.randn(2, 70, 8, dtype=dtype)
        expected, _ = small_layer(dtype, chunk_size=1)(x)
        for chunk in (7, 16, 70, 256):
            assert_near(small_layer(dtype, chunk_size=chunk)(x)[0], expected, tolerance)


def assert_initial_values(layer: Mamba2) -> None:
    """A, D, the norm and the steps are the paper's."""
    rates = layer.A_log.exp()
    assert rates.min() >= 1 - 1e-5
    assert rates.max() <= 16 + 1e-4
    assert torch.equal(layer.D, torch.ones_like(layer.D))
    assert layer.norm is not None
    assert torch.equal(layer.norm.weight, torch.ones_like(layer.norm.weight))
    steps = softplus(layer.dt_bias.detach().double())
    # The inverse of softplus in float32 is off by a few 1e-7 of a step.
    assert steps.min() >= 1e-3 * (1 - 1e-5)
    assert steps.max() <= 0.1 * (1 + 1e-5)


def test_initialisation():
    torch.manual_seed(0)
    layer = Mamba2(256, head_dim=1)  # 512 heads
    assert_initial_values(layer)
    rates = layer.A_log.detach().exp().numpy()
    # Seeded: draws of another kind have a p-value below 1e-10 at 512 heads.
    assert kstest(rates, uniform(1, 15).cdf).pvalue > 0.01
    logs = softplus(layer.dt_bias.detach().double()).log10().numpy()
    assert kstest(logs, uniform(-3, 2).cdf).pvalue > 0.01
    # nn.Linear draws uniform within fan_in^-1/2, whose standard deviation is that over sqrt(3).
    assert layer.in_proj.weight.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.02)
    torch.manual_seed(0)
    deep = Mamba2(256, head_dim=1, num_layers=16)
    assert_near(deep.out_proj.weight, layer.out_proj.weight / 4, 1e-6)


def test_initialisation_survives_the_model_and_the_config():
    layer = Mamba2(32, head_dim=16)
    chosen = {name: p.detach().clone() for name, p in layer.named_parameters()}
    LanguageModel(11, 32, [layer], [None], RMSNorm)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, chosen[name]), name
    for mixer in tiny_model("mamba2").mixers:
        assert isinstance(mixer, Mamba2)
        assert_initial_values(mixer)


def test_what_decays():
    layer = Mamba2(16, head_dim=8, bias=True, D_has_head_dim=True)
    decays = {name for name, _, marks in marked_parameters(layer) if marks.decay}
    assert decays == {"in_proj.weight", "conv1d.weight", "out_proj.weight"}


def test_sizes_are_the_papers():
    """d_model 768: in_proj of 2E + 2N + H rows; a state of E N in float32."""
    with torch.device("meta"):
        layer = Mamba2(768)
    E, N, H = 1536, 128, 24
    count = 768 * (2 * E + 2 * N + H) + 5 * (E + 2 * N) + 3 * H + E + 768 * E
    assert sum(p.numel() for p in layer.parameters()) == count
    held = E * N * 4 + 3 * (E + 2 * N) * 4 + 8
    assert layer.state_bytes(2, 64) == layer.state_bytes(2, 65536) == 2 * held


@torch.no_grad()
def test_flops_are_counted():
    for options in ({}, {"num_groups": 2, "d_ssm": 8, "norm": False}):
        layer = small_layer(**options)
        for B, T in ((1, 1), (2, 7), (1, 8), (1, 9), (2, 31)):
            with FlopCounterMode(display=False) as counter:
                layer(torch.randn(B, T, 8, dtype=torch.float64))
            assert counter.get_total_flops() == layer.flops(B, T)
    assert layer.flops(1, 8192) == 2 * layer.flops(1, 4096), "linear in time at whole chunks"


def test_bf16_autocast_is_near_fp32():
    layer, x = small_layer(torch.float32), torch.randn(2, 40, 8)
    expected, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, want_state=True)
    assert state is not None
    assert state.ssm.dtype is torch.float32
    assert_near(y, expected, 2e-2)  # projections of 8 bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, "head_dim=5, d_ssm=16: expected head_dim to divide d_ssm"),
        ({"head_dim": 4, "d_ssm": 20}, r"d_ssm <= expand \* d_model = 16"),
        ({"head_dim": 4, "num_groups": 3}, "num_groups=3: expected a divisor of the 4 heads"),
        ({"head_dim": 4, "A_min": 0.0}, "expected 0 < A_min <= A_max"),
        ({"head_dim": 4, "dt_limit_max": 0.0}, "expected 0 <= dt_limit_min < dt_limit_max"),
        ({"head_dim": 4, "dt_max": 1e-4}, "expected 0 < dt_min <= dt_max"),
        ({"head_dim": 4, "chunk_size": 0}, "chunk_size=0: expected at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(8, **options)


def training_peak(length: int) -> int:
    """Bytes that a step of one layer of width 32 takes at its worst, batch 1."""
    layer, x = Mamba2(32, d_state=64, head_dim=16), torch.randn(1, length, 32, requires_grad=True)
    return peak_bytes(lambda: layer(x)[0].sum().backward())


def test_training_memory_is_linear_and_does_not_hold_states():
    short, middle, long = (training_peak(length) for length in (2048, 4096, 8192))
    # A span of chunks is constant; beyond it twice the length takes twice the memory.
    assert (long - middle) / (middle - short) == pytest.approx(2, rel=0.1)
    activations = (long - middle) / 4096 / (64 * 4)  # float32 values per channel and token
    assert activations < 20, "13 are activations; a state for each token would add 64"
