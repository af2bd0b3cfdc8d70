"""Triton where it is installed, else stand-ins that let the modules import (the references need torch only)."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    def _jit(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        """Stand-in for triton.jit: leaves the source in place; `resolve_impl` refuses to launch it."""
        return _jit if function is None else function

    triton = SimpleNamespace(jit=_jit)
    tl = SimpleNamespace(constexpr=lambda value: value)


def interpreting() -> bool:
    """True when Triton runs its kernels in the interpreter (TRITON_INTERPRET=1), which takes CPU tensors."""
    if not HAS_TRITON:
        return False
    knobs = getattr(triton, "knobs", None)
    if knobs is not None:
        return bool(knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
