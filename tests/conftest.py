"""Shared fixtures and helpers. OpenMP reads its variables when torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many as in the processes that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "records"))

from bench.harness import quantize_model

import train_gpt as tg
from program import TINY

# Of bytes: four special tokens, then one byte each, with no leading spaces.
BYTE_TABLE = tg.ByteTable(
    torch.tensor([0] * 4 + [1] * 256, dtype=torch.int16), torch.zeros(260, dtype=torch.int16)
)


def settings(**changes: object) -> tg.Hyperparameters:
    """The tiny model's settings with some changed, given as they are typed."""
    env = {**TINY, **{name.upper(): str(value) for name, value in changes.items()}}
    assert {name.lower() for name in env} <= set(tg.Hyperparameters.__dataclass_fields__)
    return tg.Hyperparameters.from_env(env)


def shard_bytes(tokens: list[int] | np.ndarray) -> bytes:
    """A shard written from the format's description alone."""
    header = [20240520, 1, len(tokens)] + [0] * 253
    head = b"".join(n.to_bytes(4, "little") for n in header)
    return head + b"".join(int(t).to_bytes(2, "little") for t in tokens)


def byte_tokens(text: str) -> list[int]:
    """One document as the byte variant stores it."""
    return [1, *(4 + b for b in text.encode())]


@pytest.fixture(scope="session")
def byte_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of byte shards: a few thousand short arithmetic documents."""
    folder = tmp_path_factory.mktemp("corpus") / "tiny_byte260"
    folder.mkdir()
    documents = [f"{a} plus {b} is {a + b}.\n" for a in range(60) for b in range(40)]
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(1)).tolist()
    tokens = [t for i in order for t in byte_tokens(documents[i])]
    (folder / "fineweb_val_000000.bin").write_bytes(shard_bytes(tokens[:4000]))
    middle = (4000 + len(tokens)) // 2
    (folder / "fineweb_train_000000.bin").write_bytes(shard_bytes(tokens[4000:middle]))
    (folder / "fineweb_train_000001.bin").write_bytes(shard_bytes(tokens[middle:]))
    return folder


@pytest.fixture
def cpu() -> tg.Device:
    """The device of a CPU run."""
    return tg.Device(torch.device("cpu"), torch.float32, compiled=False)


@pytest.fixture
def back_ends() -> Iterator[None]:
    """Restores which attention back ends of PyTorch are enabled."""
    names = ("cudnn", "flash", "math", "mem_efficient")
    before = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names}
    yield
    for name, enabled in before.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(enabled)


def choose(h: tg.Hyperparameters) -> tuple[tg.Device, list[str]]:
    """What a single rank chooses: the device, and all notes for the log."""
    device, notes = tg.start_device(h.compile)
    device, more = tg.choose_attention(h, device, tg.Ranks())
    return device, notes + more


def load(h: tg.Hyperparameters, trains: bool = True) -> tg.Data:
    """The data of some settings, for a single rank, without log lines."""
    return tg.load_data(h, tg.Ranks(), tg.Log(silent=True), trains)


def trainer(
    model: tg.GPT, data: tg.Data, device: tg.Device, deadline: float = math.inf
) -> tg.Trainer:
    """A trainer of a single rank; its log has no folder."""
    return tg.Trainer(model, data, tg.Ranks(), device, tg.Log(), deadline)


def score(
    scoring_pass: tg.ScoringPass, val: tg.Validation, device: tg.Device, batch_tokens: int = 4096
) -> tg.Score:
    """The score of a pass by a single rank."""
    return tg.score(scoring_pass, val, tg.Ranks(), device, tg.Log(), batch_tokens)


def score_artifact(
    path: Path, h: tg.Hyperparameters, val: tg.Validation, device: tg.Device, log: tg.Log
) -> dict[str, dict]:
    """All scores of an artifact by a single rank, with their fields by name."""
    run = tg.Run({}, log, {})
    run.h, run.device, run.data = h, device, tg.Data(val, None)
    run.score_artifact(path)
    return run.result["scores"]


def quantize_matrices(
    method: str,
    weight: torch.Tensor,
    hessian: torch.Tensor | None = None,
    bits: int = 6,
    factor: float = 1.0,
    quantizer: str = "scalar",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of matrices [n, rows, cols], by rounding or gptq; a search finds scales."""
    limit, solve = 2 ** (bits - 1) - 1, {"rounding": tg.quantize_rounding, "gptq": tg.quantize_gptq}
    hessian = weight[:, :0] if hessian is None else hessian
    search = functools.partial(solve[method], tg.QUANTIZERS["scalar"], limit)
    scales = tg.to_scales(tg.search_scales(search, limit, weight, hessian).float() * factor)
    quantize = functools.partial(solve[method], tg.QUANTIZERS[quantizer], limit)
    return quantize(weight, scales, hessian).codes, scales


def artifact_of(model: tg.GPT) -> tuple[bytes, dict[str, torch.Tensor]]:
    """A model's artifact, quantized by rounding, and its arrays."""
    arrays = quantize_model(model, {})
    return tg.pack_artifact(tg.replace(model.h, compressor="zstd"), arrays), arrays


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a value of its own, so that no branch is silent at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def compile_counted(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[object]]:
    """The function under torch.compile as the trainer does it, and the list of its programs."""
    programs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        programs.append(graph)
        return graph

    torch.compiler.reset()
    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True), programs


@pytest.fixture(scope="session")
def finished(byte_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs as a sweep leaves them: three seeds, two without bigrams, and one that failed."""
    folder = tmp_path_factory.mktemp("runs")
    base = {**TINY, "NUM_LAYERS": "2", "ITERATIONS": "6", "DATA_PATH": str(byte_corpus)}
    trials = {
        "tiny": ({}, (1337, 42, 7), 0),
        "plain": ({"BIGRAM_VOCAB_SIZE": "0"}, (1337, 42), 0),
        "lost": ({"ADAM_EPS": "1e18", "TIED_EMBED_LR": "1e18"}, (42,), 4),
    }
    for name, (changes, seeds, status) in trials.items():
        for seed in seeds:
            own = {"SEED": str(seed), "RUN_DIR": str(folder / name / f"seed{seed}")}
            assert tg.main([], {**base, **changes, **own}) == status
    return folder
