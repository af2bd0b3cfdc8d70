"""Geometric augmentation that does not leak into samples: the network is told its parameters (Karras et al. 2022, F.2).

"Elucidating the design space of diffusion-based generative models", appendix F.2 and its table of transformations; what
is done to an image is a function of (seed, ordinal) alone. Each of these happens with probability p, in this order:

    x-flip, y-flip   mirrored left-right, upside down
    turn             by 90, 180 or 270 degrees
    scaling          by 2^(z / 5), z ~ N(0, 1)
    rotation         by an angle uniform over the circle
    anisotropy       by 2^(z / 5) along a direction and 2^(-z / 5) across it, z ~ N(0, 1), direction uniform
    translation      by z_x / 8 of the width and z_y / 8 of the height, z ~ N(0, 1)

and the network is told 9 numbers, all of them 0 for an image to which nothing was done (and in all sampling):

    0, 1   1 if mirrored left-right; 1 if mirrored upside down
    2      z of the scaling
    3, 4   cos - 1 and sin of the angle, counter-clockwise, of turn and rotation together
    5, 6   z of the anisotropy times cos and sin of twice its direction's angle
    7, 8   z_x and z_y of the translation, to the right and downwards

They differ from the paper's table in three points: a flip that happens mirrors (there half of them do nothing), turns
are part of the angle, and the direction's angle is doubled, since a direction and its opposite are one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels import Stream, draw_timesteps, draw_uniform

AUGMENT_PARAMETERS = 9
"""Numbers that describe the augmentation of one image."""
SCALE = 0.2
"""Standard deviation of log2 of the scalings."""
TRANSLATE = 1 / 8
"""Standard deviation of the translation, in widths and heights."""
DRAWS = 14
"""Uniform numbers of one image: each one's place is part of the layout of the streams, and never changes."""
PAD = 64  # whole vectors: at the end of a loop torch's cos and exp may differ in the last bit


