"""Compare methods on one dataset, with the same images, splits, budget and schedule, over several seeds."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from veneer.atomic_files import write_atomically, write_json
from veneer.base_models.devices import Precision
from veneer.classification.config import TransferConfig
from veneer.classification.data.run_data import Views, open_data
from veneer.classification.data.transforms import Augmentation
from veneer.classification.models.loading import is_clip_name, open_classifier
from veneer.classification.report.comparison_table import summarize_runs, table, verdict, write_accuracy_plot
from veneer.classification.train.comparison import Comparison, MethodRow, parse_rows
from veneer.injection import OptionError
from veneer.training.loop.optimizer_options import OptimizerOptions
from veneer.training.report.run_folder import discard_unused, new_folder

__all__ = ["CompareConfig", "compare"]


@dataclass(frozen=True)
class CompareConfig(OptimizerOptions):
    """Configuration of `veneer compare` and its defaults.

    Args:
        data: an image folder (`CLASS/images`, also below `train`, `validation`, `test`), a CSV of path and label, a Hugging Face
            dataset folder, or `digits` of scikit-learn (default: digits).
        model: `bundled` (the image encoder of the bundled CLIP), a timm name, or `bundled_clip` or `open_clip:NAME/TAG` for
            methods that use texts.
        weights: a safetensors file for the model, or `none` for random weights (default: the published weights).
        methods: rows, separated by commas, such as `lora, adaptformer(bottleneck=8), vpt+lora`. `linear_probe`, `full` (all
            weights) and `scratch` (all weights, randomly initialized) are rows like any other.
        seeds: runs per row, on the same splits, each with its own initialization, order and augmentation.
        baseline: also run `linear_probe`, or `zero_shot` for a CLIP, with which the table compares.
        lp_ft: LP-FT: initialize a fresh head with a logistic regression on the frozen features, then fine-tune.
        shots: training images per class (default: all).
        validation: share of the images in the validation split, which selects the epoch, if the data has no such split; 0 to 1.
        test: share of the images in the test split, which is evaluated at the end, if the data has no such split; 0 to 1.
        split_seed: seed of these splits.
        epochs: passes over the training images.
        batch: images per micro-batch.
        learning_rate: peak learning rate of all rows (default: each method's).
        weight_decay: decoupled weight decay.
        schedule: learning-rate schedule: `constant`, `cosine`, `cosine_with_restarts`, `linear`, `polynomial` or `rex`.
        warmup: share of the steps with linear warmup, 0 to 1.
        label_smoothing: share of the target that is spread over all classes, 0 to 1.
        class_weights: weights of the classes in the loss: `none`, or `balanced`, in inverse proportion to their training images.
        mixup: alpha of mixup, typically 0.2; 0 disables it.
        cutmix: alpha of CutMix, typically 1; 0 disables it. With both, each pair of images gets one of them.
        ema: decay of an exponential moving average of the weights, which is what is evaluated and saved; 0 disables it.
        augment: `none`, `light` (random crop), `flip` (also horizontal flips, if the data allows them) or `strong` (also
            RandAugment and random erasing).
        squash: resize to the exact side without a crop, as VTAB does.
        size: side of the images in pixels (default: the model's).
        mixed_precision: autocast dtype: `no` (float32), `bf16` or `fp16`.
        search: candidates of the search for learning rate and adapter scale per row, by successive halving on the validation
            split with the first seed; 7 are rates of three decades; 0 disables it.
        search_epochs: passes over the training images per candidate; this budget is shared by all rounds of the search.
        first_seed: the first of the seeds.
        workers: threads that read images; 0 uses one per core.
        out: folder for all results (default: a new one under `runs`). A second run with the same folder adds the missing runs.
    """

    data: str | None = None
    model: str = "bundled"
    weights: str | None = None
    methods: str = "lora, adaptformer, vpt, ssf, bitfit"
    seeds: int = 3
    baseline: bool = True
    lp_ft: bool = False
    shots: int | None = None
    validation: float = 0.1
    test: float = 0.15
    split_seed: int = 0
    epochs: int = 20
    batch: int = 32
    learning_rate: float | None = None
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.1
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    augment: Augmentation = "flip"
    squash: bool = False
    size: int | None = None
    mixed_precision: Precision = "no"
    search: int = 0
    search_epochs: int = 3
    first_seed: int = 0
    workers: int = 0
    out: Path | None = None

    def shared(self) -> TransferConfig:
        """The options that all methods share."""
        names = {f.name for f in dataclasses.fields(TransferConfig)} & {f.name for f in dataclasses.fields(self)}
        shared: dict[str, Any] = {name: getattr(self, name) for name in names - {"out"}}
        return TransferConfig(method="linear_probe", seed=self.first_seed, resume=True, **shared)


def compare(config: CompareConfig, accelerator: Accelerator | None = None) -> Path:
    """Runs the methods and seeds without results in the folder, and writes `results.json`, `compare.md` and `accuracy.png`.

    Returns:
        The folder with the results.
    Raises:
        VeneerError: invalid configuration or data. KeyboardInterrupt: stopped; finished runs are kept, and a second call resumes
            the interrupted run from its checkpoint.
    """
    accelerator = accelerator or Accelerator(cpu=not torch.accelerator.is_available())
    if config.seeds < 1:
        raise OptionError(f"seeds is {config.seeds}; expected at least 1.", option="seeds", given=config.seeds, expected=1)
    rows = parse_rows(_with_baseline(config))
    out = config.out or new_folder(Path("runs"), f"compare-{Path(config.data).name if config.data else 'digits'}")
    base = config.shared()
    base.check_training_options()
    with discard_unused(out):
        return _run(config, base, rows, out, accelerator)


def _run(config: CompareConfig, base: TransferConfig, rows: list[MethodRow], out: Path, accelerator: Accelerator) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    data = open_data(base, out)
    for note in data.notes:
        print(f"note: {note}", flush=True)
    classifier = open_classifier(base.model, data.classes, weights=base.weights, size=base.size, seed=base.seed)
    with Views(data, classifier.data, base.augment, squash=base.squash, workers=base.workers) as views:
        comparison = Comparison(base, views, classifier, out, accelerator)
        for seed in range(config.first_seed, config.first_seed + config.seeds):
            for row in rows:
                measured = comparison.run(row, seed)
                print(
                    f"{row.label}, seed {seed}: test accuracy {measured.test_accuracy:.1%}, validation accuracy "
                    f"{measured.val_accuracy:.1%}",
                    flush=True,
                )
                _write(config, comparison, out)
    print((out / "compare.md").read_text(encoding="utf-8"))
    return out


def _with_baseline(config: CompareConfig) -> str:
    """The methods, with the baseline prepended if it is enabled and missing."""
    baseline = "zero_shot" if is_clip_name(config.model) else "linear_probe"
    missing = config.baseline and baseline not in [row.label for row in parse_rows(config.methods)]
    return f"{baseline}, {config.methods}" if missing else config.methods


def _write(config: CompareConfig, comparison: Comparison, out: Path) -> None:
    """Writes the results so far."""
    runs, data = comparison.done, comparison.views.data
    known = list(dict.fromkeys(m.row for m in runs))
    lines = summarize_runs(runs, known)
    splits = data.splits
    write_json(
        out / "results.json",
        {
            "config": asdict(config),
            "data": {"where": data.source.where, "classes": list(data.classes), "split_digest": splits.digest},
            "model": {"name": comparison.classifier.name, "weights": comparison.classifier.weights},
            "search": comparison.searches(),
            "runs": [asdict(m) for m in runs],
        },
    )
    title = f"{config.model} on {Path(data.source.where).name}"
    counts = f"{len(splits.train):,} training, {len(splits.validation):,} validation and {len(splits.test):,} test images"
    page = [
        f"# {title}",
        "",
        f"{len(data.classes)} classes; {counts}. {config.epochs} epochs, batch size {config.batch}, augmentation "
        f"{config.augment}. ± is half a 95 % interval over seeds (Student's t); differences are paired by seed.",
        "",
        table(lines),
        "",
        *verdict(lines),
        "",
    ]
    write_atomically(out / "compare.md", "\n".join(page).encode())
    write_accuracy_plot(lines, title, out / "accuracy.png")
