"""The command line: `fastddpm train` and `fastddpm sample`. Progress goes to stderr, results to stdout.

Options are the fields of a dataclass, read by tyro; every error becomes one line and an exit code (errors.py).
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import tyro

from .config import PRESETS, Config, Precision, flatten, preset
from .errors import ConfigError, FastDDPMError
from .solvers import SAMPLERS

if TYPE_CHECKING:
    SamplerName = str
else:  # the choices of --help are those of the table that lead to an image
    SamplerName = Literal[tuple(name for name, solver in SAMPLERS.items() if solver.to_image)]

T = TypeVar("T")

EvaluateMetric = Literal["nll", "nll_ode", "fid", "kid", "is", "precision", "recall"]

USAGE = """\
usage: fastddpm COMMAND [options]

  train    train a DDPM into a run folder, or go on with the run that is there
  replay   compute one step of a run again, exactly, and print what came out
  sample   draw images from a run folder, a diffusers model folder or a Hub id
  edit     edit a picture with the net: inpaint, start from a sketch, variations, interpolate between two
  evaluate measure a run: the bound on the likelihood, term by term
  explain  show the lecture on a run's own numbers: forward, noise, bound
  ema      make the average of any width from a run's snapshots
  plan     show which images a run will read, by process and step

fastddpm COMMAND --help shows every option; fastddpm --version the version."""

INTERRUPTED = 130  # the shell's code for a process ended by Ctrl-C


@dataclass(frozen=True)
class TrainCommand:
    """Train a DDPM, or go on with the run that is in the run folder."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    allow_change: tuple[str, ...] = ()
    (
        "Fields that may differ from those of the run's first start, e.g. optim.lr, or data for images that have "
        "changed: the run goes on as another from here."
    )
    dry_run: bool = False
    """Print config, parameter count, GFLOP per image and a memory estimate, and exit."""


@dataclass(frozen=True)
class ReplayCommand:
    """Compute one step of a run again from the last checkpoint before it; prints one JSON line, writes nothing.

    Launch it as the run was: on the same number of processes the loss is the logged one, bit by bit.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    step: int
    """The step, counted from 1 as in log.jsonl and numerics.jsonl."""


@dataclass(frozen=True)
class PlanCommand:
    """Show which images a run will read, by process, step and micro-batch; starts no process and decodes nothing."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    ranks: int = 1
    """Processes to plan for, any number that the batch divides by."""
    first_step: int = 0
    """First step shown, counted from 0."""
    num_steps: int = 2
    """Steps shown; 0 shows the summary alone."""
    check: bool = False
    """Check over an epoch that ranks share out the positions and that each row comes once."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class SampleCommand:
    """Draw images; writes grid.png, filmstrip.png, denoising.gif, samples.npz (arr_0, uint8 [N, H, W, C]) in DIR."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Run folder, local diffusers model or pipeline folder, or Hub id such as google/ddpm-cifar10-32."""
    num: int = 64
    """Images to draw: numbers 0 .. NUM - 1 of the seed."""
    sampler: SamplerName = "ddpm"
    (
        "ddpm: ancestral, fresh noise at every step; ddim: deterministic unless eta is above 0; dpmpp_2m "
        "(DPM-Solver++(2M)), unipc, heun (EDM's): deterministic and of second order, good from 10 to 25 steps on; "
        "dpmpp_2m_sde: the same with fresh noise."
    )
    steps: int | None = None
    """Steps, a network evaluation each (heun: two, but for the last); unset: all timesteps of the model."""
    eta: float = 0.0
    """DDIM's share of fresh noise, 0 to 1; 1 over all timesteps is the ancestral sampler."""
    churn: float = 0.0
    """heun's fresh noise (S_churn of EDM), at least 0; 0 is deterministic."""
    variance: Literal["fixed_small", "fixed_large", "learned_range"] | None = None
    """Reverse variance of ddpm; unset: the model's own. With fewer steps fixed_small or learned_range is better."""
    temperature: float = 1.0
    """Factor of the noise that samplers add on the way; 0 takes the mean of each step."""
    spacing: Literal["trailing", "leading", "linspace"] | None = None
    """Which timesteps are kept when there are fewer than all (but by heun); unset: the model's own (ours: trailing)."""
    threshold: float | None = None
    (
        "Dynamic threshold: clip the x_0 of each image to this quantile of its absolute values and scale it back "
        "(0.995 with strong guidance); unset: the model's own clipping."
    )
    labels: Annotated[tuple[int, ...], tyro.conf.arg(name="class")] = ()
    """Class of all images, or several that take turns; unset: all of a conditional model in turn, 0, 1, 2, ..."""
    guidance: float = 1.0
    """Guidance w in guide + w (prediction - guide): 1 is none, 1.5 to 4 are usual. Needs label dropout or --guide."""
    guidance_interval: tuple[float, float] | None = None
    """Where guidance acts, as two shares of the noise steps, such as 0.1 0.8; unset: everywhere."""
    guidance_rescale: float = 0.0
    """Share, 0 to 1, of the guided prediction brought back to the unguided one's standard deviation (0.7 is usual)."""
    guide: str | None = None
    """A weaker model of the same images that guides, named as SOURCE is; unset: SOURCE itself without a class."""
    seed: int = 0
    """Image n of a seed is the same whatever the batch size and the number of processes."""
    batch_size: int = 64
    """Images per network call on each process."""
    out: str = "samples"
    """Folder to write into; made if it is not there."""
    precision: Precision = "fp32"
    """Arithmetic of the network: fp32, bf16, fp16 (GPU only), or auto: bf16 where it is faster."""
    compile: bool = False
    """Compile the network's blocks: torch.compile on a GPU, the machine's C++ compiler on a CPU."""
    graph: bool = False
    """Replay each step as one CUDA graph: faster in small batches."""


