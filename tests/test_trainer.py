"""The trainer: what a log line means, exact resume, signals, numerics, and the same run on one or two processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import DistributedType

from fastddpm.checkpoint import Checkpoints, State, load_optimizer, optimizer_tensors
from fastddpm.config import Config, preset, read_config
from fastddpm.diffusion import TrainingProcess
from fastddpm.errors import CheckpointError, ConfigError, DataError, NumericsError
from fastddpm.machine import flushed_denormals
from fastddpm.optim import as_line, ema_decay, learning_rate, make_optimizer, update_ema
from fastddpm.runlog import RunLog
from fastddpm.trainer import Trainer

ROOT = Path(__file__).parents[1]


def small(run: Path, **changes) -> Config:
    """A run of seconds: the digits, a net of 40k parameters with dropout and flips, every random stream in use."""
    values = {
        "run": str(run),
        "steps": 8,
        "batch_size": 16,
        "log_every": 1,
        "save_every": 3,
        "sample_every": 0,
        "data": {"flip": True},
        "model": {"block_out_channels": (8, 16), "norm_num_groups": 4, "dropout": 0.2},
        "optim": {"horizon": 8, "warmup_steps": 2},
    }
    return preset("digits", **(values | changes))


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(run)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert Trainer(small(run)).train().finished
    return run


def test_log_lines_have_the_contract_fields_at_every_interval(whole):
    lines = records(whole)
    assert [r["step"] for r in lines] == list(range(1, 9))
    for r in lines:
        assert r["samples_seen"] == r["step"] * 16
        assert math.isfinite(r["loss"]) and r["grad_norm"] > 0 and r["lr"] >= 0
        assert r["images_per_s"] > 0 and 0 <= r["data_wait"] <= 1 and r["memory_bytes"] > 0


def test_loss_and_norm_of_the_first_step_are_those_of_a_plain_rewrite(tmp_path):
    """The first line against the lecture's algorithm in a few lines of torch, eps taken from x_t itself."""
    config = small(
        tmp_path / "run", steps=1, model={"block_out_channels": (8, 16), "norm_num_groups": 4, "dropout": 0.0}
    )
    trainer = Trainer(config)
    weights = [p.detach().clone() for p in trainer.weights]
    (batch,) = list(trainer._batches(1))
    noised = TrainingProcess(trainer.schedule, "eps", seed=config.seed, flip=True).noise(batch.images, batch.ordinals)
    x_0 = batch.images.double() / 127.5 - 1
    x_0 = torch.where(noised.flip.view(-1, 1, 1, 1), x_0.flip(3), x_0)
    alpha_bar = torch.tensor(trainer.schedule.alpha_bar)[noised.t].view(-1, 1, 1, 1)
    eps = (noised.x_t.double() - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    loss = (trainer.unet(noised.x_t, noised.t).sample - eps).pow(2).mean()
    gradients = torch.autograd.grad(loss, trainer.weights)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    trainer.train()
    (line,) = records(tmp_path / "run")
    # eps of samples at t = 0 is x_t's rounding error divided by a small sigma, so not closer than this.
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(weights, trainer.weights, strict=True))


