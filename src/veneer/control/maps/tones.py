"""Maps of tones and colors without detail: `grey`, `blur`, `palette`, `low_resolution`."""

from PIL import Image, ImageFilter

from .color_modes import to_rgb

_Sampling = Image.Resampling


def grey(image: Image.Image) -> Image.Image:
    """Grayscale, 0.299 R + 0.587 G + 0.114 B."""
    return to_rgb(image).convert("L").convert("RGB")


def blur(image: Image.Image, *, sigma: float = 0.05) -> Image.Image:
    """Gaussian blur; `sigma` is a fraction of the shorter side."""
    return to_rgb(image).filter(ImageFilter.GaussianBlur(sigma * min(image.size)))


def palette(image: Image.Image, *, cells: int = 8) -> Image.Image:
    """Mean colors on a grid with `cells` square cells along the shorter side."""
    rgb = to_rgb(image)
    return rgb.resize(_grid(rgb.size, cells / min(rgb.size)), _Sampling.BOX).resize(rgb.size, _Sampling.NEAREST)


def low_resolution(image: Image.Image, *, pixels: int = 24) -> Image.Image:
    """Downsampled to `pixels` along the shorter side and upsampled bicubically."""
    rgb = to_rgb(image)
    return rgb.resize(_grid(rgb.size, pixels / min(rgb.size)), _Sampling.BICUBIC).resize(rgb.size, _Sampling.BICUBIC)


def _grid(size: tuple[int, int], scale: float) -> tuple[int, int]:
    width, height = (max(1, min(length, round(length * scale))) for length in size)
    return width, height
