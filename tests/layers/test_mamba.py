"""The Mamba layer: the public code's numbers, its caches, initialisation, documents, memory.

B batch, T time, D model width, E inner width, N state, R rank of the steps, W taps.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest, uniform
from torch import nn
from torch.nn.functional import softplus
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import peak_bytes
from kernels import linear_cross_entropy
from layers.channel_mixer import SwiGLU
from layers.mamba import Mamba
from layers.marks import marked_parameters
from layers.norm import RMSNorm
from models.language_model import LanguageModel
from tests.tiny import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "mamba_block1.npz"
EXACT = 1e-12  # relative to the largest value: float64, sums of up to a hundred terms
# The arrays are float64 results; float32 has 6e-8 per operation, and gradients are longer sums.
GOLDEN_TOLERANCES = pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-4)],
    ids=["fp64", "fp32"],
)


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """No element further off than tolerance * max |expected|."""
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance, f"off by {error:.1e} of the maximum, allowed {tolerance:.1e}"


def golden_layer(
    dtype: torch.dtype, backend: str = "auto"
) -> tuple[Mamba, dict[str, torch.Tensor]]:
    """The public layer's weights, loaded as its own state dict has them, and its arrays."""
    data = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}
    layer = Mamba(12, d_state=4, conv_size=4, expand=2, dt_rank=3, backend=backend)
    prefix = "param_"
    layer.load_state_dict({n[len(prefix) :]: t for n, t in data.items() if n.startswith(prefix)})
    return layer.to(dtype), data


def small_layer(dtype: torch.dtype = torch.float64, **options) -> Mamba:
    """D = 8, E = 16, N = 4, R = 2, W = 4."""
    torch.manual_seed(0)
    return Mamba(8, d_state=4, dt_rank=2, **options).to(dtype)


@pytest.mark.golden("mamba_block1", mixers=["mamba"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@GOLDEN_TOLERANCES
def test_golden_output_and_gradients(dtype, forward, backward, backend):
    layer, data = golden_layer(dtype, backend)
    x = data["u"].to(dtype).requires_grad_()
    y, _ = layer(x)
    assert_near(y, data["y"], forward)
    named = dict(layer.named_parameters())
    grads = torch.autograd.grad(y, [x, *named.values()], data["cot_y"].to(dtype))
    assert_near(grads[0], data["grad_u"], backward)
    for name, grad in zip(named, grads[1:], strict=True):
        assert_near(grad, data[f"grad_param_{name}"].view_as(grad), backward)


@pytest.mark.golden("mamba_block1", mixers=["mamba"])
@GOLDEN_TOLERANCES
@torch.no_grad()
def test_golden_steps_and_caches(dtype, forward, backward):
    """Every single step's output and state, and those a prefill leaves, shorter than W too."""
    layer, data = golden_layer(dtype)
    x = data["u"].to(dtype)

    def assert_cache(state, conv, ssm):
        # The public cache holds W inputs; the oldest is never read again.
        assert_near(state.conv, conv[..., 1:].mT, forward)
        assert_near(state.ssm, ssm, forward)

    state = None
    for t in range(x.shape[1]):
        y, state = layer(x[:, t : t + 1], state, want_state=True)
        assert_near(y[:, 0], data["y_step"][:, t], forward)
        assert_cache(state, data["conv_states"][:, t], data["ssm_states"][:, t])
    for length in (2, 7):
        _, state = layer(x[:, :length], want_state=True)
        names = f"prefill{length}_conv_state", f"prefill{length}_ssm_state"
        assert_cache(state, *(data[name] for name in names))


@pytest.mark.parametrize("prefill", [1, 2, 3, 4, 7])
@torch.no_grad()
def test_prefill_then_steps_equal_one_run(prefill):
    layer, x = small_layer(), torch.randn(2, 11, 8, dtype=torch.float64)
    whole, end = layer(x, want_state=True)
    y, state = layer(x[:, :prefill], want_state=True)
    outputs = [y]
    for t in range(prefill, 11):
        y, state = layer(x[:, t : t + 1], state, want_state=True)
        outputs.append(y)
    assert_near(torch.cat(outputs, 1), whole, EXACT)
    assert_near(state.conv, end.conv, EXACT)
    assert_near(state.ssm, end.ssm, EXACT)


def test_packed_documents_are_apart_with_gradients():
    layer, x = small_layer(), torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0] * 5 + [1] * 7])
    packed, _ = layer(x, segments=segments)
    alone = torch.cat([layer(x[:, :5])[0], layer(x[:, 5:])[0]], dim=1)
    assert_near(packed, alone, EXACT)
    wanted = [x, *layer.parameters()]
    weights = torch.randn_like(packed)
    for got, expected in zip(
        torch.autograd.grad(packed, wanted, weights),
        torch.autograd.grad(alone, wanted, weights),
        strict=True,
    ):
        assert_near(got, expected, EXACT)
    whole, _ = layer(x)
    assert not torch.allclose(whole[:, 5:], packed[:, 5:], rtol=1e-3), "documents changed nothing"


