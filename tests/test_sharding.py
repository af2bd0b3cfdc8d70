"""Sharded training on real processes (gloo): the results of one process, checkpoints across process counts, failures.

The processes of one count are started once and do everything; the tests look at what they wrote down.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from fastddpm import blocks, checkpoint, sharding
from fastddpm.checkpoint import AsyncWriter, Checkpoints, State, load_into, load_optimizer, optimizer_tensors
from fastddpm.config import EMAConfig, OptimConfig
from fastddpm.diffusion import ProcessConfig, TrainingProcess
from fastddpm.errors import CheckpointError, ConfigError
from fastddpm.generate import draw_images
from fastddpm.samplers import Sampler, to_uint8
from fastddpm.step import TrainStep
from fastddpm.unet import UNet, UNetConfig

NET = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    dropout=0.2,
)
FILM = dataclasses.replace(NET, resnet_time_scale_shift="scale_shift", checkpoint_activations=True)
OPTIM = OptimConfig(name="adamw", lr=1e-3, warmup_steps=2, weight_decay=0.1, clip_norm=0.5, horizon=40, decay="cosine")
SCHEDULE = ProcessConfig(num_timesteps=100).noise_schedule()
PLAIN_FILM = dataclasses.replace(FILM, checkpoint_activations=False)
BATCH, STEPS, FEW, TIMEOUT = 8, 12, 6, timedelta(seconds=60)
CPU = torch.device("cpu")


def shaken(config: UNetConfig) -> UNet:
    """A net whose zero-scale layers are not zero."""
    net = UNet(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net.train()


class Run:
    """A training run of this process's share of each batch, sharded; alone: of all of it, as one process trains."""

    def __init__(
        self,
        config: UNetConfig = NET,
        *,
        alone: bool = False,
        accumulation: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rank, self.world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        self.net = shaken(config)
        self.ema = copy.deepcopy(self.net).eval()
        if self.world > 1:
            sharding.shard(self.net, CPU)
            sharding.shard(self.ema, CPU)
        process = TrainingProcess(SCHEDULE, seed=5, flip=True)
        share = self.world / BATCH
        self.step = TrainStep(self.net, self.ema, process, OPTIM, EMAConfig(decay=0.9), dtype=dtype, share=share)
        self.names = [name for name, _ in self.net.named_parameters()]
        self.accumulation, self.number = accumulation, 0

    def micro(self, part: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.number)
        images = torch.randint(256, (BATCH, 3, 8, 8), generator=generator, dtype=torch.uint8)
        ordinals = torch.arange(self.number * BATCH, (self.number + 1) * BATCH)
        size = BATCH // (self.world * self.accumulation)
        mine = slice((self.rank * self.accumulation + part) * size, (self.rank * self.accumulation + part + 1) * size)
        return images[mine], ordinals[mine]

    def train(self, steps: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of each step."""
        log = []
        for _ in range(steps):
            last = self.accumulation - 1
            losses = [self.step.accumulate(*self.micro(part), last=part == last) for part in range(self.accumulation)]
            norm = self.step.update(self.number)
            loss = torch.cat(losses).sum() / BATCH
            if self.world > 1:
                dist.all_reduce(loss)
            log.append((loss.item(), norm.item()))
            self.number += 1
        return log

    def state(self) -> State:
        return State(
            self.number,
            self.number * BATCH,
            self.net.state_dict(),
            self.ema.state_dict(),
            optimizer_tensors(self.step.optimizer, self.names, self.step.weights),
            facts={"number": self.number},
            rows=sharding.rows(self.net),
        )

    def load(self, path: Path) -> None:
        state = Checkpoints(path.parents[1]).load(path, sharding.rows(self.net))
        load_into(self.net, state.model, "model")
        load_into(self.ema, state.ema, "ema")
        load_optimizer(self.step.optimizer, self.names, self.step.weights, state.optimizer)
        self.number = state.step

    def draw(self) -> tuple[Any, Tensor]:
        """Images of the averages, and one prediction of theirs, in which a small change shows."""
        x = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(7))
        with self.ema.frozen():
            predicted = self.ema(x, 50).sample.clone()
        sampler = Sampler(self.ema, SCHEDULE, sampler="ddim", num_steps=3, seed=3)
        if self.world == 1:
            return to_uint8(sampler.sample(torch.arange(4), (3, 8, 8), CPU)).numpy(), predicted
        return draw_images(sampler, 4, shape=(3, 8, 8), batch_size=4, device=CPU).images, predicted


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "no error"


def cast_copies_after_forward(run: Run) -> tuple[int, int]:
    """How many copies of convolutions' weights were made in a forward pass, and are held for the backward one."""
    made: list[Any] = []
    real = blocks._cast_sharded

    def noted(*arguments: Any) -> Tensor:
        copied = real(*arguments)
        if copied.ndim == 4 and copied.data_ptr() != arguments[1][0].data_ptr():
            made.append(weakref.ref(copied))
        return copied

    images, ordinals = run.micro(0)
    blocks._cast_sharded = noted
    try:
        noised = run.step.process.noise(images, ordinals)
        with run.net.noise_address(5, ordinals):
            prediction = run.net(noised.x_t, noised.t).sample
        held = sum(reference() is not None for reference in made)
    finally:
        blocks._cast_sharded = real
    prediction.sum().backward()
    for weight in run.step.weights:
        weight.grad = None
    return len(made), held


@contextmanager
def folded_biases() -> Iterator[None]:
    """As on a GPU, where a block hands its last bias on to a block that runs when its own weights are gone."""
    real, blocks.Shared.folds_bias = blocks.Shared.folds_bias, lambda self, x: True  # type: ignore[method-assign]
    try:
        yield
    finally:
        blocks.Shared.folds_bias = real  # type: ignore[method-assign]


def two(folder: Path) -> dict[str, Any]:
    """What two processes do: each some runs alone, to compare with, then together. Returns what the tests look at."""
    found: dict[str, Any] = {}
    if dist.get_rank() == 0:
        run = Run(alone=True)
        found["one"] = run.train(STEPS)
        Checkpoints(folder / "whole").save(run.state())
        found["one drawn"] = run.draw()
        found["one more"] = run.train(3)
        found["one drawn later"] = run.draw()
        found["one average"] = dict(run.ema.state_dict())
        found["one holds"] = sum(line.numel() for line in run.step.lines)
    else:
        found["one film"] = Run(FILM, alone=True).train(FEW)
        found["one bf16"] = Run(alone=True, dtype=torch.bfloat16).train(FEW)
        with folded_biases():
            found["one folded"] = Run(alone=True).train(FEW)
            found["one folded film"] = Run(PLAIN_FILM, alone=True).train(FEW)
    dist.barrier()

    peers = sharding.Peers(TIMEOUT)
    run = Run()
    found["plain"] = run.train(STEPS)
    checkpoints = Checkpoints(folder / "run", peers=peers)
    found["saved"] = checkpoints.save(run.state())
    found["drawn"] = run.draw()  # after the save, because state_dict() lets go of gathered weights
    found["more"] = run.train(3)
    found["drawn later"] = run.draw()
    found["full"] = sharding.full_state_dict(run.ema)
    again = Run()
    again.load(found["saved"])
    found["more again"] = again.train(3)
    found["equal"] = all(
        torch.equal(sharding.local(a), sharding.local(b))
        for a, b in zip(
            (*run.step.weights, *run.step.averages), (*again.step.weights, *again.step.averages), strict=True
        )
    )
    again.load(folder / "whole" / "checkpoints" / f"step-{STEPS:08d}")  # of one process
    found["of one"] = Checkpoints(folder / "of one", peers=peers).save(again.state())

    writer = AsyncWriter(checkpoints)  # its thread meets the other's while both train
    writer.save(run.state())
    found["beside"] = run.train(2)
    writer.drain()
    found["committed"] = writer.committed

    real = checkpoint.save_file

    def full(*arguments: Any, **options: Any) -> None:
        if run.rank == 1:
            raise OSError(28, "No space left on device")
        real(*arguments, **options)

    checkpoint.save_file = full
    found["full disk"] = error_of(lambda: checkpoints.save(run.state()))
    checkpoint.save_file = real
    dist.barrier()  # rank 0 has cleaned up
    found["left"] = sorted(path.name for path in checkpoints.folder.iterdir())

    before = [line.detach().clone() for line in run.step.lines]
    images, ordinals = run.micro(0)
    images = images.float()
    if run.rank == 1:
        images[0, 0, 0, 0] = float("nan")
    run.step.accumulate(images, ordinals)
    found["norm with NaN"] = run.step.update(run.number).item()
    found["skipped"] = all(torch.equal(a, b) for a, b in zip(before, run.step.lines, strict=True))

    parts = Run(accumulation=2)
    with CommDebugMode() as communication:
        parts.step.accumulate(*parts.micro(0), last=False)
    found["first part"] = {str(op): count for op, count in communication.get_comm_counts().items()}
    with CommDebugMode() as communication:
        parts.step.accumulate(*parts.micro(1))
    found["last part"] = {str(op): count for op, count in communication.get_comm_counts().items()}
    parts.step.update(0)
    parts = Run(accumulation=2)
    found["parts"] = parts.train(FEW)
    found["film"] = Run(FILM).train(FEW)
    found["bf16"] = Run(dtype=torch.bfloat16).train(FEW)
    with folded_biases():
        found["folded"] = Run().train(FEW)
        found["folded film"] = Run(PLAIN_FILM).train(FEW)
    found["copies"] = cast_copies_after_forward(parts)
    found["contiguous"] = all(sharding.local(weight).is_contiguous() for weight in parts.step.weights)
    found["held"] = sum(line.numel() for line in parts.step.lines)
    return found


def four(folder: Path) -> dict[str, Any]:
    """What four processes do: they go on where two stopped, some of them with no row of some weights."""
    run = Run()
    peers = sharding.Peers(TIMEOUT)
    found: dict[str, Any] = {"plain": run.train(4)}
    run.load(folder / "run" / "checkpoints" / f"step-{STEPS:08d}")
    found["saved"] = Checkpoints(folder / "four", peers=peers).save(run.state())
    found["more"] = run.train(3)
    found["empty"] = sum(line.numel() == 0 for line in run.step.lines)
    if dist.get_rank() == 0:
        alone = Run(alone=True)
        alone.load(folder / "run" / "checkpoints" / f"step-{STEPS:08d}")
        found["alone"] = alone.train(3)
    return found


def _process(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / f'store-{world}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=TIMEOUT)
    found = (two if world == 2 else four)(folder)
    torch.save(found, folder / f"found-{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _start(world: int, folder: Path) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("TRITON_INTERPRET", raising=False)  # the CPU's own kernels: ten times as fast
        mp.spawn(_process, (world, folder), nprocs=world)
    return [torch.load(folder / f"found-{world}-{rank}.pt", weights_only=False) for rank in range(world)]


Results = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("sharded")
    return folder, _start(2, folder)


@pytest.fixture(scope="module")
def of_four(of_two: Results) -> Results:
    return of_two[0], _start(4, of_two[0])


def assert_close(got: list[tuple[float, float]], want: list[tuple[float, float]], rel: float = 1e-5) -> None:
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=rel)


def test_two_processes_that_share_a_net_train_it_as_one_does(of_two):
    """Loss and gradient norm, with dropout, clipping, warm-up and decay; the same numbers on both processes."""
    first, second = of_two[1]
    assert first["plain"] == second["plain"] and first["beside"] == second["beside"]
    assert_close(first["plain"], first["one"])
    assert_close(first["more"], first["one more"])


def test_four_processes_train_it_as_one_does(of_two, of_four):
    """Of conv_out's three rows the last process has none."""
    one, found = of_two[1][0], of_four[1]
    assert_close(found[0]["plain"], one["one"][:4])
    assert_close(found[0]["more"], one["one more"])
    assert [f["empty"] for f in found] == [0, 0, 0, 2]


def test_each_process_holds_its_share_alone(of_two):
    found = of_two[1]
    total, held = found[0]["one holds"], [f["held"] for f in found]
    assert sum(held) == total and max(held) < 0.51 * total
    assert all(f["contiguous"] for f in found)


def test_accumulated_parts_are_the_same_step_and_send_no_gradient_but_the_last(of_two):
    found = of_two[1][0]
    assert_close(found["parts"], found["one"][:FEW])
    sent = {part: sum(n for op, n in found[part].items() if "reduce" in op) for part in ("first part", "last part")}
    assert sent["first part"] == 0 < sent["last part"], found


def test_recomputed_activations_and_scale_shift(of_two):
    """Dropout masks in the second pass are those of the first."""
    assert_close(of_two[1][0]["film"], of_two[1][1]["one film"])


def test_no_two_weights_have_one_gradient():
    """The fused optimiser writes the clipped gradient back: of two weights with one, one would be clipped twice."""
    run = Run(alone=True)
    with folded_biases():
        run.step.accumulate(*run.micro(0))
    places = [weight.grad.data_ptr() for weight in run.step.weights if weight.grad is not None]
    assert len(set(places)) == len(places) == len(run.step.weights)


@pytest.mark.parametrize("name", ["folded", "folded film"])
def test_biases_that_the_next_block_adds_are_there(of_two, name):
    assert_close(of_two[1][0][name], of_two[1][1][f"one {name}"])


def test_bf16_rounds_weights_of_fp32_masters(of_two):
    """Two processes sum gradients of halves of the batch, so bf16 agrees to its own rounding."""
    assert_close(of_two[1][0]["bf16"], of_two[1][1]["one bf16"], rel=8e-3)


def test_compute_copies_are_not_kept_for_the_backward_pass(of_two):
    """Else each process would hold a copy of the whole net; the net's own first and last convolution keep theirs."""
    made, held = of_two[1][0]["copies"]
    assert made > 10 and held == 2


def test_averages_are_sampled_as_they_are_now(of_two):
    """On all ranks, and again after more steps: no gathered weight is left over from the first time."""
    found = of_two[1][0]
    for name in ("drawn", "drawn later"):
        (got, predicted), (want, expected) = found[name], found[f"one {name}"]
        assert got.shape == want.shape == (4, 8, 8, 3)
        assert abs(got.astype(int) - want.astype(int)).max() <= 1
        torch.testing.assert_close(predicted, expected, rtol=0, atol=2e-5)
    change = (found["drawn later"][1] - found["drawn"][1]).abs().max()
    assert change > 2e-4, "too small a change to see old weights by"


def test_the_whole_average_is_put_together_on_rank_0(of_two):
    first, second = of_two[1]
    want = first["one average"]
    assert second["full"] == {} and list(first["full"]) == list(want)
    for name, value in first["full"].items():
        torch.testing.assert_close(value, want[name], rtol=1e-3, atol=2e-4)


def test_a_sharded_run_goes_on_bitwise(of_two):
    for found in of_two[1]:
        assert found["more"] == found["more again"] and found["equal"]


def same_bits(a: State, b: State) -> bool:
    return a.step == b.step and all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        for ours, theirs in ((a.model, b.model), (a.ema, b.ema), (a.optimizer, b.optimizer))
    )


def test_checkpoints_go_from_any_number_of_processes_to_any_other(of_two, of_four):
    """Saved on 2, loaded and saved on 4, loaded on 1; saved on 1, loaded and saved on 2: every tensor bitwise."""
    folder, found = of_two
    checkpoints = Checkpoints(folder / "run")
    saved = checkpoints.load(found[0]["saved"])
    assert checkpoints.verify(found[0]["saved"]) is None
    assert len([p for p in found[0]["saved"].iterdir() if p.suffix == ".safetensors"]) == 6
    assert all(key.rpartition("/")[2] in ("step", "exp_avg", "exp_avg_sq") for key in saved.optimizer)
    assert same_bits(Checkpoints(folder / "four").load(of_four[1][0]["saved"]), saved)
    whole = Checkpoints(folder / "whole").load(folder / "whole" / "checkpoints" / f"step-{STEPS:08d}")
    assert same_bits(Checkpoints(folder / "of one").load(found[0]["of one"]), whole)


def test_a_sharded_checkpoint_continues_without_sharding(of_two, of_four):
    assert_close(of_four[1][0]["alone"], of_two[1][0]["more"])


def test_a_full_disk_on_one_process_is_an_error_on_both(of_two):
    for found in of_two[1]:
        assert "process 1: [Errno 28] No space left on device" in found["full disk"]
        assert found["left"] == [f"step-{STEPS:08d}", f"step-{STEPS + 3:08d}"]
        assert found["committed"] == STEPS + 3


def test_a_nan_on_one_process_is_skipped_by_both(of_two):
    for found in of_two[1]:
        assert found["norm with NaN"] != found["norm with NaN"] and found["skipped"]


@pytest.mark.parametrize(
    ("options", "what"),
    [({"precision": "fp16"}, "fp16"), ({"compiled": True}, "--compile"), ({"graph": True}, "--graph")],
)
def test_what_does_not_go_with_sharding_is_refused(options, what):
    good = {"precision": "bf16", "compiled": False, "graph": False}
    sharding.check_sharding(**good)
    with pytest.raises(ConfigError, match=f"fsdp2 does not go with .*{what}"):
        sharding.check_sharding(**good | options)


def test_one_process_cannot_share():
    with pytest.raises(ConfigError, match="needs several processes"):
        sharding.shard(UNet(NET), CPU)