def test_resume_is_bitwise_and_a_finished_run_given_more_steps_goes_on(whole, tmp_path):
    run = tmp_path / "run"
    Trainer(small(run, steps=4)).train()
    Trainer(small(run, steps=7, log_every=2, save_every=2, data={"flip": True, "workers": 1})).train()
    Trainer(small(run, steps=8)).train()
    expected = [r for r in losses(whole) if r[0] in (1, 2, 3, 4, 6, 8)]
    assert losses(run) == expected
    a, b = (Checkpoints(r).load(Checkpoints(r).all()[-1]) for r in (whole, run))
    for kind in ("model", "ema", "optimizer"):
        ours, theirs = getattr(a, kind), getattr(b, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_resume_drops_lines_beyond_the_checkpoint_and_a_torn_one(whole, tmp_path):
    run = tmp_path / "run"
    Trainer(small(run, steps=4)).train()
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "loss": 99.0, "grad_norm": 1.0}\n{"step": 6, "lo')
    Trainer(small(run)).train()
    assert losses(run) == losses(whole)


def _command(config: Config, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "fastddpm", "train", "--preset", "digits", "--run", config.run),
        *("--steps", str(config.steps), "--batch-size", "16", "--log-every", "1", "--save-every", "3"),
        *("--sample-every", "0", "--data.flip", "--model.block-out-channels", "8", "16"),
        *("--model.norm-num-groups", "4", "--model.dropout", "0.2", "--optim.horizon", str(config.optim.horizon)),
        *("--optim.warmup-steps", "2", *more),
    ]


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def test_killed_at_any_moment_and_started_again_gives_the_same_losses(tmp_path):
    """SIGKILL at several instants, restarted at once, with loader processes; the losses are a calm run's."""
    steps = 120
    changes = {"steps": steps, "optim": {"horizon": steps, "warmup_steps": 2}}
    calm = small(tmp_path / "calm", **changes)
    subprocess.run(_command(calm), env=_environment(), check=True, capture_output=True)
    disturbed = small(tmp_path / "disturbed", **changes)
    generator = np.random.default_rng(0)
    kills = 0
    for _ in range(3):
        command = _command(disturbed, "--data.workers", "2")
        process = subprocess.Popen(command, env=_environment(), stderr=subprocess.PIPE, text=True)
        seen = 0
        target = int(generator.integers(5, 40))
        for line in process.stderr:
            seen += line.startswith("step ")
            if seen >= target:
                time.sleep(generator.random() * 0.02)
                process.kill()
                break
        if process.wait() == -signal.SIGKILL:
            kills += 1
        process.stderr.close()
    assert kills == 3
    subprocess.run(_command(disturbed), env=_environment(), check=True, capture_output=True)
    assert losses(tmp_path / "disturbed") == losses(tmp_path / "calm")
    leftovers = [p.name for p in (tmp_path / "disturbed" / "checkpoints").iterdir() if p.name.startswith(".")]
    assert leftovers == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    config = small(tmp_path / "run", steps=100_000)
    process = subprocess.Popen(
        _command(config, "--data.workers", "1"), env=_environment(), stderr=subprocess.PIPE, text=True
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("step 5/"):
            process.send_signal(number)
    assert process.wait() == 130
    assert "go on with the same command: fastddpm train --preset digits" in said[-1]
    last = Checkpoints(tmp_path / "run").all()[-1]
    assert f"step {int(last.name[5:])};" in said[-1]
    assert records(tmp_path / "run")[-1]["step"] == int(last.name[5:])


def test_accumulation_changes_neither_samples_nor_losses(whole, tmp_path):
    run = tmp_path / "run"
    Trainer(small(run, accumulation=4)).train()
    for a, b in zip(losses(run), losses(whole), strict=True):
        assert a == pytest.approx(b, rel=2e-5)


_RECORDER = """
import json, os, sys
from fastddpm.diffusion import TrainingProcess
plain, seen = TrainingProcess.noise, []
def recording(self, x_0, ordinals, dtype):
    noised = plain(self, x_0, ordinals, dtype)
    for i, p in enumerate(ordinals.tolist()):
        seen.append((p, int(noised.t[i]), bool(noised.flip[i]), noised.x_t[i].numpy().tobytes().hex()))
    return noised
TrainingProcess.noise = recording
from fastddpm.cli import main
code = main(sys.argv[2:])
open(sys.argv[1] + os.environ.get("RANK", "0"), "w").write(json.dumps(seen))
sys.exit(code)
"""


def test_one_and_two_processes_see_the_same_samples_timesteps_and_noise(tmp_path):
    """(position, t, flip, x_t) as sets are equal bitwise; the losses agree to rounding, dropout included."""
    script = tmp_path / "record.py"
    script.write_text(_RECORDER)
    sets = []
    for world in (1, 2):
        run = tmp_path / f"run{world}"
        arguments = [str(script), str(tmp_path / f"seen{world}-"), *_command(small(run))[3:]]
        launcher = (
            [sys.executable]
            if world == 1
            else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
        )
        environment = _environment() | {"ACCELERATE_USE_CPU": "true"}
        subprocess.run([*launcher, *arguments], env=environment, check=True, capture_output=True, timeout=300)
        seen = []
        for rank in range(world):
            seen += json.loads((tmp_path / f"seen{world}-{rank}").read_text())
        sets.append(sorted(seen))
    assert len(sets[0]) == 8 * 16
    assert sets[0] == sets[1]
    one, two = losses(tmp_path / "run1"), losses(tmp_path / "run2")
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=2e-5)


