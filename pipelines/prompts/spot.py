"""Initialize a prompt from the most similar ones of a library."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from veneer.pipelines.transfer import transfer

from veneer.atomic_files import write_json
from veneer.classification.config import TransferConfig
from veneer.injection import OptionError
from veneer.prompt_transfer import average_prompts, average_similarity, read_library, token_similarity, write_prompt
from veneer.training.report.run_folder import new_folder, run_folder

__all__ = ["SpotConfig", "spot"]


@dataclass(frozen=True)
class SpotConfig:
    """Configuration of `veneer prompts spot` and its defaults.

    Args:
        files: the library: adapter files or run folders of other tasks, of one model and one method with prompts alone: `vpt`,
            `coop` or `prompt_tuning`.
        data: labeled images of the task, as for `veneer transfer`, or `digits`; required.
        model: the model of the library, as for `veneer transfer`; required.
        weights: a .safetensors file for the model, or `none` for random weights (default: the published weights).
        steps: optimizer steps on the task, whose prompt is then compared with the library.
        top: number of the most similar prompts whose average, weighted by similarity, is the initial prompt; 1 is the most
            similar one.
        learning_rate: learning rate of these steps (default: the method's).
        shots: training images per class (default: all).
        batch: images per step.
        seed: seed of all random numbers; that of the library, if its prompts began at the same values.
        workers: threads that read images; 0 uses one per core.
        out: folder for the results (default: a new one under `runs`).
    """

    files: tuple[Path, ...]
    data: str
    model: str
    weights: str | None = None
    steps: int = 100
    top: int = 1
    learning_rate: float | None = None
    shots: int | None = None
    batch: int = 32
    seed: int = 0
    workers: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        if not self.files:
            raise OptionError("files are missing; expected prompts of other tasks.", option="files", given=(), expected=1)
        for name in ("steps", "batch"):
            if (value := getattr(self, name)) < 1:
                raise OptionError(f"{name} is {value}; expected at least 1.", option=name, given=value, expected=1)
        if not 1 <= self.top <= len(self.files):
            message = f"top is {self.top}; expected 1 to {len(self.files)}, the number of files."
            raise OptionError(message, option="top", given=self.top, expected=len(self.files))


def spot(config: SpotConfig) -> Iterator[str]:
    """Ranks a library by similarity to a prompt that is trained for a few steps, and writes the initial prompt of the task.

    The folder then has `adapter.safetensors`, for `veneer transfer --init-from`, and `result.json`.

    Source: Vu et al., SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer, ACL 2022, section 4: cosine of average
    tokens, then the best prompt or the weighted average of the k best. Not here: training from each of the k best, and one prompt
    on a mixture of all tasks.
    Raises:
        OptionError: invalid options, or similarities whose sum is not above 0. LoadError, StoredPromptError: files without
            prompts, or of several models or methods. DataError: no labeled images.
    """
    library = read_library(config.files)
    out = run_folder(config.out or new_folder(Path("runs"), f"{Path(config.data).name}-spot"), resume=False)
    entry = library[0].entry
    run = TransferConfig(
        data=config.data, model=config.model, weights=config.weights, method=entry["method"], where=tuple(entry["where"]),
        options={entry["method"]: dict(entry["config"])}, steps=config.steps, learning_rate=config.learning_rate,
        shots=config.shots, batch=config.batch, seed=config.seed, workers=config.workers, keep_epoch="last", out=out / "task",
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        (task,) = read_library([transfer(run)])
    read_library([*config.files, out / "task"])  # the model and the shapes are those of the library
    similarity = [average_similarity(each.prompts, task.prompts) for each in library]
    ranks = sorted(range(len(library)), key=lambda index: -similarity[index])
    rows = [
        f"{config.files[index]}: average tokens {similarity[index]:.4f}, "
        f"tokens {token_similarity(library[index].prompts, task.prompts):.4f}"
        for index in ranks
    ]
    yield from rows
    best = ranks[: config.top]
    weights = [similarity[index] for index in best]
    if config.top > 1 and min(weights) <= 0:
        message = f"top is {config.top}, but only {sum(weight > 0 for weight in weights)} prompts have a similarity above 0."
        raise OptionError(message, option="top", given=config.top, expected="prompts with a similarity above 0")
    state = average_prompts([library[index] for index in best], weights if config.top > 1 else [1.0])
    files = [str(config.files[index]) for index in best]
    write_prompt(out, library[0], state, {"model": config.model, "data": config.data})
    record = {"similarity": dict(zip(map(str, config.files), similarity, strict=True)), "chosen": files}
    write_json(out / "result.json", record | {"config": json.loads(json.dumps(asdict(config), default=str))})
    yield f"initial prompt of {' and '.join(files)} in {out}"
    model = shlex.join([config.model, *(("--weights", config.weights) if config.weights else ())])
    command = f"veneer transfer {shlex.quote(config.data)} --model {model} --method {entry['method']}"
    yield f"train it: {command} --init-from {shlex.quote(str(out))}"
