"""Colors and thresholds equal those of scikit-image to rounding, and with them the control maps."""

import numpy as np
import pytest

from veneer.control.maps.color_modes import lab
from veneer.control.maps.foreground import threshold_otsu

skimage = pytest.importorskip("skimage", reason="needs scikit-image")
RANDOM = np.random.default_rng(0)


def test_lab_is_equal_to_rounding():
    from skimage.color import rgb2lab

    values = np.concatenate([RANDOM.random((64, 64, 3)), RANDOM.random((64, 64, 3)) * 0.1]).astype(np.float32)
    found = lab(values)
    assert found.dtype == np.float32
    assert np.abs(found - rgb2lab(values)).max() < 2e-4  # of 100


def test_otsu_is_equal():
    from skimage.filters import threshold_otsu as other

    for _ in range(20):
        values = np.concatenate([RANDOM.normal(20, 5, 300), RANDOM.normal(60, 9, 500)]).astype(np.float32)
        assert threshold_otsu(values) == pytest.approx(float(other(values)), rel=1e-6)
