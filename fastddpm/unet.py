"""The U-Net eps_theta(x_t, t): same module names, configuration keys and results as diffusers' UNet2DModel.

Covers what DDPM (Ho et al. 2020, appendix B), improved DDPM (Nichol and Dhariwal 2021) and ADM-like nets (Dhariwal and
Nichol 2021) use. Weights go both ways by plain load_state_dict.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import blocks
from .errors import ConfigError

# Block type -> (attention after each residual block, resampling; None: as downsample_type or upsample_type says).
DOWN_BLOCKS: dict[str, tuple[bool, str | None]] = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
UP_BLOCKS: dict[str, tuple[bool, str | None]] = {
    "UpBlock2D": (False, "conv"),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}
# The one value of each key below, or the few, that this U-Net computes.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": blocks.ACTIVATIONS,
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}
# Keys that say how a net is trained, not what it is: not UNet2DModel's.
OURS_ALONE = ("checkpoint_activations", "augment_channels")
COUNTS = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
OPTIONAL_COUNTS = (
    "time_embedding_dim",
    "attention_head_dim",
    "attn_norm_num_groups",
    "num_class_embeds",
    "num_train_timesteps",
)


@dataclass(frozen=True)
class UNetConfig:
    """The network, under the keys of diffusers' UNet2DModel. The defaults are Ho's CIFAR-10 net (35.7M parameters)."""

    sample_size: int | tuple[int, int] = 32
    """Height and width of the images in pixels, one number for square ones; multiples of 2^(levels - 1)."""
    in_channels: int = 3
    """Channels of the images: 1 grayscale, 3 RGB."""
    out_channels: int = 3
    """Channels of the prediction."""
    center_input_sample: bool = False
    """Map the input x to 2 x - 1 first (for inputs in [0, 1])."""
    time_embedding_type: Literal["positional"] = "positional"
    """Embedding of the timestep: positional = sinusoids."""
    time_embedding_dim: int | None = None
    """Width of the time embedding; None: 4 x the first of block_out_channels."""
    freq_shift: int = 1
    """The slowest of the K sinusoids has the exponent -log(10000) (K - 1)/(K - freq_shift). Ho: 1, ADM: 0."""
    flip_sin_to_cos: bool = False
    """Cosines before sines in the sinusoidal embedding (ADM) rather than after (Ho)."""
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    """One per level, highest resolution first: DownBlock2D, AttnDownBlock2D or ResnetDownsampleBlock2D."""
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    """Block at the lowest resolution; None leaves it out."""
    up_block_types: tuple[str, ...] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    """One per level, lowest resolution first: UpBlock2D, AttnUpBlock2D or ResnetUpsampleBlock2D."""
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    """Channels of each level, highest resolution first; multiples of norm_num_groups."""
    layers_per_block: int = 2
    """Residual blocks per level on the way down (one more on the way up)."""
    mid_block_scale_factor: float = 1.0
    """The sums of the middle block's residual connections are divided by this."""
    downsample_padding: Literal[0, 1] = 0
    """Padding of the stride-2 convolutions: 0 = one pixel right and bottom only (Ho), 1 = one pixel on all sides."""
    downsample_type: Literal["conv", "resnet"] = "conv"
    """Downsampling of the levels with attention: a convolution or a residual block."""
    upsample_type: Literal["conv", "resnet"] = "conv"
    """Upsampling of the levels with attention: a convolution or a residual block."""
    dropout: float = 0.0
    """Probability that an activation of a residual block is dropped in training (Ho's CIFAR-10 net: 0.1)."""
    act_fn: Literal["silu", "swish"] = "silu"
    """Activation function (both names mean x sigmoid(x))."""
    attention_head_dim: int | None = None
    """Channels per attention head, channels // attention_head_dim heads; None: one head."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm."""
    attn_norm_num_groups: int | None = None
    """Groups of the norm before the middle attention; None: norm_num_groups, or no norm at all with scale_shift."""
    norm_eps: float = 1e-6
    """Constant added to the variance in every GroupNorm."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """The time embedding is added (default) or scales and shifts the second norm of a residual block (ADM)."""
    add_attention: bool = True
    """Attention in the middle block."""
    class_embed_type: Literal["timestep", "identity"] | None = None
    """What class_labels are: None = class numbers (if num_class_embeds is set), timestep, or finished embeddings."""
    num_class_embeds: int | None = None
    """Number of classes of a class-conditional net; None: unconditional."""
    num_train_timesteps: int | None = None
    """Kept for diffusers, where it sizes the learned time embedding, which is not supported here."""
    checkpoint_activations: bool = False
    """Make the activations of each residual block and attention again in the backward pass: less memory, more time."""
    augment_channels: int = 0
    """Parameters of an augmentation that the network is told in training; set by --data.augment."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), list):  # JSON has no tuples
                object.__setattr__(self, field.name, tuple(value))
        self.check()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.sample_size, self.sample_size) if isinstance(self.sample_size, int) else self.sample_size

    @property
    def size_multiple(self) -> int:
        """Height and width have to be multiples of this: every level but the last halves them."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def time_channels(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def conditional(self) -> bool:
        """Whether forward wants class_labels."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    def check(self) -> None:
        """Raises ConfigError naming the key, its value and what is valid; called for every config that is made."""
        for key, valid in SUPPORTED.items():
            _check_choice(key, getattr(self, key), valid)
        if not self.block_out_channels or not isinstance(self.block_out_channels, tuple):
            raise ConfigError(f"block_out_channels is {self.block_out_channels!r}: give the channels of each level")
        for key, types, table in (
            ("down_block_types", self.down_block_types, DOWN_BLOCKS),
            ("up_block_types", self.up_block_types, UP_BLOCKS),
        ):
            for block_type in types:
                _check_choice(key, block_type, tuple(table))
            if len(types) != len(self.block_out_channels):
                raise ConfigError(
                    f"{key} has {len(types)} entries and block_out_channels {len(self.block_out_channels)}: "
                    "give one per level"
                )
        for key in COUNTS:
            _check_count(key, getattr(self, key))
        for key in OPTIONAL_COUNTS:
            if getattr(self, key) is not None:
                _check_count(key, getattr(self, key))
        if not isinstance(self.augment_channels, int) or self.augment_channels < 0:
            raise ConfigError(f"augment_channels is {self.augment_channels!r}: give a whole number, at least 0")
        self._check_channels()
        if not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is {self.dropout!r}: give a probability, at least 0 and less than 1")
        for key in ("norm_eps", "mid_block_scale_factor"):
            value = getattr(self, key)
            if not isinstance(value, int | float) or not value > 0.0:
                raise ConfigError(f"{key} is {value!r}: give a positive number")
        self.check_size(self.sample_size)

    def check_size(self, size: int | tuple[int, int]) -> None:
        """Raises ConfigError if images of this size (a number, or height and width) cannot be halved often enough."""
        pair = (size, size) if isinstance(size, int) else size
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ConfigError(f"sample_size is {size!r}: give one number, or height and width")
        for length in pair:
            _check_count("sample_size", length)
        if any(length % self.size_multiple for length in pair):
            raise ConfigError(
                f"sample_size is {pair[0]}x{pair[1]}: a U-Net of {len(self.block_out_channels)} levels halves it "
                f"{len(self.block_out_channels) - 1} times, so height and width have to be multiples of "
                f"{self.size_multiple}"
            )

    def _check_channels(self) -> None:
        groups, head_dim = self.norm_num_groups, self.attention_head_dim
        for channels in self.block_out_channels:
            _check_count("block_out_channels", channels)
            if channels % groups:
                raise ConfigError(f"block_out_channels has {channels}: give multiples of norm_num_groups ({groups})")
        lowest = self.block_out_channels[-1]
        with_attention = [
            channels
            for types, level_channels, table in (
                (self.down_block_types, self.block_out_channels, DOWN_BLOCKS),
                (self.up_block_types, self.block_out_channels[::-1], UP_BLOCKS),
            )
            for block_type, channels in zip(types, level_channels, strict=True)
            if table[block_type][0]
        ]
        if self.mid_block_type is not None and self.add_attention:
            with_attention.append(lowest)
            if self.attn_norm_num_groups is not None and lowest % self.attn_norm_num_groups:
                raise ConfigError(
                    f"attn_norm_num_groups is {self.attn_norm_num_groups}: give a divisor of the last of "
                    f"block_out_channels ({lowest})"
                )
        if head_dim is not None and with_attention and head_dim > min(with_attention):
            raise ConfigError(
                f"attention_head_dim is {head_dim}: a level with attention has only {min(with_attention)} channels"
            )
        if self.block_out_channels[0] // 2 <= max(self.freq_shift, 0):
            raise ConfigError(
                f"freq_shift is {self.freq_shift}: give less than half the first of block_out_channels "
                f"({self.block_out_channels[0]})"
            )

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """The config of a UNet2DModel, e.g. its config.json; missing keys get UNet2DModel's own defaults.

        Keys that start with _ are diffusers' bookkeeping and are skipped. ConfigError names a model of another class,
        a key that is not UNet2DModel's (unless it is None, which turns nothing on) and values not supported here.
        """
        class_name = config.get("_class_name", "UNet2DModel")
        _check_choice("_class_name", class_name, ("UNet2DModel",))
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        for key in given.keys() - DIFFUSERS_DEFAULTS.keys():
            if given.pop(key) is not None:
                raise ConfigError(f"{key} is not a key of UNet2DModel; valid: {', '.join(DIFFUSERS_DEFAULTS)}")
        return cls(**{**DIFFUSERS_DEFAULTS, **given})

    def to_diffusers(self) -> dict[str, Any]:
        """Every key of UNet2DModel's config.json, and _class_name."""
        keys = {key: value for key, value in dataclasses.asdict(self).items() if key not in OURS_ALONE}
        return {"_class_name": "UNet2DModel", **keys}


