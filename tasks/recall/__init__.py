"""Recall tasks, generated from a seed."""
