"""Optimizers: Newton-Schulz by SVD, steps of every role in float64, averages by their formulas."""

import math

import pytest
import torch
from conftest import randomize, settings
from torch.nn import functional as F

import train_gpt as tg

ITERATIONS = {
    "quintic": 5 * [(3.4445, -4.7750, 2.0315)],
    "polar_express": [
        (8.15655, -22.48329, 15.87877),
        (4.04293, -2.80892, 0.50002),
        (3.89167, -2.77248, 0.50606),
        (3.28575, -2.36813, 0.46449),
        (2.34654, -1.70978, 0.42324),
    ],
}


def orthogonalized(matrices: torch.Tensor, coefficients: str = "quintic") -> torch.Tensor:
    """What five iterations should give, by singular value decomposition in float64."""
    u, s, vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / matrices.double().norm(dim=(-2, -1), keepdim=True).squeeze(-1)
    for a, b, c in ITERATIONS[coefficients]:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag_embed(s) @ vt


@pytest.mark.parametrize("coefficients", ITERATIONS)
@pytest.mark.parametrize("shape", [(48, 48), (24, 48), (96, 32)])
def test_newton_schulz_applies_the_polynomials_to_each_matrix_of_a_stack(shape, coefficients):
    stack = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    stack[1] *= 1e-3  # the scale has no influence
    stack[3] = 0
    got = tg.newton_schulz(stack, 5, coefficients)
    assert not got[3].any()
    want = orthogonalized(stack[:3], coefficients)
    torch.testing.assert_close(got[:3].double(), want, atol=2e-3, rtol=2e-3)
    singular = torch.linalg.svdvals(stack[:3]) / stack[:3].norm(dim=(1, 2))[:, None]
    ends = torch.linalg.svdvals(got[:3])[singular > 0.002]
    assert 0.66 < ends.min() < ends.max() < 1.22


# The learning rate of each role, and whether it has weight decay.
ROLES = {
    "matrix": (0.02, True),
    "embed": (0.035, True),
    "untied_embed": (0.6, True),
    "head": (0.008, False),
    "scalar": (0.025, True),
    "aux": (0.001, False),
}


@pytest.mark.parametrize(
    ("tied", "coefficients", "row_normalize", "slow"),
    [
        (1, "quintic", 0, 0),
        (0, "quintic", 1, 0),
        (1, "polar_express", 1, 0),
        (1, "quintic", 0, 0.56),
    ],
)
def test_a_step_of_every_role_equals_muon_and_adamw_in_float64(
    tied, coefficients, row_normalize, slow
):
    """Two steps at half the learning rates; every parameter takes part in exactly one way."""
    h = settings(
        tie_embeddings=tied, num_layers=2, jepa_chunk_size=4, grad_clip_norm=0, matrix_lr=0.02
    )
    h = tg.replace(h, beta1=0.8, beta2=0.9, adam_eps=1e-3, muon_wd=0.1, adam_wd=0.07)
    h = tg.replace(h, muon_coefficients=coefficients, muon_row_normalize=bool(row_normalize))
    h = tg.replace(h, muon_slow_share=slow)
    table_decay = 0.07 if tied else 0.03  # ADAM_WD, or EMBED_WD
    h = tg.replace(h, embed_wd=-1.0 if tied else table_decay)
    torch.manual_seed(0)
    model = randomize(tg.GPT(h))
    roles = tg.parameter_roles(model)
    assert {*roles.values()} == {*ROLES} - ({"untied_embed", "head"} if tied else {"embed"})
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    first = {n: torch.zeros_like(w) for n, w in weights.items()}
    second = {n: torch.zeros_like(w) for n, w in weights.items()}
    optimizers = tg.Optimizers(model, h, tg.Ranks())
    for step, momentum in enumerate((0.92, 0.95), 1):
        for n, p in model.named_parameters():
            g, w, m = p.grad.normal_().double(), weights[n], first[n]
            lr, decays = ROLES[roles[n]]
            lr *= 0.5
            if roles[n] == "matrix":
                w.mul_(1 - lr * 0.1)
                shape = max(1, w.size(0) / w.size(1)) ** 0.5
                m.mul_(0.85 if slow else momentum).add_(g)
                second[n].mul_(0.98).add_(g)
                update = g + momentum * m
                if slow:
                    mixed = (1 - slow) * 0.15 * m + slow * 0.02 * second[n]
                    update = (1 - momentum) * g + momentum * mixed
                if row_normalize:
                    update = F.normalize(update, dim=1)
                w.sub_(lr * shape * orthogonalized(update, coefficients))
                continue
            m.mul_(0.8).add_(0.2 * g)
            second[n].mul_(0.9).add_(0.1 * g * g)
            decay = table_decay if "embed" in roles[n] else 0.07 * decays
            w.mul_(1 - lr * decay)
            root = (second[n] / (1 - 0.9**step)).sqrt() + 1e-3
            w.sub_(lr * m / (1 - 0.8**step) / root)
        optimizers.step(tg.Phase(0.5, momentum, 0.0))
        assert not any(p.grad.any() for p in model.parameters())
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), weights[n], atol=1e-4, rtol=1e-4, msg=n)


