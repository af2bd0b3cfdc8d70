"""`fastddpm plan`: which images a config reads, by rank, step and micro-batch, worked out without any process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from .config import Config
from .data import ImageData, open_data
from .errors import ConfigError, DataError
from .order import BatchPlan


def run_plan(config: Config, *, ranks: int, first_step: int, num_steps: int, check: bool, as_json: bool) -> int:
    """Print what `config` reads as a whole and in steps first_step .. first_step + num_steps - 1 on `ranks` processes.

    check: work through an epoch as well (check_plan). as_json: one JSON object instead of lines.

    Raises:
        ConfigError: the config cannot be run, or not on so many ranks.
        DataError: the data cannot be opened, or (with check) the plan does not give each image to one rank once.
    """
    config.check()
    if ranks < 1 or first_step < 0 or num_steps < 0:
        raise ConfigError(
            f"ranks {ranks}, first-step {first_step}, num-steps {num_steps}: at least one rank and no negative steps"
        )
    plan = BatchPlan(config.batch_size, ranks, config.accumulation)
    data = open_data(config.data, config.model.image_size, config.channels)
    header = describe(config, data, ranks)
    header["check"] = check_plan(config, data, plan) if check else None
    steps = micro_batches(config, data, plan, range(first_step, first_step + num_steps))
    if as_json:
        print(json.dumps(header | {"micro_batches": list(steps)}, indent=2))
        return 0
    for name, value in header.items():
        for line in value if isinstance(value, list) else [value]:
            if line is not None:
                print(f"{name.replace('_', ' '):19}{line if isinstance(line, str) else f'{line:,}'}")
    for micro_batch in steps:
        print("step {step}, rank {rank}, micro-batch {micro_batch}".format_map(micro_batch))
        for position, name in zip(micro_batch["positions"], micro_batch["names"], strict=True):
            print(f"  {position:>12,}  {name}")
    return 0


def describe(config: Config, data: ImageData, ranks: int) -> dict[str, Any]:
    """What the config reads, as a whole."""
    images, sources = data.num_images, [config.data.source, *config.data.mix]
    facts: dict[str, Any] = {
        "sources": sources,
        "images": images,
        "blocks": data.num_blocks,
        "lanes": data.num_lanes if config.data.streaming else None,
        "window": data.window if config.data.streaming else None,
        "dropped_per_epoch": data.dropped_per_epoch,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "epochs": None,
        "per_rank_and_step": config.batch_size // ranks,
        "per_micro_batch": config.micro_batch(ranks),
        "identity": data.identity,
        "warnings": [] if data.warning is None else [data.warning],
    }
    if data.dropped_per_epoch is not None and images is not None:
        facts["epochs"] = round(config.steps * config.batch_size / (images - data.dropped_per_epoch), 2)
    warnings = facts["warnings"]
    if config.data.streaming and data.num_lanes % ranks:
        warnings.append(
            f"{ranks} ranks do not divide {data.num_lanes} lanes: ranks read blocks of which they use a part; choose "
            "another number of ranks, or data.lanes before the run is started"
        )
    if config.data.streaming and images is None:
        warnings.append(
            "rows are not counted beforehand: a lane begins its next epoch when its own shards are through, so "
            "examples of shorter lanes come round sooner"
        )
    if images is not None and images < config.batch_size:
        warnings.append(f"a batch of {config.batch_size} holds some of the {images} images more than once")
    return facts


def micro_batches(config: Config, data: ImageData, plan: BatchPlan, steps: range) -> Iterator[dict[str, Any]]:
    """Positions, rows and names of the rows of every micro-batch of every rank."""
    for step, index in plan.micro_batches(steps.start, steps.stop):
        for rank in range(plan.world):
            positions = plan.positions(step, index, rank)
            rows = data.rows_at(positions, config.seed)
            if rows is not None:
                names = [data.name_row(row) for row in rows.tolist()]
            else:
                places = ((p % data.num_lanes, p // data.num_lanes) for p in positions.tolist())
                names = [f"example {number} of lane {lane}" for lane, number in places]
            yield {
                "step": step,
                "rank": rank,
                "micro_batch": index,
                "positions": positions.tolist(),
                "rows": None if rows is None else rows.tolist(),
                "names": names,
            }


def check_plan(config: Config, data: ImageData, plan: BatchPlan) -> str:
    """Works through the steps of one epoch (of mixtures and uncounted streams: 100) and says what was found.

    Raises DataError where ranks overlap, positions are missing, or an epoch does not hold each of its rows once.
    """
    dropped = data.dropped_per_epoch
    length = None if data.num_images is None or dropped is None else data.num_images - dropped
    num_steps = 100 if length is None else -(-length // plan.batch_size)
    rows = []
    for step in range(num_steps):
        parts = [plan.positions(step, index, rank) for index in range(plan.accumulation) for rank in range(plan.world)]
        positions = np.concatenate(parts)
        if not np.array_equal(np.sort(positions), np.arange(step * plan.batch_size, (step + 1) * plan.batch_size)):
            raise DataError(f"step {step}: the ranks' positions are not each position of the step once")
        if length is not None:
            found = data.rows_at(np.sort(positions), config.seed)
            assert found is not None
            rows.append(found)
    done = f"{num_steps:,} steps on {plan.world:,} ranks: every position on one rank, once"
    if length is None:
        return done
    different = len(np.unique(np.concatenate(rows)[:length]))
    if different != length:
        raise DataError(f"an epoch holds {different:,} different rows, not {length:,}")
    return f"{done}; epoch 0 holds {length:,} of {data.num_images:,} rows, each once"