def assert_initial_values(layer: Mamba) -> None:
    """A_log, D and the steps are the paper's."""
    expanded = torch.arange(1.0, layer.d_state + 1).log().expand_as(layer.A_log)
    assert torch.equal(layer.A_log, expanded)
    assert torch.equal(layer.D, torch.ones_like(layer.D))
    steps = softplus(layer.dt_proj.bias.detach().double())
    # The inverse of softplus in float32 is off by a few 1e-7 of a step.
    assert steps.min() >= 1e-3 * (1 - 1e-5)
    assert steps.max() <= 0.1 * (1 + 1e-5)
    bound = layer.dt_rank**-0.5
    assert bound * 0.9 < layer.dt_proj.weight.abs().max() <= bound


def test_initialisation():
    torch.manual_seed(0)
    layer = Mamba(512)
    assert_initial_values(layer)
    logs = softplus(layer.dt_proj.bias.detach().double()).log().numpy()
    low, high = np.log(1e-3), np.log(0.1)
    # Seeded: at 1024 steps a normal or a uniform draw has a p-value below 1e-30.
    assert kstest(logs, uniform(low, high - low).cdf).pvalue > 0.01
    floored = Mamba(64, dt_min=1e-5, dt_max=1e-3, dt_init_floor=1e-4)
    assert softplus(floored.dt_proj.bias).min() >= 1e-4 * (1 - 1e-5)
    constant = Mamba(64, dt_init="constant", dt_scale=0.5)
    assert torch.equal(constant.dt_proj.weight, torch.full_like(constant.dt_proj.weight, 0.25))
    # nn.Linear draws uniform within fan_in^-1/2, whose standard deviation is that over sqrt(3).
    for module, scale in ((layer.in_proj, 1), (layer.x_proj, 1), (layer.out_proj, 1)):
        expected = scale * (3 * module.in_features) ** -0.5
        assert module.weight.std().item() == pytest.approx(expected, rel=0.02)
    torch.manual_seed(0)
    deep = Mamba(512, num_layers=16)
    assert_near(deep.out_proj.weight, layer.out_proj.weight / 4, 1e-6)


def test_initialisation_survives_the_model_and_the_config():
    layer = Mamba(32)
    chosen = {name: p.detach().clone() for name, p in layer.named_parameters()}
    LanguageModel(11, 32, [layer], [None], RMSNorm)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, chosen[name]), name
    for mixer in tiny_model("mamba").mixers:
        assert isinstance(mixer, Mamba)
        bound = mixer.dt_rank**-0.5
        mixer.dt_proj.weight.data.clamp_(-bound, bound)  # which tiny_model has enlarged
        assert_initial_values(mixer)


def test_what_decays():
    layer = Mamba(16, bias=True)
    decays = {name for name, _, marks in marked_parameters(layer) if marks.decay}
    projections = {"in_proj", "x_proj", "dt_proj", "out_proj", "conv1d"}
    assert decays == {f"{name}.weight" for name in projections}
    no_decay = {name for name, _, marks in marked_parameters(layer) if not marks.decay}
    assert no_decay == {
        "A_log", "D", "dt_proj.bias", "conv1d.bias", "in_proj.bias", "out_proj.bias"
    }  # fmt: skip


