"""Hedgehog behind a softmax window: the formula, its two limits, ablations, positions, sizes."""

import pytest
import torch
from torch import Tensor

from layers.attention import Attention
from layers.hedgehog import HedgehogAttention
from layers.hedgehog_window import HedgehogWindowAttention, only
from layers.marks import marked_parameters
from layers.sliding_window import SlidingWindowAttention
from models.language_model import LanguageModel

ROUNDING = 1e-11  # float64, sums of a hundred products
EPS = 1e-10  # eps / g = 1e-11 stands beside sums of at least 1


def layer(window: int, **options) -> HedgehogWindowAttention:
    torch.manual_seed(0)
    return HedgehogWindowAttention(16, num_heads=4, window=window, **options).double()


def same_weights(cls: type, source: HedgehogWindowAttention, **options):
    """A layer of another class with those parameters that it has in common with `source`."""
    other = cls(16, num_heads=4, **options).double()
    own = other.state_dict()
    other.load_state_dict({name: w for name, w in source.state_dict().items() if name in own})
    return other


def x(length: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, 16, dtype=torch.float64, generator=generator) * 2


def by_the_formula(mixer: HedgehogWindowAttention, x: Tensor) -> Tensor:
    """Section by section as the docstring of the class has it, with all weights in one matrix."""
    T = x.shape[1]
    q, k, v = mixer.project(x, torch.arange(T))
    k, v = mixer.to_all_heads(k), mixer.to_all_heads(v)
    place = torch.arange(T)
    past = place[:, None] >= place
    near = past & (place[:, None] - place < mixer.window)
    s = torch.einsum("bihd,bjhd->bhij", q, k) * mixer.key_dim**-0.5
    s = s.masked_fill(~near, float("-inf"))
    m = s.amax(-1, keepdim=True)
    far = torch.einsum("bihf,bjhf->bhij", mixer.query_map(q), mixer.key_map(k))
    g = mixer.window_factors.sigmoid()[:, None, None]
    a = 1 - g if mixer.affine_attention_factors else 1
    weights = g * (s - m).exp() + a * far.masked_fill(near | ~past, 0)
    weights = weights / weights.sum(-1, keepdim=True)
    return mixer.merge(torch.einsum("bhij,bjhv->bihv", weights, v))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine_attention_factors": True, "init_window_factor": 0.7},
        {"num_kv_heads": 2, "activation": "exp_stable"},
        {"num_kv_heads": 1, "feature_dim": 3, "rotary": False, "tie": True},
    ],
)
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65])
@torch.no_grad()
def test_equals_the_formula(length, options):
    mixer = layer(9, **options)
    expected = by_the_formula(mixer, x(length))
    torch.testing.assert_close(mixer(x(length))[0], expected, rtol=EPS, atol=EPS)


@torch.no_grad()
def test_a_window_of_everything_is_softmax_attention():
    mixer = layer(40)
    expected = same_weights(Attention, mixer)(x(40))[0]
    torch.testing.assert_close(mixer(x(40))[0], expected, rtol=EPS, atol=EPS)


@torch.no_grad()
def test_no_window_is_hedgehog():
    mixer = layer(0)
    hedgehog = same_weights(HedgehogAttention, mixer)
    y, state = mixer(x(40), want_state=True)
    expected, sums = hedgehog(x(40), want_state=True)
    torch.testing.assert_close(y, expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(state.S, sums.S, rtol=0, atol=ROUNDING)
    z, state = mixer(x(3), state, want_state=True)
    torch.testing.assert_close(z, hedgehog(x(3), sums)[0], rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_the_window_alone_is_sliding_window_attention():
    mixer = layer(9, parts="window")
    sliding = same_weights(SlidingWindowAttention, mixer, window=9)
    torch.testing.assert_close(mixer(x(40))[0], sliding(x(40))[0], rtol=EPS, atol=EPS)
    with pytest.raises(ValueError, match="window=0 with parts='window': expected at least 1"):
        layer(0, parts="window")


@torch.no_grad()
def test_the_linear_part_alone_sees_nothing_of_the_window():
    mixer = layer(9, parts="linear")
    y, _ = mixer(x(40))
    assert not y[:, :9].any(), "nothing lies behind the window yet"
    nearer = x(40)
    nearer[:, 32:39] += 1
    changed = (mixer(nearer)[0] != y).flatten(2).any(-1).all(0)
    assert changed.nonzero().flatten().tolist() == list(range(32, 39)), "but for their own queries"


@pytest.mark.parametrize("parts", ["window", "linear"])
@torch.no_grad()
def test_ablations_decode_as_they_run(parts):
    mixer = layer(5, parts=parts)
    expected, _ = mixer(x(23))
    state, outputs = None, []
    for t in range(23):
        y, state = mixer(x(23)[:, t : t + 1], state, want_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_only_one_part_of_a_model_for_a_while():
    mixer, alone = layer(9), layer(9, parts="window")
    before = mixer(x(30))[0]
    with only("window", mixer) as some:
        assert some
        assert torch.equal(mixer(x(30))[0], alone(x(30))[0])
    assert torch.equal(mixer(x(30))[0], before)
    with only("linear", alone) as some:
        assert not some, "what was built without a part stays as it is"
        assert alone.parts == "window"


@torch.no_grad()
def test_outputs_are_means_of_the_values():
    mixer = layer(9)
    constant = x(1).expand(-1, 40, -1)
    without_positions = same_weights(HedgehogWindowAttention, mixer, window=9, rotary=False)
    y, _ = without_positions(constant)
    torch.testing.assert_close(y, y[:, :1].expand_as(y), rtol=EPS, atol=EPS)


@torch.no_grad()
def test_scores_of_any_size_stay_finite():
    mixer = layer(9).float()
    for size in (1e-6, 1e3, 1e6):
        y, state = mixer(x(70).float() * size, want_state=True)
        assert y.isfinite().all()
        assert state.S.isfinite().all()


def test_initialisation_survives_the_model():
    mixer = HedgehogWindowAttention(16, num_heads=4)
    model = LanguageModel(7, 16, [mixer], [None], torch.nn.LayerNorm)
    gates = torch.full((4,), 0.1)
    torch.testing.assert_close(mixer.window_factors.sigmoid().detach(), gates)
    assert torch.equal(mixer.query_map.weight, torch.eye(4).expand(4, 4, 4))
    marks = {name: m for name, _, m in marked_parameters(model)}
    for name in ("window_factors", "query_map.weight", "key_map.weight"):
        assert not marks[f"blocks.0.mixer.{name}"].decay


def test_sizes_of_gpt2():
    mixer = HedgehogWindowAttention(768, num_heads=12)
    plain = HedgehogAttention(768, num_heads=12)
    window = 2 * 64 * 768 * 4
    assert mixer.state_bytes(1, 10**6) == plain.state_bytes(1, 10**6) + window
    assert sum(p.numel() for p in mixer.parameters()) == 12 + sum(
        p.numel() for p in plain.parameters()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": -1}, "window=-1"),
        ({"parts": "none"}, "parts='none': allowed: both, window, linear"),
        ({"num_heads": 3}, "num_heads=3: expected a divisor of d_model=16"),
        ({"eps": -1.0}, "eps=-1.0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        HedgehogWindowAttention(16, **{"num_heads": 4, "window": 3, **options})
