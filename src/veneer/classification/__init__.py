"""Image classification with adapters on frozen models: data, models, training and reports."""

from veneer.extras import require

require("torchvision", "accelerate")
