"""The training step against a plain rewrite; precision, recomputation, kept casts, layout copies, graphs, --compile."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastddpm_kernels
from fastddpm.blocks import PACKS
from fastddpm.compiling import compile_blocks, compile_unet
from fastddpm.config import EMAConfig, OptimConfig, preset
from fastddpm.diffusion import ProcessConfig, TrainingProcess
from fastddpm.errors import ConfigError
from fastddpm.machine import product_rate, settle_precision
from fastddpm.optim import ema_decay, learning_rate, update_ema
from fastddpm.samplers import Sampler
from fastddpm.step import TrainStep
from fastddpm.unet import UNet, UNetConfig

NET = UNetConfig(
    sample_size=16,
    block_out_channels=(16, 32, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    dropout=0.2,
)
OPTIM = OptimConfig(name="adamw", lr=1e-3, warmup_steps=2, weight_decay=0.1, clip_norm=0.05, horizon=10, decay="cosine")
SCHEDULE = ProcessConfig(num_timesteps=100).noise_schedule()
SEED = 5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def shaken(config: UNetConfig, device: str = "cpu") -> UNet:
    """A net whose zero-scale layers are not zero."""
    net = UNet(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net.to(device).train()


def batch(step: int, count: int = 6, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    ordinals = torch.arange(step * count, (step + 1) * count)
    return images.contiguous(memory_format=torch.channels_last).to(device), ordinals.to(device)


def make_step(config: UNetConfig = NET, device: str = "cpu", **options: Any) -> TrainStep:
    net = shaken(config, device)
    process = TrainingProcess(SCHEDULE, seed=SEED, flip=True)
    return TrainStep(net, copy.deepcopy(net).eval(), process, OPTIM, EMAConfig(decay=0.9), **options)


def run(step: TrainStep, count: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    results = [step(*batch(i, device=device), i) for i in range(count)]
    return [(losses.clone(), norm.clone()) for losses, norm in results]


@pytest.mark.parametrize("device", DEVICES)
def test_the_step_is_algorithm_1_with_torchs_own_clipping_adamw_and_average(device: str) -> None:
    step = make_step(device=device)
    net = shaken(NET, device)
    average = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(
        net.parameters(), betas=OPTIM.betas, eps=OPTIM.adam_eps, weight_decay=0.1, fused=False
    )
    for number in range(3):
        images, ordinals = batch(number, device=device)
        losses, norm = step(images, ordinals, number)
        noised = step.process.noise(images, ordinals)
        with net.noise_address(SEED, ordinals):
            expected = step.process.loss(net(noised.x_t, noised.t).sample, noised, ordinals)
        expected.mean().backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), OPTIM.clip_norm)
        assert expected_norm > 2 * OPTIM.clip_norm, "nothing was clipped"
        optimizer.param_groups[0]["lr"] = learning_rate(OPTIM, number, 10)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            decay = ema_decay(EMAConfig(decay=0.9), number)
            for mean, weight in zip(average.parameters(), net.parameters(), strict=True):
                mean.mul_(decay).add_(weight, alpha=1 - decay)
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-4, atol=0)
    for got, want in ((step.weights, net), (step.averages, average)):
        for a, (name, b) in zip(got, want.named_parameters(), strict=True):
            # The softmax is blind to k's bias: its gradient is rounding, which Adam turns into steps of up to lr.
            blind = name.endswith("to_k.bias")
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2 * 3 * OPTIM.lr if blind else 2e-5)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    whole, parts = make_step(), make_step(share=1 / 6)
    images, ordinals = batch(0)
    losses, norm = whole(images, ordinals, 0)
    shares = [parts.accumulate(images[i : i + 2], ordinals[i : i + 2], last=i == 4) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(shares), losses)
    torch.testing.assert_close(parts.update(0), norm)


def test_without_clip_norm_gradients_are_not_touched() -> None:
    step = make_step()
    step.optim = dataclasses.replace(OPTIM, clip_norm=None)
    step(*batch(0), 0)
    assert getattr(step.optimizer, "grad_scale", None) is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(device: str, accumulation: int, monkeypatch) -> None:
    """Neither weights nor moments nor averages, and the steps after it are those of a run that never had it."""
    calm, disturbed = (make_step(device=device, share=1 / 6 if accumulation == 2 else None) for _ in range(2))

    def one(step: TrainStep, number: int, data: int) -> torch.Tensor:
        images, ordinals = (x.to(device) for x in batch(data))
        if accumulation == 1:
            return step(images, ordinals, number)[1]
        for i in (0, 3):
            step.accumulate(images[i : i + 3], ordinals[i : i + 3], last=i == 3)
        return step.update(number)

    def state(step: TrainStep) -> list[torch.Tensor]:
        moments = [value for line in step.lines for value in step.optimizer.state[line].values()]
        return [t.clone() for t in (*step.weights, *step.averages, *moments)]

    for step in (calm, disturbed):
        one(step, 0, 0)
    before = state(disturbed)
    plain = TrainingProcess.loss_and_grad
    with monkeypatch.context() as patch:
        patch.setattr(
            TrainingProcess, "loss_and_grad", lambda self, *args: [x * float("inf") for x in plain(self, *args)]
        )
        assert not one(disturbed, 1, 1).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, state(disturbed), strict=True))
    assert all(weight.grad is None for weight in disturbed.weights)
    for step in (calm, disturbed):
        one(step, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(state(calm), state(disturbed), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_follows_fp32_over_fp32_weights(device: str) -> None:
    full, half = make_step(device=device), make_step(device=device, dtype=torch.bfloat16)
    for (a, norm_a), (b, norm_b) in zip(run(full, 4, device), run(half, 4, device), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)
        torch.testing.assert_close(norm_a, norm_b, rtol=0.05, atol=0)
    assert {w.dtype for w in half.weights} == {torch.float32}
    images, _ = batch(0, device=device)
    assert half.unet(images.float(), 3).sample.dtype == torch.bfloat16


PRIME = 11  # images: no size of the net's is a multiple of it, so that a tensor's shape says whether it is activations
FILLS = {"aten::addmm", "aten::constant_pad_nd"}  # the bias as a product's first summand; padding is a copy by nature


def copies_of_activations(work: Callable[[], object]) -> list[tuple[str, list[int], list[str]]]:
    """What copies or transposes activations of 16 channels or more: the operator, its shape and who called it.

    Found by the profiler, which also sees the operators inside of custom ones, and not only those that autograd calls.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        work()
    found = []
    for event in profile.events():
        if event.name not in ("aten::copy_", "aten::stack") or not event.input_shapes:  # clones etc. end in copy_
            continue
        shape, callers, parent = event.input_shapes[0], [], event.cpu_parent
        while parent is not None:
            callers.append(parent.name)
            parent = parent.cpu_parent
        rows = len(shape) < 2 or (len(shape) == 2 and shape[0] == PRIME)  # statistics, embeddings, random words
        if rows or shape[0] % PRIME or 3 in shape[1:] or math.prod(shape) < PRIME * 16 * 16:  # 3: of an image
            continue
        if not FILLS.intersection(callers):
            found.append((event.name, shape, callers))
    return found


