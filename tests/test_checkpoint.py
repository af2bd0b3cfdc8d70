"""Checkpoints: what is written comes back on any number of processes; what is damaged, forged or failing is refused."""

import contextlib
import dataclasses
import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastddpm import checkpoint
from fastddpm.checkpoint import FORMAT, ROWS, AsyncWriter, Checkpoints, State, load_optimizer
from fastddpm.errors import CheckpointError
from fastddpm.files import sha256
from fastddpm.sharding import Rows

SHAPES = {"conv.weight": (7, 2, 3), "conv.bias": (7,), "out.weight": (3, 5), "norm.weight": (1,)}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def whole_state(step: int = 5) -> State:
    moments = {f"{name}/exp_avg": value for name, value in tensors(3).items()}
    moments |= {f"{name}/step": torch.tensor(float(step)) for name in SHAPES}
    facts = {"skipped_steps": [3], "norm": 0.5}
    return State(step, step * 8, tensors(1), tensors(2), moments, facts=facts)


def rows_of(rank: int, world: int) -> dict[str, Rows]:
    held = {}
    for name, shape in SHAPES.items():
        most = -(-shape[0] // world)
        held[name] = Rows(min(rank * most, shape[0]), min((rank + 1) * most, shape[0]), shape)
    return held


def shard_of(state: State, rank: int, world: int) -> State:
    rows = rows_of(rank, world)

    def cut(part: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for key, value in part.items():
            held = rows[key.partition("/")[0]]
            found[key] = value[held.start : held.stop] if value.ndim else value
        return found

    parts = {part: cut(getattr(state, part)) for part in ("model", "ema", "optimizer")}
    return dataclasses.replace(state, **parts, rows=rows)


def assert_same(a: State, b: State) -> None:
    for part in ("model", "ema", "optimizer"):
        ours, theirs = getattr(a, part), getattr(b, part)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].shape == theirs[key].shape and torch.equal(ours[key], theirs[key]), (part, key)
    assert (a.step, a.samples_seen, a.scaler, a.facts) == (b.step, b.samples_seen, b.scaler, b.facts)


class Circle:
    """Peers that are threads."""

    def __init__(self, world: int) -> None:
        self.world, self.values = world, [None] * world
        self.barrier = threading.Barrier(world, timeout=30)

    def peer(self, rank: int) -> Any:
        circle = self

        class Peer:
            world = circle.world

            def exchange(self, value: Any) -> list[Any]:
                circle.values[rank] = value
                circle.barrier.wait()
                told = list(circle.values)
                circle.barrier.wait()
                return told

        peer = Peer()
        peer.rank = rank  # type: ignore[attr-defined]
        return peer


def together(world: int, action: Callable[[int, Any], Any]) -> list[Any]:
    """What action(rank, peer) returns or raises on each of `world` threads."""
    circle, results = Circle(world), [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = action(rank, circle.peer(rank))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def save_sharded(folder: Path, world: int, state: State) -> list[Any]:
    return together(world, lambda rank, peer: Checkpoints(folder, 3, peer).save(shard_of(state, rank, world)))


@pytest.mark.parametrize("saved", [1, 2, 4])
def test_what_any_number_of_processes_saved_any_number_loads(tmp_path, saved):
    """Bitwise, weights, averages and moments; tensors of fewer rows than processes too."""
    state = whole_state()
    if saved == 1:
        Checkpoints(tmp_path).save(state)
    else:
        assert len(set(save_sharded(tmp_path, saved, state))) == 1
    checkpoints = Checkpoints(tmp_path)
    (path,) = checkpoints.all()
    assert checkpoints.verify(path) is None
    assert_same(checkpoints.load(path), state)
    for part in ("model", "ema", "optimizer"):
        found = checkpoints.tensors(path, part)
        assert all(torch.equal(found[key], value) for key, value in getattr(state, part).items())
    for world in (2, 3, 4):
        for rank in range(world):
            assert_same(checkpoints.load(path, rows_of(rank, world)), shard_of(state, rank, world))


def test_a_process_reads_its_rows_only(tmp_path, monkeypatch):
    """A process of a sharded run must not hold the whole state for a moment: no tensor is read whole."""
    save_sharded(tmp_path, 2, whole_state())
    read = []
    real = checkpoint.safe_open

    class Counting:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.file = real(*arguments, **options)

        def __enter__(self) -> "Counting":
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_slice(self, key: str) -> Any:
            inner = self.file.get_slice(key)

            class Slice:
                get_shape = staticmethod(inner.get_shape)

                def __getitem__(self, index: Any) -> Tensor:
                    value: Tensor = inner[index]
                    read.append(value.numel())
                    return value

            return Slice()

        def get_tensor(self, key: str) -> Tensor:
            value: Tensor = self.file.get_tensor(key)
            read.append(value.numel())
            return value

    monkeypatch.setattr(checkpoint, "safe_open", Counting)
    loaded = Checkpoints(tmp_path).load(tmp_path / "checkpoints" / "step-00000005", rows_of(1, 4))
    held = sum(value.numel() for part in (loaded.model, loaded.ema, loaded.optimizer) for value in part.values())
    assert sum(read) == held


def test_rows_of_another_net_are_refused(tmp_path):
    save_sharded(tmp_path, 2, whole_state())
    rows = rows_of(0, 2) | {"out.weight": Rows(0, 2, (4, 5))}
    with pytest.raises(CheckpointError, match=r"another architecture: out.weight is \(3, 5\), not \(4, 5\)"):
        Checkpoints(tmp_path).load(tmp_path / "checkpoints" / "step-00000005", rows)


def test_what_fails_on_one_process_fails_on_all(tmp_path, monkeypatch):
    """One rank's disk is full: all raise the same error naming it, nothing half written stays, the older one stays."""
    save_sharded(tmp_path, 3, whole_state(1))
    real = checkpoint.save_file

    def full(tensors: Any, path: Path, **options: Any) -> None:
        if path.name == "ema-00002-of-00003.safetensors":
            raise OSError(28, "No space left on device")
        real(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    errors = save_sharded(tmp_path, 3, whole_state(2))
    assert all(isinstance(error, CheckpointError) for error in errors), errors
    assert {str(error).partition("written: ")[2] for error in errors} == {
        "process 1: [Errno 28] No space left on device"
    }
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    save_sharded(tmp_path, 3, whole_state(2))
    assert_same(Checkpoints(tmp_path).load(Checkpoints(tmp_path).all()[-1]), whole_state(2))


def test_a_failed_commit_fails_on_all(tmp_path, monkeypatch):
    def broken(path: Path, value: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "write_json", broken)
    errors = save_sharded(tmp_path, 2, whole_state())
    assert all(isinstance(error, CheckpointError) and "process 0" in str(error) for error in errors)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def saved(folder: Path) -> Path:
    return Checkpoints(folder).save(whole_state())


def forge(path: Path, name: str, content: bytes) -> None:
    """Replace a file and its sum in the manifest, as someone would who may write the folder."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[name] = sha256(path / name)
    (path / "manifest.json").write_text(json.dumps(manifest))


def altered(path: Path, **changes: Any) -> None:
    values = json.loads((path / "state.json").read_text()) | changes
    forge(path, "state.json", json.dumps(values).encode())


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_malicious_file_runs_nothing(tmp_path, name):
    path, mark = saved(tmp_path), tmp_path / "ran"
    content = pickle.dumps(Bomb(mark))
    pickle.loads(content)  # the bomb is one
    assert mark.exists()
    mark.unlink()
    if name == "manifest.json":
        (path / name).write_bytes(content)
    else:
        forge(path, name, content)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError):
        found = checkpoints.newest()
        assert found is not None
        checkpoints.load(found[0])
    for part in ("model", "ema", "optimizer"):
        with contextlib.suppress(CheckpointError):
            checkpoints.tensors(path, part)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", ".", "", "a/b", ".hidden", "a\nb"])
def test_a_manifest_that_names_other_places_is_refused(tmp_path, name):
    path = saved(tmp_path)
    (path.parent / "outside").write_text("x")
    manifest = json.loads((path / "manifest.json").read_text())
    target = path / name
    manifest[name] = sha256(target) if target.is_file() else "0" * 64
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "is not a plain file of the folder" in str(Checkpoints(tmp_path).verify(path))


def test_a_symlink_is_refused_and_a_file_of_no_concern_is_not(tmp_path):
    path = saved(tmp_path)
    (path / "notes.txt").write_text("the good one")
    assert Checkpoints(tmp_path).verify(path) is None
    (path / "model.safetensors").rename(tmp_path / "elsewhere")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "model.safetensors" in str(Checkpoints(tmp_path).verify(path))


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_every_damage_is_named(tmp_path, file, damage):
    path = saved(tmp_path)
    raw = (path / file).read_bytes()
    if damage == "delete":
        (path / file).unlink()
    else:
        half = len(raw) // 2
        (path / file).write_bytes(
            raw[:half] + (bytes([raw[half] ^ 255]) + raw[half + 1 :] if damage == "flip" else b"")
        )
    reason = Checkpoints(tmp_path).verify(path)
    assert reason is not None and file.removesuffix(".json") in reason


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "5"},
        {"step": -1},
        {"step": True},
        {"step": 5.0},
        {"samples_seen": None},
        {"processes": 0},
        {"processes": 10**9},
        {"scaler": []},
        {"scaler": {"scale": "x"}},
        {"facts": [1]},
    ],
    ids=str,
)
def test_a_state_of_wrong_types_is_refused(tmp_path, changes):
    path = saved(tmp_path)
    altered(path, **changes)
    (name,) = changes
    with pytest.raises(CheckpointError, match=f"{name} "):
        Checkpoints(tmp_path).load(path)


@pytest.mark.parametrize("content", [b"[]", b"[" * 100_000, b"\xff", b"", b"5"], ids=range(5))
def test_a_state_that_is_no_table_is_refused(tmp_path, content):
    path = saved(tmp_path)
    forge(path, "state.json", content)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        Checkpoints(tmp_path).newest()
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        Checkpoints(tmp_path).load(path)


def test_another_format_is_named(tmp_path):
    path = saved(tmp_path)
    altered(path, format=1)
    with pytest.raises(CheckpointError, match=f"has format 1 and this version of fastddpm {FORMAT}: go on with"):
        Checkpoints(tmp_path).load(path)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "{",
        '{"conv.bias": 3}',
        '{"conv.bias": []}',
        '{"conv.bias": ["0", 7]}',
        '{"conv.bias": [1, 7]}',
        '{"conv.bias": [-1, 7]}',
        '{"conv.bias": [0, 8]}',
        '{"conv.bias": [0, 1000000000000]}',
        '{"conv.weight": [0, 7, 2]}',
        '{"conv.weight": [0, 7, 3, 2]}',
    ],
)
def test_rows_that_cannot_be_are_refused(tmp_path, header):
    """The header of a tensor file says which rows it has: holes, overlaps and wrong types are damage."""
    path = saved(tmp_path)
    save_file(tensors(1), path / "model.safetensors", metadata={ROWS: header})
    forge(path, "model.safetensors", (path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError):
        Checkpoints(tmp_path).load(path)


def test_rows_there_twice_or_not_at_all_are_refused(tmp_path):
    save_sharded(tmp_path, 2, whole_state())
    (path,) = Checkpoints(tmp_path).all()
    one, two = (path / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    forge(path, two.name, one.read_bytes())
    with pytest.raises(CheckpointError, match="are missing or there twice"):
        Checkpoints(tmp_path).load(path)


def test_a_manifest_without_one_processs_file_is_refused(tmp_path):
    save_sharded(tmp_path, 2, whole_state())
    (path,) = Checkpoints(tmp_path).all()
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["ema-00002-of-00002.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "does not name ema-00002-of-00002" in str(Checkpoints(tmp_path).verify(path))


def test_moments_of_another_net_are_refused():
    weights = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    names = ["a", "b"]
    good = {"a/step": torch.tensor(1.0), "a/exp_avg": torch.ones(2, 3)}
    good |= {"b/step": torch.tensor(1.0), "b/exp_avg": torch.ones(4)}
    for changed, text in (
        ({k: v for k, v in good.items() if k != "b/exp_avg"}, "b/exp_avg is missing"),
        (good | {"c/step": torch.tensor(1.0)}, "c/step is of no weight"),
        (good | {"a/exp_avg": torch.ones(3)}, r"a/exp_avg is \(3,\), not \(2, 3\)"),
        (good | {"a/step": torch.ones(3)}, "a/step is"),
    ):
        lines = [torch.nn.Parameter(weight.detach().view(-1)) for weight in weights]
        optimizer = torch.optim.Adam(lines)
        with pytest.raises(CheckpointError, match=text):
            load_optimizer(optimizer, names, weights, changed)


class Gate:
    """Holds the writer back at its first fsync until opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        real = checkpoint.sync

        def held(path: Path) -> None:
            self.reached.set()
            assert self.opened.wait(30)
            real(path)

        monkeypatch.setattr(checkpoint, "sync", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    held = Gate(monkeypatch)
    yield held
    held.opened.set()


def test_what_training_does_while_a_checkpoint_is_written_is_not_in_it(tmp_path, gate):
    """save returns before anything is committed, and what is reported as committed is."""
    state, expected = whole_state(), whole_state()
    told: list[int] = []
    checkpoints = Checkpoints(tmp_path)
    writer = AsyncWriter(checkpoints, lambda state, path: told.append(state.step * checkpoints.all().count(path)))
    writer.save(state)
    assert gate.reached.wait(30)
    assert writer.committed is None and checkpoints.all() == [] and told == []
    for part in (state.model, state.ema, state.optimizer):
        for value in part.values():
            value.fill_(float("nan"))
    state.facts["skipped_steps"].append(9)
    gate.opened.set()
    writer.drain()
    assert writer.committed == 5 and told == [5]
    assert_same(checkpoints.load(checkpoints.all()[0]), expected)


def test_the_next_save_waits_for_the_one_before(tmp_path, gate):
    writer = AsyncWriter(Checkpoints(tmp_path))
    writer.save(whole_state(1))
    assert gate.reached.wait(30)
    seen: list[Any] = []
    second = threading.Thread(target=lambda: (writer.save(whole_state(2)), seen.append(writer.committed)))
    second.start()
    second.join(0.2)
    assert second.is_alive() and seen == []
    gate.opened.set()
    second.join(30)
    assert seen[0] in (1, 2)
    writer.drain()
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["step-00000001", "step-00000002"]
    assert writer.committed == 2


def test_the_writers_error_comes_out_once_and_older_checkpoints_stay(tmp_path, monkeypatch):
    writer = AsyncWriter(Checkpoints(tmp_path))
    writer.save(whole_state(1))
    writer.drain()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    writer.save(whole_state(2))
    with pytest.raises(CheckpointError, match=r"step-00000002 cannot be written: .*No space left"):
        writer.save(whole_state(3))
    writer.drain()
    assert writer.committed == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_failed_export_is_an_error_and_the_checkpoint_counts(tmp_path):
    def broken(state: State, path: Path) -> None:
        raise OSError(28, "No space left on device")

    writer = AsyncWriter(Checkpoints(tmp_path), broken)
    writer.save(whole_state())
    with pytest.raises(CheckpointError, match=r"export failed: .*No space left"):
        writer.drain()
    assert writer.committed == 5


def test_sharded_checkpoints_are_written_beside_training(tmp_path):
    def save(rank: int, peer: Any) -> Any:
        writer = AsyncWriter(Checkpoints(tmp_path, 2, peer))
        for step in (1, 2, 3):
            writer.save(shard_of(whole_state(step), rank, 2))
        writer.drain()
        return writer.committed

    assert together(2, save) == [3, 3]
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000002", "step-00000003"]
    assert_same(Checkpoints(tmp_path).load(Checkpoints(tmp_path).all()[-1]), whole_state(3))
