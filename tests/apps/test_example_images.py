"""Bundled example images."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image
from veneer.apps.pages.shared import example_images


@pytest.mark.parametrize(("name", "rows"), [("digits", 2)])
def test_image_strip_has_an_alt_text(name: str, rows: int) -> None:
    html = getattr(example_images, name)()
    found = re.search(r'src="data:image/webp;base64,([^"]+)" alt="([^"]+)" width="(\d+)" height="(\d+)"', html)
    assert found is not None
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as image:
        assert image.size == (int(found[3]), int(found[4]))
        assert image.height == rows * (example_images.SIDE + example_images.GAP) - example_images.GAP
        assert sum(count > 0 for count in image.convert("L").histogram()) > 100
    assert found[2]
    assert len(html) < 60_000
