"""Attention: every back end that runs here, at the shapes of both stacks."""

import torch

import train_gpt as tg

from .harness import Machine, Row, Scale, Table, equal, in_turns, rows_of, tolerance

BACK_ENDS = ("flash", "cudnn", "fa3", "math")


def attention(scale: Scale, machine: Machine) -> Table:
    """Each attention back end, forward and with backward."""
    device = machine.device
    rows: list[Row] = []
    absent: dict[str, str] = {}
    *heads, width = scale.heads
    like = {"device": device.device, "dtype": device.dtype}
    for count, length in scale.attention:
        shapes = [(count, length, n, width) for n in (heads[0], *heads)]
        above, q, k = (torch.randn(shape, **like) for shape in shapes)
        qkv = [x.requires_grad_() for x in (q, k, torch.randn_like(k))]

        def forward(name: str, qkv: list[torch.Tensor] = qkv) -> torch.Tensor:
            return tg.load_attention(name)(*qkv)

        def both(
            name: str, qkv: list[torch.Tensor] = qkv, above: torch.Tensor = above
        ) -> tuple[torch.Tensor, ...]:
            y = forward(name, qkv)
            return y, *torch.autograd.grad(y, qkv, above)

        try:
            good = {}
            for name in BACK_ENDS:
                try:
                    good[name] = [x.detach() for x in both(name)]
                except Exception as error:  # not installed, not of this device, or no memory
                    absent[name] = f"{type(error).__name__}: {error!s:.60}"
            first, *others = good
            for name in others:
                for one, other in zip(good[name], good[first], strict=True):
                    what = f"attention by {name} and {first}"
                    equal(one, other, tolerance(machine, 1e-3, 2e-2), what)
            for what, way in (("forward", forward), ("forward and backward", both)):
                ways = {
                    f"{count} x {length}, {what}: {n}": lambda n=n, way=way: way(n) for n in good
                }
                rows += rows_of(in_turns(ways, scale.rounds, device.now, calls=scale.calls))
        finally:
            tg.load_attention(machine.attention.name)
    gone = "".join(f"; not here: {name} ({why})" for name, why in absent.items())
    shape = f"{heads[0]} query heads, {heads[1]} key/value heads, width {width}"
    return Table(f"sequences x tokens, {shape}, {device.dtype}{gone}", rows)
