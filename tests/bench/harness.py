"""What all benchmarks share: sizes, the machine, variants that take turns, rows of figures."""

import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_gpt as tg


class Machine(NamedTuple):
    """What the benchmarks run on."""

    device: tg.Device


class Row(NamedTuple):
    """A figure of one variant: over rounds, or counted once."""

    what: str
    unit: str
    median: float
    low: float
    high: float
    rounds: int
    ratio: list[float] | None = None  # to a first variant, by round: median, lowest, highest


class Table(NamedTuple):
    """What a benchmark found, and at which sizes."""

    sizes: str
    rows: list[Row]


@dataclass(frozen=True)
class Scale:
    """How large and how often: every size of every benchmark."""

    device: str
    rounds: int
    calls: int  # in a turn, of what a GPU does in a millisecond
    settings: str  # of the model, its step and its scoring, as one would type them
    byte_settings: str  # of the step of PR #832's stack
    frontier_settings: str  # of the frontier's step
    eager: str  # what the step changes where an eager one takes part
    matrices: str  # of the model whose matrices Muon steps
    ranks: str  # of the model whose gradients are summed
    attention: tuple[tuple[int, int], ...]  # sequences, and tokens of each
    heads: tuple[int, int, int]  # query heads, key/value heads, width
    val_tokens: int  # to score
    codes: int  # bytes of codes for every compressor
    square: int  # rows and columns of the matrix product that is the ceiling

    def h(self, settings: str) -> tg.Hyperparameters:
        """Returns the settings of a text such as "NUM_LAYERS=2 PRESET=cpu"."""
        return tg.Hyperparameters.from_env(assignments(settings))


def assignments(text: str) -> dict[str, str]:
    """Returns the environment that a text of NAME=value words describes."""
    return dict(word.split("=", 1) for word in shlex.split(text))


# A GPU's share of a step on eight, at the published shapes.
V9, BYTES = "TRAIN_BATCH_TOKENS=98304", "PRESET=byte_jepa TRAIN_BATCH_TOKENS=49152"
BYTE_CPU = "PRESET=byte_jepa NUM_LAYERS=2 MODEL_DIM=128 NUM_HEADS=2 NUM_KV_HEADS=1 "
BYTE_CPU += "TRAIN_SEQ_LEN=512 TRAIN_BATCH_TOKENS=2048"
FRONTIER = "PRESET=frontier TRAIN_BATCH_TOKENS=98304"
FRONTIER_CPU = (
    "PRESET=frontier VOCAB_SIZE=1024 NUM_LAYERS=4 MODEL_DIM=128 NUM_HEADS=2 NUM_KV_HEADS=1 "
)
FRONTIER_CPU += (
    "LOOP_START=1 LOOP_END=2 PARALLEL_START_LAYER=3 TRAIN_SEQ_LEN=512 TRAIN_BATCH_TOKENS=2048"
)
CUDA = Scale(
    device="cuda",
    rounds=10,
    calls=10,
    settings=V9,
    byte_settings=BYTES,
    frontier_settings=FRONTIER,
    eager="TRAIN_BATCH_TOKENS=32768",
    matrices="",
    ranks="TRAIN_BATCH_TOKENS=16384",
    attention=((48, 2048), (12, 4096)),
    heads=(8, 4, 64),
    val_tokens=124_928,  # whole sequences of the one pass
    codes=8 << 20,
    square=8192,
)
CPU = Scale(
    device="cpu",
    rounds=5,
    calls=1,
    settings="PRESET=cpu",
    byte_settings=BYTE_CPU,
    frontier_settings=FRONTIER_CPU,
    eager="",
    matrices="",
    ranks="NUM_LAYERS=6 TRAIN_SEQ_LEN=128 TRAIN_BATCH_TOKENS=128",
    attention=((1, 2048), (1, 4096)),
    heads=(8, 4, 64),
    val_tokens=15_872,
    codes=2 << 20,
    square=2048,
)
SCALES = {
    ("cpu", False): CPU,
    ("cpu", True): replace(
        CPU,
        rounds=3,
        settings="PRESET=cpu GPTQ_CALIB_TOKENS=32768",
        eager="NUM_LAYERS=1",
        matrices="MODEL_DIM=128",
        ranks="NUM_LAYERS=2 TRAIN_SEQ_LEN=128 TRAIN_BATCH_TOKENS=128",
        attention=((1, 512), (1, 1024)),
        val_tokens=2048,
        codes=1 << 19,
        square=1024,
    ),
    ("cuda", False): CUDA,
    ("cuda", True): replace(CUDA, rounds=5, val_tokens=32_768, codes=1 << 20),
}


