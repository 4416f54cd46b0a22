"""Tests of the contract suite itself: it passes a right mixer and catches each wrong one."""

import pytest

from tests.contract import checks, tiny_mixers
from tests.contract.tiny_mixers import Tiny

CAUGHT_BY = {
    tiny_mixers.SaysTheWrongKind: (checks.check_class_facts,),
    tiny_mixers.HidesStateFromTools: (checks.check_state_tools,),
    tiny_mixers.LeaksOneStep: (checks.check_perturbation, checks.check_jacobian),
    tiny_mixers.ForgetsOnSplit: (checks.check_split, checks.check_decode),
    tiny_mixers.StateOfAnotherStep: (checks.check_split, checks.check_decode),
    tiny_mixers.DetachesState: (checks.check_split,),
    tiny_mixers.MixesDocuments: (checks.check_packing,),
    tiny_mixers.MixesDocumentsOfCalls: (checks.check_packing,),
    tiny_mixers.DecaysOnPadding: (checks.check_padding, checks.check_padding_alone),
    tiny_mixers.ReadsPadding: (checks.check_padding,),
    tiny_mixers.UnderstatesBytes: (checks.check_state_bytes,),
    tiny_mixers.UnderstatesFlops: (checks.check_flops,),
    tiny_mixers.SaysBoundedStateGrows: (checks.check_bounded_state,),
    tiny_mixers.RowsInteract: (checks.check_batch_invariance,),
    tiny_mixers.ChangesGivenState: (checks.check_state_is_value,),
    tiny_mixers.IsRandom: (checks.check_deterministic,),
    tiny_mixers.AlwaysReturnsState: (checks.check_want_state,),
    tiny_mixers.KeepsActivations: (checks.check_leaves_nothing_behind,),
    tiny_mixers.Overflows: (checks.check_extremes,),
    tiny_mixers.NewStateIsNotEmpty: (checks.check_new_state,),
    tiny_mixers.ReadsPrefix: (checks.check_prefix,),
    tiny_mixers.LosesMarksOnCopy: (checks.check_marks,),
    tiny_mixers.HasUnsavedNumbers: (checks.check_save_and_load,),
    tiny_mixers.AcceptsAnything: (checks.check_refuses_bad_input,),
    tiny_mixers.BranchesOnCompilation: (checks.check_compiles,),
}


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_right_mixer_passes(check):
    check(Tiny)


@pytest.mark.parametrize("wrong", CAUGHT_BY, ids=lambda wrong: wrong.__name__)
def test_wrong_mixer_is_caught(wrong):
    for check in CAUGHT_BY[wrong]:
        with pytest.raises(AssertionError):
            check(wrong)


def test_every_check_catches_something():
    assert {check for each in CAUGHT_BY.values() for check in each} == set(checks.CHECKS)


def test_leaky_mixer_is_passed_over_by_name():
    class Leaky(tiny_mixers.LeaksOneStep):
        causal = "leaky"
        leak_reason = "reads one token ahead"

    with pytest.raises(pytest.skip.Exception, match="Leaky declares that it leaks: reads one"):
        checks.check_perturbation(Leaky)


def test_false_facts_are_refused_when_the_class_is_made():
    with pytest.raises(TypeError, match="leak_reason belongs to causal = 'leaky'"):

        class Silent(Tiny):
            causal = "leaky"

    with pytest.raises(TypeError, match="causal = 'acausal'"):

        class Misspelt(Tiny):
            causal = "acausal"
