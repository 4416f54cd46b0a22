"""MonarchLinear: the map, its structure, initialisation, projection, whole models.

k = l = nblocks; p inputs and s outputs a block, q = min(p, s).
"""

import copy
import io

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layers.marks import marked_parameters
from layers.monarch import MonarchLinear, densify, to_monarch
from layers.projection import projection_flops
from models.initialise import initialise
from tests.tiny import CONF, tiny_model

EXACT = 1e-12  # float64, relative to the largest value
# Square; up; down; widths that 4 does not divide, one of them at a time and both.
SIZES = [(16, 16), (24, 48), (48, 24), (30, 41), (32, 21), (19, 40)]
each_size = pytest.mark.parametrize(("d_in", "d_out"), SIZES)


def layer_of(d_in: int, d_out: int, **options) -> MonarchLinear:
    """float64, with a bias that is not zero."""
    torch.manual_seed(0)
    layer = MonarchLinear(d_in, d_out, True, **options).double()
    nn.init.normal_(layer.bias)
    return layer


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """No element further off than tolerance * max |expected|."""
    assert got.shape == expected.shape
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"off by {error:.1e} of the maximum, allowed {tolerance:.1e}"


@each_size
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_is_the_dense_map_of_its_weight(d_in, d_out, backend):
    layer = layer_of(d_in, d_out, backend=backend)
    x = torch.randn(2, 3, d_in, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = x @ layer.dense_weight().mT + layer.bias
    assert_near(y, expected, EXACT)
    wanted = [x, *layer.parameters()]
    cot = torch.randn_like(y)
    for got, grad in zip(
        torch.autograd.grad(y, wanted, cot), torch.autograd.grad(expected, wanted, cot), strict=True
    ):
        assert_near(got, grad, EXACT)
    assert_near(layer.to_dense()(x), y, EXACT)


@each_size
def test_ranks_and_sizes(d_in, d_out):
    layer = layer_of(d_in, d_out)
    p, s = -(-d_in // 4), -(-d_out // 4)
    q = min(p, s)
    assert layer.blkdiag1.shape == (4, q, p)
    assert layer.blkdiag2.shape == (4, s, q)
    padded = torch.zeros(4 * s, 4 * p, dtype=torch.float64)
    padded[:d_out, :d_in] = layer.dense_weight()
    ranks = torch.linalg.matrix_rank(padded.view(s, 4, 4, p).permute(1, 2, 0, 3))
    assert set(ranks.flatten().tolist()) <= {q // 4, -(-q // 4)}


@pytest.mark.parametrize(
    ("d_in", "d_out", "count"),
    [
        (768, 768, 294_912),
        (768, 2304, 589_824),
        (768, 3072, 737_280),
        (3072, 768, 737_280),
        (1024, 1024, 524_288),
        (1024, 4096, 1_310_720),
    ],
)
def test_parameters_are_the_papers(d_in, d_out, count):
    with torch.device("meta"):
        layer = MonarchLinear(d_in, d_out)
    assert sum(p.numel() for p in layer.parameters()) == count
    assert f"{count / (d_in * d_out):.1%} of dense" in repr(layer)


def test_gpt2_small_has_the_papers_size():
    """Queries, keys, values, outputs and both channel matrices; 72M and 85.5M in the paper."""

    def size(d_in, d_out):
        with torch.device("meta"):
            return sum(p.numel() for p in MonarchLinear(d_in, d_out).parameters())

    dense, attention, channels = 124.4e6, 4 * size(768, 768), size(768, 3072) + size(3072, 768)
    mlp_only = dense - 12 * (2 * 768 * 3072 - channels)
    assert mlp_only == pytest.approx(85.5e6, rel=2e-3)
    assert 71e6 < mlp_only - 12 * (4 * 768 * 768 - attention) < 72e6


@pytest.mark.parametrize(("d_in", "d_out"), [(768, 3072), (3072, 768), (512, 512), (510, 301)])
def test_matched_initialisation(d_in, d_out):
    torch.manual_seed(0)
    for std, expected in ((0.02, 0.02), (0.005, 0.005), (None, (3 * d_in) ** -0.5)):
        layer = MonarchLinear(d_in, d_out, True, std=std)
        assert layer.dense_weight().std().item() == pytest.approx(expected, rel=0.03)
        assert (layer.bias == 0).all()


def test_official_initialisation():
    """Uniform factors; the matrix has 3^-1/2 of the deviation of a dense layer's."""
    torch.manual_seed(0)
    layer = MonarchLinear(768, 3072, True, init="official")
    for w, fan_in in ((layer.blkdiag1, 192), (layer.blkdiag2, 192)):
        assert w.abs().max() <= fan_in**-0.5
        assert w.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.01)
    assert layer.dense_weight().std().item() == pytest.approx(0.01205, rel=0.03)
    assert 0.9 < layer.bias.abs().max().item() * 3072**0.5 <= 1


def test_the_models_initialiser_keeps_away():
    layer = MonarchLinear(32, 32, True)
    before = copy.deepcopy(layer.state_dict())
    initialise(nn.Sequential(layer))
    assert all(torch.equal(before[name], p) for name, p in layer.state_dict().items())
    decays = {name: marks.decay for name, _, marks in marked_parameters(layer)}
    assert decays == {"blkdiag1": True, "blkdiag2": True, "bias": False}


@each_size
def test_projection_of_a_dense_layer(d_in, d_out):
    layer = layer_of(d_in, d_out)
    weight, bias = layer.dense_weight().detach(), layer.bias.detach()
    again = MonarchLinear.from_dense(weight, bias)
    assert_near(again.dense_weight(), weight, EXACT)
    assert torch.equal(again.bias, bias)
    target = torch.randn(d_out, d_in, dtype=torch.float64)
    nearest = MonarchLinear.from_dense(target)
    error = (nearest.dense_weight() - target).norm()
    assert 0 < error < target.norm()
    for scale in (1e-3, 1e-2, 0.1):
        moved = copy.deepcopy(nearest)
        with torch.no_grad():
            for p in moved.parameters():
                p.add_(scale * torch.randn_like(p))
        assert (moved.dense_weight() - target).norm() > error


@pytest.mark.filterwarnings("ignore:nblocks=1")
def test_full_rank_is_exact():
    target = torch.randn(21, 16, dtype=torch.float64)
    assert_near(MonarchLinear.from_dense(target, nblocks=1).dense_weight(), target, EXACT)


@pytest.mark.parametrize("tokens", [1, 6])
@each_size
def test_flops(d_in, d_out, tokens):
    layer = MonarchLinear(d_in, d_out)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, d_in))
    assert counter.get_total_flops() == projection_flops(layer, tokens)


