"""Rows of benchmarks/chaos.py in which whole runs are killed, spread out, disturbed, stopped and sharded."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml

from fastddpm.order import rows_at

from .chaos_runs import (
    BATCH,
    ROWS,
    TOLERANCE,
    Count,
    Life,
    Run,
    Session,
    Stalled,
    faults_of,
    largest_distance,
    surroundings,
    unequal,
)
from .record import ROOT

MOMENTS = ("step", "save", "start", "epoch")


def kill(session: Session) -> None:
    """20 SIGKILLs at random moments, started again by the same command: everything bitwise that of a calm run."""
    steps = session.number(200, 30)
    combinations = [
        (streamed, processes, workers) for streamed in (False, True) for processes in (1, 2) for workers in (0, 2)
    ]
    if session.quick:
        combinations = [(False, 1, 2)]

    def options(streamed: bool, workers: int = 0) -> dict[str, Any]:
        streaming = {"data.streaming": True} if streamed else {"data.cache-gb": 0}
        return {"data.source": session.parquet(), "steps": steps, "data.workers": workers, **streaming}

    def calm(streamed: bool, processes: int) -> Run:
        return session.run("calm", processes=processes, options=options(streamed) | {"save-every": steps}).complete()

    def disturb(streamed: bool, processes: int, workers: int, reference: Run) -> None:
        kind = "streamed" if streamed else "map-style"
        number = session.number(20 if processes == 1 else 5, 2)
        name = f"{kind}, {processes} process{'es' * (processes > 1)}, {workers} workers"
        with session.count("kill", f"{name}: SIGKILLs") as count:
            run = session.run("killed", processes=processes, options=options(streamed, workers))
            generator = random.Random(f"{session.seed} {name}")
            hit = dict.fromkeys(MOMENTS, 0)
            for moment in _moments(number, session.quick, generator):
                hit[_kill_once(run, moment, generator, (5, 9) if session.quick else (1, 6))] += 1
                count.add(True)
            resumed = sum("going on at step" in p.read_text() for p in run.folder.parent.glob("run-life*.err"))
            count.facts = {**hit, "resumed": resumed}
            if not resumed:
                count.wrong.append("no start went on from a checkpoint")
            count.what += f" ({', '.join(f'{n} at {m}' for m, n in hit.items() if n)})"
        with session.count("kill", f"{name}: samples, log, model, EMA and Adam bitwise") as count:
            count.add(unequal(run.complete(), reference), name)

    alone, several = ([c for c in combinations if (c[1] == 1) is one] for one in (True, False))
    kinds = sorted({c[:2] for c in combinations})
    references = dict(zip(kinds, session.side_by_side(calm, kinds), strict=True))
    session.side_by_side(disturb, [(*c, references[c[:2]]) for c in alone])
    for c in several:
        disturb(*c, references[c[:2]])


def _moments(number: int, quick: bool, generator: random.Random) -> list[str]:
    """Kinds of moments, all of them among any four, in random order; ends of epochs in the second half's reach too."""
    if quick:
        return ["step", "save"][:number]
    chosen = ["epoch", "save", "step", "start"] if number < 10 else ["epoch"] * 3 + ["save"] * 6 + ["start"] * 3
    chosen += ["step"] * (number - len(chosen))
    generator.shuffle(chosen)
    return chosen


def _kill_once(run: Run, moment: str, generator: random.Random, steps: tuple[int, int]) -> str:
    """Start the run and SIGKILL it; returns the moment that was hit. Raises Stalled if it ended before."""
    life = run.start()
    if moment == "start":
        time.sleep(generator.uniform(0.2, 4.0))
    else:
        life.wait_for_step(0)
        first = life.step
        step = first + generator.randint(*steps)
        if moment == "epoch":
            epoch = ROWS // BATCH  # the last batch of an epoch is step 37 (streamed) or 38 (map-style) and multiples
            ends = [e for e in range(epoch, run.steps - 20, epoch) if e > first + 1]
            step, moment = (ends[0] - 1 + generator.randint(0, 1), moment) if ends else (step, "step")
        life.wait_for_step(step)
        if moment == "save":
            life.wait_until(run.is_saving, pause_s=0.0002)
        else:
            time.sleep(generator.uniform(0.0, 0.03))
    if life.process.poll() is not None:
        raise Stalled(f"ended at step {life.step} before the kill: {life.last_words()}")
    if run.processes == 1:
        life.process.kill()  # its loader processes must find out by themselves
    elif moment == "start" or generator.random() < 0.5:
        life.end()  # as a machine that goes down
    else:
        os.kill(generator.choice(life.ranks(run.processes)), signal.SIGKILL)
    life.wait()
    if run.processes > 1:
        life.end()
    return moment


