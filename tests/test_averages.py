"""Power-function averages: the recursion against the sum it stands for, any width from the snapshots of two, files."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import integrate, stats
from torch import Tensor

from fastddpm import averages, sharding
from fastddpm.averages import (
    MAX_WIDTH,
    PowerAverages,
    average_weight,
    exponent_of,
    fit_profile,
    profile_product,
    read_snapshots,
    reconstruct,
    rewind_snapshots,
    run_ema,
    width_of,
    write_snapshots,
)
from fastddpm.cli import EmaCommand
from fastddpm.config import EMAConfig, preset, to_dict
from fastddpm.errors import CheckpointError, ConfigError
from fastddpm.optim import OptimConfig, make_optimizer
from fastddpm.pipeline import load_pipeline
from fastddpm.unet import UNet, UNetConfig

STEPS, STORED = 2000, (0.05, 0.1)


def profile(width: float, step: int) -> np.ndarray:
    """The weight of each step in the average after `step`: the power function integrated over each step's interval."""
    edges = (np.arange(step + 1) / step) ** (exponent_of(width) + 1)
    return np.diff(edges)


def direct(history: np.ndarray, width: float, step: int) -> np.ndarray:
    """The average of history [steps, ...] after `step` steps as one sum."""
    return np.tensordot(profile(width, step), history[:step], axes=1)


def walk(steps: int = STEPS, size: int = 6) -> np.ndarray:
    """Weights far from 0 that drift: float64 [steps, size]."""
    return 5 + np.random.default_rng(0).standard_normal((steps, size)).cumsum(0) / math.sqrt(steps)


def kept(history: np.ndarray, widths: tuple[float, ...] = STORED, dtype: torch.dtype = torch.float64) -> PowerAverages:
    """The averages after training that went through the weights of history."""
    power = PowerAverages([torch.zeros(history.shape[1:], dtype=dtype)], widths)
    for step, weights in enumerate(torch.from_numpy(history).to(dtype)):
        power.update([weights], power.weights(step))
    return power


# The relation of widths and exponents.


@given(st.floats(1e-5, MAX_WIDTH))
def test_exponents_have_the_widths_they_are_made_from(width: float) -> None:
    assert width_of(exponent_of(width)) == pytest.approx(width, rel=1e-12)


@given(st.floats(0.0, 1e5))
def test_widths_have_the_exponents_they_are_made_from(exponent: float) -> None:
    assert exponent_of(min(width_of(exponent), MAX_WIDTH)) == pytest.approx(exponent, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 6.94, 16.97, 200.0])
def test_the_width_is_the_standard_deviation_of_the_profile(exponent: float) -> None:
    """By quadrature of the power function itself, and by scipy's Beta distribution."""
    moments = [integrate.quad(lambda u, k=k: (exponent + 1) * u ** (exponent + k), 0, 1)[0] for k in (0, 1, 2)]
    assert moments[0] == pytest.approx(1)
    assert math.sqrt(moments[2] - moments[1] ** 2) == pytest.approx(width_of(exponent), rel=1e-6)
    assert stats.beta(exponent + 1, 1).std() == pytest.approx(width_of(exponent))


def test_the_exponents_of_the_paper() -> None:
    """Karras et al. 2024, section 3.1: widths of 0.05 and 0.10 are the exponents 16.97 and 6.94."""
    assert [round(exponent_of(width), 2) for width in STORED] == [16.97, 6.94]
    assert exponent_of(MAX_WIDTH) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, math.nan])
def test_widths_out_of_range_are_refused(width: float) -> None:
    with pytest.raises(ConfigError, match=r"must be above 0 and at most 0\.2887"):
        exponent_of(width)


def test_a_width_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ema\.widths is 0\.1 0\.1: give different widths"):
        PowerAverages([], (0.1, 0.1))


