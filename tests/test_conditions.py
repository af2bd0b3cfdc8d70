"""What the trainer does around the loss: labels and their hiding, estimates as inputs, augmentation, averages, the log.

Everything is addressed by position, so a run with all of it goes on bitwise.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastddpm.checkpoint import Checkpoints
from fastddpm.config import Config, preset, read_config, to_dict
from fastddpm.diffusion import ProcessConfig, TrainingProcess
from fastddpm.errors import ConfigError, DataError
from fastddpm.pipeline import load_pipeline
from fastddpm.step import FIXED_POINT, TrainStep
from fastddpm.trainer import Trainer
from fastddpm.unet import UNet

ROOT = Path(__file__).parents[1]
EVERYTHING = {
    "num_timesteps": 5,  # few, so that loss-aware timesteps soon have a history to go by
    "prediction": "v",
    "zero_terminal_snr": True,
    "variance": "learned_range",
    "loss": "hybrid",
    "timesteps": "loss_aware",
    "offset_noise": 0.1,
    "label_dropout": 0.2,
    "self_conditioning": True,
}


def small(run: Path, **changes) -> Config:
    """A run of seconds with all of it."""
    values = {
        "run": str(run),
        "steps": 8,
        "batch_size": 16,
        "log_every": 2,
        "save_every": 4,
        "sample_every": 8,
        "conditional": True,
        "data": {"augment": 0.3},
        "model": {"block_out_channels": (8, 16), "norm_num_groups": 4, "dropout": 0.2},
        "optim": {"horizon": 8, "warmup_steps": 2},
        "diffusion": EVERYTHING,
        "ema": {"widths": (0.05, 0.2)},
        "grid": {"num": 4, "steps": 2, "guidance": 2.0},
    }
    return preset("digits", **(values | changes))


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert Trainer(small(run)).train().finished
    return run


def test_a_run_with_everything_goes_on_bitwise(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(small(run, steps=3)).train()  # in the middle of a log window
    Trainer(small(run, steps=5, accumulation=1)).train()
    Trainer(small(run)).train()
    exact = ("step", "loss", "grad_norm", "loss_quartiles")
    assert [[r[k] for k in exact] for r in records(run)] == [[r[k] for k in exact] for r in records(whole)]
    a, b = (Checkpoints(r).load(Checkpoints(r).all()[-1]) for r in (whole, run))
    for kind in ("model", "ema", "optimizer"):
        ours, theirs = getattr(a, kind), getattr(b, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    history = a.optimizer["loss history/losses"]
    assert (history >= 0).all(), "the history was never used"
    names = {key.rpartition("/")[2] for key in a.optimizer}
    assert {"average-0.05", "average-0.2", "exp_avg"} <= names and any(
        k.startswith("loss history/") for k in a.optimizer
    )
    assert {path.name for path in (whole / "ema").iterdir()} == {path.name for path in (run / "ema").iterdir()}
    for path in (whole / "ema").iterdir():
        ours, theirs = load_file(path), load_file(run / "ema" / path.name)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert len(list((whole / "ema").iterdir())) == 4  # two widths at two saves


def test_a_config_that_needs_more_than_a_checkpoint_holds_is_refused(whole: Path, tmp_path: Path) -> None:
    trainer = Trainer(small(tmp_path / "run", ema={}))
    with pytest.raises(ConfigError, match=r"ema\.widths"):
        Trainer(small(whole, ema={"widths": (0.05,)}))
    wider = Trainer(small(tmp_path / "wider"))
    newest = Checkpoints(whole).all()[-1]
    state = Checkpoints(whole).load(newest)
    trainer._restore(state, newest)  # what is not asked for is left
    bare = {k: t for k, t in state.optimizer.items() if "average-" not in k}
    with pytest.raises(Exception, match=r"has no .*/average-0\.05"):
        wider._load_own(bare, newest)


def test_quartiles_are_means_of_the_losses_since_the_last_line(tmp_path: Path) -> None:
    config = small(
        tmp_path / "run",
        steps=3,
        log_every=3,
        conditional=False,
        data={},
        ema={},
        diffusion={},
        grid={},
        sample_every=0,
    )
    trainer = Trainer(config)
    sums, counts = np.zeros(4), np.zeros(4)
    with_batches = trainer._batches(3)
    for step in range(3):
        batch = next(with_batches)
        t = trainer.train_step.process.timesteps(batch.ordinals)
        trainer.unet.train()
        losses, _ = trainer.train_step(batch.images, batch.ordinals, step)
        np.add.at(sums, (t * 4 // 1000).numpy(), losses.double().numpy())
        np.add.at(counts, (t * 4 // 1000).numpy(), 1)
    trainer._lock.close()
    Trainer(config).train()
    (line,) = records(tmp_path / "run")
    expected = [s / n if n else None for s, n in zip(sums, counts, strict=True)]
    assert line["loss_quartiles"] == pytest.approx(expected, rel=1e-5)


def test_labels_are_hidden_by_position_in_the_share_asked_for() -> None:
    process = TrainingProcess.of(ProcessConfig(label_dropout=0.3), seed=5, flip=False, batch_size=8)
    ordinals = torch.arange(4000)
    labels = ordinals % 10
    told = process.hide_labels(labels, ordinals, 11)
    hidden = told == 10
    assert abs(hidden.float().mean() - 0.3) < 0.03
    assert torch.equal(told[~hidden], labels[~hidden])
    some = torch.tensor([3999, 17, 1200])
    assert torch.equal(process.hide_labels(labels[some], some, 11), told[some])
    assert (process.hide_labels(torch.full((8,), -1), torch.arange(8), 11) == 10).all()
    never = TrainingProcess.of(ProcessConfig(), seed=5, flip=False, batch_size=8)
    assert torch.equal(never.hide_labels(labels, ordinals, 10), labels)


def test_the_estimate_is_given_to_half_and_is_the_nets_own(tmp_path: Path) -> None:
    config = preset(
        "digits",
        model={"block_out_channels": (8, 16), "norm_num_groups": 4},
        diffusion={"self_conditioning": True, "prediction": "x_0"},
    )
    net = UNet(config.network(), seed=1)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    process = TrainingProcess.of(config.diffusion, seed=3, flip=False, batch_size=64)
    seen = []
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    step = TrainStep(net, UNet(config.network()), process, config.optim, config.ema)
    images = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8)
    ordinals = torch.arange(64)
    step.accumulate(images, ordinals)
    first, second = seen
    assert torch.equal(first[:, 1], torch.zeros(64, 8, 8)) and torch.equal(first[:, 0], second[:, 0])
    given = second[:, 1].flatten(1).abs().sum(1) > 0
    assert 20 < int(given.sum()) < 44
    estimate = net(first, process.noise(images, ordinals).t).sample.clamp(-1, 1)
    torch.testing.assert_close(second[given, 1], estimate[given, 0])


def test_a_conditional_run_is_a_pipeline_of_diffusers(whole: Path) -> None:
    from diffusers import UNet2DModel

    pipeline = load_pipeline(str(whole))
    assert pipeline.num_classes == 10 and pipeline.shape == (1, 8, 8)
    theirs = UNet2DModel.from_pretrained(whole, subfolder="unet")
    assert theirs.config.num_class_embeds == 11 and theirs.config.out_channels == 2
    x, t, labels = torch.randn(3, 2, 8, 8), torch.tensor([0, 2, 4]), torch.tensor([0, 9, 10])
    with torch.no_grad():
        expected = theirs(x, t, class_labels=labels).sample
        torch.testing.assert_close(pipeline.unet(x, t, class_labels=labels).sample, expected, atol=1e-5, rtol=1e-5)


def test_conditional_without_classes_is_refused(tmp_path: Path) -> None:
    for changes, error, words in (
        (
            {"data": {"label_column": None}, "model": {"num_class_embeds": 4}},
            DataError,
            "has 10 classes .* at least 10",
        ),
        ({"conditional": False, "model": {"num_class_embeds": 4}}, ConfigError, "add --conditional"),
        ({"conditional": False}, ConfigError, "label_dropout"),
        ({"data": {"augment": 2.0}}, ConfigError, r"augment is 2\.0"),
        ({"model": {"augment_channels": 3}}, ConfigError, "--data.augment sets it"),
    ):
        with pytest.raises(error, match=words):
            Trainer(small(tmp_path / "run", **changes))


def test_two_processes_draw_the_same_timesteps_and_lose_alike(whole: Path, tmp_path: Path) -> None:
    """Loss-aware timesteps depend on the losses of all processes; half way the two become one."""
    run, script = tmp_path / "run", tmp_path / "train.py"
    script.write_text(
        "import json, sys\n"
        "from fastddpm.config import Config, from_dict\n"
        "from fastddpm.trainer import Trainer\n"
        "Trainer(from_dict(Config, json.loads(sys.argv[1]))).train()\n"
    )
    config = to_dict(small(run, steps=6, accumulation=2))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([*launcher, str(script), json.dumps(config)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    Trainer(small(run)).train()
    for a, b in zip(records(whole), records(run), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["loss_quartiles"] == pytest.approx(b["loss_quartiles"], rel=1e-4)
    one, two = (Checkpoints(r).load(Checkpoints(r).all()[-1]).optimizer["loss history/losses"] for r in (whole, run))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_labels_that_the_network_is_not_told_are_named_before_they_reach_it(tmp_path: Path) -> None:
    config = small(tmp_path / "run", model={"num_class_embeds": 10}, diffusion={}, grid={}, ema={})
    trainer = Trainer(config)
    trainer.data.num_classes = None  # as of a stream of plain numbers
    fewer = dataclasses.replace(config, model=dataclasses.replace(config.model, num_class_embeds=4))
    trainer.config = fewer
    with pytest.raises(DataError, match=r"label \d \(.*\) of .* is not one that the network is told \(0 \.\. 3\)"):
        list(trainer._batches(2))
    resident = dataclasses.replace(trainer.data.config, resident=True)
    trainer.data.config = resident
    with pytest.raises(DataError, match="is not one that the network is told"):
        list(trainer._batches(1))


def test_losses_that_are_not_finite_are_in_no_quartile(tmp_path: Path) -> None:
    step = Trainer(small(tmp_path / "run", conditional=False, diffusion={}, data={}, ema={}, grid={})).train_step
    step._count(torch.tensor([0, 300, 600, 600]), torch.tensor([1.0, float("nan"), float("inf"), 3.0]))
    assert (step.quartiles[0] / FIXED_POINT).tolist() == [1.0, 0.0, 3.0, 0.0]
    assert step.quartiles[1].tolist() == [1, 0, 1, 0]


def test_averages_and_histories_begin_where_an_allowed_change_adds_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    plain = {"conditional": False, "data": {}, "grid": {}, "sample_every": 0}
    Trainer(small(run, steps=4, ema={}, diffusion={}, **plain)).train()
    changed = small(run, steps=6, diffusion={"timesteps": "loss_aware"}, **plain)
    trainer = Trainer(changed, allow_change=("ema.widths", "diffusion.timesteps"))
    averages = trainer.train_step.power_averages
    assert averages is not None
    assert all(torch.equal(a, w) for a, w in zip(averages.averages[0], trainer.weights, strict=True))
    trainer.train()
    own = Checkpoints(run).load(Checkpoints(run).all()[-1]).optimizer
    assert any("average-0.2" in key for key in own) and "loss history/losses" in own


def test_replay_has_the_quartiles_of_the_log(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    last = records(run)[-1]
    config = dataclasses.replace(read_config(run), run=str(run))
    found = Trainer(config, replay=last["step"]).replay()
    assert found["loss"] == last["loss"] and found["loss_quartiles"] == last["loss_quartiles"]


def everything_step(device: str, graph: bool) -> TrainStep:
    config = small(Path("unused"), model={"block_out_channels": (8, 16), "norm_num_groups": 4, "num_class_embeds": 10})
    nets = [UNet(config.network(), seed=2).to(device) for _ in range(2)]
    process = TrainingProcess.of(config.diffusion, seed=3, flip=False, batch_size=16, device=device)
    options = {"augment": 0.3, "flip": True, "graph": graph, "horizon": 100}
    return TrainStep(nets[0].train(), nets[1].eval(), process, config.optim, config.ema, **options)


def check_same_state(a: TrainStep, b: TrainStep, **tolerance: float) -> None:
    assert torch.equal(a.quartiles[1], b.quartiles[1]) and torch.equal(a.t, b.t)
    torch.testing.assert_close(a.quartiles[0].double(), b.quartiles[0].double(), **tolerance)
    assert a.process.history is not None and b.process.history is not None
    torch.testing.assert_close(a.process.history.losses, b.process.history.losses, **tolerance)
    assert a.power_averages is not None and b.power_averages is not None
    for ours, theirs in zip(a.power_averages.averages, b.power_averages.averages, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_graphed_step_keeps_all_of_the_state(graph: bool) -> None:
    """Quartiles, history, averages and timesteps are written by each replay, from labels that are copied in."""
    device = "cuda" if graph else "cpu"
    plain, other = everything_step(device, False), everything_step(device, graph)
    for number in range(8):
        generator = torch.Generator().manual_seed(number)
        images = torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8, generator=generator).to(device)
        labels = torch.randint(-1, 10, (16,), generator=generator).to(device)
        ordinals = torch.arange(number * 16, number * 16 + 16, device=device)
        first = [step(images, ordinals, number, labels)[0].clone() for step in (plain, other)]
        torch.testing.assert_close(*first, rtol=1e-3, atol=1e-4)
    check_same_state(plain, other, rtol=1e-3, atol=1e-3)
    assert (plain.process.history.losses >= 0).any() and len(plain._seen) == len(other._seen) == 0  # type: ignore[union-attr]
