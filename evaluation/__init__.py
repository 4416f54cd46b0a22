"""Protocols over a trained model: perplexity, recall slices, cost."""

from evaluation.evaluate import evaluate
from evaluation.settings import Settings
from evaluation.table import print_table

__all__ = ["Settings", "evaluate", "print_table"]