def test_auto_precision_is_the_same_on_all_processes_and_kept_on_resume(tmp_path):
    """Two processes on CPUs, started as README says; rank 0 measures for both."""
    script = tmp_path / "auto.py"
    script.write_text(
        "import sys, fastddpm.machine as machine\n"
        "rates = iter((1.0, float(sys.argv.pop(1))))\n"
        "machine.product_rate = lambda dtype: next(rates)\n"
        "from fastddpm.cli import main\n"
        "sys.exit(main())\n"
    )
    options = ["train", "--preset", "digits", "--precision", "auto", "--data.workers", "0", "--sample-every", "0"]
    options += ["--run", str(tmp_path / "run"), "--model.block-out-channels", "8", "16", "--model.norm-num-groups", "4"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for steps, rate in (("1", "9"), ("2", "0.1")):  # bf16 is nine times as fast, and at the second start slower
        command = [*launcher, "--", str(script), rate, *options, "--steps", steps, "--optim.horizon", "2"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "bf16, 2 x cpu" in done.stderr
    assert read_config(tmp_path / "run").precision == "bf16"


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("fastddpm.machine.Accelerator", lambda **_: _Alone())
    with pytest.raises(ConfigError, match="ACCELERATE_USE_CPU"):
        Trainer(small(tmp_path / "run"))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_launches_are_refused_rather_than_trained_wrongly(tmp_path, monkeypatch, kind):
    sharded = _Alone()
    sharded.distributed_type = DistributedType(kind)
    monkeypatch.setattr("fastddpm.machine.Accelerator", lambda **_: sharded)
    with pytest.raises(ConfigError, match=f"distributed type {kind} is not supported"):
        Trainer(small(tmp_path / "run"))


class _Alone:
    num_processes = 1
    distributed_type = DistributedType.NO
    device = torch.device("cpu")


@pytest.mark.parametrize("save_every", [1, 1000])
def test_a_diverging_run_ends_with_an_error_and_saves_nothing_bad(tmp_path, save_every):
    run = tmp_path / "run"
    config = small(
        run, steps=50, log_every=5, save_every=save_every, optim={"lr": 1e30, "warmup_steps": 0, "clip_norm": None}
    )
    with pytest.raises(NumericsError, match=r"3 steps in a row|weights of step \d+ are not finite"):
        Trainer(config).train()
    for path in Checkpoints(run).all():
        state = Checkpoints(run).load(path)
        assert all(t.isfinite().all() for t in [*state.model.values(), *state.ema.values()])


def test_checkpoints_written_beside_training_are_those_written_between_steps(tmp_path, whole):
    run = tmp_path / "run"
    for steps in (4, 8):
        Trainer(small(run, steps=steps, save_async=True)).train()
    assert losses(run) == losses(whole)
    for ours, theirs in zip(Checkpoints(run).all()[-2:], Checkpoints(whole).all()[-2:], strict=True):
        for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_checkpoint_that_fails_beside_training_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "save", _full_disk)
    with pytest.raises(CheckpointError, match="the disk is full"):
        Trainer(small(tmp_path / "run", save_async=True)).train()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """A finite gradient and a learning rate that overflows the weights: nothing in the loss shows it yet."""
    run = tmp_path / "run"
    config = small(run, steps=1, optim={"lr": 1e38, "warmup_steps": 0, "weight_decay": 1e10})
    with pytest.raises(NumericsError, match="weights of step 1 are not finite"):
        Trainer(config).train()
    assert Checkpoints(run).all() == []


def test_a_start_that_saved_nothing_binds_nothing(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(NumericsError):
        Trainer(small(run, steps=9, optim={"lr": 1e30, "warmup_steps": 0, "clip_norm": None}, save_every=50)).train()
    assert Trainer(small(run)).train().finished
    assert [r["step"] for r in records(run)] == list(range(1, 9))


def test_another_config_is_refused_and_every_difference_named(whole):
    before = (whole / "config.json").read_text()
    with pytest.raises(ConfigError) as caught:
        Trainer(small(whole, batch_size=32, optim={"lr": 1.0, "horizon": 8, "warmup_steps": 2}))
    assert "batch_size: 16 -> 32" in str(caught.value) and "optim.lr: 0.002 -> 1.0" in str(caught.value)
    assert (whole / "config.json").read_text() == before


def test_a_change_that_is_allowed_goes_on_as_another_run_and_is_written_down(tmp_path, whole, capsys):
    """Other learning rate and batch size from step 4 on: the images go on where they were."""
    run = tmp_path / "run"
    Trainer(small(run, steps=4)).train()
    changed = {"batch_size": 24, "optim": {"horizon": 8, "warmup_steps": 2, "lr": 1e-4}}
    with pytest.raises(ConfigError, match=r"--allow-change batch_size optim\.lr"):
        Trainer(small(run, **changed))
    with pytest.raises(ConfigError, match=r"--allow-change optim\.lr"):
        Trainer(small(run, **changed), allow_change=["batch_size"])
    Trainer(small(run, **changed), allow_change=["batch_size", "optim.lr"]).train()
    assert "from step 4 on this is another run: batch_size: 16 -> 24" in capsys.readouterr().err
    lines = records(run)
    assert losses(run)[:4] == losses(whole)[:4]
    assert [r["samples_seen"] for r in lines] == [16, 32, 48, 64, 88, 112, 136, 160]
    assert lines[-1]["lr"] < 1e-4
    facts = json.loads((run / "config.json").read_text())
    assert [change["step"] for change in facts["changes"]] == [4, 4]
    # The changed run is exact from there on: interrupted or not.
    again = tmp_path / "again"
    Trainer(small(again, steps=4)).train()
    Trainer(small(again, **{**changed, "steps": 6}), allow_change=["batch_size", "optim.lr"]).train()
    Trainer(small(again, **changed)).train()
    assert losses(again) == losses(run)


@pytest.mark.parametrize(("name", "why"), [("optim.lrate", "is not a field"), ("steps", "may always change")])
def test_names_of_allowed_changes_are_checked(tmp_path, name, why):
    with pytest.raises(ConfigError, match=f"allow-change {name}: it {why}"):
        Trainer(small(tmp_path / "run"), allow_change=[name])


def test_accumulation_may_change_on_resume(tmp_path, whole):
    run = tmp_path / "run"
    for steps, accumulation in ((3, 2), (6, 4), (8, 1)):
        Trainer(small(run, steps=steps, accumulation=accumulation)).train()
    for a, b in zip(losses(run), losses(whole), strict=True):
        assert a == pytest.approx(b, rel=2e-5)


def test_a_data_set_that_has_grown_is_refused(tmp_path):
    run = tmp_path / "run"
    Trainer(small(run)).train()
    facts = json.loads((run / "config.json").read_text())
    assert facts["data"]["num_images"] == 1797
    (run / "config.json").write_text(json.dumps(facts | {"data": facts["data"] | {"num_images": 1700}}))
    with pytest.raises(DataError, match="digits has 1797 images and had 1700"):
        Trainer(small(run))
    (run / "config.json").write_text(json.dumps(facts | {"data": facts["data"] | {"identity": "another"}}))
    with pytest.raises(DataError, match="digits is not as it was"):
        Trainer(small(run))
    assert Trainer(small(run), allow_change=["data"]).step == 8


def test_the_status_says_how_a_run_ended(tmp_path, monkeypatch):
    run = tmp_path / "run"

    def status() -> dict:
        return json.loads((run / "status.json").read_text())

    seen = []

    def signalled(self):
        seen.append((status()["status"], status()["step"]))
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "draw_grid", signalled)
        assert not Trainer(small(run, sample_every=4)).train().finished
    assert seen == [("running", 3)]  # the last that is saved
    assert (status()["status"], status()["step"]) == ("preempted", 5)
    Trainer(small(run)).train()
    assert (status()["status"], status()["step"]) == ("done", 8)
    monkeypatch.setattr(Checkpoints, "save", _full_disk)
    with pytest.raises(CheckpointError):
        Trainer(small(run, steps=9)).train()
    end = status()
    assert (end["status"], end["exit_code"], end["reason"]) == ("failed", 6, "the disk is full")
    for path in Checkpoints(run).all():
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError):
        Trainer(small(run))
    end = status()
    assert end["exit_code"] == 6 and "no checkpoint can be trusted" in end["reason"]


