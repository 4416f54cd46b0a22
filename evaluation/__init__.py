"""Protocols over a trained model: perplexity, recall slices, cost."""
