"""Each type of noise against a slow explicit reference with the same random numbers."""

import math

import pytest
import torch

from tests.raising import raises
from veneer.injection.errors import OptionError
from veneer.training.objective.noise import NoiseOptions, sample_noise

LATENTS = torch.randn(3, 9, 14, generator=torch.Generator().manual_seed(5)) + torch.tensor([0.0, 2.0, -3.0]).view(3, 1, 1)


def g(seed=1):
    return torch.Generator().manual_seed(seed)


def test_plain_noise_is_the_generators_normal_draw():
    noise, seen = sample_noise(LATENTS, NoiseOptions(), g())
    assert torch.equal(noise, torch.randn(3, 9, 14, generator=g()))
    assert torch.equal(seen, noise)


@pytest.mark.parametrize("adaptive", [0.0, 0.03, -0.5])
@pytest.mark.parametrize("random", [False, True])
def test_offset(adaptive, random):
    options = NoiseOptions(offset=0.1, offset_adaptive=adaptive, offset_random=random)
    noise, seen = sample_noise(LATENTS, options, g())
    source = g()
    plain = torch.randn(3, 9, 14, generator=source)
    strength = 0.1 * (torch.rand((), generator=source).item() if random else 1)
    shifts = torch.randn((3, 1, 1), generator=source).flatten().tolist()
    for c in range(3):
        mean = sum(LATENTS[c].flatten().tolist()) / (9 * 14)
        expected = max(0.0, strength + adaptive * abs(mean)) * shifts[c]
        assert (noise[c] - plain[c]).flatten().tolist() == pytest.approx([expected] * (9 * 14), abs=1e-6)
    assert torch.equal(seen, noise)  # the target is the offset noise


def bilinear(coarse, height, width):
    """Half-pixel centers, edges repeated."""
    h, w = len(coarse), len(coarse[0])
    out = [[0.0] * width for _ in range(height)]
    for y in range(height):
        for x in range(width):
            sy, sx = max((y + 0.5) * h / height - 0.5, 0), max((x + 0.5) * w / width - 0.5, 0)
            y0, x0 = int(sy), int(sx)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            fy, fx = sy - y0, sx - x0
            top = coarse[y0][x0] * (1 - fx) + coarse[y0][x1] * fx
            bottom = coarse[y1][x0] * (1 - fx) + coarse[y1][x1] * fx
            out[y][x] = top * (1 - fy) + bottom * fy
    return out


@pytest.mark.parametrize("levels", [1, 2, 6])
def test_pyramid(levels):
    noise, _ = sample_noise(LATENTS, NoiseOptions(pyramid=0.3, pyramid_levels=levels), g())
    source = g()
    total = torch.randn(3, 9, 14, generator=source)
    sizes = []
    for i in range(levels):
        r = 2 + 2 * torch.rand((), generator=source).item()
        size = max(1, int(9 / r**i)), max(1, int(14 / r**i))
        sizes.append(size)
        coarse = torch.randn((1, 3, *size), generator=source)[0].tolist()
        total = total + 0.3**i * torch.tensor([bilinear(channel, 9, 14) for channel in coarse])
        if min(size) == 1:
            break
    values = total.flatten().tolist()
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    torch.testing.assert_close(noise, total / std, rtol=1e-4, atol=1e-5)
    assert sizes[0] == (9, 14)
    assert float(noise.std()) == pytest.approx(1.0, abs=1e-5)


def test_perturbation_changes_the_input_and_not_the_target():
    noise, seen = sample_noise(LATENTS, NoiseOptions(perturbation=0.1), g())
    source = g()
    plain, extra = (torch.randn(3, 9, 14, generator=source) for _ in range(2))
    assert torch.equal(noise, plain)
    torch.testing.assert_close(seen, plain + 0.1 * extra)


def test_order_is_offset_then_pyramid_then_perturbation():
    both = NoiseOptions(offset=0.5, pyramid=0.3, pyramid_levels=1)
    noise, _ = sample_noise(LATENTS, both, g())
    source = g()
    plain = torch.randn(3, 9, 14, generator=source) + 0.5 * torch.randn((3, 1, 1), generator=source)
    torch.rand((), generator=source)
    total = plain + torch.randn((1, 3, 9, 14), generator=source)[0]
    torch.testing.assert_close(noise, total / total.std())


def test_offset_makes_brightness_vary():
    def spread(options):
        return torch.stack([sample_noise(LATENTS, options, g(s))[0].mean((1, 2)) for s in range(400)]).var().item()

    cells = 9 * 14
    assert spread(NoiseOptions()) == pytest.approx(1 / cells, rel=0.2)
    assert spread(NoiseOptions(offset=0.3)) == pytest.approx(1 / cells + 0.09, rel=0.2)


@pytest.mark.parametrize("bad", [{"offset": -0.1}, {"pyramid": 1.0}, {"pyramid_levels": 0}, {"perturbation": -1.0}])
def test_options_are_checked(bad):
    ((name, value),) = bad.items()
    with raises(OptionError, option=name, given=value):
        NoiseOptions(**bad)


def test_half_precision_latents_get_float32_noise():
    noise, seen = sample_noise(LATENTS.half(), NoiseOptions(offset=0.1, offset_adaptive=0.1), g())
    assert noise.dtype == seen.dtype == torch.float32
