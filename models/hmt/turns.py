"""Which tokens of a stream are read in which round: a segment, or what is left or known of one."""

from collections.abc import Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """What one stream reads in one round.

    Attributes:
        index: number of the segment in its document.
        begin: tokens of this call that the stream has read before.
        count: tokens that it reads now; 0 where it only closes a segment that was full.
        opens: the segment begins here.
        closes: the segment ends here, with another behind it.
    """

    index: int
    begin: int
    count: int
    opens: bool
    closes: bool


def turns(length: int, offset: int, closed: int, segment_len: int) -> list[Turn]:
    """Every turn of a stream with `length` tokens in this call.

    Args:
        offset: tokens of the open segment that were read before, 0 to `segment_len`; 0 when
            there is no open segment.
        closed: segments before the open one.

    >>> [turn.count for turn in turns(7, offset=2, closed=0, segment_len=4)]
    [2, 4, 1]
    """
    found: list[Turn] = []
    begin = 0
    while begin < length:
        room = segment_len - (0 if found else offset)
        count = min(room, length - begin)
        opens = bool(found) or offset == 0
        closes = begin + count < length
        found.append(Turn(closed + len(found), begin, count, opens, closes))
        begin += count
    return found


def idle(plan: Sequence[Turn]) -> Turn:
    """What a stream does that has no turn left: nothing."""
    return Turn(plan[-1].index if plan else 0, 0, 0, opens=False, closes=False)