@dataclass(frozen=True)
class EditCommand:
    """Edit a picture with a net: paint parts of it anew, start from it, vary it, or go from it to another.

    Writes DIR/edit.png (what went in first, what came out below) and DIR/samples.npz; interpolate DIR/edit.gif too.
    """

    task: Annotated[Literal["inpaint", "start", "variations", "interpolate"], tyro.conf.Positional]
    (
        "inpaint: paint the white part of --mask anew and keep the rest exactly (RePaint); start: noise the image to "
        "--strength and sample from there, so that a sketch becomes a picture (SDEdit); variations: the same, many "
        "times; interpolate: pictures between --image and --to."
    )
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Run folder, local diffusers model or pipeline folder, or Hub id."""
    image: str
    """The picture, in any format of PIL's."""
    mask: str | None = None
    """inpaint: a picture of the image's size; white (128 and more) is painted anew, black is kept."""
    to: str | None = None
    """interpolate: the picture to end at."""
    strength: float | None = None
    """start, variations, interpolate --how noise: share of the noise steps, up to 1; unset: 0.6 for start, else 0.5."""
    num: int | None = None
    """inpaint, start, variations: results, numbers 0 .. NUM - 1 of the seed; unset: 4, 1 and 16."""
    resamples: int | None = None
    """inpaint: times that each stretch of steps is gone, so that the paint fits what is kept; unset: 10, 1 is once."""
    jump: int | None = None
    """inpaint: steps of a stretch; unset: 10, or a tenth of the steps where they are fewer than 100."""
    frames: int | None = None
    """interpolate: pictures on the way, both ends among them; unset: 9."""
    how: Literal["inversion", "noise"] | None = None
    (
        "interpolate: inversion (unset): between the two x_T that DDIM run backwards finds, so that the ends are the "
        "pictures themselves; noise: between the two noised to --strength, with ends that are like them (Ho et al.)."
    )
    refine: int | None = None
    """interpolate --how inversion: rounds of the inversion of each step; more bring the ends closer; unset: 5."""
    fit: Literal["exact", "resize", "crop", "resize_crop"] = "exact"
    """How images of another size than the model's are brought to it, as for training."""
    background: str | None = None
    """Colour behind partly transparent images, such as white or #80a0ff; unset: they are refused."""
    label: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Class of the result, which a conditional net needs; one trained with label dropout does without, too."""
    guidance: float = 1.0
    """Classifier-free guidance, for a net trained with label dropout; 1 is none."""
    sampler: SamplerName | None = None
    """As for sample (inpaint: ddpm or ddim); unset: ddim for interpolate --how inversion, else ddpm."""
    steps: int | None = None
    """Steps of the sampler; unset: 250 for inpaint, 100 for interpolate, else all timesteps of the model."""
    eta: float = 0.0
    """DDIM's share of fresh noise, 0 to 1."""
    variance: Literal["fixed_small", "fixed_large", "learned_range"] | None = None
    """Reverse variance of ddpm; unset: the model's own. With fewer steps fixed_small is better."""
    spacing: Literal["trailing", "leading", "linspace"] | None = None
    """Which timesteps are kept when there are fewer than all; unset: the model's own."""
    seed: int = 0
    """Result n of a seed is the same whatever the batch size and the number of processes."""
    batch_size: int = 64
    """Images per network call on each process."""
    out: str | None = None
    """Folder to write into, made if it is not there; unset: edited/TASK."""
    precision: Precision = "fp32"
    """Arithmetic of the network: fp32, bf16, fp16 (GPU only), or auto: bf16 where it is faster."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure a run; prints one JSON line, writes numbers and a plot into RUN/evaluation (or DIR)."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    metrics: tuple[EvaluateMetric, ...] = ("nll",)
    (
        "nll: the variational bound in bits per dimension, as L_T, the sum of L_{t-1}, and L_0; nll_ode: the "
        "likelihood under the probability-flow ODE, with Hutchinson's estimate of the divergence; fid, kid, precision, "
        "recall: distances between features of samples and of real images; is: the inception score of the samples."
    )
    source: str | None = None
    """Images to measure on, written as --data.source; unset: the run's own."""
    split: str | None = None
    (
        "Split to measure on; unset: for nll and nll_ode test, or of the digits, which have no other, the images they "
        "were trained on; for distances between features the split that was trained on, as in the literature."
    )
    num: int | None = None
    """Images, from the first of the split on; unset: all of them."""
    batch_size: int = 64
    """Images per network call on each process."""
    every: int = 1
    (
        "nll: of every EVERY timesteps of the sum take one, drawn anew for each image, which stands for all of them; "
        "1 takes all."
    )
    steps: int = 50
    """nll_ode: steps of the solver (Runge-Kutta of fourth order: four network evaluations each)."""
    probes: int = 2
    """nll_ode: Hutchinson probes per image; from one alone the error of the estimate is not known."""
    num_samples: int = 10_000
    """fid, kid, is, precision, recall: samples that are drawn."""
    sampler: SamplerName = "ddim"
    """fid, kid, is, precision, recall: sampler that draws them, by its name in `sample --sampler`."""
    sampler_steps: int | None = None
    """fid, kid, is, precision, recall: its steps; unset: 50, or all timesteps where those are fewer."""
    guidance: float = 1.0
    """fid, kid, is, precision, recall: classifier-free guidance of the samples; 1 is none."""
    features: str = "classifier"
    (
        "Where features come from: classifier (a small one, trained on the data's own labels and kept), inception "
        "(torch-fidelity's), torchvision:NAME or timm:NAME."
    )
    features_weights: str | None = None
    """File of the extractor's weights; unset: where its library keeps them."""
    features_download: bool = False
    """Let torch-fidelity download Inception's weights."""
    features_epochs: int = 24
    """classifier: epochs of its training."""
    seed: int = 0
    """Seed of the noise, and of the samples."""
    out: str | None = None
    """Folder to write into; unset: RUN/evaluation."""
    precision: Precision = "fp32"
    """Arithmetic of the network: fp32, bf16, fp16 (GPU only), or auto: bf16 where it is faster."""


