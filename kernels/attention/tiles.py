"""How long attention is cut, which decides what it costs.

T queries, S keys, W window.
"""

_LEAST_BLOCK = 64  # queries; below this a call is overhead
_MASK = 1 << 20  # scores under one mask, B and H aside: 4 MiB as float32


def band_block(window: int) -> int:
    """Queries per block of a sliding window: W, so that keys are copied about twice."""
    return max(window, _LEAST_BLOCK)


def query_blocks(queries: int, keys: int) -> list[tuple[int, int]]:
    """(start, end) of the blocks of queries that later positions of a sequence are cut into."""
    size = max(_LEAST_BLOCK, _MASK // keys)
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


def scores(queries: int, keys: int, causal: bool, window: int | None) -> int:
    """Scores computed per head for one document, masked ones included."""
    T, S = queries, keys
    if window is not None and window < S:
        reach, C = window - 1, band_block(window)
        head = min(T, C)
        return head * (head + min(S - T, reach)) + _after_head(T - head, C, reach)
    if not causal or T in (1, S):
        return T * S
    return sum((end - start) * (S - T + end) for start, end in query_blocks(T, S))


def _after_head(rest: int, block: int, reach: int) -> int:
    body, tail = rest - rest % block, rest % block
    return body * (block + reach) + tail * (tail + reach)
