"""Memory predicted from shapes against what real models allocate and store."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.base_models.quantized import kinds
from tests.raising import raises
from veneer import base_models
from veneer.base_models import KINDS
from veneer.base_models.quantized_linear import quantize_linear
from veneer.injection import OptionError
from veneer.injection.quantized_weight import stored_parts
from veneer.testing.pipelines import FAMILIES, tiny_pipeline
from veneer.training import attach_methods, prepare_base
from veneer.training.families import family
from veneer.training.loop.optimizer_step import AUTOCAST
from veneer.training.personalization_config import PersonalizeConfig
from veneer.training.preflight import memory_parts
from veneer.training.preflight.estimates import estimate
from veneer.training.preflight.memory_parts import catch_inputs, count_training_step, phase_peaks, vae_bytes
from veneer.training.preflight.memory_prediction import MemoryPredictor
from veneer.training.preflight.meta_family import meta_family
from veneer.training.preflight.packed_linear import PACKINGS, PackedLinear
from veneer.training.preflight.step_cost import FlopCounter, PeakBytes, count_forward_bytes, count_step_cost
from veneer.training.report.memory_profile import peak

RUN = PersonalizeConfig(concept="<toy>", dtype="float32", resolution=64)
SIDES = dict.fromkeys(FAMILIES, 32) | {"pixart": 128}


def attach(pipe, checkpointing=False, rank=4):
    """Trainable parameters of a LoRA on a pipeline that is set up as for training."""
    prepare_base.freeze(pipe)
    found = attach_methods.build_methods("lora", {"lora": {"rank": rank}}, "<toy>", "toy")
    attached = attach_methods.attach_all(pipe, found, {}, False, 0)
    if checkpointing:
        prepare_base.enable_gradient_checkpointing(pipe.components[next(iter(attached[0].towers))])
    return [p for p in attached[0].parameters() if p.requires_grad]


def real_step(kind, trainable, side, rows, precision="no"):
    """A forward and backward pass of a real model on random inputs, warm."""
    noisy = torch.randn(rows, kind.latent_channels, side // kind.vae_factor, side // kind.vae_factor)
    text = {name: tensor.detach() for name, tensor in kind.encode_text([prompt(kind)] * rows).items()}
    inputs = catch_inputs(kind.tower, lambda: kind.denoise(noisy, torch.full((rows,), 995.0), text))
    dtype = AUTOCAST[precision]

    def predict():
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            output = kind.tower(**inputs)[0]
        return output[0] if isinstance(output, list) else output  # as `count_step_cost` does

    def step():
        predict().float().square().mean().backward()

    step()
    for p in trainable:
        p.grad = None
    return step


def prompt(kind):
    return "a dog" if kind.text_towers else "1"


@pytest.mark.parametrize("name", FAMILIES)
def test_text_shapes_are_those_of_encoded_text(name):
    kind = family(tiny_pipeline(name))
    encoded = kind.encode_text([prompt(kind)] * 3)
    shapes = kind.text_shapes(3)
    assert {n: (t.shape, t.dtype) for n, t in shapes.items()} == {n: (t.shape, t.dtype) for n, t in encoded.items()}
    assert all(t.is_meta for t in shapes.values())


STEPS = [(name, False, "no") for name in FAMILIES]
STEPS += [(name, *options) for name in ("sd", "flux") for options in ((True, "no"), (False, "bf16"))]
"""Every family, and checkpointing and autocast of a UNet and of a transformer."""


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # FLUX's norms under autocast
@pytest.mark.parametrize(("name", "checkpointing", "precision"), STEPS)
def test_counted_activations_are_those_of_a_real_step(name, checkpointing, precision):
    """By the tensors of the step; without autocast also by torch's records, which include workspaces and random states."""
    pipe = tiny_pipeline(name)
    kind, side = family(pipe), 2 * SIDES[name]
    trainable = attach(pipe, checkpointing)
    counted = count_training_step(kind, trainable, side, 2, precision).activations
    step = real_step(kind, trainable, side, 2, precision)
    with PeakBytes() as tracked:
        step()
    assert counted == pytest.approx(tracked.peak, rel=1e-3 if precision == "no" else 1e-2)
    for p in trainable:
        p.grad = None
    if precision == "no":
        assert counted == pytest.approx(peak(step), rel=0.13)


def test_counting_flops_keeps_no_recomputed_activations():
    pipe = tiny_pipeline("flux", num_single_layers=6)
    trainable = attach(pipe, checkpointing=True)
    kind = family(pipe)
    with_flops = count_training_step(kind, trainable, 64, 2, "no")
    without = count_training_step(kind, trainable, 64, 2, "no", flops=False)
    assert with_flops.activations == without.activations
    assert with_flops.flops > without.flops == 0


