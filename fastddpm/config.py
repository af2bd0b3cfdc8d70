"""The one config tree: typed dataclasses -> command line -> RUN/config.json -> read back by sample and resume.

A preset is a whole Config; adding an experiment is adding a line to PRESETS.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from .augment import AUGMENT_PARAMETERS
from .data import DataConfig
from .diffusion import ProcessConfig
from .errors import ConfigError
from .metrics import FEATURE_METRICS
from .samplers import SAMPLERS
from .unet import UNetConfig

T = TypeVar("T")

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, learning-rate schedule and clipping; the learning rate is a function of the step alone."""

    name: Literal["adam", "adamw"] = "adam"
    """Adam (Ho's recipe) or AdamW (decoupled weight decay)."""
    lr: float = 2e-4
    """Peak learning rate, per optimiser step."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moment."""
    adam_eps: float = 1e-8
    """Constant added to the root of the second moment."""
    weight_decay: float = 0.0
    """Weight decay coefficient."""
    warmup_steps: int = 5000
    """Optimiser steps over which the learning rate rises linearly to its peak."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up, reaching 0 at the horizon unless constant."""
    horizon: int | None = None
    """Optimiser step at which the decay ends; unset: the --steps of the first start, kept when a run is prolonged."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None switches clipping off."""


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of the weights; what is sampled and exported."""

    decay: float = 0.9999
    """Decay per optimiser step."""
    warmup: bool = True
    """Use min(decay, (1 + n) / (10 + n)) at step n, or the first thousands of steps average the initial noise."""
    widths: tuple[float, ...] = ()
    (
        "Relative widths of power-function averages kept beside it, e.g. 0.05 0.1: from their snapshots `fastddpm ema` "
        "makes the average of any width afterwards (Karras et al. 2024, section 3). None by default."
    )
    snapshot_every: int = 0
    """Optimiser steps between those snapshots, beside one at the end; 0: as save_every."""


@dataclass(frozen=True)
class GridConfig:
    """The grid of samples drawn during training (RUN/samples)."""

    num: int = 64
    """Images in the grid."""
    sampler: str = "ddpm"
    """Sampler of the grid, by its name in `sample --sampler`."""
    steps: int | None = None
    """Network evaluations per image; unset: all timesteps."""
    eta: float = 0.0
    """DDIM's share of fresh noise, 0 to 1 (other samplers ignore it)."""
    guidance: float = 1.0
    """Classifier-free guidance of a conditional run with label dropout; 1 is none."""
    batch_size: int = 64
    """Images per network call on each process."""


@dataclass(frozen=True)
class EvalConfig:
    """Quality of the samples, measured during training (RUN/quality.jsonl); the best checkpoint is kept."""

    every: int = 0
    """Optimiser steps between measurements, each of which saves a checkpoint too; 0: none."""
    metrics: tuple[str, ...] = ("fid",)
    """Of fid, kid, is, precision, recall; the first one says which checkpoint is the best."""
    num_samples: int = 2000
    """Samples of the averaged weights."""
    sampler: str = "ddim"
    """Sampler that draws them, by its name in `sample --sampler`."""
    steps: int | None = None
    """Its steps; unset: 50, or all timesteps where those are fewer."""
    guidance: float = 1.0
    """Classifier-free guidance of a conditional run with label dropout; 1 is none."""
    batch_size: int = 64
    """Images per network call on each process."""
    features: str = "classifier"
    (
        "Where features come from: classifier (a small one, trained on the data's own labels and kept), inception "
        "(torch-fidelity's), torchvision:NAME or timm:NAME."
    )
    features_weights: str | None = None
    """File of the extractor's weights; unset: where its library keeps them."""
    features_epochs: int = 24
    """classifier: epochs of its training."""


