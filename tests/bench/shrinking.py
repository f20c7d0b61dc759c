"""Quantizing and packing: seconds of GPTQ, and bytes against what the codes' entropy allows."""

import lzma
import zlib
from contextlib import suppress
from importlib import import_module

import numpy as np
import torch

import train_gpt as tg

from .harness import Table, in_turns, random_model, row, rows_of


def gptq(scale, rt):
    """Seconds of GPTQ: collecting Hessians, solving, and rounding alone."""
    h = tg.replace(scale.h(scale.settings), max_wallclock_seconds=0.0)
    model, log = random_model(h, rt).eval(), tg.Log(silent=True)
    clock, hessians = tg.TrainingClock(rt, h, log), {}

    def collect():
        hessians.update(tg.collect_hessians(model, tg.calibration(None, h, 0), clock, log))

    collect()
    ways = {
        "rounding": lambda: tg.quantize(model),
        "GPTQ, collecting Hessians": collect,
        "GPTQ, solving": lambda: tg.quantize(model, hessians),
    }
    tg.quantize(model, hessians)  # both once, to warm up
    rows = rows_of(in_turns(ways, max(scale.rounds // 2, 1), rt.now, warm=0))
    sizes = f"{len(hessians)} matrices of {h.num_layers} layers x {h.model_dim}"
    return Table(f"{sizes}, {h.gptq_calib_tokens:,} random tokens", rows)


def compressors():
    """Functions from bytes to fewer bytes, at their strongest, by name."""
    ways = {
        "zstd-22": tg.zstd().ZstdCompressor(level=22).compress,
        "zlib-9": lambda raw: zlib.compress(raw, 9),
        "lzma-9e": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
    }
    with suppress(ImportError):
        ways["brotli-11"] = import_module("brotli").compress
    return ways


def entropy_bytes(codes):
    """Order-0 entropy of bytes, in bytes."""
    part = np.bincount(codes, minlength=256) / len(codes)
    part = part[part > 0]
    return -len(codes) * float((part * np.log2(part)).sum()) / 8


def packing(scale, rt):
    """Seconds and bytes of packing: the artifact, and matrices' codes by several compressors."""
    h = scale.h(scale.settings)
    model = random_model(h, rt)
    arrays, _ = tg.quantize(model)
    roles = tg.parameter_roles(model)
    names = [f"{name}.codes" for name, role in roles.items() if role == "matrix"]
    codes = torch.cat([arrays[name].flatten() for name in names]).cpu().view(torch.uint8).numpy()
    codes, packed = codes[: scale.codes], {}
    raw, least = codes.tobytes(), entropy_bytes(codes)
    ways = {
        name: lambda name=name, way=way: packed.update({name: len(way(raw))})
        for name, way in compressors().items()
    }
    rounds = max(scale.rounds // 2, 1)
    rows = rows_of(in_turns(ways, rounds, warm=0))
    rows.append(row("order-0 entropy", "bytes", [least]))
    rows += [row(name, "bytes", [size], [least]) for name, size in packed.items()]
    whole = {"the artifact": lambda: packed.update(artifact=len(tg.pack(h, arrays)))}
    rows += rows_of(in_turns(whole, 1, warm=0))
    rows.append(row("the artifact", "bytes", [packed["artifact"]]))
    sizes = f"{len(raw):,} of {sum(arrays[n].numel() for n in names):,} codes of normal weights"
    return Table(f"{sizes}; the artifact of {h.num_layers} layers x {h.model_dim}", rows)
