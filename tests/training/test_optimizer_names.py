"""Every optimizer by name: exact resume from a checkpoint, other spellings, arguments, modes, and what is rejected."""

from __future__ import annotations

import importlib.util

import bitsandbytes.optim
import pytest
import timm.optim
import torch
from torch import nn

from tests.raising import raises, warns
from veneer.injection.errors import MissingExtra
from veneer.training.loop import optimizers
from veneer.training.loop.config import TrainConfig
from veneer.training.loop.errors import TrainError
from veneer.training.loop.optimizers import OptimizerWarning, base_rate, build, catalog, names
from veneer.training.loop.optimizers.catalog import BUILT_IN, REJECTED, canonical_name, load_class
from veneer.training.loop.trainer import Trainer

NEEDS_GPU = tuple(name for name in timm.optim.list_optimizers() if name.startswith(("bnb", "fused")))
"""timm builds optimizers of bitsandbytes and apex on a GPU only; those of bitsandbytes have names of their own for any device."""
MISSING = tuple(name for name, entry in BUILT_IN.items() if importlib.util.find_spec(entry.module.partition(".")[0]) is None)
"""Optimizers of packages that are not installed."""
KRONS = ("kron", "kronc", "kronw")
"""They need opt_einsum, and are tested with small parameters."""
HERE = [name for name in names() if name not in (*NEEDS_GPU, *MISSING, *KRONS)]
PATHS = ["torch.optim.Rprop", "torch.optim.NAdam", "timm.optim.Adafactor", "schedulefree.AdamWScheduleFreePaper"]
PAGED = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")


