"""The trainer and the scorer without tricks: what train_gpt.py must equal, and be faster than.

The same model, eager; Muon a matrix at a time; torch's AdamW and clipping as they come; a window
scored at a time. Every function that train_gpt.py has for speed is written out plainly here.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt as tg


def newton_schulz(gradient: Tensor, steps: int, coefficients: str = "quintic") -> Tensor:
    """Returns about U V^T of one U S V^T [rows, cols]."""
    table = tg.NEWTON_SCHULZ[coefficients]
    tall = gradient.size(0) > gradient.size(1)
    x = gradient / (gradient.norm() + 1e-7)
    if tall:
        x = x.T
    for step in range(steps):
        a, b, c = table[min(step, len(table) - 1)]
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Loop:
    """A training loop: `step` is one step, `average` the moving average of the weights."""

    def __init__(self, model: tg.GPT, h: tg.Hyperparameters) -> None:
        self.model, self.h = model.train(), h
        self.rates = {
            "embed": h.tied_embed_lr,
            "untied_embed": h.embed_lr,
            "head": h.head_lr,
            "scalar": h.scalar_lr,
            "aux": h.jepa_lr,
        }
        tables = dict.fromkeys(("embed", "untied_embed"), h.embedding_wd)
        decays = {"scalar": h.adam_wd, "head": 0.0, "aux": 0.0} | tables
        roles = tg.parameter_roles(model)
        groups: dict[str, list[nn.Parameter]] = {role: [] for role in ("matrix", *self.rates)}
        for name, p in model.named_parameters():
            groups[roles[name]].append(p)
        self.matrices = groups["matrix"]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adamw = torch.optim.AdamW(
            [{"params": groups[role], "weight_decay": decays[role]} for role in self.rates],
            betas=(h.beta1, h.beta2),
            eps=h.adam_eps,
            foreach=False,
        )
        self.average = [p.detach().clone() for p in model.parameters()]

    def step(
        self,
        number: int,
        phase: tg.Phase,
        inputs: Tensor,
        targets: Tensor,
        auxiliary: Callable[[slice], tg.Auxiliary] = lambda rows: tg.NO_AUXILIARY,
    ) -> float:
        """Takes step `number` on ids [sequences, T] with the rates and loops of a phase.

        `auxiliary` returns the inputs of the auxiliary losses of some sequences.

        Returns the mean cross-entropy.
        """
        h = self.h
        parts = tg.grad_accum_steps(len(inputs), h.train_seq_len, h.micro_batch_tokens)
        rows = len(inputs) // parts
        for p in self.model.parameters():  # one that no loss reaches has momentum all the same
            p.grad = torch.zeros_like(p)
        total = 0.0
        for n in range(parts):
            part = slice(n * rows, (n + 1) * rows)
            batch = inputs[part], targets[part], auxiliary(part)
            loss, terms = self.model.losses(*batch, phase.loops)
            (loss / parts).backward()
            total += terms["train_loss"].item() / parts
        nn.utils.clip_grad_norm_(self.model.parameters(), h.grad_clip_norm or math.inf)
        self.muon(number, phase.lr_scale)
        for group, rate in zip(self.adamw.param_groups, self.rates.values(), strict=True):
            group["lr"] = rate * phase.lr_scale
        self.adamw.step()
        decay = min(h.ema_decay, (1 + number) / (10 + number)) if h.ema_enabled else 0.0
        with torch.no_grad():
            for average, p in zip(self.average, self.model.parameters(), strict=True):
                average.copy_(decay * average + (1 - decay) * p)
        return total

    @torch.no_grad()
    def muon(self, number: int, scale: float) -> None:
        """Takes Muon's part of the step."""
        h = self.h
        warm = min(number / h.muon_momentum_warmup_steps, 1) if h.muon_momentum_warmup_steps else 1
        start, end = h.muon_momentum_warmup_start, h.muon_momentum
        momentum, lr = start + warm * (end - start), h.matrix_lr * scale
        for p, buffer in zip(self.matrices, self.momenta, strict=True):
            buffer.mul_(momentum).add_(p.grad)
            direction = p.grad + momentum * buffer
            if h.muon_row_normalize:
                direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-7)
            direction = direction.to(self.model.dtype)
            update = newton_schulz(direction, h.muon_backend_steps, h.muon_coefficients).float()
            p.mul_(1 - lr * h.muon_wd)
            p.sub_(lr * max(1, p.size(0) / p.size(1)) ** 0.5 * update)


@torch.inference_mode()
def score(
    forward_logits: Callable[[Tensor], Tensor], tokens: Tensor, seq_len: int, stride: int
) -> float:
    """Returns the nats of all tokens but the first, in windows `stride` apart, one at a time."""
    total, nats, scored = len(tokens) - 1, 0.0, 0
    for end in [*range(seq_len, total, stride), total]:
        window = tokens[end - seq_len : end + 1].long()
        logits = forward_logits(window[None, :-1])[0]
        losses = F.cross_entropy(logits, window[1:], reduction="none").double()
        nats += losses[scored - end :].sum().item()
        scored = end
    return nats
