"""Checkpoints: safetensors and JSON, complete or absent, verified on load; no pickle.

RUN/checkpoints/step-00001000/ holds model, ema and optimizer tensors, state.json and a manifest of sha256 sums. It is
written under a temporary name, fsynced and renamed, so a kill at any instant leaves the older ones as they were.

A sharded run (sharding.py) writes one file of each kind per process, model-00001-of-00002.safetensors and so on: rows
of every tensor, and in the file's header which rows of what shape. Any number of processes reads either layout, each
the rows that it holds and no others. torch's own distributed checkpoints are not used: their default reader unpickles,
and their safetensors reader takes every file that lies in the folder and leaves rows that none of them has as they
were in memory.
"""

import itertools
import json
import math
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .diffusion import STREAM_VERSION
from .errors import CheckpointError
from .files import sha256, sync, write_json
from .optim import as_line
from .sharding import Alone, Peers, Rows, local

FORMAT = 2
PARTS = ("model", "ema", "optimizer")
ROWS = "fastddpm.rows"  # key in a safetensors header: {tensor: [first row, *shape of the whole tensor]} as JSON
MAX_FILES = 1 << 16
_NAME = re.compile(r"step-(\d{8,})")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a file in the folder itself
_ATTEMPT = itertools.count()
T = TypeVar("T")


