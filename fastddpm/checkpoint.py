"""Checkpoints: safetensors and JSON, complete or absent, verified on load; no pickle.

RUN/checkpoints/step-00001000/ holds model, ema and optimizer tensors, state.json and a manifest of sha256 sums. It is
written under a temporary name, fsynced and renamed, so a kill at any instant leaves the older ones as they were.
"""

import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .diffusion import STREAM_VERSION
from .errors import CheckpointError
from .files import sha256, sync, write_json
from .optim import as_line

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_ATTEMPT = itertools.count()


@dataclass
class State:
    """What a run needs to go on exactly: tensors on the host and a few numbers."""

    step: int
    """Optimiser steps done."""
    samples_seen: int
    """Images consumed: the position in the training sequence, and the whole state of the data."""
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """Moments by "parameter name/moment name"."""
    scaler: dict[str, float] = field(default_factory=dict)
    """fp16's loss scale; empty otherwise."""


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: list[str], weights: list[nn.Parameter]
) -> dict[str, Tensor]:
    """Moments in the shapes of the weights, whose memory is what the optimiser's one group holds, line by line."""
    tensors = {}
    for name, weight, line in zip(names, weights, optimizer.param_groups[0]["params"], strict=True):
        for key, value in optimizer.state.get(line, {}).items():
            value = value.detach()
            tensors[f"{name}/{key}"] = value if key == "step" else value.as_strided(weight.shape, weight.stride())
    return tensors


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], weights: list[nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put saved moments, of whatever memory order, back in their weights' order."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        by_parameter.setdefault(name, {})[kind] = value
    group = optimizer.param_groups[0]
    for name, weight, line in zip(names, weights, group["params"], strict=True):
        for kind, value in by_parameter.get(name, {}).items():
            if kind == "step":  # on the host, except where the fused optimiser wants it beside the parameter
                beside = group.get("fused") or group.get("capturable")
                moment = value.clone().to(line.device if beside else "cpu")
            else:
                moment = as_line(torch.empty_like(weight).copy_(value).detach())
            optimizer.state[line][kind] = moment


def load_into(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Copy tensors into a module's parameters in place, strides kept.

    Raises:
        CheckpointError: if names or shapes differ (the first few are named).
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if missing or unexpected or shapes:
        parts = []
        if missing:
            parts.append(f"{len(missing)} tensors are missing ({', '.join(missing[:2])}, ...)")
        if unexpected:
            parts.append(f"{len(unexpected)} are not of this net ({', '.join(unexpected[:2])}, ...)")
        if shapes:
            parts.append(f"{len(shapes)} have another shape ({sorted(shapes)[0]})")
        raise CheckpointError(f"{what} is of another architecture: {'; '.join(parts)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file, on the host.

    Raises:
        CheckpointError: naming the file, if it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path, keep: int = 3) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep

    def all(self) -> list[Path]:
        """Committed checkpoints, oldest first, verified or not."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)

    def save(self, state: State) -> Path:
        """Commit a checkpoint and prune older ones; returns its folder.

        Raises:
            CheckpointError: if it cannot be written (a full disk, say); older checkpoints are untouched.
        """
        target = self.folder / f"step-{state.step:08d}"
        temporary = self.folder / f".writing-{os.getpid()}-{next(_ATTEMPT)}"
        try:
            temporary.mkdir(parents=True)
            for name, tensors in (("model", state.model), ("ema", state.ema), ("optimizer", state.optimizer)):
                # save_file refuses strided tensors; a copy to the host in plain order also makes the file canonical.
                save_file(
                    {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / f"{name}.safetensors"
                )
            facts = {
                "format": FORMAT,
                "stream_version": STREAM_VERSION,
                "step": state.step,
                "samples_seen": state.samples_seen,
                "scaler": state.scaler,
            }
            (temporary / "state.json").write_text(json.dumps(facts, indent=2) + "\n")
            files = sorted(temporary.iterdir())
            for path in files:
                sync(path)
            write_json(temporary / "manifest.json", {path.name: sha256(path) for path in files})
            if target.exists():
                # Left by a start that lost faith in it (it no longer verified): out of the way, then gone.
                target.rename(self.folder / f".old-{os.getpid()}-{next(_ATTEMPT)}")
            temporary.rename(target)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"checkpoint {target} cannot be written: {error}") from error
        self._prune(state.step)
        return target

    def _prune(self, newest: int) -> None:
        """Delete all but the last `keep` up to step `newest`."""
        for path in [path for path in self.all() if _step_of(path) <= newest][: -self.keep]:
            # Renamed first: a kill in the middle of the deletion must not leave half a checkpoint under its name.
            path.rename(doomed := self.folder / f".old-{os.getpid()}-{next(_ATTEMPT)}")
            shutil.rmtree(doomed, ignore_errors=True)
        self.sweep()

    def set_aside(self, paths: Iterable[Path]) -> None:
        """Rename checkpoints that do not verify, so that they neither count nor are lost."""
        for path in paths:
            path.rename(path.with_name(f"refused-{path.name}-{uuid.uuid4().hex[:4]}"))

    def sweep(self) -> None:
        """Delete what killed processes left half written or half deleted."""
        for pattern in (".writing-*", ".old-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def verify(self, path: Path) -> str | None:
        """Why a checkpoint cannot be trusted, or None if every byte is as written."""
        try:
            manifest: dict[str, str] = json.loads((path / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            return f"its manifest cannot be read: {error}"
        if not isinstance(manifest, dict):
            return "its manifest is not a table of files"
        for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"):
            if name not in manifest:
                return f"its manifest does not name {name}"
        for name, digest in manifest.items():
            try:
                if sha256(path / name) != digest:
                    return f"{name} is not what was written (another sha256)"
            except OSError as error:
                return f"{name} cannot be read: {error}"
        return None

    def newest(self) -> tuple[Path, dict[Path, str]] | None:
        """The newest checkpoint that verifies, and the newer ones that do not with why; None if there are none.

        Raises:
            CheckpointError: if there are some but none verifies: starting again at step 0 would throw a run away.
        """
        refused: dict[Path, str] = {}
        found = self.all()
        for path in reversed(found):
            reason = self.verify(path)
            if reason is None:
                return path, refused
            refused[path] = reason
        if not found:
            return None
        reasons = "; ".join(f"{path}: {reason}" for path, reason in refused.items())
        raise CheckpointError(
            f"no checkpoint can be trusted ({reasons}); restore one, or choose another --run to start afresh"
        )

    def load(self, path: Path) -> State:
        """Read a checkpoint.

        Raises:
            CheckpointError: if it was written by another format or noise layout, or cannot be read.
        """
        facts: dict[str, Any] = json.loads((path / "state.json").read_text())
        for name, ours in (("format", FORMAT), ("stream_version", STREAM_VERSION)):
            if facts.get(name) != ours:
                raise CheckpointError(
                    f"{path} has {name} {facts.get(name)} and this version of fastddpm {ours}: go on with the version "
                    "that wrote it"
                )
        tensors = {name: read_safetensors(path / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}
        return State(facts["step"], facts["samples_seen"], **tensors, scaler=facts["scaler"])
