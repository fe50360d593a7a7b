"""Transfer a soft prompt to another task or another model."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from veneer.pipelines.transfer import transfer

from veneer.atomic_files import write_json
from veneer.base_models.devices import resolve_device
from veneer.classification.config import TransferConfig
from veneer.classification.data.run_data import Views, open_data
from veneer.classification.models.loading import is_clip_name, open_classifier
from veneer.classification.report.artifacts import write_files
from veneer.classification.train.batches import ClassifyingLoss, Order, logits_of
from veneer.injection import OptionError, attach
from veneer.prompt_transfer import (
    ProjectorOptions,
    SoftPrompt,
    average_similarity,
    model_identity,
    models_of,
    prompt_of,
    read_soft_prompt,
    token_similarity,
    transfer_to_model,
)
from veneer.training.loop.seeds import mix
from veneer.training.report.run_folder import new_folder, run_folder

__all__ = ["PromptTransferConfig", "transfer_prompt"]

METHOD = "prompt_tuning"


@dataclass(frozen=True)
class PromptTransferConfig:
    """Configuration of `veneer prompts transfer` and its defaults.

    Args:
        file: the prompt: an adapter file or run folder of `prompt_tuning` or `coop` on a CLIP, with one prompt for all classes.
        to: the other model, or the prompt's own for another task; required: `bundled_clip` or `open_clip:NAME/TAG`.
        data: labeled images of the task, as for `veneer transfer`, or `digits`; required.
        weights: a .safetensors file for the model, or `none` for random weights (default: the published weights).
        distance: prompts of further tasks that were trained on both models, SOURCE=TARGET, each an adapter file or run folder:
            the projector minimizes the squared distance of the projected prompts to those of the other model, without images.
        projector: `projector.safetensors` of an earlier transfer between the two models, or its folder, instead of training one:
            for a task that it has not seen.
        hidden: hidden units of the projector.
        by_token: project each token alone; otherwise all tokens together, which has more parameters.
        steps: optimizer steps of the projector.
        learning_rate: learning rate of the projector.
        epochs: passes over the training images of two comparison runs, from the transferred and from a random prompt; 0 leaves
            them out.
        shots: training images per class (default: all).
        batch: images per step.
        seed: seed of all random numbers.
        workers: threads that read images; 0 uses one per core.
        device: device such as `cuda` for the projector (default: a GPU if there is one).
        out: folder for the results (default: a new one under `runs`).
    """

    file: Path
    to: str
    data: str
    weights: str | None = None
    distance: tuple[str, ...] = ()
    projector: Path | None = None
    hidden: int = 768
    by_token: bool = False
    steps: int = 300
    learning_rate: float = 1e-3
    epochs: int = 10
    shots: int | None = None
    batch: int = 32
    seed: int = 0
    workers: int = 0
    device: str | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if not is_clip_name(self.to):
            message = (
                f"to is {self.to}; expected a model of class names, which needs no trained head: bundled_clip or open_clip:…."
            )
            raise OptionError(message, option="to", given=self.to, expected="bundled_clip or open_clip:NAME/TAG")
        for name, least in (("hidden", 1), ("steps", 1), ("epochs", 0), ("batch", 1)):
            if (value := getattr(self, name)) < least:
                raise OptionError(f"{name} is {value}; expected at least {least}.", option=name, given=value, expected=least)
        if not 0 < self.learning_rate < float("inf"):
            message = f"learning_rate is {self.learning_rate}; expected finite and above 0."
            raise OptionError(message, option="learning_rate", given=self.learning_rate, expected="above 0")
        if self.distance and self.projector is not None:
            message = "distance trains a projector, and projector reads one; leave out one of --distance and --projector."
            raise OptionError(message, option="projector", given=str(self.projector), expected=None)
        for pair in self.distance:
            if not all(pair.partition("=")):
                message = f"distance has {pair!r}; expected SOURCE=TARGET, such as runs/pets-small=runs/pets-large."
                raise OptionError(message, option="distance", given=pair, expected="SOURCE=TARGET")

    def run(self, name: str, source: SoftPrompt, out: Path, initial: Path | None = None) -> TransferConfig:
        """A run of `prompt_tuning` on the task. `name`: of its folder in `out`. `initial`: its initial prompt."""
        return TransferConfig(
            data=self.data, model=self.to, weights=self.weights, method=METHOD, where=source.where, shots=self.shots,
            options={METHOD: {"tokens": len(source.vectors)}}, epochs=max(1, self.epochs), batch=self.batch, seed=self.seed,
            workers=self.workers, init_from=initial, out=out / name,
        )  # fmt: skip

    def projector_options(self) -> ProjectorOptions:
        """The options of the projector."""
        return ProjectorOptions(self.distance, self.projector, self.hidden, self.by_token, self.steps, self.learning_rate)


def transfer_prompt(config: PromptTransferConfig) -> Iterator[str]:
    """Writes the prompt on the other model, measures it, and compares it with a random prompt as the initial one.

    The folder then has `adapter.safetensors` of `prompt_tuning` and `model.json`, which `veneer predict` and
    `veneer transfer --init-from` read, `projector.safetensors` if there is a projector, and `result.json`.

    Raises:
        OptionError: invalid options. LoadError, StoredPromptError: files that are no prompts or projectors, or of other models.
        DataError: no labeled images.
    """
    source = read_soft_prompt(config.file)
    out = run_folder(config.out or new_folder(Path("runs"), f"{Path(config.file).stem}-transfer"), resume=False)
    line, record = _transfer(config, source, out)
    yield line
    names = {"transferred": "transferred", "random": "random", "none": "no"}
    yield "test accuracy: " + ", ".join(f"{text} prompt {record['test'][name]:.1%}" for name, text in names.items())
    if config.epochs:
        record |= _compare_initial(config, source, record["validation"]["transferred"], out)
        average, tokens = record["similarity"]
        yield f"similarity to the prompt that is trained from random: average tokens {average:.4f}, tokens {tokens:.4f}"
        start, random = record["steps"]["transferred"], record["steps"]["random"]
        reached = "not reached" if start is None else f"after {start} steps ({random - start} steps saved)"
        goal = f"validation accuracy {record['goal']:.1%}"
        yield f"as the initial prompt: {goal} {reached}; from a random prompt after {random} steps"
    write_json(out / "result.json", record | {"config": json.loads(json.dumps(asdict(config), default=str))})
    yield f"in {out}: {', '.join(sorted(file.name for file in out.iterdir()))}"
    model = shlex.join([config.to, *(("--weights", config.weights) if config.weights else ())])
    command = f"veneer transfer {shlex.quote(config.data)} --model {model} --method {METHOD}"
    yield f"train it further: {command} --init-from {shlex.quote(str(out))}"


def _transfer(config: PromptTransferConfig, source: SoftPrompt, out: Path) -> tuple[str, dict[str, Any]]:
    """Projects the prompt, writes it, and measures it beside a random one and none."""
    run = config.run("", source, out)
    data = open_data(run, out)
    classifier = open_classifier(config.to, data.classes, weights=config.weights, seed=config.seed)
    device = torch.device(resolve_device(config.device))
    model, base = classifier.model.to(device), model_identity(classifier.model)
    record: dict[str, Any] = {"test": {}, "validation": {}}
    with Views(data, classifier.data, run.augment, seed=config.seed, workers=config.workers) as views:

        def measure(name: str) -> None:
            for split, scores in record.items():
                logits, labels = logits_of(model, views.batches(split, config.batch), device)
                scores[name] = data.objective.metrics(logits, labels).score

        measure("none")
        torch.manual_seed(mix(config.seed, "adapters", METHOD))
        attached = attach(model, METHOD, where=source.where, tokens=len(source.vectors))
        measure("random")
        loss = ClassifyingLoss(
            model, views.train, Order(data.splits.train, config.seed), config.batch, views.train.prefetch, device=device,
            objective=data.objective,
        )  # fmt: skip
        torch.manual_seed(mix(config.seed, "projector"))
        rows = list(range(config.batch))
        projector, line = transfer_to_model(
            source, prompt_of(attached), base, config.projector_options(), lambda step: loss(step, rows)
        )
        measure("transferred")
    if projector is not None:
        projector.save(out, models_of(source, base))
    write_files(run, data, classifier, [attached], out)
    return line, record


def _compare_initial(config: PromptTransferConfig, source: SoftPrompt, before: float, out: Path) -> dict[str, Any]:
    """Trains from the transferred and from a random prompt: steps until the best validation accuracy of the latter.

    Args:
        before: validation accuracy with the transferred prompt.
    """
    curves: dict[str, list[tuple[int, float]]] = {"random": [], "transferred": [(0, before)]}
    for name, curve in curves.items():
        with contextlib.redirect_stdout(sys.stderr):
            folder = transfer(config.run(name, source, out, None if name == "random" else out))
        epochs = json.loads((folder / "result.json").read_text(encoding="utf-8"))["epochs"]
        curve += [(epoch["step"], epoch["val_accuracy"]) for epoch in epochs]
    prompts = [{"": read_soft_prompt(folder).vectors} for folder in (out, out / "random")]
    goal = max(score for _, score in curves["random"])
    steps = {name: next((step for step, score in curve if score >= goal), None) for name, curve in curves.items()}
    return {"similarity": [average_similarity(*prompts), token_similarity(*prompts)], "goal": goal, "steps": steps}
