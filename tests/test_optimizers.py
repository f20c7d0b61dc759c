"""Optimizers: Newton-Schulz by SVD, stacks by loops, one step in float64, averages by hand."""

import math

import pytest
import torch
from conftest import randomize, settings

import train_gpt as tg


def scalar_iteration(s: torch.Tensor, steps: int = 5) -> torch.Tensor:
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("shape", [(48, 48), (24, 48), (96, 32)])
def test_newton_schulz_is_the_polynomial_on_the_singular_values(shape):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    stack[1] *= 1e-3  # scale must not matter
    u, s, vt = torch.linalg.svd(stack, full_matrices=False)
    relative = s / stack.norm(dim=(1, 2), keepdim=True).squeeze(-1)
    expected = u @ torch.diag_embed(scalar_iteration(relative)) @ vt
    got = tg.newton_schulz(stack.float(), 5).double()
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
    ends = torch.linalg.svdvals(got)[relative > 0.002]
    assert ends.min() > 0.66
    assert ends.max() < 1.22


def test_a_stack_equals_one_matrix_at_a_time():
    stack = torch.randn(5, 40, 24, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([tg.newton_schulz(m[None], 5) for m in stack])
    torch.testing.assert_close(tg.newton_schulz(stack, 5), alone, atol=1e-5, rtol=1e-5)


def test_a_zero_matrix_stays_zero():
    assert not tg.newton_schulz(torch.zeros(2, 8, 4), 5).any()


def test_muon_step_is_the_published_rule():
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (16, 8), (8, 8), (8, 16)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    expected = [p.detach().clone() for p in params]
    momenta = [torch.zeros_like(p) for p in params]
    named = {str(n): p for n, p in enumerate(params)}
    muon = tg.Muon(named, 0.04, 0.1, 5, torch.float32, tg.Ranks())
    assert [len(stack) for stack in muon.stacks] == [2, 1, 1]
    for momentum in (0.9, 0.95):
        for p, want, buffer in zip(params, expected, momenta, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            buffer.mul_(momentum).add_(p.grad)
            direction = tg.newton_schulz((p.grad + momentum * buffer)[None], 5)[0]
            want.mul_(1 - 0.02 * 0.1)
            want.sub_(0.02 * math.sqrt(max(1, p.size(0) / p.size(1))) * direction)
        muon.step(0.5, momentum)
    for p, want in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), want, atol=1e-5, rtol=1e-5)


def test_every_parameter_is_in_exactly_one_group_with_its_roles_settings():
    h = settings(num_layers=2, jepa_chunk_size=4)
    model = tg.GPT(h)
    optimizers = tg.Optimizers(model, h, tg.Ranks())
    held = [p for stack in optimizers.muon.stacks for p in stack]
    rates = {}
    for group in optimizers.adamw.param_groups:
        held += group["params"]
        rates |= {id(p): (group["base_lr"], group["weight_decay"]) for p in group["params"]}
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    assert rates[id(model.tok_emb.weight)] == (h.tied_embed_lr, 0.04)
    assert rates[id(model.smear.gate)] == (h.scalar_lr, 0.04)
    assert rates[id(model.bigram.proj.weight)] == (h.scalar_lr, 0.04)
    assert rates[id(model.jepa.inject.weight)] == (h.jepa_lr, 0.0)


def test_the_table_of_roles_decides_for_muon_too(monkeypatch):
    monkeypatch.setitem(tg.ROLES, "matrix", tg.Role("muon", "jepa_lr", "adam_wd", 6))
    h = settings(jepa_lr=0.5, adam_wd=0.7)
    optimizers = tg.Optimizers(tg.GPT(h), h, tg.Ranks())
    assert (optimizers.muon.lr, optimizers.muon.weight_decay) == (0.5, 0.7)


