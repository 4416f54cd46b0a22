"""The hierarchical memory transformer around any language model.

model.py is what the rest of the code sees; memory.py has the parameters and the options, state.py
what is remembered between calls, streams.py takes packed documents apart, turns.py cuts them into
segments and reading.py reads these one after the other.
"""

from models.hmt.model import HMT
from models.hmt.state import HMTState

__all__ = ["HMT", "HMTState"]