@dataclass(frozen=True)
class ExplainCommand:
    """Show a piece of the lecture on real numbers: TOPIC is forward, noise or bound; writes pictures into DIR."""

    topic: Annotated[Literal["forward", "noise", "bound"], tyro.conf.Positional]
    (
        "forward: why one draw is enough, the chain step by step beside the closed form; noise: why there is noise at "
        "inference, the same seeds with full, reduced and no noise; bound: from log p(x_0) to the three terms to the "
        "eps loss, each line with its number."
    )
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
    """Run folder; forward needs none (it takes the digits)."""
    num: int | None = None
    """Images shown, 8 unless set (noise measures diversity on at least 64); of bound, images measured: 32."""
    steps: int | None = None
    """noise: network evaluations per image; unset: all timesteps."""
    temperatures: tuple[float, ...] = (1.0, 0.5, 0.0)
    """noise: factors of the noise of each step; 0 is the mean only."""
    film: Literal["gif", "mp4"] = "gif"
    """forward: format of the animation; mp4 needs the program ffmpeg."""
    seed: int = 0
    """Seed of all noise."""
    out: str | None = None
    """Folder to write into; unset: RUN/explain, or explain without a run."""
    precision: Precision = "fp32"
    """Arithmetic of the network: fp32, bf16, fp16 (GPU only), or auto: bf16 where it is faster."""


