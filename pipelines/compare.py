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
from veneer.classification.data.benchmark_layouts import coop_classes
from veneer.classification.data.run_data import Data, open_data
from veneer.classification.data.transforms import Augmentation
from veneer.classification.data.unlabeled import check_unlabeled
from veneer.classification.models.loading import is_clip_name
from veneer.classification.protocols.base_to_new import SHOTS as BASE_TO_NEW_SHOTS
from veneer.classification.protocols.base_to_new import base_and_new, check_generalization
from veneer.classification.protocols.base_to_new_table import base_to_new_page, summarize_base_to_new
from veneer.classification.protocols.benchmark_tasks import COOP, PROTOCOLS, SHOTS, Protocol
from veneer.classification.protocols.few_shot import check_shots, few_shot_data
from veneer.classification.protocols.few_shot_files import write_base_to_new, write_few_shot
from veneer.classification.protocols.protocol_table import TaskRun, protocol_page, summarize, task_runs
from veneer.classification.protocols.row_runs import SearchData, run_rows
from veneer.classification.protocols.task_data import open_task
from veneer.classification.train.comparison import MethodRow, RunMetrics, parse_rows
from veneer.classification.train.method_rows import with_baseline
from veneer.injection import OptionError
from veneer.training.loop.optimizer_options import OptimizerOptions
from veneer.training.report.run_folder import discard_unused, new_folder

__all__ = ["CompareConfig", "compare"]

DEFAULTS = {"epochs": 20, "batch": 32, "first_seed": 0}
"""Values of options that a protocol may set."""
OF_SPLITS = ("validation", "test", "split_seed", "multi_label")
"""Options without effect on the data of a protocol."""


