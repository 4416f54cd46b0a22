"""The Lightning module, objectives, parameter groups, callbacks and exact resume."""