def test_sizes_are_the_papers():
    """d_model 768: 3 * expand * D^2 parameters and a little; 96 KiB of h for a sequence."""
    with torch.device("meta"):
        layer = Mamba(768)
    E, N, R = 1536, 16, 48
    count = 3 * 768 * E + E * (R + 2 * N) + E * R + E + 5 * E + E * N + E
    assert sum(p.numel() for p in layer.parameters()) == count
    conv = 3 * E * 4  # W - 1 inputs in float32
    assert layer.state_bytes(2, 64) == layer.state_bytes(2, 65536) == 2 * (96 * 1024 + conv + 8)


@torch.no_grad()
def test_flops_are_counted_and_linear_in_time():
    layer = small_layer()
    for B, T in ((1, 1), (2, 31), (1, 64)):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(B, T, 8, dtype=torch.float64))
        assert counter.get_total_flops() == layer.flops(B, T) == B * T * layer.flops(1, 1)


def test_bf16_autocast_is_near_fp32():
    layer, x = small_layer(torch.float32), torch.randn(2, 40, 8)
    expected, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, want_state=True)
    assert y.dtype is torch.bfloat16
    assert state is not None
    assert state.ssm.dtype is torch.float32
    assert_near(y, expected, 2e-2)  # projections of 8 bits


class LowRank(nn.Sequential):
    """A projection that is no nn.Linear."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False) -> None:
        super().__init__(nn.Linear(d_in, 3, bias=False), nn.Linear(3, d_out, bias=bias))

    def flops(self, tokens: int) -> int:
        return sum(2 * tokens * part.weight.numel() for part in self)


def test_projections_can_be_replaced():
    layer = small_layer(projection=LowRank)
    assert all(isinstance(m, LowRank) for m in (layer.in_proj, layer.x_proj, layer.out_proj))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(2, 5, 8, dtype=torch.float64))
    assert counter.get_total_flops() == layer.flops(2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state=0: expected at least 1"),
        ({"dt_rank": 0}, "dt_rank=0: expected at least 1"),
        ({"conv_size": 0}, "conv_size=0: expected at least 1"),
        ({"dt_init": "zeros"}, "dt_init='zeros': allowed: random, constant"),
        ({"dt_min": 0.2}, "dt_min=0.2, dt_max=0.1.*expected 0 < dt_min <= dt_max"),
        ({"dt_init_floor": 0.0}, "dt_init_floor=0.0.*dt_init_floor > 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba(8, **options)


def training_peak(length: int, **options) -> int:
    """Bytes that a step of one layer of width 64 takes at its worst, batch 1."""
    layer, x = Mamba(64, **options), torch.randn(1, length, 64, requires_grad=True)
    return peak_bytes(lambda: layer(x)[0].sum().backward())


def test_training_memory_is_linear_and_does_not_hold_states():
    short, middle, long = (training_peak(length) for length in (512, 1024, 2048))
    # A tile of steps is constant; beyond it twice the length takes twice the memory.
    assert (long - middle) / (middle - short) == pytest.approx(2, rel=0.1)
    per_token = (long - middle) / 1024
    activations = per_token / (128 * 4)  # float32 values per inner channel and token
    assert activations < 12, "9 are activations; a state for each token would add 16"


@pytest.mark.slow
def test_a_tiny_model_trains_on_16384_tokens_in_6_gib():
    """Four layers of width 256 with their channel mixers, loss without logits, float32."""
    torch.manual_seed(0)
    mixers = [Mamba(256, num_layers=4) for _ in range(4)]
    model = LanguageModel(8192, 256, mixers, [SwiGLU(256) for _ in mixers], RMSNorm)
    tokens = torch.randint(8192, (1, 16385))

    def step() -> None:
        h, _ = model.hidden(tokens[:, :-1])
        loss = linear_cross_entropy(h.flatten(0, 1), model.head_weight, tokens[0, 1:])
        loss.backward()

    assert peak_bytes(step) < 6 * 2**30
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
