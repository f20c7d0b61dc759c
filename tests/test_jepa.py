"""The JEPA head: its formulas, causality at chunk borders, who learns from what, SIGReg."""

import math

import pytest
import torch
from conftest import settings
from test_model import auxiliary, random_model, some_ids

import train_gpt as tg


def jepa_model(**changes: object) -> tg.GPT:
    """The tiny model with a JEPA head, every parameter away from its start."""
    return random_model(**{"jepa_chunk_size": 4, **changes})


# ---- The start ----


def test_the_head_leaves_the_initial_model_as_it_is():
    models = []
    for chunk in (0, 4):
        torch.manual_seed(0)
        models.append(tg.GPT(settings(jepa_chunk_size=chunk)))
    with_head = models[1].state_dict()
    assert all(torch.equal(p, with_head[name]) for name, p in models[0].state_dict().items())
    # And a new head changes no logit: its injection starts at 0.
    ids = some_ids(2, 32)
    assert torch.equal(models[0].forward_logits(ids), models[1].forward_logits(ids))


def test_initial_head():
    torch.manual_seed(0)
    jepa = tg.JEPA(settings(model_dim=64, jepa_latent_dim=96, jepa_proj_hidden=128))
    for linear in (jepa.projector[0], jepa.projector[3], jepa.predictor[0], jepa.predictor[3]):
        bound = linear.in_features**-0.5
        assert linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert jepa.start.std().item() == pytest.approx(0.02, rel=0.3)
    assert not jepa.inject.weight.any()


# ---- The forward pass ----


def reference_head(jepa: tg.JEPA, x: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The stream [T, D] after the head and the prediction error of one sequence, in float64."""
    w = {name: p.detach().double() for name, p in jepa.named_parameters()}

    def two_maps(name: str, u: torch.Tensor) -> torch.Tensor:
        u = w[f"{name}.0.weight"] @ u
        u = u / (u.square().mean() + 1.2e-7).sqrt()
        return w[f"{name}.3.weight"] @ (u / (1 + (-u).exp()))

    chunks = [x[at : at + 4] for at in range(0, len(x) - 3, 4)]
    latents = [two_maps("projector", sum(chunk) / 4) for chunk in chunks]
    out, errors = [], []
    for n, chunk in enumerate(chunks):
        predicted = two_maps("predictor", latents[n - 1] if n else w["start"][0])
        errors.append((predicted - latents[n]).square().mean().item())
        out += [x_t + w["inject.weight"] @ predicted for x_t in chunk]
    return torch.stack(out + x[len(out) :]), sum(errors) / max(len(errors), 1)


@pytest.mark.parametrize("length", [3, 4, 16, 22])
def test_the_head_equals_its_formulas_in_float64(length):
    model = jepa_model()
    x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1))
    got, latents, predicted = model.jepa(x)
    wanted = [reference_head(model.jepa, list(row.double())) for row in x]
    want = torch.stack([out for out, _ in wanted])
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    if length >= 8:
        error, _ = model.jepa.losses(latents, predicted)
        assert error.item() == pytest.approx(sum(e for _, e in wanted) / 2, rel=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_no_logit_depends_on_a_later_byte(training):
    """Of any position in its chunk, nor of those past the last whole chunk."""
    model, ids = jepa_model().train(training), some_ids(1, 22)
    with torch.inference_mode():
        before = model.forward_logits(ids)
        for t in range(1, 22):
            other = ids.clone()
            other[0, t] = 4 + (other[0, t] + 77) % 256
            after = model.forward_logits(other)
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.equal(before[:, t], after[:, t])


# ---- Who learns from what ----


def gradients(model: tg.GPT, weight: float) -> dict[str, torch.Tensor]:
    """The gradients of a training step by name; zeros for one that is absent."""
    model.train().zero_grad()
    inputs = auxiliary(model, tg.Phase(1.0, 0.9, weight))
    model.losses(*some_ids(2, 2, 32), inputs)[0].backward()
    found = model.named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in found}


def test_the_jepa_losses_train_projector_and_predictor_only():
    model = jepa_model()
    off, on = gradients(model, 0.0), gradients(model, 1.0)
    for name in off:
        if name.startswith("jepa.") and "inject" not in name:
            assert not off[name].any(), name
            assert on[name].any(), name
        else:
            assert off[name].any(), name
            assert torch.equal(off[name], on[name]), name


# ---- SIGReg ----


def reference_sigreg(z: torch.Tensor, directions: torch.Tensor) -> float:
    """SIGReg by its definition, one direction and one knot at a time, in float64."""
    z = torch.stack([(c - c.mean()) / max(c.std(), 1e-6) for c in z.double().T], dim=1)
    total = 0.0
    for direction in directions.double().T:
        for k in range(17):
            t = 0.2 + 2.8 * k / 16
            phi = sum(complex(math.cos(a), math.sin(a)) for a in (t * (z @ direction)).tolist())
            total += abs(phi / len(z) - math.exp(-t * t / 2)) ** 2 / 17
    return total / directions.size(1)


def unit_columns(rows: int, columns: int) -> torch.Tensor:
    directions = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    return directions / directions.norm(dim=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigreg_equals_its_definition(dtype):
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(100, 6, generator=generator) * 1.3 + 0.2).to(dtype)
    got = tg.sigreg(z, unit_columns(6, 10), 17)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(reference_sigreg(z, unit_columns(6, 10)), rel=1e-5)


def test_sigreg_of_equal_rows_has_a_finite_gradient():
    z = torch.full((8, 4), 0.5, requires_grad=True)
    tg.sigreg(z, unit_columns(4, 8), 17).backward()
    assert z.grad.isfinite().all()


def test_directions_are_unit_vectors_that_follow_from_the_seed_and_are_not_stored():
    first, second, other = (jepa_model(seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(first.jepa.directions.norm(dim=0), torch.ones(256))
    assert torch.equal(first.jepa.directions, second.jepa.directions)
    assert not torch.equal(first.jepa.directions, other.jepa.directions)
    assert "jepa.directions" not in first.state_dict()