@torch.library.custom_op("fastddpm_tests::copies", mutates_args=())
def _copies(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", [None, "native"])
@pytest.mark.parametrize("changes", [{}, {"resnet_time_scale_shift": "scale_shift", "attention_head_dim": 8}])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_makes_no_layout_copies_of_activations(device: str, changes: dict[str, Any], impl: str | None) -> None:
    if impl == "native" and (device != "cpu" or fastddpm_kernels.native_available()):
        pytest.skip("for CPUs with a compiler")
    step = make_step(dataclasses.replace(NET, **changes), device, dtype=torch.bfloat16)
    step.unet.shared.impl = impl
    images, ordinals = batch(0, PRIME, device)
    assert copies_of_activations(lambda: step(images, ordinals, 0)) == []


def test_a_copy_inside_a_custom_operator_is_seen() -> None:
    (found,) = copies_of_activations(lambda: _copies(torch.zeros(PRIME, 16, 16, 16)))
    assert "fastddpm_tests::copies" in found[2]


# The average


class Operators(TorchDispatchMode):
    """Counts the operators that take a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], list | tuple):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight", [0.001, 0.3, 0.9])
def test_an_average_with_a_weight_of_the_device_is_one_pass(device: str, weight: float) -> None:
    averages, weights = ([p.detach() for p in shaken(NET, device).parameters()] for _ in range(2))
    for i, w in enumerate(weights):
        w.add_(torch.randn(w.shape, generator=torch.Generator().manual_seed(i)).to(device))
    kept, exact = [w.clone() for w in weights], [a.double() for a in averages]
    for average, w in zip(exact, weights, strict=True):
        average.lerp_(w.double(), torch.tensor(weight).item())
    found = []
    yes, no = (torch.tensor(value, device=device) for value in (True, False))
    for number, applied in ((torch.tensor(weight, device=device), None), (weight, yes), (weight, no)):
        mine = [a.clone() for a in averages]
        with Operators() as operators:
            update_ema(mine, weights, number, applied)
        assert len(operators.names) == 1, operators.names
        found.append(mine)
    by_tensor, by_number, skipped = found
    for a, b, c, average, truth in zip(by_tensor, by_number, skipped, averages, exact, strict=True):
        torch.testing.assert_close(a.double(), truth, rtol=1e-6, atol=1e-6)
        assert torch.equal(a, b), "a graph's average is another"
        assert torch.equal(c, average), "a skipped step changed the average"
    assert all(torch.equal(a, b) for a, b in zip(weights, kept, strict=True))


# Less memory


@pytest.mark.parametrize("addressed", [True, False])
def test_recomputed_activations_give_the_same_gradients_and_keep_less(addressed: bool) -> None:
    images, ordinals = batch(0)
    results = []
    for recompute in (False, True):
        net = shaken(dataclasses.replace(NET, checkpoint_activations=recompute))
        torch.manual_seed(3)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x_t = images.float() / 127.5 - 1
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if addressed:
                with net.noise_address(SEED, ordinals):
                    output = net(x_t, 7).sample
            else:
                output = net(x_t, 7).sample
            total = sum(kept.values())
        output.square().sum().backward()  # outside of the address, as in the step
        results.append((output, [p.grad for p in net.parameters()], total))
    (output, grads, plain), (again, grads_again, less) = results
    assert torch.equal(output, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert less < 0.7 * plain


def test_recomputed_layers_can_be_differentiated_twice_from_one_forward() -> None:
    images, ordinals = batch(0)
    net = shaken(dataclasses.replace(NET, checkpoint_activations=True))
    with net.noise_address(SEED, ordinals):
        loss = net(images.float() / 127.5 - 1, 7).sample.square().sum()
    first, again = (torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_checkpoint_activations_is_not_part_of_the_model() -> None:
    config = dataclasses.replace(NET, checkpoint_activations=True)
    assert UNetConfig.from_diffusers(config.to_diffusers()) == NET
    with torch.device("meta"):
        assert UNet(config).state_dict().keys() == UNet(NET).state_dict().keys()


# Sampling


class Casts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_frozen_weights_are_cast_once_and_give_the_same_results() -> None:
    net = shaken(NET).eval()
    net.compute_dtype = torch.bfloat16
    x_t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = net(x_t, 7).sample
    with net.frozen():
        assert torch.equal(net(x_t, 7).sample, expected)
        with Casts() as casts:
            output = net(x_t, 7).sample
    assert torch.equal(output, expected) and not output.requires_grad
    assert casts.count < 60 < len(list(net.parameters()))
    twin = copy.deepcopy(net)
    twin.cast_weights(torch.bfloat16)
    assert torch.equal(twin(x_t, 7).sample, expected) and twin.dtype == torch.bfloat16
    with torch.no_grad():
        net.conv_out.weight.mul_(2)
    assert not torch.equal(net(x_t, 7).sample, expected), "a cast was kept"
    with pytest.raises(ValueError, match=r"compute_dtype is torch\.int8"):
        net.compute_dtype = torch.int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_convolutions_are_packed_for_each_size_of_image(dtype: torch.dtype) -> None:
    net = shaken(NET).eval()
    net.compute_dtype = dtype
    truth = copy.deepcopy(net).double()
    truth.compute_dtype = torch.float64
    generator = torch.Generator().manual_seed(0)
    with net.frozen({}):
        for shape in ((1, 3, 16, 16), (3, 3, 16, 16), (1, 3, 32, 16)):
            x_t = torch.randn(shape, generator=generator)
            expected = truth(x_t.double(), 7).sample
            tolerance = 1e-5 if dtype == torch.float32 else 0.1
            for _ in range(2):  # the second finds the weights packed
                torch.testing.assert_close(net(x_t, 7).sample.double(), expected, atol=tolerance, rtol=tolerance)
        assert sum(len(key[1]) == 5 for key in net.shared.frozen or {}) > 3 or not PACKS


def test_interleaved_samplers_leave_the_net_as_it_was() -> None:
    net = shaken(NET)
    net.compute_dtype = torch.bfloat16
    runs = [Sampler(net, SCHEDULE, num_steps=n, seed=n).steps(torch.arange(2), (3, 16, 16)) for n in (2, 3)]
    for _ in zip(*runs, strict=False):
        assert net.shared.frozen is None, "casts are kept while the caller's code runs"
    for run in runs:
        run.close()
    net(torch.zeros(1, 3, 16, 16), 3).sample.float().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_copy_made_while_frozen_is_not() -> None:
    net = shaken(NET)
    with net.frozen():
        net(torch.zeros(1, 3, 16, 16), 3)
        assert copy.deepcopy(net).shared.frozen is None


# Graphs, --compile, precision


def test_a_graph_takes_one_micro_batch() -> None:
    with pytest.raises(ConfigError, match="graph is set and accumulation is 2"):
        preset("digits", graph=True, accumulation=2).check()


def test_a_graph_needs_cuda_and_says_so() -> None:
    with pytest.raises(ConfigError, match="CUDA graph: the step runs on cpu; leave out --graph"):
        make_step(graph=True)
    sampler = Sampler(shaken(NET).eval(), SCHEDULE, num_steps=2, graph=True)
    with pytest.raises(ConfigError, match="cannot be captured on cpu"):
        sampler.sample(torch.arange(1), (3, 16, 16))


@pytest.mark.gpu
def test_graphed_steps_are_the_eager_ones_and_shapes_may_change() -> None:
    eager, graphed = make_step(device="cuda"), make_step(device="cuda", graph=True)
    for (a, norm_a), (b, norm_b) in zip(run(eager, 8, "cuda"), run(graphed, 8, "cuda"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm_a, norm_b, rtol=1e-3, atol=0)
    assert graphed.graph is not None and graphed.graph.captured is not None
    for number in range(8, 14):
        images, ordinals = batch(number, 4, "cuda")
        torch.testing.assert_close(
            graphed(images, ordinals, number)[0], eager(images, ordinals, number)[0], rtol=1e-3, atol=1e-4
        )
    for a, b in zip(graphed.averages, eager.averages, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.5, "num_steps": 20}])
def test_graphed_sampling_is_the_eager_one(options: dict[str, Any]) -> None:
    net = shaken(NET, "cuda").eval()
    plain, graphed = (Sampler(net, SCHEDULE, seed=SEED, graph=graph, **options) for graph in (False, True))
    for first in (0, 4):  # the second batch replays the first one's graph
        images = torch.arange(first, first + 4)
        garbage = [torch.full((size,), float("nan"), device="cuda") for size in (20, 100, 160, 800, 4096)]
        del garbage  # what the captured kernels read must not be in memory that others get
        torch.testing.assert_close(
            graphed.sample(images, (3, 16, 16), "cuda"),
            plain.sample(images, (3, 16, 16), "cuda"),
            rtol=1e-3,
            atol=1e-3,
        )
    steps = zip(graphed.steps(images, (3, 16, 16), "cuda"), plain.steps(images, (3, 16, 16), "cuda"), strict=True)
    for a, b in steps:
        assert (a.i, a.t) == (b.i, b.t)
        torch.testing.assert_close(a.x_t, b.x_t, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(a.x_0_hat, b.x_0_hat, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_steps_are_the_plain_ones(device: str, dtype: torch.dtype) -> None:
    if device == "cpu" and (reason := fastddpm_kernels.native_available()):
        pytest.skip(reason)
    plain, compiled = make_step(device=device, dtype=dtype), make_step(device=device, dtype=dtype)
    assert compile_unet(compiled.unet)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    for (a, norm_a), (b, norm_b) in zip(run(plain, 3, device), run(compiled, 3, device), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        torch.testing.assert_close(norm_a, norm_b, rtol=0.05, atol=0)
    assert plain.unet.state_dict().keys() == compiled.unet.state_dict().keys()


@pytest.mark.parametrize("dropout", [0.2, 0.0])
def test_blocks_compile_one_by_one_without_graph_breaks(dropout: float) -> None:
    """What --compile does on a GPU, here with torch.compile's tracing and autograd but without its code generation."""
    config = dataclasses.replace(NET, layers_per_block=2, dropout=dropout)
    plain, compiled = make_step(config), make_step(config)
    plain.unet.shared.impl = compiled.unet.shared.impl = "reference"  # a single operator, as the kernels are
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    count = compile_blocks(compiled.unet, backend="aot_eager")
    for (a, norm_a), (b, norm_b) in zip(run(plain, 2), run(compiled, 2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm_a, norm_b, rtol=1e-4, atol=0)
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= count and not counters["graph_break"]
    assert dropout > 0 or graphs < count, "blocks of the same shapes were compiled twice"
    compiled.unet.eval()
    x_t = torch.zeros(2, 3, 16, 16)
    with torch.no_grad():
        compiled.unet(x_t, 1)
    before, kept = counters["stats"]["unique_graphs"], {}
    for _ in range(3):  # kept casts do not change what is compiled
        with compiled.unet.frozen(kept):
            compiled.unet(x_t, 1)
    assert counters["stats"]["unique_graphs"] == before


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastddpm_kernels, "native_available", lambda: "no C++ compiler was found: set CXX")
    with pytest.raises(ConfigError, match=r"--compile: no C\+\+ compiler was found: set CXX; leave out --compile"):
        compile_unet(UNet(NET))


def test_auto_precision_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 2e11, torch.bfloat16: 1e12}
    monkeypatch.setattr("fastddpm.machine.product_rate", lambda dtype: rates[dtype])
    if not torch.cuda.is_available():
        precision, why = settle_precision("auto")
        assert precision == "bf16" and "1,000 GFLOP/s in bf16, 200 in fp32" in (why or "")
        rates[torch.bfloat16] = 2.5e11
        assert settle_precision("auto")[0] == "fp32"
    assert settle_precision("fp32") == ("fp32", None)
    assert 1e8 < product_rate(torch.float32, 64) < 1e15
