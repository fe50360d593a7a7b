"""Tones and colours without detail: `grey`, `blur`, `palette`, `low_resolution`."""

from PIL import Image, ImageFilter

from .color_modes import upright_rgb

_Sampling = Image.Resampling


def grey(picture: Image.Image) -> Image.Image:
    """Brightness alone, 0.299 R + 0.587 G + 0.114 B: what is left to choose are the colours."""
    return upright_rgb(picture).convert("L").convert("RGB")


def blur(picture: Image.Image, *, sigma: float = 0.05) -> Image.Image:
    """Smooth spots of colour: a Gaussian of `sigma`, a part of the short side."""
    return upright_rgb(picture).filter(ImageFilter.GaussianBlur(sigma * min(picture.size)))


def palette(picture: Image.Image, *, cells: int = 8) -> Image.Image:
    """Squares of one colour each, the mean of what they cover: `cells` along the short side, as many as fit along the other."""
    rgb = upright_rgb(picture)
    return rgb.resize(_grid(rgb.size, cells / min(rgb.size)), _Sampling.BOX).resize(rgb.size, _Sampling.NEAREST)


def low_resolution(picture: Image.Image, *, pixels: int = 24) -> Image.Image:
    """Reduced to `pixels` along the short side and enlarged again, smoothly: shapes and colours stay, detail is gone."""
    rgb = upright_rgb(picture)
    return rgb.resize(_grid(rgb.size, pixels / min(rgb.size)), _Sampling.BICUBIC).resize(rgb.size, _Sampling.BICUBIC)


def _grid(size: tuple[int, int], scale: float) -> tuple[int, int]:
    width, height = (max(1, min(length, round(length * scale))) for length in size)
    return width, height
