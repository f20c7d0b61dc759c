"""Forecast of a full-size run: bytes of the artifact, FLOPs and steps; nothing is trained.

    python -m tests.bench.forecast ["NAME=VALUE ..." ...]

Each argument is the settings of a model; by default those of PRESET=v9 and of PRESET=frontier. The
artifact is that of normal weights whose rows and columns differ in size, rounded to the nearest
code and fitted to the limit. The steps follow from the step times that PR #1124 and PR #1855
published for 8xH100 and from the FLOPs of a step. README.md says what this leaves out.
"""

import sys
from typing import NamedTuple

import torch

import train_gpt as tg

from .harness import assignments, synthetic_weights
from .step import flops_per_token, visits
from .tables import show

CARDS = 8
# Mean milliseconds of a step on 8xH100 as their authors published them, by preset. That of
# frontier is PR #1855's, with its fused kernels and its own TRAIN_BATCH_TOKENS of 786,432.
PUBLISHED_MS = {"v9": 86.99, "frontier": 121.7}


class Part(NamedTuple):
    """What an artifact holds of one role."""

    weights: int
    bits: int  # range of the codes; 16 for float16
    sigmas: float  # median over rows: largest code times scale by standard deviation, k
    entropy: float  # bits a code, order 0, of each array alone
    codes: int  # bytes of the codes, or of float16, compressed without the other roles
    scales: int  # bytes of the scales, not compressed


# ---- Artifact ----


def artifact_parts(
    model: tg.GPT, arrays: dict[str, torch.Tensor], compressor: str
) -> dict[str, Part]:
    """Returns what an artifact holds, by role; `arrays` are those of tg.unpack_artifact."""
    weights, roles, parts = dict(model.named_parameters()), tg.parameter_roles(model), {}
    for role in dict.fromkeys(roles.values()):
        names = [name for name in roles if roles[name] == role]
        stored = tg.ROLES[role].bits
        codes = [arrays[f"{name}.codes" if stored else name] for name in names]
        sigmas, entropy, scales = 0.0, 16.0, 0
        if stored:
            limit = 2 ** (getattr(model.h, stored) - 1) - 1
            ratios = [
                limit * arrays[f"{name}.scales"].float() / weights[name].detach().std(-1)
                for name in names
            ]
            sigmas = torch.cat(ratios).median().item()
            entropy = 8 * sum(map(tg.code_entropy, codes)) / sum(x.numel() for x in codes)
            scales = sum(arrays[f"{name}.scales"].nbytes for name in names)
        packed = tg.CODECS[compressor].compress([x.numpy() for x in codes])
        parts[role] = Part(
            weights=sum(x.numel() for x in codes),
            bits=getattr(model.h, stored) if stored else 16,
            sigmas=sigmas,
            entropy=entropy,
            codes=len(packed),
            scales=scales,
        )
    return parts


def artifact_table(h: tg.Hyperparameters) -> list[str]:
    """Returns the lines of a table: the artifact of a model by role, and its size."""
    model = synthetic_weights(tg.GPT(h))
    program = len(tg.packed_source(tg.read_program()[0]))
    room = tg.BYTES_LIMIT - program
    blob = tg.pack_to_fit(model, {}, h, room, tg.Ranks(), tg.Log(silent=True))
    parts = artifact_parts(model, tg.unpack_artifact(blob, h)[1], h.compressor)
    lines = [
        f"Forecast of the artifact: synthetic weights, SCALE_RULE={h.scale_rule}, "
        f"COMPRESSOR={h.compressor}, each role compressed alone.",
        "",
        "| role | weights | bits | k | bits a code, order 0 | bytes of codes | bytes of scales |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for role, part in parts.items():
        k = f"{part.sigmas:.3f}" if part.sigmas else ""
        entropy = f"{part.entropy:.3f}" if part.sigmas else ""
        cells = [role, f"{part.weights:,}", str(part.bits), k, entropy]
        lines.append("| " + " | ".join([*cells, f"{part.codes:,}", f"{part.scales:,}"]) + " |")
    total = sum(part.weights for part in parts.values())
    lines.append(f"| the artifact | {total:,} | | | | {len(blob):,} | |")
    lines.append(f"| the packed program | | | | | {program:,} | |")
    lines.append(f"| left of {tg.BYTES_LIMIT:,} | | | | | {room - len(blob):,} | |")
    return lines


# ---- Steps ----


def step_times(mean: float, ratio: float, start: float) -> tuple[float, float]:
    """Returns the times of a step before and after the loops switch on, in the unit of `mean`.

    `mean` is the time of the run divided by its steps, `ratio` that of the two times, `start` the
    fraction of the run's time at which they switch on.
    """
    before = mean * (start + (1 - start) / ratio)
    return before, ratio * before


def step_table(h: tg.Hyperparameters) -> list[str]:
    """Returns the lines of a table: FLOPs of a step, and steps in the time of training."""
    with torch.device("meta"):
        model = tg.GPT(h)
    tokens, start = h.train_batch_tokens, h.enable_looping_at if h.num_loops else 1.0
    without, repeated = (flops_per_token(model, loops) * tokens for loops in (0, h.num_loops))
    ratio = repeated / without
    v9 = tg.Hyperparameters.from_env({})
    with torch.device("meta"):
        v9_flops = flops_per_token(tg.GPT(v9), 0) * v9.train_batch_tokens
    at_v9_rate = PUBLISHED_MS["v9"] * without / v9_flops
    speeds = {"PR #1124's FLOPs a second": (at_v9_rate, ratio * at_v9_rate)}
    if h.num_loops:
        published = step_times(PUBLISHED_MS["frontier"], ratio, start)
        speeds["PR #1855's mean step of 121.7 ms"] = published
    counts = [len(visits(h, loops)) for loops in sorted({0, h.num_loops})]
    lines = [
        f"Forecast of the steps in {h.max_wallclock_seconds:.0f} s on {CARDS}xH100: layer visits "
        f"{' and '.join(map(str, counts))}, {without / 1e12:.1f} TFLOPs a step"
        + (f", {repeated / 1e12:.1f} with loops ({ratio:.3f} times)." if h.num_loops else "."),
        "",
        "| at | ms a step | ms with loops | steps | of them with loops | TFLOP/s a card |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, (before, after) in speeds.items():
        seconds = h.max_wallclock_seconds
        few, many = 1000 * seconds * start / before, 1000 * seconds * (1 - start) / after
        rate = without / before / 1e9 / CARDS
        share = many / (few + many)
        cells = [name, f"{before:.1f}", f"{after:.1f}", f"{few + many:,.0f}"]
        lines.append("| " + " | ".join([*cells, f"{share:.1%}", f"{rate:.0f}"]) + " |")
    return lines


def forecast(settings: str) -> str:
    """Returns the forecast of a model as Markdown. Raises SettingsError."""
    h = tg.Hyperparameters.from_env(assignments(settings))
    return "\n".join([f"### {settings}", "", *artifact_table(h), "", *step_table(h), ""])


def main(argv: list[str]) -> None:
    """Prints a forecast of each argument."""
    for settings in argv or [f"PRESET={name}" for name in PUBLISHED_MS]:
        show(forecast(settings))


if __name__ == "__main__":
    main(sys.argv[1:])
