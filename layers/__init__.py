"""Sequence mixers, channel mixers, norms and the contract that every mixer keeps."""
