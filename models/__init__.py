"""Whole networks: the language model, segment memory around it, generation, and building them."""
