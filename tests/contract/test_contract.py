"""Every mixer of conf/mixer, and stacks of several, under every check of the contract."""

from functools import partial
from inspect import signature

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.contract import checks
from tests.contract.subjects import NAMES, SUBJECTS, make_mixer

# The same few examples in every run: a failure is then the code's, and repeatable. They are small
# enough to read without being shrunk, which takes minutes.
FEW = settings(
    max_examples=5,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
)

each_subject = pytest.mark.parametrize("subject", SUBJECTS)


@each_subject
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__[len("check_") :])
def test_contract(check, subject):
    if check is checks.check_compiles and "+" in subject:
        pytest.skip("a stack compiles what each of its mixers compiles alone")
    check(SUBJECTS[subject])


@each_subject
@FEW
@given(cuts=st.sets(st.integers(1, 29), max_size=6).map(sorted))
def test_any_split(subject, cuts):
    checks.check_split(SUBJECTS[subject], cuts, length=30)


@each_subject
@FEW
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    cuts=st.sets(st.integers(1, 60), max_size=4),
)
def test_any_packing(subject, lengths, cuts):
    inside = sorted(cut for cut in cuts if cut < sum(lengths))
    checks.check_packing(SUBJECTS[subject], lengths, inside)


@each_subject
@FEW
@given(seed=st.integers(0, 2**16))
def test_any_padding(subject, seed):
    checks.check_padding(SUBJECTS[subject], seed)


@pytest.mark.parametrize("name", NAMES)
def test_forms_agree(name):
    if "backend" not in signature(type(make_mixer(name))).parameters:
        pytest.skip(f"{name} has no choice of backend")
    reference = partial(make_mixer, name, backend="reference")
    checks.check_backends_agree(partial(make_mixer, name), reference)


@pytest.mark.slow  # the compiler takes up to 40 seconds for each
@pytest.mark.parametrize("name", NAMES)
def test_inductor_equals_eager(name):
    checks.check_compiles(partial(make_mixer, name), backend="inductor", steps=3)


def test_every_file_is_a_subject():
    assert set(NAMES) <= set(SUBJECTS)
    assert any("+" in name for name in SUBJECTS), "no stack of several mixers"
    assert torch.get_default_dtype() is torch.float32
