"""The training loop: trainer, optimizers, EMA, checkpoints and distributed training."""
