"""The training process, the process's config, and its form as diffusers' scheduler_config.json."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm.diffusion import (
    PREDICTIONS,
    SCHEDULES,
    NoiseSchedule,
    ProcessConfig,
    TrainingProcess,
    from_diffusers_scheduler,
    to_diffusers_scheduler,
)
from fastddpm.errors import ConfigError
from fastddpm.objectives import LOSSES
from fastddpm.schedules import zero_terminal_snr
from fastddpm_kernels import Stream, draw_normal

HO = NoiseSchedule.from_name("linear", 1000)
SEED = 2**40 + 17


def images(*shape: int, seed: int = 0) -> Tensor:
    """Random uint8 images [N, C, H, W]."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def by_hand(x_0: Tensor, t: Tensor, flip: Tensor | None, ordinals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_0 as the network's world has it, eps, and x_t, all in float64."""
    x = x_0.double() / 127.5 - 1 if x_0.dtype == torch.uint8 else x_0.double()
    if flip is not None:
        x = torch.stack([image.flip(-1) if mirrored else image for image, mirrored in zip(x, flip, strict=True)])
    eps = draw_normal(ordinals, (x.shape[1], x.shape[2], x.shape[3]), seed=SEED, stream=Stream.EPS, dtype=torch.float64)
    alpha_bar = torch.tensor(HO.alpha_bar)[t][:, None, None, None]
    return x, eps, alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * eps


