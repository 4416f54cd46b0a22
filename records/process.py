"""Which of the processes that train together this one is."""

import os

# As torchrun, Lightning and Slurm say it to the processes they start, the widest count first.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def rank() -> int:
    """The number of this process among those of its run, from 0."""
    for name in RANK_VARIABLES:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def is_first_process() -> bool:
    """Whether this process writes, and speaks, for all of its run."""
    return rank() == 0
