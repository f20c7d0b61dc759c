"""Scoring: in batches and one window at a time; the sliding window and one pass in its place."""

import train_gpt as tg

from . import reference
from .harness import (
    Machine,
    Row,
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


def scoring(scale: Scale, machine: Machine) -> Table:
    """Tokens scored a second: in batches, equal to one window at a time; in one pass."""
    h, device = scale.h(scale.settings), machine.device
    val = random_data(h, scale.val_tokens).val
    model = random_model(h, machine).eval()
    forward_logits, tokens = device.compile(model.forward_logits), val.tokens.to(device.device)
    batch_tokens = tg.scoring_batch_tokens(h.val_batch_size, device)
    sliding, plain = tg.sliding_pass(forward_logits, h), tg.plain_pass(forward_logits, h)
    one_pass = tg.one_pass(model, h.window_tokens, device)
    nats: dict[str, float] = {}

    def in_batches(name: str, scoring_pass: tg.ScoringPass) -> None:
        log = tg.Log(silent=True)
        nats[name] = tg.score(scoring_pass, val, tg.Ranks(), device, log, batch_tokens).nats

    def one_at_a_time(name: str, scoring_pass: tg.ScoringPass) -> None:
        seq_len, stride = scoring_pass.seq_len, scoring_pass.stride
        nats[name] = reference.score(forward_logits, tokens, seq_len, stride)

    rows: list[Row] = []
    for kind, way in (("sliding", sliding), ("plain", plain)):
        one, many = f"{kind}, a window at a time", f"{kind}, in batches"
        ways = {
            one: lambda name=one, way=way: one_at_a_time(name, way),
            many: lambda name=many, way=way: in_batches(name, way),
        }
        seconds = in_turns(ways, scale.rounds, device.now, warm=2)
        equal(nats[many], nats[one], tolerance(machine, 1e-5, 2e-3), f"{kind} scores")
        rows += rows_of(seconds)
        rows.append(
            row(f"{kind}, scored", "tokens/s", [scale.val_tokens / s for s in seconds[many]])
        )
    ways = {
        "sliding": lambda: in_batches("sliding", sliding),
        # It attends to as many tokens as a window holds (EVAL_WINDOW).
        "one pass": lambda: in_batches("one pass", one_pass),
    }
    seconds = in_turns(ways, scale.rounds, device.now, warm=2)
    rows += rows_of(seconds)
    speeds = [scale.val_tokens / s for s in seconds["one pass"]]
    rows.append(row("one pass, scored", "tokens/s", speeds))
    windows = max(batch_tokens // h.window_tokens, 1)
    sizes = f"{h.num_layers} layers x {h.model_dim}, {scale.val_tokens:,} tokens, windows of"
    sizes += f" {h.window_tokens}, stride {sliding.stride}, {windows} windows a batch"
    return Table(sizes, rows)
