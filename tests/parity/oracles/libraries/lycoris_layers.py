"""Weight updates of LyCORIS' own modules beside ours, through its file format."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.formats.lycoris_cases import by_site, change, changes, chosen, made, write
from tests.parity.measure import Row, largest_difference
from tests.parity.oracle import Package
from veneer.formats import load_all
from veneer.testing.pipelines import tiny_pipeline

ORACLE = Package("lycoris-lora", "lycoris")
METHODS = ("boft", "dora", "glora", "ia3", "loha", "lokr", "lora", "oft")
SITES = ["unet.down_blocks.0.resnets.0.conv1", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("locon", {"lora_dim": 3, "alpha": 2.0, "use_tucker": True}),
    "dora": ("locon", {"lora_dim": 3, "alpha": 2.0, "weight_decompose": True}),
    "loha": ("loha", {"lora_dim": 2, "alpha": 3.0, "use_tucker": True}),
    "lokr": ("lokr", {"lora_dim": 1, "alpha": 0.5}),
    "oft": ("diag-oft", {"lora_dim": 4, "constraint": 0.01, "rescaled": True}),
    "boft": ("boft", {"lora_dim": 14, "rescaled": True}),
    "glora": ("glora", {"lora_dim": 3, "alpha": 2.0}),
    "ia3": ("ia3", {}),
}


def rows() -> list[Row]:
    """Files that LyCORIS writes, on a tiny UNet of Stable Diffusion."""
    return [_row(method) for method in METHODS]


def _row(method: str) -> Row:
    algorithm, options = ALGORITHMS[method]
    pipe = tiny_pipeline("sd")
    places = chosen(pipe, SITES)
    modules = [made(pipe, place, algorithm, **options) for place in places]
    theirs: dict[str, Any] = {}
    for place, module in zip(places, modules, strict=True):
        theirs.update(by_site(place, change(module)))
    with tempfile.TemporaryDirectory() as folder:
        ours = changes(load_all(pipe, write(Path(folder) / "file.safetensors", modules)))
    difference = largest_difference((ours[name], theirs[name]) for name in theirs)
    return Row(method, "weight updates of files, a convolution and a projection of a UNet", difference, "float32")
