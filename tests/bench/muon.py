"""Muon: stacks of matrices against one after another, and PyTorch's own."""

import torch

import train_gpt as tg

from . import reference
from .harness import Machine, Scale, Table, equal, in_turns, random_model, rows_of, tolerance


def muon(scale: Scale, machine: Machine) -> Table:
    """A step of Muon and its Newton-Schulz iterations, stacked and matrix by matrix."""
    h, device = scale.h(scale.matrices), machine.device
    model = random_model(h, machine)
    roles = tg.parameter_roles(model)
    matrices = {name: p for name, p in model.named_parameters() if roles[name] == "matrix"}
    for p in matrices.values():
        p.grad = torch.randn_like(p)

    def optimizer(matrices: dict[str, torch.Tensor], dtype: torch.dtype) -> tg.Muon:
        steps = h.muon_backend_steps
        return tg.Muon(matrices, h.matrix_lr, h.muon_wd, steps, dtype, tg.Ranks())

    stacked, in_bf16 = (optimizer(matrices, dtype) for dtype in (device.dtype, torch.bfloat16))
    single = [optimizer({name: p}, device.dtype) for name, p in matrices.items()]
    stacks = [torch.stack([p.grad for p in stack]).to(device.dtype) for stack in stacked.stacks]

    def in_stacks() -> list[torch.Tensor]:
        return [tg.newton_schulz(stack, h.muon_backend_steps) for stack in stacks]

    def looped() -> list[torch.Tensor]:
        return [reference.newton_schulz(m, h.muon_backend_steps) for s in stacks for m in s]

    one, other = (torch.cat([x.flatten() for x in way()]) for way in (in_stacks, looped))
    equal(one, other, tolerance(machine, 1e-3, 5e-2), "Newton-Schulz, stacked and not")
    steps = {
        "step, stacked": lambda: stacked.step(0.0, 0.95),
        "step, matrix by matrix": lambda: [muon.step(0.0, 0.95) for muon in single],
    }
    if device.dtype != torch.bfloat16:
        steps["step, stacked, bfloat16"] = lambda: in_bf16.step(0.0, 0.95)
    if hasattr(torch.optim, "Muon"):
        theirs = torch.optim.Muon(
            [*matrices.values()], lr=0.0, weight_decay=h.muon_wd, momentum=0.95
        )
        steps["step, torch.optim.Muon, bfloat16"] = theirs.step
    iterations = {"Newton-Schulz, stacked": in_stacks, "Newton-Schulz, matrix by matrix": looped}
    rows = rows_of(in_turns(steps, scale.rounds, device.now, calls=scale.calls))
    rows += rows_of(in_turns(iterations, scale.rounds, device.now, calls=scale.calls))
    shapes = ", ".join(f"{len(s)} of {s.size(1)} x {s.size(2)}" for s in stacks)
    sizes = f"{len(matrices)} matrices in {len(stacks)} stacks: {shapes}; {device.dtype}"
    return Table(sizes, rows)
