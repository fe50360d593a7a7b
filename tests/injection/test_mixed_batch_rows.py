"""Mixed batches: the output of each sample equals its output alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.injection.toy import Net, net, stir
from tests.raising import raises
from veneer import mixed
from veneer.injection import Attachment, OptionError, StateError, UnknownName, UnsupportedSite, activate, attach, attachments
from veneer.testing.pipelines import tiny_pipeline

WHERE = "conv attn.{q,v} head"


def inputs(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "ids": torch.randint(7, (rows, 4), generator=generator),
        "image": torch.randn(rows, 2, 4, 4, generator=generator),
    }


def three_attachments(method: str = "lora", where: str = WHERE, **options: Any) -> tuple[Net, list[Attachment]]:
    model = net().double()
    torch.manual_seed(0)
    attached = [attach(model, method, where=where, name=name, **options) for name in ("style", "face", "more")]
    for factor, attachment in enumerate(attached, 1):
        stir(attachment, 0.15 * factor)
    return model, attached


def run_rows(model: nn.Module, rows: int, only: slice = slice(None)) -> Tensor:
    with torch.no_grad():
        return model(**{k: (v.double() if v.is_floating_point() else v)[only] for k, v in inputs(rows).items()})


def expected_output(model: nn.Module, samples: list[dict[str, float]], copies: int = 1) -> Tensor:
    """The outputs of the samples, run one by one with their attachments."""
    rows = []
    for i in range(copies * len(samples)):
        with activate(model, samples[i % len(samples)]):
            rows.append(run_rows(model, copies * len(samples), slice(i, i + 1)))
    return torch.cat(rows)


METHODS: list[tuple[str, str, dict[str, Any]]] = [
    ("lora", "embed.token " + WHERE, {"rank": 2, "alpha": 3.0}),
    ("lokr", WHERE, {"factor": 2}),
    ("vera", "attn.{q,v} head", {"rank": 2}),
    ("svdiff", WHERE, {}),
    ("oft", "head", {"block_size": 3}),
    ("dora", WHERE, {"rank": 2}),
    ("ia3", WHERE, {"inputs": "head"}),
    ("oft", "attn.{q,v} head", {"block_size": 3, "side": "output"}),
    ("bitfit", "bias.conv bias.head", {}),
]


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(("method", "where", "options"), METHODS)
def test_each_sample_equals_its_output_alone(method: str, where: str, options: dict[str, Any], copies: int) -> None:
    """Of two copies, the second has the same samples in the same order."""
    model, _ = three_attachments(method, where, **options)
    samples = [{"style": 1.0}, {"face": 0.5}, {}, {"style": 1.0}, {"style": 0.3, "more": 1.0}, {"face": 0.5}]
    with mixed(model, samples):
        output = run_rows(model, copies * len(samples))
    torch.testing.assert_close(output, expected_output(model, samples, copies), rtol=1e-9, atol=1e-9)
    outputs = [run_rows(model, 1) for name in ("style", "face") if activate(model, name)]
    assert not torch.allclose(*outputs, atol=1e-3)


def test_a_sample_without_attachments_is_the_base_output_bitwise() -> None:
    model, _ = three_attachments(where="conv head", rank=2)
    with mixed(model, ["style", None, "face"]):
        output = run_rows(model, 3)
    with activate(model, ()):
        assert torch.equal(output[1], run_rows(model, 3)[1])


def test_forms_of_samples_and_strengths() -> None:
    model, (style, _, more) = three_attachments(rank=2)
    samples = [{"style": 0.8}, {"face": 0.25, "more": 0.25}, {}, {"more": 0.5}]
    with mixed(model, [style, ("face", more), "style", {more: 0.5}], strengths=[0.8, 0.25, 0, 1]):
        output = run_rows(model, 4)
    torch.testing.assert_close(output, expected_output(model, samples), rtol=1e-9, atol=1e-9)


def test_different_methods_at_one_site_and_the_effective_weight_of_each_sample() -> None:
    """The norm of DoRA includes LoRA's delta only in the samples that have it, at its strength."""
    model = net().double()
    torch.manual_seed(0)
    for name, method in (("under", "lora"), ("middle", "dora"), ("turn", "ia3"), ("over", "lora")):
        stir(attach(model, method, where="attn.q head", name=name), 0.2)
    attachments(model)[0].merge()
    attachments(model)[0].unmerge()  # its hook is the last one now
    samples = [{"middle": 1.0}, {"under": 0.5, "middle": 1.0, "turn": 0.7}, {"turn": 1.0, "over": 1.0, "under": 1.0}]
    with mixed(model, samples):
        output = run_rows(model, 3)
    torch.testing.assert_close(output, expected_output(model, samples), rtol=1e-9, atol=1e-9)