@pytest.mark.parametrize("tied", [1, 0])
def test_a_step_is_the_published_one_at_the_scheduled_rates(tied):
    """AdamW and Muon written out, one step after another, at half the learning rates."""
    h = settings(num_layers=2, grad_clip_norm=0, beta1=0.8, beta2=0.9, adam_eps=1e-3)
    h = tg.replace(h, tie_embeddings=bool(tied), jepa_chunk_size=4)
    rates = {"embed": 0.035, "untied_embed": 0.6, "head": 0.008, "scalar": 0.025, "aux": 0.001}
    torch.manual_seed(0)
    model = randomize(tg.GPT(h))
    roles = tg.parameter_roles(model)
    weights = {n: p.detach().clone().double() for n, p in model.named_parameters()}
    first = {n: torch.zeros_like(w) for n, w in weights.items()}
    second = {n: torch.zeros_like(w) for n, w in weights.items()}
    optimizers = tg.Optimizers(model, h, tg.Ranks())
    for step in range(2):
        for p in model.parameters():
            p.grad.normal_()
        grads = {n: p.grad.double().clone() for n, p in model.named_parameters()}
        for n, w in weights.items():
            g, m = grads[n], first[n]
            if roles[n] == "matrix":
                momentum = 0.92 + step / 1500 * 0.07
                m.mul_(momentum).add_(g)
                u = tg.newton_schulz((g + momentum * m)[None].float(), 5)[0].double()
                w.mul_(1 - 0.5 * 0.025 * 0.04)
                w.sub_(0.5 * 0.025 * math.sqrt(max(1, w.size(0) / w.size(1))) * u)
                continue
            lr = 0.5 * rates[roles[n]]
            m.mul_(0.8).add_(0.2 * g)
            second[n].mul_(0.9).add_(0.1 * g * g)
            w.mul_(1 - lr * (0.0 if roles[n] in ("head", "aux") else 0.04))
            root = (second[n] / (1 - 0.9 ** (step + 1))).sqrt() + 1e-3
            w.sub_(lr * m / (1 - 0.8 ** (step + 1)) / root)
        optimizers.step(tg.Phase(0.5, 0.92 + step / 1500 * 0.07, 0.0, 0.0))
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), weights[n], atol=1e-5, rtol=1e-4, msg=n)


def test_gradients_are_clipped_and_dropped():
    h = settings(grad_clip_norm=0.3)
    model = tg.GPT(h)
    optimizers = tg.Optimizers(model, h, tg.Ranks())
    for p in model.parameters():
        p.grad.fill_(1)
    seen = []
    optimizers.muon.step = lambda *_: seen.append(
        torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    )
    optimizers.step(tg.Phase(1.0, 0.9, 0.0, 0.0))
    assert seen[0] == pytest.approx(0.3, rel=1e-3)
    assert not any(p.grad.any() for p in model.parameters())


def test_ema_is_the_bounded_average():
    h = settings(ema_decay=0.9)
    model = torch.nn.Linear(1, 1, bias=False)
    average = tg.WeightAverage(model, h)
    want = model.weight.item()
    for t in range(200):
        model.weight.data.fill_(math.sin(t))
        decay = min(0.9, (1 + t) / (10 + t))
        want = decay * want + (1 - decay) * math.sin(t)
        average.update(t, 1.0)
    assert average.weights["weight"].item() == pytest.approx(want, abs=1e-5)
    assert average.copy_to_model(tg.Log()) == "ema"
    assert model.weight.item() == pytest.approx(want, abs=1e-5)


def test_without_averaging_the_last_weights_stay():
    h = settings(ema_enabled=0)
    model = torch.nn.Linear(1, 1, bias=False)
    average = tg.WeightAverage(model, h)
    model.weight.data.fill_(7)
    average.update(0, 1.0)
    assert average.copy_to_model(tg.Log()) == "raw"
    assert model.weight.item() == 7


def test_swa_is_the_equal_average_of_the_due_steps():
    h = settings(swa_enabled=1, swa_every=3, swa_start_frac=0.5, ema_enabled=1)
    model = torch.nn.Linear(1, 1, bias=False)
    average, taken = tg.WeightAverage(model, h), []
    for t in range(40):
        model.weight.data.fill_(math.sin(t))
        lr_scale = 1 - t / 40
        if lr_scale < 0.5 and (t + 1) % 3 == 0:
            taken.append(math.sin(t))
        average.update(t, lr_scale)
        want = sum(taken) / len(taken) if taken else math.sin(t)  # until it starts: the last
        assert average.weights["weight"].item() == pytest.approx(want, abs=1e-6)
    assert len(taken) == average.count == 6
    assert average.copy_to_model(tg.Log()) == "swa"
    assert model.weight.item() == pytest.approx(sum(taken) / 6, abs=1e-6)


def test_swa_without_a_due_step_ends_with_the_last_weights(capsys):
    model = torch.nn.Linear(1, 1, bias=False)
    average = tg.WeightAverage(model, settings(swa_enabled=1))
    model.weight.data.fill_(7)
    average.update(0, 0.1)
    assert average.copy_to_model(tg.Log()) == "raw"
    assert model.weight.item() == 7
    assert "last weights" in capsys.readouterr().out
