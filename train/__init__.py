"""Training: data, optimizer, step, loop and checkpoints."""
