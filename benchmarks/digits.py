"""Are the samples of the digits preset digits? Trains it from several seeds and lets a classifier judge.

    python -m benchmarks.digits                      # three training seeds, about 2 minutes each on 2 cores
    python -m benchmarks.digits --seeds 0 --steps 500

The judge is a logistic regression on kernel features of scikit-learn's real digits, three in ten held out. A sample is
plainly a digit if the judge gives some class at least 0.8. The same figure is printed for held-out real digits, for
half-half blends of two of them with different labels, and for pure noise. The judge never sees a sample in training.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline

from .record import append, environment, results_path

PLAIN = 0.8
NUM = 200


@dataclass(frozen=True)
class Judge:
    """A classifier of 8x8 digits and its figures for things that are, half are and are not digits."""

    model: Pipeline
    accuracy: float
    real: float
    blends: float
    noise: float

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities [N, 10] of uint8 images [N, 8, 8, 1]."""
        return self.model.predict_proba(images.reshape(len(images), 64) / 255.0)

    def plain(self, images: np.ndarray) -> float:
        """Share of images with a class of at least PLAIN."""
        return float((self.probabilities(images).max(1) >= PLAIN).mean())

    def classes(self, images: np.ndarray) -> list[int]:
        """How many images are plainly of each class 0 .. 9."""
        p = self.probabilities(images)
        return np.bincount(p.argmax(1)[p.max(1) >= PLAIN], minlength=10).tolist()


def make_judge() -> Judge:
    """Train the judge on seven in ten of the real digits and measure it on the others."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    seen, held, seen_labels, held_labels = train_test_split(
        pixels, digits.target, test_size=0.3, random_state=0, stratify=digits.target
    )
    # Kernel features that decay with distance make the judge unsure of what lies far from every digit; a linear one
    # is sure of half of pure noise. C trades real digits called plain (91 %) against blends called plain (19 %).
    features = Nystroem(gamma=0.1, n_components=600, random_state=0)
    model = make_pipeline(features, LogisticRegression(C=20.0, max_iter=5000))
    model.fit(seen.reshape(len(seen), 64) / 255.0, seen_labels)
    judge = Judge(model, 0.0, 0.0, 0.0, 0.0)
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, len(held), (2, 2000))
    different = held_labels[a] != held_labels[b]
    blends = (held[a[different]].astype(int) + held[b[different]] + 1) // 2
    noise = generator.integers(0, 256, (1000, 8, 8, 1))
    accuracy = float((judge.probabilities(held).argmax(1) == held_labels).mean())
    return Judge(model, accuracy, judge.plain(held), judge.plain(blends), judge.plain(noise))


def trained_samples(seed: int, folder: Path, steps: int | None = None) -> tuple[np.ndarray, float]:
    """Train the preset from a seed and draw images 0 .. 199; returns uint8 [200, 8, 8, 1] and the training seconds."""
    from fastddpm.cli import main

    run, out = folder / f"run{seed}", folder / f"out{seed}"
    start = time.perf_counter()
    train = ["train", "--preset", "digits", "--run", str(run), "--seed", str(seed)]
    if main(train + (["--steps", str(steps)] if steps else [])):
        raise SystemExit("training failed")
    seconds = time.perf_counter() - start
    if main(["sample", str(run), "--num", str(NUM), "--batch-size", str(NUM), "--out", str(out)]):
        raise SystemExit("sampling failed")
    return np.load(out / "samples.npz")["arr_0"], seconds


def main() -> None:
    """Command line of the benchmark: one JSON line per training seed on stdout, a table on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--steps", type=int, help="optimiser steps instead of the preset's")
    parser.add_argument("--record", action="store_true", help="append the lines to benchmarks/results")
    parser.add_argument("--out", type=Path, help="folder for runs and samples (default: a temporary one)")
    options = parser.parse_args()
    judge = make_judge()
    facts = environment("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"judge: {judge.accuracy:.1%} accurate on held-out digits; plainly a digit: {judge.real:.1%} of them, "
        f"{judge.blends:.1%} of blends, {judge.noise:.1%} of noise",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            images, seconds = trained_samples(seed, options.out or Path(temporary), options.steps)
            record = {
                "workload": "digits",
                "seed": seed,
                "train_seconds": round(seconds, 1),
                "plain": judge.plain(images),
                "classes": judge.classes(images),
                "judge": {k: getattr(judge, k) for k in ("accuracy", "real", "blends", "noise")},
            }
            print(json.dumps(record), flush=True)
            if options.record:
                append(results_path(facts), record | facts)


if __name__ == "__main__":
    main()