def test_checkpointing_saves_most_of_many_blocks():
    costs = []
    for checkpointing in (False, True):
        pipe = tiny_pipeline("flux", num_single_layers=12)
        trainable = attach(pipe, checkpointing)
        costs.append(count_training_step(family(pipe), trainable, 64, 2, "no", flops=False).activations)
    assert costs[1] < costs[0] / 3


def test_activations_grow_with_batch_and_area():
    pipe = tiny_pipeline("sd")
    trainable, kind = attach(pipe), family(pipe)
    small, batch, area = (
        count_training_step(kind, trainable, side, rows, "no", flops=False).activations
        for side, rows in ((64, 2), (64, 4), (128, 2))
    )
    assert batch == pytest.approx(2 * small, rel=0.05)
    assert area == pytest.approx(4 * small, rel=0.1)


def test_passes_of_a_vae_are_counted_once(monkeypatch):
    """For all VAEs of a layout, whatever their weights; a dtype, a size or tiling of its own is counted anew."""
    passes = []
    monkeypatch.setattr(memory_parts, "_vae_counts", {})
    monkeypatch.setattr(memory_parts, "count_forward_bytes", lambda *each: passes.append(each) or count_forward_bytes(*each))
    first = vae_bytes(family(tiny_pipeline("sd")), 32)
    assert len(passes) == 2
    assert vae_bytes(family(tiny_pipeline("sd", seed=1)), 32) == first
    assert len(passes) == 2
    assert vae_bytes(family(tiny_pipeline("sd")), 64) == pytest.approx([4 * each for each in first], rel=0.1)
    half, tiled = tiny_pipeline("sd"), tiny_pipeline("sd")
    half.vae.to(torch.bfloat16)
    assert vae_bytes(family(half), 32) == pytest.approx([each / 2 for each in first], rel=0.1)
    tiled.vae.enable_tiling()
    vae_bytes(family(tiled), 32)
    assert len(passes) == 8


def test_every_kind_has_a_packing():
    assert set(PACKINGS) == set(KINDS)


@kinds()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (320, 1280), (1088, 72)])
def test_packed_bytes_are_those_of_the_library(kind, dtype, shape):
    columns, rows = shape
    real = quantize_linear(nn.Linear(columns, rows, bias=False, dtype=dtype).requires_grad_(False), KINDS[kind])
    parts = stored_parts(real, "weight", real.weight)
    stored = sum(t.numel() * t.element_size() for name, t in parts if "quant_state" not in name)  # JSON, for files only
    offset = 4 if kind.endswith("-dq") else 0  # a scalar, in that JSON
    assert PackedLinear(nn.Linear(columns, rows, bias=False, dtype=dtype, device="meta"), kind).stored == stored + offset


@kinds()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_allocates_as_the_library_does(kind, dtype):
    """Frozen layers in a row: what each keeps for the backward pass, and the weight while it is dequantized."""
    if kind == "int8" and dtype == torch.bfloat16:
        pytest.skip("the CPU kernel converts the weight in float32 in between")
    width, count = 1024, 4
    floats = [nn.Linear(width, width, dtype=dtype) for _ in range(count + 1)]
    for linear in floats[1:]:
        linear.requires_grad_(False)
    packed = nn.Sequential(floats[0], *(PackedLinear(copy.deepcopy(linear).to("meta"), kind) for linear in floats[1:]))
    # in training mode int8 computes with float inputs and a dequantized weight on a CPU, which has no kernel for integers
    real = nn.Sequential(floats[0], *(quantize_linear(linear, KINDS[kind]) for linear in floats[1:])).train()
    x = torch.randn(8, width, dtype=dtype)
    counted = count_step_cost(packed, {"input": x}).activations

    def step():
        real(x).float().square().mean().backward()

    step()
    real.zero_grad()
    assert counted == pytest.approx(peak(step), rel=0.1)


@pytest.mark.parametrize("method", ["lora", "adamix"])
def test_the_prediction_is_the_estimate_of_the_loaded_model(method):
    config = replace(RUN, base="bundled", method=method, gradient_checkpointing=True, ema=0.9).with_defaults()
    predicted = MemoryPredictor("cpu").predict(config)
    pipe = base_models.load("bundled")
    prepare_base.freeze(pipe)
    methods = attach_methods.build_methods(method, config.options, "<toy>", "toy")
    attached = attach_methods.attach_all(pipe, methods, {method: config.where} if config.where else {}, False, 0)
    prepare_base.enable_gradient_checkpointing(pipe.unet)
    loop = replace(config.loop(), batch=1)
    found = estimate(attached, loop, family(pipe), 64, config.batch, config.batch, ["a <toy>"], False, images=1)
    phases = predicted.phases()
    assert found.base == sum(predicted.weights.values()) + predicted.adapters
    assert found.training == predicted.training
    assert found.activations == predicted.activations
    assert (found.encoding, found.decoding) == (predicted.encoding, predicted.decoding)
    assert found.memory == predicted.peak == max(phases.values())


