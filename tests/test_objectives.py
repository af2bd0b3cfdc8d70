"""Losses and draws of timesteps: weights against the derivation, gradients against autograd of independent formulas,
unbiasedness, and that nothing depends on how a batch is cut."""

import math
from collections import deque
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm.diffusion import PREDICTIONS, LossName, Noised, ProcessConfig, TrainingProcess
from fastddpm.errors import CheckpointError
from fastddpm.objectives import LOSSES, UNIT, LossHistory, loss_weights, stratified, vlb_constants
from fastddpm_kernels import Stream, add_noise, diffusion_loss_and_grad, draw_normal, draw_timesteps

SEED = 2**40 + 17
SIX = ProcessConfig(schedule="cosine", num_timesteps=6)  # t = 0 is drawn often


def images(*shape: int, seed: int = 0) -> Tensor:
    """Random uint8 images [N, C, H, W], with black and white pixels among them."""
    x = torch.randint(-20, 276, shape, generator=torch.Generator().manual_seed(seed))
    return x.clamp(0, 255).to(torch.uint8)


def process_of(config: ProcessConfig, batch_size: int = 8, **options: Any) -> TrainingProcess:
    """Its training process, with losses in the history if it has one."""
    process = TrainingProcess.of(config, seed=SEED, batch_size=batch_size, **{"flip": True, **options})
    if process.history is not None:
        losses = torch.rand(config.num_timesteps, 10, generator=torch.Generator().manual_seed(5))
        process.history.load({"losses": losses * torch.linspace(3, 0.2, config.num_timesteps)[:, None]})
    return process


# Weights


def test_the_table_names_what_the_config_takes() -> None:
    assert set(get_args(LossName)) == set(LOSSES)


@pytest.mark.parametrize("loss, pure_noise", [("min_snr", False), ("p2", False), ("vlb", False), ("vlb", True)])
def test_predictions_have_the_same_loss(loss: str, pure_noise: bool) -> None:
    """The same x_0_hat, told as eps, x_0 or v: the weighted squared error is one number."""
    config = ProcessConfig(loss=loss, p2_gamma=0.7, num_timesteps=40, prediction="v", zero_terminal_snr=pure_noise)
    schedule = config.noise_schedule()
    t, generator = torch.arange(40), torch.Generator().manual_seed(0)
    x_0, eps, error = torch.randn(3, 40, 5, generator=generator, dtype=torch.float64)
    mean, variance = schedule.q_mean_variance(x_0, t)
    x_t = mean + variance.sqrt() * eps
    found = {}
    for kind in PREDICTIONS[1:] if pure_noise else PREDICTIONS:
        told = {}
        for name, x in (("right", x_0), ("wrong", x_0 + error)):
            noise = schedule.predict_eps(x_t, t, x, "x_0")
            v = schedule._at("sqrt_alpha_bar", t, x) * noise - schedule._at("sqrt_one_minus_alpha_bar", t, x) * x
            told[name] = {"eps": noise, "x_0": x, "v": v}[kind]
        weights = torch.tensor(loss_weights(replace(config, prediction=kind), schedule))
        assert (weights >= 0).all()
        found[kind] = weights * (told["right"] - told["wrong"]).square().mean(1)
    for losses in found.values():
        torch.testing.assert_close(losses, found["x_0"], rtol=1e-9, atol=1e-14)


def test_weights_are_the_papers() -> None:
    schedule = ProcessConfig().noise_schedule()
    alpha_bar, beta = schedule.alpha_bar, schedule.beta
    snr = alpha_bar / (1 - alpha_bar)
    for gamma in (1.0, 5.0):
        of = {
            p: loss_weights(ProcessConfig(loss="min_snr", min_snr_gamma=gamma, prediction=p), schedule)
            for p in PREDICTIONS
        }
        assert np.allclose(of["eps"], np.minimum(snr, gamma) / snr, rtol=1e-12)
        assert np.allclose(of["v"], np.minimum(snr, gamma) / (snr + 1), rtol=1e-12)
        assert np.allclose(of["x_0"], np.minimum(snr, gamma), rtol=1e-12)
    assert np.allclose(loss_weights(ProcessConfig(loss="p2", p2_k=2.0, p2_gamma=0.5), schedule), (2 + snr) ** -0.5)
    # DDPM, eq. 12; improved DDPM's L_simple has weight 1.
    for kind in ("fixed_small", "fixed_large"):
        own = loss_weights(ProcessConfig(loss="vlb", variance=kind), schedule)
        ours = 1000 * beta**2 / (2 * schedule.variance(kind) * (1 - beta) * (1 - alpha_bar))
        assert np.allclose(own[1:], ours[1:], rtol=1e-12) and own[0] == 0
    for config in (ProcessConfig(), ProcessConfig(loss="hybrid", variance="learned_range")):
        assert (loss_weights(config, schedule) == 1).all()