class NoSync(TorchDispatchMode):
    """Fails where a value is read from the device by the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read by the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("flip", [False, True])
def test_noising_is_equation_4(flip: bool, memory_format: torch.memory_format) -> None:
    x_0 = images(64, 3, 5, 7).contiguous(memory_format=memory_format)
    ordinals = torch.arange(1000, 1064)
    noised = TrainingProcess(HO, seed=SEED, flip=flip).noise(x_0, ordinals)
    assert noised.t.dtype == torch.int64 and 0 <= noised.t.min() <= noised.t.max() < 1000
    assert (noised.flip is not None) == flip
    if noised.flip is not None:
        assert 0 < noised.flip.sum() < 64
    assert noised.x_t.dtype == torch.float32 and noised.x_t.is_contiguous(memory_format=memory_format)
    _, _, x_t = by_hand(x_0, noised.t, noised.flip, ordinals)
    torch.testing.assert_close(noised.x_t.double(), x_t, rtol=0, atol=2e-6)
    # A float image is taken as it is.
    floats = x_0.float() / 127.5 - 1
    again = TrainingProcess(HO, seed=SEED, flip=flip).noise(floats, ordinals, torch.bfloat16)
    assert again.x_t.dtype == torch.bfloat16 and torch.equal(again.t, noised.t)
    torch.testing.assert_close(again.x_t.double(), x_t, rtol=2**-8, atol=2e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("flip", [False, True])
def test_loss_and_gradient(prediction: str, flip: bool) -> None:
    x_0, ordinals = images(16, 3, 4, 6), torch.arange(5, 21)
    process = TrainingProcess(HO, prediction, SEED, flip)
    noised = process.noise(x_0, ordinals)
    x, eps, _ = by_hand(x_0, noised.t, noised.flip, ordinals)
    alpha_bar = torch.tensor(HO.alpha_bar)[noised.t][:, None, None, None]
    target = {"eps": eps, "x_0": x, "v": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x}[prediction]
    output = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    truth = (output.double() - target).square().mean((1, 2, 3))
    upstream = torch.rand(16, generator=torch.Generator().manual_seed(2))
    (truth_grad,) = torch.autograd.grad((truth * upstream.double()).sum(), output)

    losses = process.loss(output, noised, ordinals, x_0)
    torch.testing.assert_close(losses.double(), truth, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad((losses * upstream).sum(), output)
    torch.testing.assert_close(grad, truth_grad, rtol=1e-5, atol=1e-8)

    for scale in (torch.tensor(128 / 16.0), 8.0):
        fused, grad = process.loss_and_grad(output, noised, ordinals, x_0, scale)
        assert torch.equal(fused, losses.detach())
        (truth_grad,) = torch.autograd.grad(8 * process.loss(output, noised, ordinals, x_0).sum(), output)
        torch.testing.assert_close(grad, truth_grad, rtol=1e-6, atol=1e-8)
        assert grad.dtype == output.dtype and not grad.requires_grad


def test_the_right_network_has_no_loss() -> None:
    """predict_eps and predict_x_0 of what the loss wants: the three objectives have their zero at the same network."""
    x_0, ordinals = images(8, 1, 4, 4), torch.arange(8)
    for prediction in PREDICTIONS:
        process = TrainingProcess(HO, prediction, SEED)
        noised = process.noise(x_0, ordinals)
        x, eps, _ = by_hand(x_0, noised.t, None, ordinals)
        v = HO.predict_x_0(eps, noised.t, x, "v")  # sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
        best = {"eps": eps, "x_0": x, "v": v}[prediction]
        assert process.loss(best.float(), noised, ordinals, x_0).max() < 1e-12
        torch.testing.assert_close(
            HO.predict_x_0(noised.x_t.double(), noised.t, best, prediction), x, rtol=0, atol=2e-4
        )


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x_0, ordinals = images(12, 3, 4, 4), torch.arange(100, 112)
    output = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    process = TrainingProcess(HO, "v", SEED, flip=True)
    whole = process.noise(x_0, ordinals)
    losses = process.loss(output, whole, ordinals, x_0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    for part in (order[:5], order[5:]):
        noised = process.noise(x_0[part], ordinals[part])
        assert torch.equal(noised.x_t, whole.x_t[part]) and torch.equal(noised.t, whole.t[part])
        assert torch.equal(process.loss(output[part], noised, ordinals[part], x_0[part]), losses[part])
    other = TrainingProcess(HO, "v", SEED + 1, flip=True).noise(x_0, ordinals)
    assert not torch.equal(other.t, whole.t)


def test_the_host_reads_nothing() -> None:
    x_0, ordinals = images(4, 3, 4, 4), torch.arange(4)
    process = TrainingProcess(HO, "v", SEED, flip=True)
    process.noise(x_0, ordinals)  # the tables are moved to the device once
    with NoSync():
        noised = process.noise(x_0, ordinals)
        process.loss_and_grad(noised.x_t, noised, ordinals, x_0, torch.tensor(0.25))


@pytest.mark.gpu
def test_the_host_waits_for_nothing_on_a_gpu() -> None:
    x_0, ordinals = images(4, 3, 8, 8).cuda(), torch.arange(4).cuda()
    process = TrainingProcess(HO, "v", SEED, flip=True)
    scale = torch.tensor(0.25).cuda()

    def step() -> Tensor:
        noised = process.noise(x_0, ordinals, torch.bfloat16)
        return process.loss_and_grad(noised.x_t, noised, ordinals, x_0, scale)[0]

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()


def test_timesteps_and_flips_are_fair() -> None:
    noised = TrainingProcess(HO, seed=SEED, flip=True).noise(
        images(1, 1, 1, 1).expand(50_000, 1, 1, 1), torch.arange(50_000)
    )
    assert noised.flip is not None
    counts = torch.bincount(noised.t, minlength=1000).double()
    chi2 = float(((counts - 50) ** 2 / 50).sum())  # 999 degrees of freedom
    assert abs(chi2 - 999) < 5 * math.sqrt(2 * 999)
    assert abs(float(noised.flip.double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(50_000)


def test_one_draw_is_the_chain() -> None:
    """Samples of the step-by-step chain and of the closed form have the moments of q(x_t | x_0)."""
    schedule = NoiseSchedule.from_name("linear", 30)
    ordinals, shape, value = torch.arange(2000), (1, 8, 8), 0.6
    x = torch.full((2000, *shape), value)
    for t in range(30):
        z = draw_normal(ordinals, shape, seed=SEED, stream=Stream.Z, step=t)
        x = math.sqrt(schedule.alpha[t]) * x + math.sqrt(schedule.beta[t]) * z
        if t not in (0, 4, 14, 29):
            continue
        fixed = NoiseSchedule(schedule.beta[: t + 1])  # its last timestep is t: noise the samples whose draw is that
        noised = TrainingProcess(fixed, seed=SEED).noise(torch.full((2000, *shape), value), ordinals)
        closed = noised.x_t[noised.t == t]
        mean, variance = (float(m) for m in schedule.q_mean_variance(torch.tensor(value, dtype=torch.float64), t))
        for draw in (x, closed):
            n = draw.numel()
            assert abs(float(draw.double().mean()) - mean) < 5 * math.sqrt(variance / n)
            assert abs(float(draw.double().var()) - variance) < 5 * variance * math.sqrt(2 / n)


def test_wrong_arguments_of_the_training_process() -> None:
    with pytest.raises(ConfigError, match=r"epsilon.*eps, x_0, v"):
        TrainingProcess(HO, "epsilon")
    with pytest.raises(ConfigError, match="seed is -1"):
        TrainingProcess(HO, seed=-1)


# Config


def test_the_defaults_are_hos_recipe() -> None:
    process = ProcessConfig()
    assert np.array_equal(process.noise_schedule().beta, np.linspace(1e-4, 0.02, 1000))
    assert (process.prediction, process.variance, process.clip) == ("eps", "fixed_large", True)


def test_the_config_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    read = tyro.cli(ProcessConfig, args=["--schedule", "cosine", "--num-timesteps", "50", "--no-clip"])
    assert read == ProcessConfig(schedule="cosine", num_timesteps=50, clip=False)
    assert tyro.cli(ProcessConfig, args=["--betas", "0.1", "0.2", "--num-timesteps", "2"]).betas == (0.1, 0.2)
    with pytest.raises(SystemExit):
        tyro.cli(ProcessConfig, args=["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in (*SCHEDULES, *LOSSES, "stratified")) and "Timesteps T" in text
    with pytest.raises(SystemExit):
        tyro.cli(ProcessConfig, args=["--schedule", "cosin"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schedule": "cosin"}, "diffusion.schedule is 'cosin': valid are linear, cosine, sigmoid"),
        ({"prediction": "epsilon"}, "diffusion.prediction is 'epsilon': valid are eps, x_0, v"),
        ({"variance": "learned"}, "valid are fixed_small, fixed_large"),
        ({"spacing": "even"}, "valid are trailing, leading, linspace"),
        ({"clip_range": 0.0}, "diffusion.clip_range is 0.0"),
        ({"num_timesteps": 0}, "num_timesteps is 0"),
        ({"beta_end": 2.0}, "beta_end 2.0"),
        ({"betas": (0.1, 0.2)}, "2 entries"),
        ({"betas": (0.1, 1.0), "num_timesteps": 2}, "prediction is 'eps' and the last alpha_bar is 0"),
        ({"loss": "mse"}, "diffusion.loss is 'mse': valid are simple, min_snr, p2, vlb, hybrid"),
        ({"timesteps": "random"}, "diffusion.timesteps is 'random': valid are uniform, stratified, loss_aware"),
        ({"dynamic_threshold": 0.0}, "diffusion.dynamic_threshold is 0.0: it must be above 0 and at most 1, or None"),
        ({"dynamic_threshold": 1.01}, "diffusion.dynamic_threshold is 1.01"),
        ({"dynamic_threshold": 0.9, "clip": False}, "dynamic_threshold is 0.9 and diffusion.clip off"),
        ({"dynamic_threshold": 0.9, "clip_range": 2.0}, "dynamic_threshold is 0.9 and diffusion.clip_range 2.0"),
        ({"min_snr_gamma": 0.0}, "diffusion.min_snr_gamma is 0.0: it must be above 0"),
        ({"min_snr_gamma": math.nan}, "diffusion.min_snr_gamma is nan"),
        ({"p2_gamma": -1.0}, "diffusion.p2_gamma is -1.0: it must be at least 0"),
        ({"p2_k": 0.0}, "diffusion.p2_k is 0.0"),
        ({"vlb_weight": 0.0}, "diffusion.vlb_weight is 0.0"),
        ({"huber": 0.0}, "diffusion.huber is 0.0: it must be at least 1e-6, or None"),
        ({"offset_noise": -0.1}, "diffusion.offset_noise is -0.1: it must be at least 0"),
        ({"label_dropout": 1.0}, "diffusion.label_dropout is 1.0: it must be at least 0 and below 1"),
        ({"label_dropout": -0.1}, "diffusion.label_dropout is -0.1"),
        ({"loss": "hybrid"}, "loss is hybrid and diffusion.variance fixed_large: .* needs learned_range"),
        ({"variance": "learned_range"}, "variance is learned_range and diffusion.loss simple: .*valid are hybrid, vlb"),
        ({"loss": "vlb", "huber": 0.1}, "huber is 0.1 and diffusion.loss vlb"),
        ({"loss": "hybrid", "variance": "learned_range", "huber": 0.1}, "huber is 0.1 and diffusion.loss hybrid"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr is set and diffusion.prediction eps: .*valid are v, x_0"),
        ({"zero_terminal_snr": True, "prediction": "v", "loss": "p2"}, "p2: its weight is 0 at the last timestep"),
        ({"zero_terminal_snr": True, "prediction": "v", "num_timesteps": 1}, "at least 2 timesteps"),
    ],
)
def test_wrong_fields_name_the_valid_ones(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        ProcessConfig(**changes).check()
    assert "\n" not in str(error.value)


def test_fields_that_go_together() -> None:
    for changes in (
        {"loss": "vlb"},
        {"loss": "vlb", "variance": "learned_range", "timesteps": "loss_aware"},
        {"loss": "simple", "huber": 0.1, "prediction": "v", "zero_terminal_snr": True, "timesteps": "stratified"},
        {"loss": "hybrid", "variance": "learned_range", "offset_noise": 0.1, "label_dropout": 0.99},
        {"dynamic_threshold": 1.0, "loss": "p2", "p2_gamma": 0.0},
    ):
        ProcessConfig(**changes).check()
    process = ProcessConfig(schedule="quadratic", prediction="v", zero_terminal_snr=True)
    expected = zero_terminal_snr(NoiseSchedule.from_name("quadratic", 1000).beta)
    assert np.array_equal(process.noise_schedule().beta, expected) and expected[-1] == 1


# diffusers


def scheduler_of(facts: dict[str, Any]) -> Any:
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, facts["_class_name"]).from_config(facts)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.sampled_from([1, 2, 19, 50, 1000]),
    st.sampled_from(PREDICTIONS),
    st.sampled_from(["fixed_small", "fixed_large", "learned_range"]),
    st.sampled_from([{"clip": False, "clip_range": 1.5}, {"clip_range": 1.5}, {"dynamic_threshold": 0.9}]),
    st.booleans(),
)
def test_to_diffusers_and_back(
    schedule: Any, num_timesteps: int, prediction: Any, variance: Any, clip: dict[str, Any], pure_noise: bool
) -> None:
    process = ProcessConfig(
        schedule=schedule,
        num_timesteps=num_timesteps,
        prediction=prediction,
        variance=variance,
        loss="hybrid" if variance == "learned_range" else "simple",
        zero_terminal_snr=pure_noise and prediction != "eps" and num_timesteps > 1,
        **clip,
    )
    facts = to_diffusers_scheduler(process)
    scheduler = scheduler_of(facts)
    table = process.noise_schedule()
    assert {*facts} - {"_class_name"} == {key for key in scheduler.config if not key.startswith("_")}
    beta = scheduler.betas.double().numpy()
    # float32 on their side; rescaling divides neighbours of products of all before.
    assert np.allclose(beta, table.beta, rtol=1e-6, atol=3e-5 if process.zero_terminal_snr else 2e-8)
    assert scheduler.config.timestep_spacing == "trailing" and scheduler.config.variance_type == variance
    names = {"linear": "linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid", "quadratic": "scaled_linear"}
    if num_timesteps >= 50:  # below, the scaled betas are cut, which DDPMScheduler does not know
        assert scheduler.config.beta_schedule == names[schedule] and facts["trained_betas"] is None
    read, tables = from_diffusers_scheduler(facts)
    assert np.allclose(tables.beta, table.beta, rtol=1e-12, atol=0)
    same = ("num_timesteps", "prediction", "variance", "clip", "clip_range", "spacing")
    for name in (*same, "dynamic_threshold", "zero_terminal_snr", "loss"):
        assert getattr(read, name) == getattr(process, name)
    assert np.array_equal(read.noise_schedule().beta, tables.beta)
    if num_timesteps >= 50:
        assert read.schedule == schedule and read.betas is None


def test_betas_of_ones_own_are_written_as_trained_betas() -> None:
    betas = (0.1, 0.05, 0.3)
    facts = to_diffusers_scheduler(ProcessConfig(betas=betas, num_timesteps=3))
    assert facts["trained_betas"] == list(betas)
    assert scheduler_of(facts).betas.tolist() == pytest.approx(betas)
    read, schedule = from_diffusers_scheduler(facts)
    assert read.betas == betas and schedule.beta.tolist() == list(betas)


@pytest.mark.parametrize(
    "facts",
    [
        {"_class_name": "DDPMScheduler"},
        {"_class_name": "DDIMScheduler", "clip_sample": False},
        {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "num_train_timesteps": 400},
        {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "num_train_timesteps": 60, "beta_end": 0.999},
        {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid", "beta_start": 1e-7, "beta_end": 2e-3},
        {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"_class_name": "DDPMScheduler", "trained_betas": [0.01, 0.2, 0.1], "variance_type": "fixed_small_log"},
    ],
)
def test_foreign_schedulers(facts: dict[str, Any]) -> None:
    scheduler = scheduler_of(facts)
    process, schedule = from_diffusers_scheduler(facts)
    assert np.allclose(schedule.beta, scheduler.betas.double().numpy(), rtol=3e-6, atol=1e-8)
    assert np.array_equal(process.noise_schedule().beta, schedule.beta) or np.allclose(
        process.noise_schedule().beta, schedule.beta, rtol=1e-12, atol=0
    )
    assert process.spacing == scheduler.config.timestep_spacing == "leading"
    assert process.clip == scheduler.config.clip_sample
    assert process.variance == "fixed_small"


def test_the_scheduler_of_google_ddpm_cifar10_32() -> None:
    facts = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    process, schedule = from_diffusers_scheduler(facts)
    assert process == ProcessConfig(spacing="leading")
    assert np.array_equal(schedule.beta, HO.beta)


def test_thresholding_is_diffusers_thresholding() -> None:
    """What is written thresholds as ours is defined: to the quantile, at least 1, and back to -1 .. 1."""
    scheduler = scheduler_of(to_diffusers_scheduler(ProcessConfig(dynamic_threshold=0.9)))
    x_0_hat = 3 * torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_0_hat[0] *= 0.1
    scale = x_0_hat.abs().flatten(1).quantile(0.9, dim=1).clamp(min=1)[:, None, None, None]
    torch.testing.assert_close(scheduler._threshold_sample(x_0_hat), x_0_hat.clamp(-scale, scale) / scale)
    assert (scale[1:] > 1).all() and scale[0] == 1
    # With its default largest scale of 1, theirs is plain clipping, and takes the place of the other.
    process, _ = from_diffusers_scheduler({"thresholding": True, "clip_sample": False})
    assert process.clip and process.clip_range == 1 and process.dynamic_threshold is None


def test_rescaled_foreign_schedulers() -> None:
    facts = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }
    for changes in ({}, {"trained_betas": [0.1, 0.2, 0.3]}):
        process, schedule = from_diffusers_scheduler({**facts, **changes})
        assert process.zero_terminal_snr and process.schedule == ("linear" if changes else "quadratic")
        alpha_bar = scheduler_of({**facts, **changes}).alphas_cumprod.double().numpy()
        assert np.allclose(schedule.alpha_bar, alpha_bar, rtol=2e-4, atol=1e-7) and schedule.alpha_bar[-1] == 0


def test_predict_epsilon_of_old_files() -> None:
    assert from_diffusers_scheduler({"predict_epsilon": False})[0].prediction == "x_0"
    assert from_diffusers_scheduler({"predict_epsilon": True})[0].prediction == "eps"


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"_class_name": "PNDMScheduler"}, "'PNDMScheduler': valid are DDPMScheduler, DDIMScheduler"),
        ({"beta_schedule": "laplace"}, "beta_schedule 'laplace'.*linear, scaled_linear"),
        ({"prediction_type": "flow"}, "'flow': valid are epsilon, sample, v_prediction"),
        ({"variance_type": "learned"}, "'learned': valid are fixed_small"),
        ({"variance_type": "fixed_large_log"}, "'fixed_large_log'"),
        ({"timestep_spacing": "log"}, "'log': valid are trailing"),
        ({"thresholding": True, "sample_max_value": 1.5}, "sample_max_value = 1.5 with thresholding.* 1e.09 or more"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True with prediction_type = 'epsilon'"),
        ({"steps_offset": 1}, "steps_offset = 1"),
        ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False}, "set_alpha_to_one = False"),
        ({"num_train_timesteps": 0}, "num_timesteps is 0"),
        ({"trained_betas": [0.1, 2.0]}, "index 1 is 2.0"),
        ({"beta_start": "small"}, "beta_start or beta_end"),
        ({"beta_end": 1.5}, "must be above 0 and below 1"),
    ],
)
def test_what_is_not_supported_is_named(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_diffusers_scheduler(facts)
