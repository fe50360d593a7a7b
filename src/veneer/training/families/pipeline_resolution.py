"""The native resolution of families whose pipeline states it in latents."""

from __future__ import annotations

from typing import Any


class PipelineResolution:
    """The part of a `Family` whose native resolution is the pipeline's default, not in the denoiser's config."""

    @property
    def resolution(self) -> int:
        """`default_sample_size` latents, in pixels per side."""
        family: Any = self
        return int(family.vae_factor) * int(family.pipe.default_sample_size)
