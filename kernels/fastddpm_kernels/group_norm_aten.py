"""group_norm_silu of torch's own operators, differentiated by autograd: what a CPU without a compiler runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import dropout, dropout_threshold


def group_norm_silu_aten(
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
    """`group_norm_silu` as torch would compute it; statistics in fp32 inside torch's kernel."""
    offset = None if add is None else add[:, :, None, None] if add.ndim == 2 else add[:, None, None]
    if residual is None and skip is None and offset is not None and x.numel():
        # One pass for the addition and for what _centred does.
        h = x + (offset - _one_of_each_group(x, num_groups, offset)).to(x.dtype)
    else:
        total = x if residual is None else x + residual
        if offset is not None:
            total = total + offset.to(x.dtype)
        h = _centred(total if skip is None else torch.cat((total, skip), dim=1), num_groups)
    if torch.is_grad_enabled() and weight.requires_grad and not h.requires_grad:
        h = h.detach().requires_grad_()  # torch's channels_last backward for the parameters alone crashes
    y = F.group_norm(h, num_groups, weight, bias, eps) if h.numel() else h
    if scale is not None and shift is not None:
        y = torch.addcmul(shift[:, :, None, None].to(x.dtype), y, (1.0 + scale)[:, :, None, None].to(x.dtype))
    if silu:
        y = F.silu(y)
    if ordinals is not None and dropout_threshold(p) > 0:
        y = dropout(y, p, ordinals, layer=layer, seed=seed)
    return y if residual is None else (y, total)


def _centred(x: Tensor, num_groups: int) -> Tensor:
    """x less one of its own values in each group, to which the norm is blind but its channels_last kernel is not.

    That kernel takes the variance as E[x^2] - E[x]^2, which at mean 100 and standard deviation 0.1 leaves nothing of
    fp32 (error 355 where 1 is large). Near values differ exactly in every dtype.
    """
    return x - _one_of_each_group(x, num_groups).to(x.dtype) if x.numel() else x


def _one_of_each_group(x: Tensor, num_groups: int, offset: Tensor | None = None) -> Tensor:
    """[N, C, 1, 1]: for each channel the first value of its group, in x + offset; no gradient."""
    first = x.detach()[:, :, :1, :1]
    if offset is not None:
        first = first + offset.detach()
    size = x.shape[1] // num_groups
    return first[:, ::size].repeat_interleave(size, dim=1)
