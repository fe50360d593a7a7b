"""Tiny real CLIPs, and random images."""

import numpy as np
import open_clip
import torch
from PIL import Image, ImageFilter


def random_image(seed, side=32):
    """A soft random pattern."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(3))


TINY = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"layers": 1, "width": 32, "heads": 2, "vocab_size": 49408, "context_length": 16},
}


def tiny_open_clip():
    torch.manual_seed(0)
    return open_clip.CLIP(**TINY).eval()


class Bundled:
    """Interface of the bundled CLIP: a model with preprocessing and tokenizer."""

    def __init__(self):
        self.model = tiny_open_clip()
        self.preprocess = open_clip.image_transform(32, is_train=False)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=16)
        self.encode_image, self.encode_text = self.model.encode_image, self.model.encode_text
