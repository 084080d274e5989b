"""What stops `lenvm distill`."""


class DistillationError(RuntimeError):
    """Distillation cannot go on; the message is one sentence for the user."""
