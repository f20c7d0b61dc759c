"""Muon: stacks of matrices against one after another, and PyTorch's own."""

import torch

import train_gpt as tg

from . import reference
from .harness import Table, equal, in_turns, random_model, rows_of, tolerance


def muon(scale, rt):
    """A step of Muon and its Newton-Schulz iterations, stacked and matrix by matrix."""
    h = scale.h(scale.matrices)
    model = random_model(h, rt)
    roles = tg.parameter_roles(model)
    matrices = [p for name, p in model.named_parameters() if roles[name] == "matrix"]
    for p in matrices:
        p.grad = torch.randn_like(p)
    given = h.muon_wd, h.muon_backend_steps
    stacked, in_bf16 = (tg.Muon(matrices, *given, dtype) for dtype in (rt.dtype, torch.bfloat16))
    single = [tg.Muon([p], *given, rt.dtype) for p in matrices]
    stacks = [torch.stack([p.grad for p in stack]).to(rt.dtype) for stack in stacked.stacks]

    def in_stacks():
        return [tg.newton_schulz(stack, h.muon_backend_steps) for stack in stacks]

    def looped():
        return [reference.newton_schulz(m, h.muon_backend_steps) for s in stacks for m in s]

    one, other = (torch.cat([x.flatten() for x in way()]) for way in (in_stacks, looped))
    equal(one, other, tolerance(rt, 1e-3, 5e-2), "Newton-Schulz, stacked and not")
    steps = {
        "step, stacked": lambda: stacked.step(0.0, 0.95),
        "step, matrix by matrix": lambda: [muon.step(0.0, 0.95) for muon in single],
    }
    if rt.dtype != torch.bfloat16:
        steps["step, stacked, bfloat16"] = lambda: in_bf16.step(0.0, 0.95)
    if hasattr(torch.optim, "Muon"):
        theirs = torch.optim.Muon(matrices, lr=0.0, weight_decay=h.muon_wd, momentum=0.95)
        steps["step, torch.optim.Muon, bfloat16"] = theirs.step
    iterations = {"Newton-Schulz, stacked": in_stacks, "Newton-Schulz, matrix by matrix": looped}
    rows = rows_of(in_turns(steps, scale.rounds, rt.now, calls=scale.calls))
    rows += rows_of(in_turns(iterations, scale.rounds, rt.now, calls=scale.calls))
    shapes = ", ".join(f"{len(s)} of {s.size(1)} x {s.size(2)}" for s in stacks)
    return Table(f"{len(matrices)} matrices in {len(stacks)} stacks: {shapes}; {rt.dtype}", rows)