@torch.no_grad()
def draw_augmentation(
    ordinals: Tensor, *, seed: int, p: float, size: tuple[int, int], flip: bool = False
) -> tuple[Tensor, Tensor]:
    """What is done to each image, and what the network is told of it.

    Args:
        ordinals: int64 [N], positions of the images in the run's sequence of images.
        seed: the run's, 0 .. 2^63 - 1.
        p: probability of each transformation, 0 .. 1.
        size: height and width of the images in pixels.
        flip: mirror half of the images left-right before anything else, by the coin that TrainingProcess flips; the
            network is not told. (A mirror behind a rotation would make it one the other way round.)

    Returns:
        matrices float32 [N, 2, 3]: where in the image a pixel of the result is found, (x, y) = M[:, :2] (x', y') +
        M[:, 2] in pixels from the middle, to the right and downwards; parameters float32 [N, 9], see the module. Of an
        image to which nothing is done exactly the identity and zeros. The same numbers for an ordinal in any batch. No
        gradients; the host does not wait for the device.
    """
    num = ordinals.shape[0]
    uniform = F.pad(draw_uniform(ordinals, DRAWS, seed=seed, stream=Stream.AUGMENT), (0, 0, 0, -num % PAD))
    if uniform.device.type == "mps":  # has no float64
        uniform = uniform.cpu()
    # By draw, float64 [N]: one rounding to float32 at the end leaves no trace of a device's own cos and exp.
    u = uniform.double().T.contiguous().unbind()

    def happens(gate: int, value: Tensor) -> Tensor:
        return torch.where(u[gate] < p, value, 0.0)

    one = torch.ones_like(u[0])
    x_flip, y_flip = happens(0, one), happens(1, one)
    quarters = happens(2, (3 * u[3]).floor() + 1)
    scaling = happens(4, _normal(u[5]))
    angle = happens(6, math.pi * (2 * u[7] - 1))
    direction, squeeze = 2 * math.pi * u[9], happens(8, _normal(u[10]))
    right, down = happens(11, _normal(u[12])), happens(11, _normal(u[13]))

    # cos and sin of a turn are whole numbers: rounded ones would make a turned image a blurred one.
    turn_cos, turn_sin = _is(quarters, 0) - _is(quarters, 2), _is(quarters, 1) - _is(quarters, 3)
    cos = turn_cos * angle.cos() - turn_sin * angle.sin()
    sin = turn_sin * angle.cos() + turn_cos * angle.sin()
    squeeze_x, squeeze_y = squeeze * direction.cos(), squeeze * direction.sin()
    parameters = torch.stack((x_flip, y_flip, scaling, cos - 1, sin, squeeze_x, squeeze_y, right, down), dim=1)

    # The way back from the result: translation, anisotropy, angle, scaling, flips undone. Anisotropy is the exponential
    # of the matrix k ((cos, sin), (sin, -cos)) of twice the direction's angle, k = ln(2) z / 5.
    k = math.log(2) * SCALE * squeeze
    stretch, shear = -k.sinh() * direction.cos(), -k.sinh() * direction.sin()
    zoom = torch.exp2(-SCALE * scaling)
    zoom_x, zoom_y = zoom * (1 - 2 * x_flip), zoom * (1 - 2 * y_flip)
    xx = zoom_x * (cos * (k.cosh() + stretch) - sin * shear)
    xy = zoom_x * (cos * shear - sin * (k.cosh() - stretch))
    yx = zoom_y * (sin * (k.cosh() + stretch) + cos * shear)
    yy = zoom_y * (sin * shear + cos * (k.cosh() - stretch))
    dx, dy = right * (TRANSLATE * size[1]), down * (TRANSLATE * size[0])
    matrices = torch.stack((xx, xy, -(xx * dx + xy * dy), yx, yy, -(yx * dx + yy * dy)), dim=1)
    # + 0.0: no negative zeros.
    matrices, parameters = ((x[:num] + 0.0).to(ordinals.device, torch.float32) for x in (matrices, parameters))
    matrices = matrices.view(num, 2, 3)
    if flip:
        coin = draw_timesteps(ordinals, 1, seed=seed)[1]
        matrices[:, 0] = torch.where(coin[:, None], -matrices[:, 0], matrices[:, 0])
    return matrices, parameters


def _normal(u: Tensor) -> Tensor:
    """N(0, 1) of the middle of one of 2^24 equal intervals: the inverse of its distribution function, |z| < 5.5."""
    return math.sqrt(2) * torch.erfinv(2 * u - (1 - 2.0**-24))


def _is(x: Tensor, value: int) -> Tensor:
    return (x == value).to(x.dtype)


@torch.no_grad()
def apply_augmentation(images: Tensor, matrices: Tensor) -> Tensor:
    """The transformed images, by cubic convolution (Keys 1981, a = -1/2), mirrored beyond their edges.

    A pixel of the result stands for more than a pixel of an image that is made smaller: such images are smoothed first,
    by the variance that its footprint has above a pixel's, along the directions in which they shrink. Flips, turns (of
    square images), shifts by whole pixels, and nothing at all, are exact: the weights are then whole numbers.

    Args:
        images: [N, C, H, W] uint8 (taken as x/127.5 - 1) or float in -1 .. 1.
        matrices: float32 [N, 2, 3] as draw_augmentation returns them.

    Returns:
        float32 [N, C, H, W] in -1 .. 1, in the images' memory order. Each image depends on itself and its matrix alone.
        No gradients; the host does not wait for the device.
    """
    num, channels, height, width = images.shape
    x = images.to(torch.float32)
    if images.dtype == torch.uint8:
        x = x.div_(127.5).sub_(1.0)
    planes = _smoothed(x.contiguous(), matrices).view(num, channels, height * width)
    xs = torch.arange(width, device=x.device).repeat(height) - (width - 1) / 2
    ys = torch.arange(height, device=x.device)[:, None].expand(-1, width).reshape(-1) - (height - 1) / 2
    xx, xy, x_0, yx, yy, y_0 = (entry[:, None] for entry in matrices.reshape(num, 6).unbind(1))
    source_x = xx * xs + xy * ys + x_0 + (width - 1) / 2  # [N, H W] in pixels from the first
    source_y = yx * xs + yy * ys + y_0 + (height - 1) / 2
    column, row = source_x.floor(), source_y.floor()
    weights_x, weights_y = _cubic(source_x - column), _cubic(source_y - row)
    columns = [_mirrored(column.to(torch.int64) + i, width) for i in range(-1, 3)]
    rows = [_mirrored(row.to(torch.int64) + i, height) * width for i in range(-1, 3)]
    result = torch.zeros_like(planes)
    for start, weight_y in zip(rows, weights_y, strict=True):
        line = torch.zeros_like(planes)
        for place, weight_x in zip(columns, weights_x, strict=True):
            line += planes.gather(2, (start + place)[:, None].expand(-1, channels, -1)) * weight_x[:, None]
        result += line * weight_y[:, None]
    return torch.empty_like(images, dtype=torch.float32).copy_(result.clamp_(-1, 1).view(images.shape))


