"""What happens around the steps of a run: rows of metrics, checkpoints, progress, signals."""
