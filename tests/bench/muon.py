"""Muon's step at the shapes of 11 layers: stacked, matrix by matrix, and torch.optim.Muon.

    python tests/bench/muon.py [--rounds 5]

All three take turns in one process, so that a noisy machine hits them alike; medians are told.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt as tg


def main() -> None:
	"""Time a step of each and print a table."""
	parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
	parser.add_argument("--rounds", type=int, default=5)
	rounds = parser.parse_args().rounds
	device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
	dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
	model = tg.GPT(tg.Hyperparameters()).to(device)
	roles = tg.parameter_roles(model)
	matrices = [p for name, p in model.named_parameters() if roles[name] == "matrix"]
	for p in matrices:
		p.grad = torch.randn_like(p)
	stacked = tg.Muon(matrices, 0.04, 5, dtype)
	in_bf16 = tg.Muon(matrices, 0.04, 5, torch.bfloat16)
	single = [tg.Muon([p], 0.04, 5, dtype) for p in matrices]
	steps: dict[str, Callable[[], object]] = {
		"stacked, 4 shapes": lambda: stacked.step(0.0, 0.95),
		"stacked, bfloat16": lambda: in_bf16.step(0.0, 0.95),
		"matrix by matrix": lambda: [muon.step(0.0, 0.95) for muon in single],
	}
	if hasattr(torch.optim, "Muon"):
		theirs = torch.optim.Muon(matrices, lr=0.0, weight_decay=0.04, momentum=0.95)
		steps["torch.optim.Muon"] = theirs.step
	seconds: dict[str, list[float]] = {name: [] for name in steps}
	for _ in range(rounds + 1):
		for name, step in steps.items():
			began = time.perf_counter()
			step()
			if device.type == "cuda":
				torch.cuda.synchronize()
			seconds[name].append(time.perf_counter() - began)
	print(f"{len(matrices)} matrices, {device}, {dtype}, torch {torch.__version__}")
	first = statistics.median(seconds["stacked, 4 shapes"][1:])
	for name, times in seconds.items():
		times = times[1:]  # the first round warms up
		low, middle, high = min(times), statistics.median(times), max(times)
		print(f"{name:20} median {middle:.3f} s ({low:.3f} to {high:.3f}), {middle / first:.2f} x")


if __name__ == "__main__":
	main()