@dataclass
class State:
    """What a run needs to go on exactly: tensors and a few numbers."""

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
    facts: dict[str, Any] = field(default_factory=dict)
    """What the run has counted so far, as plain JSON values."""
    rows: dict[str, Rows] = field(default_factory=dict)
    """By parameter name, which rows the tensors are; empty: they are whole (see sharding.rows)."""


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: list[str], weights: list[nn.Parameter]
) -> dict[str, Tensor]:
    """Moments in the shapes of the weights, whose memory is what the optimiser's one group holds, line by line.

    Of a sharded net: in the shapes of the rows that this process holds.
    """
    tensors = {}
    for name, whole, line in zip(names, weights, optimizer.param_groups[0]["params"], strict=True):
        weight = local(whole)
        for key, value in optimizer.state.get(line, {}).items():
            value = value.detach()
            tensors[f"{name}/{key}"] = value if key == "step" else value.as_strided(weight.shape, weight.stride())
    return tensors


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], weights: list[nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put saved moments, of whatever memory order, back in their weights' order.

    Raises:
        CheckpointError: naming a moment that is missing, unknown or of another shape than its weight.
    """
    kinds = sorted({key.rpartition("/")[2] for key in tensors})
    expected = {f"{name}/{kind}" for name in names for kind in kinds}
    for key in sorted(expected ^ tensors.keys())[:1]:
        raise CheckpointError(
            f"the optimiser's {key} is {'missing' if key in expected else 'of no weight of this net'}"
        )
    group = optimizer.param_groups[0]
    for name, whole, line in zip(names, weights, group["params"], strict=True):
        weight = local(whole)
        for kind in kinds:
            value = tensors[f"{name}/{kind}"]
            if value.shape != (shape := () if kind == "step" else weight.shape):
                raise CheckpointError(f"the optimiser's {name}/{kind} is {tuple(value.shape)}, not {tuple(shape)}")
            if kind == "step":  # on the host, except where the fused optimiser wants it beside the parameter
                beside = group.get("fused") or group.get("capturable")
                moment = value.clone().to(line.device if beside else "cpu")
            else:
                moment = as_line(torch.empty_like(weight).copy_(value))
            optimizer.state[line][kind] = moment


def load_into(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Copy tensors into a module's parameters in place, strides kept; a sharded module takes its rows of them.

    Raises:
        CheckpointError: if names or shapes differ (the first few are named).
    """
    own = {name: local(tensor) for name, tensor in module.state_dict().items()}
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


def file_names(part: str, processes: int) -> list[str]:
    """The safetensors files of "model", "ema" or "optimizer", by rank of the process that wrote them."""
    if processes == 1:
        return [f"{part}.safetensors"]
    return [f"{part}-{rank + 1:05d}-of-{processes:05d}.safetensors" for rank in range(processes)]


def _parameter_of(part: str, key: str) -> str:
    return key.rpartition("/")[0] if part == "optimizer" else key


def _write_part(path: Path, part: str, tensors: dict[str, Tensor], rows: Mapping[str, Rows], rank: int) -> None:
    """One process's file. What has no rows is the same on all processes, and written by the first."""
    header: dict[str, list[int]] = {}
    written = {}
    for key, tensor in tensors.items():
        held = rows.get(_parameter_of(part, key)) if tensor.ndim else None
        if rank > 0 if held is None else held.start == held.stop:
            continue
        # save_file refuses strided tensors; a copy to the host in plain order also makes the file canonical.
        written[key] = local(tensor).cpu().contiguous()
        if held is not None:
            header[key] = [held.start, *held.shape]
    save_file(written, path, metadata={ROWS: json.dumps(header)} if header else None)


class _Part:
    """The tensors of one part of a checkpoint, put together from the files of all processes that wrote it."""

    def __init__(self, folder: Path, part: str, processes: int, stack: ExitStack) -> None:
        self.folder, self.part = folder, part
        self.pieces: dict[str, list[tuple[int, int, Any]]] = {}  # first row, row after the last, file
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in file_names(part, processes):
            try:
                file = stack.enter_context(safe_open(folder / name, framework="pt", device="cpu"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
            header = json.loads((file.metadata() or {}).get(ROWS, "{}"))
            for key in file.keys():  # noqa: SIM118 (not a dict)
                shape = tuple(file.get_slice(key).get_shape())
                start, *whole = header.get(key, (0, *shape))
                if tuple(whole) != self.shapes.setdefault(key, tuple(whole)) or tuple(whole[1:]) != shape[1:]:
                    raise ValueError(f"its files disagree on the shape of {key}")
                self.pieces.setdefault(key, []).append((start, start + (shape or (1,))[0], file))
        for key, pieces in self.pieces.items():
            pieces.sort(key=lambda piece: piece[:2])
            done = 0
            for start, stop, _ in pieces:
                if start != done:
                    raise ValueError(
                        f"rows {min(start, done)} to {max(start, done)} of {key} are missing or there twice"
                    )
                done = stop
            if done != (self.shapes[key] or (1,))[0]:
                raise ValueError(f"of the {self.shapes[key][0]} rows of {key} there are {done}")

    def read(self, rows: Mapping[str, Rows]) -> dict[str, Tensor]:
        """All tensors, or of those that `rows` names these rows."""
        return {key: self._read(key, rows.get(_parameter_of(self.part, key))) for key in self.pieces}

    def _read(self, key: str, wanted: Rows | None) -> Tensor:
        pieces, shape = self.pieces[key], self.shapes[key]
        if wanted is None or not shape:
            if len(pieces) == 1:
                whole: Tensor = pieces[0][2].get_tensor(key)
                return whole
            wanted = Rows(0, shape[0], shape)
        if wanted.shape != shape:
            where = self.folder / f"{self.part}.safetensors"
            raise CheckpointError(f"{where} is of another architecture: {key} is {shape}, not {wanted.shape}")
        result: Tensor | None = None
        for start, stop, file in pieces:
            first, last = max(start, wanted.start), min(stop, wanted.stop)
            if first >= last and result is not None:
                continue
            some = file.get_slice(key)[max(first - start, 0) : max(last - start, 0)]
            if result is None:
                result = some.new_empty((wanted.stop - wanted.start, *shape[1:]))
            if first < last:
                result[first - wanted.start : last - wanted.start] = some
        assert result is not None
        return result


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_scaler(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(number, int | float) and math.isfinite(number) for number in value.values()
    )


def _is_file_count(value: Any) -> bool:
    return _is_count(value) and 1 <= value <= MAX_FILES


FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "samples_seen": _is_count,
    "processes": _is_file_count,
    "scaler": _is_scaler,
    "facts": _is_table,
}


def _read_json(path: Path) -> dict[str, Any]:
    """A table. Raises CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} cannot be read: it is no table")
    return value


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        keep: how many are left after a newer one is committed.
        peers: of a sharded run: the processes that save together. `save` is then called on all of them with the same
            step, and what fails on one fails on all.
    """

    def __init__(self, run: Path, keep: int = 3, peers: Peers | Alone | None = None) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep
        self.spared: int | None = None
        """Step of a checkpoint that is kept besides."""
        self.peers = peers or Alone()

    def all(self) -> list[Path]:
        """Committed checkpoints, oldest first, verified or not."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)

    def save(self, state: State) -> Path:
        """Commit a checkpoint and prune older ones; returns its folder.

        Raises:
            CheckpointError: if it cannot be written (a full disk, say), on all processes that save together; older
                checkpoints are untouched.
        """
        peers = self.peers
        target = self.folder / f"step-{state.step:08d}"
        temporary = self.folder / f".writing-{os.getpid()}-{next(_ATTEMPT)}"

        def make() -> str | None:
            if peers.rank > 0:
                return None
            temporary.mkdir(parents=True)
            return temporary.name

        def write() -> dict[str, str]:
            paths = [temporary / file_names(part, peers.world)[peers.rank] for part in PARTS]
            for path, part, tensors in zip(paths, PARTS, (state.model, state.ema, state.optimizer), strict=True):
                _write_part(path, part, tensors, state.rows, peers.rank)
                sync(path)
            return {path.name: sha256(path) for path in paths}

        def commit() -> None:
            if peers.rank > 0:
                return
            values = {
                "format": FORMAT,
                "stream_version": STREAM_VERSION,
                "step": state.step,
                "samples_seen": state.samples_seen,
                "processes": peers.world,
                "scaler": state.scaler,
                "facts": state.facts,
            }
            path = temporary / "state.json"
            path.write_text(json.dumps(values, indent=2) + "\n")
            sync(path)
            manifest[path.name] = sha256(path)
            write_json(temporary / "manifest.json", dict(sorted(manifest.items())))
            if target.exists():
                # Left by a start that lost faith in it (it no longer verified): out of the way, then gone.
                target.rename(self.folder / f".old-{os.getpid()}-{next(_ATTEMPT)}")
            temporary.rename(target)
            sync(self.folder)

        try:
            temporary = self.folder / str(self._together(make)[0])
            manifest = {name: digest for digests in self._together(write) for name, digest in digests.items()}
            self._together(commit)
        except (OSError, CheckpointError) as error:
            if peers.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"checkpoint {target} cannot be written: {error}") from error
        if peers.rank == 0:
            self._prune(state.step)
        return target

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Results of an action on each process. Raises CheckpointError on all of them where one fails."""
        result, failure, cause = None, None, None
        try:
            result = action()
        except Exception as error:  # whatever it is: the others wait for this process's word
            cause = error
            failure = str(error) if isinstance(error, OSError | CheckpointError) else f"{type(error).__name__}: {error}"
        try:
            told = self.peers.exchange((result, failure))
        except RuntimeError as error:
            raise CheckpointError(f"the processes that save together have lost each other: {error}") from error
        failures = [
            text if self.peers.world == 1 else f"process {rank}: {text}"
            for rank, (_, text) in enumerate(told)
            if text is not None
        ]
        if failures:
            raise CheckpointError("; ".join(failures)) from cause
        return [value for value, _ in told]  # type: ignore[misc]

    def _prune(self, newest: int) -> None:
        """Delete all but the last `keep` up to step `newest`; what cannot be deleted stays."""
        with suppress(OSError):  # the new one is committed, and the next save tries again
            for path in [path for path in self.all() if _step_of(path) <= newest][: -self.keep]:
                if _step_of(path) == self.spared:
                    continue
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
        """Why a checkpoint cannot be trusted, or None if every byte is as written.

        Files that the manifest does not name are not read by anything, and no reason.
        """
        try:
            manifest = _read_json(path / "manifest.json")
        except CheckpointError as error:
            return f"its manifest cannot be trusted: {error}"
        for name, digest in manifest.items():
            if not _PLAIN_NAME.fullmatch(name) or (path / name).is_symlink():
                return f"its manifest names {name!r}, which is not a plain file of the folder"
            try:
                if sha256(path / name) != digest:
                    return f"{name} is not what was written (another sha256)"
            except OSError as error:
                return f"{name} cannot be read: {error}"
        if "state.json" not in manifest:
            return "its manifest does not name state.json"
        try:
            processes = _read_json(path / "state.json").get("processes", 1)
        except CheckpointError as error:
            return str(error)
        if not _is_file_count(processes):
            return f"state.json has processes {processes!r}"
        for name in (name for part in PARTS for name in file_names(part, processes)):
            if name not in manifest:
                return f"its manifest does not name {name}"
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

    def load(self, path: Path, rows: Mapping[str, Rows] | None = None) -> State:
        """Read a checkpoint, whatever number of processes wrote it.

        Args:
            rows: what a process of a sharded run holds (sharding.rows); only that is read. None or empty: everything.

        Raises:
            CheckpointError: if it was written by another format or noise layout, or cannot be read.
        """
        values = _state_values(path)
        with self._parts(path, values["processes"], PARTS) as parts:
            tensors = {part.part: part.read(rows or {}) for part in parts}
        return State(
            values["step"],
            values["samples_seen"],
            **tensors,
            scaler=values["scaler"],
            facts=values["facts"],
            rows=dict(rows or {}),
        )

    def tensors(self, path: Path, part: str) -> dict[str, Tensor]:
        """All of "model", "ema" or "optimizer" of a checkpoint, on the host; one process is enough.

        Raises:
            CheckpointError: as load does.
        """
        with self._parts(path, _state_values(path)["processes"], (part,)) as parts:
            return parts[0].read({})

    @contextmanager
    def _parts(self, path: Path, processes: int, names: Iterable[str]) -> Iterator[list[_Part]]:
        try:
            with ExitStack() as stack:
                yield [_Part(path, name, processes, stack) for name in names]
        except (OSError, SafetensorError, ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
            # Whatever a header holds that this version did not write: types are not checked one by one.
            raise CheckpointError(f"{path} cannot be read: {error}") from error


def _state_values(path: Path) -> dict[str, Any]:
    values = _read_json(path / "state.json")
    for name, ours in (("format", FORMAT), ("stream_version", STREAM_VERSION)):
        if values.get(name) != ours:
            raise CheckpointError(
                f"{path} has {name} {values.get(name)!r} and this version of fastddpm {ours}: go on with the version "
                "that wrote it"
            )
    for name, fits in FIELDS.items():
        if not fits(values.get(name)):
            raise CheckpointError(f"{path / 'state.json'} has {name} {values.get(name)!r}, which cannot be")
    return values


def snapshot(state: State) -> State:
    """A copy of a state on the host, which training does not change."""

    def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: local(tensor).to("cpu", copy=True) for name, tensor in tensors.items()}

    facts = json.loads(json.dumps(state.facts))
    model, ema, optimizer = copied(state.model), copied(state.ema), copied(state.optimizer)
    return replace(state, model=model, ema=ema, optimizer=optimizer, scaler=dict(state.scaler), facts=facts)


class AsyncWriter:
    """Writes checkpoints beside training, one at a time, from a copy in the host's memory.

    Args:
        checkpoints: commits them, by the same code as without this.
        on_commit: called in the writer's thread with each checkpoint's state and folder once it is committed.
    """

    def __init__(self, checkpoints: Checkpoints, on_commit: Callable[[State, Path], None] | None = None) -> None:
        self.checkpoints = checkpoints
        self.on_commit = on_commit
        self.committed: int | None = None
        """Step of the newest checkpoint that this writer has committed: a kill from then on does not lose it."""
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, state: State) -> None:
        """Copy the state and begin to write it, once the one before is committed; training may go on at once.

        Raises:
            CheckpointError: that the one before could not be written.
        """
        self.drain()
        # No daemon: a process that ends waits for it, however it ends short of being killed.
        self._thread = threading.Thread(target=self._write, args=(snapshot(state),), name="checkpoint writer")
        self._thread.start()

    def _write(self, state: State) -> None:
        try:
            path = self.checkpoints.save(state)
            self.committed = state.step
            if self.on_commit is not None:
                self.on_commit(state, path)
        except Exception as error:
            self._error = error

    def wait(self) -> None:
        """Wait until nothing is being written, whatever came of it."""
        if self._thread is not None:
            self._thread.join()

    def drain(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: that it could not be written; once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            # A new one: this thread's place in the code belongs into its traceback.
            text = str(error) if isinstance(error, CheckpointError) else f"a checkpoint's export failed: {error}"
            raise CheckpointError(text) from error
