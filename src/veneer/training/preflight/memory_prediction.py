"""Predicted memory of a run from the configs of its base model, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.base_models.devices import resolve_dtype
from veneer.base_models.quantization import parse_quantize, resolve_components
from veneer.injection import Attachment
from veneer.injection.attachment.quantized_sites import weight_form_error
from veneer.injection.errors import OptionError
from veneer.injection.method import Method
from veneer.injection.seams.seam_choice import acts_in_calls
from veneer.injection.sites import WeightSite

from .. import attach_methods, prepare_base
from ..concepts.concept import concepts_of, token_options
from ..data.dataset_tables import dataset_tables
from ..families import Family
from ..personalization_config import PersonalizeConfig
from .estimates import size
from .memory_parts import count_training_step, passes_of, phase_peaks, training_bytes, vae_bytes
from .meta_family import meta_family
from .packed_linear import PackedLinear, pack_linears, weight_bytes


@dataclass(frozen=True)
class MemoryPrediction:
    """Predicted bytes of a run on a device, by what they are for.

    Args:
        weights: component to the bytes of its weights. `formats`: component to its dtype or kind.
        denoiser: name of the component that the adapters train on.
        adapters: bytes of the adapters. `values`: number of trainable parameters.
        training: gradients, optimizer state, EMA weights and copies. `activations`: of a step beyond the gradients.
        encoding, decoding: what the VAE allocates for a photo and for an image.
        loading: bytes in host memory of all components in the dtype of the run, before any is quantized.
        offloads: whether the encoders leave the device once their outputs are cached.
        resolution: side in pixels, a multiple of `multiple`. `batch`: images per micro-batch.
        checkpointing: whether the run uses gradient checkpointing.
    """

    weights: Mapping[str, int]
    formats: Mapping[str, str]
    denoiser: str
    adapters: int
    values: int
    training: int
    activations: int
    encoding: int
    decoding: int
    loading: int
    offloads: bool
    resolution: int
    multiple: int
    batch: int
    checkpointing: bool

    @property
    def encoders(self) -> int:
        """Bytes of the VAE and the text encoders."""
        return sum(self.weights.values()) - self.denoisers

    @property
    def denoisers(self) -> int:
        """Bytes of the denoiser, with both experts of a model that has two."""
        return sum(count for name, count in self.weights.items() if name.startswith(self.denoiser))

    def phases(self, offloads: bool | None = None) -> dict[str, int]:
        """Peak bytes on the device of each phase. `offloads`: in place of the run's."""
        resident = self.denoisers + self.adapters
        parts = self.training, self.activations, self.encoding, self.decoding
        return phase_peaks(resident, self.encoders, *parts, offloads=self.offloads if offloads is None else offloads)

    @property
    def peak(self) -> int:
        """Peak bytes on the device in the whole run."""
        return max(self.phases().values())

    def rows(self) -> list[tuple[str, str, int]]:
        """(what, format, bytes) of each part, and of the peak of each phase, for training with and without offloading."""
        other = self.phases(not self.offloads)["training"]
        label = "training, encoders on the device" if self.offloads else "training, encoders offloaded"
        ways = "gradient checkpointing" if self.checkpointing else "no gradient checkpointing"
        return [
            *((name, self.formats[name], count) for name, count in self.weights.items()),
            (f"adapters, {self.values:,} parameters", "float32", self.adapters),
            ("gradients, optimizer, copies", "", self.training),
            (f"activations, {ways}", "", self.activations),
            ("VAE encoding a photo", "", self.encoding),
            ("VAE decoding an image", "", self.decoding),
            *((f"peak, {phase}", "", count) for phase, count in self.phases().items() if count),
            (f"peak, {label}", "", other),
            ("host memory while loading", "", self.loading),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{what:40}{form:>12}{size(count):>12}" for what, form, count in self.rows())


class MemoryPredictor:
    """Predictions for variants of a run, which share the counts of activations.

    Args:
        device: `cuda` or `cpu`: the default dtype is bfloat16 on the former, and encoders are offloaded from it.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        self._counts: dict[tuple[Any, ...], tuple[int, int, int]] = {}
        self._weights: dict[str, tuple[MemoryPrediction, bool]] = {}

    def predict(self, config: PersonalizeConfig, limit: int | None = None) -> MemoryPrediction:
        """The prediction for a config with defaults (`with_defaults`).

        Args:
            limit: bytes above which activations are not counted, and are 0: the rest alone exceeds them.
        Raises:
            OptionError: a component or a kind that does not exist, a GGUF file, or a resolution that is not divisible.
            BaseModelError: a base model without configs on this machine.
        """
        same = repr(replace(config, resolution=None, batch=None, gradient_checkpointing=False, offload_encoders=True))
        if limit is not None and same in self._weights:
            known, text_trains = self._weights[same]
            rest = replace(known, offloads=self._offloads(config, text_trains))
            if rest.peak > limit:
                return replace(rest, resolution=config.resolution or known.resolution, **_variant(config))
        dtype = resolve_dtype(config.dtype, self.device)
        kind = meta_family(config.base, dtype)
        parts = {name: part for name, part in kind.pipe.components.items() if isinstance(part, nn.Module)}
        loading = sum(map(weight_bytes, parts.values()))
        kinds = _quantized(config, list(parts))
        for component, name in kinds.items():
            pack_linears(parts[component], name)
        weights = {name: weight_bytes(part) for name, part in parts.items()}
        trainable, passes = _attach(config, kind)
        text_trains = any(p.requires_grad for tower in kind.text_towers.values() for p in tower.parameters())
        resolution = _resolution(config, kind)
        values = sum(p.numel() for p in trainable)
        rest = MemoryPrediction(
            weights=weights,
            formats={name: kinds.get(name, str(dtype).removeprefix("torch.")) for name in weights},
            denoiser=kind.denoiser,
            adapters=sum(map(weight_bytes, parts.values())) - sum(weights.values()),
            values=values,
            training=training_bytes(values, config.loop()),
            activations=0,
            encoding=0,
            decoding=0,
            loading=loading,
            offloads=self._offloads(config, text_trains),
            resolution=resolution,
            multiple=kind.multiple,
            **_variant(config),
        )
        self._weights.setdefault(same, (replace(rest, resolution=kind.resolution), text_trains))
        if limit is not None and rest.peak > limit:
            return rest
        key = (dtype, tuple(sorted(kinds.items())), resolution, rest.batch, config.gradient_checkpointing)
        if key not in self._counts:
            steps = count_training_step(kind, trainable, resolution, rest.batch, config.mixed_precision, flops=False)
            self._counts[key] = (passes * max(0, steps.activations - 4 * values), *vae_bytes(kind, resolution))
        activations, encoding, decoding = self._counts[key]
        return replace(rest, activations=activations, encoding=encoding, decoding=decoding)

    def _offloads(self, config: PersonalizeConfig, text_trains: bool) -> bool:
        """As `personalize` decides it, if the photos and captions fit into the cache."""
        varied = config.shuffle_tags or config.tag_dropout > 0 or config.crop != "center"
        return config.offload_encoders and self.device != "cpu" and config.cache and not text_trains and not varied


def _variant(config: PersonalizeConfig) -> dict[str, Any]:
    has_class_images = config.class_images or any(table.regularization for table in dataset_tables(config))
    return {"batch": (config.batch or 1) * (2 if has_class_images else 1), "checkpointing": config.gradient_checkpointing}


def _quantized(config: PersonalizeConfig, components: list[str]) -> dict[str, str]:
    """Component to the name of its kind."""
    resolved = resolve_components(parse_quantize(config.quantize or None, config.mixed_precision), components)
    kinds: dict[str, str] = {}
    for component, kind in resolved.items():
        if isinstance(kind, Path):
            message = f"check: {kind} is a GGUF file, whose memory is not predicted; expected a kind, such as nf4."
            raise OptionError(message, option="quantize", where=component, given=str(kind), expected="kind")
        kinds[component] = kind.name
    return kinds


def _attach(config: PersonalizeConfig, kind: Family) -> tuple[list[Tensor], int]:
    """Attaches the methods of the run as `personalize` does. Returns the trainable parameters, and the passes of a batch."""
    tokens, words = token_options(concepts_of(config))
    methods = attach_methods.build_methods(config.method, config.options, tokens or "<toy>", words or "toy")
    where = {m.name: config.where for m in methods if config.where and not attach_methods.trains_token_embeddings(m)}
    methods = [_without_tokenizer(method) for method in methods]
    attached = attach_methods.attach_all(kind.pipe, methods, where, config.text_encoder, config.seed)
    for each in attached:
        _reject_weight_forms(each)
    if config.gradient_checkpointing:
        prepare_base.checkpoint_towers(kind.pipe, attached)
    return [p for each in attached for p in each.parameters() if p.requires_grad], passes_of(attached)


def _without_tokenizer(method: Method) -> Method:
    """The method with ids for its tokens, because the base model is built without tokenizers."""
    if not attach_methods.trains_token_embeddings(method):
        return method
    options: dict[str, Any] = {"ids": tuple(range(len(method.names))), "initialize": ""}  # type: ignore[attr-defined]
    return replace(method, **options)


def _reject_weight_forms(attached: Attachment) -> None:
    """Checks that no adapter computes the weight of a layer that the run quantizes.

    Raises:
        UnsupportedSite: as `attach` raises it in the run.
    """
    for site, adapter in attached.parts.values():
        if not isinstance(site, WeightSite) or acts_in_calls(site, adapter):
            continue
        if isinstance(layer := attached.towers[site.component].get_submodule(site.path), PackedLinear):
            raise weight_form_error(site, attached.method, layer.kind)


def _resolution(config: PersonalizeConfig, kind: Family) -> int:
    sides = [side for table in dataset_tables(config) for side in table.resolution or (kind.resolution,)]
    resolution = max(sides)  # datasets without sides have that of the run
    if resolution < 1 or resolution % kind.multiple:
        message = f"check: resolution is {resolution}; expected a multiple of {kind.multiple}."
        raise OptionError(message, option="resolution", given=resolution, expected=kind.multiple)
    return resolution