@dataclass(frozen=True)
class EmaCommand:
    """Make the weights averaged over any relative width from the snapshots of a run that kept them (--ema.widths)."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    width: float
    """Relative standard deviation of the average: 0.1 averages over about the last tenth of the training steps."""
    step: int | None = None
    """The average as of this step; unset: the last snapshot's."""
    out: str | None = None
    """Folder to write the pipeline into; unset: RUN/ema/width-WIDTH. `fastddpm sample` and diffusers read it."""


def _message(raw: str) -> str:
    """tyro's error as one line: what stands between its title and its next rule, without the frame."""
    lines = [line.strip("│╭╮╰╯ ") for line in raw.splitlines()]
    rules = [i for i, line in enumerate(lines) if line and set(line) <= {"─", "-"}]
    if raw.startswith("╭"):
        start = 1
    else:  # a terminal without box characters: the title has a rule of its own
        start, rules = (rules[0] + 1, rules[1:]) if rules else (0, [])
    body = lines[start : rules[0] if rules else None]
    message = re.sub(r"\[/?bold\]", "", " ".join(part for part in body if part))
    message = re.sub(r"Missing from [\w ]+: (\S+) ", r"the argument \1 is missing: ", message)
    return re.sub(r"\s+", " ", message) or "the options cannot be read"


def _unknown(message: str, valid: list[str]) -> str:
    """Complete tyro's list of unrecognised options with what would have been valid."""
    name = message.split(":", 1)[1].split(",")[0].strip()
    if not name.startswith("-"):
        return f"unexpected argument {name!r}"
    plain = name.lstrip("-").split("=")[0].replace("_", "-")
    near = difflib.get_close_matches(plain, valid, n=1, cutoff=0.6)
    section = plain.split(".")[0] + "."
    shown = [v for v in valid if v.startswith(section)] or [v for v in valid if "." not in v]
    hint = f"did you mean --{near[0]}? " if near else ""
    return f"unknown option {name}: {hint}valid are {', '.join('--' + v for v in shown)}"


