"""Class images for prior preservation: samples of the base model for the class prompt, saved to disk.

The loss is `losses.prior_preservation`. Source: Ruiz et al., CVPR 2023 (DreamBooth), section 3.2.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from torch import Tensor

from veneer.atomic_files import write_atomically
from veneer.injection.errors import OptionError
from veneer.injection.quantized_weight import plain_tensors, quantization_of

from ..families import Family
from ..loop.seeds import generator

KEY = "veneer.prior"
"""Name of the PNG text chunk with the settings of an image."""


def generate_class_images(
    family: Family,
    folder: Path,
    prompt: str | Sequence[str],
    count: int,
    seed: int = 0,
    *,
    batch: int = 4,
    base: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[Path]:
    """Generates the missing ones of `count` images of `prompt` as `prior-00000.png` … in `folder`.

    The noise of image i comes from `generator(seed, "prior", i)`, whatever the batch. An existing image is reused if it is
    readable and its base model, scheduler, prompt, seed and settings are the same. Images are renamed into place, so that a
    stopped run resumes. It uses the pipeline as it is: call it before attaching adapters, or with disabled ones.

    Args:
        prompt: class prompt, such as `a photo of a dog`; for DiT the class label. Or one prompt per image.
        count: at least 1; the paper uses 1,000, diffusers 100. Further files are neither deleted nor returned.
        batch: batch size of the generation. `base`: digest of the base model (default: `base_digest(family)`).
        progress: called with (existing images, count) after each batch.
        settings: pipeline arguments such as `num_inference_steps`, `guidance_scale`, `height`, `width`; JSON values.
    Raises:
        OptionError: for a count or batch below 1.
        OSError: if an image cannot be written; those before it are kept.
    """
    if count < 1 or batch < 1:
        option, given = ("count", count) if count < 1 else ("batch", batch)
        raise OptionError(f"{option} must be at least 1, got {given}", option=option, given=given, expected=1)
    base = base or base_digest(family)
    paths = [folder / f"prior-{i:05d}.png" for i in range(count)]
    prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
    recipes = [_recipe(family, base, prompts[i], seed, i, settings) for i in range(count)]
    missing = [i for i in range(count) if not _made_by(paths[i], recipes[i])]
    for start in range(0, len(missing), batch):
        chunk = missing[start : start + batch]
        images = family.generate([prompts[i] for i in chunk], [generator(seed, "prior", i) for i in chunk], **settings)
        for i, image in zip(chunk, images, strict=True):
            write_atomically(paths[i], _png(image, recipes[i]))
        if progress is not None:
            progress(count - len(missing) + start + len(chunk), count)
    return paths


def base_digest(family: Family) -> str:
    """Digest of a pipeline (16 hex digits): names, shapes and 64 evenly spaced values of every tensor, as it is stored."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (family.tower, family.pipe.vae, *family.text_towers.values()):
        for name, tensor in sorted(_stored_tensors(part), key=lambda pair: pair[0]):
            flat = tensor.detach().flatten()
            values = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.tobytes())
    return digest.hexdigest()


def _stored_tensors(part: Any) -> list[tuple[str, Tensor]]:
    """The state dict, with the parts of quantized weights."""
    return list(part.state_dict().items()) if quantization_of(part) is None else list(plain_tensors(part))


def _recipe(family: Family, base: str, prompt: str, seed: int, index: int, settings: dict[str, Any]) -> str:
    scheduler = family.pipe.scheduler
    config = {key: value for key, value in sorted(scheduler.config.items()) if not key.startswith("_")}
    facts = {"base": base, "prompt": prompt, "seed": seed, "index": index, "settings": settings}
    return json.dumps({**facts, "scheduler": [type(scheduler).__name__, config]}, sort_keys=True, default=str)


def _made_by(path: Path, recipe: str) -> bool:
    """True for an intact PNG whose text chunk equals `recipe`."""
    try:
        with Image.open(path) as image:
            image.load()
            return bool(image.info.get(KEY) == recipe)
    except (OSError, SyntaxError, ValueError):
        return False


def _png(image: Image.Image, recipe: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, recipe)
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    return data.getvalue()
