"""Study the attention heads of a classifier or of a diffusion model."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.atomic_files import write_json
from veneer.attention_heads import AttentionLayer, attention_layers
from veneer.attention_heads.denoiser import record_calls
from veneer.attention_heads.plots import write_importance, write_maps, write_words
from veneer.attention_heads.study import HeadReport, mean_maps, study_heads
from veneer.base_models import preset
from veneer.base_models.devices import resolve_device
from veneer.base_models.loading import load_on_device
from veneer.classification.data.labeled_images import Source
from veneer.classification.data.loader import ImageLoader
from veneer.classification.data.sources import open_source
from veneer.classification.data.split_files import load_splits
from veneer.classification.objectives.single_label import SINGLE_LABEL
from veneer.classification.predict import Predictor, open_predictor
from veneer.injection import OptionError
from veneer.training.data.image_io import DataError
from veneer.training.families import family
from veneer.training.report.bars import show_bar
from veneer.training.report.run_folder import new_folder

__all__ = ["AnalyzeHeadsConfig", "analyze_heads"]

LISTED = 5
OF_CLASSIFIERS = ("images", "batch")
OF_DENOISERS = ("prompts", "timesteps", "steps", "seed")


@dataclass(frozen=True)
class AnalyzeHeadsConfig:
    """Configuration of `veneer analyze heads` and its defaults.

    Args:
        model: run folder of `veneer transfer` with one task and one label per image (of a frozen model: `--method linear_probe`),
            or a diffusion model: `bundled`, a diffusers folder, a .safetensors file or a hub name.
        data: of a run folder, required: labeled images of its classes, as for `veneer transfer`. The validation images of the
            run or of the data are measured; without validation images, all images.
        prompts: of a diffusion model: prompts to generate with (default: the first two of its preset).
        images: of a run folder: images to measure, at most; the same number of each class as far as possible.
        batch: of a run folder: images per forward pass.
        timesteps: of a diffusion model: timesteps per prompt at which the denoiser is measured, at least 1.
        steps: of a diffusion model: denoising steps of the generation that has these timesteps (default: the model's).
        seed: of a diffusion model: seed of the generation.
        device: device such as `cuda` (default: a GPU if there is one).
        out: folder for the results (default: `runs/` and the name of the model).
    """

    model: str
    data: str | None = None
    prompts: tuple[str, ...] = ()
    images: int = 256
    batch: int = 64
    timesteps: int = 3
    steps: int | None = None
    seed: int = 0
    device: str | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("images", "batch", "timesteps"):
            if (value := getattr(self, name)) < 1:
                raise OptionError(f"{name} is {value}; expected at least 1.", option=name, given=value, expected=1)


@dataclass(frozen=True)
class _Study:
    layers: Sequence[AttentionLayer]
    maps: dict[str, Tensor]
    whole: dict[str, float]
    reports: list[HeadReport]
    measurement: str
    words: Sequence[str] = ()
    image: Any = None


def analyze_heads(config: AnalyzeHeadsConfig) -> Iterator[str]:
    """Classifies the pattern of each head, disables each one, and writes `heads.json`, `importance.png` and `maps.png`.

    A classifier is measured by accuracy and loss, a diffusion model by the relative change of its prediction, and `words.png`
    shows where its image reads each word of the first prompt.

    Raises:
        HeadsError: the model has no attention heads, or computes them in a way that cannot be studied.
        OptionError: a classifier without data, with prompts or with several labels for each image. DataError: no labeled
            images of its classes.
    """
    is_classifier = (Path(config.model) / "model.json").is_file()
    if is_classifier and config.data is None:
        message = f"{config.model} is a classifier; expected labeled images after it."
        raise OptionError(message, option="data", given=None, expected="a folder of CLASS/IMAGE")
    if not is_classifier and config.data is not None:
        message = f"data is {config.data!r}, but {config.model} is no run folder of veneer transfer. Use --prompts, or check it."
        raise OptionError(message, option="data", given=config.data, expected=None)
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in (OF_DENOISERS if is_classifier else OF_CLASSIFIERS) and value != field.default:
            message = f"--{field.name} has no effect on {config.model}, a {'classifier' if is_classifier else 'diffusion model'}."
            raise OptionError(message, option=field.name, given=value, expected=field.default)
    out = config.out or new_folder(Path("runs"), f"{Path(config.model).name}-heads")
    study = _study_classifier(config) if is_classifier else _study_denoiser(config)
    out.mkdir(parents=True, exist_ok=True)
    record = {"model": config.model, "measurements": study.whole, "heads": [report.as_dict() for report in study.reports]}
    write_json(out / "heads.json", record)
    write_importance(study.layers, study.reports, study.measurement, out / "importance.png")
    if study.maps:
        write_maps(study.layers, study.maps, study.reports, out / "maps.png")
    if study.words:
        write_words(study.layers, study.maps, study.words, study.image, out / "words.png")
    yield from _lines(config, study, is_classifier)
    yield f"in {out}: {', '.join(sorted(file.name for file in out.iterdir()))}"
    if is_classifier:
        yield f"prune heads: veneer transfer {shlex.quote(str(config.data))} --method head_pruning --keep 0.75"


def _study_classifier(config: AnalyzeHeadsConfig) -> _Study:
    predictor = open_predictor(Path(config.model), resolve_device(config.device))
    if predictor.objective is not SINGLE_LABEL:
        message = f"{config.model} gives an image several labels; expected a classifier with one label for each image."
        raise OptionError(message, option="model", given=config.model, expected="one label for each image")
    layers = attention_layers(predictor.classifier.model)
    batches = list(_batches(predictor, config))

    def measure() -> dict[str, float]:
        logits = torch.cat([predictor.logits(pixels.to(predictor.device)).cpu() for pixels, _ in batches])
        labels = torch.cat([labels for _, labels in batches])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return {"accuracy": float((logits.argmax(1) == labels).double().mean()), "loss": float(loss)}

    maps = mean_maps(layers, measure)
    whole, reports = study_heads(layers, maps, measure, progress=_bar())
    return _Study(layers, maps, whole, reports, "accuracy")


def _batches(predictor: Predictor, config: AnalyzeHeadsConfig) -> Iterator[tuple[Tensor, Tensor]]:
    source = open_source(config.data)
    if source.classes != predictor.classifier.classes:
        message = f"{config.data} has the classes {', '.join(source.classes)}; expected those of {config.model}."
        expected = predictor.classifier.classes
        raise DataError(message, file=config.data, where="classes", given=source.classes, expected=expected)
    indices = _in_turn(source, _validation(source, Path(config.model)))[: config.images]
    with ImageLoader(source, predictor.view) as loader:
        yield from loader.batches(indices, config.batch)


def _validation(source: Source, run: Path) -> Sequence[int]:
    """The validation images: those of the run if it was trained on this data, else all images of the split or of the data."""
    if (file := run / "splits.json").is_file():
        try:
            return load_splits(file, source).validation
        except DataError:
            pass  # other data
    marked = [index for index, example in enumerate(source.examples) if example.split == "validation"]
    return marked or range(len(source))


def _in_turn(source: Source, indices: Sequence[int]) -> list[int]:
    """The first image of each class, then the second, and so on."""
    seen: Counter[int] = Counter()
    ranks = []
    for index in indices:
        label = source.examples[index].label
        ranks.append((seen[label], label, index))
        seen[label] += 1
    return [index for _, _, index in sorted(ranks)]


def _study_denoiser(config: AnalyzeHeadsConfig) -> _Study:
    device = resolve_device(config.device)
    pipe = load_on_device(config.model, device, None, ())
    layers = attention_layers(pipe)
    settings = preset(config.model)
    prompts = config.prompts or settings.unrelated[:2]
    if not prompts:
        message = f"{config.model} has no preset with prompts. Pass --prompts."
        raise OptionError(message, option="prompts", given=(), expected="at least one prompt")
    images: list[Any] = []

    def generate() -> None:
        for prompt in prompts:
            generator = torch.Generator("cpu").manual_seed(config.seed)
            steps = config.steps or settings.steps
            images.extend(family(pipe).generate([prompt], [generator], num_inference_steps=steps))

    recorded = record_calls(layers[0].tower, generate, config.timesteps * len(prompts))
    maps = mean_maps(layers, recorded.run)
    whole, reports = study_heads(layers, maps, recorded.change, progress=_bar())
    return _Study(layers, maps, whole, reports, "change", _words(pipe, prompts[0]), images[0])


def _words(pipe: Any, prompt: str) -> list[str]:
    """The text of each token of a prompt; empty if the pipeline has no CLIP tokenizer."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return []
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt, truncation=True).input_ids)
    return [str(token).replace("</w>", "") for token in tokens]