@dataclass(frozen=True)
class CompareConfig(OptimizerOptions):
    """Configuration of `veneer compare` and its defaults.

    Args:
        data: image folder (`CLASS/IMAGE`, or `train/CLASS/IMAGE` and so on), a CSV of path, label and optionally split, a
            dataset of Hugging Face (folder or hub name) with such files, or `digits` of scikit-learn (default: digits).
        multi_label: images may have several labels, separated by `;` or `|` in the label column of a table or in a JSON list; one
            sigmoid per class, mean average precision instead of accuracy.
        protocol: `none`, or `vtab-1k`, `fgvc` or `coop` for all tasks of the benchmark in the folder `data`, with its splits,
            preprocessing and selection.
        base_to_new: train on the first half of the classes, in alphabetical order or that of the protocol coop, and test on
            these and on the other, new classes. Needs a CLIP, and methods without parameters of the trained classes; 16 `shots`
            by default, a sample for each seed. Not with the protocols vtab-1k and fgvc.
        model: a timm name or folder, `hf:` and a folder or hub name of a vision model of transformers, such as
            `hf:facebook/dinov2-base`, `bundled` (the image encoder of the bundled CLIP), or for methods that use class names,
            such as `coop`, `bundled_clip` or `open_clip:NAME/TAG`, such as `open_clip:ViT-B-32/laion2b_s34b_b79k`.
        weights: a .safetensors file for the model, or `none` for random weights (default: the published weights).
        methods: rows of the table: methods, with options in parentheses, or joined by `+`, all in quotes: `'lora,
            adaptformer(bottleneck=8), vpt+lora'`. `linear_probe`, `full` (all weights) and `scratch` (all weights, randomly
            initialized) are rows like any other.
        seeds: runs per row, on the same splits (but see `shots`), each with its own initialization, order and augmentation.
        baseline: also run the baseline of the table: `linear_probe`, or `zero_shot` for a CLIP.
        lp_ft: LP-FT: initialize a new head with a logistic regression on the frozen features, then fine-tune; best in short
            runs.
        shots: training images per class (default: all; 1 2 4 8 16 with the protocol coop). Several numbers: few-shot curves, each
            seed with its own training images and min(shots, 4) validation images per class; `search` runs once per method, on the
            largest number with the first seed.
        unlabeled: images without labels, which `pet` and `ppt` need: an image, a folder, or a list of paths.
        validation: share of the images for the validation split, which selects the epoch, 0 to 1; not used if the data has one.
        test: share of the images for the test split, which is evaluated at the end, 0 to 1; not used if the data has one.
        split_seed: seed of the validation and test splits.
        steps: optimizer steps of a run, instead of `epochs`; with several `shots`, the same number of steps for each.
        epochs: passes over the training images (default: 20, or the protocol's).
        batch: images per micro-batch (default: 32, or the protocol's).
        learning_rate: peak learning rate of all rows (default: each method's, such as 0.001 for lora).
        weight_decay: decoupled weight decay of all trained parameters.
        schedule: learning-rate schedule: `constant`, `cosine`, `cosine_with_restarts`, `linear`, `polynomial` or `rex`.
        warmup: share of the steps with linear warmup before the schedule, 0 to 1.
        label_smoothing: share of the target that is spread over all classes, 0 to 1.
        class_weights: weights of the classes in the loss: `none`, or `balanced`, in inverse proportion to their training images.
        mixup: alpha of mixup, typically 0.2; 0 disables it.
        cutmix: alpha of CutMix, typically 1; 0 disables it. With both, each pair of images gets one of them.
        ema: decay of an exponential moving average of the trained weights, such as 0.999; the average is evaluated and saved; 0
            disables it.
        augment: `none`, `light` (random crop), `flip` (also horizontal flips, except of `digits`) or `strong` (also RandAugment
            and random erasing).
        squash: resize to a square that ignores the aspect ratio, without a crop, as VTAB does.
        size: side of the images in pixels (default: the model's).
        mixed_precision: autocast of the forward pass to this dtype; `no` disables it.
        search: candidates of the search for learning rate and adapter scale per row, by successive halving on the validation
            split with the first seed; 7 are rates of three decades; 0 disables it.
        search_epochs: passes over the training images per candidate; this budget is shared by all rounds of the search.
        keep_epoch: epoch whose weights are evaluated: `best` by validation accuracy, or `last`.
        first_seed: the first of the seeds (default: 0, or 1 with the protocol coop).
        workers: threads that read images; 0 uses one per core.
        out: folder for all results (default: a new one under `runs`). With the folder of an earlier comparison, only its
            missing runs are trained.
    """

    data: str | None = None
    multi_label: bool = False
    protocol: Literal["none", "vtab-1k", "fgvc", "coop"] = "none"
    base_to_new: bool = False
    model: str = "bundled"
    weights: str | None = None
    methods: str = "lora, adaptformer, vpt, ssf, bitfit"
    seeds: int = 3
    baseline: bool = True
    lp_ft: bool = False
    shots: tuple[int, ...] = ()
    unlabeled: Path | None = None
    validation: float = 0.1
    test: float = 0.15
    split_seed: int = 0
    steps: int | None = None
    epochs: int | None = None
    batch: int | None = None
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
    keep_epoch: Literal["best", "last"] = "best"
    first_seed: int | None = None
    workers: int = 0
    out: Path | None = None

    def with_defaults(self) -> CompareConfig:
        """The config with the defaults and the settings of its protocol, if it has one.

        Raises:
            OptionError: an option that the protocol sets or does not use has another value.
        """
        protocol = PROTOCOLS.get(self.protocol)
        check_shots(self.shots)
        if protocol is not None:
            self._check_protocol(protocol)
        if self.base_to_new and protocol not in (COOP, None):
            message = f"base_to_new: the protocol {self.protocol} has no new classes. Pass --protocol coop, or leave it out."
            raise OptionError(message, option="base_to_new", given=self.protocol, expected="coop")
        defaults = DEFAULTS if protocol is None else protocol.defaults
        changes: dict[str, Any] = {"shots": BASE_TO_NEW_SHOTS} if self.base_to_new and not self.shots else {}
        changes |= {name: value for name, value in defaults.items() if getattr(self, name) is None}
        changes |= {} if protocol is None else protocol.settings
        return dataclasses.replace(self, **changes)

    def _check_protocol(self, protocol: Protocol) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        expected = {**{name: defaults[name] for name in OF_SPLITS}, **protocol.settings}
        expected |= {} if protocol is COOP else {"shots": ()}
        for name, value in expected.items():
            given = getattr(self, name)
            if given not in (value, defaults[name]):
                flag = f"--{name.replace('_', '-')}"
                message = f"{name} is {given}; expected {value} with the protocol {protocol.name}. Leave out {flag}."
                raise OptionError(message, option=name, given=given, expected=value)
        if self.data in (None, "digits"):
            message = f"data is {self.data or 'not set'}; expected the folder with the tasks of {protocol.name}."
            raise OptionError(message, option="data", given=self.data, expected="folder")

    @property
    def samples_by_seed(self) -> bool:
        """True if each seed samples its own images of the dataset."""
        return self.protocol == "none" and (len(self.shots) > 1 or self.base_to_new)

    def shared(self) -> TransferConfig:
        """The options that all methods share. Where each seed samples its own images, they are those of all images."""
        names = {f.name for f in dataclasses.fields(TransferConfig)} & {f.name for f in dataclasses.fields(self)}
        shared: dict[str, Any] = {name: getattr(self, name) for name in names - {"out", "shots"}}
        shots = self.shots[0] if len(self.shots) == 1 and not self.samples_by_seed else None
        return TransferConfig(method="linear_probe", seed=self.first_seed or 0, resume=True, shots=shots, **shared)


