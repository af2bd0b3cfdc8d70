"""What --compile does to a network: compiled blocks on a GPU, the kernels package's compiled loops on a CPU."""

import torch

import fastddpm_kernels

from .blocks import Attention, ResnetBlock
from .errors import ConfigError
from .unet import UNet

RECOMPILE_LIMIT = 256  # compilations of one forward: torch's 8 are fewer than a net's blocks of different shapes


def compile_unet(unet: UNet) -> str:
    """Compile a net in place, its names and state dict unchanged; returns what was done, in words.

    On a GPU the residual blocks and attentions are compiled one by one by torch.compile, in which our kernels are
    single operators: seconds where compiling the whole net takes minutes. On a CPU, where torch.compile was measured
    to lose against torch's own kernels, norms and activations become loops compiled by the machine's C++ compiler.

    Raises:
        ConfigError: if there is no compiler.
    """
    if unet.device.type == "cpu":
        reason = fastddpm_kernels.native_available()
        if reason is not None:
            raise ConfigError(f"--compile: {reason}; leave out --compile")
        unet.shared.impl = "native"
        return "norms and activations as C++ loops of this machine's compiler"
    return f"{compile_blocks(unet)} residual blocks and attentions by torch.compile"


def compile_blocks(unet: UNet, backend: str = "inductor") -> int:
    """torch.compile for each residual block and attention, in place; returns how many.

    Those of the same shapes share a compilation, unless they drop activations: their masks differ by the layer's
    number, which is compiled in.
    """
    if backend == "inductor" and unet.device.type == "cuda" and not fastddpm_kernels.HAS_TRITON:
        raise ConfigError(
            "--compile: torch.compile needs the triton package on a GPU: install it, or leave out --compile"
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock | Attention)]
    for module in blocks:
        module.compile(dynamic=False, fullgraph=True, backend=backend)
    return len(blocks)