def elastic(session: Session) -> None:
    """1, 2, 4 processes x accumulation 1, 2, 4, and a run that changes its processes across kills."""
    steps = session.number(200, 12)
    worlds, accumulations = ((1, 2, 4), (1, 2, 4)) if not session.quick else ((1,), (1, 2))

    def trained(processes: int, accumulation: int) -> Run:
        options = {"data.source": session.parquet(), "steps": steps, "accumulation": accumulation, "save-every": steps}
        return session.run("elastic", processes=processes, options=options).complete()

    alone = dict(zip(accumulations, session.side_by_side(trained, [(1, a) for a in accumulations]), strict=True))
    reference = alone[1]
    with session.count("elastic", f"processes x accumulation, {steps} steps, samples equal, within 1e-5") as count:
        farthest = 0.0
        for processes in worlds:
            for accumulation in accumulations:
                run = alone[accumulation] if processes == 1 else trained(processes, accumulation)
                count.add(unequal(run, reference, TOLERANCE), f"{processes} x {accumulation}")
                farthest = max(farthest, largest_distance(run, reference))
        count.what += f" (at most {farthest:.1e})"
        count.facts["farthest"] = farthest
    if session.quick:
        return
    for streamed in (False, True):
        source = {"data.source": session.parquet(), "steps": steps, "data.streaming": streamed or None}
        kind = "streamed" if streamed else "map-style"
        with session.count("elastic", f"{kind}: 2, then 4, then 1 processes across kills") as count:
            reference = session.run("whole", options=source).complete() if streamed else alone[1]
            run = session.run("changing", options=source)
            for processes, until in ((2, 67), (4, 131)):
                run.processes = processes
                life = run.start()
                life.wait_for_step(until)
                life.end()
            run.processes = 1
            run.complete()
            count.add(unequal(run, reference, TOLERANCE), kind)
            count.what += f" (at most {largest_distance(run, reference):.1e})"


def quiet(session: Session) -> None:
    """What must not matter: workers, prefetching, caches, intervals of log, save and sample."""
    steps = session.number(60, 12)
    base = {"data.source": session.parquet(), "steps": steps, "save-every": steps}
    sampled = {"sample-every": 10, "grid.num": 4, "grid.steps": 2}
    variants: dict[str, dict[str, Any]] = {
        "2 workers": {"data.workers": 2, "data.cache-gb": 0},
        "log every 7": {"log-every": 7},
        "save every step, keep 1": {"save-every": 1, "keep": 1},
        "sample grids": sampled,
        "asynchronous saves": {"save-async": True, "save-every": 3},
        "resident": {"data.resident": True},
        "1 worker": {"data.workers": 1, "data.cache-gb": 0},
        "checkpointed activations": {"model.checkpoint-activations": True},
    }
    streams = {
        "streamed, 1 worker": {"data.workers": 1},
        "streamed, 2 workers, saves, grids": {"data.workers": 2, "save-every": 5, **sampled},
    }
    if session.quick:
        variants, streams = {"save every step, log every 7": {"save-every": 1, "log-every": 7}}, {}

    def trained(changes: dict[str, Any]) -> Run | str:
        try:
            return session.run("quiet", options=base | changes).complete()
        except Stalled as error:
            return str(error)

    with session.count("quiet", f"variants of {steps} steps bitwise equal") as count:
        all_changes = [{}, *variants.values()] + [
            {"data.streaming": True, **c} for c in ({}, *streams.values()) if streams
        ]
        runs = session.side_by_side(trained, [(c,) for c in all_changes])
        whole, others, streamed = runs[0], runs[1 : 1 + len(variants)], runs[1 + len(variants) :]
        pairs = [(name, run, whole, c) for (name, c), run in zip(variants.items(), others, strict=True)]
        if streams:
            pairs += [(n, r, streamed[0], c) for (n, c), r in zip(streams.items(), streamed[1:], strict=True)]
        for name, run, reference, changes in pairs:
            if isinstance(run, str) or isinstance(reference, str):
                count.add([run if isinstance(run, str) else str(reference)], name)
            else:
                count.add(unequal(run, reference, every=changes.get("log-every", 1)), name)


