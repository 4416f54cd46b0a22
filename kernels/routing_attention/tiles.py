"""How strict routing attention is cut, which decides what it costs.

T queries, S keys, W window.
"""

from typing import NamedTuple

_LEAST_BLOCK, _MOST_BLOCK = 16, 256  # below, a product is overhead


class Tiles(NamedTuple):
    """Sizes for one row and head."""

    block: int  # queries in a chunk, and keys in a block
    blocks: int  # of keys
    chunks: int  # of queries
    reach: int  # blocks that a chunk reads before its anchor
    ahead: int  # and after it

    @classmethod
    def of(cls, queries: int, keys: int, window: int, causal: bool, shared: bool) -> "Tiles":
        """`shared`: no block of keys anchors more queries than it has keys."""
        # Half a window: a third of the scores is masked, whatever the window.
        block = min(keys, max(_LEAST_BLOCK, min(_ceil(window, 2), _MOST_BLOCK)))
        blocks = _ceil(keys, block)
        # Each block of keys that anchors a query may leave one chunk not full.
        anchors = min(blocks, queries)
        chunks = anchors if shared else anchors + (queries - anchors) // block
        reach = min(blocks - 1, _ceil(window - 1, block))
        ahead = 0 if causal else min(blocks - 1, _ceil(window, block))
        return cls(block, blocks, chunks, reach, ahead)

    @property
    def columns(self) -> int:
        """Keys that a chunk reads, masked ones included."""
        return (self.reach + 1 + self.ahead) * self.block


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
