"""What a piece of code holds at its worst, as torch's allocator sees it."""

import os
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its start and stop

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that `run` allocates on the CPU at any one time, beyond what is there before it.

    What `run` frees but did not allocate counts for nothing: neither does it make room, nor is
    the size known that the allocator had for it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    recorded = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = recorded.experimental_event_tree()  # type: ignore[union-attr]
    changes = []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields))
    sizes: dict[int, int] = {}
    held = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        if change.alloc_size > 0:
            sizes[change.ptr] = change.alloc_size
            held += change.alloc_size
            peak = max(peak, held)
        else:
            held -= sizes.pop(change.ptr, 0)
    assert peak > 0, "the profiler saw no allocation"
    return peak