# UNet2DModel's own defaults, which a config.json leaves out; sample_size has none that can be run.
DIFFUSERS_DEFAULTS: dict[str, Any] = {
    **{f.name: f.default for f in dataclasses.fields(UNetConfig) if f.name not in OURS_ALONE},
    "sample_size": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "downsample_padding": 1,
    "attention_head_dim": 8,
    "norm_eps": 1e-5,
}


def _check_choice(key: str, value: Any, valid: tuple[Any, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{key} {value!r} is not supported; valid: {', '.join(map(str, valid))}")


def _check_count(key: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key} has {value!r}: give a whole number, at least 1")


class UNetOutput(NamedTuple):
    """What forward returns; a tuple, so that wrappers that walk outputs (DDP, accelerate) need not know it."""

    sample: Tensor
    """[N, out_channels, H, W]: the prediction."""


class UNet(nn.Module):
    """eps_theta(x_t, t), with Ho's initialisation.

    The weights are drawn in fp32 on the CPU from a generator seeded with `seed`: the same numbers on every device and
    whatever else has drawn random numbers, whose generators stay untouched. They are made on torch's default device
    (on "meta" they stay without values) and in its default dtype, and in channels_last memory order, as are the
    activations wherever the operators allow it.
    """

    def __init__(self, config: UNetConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.shared = blocks.Shared()
        self.shared.recompute = config.checkpoint_activations
        device = torch.get_default_device()
        with torch.device("meta"):  # so that no module draws initial values of its own
            self._build()
        # In the order of modules(), which is the order of the names in the state dict.
        for layer, dropout in enumerate(module for module in self.modules() if isinstance(module, blocks.Dropout)):
            dropout.layer = layer
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.weight.shape[2:] == (1, 1):  # matrices, as their gradients are
                module.weight.data = module.weight.data.flatten(1)[:, :, None, None]
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters(seed)

    def _build(self) -> None:
        config = self.config
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        resnet = partial(
            blocks.ResnetBlock,
            embedding_channels=config.time_channels,
            groups=config.norm_num_groups,
            norm_eps=config.norm_eps,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
            dropout=config.dropout,
            shared=self.shared,
        )

        def attention(
            width: int, groups: int | None = config.norm_num_groups, output_scale: float = 1.0
        ) -> blocks.Attention:
            return blocks.Attention(
                width,
                head_channels=config.attention_head_dim or width,
                groups=groups,
                norm_eps=config.norm_eps,
                shared=self.shared,
                output_scale=output_scale,
            )

        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = blocks.TimestepEmbedding(channels[0], config.time_channels, self.shared)
        self.class_embedding: nn.Module | None = None
        if config.class_embed_type == "timestep":
            self.class_embedding = blocks.TimestepEmbedding(channels[0], config.time_channels, self.shared)
        elif config.class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, config.time_channels)
        # Added to the sinusoid, before the two layers with an activation in between: what an augmentation changes in
        # the net depends on t. No bias: without an augmentation it adds exactly nothing, and may be left out.
        self.augment_embedding: nn.Linear | None = None
        if config.augment_channels:
            self.augment_embedding = nn.Linear(config.augment_channels, channels[0], bias=False)

        self.down_blocks = nn.ModuleList()
        for level, block_type in enumerate(config.down_block_types):
            has_attention, resampling = DOWN_BLOCKS[block_type]
            width_in, width = channels[max(level - 1, 0)], channels[level]
            downsampler: nn.Module | None = None
            if level < levels - 1:
                if (resampling or config.downsample_type) == "conv":
                    downsampler = blocks.Downsample(width, config.downsample_padding, self.shared)
                else:
                    downsampler = resnet(width, width, resample=blocks.average_pool)
            self.down_blocks.append(
                blocks.DownBlock(
                    [resnet(width if i else width_in, width) for i in range(config.layers_per_block)],
                    [attention(width) for _ in range(config.layers_per_block)] if has_attention else [],
                    downsampler,
                    self.shared,
                )
            )

        # Named before mid_block, as in diffusers' state dict.
        self.up_blocks = nn.ModuleList()
        width = channels[-1]
        for level, block_type in zip(reversed(range(levels)), config.up_block_types, strict=True):
            has_attention, resampling = UP_BLOCKS[block_type]
            width_below, width = width, channels[level]
            skip_widths = [width] * config.layers_per_block + [channels[max(level - 1, 0)]]
            upsampler: nn.Module | None = None
            if level > 0:
                if (resampling or config.upsample_type) == "conv":
                    upsampler = blocks.Upsample(width, self.shared)
                else:
                    upsampler = resnet(width, width, resample=blocks.upsample_nearest)
            self.up_blocks.append(
                blocks.UpBlock(
                    [resnet((width if i else width_below) + skip, width) for i, skip in enumerate(skip_widths)],
                    [attention(width) for _ in skip_widths] if has_attention else [],
                    upsampler,
                    self.shared,
                )
            )

        self.mid_block: blocks.MidBlock | None = None
        if config.mid_block_type is not None:
            scale = config.mid_block_scale_factor
            groups = config.attn_norm_num_groups
            if groups is None and config.resnet_time_scale_shift == "default":
                groups = config.norm_num_groups
            self.mid_block = blocks.MidBlock(
                [resnet(channels[-1], channels[-1], output_scale=scale) for _ in range(2)],
                attention(channels[-1], groups, scale) if config.add_attention else None,
                self.shared,
            )

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def reset_parameters(self, seed: int = 0) -> None:
        """Ho's initialisation, drawn from a generator seeded with `seed`; see blocks.initialise."""
        blocks.initialise(self, seed, last=self.conv_out, zero=self.augment_embedding)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the parameters (diffusers' pipelines ask for it)."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters (diffusers' pipelines ask for it)."""
        return self.conv_in.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of activations, products and the prediction; weights are cast to it, norms compute in fp32.

        The parameters' own dtype unless set. bfloat16 or float16 over float32 parameters is mixed precision: the
        parameters and their gradients stay float32, and no autocast is needed.
        """
        return self.shared.dtype or self.dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"compute_dtype is {dtype}: give a floating point type, or None for the parameters' own")
        self.shared.dtype = dtype

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Convolutions and linear layers in the dtype for good, and computation in it: for sampling.

        Norms stay as they are. The results are those of compute_dtype over the weights as they were.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)
        self.compute_dtype = dtype

    @contextmanager
    def noise_address(self, seed: int, ordinals: Tensor) -> Iterator[None]:
        """Inside, dropout masks are those of (seed, dropout layer, ordinal), wherever a sample lies in which batch.

        seed: int in [0, 2^63). ordinals: int64 [N] on the net's device, the samples' places in the training sequence.
        Layers are numbered in the order of modules(). Outside, masks come from torch's own generator (a loop of the
        user's own). Holds for wrappers of this net (DDP, accelerate, torch.compile) too; a deep copy of it is not
        affected.
        """
        with self.shared.address(seed, ordinals):
            yield

    @contextmanager
    def frozen(self, kept: dict[Any, Tensor] | None = None) -> Iterator[None]:
        """Inside, weights are taken not to change and get no gradients: cast and concatenated once, for sampling.

        kept: holds the casts from one such block to the next, and for whoever captures their addresses in a graph.
        """
        before, self.shared.frozen = self.shared.frozen, {} if kept is None else kept
        try:
            with torch.no_grad():
                yield
        finally:
            self.shared.frozen = before

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        augment: Tensor | None = None,
    ) -> UNetOutput | tuple[Tensor]:
        """sample [N, in_channels, H, W], timestep a number, [] or [N] -> sample [N, out_channels, H, W].

        class_labels: int64 [N] for num_class_embeds; numbers [N] for class_embed_type timestep; [N, time_channels] for
        identity; None for an unconditional net. augment: float [N, augment_channels], how each image was augmented;
        None, and zeros, say that it was not, with the very same result. Everything but timestep and integer labels gets
        a gradient. return_dict=False gives a plain tuple of one tensor. The result is of compute_dtype. ConfigError for
        sizes that cannot be halved often enough, ValueError for a timestep of another shape and for labels missing or
        not wanted, and for an augmentation that is of another shape or not wanted.
        """
        height, width = sample.shape[2:]
        if height % self.config.size_multiple or width % self.config.size_multiple:
            self.config.check_size((height, width))
        projected = iter(self._project(self._embed(sample, timestep, class_labels, augment)))
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        # Converted here, once: from then on the weights' memory order keeps channels_last.
        x = sample.to(self.compute_dtype).contiguous(memory_format=torch.channels_last)
        h = blocks.Sum(blocks.convolve(x, self.conv_in, self.shared))
        skips: tuple[Tensor, ...] = ()
        for block in self.down_blocks:
            h, states = block(h, projected)
            skips += states
        if self.mid_block is not None:
            last, h = self.mid_block(h, projected)
        else:
            last = h.tensor()
            h = blocks.Sum(last)
        skips += (last,)
        count = self.config.layers_per_block + 1
        for block in self.up_blocks:
            h = block(h, skips[-count:], projected)
            skips = skips[:-count]
        y, _ = blocks.norm_silu(h, self.conv_norm_out, self.shared)
        output = blocks.convolve(y, self.conv_out, self.shared)
        return UNetOutput(output) if return_dict else (output,)

    def _project(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """What each residual block gets of the embedding, in the order of their use."""
        stages = [*self.down_blocks, *([self.mid_block] if self.mid_block is not None else []), *self.up_blocks]
        resnets = [resnet for stage in stages for resnet in blocks.resnets_of(stage)]
        activated = nn.functional.silu(embedding)
        if self.shared.sharded:
            return (activated,) * len(resnets)  # each projects it itself: its weights are there only while it runs
        return blocks.project_embedding(activated, resnets, self.shared)

    def _embed(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        """[N, time_channels]: the embedding of the timestep and the augmentation, plus that of the class."""
        count, config = sample.shape[0], self.config
        if not isinstance(timestep, Tensor):
            timestep = torch.full((count,), timestep, device=sample.device)  # no copy from the host
        if timestep.numel() not in (1, count):
            raise ValueError(f"timestep has shape {tuple(timestep.shape)} for a batch of {count}: give one number or N")
        project = partial(
            blocks.sinusoid,
            channels=config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        t = timestep.to(sample.device).reshape(-1).expand(count)
        inputs = project(t).to(self.compute_dtype)
        if augment is not None:
            if self.augment_embedding is None or augment.shape != (count, config.augment_channels):
                raise ValueError(
                    f"augment has shape {tuple(augment.shape)}: the net takes "
                    f"{(count, config.augment_channels) if config.augment_channels else 'none'}"
                )
            weight = self.shared.cast(inputs.dtype, self.augment_embedding.weight)
            inputs = inputs + nn.functional.linear(augment.to(inputs.dtype), weight)
        embedding = self.time_embedding(inputs)
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels were given to an unconditional net")
            return embedding
        if class_labels is None:
            raise ValueError("class_labels are missing: the net is class-conditional")
        if config.class_embed_type == "timestep":
            class_labels = project(class_labels).to(self.compute_dtype)
        return embedding + self.class_embedding(class_labels).to(self.compute_dtype)


OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_ATTENTION_KEY = re.compile(rf"(attentions\.\d+)\.({'|'.join(OLD_ATTENTION_NAMES)})\.")


def convert_old_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention weights under diffusers' names of 2022 (query, key, value, proj_attn) renamed to today's.

    Weights stored as 1x1 convolutions [C_out, C_in, 1, 1] become those of linear layers. Other names and tensors are
    handed on as they are, so a state dict of today comes back equal. No tensor is copied.
    """
    converted = {}
    for name, tensor in state_dict.items():
        name = OLD_ATTENTION_KEY.sub(lambda match: f"{match[1]}.{OLD_ATTENTION_NAMES[match[2]]}.", name)
        converted[name] = tensor.flatten(1) if ".attentions." in name and tensor.ndim > 2 else tensor
    return converted