def test_a_second_signal_while_a_checkpoint_is_written_loses_nothing(tmp_path, monkeypatch):
    """With save_async, between the last step and the status; the first signal comes at step 4."""
    run = tmp_path / "run"
    plain = Checkpoints.save

    def slow(self, state):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        return plain(self, state)

    monkeypatch.setattr(Checkpoints, "save", slow)
    monkeypatch.setattr(Trainer, "draw_grid", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    assert not Trainer(small(run, sample_every=4, save_every=100, save_async=True)).train().finished
    assert [path.name for path in Checkpoints(run).all()] == ["step-00000005"]
    assert json.loads((run / "status.json").read_text())["status"] == "preempted"


def test_a_torn_log_does_not_stop_a_replay(tmp_path, whole):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_bytes((whole / "log.jsonl").read_bytes() + b'{"step": 9, "lo')
    assert [r["step"] for r in RunLog(run).records()] == list(range(1, 9))


def _full_disk(self, *args, **kwargs):
    raise CheckpointError("the disk is full")


@pytest.mark.parametrize(("number", "before"), [(1, 0), (3, 0), (4, 3), (8, 6)])
def test_a_replay_gives_the_logged_step_bit_by_bit_and_writes_nothing(whole, number, before, capsys):
    contents = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    config = read_config(whole)
    record = Trainer(config, replay=number).replay()
    logged = records(whole)[number - 1]
    for name in ("step", "samples_seen", "loss", "grad_norm", "lr"):
        assert record[name] == logged[name]
    assert f"replaying steps {before + 1} to {number}" in capsys.readouterr().err
    assert record["positions"] == list(range((number - 1) * 16, number * 16)) and len(record["rows"]) == 16
    assert sum(record["losses"]) / 16 == pytest.approx(record["loss"])
    assert contents == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


def test_the_replay_command_prints_one_line_of_json(whole):
    command = [sys.executable, "-m", "fastddpm", "replay", str(whole), "--step", "5"]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["same"] is True and record["logged_loss"] == record["loss"] == records(whole)[4]["loss"]


def test_the_horizon_is_the_first_starts_and_kept(tmp_path):
    run = tmp_path / "run"
    for steps in (3, 6):
        trainer = Trainer(small(run, steps=steps, optim={"horizon": None, "warmup_steps": 2}))
        trainer.train()
        assert trainer.config.optim.horizon == 3


def test_a_run_folder_in_use_is_refused(tmp_path):
    held = Trainer(small(tmp_path / "run"))
    with pytest.raises(ConfigError, match="is in use by another process"):
        Trainer(small(tmp_path / "run"))
    held.train()
    Trainer(small(tmp_path / "run")).train()


def test_trackers_get_what_the_log_gets(tmp_path, whole):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    Trainer(small(run, trackers=("tensorboard",))).train()
    (events,) = (run / "fastddpm").glob("events.out.tfevents*")
    read = EventAccumulator(str(events.parent)).Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(s, np.float32(v)) for s, v, _ in losses(whole)]


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size 16 does not divide by 1 processes x 3 accumulation"):
        Trainer(small(tmp_path / "run", accumulation=3))


