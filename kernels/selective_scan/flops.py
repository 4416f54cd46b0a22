"""Work of the selective scan: one multiply, one add and one exponential each count as one.

Only what has a state dimension counts; the rest is element-wise over (B, D, L), which torch's
FlopCounterMode leaves out too. B batch, D channels, L time, N state.
"""


def selective_scan_flops(batch: int, length: int, channels: int, d_state: int) -> int:
    """7 B L D N forward: exp(step A) is 2, (step u) B is 1, recurrence and readout are 2 each."""
    return 7 * batch * length * channels * d_state


def selective_scan_backward_flops(batch: int, length: int, channels: int, d_state: int) -> int:
    """20 B L D N: the states again 5, C g and the adjoint scan 3, and the gradients' sums.

    These are 2 each for B, C and u, 2 for the exponent, and 2 each for its sums that are the
    gradients of the step and of A.
    """
    return 20 * batch * length * channels * d_state