@dataclass(frozen=True)
class Config:
    """Everything a run is a function of, and how often it reports."""

    preset: str = "cifar10"
    (
        "Preset that supplies the defaults shown here, read before any other option: digits, cifar10, images64 "
        "(your own images at 64x64) or images256."
    )
    run: str = ""
    """Run folder; unset: runs/PRESET. Started again with the same command, a run goes on where it was."""
    seed: int = 0
    """Seed of weights, order, timesteps, flips, noise and dropout."""
    steps: int = 800_000
    """Optimiser steps of the whole run."""
    batch_size: int = 128
    """Images per optimiser step over all processes; must divide by processes x accumulation."""
    accumulation: int = 1
    """Micro-batches per optimiser step on each process; more of them need less memory."""
    precision: Precision = "auto"
    (
        "Arithmetic of the network, whose weights and statistics are fp32 always: fp32, bf16, fp16 with a loss scale "
        "(GPU only), or auto: bf16 where the first start measures that the device is faster in it, kept from then on."
    )
    compile: bool = False
    """Compile the network's blocks: torch.compile on a GPU, the machine's C++ compiler on a CPU. Takes seconds."""
    graph: bool = False
    """Replay the whole step as one CUDA graph, for small batches; one process, fp32 or bf16."""
    log_every: int = 100
    """Optimiser steps between lines of RUN/log.jsonl."""
    save_every: int = 5000
    """Optimiser steps between checkpoints."""
    sample_every: int = 5000
    """Optimiser steps between sample grids; 0 draws none."""
    keep: int = 3
    """Checkpoints kept; older ones are deleted after a newer one is committed."""
    save_async: bool = False
    """Write checkpoints while training goes on, from a copy in the host's memory."""
    sharding: Literal["none", "fsdp2"] = "none"
    """fsdp2: each process holds its share of weights, gradients, moments and averages, for nets that do not fit."""
    hang_timeout: float = 600.0
    """Seconds without progress after which several processes end, naming the rank that holds them up; 0 waits on."""
    conditional: bool = False
    """Train on the labels of the data: the network is told the class, and `sample --class` asks for one."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate to log to beside log.jsonl, e.g. tensorboard wandb; each must be installed."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where images come from."""
    model: UNetConfig = field(default_factory=UNetConfig)
    """The U-Net, under diffusers' names."""
    diffusion: ProcessConfig = field(default_factory=ProcessConfig)
    """The forward process and what the network predicts."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """Average of the weights."""
    grid: GridConfig = field(default_factory=GridConfig)
    """Sample grids during training."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Quality during training."""

    def check(self) -> None:
        """Check what can be checked without data or devices.

        Raises:
            ConfigError: naming the field, its value and what is valid.
        """
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.graph and self.accumulation > 1:
            raise ConfigError(f"graph is set and accumulation is {self.accumulation}: a graph holds one micro-batch")
        if self.sample_every < 0:
            raise ConfigError(f"sample_every is {self.sample_every}: give 0 for no grids, or a number of steps")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}: it must be in 0 .. 2^63 - 1")
        if self.precision not in typing.get_args(Precision):
            raise ConfigError(f"precision is {self.precision!r}: valid are {', '.join(typing.get_args(Precision))}")
        if self.sharding not in ("none", "fsdp2"):
            raise ConfigError(f"sharding is {self.sharding!r}: valid are none, fsdp2")
        if not self.data.source:
            raise ConfigError(
                "data.source is not set: give --data.source hub:ID, parquet:DIR, folder:DIR, digits or anything "
                "load_dataset reads"
            )
        if self.grid.sampler not in (drawing := [name for name, solver in SAMPLERS.items() if solver.to_image]):
            raise ConfigError(f"grid.sampler is {self.grid.sampler!r}: valid are {', '.join(drawing)}")
        if self.grid.num < 1 or self.grid.batch_size < 1:
            raise ConfigError(
                f"grid.num is {self.grid.num} and grid.batch_size {self.grid.batch_size}: both at least 1"
            )
        if (
            self.sample_every
            and self.grid.steps is not None
            and not 1 <= self.grid.steps <= self.diffusion.num_timesteps
        ):
            raise ConfigError(
                f"grid.steps is {self.grid.steps}: it must be in 1 .. {self.diffusion.num_timesteps} "
                "(diffusion.num_timesteps)"
            )
        if not 0 <= self.grid.eta <= 1:
            raise ConfigError(f"grid.eta is {self.grid.eta}: it must be in 0 .. 1")
        self._check_eval()
        self.diffusion.check()
        self.check_numbers()
        if self.model.in_channels != self.model.out_channels:
            raise ConfigError(
                f"model.in_channels is {self.model.in_channels} and model.out_channels {self.model.out_channels}: "
                "the network predicts one value per input value, so they must be equal"
            )
        self._check_conditions()

    def _check_eval(self) -> None:
        if self.eval.every < 0:
            raise ConfigError(f"eval.every is {self.eval.every}: give 0 for no measurements, or a number of steps")
        for name in self.eval.metrics or ("",):
            if name not in FEATURE_METRICS:
                raise ConfigError(f"eval.metrics has {name!r}: valid are {', '.join(FEATURE_METRICS)}")
        if not SAMPLERS.get(self.eval.sampler, SAMPLERS["ddim_inverse"]).to_image:
            drawing = [name for name, solver in SAMPLERS.items() if solver.to_image]
            raise ConfigError(f"eval.sampler is {self.eval.sampler!r}: valid are {', '.join(drawing)}")
        for name in ("num_samples", "batch_size", "features_epochs", "steps"):
            if (value := getattr(self.eval, name)) is not None and value < 1:
                raise ConfigError(f"eval.{name} is {value}: it must be at least 1")
        if (self.eval.steps or 1) > self.diffusion.num_timesteps:
            raise ConfigError(f"eval.steps is {self.eval.steps}: it must be in 1 .. {self.diffusion.num_timesteps}")

    def _check_conditions(self) -> None:
        if self.model.class_embed_type is not None:
            raise ConfigError("model.class_embed_type must be unset: the trainer's classes are numbers (--conditional)")
        if self.model.num_class_embeds is not None and not self.conditional:
            raise ConfigError(
                f"model.num_class_embeds is {self.model.num_class_embeds} and conditional is not set: add --conditional"
            )
        if self.diffusion.label_dropout and not self.conditional:
            raise ConfigError(
                f"diffusion.label_dropout is {self.diffusion.label_dropout} and conditional is not set: an "
                "unconditional run has no labels to drop"
            )
        for part, guidance in (("grid", self.grid.guidance), ("eval", self.eval.guidance)):
            if guidance != 1 and not self.diffusion.label_dropout:
                raise ConfigError(
                    f"{part}.guidance is {guidance}: guidance needs hidden classes (--conditional and "
                    "--diffusion.label-dropout 0.1)"
                )
        if not 0 <= self.data.augment <= 1:
            raise ConfigError(f"data.augment is {self.data.augment}: it must be in 0 .. 1")
        if self.model.augment_channels:
            raise ConfigError("model.augment_channels must be unset: --data.augment sets it")

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.model.in_channels

    def network(self) -> UNetConfig:
        """The network that is trained: `model`, whose channels are those of the images, and what the process adds.

        Learned variances are as many channels again in its output, an estimate of its own in its input
        (self-conditioning), hidden labels a class of their own behind the last one, augmentations their parameters.

        Raises:
            ConfigError: conditional, and the number of classes is not set (the trainer takes that of the data).
        """
        model, diffusion = self.model, self.diffusion
        changes: dict[str, Any] = {}
        if diffusion.variance == "learned_range":
            changes["out_channels"] = 2 * model.out_channels
        if diffusion.self_conditioning:
            changes["in_channels"] = 2 * model.in_channels
        if self.conditional:
            if model.num_class_embeds is None:
                raise ConfigError("conditional is set and model.num_class_embeds is not: give the number of classes")
            changes["num_class_embeds"] = model.num_class_embeds + (diffusion.label_dropout > 0)
        if self.data.augment:
            changes["augment_channels"] = AUGMENT_PARAMETERS
        return dataclasses.replace(model, **changes)

    def check_numbers(self) -> None:
        """Check the ranges of optimiser and EMA fields.

        Raises:
            ConfigError: naming the field, its value and its range.
        """
        for name, value in flatten(to_dict(self)).items():
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise ConfigError(f"{name} is {value}: it must be a finite number")
        optim = self.optim
        checks = (
            ("optim.lr", optim.lr, optim.lr > 0, "above 0"),
            ("optim.betas", optim.betas, all(0 <= b < 1 for b in optim.betas), "two numbers in [0, 1)"),
            ("optim.adam_eps", optim.adam_eps, optim.adam_eps >= 0, "at least 0"),
            ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "at least 0"),
            ("optim.warmup_steps", optim.warmup_steps, optim.warmup_steps >= 0, "at least 0"),
            ("optim.horizon", optim.horizon, optim.horizon is None or optim.horizon >= 1, "at least 1, or None"),
            (
                "optim.clip_norm",
                optim.clip_norm,
                optim.clip_norm is None or optim.clip_norm > 0,
                "above 0, or None for no clipping",
            ),
            ("ema.decay", self.ema.decay, 0 <= self.ema.decay < 1, "in [0, 1)"),
            ("ema.snapshot_every", self.ema.snapshot_every, self.ema.snapshot_every >= 0, "at least 0"),
            ("grid.guidance", self.grid.guidance, self.grid.guidance >= 0, "at least 0; 1 is none"),
            ("data.workers", self.data.workers, self.data.workers >= 0, "at least 0"),
            ("data.cache_gb", self.data.cache_gb, self.data.cache_gb >= 0, "at least 0"),
            ("hang_timeout", self.hang_timeout, self.hang_timeout >= 0, "at least 0"),
        )
        for name, value, ok, valid in checks:
            if not ok:
                raise ConfigError(f"{name} is {value}: it must be {valid}")

        for width in self.ema.widths:
            if not 0 < width <= 12**-0.5:
                raise ConfigError(f"ema.widths has {width:g}: each must be above 0 and at most 0.2886 (12^-1/2)")

    def micro_batch(self, world: int) -> int:
        """Images per forward pass on each of `world` processes.

        Raises:
            ConfigError: if the batch does not divide by processes x accumulation.
        """
        if self.batch_size % (world * self.accumulation):
            raise ConfigError(
                f"batch_size {self.batch_size} does not divide by {world} processes x {self.accumulation} accumulation"
            )
        return self.batch_size // (world * self.accumulation)


