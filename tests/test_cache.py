"""Decoded images: the same batches from a store in any state, from a device, and whatever has happened to the file."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_data import NUM_ROWS, one_line, picture, png, private_cache, write_folder, write_splits

from fastddpm import cache, loader
from fastddpm.cache import DecodedStore
from fastddpm.data import Batch, DataConfig, ImageData, open_data
from fastddpm.errors import ConfigError, DataError
from fastddpm.loader import _one_ahead

BATCH_SIZE, SEED = 8, 7
CPU = torch.device("cpu")
SHAPE = (NUM_ROWS, 8, 8, 3)
ROWS = np.arange(NUM_ROWS)
PIXELS = np.stack([picture(row) for row in range(NUM_ROWS)])


@pytest.fixture(scope="module", autouse=True)
def library_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_cache(tmp_path_factory.mktemp("datasets")):
        yield


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"parquet:{write_splits(tmp_path_factory.mktemp('parquet'))}"


@pytest.fixture(scope="module")
def data(parquet: str) -> ImageData:
    return open_data(DataConfig(source=parquet), (8, 8), 3)


@pytest.fixture(scope="module")
def resident(parquet: str) -> ImageData:
    return open_data(DataConfig(source=parquet, resident=True), (8, 8), 3)


@pytest.fixture(scope="module")
def truth(parquet: str) -> list[tuple]:
    return sequence(open_data(DataConfig(source=parquet, cache_gb=0), (8, 8), 3), 0, 20)


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stores are, none so far."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "fastddpm-decoded"


def sequence(data: ImageData, first: int, last: int, world: int = 1, accumulation: int = 1, **options: Any) -> list:
    """(ordinal, row, label, pixels) of all ranks, put in the order of the plan, without sorting."""
    options = {"workers": 0} | options
    ranks = [
        list(data.batches(SEED, first, last, BATCH_SIZE, rank, world, accumulation, **options)) for rank in range(world)
    ]
    found = []
    for micro_batches in zip(*ranks, strict=True):
        columns = []
        for images, labels, ordinals, rows, _ in micro_batches:
            assert images.is_contiguous(memory_format=torch.channels_last) and labels is not None
            assert (images.dtype, {t.dtype for t in (labels, ordinals, rows)}) == (torch.uint8, {torch.int64})
            pixels = [image.tobytes() for image in images.permute(0, 2, 3, 1).contiguous().numpy()]
            columns.append(zip(ordinals.tolist(), rows.tolist(), labels.tolist(), pixels, strict=True))
        found += [example for examples in zip(*columns, strict=True) for example in examples]  # ranks take turns
    return found


def the_store(stores: Path) -> DecodedStore:
    (path,) = stores.glob("*.bin")
    return DecodedStore(path, SHAPE, int(salt(path), 16))


def salt(path: Path) -> str:
    identity = json.dumps(json.loads(path.with_suffix(".json").read_text()), sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[-8:]


def assert_whole(store: DecodedStore) -> None:
    images, labels, known = store.read(ROWS)
    assert known.all() and store.complete()
    assert np.array_equal(images, PIXELS) and np.array_equal(labels, ROWS % 2)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    filled=st.integers(0, 8),
    world=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 2]),
    first=st.integers(0, 13),
    in_memory=st.booleans(),
    device=st.sampled_from([None, CPU]),
)
def test_batches_are_the_same_from_a_store_in_any_state(
    data: ImageData,
    resident: ImageData,
    truth: list[tuple],
    tmp_path_factory: pytest.TempPathFactory,
    filled: int,
    world: int,
    accumulation: int,
    first: int,
    in_memory: bool,
    device: torch.device | None,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("stores"))
        sequence(data, 0, filled)
        read = sequence(resident if in_memory else data, first, first + 6, world, accumulation, device=device)
        assert read == truth[first * BATCH_SIZE : (first + 6) * BATCH_SIZE]
        assert data.warning is None and resident.warning is None


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("in_memory", [False, True])
def test_loader_processes_fill_the_store(
    data: ImageData, resident: ImageData, truth: list[tuple], stores: Path, workers: int, in_memory: bool
) -> None:
    chosen = resident if in_memory else data
    if not in_memory:
        batches = data.batches(SEED, 0, 20, BATCH_SIZE, workers=workers)
        next(batches)
        assert len(multiprocessing.active_children()) == workers
        batches.close()
    assert sequence(chosen, 0, 7, world=2, workers=workers) == truth[: 7 * BATCH_SIZE]
    assert_whole(the_store(stores))


def test_a_whole_store_needs_no_decoding_and_no_loader_processes(
    data: ImageData, truth: list[tuple], stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence(data, 0, 7)
    monkeypatch.setattr(loader, "decode_image", None)
    batches = data.batches(SEED, 0, 20, BATCH_SIZE, workers=2)
    next(batches)
    assert not multiprocessing.active_children()
    batches.close()
    assert sequence(data, 0, 20, workers=2) == truth


def test_each_row_is_decoded_once(data: ImageData, stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, count = loader.decode_image, [0]

    def counted(*args: Any, **kwargs: Any) -> np.ndarray:
        count[0] += 1
        return decode(*args, **kwargs)

    monkeypatch.setattr(loader, "decode_image", counted)
    sequence(data, 0, 20)
    assert count == [NUM_ROWS]


def zero_pixels(path: Path) -> None:
    """What a power cut leaves if the marks reached the disk before the pixels."""
    write_at(path, 0, bytes(12 * 192 + 100))


def flip_one_bit(path: Path) -> None:
    write_at(path, 20 * 192, bytes([path.read_bytes()[20 * 192] ^ 1]))


def change_a_label(path: Path) -> None:
    marks = path.stat().st_size - NUM_ROWS * 16
    write_at(path, marks + 16 * 3, (0).to_bytes(8, sys.byteorder))  # of row 3, which is 1


def swap_two_rows(path: Path) -> None:
    content, marks = path.read_bytes(), path.stat().st_size - NUM_ROWS * 16
    for start, length in ((0, 192), (marks, 16)):
        write_at(path, start, content[start + 2 * length : start + 3 * length])
        write_at(path, start + 2 * length, content[start : start + length])


def truncate(path: Path) -> None:
    os.truncate(path, 5000)


def truncate_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def put_noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def put_a_store_of_others(path: Path) -> None:
    """Rows that prove themselves, of another data set of the same shape."""
    path.unlink()
    DecodedStore(path, SHAPE, salt=123).write(ROWS, 255 - PIXELS, ROWS % 2)


def write_at(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize(
    "damage",
    [
        *(zero_pixels, flip_one_bit, change_a_label, swap_two_rows),
        *(truncate, truncate_to_nothing, put_noise, put_a_store_of_others),
    ],
)
def test_what_does_not_prove_itself_is_decoded_again(
    data: ImageData, truth: list[tuple], stores: Path, damage: Any
) -> None:
    sequence(data, 0, 7)
    (path,) = stores.glob("*.bin")
    before = path.read_bytes()
    damage(path)
    assert path.read_bytes() != before
    assert sequence(data, 0, 7) == truth[: 7 * BATCH_SIZE]
    assert_whole(the_store(stores))


def fill(data: ImageData, folder: Path, killed_at: int | None = None) -> None:
    """In a process of its own; it kills itself in the middle of write number `killed_at`."""
    datasets.config.HF_DATASETS_CACHE = folder
    write, count = os.pwrite, [0]

    def pwrite(file: int, content: Any, offset: int) -> int:
        count[0] += 1
        if count[0] == killed_at:
            write(file, bytes(memoryview(content).cast("B")[: memoryview(content).nbytes // 2]), offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, content, offset)

    os.pwrite = pwrite
    sequence(data, 0, 7)


@pytest.mark.parametrize("killed_at", [1, 2, 31, 60, 97])
def test_a_kill_while_filling_leaves_nothing_wrong(
    data: ImageData, truth: list[tuple], stores: Path, killed_at: int
) -> None:
    child = multiprocessing.get_context("fork").Process(target=fill, args=(data, stores.parent, killed_at))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    images, labels, known = the_store(stores).read(ROWS)
    assert known.sum() == (killed_at - 1) // 2
    assert np.array_equal(images[known], PIXELS[known]) and np.array_equal(labels[known], ROWS[known] % 2)
    assert sequence(data, 0, 7) == truth[: 7 * BATCH_SIZE]
    assert_whole(the_store(stores))


def test_processes_may_fill_at_once(data: ImageData, truth: list[tuple], stores: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=fill, args=(data, stores.parent)) for _ in range(3)]
    for child in children:
        child.start()
    assert sequence(data, 0, 20) == truth
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert_whole(the_store(stores))


def test_a_reader_beside_a_writer_sees_whole_rows_or_none(tmp_path: Path) -> None:
    """The writer stops for the reader in the middle of every row."""
    path = tmp_path / "x.bin"
    store = DecodedStore(path, SHAPE, 1)
    torn, write = threading.Barrier(2), os.pwrite

    def pwrite(file: int, content: np.ndarray, offset: int) -> int:
        raw = content.tobytes()
        write(file, raw[: len(raw) // 2], offset)
        torn.wait(10)
        torn.wait(10)
        return write(file, raw[len(raw) // 2 :], offset + len(raw) // 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        writer = threading.Thread(target=store.write, args=(ROWS[:5], PIXELS[:5], ROWS[:5] % 2))
        writer.start()
        reader = DecodedStore(path, SHAPE, 1)
        for number in range(10):
            torn.wait(10)
            images, _, known = reader.read(ROWS)
            torn.wait(10)
            assert known.sum() == number // 2 and np.array_equal(images[known], PIXELS[known])
        writer.join(10)
    assert reader.read(ROWS)[2].sum() == 5


def no_space(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_cannot_hold_the_store(
    data: ImageData, truth: list[tuple], stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_space)
        assert sequence(data, 0, 7) == truth[: 7 * BATCH_SIZE]
        assert data.warning == (
            f"decoded images are not kept in {stores}, so each epoch decodes anew: No space left on device"
        )
        assert not list(stores.glob("*.bin"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 15_000))  # type: ignore[attr-defined]
        assert sequence(data, 0, 7) == truth[: 7 * BATCH_SIZE]
        assert data.warning is not None and "more than half of the 1.5e-05 GB that are free there" in data.warning
        assert not list(stores.glob("*.bin"))
    sequence(data, 0, 7)
    assert data.warning is None
    assert_whole(the_store(stores))


def test_a_disk_that_fills_up(
    data: ImageData, truth: list[tuple], stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = os.pwrite, [0]

    def pwrite(file: int, content: Any, offset: int) -> int:
        count[0] += 1
        return no_space() or 0 if count[0] > 21 else write(file, content, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert sequence(data, 0, 7) == truth[: 7 * BATCH_SIZE]
    assert count == [22]  # and no further try
    assert the_store(stores).read(ROWS)[2].sum() == 10


def test_a_folder_that_cannot_be_written(
    data: ImageData, truth: list[tuple], stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores.write_text("a file where the folder should be")
    assert sequence(data, 0, 7) == truth[: 7 * BATCH_SIZE]
    assert data.warning is not None and f"not kept in {stores}" in data.warning and "\n" not in data.warning
    stores.unlink()
    sequence(data, 0, 7)
    # A whole store that others have made is used, and a part of one is as good as it goes.
    opened = os.open
    (path,) = stores.glob("*.bin")

    def read_only(name: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        if Path(name) == path and flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(name, flags, mode, **options)

    monkeypatch.setattr(os, "open", read_only)
    zero_pixels(path)
    before = path.read_bytes()
    assert sequence(data, 0, 7) == truth[: 7 * BATCH_SIZE]
    assert (data.warning, path.read_bytes()) == (None, before)
    truncate(path)
    assert sequence(data, 0, 7) == truth[: 7 * BATCH_SIZE]
    assert data.warning is not None and "Read-only file system" in data.warning


def test_what_the_images_depend_on_makes_another_store(parquet: str, stores: Path) -> None:
    configs = [
        DataConfig(source=parquet),
        DataConfig(source=parquet, split="train[:40]"),
        DataConfig(source=parquet, fit="resize"),
    ]
    for config in (*configs, *configs):
        for size, channels in (((8, 8), 3), ((8, 8), 1)):
            sequence(open_data(config, size, channels), 0, 7)
    sequence(open_data(DataConfig(source=parquet, fit="resize"), (6, 8), 3), 0, 7)
    assert len(list(stores.glob("*.bin"))) == len(list(stores.glob("*.json"))) == 7
    described = [json.loads(path.read_text()) for path in stores.glob("*.json")]
    assert {(d["split"], d["fit"], tuple(d["shape"])) for d in described} >= {("train[:40]", "exact", (40, 8, 8, 1))}


def test_stores_that_nobody_has_opened_for_long_make_room_for_new_ones(data: ImageData, stores: Path) -> None:
    def make(letter: str, days: float) -> Path:
        path = stores / f"{letter * 32}.bin"
        DecodedStore(path, SHAPE, 1).write(ROWS, PIXELS, ROWS % 2)
        path.with_suffix(".json").write_text("{}")
        return age(path, days)

    def age(path: Path, days: float) -> Path:
        os.utime(path, (time.time() - days * 86400,) * 2)
        return path

    stores.mkdir(parents=True)
    old, recent, open_now, opened_again = make("a", 31), make("b", 29), make("c", 31), make("d", 31)
    foreign = stores / "notes.bin"
    foreign.touch()
    age(foreign, 31)
    store = DecodedStore(open_now, SHAPE, 1)
    age(open_now, 31)
    DecodedStore(opened_again, SHAPE, 1)
    sequence(data, 0, 1)
    assert not old.exists() and not old.with_suffix(".json").exists()
    assert all(path.exists() for path in (recent, open_now, opened_again, foreign, recent.with_suffix(".json")))
    assert_whole(store)
    del store
    sequence(data, 0, 1)  # makes no store
    assert open_now.exists()
    (mine,) = set(stores.glob("*.bin")) - {recent, open_now, opened_again, foreign}
    mine.unlink()
    sequence(data, 0, 1)
    assert mine.exists() and not open_now.exists()


def test_a_changed_image_is_seen(tmp_path: Path, stores: Path) -> None:
    folder = write_folder(tmp_path / "images", [f"{row}.png" for row in range(4)])

    def pixels() -> list[bytes]:
        data = open_data(DataConfig(source=f"folder:{folder}"), (8, 8), 3)
        (batch,) = data.batches(SEED, 0, 1, 4, workers=0)
        assert batch.labels is None
        images = batch.images.permute(0, 2, 3, 1).numpy()
        return [images[batch.rows.tolist().index(row)].tobytes() for row in range(4)]

    for _ in range(2):
        assert pixels() == [picture(row).tobytes() for row in range(4)]
    (folder / "2.png").write_bytes(png(picture(9)))
    os.utime(folder / "2.png", (1, 1))
    assert pixels() == [picture(row).tobytes() for row in (0, 1, 9, 3)]


def test_a_bad_image_is_named_when_it_is_due(tmp_path: Path, stores: Path) -> None:
    folder = write_folder(tmp_path / "images", [f"{row:02}.png" for row in range(12)])
    (folder / "07.png").write_bytes(b"not an image")
    data, resident = (
        open_data(DataConfig(source=f"folder:{folder}", resident=resident), (8, 8), 3) for resident in (False, True)
    )
    read: list[int] = []
    messages = []
    for _ in range(2):  # the second time the others come from the store
        read.clear()
        messages.append(
            one_line(lambda: [read.extend(b.rows.tolist()) for b in data.batches(0, 0, 12, 1, workers=0, device=CPU)])
        )
    messages.append(one_line(lambda: resident.batches(0, 0, 12, 1, workers=0)))
    assert len(set(messages)) == 1 and f"image {folder}/07.png (row 7 of " in messages[0]
    (folder / "07.png").write_bytes(png(picture(7)))
    order = [batch.rows.item() for batch in data.batches(0, 0, 12, 1, workers=0)]
    assert read == order[: order.index(7)]


def test_sets_that_are_not_kept(parquet: str, stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (
        DataConfig(source=parquet, cache_gb=0),
        DataConfig(source=parquet, cache_gb=(NUM_ROWS * 192 - 1) / 1e9),
        DataConfig(source=parquet, streaming=True),
    ):
        data = open_data(config, (8, 8), 3)
        sequence(data, 0, 2)
        assert data.warning is None and not stores.exists()
    monkeypatch.setattr(datasets, "is_caching_enabled", lambda: False)
    sequence(open_data(DataConfig(source=parquet), (8, 8), 3), 0, 2)
    assert not stores.exists()


def test_what_cannot_be_resident_is_refused(
    parquet: str, resident: ImageData, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def streamed() -> Any:
        return open_data(DataConfig(source=parquet, streaming=True, resident=True), (8, 8), 3)

    assert "data.resident keeps a whole data set and data.streaming never has it" in one_line(streamed, ConfigError)
    for free, fits in ((2 * NUM_ROWS * 192 - 1, False), (2 * NUM_ROWS * 192, True)):
        monkeypatch.setattr(loader, "_free_bytes", lambda device, free=free: free)
        if fits:
            assert next(resident.batches(0, 0, 1, 8, workers=0)).images.shape == (8, 3, 8, 8)
        else:
            message = one_line(lambda: resident.batches(0, 0, 1, 8, workers=0), ConfigError)
            assert "the 50 images take 9.6e-06 GB, more than half of the 1.92e-05 GB of memory of cpu" in message


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_the_budget_is_checked(parquet: str, value: float) -> None:
    assert "data.cache_gb is" in one_line(
        lambda: open_data(DataConfig(source=parquet, cache_gb=value), (8, 8), 3), ConfigError
    )


def test_ranks_load_a_resident_set_from_different_ends(
    resident: ImageData, truth: list[tuple], stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that on one machine they share the decoding."""
    monkeypatch.setattr(loader, "_RESIDENT_ROWS", 12)
    read, asked = DecodedStore.read, []

    def recorded(self: DecodedStore, rows: np.ndarray) -> Any:
        asked.append(rows.tolist())
        return read(self, rows)

    monkeypatch.setattr(DecodedStore, "read", recorded)
    assert sequence(resident, 0, 20, world=2) == truth
    assert [rows[0] for rows in asked] == [0, 12, 24, 36, 48, 24, 36, 48, 10, 22]


