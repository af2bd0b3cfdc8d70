"""Rows of benchmarks/chaos.py about what is read and written: the plan, checkpoints, faulty data."""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from fastddpm.checkpoint import AsyncWriter, Checkpoints, State
from fastddpm.data import Batch, DataConfig, open_data
from fastddpm.errors import CheckpointError, DataError
from fastddpm.files import sha256
from fastddpm.order import BatchPlan, LaneOrder, rows_at

from .chaos_runs import (
    BATCH,
    ROWS,
    Life,
    Run,
    Session,
    Stalled,
    arguments,
    encode,
    faults_of,
    surroundings,
    unequal,
    write_digits,
    write_parquet,
)


def plan(session: Session) -> None:
    """Virtual ranks: what each of up to 4,096 would read, without processes."""
    worlds = (1, 2, 3, 64, 1024, 4096) if not session.quick else (1, 3, 64)
    for streamed in (False, True):
        for accumulation in (1, 2):
            kind = "streamed" if streamed else "map-style"
            span = f"{worlds[0]} to {worlds[-1]} ranks"
            with session.count("plan", f"{kind}, {span}, accumulation {accumulation}") as count:
                slowest = 0.0
                for world in worlds:
                    batch = world * accumulation * max(1, 128 // world)
                    faults, ms = check_plan(batch, world, accumulation, 50_000, streamed)
                    slowest = max(slowest, ms)
                    count.add(faults + ([f"{ms:.2f} ms per step and rank"] if ms >= 1 else []), f"{world} ranks")
                count.what += f" (at most {slowest:.2f} ms per step and rank)"
                count.facts["ms"] = slowest
    _plan_streams(session, worlds)
    with session.count("plan", "fastddpm plan --check, 8 and 4,096 ranks, map-style and streamed") as count:
        for ranks, streamed in ((8, False), (8, True), (4096, False), (4096, True)):
            streaming = {"data.source": session.parquet(), "data.streaming": streamed or None}
            options: dict[str, Any] = {"preset": "digits", "batch-size": max(BATCH, ranks), **streaming}
            command = [sys.executable, "-m", "fastddpm", "plan", *arguments(options), "--ranks", str(ranks), "--check"]
            life = Life(command, surroundings(session.cache), session.folder_of("plan") / "said.err")
            code = life.wait()
            count.add([] if code == 0 else [f"exit {code}: {life.last_words()}"], f"{ranks} ranks")


def check_plan(
    batch: int, world: int, accumulation: int, num_images: int, streamed: bool = False
) -> tuple[list[str], float]:
    """Faults of what `world` ranks read in some steps and in an epoch; milliseconds of CPU per step and rank."""
    plan, faults = BatchPlan(batch, world, accumulation), []
    sizes = np.full(100, num_images // 100) + np.where(np.arange(100) % 2, 7, -7)  # row groups are never quite equal
    lanes = LaneOrder(sizes, math.gcd(batch, 64), 64, seed=7)
    starts = np.cumsum(sizes) - sizes

    def rows(positions: np.ndarray) -> np.ndarray:
        if not streamed:
            return rows_at(positions, num_images, seed=7)
        place = lanes.locate(positions % lanes.num_lanes, positions // lanes.num_lanes)
        return np.asarray(starts[place.block] + place.row)

    steps = max(2, 256 // world)
    seen = np.zeros(steps * batch, np.int64)
    found, spent = np.zeros(steps * batch, np.int64), 0.0
    rows(np.zeros(1, np.int64))  # an epoch's blocks are put in order once
    for step in range(steps):
        for rank in range(world):
            begin = time.thread_time()
            parts = [plan.positions(step, index, rank) for index in range(accumulation)]
            named = [rows(part) for part in parts]
            spent += time.thread_time() - begin
            for part, name in zip(parts, named, strict=True):
                np.add.at(seen, part, 1)
                found[part] = name
    if not (seen == 1).all():
        faults.append(f"{int((seen != 1).sum())} positions are not read exactly once")
    if not np.array_equal(found, rows(np.arange(steps * batch))):
        faults.append("the ranks' rows are not those of the positions")
    kept = num_images if not streamed else lanes.length * lanes.num_lanes
    for epoch in (0, 1):
        each = rows(np.arange(epoch * kept, (epoch + 1) * kept))
        if len(np.unique(each)) != kept or num_images - kept >= lanes.num_lanes:
            faults.append(f"epoch {epoch} has {len(np.unique(each))} rows of {num_images}, and {kept} places")
    return faults, 1e3 * spent / (steps * world)


def _plan_streams(session: Session, worlds: Sequence[int]) -> None:
    """Streamed parquet through the loader: an epoch's rows by virtual ranks, each once but for fewer than C."""
    with session.count(
        "plan", "streamed: an epoch by ranks, disjoint, each row at most once, fewer than C dropped"
    ) as count:
        for world in (w for w in worlds if w in (1, 2, 64) or session.quick):
            batch = 64
            if batch % world:
                continue
            data = open_data(_data(session, streaming=True, workers=0), (8, 8), 1)
            lanes = int(data.num_lanes or 0)
            kept = ROWS // lanes * lanes
            steps = kept // batch + 1
            found = _by_position(data, world, steps, batch)
            names = [found[p][0] for p in range(kept)]
            faults = []
            if len(set(names)) != kept:
                faults.append(f"{kept - len(set(names))} rows come twice in an epoch")
            if sorted(found) != list(range(steps * batch)):
                faults.append("positions are missing")
            if ROWS - kept >= lanes:
                faults.append(f"{ROWS - kept} rows dropped, {lanes} lanes")
            count.add(faults, f"{world} ranks")


def _data(session: Session, **more: Any) -> DataConfig:
    return DataConfig(**{"source": session.parquet(), "cache_gb": 0.0, **more})


def _by_position(data: Any, world: int, steps: int, batch: int) -> dict[int, tuple[int, bytes, tuple[str, ...]]]:
    """(row, pixels, replaced) of each position that `world` virtual ranks read in `steps` steps."""
    found: dict[int, tuple[int, bytes, tuple[str, ...]]] = {}
    for rank in range(world):
        for part in data.batches(0, 0, steps, batch, rank=rank, world=world):
            _put(found, part)
    return found


def _put(found: dict[int, tuple[int, bytes, tuple[str, ...]]], part: Batch) -> None:
    replaced = tuple(getattr(part, "replaced", ()))
    for i, position in enumerate(part.ordinals.tolist()):
        if position in found:
            raise AssertionError(f"position {position} is read twice")
        found[position] = (int(part.rows[i]), part.images[i].permute(1, 2, 0).numpy().tobytes(), replaced)


def make_state(step: int, size: int = 150_000) -> State:
    """A state of about 2.4 MB, every number of which is a function of its step."""

    def table(offset: int) -> dict[str, torch.Tensor]:
        return {"weight": torch.arange(size, dtype=torch.float32) + 1000 * step + offset}

    moments = {
        f"weight/{name}": value for name, value in (("exp_avg", table(3)["weight"]), ("exp_avg_sq", table(5)["weight"]))
    }
    return State(step, step * BATCH, table(1), table(2), moments)


def is_state(state: State, step: int) -> bool:
    """Whether a loaded state is make_state(step)."""
    wanted = make_state(step)
    return (state.step, state.samples_seen) == (step, step * BATCH) and all(
        getattr(state, kind).keys() == getattr(wanted, kind).keys()
        and all(torch.equal(t, getattr(wanted, kind)[n]) for n, t in getattr(state, kind).items())
        for kind in ("model", "ema", "optimizer")
    )


def save_for_ever(run: Path, first: int, background: bool, report: Any) -> None:
    """Save one state after another, and report each step whose checkpoint is committed."""
    checkpoints, step = Checkpoints(run, keep=2), first
    writer = AsyncWriter(checkpoints)
    while True:
        step += 1
        if background:
            writer.save(make_state(step))
            if writer.committed is not None:
                report.send(writer.committed)
        else:
            checkpoints.save(make_state(step))
            report.send(step)


def save(session: Session) -> None:
    """Kills while saving, disks that fail, damaged and malicious files."""
    number = session.number(100, 6)
    for background in (False, True):
        kill_while_saving(session, number, background)
    disks(session)
    damage(session)
    malice(session)
    if not session.quick:
        _through_the_command_line(session)


def kill_while_saving(
    session: Session, number: int, background: bool, saver: Callable[[Path, int, bool, Any], None] = save_for_ever
) -> None:
    """SIGKILLs to a process that does nothing but save; `saver` reports each step that it holds to be saved."""
    kind = "asynchronous" if background else "synchronous"
    with session.count("save", f"SIGKILLs while saving ({kind}), newest reported verifies and loads") as count:
        run = session.folder_of("saves")
        generator = random.Random(f"{session.seed} {kind}")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        checkpoints, reported, halves = Checkpoints(run, keep=2), 0, 0
        for _ in range(number):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=saver, args=(run, reported, background, sender), daemon=True)
            process.start()
            sender.close()
            try:
                if not receiver.poll(60):
                    raise Stalled("nothing was saved in 60 s")
                reported = max(reported, receiver.recv())
            except EOFError:
                raise Stalled("the saving process ended before its first save") from None
            finally:
                if sys.exc_info()[0] is not None:
                    process.kill()
            time.sleep(generator.uniform(0.0, 0.15))
            process.kill()
            process.join()
            with contextlib.suppress(EOFError):
                while receiver.poll():
                    reported = max(reported, receiver.recv())
            receiver.close()
            halves += any((run / "checkpoints").glob(".*"))
            newest = checkpoints.newest()
            if newest is None:
                count.add([f"step {reported} was reported and there is no checkpoint"] if reported else [])
                continue
            path, refused = newest
            step = int(path.name.removeprefix("step-"))
            faults = [f"step {reported} was reported and the newest is {step}"] if step < reported else []
            faults += [f"not complete: {path}: {why}" for path, why in refused.items()]
            count.add(
                faults or ([] if is_state(checkpoints.load(path), step) else [f"step {step} is not what was saved"])
            )
            reported = max(reported, step)
        count.what += f" ({halves} left a folder half written)"
        count.facts["half_written"] = halves
        if not background and not halves:
            count.wrong.append("no kill fell into a save")


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A file system of that size on `folder`; False where mounting is not permitted."""
    mounted = (
        sys.platform == "linux"
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)], capture_output=True
        ).returncode
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


def _attempt(run: Path, step: int, how: str, report: Any) -> None:
    """In a process of its own: one save under a limit; reports what came of it."""
    if how == "file-size limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if how == "read-only folder" and os.getuid() == 0:
        os.setuid(65534)  # root writes wherever it likes
    try:
        Checkpoints(run, keep=5).save(make_state(step))
        report.send("saved")
    except CheckpointError as error:
        report.send(f"CheckpointError: {error}")
    except BaseException as error:
        report.send(f"{type(error).__name__}: {error}")


def disks(session: Session) -> None:
    with session.count("save", "full disk, file-size limit, read-only folder: clear error, old ones intact") as count:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        for how, words in (
            ("full disk", ("No space left",)),
            ("file-size limit", ("File too large", "too large")),
            ("read-only folder", ("Permission denied", "Read-only")),
        ):
            run = session.folder_of("disk")
            with contextlib.ExitStack() as stack:
                if how == "full disk" and not stack.enter_context(small_disk(run, 6)):
                    count.what += "; no full disk, since mounting is not permitted here"
                    continue
                Checkpoints(run).save(make_state(1))
                before = {p: sha256(p) for p in sorted(run.rglob("*")) if p.is_file()}
                for path in (session.folder, run.parent, run, run / "checkpoints", *run.glob("checkpoints/*")):
                    path.chmod(0o755)
                if how == "full disk":
                    (run / "ballast").write_bytes(bytes(2_000_000))
                    before[run / "ballast"] = sha256(run / "ballast")
                if how == "read-only folder":
                    (run / "checkpoints").chmod(0o555)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_attempt, args=(run, 2, how, sender))
                process.start()
                sender.close()
                said = receiver.recv() if receiver.poll(60) else "nothing in 60 s"
                process.join(10)
                (run / "checkpoints").chmod(0o755)
                faults = []
                if not (said.startswith("CheckpointError") and any(w in said for w in words) and "\n" not in said):
                    faults.append(f"said {said!r}")
                if {p: sha256(p) for p in sorted(run.rglob("*")) if p.is_file()} != before:
                    faults.append("files are not as they were before")
                newest = Checkpoints(run).newest()
                if newest is None or not is_state(Checkpoints(run).load(newest[0]), 1):
                    faults.append("the old checkpoint is not intact")
                count.add(faults, how)


def damage(session: Session) -> None:
    with session.count("save", "files flipped, truncated or deleted: named, and the previous checkpoint used") as count:
        run = session.folder_of("damage")
        checkpoints = Checkpoints(run, keep=5)
        for step in (1, 2):
            checkpoints.save(make_state(step))
        newest = checkpoints.all()[-1]
        generator = random.Random(session.seed)
        kinds = ["deleted", "truncated", "emptied"] + ["flipped"] * session.number(12, 2)
        for file in sorted(newest.iterdir()):
            whole = file.read_bytes()
            for kind in kinds:
                file.unlink(missing_ok=True)
                if kind == "flipped":
                    place = generator.randrange(8 * len(whole))
                    torn = bytearray(whole)
                    torn[place // 8] ^= 1 << place % 8
                    file.write_bytes(torn)
                elif kind != "deleted":
                    file.write_bytes(whole[: generator.randrange(1, len(whole))] if kind == "truncated" else b"")
                try:
                    found = checkpoints.newest()
                except CheckpointError as error:
                    count.add([str(error)], f"{file.name} {kind}")
                    continue
                path, refused = found if found is not None else (None, {})
                # A flipped digest in the manifest speaks against the file that it is of.
                named = ("manifest", ".safetensors", "state.json") if file.name == "manifest.json" else (file.name,)
                faults = []
                if path is None or path == newest or not is_state(checkpoints.load(path), 1):
                    faults.append(f"{path} is used")
                elif not any(name in refused.get(newest, "") for name in named):
                    faults.append(f"the reason does not name it: {refused}")
                # A manifest may be damaged where no digest is: in the white space between its entries.
                harmless = file.name == "manifest.json" and kind == "flipped" and path == newest and _means(file, whole)
                count.add([] if harmless else faults, f"{file.name} {kind}")
            file.write_bytes(whole)


def _means(file: Path, whole: bytes) -> bool:
    try:
        return bool(json.loads(file.read_bytes()) == json.loads(whole))
    except ValueError:
        return False


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def malice(session: Session) -> None:
    with session.count("save", "a pickle that runs code in place of each file, manifest forged: nothing runs") as count:
        marker = session.folder / "ran"
        bombs = {"pickle": pickle.dumps(Bomb(marker)), "torch.save": _zipped_bomb(marker)}
        for form, bomb in bombs.items():
            assert pickle.loads(bombs["pickle"]) is None and marker.exists()  # it would
            marker.unlink()
            for name in (
                "model.safetensors",
                "ema.safetensors",
                "optimizer.safetensors",
                "state.json",
                "manifest.json",
                "extra.pkl",
                ".metadata",
            ):
                run = session.folder_of("malice")
                checkpoints = Checkpoints(run)
                checkpoints.save(make_state(1))
                folder = checkpoints.all()[0]
                (folder / name).write_bytes(bomb)
                if name != "manifest.json":
                    sums = {p.name: sha256(p) for p in folder.iterdir() if p.name != "manifest.json"}
                    (folder / "manifest.json").write_text(json.dumps(sums))
                faults = []
                try:
                    found = checkpoints.newest()
                    assert found is not None
                    checkpoints.load(found[0])
                    if name not in ("extra.pkl", ".metadata"):
                        faults.append("it was loaded")
                except CheckpointError:
                    pass
                except Exception as error:
                    faults.append(f"{type(error).__name__} instead of CheckpointError: {error}")
                if marker.exists():
                    marker.unlink()
                    faults.append("its code ran")
                count.add(faults, f"{form} as {name}")
                shutil.rmtree(run)


def _zipped_bomb(marker: Path) -> bytes:
    file = io.BytesIO()
    torch.save(Bomb(marker), file)
    return file.getvalue()


def _through_the_command_line(session: Session) -> None:
    """The same, seen by a user: one line, exit code 6, and a run that goes on."""
    options = {"data.source": session.parquet(), "steps": 24, "save-every": 8, "optim.horizon": 24}
    reference = session.run("whole", options=options).complete()

    def started() -> Run:
        return session.run("cut", options=options | {"steps": 16}).complete()

    with session.count("save", "command line: flipped bit, none valid, file-size limit, malicious file") as count:

        def flipped() -> list[str]:
            run = started()
            _flip(run.checkpoints()[-1] / "ema.safetensors")
            run.options["steps"] = 24
            life = run.start()
            code = life.wait()
            named = "ema.safetensors" in life.words and "going on at step 8 " in life.words
            return ([] if code == 0 and named else [f"exit {code}: {life.last_words()}"]) + unequal(run, reference)

        def none_valid() -> list[str]:
            run = started()
            for checkpoint in run.checkpoints():
                _flip(checkpoint / "model.safetensors")
            return _ends(run, 6, "model.safetensors", {"steps": 24})

        def too_large() -> list[str]:
            run = started()
            before = {p: sha256(p) for c in run.checkpoints() for p in c.iterdir()}
            # Weights fit, Adam's moments do not.
            faults = _ends(run, 6, "cannot be written", {"steps": 24}, preexec_fn=_small_files)
            after = {p: sha256(p) for c in run.checkpoints() for p in c.iterdir()}
            return faults + ([] if before.items() <= after.items() else ["older checkpoints are not as they were"])

        def malicious() -> list[str]:
            run, marker = started(), session.folder / "ran-too"
            for folder in run.checkpoints():
                (folder / "optimizer.safetensors").write_bytes(pickle.dumps(Bomb(marker)))
                sums = {p.name: sha256(p) for p in folder.iterdir() if p.name != "manifest.json"}
                (folder / "manifest.json").write_text(json.dumps(sums))
            return _ends(run, 6, "optimizer.safetensors", {"steps": 24}) + (["its code ran"] if marker.exists() else [])

        actions = {"flipped": flipped, "none valid": none_valid, "file-size limit": too_large, "malicious": malicious}
        results = session.side_by_side(faults_of, [(action,) for action in actions.values()])
        for name, faults in zip(actions, results, strict=True):
            count.add(faults, name)


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def _flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def _ends(run: Run, code: int, words: str, changes: dict[str, Any], **more: Any) -> list[str]:
    """Faults of a start that should end with an exit code and one line that holds `words`."""
    run.options.update(changes)
    life = run.start(**more)
    found = life.wait()
    lines = [line for line in life.words.splitlines() if "error:" in line]
    faults = [] if found == code else [f"exit {found}, not {code}: {life.last_words()}"]
    if not any(words in line for line in lines) or "Traceback" in life.words:
        faults.append(f"no line about {words!r}: {life.last_words()}")
    return faults


def _gray(value: int) -> np.ndarray:
    return np.full((8, 8, 1), value, np.uint8)


def _ramp() -> np.ndarray:
    return (np.arange(64, dtype=np.int64).reshape(8, 8) * 4).astype(np.uint8)


def faulty_images() -> dict[str, tuple[Any, dict[str, Any], np.ndarray | str]]:
    """Each fault: the stored image, changes of the config, and the gray pixels it must give or words of its error."""
    ramp = _ramp()
    whole = encode(Image.fromarray(ramp))
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    wide = ramp.astype(np.uint16) * 257 + np.where(ramp == 0, 0, 100).astype(np.uint16)
    palette = Image.fromarray(ramp).convert("P")
    half = np.stack([np.full((8, 8), 200, np.uint8), np.full((8, 8), 102, np.uint8)], 2)
    upright = Image.fromarray(np.ascontiguousarray(np.rot90(ramp, 1)))
    exif = upright.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    frames = [Image.fromarray(np.full((8, 8), v, np.uint8)) for v in (0, 255)]
    huge = bytearray(encode(Image.new("L", (1, 1))))
    huge[16:24] = (100_000).to_bytes(4, "big") * 2
    import zlib

    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    cmyk = encode(Image.new("CMYK", (8, 8), (0, 0, 0, 155)), "TIFF")

    def stored(data: bytes | None) -> dict[str, Any]:
        return {"bytes": data, "path": "fault.png"}

    resized = {"fit": "resize"}
    return {
        "whole": (stored(whole), {}, ramp[..., None]),
        "truncated": (stored(encode(Image.fromarray(noise), "BMP")[:900]), {}, "cannot be decoded"),
        "no bytes": (stored(b""), {}, "fault.png"),
        "wrong type": (stored(b"<!DOCTYPE html><title>404</title>"), {}, "cannot be decoded"),
        "16-bit": (stored(encode(Image.fromarray(wide))), {}, np.round(wide / 257).astype(np.uint8)[..., None]),
        "float": (stored(encode(Image.fromarray(ramp.astype(np.float32)), "TIFF")), {}, "float"),
        "palette": (stored(encode(palette)), {}, ramp[..., None]),
        "alpha": (stored(encode(Image.fromarray(half))), {}, "transparent"),
        "alpha on white": (stored(encode(Image.fromarray(half))), {"background": "white"}, _gray(233)),
        "alpha on a colour": (stored(encode(Image.fromarray(half))), {"background": "#646464"}, _gray(140)),
        "CMYK": (stored(cmyk), {}, _gray(100)),
        "EXIF-rotated": (stored(encode(upright, exif=exif)), {}, ramp[..., None]),
        "animated": (stored(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])), {}, "2 frames"),
        "huge": (stored(bytes(huge)), resized, "pixels"),
        "tiny": (stored(encode(Image.new("L", (1, 1), 77))), resized, _gray(77)),
        "tiny, exact": (stored(encode(Image.new("L", (1, 1), 77))), {}, "1x1"),
        "missing": ({"bytes": None, "path": None}, {}, "missing"),
        "missing file": ({"bytes": None, "path": "/nowhere/fault.png"}, {}, "fault.png"),
        "no image": (None, {}, "missing"),
    }


def data(session: Session) -> None:
    """Faulty images, skipping them, and data that cannot be trained on."""
    good = {"bytes": encode(Image.fromarray(_ramp().T.copy())), "path": "good.png"}
    with session.count("data", "faulty images: the stated value, or an error with split, row and path") as count:
        for name, (image, changes, wanted) in faulty_images().items():
            for streaming in (False, True):
                count.add(
                    faults_of(_one_fault, session, [good, image, good], changes, wanted, streaming),
                    f"{name}{', streamed' * streaming}",
                )
    _skipping(session)
    if not session.quick:
        _refused(session)


def _one_fault(
    session: Session, images: list[Any], changes: dict[str, Any], wanted: np.ndarray | str, streaming: bool
) -> list[str]:
    """A set of three images of which the second is at fault."""
    folder = session.folder_of("fault")
    write_parquet(folder / "train.parquet", images, [0, 1, 2])
    config = DataConfig(
        source=f"parquet:{folder}",
        workers=0,
        cache_gb=0.0,
        streaming=streaming,
        lanes=1 if streaming else None,
        **changes,
    )
    found: dict[int, tuple[int, bytes, tuple[str, ...]]] = {}
    os.environ["HF_DATASETS_CACHE"] = str(session.cache)
    try:
        opened = open_data(config, (8, 8), 1)
        for part in opened.batches(0, 0, 3, 1):
            _put(found, part)
    except DataError as error:
        message = str(error)
        if not isinstance(wanted, str):
            return [f"refused: {message}"]
        path = (images[1] or {}).get("path")
        names = [wanted, "row 1", "train", *([path] if path else [])]
        missing = [n for n in names if n not in message]
        return [f"{missing} not in {message!r}"] if missing or "\n" in message else []
    if isinstance(wanted, str):
        return ["it was taken"]
    pixels = {row & 0xFFFFFFFF: np.frombuffer(data, np.uint8).reshape(8, 8, 1) for row, data, _ in found.values()}
    return [] if np.array_equal(pixels[1], wanted) else [f"gave {pixels[1][0, :3, 0]} .., not {wanted[0, :3, 0]} .."]


def _skipping(session: Session) -> None:
    with session.count("data", "bad images skipped: the same order and replacements for 1, 2, 4 processes") as count:
        folder = session.folder_of("bad") / "set"
        write_digits(folder, (120,), 12)
        table = pq.read_table(path := next(folder.glob("*.parquet")))
        images = table.column("image").to_pylist()
        bad = (3, 40, 41, 97)
        for row in bad:
            images[row] = {"bytes": b"not an image", "path": f"bad{row}.png"}
        write_parquet(path, images, table.column("label").to_pylist(), 12)
        for streaming in (False, True):
            config = DataConfig(
                source=f"parquet:{folder}", cache_gb=0.0, workers=0, streaming=streaming, bad_image="skip"
            )
            ways = []
            for world in (1, 2, 4):
                opened = open_data(config, (8, 8), 1)
                found = _by_position(opened, world, 15, BATCH)
                ways.append(({p: f[:2] for p, f in found.items()}, sorted({m for f in found.values() for m in f[2]})))
            for world, way in zip((1, 2, 4), ways, strict=True):
                faults = [] if way[0] == ways[0][0] else ["the order is another than on one process"]
                if way[1] != ways[0][1] or not all(any(f"bad{row}.png" in m for m in way[1]) for row in bad):
                    faults.append(f"replaced: {way[1][:2]} .., of {len(way[1])}")
                if {row & 0xFFFFFFFF for row, _ in way[0].values()} & set(bad) and not streaming:
                    faults.append("a bad row is in a batch")
                count.add(faults, f"{'streamed' if streaming else 'map-style'}, {world} processes")


def _refused(session: Session) -> None:
    """Through the command line: exit 4 or 5, one line, in under ten seconds."""
    empty, labels, bad = (session.folder_of(name) for name in ("empty", "labels", "bad"))
    write_parquet(empty / "train.parquet", [], [])
    good = {"bytes": encode(Image.fromarray(_ramp())), "path": "good.png"}
    write_parquet(labels / "train.parquet", [good] * 40, [0] * 20 + [99] + [0] * 19)
    write_parquet(bad / "train.parquet", [good] * 20 + [{"bytes": b"no", "path": "bad.png"}] + [good] * 19, [0] * 40)
    cases: dict[str, tuple[int, dict[str, Any], str]] = {
        "empty set": (4, {"data.source": f"parquet:{empty}"}, "0 rows"),
        "wrong column": (4, {"data.source": session.parquet(), "data.image-column": "picture"}, "picture"),
        "label out of range": (4, {"data.source": f"parquet:{labels}"}, "99"),
        "a bad image": (4, {"data.source": f"parquet:{bad}"}, "bad.png"),
        "unknown option": (5, {"data.sauce": "x"}, "data.sauce"),
        "no such set": (4, {"data.source": "parquet:/nowhere"}, "/nowhere"),
        "filter of a column that is not there": (
            4,
            {"data.source": session.parquet(), "data.filter": "blurred == 1"},
            "blurred",
        ),
        "batch that does not divide": (5, {"accumulation": 5}, "accumulation"),
    }
    with session.count(
        "data", "command line: empty, wrong column, label, key and the like: exit 4 or 5 in under 10 s"
    ) as count:
        for name, (code, changes, words) in cases.items():
            run = session.run("refused", options=changes, orders=None)
            begin = time.monotonic()
            faults = faults_of(_ends, run, code, words, {})
            seconds = time.monotonic() - begin
            count.add(faults + ([f"took {seconds:.1f} s"] if seconds >= 10 else []), name)
            count.facts["seconds"] = max(seconds, count.facts.get("seconds", 0.0))
            if (run.folder / "log.jsonl").exists():
                count.add(["it trained"], name)
        count.what += f" (at most {count.facts['seconds']:.1f} s)"