def tensors(side=96):
    """Parameters of 0 to 4 dimensions; the matrix is large enough for a state of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (side, side // 2), "bias": (side,), "kernel": (4, 3, 3, 3), "sequence": (3, 2, 5), "scale": ()}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def trainer_of(parameters, name, folder=None, **options):
    def loss(step, rows):
        generator = torch.Generator().manual_seed(100 + step)
        return sum(((p - torch.randn(p.shape, generator=generator)) ** 2).sum() for p in parameters.values()) / 100

    callbacks = {key: options.pop(key) for key in ("on_step", "on_preview") if key in options}
    config = TrainConfig(**{"steps": 6, "optimizer": name, "learning_rate": 1e-2, "tracker": "none", "warmup": 2, **options})
    first, *others = parameters.values()
    groups = [{"params": [first], "name": "matrix"}, {"params": others, "name": "others", "lr_scale": 0.5, "weight_decay": 0.0}]
    return Trainer(config, groups, loss, parameters, folder, **callbacks)


def run_in_parts(name, folder, side=96, **options):
    """The parameters after a stop at step 3, and a resume in a new trainer with new parameters."""
    first = tensors(side)
    stopping = trainer_of(first, name, folder, on_step=lambda event: event.step == 2 and stopping.stop(), **options)
    assert stopping.fit().stopped
    second = tensors(side)
    assert trainer_of(second, name, folder, **options).fit(resume=True).resumed_from == 3
    return second


@pytest.mark.parametrize("name", [*HERE, *PATHS])
@PAGED
def test_every_optimizer_resumes_exactly(name, tmp_path):
    whole = tensors()
    trainer_of(whole, name).fit()
    parts = run_in_parts(name, tmp_path)
    for key, start in tensors().items():
        assert not torch.equal(whole[key], start), f"{key} is not trained"
        assert whole[key].isfinite().all()
        assert torch.equal(whole[key], parts[key]), key


@pytest.mark.parametrize("name", KRONS)
@pytest.mark.filterwarnings("ignore:It is highly recommended to have .opt_einsum.:UserWarning")
def test_kron_resumes_exactly_with_its_random_generator(name, tmp_path, monkeypatch):
    """Random numbers scale its weight decay."""
    monkeypatch.setattr(catalog, "LIBRARIES", {})
    load_class.cache_clear()
    options = {"optimizer_args": {"stochastic_weight_decay": "true"}, "weight_decay": 0.5}
    whole = tensors(4)
    trainer_of(whole, name, **options).fit()
    parts = run_in_parts(name, tmp_path, 4, **options)
    load_class.cache_clear()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not any(torch.equal(whole[key], start) for key, start in tensors(4).items())


@pytest.mark.skipif(importlib.util.find_spec("opt_einsum") is not None, reason="opt_einsum is installed")
def test_kron_names_the_library_that_it_needs():
    with raises(MissingExtra, where="kron", given="opt_einsum", expected="optimizers"):
        build("kron", [{"params": [*tensors().values()]}], 1e-3)


def test_every_name_of_timm_is_offered_or_rejected():
    """`adahessian` is rejected: the training loop computes no second derivatives."""
    assert {*timm.optim.list_optimizers()} - {*names()} == {"adahessian"}
    assert len(HERE) > 90


@pytest.mark.skipif(torch.cuda.is_available(), reason="they need a GPU")
@pytest.mark.parametrize("name", NEEDS_GPU)
def test_timms_names_of_gpu_packages_are_rejected_on_a_cpu(name):
    with raises(TrainError, where="optimizer", given=name):
        build(name, [{"params": [*tensors().values()]}], 1e-3)


@pytest.mark.parametrize("name", ["adahessian", "AdaHessian", "lbfgs", "torch.optim.LBFGS", "timm.optim.Adahessian"])
def test_optimizers_that_need_more_than_a_gradient_are_rejected(name):
    reason = REJECTED[name.rpartition(".")[2].lower()]
    with raises(TrainError, where="optimizer", given=name, expected=reason):
        TrainConfig(optimizer=name)


@pytest.mark.parametrize("name", ["torch.optim.LBFGSs", "torch.nn.Linear", "no_such_package.Adam"])
def test_a_path_that_is_no_optimizer_is_rejected(name):
    with raises(TrainError, where="optimizer", given=name):
        load_class(name)


@pytest.mark.parametrize(
    ("name", "close"), [("adamm", "adam"), ("prodigi", "prodigy"), ("lyon", "lion"), ("paged_adam8bits", "paged_adam8bit")]
)
def test_an_unknown_name_suggests_the_nearest(name, close):
    with pytest.raises(TrainError) as caught:
        TrainConfig(optimizer=name)
    assert (caught.value.where, caught.value.given, caught.value.expected[0]) == ("optimizer", name, close)


@pytest.mark.parametrize(
    ("name", "known"),
    [("Lion", "lion"), ("PagedAdamW8bit", "paged_adamw8bit"), ("AdaFactor", "adafactor"), ("DAdaptAdam", "dadapt_adam"),
     ("AdamWScheduleFree", "schedule_free_adamw"), ("SGDNesterov", "nesterov"), ("AdamW", "adamw"),
     ("schedule-free-sgd", "schedule_free_sgd")],
)  # fmt: skip
def test_spellings_of_other_tools_are_accepted(name, known):
    assert canonical_name(name) == known


def test_arguments_reach_the_class_as_its_types():
    arguments = {"betas": "0.8,0.9", "eps": "1e-6", "amsgrad": "true", "foreach": "false"}
    optimizer = build("adamw", [{"params": [*tensors().values()]}], 1e-3, arguments=arguments)
    group = optimizer.param_groups[0]
    assert [group[key] for key in arguments] == [(0.8, 0.9), 1e-6, True, False]
    optimizer = build("adafactorbv", [{"params": [*tensors().values()]}], 1e-3, arguments={"momentum_dtype": "float32"})
    assert optimizer.param_groups[0]["momentum_dtype"] is torch.float32
    optimizer = build("lion", [{"params": [*tensors().values()]}], 1e-3, arguments={"betas": [0.8, 0.9]})
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("optimizer", "key", "value", "where", "expected"),
    [
        ("adamw", "beta", "0.9", "optimizer_args", ("betas",)),
        ("lion", "lr", "0.9", "optimizer_args", "--learning-rate"),
        ("prodigy", "weight_decay", "0", "optimizer_args", "--weight-decay"),
        ("adamw", "betas", "0.9", "optimizer_args.betas", "2 values, such as 0.9,0.999"),
        ("adamw", "eps", "small", "optimizer_args.eps", "a number"),
        ("adamw", "amsgrad", "1", "optimizer_args.amsgrad", "true or false"),
        ("muon", "algo", 3, "optimizer_args.algo", "a name, such as muon"),
        ("adafactorbv", "momentum_dtype", "half", "optimizer_args.momentum_dtype", None),
    ],
)
def test_wrong_arguments_name_the_right_ones(optimizer, key, value, where, expected):
    if value == "half":  # an alias of float16
        assert TrainConfig(optimizer=optimizer, optimizer_args={key: value})
        value, expected = "tiny", "a dtype, such as bfloat16"
    given = key if where == "optimizer_args" else value
    with raises(TrainError, where=where, given=given, expected=expected):
        TrainConfig(optimizer=optimizer, optimizer_args={key: value})


def test_an_optimizer_that_cannot_train_the_shapes_is_rejected_before_training():
    with raises(TrainError, where="optimizer", given="torch.optim.Muon"):
        build("torch.optim.Muon", [{"params": [*tensors().values()]}], 1e-3)
    assert build("torch.optim.Muon", [{"params": [tensors()["matrix"]]}], 1e-3)


class Counting(torch.optim.SGD):
    """An optimizer whose step depends on a value outside its state."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.1 * self.count
        return super().step(closure)


