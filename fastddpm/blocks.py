"""Building blocks of the U-Net, under the module names of diffusers' UNet2DModel (DDPM, Ho et al. 2020, appendix B).

Activations are [N, C, H, W] in channels_last memory from the first convolution to the last; 1x1 convolutions and the
attention are matrix products on [N H W, C] views of them. A residual sum is not computed where it arises but by the
next norm, in the pass that it makes anyway (`Sum`), and a skip connection is never concatenated: norm and shortcut
read the two parts.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from typing import cast as typed

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastddpm_kernels

ACTIVATIONS: tuple[str, ...] = ("silu", "swish")  # two names of x sigmoid(x)
# The operators by which torch's own compiler packs weights; not every build has them.
PACKS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")


class Shared:
    """What all layers of a net share: where dropout masks come from, the activations' dtype, and kept casts.

    It is an object and not an argument of forward, so that forward keeps diffusers' signature and wrappers such as
    DistributedDataParallel, which hold the same module, need not know of it. copy.deepcopy of a net copies it once:
    the layers of the copy share one of their own.
    """

    def __init__(self) -> None:
        self.seed: int = 0
        self.ordinals: Tensor | None = None
        self.dtype: torch.dtype | None = None
        self.impl: str | None = None
        self.frozen: dict[tuple[torch.dtype, tuple[int, ...]], Tensor] | None = None
        self.recompute = False
        self.sharded = False  # a layer's weights are there only while it runs, forward or backward (sharding.py)
        self.casts: dict[int, _Cast] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        copied = Shared()  # casts are kept by the identity of parameters, which a copy has others of
        copied.dtype, copied.impl, copied.recompute = self.dtype, self.impl, self.recompute
        copied.seed, copied.ordinals = self.seed, self.ordinals
        return copied

    @contextmanager
    def address(self, seed: int, ordinals: Tensor | None) -> Iterator[None]:
        """Dropout masks are those of (seed, ordinals) inside."""
        before = self.seed, self.ordinals
        self.seed, self.ordinals = seed, ordinals
        try:
            yield
        finally:
            self.seed, self.ordinals = before

    def run(self, layer: nn.Module, *args: Any) -> Any:
        """layer(*args); with `recompute` its activations are made again in the backward pass, masks included."""
        if not (self.recompute and torch.is_grad_enabled()):
            with self._cast_again() if self.sharded and torch.is_grad_enabled() else nullcontext():
                return layer(*args)
        again = _Recomputation(self)
        return checkpoint(
            layer,
            *args,
            use_reentrant=False,
            preserve_rng_state=self.ordinals is None,  # masks are then of torch's own generator
            context_fn=lambda: (nullcontext(), again),
        )

    @contextmanager
    def _cast_again(self) -> Iterator[None]:
        """Inside, casts are not kept for the backward pass, which makes them again from the weights gathered for it.

        Or each process would hold a copy of the whole net between the passes.
        """
        casts: dict[int, _Cast] = {}
        self.casts = casts

        def pack(saved: Tensor) -> Any:
            cast = casts.get(saved.untyped_storage().data_ptr())
            return saved if cast is None else (cast.again, saved.shape, saved.stride(), saved.storage_offset())

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            again, *view = packed
            return typed(Tensor, again().as_strided(*view))

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                yield
        finally:
            self.casts = None
            casts.clear()  # autograd holds on to pack

    def cast(self, dtype: torch.dtype, *parameters: Tensor | None) -> Tensor:
        """The parameters (of layers that have them) in the dtype, along one first axis; made once while frozen."""
        given = typed(tuple[Tensor, ...], parameters)
        if self.sharded:  # nothing is kept while frozen: that would gather the whole net bit by bit
            made = _cast_sharded(dtype, given)
            own = {p.untyped_storage().data_ptr() for p in given}
            if self.casts is not None and (place := made.untyped_storage().data_ptr()) not in own:
                self.casts[place] = _Cast(made, partial(_cast_sharded, dtype, given))
            return made
        # Compiled code would guard on every parameter's id, and be compiled again when the casts are there.
        if torch.compiler.is_compiling() or self.frozen is None:
            return _cast(dtype, given)
        key = dtype, tuple(id(p) for p in given)
        if key not in self.frozen:
            self.frozen[key] = _cast(dtype, given)
        return self.frozen[key]

    def packed(self, x: Tensor, conv: nn.Conv2d) -> Tensor | None:
        """While frozen on a CPU, the weight of conv in oneDNN's own order for images of x's shape; else None.

        Without it every call brings the weights into that order anew (143 MB of Ho's net in fp32, which a batch of one
        image does not hide: 73 -> 67 ms a call on 2 cores), and small images of a batch of one go another, slower way.
        """
        if torch.compiler.is_compiling() or self.frozen is None or not PACKS or x.device.type != "cpu":
            return None
        if x.dtype not in (torch.float32, torch.bfloat16):
            return None
        key = x.dtype, (id(conv), *x.shape)
        if key not in self.frozen:
            weight = self.cast(x.dtype, conv.weight).detach()
            self.frozen[key] = torch.ops.mkldnn._reorder_convolution_weight(
                weight, conv.padding, conv.stride, conv.dilation, conv.groups, x.shape
            )
        return self.frozen[key]

    def folds_bias(self, x: Tensor) -> bool:
        """Whether a convolution's bias is better added by the norm that follows it.

        A GPU's convolutions add it in a pass of its own, a CPU's while they write their result.
        """
        return x.device.type == "cuda"


class _Recomputation:
    """The context of recomputing a layer, which finds the addresses of its first pass; may be entered repeatedly."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.address = shared, (shared.seed, shared.ordinals)

    def __enter__(self) -> None:
        self.before = self.shared.seed, self.shared.ordinals
        self.shared.seed, self.shared.ordinals = self.address

    def __exit__(self, *_: object) -> None:
        self.shared.seed, self.shared.ordinals = self.before


