"""The rivals, each driven as its own training code drives it, and the truth that everyone is held against.

diffusers has no packaged trainer: its rival is a loop that makes the calls of its script on its own UNet2DModel,
DDPMScheduler, EMAModel, get_scheduler and accelerate (SCRIPT names the commit that it was checked against). Left out,
all in the rival's favour: decoding, resizing and normalising images (they lie in memory), the tracker, checkpoints.
lucidrains' denoising_diffusion_pytorch has another net (its GFLOP per image stand beside it); the loop is that of its
Trainer, with the EMA at every step (its own: every 10th) and from the first one.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch._inductor
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastddpm.blocks import Dropout
from fastddpm.flops import flops_per_image
from fastddpm.machine import make_accelerator
from fastddpm.unet import UNet, UNetConfig
from fastddpm_kernels.dropout import dropout_reference

from .kernels import FLOORS

SEED = 1234
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# examples/unconditional_image_generation/train_unconditional.py of huggingface/diffusers and its defaults.
SCRIPT: dict[str, Any] = {
    "commit": "c56add8081be60b7e8794e011f1790d0e37aeced",
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 500,
    "adam_beta1": 0.95,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-6,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "ema_max_decay": 0.9999,
    "ema_inv_gamma": 1.0,
    "ema_power": 0.75,
    "ddpm_num_steps": 1000,
    "ddpm_beta_schedule": "linear",
    "prediction_type": "epsilon",
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
}
TRAINING_STEPS = 100_000  # of the learning rate's schedule


class Missing(Exception):
    """A rival cannot be imported here; the message is one line that says why."""


@dataclass(frozen=True)
class Net:
    """A network of the benchmark, and lucidrains' of about its width."""

    config: UNetConfig
    lucidrains: Mapping[str, Any]
    """Arguments of its Unet."""


