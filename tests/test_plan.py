"""`fastddpm plan`: what it prints is what the loader reads, for any number of ranks; errors and their exit codes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_data import NUM_ROWS, private_cache, regroup, shards_of, write_splits

from fastddpm import cli
from fastddpm import data as data_module
from fastddpm.data import DataConfig, ImageData, open_data
from fastddpm.order import BatchPlan
from fastddpm.sources import SOURCES


@pytest.fixture(scope="module", autouse=True)
def library_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_cache(tmp_path_factory.mktemp("datasets")):
        yield


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_splits(tmp_path_factory.mktemp("parquet"))
    for path in folder.glob("train-*.parquet"):
        regroup(path, 4)
    return folder


def planned(source: str, *options: str) -> dict:
    """The JSON that the command prints."""
    text = printed(source, "--json", *options)
    found: dict = json.loads(text)
    return found


def printed(source: str, *options: str) -> str:
    import contextlib
    import io

    out = io.StringIO()
    arguments = ["plan", "--preset", "digits", "--data.source", source, "--model.in-channels", "3"]
    with contextlib.redirect_stdout(out):
        code = cli.main([*arguments, "--model.out-channels", "3", "--batch-size", "8", *options])
    assert code == 0
    return out.getvalue()


STREAMED = ("--data.streaming", "--data.lanes", "4", "--data.shuffle-buffer", "12")


@pytest.mark.parametrize("options", [(), STREAMED, ("--data.filter", "label == 'a'"), ("--accumulation", "2")])
def test_the_plan_is_what_every_rank_reads(parquet: Path, options: tuple[str, ...]) -> None:
    source = f"parquet:{parquet}"
    found = planned(source, "--ranks", "2", "--first-step", "5", "--num-steps", "3", "--seed", "7", *options)
    streaming = {"streaming": True, "lanes": 4, "shuffle_buffer": 12} if options == STREAMED else {}
    rule = options[1] if options[:1] == ("--data.filter",) else None
    data = open_data(DataConfig(source=source, cache_gb=0, filter=rule, **streaming), (8, 8), 3)
    accumulation = 2 if "--accumulation" in options else 1
    for rank in range(2):
        batches = list(data.batches(7, 5, 8, 8, rank, 2, accumulation, workers=0))
        shown = [m for m in found["micro_batches"] if m["rank"] == rank]
        assert [(m["step"], m["micro_batch"]) for m in shown] == list(BatchPlan(8, 2, accumulation).micro_batches(5, 8))
        for batch, micro_batch in zip(batches, shown, strict=True):
            assert micro_batch["positions"] == batch.ordinals.tolist()
            assert micro_batch["rows"] == batch.rows.tolist()
            assert micro_batch["names"] == [data.name_row(row) for row in batch.rows.tolist()]
    assert found["identity"] == data.identity and found["images"] == (25 if rule else NUM_ROWS)
    assert (found["lanes"], found["dropped_per_epoch"]) == ((4, 2) if streaming else (None, 0))
    assert found["per_rank_and_step"] == 4 and found["per_micro_batch"] == 4 // accumulation


def test_the_header_says_what_is_read(parquet: Path) -> None:
    text = printed(f"parquet:{parquet}", *STREAMED, "--ranks", "8", "--num-steps", "1", "--check", "--steps", "12")
    lines = {line[:19].strip(): line[19:] for line in text.splitlines()[:16]}
    assert lines["images"] == "50" and lines["blocks"] == "15" and lines["window"] == "3"
    assert lines["epochs"] == "2.0"
    assert "8 ranks do not divide 4 lanes" in lines["warnings"]
    assert (
        lines["check"] == "6 steps on 8 ranks: every position on one rank, once; epoch 0 holds 48 of 50 rows, each once"
    )
    assert "step 0, rank 7, micro-batch 0\n             7  row " in text
    assert " of row group " in text and "train-0000" in text


def test_the_memory_of_many_lanes_is_told(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(f"parquet:{parquet}", *STREAMED, "--num-steps", "0")["warnings"] == []
    monkeypatch.setattr(data_module, "MANY_BYTES", 100)
    (warning,) = planned(f"parquet:{parquet}", *STREAMED, "--num-steps", "0")["warnings"]
    assert warning.startswith("the stream's lanes (4) may hold ") and "lower data.lanes" in warning


def test_streams_that_do_not_count_show_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "shards", lambda location, config: shards_of((5, 9, 3)))
    text = printed("shards:x", "--data.streaming", "--data.lanes", "2", "--ranks", "2", "--num-steps", "1", "--check")
    assert "             3  example 1 of lane 1\n" in text and "its own shards are through" in text
    assert "check              100 steps on 2 ranks: every position on one rank, once\n" in text
    found = planned("shards:x", "--data.streaming", "--num-steps", "1")
    assert found["images"] is None and found["micro_batches"][0]["rows"] is None


def test_thousands_of_ranks_are_checked_without_processes(parquet: Path) -> None:
    for options in ((), STREAMED):
        found = planned(
            f"parquet:{parquet}", "--ranks", "4096", "--batch-size", "8192", "--num-steps", "0", "--check", *options
        )
        assert "1 steps on 4,096 ranks: every position on one rank, once" in found["check"]
        assert any("more than once" in warning for warning in found["warnings"])


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--ranks", "3"), 5, "batch size 8 does not divide by 3 processes"),
        (("--ranks", "0"), 5, "ranks 0"),
        (("--rnks", "3"), 5, "did you mean --ranks?"),
        (("--data.filter", "label == 'z'"), 4, "no class 'z'"),
        (("--data.split", "dev"), 4, "no split dev"),
        (("--first-step", "-1"), 5, "first-step -1"),
    ],
)
def test_errors_end_with_their_codes(
    parquet: Path, options: tuple[str, ...], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--preset", "digits", "--data.source", f"parquet:{parquet}", "--batch-size", "8", *options]
    assert cli.main(arguments) == code
    err = capsys.readouterr().err
    assert err.startswith("fastddpm: error: ") and words in err and err.count("\n") == 1


def test_a_plan_that_is_wrong_is_found(
    parquet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--preset", "digits", "--data.source", f"parquet:{parquet}", "--batch-size", "8", "--check"]
    real = BatchPlan.positions
    with monkeypatch.context() as patch:
        patch.setattr(BatchPlan, "positions", lambda self, step, index, rank: real(self, step, index, rank) // 2)
        assert cli.main(arguments) == 4 and "not each position of the step once" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(ImageData, "rows_at", lambda self, positions, seed: positions // 2)
        assert cli.main(arguments) == 4 and "an epoch holds 25 different rows, not 50" in capsys.readouterr().err
