"""Floor 2: state, losses, optimizers, the step, metrics, checkpoints and evaluation."""