def test_fp16_on_a_cpu_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        Trainer(small(tmp_path / "run", precision="fp16"))


def test_bf16_trains_on_a_cpu(tmp_path, whole):
    run = tmp_path / "run"
    Trainer(small(run, precision="bf16")).train()
    for (_, a, _), (_, b, _) in zip(losses(run), losses(whole), strict=True):
        assert a == pytest.approx(b, rel=0.05)


def test_a_damaged_checkpoint_is_passed_over_and_none_left_is_an_error(tmp_path, capsys):
    run = tmp_path / "run"
    Trainer(small(run)).train()
    _, sixth, eighth = Checkpoints(run).all()
    for path in (sixth, eighth):
        weights = path / "model.safetensors"
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
    expected = losses(run)
    trainer = Trainer(small(run))
    assert trainer.step == 3
    assert "model.safetensors is not what was written" in capsys.readouterr().err
    trainer.train()
    assert losses(run) == expected
    # Saved again, the damaged ones out of the way but not deleted.
    assert [p.name for p in Checkpoints(run).all()] == ["step-00000003", "step-00000006", "step-00000008"]
    assert len([p for p in (run / "checkpoints").iterdir() if p.name.startswith("refused-step-")]) == 2
    for path in Checkpoints(run).all():
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint can be trusted"):
        Trainer(small(run))


