"""The keys and values that softmax attention remembers, as a value that is cheap to append to.

B batch, T new tokens, S slots, G key and value heads, D head width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from layers.segments import NO_DOCUMENT, DocumentState, Place, belongs


class _Room:
    """Memory behind a line of caches, each a prefix of the next; `used` slots are taken.

    Only the newest cache of the line may go on in place: slots from `used` are in no cache.
    """

    def __init__(self, k: Tensor, v: Tensor, capacity: int) -> None:
        (B, used, G, D), (*_, V) = k.shape, v.shape
        self.k, self.v = k.new_empty(B, capacity, G, D), v.new_empty(B, capacity, G, V)
        self.k[:, :used], self.v[:, :used] = k, v
        self.used = used

    def fits(self, used: int, needed: int) -> bool:
        # A tensor born in inference mode may not be written to outside it.
        writable = torch.is_inference_mode_enabled() or not self.k.is_inference()
        return self.used == used and needed <= self.k.shape[1] and writable


@dataclass(eq=False)
class KVCache:
    """Keys and values of the document that each row ended in.

    The tokens of row b stand in its last `length[b]` slots, oldest first; slots before them hold
    zeros. (Rows end together, so that a token for every row goes into the same slot of each.)

    A state is a value, yet appending to one costs the new tokens only, amortised: k and v are
    views of a larger buffer, and the newest view grows in place, where no older one can see it.
    Appending to an older one copies it, as does everything under autograd.
    """

    k: Tensor  # (B, S, G, D)
    v: Tensor  # (B, S, G, D)
    length: Tensor  # (B,) int64 tokens in each row
    segment: Tensor  # (B,) int64 document that the row ended in
    filled: int  # slots in use: S, but 0 for the empty past, whose slots are a wish for room
    ragged: bool = False  # whether a row may have fewer tokens than `filled`
    # Not an __init__ field: a cache made by dataclasses.replace (any of layers/state.py) is no
    # longer a view of the buffer, and has none.
    room: _Room | None = field(default=None, init=False, repr=False)

    def joined(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The slots in use followed by k, v (B, T, G, D), in the cache's dtype."""
        old_k, old_v = self.k[:, : self.filled], self.v[:, : self.filled]
        return torch.cat([old_k, k.to(old_k.dtype)], 1), torch.cat([old_v, v.to(old_v.dtype)], 1)

    def append(self, k: Tensor, v: Tensor, place: Place) -> "KVCache":
        """The cache with k, v (B, T, G, D) appended to every row."""
        needed = self.filled + k.shape[1]
        if torch.is_grad_enabled():
            new_k, new_v = self.joined(k, v)
            return KVCache(new_k, new_v, place.length, place.last, needed, self.ragged)
        room = self.room
        if room is None or not room.fits(self.filled, needed):
            capacity = max(needed, self.k.shape[1], 2 * self.filled)
            room = _Room(self.k[:, : self.filled], self.v[:, : self.filled], capacity)
        room.k[:, self.filled : needed], room.v[:, self.filled : needed] = k, v
        room.used = needed
        grown = KVCache(
            room.k[:, :needed], room.v[:, :needed], place.length, place.last, needed, self.ragged
        )
        grown.room = room
        return grown


def key_tags(
    past: DocumentState, slots: int, where: Place, segments: Tensor | None, length: int
) -> Tensor:
    """Document numbers (B, slots + T) of the cached keys and of a call's T = `length` own.

    A row's cached tokens stand in the last of the `slots`; -1 marks the slots before them, and
    all of them in a row that starts a new document.
    """
    holds = torch.arange(slots, device=past.length.device) >= slots - past.length[:, None]
    if where.carry is not None:
        holds = holds & where.carry[:, None]
    old = torch.where(holds, past.segment.clamp(min=0)[:, None], -1)
    new = where.last[:, None].expand(-1, length) if segments is None else segments
    return torch.cat([old, new], dim=1)


def empty_cache(
    batch_size: int,
    max_len: int,
    heads: int,
    width: int,
    device: torch.device | str,
    dtype: torch.dtype,
    value_width: int | None = None,
) -> KVCache:
    """No tokens; the first append takes memory for `max_len` of them at once.

    `value_width` is that of keys by default.
    """
    # One zero seen as every slot: what the empty past holds is the number of slots.
    k = torch.zeros((), device=device, dtype=dtype).expand(batch_size, max_len, heads, width)
    v = k[..., : width if value_width is None else value_width]
    length = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return KVCache(k, v, length, torch.full_like(length, NO_DOCUMENT), filled=0)


def remember(
    state: KVCache | None,
    k: Tensor,
    v: Tensor,
    where: Place,
    segments: Tensor | None,
    want_state: bool,
) -> tuple[Tensor, Tensor, Tensor | None, KVCache | None]:
    """Put a call's keys and values after those of the past.

    Returns:
        k and v of all slots (B, S + T, G, D); their document numbers (B, S + T), None where every
        slot is of one document; and the cache after the call, if `want_state`.
    """
    tags = segments
    if state is not None:
        if segments is not None or state.ragged:
            tags = key_tags(state, state.filled, where, segments, k.shape[1])
        if want_state and segments is None:
            after = state.append(k, v, where)
            return after.k, after.v, tags, after
        k, v = state.joined(k, v)
    return k, v, tags, _last_document(k, v, tags, where) if want_state else None


def _last_document(k: Tensor, v: Tensor, tags: Tensor | None, where: Place) -> KVCache:
    """What the call's keys leave behind: those of each row's last document."""
    if tags is None:
        return KVCache(k, v, where.length, where.last, filled=k.shape[1])
    shortest, longest = torch.stack(where.length.aminmax()).tolist()
    k, v = newest(belongs(tags, where.last), longest, k, v)
    return KVCache(k, v, where.length, where.last, filled=longest, ragged=shortest < longest)


def newest(keep: Tensor, slots: int, *tensors: Tensor) -> list[Tensor]:
    """The last `slots` kept positions of each row, in order, against the right edge.

    Args:
        keep: bool (B, S), S >= slots.
        tensors: each (B, S, G, D).

    Returns:
        Each (B, slots, G, D), zeros where a row keeps fewer.
    """
    S = keep.shape[1]
    order = keep.to(torch.uint8).argsort(dim=1, stable=True).narrow(1, S - slots, slots)
    unused = ~keep.gather(1, order)[..., None, None]
    index = order[..., None, None]
    return [torch.take_along_dim(x, index, 1).masked_fill(unused, 0) for x in tensors]