def test_autocast_and_half_precision():
    layer = MonarchLinear(64, 96, True, std=0.1)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    assert_near(y.float(), layer(x), 2e-2)  # products of 8 bits
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype is torch.bfloat16


def test_compiled_and_loaded_the_same():
    layer, x = layer_of(30, 41), torch.randn(5, 30, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_near(compiled(x), layer(x), EXACT)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = MonarchLinear(30, 41, True).double()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x), layer(x))


def test_one_override_makes_every_projection():
    projection = instantiate(OmegaConf.load(CONF / "projection" / "monarch.yaml"))
    layer = projection(32, 64, bias=True)
    assert isinstance(layer, MonarchLinear)
    assert layer.nblocks == 4
    assert isinstance(projection(32, 64), MonarchLinear)


def sparse_model() -> tuple[nn.Module, list[str]]:
    """A model with a tied head whose mixers are projected, and the names of what was."""
    model = tiny_model("attention").eval()
    model.head = nn.Linear(32, 31, bias=False)
    model.head.weight = model.embedding.weight
    return model, to_monarch(model, lambda name: "mixer" in name or name == "head")


def test_sparse_to_dense():
    """A tied head stays; the dense model computes the same; files from before load after."""
    model, names = sparse_model()
    assert names
    assert all("mixer" in name for name in names)
    assert all(isinstance(model.get_submodule(name), MonarchLinear) for name in names)
    assert model.head.weight is model.embedding.weight
    tokens = torch.randint(31, (2, 9))
    expected = model(tokens)[0]
    state = copy.deepcopy(model.state_dict())
    assert densify(model) == names
    assert not any(isinstance(m, MonarchLinear) for m in model.modules())
    # float32: the spec's bound for the step from sparse to dense.
    assert_near(model(tokens)[0], expected, 1e-5)
    again, _ = sparse_model()
    again.load_state_dict(state)
    assert torch.equal(again(tokens)[0], expected)


def test_frozen_layers_stay_frozen():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    model[0].requires_grad_(False)
    assert to_monarch(model) == ["0", "1"]
    assert [p.requires_grad for p in model.parameters()] == [False] * 3 + [True] * 3
    assert not model[0].training


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 16), {}, "d_in=0, d_out=16, nblocks=4: each must be at least 1"),
        ((16, 16), {"nblocks": 0}, "nblocks=0"),
        ((16, 12), {}, "nblocks=4 for 16 -> 12: .*expected nblocks\\^2 <= 12"),
        ((16, 16), {"init": "zeros"}, "init='zeros': allowed: matched, official"),
        ((16, 16), {"std": 0.0}, "std=0.0: expected above 0, or None"),
    ],
)
def test_bad_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        MonarchLinear(*arguments, **options)


def test_one_block_warns():
    with pytest.warns(UserWarning, match="no saving"):
        MonarchLinear(8, 8, nblocks=1)
