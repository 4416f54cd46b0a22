"""Typed schemas of every configuration group, composing, and checking before anything is read."""
