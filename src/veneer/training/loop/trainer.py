"""Training loop with exact resume, for any loss over indexed samples, on one or several processes.

There is no data loader: the loss function fetches the samples of a step by their rows, and all randomness is a function of
(seed, step, sample). So the state of a run is the weights, the optimizer state, the EMA weights, the fp16 gradient scale, the
loss history, the elapsed time, the number of processes and the step.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..report.bars import close_bar
from ..report.progress import WINDOW, Pace, Progress, ProgressFile, peak_memory, reset_peak_memory
from ..report.result import TrainResult
from ..report.tracking import tracking
from . import optimizers
from .checkpoints import CheckpointError, Checkpoints, CheckpointWarning, State, copy_into
from .config import TrainConfig
from .disk_space import Reserve, is_full
from .distributed import broadcast_start, on_main
from .divergence import Diverged, LastGood, write_last_good
from .ema import EMA
from .errors import TrainError
from .optimizer_step import Gradients, LossStep
from .stop_signals import StopFlag

if TYPE_CHECKING:
    from .sharded_base import ShardedBase

__all__ = ["Diverged", "LossStep", "TrainConfig", "TrainError", "TrainResult", "Trainer"]

LAST_FILES = 5
"""Size of the files at the end of a run, in multiples of the weights: a checkpoint with Adam's moments, and two adapter files."""


