"""A training step: its stages, its speed against the device's matrix products and a plain loop."""

import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

import train_gpt as tg

from . import reference
from .harness import (
    Machine,
    Scale,
    Table,
    equal,
    in_turns,
    random_data,
    random_model,
    row,
    rows_of,
    tolerance,
)

STAGES = (
    "data read",
    "to the device",
    "forward",
    "backward",
    "gradient reduction",
    "Muon",
    "AdamW",
    "clip and clear",
    "EMA",
)


def visits(h: tg.Hyperparameters, loops: int) -> list[int]:
    """Returns the layers in the order of a forward pass; with `loops`, some more than once."""
    plan = tg.layer_plan(h, loops)
    return [*plan.encoder, *plan.decoder]


def product_weights(module: nn.Module) -> int:
    """Returns the number of weights of a module's matrix products."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, tg.Linear))


def flops_per_token(model: tg.GPT, loops: int) -> float:
    """Returns the floating-point operations of a training step for each token: 6 N + 6 L T d.

    N: weights of all matrix products, those of a layer once for each of its visits, the head with
    them, each 2 forward and 4 backward; the JEPA head works on chunks. Attention, causal, in L
    visits: T/2 keys and T/2 values of width d, likewise.
    """
    h = model.h
    order = visits(h, loops)
    n = sum(product_weights(model.blocks[layer]) for layer in order)
    n += model.tok_emb.weight.numel() if h.tie_embeddings else 0  # as the head
    for name, child in model.named_children():
        if name != "blocks":
            n += product_weights(child) / (h.jepa_chunk_size if name == "jepa" else 1)
    return 6 * n + 6 * len(order) * h.train_seq_len * h.model_dim


class Steps:
    """Training steps on random text, one at a call; a subclass takes them.

    At full rates, with auxiliary losses at their peak. `precision` is that of float32 products.
    """

    def __init__(
        self, h: tg.Hyperparameters, machine: Machine, data: tg.Data, precision: str = "medium"
    ) -> None:
        self.h, self.device, self.data, self.precision = h, machine.device, data, precision
        self.phase = tg.programs(h)[-1]
        self.losses: list[torch.Tensor | float] = []
        self.model = random_model(h, machine).train()

    def __call__(self) -> None:
        """Takes a step and keeps its loss."""
        with tg.matmul_precision(self.precision):
            self.losses.append(self.take(len(self.losses)))

    def take(self, number: int) -> torch.Tensor | float:
        """Takes step `number`; returns its cross-entropy."""
        raise NotImplementedError


class Ours(Steps):
    """The steps of train_gpt.py, as `Trainer.loop` takes them."""

    def __init__(self, h: tg.Hyperparameters, machine: Machine, data: tg.Data) -> None:
        super().__init__(h, machine, data)
        log = tg.Log(silent=True)
        self.trainer = tg.Trainer(self.model, data, tg.Ranks(), self.device, log, math.inf)

    def take(self, number: int) -> torch.Tensor:
        """Takes a step and updates the average."""
        trainer = self.trainer
        trainer.step = number
        terms = trainer.take_step(self.phase, *trainer.batches.batch(number))
        trainer.average.update(number, self.phase.lr_scale)
        return terms["train_loss"]


class Plain(Steps):
    """The same steps by the reference loop."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.loop = reference.Loop(self.model, self.h)

    def take(self, number: int) -> float:
        """Takes a step."""
        device = self.device.device
        ids, targets = (x.to(device) for x in self.data.train.batch(number))
        auxiliary = partial(tg.auxiliary_inputs, self.phase, self.h, number, device=self.device)
        return self.loop.step(number, self.phase, ids, targets, auxiliary)


class Cut:
    """Steps of `Ours` cut into stages at some calls; each cut waits for the device."""

    def __init__(self, steps: Ours) -> None:
        self.steps, self.mark = steps, 0.0
        self.times: list[dict[str, float]] = []  # seconds by stage, for each step

    def cut(self, stage: str) -> None:
        """Counts the seconds since the last cut as those of a stage."""
        now = self.steps.device.now()
        self.times[-1][stage] += now - self.mark
        self.mark = now

    def wrap(self, function: Callable[..., object], before: str, stage: str) -> object:
        """Returns the function with a cut before and after each call."""

        def cut_off(*args: object) -> object:
            self.cut(before)
            result = function(*args)
            self.cut(stage)
            return result

        return cut_off

    def __call__(self) -> None:
        """Takes a step."""
        trainer, rest = self.steps.trainer, "clip and clear"
        calls: list[tuple[object, str, str, str]] = [  # of frozen dataclasses the class is patched
            (tg.TrainingBatches, "batch", "data read", "data read"),
            (trainer, "loss_fn", "to the device", "forward"),
            (tg.Ranks, "all_reduce_", "backward", "gradient reduction"),
            (trainer.optimizers.muon, "step", rest, "Muon"),
            (trainer.optimizers.adamw, "step", rest, "AdamW"),
            (trainer.average, "update", rest, "EMA"),
        ]
        self.times.append(dict.fromkeys(STAGES, 0.0))
        with ExitStack() as stack:
            for owner, name, before, stage in calls:
                wrapped = self.wrap(getattr(owner, name), before, stage)
                stack.enter_context(mock.patch.object(owner, name, wrapped))
            self.mark = self.steps.device.now()
            self.steps()


def described(h: tg.Hyperparameters) -> str:
    """Returns the sizes of a step, with NUM_LOOPS in effect."""
    count = len(visits(h, h.num_loops))
    repeated = f" in {count} visits" if count > h.num_layers else ""
    shape = f"{h.num_layers} layers{repeated} x {h.model_dim}, sequences of {h.train_seq_len}"
    return f"{shape}, {h.train_batch_tokens:,} tokens a step, vocabulary {h.vocab_size}"