# The recursion.


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25, MAX_WIDTH])
def test_the_recursion_is_the_explicit_sum(width: float) -> None:
    """Over 300 steps in float64, at every step; MAX_WIDTH is the plain mean."""
    history = walk(300)
    power = PowerAverages([torch.zeros(6, dtype=torch.float64)], (width,))
    for step, weights in enumerate(torch.from_numpy(history)):
        power.update([weights], power.weights(step))
        np.testing.assert_allclose(power.averages[0][0], direct(history, width, step + 1), rtol=1e-12)
    if width == MAX_WIDTH:
        np.testing.assert_allclose(power.averages[0][0], history.mean(0), rtol=1e-12)


def test_a_wrong_exponent_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """beta = (1 - 1/t)^g, one power short, gives another average by far more than rounding."""
    right = averages.average_weight
    monkeypatch.setattr(averages, "average_weight", lambda exponent, step: right(exponent - 1, step))
    history = walk(300)
    wrong, truth = kept(history, (0.1,)).averages[0][0].numpy(), direct(history, 0.1, 300)
    assert np.abs(wrong - truth).max() > 1e-3


def test_weights_keep_their_digits_at_large_steps() -> None:
    """1 - (1 - 1/t)^a is a / t for large t, which the formula as it stands loses in float64."""
    t, a = 10**12, exponent_of(0.1) + 1
    assert average_weight(a - 1, t - 1) == pytest.approx(a / t - a * (a - 1) / 2 / t**2, rel=1e-13)
    assert average_weight(a - 1, 0) == 1.0


