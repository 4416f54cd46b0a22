"""FLOPs of the recurrence."""


def linear_recurrence_flops(batch: int, length: int, width: int, *, is_complex: bool) -> int:
    """FLOPs as FlopCounterMode counts them: a multiply-add per element, 2, or 8 where complex."""
    return batch * length * width * (8 if is_complex else 2)
