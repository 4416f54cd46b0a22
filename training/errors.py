"""What ends a run that was configured well."""


class TrainingError(RuntimeError):
    """A run cannot go on; the message is one line that says at which step and why."""