# Fields that say how long a run is, how often it reports and with how many hands: they may differ on resume,
# because no loss depends on them. Everything else makes another run.
RUNTIME_FIELDS = frozenset(
    (
        *("preset", "run", "steps", "log_every", "save_every", "sample_every", "keep", "trackers", "data.workers"),
        *("data.cache_gb", "data.resident", "model.checkpoint_activations", "ema.snapshot_every"),
        *("accumulation", "save_async", "sharding", "hang_timeout"),
        *(f"grid.{field.name}" for field in dataclasses.fields(GridConfig)),
        *(f"eval.{field.name}" for field in dataclasses.fields(EvalConfig)),
    )
)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"flip": True}} -> {"data.flip": True}; values that are not dicts are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_dict(config: Config) -> dict[str, Any]:
    """The tree as plain JSON values (tuples become lists)."""
    result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return result


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def from_dict(kind: type[T], tree: dict[str, Any], where: str = "") -> T:
    """Rebuild a config dataclass from the plain values of to_dict.

    Raises:
        ConfigError: if a field is not one of the dataclass (names the valid ones).
    """
    hints = typing.get_type_hints(kind)
    if not isinstance(tree, dict):
        raise ConfigError(f"{where.rstrip('.') or 'the config'} is {tree!r}: it must be a table of {', '.join(hints)}")
    unknown = [key for key in tree if key not in hints]
    if unknown:
        raise ConfigError(f"unknown field {where}{unknown[0]}: valid are {', '.join(hints)}")
    values = {}
    for key, value in tree.items():
        hint = hints[key]
        nested = isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and dataclasses.is_dataclass(hint)
        values[key] = from_dict(hint, value, f"{where}{key}.") if nested else _tuples(value)
    return kind(**values)


