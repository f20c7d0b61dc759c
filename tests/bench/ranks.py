"""What it costs to average gradients: one flat all-reduce against DistributedDataParallel.

    torchrun --standalone --nproc_per_node=2 -m tests.bench.ranks [--rounds 7] [--compile]

Backward alone, backward and one all-reduce of all gradients at once, and backward under PyTorch's
DDP (buckets of 25 MB, overlapped) take turns in one process. With --compile each forward is
compiled; DDP then splits the graph at its buckets.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import train_gpt as tg

from . import ROOT
from .harness import SCALES, Machine, Row, Scale, Table, in_turns, rows_of
from .tables import markdown, show


def ranks(scale: Scale, machine: Machine) -> Table:
    """Averaging gradients over ranks: one all-reduce against DDP's buckets."""
    count = torch.cuda.device_count() if machine.device.is_cuda else 2
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    arguments = ["--rounds", str(scale.rounds), "--settings", scale.ranks, "--json"]
    arguments += ["--device", machine.device.device.type]
    command = [sys.executable, *launch, "-m", "tests.bench.ranks", *arguments]
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    sizes, rows = json.loads(done.stdout.splitlines()[-1])
    return Table(sizes, [Row(*values) for values in rows])


def measure(h: tg.Hyperparameters, device: torch.device, rounds: int, compiled: bool) -> Table:
    """Returns the table of this process group."""
    cuda, group = device.type == "cuda", tg.Ranks(dist.get_rank(), dist.get_world_size())
    dtype = torch.bfloat16 if cuda else torch.float32
    ours, theirs = (tg.GPT(h, dtype=dtype).to(device) for _ in range(2))
    gradient = tg.bind_flat_gradient_(list(ours.parameters()))
    ddp = DistributedDataParallel(theirs)
    if compiled:
        ours, ddp = (torch.compile(model, dynamic=False) for model in (ours, ddp))
    shape = (h.train_batch_tokens // h.train_seq_len, h.train_seq_len)
    ids = torch.randint(h.vocab_size, shape).to(device)

    def flat() -> None:
        ours(ids, ids).backward()
        group.all_reduce_(gradient)

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter()

    ways = {
        "backward alone": lambda: ours(ids, ids).backward(),
        "one all-reduce after it": flat,
        "DDP's buckets within it": lambda: ddp(ids, ids).backward(),
    }
    rows = rows_of(in_turns(ways, rounds, now, warm=2))
    sizes = f"{gradient.numel():,} gradients, {ids.numel()} tokens a rank"
    return Table(f"{sizes}, {group.world_size} ranks", rows)


def main() -> None:
    """Measures; rank 0 prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    kinds = ("cpu", "cuda")
    parser.add_argument("--device", choices=kinds, default=kinds[torch.cuda.is_available()])
    parser.add_argument("--settings", help="of the model and its batch, as one would type them")
    parser.add_argument("--json", action="store_true", help="print sizes and rows as JSON")
    args = parser.parse_args()
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    scale = SCALES[args.device, False]
    h = scale.h(scale.ranks if args.settings is None else args.settings)
    table = measure(h, torch.device(args.device), args.rounds, args.compile)
    if dist.get_rank() == 0:
        if args.json:
            print(json.dumps(table))
        else:
            show(markdown("ranks", "one all-reduce against DDP's buckets", table))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
