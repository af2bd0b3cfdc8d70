"""group_norm_silu: y = dropout(silu(FiLM(GroupNorm(cat(x + add + residual, skip))))) for channels_last images.

GroupNorm of Wu and He 2018, per sample and group: n = (total - mean) / sqrt(variance + eps) with the biased variance;
u = (n weight + bias) (1 + scale) + shift; silu(u) = u sigmoid(u). Statistics are those of the values less their mean,
never E[x^2] - E[x]^2, in fp32 (float64 when an input is float64).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import Tensor

from . import native
from ._dispatch import check_images, check_per_sample, check_precision, compute_dtype, resolve_impl
from .dropout import HALVES, dropout_mask_reference, dropout_threshold
from .group_norm_aten import group_norm_silu_aten
from .group_norm_kernels import empty_images, launch_group_norm_silu, launch_group_norm_silu_backward
from .ops import Case, Kwargs, Op, example_floats, example_ordinals
from .philox import Stream, split_seed, stream_tag

CHUNK_ELEMENTS = 2**17  # of the references: a chunk and its copies stay in a core's cache
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_IMPLS = ("aten", "native")  # torch's own operators, and the loops that the machine's compiler makes


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    *,
    silu: bool = True,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    p: float = 0.0,
    ordinals: Tensor | None = None,
    layer: int = 0,
    seed: int = 0,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """GroupNorm, FiLM, SiLU and dropout of a sum and a concatenation that are never made. Returns y, or (y, total).

    x [N, C1, H, W] fp32, bf16 or fp16 (float64 for the reference), channels_last. weight, bias [C] floating point,
    C = C1 + C2. silu False: no activation. add [C1] or [N, C1] floating point: added to every pixel of x. residual
    like x: added too, and total = x + add + residual, in x's dtype, is normalised and returned as well. skip
    [N, C2, H, W] of x's dtype, channels_last: further channels, normalised with the first. scale, shift [N, C]
    floating point, both or none: FiLM. p, ordinals int64 [N], layer, seed: dropout of y with `dropout`'s own mask.

    y [N, C, H, W] and total have x's dtype and are channels_last. Differentiable once, in all floating-point tensors,
    each gradient in its tensor's dtype. Results do not depend on the batch. Raises ValueError for an argument out of
    shape, layout, range, dtype or device, and names it.
    """
    threshold, tag = _check(
        x, weight, bias, num_groups, eps, add, residual, skip, scale, shift, p, ordinals, layer, seed
    )
    impl = resolve_impl(impl, x.device, CPU_IMPLS)
    check_precision(impl, x, weight, bias, add, scale, shift)
    if impl == "aten":
        return group_norm_silu_aten(
            x, weight, bias, num_groups, eps, silu=silu, add=add, residual=residual, skip=skip, scale=scale,
            shift=shift, p=p, ordinals=ordinals, layer=layer, seed=seed,
        )  # fmt: skip
    if impl == "native":
        _check_native(x)
    y, total, _, _, _ = _group_norm_silu_op(
        x, weight, bias, add, residual, skip, scale, shift, ordinals if threshold else None,
        num_groups, eps, silu, threshold, tag, seed, impl,
    )  # fmt: skip
    return y if residual is None else (y, total)


def group_norm_silu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    *,
    silu: bool = True,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    p: float = 0.0,
    ordinals: Tensor | None = None,
    layer: int = 0,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`group_norm_silu` in plain torch; carries no gradient of its own."""
    y, total, _, _, _ = _run_reference(
        x, weight, bias, add, residual, skip, scale, shift, ordinals,
        num_groups=num_groups, eps=eps, silu=silu, threshold=dropout_threshold(p),
        tag=stream_tag(Stream.DROPOUT, layer), seed=seed,
    )  # fmt: skip
    return y if residual is None else (y, total)


