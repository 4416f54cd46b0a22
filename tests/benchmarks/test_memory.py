"""The peak is of what a piece of code allocates, whatever it frees."""

import torch

from benchmarks.memory import peak_bytes


def test_the_peak_is_what_is_held_at_one_time():
    def run():
        for _ in range(3):
            a = torch.empty(1000)  # 4000 bytes, beside the one before it but for the first
        return a

    assert peak_bytes(run) == 8000


def test_what_is_freed_but_not_allocated_makes_no_room():
    held = []
    assert peak_bytes(lambda: held.append(torch.empty(1 << 20))) == 4 << 20  # its size is known

    def run():
        held.clear()
        return torch.empty(10)

    assert peak_bytes(run) == 40
