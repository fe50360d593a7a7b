"""P+: each cross-attention layer against a UNet whose processors are given their own text states, and one embedding for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer
from tests.raising import raises
from veneer.full_size_models import full_size
from veneer.hosts.diffusers_unet import text_readers
from veneer.injection import UnsupportedSite, attach, hosts, methods
from veneer.injection.errors import OptionError
from veneer.testing.pipelines import tiny_pipeline
from veneer.testing.snapshot import assert_same, snapshot

PROMPTS = ["a photo of <toy> on the beach", "a photo of a duck"]
POOLED: dict[str, Any] = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
SITE = "text_encoder.embeddings.token_embedding.vocabulary"


def p_plus(pipe: Any, tokens: Any = "<toy>", seed: int = 1, **config: Any) -> Any:
    """An attachment whose vectors are not those of the initialization."""
    tuned = attach(pipe, "p_plus", tokens=tokens, **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return tuned


def vectors(tuned: Any) -> dict[str, nn.Parameter]:
    """Component to its vectors (tokens, L, width)."""
    return {name.partition(".")[0]: p for name, p in tuned.named_parameters()}


def to_double(pipe: Any) -> Any:
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.double()
    return pipe


def encode(pipe: Any, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
    """Text states and, of SDXL, the pooled embedding."""
    if hasattr(pipe, "text_encoder_2"):
        states, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        return states, pooled
    return pipe.encode_prompt(prompts, "cpu", 1, False)[0], None


def denoise(pipe: Any, states: Tensor, pooled: Tensor | None) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(len(states), 4, 8, 8, generator=generator).to(states.dtype)
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * len(states)).to(states.dtype)
    more = {} if pooled is None else {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    output: Tensor = pipe.unet(noisy, torch.tensor([37] * len(states)), encoder_hidden_states=states, **more).sample
    return output


class OwnStates:
    """A processor that ignores the text states of the call and attends to others."""

    def __init__(self, inner: Any, states: Tensor) -> None:
        self.inner, self.states = inner, states

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        return self.inner(attn, hidden_states, encoder_hidden_states=self.states, **kwargs)


def reference(family: str, learned: dict[str, Tensor], **denoiser: Any) -> tuple[Tensor, list[Tensor]]:
    """The UNet's output for `PROMPTS` without veneer: a table row for each layer, and the prompt with it encoded again.

    Args:
        learned: component to vectors (1, L, width).
    """
    pipe = to_double(tiny_pipeline(family, **denoiser))
    tables, layers = [], next(iter(learned.values())).shape[1]
    tokens = [f"<layer{i}>" for i in range(layers)]
    for component, new in learned.items():
        encoder, tokenizer = getattr(pipe, component), getattr(pipe, component.replace("text_encoder", "tokenizer"))
        tokenizer.add_tokens(tokens)
        table = torch.cat([encoder.get_input_embeddings().weight.detach(), new[0].detach()]).requires_grad_()
        embedding = nn.Embedding(*table.shape)
        del embedding.weight
        embedding.weight = table  # type: ignore[assignment]
        encoder.set_input_embeddings(embedding)
        tables.append(table)
    states, pooled = zip(*(encode(pipe, [prompt.replace("<toy>", token) for prompt in PROMPTS]) for token in tokens), strict=True)
    blocks = [*pipe.unet.down_blocks, pipe.unet.mid_block, *pipe.unet.up_blocks]
    cross = [m for block in blocks for name, m in block.named_modules() if name.endswith("attn2")]
    for module, own in zip(cross, states, strict=True):
        module.processor = OwnStates(module.processor, own)
    mean = torch.stack(states).mean(0)
    return denoise(pipe, mean, None if pooled[0] is None else torch.stack(pooled).mean(0)), tables


@pytest.mark.parametrize(("family", "denoiser"), [("sd", {}), ("sd2", {}), ("sdxl", {}), ("sd", POOLED)])
def test_every_layer_reads_its_own_embedding(family: str, denoiser: dict[str, Any]) -> None:
    """Values and gradients, in a batch with a prompt without the token; pooled embeddings are the mean over layers."""
    pipe = tiny_pipeline(family, **denoiser)
    learned = vectors(p_plus(pipe))
    to_double(pipe)  # the adapters are part of it
    got = denoise(pipe, *encode(pipe, PROMPTS))
    want, tables = reference(family, learned, **denoiser)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(4)).double()
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for new, table in zip(learned.values(), tables, strict=True):
        assert new.grad is not None
        assert table.grad is not None
        assert new.grad.abs().amin(dim=-1).min() > 0
        torch.testing.assert_close(new.grad[0], table.grad[-new.shape[1] :], rtol=0, atol=1e-10)


@pytest.mark.parametrize("tower", ["text", "text_2"])
def test_tokens_of_one_of_two_encoders(tower: str) -> None:
    """Every layer reads its own states of that encoder, and the same states of the other."""
    pipe, plain = tiny_pipeline("sdxl"), tiny_pipeline("sdxl")
    p_plus(pipe, where=f"{tower}/vocabulary")
    states, pooled = encode(pipe, PROMPTS)
    widths = [encoder.config.hidden_size for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    readers = text_readers(plain.components)
    assert readers is not None
    counts = [8 if tower == name else 1 for name in ("text", "text_2")]
    parts = states.split([count * width for count, width in zip(counts, widths, strict=True)], -1)
    for layer, module in enumerate(readers.cross):
        own = [part.chunk(n, -1)[layer if n > 1 else 0] for part, n in zip(parts, counts, strict=True)]
        module.processor = OwnStates(module.processor, torch.cat(own, -1))  # type: ignore[assignment]
    got, want = denoise(pipe, states, pooled), denoise(plain, states[..., : sum(widths)], pooled)
    torch.testing.assert_close(got, want)
    first = [part.chunk(n, -1)[0] for part, n in zip(parts, counts, strict=True)]
    assert not torch.allclose(got, denoise(tiny_pipeline("sdxl"), torch.cat(first, -1), pooled), rtol=0, atol=1e-3)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    pipe = tiny_pipeline("sd")
    (learned,) = vectors(p_plus(pipe)).values()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
            pipe.unet.train()
        states, _ = encode(pipe, PROMPTS)
        denoise(pipe, states, None).square().sum().backward()
        gradients.append(learned.grad)
        learned.grad = None
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


# the pipeline


def generate(pipe: Any, prompt: Any, **settings: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = pipe(prompt, num_inference_steps=2, output_type="np", generator=generator, **settings).images
    return torch.from_numpy(images)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_with_equal_layers_it_is_textual_inversion(family: str) -> None:
    """In the whole pipeline: guidance with a negative prompt, several prompts, several images of each."""
    settings: dict[str, Any] = {"negative_prompt": ["a car", ""], "num_images_per_prompt": 2, "guidance_scale": 5.0}
    pipe = tiny_pipeline(family)
    learned = vectors(p_plus(pipe))
    with torch.no_grad():
        for p in learned.values():
            p[:] = p[:, :1]
    images = generate(pipe, PROMPTS, **settings)
    other = tiny_pipeline(family)
    rows = vectors(attach(other, "textual_inversion", tokens="<toy>"))
    with torch.no_grad():
        for component, p in rows.items():
            p.copy_(learned[component][:, 0])
    torch.testing.assert_close(images, generate(other, PROMPTS, **settings), rtol=0, atol=1e-4)
    with torch.no_grad():
        for p in learned.values():
            p[:, -1].neg_()
    assert not torch.allclose(images, generate(pipe, PROMPTS, **settings), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_other_prompts_and_the_disabled_token_give_the_images_of_the_base(family: str) -> None:
    pipe = tiny_pipeline(family)
    plain = generate(pipe, PROMPTS[1])
    tuned = p_plus(pipe, initialize="duck")
    assert torch.equal(generate(pipe, PROMPTS[1]), plain)
    with tuned.enabled(False):
        assert torch.equal(generate(pipe, "a photo of a <toy>"), plain)
    assert not torch.equal(generate(pipe, "a photo of a <toy>"), plain)
    tuned.scale = 0.5
    half = generate(pipe, "a photo of a <toy>")
    assert not torch.equal(half, plain)
    for component, learned in vectors(tuned).items():
        (index,) = pipe.tokenizer.encode("duck", add_special_tokens=False)
        with torch.no_grad():
            learned.lerp_(getattr(pipe, component).get_input_embeddings().weight[index].expand_as(learned), 0.5)
    tuned.scale = 1.0
    torch.testing.assert_close(generate(pipe, "a photo of a <toy>"), half, rtol=0, atol=1e-5)


def test_detach_restores_the_encoders_and_the_unet() -> None:
    pipe = tiny_pipeline("sdxl")
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    before = {name: snapshot(part) for name, part in parts.items()}
    first, second = p_plus(pipe, "<a>", name="a"), p_plus(pipe, "<b>", name="b")
    first.detach()
    second.detach()
    for name, part in parts.items():
        assert_same(before[name], snapshot(part), name)
    assert len(pipe.tokenizer) == len(tiny_pipeline("sdxl").tokenizer)


def test_only_prompts_with_the_token_are_encoded_for_each_layer() -> None:
    pipe = tiny_pipeline("sd")
    p_plus(pipe)
    rows: list[int] = []
    pipe.text_encoder.get_input_embeddings().register_forward_hook(lambda _module, _args, output: rows.append(len(output)))
    states, _ = encode(pipe, [*PROMPTS, PROMPTS[1]])
    assert rows == [4 + 1 + 1]
    assert states.shape[-1] == 4 * 24


def test_a_forward_pass_after_one_that_raised_an_error() -> None:
    pipe = tiny_pipeline("sd")
    plain, _ = encode(pipe, ["a photo of a duck"])
    tuned = p_plus(pipe, initialize="duck")

    def interrupt(*_: Any) -> None:
        raise InterruptedError

    hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(interrupt)
    with pytest.raises(InterruptedError):
        encode(pipe, ["a photo of a <toy>"])
    hook.remove()
    with tuned.enabled(False):
        states, _ = encode(pipe, ["a photo of a <toy>"])
    assert torch.equal(states, plain)


# several attachments


@pytest.mark.parametrize("leaving", [0, 1])
def test_two_attachments_equal_one_with_both_tokens(leaving: int) -> None:
    """In one prompt and in two of a batch; the other token stays when one is detached."""
    prompts = ["a photo of <a> and <b>", "a photo of <b>", "a photo of <a>"]
    pipe, both = tiny_pipeline("sd"), tiny_pipeline("sd")
    pair = [p_plus(pipe, token, seed=i, name=token[1]) for i, token in enumerate(("<a>", "<b>"))]
    (joint,) = vectors(p_plus(both, ("<a>", "<b>"))).values()
    with torch.no_grad():
        joint.copy_(torch.cat([p for tuned in pair for p in vectors(tuned).values()]))
    expected = denoise(both, *encode(both, prompts))
    torch.testing.assert_close(denoise(pipe, *encode(pipe, prompts)), expected, rtol=0, atol=1e-6)
    alone = denoise(both, *encode(both, [prompts[1 + leaving]]))
    with pair[leaving].enabled(False):
        torch.testing.assert_close(denoise(pipe, *encode(pipe, [prompts[1 + leaving]])), alone, rtol=0, atol=1e-6)
    pair[leaving].detach()
    torch.testing.assert_close(denoise(pipe, *encode(pipe, [prompts[1 + leaving]])), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", ["p_plus", "textual_inversion"])
def test_beside_textual_inversion(first: str) -> None:
    """Its token is the same for all layers."""
    prompt = ["a photo of <a> and <b>"]
    pipe, both = tiny_pipeline("sd"), tiny_pipeline("sd")
    tuned = {}
    for method in sorted(("p_plus", "textual_inversion"), key=lambda name: name != first):
        tuned[method] = attach(pipe, method, tokens="<a>" if method == "p_plus" else "<b>", initialize="")
    (joint,) = vectors(p_plus(both, ("<a>", "<b>"))).values()
    (own,), (same,) = vectors(tuned["p_plus"]).values(), vectors(tuned["textual_inversion"]).values()
    with torch.no_grad():
        joint.copy_(torch.cat([own, same[:, None].expand_as(own)]))
    expected = denoise(both, *encode(both, prompt))
    torch.testing.assert_close(denoise(pipe, *encode(pipe, prompt)), expected, rtol=0, atol=1e-6)


# files, initialization, counts


def test_a_file_has_one_vector_for_each_token_and_layer(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    tuned = p_plus(pipe, ("<a>", "<b>"))
    images = generate(pipe, "a <a> and a <b>")
    file = tuned.save(tmp_path / "tokens.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in load_file(file).items()} == {f"{SITE}:vectors": (2, 4, 24)}
    again = tiny_pipeline("sd")
    veneer.load(again, file)
    assert torch.equal(generate(again, "a <a> and a <b>"), images)
    with raises(veneer.LoadError, misshapen={f"{SITE}:vectors": ((2, 4, 24), (2, 6, 24))}):
        veneer.load(tiny_pipeline("sd", layers_per_block=2), file, base="any")


def test_all_layers_start_as_the_initializer_word_or_differ_without_one() -> None:
    pipe = tiny_pipeline("sd")
    (learned,) = vectors(attach(pipe, "p_plus", tokens="<a>", initialize="duck")).values()
    (index,) = pipe.tokenizer.encode("duck", add_special_tokens=False)
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(learned[0], table[index].expand(4, -1))
    (learned,) = vectors(attach(pipe, "p_plus", tokens=[f"<t{i}>" for i in range(50)])).values()
    assert learned.std().item() == pytest.approx(table.std().item(), rel=0.05)
    assert not torch.equal(learned[:, 0], learned[:, 1])


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        ("Stable Diffusion 1.5", [16 * 768]),
        pytest.param("Stable Diffusion XL", [70 * 768, 70 * 1280], marks=pytest.mark.slow),
    ],
)
def test_counts_of_full_size_models(model: str, counts: list[int]) -> None:
    tuned = attach(full_size(model), "p_plus")
    try:
        assert [tuned.method.count(site) for site, _ in tuned.parts.values()] == counts
        assert [p.numel() for p in tuned.parameters()] == counts
    finally:
        tuned.detach()


def test_the_layers_are_those_of_the_forward_pass() -> None:
    """Downward, middle, upward: not the order in which the UNet registers its blocks."""
    pipe = tiny_pipeline("sdxl")
    readers = text_readers(pipe.components)
    assert readers is not None
    seen: list[nn.Module] = []
    for module in readers.cross:
        module.register_forward_hook(lambda module, _args, _output: seen.append(module))
    with torch.no_grad():
        denoise(pipe, *encode(pipe, PROMPTS))
    assert seen == [*readers.cross]
    assert len(seen) == 8


# without a UNet, and errors


def test_a_bare_encoder_takes_the_number_of_layers() -> None:
    model = hosts.get("clip_text")().tiny()["clip"]()
    with raises(UnsupportedSite, option="layers", given=0, expected="at least 1"):
        attach(model, "p_plus", ids=(900,))
    tuned = p_plus(model, ids=(900,), layers=3, name="one")
    with raises(UnsupportedSite, option="layers", given=2, expected=3):
        attach(model, "p_plus", tokens="<b>", ids=(901,), layers=2)
    with torch.no_grad():
        states = model(input_ids=torch.tensor([[62, 900, 5, 63], [62, 7, 5, 63]]))[0]
    assert states.shape == (2, 4, 3 * 16)
    assert torch.equal(states[1, :, :16], states[1, :, 16:32])
    assert not torch.equal(states[0, :, :16], states[0, :, 16:32])
    assert [p.shape for p in tuned.parameters()] == [(1, 3, 16)]


@pytest.mark.parametrize("family", ["sd3", "flux", "pixart"])
def test_pipelines_without_a_unet_are_rejected(family: str) -> None:
    with raises(UnsupportedSite, method="p_plus"):
        attach(tiny_pipeline(family), "p_plus", tokens="<toy>")


def test_the_unet_has_its_number_of_layers() -> None:
    with raises(UnsupportedSite, option="layers", given=5, expected=4):
        attach(tiny_pipeline("sd"), "p_plus", layers=5)


@pytest.mark.parametrize(
    ("config", "option", "given"),
    [
        ({"layers": -1}, "layers", -1),
        ({"tokens": ()}, "tokens", ()),
        ({"tokens": ("<a>", "<b>"), "initialize": ("duck",)}, "initialize", 1),
        ({"subtokens": "last"}, "subtokens", "last"),
        ({"ids": (1, 2)}, "ids", (1, 2)),
    ],
)
def test_options_that_make_no_sense(config: dict[str, Any], option: str, given: Any) -> None:
    with raises(OptionError, method="p_plus", option=option, given=given):
        methods.get("p_plus").from_config(config)