def parse(kind: type[T], args: list[str], prog: str, default: T | None, valid: list[str]) -> T:
    """Read options with tyro; its errors become one ConfigError line. --help prints and exits as usual.

    Raises:
        ConfigError: naming the option and what is valid.
    """
    # --no-a.b is accepted beside tyro's own --a.no-b.
    args = [re.sub(r"^--no[-_]((?:\w|-)+\.)", r"--\1no-", a) for a in args]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            if default is None:
                return tyro.cli(kind, args=args, prog=prog)
            return tyro.cli(kind, args=args, prog=prog, default=default)
    except SystemExit as end:
        if not end.code:
            raise
        message = _message(complaint.getvalue())
        raise ConfigError(
            _unknown(message, valid) if message.startswith("Unrecognized options:") else message
        ) from None


def _preset_of(args: list[str]) -> str:
    """The value of --preset, which is read before anything else because it supplies the defaults."""
    name = "cifar10"
    for here, following in itertools.zip_longest(args, args[1:]):
        if here == "--preset":
            if following is None:
                raise ConfigError(f"--preset needs a name: valid are {', '.join(PRESETS)}")
            name = following
        elif here.startswith("--preset="):
            name = here.split("=", 1)[1]
    return name


def train(args: list[str]) -> int:
    """`fastddpm train`."""
    if not args:
        raise ConfigError(f"train needs a preset: --preset {', '.join(PRESETS)}; train --help shows every option")
    base = preset(_preset_of(args))
    valid = [name.replace("_", "-") for name in flatten(dataclasses.asdict(base))] + ["allow-change", "dry-run"]
    command = parse(TrainCommand, args, "fastddpm train", TrainCommand(base), valid)
    if command.dry_run:
        from .dryrun import describe

        text = describe(command.config, int(os.environ.get("WORLD_SIZE", "1")))
        if os.environ.get("RANK", "0") == "0":
            print(text)
        return 0
    from .trainer import Trainer

    trainer = Trainer(command.config, allow_change=command.allow_change)
    if trainer.step >= command.config.steps:
        trainer.say(f"nothing left to do: {trainer.step} steps are done; --steps with a larger number goes on")
    outcome = trainer.train()
    if not trainer.accelerator.is_main_process:
        return 0 if outcome.finished else INTERRUPTED
    again = shlex.join(["fastddpm", "train", *args])
    if not outcome.finished:
        print(f"stopped and saved at step {outcome.step}; go on with the same command: {again}", file=sys.stderr)
        return INTERRUPTED
    print(f"run        {outcome.run} ({outcome.step} steps done)")
    run, out = shlex.quote(str(outcome.run)), shlex.quote(f"{outcome.run}/samples/final")
    print(f"next       fastddpm sample {run} --out {out}")
    return 0


def replay(args: list[str]) -> int:
    """`fastddpm replay`."""
    command = parse(ReplayCommand, args, "fastddpm replay", None, ["step"])
    from .config import read_config
    from .files import expand
    from .runlog import RunLog, to_json
    from .trainer import Trainer

    run = expand(command.run)
    config = read_config(run)
    if config is None:
        raise ConfigError(f"{run} is not a run folder: it has no config.json")
    if command.step > config.steps:
        raise ConfigError(f"--step is {command.step}: {run} is a run of {config.steps} steps")
    trainer = Trainer(dataclasses.replace(config, run=str(run)), replay=command.step)
    record = json.loads(to_json(trainer.replay()))
    logged = next((line for line in RunLog(run).records() if line["step"] == command.step), None)
    if logged is not None:
        known = logged["loss"] is not None  # of a skipped step there is nothing to compare
        same = all(logged[name] == record[name] for name in ("loss", "grad_norm")) if known else None
        record |= {"logged_loss": logged["loss"], "same": same}
    if trainer.accelerator.is_main_process:
        print(json.dumps(record))
    return 0


def sample(args: list[str]) -> int:
    """`fastddpm sample`."""
    names = (f.name.replace("_", "-") for f in dataclasses.fields(SampleCommand) if f.name != "source")
    valid = ["class" if name == "labels" else name for name in names]
    command = parse(SampleCommand, args, "fastddpm sample", None, valid)
    from .sampling import run_sample

    return run_sample(command)