def signals(session: Session) -> None:
    """SIGTERM and SIGINT to trainer, launcher and group, with loader processes; and the SLURM script."""
    steps = session.number(240, 30)  # a launcher may take seconds to end, and its trainer goes on meanwhile
    options = {
        "data.source": session.parquet(),
        "data.cache-gb": 0,
        "data.workers": 2,
        "steps": steps,
        "save-every": 1000,
    }
    launches = [
        ("trainer", 1, ("trainer", "group")),
        ("accelerate", 1, ("trainer", "launcher", "group")),
        ("torchrun", 2, ("trainer", "launcher", "group")),
    ]
    if session.quick:
        launches = launches[:1]
    worlds = sorted({processes for _, processes, _ in launches})
    references = {w: session.run("calm", processes=w, options=options).complete() for w in worlds}

    def one(launcher: str, processes: int, target: str, number: signal.Signals) -> list[str]:
        run = session.run("signalled", processes=processes, launcher=launcher, options=options)
        life = run.start()
        life.wait_for_step(5)
        trainers = _trainers(life, launcher, processes)
        if target == "group":
            life.send(number)
        else:
            os.kill(life.process.pid if target == "launcher" else trainers[-1], number)
        _until(lambda: _gone([life.process.pid, *trainers]), 60.0, life)
        faults = []
        if (status := run.status().get("status")) != "preempted":
            faults.append(f"status {status}: {life.last_words()}")
        saved = [int(p.name.removeprefix("step-")) for p in run.checkpoints()]
        if saved != [s for s in saved if s < steps] or len(saved) != 1 or saved[0] != run.status().get("step"):
            faults.append(f"saved {saved}, status says step {run.status().get('step')}")
        elif saved[0] > run.log()[-1]["step"]:
            faults.append(f"saved at {saved[0]}, the log ends at {run.log()[-1]['step']}")
        life.end()
        return faults + unequal(run.complete(), references[processes])

    with session.count(
        "signals", "SIGTERM, SIGINT to trainer, launcher, group: saved, preempted, bitwise resume"
    ) as count:
        both = (signal.SIGTERM, signal.SIGINT)
        cases = [(name, n, target, s) for name, n, targets in launches for target in targets for s in both]
        if session.quick:
            cases = cases[:1]
        alone = [c for c in cases if c[1] == 1]
        results = dict(zip(alone, session.side_by_side(faults_of, [(one, *c) for c in alone]), strict=True))
        for case in cases:
            faults = results[case] if case in results else faults_of(one, *case)
            count.add(faults, f"{case[3].name} to the {case[2]} of {case[0]}, {case[1]} processes")
    if not session.quick:
        _slurm(session)


def _trainers(life: Life, launcher: str, processes: int) -> list[int]:
    """Process ids of the trainers; accelerate gives its only one no rank."""
    if launcher == "torchrun":
        return life.ranks(processes)
    children = [child.pid for child in psutil.Process(life.process.pid).children()]
    return children if launcher == "accelerate" else [life.process.pid]


def _gone(pids: Sequence[int]) -> bool:
    """Whether none of the processes runs any more."""
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
    return True


def _until(holds: Callable[[], bool], limit_s: float, life: Life) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            words = life.last_words()
            life.end()
            raise Stalled(f"{limit_s:.0f} s after the signal it has not ended; last words: {words}")
        time.sleep(0.05)


def _slurm(session: Session) -> None:
    """launch/slurm.sh with stand-ins for SLURM's commands."""
    with session.count(
        "signals", "launch/slurm.sh: requeued by itself after TERM, bitwise resume; not if done, failed"
    ) as count:
        count.add(faults_of(_slurm_run, session), "a run")
        for status, code, requeued in (("preempted", 1, True), ("done", 0, False), ("failed", 3, False)):
            folder = session.folder_of("slurm")
            record = json.dumps({"status": status, "step": 5, "exit_code": code, "reason": "stand-in"})
            step = f"mkdir -p {folder}/run; echo '{record}' > {folder}/run/status.json; exit {int(code > 0)}"
            life = Life(_slurm_script(), _stand_ins(folder, step, session.cache), folder / "said.err")
            ended = life.wait(60)
            faults = [] if _requeued(folder) is requeued else [f"requeued: {not requeued}: {life.last_words()}"]
            faults += [] if ended == (0 if requeued else code) else [f"exit {ended}: {life.last_words()}"]
            count.add(faults, status)


