"""Attention, Muon, scoring, quantizing and packing, start-up: each against its alternatives."""

import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

import train_gpt as tg

from . import reference
from .harness import (
    Machine,
    Row,
    Scale,
    Table,
    calibration_batches,
    equal,
    in_turns,
    quantize_model,
    random_data,
    random_model,
    row,
    rows_of,
    tolerance,
)

BACK_ENDS = ("flash", "cudnn", "fa3", "math")
PROBE = Path(__file__).with_name("probe.py")
STAGES = {"step": "training", "score": "sliding scores", "quantize": "GPTQ and packing"}


def attention(scale: Scale, machine: Machine) -> Table:
    """Each attention back end, forward and with backward."""
    device, (*heads, width) = machine.device, scale.heads
    rows: list[Row] = []
    absent: dict[str, str] = {}
    for count, length in scale.attention:
        shapes = [(count, length, n, width) for n in (heads[0], heads[0], heads[1], heads[1])]
        options = {"device": device.device, "dtype": device.dtype}
        above, *qkv = (torch.randn(shape, **options) for shape in shapes)
        for x in qkv:
            x.requires_grad_()

        def forward(name: str, qkv: list[torch.Tensor] = qkv) -> torch.Tensor:
            tg.select_attention(name)
            return tg.attend_sdpa(*qkv)

        def both(
            name: str, qkv: list[torch.Tensor] = qkv, above: torch.Tensor = above
        ) -> tuple[torch.Tensor, ...]:
            y = forward(name, qkv)
            return y, *torch.autograd.grad(y, qkv, above)

        results = {}
        for name in BACK_ENDS:
            try:
                results[name] = torch.cat([x.detach().flatten() for x in both(name)])
            except Exception as error:  # not installed, not of this device, or no memory
                absent[name] = f"{type(error).__name__}: {error!s:.60}"
        first, *others = results
        for name in others:
            what = f"attention by {name} and {first}"
            equal(results[name], results[first], tolerance(machine, 1e-3, 2e-2), what)
        for what, way in (("forward", forward), ("forward and backward", both)):
            ways = {f"{count} x {length}, {what}: {n}": partial(way, n) for n in results}
            rows += rows_of(in_turns(ways, scale.rounds, device.now, calls=scale.calls))
    gone = "".join(f"; not here: {name} ({why})" for name, why in absent.items())
    shape = f"{heads[0]} query heads, {heads[1]} key/value heads, width {width}"
    return Table(f"sequences x tokens, {shape}, {device.dtype}{gone}", rows)


def muon(scale: Scale, machine: Machine) -> Table:
    """A step of Muon and its Newton-Schulz iterations, stacked and matrix by matrix."""
    h, device = scale.h(scale.matrices), machine.device
    model = random_model(h, machine)
    roles = tg.parameter_roles(model)
    matrices = {name: p for name, p in model.named_parameters() if roles[name] == "matrix"}
    for p in matrices.values():
        p.grad = torch.randn_like(p)

    def optimizer(matrices: dict[str, torch.Tensor], dtype: torch.dtype) -> tg.Muon:
        return tg.Muon(matrices, h.matrix_lr, h.muon_wd, h, dtype, tg.Ranks())

    stacked = optimizer(matrices, device.dtype)
    single = [optimizer({name: p}, device.dtype) for name, p in matrices.items()]
    stacks = [torch.stack([p.grad for p in stack]).to(device.dtype) for stack in stacked.stacks]

    def in_stacks() -> list[torch.Tensor]:
        return [tg.newton_schulz(stack, h.muon_backend_steps) for stack in stacks]

    def one_by_one() -> list[torch.Tensor]:
        return [reference.newton_schulz(m, h.muon_backend_steps) for s in stacks for m in s]

    one, other = (torch.cat([x.flatten() for x in way()]) for way in (in_stacks, one_by_one))
    equal(one, other, tolerance(machine, 1e-3, 5e-2), "Newton-Schulz, stacked and not")
    steps: dict[str, Callable[[], object]] = {
        "step, stacked": partial(stacked.step, 0.0, 0.95),
        "step, matrix by matrix": lambda: [muon.step(0.0, 0.95) for muon in single],
    }
    if device.dtype != torch.bfloat16:
        in_bf16 = optimizer(matrices, torch.bfloat16)
        steps["step, stacked, bfloat16"] = partial(in_bf16.step, 0.0, 0.95)
    if hasattr(torch.optim, "Muon"):
        options = {"lr": 0.0, "weight_decay": h.muon_wd, "momentum": 0.95}
        theirs = torch.optim.Muon([*matrices.values()], **options)
        steps["step, torch.optim.Muon, bfloat16"] = theirs.step
    iterations = {
        "Newton-Schulz, stacked": in_stacks,
        "Newton-Schulz, matrix by matrix": one_by_one,
    }
    rows: list[Row] = []
    for ways in (steps, iterations):
        rows += rows_of(in_turns(ways, scale.rounds, device.now, calls=scale.calls))
    shapes = ", ".join(f"{len(s)} of {s.size(1)} x {s.size(2)}" for s in stacks)
    sizes = f"{len(matrices)} matrices in {len(stacks)} stacks: {shapes}; {device.dtype}"
    return Table(sizes, rows)


