"""Small data sets that the tests write, each image of its own row."""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastddpm.data import Batch
from fastddpm.errors import DataError

NUM_ROWS = 50
SHARD_ROWS = (17, 20, 13)


@contextmanager
def private_cache(folder: Path) -> Iterator[None]:
    """datasets' cache in `folder`, removed at the end, and no Hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
        patch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", folder / "extracted")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield
    shutil.rmtree(folder, ignore_errors=True)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture(row: int, height: int = 8, width: int = 8) -> np.ndarray:
    """An RGB image that no other row has."""
    return np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_parquet(path: Path, rows: range, features: datasets.Features | None = None, **columns: Any) -> None:
    features = features or datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": png(picture(row)), "path": f"{row}.png"} for row in rows]
    labels = [row % 2 for row in rows]
    values = {"img": images, "label": labels} | columns
    dataset = datasets.Dataset.from_dict({name: values[name] for name in features}, features=features)
    dataset.to_parquet(path)


def write_splits(folder: Path) -> Path:
    """50 rows of train in three files, one of them beside an empty file, and a test split that cannot be read."""
    start = 0
    for number, rows in enumerate(SHARD_ROWS):
        write_parquet(folder / f"train-0000{number}-of-00003.parquet", range(start, start + rows))
        start += rows
    whole = pq.read_table(folder / "train-00000-of-00003.parquet")
    pq.write_table(whole.slice(0, 0), folder / "train-extra.parquet")
    (folder / "test-00000-of-00001.parquet").write_bytes(b"PAR1 but damaged")
    (folder / "README.md").write_text("a data set")
    return folder


def shard_examples(shards: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Rows first .. last - 1 of each shard."""
    for first, last in shards:
        for row in range(first, last):
            yield {"img": {"bytes": png(picture(row)), "path": f"{row}.png"}, "label": row % 2}


def shards_of(counts: tuple[int, ...]) -> datasets.IterableDataset:
    """A stream of shards of so many rows, about which nothing is known beforehand."""
    ends = np.cumsum(counts).tolist()
    shards = [(end - count, end) for end, count in zip(ends, counts, strict=True)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.IterableDataset.from_generator(shard_examples, features=features, gen_kwargs={"shards": shards})


def regroup(path: Path, rows: int) -> None:
    """Write a parquet file again in row groups of so many rows."""
    pq.write_table(pq.read_table(path), path, row_group_size=rows)


def write_folder(folder: Path, names: list[str]) -> Path:
    for row, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(row)))
    return folder


def image_bytes(batch: Batch) -> list[bytes]:
    return [pixels.tobytes() for pixels in batch.images.permute(0, 2, 3, 1).contiguous().numpy()]


def one_line(action: Callable[[], Any], error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600
    return message
