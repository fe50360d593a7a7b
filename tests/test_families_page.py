"""Every cell of the table of `docs/families.md` is a test: attach, train, generate, quantize, read and write files."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.base_models.quantized import needs
from tests.families_table import (
    COLUMNS,
    FORMATS,
    PAGE,
    UNET,
    Cell,
    denoiser_of,
    denoisers,
    is_collected,
    notes,
    page_cells,
    peers,
    pipelines_table,
    save_in_formats,
    table,
    tiny_denoiser,
    tiny_of,
    trained,
)
from tests.formats.cases import fill
from tests.training.images import save
from veneer import attach, load
from veneer.base_models import quantize_model
from veneer.formats import format_of, read
from veneer.injection import Attachment
from veneer.injection.quantized_weight import is_quantized
from veneer.injection.registry import host_of
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.data.captions import Captions
from veneer.training.data.dataset import PhotoDataset, find_photos
from veneer.training.families import families, family
from veneer.training.objective.denoising_loss import DenoisingLoss

CELLS = list(page_cells())
KIND = "int8"
PROMPTS = {"dit": "goldfish"}
OWN_NAMES = {(UNET, "onetrainer"): "kohya"}
"""Format as which a file is recognized, if not that in which it was written: OneTrainer has kohya's names for UNets."""
SIDES = {"DiTTransformer2DModel": 32}
"""Sides of images of classes with a fixed size, pixels; 64 for others, the least of Sana."""
pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # a call in Ideogram 4's pipeline
    pytest.mark.filterwarnings("ignore:`LoraLoaderMixin` is deprecated:FutureWarning"),  # a base of PRX's pipeline
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers' DPM solver
    pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning"),
]


def cells_of(*columns: str) -> Any:
    """Parametrizes a test by the cells of columns that do not say `no`."""
    return pytest.mark.parametrize(
        "cell", [cell for cell in CELLS if cell.column in columns and not cell.text.startswith("no")], ids=str
    )


def file_cells(column: str) -> Any:
    """Parametrizes a test by the formats of a column."""
    known = [(cell.denoiser, form) for cell in CELLS if cell.column == column for form in cell.names]
    return pytest.mark.parametrize(("denoiser", "form"), known)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    save(folder / "0.png", 72, 64, seed=0)
    return folder


@functools.cache
def pipeline(name: str) -> Any:
    """A tiny pipeline with frozen components, shared by the tests that detach from it."""
    return frozen(tiny_of(name))


def frozen(pipe: Any) -> Any:
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    return pipe


@torch.no_grad()
def output(model: Any) -> Tensor:
    """The output of a denoiser for fixed inputs."""
    host = host_of(model)
    assert host is not None
    images = model(**host.sample(model), return_dict=False)[0]
    return torch.stack(images) if isinstance(images, list) else images


def photo_loss(name: str, pipe: Any, photos: Path) -> Tensor:
    """The loss of one photo, as `veneer personalize` computes it."""
    kind = family(pipe)
    side = SIDES.get(type(kind.tower).__name__, 64)
    captions = Captions(templates=(PROMPTS.get(name, "a dog"),))
    data = PhotoDataset(find_photos(photos), side, kind.multiple, 0, captions=captions)
    return DenoisingLoss(kind, data, 0, 1)(0, [0])


def assert_trains(loss: Tensor, lora: Attachment) -> None:
    """A finite loss, and a step that changes every adapter's second factor, whose initial values are zeros."""
    assert loss.isfinite()
    loss.backward()
    torch.optim.Adam(lora.parameters(), 1e-2).step()
    assert all(adapter.up.any() for _, adapter in lora.parts.values())


def assert_same_output(model: Any, expected: Tensor) -> None:
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)


def attention_lora(model: Any) -> Attachment:
    return attach(model, "lora", where="attn.v", rank=2)


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_has_the_tables_of_the_registries() -> None:
    """Formats that are written are checked below."""
    text = PAGE.read_text(encoding="utf-8")
    assert table({cell.denoiser: cell.names for cell in CELLS if cell.column == "files written"}) in text
    assert pipelines_table() in text


def test_every_cell_has_a_test() -> None:
    assert {cell.denoiser for cell in CELLS} == {*denoisers()}
    assert len(CELLS) == len(denoisers()) * len(COLUMNS)
    for cell in CELLS:
        assert cell.names if cell.column.startswith("files") else cell.text in ("yes", *(f"no ({note})" for note in notes()))


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.text.startswith("no")], ids=str)
def test_what_is_not_supported_has_a_note_and_no_family(cell: Cell) -> None:
    assert cell.column in ("train", "generate")
    assert cell.denoiser not in trained()
    name = re.sub(r"(?:Transformer)?[23]DModel$", "", cell.denoiser)
    assert name in notes()[cell.text[4]]