def check_vlb(config: ProcessConfig) -> None:
    """Weighted square and constant against the KL of two Gaussians, for every t but 0."""
    schedule = config.noise_schedule()
    t, generator = torch.arange(schedule.num_timesteps), torch.Generator().manual_seed(1)
    x_0, eps, error = torch.randn(3, len(t), 7, generator=generator, dtype=torch.float64)
    mean, variance = schedule.q_mean_variance(x_0, t)
    x_t = mean + variance.sqrt() * eps
    right = {"eps": eps, "x_0": x_0, "v": schedule._at("sqrt_alpha_bar", t, x_0) * eps - variance.sqrt() * x_0}
    x_0_hat = schedule.predict_x_0(x_t, t, right[config.prediction] + error, config.prediction)
    q_mean, q_variance = schedule.q_posterior(x_0, x_t, t)
    p_mean, _ = schedule.q_posterior(x_0_hat, x_t, t)
    p_variance = torch.tensor(schedule.variance(config.variance))[:, None]
    kl = kl_divergence(Normal(q_mean, q_variance.clamp(min=1e-300).sqrt()), Normal(p_mean, p_variance.sqrt())).mean(1)
    ours = torch.tensor(LOSSES["vlb"](config, schedule)) * error.square().mean(1)
    ours += torch.tensor(vlb_constants(config, schedule))
    torch.testing.assert_close(ours[1:], len(t) * kl[1:], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_vlb_is_the_kl_divergence(prediction: Any, variance: Any) -> None:
    config = ProcessConfig(loss="vlb", prediction=prediction, variance=variance, num_timesteps=60)
    check_vlb(config)
    if prediction != "eps":
        check_vlb(replace(config, zero_terminal_snr=True))


@pytest.mark.parametrize("factor", [2.0, 59 / 60])
def test_a_wrong_factor_fails_the_kl_divergence(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config, right = ProcessConfig(loss="vlb", num_timesteps=60), LOSSES["vlb"]
    monkeypatch.setitem(LOSSES, "vlb", lambda *args: factor * right(*args))
    with pytest.raises(AssertionError):
        check_vlb(config)


# Losses and gradients


def by_hand(process: TrainingProcess, noised: Noised, ordinals: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_0 as the network's world has it, the noise with its offset, and x_t, all float64."""
    x = x_0.double() / 127.5 - 1
    if noised.flip is not None:
        x = torch.stack([image.flip(-1) if mirrored else image for image, mirrored in zip(x, noised.flip, strict=True)])
    size, options = (x.shape[1], x.shape[2], x.shape[3]), {"seed": SEED, "dtype": torch.float64}
    eps = draw_normal(ordinals, size, stream=Stream.EPS, **options)
    shared = draw_normal(ordinals, (size[0], 1, 1), stream=Stream.OFFSET, **options)
    eps = eps + process.config.offset_noise * shared
    alpha_bar = torch.tensor(process.schedule.alpha_bar)[noised.t][:, None, None, None]
    return x, eps, alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * eps


def truth(process: TrainingProcess, noised: Noised, ordinals: Tensor, x_0: Tensor, output: Tensor) -> Tensor:
    """The losses float64 [N], differentiable by autograd in `output`, from the definitions alone."""
    config, schedule, t = process.config, process.schedule, noised.t
    T = schedule.num_timesteps
    x, eps, x_t = by_hand(process, noised, ordinals, x_0)
    alpha_bar = torch.tensor(schedule.alpha_bar)[t][:, None, None, None]
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x
    learned = config.variance == "learned_range"
    own, value = output.chunk(2, dim=1) if learned else (output, None)
    error = own - {"eps": eps, "x_0": x, "v": v}[config.prediction]
    square = (
        error**2 if config.huber is None else 2 * config.huber * ((error**2 + config.huber**2).sqrt() - config.huber)
    )
    losses = square.mean((1, 2, 3))
    if config.loss == "min_snr":
        gain = {"eps": snr, "x_0": torch.ones(()), "v": snr + 1}[config.prediction]
        losses = losses * snr.clamp(max=config.min_snr_gamma) / gain
    elif config.loss == "p2":
        gain = {"eps": torch.ones(()), "x_0": snr, "v": alpha_bar.flatten()}[config.prediction]
        losses = losses * gain / (config.p2_k + snr) ** config.p2_gamma
    elif config.loss in ("vlb", "hybrid"):
        if config.loss == "hybrid":
            own = own.detach()
        noise = (1 - alpha_bar).sqrt()
        x_0_hat = {
            "eps": (x_t - noise * own) / alpha_bar.sqrt(),
            "x_0": own,
            "v": alpha_bar.sqrt() * x_t - noise * own,
        }[config.prediction]
        q_mean, q_variance = schedule.q_posterior(x, x_t, t)
        p_mean, _ = schedule.q_posterior(x_0_hat, x_t, t)
        small, large = (
            torch.tensor(schedule.variance(k))[t][:, None, None, None] for k in ("fixed_small", "fixed_large")
        )
        if learned:
            beta = torch.tensor(schedule.beta)[t][:, None, None, None]
            p_variance = beta ** ((value + 1) / 2) * small ** ((1 - value) / 2)
        else:
            p_variance = large if config.variance == "fixed_large" else small
        p = Normal(p_mean, p_variance.sqrt())
        kl = kl_divergence(Normal(q_mean, q_variance.clamp(min=1e-300).sqrt()), p)
        upper = torch.where(x > 1 - 1e-6, torch.ones(()), p.cdf(x + 1 / 255))
        lower = torch.where(x < -1 + 1e-6, torch.zeros(()), p.cdf(x - 1 / 255))
        decoder = -(upper - lower).clamp(min=1e-300).log()
        bound = T * torch.where((t == 0)[:, None, None, None], decoder, kl).mean((1, 2, 3))
        losses = losses + config.vlb_weight * bound if config.loss == "hybrid" else bound
    if process.history is not None:
        p_t = process.history.shares().double() / process.history.shares().sum()
        losses = losses / (T * p_t[t])
    return losses


CONFIGS = {
    "simple": {},
    "huber": {"huber": 0.3},
    "offset eps": {"offset_noise": 0.2},
    "offset v": {"offset_noise": 0.2, "prediction": "v"},
    "offset x_0": {"offset_noise": 0.2, "prediction": "x_0"},
    "min_snr": {"loss": "min_snr", "min_snr_gamma": 0.8},
    "min_snr v": {"loss": "min_snr", "prediction": "v", "timesteps": "stratified"},
    "v pure noise": {"prediction": "v", "zero_terminal_snr": True, "timesteps": "stratified"},
    "min_snr x_0 huber": {"loss": "min_snr", "prediction": "x_0", "huber": 0.1, "timesteps": "loss_aware"},
    "p2": {"loss": "p2", "p2_gamma": 0.5, "p2_k": 2.0, "timesteps": "loss_aware", "offset_noise": 0.1},
    "p2 v": {"loss": "p2", "prediction": "v"},
    "vlb": {"loss": "vlb"},
    "vlb small v loss-aware": {"loss": "vlb", "variance": "fixed_small", "prediction": "v", "timesteps": "loss_aware"},
    "vlb x_0 pure noise": {"loss": "vlb", "prediction": "x_0", "zero_terminal_snr": True, "offset_noise": 0.1},
    "vlb learned": {"loss": "vlb", "variance": "learned_range"},
    "vlb learned x_0 loss-aware": {
        **{"loss": "vlb", "variance": "learned_range", "prediction": "x_0", "timesteps": "loss_aware"},
    },
    "hybrid": {"loss": "hybrid", "variance": "learned_range", "vlb_weight": 0.5},
    "hybrid v with everything": {
        **{"loss": "hybrid", "variance": "learned_range", "vlb_weight": 0.1, "prediction": "v"},
        **{"zero_terminal_snr": True, "offset_noise": 0.1, "timesteps": "loss_aware"},
    },
}


def near_the_truth(process: TrainingProcess, noised: Noised, ordinals: Tensor, x_0: Tensor) -> Tensor:
    """A network's output, float32: the right prediction with errors of every size, and values of the variance."""
    alpha_bar = torch.tensor(process.schedule.alpha_bar)[noised.t][:, None, None, None].float()
    x = x_0.float() / 127.5 - 1
    x = x if noised.flip is None else torch.where(noised.flip[:, None, None, None], x.flip(-1), x)
    eps = (noised.x_t.float() - alpha_bar.sqrt() * x) / (1 - alpha_bar).sqrt()
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x
    error, value = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(9))
    own = {"eps": eps, "x_0": x, "v": v}[process.prediction] + 0.3 * error
    return torch.cat((own, 0.5 * value), 1) if process.config.variance == "learned_range" else own


def check_loss(config: ProcessConfig) -> None:
    x_0, ordinals = images(64, 2, 4, 3), torch.arange(5, 69)
    process = process_of(config)
    noised = process.noise(x_0, ordinals)
    if len(noised.t.unique()) < config.num_timesteps:
        raise RuntimeError("not every timestep is among the samples")
    torch.testing.assert_close(noised.x_t.double(), by_hand(process, noised, ordinals, x_0)[2], rtol=0, atol=2e-6)
    output = near_the_truth(process, noised, ordinals, x_0)
    upstream = torch.rand(64, generator=torch.Generator().manual_seed(2))
    exact = output.double().requires_grad_()
    losses = truth(process, noised, ordinals, x_0, exact)
    (grad,) = torch.autograd.grad((losses * upstream).sum(), exact)

    leaf = output.clone().requires_grad_()
    ours = process.loss(leaf, noised, ordinals, x_0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), losses.detach(), rtol=2e-5, atol=1e-6)
    (ours_grad,) = torch.autograd.grad((ours * upstream).sum(), leaf)
    scale = grad.abs().amax((1, 2, 3), keepdim=True)  # of the sample: errors cancel in single elements
    assert ((ours_grad - grad).abs() <= 2e-5 * scale).all()

    (grad,) = torch.autograd.grad(truth(process, noised, ordinals, x_0, exact).sum() * 3, exact)
    for factor in (3.0, torch.tensor(3.0)):
        fused, fused_grad = process.loss_and_grad(output, noised, ordinals, x_0, factor)
        assert torch.equal(fused, ours.detach()) and not fused.requires_grad and not fused_grad.requires_grad
        assert ((fused_grad - grad).abs() <= 2e-5 * grad.abs().amax((1, 2, 3), keepdim=True)).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_the_definitions(name: str) -> None:
    check_loss(replace(SIX, **CONFIGS[name]))


@pytest.mark.parametrize("name", ["hybrid", "hybrid v with everything"])
def test_the_kernels_see_what_the_references_see(name: str) -> None:
    config = replace(SIX, **CONFIGS[name])
    x_0, ordinals = images(4, 2, 4, 3), torch.arange(4)
    results = []
    for impl in ("reference", "triton"):
        process = process_of(config, impl=impl)
        noised = process.noise(x_0, ordinals)
        output = near_the_truth(process, noised, ordinals, x_0)
        results.append((noised.x_t, *process.loss_and_grad(output, noised, ordinals, x_0, 1.0)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


BUGS: dict[str, tuple[str, str, Any]] = {
    "the offset is not taken off": ("offset v", "_own", lambda self, prediction, noised: prediction),
    "the offset of eps is taken off v": (
        "offset v",
        "_own",
        lambda self, prediction, noised: prediction - noised.offset,
    ),
    "the mean of hybrid is not detached": (
        "hybrid",
        "_bound",
        lambda self, prediction, noised, x_0, plain=TrainingProcess._bound: (
            plain(self, prediction, noised, x_0) + (prediction[:, :2] - prediction[:, :2].detach()).mean((1, 2, 3))
        ),
    ),
    "the decoder's term is left out": ("vlb", "_bound", lambda self, prediction, *_: prediction.mean((1, 2, 3)) * 0),
    "the history has no importance": (
        "p2",
        "_target",
        lambda self, noised, x_0, plain=TrainingProcess._target: plain(self, noised._replace(importance=None), x_0),
    ),
    "weights of another t": (
        "min_snr",
        "_target",
        lambda self, noised, x_0, plain=TrainingProcess._target: plain(
            self, noised._replace(t=(noised.t + 1) % 6), x_0
        ),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_fails_the_definitions(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, method, wrong = BUGS[bug]
    monkeypatch.setattr(TrainingProcess, method, wrong)
    with pytest.raises(AssertionError):
        check_loss(replace(SIX, **CONFIGS[name]))


def test_the_mean_of_hybrid_does_not_see_the_bound() -> None:
    config = replace(SIX, **CONFIGS["hybrid"])
    x_0, ordinals = images(12, 2, 4, 3), torch.arange(12)
    process = process_of(config)
    plain = process_of(replace(SIX))
    noised = process.noise(x_0, ordinals)
    output = near_the_truth(process, noised, ordinals, x_0)
    _, grad = process.loss_and_grad(output, noised, ordinals, x_0, 1.0)
    _, simple = plain.loss_and_grad(output[:, :2], plain.noise(x_0, ordinals), ordinals, x_0, 1.0)
    assert torch.equal(grad[:, :2], simple) and (grad[:, 2:] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["offset v", "vlb", "vlb learned", "hybrid"])
def test_gradients_have_the_predictions_dtype_and_format(name: str, dtype: torch.dtype) -> None:
    config = replace(SIX, **CONFIGS[name])
    x_0, ordinals = images(12, 2, 4, 3).contiguous(memory_format=torch.channels_last), torch.arange(12)
    process = process_of(config)
    noised = process.noise(x_0, ordinals, dtype)
    exact = process.noise(x_0, ordinals)
    assert noised.x_t.dtype == dtype and noised.x_t.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(noised.x_t, exact.x_t.to(dtype), rtol=0, atol=0)
    output = near_the_truth(process, exact, ordinals, x_0).to(dtype).contiguous(memory_format=torch.channels_last)
    losses, grad = process.loss_and_grad(output, noised, ordinals, x_0, 0.5)
    assert grad.dtype == dtype and grad.stride() == output.stride() and losses.dtype == torch.float32
    # The same numbers in float32, rounded once: x_t's rounding does not reach the loss.
    same, full = process.loss_and_grad(output.float(), exact, ordinals, x_0, 0.5)
    torch.testing.assert_close(losses, same, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad.float(), full, rtol=2**-7, atol=1e-6)


def test_what_a_process_needs_is_said() -> None:
    x_0, ordinals = images(2, 2, 4, 3), torch.arange(2)
    process = process_of(replace(SIX, loss="vlb"))
    noised = process.noise(x_0, ordinals)
    with pytest.raises(ValueError, match="'vlb' needs x_0"):
        process.loss(noised.x_t, noised, ordinals)


# Offset noise


def test_offset_noise_is_shared_by_the_pixels_of_a_channel() -> None:
    strength, ordinals = 0.5, torch.arange(3000)
    config = ProcessConfig(prediction="v", zero_terminal_snr=True, offset_noise=strength, num_timesteps=2)
    process = process_of(config, flip=False)
    noised = process.noise(torch.zeros(3000, 2, 2, 2), ordinals)
    noise = noised.x_t[noised.t == 1].double()  # alpha_bar is 0: x_t is the noise
    n, flat = len(noise), noise.flatten(1)
    assert n > 1300
    covariance = flat.T @ flat / n
    within = strength**2 * torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).double()
    expected = torch.eye(8).double() + within
    assert (covariance - expected).abs().max() < 5 * (1 + strength**2) * math.sqrt(2 / n)
    assert flat.mean(0).abs().max() < 5 * math.sqrt((1 + strength**2) / n)
    # The network that knows this noise has no loss.
    assert noised.offset is not None
    eps = draw_normal(ordinals, (2, 2, 2), seed=SEED, stream=Stream.EPS) + noised.offset
    best = process.schedule.table("sqrt_alpha_bar")[noised.t][:, None, None, None] * eps
    assert process.loss(best, noised, ordinals, torch.zeros(3000, 2, 2, 2)).max() < 1e-12


# Timesteps


def test_uniform_is_what_it_was() -> None:
    """The class itself, `of` with the defaults, and the kernels called by hand: the same bits."""
    x_0, ordinals = images(9, 2, 4, 3), torch.arange(9)
    old, new = TrainingProcess(ProcessConfig().noise_schedule(), "eps", SEED, True), process_of(ProcessConfig())
    a, b = old.noise(x_0, ordinals), new.noise(x_0, ordinals)
    assert torch.equal(a.x_t, b.x_t) and torch.equal(a.t, b.t)
    tables = [old.schedule.table(name) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar")]
    t, flip = draw_timesteps(ordinals, 1000, seed=SEED)
    assert torch.equal(a.t, t) and torch.equal(a.x_t, add_noise(x_0, t, ordinals, *tables, seed=SEED, flip=flip))
    by_hand = diffusion_loss_and_grad(a.x_t, t, ordinals, *tables, seed=SEED, grad_scale=2.0)
    for process in (old, new):
        ours = process.loss_and_grad(a.x_t, a, ordinals, x_0, 2.0)
        assert all(torch.equal(x, y) for x, y in zip(ours, by_hand, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 2**20), st.integers(1, 2**20), st.integers(0, 2**32))
def test_stratified_is_exact(num_timesteps: int, batch_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, turn = torch.randint(UNIT, (2, 20), generator=generator)
    ordinals = torch.randint(2**62, (20,), generator=generator)
    u[0], ordinals[0] = UNIT - 1, batch_size - 1
    drawn = stratified(u, turn, ordinals, num_timesteps, batch_size)
    columns = (column.tolist() for column in (drawn, u, turn, ordinals))
    for t, x, turned, ordinal in zip(*columns, strict=True):
        part = (ordinal + turned * batch_size // UNIT) % batch_size
        assert t == (part * UNIT + x) * num_timesteps // (batch_size * UNIT) < num_timesteps


@pytest.mark.parametrize("num_timesteps, batch_size", [(1000, 64), (30, 90), (7, 5)])
def test_every_batch_covers_the_timesteps_evenly(num_timesteps: int, batch_size: int) -> None:
    config = ProcessConfig(num_timesteps=num_timesteps, timesteps="stratified")
    process = process_of(config, batch_size)
    drawn = process.timesteps(torch.arange(200 * batch_size)).view(200, batch_size)
    batches = drawn.sort(dim=1).values
    part = torch.arange(batch_size)
    assert (batches >= part * num_timesteps // batch_size).all()
    assert (batches <= ((part + 1) * num_timesteps - 1) // batch_size).all()
    if batch_size % num_timesteps == 0:
        assert (batches == part // (batch_size // num_timesteps)).all()
    # Over all places in the batch the marginal is uniform; its variance is below that of independent draws.
    counts = torch.bincount(batches.flatten(), minlength=num_timesteps).double()
    expected = batches.numel() / num_timesteps
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < num_timesteps - 1 + 5 * math.sqrt(2 * num_timesteps)
    f = (torch.arange(num_timesteps).double() / num_timesteps) ** 2
    means = f[batches].mean(1)
    assert abs(float(means.mean() - f.mean())) < 5 * float(means.std()) / math.sqrt(200) + 1e-12
    assert means.var() < 0.2 * f.var() / batch_size
    # And at every place of it, where a stream's lanes put images of the same shards.
    places = (drawn * 4).div(num_timesteps, rounding_mode="floor")
    for quarter in range(4):
        share = (torch.arange(num_timesteps) * 4 // num_timesteps == quarter).double().mean()
        assert ((places == quarter).double().mean(0) - share).abs().max() < 5 * math.sqrt(0.25 / 200)


def history_of(losses: Tensor) -> LossHistory:
    history = LossHistory(len(losses))
    history.load({"losses": losses})
    return history


def test_loss_aware_is_uniform_until_every_timestep_has_ten_losses() -> None:
    losses = torch.rand(20, 10, generator=torch.Generator().manual_seed(0)) + 1
    u = torch.randint(UNIT, (100,), generator=torch.Generator().manual_seed(1))
    for missing in (True, False):
        if missing:
            losses[7, 0] = -1
        else:
            losses[7, 0] = 30
        history = history_of(losses)
        t, importance = history.draw(u)
        assert torch.equal(t, u * 20 >> 31) == missing
        assert (importance == 1).all() == missing


def test_loss_aware_probabilities_are_equation_18() -> None:
    losses = (
        torch.rand(50, 10, generator=torch.Generator().manual_seed(0)).square() * torch.logspace(0, -4, 50)[:, None]
    )
    history = history_of(losses)
    shares = history.shares()
    p = shares.double() / shares.sum()
    w = losses.double().square().mean(1).sqrt()
    exact = 0.999 * w / w.sum() + 0.001 / 50
    assert (p - exact).abs().max() < 1.5 / (256 * 50)  # a half and the least of one unit
    assert shares.min() >= 1
    torch.testing.assert_close(history.importance(torch.arange(50)).double(), 1 / (50 * p), rtol=2e-7, atol=0)
    # The inverse of the cumulative distribution, by Python's own integers.
    u = [0, 1, UNIT // 3, UNIT - 1, *torch.randint(UNIT, (500,), generator=torch.Generator().manual_seed(1)).tolist()]
    t, importance = history.draw(torch.tensor(u))
    bounds, total = np.cumsum(shares.tolist()), int(shares.sum())
    assert t.tolist() == [int(np.searchsorted(bounds, (x * total) >> 31, side="right")) for x in u]
    assert torch.equal(importance, history.importance(t))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(0, 2**32))
def test_importance_leaves_expectations_as_they_are(num_timesteps: int, seed: int) -> None:
    """sum over t of p_t f(t) / (T p_t) = mean f, whatever the history, with the probabilities that are drawn from."""
    generator = torch.Generator().manual_seed(seed)
    history = history_of(torch.randn(num_timesteps, 10, generator=generator).exp() ** 3)
    every = torch.arange(num_timesteps)
    p = history.shares().double() / history.shares().sum()
    f = torch.randn(num_timesteps, generator=generator, dtype=torch.float64)
    assert float((p * f * history.importance(every)).sum()) == pytest.approx(float(f.mean()), rel=1e-6, abs=1e-6)


def test_drawn_losses_average_to_the_uniform_mean() -> None:
    """The process's own draws and losses, with loss-aware timesteps and without: one expectation, smaller spread."""
    x_0, ordinals = images(20_000, 1, 1, 1), torch.arange(20_000)
    config = ProcessConfig(num_timesteps=20, schedule="cosine", loss="vlb")
    losses: dict[str, Tensor] = {}
    for timesteps in ("uniform", "loss_aware"):
        process = TrainingProcess.of(replace(config, timesteps=timesteps), seed=SEED, flip=False, batch_size=8)
        noised = process.noise(x_0, ordinals)
        for _ in range(2):  # the second time with a history
            losses[timesteps] = process.loss(torch.zeros_like(noised.x_t), noised, ordinals, x_0).double()
            if process.history is not None:
                process.history.update(noised.t, losses[timesteps])
                noised = process.noise(x_0, ordinals)
    uniform, aware = losses["uniform"], losses["loss_aware"]
    assert aware.var() < 0.8 * uniform.var()
    spread = math.sqrt(float(uniform.var() + aware.var()) / 20_000)
    assert abs(float(uniform.mean() - aware.mean())) < 4 * spread
    planted = aware / noised.importance  # the importance left out
    assert abs(float(uniform.mean() - planted.mean())) > 6 * spread


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 4), st.floats(0, 1e6, width=32) | st.sampled_from([math.nan, math.inf])),
            min_size=1,
            max_size=30,
        ),
        max_size=4,
    ),
)
def test_the_history_is_the_last_ten_of_each(num_timesteps: int, steps: list[list[tuple[int, float]]]) -> None:
    history = LossHistory(num_timesteps)
    queues: list[deque[float]] = [deque([-1.0] * 10, maxlen=10) for _ in range(num_timesteps)]
    for samples in steps:
        t = torch.tensor([s[0] % num_timesteps for s in samples])
        own = torch.tensor([s[1] for s in samples], dtype=torch.float32)
        history.update(t, own * history.importance(t))
        for timestep, loss in zip(t.tolist(), own.tolist(), strict=True):
            if math.isfinite(loss):
                queues[timestep].append(loss)
        torch.testing.assert_close(history.losses, torch.tensor([list(q) for q in queues]), rtol=1e-6, atol=0)
        assert (history.shares() >= 1).all()


def test_extreme_losses_leave_probabilities_finite() -> None:
    for losses in (torch.zeros(4, 10), torch.full((4, 10), 1e18), torch.eye(4, 10) * 1e18):
        shares = history_of(losses).shares()
        assert (shares >= 1).all() and shares.sum() <= 4 * 256 + 4
    history = LossHistory(2)
    history.update(torch.tensor([0, 0, 1]), torch.tensor([3e38, -1e-7, 0.5]))
    assert history.losses[0, -2:].tolist() == [pytest.approx(1e18), 0.0] and history.losses[1, -1] == 0.5


def test_rounding_hardly_ever_changes_a_timestep() -> None:
    losses = torch.rand(1000, 10, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 1000)[:, None]
    u = torch.randint(UNIT, (20_000,), generator=torch.Generator().manual_seed(1))
    t = history_of(losses).draw(u)[0]
    off = 1 + 1e-7 * torch.randn(1000, 10, generator=torch.Generator().manual_seed(2))
    assert (history_of(losses * off).draw(u)[0] != t).float().mean() < 1e-3


def test_the_state_goes_on_from_a_checkpoint() -> None:
    config = replace(SIX, timesteps="loss_aware")
    process, other = process_of(config), TrainingProcess.of(config, seed=SEED, flip=True, batch_size=8)
    assert process.history is not None and other.history is not None
    other.history.load({name: tensor.clone() for name, tensor in process.history.tensors().items()})
    ordinals = torch.arange(100)
    assert torch.equal(process.timesteps(ordinals), other.timesteps(ordinals))
    # A trainer may as well write into the tensors themselves.
    other.history.tensors()["losses"].fill_(-1)
    assert torch.equal(
        other.timesteps(ordinals), TrainingProcess.of(config, seed=SEED, flip=True, batch_size=8).timesteps(ordinals)
    )
    for tensors, message in (({}, "none"), ({"losses": torch.zeros(5, 10)}, r"\[5, 10\].*\[6, 10\]")):
        with pytest.raises(CheckpointError, match=message):
            other.history.load(tensors)
    assert process_of(SIX).history is None


# What all of them hold


@pytest.mark.parametrize("name", ["v pure noise", "p2", "vlb small v loss-aware", "hybrid v with everything"])
def test_nothing_depends_on_how_a_batch_is_cut(name: str) -> None:
    """Three steps of 1, 2 or 4 virtual processes: timesteps, losses, gradients and history bit for bit."""
    config = replace(SIX, **CONFIGS[name])
    runs = []
    for world in (1, 2, 4):
        process = TrainingProcess.of(config, seed=SEED, flip=True, batch_size=40)
        record = []
        for step in range(3):
            x_0, ordinals = images(40, 2, 4, 3, seed=step), torch.arange(40) + 40 * step
            cuts = [slice(rank * 40 // world, (rank + 1) * 40 // world) for rank in range(world)]
            noised = [process.noise(x_0[c], ordinals[c]) for c in cuts]
            channels = 4 if config.variance == "learned_range" else 2
            outputs = torch.randn(40, channels, 4, 3, generator=torch.Generator().manual_seed(step))
            results = [
                process.loss_and_grad(outputs[c], n, ordinals[c], x_0[c], 0.1)
                for n, c in zip(noised, cuts, strict=True)
            ]
            t, losses = torch.cat([n.t for n in noised]), torch.cat([r[0] for r in results])
            record += [t, losses, torch.cat([r[1] for r in results]), torch.cat([n.x_t for n in noised])]
            if process.history is not None:
                process.history.update(t, losses)
                record.append(process.history.losses.clone())
        runs.append(record)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


class NoSync(TorchDispatchMode):
    """Fails where a value is read from the device by the host, or a shape depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        ), func
        return func(*args, **(kwargs or {}))


def whole_step(process: TrainingProcess, x_0: Tensor, ordinals: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    noised = process.noise(x_0, ordinals, dtype)
    output = torch.cat((noised.x_t,) * (2 if process.config.variance == "learned_range" else 1), 1)
    if process.self_conditioning:
        process.estimate(output, noised, ordinals)
    process.hide_labels(ordinals % 3, ordinals, 4)
    losses, grad = process.loss_and_grad(output, noised, ordinals, x_0, torch.full((), 0.25, device=x_0.device))
    if process.history is not None:
        process.history.update(noised.t, losses)
    return losses, grad


STEPS = ["simple", "offset v", "huber", "vlb", "vlb learned", "p2", "hybrid v with everything"]


@pytest.mark.parametrize("name", STEPS)
def test_the_host_reads_nothing_and_nothing_has_to_be_real(name: str) -> None:
    config = replace(SIX, **CONFIGS[name], self_conditioning=True, label_dropout=0.2)
    process = TrainingProcess.of(config, seed=SEED, flip=True, batch_size=8)
    x_0, ordinals = images(8, 2, 4, 3), torch.arange(8)
    whole_step(process, x_0, ordinals, torch.bfloat16)
    with NoSync():
        losses, grad = whole_step(process, x_0, ordinals, torch.bfloat16)
    with FakeTensorMode():
        process = TrainingProcess.of(config, seed=SEED, flip=True, batch_size=8)
        fake = torch.empty(8, 2, 4, 3, dtype=torch.uint8), torch.empty(8, dtype=torch.int64)
        faked = whole_step(process, *fake, torch.bfloat16)
    for real, false in zip((losses, grad), faked, strict=True):
        assert real.shape == false.shape and real.dtype == false.dtype and real.stride() == false.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_a_step_can_be_captured_in_a_graph(name: str) -> None:
    config = replace(SIX, **CONFIGS[name], self_conditioning=True, label_dropout=0.2)
    x_0, ordinals = images(64, 2, 4, 3).cuda(), torch.arange(64).cuda()
    plain, captured = (TrainingProcess.of(config, seed=SEED, flip=True, batch_size=64, device="cuda") for _ in range(2))
    expected = [whole_step(plain, x_0, ordinals + 64 * step, torch.bfloat16) for step in range(4)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        whole_step(captured, x_0, ordinals, torch.bfloat16)
    torch.cuda.current_stream().wait_stream(stream)
    graph, places = torch.cuda.CUDAGraph(), ordinals.clone()
    with torch.cuda.graph(graph, stream=stream):
        results = whole_step(captured, x_0, places, torch.bfloat16)
    for step in range(1, 4):
        places.copy_(ordinals + 64 * step)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, expected[step], strict=True))


# Inputs besides x_t


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_estimate_is_x_0_hat_for_half_of_the_samples(prediction: Any) -> None:
    config = replace(SIX, prediction=prediction, self_conditioning=True, variance="learned_range", loss="hybrid")
    process = process_of(config, flip=False)
    x_0, ordinals = images(400, 1, 3, 2), torch.arange(400)
    noised = process.noise(x_0, ordinals, torch.bfloat16)
    exact = process.noise(x_0, ordinals)
    estimate = process.estimate(near_the_truth(process, exact, ordinals, x_0), noised, ordinals)
    own = near_the_truth(process, exact, ordinals, x_0)[:, :1]
    x_0_hat = process.schedule.predict_x_0(exact.x_t, exact.t, own, prediction).clamp(-1, 1)
    given = estimate.flatten(1).abs().sum(1) > 0
    assert abs(int(given.sum()) - 200) < 50
    torch.testing.assert_close(estimate[given], x_0_hat[given])
    some = torch.tensor([399, 3, 77])
    part = process.estimate(own[some].repeat(1, 2, 1, 1), process.noise(x_0[some], ordinals[some]), ordinals[some])
    torch.testing.assert_close(part, estimate[some])
