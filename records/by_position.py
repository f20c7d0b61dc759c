"""Show how much adapters gain at each position of the documents.

    PRESET=frontier python records/by_position.py logs/run --out gain.png

The validation text is scored document by document, without adapters and with them, in windows of
equal context. Settings in the environment are those of train_gpt.py --eval. Prints bits per byte
and the share of the gain by the position in the document, and draws the gain.
"""

import argparse
import io
import math
import os
import sys
from itertools import pairwise
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import rich.console
import rich.table
import torch
from matplotlib import style
from matplotlib.figure import Figure
from torch import Tensor

from plot import RC
from runs import RunError, train_gpt
from tool import tool

BOUNDS = (0, 16, 48, 96, 192, 384, 768, 1536, 3072)  # the last group has no end


def score_positions(run: train_gpt.Run, scoring_pass: train_gpt.ScoringPass) -> Tensor:
    """Returns nats and bytes, float64 [2, N], of the positions of the validation text by a pass."""
    found = torch.zeros(2, len(run.data.val.tokens) - 1, dtype=torch.float64)

    def keep(batch: train_gpt.Batch, scores: Tensor) -> None:
        found[:, batch.positions().cpu()] = scores[::2, batch.scored()].cpu()

    tokens = train_gpt.scoring_batch_tokens(run.h, run.device)
    train_gpt.score(scoring_pass, run.data.val, run.ranks, run.device, run.log, tokens, keep)
    return run.ranks.all_reduce_(found.to(run.device.device)).cpu()


def position_in_document(tokens: Tensor) -> Tensor:
    """Returns the position in its document, int64 [N], of the tokens [N + 1] but the last."""
    here = torch.arange(len(tokens) - 1)
    begins = (tokens[:-1] == train_gpt.BOS_ID) | (here == 0)
    return here - (here * begins).cummax(0).values


def draw(gains: list[float], out: Path) -> None:
    """Writes a figure of the gain in each group of positions."""
    with style.context(["default", RC]):
        figure = Figure(figsize=(7.5, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.bar(range(len(gains)), [1000 * gain for gain in gains])
        axes.set_xticks(range(len(gains)), group_names())
        axes.set_xlabel("position in the document, tokens")
        axes.set_ylabel("gain of adapters, mB")
        png = io.BytesIO()
        figure.savefig(png, metadata={"Software": None})
    train_gpt.write_atomically(out, png.getvalue())


def group_names() -> list[str]:
    """Returns a name for each group of positions."""
    return [f"{begin}-{end - 1}" for begin, end in pairwise(BOUNDS)] + [f"from {BOUNDS[-1]}"]


@tool
def main(argv: list[str]) -> int:
    """Runs the program; returns 0, or 2 if the artifact cannot be scored."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, help="an artifact, or a run's folder")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw the gain")
    args = parser.parse_args(argv)
    try:
        run = train_gpt.Run(os.environ, train_gpt.Log(silent=True), {})
        path = train_gpt.file_in(args.artifact, train_gpt.ARTIFACT)
        run.h, weights = train_gpt.load_artifact(path, run.h)
        run.prepare(trains=False, writes=False)
    except (train_gpt.SettingsError, train_gpt.DataError) as error:
        raise RunError(str(error)) from error
    model, tokens = run.load_model(weights), run.data.val.tokens
    equal = train_gpt.replace(run.h, eval_stride=run.h.ttt_chunk_size)
    plain = train_gpt.by_document(model, equal, run.device)
    adapts = train_gpt.with_adapters(model, run.h, run.device, run.ranks, run.log)
    without, text_bytes = score_positions(run, plain)
    adapted, _ = score_positions(run, adapts)
    groups = torch.bucketize(position_in_document(tokens), torch.tensor(BOUNDS[1:]), right=True)
    nats = torch.stack((without, adapted, text_bytes))
    sums = torch.zeros(3, len(BOUNDS), dtype=torch.float64).index_add_(1, groups, nats)
    table = rich.table.Table("positions", "bytes", "documents", "adapters", "gain, mB", "share")
    for name, (before, after, size) in zip(
        [*group_names(), "all"], [*sums.T, sums.sum(1)], strict=True
    ):
        of_group = [bits_per_byte(x, size) for x in (before, after, before - after)]
        share = (before - after) / ((without - adapted).sum() or 1)
        cells = f"{of_group[0]:.4f}", f"{of_group[1]:.4f}", f"{1000 * of_group[2]:.2f}"
        table.add_row(name, f"{int(size):,}", *cells, f"{share:.1%}")
    rich.console.Console(width=100).print(table)
    if args.out:
        gained = sums[0] - sums[1]
        draw([bits_per_byte(x, size) for x, size in zip(gained, sums[2], strict=True)], args.out)
    return 0


def bits_per_byte(nats: Tensor, text_bytes: Tensor) -> float:
    """Returns bits per byte, 0 of no text."""
    return float(nats / math.log(2) / text_bytes) if text_bytes else 0.0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
