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

CARDS, SECONDS = 8, 600
# Settings of two records, and the mean seconds of their steps as their authors published them.
PUBLISHED = {"PR #1124": ("PRESET=v9", 0.08699), "PR #1855": ("PRESET=frontier", 0.1217)}


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
        packed = tg.CODECS[compressor].compress(
            [x.numpy() for x in codes], tg.QUANTIZERS[model.h.quantizer]
        )
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
    blob = tg.pack_to_fit(
        model, tg.weight_stacks(model, {}, tg.Ranks()), room, tg.Ranks(), tg.Log(silent=True)
    )
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


def step_flops(h: tg.Hyperparameters) -> tuple[float, float]:
    """Returns the FLOPs of a step before and after the loops switch on."""
    with torch.device("meta"):
        model = tg.GPT(h)
    before, after = (flops_per_token(model, loops) for loops in (0, h.num_loops))
    return before * h.train_batch_tokens, after * h.train_batch_tokens


def published_speed(settings: str, mean: float) -> float:
    """Returns the FLOPs a second of a run whose steps took `mean` seconds on average."""
    h = tg.Hyperparameters.from_env(assignments(settings))
    before, after = step_flops(h)
    return before / step_times(mean, after / before, h.enable_looping_at)[0]


def step_table(h: tg.Hyperparameters) -> list[str]:
    """Returns the lines of a table: FLOPs of a step, and steps in the time of training."""
    before, after = step_flops(h)
    start = h.enable_looping_at if h.num_loops else 1.0
    counts = [len(visits(h, loops)) for loops in (0, h.num_loops)]
    lines = [
        f"Forecast of the steps in {SECONDS} s on {CARDS}xH100. Before the loops {counts[0]} layer "
        f"visits and {before / 1e12:.1f} TFLOPs a step, then {counts[1]} and {after / 1e12:.1f}.",
        "",
        "| at the speed of | TFLOP/s a card | ms a step before | then | steps | of them looped |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, (settings, mean) in PUBLISHED.items():
        speed = published_speed(settings, mean)
        few, many = SECONDS * start * speed / before, SECONDS * (1 - start) * speed / after
        times = [f"{1000 * flops / speed:.1f}" for flops in (before, after)]
        cells = [name, f"{speed / CARDS / 1e12:.0f}", *times, f"{few + many:,.0f}"]
        lines.append("| " + " | ".join([*cells, f"{many / (few + many):.1%}"]) + " |")
    return lines


def forecast(settings: str) -> str:
    """Returns the forecast of a model as Markdown. Raises SettingsError."""
    h = tg.Hyperparameters.from_env(assignments(settings))
    return "\n".join([f"### {settings}", "", *artifact_table(h), "", *step_table(h), ""])


def main(argv: list[str]) -> None:
    """Prints a forecast of each argument."""
    for settings in argv or ["PRESET=v9", "PRESET=frontier"]:
        show(forecast(settings))


if __name__ == "__main__":
    main(sys.argv[1:])