def differences(stored: Config, wanted: Config) -> list[str]:
    """Fields that make `wanted` another run than `stored`, as "name: stored -> wanted" lines."""
    a, b = flatten(to_dict(stored)), flatten(to_dict(wanted))
    return [
        f"{name}: {a.get(name)!r} -> {b.get(name)!r}"
        for name in sorted(a.keys() | b.keys())
        if name not in RUNTIME_FIELDS and a.get(name) != b.get(name)
    ]


def read_facts(run: Path) -> dict[str, Any] | None:
    """RUN/config.json: "config", "versions" and "num_images"; None if there is none yet.

    Raises:
        ConfigError: if it is not one of ours.
    """
    path = run / "config.json"
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        raise ConfigError(f"{path} is not the config of a fastddpm run; choose another --run")
    return facts


def read_config(run: Path) -> Config | None:
    """The config stored in a run folder, or None if there is none yet.

    Raises:
        ConfigError: if RUN/config.json is not one of ours, or has fields this version does not know.
    """
    facts = read_facts(run)
    try:
        return None if facts is None else from_dict(Config, facts["config"])
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{run / 'config.json'}: {error}") from error


PRESETS: dict[str, Config] = {
    # Handwritten digits of scikit-learn on a CPU, in about two minutes.
    "digits": Config(
        preset="digits",
        precision="fp32",  # too small to gain by another
        steps=2200,
        batch_size=64,
        log_every=50,
        save_every=500,
        sample_every=500,
        data=DataConfig(source="digits", flip=False, workers=0),
        model=UNetConfig(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),  # attention in the middle block only
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            dropout=0.0,
        ),
        diffusion=ProcessConfig(schedule="cosine", variance="fixed_small"),
        optim=OptimConfig(name="adamw", lr=2e-3, warmup_steps=50, decay="cosine"),
        ema=EMAConfig(decay=0.995),
        grid=GridConfig(num=36, sampler="ddim", steps=25),
    ),
    # Ho et al. 2020, CIFAR-10: FID 3.17 after 800k steps.
    "cifar10": Config(
        preset="cifar10",
        data=DataConfig(source="hub:uoft-cs/cifar10"),
        model=UNetConfig(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            dropout=0.1,
        ),
        grid=GridConfig(sampler="ddim", steps=100),
    ),
    # Your own images at 64x64: Ho's net one level deeper, attention at 16x16.
    "images64": Config(
        preset="images64",
        steps=200_000,
        data=DataConfig(fit="resize_crop"),
        model=UNetConfig(
            sample_size=64,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            dropout=0.0,
        ),
        diffusion=ProcessConfig(schedule="cosine", variance="fixed_small"),
        grid=GridConfig(sampler="ddim", steps=100),
    ),
    # Ho et al. 2020, 256x256 sets (CelebA-HQ, LSUN).
    "images256": Config(
        preset="images256",
        steps=500_000,
        batch_size=64,
        data=DataConfig(fit="resize_crop"),
        model=UNetConfig(
            sample_size=256,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            layers_per_block=2,
            down_block_types=(*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
            dropout=0.0,
        ),
        diffusion=ProcessConfig(variance="fixed_small"),
        optim=OptimConfig(lr=2e-5),
        grid=GridConfig(num=16, sampler="ddim", steps=100, batch_size=8),
    ),
}


def preset(name: str, **changes: Any) -> Config:
    """A preset by name with some fields changed; a dict changes fields of a nested part.

    >>> preset("digits", steps=100, data={"workers": 2}).data.source
    'digits'

    Raises:
        ConfigError: if the preset or a field does not exist (names the valid ones).
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: valid are {', '.join(PRESETS)}")
    return replace(PRESETS[name], changes)


def replace(config: T, changes: dict[str, Any], where: str = "") -> T:
    """A copy of a config dataclass with some fields changed; nested dicts change nested fields.

    Raises:
        ConfigError: if a field does not exist (names the valid ones).
    """
    names = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    values = {}
    for key, value in changes.items():
        if key not in names:
            raise ConfigError(f"unknown field {where}{key}: valid are {', '.join(names)}")
        old = getattr(config, key)
        nested = dataclasses.is_dataclass(old) and isinstance(value, dict)
        values[key] = replace(old, value, f"{where}{key}.") if nested else value
    return dataclasses.replace(config, **values)  # type: ignore[type-var]