def group_norm_silu_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    *,
    silu: bool = True,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    p: float = 0.0,
    ordinals: Tensor | None = None,
    layer: int = 0,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`group_norm_silu` as one Triton launch, or three where a group does not fit on chip; carries no gradient."""
    y, total, _, _ = launch_group_norm_silu(
        x, weight, bias, add, residual, skip, scale, shift, ordinals,
        num_groups=num_groups, eps=eps, silu=silu, threshold=dropout_threshold(p),
        tag=stream_tag(Stream.DROPOUT, layer), seed=seed,
    )  # fmt: skip
    return y if residual is None else (y, total)


def group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    *,
    silu: bool = True,
    add: Tensor | None = None,
    dtotal: Tensor | None = None,
    skip: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    p: float = 0.0,
    ordinals: Tensor | None = None,
    layer: int = 0,
    seed: int = 0,
    with_dadd: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `group_norm_silu` per sample, which autograd sums; here for tests and benchmarks.

    x: x, or total where there was a residual, with dtotal [N, C1, H, W] or None and add None. mean, rstd
    [N, num_groups] fp32 (float64 for the reference): the forward's. dy [N, C, H, W] and dtotal have x's dtype and any
    layout. Returns those that apply of dx, dskip, (dweight, dbias) [N, 2, C], (dscale, dshift) [N, 2, C] and dadd
    [N, C1]. Raises ValueError as `group_norm_silu` does.
    """
    threshold, tag = _check(x, weight, bias, num_groups, 1.0, add, None, skip, scale, shift, p, ordinals, layer, seed)
    for name, gradient, num_channels in (("dy", dy, weight.shape[0]), ("dtotal", dtotal, x.shape[1])):
        if gradient is not None:
            _check_like(name, gradient, (x.shape[0], num_channels, *x.shape[2:]), x)
    for name, statistics in (("mean", mean), ("rstd", rstd)):
        _check_rows(name, statistics, ((x.shape[0], num_groups),), x)
        if statistics.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32, as the forward makes it, got {statistics.dtype}")
    impl = resolve_impl(impl, x.device)
    check_precision(impl, x, weight, bias, add, scale, shift, mean, rstd)
    results = _group_norm_silu_backward_op(
        dy, dtotal, x, weight, bias, add, skip, scale, shift, mean, rstd, ordinals, None,
        num_groups, silu, threshold, tag, seed, with_dadd, impl,
    )  # fmt: skip
    return _that_apply(results, skip, scale, with_dadd)


def group_norm_silu_backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    *,
    silu: bool = True,
    add: Tensor | None = None,
    dtotal: Tensor | None = None,
    skip: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    p: float = 0.0,
    ordinals: Tensor | None = None,
    layer: int = 0,
    seed: int = 0,
    with_dadd: bool = False,
) -> tuple[Tensor, ...]:
    """`group_norm_silu_backward` in plain torch."""
    results = _run_reference_backward(
        dy, dtotal, x, weight, bias, add, skip, scale, shift, mean, rstd, ordinals, None,
        num_groups=num_groups, silu=silu, threshold=dropout_threshold(p), tag=stream_tag(Stream.DROPOUT, layer),
        seed=seed, with_dadd=with_dadd,
    )  # fmt: skip
    return _that_apply(results, skip, scale, with_dadd)


def group_norm_silu_backward_triton(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    *,
    silu: bool = True,
    add: Tensor | None = None,
    dtotal: Tensor | None = None,
    skip: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    p: float = 0.0,
    ordinals: Tensor | None = None,
    layer: int = 0,
    seed: int = 0,
    with_dadd: bool = False,
) -> tuple[Tensor, ...]:
    """`group_norm_silu_backward` as one Triton launch, or three."""
    results = launch_group_norm_silu_backward(
        dy, dtotal, x, weight, bias, add, skip, scale, shift, mean, rstd, ordinals,
        num_groups=num_groups, silu=silu, threshold=dropout_threshold(p), tag=stream_tag(Stream.DROPOUT, layer),
        seed=seed, with_dadd=with_dadd,
    )  # fmt: skip
    return _that_apply(results, skip, scale, with_dadd)