class Trainer:
    """Trains tensors with a loss over indexed samples.

    Args:
        config: settings of the loop.
        groups: parameter groups, `{"params": [...], "lr_scale": 1.0, "name": "unet"}`.
        loss_step: `loss_step(step, rows)` returns the mean loss over the samples `rows` of step `step`, a scalar with gradient.
            `rows` are positions in the global batch, 0 … `config.samples - 1`; (step, row) identifies a sample of the run,
            whatever the number of processes. Its randomness must depend on (seed, step, row) only; torch's global generator
            is seeded with (seed, step, first row) before each call, for dropout. It runs under autocast.
        named: all trainable tensors by name, and other tensors that change in training (such as batch statistics), as saved in
            checkpoints; EMA applies to the parameters among them.
        folder: folder of checkpoints, tracker logs and `progress.jsonl`; without a folder, no files are written.
        identity: further settings that must match on resume (method, digests of the images), as JSON values.
        accelerator: device and processes (default: a new one). The tensors must be on its device.
        base: the base model in the loss and in previews, if it is sharded.
        after_step: `after_step(step, steps)` is called on every process after each update, before the gradients are cleared,
            with the number of finished steps and of all steps. Tensors that it changes must be in `named`.
        on_step: called after each step with a `Progress`, on the main process.
        on_preview: called with the number of finished steps, every `config.preview_every` steps, on the main process, with the
            EMA weights if EMA is enabled.

    Raises:
        TrainError: a parameter that is missing in `named`, does not require a gradient or is not float32.
    """

    def __init__(
        self,
        config: TrainConfig,
        groups: Sequence[optimizers.ParameterGroup],
        loss_step: LossStep,
        named: Mapping[str, Tensor],
        folder: Path | None = None,
        *,
        identity: Mapping[str, Any] | None = None,
        accelerator: Accelerator | None = None,
        base: ShardedBase | None = None,
        after_step: Callable[[int, int], None] | None = None,
        on_step: Callable[[Progress], None] | None = None,
        on_preview: Callable[[int], object] | None = None,
    ) -> None:
        self.config, self.after_step, self.on_step, self.on_preview, self.base = config, after_step, on_step, on_preview, base
        self.accelerator = accelerator or Accelerator()
        group_parameters = [list(group["params"]) for group in groups]
        groups = [{**group, "params": params} for group, params in zip(groups, group_parameters, strict=True)]
        self.parameters = [parameter for params in group_parameters for parameter in params]
        self.named = dict(named)
        self.trained = optimizers.names_of(self.parameters, self.named)
        rate, decay = config.learning_rate, config.weight_decay
        self.optimizer = optimizers.build(config.optimizer, groups, rate, decay, config.optimizer_args)
        self.gradients = Gradients(config, self.accelerator, loss_step, self.parameters, self.optimizer, base is not None)
        self.ema = EMA(self.trained, config.ema, config.ema_warmup) if config.ema else None
        self.folder = None if folder is None else Path(folder)
        self._file = None if self.folder is None else ProgressFile(self.folder / "progress.jsonl")
        settings = {**config.identity(), "groups": optimizers.group_settings(groups), **(identity or {})}
        settings |= {} if after_step is None else {"steps": config.steps}
        self.checkpoints = None if folder is None else Checkpoints(Path(folder), settings, config.keep_checkpoints)
        self.step, self.losses, self.seconds = 0, list[float](), 0.0
        self._resumed_from, self._last_saved, self._warnings = 0, -1, list[str]()
        self._stop, self._last_good = StopFlag(), LastGood(self._tensors())
        weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.named.values())
        self._reserve = None if folder is None else Reserve(Path(folder), LAST_FILES * weight_bytes + 2**21)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    def stop(self) -> None:
        """Stops the run after the current step and writes a checkpoint; may be called from any thread and from callbacks."""
        self._stop.requested = True

    def averaged(self) -> AbstractContextManager[None]:
        """Context manager that uses the EMA weights, or the weights for evaluation of a Schedule-Free optimizer."""
        return self.ema.swapped() if self.ema else optimizers.evaluation_weights(self.optimizer, self.parameters)

    def fit(self, resume: bool = False, accept: Collection[str] = ()) -> TrainResult:
        """Trains to the last step, or until SIGINT, SIGTERM or `stop`, which finish the step and write a checkpoint.

        A second SIGINT raises KeyboardInterrupt. If a checkpoint cannot be written, `CheckpointWarning` is issued and the run
        continues. Disk space for the last files is reserved during training.

        Args:
            resume: True resumes bitwise from the newest valid checkpoint in `folder`, or starts from scratch if there is none.
            accept: settings that may differ from the checkpoint's, such as `learning_rate`; another type of optimizer starts
                with a new state.

        Raises:
            CheckpointError: the checkpoints belong to another run or are all corrupt, or they exist and `resume` is False.
            Diverged: a loss or gradient is not finite. The weights of the last finite loss are restored first.
        """
        self._load_checkpoint(resume, accept)
        optimizers.start_training(self.optimizer)
        try:
            return self._run()
        finally:
            close_bar()
            if self._reserve is not None and self.accelerator.is_main_process:
                self._reserve.release()

    def _run(self) -> TrainResult:
        reset_peak_memory(self.device)
        pace = Pace()
        with tracking(self.config.tracker, self.folder, asdict(self.config), self.step) as record, self._stop:
            stopping = False
            if self._reserve is not None and self.accelerator.is_main_process:
                self._reserve.take()
            while self.step < self.config.steps and not stopping:
                start = time.monotonic()
                stopping, norm = self._train_step()
                self.seconds += time.monotonic() - start
                self._report(norm, pace, record)
                self._save_if_due(stopping)
        return self._result(stopped=self.step < self.config.steps)

    def _load_checkpoint(self, resume: bool, accept: Collection[str]) -> None:
        """Restores the newest checkpoint if there is one, and broadcasts the tensors to all processes."""
        if self.checkpoints is not None:
            state = on_main(self.accelerator, lambda: self._newest_state(resume, accept))
            if state is not None:
                self._restore(state)
        broadcast_start(self.accelerator, self._tensors())

    def _newest_state(self, resume: bool, accept: Collection[str]) -> State | None:
        assert self.checkpoints is not None
        self.checkpoints.clean()
        if resume:
            return self.checkpoints.newest(accept)
        if steps := self.checkpoints.steps():
            raise CheckpointError(
                f"{self.checkpoints.folder} has checkpoints (newest: step {steps[-1]}). Resume the run, delete them, or choose "
                "another folder.",
                file=self.checkpoints.folder,
                where="steps",
                given=steps[-1],
            )
        return None

    def _train_step(self) -> tuple[bool, float]:
        """Runs one optimizer step. Returns whether a stop was requested, and the gradient norm."""
        step = self.step
        rate = optimizers.base_rate(self.config.optimizer, self.config.learning_rate) * self.config.rate(step)
        optimizers.set_rates(self.optimizer, rate)
        loss, stop, norm = self.gradients.compute(step, self._stop.requested)
        if not math.isfinite(loss):
            raise self._diverged("loss", loss, rate, self._last_good.restore(step))
        if self.gradients.fatal(norm):
            raise self._diverged("gradient", norm, rate, step)
        self._last_good.save(step)
        after_step = self.after_step
        self.gradients.apply(step, norm, None if after_step is None else lambda: after_step(step + 1, self.config.steps))
        if self.ema:
            self.ema.update(step)
        self.losses.append(loss)
        self.step += 1
        return stop, norm

    def _diverged(self, where: str, given: float, rate: float, restored_step: int) -> Diverged:
        self.gradients.clear()
        file, newest = None, None
        if self._reserve is not None and self.accelerator.is_main_process:
            self._reserve.release()
        if self.folder is not None and self.accelerator.is_main_process:
            file = write_last_good(self.folder, self.named)
        if self.checkpoints is not None and (steps := self.checkpoints.steps()):
            newest = self.checkpoints.path(steps[-1])
        return Diverged(self.step, where, given, rate, restored_step, file, newest)

    def _report(self, norm: float, pace: Pace, record: Callable[[Mapping[str, float], int], None]) -> None:
        config, recent = self.config, self.losses[-WINDOW:]
        rate = float(self.optimizer.param_groups[0]["lr"])
        remaining, memory = pace.left(config.steps - self.step), peak_memory(self.device)
        smoothed = sum(recent) / len(recent)
        event = Progress(self.step, config.steps, recent[-1], smoothed, rate, norm, self.seconds, remaining, memory)
        if self.accelerator.is_main_process:
            if self.step % config.log_every == 0 or self.step == config.steps:
                record({"loss": event.loss, "loss_smoothed": smoothed, "learning_rate": rate, "gradient_norm": norm}, self.step)
            for callback in (self._file, self.on_step):
                if callback is not None:
                    callback(event)
        if self.on_preview and config.preview_every and self.step % config.preview_every == 0:
            on_main(self.accelerator, partial(self._preview, self.on_preview), self.base)

    def _preview(self, preview: Callable[[int], object]) -> None:
        """Calls `preview` with the EMA weights; a full disk does not end the run."""
        try:
            with self.averaged(), torch.no_grad():
                preview(self.step)
        except OSError as error:
            if not is_full(error):
                raise
            self._warnings.append(f"the preview of step {self.step} was not written: the disk is full")
            warning = CheckpointWarning(self._warnings[-1], where="preview", given=error.errno)
            warnings.warn(warning, stacklevel=2)

    def _save_if_due(self, stopping: bool) -> None:
        """Writes a checkpoint if one is due: at the interval, at the end if there is an interval, and when stopping."""
        every = self.config.checkpoint_every
        due = every and (self.step % every == 0 or self.step == self.config.steps)
        checkpoints = self.checkpoints
        if checkpoints is None or not (due or stopping):
            return
        try:
            on_main(self.accelerator, lambda: self._save(checkpoints, stopping or self.step == self.config.steps))
            self._last_saved = self.step
        except CheckpointError as error:
            self._warnings.append(str(error))
            warning = CheckpointWarning(str(error), where=error.where, given=error.given, file=error.file)
            warnings.warn(warning, stacklevel=3)

    def _save(self, checkpoints: Checkpoints, last: bool) -> None:
        """Writes a checkpoint; the last of a run may use the reserved disk space."""
        try:
            checkpoints.save(self._state())
        except CheckpointError as error:
            if not last or self._reserve is None or not is_full(error):
                raise
            self._reserve.release()
            checkpoints.save(self._state())

    def _tensors(self) -> list[Tensor]:
        return [*self.named.values(), *(self.ema.averages.values() if self.ema else ())]

    def _state(self) -> State:
        optimizer_tensors, optimizer_values = optimizers.pack(self.optimizer, self.trained)
        tensors = {
            "weights": self.named,
            "optimizer": optimizer_tensors,
            "history": {"losses": torch.tensor(self.losses, dtype=torch.float64)},
        }
        if self.ema:
            tensors["ema"] = self.ema.averages
        values = {"optimizer": optimizer_values, "scaler": self.gradients.scaler.state_dict(), "seconds": self.seconds}
        values["processes"] = self.accelerator.num_processes
        return State(self.step, tensors, values)

    def _restore(self, state: State) -> None:
        copy_into(self.named, state.tensors["weights"], "weights")
        optimizers.unpack(self.optimizer, self.trained, state.tensors["optimizer"], state.values["optimizer"])
        if self.ema:
            weights = {name: state.tensors["weights"][name] for name in self.ema.averages}
            copy_into(self.ema.averages, state.tensors.get("ema", weights), "averaged weights")
        if state.values["scaler"] and self.gradients.scaler.is_enabled():
            self.gradients.scaler.load_state_dict(state.values["scaler"])
        self.losses = state.tensors["history"]["losses"].tolist()
        self.seconds = state.values["seconds"]
        self.step = self._resumed_from = self._last_saved = state.step

    def _result(self, stopped: bool) -> TrainResult:
        newest = None if self.checkpoints is None or self._last_saved < 0 else self.checkpoints.path(self._last_saved)
        memory, losses, notes = peak_memory(self.device), list(self.losses), list(self._warnings)
        return TrainResult(self.step, losses, self.seconds, memory, stopped, self._resumed_from, newest, notes)
