"""Examples in the help texts of the commands."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "personalize": (
        "veneer personalize",
        "veneer personalize photos/ --concept '<toy>' --class-word toy --rank 16 --steps 600",
        "veneer personalize photos/ --concept '<toy>' --class-word toy --method pivotal",
        "veneer personalize photos/ --method pez --tokens 8",
        "veneer personalize photos/ --concept '<toy>' --base model.safetensors --learning-rate 1e-4",
        "veneer personalize photos/ --concept '<toy>' --base owner/model --quantize nf4",
        "veneer personalize photos/ --concept '<toy>' --base flux --check 12GB",
        "veneer personalize photos/ --concept '<toy>' --steps 600 --print-config",
    ),
    "transfer": (
        "veneer transfer",
        "veneer transfer photos/ --model vit_small_patch16_224.augreg_in21k --epochs 10",
        "veneer transfer photos/ --method vpt+lora --rank 4 --search 6",
        "veneer transfer photos/ --method vpt+lora --method-where lora=attn@2:4 vpt=tokens.block@0",
        "veneer transfer photos/ --model bundled_clip --method coop --shots 16",
        "veneer transfer photos/ --model bundled_clip --method ppt --shots 4 --unlabeled new-photos/",
        "veneer transfer pets/ clothes/ --tasks --method hyperformer_plus_plus --out runs/pets+clothes",
        "veneer transfer photos/ --method pfeiffer --with runs/domain",
    ),
    "compare": (
        "veneer compare photos/ --methods 'lora, ssf, vpt' --seeds 3",
        "veneer compare photos/ --methods 'lora(rank=4), lora(rank=16), full' --epochs 10",
        "veneer compare photos/ --model bundled_clip --methods 'coop, dart' --shots 1 2 4 --steps 200",
        "veneer compare photos/ --model bundled_clip --methods 'coop, cocoop' --base-to-new",
    ),
    "search": (
        "veneer search photos/ --budget-parameters 100000 --trials 64",
        "veneer search photos/ --budget-parameters 100000 --space blocks --sizes 2 8 --trials 16",
        "veneer search photos/ --budget-parameters 200000 --space s4 --trials 16 --out runs/s4",
    ),
    "predict": (
        "veneer predict runs/clothes new-photos/",
        "veneer predict runs/clothes new-photos/ --top 1 --format csv",
        "veneer predict runs/pets+clothes new-photos/ --task pets",
        "veneer predict runs/clothes sketches/ --exchange mad_x=runs/sketches",
    ),
    "caption": (
        "veneer caption photos/ --model Salesforce/blip-image-captioning-base --prefix 'a photo of <toy>, '",
        "veneer caption photos/ --model SmilingWolf/wd-vit-tagger-v3 --threshold 0.5 --dry-run",
    ),
    "export": (
        "veneer export runs/clothes --to timm --out clothes-timm",
        "veneer export runs/clothes --to onnx --include-normalization --out clothes.onnx",
    ),
    "analyze heads": (
        "veneer analyze heads runs/clothes clothes/",
        "veneer analyze heads bundled --prompts 'a photo of a blue car, white background'",
    ),
    "prompts similarity": (
        "veneer prompts similarity runs/pets runs/flowers runs/clothes",
        "veneer prompts similarity runs/pets runs/flowers --images photos/",
    ),
    "prompts spot": (
        "veneer prompts spot runs/pets runs/flowers runs/clothes --data shoes/ --model bundled --out runs/shoes-prompt",
        "veneer prompts spot runs/* --top 3 --data shoes/ --model vit_base_patch16_224.augreg2_in21k_ft_in1k",
    ),
    "prompts transfer": (
        "veneer prompts transfer runs/pets --to bundled_clip --data flowers/",
        "veneer prompts transfer runs/pets --to open_clip:ViT-L-14/openai --data pets/ --out runs/pets-large",
        "veneer prompts transfer runs/birds --to open_clip:ViT-L-14/openai --data birds/ --projector runs/pets-large",
    ),
    "control train": (
        "veneer control train --condition canny --method t2i_adapter",
        "veneer control train photos/ --condition soft_edge --base owner/model",
        "veneer control train pairs/ --condition pairs --method controlnet",
        "veneer control train photos/ --method ip_adapter",
    ),
    "control generate": (
        "veneer control generate 'a cat' --adapter runs/canny-controlnet --image dog.jpg",
        "veneer control generate 'a cat' --adapter runs/canny-controlnet:0.8 --map edges.png",
    ),
    "generate": (
        "veneer generate 'a photo of a <toy>' --adapter runs/toy-lora",
        "veneer generate 'a <toy> in snow' --adapter runs/toy-lora:0.8 runs/style-lora:0.5",
        "veneer generate 'a <toy>' --adapter runs/toy-lora --images-per-prompt 4 --side-by-side",
    ),
    "inspect": ("veneer inspect toy.safetensors", "veneer inspect toy.safetensors --base sdxl"),
    "convert": (
        "veneer convert runs/toy-lora --to kohya",
        "veneer convert toy.safetensors --base sdxl --to peft_folder --out toy-peft",
    ),
    "convert-config": ("veneer convert-config dataset.toml --out run.toml",),
    "merge": (
        "veneer merge toy.safetensors ink.safetensors --weights 1 0.5 --out both.safetensors",
        "veneer merge runs/toy-lora user/style --method ties --rank 16 --out both.safetensors",
        "veneer merge runs/photos runs/sketches --method average --out both.safetensors",
        "veneer merge runs/a runs/b --method parameters --images new/ --domains a/ b/ --out c.safetensors",
    ),
    "extract": (
        "veneer extract tuned/ --base original/ --rank 32 --out tuned.safetensors",
        "veneer extract tuned/ --base original/ --energy 0.9 --rank 64 --out tuned.safetensors",
    ),
    "resize": (
        "veneer resize toy.safetensors --rank 8 --out toy-rank8.safetensors",
        "veneer resize toy.safetensors --energy 0.95 --dtype float16 --out toy-small.safetensors",
    ),
    "push": (
        "veneer push runs/toy-lora user/toy-lora --license cc-by-4.0 --dry-run",
        "veneer push runs/toy-lora user/toy-lora --license cc-by-4.0 --private",
    ),
    "sites": ("veneer sites bundled", "veneer sites vit_small_patch16_224", "veneer sites bundled --peft"),
    "examples": ("veneer examples",),
    "app": ("veneer app", "veneer app --port 8000 --no-browser"),
    "bench": ("veneer bench --size tiny", "veneer bench --rows attach load --out bench.json"),
}
"""Command to lines to type."""


def examples_text(command: str) -> str:
    """The examples of a command for the end of its help text; empty without any."""
    lines = EXAMPLES.get(command, ())
    return "\n".join([f"example{'s'[: len(lines) > 1]}:", *(f"  {line}" for line in lines)]) if lines else ""