def test_denoisers_are_read_from_annotations() -> None:
    assert denoiser_of("ZImagePipeline", "transformer") == "ZImageTransformer2DModel"
    assert denoiser_of("StableDiffusionPipeline", "unet") == type(tiny_pipeline("sd").unet).__name__ == UNET
    assert {name for names in trained().values() for name in names} == {*families()}


def test_ids_of_tests_are_checked() -> None:
    assert is_collected("tests.formats.test_xlabs:test_read_as_diffusers_reads_it[diffusion_model.]")
    assert not is_collected("tests.formats.test_xlabs:test_read_as_diffusers_reads_it[model.]")
    assert not is_collected("tests.formats.test_xlabs:test_read_as_diffusers_reads_it")
    assert not is_collected("tests.formats.test_xlabs:test_that_is_missing")


# -- the cells ---------------------------------------------------------------------------------------------------------


@cells_of("attach")
def test_attach(cell: Cell) -> None:
    model = tiny_denoiser(cell.denoiser)
    before = output(model)
    lora = attach(model, "lora", rank=2)
    assert torch.equal(output(model), before)
    fill(lora, std=0.2)
    assert not torch.allclose(output(model), before)
    lora.detach()
    assert torch.equal(output(model), before)


@cells_of("train")
def test_train(cell: Cell, photos: Path) -> None:
    for name in trained()[cell.denoiser]:
        pipe = pipeline(name)
        lora = attention_lora(family(pipe).tower)
        assert_trains(photo_loss(name, pipe, photos), lora)
        lora.detach()


@cells_of("generate")
def test_generate(cell: Cell) -> None:
    """One image with a LoRA, which differs from that of the base model."""
    side = SIDES.get(cell.denoiser, 64)
    for name in trained()[cell.denoiser]:
        kind = family(pipeline(name))
        settings = {"num_inference_steps": 2} | ({} if name in ("dit", "pixart") else {"height": side, "width": side})
        images = []
        for std in (0.0, 1.0):
            lora = fill(attention_lora(kind.tower), std=std)
            images += kind.generate([PROMPTS.get(name, "a dog")], [torch.Generator().manual_seed(0)], **settings)
            lora.detach()
        assert images[0].size == images[1].size
        assert images[0].tobytes() != images[1].tobytes()


@needs(KIND)
@cells_of("quantized")
def test_quantized(cell: Cell, photos: Path) -> None:
    """Layers of 8 bits, as `--quantize int8` makes them, and a step of a LoRA on them."""
    names = trained().get(cell.denoiser, ())
    pipe = frozen(tiny_of(names[0])) if names else None
    model = tiny_denoiser(cell.denoiser).requires_grad_(False) if pipe is None else family(pipe).tower
    assert quantize_model(model, KIND).quantized > 0
    lora = attention_lora(model)
    before = output(model) if pipe is None else None
    quantized = [p for p in model.parameters() if is_quantized(p)]
    if pipe is None:
        images = model.train()(**host_of(model).sample(model), return_dict=False)[0]  # type: ignore[union-attr]
        loss = sum(image.float().square().mean() for image in images)
    else:
        loss = photo_loss(names[0], pipe, photos)
    assert quantized
    assert_trains(loss, lora)
    assert before is None or not torch.equal(output(model.eval()), before)


@cells_of("files written")
def test_files_written(cell: Cell, tmp_path: Path) -> None:
    """Read again with every key and the same output; diffusers' format also by diffusers. Other formats raise an error."""
    model = tiny_denoiser(cell.denoiser)
    base = output(model)
    lora = fill(attach(model, "lora", where="attn", rank=2, alpha=3.0), std=0.5)
    changed = output(model)
    assert not torch.allclose(changed, base)
    paths = save_in_formats(lora, tmp_path)
    assert tuple(paths) == cell.names
    lora.detach()
    for form, path in paths.items():
        assert format_of(read(path)).name == OWN_NAMES.get((cell.denoiser, form), form)
        loaded = load(model, path)
        assert loaded.loaded.clean
        assert_same_output(model, changed)
        loaded.detach()
    if hasattr(model, "load_lora_adapter"):  # all but DiT
        state, metadata = load_file(paths["diffusers"]), read(paths["diffusers"]).json("lora_adapter_metadata")
        model.load_lora_adapter(state, prefix="unet" if cell.denoiser == UNET else "transformer", metadata=metadata)
        assert_same_output(model, changed)


@file_cells("files read")
def test_files_read(denoiser: str, form: str) -> None:
    """Files as other tools write them have tests of their own; others are written and read above."""
    (cell,) = (c for c in CELLS if c.denoiser == denoiser and c.column == "files written")
    tests = peers().get(denoiser, {}).get(form, [])
    assert tests or form in cell.names
    assert [test for test in tests if not is_collected(test)] == []
    assert form in FORMATS or tests