class CountingIn8Bits(bitsandbytes.optim.AdamW8bit):
    """An optimizer whose step depends on a value outside its state only where that state has 8 bits."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        if any(each["state1"].dtype == torch.uint8 for each in self.state.values()):
            self.param_groups[0]["lr"] = 0.1 * self.count
        return super().step(closure)


class Noisy(torch.optim.SGD):
    """An optimizer that adds noise of torch's global generator."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(torch.randn(parameter.shape))


class Keeping(torch.optim.SGD):
    """An optimizer with an object in its state."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["kept"] = object()
        return super().step(closure)


def test_an_optimizer_samples_the_same_whatever_the_micro_batches():
    """As on several processes, whose last micro-batches differ."""
    weights = []
    for batch, accumulation in ((4, 1), (1, 4)):
        parameters = tensors()
        trainer_of(parameters, f"{__name__}.Noisy", batch=batch, gradient_accumulation_steps=accumulation).fit()
        weights.append(parameters)
    for key, parameter in weights[0].items():
        torch.testing.assert_close(parameter, weights[1][key], rtol=1e-4, atol=1e-4)


def test_state_that_cannot_be_saved_is_rejected_before_training():
    groups = [{"params": [*tensors().values()]}]
    with raises(TrainError, where="resume", given=f"{__name__}.Counting"):
        build(f"{__name__}.Counting", groups, 1e-3)
    with raises(TrainError, where="resume", given=f"{__name__}.CountingIn8Bits"):
        build(f"{__name__}.CountingIn8Bits", groups, 1e-3)
    with raises(TrainError, where="group 0:kept", given="object"):
        build(f"{__name__}.Keeping", groups, 1e-3)


@PAGED
def test_the_trial_leaves_the_random_generator_and_the_parameters_alone():
    parameters, state = tensors(), torch.get_rng_state()
    build("adan", [{"params": [*parameters.values()]}], 1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(parameters[key], start) and parameters[key].grad is None for key, start in tensors().items())


def test_muon_orthogonalizes_matrices_and_trains_others_with_adamw():
    """Others are vectors, matrices with a side below 4, and matrices more than 128 times as wide as high, such as LoRA's."""
    parameters = {**tensors(), "down": nn.Parameter(torch.zeros(4, 516)), "wide": nn.Parameter(torch.zeros(4, 512))}
    optimizer = build("muon", [{"params": [*parameters.values()]}], 1e-2, 0.0)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with_moments = {key for key, parameter in parameters.items() if "exp_avg_sq" in optimizer.state[parameter]}
    assert with_moments == {"bias", "scale", "sequence", "down"}


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"])
def test_schedule_free_previews_and_results_have_the_averaged_weights(name):
    """The average is x = y + (1 - 1/beta) (z - y); previews leave training bitwise as it is."""
    parameters, previews = tensors(), []

    def preview(step):
        previews.append(parameters["matrix"].detach().clone())

    trainer = trainer_of(parameters, name, preview_every=2, on_preview=preview)
    trainer.fit()
    plain = tensors()
    trainer_of(plain, name).fit()
    assert all(torch.equal(parameters[key], plain[key]) for key in plain)
    weight, group = parameters["matrix"], trainer.optimizer.param_groups[0]
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    expected = weight + (1 - 1 / beta) * (trainer.optimizer.state[weight]["z"] - weight)
    assert not torch.equal(expected, weight)
    torch.testing.assert_close(previews[-1], expected.detach())
    with trainer.averaged(), trainer.averaged():
        assert torch.equal(weight, previews[-1])
    assert torch.equal(weight, plain["matrix"])


def test_schedule_free_has_no_ema():
    with raises(TrainError, where="ema", given=0.99):
        TrainConfig(optimizer="AdamWScheduleFree", ema=0.99)
    with raises(TrainError, where="ema", given=0.99):
        TrainConfig(optimizer="schedulefree.AdamWScheduleFree", ema=0.99)
    for name in ("adamw", "torch.optim.NAdam"):
        assert TrainConfig(optimizer=name, ema=0.99)


def test_learning_rate_free_optimizers_ignore_rates_with_a_warning():
    with warns(OptimizerWarning, where="prodigy", given=("learning_rate", "block_lr"), expected=1.0):
        optimizers.warn_ignored_rates("prodigy", {"learning_rate": 1e-4, "text_learning_rate": None, "block_lr": {"mid": 0.5}})
    optimizers.warn_ignored_rates("prodigy", {"learning_rate": 1.0, "block_lr": {}})
    optimizers.warn_ignored_rates("adamw", {"learning_rate": 1e-4})
    assert [base_rate(name, 1e-4) for name in ("prodigy", "prodigyopt.Prodigy", "dadapt_lion", "adamw")] == [1.0, 1.0, 1.0, 1e-4]