def step(scale: Scale, machine: Machine, settings: str | None = None) -> Table:
    """A training step by stage, tokens a second, and the part of the device's matrix products."""
    h, device = scale.h(settings or scale.settings), machine.device
    whole = Ours(h, machine, random_data(h))
    tg.check(whole.trainer.grad_accum == 1, "only steps of one micro-batch can be cut into stages")
    loops, tokens = whole.phase.loops, h.train_batch_tokens
    cut, per_step = Cut(whole), flops_per_token(whole.model, loops) * tokens
    like = {"device": device.device, "dtype": device.dtype}
    a, b = (torch.randn(scale.square, scale.square, **like) for _ in range(2))
    wide = whole.model.blocks[0].mlp.up.weight.detach().to(device.dtype)
    x = torch.randn(h.train_batch_tokens, h.model_dim, **like)
    square, mlp = f"product {scale.square} x {scale.square}", "product of the MLP's first matrix"
    operations = {square: 16 * scale.square**3, mlp: 16 * wide.numel() * len(x)}

    def eightfold(one: torch.Tensor, other: torch.Tensor) -> None:  # one is too short to time
        for _ in range(8):
            one @ other

    ways = {"step": whole, "step, cut": cut, square: partial(eightfold, a, b)}
    ways[mlp] = partial(eightfold, x, wide.mT)
    if loops:
        ways["step without repeated layers"] = unlooped = Ours(h, machine, random_data(h))
        unlooped.phase = unlooped.phase._replace(loops=0)
    seconds = in_turns(ways, scale.rounds, device.now, warm=2)
    rows = rows_of(seconds)[:2]
    for stage in STAGES:
        times = [parts[stage] for parts in cut.times[-scale.rounds :]]
        rows.append(row(f"  {stage}", "s", times, seconds["step, cut"]))
    if loops:
        what = "step without repeated layers"
        rows.append(row(what, "s", seconds[what], seconds["step"]))
        fewer = flops_per_token(whole.model, 0) * tokens
        rows.append(row("FLOPs without repeated layers", "%", [100 * fewer / per_step]))
    rates = {name: [n / s / 1e12 for s in seconds[name]] for name, n in operations.items()}
    rows.append(row("speed", "tokens/s", [h.train_batch_tokens / s for s in seconds["step"]]))
    rows += [row(name, "TFLOP/s", rates[name], rates[square]) for name in (square, mlp)]
    used = [per_step / s / 1e10 / r for s, r in zip(seconds["step"], rates[square], strict=True)]
    rows.append(row("model FLOP utilisation", "%", used))
    formula = f"{per_step / h.train_batch_tokens:,.0f} FLOPs a token = 6 N + 6 L T d"
    return Table(f"{described(h)}; {formula}", rows)


def step_of_bytes(scale: Scale, machine: Machine) -> Table:
    """The same of the byte stack with its JEPA head."""
    return step(scale, machine, scale.byte_settings)


def step_of_frontier(scale: Scale, machine: Machine) -> Table:
    """The same of PRESET=frontier with its repeated layers, and without these."""
    return step(scale, machine, scale.frontier_settings)


def kernels(scale: Scale, machine: Machine) -> Table:
    """The ten longest kernels of a training step, on a CPU the ten longest operators."""
    h, device = scale.h(scale.settings), machine.device
    steps = Ours(h, machine, random_data(h))
    for _ in range(2):  # compiles
        steps()
    device.now()  # waits for them
    with torch.profiler.profile() as profile:
        for _ in range(scale.rounds):
            steps()
        device.now()
    kind = torch.autograd.DeviceType.CUDA if device.is_cuda else torch.autograd.DeviceType.CPU
    times: Counter[str] = Counter()
    for event in profile.key_averages():
        if event.device_type == kind and not event.is_user_annotation:
            own = event.self_device_time_total if device.is_cuda else event.self_cpu_time_total
            times[event.key] += own / 1e6 / scale.rounds
    whole = sum(times.values())
    rows = [row("all", "s", [whole], [whole])]
    rows += [row(name[:80], "s", [own], [whole]) for name, own in times.most_common(10)]
    return Table(f"{described(h)}; a mean of {scale.rounds} steps", rows)


def loop(scale: Scale, machine: Machine) -> Table:
    """Steps of train_gpt.py, eager and compiled, against the plain loop; equal losses."""
    h = scale.h(f"{scale.settings} {scale.eager}")
    data, sizes = random_data(h), described(h)
    device = machine.device
    eager, compiled = (
        machine._replace(device=replace(device, compiled=yes)) for yes in (False, True)
    )
    default, alike = "plain loop", "plain loop, products as ours"
    ways: dict[str, Steps] = {
        default: Plain(h, eager, data, "highest"),
        alike: Plain(h, eager, data),
    }
    ways["train_gpt.py, eager"] = Ours(h, eager, data)
    for way in ways.values():
        way()
    name, began = "train_gpt.py, compiled", device.now()
    try:
        ways[name] = Ours(h, compiled, data)
        ways[name]()
    except Exception as error:  # no compiler is here
        ways.pop(name, None)
        sizes += f"; {name}: not here: {error!r:.80}"
    first = device.now() - began
    rows = rows_of(in_turns(ways, scale.rounds, device.now))
    losses = {name: [float(x) for x in way.losses] for name, way in ways.items()}
    losses.pop(default)  # a CPU with AMX rounds the inputs of the others' products
    for other, values in losses.items():
        equal(values, losses[alike], tolerance(machine, 1e-4, 5e-2), f"losses of {other}")
    if name in ways:
        rows.append(row("compilation, with the first step", "s", [first]))
    return Table(sizes, rows)
