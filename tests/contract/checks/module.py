"""A mixer is a good nn.Module: facts, errors, marks, copies, files, compilation."""

import copy
import io

import torch
from torch import nn

from layers.marks import marked_parameters
from models.language_model import LanguageModel
from tests.contract.compare import (
    assert_close,
    assert_equal,
    assert_gradients_close,
    assert_states_close,
    gradients,
    random_input,
)
from tests.contract.subjects import Factory, build


def check_class_facts(make: Factory) -> None:
    """Facts are of the kind that the contract names, and those of a leak go together."""
    mixer = build(make)
    assert mixer.causal in ("strict", "prefix", "leaky")
    assert (mixer.causal == "leaky") == bool(mixer.leak_reason)
    assert "\n" not in mixer.leak_reason
    assert type(mixer.supports_segments) is bool
    assert type(mixer.bounded_state) is bool
    assert isinstance(mixer.new_state(2, 3), mixer.state_type)
    assert isinstance(mixer(random_input(2, 3, mixer), want_state=True)[1], mixer.state_type)


def check_refuses_bad_input(make: Factory) -> None:
    """Wrong arguments raise ValueError in one line."""
    mixer = build(make)
    x = random_input(2, 3, mixer)
    state = mixer.new_state(3, 4)
    wrong = [
        ("no position", (x[:, :0],), {}),
        ("no batch dimension", (x[0],), {}),
        ("another width", (x[..., :-1],), {}),
        ("a state of another batch", (x, state), {}),
        ("a state of another type", (x, {"k": x}), {}),
        ("segments of another length", (x,), {"segments": torch.zeros(2, 4, dtype=torch.int64)}),
        ("segments that are no integers", (x,), {"segments": torch.zeros(2, 3)}),
    ]
    if not mixer.supports_segments:
        wrong.append(("segments", (x,), {"segments": torch.zeros(2, 3, dtype=torch.int64)}))
    for what, arguments, named in wrong:
        try:
            mixer(*arguments, **named)
        except ValueError as error:
            message = str(error)
            assert message, f"{what}: an empty message"
            assert "\n" not in message, f"{what}: {message}"
        except Exception as error:
            raise AssertionError(
                f"{what}: {type(error).__name__} in place of ValueError"
            ) from error
        else:
            raise AssertionError(f"{what}: accepted")


def check_marks(make: Factory) -> None:
    """Marks and the values a layer chose survive the model's initialiser, copies and "meta"."""
    torch.manual_seed(0)
    mixer = make()
    chosen = {
        name: parameter.detach().clone()
        for name, parameter, marks in marked_parameters(mixer)
        if marks.own_init
    }
    marks = {name: mark for name, _, mark in marked_parameters(mixer)}
    model = LanguageModel(7, mixer.d_model, [mixer], [None], nn.LayerNorm)
    for what, twin in (("building", model), ("deepcopy", copy.deepcopy(model))):
        found = {n: (p, m) for n, p, m in marked_parameters(twin)}
        for name, mark in marks.items():
            parameter, kept = found[f"blocks.0.mixer.{name}"]
            assert kept == mark, f"{name} after {what}: {kept} for {mark}"
            if mark.own_init:
                assert_equal(f"{name} after {what}", parameter, chosen[name])
    with torch.device("meta"):
        blank = make()
    assert all(p.is_meta for p in blank.parameters()), "a parameter was not built on meta"
    blank.to_empty(device="cpu")
    assert {n: m for n, _, m in marked_parameters(blank)} == marks, "marks lost on meta"


@torch.no_grad()
def check_save_and_load(make: Factory) -> None:
    """A mixer built from another seed and given the saved parameters computes the same bits."""
    mixer = build(make, torch.float32)
    file = io.BytesIO()
    torch.save(mixer.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    twin = make().eval()
    twin.load_state_dict(torch.load(file, weights_only=True))
    x = random_input(2, 9, mixer)
    assert_equal("output after loading", twin(x, want_state=True), mixer(x, want_state=True))


def check_compiles(make: Factory, backend: str = "aot_eager", steps: int = 0) -> None:
    """torch.compile changes nothing: output, state, gradients, and `steps` from the state."""
    mixer = build(make)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, backend=backend)
    x = random_input(2, 21, mixer).requires_grad_()
    y, end = mixer(x, want_state=True)
    z, end_compiled = compiled(x, want_state=True)
    assert_close("compiled output", z, y)
    assert_states_close("compiled", end_compiled, end)
    assert_gradients_close(
        "compiled",
        gradients(mixer, x, z, end_compiled, None),
        gradients(mixer, x, y, end, None),
    )
    with torch.no_grad():
        state = compiled_state = mixer(x, want_state=True)[1]
        for t in range(steps):
            token = x[:, t : t + 1]
            y, state = mixer(token, state, want_state=True)
            z, compiled_state = compiled(token, compiled_state, want_state=True)
            assert_close(f"compiled step {t}", z, y)
            assert_states_close(f"compiled step {t}", compiled_state, state)