def scoring(scale: Scale, machine: Machine) -> Table:
    """Tokens scored a second: in batches, equal to one window at a time; in one pass."""
    h, device = scale.h(scale.settings), machine.device
    val = random_data(h, scale.val_tokens).val
    model = random_model(h, machine).eval()
    forward_logits, tokens = device.compile(model.forward_logits), val.tokens.to(device.device)
    batch_tokens = tg.scoring_batch_tokens(h, device)
    window = h.window_tokens
    sliding = tg.ScoringPass(forward_logits, window, h.stride_tokens)
    plain = tg.ScoringPass(forward_logits, window, window)
    one_pass = tg.one_pass(model, h.window_tokens, device)  # attends to as much as a window holds
    nats: dict[str, float] = {}

    def in_batches(name: str, scoring_pass: tg.ScoringPass) -> None:
        log = tg.Log(silent=True)
        nats[name] = tg.score(scoring_pass, val, tg.Ranks(), device, log, batch_tokens).nats

    def one_at_a_time(name: str, scoring_pass: tg.ScoringPass) -> None:
        seq_len, stride = scoring_pass.seq_len, scoring_pass.stride
        nats[name] = reference.score(forward_logits, tokens, seq_len, stride)

    def speed(kind: str, seconds: list[float]) -> Row:
        return row(f"{kind}, scored", "tokens/s", [scale.val_tokens / s for s in seconds])

    rows: list[Row] = []
    for kind, way in (("sliding", sliding), ("plain", plain)):
        one, many = f"{kind}, a window at a time", f"{kind}, in batches"
        ways = {one: partial(one_at_a_time, one, way), many: partial(in_batches, many, way)}
        seconds = in_turns(ways, scale.rounds, device.now, warm=2)
        equal(nats[many], nats[one], tolerance(machine, 1e-5, 2e-3), f"{kind} scores")
        rows += [*rows_of(seconds), speed(kind, seconds[many])]
    passes = {"sliding": sliding, "one pass": one_pass}
    ways = {name: partial(in_batches, name, way) for name, way in passes.items()}
    seconds = in_turns(ways, scale.rounds, device.now, warm=2)
    rows += [*rows_of(seconds), speed("one pass", seconds["one pass"])]
    windows = max(batch_tokens // h.window_tokens, 1)
    sizes = f"{h.num_layers} layers x {h.model_dim}, {scale.val_tokens:,} tokens, windows of"
    sizes += f" {h.window_tokens}, stride {sliding.stride}, {windows} windows a batch"
    return Table(sizes, rows)


def gptq(scale: Scale, machine: Machine) -> Table:
    """Seconds of GPTQ: collecting Hessians, solving with each quantizer, and rounding alone."""
    h, ranks = scale.h(scale.settings), tg.Ranks()
    model = random_model(h, machine).eval()
    hessians: dict[str, torch.Tensor] = {}

    def collect() -> None:
        hessians.update(tg.collect_hessians(model, calibration_batches(h), ranks))

    def solve(quantizer: str) -> None:
        model.h = tg.replace(h, quantizer=quantizer)
        quantize_model(model, hessians)

    ways = {
        "rounding": lambda: quantize_model(model, {}),
        "GPTQ, collecting Hessians": collect,
        "GPTQ, solving": partial(solve, "scalar"),
        "GPTQ, solving with a trellis": partial(solve, "trellis"),
    }
    rows = rows_of(in_turns(ways, max(scale.rounds // 2, 1), machine.device.now))
    sizes = f"{len(hessians)} matrices of {h.num_layers} layers x {h.model_dim}"
    return Table(f"{sizes}, {h.gptq_calib_tokens:,} random tokens", rows)


def packing(scale: Scale, machine: Machine) -> Table:
    """Seconds and bytes of packing: the artifact, and matrices' codes by several compressors."""
    h = scale.h(scale.settings)
    model = random_model(h, machine)
    arrays = quantize_model(model, {})
    roles = tg.parameter_roles(model)
    names = [f"{name}.codes" for name, role in roles.items() if role == "matrix"]
    codes = torch.cat([arrays[name].flatten() for name in names]).cpu()
    total, codes = len(codes), codes[: scale.codes // h.model_dim * h.model_dim]
    matrix, least = codes.view(-1, h.model_dim).numpy(), tg.code_entropy(codes)
    codecs = {
        name: partial(codec.compress, [matrix], tg.QUANTIZERS["scalar"])
        for name, codec in tg.CODECS.items()
        if find_spec(codec.package)
    }
    codecs["zlib"] = partial(zlib.compress, matrix.tobytes(), level=9)
    packed: dict[str, int] = {}

    def compress(name: str) -> None:
        packed[name] = len(codecs[name]())

    def pack() -> None:
        packed["the artifact"] = len(tg.pack_artifact(h, arrays))

    ways = {name: partial(compress, name) for name in codecs}
    rows = rows_of(in_turns(ways, max(scale.rounds // 2, 1), warm=0))
    rows += rows_of(in_turns({"the artifact": pack}, 1, warm=0))
    rows.append(row("order-0 entropy", "bytes", [least]))
    rows += [row(name, "bytes", [packed[name]], [least]) for name in codecs]
    rows.append(row("the artifact", "bytes", [packed["the artifact"]]))
    sizes = f"{len(codes):,} of {total:,} codes of normal weights"
    return Table(f"{sizes}; the artifact of {h.num_layers} layers x {h.model_dim}", rows)


def startup(scale: Scale, machine: Machine) -> Table:
    """Seconds from a process's start to its second step, and peak memory by stage."""
    found: dict[str, list[dict]] = {}
    for stage in STAGES:
        command = [sys.executable, str(PROBE), stage, json.dumps(asdict(scale))]
        for _ in range(max(scale.rounds // 2, 1) if stage == "step" else 1):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{stage}: {done.stderr[-500:]}")
            found.setdefault(stage, []).append(json.loads(done.stdout.splitlines()[-1]))
    names = found["step"][0]["seconds"]
    rows = [row(n, "s", [f["seconds"][n] for f in found["step"]]) for n in names]
    for stage, what in STAGES.items():
        rows.append(row(f"peak memory, {what}", "MiB", [f["peak_mib"] for f in found[stage]]))
    kind = "allocated on the GPU" if machine.device.is_cuda else "of the process (VmHWM)"
    return Table(f"{scale.settings}; memory {kind}", rows)