@pytest.mark.parametrize("size", [100.0, 0.2])
def test_a_gradient_is_clipped_to_its_largest_norm(size):
    """A step with a gradient of any size is that with a gradient of norm 0.3 at most."""
    found = []
    for clip, norm in ((0.3, size), (0, min(size, 0.3))):
        h = settings(grad_clip_norm=clip, adam_eps=1)  # so that AdamW sees the size
        torch.manual_seed(0)
        model = tg.GPT(h)
        optimizers = tg.Optimizers(model, h, tg.Ranks())
        count = sum(p.numel() for p in model.parameters())
        for p in model.parameters():
            p.grad.fill_(norm / count**0.5)
        optimizers.step(tg.Phase(1.0, 0.9, 0.0))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.fault(34)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_no_weight(value):
    """Nor do the momenta of the steps before it, or the decay of the weights."""
    h = settings()
    model = tg.GPT(h)
    optimizers = tg.Optimizers(model, h, tg.Ranks())
    for bad in (False, False, True):
        before = [p.clone() for p in model.parameters()]
        optimizers.gradient.fill_(0.1)
        optimizers.gradient[7] += value if bad else 0.0
        assert optimizers.step(tg.Phase(1.0, 0.9, 0.0)).isfinite() != bad
        assert all(map(torch.equal, before, model.parameters())) == bad
    assert all(state.isfinite().all() for state in optimizers.state().values())


def test_gradients_of_large_weights_are_aligned_for_vector_instructions():
    """16 bytes, whatever small gradients of odd sizes there are, such as that of BigramHash."""
    model = tg.GPT(settings(num_layers=3, model_dim=24))
    optimizers = tg.Optimizers(model, model.h, tg.Ranks())
    assert sum(p.numel() % 4 for p in model.parameters())
    parts = [p.grad for p in model.parameters() if p.numel() >= 256]
    offsets = [part.data_ptr() - optimizers.gradient.data_ptr() for part in parts]
    assert len(offsets) > 10
    assert not any(offset % 16 for offset in offsets)


# ---- The average of the weights ----


def average_of(steps: int, **changes: object) -> tuple[str, float, list[float]]:
    """Kind and value of the average of one weight that is sin(t) after step t, and its course.

    The learning rate falls linearly to 0.
    """
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, -2.0)
    average, course = tg.WeightAverage(model, settings(**changes)), []
    for t in range(steps):
        model.weight.data.fill_(math.sin(t))
        average.update(t, 1 - t / steps)
        course.append(average.weights["weight"].item())
    average.finish()
    return average.copy_to_model(tg.Log()), model.weight.item(), course


def test_the_ema_starts_with_a_smaller_decay():
    want, course = -2.0, []
    for t in range(200):
        decay = min(0.9, (1 + t) / (10 + t))
        want = decay * want + (1 - decay) * math.sin(t)
        course.append(want)
    kind, value, found = average_of(200, ema_decay=0.9)
    assert kind == "ema"
    assert found == pytest.approx(course, abs=1e-5)
    assert value == pytest.approx(want, abs=1e-5)


def test_the_final_weights_may_have_a_share_of_the_last_ones():
    whole = average_of(200, ema_decay=0.9)[1]
    part = average_of(200, ema_decay=0.9, average_share=0.75)[1]
    assert part == pytest.approx(0.75 * whole + 0.25 * math.sin(199), abs=1e-6)


def test_without_averaging_the_last_weights_stay():
    assert average_of(8, ema_enabled=0)[:2] == ("raw", pytest.approx(math.sin(7)))


def test_swa_is_the_equal_average_of_the_steps_that_are_due():
    kind, value, course = average_of(40, swa_enabled=1, swa_every=3, swa_start_frac=0.5)
    taken = []
    for t in range(40):
        if 1 - t / 40 < 0.5 and (t + 1) % 3 == 0:
            taken.append(math.sin(t))
        want = sum(taken) / len(taken) if taken else math.sin(t)  # until it starts: the last
        assert course[t] == pytest.approx(want, abs=1e-6)
    assert len(taken) == 6
    assert (kind, value) == ("swa", pytest.approx(sum(taken) / 6, abs=1e-6))


def test_swa_without_a_step_that_is_due_ends_with_the_last_weights(capsys):
    assert average_of(8, swa_enabled=1)[:2] == ("raw", pytest.approx(math.sin(7)))
    assert "last weights" in capsys.readouterr().out
