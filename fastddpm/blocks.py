"""Building blocks of the U-Net, under the module names of diffusers' UNet2DModel (DDPM, Ho et al. 2020, appendix B).

Every block takes and returns [N, C, H, W] activations and asks for no memory layout of its own: convolutions keep
channels_last because their weights have it, and the rearrangements of the attention are views of such tensors.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import fastddpm_kernels

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "swish": F.silu}


class NoiseAddress:
    """Where dropout masks are drawn from: one object shared by all dropout layers of a net, set by UNet.noise_address.

    It is an object and not an argument of forward, so that forward keeps diffusers' signature and wrappers such as
    DistributedDataParallel, which hold the same module, need not know of it. copy.deepcopy of a net copies it once:
    the layers of the copy share an address of their own.
    """

    def __init__(self) -> None:
        self.seed: int = 0
        self.ordinals: Tensor | None = None


class Dropout(nn.Module):
    """Dropout whose mask depends on (seed, layer, ordinal of the sample, element) while an address is set.

    Without an address torch's own generator draws the mask, as nn.Dropout would. Nothing is dropped in eval mode.
    `layer` is the number of this layer in the net, given by the net after it is built.
    """

    def __init__(self, p: float, address: NoiseAddress):
        super().__init__()
        self.p = p
        self.layer = 0
        self.address = address

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape and dtype; differentiable. ValueError if the ordinals are not N numbers."""
        if not self.training or self.p == 0.0:
            return x
        ordinals = self.address.ordinals
        if ordinals is None:
            return F.dropout(x, self.p)
        if ordinals.shape != x.shape[:1]:
            raise ValueError(f"noise_address has ordinals of shape {tuple(ordinals.shape)} for a batch of {x.shape[0]}")
        return fastddpm_kernels.dropout(x, self.p, ordinals, layer=self.layer, seed=self.address.seed)

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"


def sinusoid(t: Tensor, channels: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoidal embedding (Vaswani et al. 2017, section 3.5): sin and cos of t exp(-log(10000) k / (K - freq_shift)).

    t: any real dtype [N]. Returns float32 [N, channels], K = channels // 2 frequencies k = 0..K-1, the sines first
    unless flip_sin_to_cos, an odd channel filled with 0. Always computed in fp32, in this order of operations: a
    float64 net must see the very numbers that an fp32 one (and diffusers) sees, and half precision cannot hold t.
    """
    half = channels // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(10000) * k / (half - freq_shift))
    angle = t.float()[:, None] * frequency
    parts = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return F.pad(torch.cat(parts, dim=1), (0, channels % 2))


class TimestepEmbedding(nn.Module):
    """[N, in_channels] sinusoid -> [N, channels]: linear, SiLU, linear."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Downsample(nn.Module):
    """Halves H and W by a 3x3 convolution of stride 2, padded on all sides (1) or on the right and bottom only (0)."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.padding = padding

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles H and W: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(upsample_nearest(x))


upsample_nearest: Callable[[Tensor], Tensor] = partial(F.interpolate, scale_factor=2.0, mode="nearest")
average_pool: Callable[[Tensor], Tensor] = partial(F.avg_pool2d, kernel_size=2)


class ResnetBlock(nn.Module):
    """GN, activation, 3x3 conv, time embedding, GN, activation, dropout, 3x3 conv, plus the (1x1 projected) input.

    The embedding, already through the activation, is projected and added before the second norm, or with scale_shift
    gives that norm's scale and shift (Dhariwal and Nichol 2021, section 4). `resample` acts on the activated input of
    the first convolution and on the shortcut ("BigGAN" resampling). The sum is divided by output_scale.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_channels: int,
        groups: int,
        norm_eps: float,
        activation: Callable[[Tensor], Tensor],
        scale_shift: bool,
        dropout: float,
        address: NoiseAddress,
        resample: Callable[[Tensor], Tensor] | None = None,
        output_scale: float = 1.0,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, norm_eps)
        self.dropout = Dropout(dropout, address)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.activation = activation
        self.scale_shift = scale_shift
        self.resample = resample
        self.output_scale = output_scale

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [N, in_channels, H, W], embedding [N, embedding_channels] -> [N, out_channels, H', W']."""
        h = self.activation(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)
        projected = self.time_emb_proj(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = projected.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + projected)
        h = self.conv2(self.dropout(self.activation(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return _scaled_sum(x, h, self.output_scale)


class Attention(nn.Module):
    """Self-attention over the H W pixels: GN (unless groups is None), q, k, v, softmax, output projection, plus x.

    channels // head_channels heads; channels that the heads leave over are projected away, as diffusers does.
    The sum is divided by output_scale.
    """

    def __init__(
        self,
        channels: int,
        *,
        head_channels: int,
        groups: int | None,
        norm_eps: float,
        output_scale: float = 1.0,
    ):
        super().__init__()
        self.heads = channels // head_channels
        inner = self.heads * head_channels
        self.group_norm = nn.GroupNorm(groups, channels, norm_eps) if groups is not None else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])
        self.output_scale = output_scale

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        h = x if self.group_norm is None else self.group_norm(x)
        tokens = rearrange(h, "n c h w -> n (h w) c")
        q, k, v = (
            rearrange(project(tokens), "n l (heads d) -> n heads l d", heads=self.heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "n heads l d -> n l (heads d)")
        h = rearrange(self.to_out[0](attended), "n (h w) c -> n c h w", h=x.shape[2])
        return _scaled_sum(x, h, self.output_scale)


class DownBlock(nn.Module):
    """The residual blocks of one level on the way down, each followed by attention where asked for, and a resampling.

    resnets, attentions (as many, or none) and downsampler are made by the net; the two lists are named as diffusers
    names them.
    """

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module], downsampler: nn.Module | None):
        super().__init__()
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        if downsampler is not None:
            self.downsamplers = nn.ModuleList([downsampler])
        self.has_attention = bool(attentions)
        self.resamples = downsampler is not None

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns the output and every state that the way up takes as a skip connection, the output last."""
        states: tuple[Tensor, ...] = ()
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, embedding)
            if self.has_attention:
                x = self.attentions[i](x)
            states += (x,)
        if self.resamples:
            x = self.downsamplers[0](x, embedding)
            states += (x,)
        return x, states