class _Cast(NamedTuple):
    """A cast in use, held so that no other tensor takes its place in memory, and what makes it again."""

    made: Tensor
    again: Callable[[], Tensor]


def _cast(dtype: torch.dtype, parameters: tuple[Tensor, ...]) -> Tensor:
    return (parameters[0] if len(parameters) == 1 else torch.cat(parameters)).to(dtype)


def _cast_sharded(dtype: torch.dtype, parameters: tuple[Tensor, ...]) -> Tensor:
    """The same, with convolutions turned into channels_last order, which sharded parameters do not have."""
    together = _cast(dtype, parameters)
    return together.contiguous(memory_format=torch.channels_last) if together.ndim == 4 else together


class Sum(NamedTuple):
    """x + branch + bias, a hidden state that is not added up yet.

    branch: [N, C, H, W] or None; bias: [C] (only with a branch) or None.
    """

    x: Tensor
    branch: Tensor | None = None
    bias: Tensor | None = None

    def tensor(self) -> Tensor:
        """The sum [N, C, H, W], for layers that have no norm in front."""
        if self.branch is None:
            return self.x
        branch = self.branch if self.bias is None else self.branch + self.bias.to(self.branch.dtype)[:, None, None]
        return self.x + branch


class Dropout(nn.Module):
    """Dropout's probability, and its layer's number in the net, which is given by the net after it is built.

    The mask depends on (seed, layer, ordinal of the sample, element) while an address is set (UNet.noise_address);
    else torch's own generator draws it, as nn.Dropout would. Nothing is dropped in eval mode.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.layer = 0

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"


def norm_silu(
    h: Sum,
    norm: nn.GroupNorm,
    shared: Shared,
    *,
    silu: bool = True,
    skip: Tensor | None = None,
    add: Tensor | None = None,
    scale_shift: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """GroupNorm, FiLM, SiLU and dropout of cat((h + add, skip), 1), and h as a tensor (without `add`).

    add [N, C] or [C] only for an h that is added up; scale_shift [N, 2 C]: scale, then shift.
    """
    p = dropout.p if dropout is not None and dropout.training else 0.0
    options: dict[str, Any] = {}
    if dropout is not None and p > 0.0 and shared.ordinals is not None:
        if shared.ordinals.shape != h.x.shape[:1]:
            ordinals = tuple(shared.ordinals.shape)
            raise ValueError(f"noise_address has ordinals of shape {ordinals} for a batch of {len(h.x)}")
        options = {"p": p, "ordinals": shared.ordinals, "layer": dropout.layer, "seed": shared.seed}
    scale, shift = (None, None) if scale_shift is None else scale_shift.chunk(2, dim=1)
    result = fastddpm_kernels.group_norm_silu(
        h.x,
        norm.weight,
        norm.bias,
        norm.num_groups,
        norm.eps,
        silu=silu,
        add=add if h.branch is None else h.bias,
        residual=h.branch,
        skip=skip,
        scale=scale,
        shift=shift,
        impl=shared.impl,
        **options,
    )
    y, total = result if isinstance(result, tuple) else (result, h.x)
    return (F.dropout(y, p) if p > 0.0 and not options else y), total


def convolve(x: Tensor, conv: nn.Conv2d, shared: Shared, bias: bool = True) -> Tensor:
    """The convolution in x's dtype; bias=False leaves its bias to the caller."""
    b = shared.cast(x.dtype, conv.bias) if bias and conv.bias is not None else None
    if (packed := shared.packed(x, conv)) is not None:
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed, b, conv.padding, conv.stride, conv.dilation, conv.groups, "none", [], ""
        )
    return F.conv2d(x, shared.cast(x.dtype, conv.weight), b, conv.stride, conv.padding)


def pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N H W, C], a view in channels_last memory."""
    return rearrange(x, "n c h w -> (n h w) c")


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

    def __init__(self, in_channels: int, channels: int, shared: Shared):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return linear(F.silu(linear(x, self.shared, self.linear_1)), self.shared, self.linear_2)


def linear(x: Tensor, shared: Shared, *layers: Any) -> Tensor:
    """x [..., C_in] through linear layers side by side -> [..., sum of C_out], as one product in x's dtype."""
    weight = shared.cast(x.dtype, *(layer.weight for layer in layers))
    return F.linear(x, weight, shared.cast(x.dtype, *(layer.bias for layer in layers)))


class Downsample(nn.Module):
    """Halves H and W by a 3x3 convolution of stride 2, padded on all sides (1) or on the right and bottom only (0)."""

    def __init__(self, channels: int, padding: int, shared: Shared):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.padding = padding
        self.shared = shared

    def forward(self, h: Sum, projected: Tensor) -> tuple[Tensor, Sum]:
        """Returns h as a tensor, and the result."""
        x = h.tensor()
        return x, Sum(convolve(x if self.padding else F.pad(x, (0, 1, 0, 1)), self.conv, self.shared))


class Upsample(nn.Module):
    """Doubles H and W: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int, shared: Shared):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.shared = shared

    def forward(self, h: Sum, projected: Tensor) -> tuple[Tensor, Sum]:
        """Returns h as a tensor, and the result."""
        x = h.tensor()
        return x, Sum(convolve(upsample_nearest(x), self.conv, self.shared))


upsample_nearest: Callable[[Tensor], Tensor] = partial(F.interpolate, scale_factor=2.0, mode="nearest")
average_pool: Callable[[Tensor], Tensor] = partial(F.avg_pool2d, kernel_size=2)


class ResnetBlock(nn.Module):
    """GN, SiLU, 3x3 conv, time embedding, GN, SiLU, dropout, 3x3 conv, plus the (1x1 projected) input.

    The projected embedding is added before the second norm, or with scale_shift gives that norm's scale and shift
    (Dhariwal and Nichol 2021, section 4). `resample` acts on the activated input of the first convolution and on the
    shortcut ("BigGAN" resampling). The sum is divided by output_scale.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_channels: int,
        groups: int,
        norm_eps: float,
        scale_shift: bool,
        dropout: float,
        shared: Shared,
        resample: Callable[[Tensor], Tensor] | None = None,
        output_scale: float = 1.0,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, norm_eps)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.shared = shared
        self.scale_shift = scale_shift
        self.resample = resample
        self.output_scale = output_scale

    def forward(self, h: Sum, projected: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Sum]:
        """h and skip make up the in_channels; projected is what `project_embedding` gives for this block, or in a
        sharded net, where no other block has this one's weights, the activated embedding itself.

        Returns h as a tensor, and the result [N, out_channels, H', W'].
        """
        shared = self.shared
        if shared.sharded:
            (projected,) = project_embedding(projected, [self], shared)
        activated, total = norm_silu(h, self.norm1, shared, skip=skip)
        x, folds = total, shared.folds_bias(total)
        if self.resample is not None:
            x, activated = self.resample(x), self.resample(activated)
            skip = None if skip is None else self.resample(skip)
        inner = Sum(convolve(activated, self.conv1, shared, bias=not folds))
        bias_1 = self.conv1.bias if folds else None  # without scale_shift `projected` holds it already
        add, film = (bias_1, projected) if self.scale_shift else (projected, None)
        activated, _ = norm_silu(inner, self.norm2, shared, add=add, scale_shift=film, dropout=self.dropout)
        branch = convolve(activated, self.conv2, shared, bias=not folds)
        bias_2 = self.conv2.bias if folds else None
        if shared.sharded and bias_2 is not None:
            bias_2 = bias_2.clone()  # the next block adds it, when this one's weights are gone
        result = Sum(self._shortcut(x, skip), branch, bias_2)
        return total, _scaled(result, self.output_scale)

    def _shortcut(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """x (and skip) through the 1x1 convolution, as products of pixels and weights."""
        if self.conv_shortcut is None:
            return x
        shared, (n, c, height, _) = self.shared, x.shape
        weight = shared.cast(x.dtype, self.conv_shortcut.weight).flatten(1)
        y = F.linear(pixels(x), weight[:, :c], shared.cast(x.dtype, self.conv_shortcut.bias))
        if skip is not None:
            y = y.addmm_(pixels(skip), weight[:, c:].t())
        return rearrange(y, "(n h w) c -> n c h w", n=n, h=height)


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
        shared: Shared,
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
        self.shared = shared
        self.output_scale = output_scale

    def forward(self, h: Sum) -> tuple[Tensor, Sum]:
        """[N, C, H, W] -> h as a tensor, and the result of the same shape."""
        if self.group_norm is None:
            total = normed = h.tensor()
        else:
            normed, total = norm_silu(h, self.group_norm, self.shared, silu=False)
        qkv = linear(rearrange(normed, "n c h w -> n (h w) c"), self.shared, self.to_q, self.to_k, self.to_v)
        q, k, v = (rearrange(x, "n l (heads d) -> n heads l d", heads=self.heads) for x in qkv.chunk(3, dim=-1))
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "n heads l d -> n l (heads d)")
        branch = rearrange(linear(attended, self.shared, self.to_out[0]), "n (h w) c -> n c h w", h=total.shape[2])
        return total, _scaled(Sum(total, branch), self.output_scale)


