"""What all benchmarks share: their sizes, variants that take turns, rows of figures."""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_gpt as tg


class Row(NamedTuple):
    """A figure of one variant: over rounds, or counted once."""

    what: str
    unit: str
    median: float
    low: float
    high: float
    rounds: int
    ratio: list[float] | None = None  # to a first variant, by round: median, lowest, highest
    note: str = ""


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
    byte_settings: str  # of the other stack's step
    eager: str  # what the step changes where an eager one takes part
    matrices: str  # of the model whose matrices Muon steps
    ranks: str  # of the model whose gradients are summed
    attention: tuple[tuple[int, int], ...]  # sequences, and tokens of each
    heads: tuple[int, int, int]  # query heads, key/value heads, width
    val_tokens: int  # to score
    codes: int  # bytes of codes for every compressor
    square: int  # rows and columns of the matrix product that is the ceiling

    def h(self, settings):
        """Settings as they are typed."""
        return tg.Hyperparameters.from_env(tg.assignments(settings))


# A GPU's share of a step on eight, at the published shapes.
V9, BYTES = "TRAIN_BATCH_TOKENS=98304", "PRESET=byte_jepa TRAIN_BATCH_TOKENS=49152"
BYTE_CPU = "PRESET=byte_jepa NUM_LAYERS=2 MODEL_DIM=128 NUM_HEADS=2 NUM_KV_HEADS=1 "
BYTE_CPU += "TRAIN_SEQ_LEN=512 TRAIN_BATCH_TOKENS=2048"
CUDA = Scale(
    device="cuda",
    rounds=10,
    calls=10,
    settings=V9,
    byte_settings=BYTES,
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
    ("cpu", True): tg.replace(
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
    ("cuda", True): tg.replace(CUDA, rounds=5, val_tokens=32_768, codes=1 << 20),
}


def start_runtime(scale):
    """The runtime of the device asked for."""
    if scale.device == "cuda" or not torch.cuda.is_available():
        return tg.Runtime.start(scale.h(scale.settings))
    attend = tg.load_attention("flash")
    return tg.Runtime(torch.device("cpu"), torch.float32, "flash", attend, False, [])


def in_turns(ways, rounds, now=time.perf_counter, warm=1, calls=1):
    """Seconds of a call of each way by round; all take turns, so that noise hits them alike.

    `now` waits for the device's work; every second round goes backwards; `warm` are thrown away.
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


def row(what, unit, values, base=None, note=""):
    """A row of values by round; of a base's values, the ratios to them."""
    ratios = [value / other for value, other in zip(values, base, strict=True)] if base else []
    ratio = [f(ratios) for f in (statistics.median, min, max)] if ratios else None
    middle = statistics.median(values)
    return Row(what, unit, middle, min(values), max(values), len(values), ratio, note)


def rows_of(seconds, notes=None):
    """A row of each way's seconds, with its ratio to the first way."""
    first, notes = next(iter(seconds.values())), notes or {}
    return [row(name, "s", times, first, notes.get(name, "")) for name, times in seconds.items()]


def equal(one, other, tolerance, what):
    """ValueError unless two figures, or lists of them, differ by at most a part `tolerance`."""
    one, other = (torch.as_tensor(x, dtype=torch.float64) for x in (one, other))
    apart = ((one - other).norm() / other.norm()).item()
    tg.expect(apart <= tolerance, f"{what}: differ by {apart:.2e}, more than {tolerance:.0e}")


def tolerance(rt, exact, rough):
    """How far two orders of one computation may differ."""
    return exact if rt.dtype == torch.float32 else rough


def random_model(h, rt):
    """A model whose every weight is random: zeros would be faster than a trained model's."""
    torch.manual_seed(h.seed)
    model = tg.GPT(h, rt.attend, rt.dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model.to(rt.device)


def random_data(h, val_tokens=0):
    """Random text of a vocabulary: validation tokens, and eight steps of a shard to train on."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(4, h.vocab_size, 8 * h.train_batch_tokens + 1).astype("<u2")
    header = np.zeros(tg.SHARD_HEADER_INTS, "<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, len(tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fineweb_train_000000.bin")
        path.write_bytes(header.tobytes() + tokens.tobytes())
        train = tg.TokenStream(path.parent, "train", h.vocab_size)  # mapped: it outlives its name
    size = (torch.arange(h.vocab_size) >= 4).short()
    val = torch.from_numpy(draw.integers(4, h.vocab_size, val_tokens + 1).astype("<i4"))
    return tg.Data(val, tg.ByteTable(size, 0 * size), train)
