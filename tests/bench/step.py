"""A training step: its stages, its speed against the device's matrix products and a plain loop."""

from functools import partial
from unittest import mock

import torch

import train_gpt as tg

from . import reference
from .harness import Table, equal, in_turns, random_data, random_model, row, rows_of, tolerance

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


def flops_per_token(model, h):
    """Floating-point operations of a training step for each token: 6 N + 6 L T d.

    N: weights of all matrix products, the tied head with them, each 2 forward and 4 backward; the
    JEPA head works on chunks. Attention, causal: T/2 keys and T/2 values of width d, likewise.
    """
    n = model.tok_emb.weight.numel()
    for name, module in model.named_modules():
        if isinstance(module, tg.Linear):
            share = h.jepa_chunk_size if name.startswith("jepa.") else 1
            n += module.weight.numel() / share
    return 6 * n + 6 * h.num_layers * h.train_seq_len * h.model_dim


class Steps:
    """Training steps on random text, one at a call; a subclass takes them."""

    def __init__(self, h, rt, data, precision="medium"):
        # Of float32 products; "medium" as `tg.train` sets it.
        self.h, self.rt, self.data, self.number, self.losses = h, rt, data, 0, []
        self.precision = precision
        self.model = random_model(h, rt).train()

    def __call__(self):
        """A step at the full rates, JEPA's weight at its peak."""
        torch.set_float32_matmul_precision(self.precision)
        self.model.prepare(self.h.jepa_lambda_max, self.number)
        self.losses.append(self.take(self.number))
        self.number += 1


class Ours(Steps):
    """Those of train_gpt.py."""

    def __init__(self, h, rt, data):
        super().__init__(h, rt, data)
        self.losses_of = rt.compile(self.model.losses)
        self.optimizers = tg.Optimizers(self.model, h)
        self.average = tg.WeightAverage(self.model, h)

    def take(self, number):
        """What `tg.train` does in a step; the loss."""
        batch = self.data.train.batch(number, self.h)
        terms = tg.train_step(self.losses_of, self.optimizers, batch, number, 1.0, self.rt)
        self.average.update(number)
        return terms["train_loss"]


class Plain(Steps):
    """Those of the reference loop."""

    def __init__(self, h, rt, data, precision="medium"):
        super().__init__(h, rt, data, precision)
        self.loop = reference.Loop(self.model, h)

    def take(self, number):
        """The same; the loss."""
        batch = self.data.train.batch(number, self.h)
        return self.loop.step(number, 1.0, *(ids.to(self.rt.device) for ids in batch))


class Cut:
    """Steps of `Ours` cut into stages where they call something; each cut waits for the device."""

    def __init__(self, steps):
        self.steps, self.times, self.mark = steps, [], 0.0

    def cut(self, stage):
        """What passed since the last cut was this stage."""
        now = self.steps.rt.now()
        self.times[-1][stage] += now - self.mark
        self.mark = now

    def around(self, owner, name, before, stage):
        """A patch of the owner's function: a cut before and one after it."""
        function = getattr(owner, name)

        def cut_off(*args):
            self.cut(before)
            result = function(*args)
            self.cut(stage)
            return result

        return mock.patch.object(owner, name, cut_off)

    def __call__(self):
        """A step."""
        steps, rest = self.steps, "clip and clear"
        self.times.append(dict.fromkeys(STAGES, 0.0))
        with (
            self.around(steps.data.train, "batch", "data read", "data read"),
            self.around(steps, "losses_of", "to the device", "forward"),
            self.around(tg, "summed", "backward", "gradient reduction"),
            self.around(steps.optimizers.muon, "step", rest, "Muon"),
            self.around(steps.optimizers.adamw, "step", rest, "AdamW"),
            self.around(steps.average, "update", rest, "EMA"),
        ):
            self.mark = steps.rt.now()
            steps()


