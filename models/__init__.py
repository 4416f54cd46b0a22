"""Whole networks: the language model, generation, and building both from a config."""
