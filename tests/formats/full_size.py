"""Files that diffusers' classes write at the shapes of Stable Diffusion 1.5: loaded, compared, saved again.

`python -m tests.formats.full_size` makes each with random values, as the class itself saves it, loads it as an attachment of a
UNet of SD 1.5 (random values), compares the outputs with those of diffusers with the same weights, and the tensors of the file
saved again byte by byte. It needs about 10 GiB of memory and of disk, and some minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.formats.test_ip_adapter import nested
from veneer.formats import formats

SD15 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
WEIGHTS = "diffusion_pytorch_model.safetensors"
Made = tuple[dict[str, Any], Callable[[Any], dict[str, Any]]]
"""What our attachment is given, and what the UNet is called with by diffusers."""


def filled(module: nn.Module, seed: int) -> nn.Module:
    """Set random values in a module that was built without any: uniform, of standard deviation 1 / √(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.to_empty(device="cpu").named_parameters():
            bound = (3 / p[0].numel()) ** 0.5 if p.dim() > 1 else 0.1
            p.uniform_(-bound, bound, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return module.eval()


def unet() -> Any:
    with torch.device("meta"):
        made = UNet2DConditionModel(**SD15)
    return filled(made, 0)


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 77, 768, generator=generator)
    return {
        "sample": torch.randn(2, 4, 16, 16, generator=generator), "timestep": torch.tensor(500), "encoder_hidden_states": text,
    }  # fmt: skip


def picture() -> Tensor:
    return torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(2))


def controlnet(folder: Path) -> Made:
    with torch.device("meta"):
        net: Any = ControlNetModel(**SD15, conditioning_embedding_out_channels=(16, 32, 96, 256))
    filled(net, 3).save_pretrained(folder)

    def more(model: Any) -> dict[str, Any]:
        down, mid = net(**inputs(), controlnet_cond=picture(), return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    return {"image": picture()}, more


def t2i_adapter(kind: str, channels: list[int], blocks: int) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        made: Any = T2IAdapter(channels=channels, num_res_blocks=blocks, downscale_factor=8, adapter_type=kind)
        filled(made, 4).save_pretrained(folder)
        return {"image": picture()}, lambda model: {"down_intrablock_additional_residuals": list(made(picture()))}

    return make


def ip_adapter(kind: str) -> Callable[[Path], Made]:
    """The original names and sizes; diffusers' loader puts them into the UNet, which stays changed."""
    width, context, generator = {"base": 1024, "plus": 1280}[kind], 768, torch.Generator().manual_seed(5)

    def make(folder: Path) -> Made:
        with torch.device("meta"):
            model: Any = UNet2DConditionModel(**SD15)
        shapes: dict[str, tuple[int, ...]] = {}
        if kind == "base":
            shapes |= {"proj.weight": (4 * context, width), "proj.bias": (4 * context,), "norm.weight": (context,)}
            shapes |= {"norm.bias": (context,)}
        else:
            shapes |= {"latents": (1, 16, 768), "proj_in.weight": (768, width), "proj_in.bias": (768,)}
            shapes |= {"proj_out.weight": (context, 768), "proj_out.bias": (context,)}
            shapes |= {"norm_out.weight": (context,), "norm_out.bias": (context,)}
            for i in range(4):
                layer = {f"0.{n}.{end}": (768,) for n in ("norm1", "norm2") for end in ("weight", "bias")}
                layer |= {"0.to_q.weight": (768, 768), "0.to_kv.weight": (1536, 768), "0.to_out.weight": (768, 768)}
                layer |= {"1.0.weight": (768,), "1.0.bias": (768,), "1.1.weight": (3072, 768), "1.3.weight": (768, 3072)}
                shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes = {f"image_proj.{name}": shape for name, shape in shapes.items()}
        cross = [name.removesuffix(".processor") for name in model.attn_processors if name.endswith("attn2.processor")]
        for n, name in enumerate(cross):
            for part in ("to_k", "to_v"):
                size = model.get_submodule(name).to_k.out_features
                shapes[f"ip_adapter.{2 * n + 1}.{part}_ip.weight"] = (size, context)
        flat = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
        folder.mkdir()
        save_file(flat, folder / "ip-adapter.safetensors")
        given = torch.randn((2, 257, width) if kind == "plus" else (2, width), generator=generator)

        def more(model: Any) -> dict[str, Any]:
            model._load_ip_adapter_weights([nested(flat)], low_cpu_mem_usage=False)
            return {"added_cond_kwargs": {"image_embeds": [given[:, None]]}}

        return {"embeds": given}, more

    return make


CASES: dict[str, tuple[str, Callable[[Path], Made]]] = {
    "t2i_adapter full": ("t2i_adapter", t2i_adapter("full_adapter", [320, 640, 1280, 1280], 2)),
    "t2i_adapter light": ("t2i_adapter", t2i_adapter("light_adapter", [320, 640, 1280], 4)),
    "controlnet": ("controlnet", controlnet),
    "ip_adapter base": ("ip_adapter", ip_adapter("base")),
    "ip_adapter plus": ("ip_adapter", ip_adapter("plus")),
}


@torch.no_grad()
def check(name: str, model: Any, scratch: Path) -> bool:
    """Check one round trip."""
    began = time.monotonic()
    method, make = CASES[name]
    given, more = make(scratch / "a")
    bare = model(**inputs()).sample
    attachment = veneer.load(model, scratch / "a")
    clean = attachment.loaded.clean
    with attachment.condition(**given):
        ours = model(**inputs()).sample
    form: Any = formats.get(method)()
    form.save(attachment, scratch / "b" if form.folder else scratch / "b" / form.file)
    numbers = sum(p.numel() for p in attachment.parameters())
    attachment.detach()
    back = torch.equal(model(**inputs()).sample, bare)
    theirs = model(**inputs(), **more(model)).sample
    before, after = (load_file(scratch / folder / form.file) for folder in "ab")
    same = before.keys() == after.keys() and all(_bytes(before[k]) == _bytes(after[k]) for k in before)
    apart, moved = (float((ours - other).abs().max()) for other in (theirs, bare))
    print(
        f"{name}: {numbers:,} numbers, {len(before)} tensors; load report {'clean' if clean else 'NOT CLEAN'}; outputs differ by "
        f"{apart:.1e} (of a change of {moved:.2f}); detached {'bitwise' if back else 'NOT'} the base; written again "
        f"{'byte-equal' if same else 'DIFFERENT'}; {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return clean and back and same and apart < 1e-4 < moved


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes() if tensor.numel() else b""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; all without")
    names = parser.parse_args().names or list(CASES)
    failed, model = [], unet()
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            if not check(name, model, Path(scratch)):
                failed.append(name)
        if name.startswith("ip_adapter"):
            model = unet()  # diffusers' loader has changed it
    print(f"{len(names)} files, {len(failed)} wrong{': ' + ', '.join(failed) if failed else ''}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