NETS = {
    "cifar10": Net(UNetConfig(), {"dim": 128, "dim_mults": (1, 2, 2, 2)}),
    "adm64": Net(
        UNetConfig(
            sample_size=64,
            freq_shift=0,
            flip_sin_to_cos=True,
            down_block_types=("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
            up_block_types=(*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
            block_out_channels=(192, 384, 576, 768),
            layers_per_block=3,
            downsample_padding=1,
            downsample_type="resnet",
            upsample_type="resnet",
            attention_head_dim=64,
            attn_norm_num_groups=32,
            norm_eps=1e-5,
            resnet_time_scale_shift="scale_shift",
        ),
        {"dim": 192, "dim_mults": (1, 2, 3, 4)},
    ),
    # For a smoke test.
    "small": Net(
        UNetConfig(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
        ),
        {"dim": 32, "dim_mults": (1, 2)},
    ),
}


def load(name: str) -> ModuleType:
    """A rival's module. Raises Missing."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that does not fit this torch raises what it likes
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise Missing(f"{name.partition('.')[0]} cannot be imported ({line}): pip install -e '.[bench]'") from error


def load_lucidrains() -> ModuleType:
    """denoising_diffusion_pytorch; its nets have no use for the torchvision that it imports, which may be missing."""
    try:
        importlib.import_module("torchvision")
    except Exception:  # missing, or built for another torch
        stand_ins = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms", "torchvision.utils")}
        vars(stand_ins["torchvision"]).update(
            transforms=stand_ins["torchvision.transforms"], utils=stand_ins["torchvision.utils"]
        )
        before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torchvision"}
        sys.modules.update(stand_ins)
        try:
            return load("denoising_diffusion_pytorch")
        finally:
            for name in stand_ins:
                del sys.modules[name]
            sys.modules.update(before)
    return load("denoising_diffusion_pytorch")


def absent() -> dict[str, str]:
    """The rivals that cannot be run here, and why, in one line each."""
    needed: dict[str, tuple[Callable[[], Any], ...]] = {
        "diffusers": (partial(load, "diffusers"), partial(load, "tqdm.auto")),
        "lucidrains": (load_lucidrains, partial(load, "ema_pytorch")),
    }
    reasons = {}
    for rival, loaders in needed.items():
        try:
            for each in loaders:
                each()
        except Missing as reason:
            reasons[rival] = str(reason)
    return reasons


# What every candidate gets: weights, images, precision.


def random_weights(config: UNetConfig) -> dict[str, Tensor]:
    """A state dict, the same for everyone, in which no layer is zero: zeros would hide wrong gradients of others."""
    weights = UNet(config, seed=SEED).state_dict()
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in weights.items():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weights[name] = noise / math.sqrt(weight[0].numel())
        else:
            weights[name] = 0.1 * noise + float(name.endswith("weight"))  # gains of norms
    return weights


def diffusers_net(config: UNetConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    """Its UNet2DModel with the weights. Raises Missing."""
    load("diffusers.utils.logging").set_verbosity_error()
    net: nn.Module = load("diffusers").UNet2DModel.from_config(config.to_diffusers())
    net.load_state_dict(weights)
    return net


def our_net(config: UNetConfig, weights: Mapping[str, Tensor]) -> UNet:
    """Our U-Net with the weights."""
    net = UNet(config)
    net.load_state_dict(weights)
    return net


def made_up_images(config: UNetConfig, count: int) -> Tensor:
    """uint8 [count, C, H, W] in NHWC memory, on the host."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (count, *config.image_size, config.in_channels)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


def shuffled(images: Tensor, batch: int, device: str) -> Iterator[Tensor]:
    """Endless batches of them on the device, in a new order each time round, copied from page-locked memory."""
    generator = torch.Generator().manual_seed(SEED)
    rows = images.permute(0, 2, 3, 1)
    while True:
        for chosen in torch.randperm(len(rows), generator=generator).split(batch):
            if len(chosen) == batch:
                gathered = rows[chosen].permute(0, 3, 1, 2)
                yield gathered.pin_memory().to(device, non_blocking=True) if device == "cuda" else gathered


def compile_options(mode: str, force_layout: bool) -> dict[str, Any]:
    """torch.compile's options; force_layout: channels_last inside, which it refuses to U-Nets of its own accord."""
    options = dict(torch._inductor.list_mode_options(mode))
    return options | {"force_layout_optimization": True} if force_layout else options


def gflop_per_image(net: nn.Module, shape: Sequence[int]) -> float:
    """GFLOP of a forward pass for one image [C, H, W], of any net called as net(x_t, t), counted on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.to("meta")(torch.zeros(1, *shape, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta"))
    return counter.get_total_flops() / 1e9


# The training loops.


@dataclass
class Candidate:
    """An implementation of the training step, ready to be called; a call is one step."""

    name: str
    ours: bool
    dtype: torch.dtype
    memory_format: str
    batch: int
    step: Callable[[], Any]
    """Returns the losses [N] if it has them."""
    predict: Callable[[Tensor, Tensor], Tensor]
    """The network as the step calls it: x_t [N, C, H, W] of dtype, t int64 [N]."""
    parameters: list[nn.Parameter]
    averages: list[Tensor]
    optimizer: Any
    gflop_per_image: float
    """Of a forward pass."""
    compiled: bool = False
    masks: Callable[[Tensor], AbstractContextManager[Any]] | None = None
    """Sets the dropout masks of the ordinals; None: they cannot be set."""
    training: Callable[[bool], Any] = lambda on: None
    """Switches dropout on and off."""
    calls: int = 0
    losses: Tensor | None = None

    def __call__(self) -> None:
        self.losses = self.step()
        self.calls += 1

    def optimizer_steps(self) -> int:
        """Steps that the optimiser has counted itself."""
        return int(self.optimizer.state[self.optimizer.param_groups[0]["params"][0]]["step"])

    def ema_weight(self) -> float:
        """Take a step and measure the share of the new weights in it: 1 - decay if the step averages, 0 if not."""
        before = [average.detach().clone() for average in self.averages]
        self()
        moved = torch._foreach_sub([a.detach() for a in self.averages], before)
        distance = torch._foreach_sub([p.detach() for p in self.parameters], before)
        dot = sum(float((m.double() * d).sum()) for m, d in zip(moved, distance, strict=True))
        return dot / sum(float(d.double().square().sum()) for d in distance)


@dataclass(frozen=True)
class Form:
    """A way to run a rival; `tuned` is what a user can switch on without touching the net."""

    dtype: torch.dtype
    channels_last: bool = False
    tuned: bool = False
    """Fused optimiser, EMA over all tensors at once, no .item() and no progress bar, images gathered in one go."""
    compile: Mapping[str, Any] | None = None
    label: str = ""
    """Of the way it is compiled."""

    @property
    def words(self) -> str:
        said = ("channels_last" * self.channels_last, "fused" * self.tuned, self.label)
        return " ".join((DTYPE_NAMES[self.dtype], *filter(None, said)))


class _Images(torch.utils.data.Dataset):
    """What the script's data set gives after its transforms, made before."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.float().contiguous() / 127.5 - 1.0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input": self.images[i]}


def _cycle(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def diffusers_step(
    config: UNetConfig, weights: Mapping[str, Tensor], images: Tensor, batch: int, device: str, form: Form
) -> Candidate:
    """The script's loop body, one call per step. Raises Missing."""
    diffusers, tqdm = load("diffusers"), load("tqdm.auto").tqdm
    accelerator = make_accelerator(
        DTYPE_NAMES[form.dtype],
        cpu=device == "cpu",
        gradient_accumulation_steps=SCRIPT["gradient_accumulation_steps"],
    )
    net = diffusers_net(config, weights).train()
    if form.channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if form.compile is not None:
        net.forward = torch.compile(net.forward, dynamic=False, options=dict(form.compile))  # type: ignore[method-assign]
    ema = load("diffusers.training_utils").EMAModel(
        net.parameters(),
        decay=SCRIPT["ema_max_decay"],
        use_ema_warmup=True,
        inv_gamma=SCRIPT["ema_inv_gamma"],
        power=SCRIPT["ema_power"],
        foreach=form.tuned,
        model_cls=diffusers.UNet2DModel,
        model_config=net.config,
    )
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=SCRIPT["ddpm_num_steps"],
        beta_schedule=SCRIPT["ddpm_beta_schedule"],
        prediction_type=SCRIPT["prediction_type"],
    )
    optimizer: Any = torch.optim.AdamW(
        net.parameters(),
        lr=SCRIPT["learning_rate"],
        betas=(SCRIPT["adam_beta1"], SCRIPT["adam_beta2"]),
        weight_decay=SCRIPT["adam_weight_decay"],
        eps=SCRIPT["adam_epsilon"],
        **({"fused": True} if form.tuned else {}),
    )
    loader: Any = torch.utils.data.DataLoader(
        _Images(images), batch_size=batch, shuffle=True, num_workers=SCRIPT["dataloader_num_workers"]
    )
    lr_scheduler = load("diffusers.optimization").get_scheduler(
        SCRIPT["lr_scheduler"],
        optimizer=optimizer,
        num_warmup_steps=SCRIPT["lr_warmup_steps"],
        num_training_steps=TRAINING_STEPS,
    )
    model, optimizer, loader, lr_scheduler = accelerator.prepare(net, optimizer, loader, lr_scheduler)
    ema.to(accelerator.device)
    batches: Iterator[Any] = _cycle(loader)
    if form.tuned:
        batches = ({"input": x.float() / 127.5 - 1.0} for x in shuffled(images, batch, device))
        if not form.channels_last:
            batches = ({"input": x["input"].contiguous()} for x in batches)
    bar = tqdm(total=TRAINING_STEPS, file=open(os.devnull, "w"), disable=form.tuned)  # noqa: SIM115
    graphed = form.compile is not None and "triton.cudagraphs" in form.compile

    def step() -> None:
        if graphed:
            torch.compiler.cudagraph_mark_step_begin()
        x_0 = next(batches)["input"].to(form.dtype)
        eps = torch.randn(x_0.shape, dtype=form.dtype, device=x_0.device)
        if form.channels_last:
            eps = eps.contiguous(memory_format=torch.channels_last)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x_0),), device=x_0.device).long()
        x_t = scheduler.add_noise(x_0, eps, t)
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(x_t, t).sample.float(), eps.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), SCRIPT["max_grad_norm"])
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(model.parameters())
            bar.update(1)
        if not form.tuned:
            logs = {"loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0], "step": bar.n}
            logs["ema_decay"] = ema.cur_decay_value
            bar.set_postfix(**logs)
            accelerator.log(logs, step=bar.n)

    return Candidate(
        f"diffusers {form.words}" + " (its script)" * (not form.tuned and not form.channels_last and not form.compile),
        ours=False,
        dtype=form.dtype,
        memory_format="channels_last" if form.channels_last else "contiguous",
        batch=batch,
        step=step,
        predict=lambda x_t, t: model(x_t, t).sample,
        parameters=list(model.parameters()),
        averages=ema.shadow_params,
        optimizer=optimizer,
        gflop_per_image=flops_per_image(config) / 1e9,
        compiled=form.compile is not None,
        training=model.train,
    )


def image_shape(config: UNetConfig) -> tuple[int, int, int]:
    """(C, H, W)."""
    return (config.in_channels, *config.image_size)


def lucidrains_net(net: Net) -> nn.Module:
    """Its Unet, weights as it draws them. Raises Missing."""
    unet = load_lucidrains().Unet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        built: nn.Module = unet(**net.lucidrains, channels=net.config.in_channels, dropout=net.config.dropout)
    return built


def lucidrains_step(net: Net, images: Tensor, batch: int, device: str, form: Form) -> Candidate:
    """The loop body of its Trainer. Raises Missing."""
    package, ema_class = load_lucidrains(), load("ema_pytorch").EMA
    accelerator = make_accelerator(DTYPE_NAMES[form.dtype], cpu=device == "cpu")
    unet = lucidrains_net(net)
    gflop = gflop_per_image(lucidrains_net(net), image_shape(net.config))
    if form.channels_last:
        unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if form.compile is not None:
        unet.forward = torch.compile(unet.forward, dynamic=False, options=dict(form.compile))  # type: ignore[method-assign]
    diffusion = package.GaussianDiffusion(
        unet, image_size=net.config.image_size, objective="pred_noise", beta_schedule="linear"
    ).to(device)
    optimizer: Any = torch.optim.Adam(diffusion.parameters(), lr=SCRIPT["learning_rate"], betas=(0.9, 0.99))
    ema = ema_class(
        diffusion,
        ema_model=None if form.compile is None else _twin(package, net, diffusion),
        beta=SCRIPT["ema_max_decay"],
        update_every=1,
        update_after_step=0,
    ).to(device)
    model, optimizer = accelerator.prepare(diffusion, optimizer)
    batches = shuffled(images, batch, device)

    def step() -> None:
        x = next(batches).float() / 255.0
        x = x if form.channels_last else x.contiguous()
        with accelerator.autocast():
            loss = model(x)
        loss.item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), SCRIPT["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        with accelerator.autocast():
            prediction: Tensor = unet(x_t.float(), t)
        return prediction

    return Candidate(
        f"lucidrains {form.words}",
        ours=False,
        dtype=form.dtype,
        memory_format="channels_last" if form.channels_last else "contiguous",
        batch=batch,
        step=step,
        predict=predict,
        parameters=list(unet.parameters()),
        averages=list(ema.ema_model.model.parameters()),
        optimizer=optimizer,
        gflop_per_image=gflop,
        compiled=form.compile is not None,
        training=model.train,
    )


def _twin(package: ModuleType, net: Net, diffusion: nn.Module) -> nn.Module:
    """A copy whose forward is not the compiled one, which cannot be deep-copied."""
    twin: nn.Module = package.GaussianDiffusion(
        lucidrains_net(net), image_size=net.config.image_size, objective="pred_noise", beta_schedule="linear"
    )
    twin.load_state_dict(diffusion.state_dict())
    return twin


# The truth.


@dataclass(frozen=True)
class Verdict:
    """How far a candidate is from the truth: errors over the largest entry of each tensor, the worst of all."""

    correct: bool
    error: float
    torch_error: float
    """Of the plain net in the same precision, at the same tensor."""
    worst: float
    """Error over what is allowed, at most 1 if correct."""


class Truth:
    """Prediction and gradients of a net in float64 on a few inputs, and the errors of plain PyTorch in a precision.

    A tensor may be off by 2 (base + floor) of its largest entry, gradients of parameters by twice that, where base is
    the error of the plain net (autocast for bf16) and floor the precision's. Gradients smaller than a thousandth of the
    largest (such as of the keys' biases, which are zero but for rounding) count as that large.
    """

    def __init__(
        self, net: nn.Module, shape: Sequence[int], device: str, dtypes: Sequence[torch.dtype], batch: int = 2
    ) -> None:
        self.net, self.device = net.to(device), device
        generator = torch.Generator().manual_seed(SEED)
        # Rounded, so that every precision sees the same numbers.
        self.x_t = torch.randn(batch, *shape, generator=generator).bfloat16().float().to(device)
        self.t = torch.tensor([999, 371, 20, 0])[:batch].to(device)
        self.upstream = torch.randn(batch, *shape, generator=generator).bfloat16().float().to(device)
        self.ordinals = torch.arange(batch, device=device)
        # Ours has masks that the true net can be given; lucidrains' net has none.
        self._true = {masked: self._exact(masked) for masked in (False, *([True] if isinstance(net, TrueNet) else []))}
        self._bases = {(dtype, dropping): self._base(dtype, dropping) for dtype in dtypes for dropping in (False, True)}

    def check(self, candidate: Candidate) -> Verdict:
        """Hold a candidate against the truth at its own batch, of which the few inputs are repeated.

        With dropout: where the masks can be set, with the same masks; else without dropout, or (compiled for training)
        against the error that dropout makes in the plain net.
        """
        dropping = candidate.masks is not None or candidate.compiled
        repeats = candidate.batch // len(self.x_t)
        layout = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[candidate.memory_format]

        def repeated(x: Tensor) -> Tensor:
            return torch.cat([x] * repeats)

        candidate.training(dropping)
        masks = candidate.masks or (lambda _: nullcontext())
        with masks(repeated(self.ordinals)):
            x_t = repeated(self.x_t).to(candidate.dtype).contiguous(memory_format=layout)
            tensors = self._run(
                candidate.predict, candidate.parameters, x_t, repeated(self.t), repeated(self.upstream) / repeats
            )
        candidate.training(True)
        tensors[0] = tensors[0][: len(self.x_t)]
        errors = self._errors(tensors, candidate.masks is not None)
        base = self._bases[candidate.dtype, dropping and candidate.masks is None]
        floor = FLOORS[candidate.dtype]
        ratios = [e / ((4 if i else 2) * (b + floor)) for i, (e, b) in enumerate(zip(errors, base, strict=True))]
        i = max(range(len(ratios)), key=lambda i: (math.isnan(ratios[i]), ratios[i]))
        return Verdict(ratios[i] <= 1, errors[i], base[i], ratios[i])

    def _run(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        x_t: Tensor,
        t: Tensor,
        upstream: Tensor,
    ) -> list[Tensor]:
        prediction = predict(x_t, t)
        grads = torch.autograd.grad(prediction, list(parameters), upstream.to(prediction.dtype))
        return [prediction.detach().double(), *(grad.double() for grad in grads)]

    def _exact(self, masked: bool) -> list[Tensor]:
        exact = self.net.double().train(masked)
        with same_masks(exact, self.ordinals) if masked else nullcontext():
            tensors = self._run(exact, list(exact.parameters()), self.x_t.double(), self.t.double(), self.upstream)
        self.net.float()
        return tensors

    def _errors(self, tensors: Sequence[Tensor], masked: bool) -> list[float]:
        truth = self._true[masked]
        largest = torch.stack([x.abs().max() for x in truth])
        largest[1:] = largest[1:].clamp(min=1e-3 * float(largest[1:].max()))
        off = torch.stack([(a - b).abs().max() for a, b in zip(tensors, truth, strict=True)])
        errors: list[float] = (off / largest).tolist()
        return errors

    def _base(self, dtype: torch.dtype, dropping: bool) -> list[float]:
        """Errors of the plain net in a precision, with or without dropout of its own."""
        plain = self.net.train(dropping)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(self.device, dtype) if dtype != torch.float32 else nullcontext():
                prediction: Tensor = plain(x_t, t)
            return prediction

        return self._errors(self._run(predict, list(plain.parameters()), self.x_t, self.t, self.upstream), False)


class TrueNet(nn.Module):
    """A net of diffusers, or ours, called as net(x_t, t) and returning a tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        prediction: Tensor = self.net(x_t, t, return_dict=False)[0]
        return prediction


def true_net(config: UNetConfig, weights: Mapping[str, Tensor]) -> tuple[TrueNet, str]:
    """The net that is the truth, called as net(x_t, t), and its name: diffusers', or where it is missing ours.

    Ours in plain PyTorch is a weaker truth, but the tests hold it against diffusers' in float64.
    """
    try:
        return TrueNet(diffusers_net(config, weights)), "diffusers float64"
    except Missing:
        ours = our_net(config, weights)
        ours.shared.impl = "reference"
        return TrueNet(ours), "our own float64"


@contextmanager
def same_masks(net: nn.Module, ordinals: Tensor) -> Iterator[None]:
    """Inside, dropout of the true net uses the masks that ours has for the ordinals."""
    inner = net.net
    if isinstance(inner, UNet):
        with inner.noise_address(SEED, ordinals):
            yield
        return
    assert isinstance(inner, nn.Module)
    config = UNetConfig.from_diffusers(dict(inner.config))  # type: ignore[arg-type]
    with torch.device("meta"):
        layers = {name: m.layer for name, m in UNet(config).named_modules() if isinstance(m, Dropout)}
    modules = {name: inner.get_submodule(name) for name in layers}
    for name, module in modules.items():
        drop = partial(dropout_reference, p=config.dropout, layer=layers[name], seed=SEED)
        module.forward = lambda x, drop=drop: drop(x, ordinals=ordinals)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def with_dropout(net: Net, dropout: float) -> Net:
    """The same net with another dropout."""
    return replace(net, config=replace(net.config, dropout=dropout))
