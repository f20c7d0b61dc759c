"""Quantizing and packing: seconds of GPTQ, and bytes against what the codes' entropy allows."""

import zlib
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch

import train_gpt as tg

from .harness import Machine, Scale, Table, in_turns, random_batches, random_model, row, rows_of


def gptq(scale: Scale, machine: Machine) -> Table:
    """Seconds of GPTQ: collecting Hessians, solving, and rounding alone."""
    h, ranks = scale.h(scale.settings), tg.Ranks()
    model = random_model(h, machine).eval()
    hessians: dict[str, torch.Tensor] = {}

    def collect() -> None:
        hessians.update(tg.collect_hessians(model, random_batches(h), ranks)[0])

    collect()
    ways = {
        "rounding": lambda: tg.quantize_model(model, {}, ranks),
        "GPTQ, collecting Hessians": collect,
        "GPTQ, solving": lambda: tg.quantize_model(model, hessians, ranks),
    }
    tg.quantize_model(model, hessians, ranks)  # both once, to warm up
    rows = rows_of(in_turns(ways, max(scale.rounds // 2, 1), machine.device.now, warm=0))
    sizes = f"{len(hessians)} matrices of {h.num_layers} layers x {h.model_dim}"
    return Table(f"{sizes}, {h.gptq_calib_tokens:,} random tokens", rows)


def compressors() -> dict[str, Callable[[bytes], bytes]]:
    """Returns the program's codecs that are installed, and zlib, by name."""
    ways = {name: codec.compress for name, codec in tg.CODECS.items() if find_spec(codec.package)}
    return ways | {"zlib": lambda raw: zlib.compress(raw, 9)}


def entropy_bytes(codes: np.ndarray) -> float:
    """Returns the order-0 entropy of bytes, in bytes."""
    part = np.bincount(codes, minlength=256) / len(codes)
    part = part[part > 0]
    return -len(codes) * float((part * np.log2(part)).sum()) / 8


def packing(scale: Scale, machine: Machine) -> Table:
    """Seconds and bytes of packing: the artifact, and matrices' codes by several compressors."""
    h = scale.h(scale.settings)
    model = random_model(h, machine)
    arrays, _ = tg.quantize_model(model, {}, tg.Ranks())
    roles = tg.parameter_roles(model)
    names = [f"{name}.codes" for name, role in roles.items() if role == "matrix"]
    codes = torch.cat([arrays[name].flatten() for name in names]).cpu().view(torch.uint8).numpy()
    codes = codes[: scale.codes]
    packed: dict[str, int] = {}
    raw, least = codes.tobytes(), entropy_bytes(codes)
    ways = {
        name: lambda name=name, way=way: packed.update({name: len(way(raw))})
        for name, way in compressors().items()
    }
    rounds = max(scale.rounds // 2, 1)
    rows = rows_of(in_turns(ways, rounds, warm=0))
    rows.append(row("order-0 entropy", "bytes", [least]))
    rows += [row(name, "bytes", [size], [least]) for name, size in packed.items()]

    def pack() -> None:
        packed["artifact"] = len(tg.pack_artifact(h, arrays, h.compressor))

    rows += rows_of(in_turns({"the artifact": pack}, 1, warm=0))
    rows.append(row("the artifact", "bytes", [packed["artifact"]]))
    sizes = f"{len(raw):,} of {sum(arrays[n].numel() for n in names):,} codes of normal weights"
    return Table(f"{sizes}; the artifact of {h.num_layers} layers x {h.model_dim}", rows)