def _cubic(f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the pixels at -1, 0, 1, 2 for a place f in [0, 1): 0, 1, 0, 0 exactly for f = 0. They add up to 1."""
    g = 1 - f
    return -0.5 * f * g * g, 1 - f * f * (2.5 - 1.5 * f), f * (0.5 + f * (2 - 1.5 * f)), -0.5 * f * f * g


def _mirrored(i: Tensor, count: int) -> Tensor:
    """Index in 0 .. count - 1 of pixel i of an image continued by its mirror images, the edge not repeated."""
    period = max(2 * (count - 1), 1)
    i = i.remainder(period)
    return torch.minimum(i, period - i) if count > 1 else i


def _smoothed(x: Tensor, matrices: Tensor) -> Tensor:
    """x [N, C, H, W] smoothed by the covariance (M M^T - I)+ / 6, as one step of the heat equation.

    A pixel is taken as a tent (the weights of linear interpolation) of variance 1/6 in each direction, so its footprint
    in the image has the covariance M M^T / 6: what that has more is to be smoothed away, or it would alias.
    x + (C_xx d_xx + C_yy d_yy) x / 2 + C_xy d_xy x with central differences adds C to the variance of every point, and
    nothing where C is 0; halved in one direction, an image loses its finest stripes across it exactly.
    """
    (xx, xy, _), (yx, yy, _) = (row.unbind(-1) for row in matrices.unbind(-2))
    mean, half = (xx * xx + xy * xy + yx * yx + yy * yy) / 2 - 1, (xx * xx + xy * xy - yx * yx - yy * yy) / 2
    across = xx * yx + xy * yy
    radius = (half * half + across * across).sqrt()
    larger, smaller = (mean + radius).clamp(min=0), (mean - radius).clamp(min=0)
    # 1/6, but at most a variance of 1/2 in all: beyond that the finest pattern would come out as its negative.
    factor = 0.5 / (larger + smaller).clamp(min=3.0)
    tilt = (larger - smaller) / (2 * radius.clamp(min=1e-30))
    c_xx = factor * ((larger + smaller) / 2 + tilt * half)
    c_yy = factor * ((larger + smaller) / 2 - tilt * half)
    c_xy = factor * tilt * across

    def shifted(image: Tensor, dim: int, by: int) -> Tensor:
        count = image.shape[dim]
        return image.index_select(dim, _mirrored(torch.arange(by, count + by, device=image.device), count))

    left, right = shifted(x, 3, -1), shifted(x, 3, 1)
    d_xx = left + right - 2 * x
    d_yy = shifted(x, 2, -1) + shifted(x, 2, 1) - 2 * x
    slope = (right - left) / 2
    d_xy = (shifted(slope, 2, 1) - shifted(slope, 2, -1)) / 2
    c_xx, c_yy, c_xy = (c[:, None, None, None] for c in (c_xx, c_yy, c_xy))
    smoothed: Tensor = x + (c_xx * d_xx + c_yy * d_yy) / 2 + c_xy * d_xy
    return smoothed