def described(h):
    """The sizes of a step."""
    shape = f"{h.num_layers} layers x {h.model_dim}, sequences of {h.train_seq_len}"
    return f"{shape}, {h.train_batch_tokens:,} tokens a step, vocabulary {h.vocab_size}"


def step(scale, rt, settings=None):
    """A training step by stage, tokens a second, and the part of the device's matrix products."""
    h = scale.h(settings or scale.settings)
    tg.expect(tg.micro_batches(h) == 1, "stages are told apart in steps of one micro-batch")
    whole = Ours(h, rt, random_data(h))
    cut, per_step = Cut(whole), flops_per_token(whole.model, h) * h.train_batch_tokens
    like = {"device": rt.device, "dtype": rt.dtype}
    a, b = (torch.randn(scale.square, scale.square, **like) for _ in range(2))
    wide = whole.model.blocks[0].mlp.up.weight.detach().to(rt.dtype)
    x = torch.randn(h.train_batch_tokens, h.model_dim, **like)
    square, mlp = f"product {scale.square} x {scale.square}", "product of the MLP's first matrix"
    operations = {square: 16 * scale.square**3, mlp: 16 * wide.numel() * len(x)}

    def eightfold(one, other):  # a single one is too short to time on a GPU
        for _ in range(8):
            one @ other

    ways = {"step": whole, "step, cut": cut, square: partial(eightfold, a, b)}
    ways[mlp] = partial(eightfold, x, wide.mT)
    seconds = in_turns(ways, scale.rounds, rt.now, warm=2)
    rows = rows_of(seconds)[:2]
    for stage in STAGES:
        times = [parts[stage] for parts in cut.times[-scale.rounds :]]
        rows.append(row(f"  {stage}", "s", times, seconds["step, cut"]))
    rates = {name: [n / s / 1e12 for s in seconds[name]] for name, n in operations.items()}
    rows.append(row("speed", "tokens/s", [h.train_batch_tokens / s for s in seconds["step"]]))
    rows += [row(name, "TFLOP/s", rates[name], rates[square]) for name in (square, mlp)]
    used = [per_step / s / 1e10 / r for s, r in zip(seconds["step"], rates[square], strict=True)]
    rows.append(row("model FLOP utilisation", "%", used))
    formula = f"{per_step / h.train_batch_tokens:,.0f} FLOPs a token = 6 N + 6 L T d"
    return Table(f"{described(h)}; {formula}", rows)


def step_of_bytes(scale, rt):
    """The same of the byte stack with its JEPA head."""
    return step(scale, rt, scale.byte_settings)


def loop(scale, rt):
    """Steps of train_gpt.py, eager and compiled, against the plain loop; equal losses."""
    h = scale.h(f"{scale.settings} {scale.eager}")
    data, sizes = random_data(h), described(h)
    eager, compiled = (tg.replace(rt, compiled=yes) for yes in (False, True))
    default, alike = "plain loop", "plain loop, products as ours"
    ways = {default: Plain(h, eager, data, "highest"), alike: Plain(h, eager, data)}
    ways["train_gpt.py, eager"] = Ours(h, eager, data)
    for way in ways.values():
        way()
    name, began = "train_gpt.py, compiled", rt.now()
    try:
        ways[name] = Ours(h, compiled, data)
        ways[name]()
    except Exception as error:  # no compiler is here
        ways.pop(name, None)
        sizes += f"; {name}: not here: {error!r:.80}"
    first = rt.now() - began
    rows = rows_of(in_turns(ways, scale.rounds, rt.now))
    losses = {name: [float(x) for x in way.losses] for name, way in ways.items()}
    losses.pop(default)  # a CPU with AMX rounds the inputs of the others' products
    for other, values in losses.items():
        equal(values, losses[alike], tolerance(rt, 1e-4, 5e-2), f"losses of {other}")
    if name in ways:
        rows.append(row("compilation, with the first step", "s", [first]))
    return Table(sizes, rows)
