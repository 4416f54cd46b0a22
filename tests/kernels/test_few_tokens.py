"""What "auto" takes for a few tokens: the reference's values and gradients, and its FLOPs count."""

from functools import partial
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import OURS, REFERENCE, Contender
from benchmarks.operators import OPERATORS
from kernels import native
from kernels.linear_attention import cpp, linear_attention
from kernels.linear_attention.op import step_at_once
from tests.benchmarks.test_bench import SMALL
from tests.kernels.compare import TOLERANCE, assert_close, needs_compiler, values_and_gradients

CPU = torch.device("cpu")
# No reference over time; the others' outputs do not depend on it.
ACROSS_TIME = sorted(OPERATORS.keys() - {"linear_cross_entropy", "linear_attention_step"})


def contenders(op: str, length: int) -> dict[str, Contender]:
    torch.manual_seed(length)
    operator = OPERATORS[op]
    return operator.make({**operator.sizes, **SMALL[op]}, length, torch.float64, CPU)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("op", ACROSS_TIME)
def test_auto_is_the_reference(op, length):
    found = contenders(op, length)
    ours, reference = found[OURS], found[REFERENCE]
    got, expected = (
        values_and_gradients(lambda *x, run=c.run: (run(*x),), ours.inputs, torch.float64)
        for c in (ours, reference)
    )
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_close(f"{op} {i}", a, b, TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    "op", ["causal_conv1d", "linear_recurrence", "long_conv", "selective_scan"]
)
def test_a_mode_that_counts_sees_the_operator(op):
    ours = contenders(op, 1)[OURS]
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in ours.inputs]
    with FlopCounterMode(display=False) as counter:
        ours.run(*inputs)
    assert counter.get_total_flops() > 0


def step(dtype: torch.dtype = torch.float32, batch: int = 2) -> dict:
    """The arguments of one token behind a state; K and V with and without whole vectors."""
    torch.manual_seed(0)
    q, k, v = (torch.rand(batch, 1, 3, width).to(dtype) for width in (7, 7, 70))
    exact = torch.promote_types(dtype, torch.float32)
    S, z = (torch.rand(batch, 3, *shape, dtype=exact) for shape in ((7, 70), (7,)))
    return {"q": q, "k": k, "v": v, "state": (S, z), "scale": 0.7, "normalize": True, "eps": 1e-3}


@pytest.fixture
def extension() -> ModuleType:
    return native.extension(cpp.SOURCE)


@needs_compiler
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_step_at_once_is_the_operator(dtype, normalize, extension):
    given = step(dtype) | {"normalize": normalize}
    q, k, v, (S, z), *numbers = given.values()
    expected = torch.ops.seqmix.linear_attention_steps(q, k, v, S, z, None, *numbers, "cpp")
    y, (S_after, z_after) = step_at_once(**given)
    for got, wanted in zip((y, S_after, z_after), expected, strict=True):
        assert got.dtype is wanted.dtype
        assert torch.equal(got, wanted)
    with torch.inference_mode():
        assert torch.equal(step_at_once(**given)[0], y)
    q.requires_grad_()
    with torch.no_grad():
        assert torch.equal(step_at_once(**given | {"k": torch.nn.Parameter(k)})[0], y)
    options = {"initial_state": (S, z), "scale": 0.7, "normalize": normalize, "eps": 1e-3}
    with torch.no_grad():
        assert torch.equal(linear_attention(q, k, v, **options), y)
        got, state = linear_attention(q, k, v, **options, return_state=True)
    assert torch.equal(got, y)
    assert torch.equal(state[0], S_after)


class Subclass(torch.Tensor):
    pass


OUT_OF_THE_ORDINARY = {
    "a gradient": lambda q, **_: {"q": q.requires_grad_()},
    "a state's gradient": lambda state, **_: {"state": (state[0], state[1].requires_grad_())},
    "other memory": lambda v, **_: {"v": v.mT.contiguous().mT},
    "a negative view": lambda v, **_: {"v": torch._neg_view(v)},
    "a subclass": lambda k, **_: {"k": k.as_subclass(Subclass)},
    "no tensor": lambda **_: {"q": None},
    "meta": lambda **given: {name: given[name].to("meta") for name in "qkv"},
    "a sparse state": lambda state, **_: {"state": (state[0].to_sparse(), state[1])},
    "two tokens": lambda **given: {name: given[name].repeat(1, 2, 1, 1) for name in "qkv"},
    "more queries than values": lambda **given: {n: given[n].repeat(1, 2, 1, 1) for n in "qk"},
    "no token": lambda **given: {name: given[name][:, :0] for name in "qkv"},
    "half precision": lambda **given: {name: given[name].half() for name in "qkv"},
    "other dtypes": lambda k, **_: {"k": k.bfloat16()},
    "another dtype of q": lambda q, **_: {"q": q.bfloat16()},
    "another dtype of v": lambda v, **_: {"v": v.bfloat16()},
    "a wide state": lambda state, **_: {"state": (state[0].double(), state[1])},
    "a narrow state": lambda state, **_: {"state": (state[0], state[1].bfloat16())},
    "a missing dimension": lambda q, **_: {"q": q[0]},
    "v's missing dimension": lambda v, **_: {"v": v[0]},
    "other keys": lambda k, **_: {"k": k[..., :-1].contiguous()},
    "other heads": lambda v, **_: {"v": v[:, :, :-1].contiguous()},
    "another batch": lambda v, **_: {"v": v[:1]},
    "S of another shape": lambda state, **_: {"state": (state[0].mT.contiguous(), state[1])},
    "z of another shape": lambda state, **_: {"state": (state[0], state[1][..., :-1].contiguous())},
    "no tuple": lambda state, **_: {"state": list(state)},
    "no pair": lambda state, **_: {"state": (*state, state[1])},
}


@needs_compiler
@pytest.mark.parametrize("what", OUT_OF_THE_ORDINARY)
def test_a_step_goes_the_long_way(what, extension):
    given = step()
    assert step_at_once(**given) is not None
    assert step_at_once(**given | OUT_OF_THE_ORDINARY[what](**given)) is None


@needs_compiler
def test_a_step_goes_the_long_way_where_somebody_looks_on(extension, monkeypatch):
    given = step()
    with FlopCounterMode(display=False) as counter:
        assert step_at_once(**given) is None
        q, k, v, state, scale, *_ = given.values()
        linear_attention(q, k, v, initial_state=state, scale=scale)
    assert counter.get_total_flops() > 0
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        linear_attention(q, k, v, initial_state=state)
    assert "seqmix::linear_attention_steps" in {event.key for event in seen.key_averages()}
    inside = []
    torch.func.vmap(lambda v: inside.append(step_at_once(**given | {"v": v})) or v)(v[None])
    assert inside == [None]
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(given[name]) for name in "qkv"}
        assert step_at_once(**given | fake) is None
    assert step_at_once(**given) is not None
    for value, off in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(native.SWITCH, value)
        assert (step_at_once(**given) is None) == off


@needs_compiler
def test_a_compiled_step_is_the_eager_one(extension):
    q, k, v, state, *_ = step().values()
    run = partial(linear_attention, initial_state=state)
    with torch.no_grad():
        expected = run(q, k, v)
        assert torch.equal(torch.compile(run, fullgraph=True)(q, k, v), expected)
