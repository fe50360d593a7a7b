"""Objectives against the papers' formulas, element by element, and against diffusers' schedulers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, compute_snr

from tests.raising import raises
from veneer.injection.errors import OptionError
from veneer.training.objective import timestep_sampling
from veneer.training.objective.loss_weighting import SNR_CEILING, SNR_FLOOR, snr_weight
from veneer.training.objective.objectives import Epsilon, Flow, ObjectiveOptions, Sample, VPrediction, from_scheduler

T = torch.tensor([0, 17, 500, 999])


def tensors(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 2, 5, generator=g).to(dtype) for _ in range(2)]


def schedulers():
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    yield DDPMScheduler()
    yield PNDMScheduler(**betas)
    yield EulerDiscreteScheduler(**betas)
    yield DDIMScheduler(**betas, rescale_betas_zero_snr=True)


@pytest.mark.parametrize("scheduler", list(schedulers()), ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_variance_preserving_formulas(scheduler, prediction):
    objective = from_scheduler(type(scheduler).from_config(scheduler.config, prediction_type=prediction))
    latents, noise = tensors()
    noisy, target = objective.add_noise(latents, noise, T), objective.target(latents, noise, T)
    for i, t in enumerate(T.tolist()):
        alpha = float(scheduler.alphas_cumprod[t])
        for index in [(0, 0, 0), (2, 1, 4)]:
            x, e = float(latents[i][index]), float(noise[i][index])
            assert float(noisy[i][index]) == pytest.approx(math.sqrt(alpha) * x + math.sqrt(1 - alpha) * e, abs=1e-6)
            expected = {"epsilon": e, "sample": x, "v_prediction": math.sqrt(alpha) * e - math.sqrt(1 - alpha) * x}
            assert float(target[i][index]) == pytest.approx(expected[prediction], abs=1e-6)
    assert torch.equal(objective.model_input(T), T)


def test_agrees_with_diffusers_ddpm():
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    objective = from_scheduler(scheduler)
    latents, noise = tensors()
    torch.testing.assert_close(objective.add_noise(latents, noise, T), scheduler.add_noise(latents, noise, T))
    torch.testing.assert_close(objective.target(latents, noise, T), scheduler.get_velocity(latents, noise, T))
    torch.testing.assert_close(objective.snr(T), compute_snr(scheduler, T))


@pytest.mark.parametrize("kind", [DDPMScheduler(prediction_type="v_prediction"), FlowMatchEulerDiscreteScheduler()])
def test_everything_is_float32(kind):
    objective = from_scheduler(kind)
    latents, noise = tensors(dtype=torch.bfloat16)
    t = objective.sample_timesteps([torch.Generator().manual_seed(i) for i in range(4)])
    values = objective.add_noise(latents, noise, t), objective.target(latents, noise, t), objective.weight(t), objective.snr(t)
    assert [v.dtype for v in values] == [torch.float32] * 4
    exact = objective.add_noise(latents.float(), noise.float(), t)
    assert torch.equal(values[0], exact)


@pytest.mark.parametrize(
    ("prediction", "weighting", "formula"),
    [
        ("epsilon", "none", lambda s, g: 1.0),
        ("epsilon", "min_snr", lambda s, g: min(s, g) / s),
        ("v_prediction", "min_snr", lambda s, g: min(s, g) / (s + 1)),
        ("sample", "min_snr", lambda s, g: min(s, g)),
        ("epsilon", "min_snr_plus_one", lambda s, g: min(s, g) / s),
        ("v_prediction", "min_snr_plus_one", lambda s, g: min(s, g) / s + 1),
        ("epsilon", "debiased", lambda s, g: 1 / math.sqrt(min(s, 1000.0))),
        ("v_prediction", "debiased", lambda s, g: 1 / (min(s, 1000.0) + 1)),
        ("v_prediction", "snr_scaled_v", lambda s, g: s / (s + 1)),
    ],
)
@pytest.mark.parametrize("gamma", [5.0, 1.0])
def test_weights(prediction, weighting, formula, gamma):
    scheduler = DDPMScheduler(prediction_type=prediction)
    objective = from_scheduler(scheduler, ObjectiveOptions(weighting=weighting, gamma=gamma))
    got = objective.weight(torch.arange(1000))
    for t in range(0, 1000, 37):
        alpha = float(scheduler.alphas_cumprod[t])
        assert float(got[t]) == pytest.approx(formula(alpha / (1 - alpha), gamma), rel=2e-4)


def test_the_two_min_snr_weights_for_v_differ():
    snr = torch.tensor([0.5, 5.0, 50.0])
    plain = snr_weight("min_snr", "v_prediction", snr, 5.0)
    plus = snr_weight("min_snr_plus_one", "v_prediction", snr, 5.0)
    assert plain.tolist() == pytest.approx([0.5 / 1.5, 5 / 6, 5 / 51])
    assert plus.tolist() == pytest.approx([2.0, 2.0, 1.1])


@pytest.mark.parametrize(
    ("prediction", "weighting", "limit"),
    [
        ("epsilon", "min_snr", 1.0),
        ("v_prediction", "min_snr", 0.0),
        ("v_prediction", "min_snr_plus_one", 2.0),
        ("epsilon", "debiased", SNR_FLOOR**-0.5),
        ("v_prediction", "debiased", 1 / (SNR_FLOOR + 1)),
        ("sample", "min_snr", 0.0),
    ],
)
def test_weights_at_zero_terminal_snr(prediction, weighting, limit):
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction)
    objective = from_scheduler(scheduler, ObjectiveOptions(weighting=weighting))
    last = torch.tensor([999])
    assert float(objective.snr(last)) == 0.0
    assert float(objective.weight(last)) == pytest.approx(limit)
    assert torch.isfinite(objective.weight(torch.arange(1000))).all()
    assert SNR_CEILING == 1000


@pytest.mark.parametrize(
    ("options", "scheduler", "option"),
    [
        (ObjectiveOptions(weighting="cosmap"), DDPMScheduler(), "weighting"),
        (ObjectiveOptions(weighting="snr_scaled_v"), DDPMScheduler(), "weighting"),
        (
            ObjectiveOptions(weighting="debiased"),
            DDPMScheduler(prediction_type="sample"),
            "weighting",
        ),
        (ObjectiveOptions(weighting="min_snr"), FlowMatchEulerDiscreteScheduler(), "weighting"),
        (ObjectiveOptions(density="flux_shift"), DDPMScheduler(), "density"),
        (ObjectiveOptions(prediction="nonsense"), DDPMScheduler(), "prediction"),
    ],
)
def test_options_that_do_not_fit_are_errors(options, scheduler, option):
    with raises(OptionError, option=option, given=getattr(options, option)):
        from_scheduler(scheduler, options)


@pytest.mark.parametrize("bad", [{"density": "uniforn"}, {"weighting": "snr"}, {"gamma": 0}, {"shift": -1}, {"logit_std": 0}])
def test_options_are_checked(bad):
    ((name, value),) = bad.items()
    with raises(OptionError, option=name, given=value):
        ObjectiveOptions(**bad)


def test_scheduler_chooses_the_objective():
    for prediction, kind in [("epsilon", Epsilon), ("v_prediction", VPrediction), ("sample", Sample)]:
        assert type(from_scheduler(DDPMScheduler(prediction_type=prediction))) is kind
    assert type(from_scheduler(FlowMatchEulerDiscreteScheduler())) is Flow
    assert type(from_scheduler(DDPMScheduler(), ObjectiveOptions(prediction="v_prediction"))) is VPrediction


# -- flow -------------------------------------------------------------------------------------------------------------


def test_flow_formulas():
    objective = Flow(ObjectiveOptions())
    latents, noise = tensors()
    sigma = torch.tensor([1.0, 0.25, 0.5, 0.001])
    noisy, target = objective.add_noise(latents, noise, sigma), objective.target(latents, noise, sigma)
    for i, s in enumerate(sigma.tolist()):
        for index in [(0, 0, 0), (2, 1, 4)]:
            x, e = float(latents[i][index]), float(noise[i][index])
            assert float(noisy[i][index]) == pytest.approx((1 - s) * x + s * e, abs=1e-6)
            assert float(target[i][index]) == pytest.approx(e - x, abs=1e-6)
    assert objective.model_input(sigma).tolist() == pytest.approx([1000, 250, 500, 1])
    assert objective.snr(sigma).tolist() == pytest.approx([0, 9, 1, 999.0**2])


def test_flow_agrees_with_the_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = from_scheduler(scheduler)
    latents, noise = tensors()
    sigma, timesteps = scheduler.sigmas[[0, 300, 700, 998]], scheduler.timesteps[[0, 300, 700, 998]]
    torch.testing.assert_close(objective.model_input(sigma), timesteps)
    torch.testing.assert_close(objective.add_noise(latents, noise, sigma), scheduler.scale_noise(latents, timesteps, noise))


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_flow_weights(weighting):
    sigma = torch.tensor([0.01, 0.3, 0.5, 1.0])
    got = Flow(ObjectiveOptions(weighting=weighting)).weight(sigma)
    by_hand = {
        "none": [1.0] * 4,
        "sigma_sqrt": [10000.0, 1 / 0.09, 4.0, 1.0],
        "cosmap": [2 / (math.pi * (1 - 2 * s + 2 * s * s)) for s in (0.01, 0.3, 0.5, 1.0)],
    }
    assert got.tolist() == pytest.approx(by_hand[weighting], rel=1e-5)
    torch.testing.assert_close(got, compute_loss_weighting_for_sd3(weighting, sigma))


def test_shifts_agree_with_the_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    by_formula = [timestep_sampling.shift_sigma(i / 1000, 3.0) for i in range(1000, 0, -1)]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(by_formula))
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens in (256, 1024, 4096):
        mu = timestep_sampling.flux_mu(tokens)
        assert mu == pytest.approx(calculate_shift(tokens))
        assert timestep_sampling.shift_sigma_exponentially(0.3, mu) == pytest.approx(dynamic.time_shift(mu, 1.0, 0.3))
    assert [timestep_sampling.flux_mu(n) for n in (256, 4096)] == pytest.approx([0.5, 1.15])
    assert timestep_sampling.shift_sigma_exponentially(0.0, 1.0) == 0.0


# -- densities --------------------------------------------------------------------------------------------------------


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def logit(u):
    return math.log(u / (1 - u))


def unshift(s, k):
    return s / (k - (k - 1) * s)


CDFS = {  # P(σ ≤ s) for Flow with a scheduler shift of 3
    "uniform": lambda s: unshift(s, 3),
    "logit_normal": lambda s: normal_cdf((logit(unshift(s, 3)) - 0.2) / 0.7),
    "cubic": lambda s: 1 - (1 - unshift(s, 3)) ** (1 / 3),
    "sigmoid": lambda s: normal_cdf(logit(s) / 0.9),
    "shift": lambda s: normal_cdf(logit(unshift(s, 3)) / 0.9),
    "flux_shift": lambda s: normal_cdf(logit(unshift(s, math.exp(0.5))) / 0.9),
}


@pytest.mark.parametrize("density", CDFS)
def test_distribution_of_each_density(density):
    options = ObjectiveOptions(density=density, logit_mean=0.2, logit_std=0.7, sigmoid_scale=0.9, tokens=256)
    objective = from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), options)
    g = torch.Generator().manual_seed(0)
    n = 4000
    draws = sorted(objective.sample_timestep(g) for _ in range(n))
    distance = max(abs((i + 0.5) / n - CDFS[density](s)) for i, s in enumerate(draws) if 0.001 < s < 1)
    assert distance < 1.63 / math.sqrt(n)  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize(("density", "mean"), [("logit_normal", 0.8), ("mode", 0.0)])
def test_the_scripts_of_diffusers_have_the_other_sign_of_the_mean(density, mean):
    """They use `scheduler.timesteps[u * T]`, which starts at the noisy end; `mode` is symmetric."""
    scheduler, n = FlowMatchEulerDiscreteScheduler(), 4000
    u = compute_density_for_timestep_sampling(density, n, mean, 1.0, 1.29, generator=torch.Generator().manual_seed(0))
    theirs = scheduler.timesteps[(u * 1000).long().clamp(max=999)].mean() / 1000
    g = torch.Generator().manual_seed(1)
    for sign in (-1, 1):
        options = ObjectiveOptions(density=density, logit_mean=sign * mean)
        ours = sum(from_scheduler(scheduler, options).sample_timestep(g) for _ in range(n)) / n
        assert (abs(ours - theirs) < 0.02) == (sign < 0 or density == "mode")


def test_mode_density():
    objective = from_scheduler(FlowMatchEulerDiscreteScheduler(), ObjectiveOptions(density="mode", mode_scale=1.29))
    for seed in range(20):
        u = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()
        expected = 1 - u - 1.29 * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
        assert objective.sample_timestep(torch.Generator().manual_seed(seed)) == pytest.approx(max(expected, 0.001))


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode", "cubic", "sigmoid"])
def test_indices_of_the_discrete_objectives(density):
    objective = from_scheduler(DDPMScheduler(), ObjectiveOptions(density=density))
    draws = [objective.sample_timestep(torch.Generator().manual_seed(s)) for s in range(300)]
    assert all(type(t) is int and 0 <= t <= 999 for t in draws)
    u = [timestep_sampling.sample(density, objective.options, torch.Generator().manual_seed(s)) for s in range(300)]
    assert draws == [min(999, math.floor(x * 1000)) for x in u]
    if density == "cubic":
        assert sum(t > 875 for t in draws) / 300 == pytest.approx(0.5, abs=0.1)  # 1 − u³ > 0.875 for u < 0.5


def test_uniform_reaches_both_ends():
    objective = from_scheduler(DDPMScheduler(num_train_timesteps=4))
    g = torch.Generator().manual_seed(0)
    assert {objective.sample_timestep(g) for _ in range(200)} == {0, 1, 2, 3}


@pytest.mark.parametrize("density", timestep_sampling.DENSITIES)
def test_one_draw_takes_one_number(density):
    objective = Flow(ObjectiveOptions(density=density))
    g, reference = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    objective.sample_timestep(g)
    normal = density in ("logit_normal", "sigmoid", "shift", "flux_shift")
    (torch.randn if normal else torch.rand)((), generator=reference, dtype=torch.float64)
    assert torch.equal(g.get_state(), reference.get_state())


def test_flux_shift_sees_the_size_of_the_sample():
    objective = Flow(ObjectiveOptions(density="flux_shift", tokens=256))
    small, large = (objective.sample_timestep(torch.Generator().manual_seed(0), tokens=n) for n in (256, 4096))
    assert small < large
    assert small == objective.sample_timestep(torch.Generator().manual_seed(0))


def test_dynamic_schedulers_have_no_shift_of_their_own_and_options_override():
    dynamic = from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))
    assert dynamic.shift == 1.0
    assert from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), ObjectiveOptions(shift=2.0)).shift == 2.0


def test_sample_timesteps_takes_one_from_each_generator():
    for scheduler, dtype in [(DDPMScheduler(), torch.int64), (FlowMatchEulerDiscreteScheduler(), torch.float32)]:
        objective = from_scheduler(scheduler)
        together = objective.sample_timesteps([torch.Generator().manual_seed(s) for s in (1, 2, 3)])
        assert together.dtype == dtype
        alone = [objective.sample_timestep(torch.Generator().manual_seed(s)) for s in (1, 2, 3)]
        assert together.tolist() == pytest.approx(alone)


def test_a_scheduler_without_alphas_is_refused():
    class Odd:
        config = {"prediction_type": "epsilon"}

    with raises(OptionError, option="prediction", method="Odd"):
        from_scheduler(Odd())
