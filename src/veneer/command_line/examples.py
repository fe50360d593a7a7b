"""Examples in the help texts of the commands."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "personalize": (
        "veneer personalize",
        "veneer personalize photos/ --concept '<toy>' --class-word toy --method pivotal",
        "veneer personalize photos/ --concept '<toy>' --base stabilityai/stable-diffusion-xl-base-1.0 --rank 16 --quantize nf4",
        "veneer personalize photos/ --concept '<toy>' --base flux --check 12GB",
    ),
    "transfer": (
        "veneer transfer",
        "veneer transfer photos/ --model vit_small_patch16_224.augreg_in21k --method lora --epochs 10",
    ),
    "caption": (
        "veneer caption photos/ --model Salesforce/blip-image-captioning-base --prefix 'a photo of <toy>, '",
        "veneer caption photos/ --model SmilingWolf/wd-vit-tagger-v3 --threshold 0.5 --dry-run",
    ),
    "compare": ("veneer compare photos/ --methods 'lora, ssf, vpt' --seeds 3",),
    "predict": ("veneer predict runs/clothes new-photos/",),
    "export": (
        "veneer export runs/clothes --to timm --out clothes-timm",
        "veneer export runs/clothes --to onnx --out clothes.onnx",
    ),
    "control train": (
        "veneer control train --condition canny --method controlnet",
        "veneer control train pairs/ --condition pairs --method t2i_adapter",
    ),
    "control generate": ("veneer control generate 'a cat' --adapter runs/canny --image map.png",),
    "generate": (
        "veneer generate 'a photo of a <toy>' --adapter runs/toy-lora",
        "veneer generate 'a <toy> in snow' --adapter runs/toy-lora:0.8 runs/style-lora:0.5 --images-per-prompt 4 --side-by-side",
    ),
    "inspect": ("veneer inspect toy.safetensors",),
    "convert": ("veneer convert runs/toy-lora --to kohya",),
    "convert-config": ("veneer convert-config dataset.toml --out run.toml",),
    "merge": ("veneer merge toy.safetensors style.safetensors --weights 1 0.5 --method ties",),
    "extract": ("veneer extract tuned/ --base original/ --rank 32",),
    "resize": ("veneer resize toy.safetensors --rank 8",),
    "push": (
        "veneer push runs/toy-lora user/toy-lora --license cc-by-4.0 --dry-run",
        "veneer push runs/toy-lora user/toy-lora --license cc-by-4.0 --private",
    ),
    "sites": ("veneer sites bundled", "veneer sites vit_small_patch16_224"),
    "examples": ("veneer examples",),
    "app": ("veneer app", "veneer app --port 8000 --no-browser"),
    "bench": ("veneer bench --size tiny",),
}
"""Command to lines to type."""


def examples_text(command: str) -> str:
    """The examples of a command for the end of its help text; empty without any."""
    lines = EXAMPLES.get(command, ())
    return "\n".join([f"example{'s'[: len(lines) > 1]}:", *(f"  {line}" for line in lines)]) if lines else ""
