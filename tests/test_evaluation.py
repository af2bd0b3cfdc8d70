"""`fastddpm evaluate`: what it prints and writes, that each image counts once whatever the processes, bad input."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

from fastddpm import evaluation
from fastddpm.bound import bound_terms, make_strata, prior_term
from fastddpm.cli import main
from fastddpm.config import read_config
from fastddpm.diffusion import ProcessConfig
from fastddpm.errors import DataError
from fastddpm.evaluation import measure_bound, measure_likelihood, network_of, open_split
from fastddpm.pipeline import Pipeline, load_pipeline

ROOT = Path(__file__).parents[1]
T = 12
TINY = (
    *("--model.block-out-channels", "8", "16", "--model.norm-num-groups", "4", "--batch-size", "8"),
    *("--log-every", "1", "--sample-every", "0", "--diffusion.num-timesteps", str(T)),
)
CPU = torch.device("cpu")


def trained(folder: Path, *more: str) -> Path:
    """A run of two steps, its weights moved away from where the network is nearly 0."""
    assert main(["train", "--preset", "digits", "--run", str(folder), "--steps", "2", *TINY, *more]) == 0
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file(
        {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in load_file(weights).items()}, weights
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("evaluation") / "run")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> Path:
    return trained(
        tmp_path_factory.mktemp("evaluation") / "conditional",
        *("--conditional", "--diffusion.label-dropout", "0.2", "--diffusion.self-conditioning"),
        *("--diffusion.variance", "learned_range", "--diffusion.loss", "hybrid", "--diffusion.prediction", "v"),
    )


def loaded(folder: Path) -> Pipeline:
    pipeline = load_pipeline(str(folder))
    pipeline.unet.requires_grad_(False)
    return pipeline


def evaluate(folder: Path, *more: str) -> int:
    return main(["evaluate", str(folder), *more])


def digits(n: int) -> Tensor:
    pixels = (load_digits().images[:n].astype(np.int64) * 255 + 8) // 16
    return torch.from_numpy(pixels.astype(np.uint8))[:, None]


# What comes out


def test_one_json_line_with_terms_that_add_up(run, tmp_path, capsys):
    assert evaluate(run, "--num", "10", "--batch-size", "4", "--seed", "5") == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    nll = json.loads(line)["nll"]
    assert nll.keys() == {"L_T", "L_t", "L_0", "total_bits_per_dim", "stderr", "num_images", "split"}
    assert nll["L_T"] + nll["L_t"] + nll["L_0"] == pytest.approx(nll["total_bits_per_dim"], rel=1e-12)
    assert nll["num_images"] == 10 and nll["split"] == "train" and nll["stderr"] > 0
    assert "the first 10 of split train of digits" in captured.err and "no test split" in captured.err
    assert all(word in captured.err for word in ("t = 0 .. 2", "t = 9 .. 11", "L_T", "total", "share"))

    stored = json.loads((run / "evaluation" / "nll.json").read_text())
    assert stored["nll"] == nll and stored["seed"] == 5 and stored["source"] == "digits"
    assert [(q["first_t"], q["last_t"]) for q in stored["quartiles"]] == [(0, 2), (3, 5), (6, 8), (9, 11)]
    curve = stored["bits_per_dim_by_t"]
    assert len(curve) == T and stored["num_images_by_t"] == [10] * T
    assert curve[0] == pytest.approx(nll["L_0"]) and sum(curve[1:]) == pytest.approx(nll["L_t"])
    assert sum(q["bits_per_dim"] for q in stored["quartiles"]) == pytest.approx(nll["L_t"] + nll["L_0"])
    picture = np.asarray(Image.open(run / "evaluation" / "nll.png"))
    assert picture.shape[0] > 300 and picture.min() < 100


def by_hand(folder: Path, num: int, seed: int) -> np.ndarray:
    """Bits per dimension of each image, [num, T + 1]: L_0 .. L_{T-1} and L_T, image by image."""
    pipeline, x_0 = loaded(folder), digits(num)
    process, schedule = pipeline.process, pipeline.schedule
    rows = []
    for i in range(num):
        network = network_of(pipeline.unet, process, schedule, None, torch.float32)
        strata, image = make_strata(T), torch.tensor([i])
        terms = bound_terms(process, schedule, network, x_0[i : i + 1], image, strata, seed=seed)
        rows.append([float(term.values) for term in terms] + [float(prior_term(schedule, x_0[i : i + 1]))])
    return np.array(rows) / math.log(2)


def test_figures_are_the_means_over_images_whatever_the_batches(run, capsys):
    truth = by_hand(run, 7, seed=3)
    for batch in ("1", "3", "64"):
        assert evaluate(run, "--num", "7", "--seed", "3", "--batch-size", batch) == 0
        nll = json.loads(capsys.readouterr().out)["nll"]
        assert nll["L_0"] == pytest.approx(truth[:, 0].mean(), rel=1e-5)
        assert nll["L_t"] == pytest.approx(truth[:, 1:T].sum(1).mean(), rel=1e-5)
        assert nll["L_T"] == pytest.approx(truth[:, T].mean(), rel=1e-9)
        totals = truth.sum(1)
        assert nll["stderr"] == pytest.approx(totals.std(ddof=1) / math.sqrt(7), rel=1e-4)


def shared_out(monkeypatch: pytest.MonkeyPatch, world: int, measure) -> list:
    """What each of `world` processes has measured before sums are exchanged."""
    monkeypatch.setattr(evaluation, "_over_ranks", lambda array, device: array)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(evaluation, "_ranks", lambda rank=rank: (rank, world))
        shares.append(measure())
    monkeypatch.undo()
    return shares


@pytest.mark.parametrize("every", [1, 3])
def test_shares_of_any_number_of_processes_add_up_to_the_same(run, monkeypatch, every):
    pipeline = loaded(run)
    images = open_split(read_config(run), pipeline, num=11)

    def measure():
        return measure_bound(pipeline, images, batch_size=4, every=every, seed=1)

    whole = measure()
    assert whole.counts.sum() == 11 * len(make_strata(T, every)) and whole.counts[0] == 11
    for world in (2, 3, 40):
        shares = shared_out(monkeypatch, world, measure)
        for name in ("prior", "middle", "first", "parts", "counts"):
            together = np.sum([getattr(share, name) for share in shares], axis=0)
            assert np.allclose(together, getattr(whole, name), rtol=1e-12, atol=0), (world, name)


def test_a_planted_lost_batch_is_seen(run, monkeypatch):
    """The last, smaller batch left out, as by a loader that drops it."""
    pipeline = loaded(run)
    images = open_split(read_config(run), pipeline, num=7)
    truth = by_hand(run, 7, seed=0)

    def totals() -> np.ndarray:
        return measure_bound(pipeline, images, batch_size=3).totals

    assert np.allclose(totals(), truth.sum(1), rtol=1e-5)
    real = evaluation.bound_terms
    monkeypatch.setattr(evaluation, "bound_terms", lambda *a, **k: real(*a, **k) if len(a[3]) == 3 else iter(()))
    assert not np.allclose(totals(), truth.sum(1), rtol=1e-2)


def test_two_processes_print_what_one_does(run, tmp_path, capsys):
    arguments = [
        "evaluate",
        str(run),
        "--metrics",
        "nll",
        "nll_ode",
        "--num",
        "11",
        "--batch-size",
        "4",
        "--steps",
        "2",
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    finally:
        torch.set_num_threads(threads)
    one = json.loads(capsys.readouterr().out)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "fastddpm", "--", *arguments, "--out", str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    two = json.loads(line)
    assert two.keys() == one.keys() == {"nll", "nll_ode"}
    for metric, figures in one.items():
        assert figures.pop("split") == two[metric].pop("split") == "train"
        assert two[metric] == pytest.approx(figures, rel=1e-9)
    curves = [json.loads((tmp_path / name / "nll.json").read_text())["bits_per_dim_by_t"] for name in ("one", "two")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)


def test_thinned_timesteps_leave_gaps_in_the_curve_only(run, tmp_path, capsys):
    assert evaluate(run, "--num", "3", "--every", "11", "--out", str(tmp_path)) == 0
    nll = json.loads(capsys.readouterr().out)["nll"]
    stored = json.loads((tmp_path / "nll.json").read_text())
    counts = stored["num_images_by_t"]
    assert counts[0] == 3 and sum(counts[1:]) == 3 and stored["every"] == 11
    curve = list(zip(stored["bits_per_dim_by_t"], counts, strict=True))
    assert all((bits is None) == (count == 0) for bits, count in curve)
    assert sum(bits * count * 11 for bits, count in curve[1:] if count) / 3 == pytest.approx(nll["L_t"])


def test_the_likelihood_by_the_ode(run, tmp_path, capsys):
    options = ["--metrics", "nll_ode", "--num", "3", "--batch-size", "2", "--out", str(tmp_path)]
    found = {}
    for steps in ("6", "12"):
        assert evaluate(run, *options, "--steps", steps, "--probes", "2") == 0
        captured = capsys.readouterr()
        found[steps] = json.loads(captured.out)["nll_ode"]
        assert "of the divergence" in captured.err
    assert found["12"].keys() == {"bits_per_dim", "stderr", "hutchinson_stderr", "num_images", "steps", "split"}
    assert found["12"]["bits_per_dim"] == pytest.approx(found["6"]["bits_per_dim"], rel=1e-2)
    assert found["12"]["hutchinson_stderr"] > 0 and found["12"]["num_images"] == 3 and found["12"]["steps"] == 12
    assert json.loads((tmp_path / "nll_ode.json").read_text())["nll_ode"] == found["12"]
    assert evaluate(run, *options, "--steps", "2", "--probes", "1", "--num", "1") == 0
    alone = json.loads(capsys.readouterr().out)["nll_ode"]
    assert alone["hutchinson_stderr"] is None and alone["stderr"] is None


def test_likelihoods_do_not_depend_on_batches_or_processes(run, monkeypatch):
    pipeline = loaded(run)
    images = open_split(read_config(run), pipeline, num=5)

    def measure(batch: int = 2):
        return measure_likelihood(pipeline, images, batch_size=batch, num_steps=2)

    whole = measure()
    assert np.allclose(measure(5).bits, whole.bits, rtol=1e-5)
    shares = shared_out(monkeypatch, 3, measure)
    assert np.allclose(np.sum([share.bits for share in shares], axis=0), whole.bits, rtol=1e-12, atol=0)


# Conditional runs


def test_a_conditional_run_is_told_the_labels_and_its_own_estimate(conditional, capsys):
    assert evaluate(conditional, "--metrics", "nll", "nll_ode", "--num", "6", "--steps", "2", "--batch-size", "4") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["nll"]["num_images"] == 6 and math.isfinite(record["nll_ode"]["bits_per_dim"])
    pipeline = loaded(conditional)
    images = open_split(read_config(conditional), pipeline, num=6)
    labels = torch.tensor(load_digits().target[:6])
    seen = []
    real = pipeline.unet.forward

    def watched(x, t, class_labels=None, return_dict=True):
        seen.append((x, t, class_labels))
        return real(x, t, class_labels, return_dict)

    pipeline.unet.forward = watched  # type: ignore[method-assign]
    figures = measure_bound(pipeline, images, batch_size=6, every=11)
    assert all(torch.equal(told, labels) for *_, told in seen)
    first, second = seen[0][0], seen[1][0]
    assert torch.equal(first[:, :1], second[:, :1]) and (first[:, 1:] == 0).all() and (second[:, 1:] != 0).any()
    assert second[:, 1:].abs().max() <= 1
    pipeline.unet.forward = real  # type: ignore[method-assign]
    x_0, _ = images.read(0, 6, CPU)
    wrong = network_of(pipeline.unet, pipeline.process, pipeline.schedule, (labels + 1) % 10, torch.float32)
    (terms,) = bound_terms(pipeline.process, pipeline.schedule, wrong, x_0, torch.arange(6), make_strata(T)[:1], seed=0)
    assert not np.allclose(terms.values.numpy() / math.log(2), figures.first, rtol=1e-3)


def test_the_own_estimate_between_two_timesteps_lies_between_theirs():
    process = ProcessConfig(num_timesteps=9, clip=False)
    schedule = process.noise_schedule()
    x_t, output = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    at = [evaluation._estimate(process, schedule, x_t, torch.full((3,), t), output) for t in (4.0, 4.25, 5.0)]
    whole = [schedule.predict_x_0(x_t, t, output) for t in (4, 5)]
    assert torch.allclose(at[0], whole[0]) and torch.allclose(at[2], whole[1])
    assert torch.allclose(at[1], 0.75 * whole[0] + 0.25 * whole[1])


def test_labels_that_the_network_does_not_know(conditional, tmp_path, capsys):
    def source(labels: list[int | None], name: str) -> str:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        pictures = [Image.fromarray(image) for image in digits(len(labels))[:, 0].numpy()]
        folder = tmp_path / name
        folder.mkdir()
        data = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        data.to_parquet(str(folder / "test.parquet"))
        return f"parquet:{folder}"

    base, pipeline = read_config(conditional), loaded(conditional)
    for labels, told in (([3, 10], "has the label 10: the network knows 0 .. 9"), ([3, -2], "has the label -2")):
        data = dataclasses.replace(base.data, source=source(labels, f"labels{labels[1]}"), label_column="label")
        images = open_split(dataclasses.replace(base, data=data), pipeline)
        with pytest.raises(DataError, match=f"row 1 of split test.*{told}"):
            images.read(0, 2, CPU)
    data = dataclasses.replace(base.data, source=source([3, -1], "none"), label_column="label")
    _, labels = open_split(dataclasses.replace(base, data=data), pipeline).read(0, 2, CPU)
    assert labels.tolist() == [3, 10], "without a label it is the class that stands for none"


# Other images


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> Path:
    """train and test of 8x8 grayscale images, folders big and colour of others."""
    root = tmp_path_factory.mktemp("splits")
    pixels = digits(9)[:, 0].numpy()
    for i, image in enumerate(pixels):
        for folder in ("sets/train", "sets/test", "big/test", "big/train"):
            path = root / folder / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            side = 8 if folder.startswith("sets") else 12
            if folder != "sets/test" or i >= 5:
                Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST).save(path)
    return root


def test_the_test_split_of_another_source(run, splits, tmp_path, capsys):
    assert evaluate(run, "--source", f"folder:{splits / 'sets'}", "--out", str(tmp_path)) == 0
    captured = capsys.readouterr()
    nll = json.loads(captured.out)["nll"]
    assert nll["split"] == "test" and nll["num_images"] == 4
    assert "split test of folder:" in captured.err and "trained" not in captured.err
    pipeline = loaded(run)
    images = open_split(read_config(run), pipeline, source=f"folder:{splits / 'sets'}")
    assert torch.equal(images.read(0, 4, CPU)[0], digits(9)[5:])


def test_filtered_mixed_and_streamed_images_count_once_each(run, tmp_path):
    """Whatever the training sequence makes of them: shares of a mixture, lanes that leave images out."""
    config, pipeline = read_config(run), loaded(run)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    pictures = [Image.fromarray(image) for image in digits(11)[:, 0].numpy()]
    for name, rows in (("a", range(7)), ("b", range(7, 11))):
        data = {"image": [pictures[i] for i in rows], "label": [i % 2 for i in rows]}
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict(data, features=features).to_parquet(tmp_path / name / "test.parquet", batch_size=3)
    mixed = dataclasses.replace(
        config.data, source=f"parquet:{tmp_path / 'a'}", mix=(f"parquet:{tmp_path / 'b'}",), weights=(0.9, 0.1)
    )
    odd = [i for i in range(7) if i % 2]
    for data, expected in (
        (mixed, list(range(11))),
        (dataclasses.replace(mixed, streaming=True, lanes=4), list(range(11))),
        (dataclasses.replace(mixed, mix=(), weights=(), filter="label == 1"), odd),
        (dataclasses.replace(mixed, mix=(), weights=(), filter="label == 1", streaming=True), odd),
    ):
        images = open_split(dataclasses.replace(config, data=data), pipeline)
        assert images.num == len(expected)
        assert torch.equal(images.read(0, images.num, CPU)[0], digits(11)[expected])
        few = open_split(dataclasses.replace(config, data=data), pipeline, num=2)
        assert torch.equal(few.read(1, 2, CPU)[0], digits(11)[expected[1:2]])


def test_scaled_images_are_refused_or_said_to_be_scaled(run, splits, tmp_path, capsys):
    big = f"folder:{splits / 'big'}"
    assert evaluate(run, "--source", big, "--out", str(tmp_path)) == 4
    assert "is 12x12 pixels (width x height), the model takes 8x8" in capsys.readouterr().err
    scaled = tmp_path / "scaled"
    shutil.copytree(run, scaled)
    facts = json.loads((scaled / "config.json").read_text())
    facts["config"]["data"]["fit"] = "resize"
    (scaled / "config.json").write_text(json.dumps(facts))
    assert evaluate(scaled, "--source", big, "--num", "2", "--every", "11") == 0
    assert "images of another size are brought to 8x8 (fit resize)" in capsys.readouterr().err


def test_images_of_other_channels_are_said_to_be(run, conditional, tmp_path, capsys):
    colour = tmp_path / "colour"
    (colour / "test").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(colour / "test" / f"{i}.png")
    options = ["--source", f"folder:{colour}", "--every", "11", "--out", str(tmp_path / "out")]
    assert evaluate(run, *options) == 0
    assert "images are in colour: the model is gray" in capsys.readouterr().err
    assert evaluate(conditional, *options) == 4
    assert "has no labels, and the run is conditional: give another --source" in capsys.readouterr().err
    gray = evaluation.open_data(evaluation.DataConfig(source="digits"), (8, 8), 3)
    assert "images are gray" in (evaluation._other_channels(gray.config, gray, np.arange(3)) or "")


# Bad input


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--split", "tset"], 4, "digits: no split tset; it has train"),
        (["--split", "test"], 4, "digits: no split test; it has train"),
        (["--num", "0"], 5, "--num is 0: it must be at least 1"),
        (["--num", "1798"], 5, "--num is 1798: split train of digits has 1797 images"),
        (["--batch-size", "0"], 5, "--batch-size is 0: it must be at least 1"),
        (["--every", "0"], 5, "--every is 0: it must be at least 1"),
        (["--every", "12"], 5, "every is 12: it must be in 1 .. 11 (T - 1)"),
        (["--steps", "0"], 5, "--steps is 0: it must be at least 1"),
        (["--probes", "-1"], 5, "--probes is -1: it must be at least 1"),
        (["--seed", "-1"], 5, "seed is -1: it must be in 0 .. 2^63 - 1"),
        (["--metrics", "fud"], 5, "fud"),
        (["--metrics"], 5, "--metrics is empty: valid are nll, nll_ode"),
        (["--out", "/dev/null/x"], 5, "output folder /dev/null/x cannot be written"),
        (["--source", "folder:/nowhere"], 4, "no such folder: /nowhere"),
    ],
)
def test_bad_input_is_one_line(run, capsys, options, code, message):
    assert evaluate(run, *options) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("fastddpm: error: ") and message in error


def test_a_folder_without_a_run_or_without_weights(run, tmp_path, capsys):
    assert evaluate(tmp_path / "nothing") == 5
    assert "nothing is not a run folder: it has no config.json" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(run / "config.json", empty)
    assert evaluate(empty) == 6
    assert "has no weights yet: they are written at the run's first save" in capsys.readouterr().err


def test_a_diverged_network_is_an_error_and_not_a_figure(run, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.full_like(w, math.nan) for name, w in load_file(weights).items()}, weights)
    for metric in ("nll", "nll_ode"):
        assert evaluate(broken, "--metrics", metric, "--num", "2", "--steps", "1") == 3
        captured = capsys.readouterr()
        assert captured.out == "" and "the network's predictions are not finite" in captured.err
