"""Small classifiers of every vision host with trained methods, as `veneer export` reads them from a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.classification.small import model_folder
from tests.classification.transformers_folders import transformers_folder
from veneer.classification.data.transforms import EvalView
from veneer.classification.export.export_format import ExportSource
from veneer.classification.models.classifier import Classifier
from veneer.classification.models.compatibility import compatible_methods
from veneer.classification.models.loading import open_classifier
from veneer.injection import Attachment, SelectionError, UnsupportedSite, attach, methods, sites
from veneer.injection.attachment.plan import supports
from veneer.injection.method import Method
from veneer.testing.case import merges_at, perturb

HOSTS = {
    "timm_vit": "vit", "timm_swin": "swin", "timm_convnext": "convnext", "timm_conv": "resnet", "timm_fallback": "coatnet",
    "clip_classifier": "clip", "transformers_vit": "dinov2",
}  # fmt: skip
"""Host to the small model of it."""
CLASSES = ("cat", "dog", "octopus")
SIZES = {"resnet": 0.05}
"""Size of the perturbation of models that amplify it; 0.3 for the others."""
CLIP = "export_test_clip"


def open_small(kind: str, folder: Path) -> Classifier:
    """A classifier with seeded random weights. `folder`: for the files of the model."""
    if kind == "clip":
        return open_classifier(clip_name(folder), CLASSES, weights="none", seed=1)
    path = folder / kind
    if kind == "dinov2":
        return open_classifier(f"hf:{path if path.is_dir() else transformers_folder(folder, kind)}", CLASSES, seed=1)
    return open_classifier(str(path if path.is_dir() else model_folder(folder, kind)), CLASSES, seed=1)


def clip_name(folder: Path) -> str:
    """Name of a small open_clip model, whose config is added to open_clip's."""
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 24, "layers": 1, "head_width": 12},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / f"{CLIP}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{CLIP}.json")
    return f"open_clip:{CLIP}"


@dataclass(frozen=True)
class TrainedMethod:
    """One method on a classifier, with perturbed parameters.

    Args:
        merges: True if each adapter has a weight form at its site.
        source: what is exported. `pixels`: two normalized images. `logits`: of the attached model.
        change: largest difference to the logits without the method.
    """

    method: str
    merges: bool
    source: ExportSource
    pixels: Tensor
    logits: Tensor
    change: float


@contextmanager
def trained(classifier: Classifier, method: str) -> Iterator[TrainedMethod]:
    """Attaches a method at its default sites, or those of them at which it merges, if there are any, and trains a fresh head.

    Raises:
        UnsupportedSite: the method does not support the model.
    """
    with ExitStack() as stack:
        attached = [_attach(classifier, method, stack)]
        if classifier.fresh and not any(a.replaces and s.role == "head" for s, a in attached[0].parts.values()):
            attached.append(attach(classifier.model, "linear_probe"))
            stack.callback(attached[-1].detach)
        for seed, attachment in enumerate(attached):
            perturb(attachment, seed, SIZES.get(Path(classifier.name).name, 0.3))
        pixels = torch.randn(2, *classifier.data["input_size"], generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            logits: Tensor = classifier.model(pixels)
            with attached[0].enabled(False):
                change = float((logits - classifier.model(pixels)).abs().max())
        merges = all(merges_at(*part) for attachment in attached for part in attachment.parts.values())
        source = ExportSource(classifier, EvalView(classifier.data).config)
        yield TrainedMethod(method, merges, source, pixels, logits, change)


def _attach(classifier: Classifier, method: str, stack: ExitStack) -> Attachment:
    config = methods.get(method).examples()[0]
    torch.manual_seed(0)
    try:
        attachment = attach(classifier.model, config)
    except (SelectionError, UnsupportedSite):  # no default site, or one of a width that the method does not support
        attachment = attach(classifier.model, config, where=_usable_sites(classifier, config))
    merging = [name for name, part in attachment.parts.items() if merges_at(*part)]
    if merging and len(merging) < len(attachment.parts):
        attachment.detach()
        attachment = attach(classifier.model, config, where=tuple(f"name:{name}" for name in merging))
    stack.callback(attachment.detach)
    return attachment


def _usable_sites(classifier: Classifier, config: Method) -> tuple[str, ...]:
    """A selection of all sites before the head that the method builds an adapter for.

    Raises:
        UnsupportedSite: there are none.
    """
    usable = []
    for site in sites(classifier.model):
        if supports(config, site) and site.role != "head" and not getattr(site, "fused", False):
            with suppress(ValueError):
                config.build(site)
                usable.append(f"name:{site.name}")
    if not usable:
        raise UnsupportedSite(f"{config.name}: no site", method=config.name)
    return tuple(usable)


def trained_methods(classifier: Classifier) -> Iterator[TrainedMethod]:
    """Every method that supports a classifier, one after the other."""
    for method in compatible_methods(classifier.name):
        if method == "zero_shot" or methods.get(method).keeps_head:
            continue
        with ExitStack() as stack:
            try:
                case = stack.enter_context(trained(classifier, method))
            except UnsupportedSite:
                continue
            yield case


def relative(difference: float, logits: Tensor) -> float:
    """A difference as a share of the largest logit."""
    return difference / float(logits.abs().max())


def run_timm(folder: Path, pixels: Tensor) -> Tensor:
    """Logits of a folder by timm alone."""
    import timm

    with torch.no_grad():
        logits: Tensor = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(pixels)
    return logits


def run_open_clip(folder: Path, pixels: Tensor) -> Tensor:
    """Logits of a folder by open_clip and its class embeddings alone."""
    import open_clip
    from safetensors.torch import load_file

    clip: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    weight = load_file(folder / "class_embeddings.safetensors")["weight"]
    with torch.no_grad():
        features = clip.encode_image(pixels)
        logits: Tensor = clip.logit_scale.exp() * features / features.norm(dim=-1, keepdim=True) @ weight.T
    return logits


def run_onnx(file: Path, pixels: Tensor) -> Tensor:
    """Logits of a file by onnxruntime alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