def start_machine(scale: Scale) -> Machine:
    """Returns the device that the scale names, with the attention chosen for it."""
    if scale.device == "cuda" or not torch.cuda.is_available():
        h = scale.h(scale.settings)
        device, _ = tg.start_device(h.compile)
        return Machine(tg.choose_attention(h, device, tg.Ranks())[0])
    device = tg.Device(torch.device("cpu"), torch.float32, compiled=False)
    tg.select_attention("flash")
    return Machine(device)


def in_turns(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    now: Callable[[], float] = time.perf_counter,
    warm: int = 1,
    calls: int = 1,
) -> dict[str, list[float]]:
    """Returns the seconds of a call of each way, by round.

    The ways take turns, so that noise of the machine affects all of them; every second round goes
    backwards. `now` returns seconds after the device's work is done. The first `warm` rounds are
    not counted.
    """
    seconds = {name: [] for name in ways}
    for number in range(warm + rounds):
        for name in [*ways][:: 1 - number % 2 * 2]:
            began = now()
            for _ in range(calls):
                ways[name]()
            took = (now() - began) / calls
            if number >= warm:
                seconds[name].append(took)
    return seconds


def row(what: str, unit: str, values: Sequence[float], base: Sequence[float] | None = None) -> Row:
    """Returns the row of values by round, with their ratios to the values of a base."""
    ratio = None
    if base:
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        ratio = [statistics.median(ratios), min(ratios), max(ratios)]
    middle = statistics.median(values)
    return Row(what, unit, middle, min(values), max(values), len(values), ratio)


def rows_of(seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """Returns a row of each way's seconds, with its ratio to the first way."""
    first = next(iter(seconds.values()))
    return [row(name, "s", times, first) for name, times in seconds.items()]


def equal(one: object, other: object, tolerance: float, what: str) -> None:
    """Raises ValueError if the relative difference of two figures, or lists, is too large."""
    one, other = (torch.as_tensor(x, dtype=torch.float64) for x in (one, other))
    apart = ((one - other).norm() / other.norm()).item()
    tg.check(apart <= tolerance, f"{what}: differ by {apart:.2e}, more than {tolerance:.0e}")


def tolerance(machine: Machine, exact: float, rough: float) -> float:
    """Returns how far two orders of one computation may differ: in float32, and in bfloat16."""
    return exact if machine.device.dtype == torch.float32 else rough


def random_model(h: tg.Hyperparameters, machine: Machine) -> tg.GPT:
    """Returns a model without zero weights, which would be faster than those of a trained model."""
    torch.manual_seed(h.seed)
    model = tg.GPT(h, tg.attend_on(machine.device), machine.device.dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model.to(machine.device.device)


def synthetic_weights(model: tg.GPT, seed: int = 0) -> tg.GPT:
    """Returns the model with normal matrices, the sizes of whose rows and columns differ.

    Their standard deviations have log-std 0.3 and 0.2, as in trained matrices.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                rows = (0.3 * torch.randn(p.size(0), 1, generator=draw)).exp()
                cols = (0.2 * torch.randn(1, p.size(1), generator=draw)).exp()
                p.copy_(torch.randn(p.shape, generator=draw) * rows * cols)
    return model


def random_data(h: tg.Hyperparameters, val_tokens: int = 0) -> tg.Data:
    """Returns random tokens: so many to score, and eight steps of a shard to train on."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(4, h.vocab_size, 8 * h.train_batch_tokens + 1).astype("<u2")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fineweb_train_000000.bin")
        path.write_bytes(tg.shard_header(len(tokens)) + tokens.tobytes())
        stream = tg.TokenStream(path.parent, "train", h.vocab_size)  # mapped: outlives the folder
    size = (torch.arange(h.vocab_size) >= 4).short()
    val = torch.from_numpy(draw.integers(4, h.vocab_size, val_tokens + 1).astype("<i4"))
    train = tg.TrainingBatches(stream, h, tg.Ranks())
    return tg.Data(tg.Validation(val, tg.ByteTable(size, 0 * size), canonical=False), train)


def quantize_model(model: tg.GPT, hessians: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the arrays of a model's artifact."""
    ranks = tg.Ranks()
    return tg.artifact_arrays(model, tg.weight_stacks(model, hessians, ranks), 1.0, ranks)


def calibration_batches(h: tg.Hyperparameters) -> Sequence[torch.Tensor]:
    """Returns the batches of random tokens, int64 [n, T], that calibrate GPTQ in a run."""
    length = h.train_seq_len
    count, rows = max(h.gptq_calib_tokens // length, 1), max(h.micro_batch_tokens // length, 1)
    return tg.random_sequences(count, length, h.vocab_size, h.seed).split(rows)