def _slurm_run(session: Session) -> list[str]:
    """A job that is told to stop, queues itself, and is started again."""
    options = {"data.source": session.parquet(), "data.workers": 2, "data.cache-gb": 0, "steps": 60, "save-every": 1000}
    reference = session.run("calm", options=options).complete()
    run = session.run("slurm", options=options, orders=None)
    folder = run.folder.parent
    # As srun: drop its own options, and be a process that scancel can find.
    srun = 'while [[ $1 == --* ]]; do shift; done; echo $$ > "$HOME/step"; exec "$@"'
    environ = _stand_ins(folder, srun, session.cache)
    command = [*_slurm_script(), *run.command()[4:]]
    life = Life(command, environ, folder / "first.err")
    life.wait_for_step(5)
    os.kill(life.process.pid, signal.SIGTERM)
    faults = [] if life.wait(90) == 0 and _requeued(folder) else [f"not requeued: {life.last_words()}"]
    life.end()
    if (status := run.status().get("status")) != "preempted":
        faults.append(f"status {status}: {life.last_words()}")
    (folder / "requeued").unlink(missing_ok=True)
    life = Life(command, environ, folder / "second.err")
    if (code := life.wait()) or _requeued(folder) or run.status().get("status") != "done":
        faults.append(f"second start: exit {code}: {life.last_words()}")
    life.end()
    return faults + unequal(run, reference)


def _slurm_script() -> list[str]:
    return ["bash", str(ROOT / "launch" / "slurm.sh")]


def _requeued(folder: Path) -> bool:
    path = folder / "requeued"
    return path.exists() and path.read_text().split() == ["requeue", "4711"]


def _stand_ins(folder: Path, srun: str, cache: Path) -> dict[str, str]:
    """An environment with stand-ins for SLURM's commands; `srun` is a bash script."""
    (bin_ := folder / "bin").mkdir(exist_ok=True)
    programs = {
        "srun": srun,
        "scancel": 'kill -TERM "$(cat "$HOME/step")"',
        "squeue": "echo RUNNING",
        "scontrol": 'case $1 in requeue) echo "$@" > "$HOME/requeued";; *) echo localhost;; esac',
    }
    for name, body in programs.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_ / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1", "SLURM_NODEID": "0"}
    ours = {"PATH": f"{bin_}:{os.environ['PATH']}", "HOME": str(folder), "PYTHON": sys.executable}
    ours |= {"RUN": str(folder / "run"), "SLURMD_NODENAME": "localhost", "PORT": "29731"}
    return surroundings(cache, 2) | job | ours


