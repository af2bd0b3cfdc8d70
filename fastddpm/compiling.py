"""What --compile does to a network: compiled blocks on a GPU, the kernels package's compiled loops on a CPU."""

import torch
from torch import nn

import fastddpm_kernels

from .blocks import Attention, ResnetBlock
from .errors import ConfigError
from .unet import UNet

RECOMPILE_LIMIT = 64  # shapes of blocks in one net: torch's 8 would leave the rest uncompiled without a word


def compile_unet(unet: UNet) -> str:
    """Compile a net in place, its names and state dict unchanged; returns what was done, in words.

    On a GPU the residual blocks and attentions are compiled one by one (blocks of the same shapes share a compilation,
    so it takes seconds) by torch.compile, in which our kernels are single operators. On a CPU, where torch.compile was
    measured to lose against torch's own kernels, norms and activations become loops compiled by the machine's C++
    compiler.

    Raises:
        ConfigError: if there is no compiler.
    """
    if unet.device.type == "cpu":
        reason = fastddpm_kernels.native_available()
        if reason is not None:
            raise ConfigError(f"--compile: {reason}; leave out --compile")
        unet.shared.impl = "native"
        return "norms and activations as C++ loops of this machine's compiler"
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock | Attention)]
    for module in blocks:
        _compile(module)
    return f"{len(blocks)} residual blocks and attentions by torch.compile"


def _compile(module: nn.Module) -> None:
    try:
        module.compile(dynamic=False)
    except RuntimeError as error:
        raise ConfigError(f"--compile: torch.compile cannot run here: {error}; leave out --compile") from error
