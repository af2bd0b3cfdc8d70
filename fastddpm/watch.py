"""Ends a run of several processes that hangs, naming the rank at fault.

A collective that one process does not join stalls all others without a word. Every process posts where it is, from a
thread, in a table that rank 0 keeps; one that has made no progress for too long reads it and says who is behind.
"""

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.distributed as dist

# What a step consists of, in order; a process in an earlier one holds up those in a later one.
PHASES = ("reading data", "computing", "agreeing whether to stop", "saving", "measuring quality", "sampling")
# In these all wait for each other; elsewhere all may be busy for as long as it takes.
MEETINGS = ("computing", "agreeing whether to stop")
HANG_EXIT_CODE = 1
PATIENCE = 15.0  # seconds for an answer of the table


class Post(NamedTuple):
    """Where a process is."""

    step: int
    """The step it works on, counted from 1."""
    phase: str
    seconds: float
    """How long it has been there."""
    beat: int
    """Posts of its thread so far, which go on whatever else it does: one that stands still is stopped, or gone."""
    host: str


def culprits(before: Mapping[int, Post | None], after: Mapping[int, Post | None]) -> tuple[list[int], str | None]:
    """The ranks that hold up the others, and a sentence that says so, from two readings of the table some time apart.

    A rank without a post has never posted. No ranks where all wait for each other at the same place; no sentence either
    where all are busy there, with data, a checkpoint or samples.
    """
    dead = [rank for rank, post in after.items() if post is None or before[rank] == post]
    if dead:
        told = []
        for rank in dead:
            post = after[rank]
            place = "it has not begun" if post is None else f"last seen at step {post.step}, {post.phase}"
            told.append(f"rank {rank}{'' if post is None else f' on {post.host}'} does not answer ({place})")
        return dead, f"{', '.join(told)}: it is stopped, out of memory, or its machine is gone"
    posts = {rank: post for rank, post in after.items() if post is not None}
    places = {rank: (post.step, PHASES.index(post.phase)) for rank, post in posts.items()}
    first, last = min(places.values()), max(places.values())
    if first == last:
        phase = PHASES[first[1]]
        if phase not in MEETINGS:
            return [], None
        return [], f"all processes wait at step {first[0]}, {phase}: look at the network between them"
    behind = [rank for rank, place in places.items() if place == first]
    told = [
        f"rank {rank} on {posts[rank].host} has been {posts[rank].phase} at step {posts[rank].step} for "
        f"{posts[rank].seconds:.0f} s"
        for rank in behind
    ]
    return behind, f"{', '.join(told)}, and the others wait for it at step {last[0]}, {PHASES[last[1]]}"


class HangWatch:
    """Watches this process's progress from a thread; nothing with one process or without a timeout.

    Args:
        timeout: seconds without progress that are too many; 0 watches nothing.
        report: called with the message just before this process ends, on the lowest rank that is not at fault.
    """

    def __init__(self, timeout: float, report: Callable[[str], None]) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.timeout, self.report = timeout, report
        self._place: tuple[int, str, float] = (0, PHASES[0], time.monotonic())
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        if several and timeout > 0:
            self._rank, self._world = dist.get_rank(), dist.get_world_size()
            self._period = min(5.0, timeout / 4)
            self._table, self._reading = _open_stores(self._rank, self._world)
            self._threads = [threading.Thread(target=work, daemon=True) for work in (self._post, self._watch)]
            for thread in self._threads:
                thread.start()

    def at(self, step: int, phase: str) -> None:
        """The training thread begins `phase`, one of PHASES (ValueError), of `step`."""
        if phase not in PHASES:
            raise ValueError(f"phase {phase!r} is not in PHASES")
        self._place = (step, phase, time.monotonic())

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=1)

    def _post(self) -> None:
        """Says where this process is, as long as it lives."""
        host, beat = socket.gethostname(), 0
        while not self._ended.wait(self._period if beat else 0):
            step, phase, since = self._place
            beat += 1
            with contextlib.suppress(Exception):  # rank 0 has ended, or is what _watch will name
                self._table.set(str(self._rank), json.dumps([step, phase, time.monotonic() - since, beat, host]))

    def _watch(self) -> None:
        """Looks into the table when this process makes no progress."""
        while not self._ended.wait(self._period):
            since = self._place[2]
            if time.monotonic() - since <= self.timeout:
                continue
            message: str | None
            try:
                before = self._read_in_time()
                # So long that every living process has posted, and that one just getting there has moved on.
                if self._ended.wait(3 * self._period):
                    return
                ranks, message = culprits(before, self._read_in_time())
            except Exception as error:  # whatever torch raises for a table that cannot be reached
                told = " ".join(str(error).split())[:200] or type(error).__name__
                ranks, message = [0], f"rank 0, which keeps the table of all ranks, does not answer ({told})"
            if message is None or self._ended.is_set() or self._place[2] != since:
                continue
            self._end(f"no progress for {time.monotonic() - since:.0f} s: {message}", ranks)

    def _read_in_time(self) -> dict[int, Post | None]:
        """The table; TimeoutError where its keeper is stopped, for whose answer torch waits for ever."""
        answer: list[dict[int, Post | None]] = []
        reader = threading.Thread(target=lambda: answer.append(self._read()), daemon=True)
        reader.start()
        reader.join(PATIENCE)
        if not answer:
            raise TimeoutError(f"nothing in {PATIENCE:.0f} s")
        return answer[0]

    def _read(self) -> dict[int, Post | None]:
        posts: dict[int, Post | None] = {}
        for rank in range(self._world):
            known = self._reading.check([str(rank)])
            posts[rank] = Post(*json.loads(self._reading.get(str(rank)))) if known else None
        return posts

    def _end(self, message: str, ranks: list[int]) -> None:
        speaker = next((rank for rank in range(self._world) if rank not in ranks), self._rank)
        if self._rank == speaker:
            self.report(message)
            print(f"fastddpm (rank {self._rank}): error: {message}", file=sys.stderr, flush=True)
        else:
            time.sleep(4 * self._period)  # a launcher ends everyone at the first exit: let the message come out
        # The training thread is inside a collective that nothing interrupts.
        os._exit(HANG_EXIT_CODE)


def _open_stores(rank: int, world: int) -> tuple[dist.TCPStore, dist.TCPStore]:
    """Two connections to a table of its own (torch's serves the collectives), which rank 0 keeps on a free port.

    Two, since a reading that waits for a stopped keeper holds its connection, and posts must go on.
    """
    host, patience = os.environ.get("MASTER_ADDR", "127.0.0.1"), datetime.timedelta(seconds=PATIENCE)

    def connect(port: int, keeper: bool) -> dist.TCPStore:
        return dist.TCPStore(host, port, world, is_master=keeper, timeout=patience, wait_for_workers=False)

    port: list[Any] = [None]
    if rank == 0:
        first = connect(0, True)
        port = [first.port]
    dist.broadcast_object_list(port)
    if rank != 0:
        first = connect(port[0], False)
    return first, connect(port[0], False)