def _that_apply(
    results: tuple[Tensor, ...], skip: Tensor | None, scale: Tensor | None, with_dadd: bool
) -> tuple[Tensor, ...]:
    dx, dskip, daffine, dfilm, dadd = results
    applies = ((dx, True), (dskip, skip is not None), (daffine, True), (dfilm, scale is not None), (dadd, with_dadd))
    return tuple(result for result, applied in applies if applied)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    add: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    p: float,
    ordinals: Tensor | None,
    layer: int,
    seed: int,
) -> tuple[int, int]:
    """Validate; returns dropout's threshold and stream tag."""
    check_images("x", x)
    if x.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    num_samples, num_first, height, width = x.shape
    for name, image in (("x", x), ("residual", residual), ("skip", skip)):
        if image is None:
            continue
        check_images(name, image)
        _check_like(name, image, (num_samples, image.shape[1] if name == "skip" else num_first, height, width), x)
        # On the meta device convolutions forget the layout.
        if image.device.type != "meta" and not image.is_contiguous(memory_format=torch.channels_last):
            layout = "contiguous NCHW" if image.is_contiguous() else f"a view with strides {image.stride()}"
            raise ValueError(f"{name} is {layout}: call {name}.contiguous(memory_format=torch.channels_last)")
    num_channels = num_first + (0 if skip is None else skip.shape[1])
    if num_groups < 1 or num_channels == 0 or num_channels % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide the {num_channels} channels")
    if not eps > 0.0:
        raise ValueError(f"eps must be positive, got {eps}")
    _check_rows("weight", weight, ((num_channels,),), x)
    _check_rows("bias", bias, ((num_channels,),), x)
    if add is not None:
        _check_rows("add", add, ((num_first,), (num_samples, num_first)), x)
    if (scale is None) != (shift is None):
        given, missing = ("shift", "scale") if scale is None else ("scale", "shift")
        raise ValueError(f"{given} without {missing}: FiLM takes both or none")
    if scale is not None and shift is not None:
        _check_rows("scale", scale, ((num_samples, num_channels),), x)
        _check_rows("shift", shift, ((num_samples, num_channels),), x)
    threshold, tag = dropout_threshold(p), stream_tag(Stream.DROPOUT, layer)
    split_seed(seed)
    if ordinals is not None:
        check_per_sample("ordinals", ordinals, num_samples, torch.int64, x.device)
    elif threshold:
        raise ValueError(f"p={p} needs ordinals, the samples' positions in the sequence of samples consumed")
    return threshold, tag


def _check_native(x: Tensor) -> None:
    """Raise where the compiled loops for CPUs cannot run."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"impl='native' is for float32 and bfloat16 on a CPU, x is {x.dtype} on {x.device.type}")
    if (reason := native.native_available()) is not None:
        raise RuntimeError(f"impl='native' cannot run: {reason}")


def _check_like(name: str, image: Tensor, expected: tuple[int, ...], x: Tensor) -> None:
    """Raise unless image has the expected shape and x's dtype and device."""
    if image.shape != expected:
        raise ValueError(f"{name} must have shape {list(expected)} to go with x, got {list(image.shape)}")
    if image.dtype != x.dtype:
        raise ValueError(f"{name} must have x's dtype {x.dtype}, got {image.dtype}")
    _check_device(name, image, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}")


def _check_rows(name: str, rows: Tensor, shapes: tuple[tuple[int, ...], ...], x: Tensor) -> None:
    """Raise unless rows is a floating-point tensor of one of the shapes on x's device."""
    if rows.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {expected}, got {list(rows.shape)}")
    if not rows.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {rows.dtype}")
    _check_device(name, rows, x)


def _pixels(x: Tensor) -> Tensor:
    """x [N, C, H, W], channels_last, as its pixels [N, H W, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _tree_sum(x: Tensor) -> Tensor:
    """Sums over axis 1 by halving: additions alone, in an order that the axis's size sets, whatever the batch."""
    while x.shape[1] > 1:
        size = x.shape[1]
        half = (size + 1) // 2
        halved = torch.empty(x.shape[0], half, *x.shape[2:], dtype=x.dtype, device=x.device)
        torch.add(x[:, : size - half], x[:, half:], out=halved[:, : size - half])
        if size % 2:
            halved[:, -1] = x[:, half - 1]
        x = halved
    return x[:, 0]


def _group_means(sums: Tensor, num_groups: int, plane: int) -> Tensor:
    """[n, num_groups] from sums over the plane [n, C]."""
    grouped = sums.unflatten(1, (num_groups, -1))
    return _tree_sum(grouped.transpose(1, 2)) / (grouped.shape[2] * plane)


def _per_channel(groups: Tensor, num_channels: int) -> Tensor:
    """[n, C] from [n, num_groups]."""
    return groups.repeat_interleave(num_channels // groups.shape[1], 1)


def _chunks(x: Tensor, num_channels: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, num_channels * x.shape[2] * x.shape[3]))
    return (slice(first, first + step) for first in range(0, x.shape[0], step))


