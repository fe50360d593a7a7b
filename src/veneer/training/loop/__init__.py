"""The training loop: trainer, optimizers, EMA, checkpoints and distributed training."""

from veneer.extras import require

require("accelerate")
