"""Measurements, run from a clone as `python -m benchmarks.NAME`; nothing in the library imports them."""

import sys
from pathlib import Path

# A clone without an installation finds the kernels too.
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "kernels"))