def _lines(config: AnalyzeHeadsConfig, study: _Study, is_classifier: bool) -> Iterator[str]:
    counts = Counter(report.pattern.name for report in study.reports if report.pattern)
    patterns = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    yield f"{len(study.reports)} heads in {len(study.layers)} layers: {patterns}"
    if is_classifier:
        yield f"accuracy with all heads: {study.whole['accuracy']:.1%}"
    way = next(iter(study.reports[0].changes))
    worst_first = sorted(study.reports, key=lambda report: _harm(report, way, study.measurement), reverse=True)
    yield f"most important heads (disabled: {way}):"
    yield from (_line(report, way, study.measurement) for report in worst_first[:LISTED])
    if is_classifier:
        better = [report for report in reversed(worst_first) if _harm(report, way, "accuracy") < 0]
        yield f"heads without which accuracy is higher: {len(better)}"
        yield from (_line(report, way, "accuracy") for report in better[:LISTED])


def _harm(report: HeadReport, way: str, measurement: str) -> float:
    change = report.changes[way][measurement]
    return -change if measurement == "accuracy" else change


def _line(report: HeadReport, way: str, measurement: str) -> str:
    change = report.changes[way][measurement]
    pattern = report.pattern.name if report.pattern else "no map"
    shown = f"{100 * change:+.1f} points of accuracy" if measurement == "accuracy" else f"prediction changes by {change:.1%}"
    return f"  {report.layer} head {report.head}: {shown}, {pattern}"


def _bar() -> Callable[[int, int], None]:
    return lambda done, total: show_bar(sys.stderr, "disabling heads", done, total, "passes")