def _scaled(result: Sum, scale: float) -> Sum:
    return result if scale == 1.0 else Sum(result.tensor() / scale)


class DownBlock(nn.Module):
    """The residual blocks of one level on the way down, each followed by attention where asked for, and a resampling.

    resnets, attentions (as many, or none) and downsampler are made by the net; the two lists are named as diffusers
    names them.
    """

    def __init__(
        self, resnets: list[nn.Module], attentions: list[nn.Module], downsampler: nn.Module | None, shared: Shared
    ):
        super().__init__()
        self.shared = shared
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        if downsampler is not None:
            self.downsamplers = nn.ModuleList([downsampler])
        self.has_attention = bool(attentions)
        self.resamples = downsampler is not None

    def forward(self, h: Sum, projected: Iterator[Tensor]) -> tuple[Sum, tuple[Tensor, ...]]:
        """projected: the embedding for each residual block, in order. Returns the output and the input of each stage,
        which are the states that the way up takes as skip connections."""
        states: tuple[Tensor, ...] = ()
        for i, resnet in enumerate(self.resnets):
            x, h = self.shared.run(resnet, h, next(projected))
            if self.has_attention:
                _, h = self.shared.run(self.attentions[i], h)
            states += (x,)
        if self.resamples:
            downsampler = self.downsamplers[0]
            x, h = self.shared.run(downsampler, h, next(projected) if isinstance(downsampler, ResnetBlock) else None)
            states += (x,)
        return h, states


