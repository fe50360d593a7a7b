"""Image classification on frozen models: pictures, splits, views, models and the loop that trains what is thin."""

from veneer.extras import require

require("torchvision", "accelerate")