def test_checkpoints_are_pruned_and_of_plain_files(whole):
    names = [p.name for p in Checkpoints(whole).all()]
    assert names == ["step-00000003", "step-00000006", "step-00000008"]
    kinds = {p.suffix for p in (whole / "checkpoints").rglob("*") if p.is_file()}
    assert kinds == {".safetensors", ".json"}


def test_keep_one_keeps_the_newest(tmp_path):
    run = tmp_path / "run"
    Trainer(small(run, keep=1)).train()
    assert [p.name for p in Checkpoints(run).all()] == ["step-00000008"]


def test_a_full_disk_leaves_older_checkpoints(tmp_path, monkeypatch):
    """A write that fails half way: one clear error, nothing half written, the older checkpoint still there."""
    checkpoints = Checkpoints(tmp_path)
    tensors = {"w": torch.ones(3)}
    checkpoints.save(State(1, 1, tensors, tensors, tensors))

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastddpm.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoints.save(State(2, 2, tensors, tensors, tensors))
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step-00000001"]
    assert checkpoints.newest()[0].name == "step-00000001"


def test_moments_are_saved_in_their_weights_shape_and_restored_from_any_memory_order():
    """A fused Adam on a CPU walks memory linearly: moments in another order would silently be mixed up."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))]
    names = ["w"]
    twin = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    plain = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    config = preset("digits").optim
    a, b = (make_optimizer(config, [torch.nn.Parameter(as_line(w.detach())) for w in own]) for own in (weights, twin))
    truth = torch.optim.AdamW(plain, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=False)
    gradients = torch.randn(3, 4, 3, 3, 3)  # contiguous: as_line has to bring them into the weights' order

    def step(optimizer, own, gradient):
        optimizer.param_groups[0]["params"][0].grad = as_line(gradient, like=own[0])
        optimizer.step()
        plain[0].grad = gradient

    step(a, weights, gradients[0])
    truth.step()
    saved = {k: v.contiguous().clone() for k, v in optimizer_tensors(a, names, weights).items()}
    torch.testing.assert_close(saved["w/exp_avg"], truth.state[plain[0]]["exp_avg"])
    with torch.no_grad():
        twin[0].copy_(weights[0])
    load_optimizer(b, names, twin, saved)
    for gradient in gradients[1:]:
        step(a, weights, gradient)
        step(b, twin, gradient)
        truth.step()
    assert torch.equal(weights[0], twin[0])
    torch.testing.assert_close(weights[0], plain[0])


def test_pruning_never_deletes_the_newest_good_checkpoint(tmp_path):
    run = tmp_path / "run"
    Trainer(small(run)).train()
    for path in Checkpoints(run).all()[1:]:
        (path / "manifest.json").write_text("7")
    Trainer(small(run, steps=5, keep=1)).train()
    assert [p.name for p in Checkpoints(run).all()] == ["step-00000005"]
    assert Trainer(small(run, steps=5)).step == 5


def test_the_average_does_not_move_on_a_skipped_step():
    """fp16: torch's fused Adam skips an overflowing step on the device; the average must not move either."""
    average, weight = [torch.zeros(3)], [torch.ones(3)]
    update_ema(average, weight, 0.1, torch.tensor(False))
    assert torch.equal(average[0], torch.zeros(3))
    update_ema(average, weight, 0.1, torch.tensor(True))
    torch.testing.assert_close(average[0], torch.full((3,), 0.1))


