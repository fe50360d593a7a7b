"""The native resolution of families whose pipeline states it, in latents or in pixels."""

from __future__ import annotations

import inspect
from typing import Any


def call_default(pipeline: type, name: str) -> Any:
    """Default of an argument of a call of a pipeline class."""
    return inspect.signature(pipeline.__call__).parameters[name].default


class PipelineResolution:
    """The part of a `Family` whose native resolution is the pipeline's default, not in the denoiser's config."""

    @property
    def resolution(self) -> int:
        """`default_sample_size` latents, in pixels per side."""
        family: Any = self
        return int(family.vae_factor) * int(family.pipe.default_sample_size)


class CallResolution:
    """The part of a `Family` whose native resolution is the default height of a call of the pipeline."""

    @property
    def resolution(self) -> int:
        """The default height, in pixels; of videos it is the shorter side."""
        family: Any = self
        return int(call_default(type(family.pipe), "height"))
