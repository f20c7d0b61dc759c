"""Benchmarks of train_gpt.py: `python -m tests.bench --help`."""

import os
import sys
from pathlib import Path

# As the program itself does, before torch: threads that spin spoil any timing on a busy machine.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
