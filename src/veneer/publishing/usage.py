"""Usage sections of a model card: veneer, diffusers where its pipelines load the files, and ComfyUI and A1111."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from .card_data import LORA_FILE, TOKEN_FILE, CardFacts

VIDEO = 'num_frames=1, output_type="pil"', "frames[0][0]"
CALLS = {
    "WanTransformer3DModel": VIDEO,
    "HunyuanVideoTransformer3DModel": VIDEO,
    "LongCatImageTransformer2DModel": ("enable_prompt_rewrite=False", "images[0]"),
    "ErnieImageTransformer2DModel": ("use_pe=False", "images[0]"),
    "Kandinsky5Transformer3DModel": ("", "image[0]"),
}
"""Class of the denoiser -> (arguments, image) of a call of its pipeline for one image of the prompt itself."""
CONTROL_CLASSES = {"controlnet": "ControlNetModel", "t2i_adapter": "T2IAdapter"}


def usage_sections(facts: CardFacts) -> Iterator[str]:
    """Sections with code, most general first."""
    yield _veneer(facts)
    if facts.loads_in_diffusers:
        yield _section("diffusers", "python", "\n".join([*_diffusers_requires(facts), *_diffusers(facts)]))
    if facts.comfyui_file or (TOKEN_FILE in facts.files and facts.run.kind == "personalize"):
        yield "\n".join(_comfyui(facts))


def _section(title: str, language: str, code: str) -> str:
    return f"### {title}\n\n```{language}\n{code}\n```"


def _veneer(facts: CardFacts) -> str:
    run, repo = facts.run, facts.repo
    if run.kind == "transfer":
        return _section("veneer", "sh", f"veneer predict {repo} IMAGE …")
    base = "" if run.hub_base or run.is_bundled else " --base BASE"
    adapters = " ".join([*(shlex.quote(each.argument()) for each in run.fixed_adapters), repo])
    if run.kind == "control":
        return _section("veneer", "sh", f'veneer control generate "a prompt" --adapter {adapters} --image PHOTO{base}')
    command = f"veneer generate {shlex.quote(_prompt(facts))} --adapter {adapters}{base}"
    load = "load" if len(run.record.get("methods", ())) == 1 else "load_all"
    code = "\n".join(
        [
            f"import veneer\n\npipe = veneer.base_models.load({_base(facts)})",
            *(f'veneer.load_all(pipe, "{each.file.as_posix()}", scale={each.scale:g})' for each in run.fixed_adapters),
            f'veneer.{load}(pipe, "{repo}")',
            _call(facts),
        ]
    )
    return _section("veneer", "sh", command) + f"\n\n```python\n{code}\n```"


def _diffusers_requires(facts: CardFacts) -> Iterator[str]:
    for each in facts.run.fixed_adapters:
        yield f"# required: {each.file.as_posix()} at strength {each.scale:g}, converted by `veneer convert FILE --to diffusers`"


def _diffusers(facts: CardFacts) -> Iterator[str]:
    run, repo = facts.run, facts.repo
    base = 'veneer.base_models.path("bundled")' if run.base == "bundled" else _base(facts)
    first = "import veneer\n" if run.base == "bundled" else ""
    if run.kind == "control":
        yield from _diffusers_control(facts, base, first)
        return
    yield f"{first}from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({base})"
    if LORA_FILE in facts.files:
        yield f'pipe.load_lora_weights("{repo}", weight_name="{LORA_FILE}")'
    if TOKEN_FILE in facts.files:
        yield from _token_embeddings(facts)
    yield _call(facts)


def _token_embeddings(facts: CardFacts) -> Iterator[str]:
    repo, tokens = facts.repo, facts.run.tokens
    has_two_encoders = "text_encoder_2" in facts.components
    if len(tokens) == 1 and not has_two_encoders:
        yield f'pipe.load_textual_inversion("{repo}", weight_name="{TOKEN_FILE}")'
        return
    if has_two_encoders:
        yield "# the token has vectors for both text encoders"
    yield "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n"
    yield f'vectors = load_file(hf_hub_download("{repo}", "{TOKEN_FILE}"))'
    if not has_two_encoders:
        yield "for token, vector in vectors.items():\n    pipe.load_textual_inversion(vector, token=token)"
        return
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        own, names = f'vectors["{key}"]', f'"{tokens[0]}"'
        if len(tokens) > 1:
            own, names = f"list({own}.chunk({len(tokens)}))", f"{tokens}"
        place = f"text_encoder=pipe.text_encoder{end}, tokenizer=pipe.tokenizer{end}"
        yield f"pipe.load_textual_inversion({own}, token={names}, {place})"


def _diffusers_control(facts: CardFacts, base: str, first: str) -> Iterator[str]:
    run, repo = facts.run, facts.repo
    if run.method == "ip_adapter":
        file = next(name for name in facts.files if name.startswith("diffusers/") and name.endswith(".safetensors"))
        yield f"{first}from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({base})"
        name = file.rpartition("/")[2]
        yield f'pipe.load_ip_adapter("{repo}", subfolder="diffusers", weight_name="{name}", image_encoder_folder=None)'
        yield "# pass the image as ip_adapter_image_embeds, of the image encoder in the settings below"
        return
    name = CONTROL_CLASSES[run.method]
    argument = "controlnet" if run.method == "controlnet" else "adapter"
    pipeline = f"StableDiffusion{'XL' if 'text_encoder_2' in facts.components or facts.architecture == 'sdxl' else ''}"
    pipeline += "ControlNetPipeline" if run.method == "controlnet" else "AdapterPipeline"
    yield f"{first}from diffusers import {name}, {pipeline}\n"
    yield f'{argument} = {name}.from_pretrained("{repo}", subfolder="diffusers")'
    yield f"pipe = {pipeline}.from_pretrained({base}, {argument}={argument})"
    yield 'image = pipe("a prompt", image=map).images[0]  # map: an image of the condition'


def _comfyui(facts: CardFacts) -> Iterator[str]:
    yield "### ComfyUI, A1111 and Forge\n"
    if facts.comfyui_file:
        yield f"Copy `{facts.comfyui_file}` to `models/loras` (ComfyUI) or `models/Lora` (A1111, Forge)."
    for each in facts.run.fixed_adapters:
        name = f"`{each.file.as_posix()}` at strength {each.scale:g}"
        yield f"It requires {name}: convert it by `veneer convert FILE --to comfyui`."
    others = [name for name in facts.files if name.startswith("comfyui/") and name != facts.comfyui_file]
    names = others or ([TOKEN_FILE] if TOKEN_FILE in facts.files else [])
    for name in names:
        stem = name.rpartition("/")[2].removesuffix(".safetensors")
        place = "`models/embeddings` (ComfyUI) or `embeddings` (A1111, Forge)"
        yield f"Copy `{name}` to {place}; its trigger is its file name, `{stem}`."


def _call(facts: CardFacts) -> str:
    """Code that generates an image with the pipeline `pipe`."""
    calls = (CALLS[kind] for kind in facts.components.values() if kind in CALLS)
    arguments, image = next(calls, ("", "images[0]"))
    return f"image = pipe({', '.join(filter(None, (repr(_prompt(facts)), arguments)))}).{image}"


def _prompt(facts: CardFacts) -> str:
    return facts.image_prompts[0][0] if facts.image_prompts else f"a photo of {facts.run.concept}"


def _base(facts: CardFacts) -> str:
    """The base model as a literal; `BASE` for one that only its author has."""
    return repr(facts.run.hub_base or (facts.run.base if facts.run.is_bundled else "BASE")).replace("'", '"')
