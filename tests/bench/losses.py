"""Compare the losses of this train_gpt.py with those of another one over the same steps.

    [NAME=value ...] python -m tests.bench.losses OTHER/train_gpt.py [--steps 50] [--tolerance 1e-5]

Both run in their own processes with the same seed, with PRESET=cpu and the settings of the
environment. The exit status is 1 if a loss differs by more than the tolerance, which is relative.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def train(program: Path, steps: int, folder: Path) -> dict:
    """Returns the result of a run of a program for some steps. Raises SystemExit if it fails."""
    settings = {"PRESET": "cpu", "EVAL_STRIDE": "0", "GPTQ_ENABLED": "0"}
    # Programs from before the setting read the text in sequence.
    settings |= {"TRAIN_ORDER": "sequential", **os.environ}
    settings |= {"ITERATIONS": str(steps), "RUN_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, program], env=settings, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode not in (0, 1):  # 1: over a limit
        sys.exit(
            f"{program}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return json.loads((folder / "result.json").read_text())


def main() -> bool:
    """Prints the losses of both and their differences; returns whether these are too large."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        programs = {"this": ROOT / "train_gpt.py", "other": args.other.resolve()}
        results = {
            name: train(path, args.steps, Path(folder, name)) for name, path in programs.items()
        }
    losses = [result["train_losses"] for result in results.values()]
    apart = [abs(a / b - 1) for a, b in zip(*losses, strict=True)]
    for step in sorted({1, *range(10, args.steps + 1, 10), args.steps}):
        this, other = (x[step - 1] for x in losses)
        print(f"step {step:4} this {this:.5f} other {other:.5f} apart {apart[step - 1]:.1e}")
    for name, result in results.items():
        bpb, ms = result["scores"]["plain"]["val_bpb"], result["step_ms"]["p50"]
        print(f"{name}: bpb {bpb:.5f}, {ms:.1f} ms a step")
    same = max(apart) <= args.tolerance
    print(f"{'same' if same else 'NOT THE SAME'}: {max(apart):.1e} of {args.tolerance:.0e} allowed")
    return not same


if __name__ == "__main__":
    sys.exit(main())