def test_log_lines_are_json_whatever_the_numbers(tmp_path):
    log = RunLog(tmp_path)
    log.write({"step": 1, "grad_norm": float("inf"), "loss": float("nan"), "lr": 0.5})
    assert log.path.read_text() == '{"step": 1, "grad_norm": null, "loss": null, "lr": 0.5}\n'


def test_learning_rate_and_decay_are_functions_of_the_step():
    ho = preset("cifar10")
    assert learning_rate(ho.optim, 0, 800_000) == pytest.approx(2e-4 / 5000)
    assert learning_rate(ho.optim, 4999, 800_000) == learning_rate(ho.optim, 700_000, 800_000) == 2e-4
    digits = preset("digits").optim
    assert learning_rate(digits, 1000, 1000) == pytest.approx(0, abs=1e-12)
    assert learning_rate(digits, 500, 1000) == pytest.approx(digits.lr / 2)
    assert [ema_decay(ho.ema, n) for n in (0, 8)] == [2 / 11, 10 / 19]
    assert ema_decay(ho.ema, 10**6) == 0.9999


def test_the_average_follows_the_weights(tmp_path):
    """After the first step the average is d w_0 + (1 - d) w_1 with d = 2/11."""
    trainer = Trainer(small(tmp_path / "run", steps=1))
    before = [w.detach().clone() for w in trainer.weights]
    trainer.train()
    for w_0, w_1, average in zip(before, trainer.weights, trainer.averages, strict=True):
        torch.testing.assert_close(average, w_0 * (2 / 11) + w_1.detach() * (9 / 11), rtol=1e-5, atol=1e-7)


def test_training_leaves_the_processs_arithmetic_as_it_was(whole):
    """Denormals are flushed inside the loop only; numpy, and whatever else the process does, has them back."""
    with flushed_denormals():
        assert np.full(1, 1e-40, np.float32) * np.float32(1) == 0
    assert np.full(1, 1e-40, np.float32) * np.float32(1) > 0


def test_grids_are_drawn_during_training(tmp_path):
    run = tmp_path / "run"
    config = small(run, steps=4, sample_every=2, grid={"num": 5, "steps": 3, "batch_size": 2})
    Trainer(config).train()
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