def test_stores_pickle_for_spawned_workers(tmp_path: Path) -> None:
    store = DecodedStore(tmp_path / "x.bin", SHAPE, 5)
    store.write(ROWS, PIXELS, ROWS % 2)
    content = pickle.dumps(store)
    assert len(content) < 2000
    assert_whole(pickle.loads(content))


def batch(number: int) -> Batch:
    return Batch(torch.zeros(1, 3, 2, 2), None, torch.tensor([number]), torch.tensor([number]))


def test_each_batch_is_sent_before_the_one_in_front_of_it_is_used() -> None:
    log: list[str] = []

    def batches() -> Iterator[Batch]:
        try:
            yield from (batch(number) for number in range(3))
            raise DataError("image 3 is bad")
        finally:
            log.append("closed")

    def send(sent: Batch) -> Batch:
        log.append(f"send {sent.rows.item()}")
        return sent

    ahead = _one_ahead(batches(), send, lambda sent: sent)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="image 3"):
        for received in ahead:
            log.append(f"use {received.rows.item()}")
    assert log == ["send 0", "send 1", "use 0", "send 2", "use 1", "closed", "use 2"]
    log.clear()
    inner = batches()
    ahead = _one_ahead(inner, send, lambda sent: sent)  # type: ignore[arg-type]
    next(ahead)
    ahead.close()
    assert log == ["send 0", "send 1", "closed"]
    assert list(_one_ahead((b for b in ()), send, lambda sent: sent)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("delay", ["none", "device", "host"])
def test_a_gpu_gets_the_batches_of_the_host(
    data: ImageData, resident: ImageData, stores: Path, in_memory: bool, delay: str
) -> None:
    device = torch.device("cuda")
    expected = list(data.batches(SEED, 0, 60, BATCH_SIZE, workers=0))
    consumer = torch.cuda.Stream(device)
    found = []
    with torch.cuda.stream(consumer):
        batches = (resident if in_memory else data).batches(SEED, 0, 60, BATCH_SIZE, workers=0, device=device)
        for images, labels, ordinals, _, _ in batches:
            assert images.is_cuda and images.is_contiguous(memory_format=torch.channels_last)
            if delay == "device":
                torch.cuda._sleep(2_000_000)  # the batch is read long after the host has dropped it
            elif delay == "host":
                time.sleep(0.002)
            found.append((images + 0, labels + 0, ordinals + 0))
            del images, labels, ordinals
    consumer.synchronize()
    for (images, labels, ordinals), batch in zip(found, expected, strict=True):
        assert torch.equal(images.cpu(), batch.images)
        assert torch.equal(labels.cpu(), batch.labels) and torch.equal(ordinals.cpu(), batch.ordinals)


@pytest.mark.gpu
@pytest.mark.parametrize("in_memory", [False, True])
def test_no_batch_waits_for_the_gpu(data: ImageData, resident: ImageData, stores: Path, in_memory: bool) -> None:
    chosen, device = resident if in_memory else data, torch.device("cuda")
    batches = chosen.batches(SEED, 0, 20, BATCH_SIZE, workers=0, device=device)
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(batches)) == 19
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_digits_have_one_store_in_every_process(tmp_path: Path) -> None:
    """Their data set is made in memory, so its fingerprint is a hash of its content."""
    pytest.importorskip("sklearn")
    program = """
from fastddpm.data import DataConfig, open_data
next(open_data(DataConfig(source="digits"), (8, 8), 1).batches(0, 0, 1, 8, workers=0))
"""
    for hash_seed in ("1", "2"):
        env = os.environ | {"HF_HOME": str(tmp_path), "PYTHONHASHSEED": hash_seed}
        env.pop("HF_DATASETS_CACHE", None)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=env)
        assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / "datasets" / cache._FOLDER).glob("*.bin"))) == 1
