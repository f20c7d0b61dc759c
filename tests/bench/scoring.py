"""Scoring: in batches and one window at a time; the sliding window and one pass in its place."""

import math

import train_gpt as tg

from . import reference
from .harness import Table, equal, in_turns, random_data, random_model, row, rows_of, tolerance


def scoring(scale, rt):
    """Tokens scored a second: in batches, equal to one window at a time; in one pass."""
    h = scale.h(scale.settings)
    data, log = random_data(h, scale.val_tokens), tg.Log(silent=True)
    model = random_model(h, rt).eval()
    forward_logits = rt.compile(model.forward_logits)
    val = data.val.to(rt.device)
    widths = {"sliding": min(h.eval_stride, h.train_seq_len), "plain": h.train_seq_len}
    nats = {}

    def ours(name, stride):
        nats[name] = tg.evaluate(forward_logits, data, h, rt, log, stride).nats

    def plain(name, stride):
        nats[name] = reference.score(forward_logits, val, h.train_seq_len, stride)

    rows = []
    for kind, stride in widths.items():
        one, many = f"{kind}, a window at a time", f"{kind}, in batches"
        ways = {one: lambda s=stride, n=one: plain(n, s), many: lambda s=stride, n=many: ours(n, s)}
        seconds = in_turns(ways, scale.rounds, rt.now, warm=2)
        equal(nats[many], nats[one], tolerance(rt, 1e-5, 2e-3), f"{kind} scores")
        rows += rows_of(seconds)
        tokens = [scale.val_tokens / s for s in seconds[many]]
        rows.append(row(f"{kind}, scored", "tokens/s", tokens))
    # One pass, attending over as many tokens as a window holds (EVAL_WINDOW).
    windowed = tg.GPT(h, rt.attend, rt.dtype, h.train_seq_len).eval().to(rt.device)
    windowed.load_state_dict(model.state_dict())
    in_window = rt.compile(windowed.forward_logits)
    long = tg.replace(h, eval_seq_len=16 * h.train_seq_len)
    ways = {
        "sliding": lambda: tg.evaluate(forward_logits, data, h, rt, log, widths["sliding"]),
        "one pass": lambda: tg.evaluate(in_window, data, long, rt, log, 15 * h.train_seq_len),
    }
    seconds = in_turns(ways, scale.rounds, rt.now, warm=2)
    rows += rows_of(seconds)
    rows.append(
        row("one pass, scored", "tokens/s", [scale.val_tokens / s for s in seconds["one pass"]])
    )
    on_cpu = rt.device.type == "cpu"
    windows = max(min(h.val_batch_size // 8, 4096 if on_cpu else math.inf) // h.train_seq_len, 1)
    sizes = f"{h.num_layers} layers x {h.model_dim}, {scale.val_tokens:,} tokens, windows of"
    sizes += f" {h.train_seq_len}, stride {widths['sliding']}, {windows} windows a batch"
    return Table(sizes, rows)