def compare(config: CompareConfig, accelerator: Accelerator | None = None) -> Path:
    """Runs the methods and seeds without results in the folder, and writes `results.json`, `compare.md` and `accuracy.png`.

    With a protocol, these files are in a folder for each task, and `protocol.json` and `protocol.md` have the table of all tasks.
    With several numbers of shots they are in a folder for each number and seed, and `few_shot.json`, `few_shot.md` and
    `few_shot.png` have the curves; with `base_to_new` and no protocol `base_to_new.json` and `base_to_new.md` have the table.

    Returns:
        The folder with the results.
    Raises:
        VeneerError: invalid configuration or data. KeyboardInterrupt: stopped; finished runs are kept, and a second call resumes
            the interrupted run from its checkpoint.
    """
    accelerator = accelerator or Accelerator(cpu=not torch.accelerator.is_available())
    config = config.with_defaults()
    if config.seeds < 1:
        raise OptionError(f"seeds is {config.seeds}; expected at least 1.", option="seeds", given=config.seeds, expected=1)
    baseline = ("zero_shot" if is_clip_name(config.model) else "linear_probe") if config.baseline else ""
    rows = parse_rows(with_baseline(config.methods, baseline))
    out = config.out or new_folder(Path("runs"), f"compare-{Path(config.data).name if config.data else 'digits'}")
    base = config.shared()
    base.check_training_options()
    check_unlabeled(config.unlabeled, [name for row in rows for name in dataclasses.replace(base, method=row.method).names()])
    if config.base_to_new:
        check_generalization(config.model, rows)
    with discard_unused(out):
        out.mkdir(parents=True, exist_ok=True)
        if config.protocol != "none":
            return _run_protocol(config, PROTOCOLS[config.protocol], rows, out, accelerator)
        for row in rows:
            dataclasses.replace(base, method=row.method, shots=max(config.shots, default=None)).check_multi_label()
        data = open_data(base, out)
        for note in data.notes:
            print(f"note: {note}", flush=True)
        page = _run_samples(config, rows, out, accelerator, data) if config.samples_by_seed else out / "compare.md"
        if not config.samples_by_seed:
            _run(config, rows, out, accelerator, data, SearchData(data))
        print(page.read_text(encoding="utf-8"))
        return out