def numerics(session: Session) -> None:
    """NaN on rank 1 only, three of them in a row, and steps computed again."""
    steps = 30
    options = {"data.source": session.parquet(), "steps": steps, "save-every": 7}

    def skipped() -> list[str]:
        run = session.run(
            "nan", processes=2, options=options, orders={"nan": {"rank": 1, "steps": [4, 5, 19]}}
        ).complete()
        calm = session.run("calm", processes=2, options=options).complete()
        events = _events(run)
        faults = []
        if [e.get("step") for e in events if e.get("event") == "skipped"] != [5, 6, 20]:
            faults.append(f"numerics.jsonl has {[(e.get('event'), e.get('step')) for e in events]}")
        for event in events:
            first = (event["step"] - 1) * BATCH
            positions = np.arange(first, first + BATCH)
            right = {"positions": positions.tolist(), "rows": rows_at(positions, ROWS, seed=0).tolist()}
            faults += [
                f"step {event['step']}: {k} {event.get(k)}, not {v}" for k, v in right.items() if event.get(k) != v
            ]
            if any(len(event.get(name, ())) != BATCH for name in ("t", "losses")):
                faults.append(f"step {event['step']}: t or losses are missing")
        states = [json.loads((run.beside("witness") / f"state-{rank}").read_text()) for rank in (0, 1)]
        if not all(state["finite"] for state in states):
            faults.append("weights, averages or moments are not finite")
        if states[0]["digest"] != states[1]["digest"]:
            faults.append("the ranks' states differ")
        if [r["loss"] for r in run.log()[:4]] != [r["loss"] for r in calm.log()[:4]] or run.samples() != calm.samples():
            faults.append("steps before the first NaN, or samples, are not those of a calm run")
        if run.log()[6]["loss"] == calm.log()[6]["loss"]:
            faults.append("the step after the skipped ones is that of a calm run: were they skipped?")
        return faults

    def three(processes: int) -> list[str]:
        rank = processes - 1
        run = session.run(
            "three", processes=processes, options=options, orders={"nan": {"rank": rank, "steps": [10, 11, 12]}}
        )
        life = run.start()
        code = life.wait()
        life.end()
        status = run.status()
        faults = []
        if (code if processes == 1 else status.get("exit_code")) != 3 or status.get("status") != "failed":
            faults.append(f"exit {code}, status {status}: {life.last_words()}")
        error = next((line for line in life.words.splitlines() if "error:" in line and "step 13" in line), "")
        rows: list[int] = next((e["rows"] for e in _events(run) if e["step"] == 13), [])
        if not error or "row" not in error or not any(str(row) in error for row in rows):
            faults.append(f"no line that names the rows {rows}: {life.last_words()}")
        if [int(p.name[5:]) for p in run.checkpoints()] != [7]:
            faults.append(f"checkpoints {[p.name for p in run.checkpoints()]}")
        return faults

    def replayed(processes: int) -> list[str]:
        run = session.run("replay", processes=processes, options=options | {"keep": 10}).complete()
        faults = []
        for step in (1, 7, 8, 20, steps)[: session.number(5, 2)]:
            words = ["replay", str(run.folder), "--step", str(step)]
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            command = [
                sys.executable,
                *(torchrun if processes > 1 else []),
                "-m",
                "fastddpm",
                *(["--"] if processes > 1 else []),
                *words,
            ]
            life = Life(command, surroundings(session.cache, processes), session.folder_of("replay") / "said.err")
            code = life.wait()
            life.end()
            found = json.loads(life.printed) if code == 0 and life.printed.count("\n") == 1 else {}
            logged = run.log()[step - 1]["loss"]
            if found.get("loss") != logged:
                faults.append(
                    f"step {step}: loss {found.get('loss')}, logged {logged}, exit {code}: {life.last_words()}"
                )
        return faults

    with session.count("numerics", "NaN on rank 1 only: skipped by all ranks, state finite, written down") as count:
        count.add(faults_of(skipped), "2 processes")
    with session.count("numerics", "NaN three times in a row: exit 3, naming the rows") as count:
        for processes in (1, 2) if not session.quick else (1,):
            count.add(faults_of(three, processes), f"{processes} processes")
    with session.count("numerics", "replay gives the logged loss bitwise, 1 and 2 processes") as count:
        for processes in (1, 2) if not session.quick else (1,):
            count.add(faults_of(replayed, processes), f"{processes} processes")


def _events(run: Run) -> list[dict[str, Any]]:
    path = run.folder / "numerics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# accelerate's loader takes these and does nothing with them for a launch as ours.
IGNORED = ("rdzv_backend", "same_network", "enable_cpu_affinity", "downcast_bf16")


def launch(session: Session) -> None:
    """Launch files, processes without a GPU, learning rate, sharded checkpoints, bytes on the wire."""
    with session.count("launch", "launch/*.yaml pass accelerate's loader, no field ignored or misspelt") as count:
        for path in sorted((ROOT / "launch").glob("*.yaml")):
            count.add(faults_of(_launch_file, path), path.name)
    if session.quick:
        return
    source = {"data.source": session.parquet()}
    if not torch.cuda.is_available():
        with session.count("launch", "2 processes, no GPU, no CPU flag: exit 5") as count:
            run = session.run("unknown", processes=2, options=source, orders=None)
            life = run.start({"ACCELERATE_USE_CPU": "false"})
            life.wait()
            life.end()
            ok = "exitcode  : 5" in life.words and "ACCELERATE_USE_CPU" in life.words
            count.add(ok or [life.last_words()], "torchrun")
    worlds = (1, 2, 4)
    with session.count("launch", "learning rate at step 10 of 100 of warm-up, on 1, 2, 4 processes") as count:
        options = source | {
            "steps": 10,
            "save-every": 10,
            "optim.warmup-steps": 100,
            "optim.lr": 1e-3,
            "optim.decay": "constant",
        }
        for processes in worlds:
            rate = session.run("rate", processes=processes, options=options).complete().log()[9]["lr"]
            count.add(abs(rate - 1e-4) < 1e-12 or [f"{rate}"], f"{processes} processes")
    with session.count("launch", "FSDP2 saved on 2 processes, loaded on 1, 2, 4 (losses within 1e-5)") as count:
        options = source | {"steps": 12, "save-every": 6}
        reference = session.run("whole", options=options).complete()
        saved = session.run(
            "sharded", processes=2, options=options | {"steps": 6, "optim.horizon": 12, "sharding": "fsdp2"}
        ).complete()
        for processes in worlds:
            run = session.run(
                "sharded", processes=processes, options=options | {"sharding": "fsdp2", "optim.horizon": 12}
            )
            shutil.copytree(saved.folder, run.folder)
            shutil.copytree(saved.beside("witness"), run.beside("witness"))
            count.add(faults_of(_gone_on, run, reference), f"{processes} processes")
        run = session.run("unsharded", options=options | {"optim.horizon": 12})
        shutil.copytree(saved.folder, run.folder)
        shutil.copytree(saved.beside("witness"), run.beside("witness"))
        count.add(faults_of(_gone_on, run, reference), "1 process, not sharded")
    with session.count("launch", "bytes per step 4 P in fp32, none in accumulation steps, 2 and 4 processes") as count:
        for processes in (2, 4):
            options = source | {"steps": 5, "accumulation": 2, "save-every": 5}
            run = session.run("bytes", processes=processes, options=options, orders={"bytes": True}).complete()
            count.add(_bytes(run, count), f"{processes} processes")