def _film(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, samples: slice, work: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Factor and offset of the normalised values and 1 + scale, [n, C] or [1, C]."""
    factor, offset = weight.to(work)[None], bias.to(work)[None]
    if scale is None or shift is None:
        return factor, offset, None
    film = scale[samples].to(work) + 1.0
    return factor * film, offset * film + shift[samples].to(work), film


def _input(x: Tensor, add: Tensor | None, skip: Tensor | None, samples: slice, work: torch.dtype) -> Tensor:
    """A new [n, H W, C] of cat((x + add, skip), 1)."""
    pixels = _pixels(x[samples])
    num_channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    values = torch.empty(*pixels.shape[:2], num_channels, dtype=work, device=x.device)
    values[..., : x.shape[1]] = pixels
    if add is not None:
        values[..., : x.shape[1]] += add.to(work) if add.dim() == 1 else add[samples].to(work)[:, None]
    if skip is not None:
        values[..., x.shape[1] :] = _pixels(skip[samples])
    return values


# Sums are trees and the logistic function is made of exp, whose value does not depend on where in a vector an element
# lies (that of torch.sigmoid does): so no result depends on the batch.


@torch.no_grad()
def _run_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    ordinals: Tensor | None,
    *,
    num_groups: int,
    eps: float,
    silu: bool,
    threshold: int,
    tag: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `launch_group_norm_silu` computes, in plain torch, and the kept elements (empty without dropout)."""
    work = compute_dtype(x, weight, bias, add, scale, shift)
    num_samples, num_first, height, width = x.shape
    num_channels, plane = weight.shape[0], height * width
    y = empty_images(x, num_channels)
    total = x.new_empty(0) if residual is None else empty_images(x, num_first)
    mean = torch.empty(num_samples, num_groups, dtype=work, device=x.device)
    rstd = torch.empty_like(mean)
    keep = _draw_mask(y, ordinals, threshold, tag, seed)
    if y.numel() == 0:
        return y, total, mean.zero_(), rstd.zero_(), keep
    for samples in _chunks(x, num_channels):
        factor, offset, _ = _film(weight, bias, scale, shift, samples, work)
        values = _input(x, add, skip, samples, work)
        if residual is not None:
            values[..., :num_first] += _pixels(residual[samples])
            _pixels(total[samples]).copy_(values[..., :num_first])
            values[..., :num_first] = _pixels(total[samples])
        mean[samples] = _group_means(_tree_sum(values), num_groups, plane)
        values -= _per_channel(mean[samples], num_channels)[:, None]
        variance = _group_means(_tree_sum(values * values), num_groups, plane)
        rstd[samples] = (variance + eps).sqrt().reciprocal()
        values *= (factor * _per_channel(rstd[samples], num_channels))[:, None]
        values += offset[:, None]
        if silu:
            values /= values.neg().exp_().add_(1.0)
        if threshold:
            values = _drop(values, keep[samples], threshold)
        _pixels(y[samples]).copy_(values)
    return y, total, mean, rstd, keep


@torch.no_grad()
def _run_reference_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    ordinals: Tensor | None,
    keep: Tensor | None,
    *,
    num_groups: int,
    silu: bool,
    threshold: int,
    tag: int,
    seed: int,
    with_dadd: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `launch_group_norm_silu_backward` computes, in plain torch. keep: the mask, or None to draw it again."""
    work = mean.dtype
    _, num_first, height, width = x.shape
    num_channels, plane = weight.shape[0], height * width
    if keep is None:
        keep = _draw_mask(dy, ordinals, threshold, tag, seed)
    dx, dskip, daffine, dfilm, dadd = _empty_gradients(x, skip, num_channels, scale is not None, with_dadd, work)
    if dy.numel() == 0:  # sums over no pixels
        return dx, dskip, daffine.zero_(), dfilm.zero_(), dadd.zero_()
    for samples in _chunks(x, num_channels):
        factor, offset, film = _film(weight, bias, scale, shift, samples, work)
        spread_rstd = _per_channel(rstd[samples], num_channels)
        d = _input(x, add, skip, samples, work)
        d -= _per_channel(mean[samples], num_channels)[:, None]
        du = _pixels(dy[samples]).to(work)
        if threshold:
            du = _drop(du, keep[samples], threshold)
        if silu:
            u = d * (factor * spread_rstd)[:, None]
            u += offset[:, None]
            sigmoid = u.neg().exp_().add_(1.0).reciprocal_()
            du = u.mul_(1.0 - sigmoid).add_(1.0).mul_(sigmoid).mul_(du)
        du_sum = _tree_sum(du)
        dun_sum = _tree_sum(du * d) * spread_rstd
        daffine[samples, 0] = dun_sum if film is None else dun_sum * film
        daffine[samples, 1] = du_sum if film is None else du_sum * film
        if film is not None:
            dfilm[samples, 0] = dun_sum * weight.to(work) + du_sum * bias.to(work)
            dfilm[samples, 1] = du_sum
        k_1, k_2 = (
            _per_channel(_group_means(factor * sums, num_groups, plane), num_channels) * spread_rstd
            for sums in (du_sum, dun_sum)
        )
        gradient = (du * (factor * spread_rstd)[:, None]).sub_(d.mul_((k_2 * spread_rstd)[:, None]).add_(k_1[:, None]))
        if dtotal is not None:
            gradient[..., :num_first] += _pixels(dtotal[samples])
        _pixels(dx[samples]).copy_(gradient[..., :num_first])
        if skip is not None:
            _pixels(dskip[samples]).copy_(gradient[..., num_first:])
        if with_dadd:
            dadd[samples] = _tree_sum(gradient[..., :num_first])
    return dx, dskip, daffine, dfilm, dadd


def _empty_gradients(
    x: Tensor, skip: Tensor | None, num_channels: int, with_film: bool, with_dadd: bool, work: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of the backward, not initialised; those that do not apply have no samples."""
    num_samples = x.shape[0]
    return (
        empty_images(x, x.shape[1]),
        x.new_empty(0) if skip is None else empty_images(x, skip.shape[1]),
        torch.empty(num_samples, 2, num_channels, dtype=work, device=x.device),
        torch.empty(num_samples if with_film else 0, 2, num_channels, dtype=work, device=x.device),
        torch.empty(num_samples if with_dadd else 0, x.shape[1], dtype=work, device=x.device),
    )


def _draw_mask(y: Tensor, ordinals: Tensor | None, threshold: int, tag: int, seed: int) -> Tensor:
    """The elements of y that dropout keeps; empty without dropout."""
    if ordinals is None or threshold == 0:
        return torch.empty(0, dtype=torch.bool, device=y.device)
    return dropout_mask_reference(ordinals, (y.shape[1], y.shape[2], y.shape[3]), threshold, tag, seed, True)


def _drop(values: Tensor, keep: Tensor, threshold: int) -> Tensor:
    """Dropout of [n, H W, C] with its mask [n, C, H, W]."""
    return torch.where(_pixels(keep), values, 0.0).mul_(HALVES / (HALVES - threshold))


def _vector(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _rows(x: Tensor | None, num_samples: int | None = None) -> Tensor | None:
    """[C] or [N, C] as dense fp32, for num_samples samples where it is given."""
    if x is None:
        return None
    x = x.float()
    return (x if num_samples is None else x.expand(num_samples, -1)).contiguous()


def _run_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    ordinals: Tensor | None,
    *,
    num_groups: int,
    eps: float,
    silu: bool,
    threshold: int,
    tag: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `launch_group_norm_silu` computes, in the loops compiled for a CPU."""
    y, total, mean, rstd = native.forward(
        x, residual, skip, _rows(add, x.shape[0]), _vector(weight), _vector(bias), _rows(scale), _rows(shift),
        num_groups, eps, silu, threshold, tag, seed, None if ordinals is None else ordinals.contiguous(),
    )  # fmt: skip
    if y.numel() == 0:
        mean, rstd = mean.zero_(), rstd.zero_()  # not 0 / 0: the backward's sums over no pixels are 0
    return y, x.new_empty(0) if total is None else total, mean, rstd


def _run_native_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    ordinals: Tensor | None,
    *,
    num_groups: int,
    silu: bool,
    threshold: int,
    tag: int,
    seed: int,
    with_dadd: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `launch_group_norm_silu_backward` computes, in the loops compiled for a CPU."""
    dx, dskip, sum_dz, sum_dz_xhat, dadd = native.backward(
        dy, dtotal, x, _rows(add, x.shape[0]), skip, _vector(weight), _vector(bias), _rows(scale), _rows(shift),
        mean, rstd, num_groups, silu, threshold, tag, seed, None if ordinals is None else ordinals.contiguous(),
    )  # fmt: skip
    none = mean.new_empty(0, 2, weight.shape[0])
    film = 1.0 if scale is None else 1.0 + scale.float()
    daffine = torch.stack((film * sum_dz_xhat, film * sum_dz), dim=1)
    dfilm = none
    if scale is not None:
        dfilm = torch.stack((weight * sum_dz_xhat + bias * sum_dz, sum_dz), dim=1)
    return (
        dx,
        x.new_empty(0) if dskip is None else dskip,
        daffine,
        dfilm,
        dadd if with_dadd else mean.new_empty(0, x.shape[1]),
    )


@torch.library.custom_op("fastddpm_kernels::group_norm_silu", mutates_args=())
def _group_norm_silu_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    ordinals: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    threshold: int,
    tag: int,
    seed: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, total, mean, rstd and the mask, which the kernels draw again instead: empty for them."""
    tensors = (x, weight, bias, add, residual, skip, scale, shift, ordinals)
    if impl == "reference":
        return _run_reference(
            *tensors, num_groups=num_groups, eps=eps, silu=silu, threshold=threshold, tag=tag, seed=seed
        )
    run = _run_native if impl == "native" else launch_group_norm_silu
    results = run(*tensors, num_groups=num_groups, eps=eps, silu=silu, threshold=threshold, tag=tag, seed=seed)
    return *results, torch.empty(0, dtype=torch.bool, device=x.device)


@_group_norm_silu_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    ordinals: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    threshold: int,
    tag: int,
    seed: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = empty_images(x, weight.shape[0])
    total = x.new_empty(0) if residual is None else empty_images(x, x.shape[1])
    work = torch.float32 if impl != "reference" else compute_dtype(x, weight, bias, add, scale, shift)
    mean = torch.empty(x.shape[0], num_groups, dtype=work, device=x.device)
    keep = torch.empty(0, dtype=torch.bool, device=x.device)
    if impl == "reference" and ordinals is not None and threshold:
        keep = torch.empty(y.shape, dtype=torch.bool, device=x.device, memory_format=torch.channels_last)
    return y, total, mean, torch.empty_like(mean), keep


@torch.library.custom_op("fastddpm_kernels::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward_op(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    ordinals: Tensor | None,
    keep: Tensor | None,
    num_groups: int,
    silu: bool,
    threshold: int,
    tag: int,
    seed: int,
    with_dadd: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dskip, (dweight, dbias), (dscale, dshift) and dadd per sample; those that do not apply are empty."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    if dtotal is not None:
        dtotal = dtotal.contiguous(memory_format=torch.channels_last)
    tensors = (dy, dtotal, x, weight, bias, add, skip, scale, shift, mean, rstd, ordinals)
    if impl == "reference":
        return _run_reference_backward(
            *tensors, keep, num_groups=num_groups, silu=silu, threshold=threshold, tag=tag, seed=seed,
            with_dadd=with_dadd,
        )  # fmt: skip
    run = _run_native_backward if impl == "native" else launch_group_norm_silu_backward
    return run(*tensors, num_groups=num_groups, silu=silu, threshold=threshold, tag=tag, seed=seed, with_dadd=with_dadd)


@_group_norm_silu_backward_op.register_fake
def _(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    ordinals: Tensor | None,
    keep: Tensor | None,
    num_groups: int,
    silu: bool,
    threshold: int,
    tag: int,
    seed: int,
    with_dadd: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(x, skip, weight.shape[0], scale is not None, with_dadd, mean.dtype)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, bias, add, residual, skip, scale, shift, ordinals, num_groups, _, *settings = inputs
    _, total, mean, rstd, keep = output
    base, kept_add = (x, add) if residual is None else (total, None)
    tensors: tuple[Any, ...] = (base, weight, bias, kept_add, skip, scale, shift, mean, rstd, ordinals, keep)
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    ctx.settings = (num_groups, *settings)  # type: ignore[attr-defined]
    ctx.has_total = residual is not None  # type: ignore[attr-defined]
    ctx.add_kind = None if add is None else (add.dim(), add.dtype)  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor | None, dtotal: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, bias, add, skip, scale, shift, mean, rstd, ordinals, keep = ctx.saved_tensors  # type: ignore[attr-defined]
    num_groups, silu, threshold, tag, seed, impl = ctx.settings  # type: ignore[attr-defined]
    add_kind, needed = ctx.add_kind, ctx.needs_input_grad  # type: ignore[attr-defined]
    if torch.is_grad_enabled():  # as under create_graph=True
        raise RuntimeError("group_norm_silu is differentiable once: a gradient of its gradient is not supported")
    if dy is None:  # only total was used
        dy = empty_images(x, weight.shape[0]).zero_()
    if not ctx.has_total:  # type: ignore[attr-defined]
        dtotal = None  # of an empty tensor
    dx, dskip, daffine, dfilm, dadd = _group_norm_silu_backward_op(
        dy, dtotal, x, weight, bias, add, skip, scale, shift, mean, rstd, ordinals, keep,
        num_groups, silu, threshold, tag, seed, add_kind is not None and needed[3], impl,
    )  # fmt: skip
    dweight, dbias = daffine.sum(0).unbind()
    dscale, dshift = dfilm.unbind(1)
    if add_kind is not None:
        dadd = (dadd.sum(0) if add_kind[0] == 1 else dadd).to(add_kind[1])
    return (
        dx,
        dweight.to(weight.dtype),
        dbias.to(bias.dtype),
        dadd if add_kind is not None and needed[3] else None,
        dx if needed[4] else None,
        dskip if skip is not None else None,
        dscale.to(scale.dtype) if scale is not None else None,
        dshift.to(shift.dtype) if shift is not None else None,
        *[None] * 8,
    )


_group_norm_silu_op.register_autograd(_backward, setup_context=_setup_context)


def _example(case: Case) -> Kwargs:
    """The variant names what is given: add or temb (per sample), film, residual, skip, dropout, norm (no SiLU)."""
    options = case.variant.split("-")
    case = replace(case, channels_last=True)
    num_samples, num_first, height, width = case.shape
    kwargs: Kwargs = {"x": example_floats(case, "x"), "eps": 1e-5, "silu": "norm" not in options}
    num_channels = num_first
    if "skip" in options:
        num_channels += max(1, num_first // 2)
        shape = (num_samples, num_channels - num_first, height, width)
        kwargs["skip"] = example_floats(replace(case, shape=shape), "skip")
    kwargs["num_groups"] = gcd(num_channels, 32)

    def rows(argument: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=case.generator(argument)).to(case.device)

    kwargs["weight"], kwargs["bias"] = 1.0 + 0.3 * rows("weight", num_channels), rows("bias", num_channels)
    if "add" in options:
        kwargs["add"] = rows("add", num_first)
    if "temb" in options:
        kwargs["add"] = rows("add", num_samples, num_first)
    if "film" in options:  # halves of one projection, as a network makes them
        scale, shift = rows("film", num_samples, 2 * num_channels).chunk(2, dim=1)
        kwargs |= {"scale": scale, "shift": shift}
    if "residual" in options:
        kwargs["residual"] = example_floats(case, "residual")
    if "dropout" in options:
        kwargs |= {"p": 0.1, "ordinals": example_ordinals(case), "layer": 21, "seed": 2**62 + case.seed}
    return kwargs


def _example_backward(case: Case) -> Kwargs:
    """`_example` with upstream gradients in the place of what the backward does not read."""
    kwargs = _example(case)
    case = replace(case, channels_last=True)
    num_samples, num_channels = case.shape[0], kwargs["weight"].shape[0]
    kwargs["with_dadd"] = "add" in kwargs
    if kwargs.pop("residual", None) is not None:
        kwargs.pop("add", None)
        kwargs["dtotal"] = example_floats(case, "dtotal")
    kwargs["dy"] = example_floats(replace(case, shape=(num_samples, num_channels, *case.shape[2:])), "dy")
    # Near what the example's statistics are; the backward takes any.
    statistics = torch.rand(2, num_samples, kwargs["num_groups"], generator=case.generator("statistics"))
    kwargs["mean"], kwargs["rstd"] = (statistics.to(case.device) - 0.5)[0], (statistics.to(case.device) + 0.5)[1]
    del kwargs["eps"]
    return kwargs


VARIANTS = ("", "norm", "temb-dropout", "film-dropout", "add-residual", "add-residual-skip", "skip")
GROUP_NORM_SILU = Op(
    "group_norm_silu", group_norm_silu, group_norm_silu_reference, group_norm_silu_triton, _example, VARIANTS, DTYPES
)
GROUP_NORM_SILU_BACKWARD = Op(
    "group_norm_silu_backward",
    group_norm_silu_backward,
    group_norm_silu_backward_reference,
    group_norm_silu_backward_triton,
    _example_backward,
    VARIANTS,
    DTYPES,
)