def test_different_ranks_scales_and_dtypes() -> None:
    """Linear layers apply the LoRAs of all samples in one step; the base may be in half precision."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.bfloat16, 0.1)):
        model = net().double()
        torch.manual_seed(0)
        for name, rank, alpha in (("style", 2, 3.0), ("face", 5, 1.0), ("more", 1, None)):
            stir(attach(model, "lora", where="head", name=name, rank=rank, alpha=alpha), 0.2)
        samples = [{"style": 1.0}, {}, {"face": 0.5, "more": 2.0}, {"face": -1.0}]
        expected = expected_output(model, samples, copies=2)
        model.head.weight.data, model.head.bias.data = model.head.weight.to(dtype), model.head.bias.to(dtype)
        handles = [
            model.head.register_forward_pre_hook(lambda _, args, dtype=dtype: args[0].to(dtype)),
            model.head.register_forward_hook(lambda _, args, y: y.double()),
        ]
        with mixed(model, samples):
            torch.testing.assert_close(run_rows(model, 8), expected, rtol=0, atol=tolerance)
            with attachments(model)[1].enabled(False):
                disabled = [{k: v for k, v in sample.items() if k != "face"} for sample in samples]
                output = run_rows(model, 8)
        for handle in handles:
            handle.remove()
        if dtype == torch.float64:
            torch.testing.assert_close(output, expected_output(model, disabled, copies=2), rtol=0, atol=tolerance)


def test_scale_and_enabled_inside_and_the_state_after_it() -> None:
    model, (style, face, more) = three_attachments(rank=2)
    style.scale = 0.5
    activate(model, ["style", "more"])
    before = run_rows(model, 2)
    with mixed(model, ["style", "face"]):
        torch.testing.assert_close(run_rows(model, 2), expect_scaled(0.5, 1.0))
        with face.enabled(False):
            torch.testing.assert_close(run_rows(model, 2), expect_scaled(0.5, 0.0))
        style.scale = 1.0
        torch.testing.assert_close(run_rows(model, 2), expect_scaled(1.0, 1.0))
        for name, call in (("style", style.detach), ("face", face.merge), ("style", lambda: mixed(model, ["style"]).__enter__())):
            with raises(StateError, where=name, given="mixed"):
                call()
    assert (style.scale, face.is_enabled, more.is_enabled) == (0.5, False, True)
    assert torch.equal(run_rows(model, 2), before)
    with pytest.raises(ZeroDivisionError), mixed(model, ["style", "face"]):
        raise ZeroDivisionError
    assert torch.equal(run_rows(model, 2), before)
    style.detach()


def expect_scaled(first: float, second: float) -> Tensor:
    model, _ = three_attachments(rank=2)
    return expected_output(model, [{"style": first}, {"face": second}])


def test_the_same_adapters_for_all_samples_may_be_on_read_weights() -> None:
    """A read weight is the same for the batch, so it supports only attachments with one strength for all samples."""
    model, _ = three_attachments(where=WHERE + " attn.out", rank=2)
    with mixed(model, ["style", "style"], strengths=[0.5, 0.5]):
        output = run_rows(model, 2)
    with activate(model, {"style": 0.5}):
        assert torch.equal(output, run_rows(model, 2))
    other = attach(model, "lora", where=WHERE, name="other", rank=2)
    stir(other, 0.3)
    samples = [{"style": 0.5}, {"style": 0.5, "other": 1.0}]
    with mixed(model, samples):
        output = run_rows(model, 2)
    torch.testing.assert_close(output, expected_output(model, samples), rtol=1e-9, atol=1e-9)
    with raises(UnsupportedSite, where="style", method="lora", site="read", given="WeightSeam"):
        mixed(model, ["style", None]).__enter__()
    assert torch.equal(run_rows(model, 2), run_rows(model, 2))


def test_gradients_equal_those_of_the_samples_alone() -> None:
    model, attached = three_attachments(rank=2)
    named = {f"{a.name} {k}": p for a in attached for k, p in a.named_parameters()}
    data = {k: v.double() if v.is_floating_point() else v for k, v in inputs(3).items()}

    def gradients(row: slice) -> dict[str, Tensor | None]:
        loss = model(**data)[row].square().sum()
        return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))

    with mixed(model, ["style", "face", None], [0.5, 1.0, 1.0]):
        output = gradients(slice(None))
    for name, row, strength in (("style", 0, 0.5), ("face", 1, 1.0)):
        with activate(model, {name: strength}):
            expected = {key: g for key, g in gradients(slice(row, row + 1)).items() if key.startswith(name)}
        assert all(g is not None and g.any() for g in expected.values())
        for key, g in expected.items():
            torch.testing.assert_close(output[key], g, rtol=1e-9, atol=1e-9)
    assert all(g is None for key, g in output.items() if key.startswith("more"))


def test_errors_are_raised_before_anything_changes() -> None:
    model, (_, face, _) = three_attachments(rank=2)
    before = run_rows(model, 2)
    data: dict[str, Any]
    for samples, strengths, error, data in (
        (["style", "fase"], None, UnknownName, {"name": "fase", "expected": ("style", "face", "more")}),
        (["style"], [1, 2], OptionError, {"option": "strengths", "given": 2, "expected": 1}),
        ([], None, OptionError, {"option": "samples", "given": []}),
        ("style", None, OptionError, {"option": "samples", "given": "style"}),
        ([three_attachments(rank=2)[1][0]], None, StateError, {"where": "style", "given": "on another model"}),
    ):
        with raises(error, **data), mixed(model, samples, strengths):
            pass
    face.merge()
    with raises(StateError, where="face", given="merged"), mixed(model, ["style", "face"]):
        pass
    face.unmerge()
    assert torch.equal(run_rows(model, 2), before)


def test_a_batch_of_another_size_is_an_error() -> None:
    model, _ = three_attachments(rank=2)
    two = expected_output(model, [{"style": 1.0}, {"face": 1.0}], copies=2)
    with mixed(model, ["style", "face"]):
        with raises(StateError, where="Net", given=3, expected=2):
            run_rows(model, 3)
        torch.testing.assert_close(run_rows(model, 4), two)
        with raises(UnsupportedSite, site="head", given=((8, 6), (8, 3)), expected=4):
            model.head(torch.zeros(8, 6, dtype=torch.float64))
    with mixed(model, ["style", "face"]), raises(StateError, where="head", given="no forward pass of the model"):
        model.head(torch.zeros(2, 6, dtype=torch.float64))


@pytest.mark.slow
def test_a_compiled_model() -> None:
    """One more graph for each new combination."""
    model, _ = three_attachments(rank=2)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    samples = [{"style": 1.0}, {"face": 0.5}, {}, {"style": 1.0}]
    plain = run_rows(compiled, 4)
    for order, count in ((samples, 2), (samples[::-1], 3), (samples, 3)):
        with mixed(model, order):
            output = run_rows(compiled, 4)
        torch.testing.assert_close(output, expected_output(model, order), rtol=1e-9, atol=1e-9)
        assert len(graphs) == count
    torch.testing.assert_close(run_rows(compiled, 4), plain)
    assert len(graphs) == 3
    torch._dynamo.reset()


def test_changes_of_the_whole_batch_must_be_the_same_for_all_samples() -> None:
    """Inserted tokens and token embeddings are rejected for a part of the samples."""
    import timm

    model = timm.create_model("test_vit", num_classes=3).eval()
    attach(model, "vpt", tokens=2, name="prompts")
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        enabled = model(images)
        with mixed(model, ["prompts", "prompts"]):
            assert torch.equal(model(images), enabled)
    pipe = tiny_pipeline("sd")
    attach(pipe, "textual_inversion", tokens="<toy>", name="toy")
    for one, name, seam in ((model, "prompts", "TokenSeam"), (pipe, "toy", "VocabularySeam")):
        with raises(UnsupportedSite, where=name, given=seam), mixed(one, [name, None]):
            pass
    with mixed(pipe, ["toy", "toy"]):
        generate_latents(pipe, ["a <toy>", "a duck"], [0, 1], 5.0)


PIPELINES = {"sd": (("attn", "xattn", "text/attn"), 5.0), "flux": (("attn", "text/attn", "text_2/attn"), 3.5)}


@pytest.mark.parametrize("family", PIPELINES)
def test_latents_of_a_pipeline(family: str) -> None:
    """With classifier-free guidance, in denoiser and text encoders: the latents of each sample equal those of it alone."""
    where, guidance = PIPELINES[family]
    pipe = tiny_pipeline(family)
    torch.manual_seed(0)
    names = ["style", "face"]
    for name in names:
        stir(attach(pipe, "lora", where=where, rank=2, name=name), 0.3)
        torch.manual_seed(1)
    samples = [{"style": 1.0}, {"face": 0.5}, {}, {"style": 0.8, "face": 1.0}]
    prompts = ["a toy", "a duck", "a toy", "a goldfish"]
    with mixed(pipe, samples):
        output = generate_latents(pipe, prompts, list(range(4)), guidance)
    for i, sample in enumerate(samples):
        with activate(pipe, sample):
            alone = generate_latents(pipe, prompts[i : i + 1], [i], guidance)
        torch.testing.assert_close(output[i : i + 1], alone, rtol=0, atol=1e-4)
    bare = generate_latents(tiny_pipeline(family), prompts, list(range(4)), guidance)
    assert [bool((a - b).abs().max() > 0.01) for a, b in zip(output, bare, strict=True)] == [True, True, False, True]


def generate_latents(pipe: Any, prompts: list[str], seeds: list[int], guidance: float) -> Tensor:
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = 32 if "unet" in pipe.components else 8
    return pipe(
        prompts, generator=noise, num_inference_steps=2, guidance_scale=guidance, output_type="latent", height=size, width=size
    ).images


def test_a_prompt_for_several_samples() -> None:
    """Text encoders run once per prompt, so images of one prompt must have the same adapters there, but not in the denoiser."""
    pipe = tiny_pipeline("sd")
    both = attach(pipe, "lora", where=("attn", "text/attn"), rank=2, name="both")
    unet = attach(pipe, "lora", where="attn", rank=2, name="unet")
    for attachment in (both, unet):
        stir(attachment, 0.1)
    tokens = {"input_ids": torch.tensor([[5, 6, 7], [5, 8, 9]])}

    def states() -> Tensor:
        with torch.no_grad():
            return pipe.text_encoder(**tokens)[0]

    with activate(pipe, "both"):
        enabled = states()
    with activate(pipe, ()):
        disabled = states()
    with mixed(pipe, ["both", ("both", "unet"), "unet", None]):
        torch.testing.assert_close(states(), torch.stack([enabled[0], disabled[1]]))
    with mixed(pipe, ["both", None, None, None]), raises(StateError, where="text_encoder", given=2, expected=4):
        states()
    with mixed(pipe, ["both", None, None]), raises(StateError, where="text_encoder", given=2, expected=3):
        states()