def test_phases():
    """Encoders count while they are on the device: until all is cached, and again to generate."""
    parts = {"resident": 100, "encoders": 50, "training": 10, "activations": 30, "encoding": 40, "decoding": 20}
    assert phase_peaks(**parts, offloads=True) == {"loading": 150, "caching": 190, "training": 140, "generating": 180}
    assert phase_peaks(**parts, offloads=False) == {"loading": 150, "caching": 0, "training": 200, "generating": 180}


@pytest.mark.parametrize(("options", "offloads"), [
    ({}, True), ({"offload_encoders": False}, False), ({"crop": "random"}, False), ({"cache": False}, False),
    ({"text_encoder": True}, False), ({"tag_dropout": 0.1}, False),
])  # fmt: skip
def test_offloading_as_personalize_decides_it(options, offloads):
    config = replace(RUN, base="bundled", **options).with_defaults()
    assert MemoryPredictor("cuda").predict(config, 0).offloads is offloads
    assert not MemoryPredictor("cpu").predict(config, 0).offloads


def test_trained_text_encoders_count():
    config = replace(RUN, base="bundled").with_defaults()
    alone, both = (MemoryPredictor().predict(replace(config, text_encoder=text)) for text in (False, True))
    assert both.values > alone.values
    assert both.activations > alone.activations


@pytest.mark.parametrize(
    ("name", "weights"),
    [("sd15", {"unet": 859_520_964, "vae": 83_653_863}), ("flux", {"transformer": 11_901_408_320, "vae": 83_819_683})],
)
def test_an_architecture_has_the_published_sizes(name, weights):
    kind = meta_family(name, torch.bfloat16)
    for part, count in weights.items():
        parameters = list(kind.pipe.components[part].parameters())
        assert sum(p.numel() for p in parameters) == count
        assert all(p.is_meta and p.dtype == torch.bfloat16 and not p.requires_grad for p in parameters)


def test_a_quantized_architecture():
    config = replace(RUN, base="flux", dtype=None, quantize=("nf4", "text_encoder_2=int8"), resolution=None).with_defaults()
    predicted = MemoryPredictor().predict(config, 0)
    assert predicted.formats["transformer"] == "nf4"
    assert predicted.formats["text_encoder_2"] == "int8"
    assert predicted.formats["vae"] == "bfloat16"
    assert predicted.resolution == 1024
    gib = {name: count / 2**30 for name, count in predicted.weights.items()}
    assert gib["transformer"] == pytest.approx(10.65, abs=0.01)
    assert gib["text_encoder_2"] == pytest.approx(5.5, abs=0.2)
    assert predicted.loading > 30 * 2**30


def test_float16_keeps_what_transformers_keeps_in_float32():
    t5 = meta_family("pixart", torch.float16).pipe.text_encoder
    assert {p.dtype for name, p in t5.named_parameters() if ".wo." in name} == {torch.float32}
    assert {p.dtype for name, p in t5.named_parameters() if ".wi_0." in name} == {torch.float16}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"quantize": ("nf5",)}, {"option": "quantize", "given": "nf5"}),
        ({"quantize": ("vae=nf4",)}, {"option": "quantize", "given": "vae"}),
        ({"resolution": 100}, {"option": "resolution", "given": 100, "expected": 32}),
    ],
)
def test_wrong_options(changes, error):
    with raises(OptionError, **error):
        MemoryPredictor().predict(replace(RUN, base="bundled", **changes), 0)


def test_a_gguf_file_is_not_predicted(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"")
    pytest.importorskip("gguf", reason="needs gguf")
    with raises(OptionError, option="quantize", where="unet", expected="kind"):
        MemoryPredictor().predict(replace(RUN, base="bundled", quantize=(str(file),)), 0)


@pytest.mark.parametrize("base", ["owner/model", "sd99"])
def test_a_base_model_without_configs(base):
    with raises(base_models.BaseModelError, where="base", given=base):
        meta_family(base, torch.float32)


def test_the_counter_of_bytes_sees_what_the_counter_of_flops_keeps():
    """torch's own counter would keep every recomputed block; this one keeps none."""
    from torch.utils.checkpoint import checkpoint

    blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8))

    def step(x):
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        x.square().mean().backward()

    peaks = []
    for counter in (None, FlopCounter()):
        x = torch.randn(512, 64, requires_grad=True)
        blocks.zero_grad()
        with PeakBytes() as tracked:
            if counter is None:
                step(x)
            else:
                with counter:
                    step(x)
        peaks.append(tracked.peak)
    assert peaks[0] == peaks[1]
