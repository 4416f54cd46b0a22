"""How a network reads its inputs and gives its answers, where that is not token for token.

vectors.py reads pairs of fixed vectors; auto_encoder.py answers when it has read everything. Both
stand around a language model's blocks, base.py being what they share.
"""

from models.io.auto_encoder import AutoEncoder
from models.io.vectors import Vectors

__all__ = ["AutoEncoder", "Vectors"]
