"""Measure how long the windows of a training step take to read from disk, and from the page cache.

    python -m tests.bench.reading FOLDER [--shards 80] [--shard-tokens 10000000]

Writes shards of random tokens to FOLDER/reading and removes them at the end. A step has 384 windows
of 2,048 tokens; one process reads all, or the 48 of one of eight ranks. Before a cold round the
pages of all shards are dropped from the page cache; before a warm one the same step was read.
"""

import argparse
import os
import shutil
import time
from itertools import product
from pathlib import Path

import numpy as np

import train_gpt as tg

from .harness import Row, Table, row
from .tables import markdown

ROWS, SEQ_LEN, ROUNDS = 384, 2048, 5


def write_shards(folder: Path, shards: int, tokens: int) -> None:
    """Writes shards of so many random tokens, on disk when it returns."""
    draw = np.random.default_rng(0)
    for number in range(shards):
        with open(folder / f"fineweb_train_{number:06d}.bin", "wb") as file:
            file.write(tg.shard_header(tokens) + draw.integers(4, 1024, tokens, "<u2").tobytes())
            file.flush()
            os.fsync(file.fileno())


def drop_pages(folder: Path) -> None:
    """Drops the pages of files that no process maps from the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(folder: Path, order: str, ranks: tg.Ranks, step: int) -> float:
    """Returns the seconds that the first rank's windows of a step take, from shards mapped anew."""
    stream = tg.TokenStream(folder, "train", 1024)
    h = tg.Hyperparameters(
        train_batch_tokens=ROWS * SEQ_LEN, train_seq_len=SEQ_LEN, train_order=order
    )
    batches = tg.TrainingBatches(stream, h, ranks)
    began = time.perf_counter()
    batches.batch(step)
    return time.perf_counter() - began


def measure(folder: Path) -> list[Row]:
    """Returns the seconds of a step, cold and warm, by order of the windows and number of ranks."""
    rows = []
    for order, world_size in product(("shuffled", "sequential"), (1, 8)):
        cold, warm, ranks = [], [], tg.Ranks(0, world_size)
        for step in range(ROUNDS):
            drop_pages(folder)
            cold.append(read_seconds(folder, order, ranks, step))
            warm.append(read_seconds(folder, order, ranks, step))
        what = f"{order}, {ROWS // world_size} windows"
        rows += [row(f"{what}, cold", "s", cold), row(f"{what}, warm", "s", warm)]
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=80)
    parser.add_argument("--shard-tokens", type=int, default=10_000_000)
    args = parser.parse_args()
    folder = args.folder / "reading"
    folder.mkdir()
    try:
        write_shards(folder, args.shards, args.shard_tokens)
        sizes = f"{ROWS} windows of {SEQ_LEN:,} tokens, {args.shards} shards of "
        table = Table(sizes + f"{args.shard_tokens:,} tokens", measure(folder))
    finally:
        shutil.rmtree(folder)
    print(markdown("reading", "Seconds to read the windows of a training step", table))


if __name__ == "__main__":
    main()
