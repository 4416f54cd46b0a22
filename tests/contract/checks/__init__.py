"""The mixer contract as plain functions, each of which takes a factory of the mixer it tests.

A check raises AssertionError; those that a class fact rules out skip by name. Test files run them
over every mixer, test_suite_catches.py over mixers that are wrong on purpose.
"""

from tests.contract.checks.accounting import (
    check_bounded_state,
    check_flops,
    check_state_bytes,
)
from tests.contract.checks.causality import (
    check_jacobian,
    check_perturbation,
    check_prefix,
)
from tests.contract.checks.continuation import (
    check_backends_agree,
    check_decode,
    check_new_state,
    check_split,
)
from tests.contract.checks.documents import (
    check_packing,
    check_padding,
    check_padding_alone,
)
from tests.contract.checks.module import (
    check_class_facts,
    check_compiles,
    check_marks,
    check_refuses_bad_input,
    check_save_and_load,
)
from tests.contract.checks.rows import check_batch_invariance, check_state_tools
from tests.contract.checks.values import (
    check_deterministic,
    check_extremes,
    check_leaves_nothing_behind,
    check_state_is_value,
    check_want_state,
)

CHECKS = (
    check_class_facts,
    check_refuses_bad_input,
    check_want_state,
    check_leaves_nothing_behind,
    check_deterministic,
    check_state_is_value,
    check_split,
    check_decode,
    check_new_state,
    check_perturbation,
    check_jacobian,
    check_prefix,
    check_packing,
    check_padding,
    check_padding_alone,
    check_batch_invariance,
    check_state_tools,
    check_state_bytes,
    check_bounded_state,
    check_flops,
    check_extremes,
    check_marks,
    check_save_and_load,
    check_compiles,
)

__all__ = ["CHECKS", "check_backends_agree", *(check.__name__ for check in CHECKS)]