def _gone_on(run: Run, reference: Run) -> list[str]:
    """Let a run go on to its end."""
    return unequal(run.complete(), reference, TOLERANCE)


def _launch_file(path: Path) -> list[str]:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    keys = yaml.safe_load(path.read_text())
    loaded = load_config_from_file(str(path))
    faults = [f"{key} is ignored" for key in keys if key in IGNORED]
    faults += [
        f"{k} is {getattr(loaded, k, None)!r}, not {v!r}"
        for k, v in keys.items()
        if k not in ("distributed_type", "compute_environment") and getattr(loaded, k, None) != v
    ]
    known = {action.dest for action in launch_command_parser()._actions}
    faults += [
        f"{part}.{key} is not an option of accelerate launch"
        for part in ("fsdp_config",)
        for key in keys.get(part, {})
        if key not in known
    ]
    parsed = launch_command_parser().parse_args(["--config_file", str(path), "-m", "fastddpm", "train"])
    parsed, *_ = _validate_launch_command(parsed)
    if parsed.num_processes != keys["num_processes"] or parsed.training_script_args != ["train"]:
        faults.append(f"{parsed.num_processes} processes, arguments {parsed.training_script_args}")
    return faults


def _bytes(run: Run, count: Count) -> list[str]:
    from safetensors import safe_open

    with safe_open(run.checkpoints()[-1] / "model.safetensors", "pt") as file:
        parameters = sum(int(np.prod(file.get_slice(name).get_shape())) for name in list(file.keys()))
    faults = []
    for rank in range(run.processes):
        lines = [json.loads(line) for line in (run.beside("witness") / f"bytes-{rank}").read_text().splitlines()]
        sent = [(line["last"], line["gradients"]) for line in lines]
        if sent != [(False, 0), (True, 4 * parameters)] * run.steps:
            faults.append(f"rank {rank}: {sent[:4]} .., P = {parameters}")
        others = max((line["others"] for line in lines[2:]), default=0)
        count.facts["other_bytes"] = max(others, count.facts.get("other_bytes", 0))
        if others > 256:
            faults.append(f"rank {rank}: {others} bytes besides gradients")
    return faults


def hang(session: Session) -> None:
    """A rank that is stopped: the others end and name it."""
    with session.count("hang", "SIGSTOP to a rank of 2, --hang-timeout 5: another ends and names it") as count:
        for rank in (1, 0) if not session.quick else (1,):
            options = {"data.source": session.parquet(), "steps": 2000, "save-every": 1000, "hang-timeout": 5}

            def one(rank: int = rank, options: dict[str, Any] = options) -> list[str]:
                run = session.run("hang", processes=2, options=options)
                life = run.start()
                pids = life.ranks(2)
                life.wait_for_step(10)
                os.kill(pids[rank], signal.SIGSTOP)
                begin = time.monotonic()
                other = [pids[1 - rank]]
                life.wait_until(
                    lambda: _gone(other),
                    60.0,
                    0.1,
                )
                seconds = time.monotonic() - begin
                error = next((line for line in life.words.splitlines() if "error:" in line), "")
                life.end()
                count.facts["seconds"] = max(round(seconds, 1), count.facts.get("seconds", 0.0))
                faults = [] if f"rank {rank}" in error.partition("error:")[2] else [f"said {error!r}"]
                return faults + ([f"took {seconds:.0f} s"] if seconds > 30 else [])

            count.add(faults_of(one), f"rank {rank}")
        count.what += f" (after {count.facts.get('seconds', '-')} s)"