def edit(args: list[str]) -> int:
    """`fastddpm edit`."""
    command = _simple(EditCommand, "edit", args)
    from .edit import run_edit

    return run_edit(command)


def plan(args: list[str]) -> int:
    """`fastddpm plan`."""
    base = preset(_preset_of(args))
    own = [f.name.replace("_", "-") for f in dataclasses.fields(PlanCommand) if f.name != "config"]
    valid = [name.replace("_", "-") for name in flatten(dataclasses.asdict(base))] + own
    command = parse(PlanCommand, args, "fastddpm plan", PlanCommand(base), valid)
    from .plan import run_plan

    return run_plan(
        command.config,
        ranks=command.ranks,
        first_step=command.first_step,
        num_steps=command.num_steps,
        check=command.check,
        as_json=command.json,
    )


def _simple(kind: type[T], name: str, args: list[str]) -> T:
    """The options of a command without a preset."""
    shown = {"label": "class", "labels": "class"}
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    valid = [shown.get(name, name).replace("_", "-") for name in names]
    return parse(kind, args, f"fastddpm {name}", None, valid)


def evaluate(args: list[str]) -> int:
    """`fastddpm evaluate`."""
    known = set(get_args(EvaluateMetric))  # which may be joined by commas too
    args = [part for word in args for part in (word.split(",") if known.issuperset(word.split(",")) else [word])]
    command = _simple(EvaluateCommand, "evaluate", args)
    from .evaluation import run_evaluate

    return run_evaluate(command)


def explain(args: list[str]) -> int:
    """`fastddpm explain`."""
    command = _simple(ExplainCommand, "explain", args)
    from .explain import run_explain

    return run_explain(command)


def ema(args: list[str]) -> int:
    """`fastddpm ema`."""
    command = _simple(EmaCommand, "ema", args)
    from .averages import run_ema

    return run_ema(command)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "replay": replay,
    "sample": sample,
    "edit": edit,
    "evaluate": evaluate,
    "explain": explain,
    "ema": ema,
    "plan": plan,
}


def run(args: list[str]) -> int:
    """Run a command; errors are raised.

    Raises:
        FastDDPMError: any error shown to users.
    """
    args = args[1:] if args[:1] == ["--"] else args  # some versions of torchrun hand on the -- they are given
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if args[0] == "--version":
        print(metadata.version("fastddpm"))
        return 0
    if args[0] not in COMMANDS:
        raise ConfigError(f"unknown command {args[0]!r}: valid are {', '.join(COMMANDS)}")
    return COMMANDS[args[0]](args[1:])


def main(argv: list[str] | None = None) -> int:
    """Entry point: the exit code of `fastddpm ARGV`."""
    rank = os.environ.get("RANK", "0")
    prefix = "fastddpm" if rank == "0" else f"fastddpm (rank {rank})"
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except FastDDPMError as error:
        print(f"{prefix}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{prefix}: error: {where}{error.strerror or error}", file=sys.stderr)
        return ConfigError.exit_code
    except MemoryError:
        print(f"{prefix}: error: {_OUT_OF_MEMORY}", file=sys.stderr)
        return ConfigError.exit_code
    except RuntimeError as error:
        message = _known(error)
        if message is None:
            raise
        print(f"{prefix}: error: {message}", file=sys.stderr)
        return ConfigError.exit_code if message == _OUT_OF_MEMORY else 1
    finally:
        _leave()


_OUT_OF_MEMORY = "out of memory: lower --batch-size, raise --accumulation, or take a smaller model"


def _known(error: RuntimeError) -> str | None:
    """One line for what a user can act on: no memory, and a collective broken off because another rank ended."""
    torch: Any = sys.modules["torch"]
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
        return _OUT_OF_MEMORY
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    words = ("gloo", "NCCL", "nccl", "closed by peer", "Connection reset", "Broken pipe")
    if several and (isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)):
        return "another process ended first: its own message says why"
    return None


def _leave() -> None:
    """End the process group, so that launchers do not warn about one left open."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
