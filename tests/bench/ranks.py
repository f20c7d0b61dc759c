"""What it costs to average gradients: one flat all-reduce against DistributedDataParallel.

    torchrun --standalone --nproc_per_node=2 tests/bench/ranks.py [--rounds 7] [--compile]

Backward alone, backward and one all-reduce of all gradients at once, and backward under PyTorch's
DDP (buckets of 25 MB, overlapped) take turns in one process; rank 0 prints medians. With --compile
each forward is compiled; DDP then splits the graph at its buckets.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt as tg


def main() -> None:
	"""Time each way and print a table."""
	parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
	parser.add_argument("--rounds", type=int, default=7)
	parser.add_argument("--compile", action="store_true")
	args = parser.parse_args()
	cuda = torch.cuda.is_available()
	dist.init_process_group("nccl" if cuda else "gloo")
	rank, world = tg.ranks()
	device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
	h = tg.Hyperparameters(**({} if cuda else {"num_layers": 6, "train_seq_len": 128}))
	dtype = torch.bfloat16 if cuda else torch.float32
	ours, theirs = (tg.GPT(h, dtype=dtype).to(device) for _ in range(2))
	gradient = tg.flat_gradient(list(ours.parameters()))
	ddp = DistributedDataParallel(theirs)
	if args.compile:
		ours, ddp = (torch.compile(model, dynamic=False) for model in (ours, ddp))
	ids = torch.randint(h.vocab_size, (8 if cuda else 1, h.train_seq_len), device=device)

	def alone() -> None:
		ours(ids, ids).backward()

	def flat() -> None:
		ours(ids, ids).backward()
		tg.summed(gradient)

	def buckets() -> None:
		ddp(ids, ids).backward()

	ways: dict[str, Callable[[], None]] = {
		"backward alone": alone,
		"one all-reduce after it": flat,
		"DDP's buckets within it": buckets,
	}
	seconds: dict[str, list[float]] = {name: [] for name in ways}
	for _ in range(args.rounds + 2):
		for name, way in ways.items():
			dist.barrier()
			began = time.perf_counter()
			way()
			if cuda:
				torch.cuda.synchronize()
			seconds[name].append(time.perf_counter() - began)
	if rank == 0:
		print(f"{gradient.numel()} gradients, {world} ranks, {device}, torch {torch.__version__}")
		for name, times in seconds.items():
			times = times[2:]  # the first rounds warm up
			low, middle, high = min(times), statistics.median(times), max(times)
			print(
				f"{name:24} median {1000 * middle:.1f} ms ({1000 * low:.1f} to {1000 * high:.1f})"
			)
	dist.destroy_process_group()


if __name__ == "__main__":
	main()