class UpBlock(nn.Module):
    """The same on the way up: each residual block takes the next skip connection concatenated to its input."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module], upsampler: nn.Module | None):
        super().__init__()
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        if upsampler is not None:
            self.upsamplers = nn.ModuleList([upsampler])
        self.has_attention = bool(attentions)
        self.resamples = upsampler is not None

    def forward(self, x: Tensor, skips: tuple[Tensor, ...], embedding: Tensor) -> Tensor:
        """skips: one tensor for each residual block, the last is taken first."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat((x, skips[-1 - i]), dim=1), embedding)
            if self.has_attention:
                x = self.attentions[i](x)
        if self.resamples:
            x = self.upsamplers[0](x, embedding)
        return x


class MidBlock(nn.Module):
    """Residual block, attention (or none), residual block at the lowest resolution."""

    def __init__(self, resnets: list[nn.Module], attention: nn.Module | None):
        super().__init__()
        if attention is not None:
            self.attentions = nn.ModuleList([attention])
        self.resnets = nn.ModuleList(resnets)
        self.has_attention = attention is not None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.resnets[0](x, embedding)
        if self.has_attention:
            x = self.attentions[0](x)
        return self.resnets[1](x, embedding)


@torch.no_grad()
def initialise(net: nn.Module, seed: int, last: nn.Module) -> None:
    """Ho's initialisation: variance scaling (fan_avg, uniform) of scale 1, biases 0, norms the identity.

    `last`, the second convolution of each residual block and the output of each attention get scale 1e-10, so that the
    net and every residual branch start as (nearly) zero. Class embeddings are N(0, 1), as in ADM. All numbers are drawn
    in fp32 on the CPU, in the order of modules(), so that they depend on `seed` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    nearly_zero = {last}
    for module in net.modules():
        if isinstance(module, ResnetBlock):
            nearly_zero.add(module.conv2)
        elif isinstance(module, Attention):
            nearly_zero.add(module.to_out[0])
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = torch.empty(module.weight.shape, dtype=torch.float32, device="cpu")
            scale = 1e-10 if module in nearly_zero else 1.0
            module.weight.copy_(nn.init.xavier_uniform_(weight, gain=math.sqrt(scale), generator=generator))
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.GroupNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            weight = torch.empty(module.weight.shape, dtype=torch.float32, device="cpu")
            module.weight.copy_(weight.normal_(generator=generator))


def _scaled_sum(x: Tensor, h: Tensor, scale: float) -> Tensor:
    # A division by 1 would be one more pass over the activations.
    total = x + h
    return total if scale == 1.0 else total / scale