class UpBlock(nn.Module):
    """The same on the way up: each residual block takes the next skip connection beside its input."""

    def __init__(
        self, resnets: list[nn.Module], attentions: list[nn.Module], upsampler: nn.Module | None, shared: Shared
    ):
        super().__init__()
        self.shared = shared
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        if upsampler is not None:
            self.upsamplers = nn.ModuleList([upsampler])
        self.has_attention = bool(attentions)
        self.resamples = upsampler is not None

    def forward(self, h: Sum, skips: tuple[Tensor, ...], projected: Iterator[Tensor]) -> Sum:
        """skips: one tensor for each residual block, the last is taken first."""
        for i, resnet in enumerate(self.resnets):
            _, h = self.shared.run(resnet, h, next(projected), skips[-1 - i])
            if self.has_attention:
                _, h = self.shared.run(self.attentions[i], h)
        if self.resamples:
            upsampler = self.upsamplers[0]
            _, h = self.shared.run(upsampler, h, next(projected) if isinstance(upsampler, ResnetBlock) else None)
        return h


class MidBlock(nn.Module):
    """Residual block, attention (or none), residual block at the lowest resolution."""

    def __init__(self, resnets: list[nn.Module], attention: nn.Module | None, shared: Shared):
        super().__init__()
        self.shared = shared
        if attention is not None:
            self.attentions = nn.ModuleList([attention])
        self.resnets = nn.ModuleList(resnets)
        self.has_attention = attention is not None

    def forward(self, h: Sum, projected: Iterator[Tensor]) -> tuple[Tensor, Sum]:
        """Returns h as a tensor, the last skip connection, and the result."""
        x, h = self.shared.run(self.resnets[0], h, next(projected))
        if self.has_attention:
            _, h = self.shared.run(self.attentions[0], h)
        _, h = self.shared.run(self.resnets[1], h, next(projected))
        return x, h


def resnets_of(stage: Any) -> Iterator[ResnetBlock]:
    """The residual blocks of a DownBlock, MidBlock or UpBlock in the order of their use."""
    yield from stage.resnets
    for name in ("downsamplers", "upsamplers"):
        yield from (m for m in getattr(stage, name, ()) if isinstance(m, ResnetBlock))


def project_embedding(embedding: Tensor, blocks: list[ResnetBlock], shared: Shared) -> tuple[Tensor, ...]:
    """The activated embedding [N, C_emb] through all time_emb_proj as one product: [N, C_out or 2 C_out] a block.

    Where biases are folded and embeddings added, the first convolution's bias is in it: both are added together.
    """
    layers = [block.time_emb_proj for block in blocks]
    weight = shared.cast(embedding.dtype, *(layer.weight for layer in layers))
    bias = shared.cast(layers[0].bias.dtype, *(layer.bias for layer in layers))
    if shared.folds_bias(embedding) and not blocks[0].scale_shift:
        # A sum hands one gradient to both terms, and the fused optimiser clips in place what it reads: the factor gives
        # the second term a gradient of its own.
        bias = bias + 1.0 * shared.cast(bias.dtype, *(block.conv1.bias for block in blocks))
    together = F.linear(embedding, weight, bias.to(embedding.dtype))
    return together.split([layer.out_features for layer in layers], dim=1)


@torch.no_grad()
def initialise(net: nn.Module, seed: int, last: nn.Module, zero: nn.Linear | None = None) -> None:
    """Ho's initialisation: variance scaling (fan_avg, uniform) of scale 1, biases 0, norms the identity.

    `last`, the second convolution of each residual block and the output of each attention get scale 1e-10, so that the
    net and every residual branch start as (nearly) zero. Class embeddings are N(0, 1), as in ADM. All numbers are drawn
    in fp32 on the CPU, in the order of modules(), so that they depend on `seed` alone. `zero` starts at 0 and draws
    none, so that the rest of the net is that of the net without it.
    """
    generator = torch.Generator().manual_seed(seed)
    nearly_zero = {last}
    for module in net.modules():
        if isinstance(module, ResnetBlock):
            nearly_zero.add(module.conv2)
        elif isinstance(module, Attention):
            nearly_zero.add(module.to_out[0])
    for module in net.modules():
        if zero is not None and module is zero:
            zero.weight.zero_()
        elif isinstance(module, nn.Conv2d | nn.Linear):
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