def test_weights_from_the_device_and_flags_of_skipped_steps_do_what_numbers_do() -> None:
    """As a graph and a GPU give them: float32 scalars and a bool; a skipped step changes nothing."""
    history = walk(50).astype(np.float32)
    by_number = kept(history, dtype=torch.float32)
    power = PowerAverages([torch.zeros(6)], STORED)
    for step, weights in enumerate(torch.from_numpy(history)):
        device_weights = [torch.tensor(weight) for weight in power.weights(step)]
        power.update([weights], device_weights, torch.tensor(True))
        before = [average[0].clone() for average in power.averages]
        power.update([weights * torch.nan], device_weights, torch.tensor(False))
        assert all(torch.equal(b, a[0]) for b, a in zip(before, power.averages, strict=True))
    for a, b in zip(by_number.averages, power.averages, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_averages_keep_the_memory_order_of_the_weights() -> None:
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    power = PowerAverages([weight], (0.1,))
    assert power.averages[0][0].stride() == weight.stride()
    power.update([weight], power.weights(0))
    assert torch.equal(power.averages[0][0], weight) and power.averages[0][0].data_ptr() != weight.data_ptr()


# Any width from the snapshots of some.


@pytest.mark.parametrize(("s", "t"), [(100, 100), (37, 100), (100, 37)])
def test_inner_products_are_the_integrals(s: int, t: int) -> None:
    a, b = exponent_of(0.05), exponent_of(0.2)

    def product(tau: float) -> float:
        return (a + 1) * tau**a / s ** (a + 1) * (b + 1) * tau**b / t ** (b + 1)

    assert profile_product(a, s, b, t) == pytest.approx(integrate.quad(product, 0, min(s, t))[0], rel=1e-9)


def stored(every: int, last: int = STEPS, widths: tuple[float, ...] = STORED) -> tuple[np.ndarray, np.ndarray]:
    steps = np.arange(every, last + 1, every, dtype=np.float64)
    return np.tile([exponent_of(width) for width in widths], len(steps)), np.repeat(steps, len(widths))


@pytest.mark.parametrize("width", [0.03, 0.075, 0.15, 0.25])
def test_the_fit_is_the_least_squares_of_sampled_profiles(width: float) -> None:
    """An independent solver on the densities, sampled finely, with the sum put in as an equation of great weight."""
    exponents, steps = stored(every=400)
    weights, error = fit_profile(exponents, steps, exponent_of(width), STEPS)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    tau = (np.arange(200_000) + 0.5) * (STEPS / 200_000)

    def density(exponent: float, step: float) -> np.ndarray:
        return np.where(tau < step, (exponent + 1) / step * (tau / step) ** exponent, 0.0)

    columns = np.stack([density(e, s) for e, s in zip(exponents, steps, strict=True)], 1)
    wanted = density(exponent_of(width), STEPS)
    rows = np.vstack((columns, 1e4 * np.ones(len(steps))))
    independent = np.linalg.lstsq(rows, np.append(wanted, 1e4), rcond=None)[0]
    left = np.linalg.norm(columns @ independent - wanted) / np.linalg.norm(wanted)
    assert error == pytest.approx(left, rel=1e-2)
    np.testing.assert_allclose(weights, independent, atol=2e-3)


def test_more_snapshots_match_better_and_a_stored_average_is_found_exactly() -> None:
    errors = [fit_profile(*stored(every), exponent_of(0.075), STEPS)[1] for every in (1000, 400, 100, 50)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 < 1e-2 < errors[0]
    exponents, steps = stored(100)
    weights, error = fit_profile(exponents, steps, exponent_of(0.1), 1500)
    assert error == 0 and weights[(exponents == exponent_of(0.1)) & (steps == 1500)] == 1 and abs(weights).sum() == 1


def write_history(run: Path, history: np.ndarray, every: int, dtype: torch.dtype = torch.float64) -> PowerAverages:
    """Snapshots of training through history, two tensors of the one."""

    def parts(x: Tensor) -> dict[str, Tensor]:
        return {"b.weight": x[:4].view(2, 2), "a.bias": x[4:]}

    rows = torch.from_numpy(history).to(dtype)
    power = PowerAverages(list(parts(torch.zeros_like(rows[0])).values()), STORED)
    for step, weights in enumerate(rows):
        power.update(list(parts(weights).values()), power.weights(step))
        if (step + 1) % every == 0:
            write_snapshots(run, step + 1, power, parts(weights))
    return power


SHAPES = {"b.weight": (2, 2), "a.bias": (2,)}


def flat(tensors: dict[str, Tensor]) -> np.ndarray:
    return torch.cat((tensors["b.weight"].flatten(), tensors["a.bias"])).numpy()


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("averages") / "run"
    write_history(run, walk(), every=100)
    return run


@pytest.mark.parametrize(("width", "step"), [(0.075, 2000), (0.03, 2000), (0.2, 2000), (0.12, 1000), (0.075, 1234)])
def test_another_width_is_the_average_over_all_steps_within_the_error_predicted(
    long_run: Path, width: float, step: int
) -> None:
    """By Cauchy-Schwarz: |sum of what is left of the profile, times weights| <= error x |profile| x |weights - mean|.

    What is left adds up to 0, so that any constant may be taken from the weights. The mean square of a random walk's
    part of it is far smaller.
    """
    history = walk()
    snapshots = [s for s in read_snapshots(long_run) if s.step <= -(-step // 100) * 100]
    tensors, error = reconstruct(snapshots, width, step, SHAPES)
    exponent = exponent_of(width)
    off = np.abs(flat(tensors) - direct(history, width, step))
    spread = np.sqrt(((history[: snapshots[-1].step] - 5) ** 2).sum(0))
    bound = error * math.sqrt(profile_product(exponent, step, exponent, step)) * spread
    assert (off <= bound + 1e-12).all()
    # The next width that is stored would not have done.
    near = min(STORED, key=lambda other: abs(other - width))
    assert off.max() < np.abs(direct(history, near, step) - direct(history, width, step)).max()
    if step % 100 == 0 and width == 0.075:
        assert off.max() < 1e-4


def test_weights_that_never_change_come_out_exactly(tmp_path: Path) -> None:
    """The weights of the sum add up to 1, also where two snapshots cannot match the profile."""
    write_history(tmp_path, np.full((40, 6), 1234.5), every=20)
    tensors, error = reconstruct(read_snapshots(tmp_path), 0.25, 40, SHAPES)
    assert error > 0.1
    np.testing.assert_allclose(flat(tensors), 1234.5, rtol=1e-13)


def test_snapshots_with_the_exponent_of_another_recursion_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above fails where snapshots are not what their exponent says."""
    right = averages.average_weight
    monkeypatch.setattr(averages, "average_weight", lambda exponent, step: right(exponent - 1, step))
    history = walk()
    write_history(tmp_path, history, every=100)
    tensors, error = reconstruct(read_snapshots(tmp_path), 0.075, STEPS, SHAPES)
    exponent = exponent_of(0.075)
    bound = error * math.sqrt(profile_product(exponent, STEPS, exponent, STEPS)) * np.sqrt(((history - 5) ** 2).sum(0))
    assert (np.abs(flat(tensors) - direct(history, 0.075, STEPS)) > bound).any()


# Files.


def test_a_snapshot_says_what_it_is_and_a_stored_width_is_read_bitwise(tmp_path: Path) -> None:
    power = write_history(tmp_path, walk(60), every=30, dtype=torch.float32)
    files = sorted(path.name for path in (tmp_path / "ema").iterdir())
    assert files == [f"step-{step:08d}-width-{width}.safetensors" for step in (30, 60) for width in STORED]
    facts = _facts(tmp_path / "ema" / files[-1])
    assert (facts["step"], facts["width"], float(facts["exponent"])) == ("60", "0.1", exponent_of(0.1))
    snapshots = read_snapshots(tmp_path)
    assert [(s.step, s.width) for s in snapshots] == [(30, 0.05), (30, 0.1), (60, 0.05), (60, 0.1)]
    tensors, error = reconstruct(snapshots, 0.1, 60, SHAPES)
    assert error == 0
    for mine, theirs in zip((tensors["b.weight"], tensors["a.bias"]), power.averages[1], strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)


def test_a_restart_from_kept_averages_is_bitwise_and_writes_the_same_snapshots(tmp_path: Path) -> None:
    """Stopped after 35 of 60 steps, the averages put back; snapshots beyond are dropped and written again."""
    history = walk(60)
    write_history(tmp_path / "a", history, every=20, dtype=torch.float32)
    write_history(tmp_path / "b", history, every=20, dtype=torch.float32)
    (tmp_path / "b" / "ema" / ".0123abcd.step-00000060-width-0.1.safetensors").write_bytes(b"half")
    (tmp_path / "b" / "ema" / "width-0.2").mkdir()
    rewind_snapshots(tmp_path / "b", 35)
    left = sorted(path.name for path in (tmp_path / "b" / "ema").iterdir())
    assert left == [*(f"step-00000020-width-{width}.safetensors" for width in STORED), "width-0.2"]

    rows = torch.from_numpy(history).float()
    power = PowerAverages([rows[0]], STORED)
    for step in range(35):
        power.update([rows[step]], power.weights(step))
    saved = [average[0].clone() for average in power.averages]
    again = PowerAverages([torch.full((6,), torch.nan)], STORED)
    for average, tensor in zip(again.averages, saved, strict=True):
        average[0].copy_(tensor)
    for step in range(35, 60):
        again.update([rows[step]], again.weights(step))
        if step + 1 in (40, 60):
            split = PowerAverages([rows[0][:4].view(2, 2), rows[0][4:]], STORED)
            split.averages = [[a[0][:4].view(2, 2), a[0][4:]] for a in again.averages]
            write_snapshots(tmp_path / "b", step + 1, split, dict.fromkeys(SHAPES, rows[0]))
    for path in (tmp_path / "a" / "ema").iterdir():
        other = tmp_path / "b" / "ema" / path.name
        a, b = load_file(path), load_file(other)
        assert _facts(path) == _facts(other) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict, place: Path, metadata: dict) -> None:
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(averages, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-00000010-width-0\.05\.safetensors cannot be written.*No space"):
        write_history(tmp_path, walk(10), every=10)
    assert list((tmp_path / "ema").iterdir()) == []


def _facts(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        facts: dict[str, str] = file.metadata()
    return facts


def _spoil(path: Path, damage: str) -> None:
    raw, tensors, facts = path.read_bytes(), load_file(path), _facts(path)
    if damage == "flipped bit":
        path.write_bytes(raw[:-3] + bytes([raw[-3] ^ 4]) + raw[-2:])
    elif damage == "torn":
        path.write_bytes(raw[:-8])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "another net":
        save_file({"b.weight": tensors["b.weight"]}, path, metadata=facts)
    elif damage == "another shape":
        save_file(tensors | {"a.bias": torch.zeros(3, dtype=torch.float64)}, path, metadata=facts)
    elif damage == "another step":
        save_file(tensors, path, metadata=facts | {"step": "7"})
    else:
        save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("flipped bit", "another sha256"),
        ("torn", "cannot be read"),
        ("empty", "cannot be read"),
        ("another net", "another network: it has no a.bias"),
        ("another shape", r"another network: a\.bias is \[3\], not \[2\]"),
        ("another step", "not what its name says"),
        ("no facts", "cannot be read as a snapshot"),
    ],
)
def test_a_damaged_snapshot_is_named(tmp_path: Path, damage: str, words: str) -> None:
    write_history(tmp_path, walk(40), every=20)
    path = tmp_path / "ema" / "step-00000020-width-0.1.safetensors"
    _spoil(path, damage)
    with pytest.raises(CheckpointError, match=rf"{path.name}.*{words}.*delete it to do without"):
        reconstruct(read_snapshots(tmp_path), 0.07, 40, SHAPES)
    path.unlink()
    reconstruct(read_snapshots(tmp_path), 0.07, 40, SHAPES)


def test_memory_stays_at_two_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are read one at a time, of one file at a time: never a whole file."""
    write_history(tmp_path, walk(40), every=10)
    open_files, most = [0], [0]
    original = averages.safe_open

    class Counted:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.file = original(*args, **kwargs)

        def __enter__(self) -> "Counted":
            open_files[0] += 1
            most[0] = max(most[0], open_files[0])
            self.inner = self.file.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            open_files[0] -= 1
            self.file.__exit__(*args)

        def __getattr__(self, name: str) -> object:
            assert name in ("keys", "get_tensor", "metadata")
            return getattr(self.inner, name)

    monkeypatch.setattr(averages, "safe_open", Counted)
    reconstruct(read_snapshots(tmp_path), 0.07, 40, SHAPES)
    assert most == [1] and open_files == [0]


def _sharded(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net = UNet(NET, seed=3)
    sharding.shard(net, torch.device("cpu"))
    named = dict(net.named_parameters())
    held = [sharding.local(parameter) for parameter in named.values()]
    power = PowerAverages(held, (0.1,))
    for step in range(3):
        for tensor in held:
            tensor.mul_(1.5)
        power.update(held, power.weights(step))
    write_snapshots(folder, 3, power, named, main=rank == 0)
    dist.destroy_process_group()


def test_snapshots_of_a_sharded_net_are_those_of_the_whole_one(tmp_path: Path) -> None:
    """Two processes, each with some rows of each weight, uneven ones and none at all among them."""
    other = torch.multiprocessing.get_context("spawn").Process(target=_sharded, args=(1, tmp_path))
    other.start()
    _sharded(0, tmp_path)
    other.join()
    assert other.exitcode == 0
    named = dict(UNet(NET, seed=3).named_parameters())
    held = [parameter.detach() for parameter in named.values()]
    power = PowerAverages(held, (0.1,))
    for step in range(3):
        for tensor in held:
            tensor.mul_(1.5)
        power.update(held, power.weights(step))
    assert len(read_snapshots(tmp_path)) == 1
    whole = load_file(read_snapshots(tmp_path)[0].path)
    assert whole.keys() == named.keys() and any(len(tensor) == 1 for tensor in whole.values())
    assert all(torch.equal(whole[n], a) for n, a in zip(named, power.averages[0], strict=True))


# The command.

NET = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run folder as the trainer leaves it, after 40 steps of a net that follows a random walk; its direct average."""
    run = tmp_path_factory.mktemp("command") / "run"
    run.mkdir()
    config = dataclasses.replace(preset("digits", run=str(run)), model=NET, ema=EMAConfig(widths=STORED))
    (run / "config.json").write_text(json.dumps({"config": to_dict(config), "versions": {}, "data": {}}))
    net = UNet(NET)
    named = dict(net.named_parameters())
    optimizer = make_optimizer(OptimConfig(lr=1e-2), list(named.values()))
    power = PowerAverages(list(named.values()), STORED)
    weights, generator = profile(0.07, 40), torch.Generator().manual_seed(0)
    sums = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in named.items()}
    for step in range(40):
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(memory_format=torch.preserve_format)
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        optimizer.step()
        power.update([parameter.detach() for parameter in named.values()], power.weights(step))
        for name, parameter in named.items():
            sums[name] += parameter.detach().double() * weights[step]
        if (step + 1) % 4 == 0:
            write_snapshots(run, step + 1, power, named)
    return run, sums


def test_the_command_writes_a_pipeline_of_the_average(
    run_folder: tuple[Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, truth = run_folder
    assert run_ema(EmaCommand(str(run), 0.07)) == 0
    said = capsys.readouterr().out
    out = run / "ema" / "width-0.07"
    assert f"pipeline   {out}" in said and f"next       fastddpm sample {out} --out" in said
    assert "width 0.07 after step 40, from 20 snapshots of widths 0.05, 0.1" in said
    pipeline = load_pipeline(str(out))
    assert pipeline.process == preset("digits").diffusion
    got = pipeline.unet.state_dict()
    off = max(float((got[name] - tensor).abs().max()) for name, tensor in truth.items())
    last = load_file(run / "ema" / "step-00000040-width-0.1.safetensors")
    other = max(float((last[name] - tensor).abs().max()) for name, tensor in truth.items())
    assert off < 1e-3 < other
    facts = json.loads((out / "config.json").read_text())
    assert facts["average"]["width"] == 0.07 and facts["average"]["step"] == 40
    assert f"{facts['average']['profile_error']:.2%} away from" in said
    from diffusers import DDPMPipeline

    DDPMPipeline.from_pretrained(out)


def test_an_earlier_step_does_not_depend_on_how_far_the_run_has_gone(
    run_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = run_folder
    shorter = tmp_path / "run"
    (shorter / "ema").mkdir(parents=True)
    (shorter / "config.json").write_text((run / "config.json").read_text())
    for path in (run / "ema").glob("step-*.safetensors"):
        if path.name[:13] <= "step-00000024":
            (shorter / "ema" / path.name).write_bytes(path.read_bytes())
    for folder, name in ((run, "long"), (shorter, "short")):
        run_ema(EmaCommand(str(folder), 0.07, step=22, out=str(tmp_path / name)))
    a, b = (
        (tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for name in ("long", "short")
    )
    assert a == b
    capsys.readouterr()
    run_ema(EmaCommand(str(run), 0.003, out=str(tmp_path / "narrow")))
    assert "more snapshots (--ema.snapshot-every)" in capsys.readouterr().out


def test_what_cannot_be_made_is_one_clear_line(run_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    run, _ = run_folder
    for command, words in (
        (EmaCommand(str(tmp_path), 0.1), "is not a run folder"),
        (EmaCommand(str(run), 0.3), r"--width is 0\.3: it must be above 0 and at most 0\.2887"),
        (EmaCommand(str(run), 0.1, step=3), "--step is 3: the snapshots of .* are of steps 4 to 40"),
        (EmaCommand(str(run), 0.1, step=41), "--step is 41: the snapshots"),
        (EmaCommand(str(run), 0.1, out=str(run)), "--out is the run folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            run_ema(command)
    facts = json.loads((run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=r"has no snapshots in .* yet"):
        run_ema(EmaCommand(str(tmp_path), 0.1))
    facts["config"]["ema"]["widths"] = []
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=r"only a run started with --ema\.widths"):
        run_ema(EmaCommand(str(tmp_path), 0.1))