def _run_samples(config: CompareConfig, rows: list[MethodRow], out: Path, accelerator: Accelerator, data: Data) -> Path:
    """Runs the rows with every number of shots and seed, whose samples differ, and writes the table after each seed.

    Returns:
        The table.
    """
    first, runs, page = config.first_seed or 0, dict[int, list[RunMetrics]](), out
    search = SearchData(_sample(config, data, max(config.shots), first)[0], out / "search", first)
    for seed in range(first, first + config.seeds):
        for count in config.shots:
            sample, new = _sample(config, data, count, seed)
            each = dataclasses.replace(config, shots=(count,), first_seed=seed, seeds=1)
            notes = [f"note: {note}" for note in sample.notes]
            print(f"{count} shots, seed {seed}: {len(sample.splits.train):,} training images", *notes, sep="\n", flush=True)
            measured = _run(each, rows, out / f"{count}-shots-{seed}", accelerator, sample, search, new)
            runs.setdefault(count, []).extend(measured)
        page = (write_few_shot if new is None else write_base_to_new)(asdict(config), data, runs, out)
    return page


def _sample(config: CompareConfig, data: Data, shots: int, seed: int) -> tuple[Data, Data | None]:
    """Images of a few-shot sample, and those of new classes if they are tested."""
    sample = few_shot_data(data, shots, seed)
    return base_and_new(sample, data.classes) if config.base_to_new else (sample, None)


def _run_protocol(config: CompareConfig, protocol: Protocol, rows: list[MethodRow], out: Path, accelerator: Accelerator) -> Path:
    """Runs the rows on every task of a protocol, and writes the table after each."""
    about = f"{config.model}, {config.epochs} epochs, batch size {config.batch}, {config.seeds} seeds, test accuracy in %."
    runs: list[TaskRun] = []
    for task, folder in protocol.tasks(Path(config.data or ".").expanduser()).items():
        for each, name in _task_configs(config, protocol, task):
            count, new = next(iter(each.shots), None), None
            search, data = open_task(protocol, folder, count, each.first_seed or 0)
            if config.base_to_new:
                data, new = base_and_new(data, coop_classes(folder))
                search = data
            print(f"{name}: {len(data.splits.train):,} training, {len(data.splits.test):,} test images", flush=True)
            each = dataclasses.replace(each, data=str(folder))
            runs += task_runs(task, count, _run(each, rows, out / name, accelerator, data, SearchData(search), new))
            summary, page = (summarize_base_to_new, base_to_new_page) if new else (summarize, protocol_page)
            records = summary(protocol, runs)
            write_json(out / "protocol.json", {"config": asdict(config), "table": records})
            write_atomically(out / "protocol.md", (page(protocol, records, about) + "\n").encode())
    print((out / "protocol.md").read_text(encoding="utf-8"))
    return out


def _task_configs(config: CompareConfig, protocol: Protocol, task: str) -> list[tuple[CompareConfig, str]]:
    """Configs of a task and their folders: one, or one for each number of shots and seed if the seed samples the images."""
    if protocol is not COOP:
        return [(config, task)]
    shots = config.shots or SHOTS
    first, kind = config.first_seed or 0, "base-to-new-" if config.base_to_new else ""
    return [
        (dataclasses.replace(config, shots=(count,), first_seed=seed, seeds=1), f"{task}/{kind}{count}-shots-{seed}")
        for count in shots
        for seed in range(first, first + config.seeds)
    ]


def _run(
    config: CompareConfig, rows: list[MethodRow], out: Path, accelerator: Accelerator, data: Data, search: SearchData,
    new: Data | None = None,
) -> list[RunMetrics]:  # fmt: skip
    """Runs the rows with all seeds on one dataset. `new`: images of new classes."""
    first, metric = config.first_seed or 0, data.objective.short
    return run_rows(
        config.shared(), rows, range(first, first + config.seeds), data, out, accelerator, record=asdict(config), search=search,
        on_run=lambda run: print(run.summary(metric), flush=True), new=new,
    )  # fmt: skip
