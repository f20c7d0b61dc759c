"""The JEPA head: sizes, causality at chunk borders, who learns from what, SIGReg by definition."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import BYTE_TABLE, ROOT, TINY, load, randomize, score, settings, trainer
from test_model import BYTE_COMMAND, meta_model

import train_gpt as tg

JEPA = {"jepa_chunk_size": 4, "jepa_latent_dim": 8, "jepa_proj_hidden": 12}
JEPA_COMMAND = BYTE_COMMAND | {
    "JEPA_CHUNK_SIZE": "8",
    "JEPA_LATENT_DIM": "256",
    "JEPA_PROJ_HIDDEN": "256",
    "JEPA_LAMBDA_MAX": "0.001",
    "JEPA_SIGREG_WEIGHT": "0.02",
    "JEPA_LR": "0.001",
}


def jepa_model(**changes: object) -> tg.GPT:
    """The tiny model with a JEPA head, every parameter away from its start."""
    torch.manual_seed(0)
    return randomize(tg.GPT(settings(**JEPA, **changes)))


def auxiliary(model: tg.GPT, weight: float, step: int = 0) -> tg.AuxiliaryInputs:
    """What the JEPA losses of a step need at a weight; nothing at 0."""
    phase = tg.Phase(1.0, 0.9, weight, 0.0)
    return tg.auxiliary_inputs(phase, model.h, step, torch.device("cpu"), tg.Ranks())


def some_ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(4))


# ---- Configuration ----


def test_published_parameter_counts():
    model = meta_model(**JEPA_COMMAND)
    assert sum(p.numel() for p in model.parameters()) == 24_625_001
    assert sum(p.numel() for p in model.jepa.parameters()) == 459_008
    roles = tg.parameter_roles(model)
    assert {role for name, role in roles.items() if name.startswith("jepa.")} == {"aux"}
    without = meta_model(**JEPA_COMMAND | {"JEPA_CHUNK_SIZE": "0"})
    assert sum(p.numel() for p in without.parameters()) == 24_165_993


def test_the_preset_is_the_command():
    preset = tg.Hyperparameters.from_env({"PRESET": "byte_jepa"})
    command = tg.Hyperparameters.from_env(JEPA_COMMAND)
    assert preset == tg.replace(command, preset="byte_jepa")


def test_the_head_leaves_the_initial_backbone_as_it_is():
    models = []
    for chunk in (0, 4):
        torch.manual_seed(0)
        models.append(tg.GPT(settings(**{**JEPA, "jepa_chunk_size": chunk})))
    without, with_head = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(p, with_head[name]) for name, p in without.items())
    # And a new head changes no logit: its injection starts at 0.
    ids = some_ids(2, 32)
    assert torch.equal(models[0].forward_logits(ids), models[1].forward_logits(ids))


def test_initial_head():
    torch.manual_seed(0)
    h = settings(**JEPA | {"jepa_latent_dim": 96, "jepa_proj_hidden": 128}, model_dim=64)
    jepa = tg.JEPA(h)
    for linear in (jepa.projector[0], jepa.projector[3], jepa.predictor[0], jepa.predictor[3]):
        bound = linear.in_features**-0.5
        assert linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert jepa.start.std().item() == pytest.approx(0.02, rel=0.3)
    assert not jepa.inject.weight.any()


def test_a_chunk_needs_a_second_one_in_the_sequence():
    with pytest.raises(
        tg.SettingsError, match=r"JEPA_CHUNK_SIZE=33: two chunks must fit in TRAIN_SEQ_LEN=64"
    ):
        settings(jepa_chunk_size=33)
    settings(jepa_chunk_size=32)


# ---- The forward, by its formulas ----


def reference_head(
    jepa: tg.JEPA, x: list[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor | float]:
    """The stream after the head and the prediction error of one sequence, in float64."""
    w = {name: p.detach().double() for name, p in jepa.named_parameters()}

    def two_maps(name: str, u: torch.Tensor) -> torch.Tensor:
        u = w[f"{name}.0.weight"] @ u
        u = u / (u.square().mean() + 1.2e-7).sqrt()
        return w[f"{name}.3.weight"] @ (u / (1 + (-u).exp()))

    size = jepa.chunk_size
    chunks = [x[at : at + size] for at in range(0, len(x) - size + 1, size)]
    latents = [two_maps("projector", sum(chunk) / size) for chunk in chunks]
    out, errors = [], []
    for n, chunk in enumerate(chunks):
        predicted = two_maps("predictor", latents[n - 1] if n else w["start"][0])
        errors.append((predicted - latents[n]).square().mean())
        out += [x_t + w["inject.weight"] @ predicted for x_t in chunk]
    return out + x[len(out) :], sum(errors) / max(len(errors), 1)


@pytest.mark.parametrize("length", [3, 4, 16, 22])
def test_the_head_equals_its_formulas_in_float64(length):
    model = jepa_model()
    x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1))
    got, latents, predicted = model.jepa(x)
    wanted = [reference_head(model.jepa, list(row.double())) for row in x]
    want = torch.stack([torch.stack(rows) for rows, _ in wanted])
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    if length >= 8:
        error, _ = model.jepa.losses(latents, predicted, auxiliary(model, 1.0).jepa)
        want = sum(error for _, error in wanted) / len(wanted)
        assert error.item() == pytest.approx(want.item(), rel=1e-5)


def test_the_loss_is_cross_entropy_plus_the_weighted_terms():
    model = jepa_model(jepa_sigreg_weight=0.25).train()
    ids, targets = some_ids(2, 2, 32)
    loss, terms = model.losses(ids, targets, auxiliary(model, 0.5))
    assert list(terms) == ["train_loss", "jepa_error", "jepa_sigreg"]
    nats, error, spread = terms.values()
    assert loss.item() == pytest.approx((nats + 0.5 * error + 0.125 * spread).item(), rel=1e-6)
    # The model called on ids and targets gives cross-entropy alone.
    assert model(ids, targets).item() == pytest.approx(nats.item(), rel=1e-6)
    loss, terms = model.losses(ids, targets, auxiliary(model, 0.0))
    assert list(terms) == ["train_loss"]
    assert loss.item() == terms["train_loss"].item() == pytest.approx(nats.item(), rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_losses_are_computed_only_where_they_are_learned_from(weight, monkeypatch):
    calls = []
    sigreg = tg.sigreg
    monkeypatch.setattr(tg, "sigreg", lambda *a: calls.append(1) or sigreg(*a))
    model, (ids, targets) = jepa_model(), some_ids(2, 2, 32)
    model(ids, targets)
    model.forward_logits(ids)
    assert not calls
    model.losses(ids, targets, auxiliary(model, weight))
    assert len(calls) == weight


# ---- Causality ----


def leaks(model: tg.GPT, length: int, changed_at: int) -> bool:
    """Whether a byte changes any logit before it."""
    ids = some_ids(1, length)
    other = ids.clone()
    other[0, changed_at] = 4 + (other[0, changed_at] + 77) % 256
    with torch.inference_mode():
        before, after = model.forward_logits(ids), model.forward_logits(other)
    assert not torch.equal(before[:, changed_at], after[:, changed_at])
    return not torch.equal(before[:, :changed_at], after[:, :changed_at])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [16, 32, 35])
def test_no_logit_sees_a_later_byte(length, training):
    model = jepa_model(jepa_backbone_grad=int(training)).train(training)
    assert not any(leaks(model, length, t) for t in range(1, length))


def test_an_injection_of_the_chunk_itself_would_be_caught():
    model = jepa_model().eval()
    # The latent of the next chunk in place of each: so the second predicts from its own.
    model.jepa.projector.register_forward_hook(lambda _, __, latents: latents.roll(-1, 1))
    caught = [t for t in range(1, 16) if leaks(model, 16, t)]
    assert caught == [t for t in range(4, 16) if t % 4]  # all but the first byte of a chunk


@pytest.mark.parametrize("stride", [4, 8, 20, 32])
def test_a_byte_changes_no_score_before_it_at_any_stride(stride, cpu):
    """Whole sliding evaluation: nats of the positions before the changed byte stay as they were."""
    model = jepa_model().eval()
    text = some_ids(120).int()

    def nats(val: torch.Tensor) -> torch.Tensor:
        """Of each position, by the windows that score it."""
        found = torch.full((len(val) - 1,), math.nan)
        windows = torch.cat(tg.plan_windows(len(val) - 1, 32, stride, 1, len(val))).tolist()
        for start, count in windows:
            ids = val[start : start + 33].long()
            logits = model.forward_logits(ids[None, :-1])[0]
            each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            found[start + 32 - count : start + 32] = each[-count:]
        return found

    with torch.inference_mode():
        before = nats(text)
        val = tg.Validation(text, BYTE_TABLE, canonical=False)
        result = score(tg.ScoringPass(model.forward_logits, 32, stride), val, cpu, 256)
        assert result.nats == pytest.approx(before.double().sum().item(), rel=1e-6)
        for t in (31, 32, 33, 64, 75, 76, 77, 119):
            other = text.clone()
            other[t] = 4 + (other[t] + 50) % 256
            after = nats(other)
            assert torch.equal(before[: t - 1], after[: t - 1])
            assert before[t - 1] != after[t - 1]


# ---- Who learns from what ----


def gradients(model: tg.GPT, weight: float) -> dict[str, torch.Tensor]:
    """Gradients by name; one that is absent is 0."""
    model.train().zero_grad()
    loss, _ = model.losses(*some_ids(2, 2, 32), auxiliary(model, weight))
    loss.backward()
    found = model.named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in found}


@pytest.mark.parametrize("form", ["published", "lejepa"])
def test_the_backbone_learns_from_cross_entropy_alone(form):
    model = jepa_model(jepa_sigreg=form)
    off, on = gradients(model, 0.0), gradients(model, 1.0)
    for name in off:
        if name.startswith("jepa.") and "inject" not in name:
            assert not off[name].any()
            assert on[name].any(), name
        else:
            assert off[name].any(), name
            assert torch.equal(off[name], on[name]), name


def test_the_backbone_learns_from_the_head_where_it_is_allowed_to():
    model = jepa_model(jepa_backbone_grad=1)
    off, on = gradients(model, 0.0), gradients(model, 1.0)
    names = [n for n in off if n.startswith("blocks.")]
    assert all(not torch.equal(off[name], on[name]) for name in names)
    assert torch.equal(off["jepa.inject.weight"], on["jepa.inject.weight"])


@pytest.mark.parametrize("form", ["published", "lejepa"])
def test_the_micro_batches_of_a_step_change_no_weight_of_sigreg(form, byte_corpus, cpu):
    """The same sequences in every part, so that only the number of rows tells the parts apart."""
    ids, targets = (x.repeat(8, 1) for x in some_ids(2, 2, 64))
    found = []
    for micro in (1024, 128):
        model = jepa_model(jepa_sigreg=form, micro_batch_tokens=micro, data_path=byte_corpus)
        steps = trainer(model, load(model.h), model.h, cpu)
        steps.optimizers.step = lambda *_: None
        terms = steps.take_step(tg.Phase(1.0, 0.9, 1.0, 0.0), ids, targets)
        found.append((terms, model.jepa.projector[0].weight.grad))
    (terms, grad), (terms_of_parts, grad_of_parts) = found
    torch.testing.assert_close(terms, terms_of_parts, atol=0, rtol=0.02)
    torch.testing.assert_close(grad, grad_of_parts, atol=0.02 * grad.abs().max().item(), rtol=0.1)


def weight_at(h: tg.Hyperparameters, step: int, seconds: float = 0.0) -> float:
    """Lambda of the JEPA losses at a step after some seconds of training."""
    return tg.schedule(tg.Progress(step, h.iterations, seconds, h.training_seconds), h).jepa_weight


def test_a_weight_of_zero_keeps_the_latents_random():
    """The control: an injection that learns to use random features."""
    h = settings(**JEPA, jepa_lambda_max=0)
    torch.manual_seed(0)
    model = tg.GPT(h)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = tg.Optimizers(model, h, tg.Ranks())
    for step in range(3):
        phase = tg.schedule(tg.Progress(step, h.iterations, 0.0, math.inf), h)
        inputs = tg.auxiliary_inputs(phase, h, step, torch.device("cpu"), tg.Ranks())
        model.losses(*some_ids(2, 2, 32), inputs)[0].backward()
        optimizers.step(phase)
    for name, p in model.named_parameters():
        frozen = name.startswith(("jepa.projector", "jepa.predictor", "jepa.start"))
        assert torch.equal(p, start[name]) == frozen, name


def test_phases():
    h = settings(**JEPA, iterations=9000, max_wallclock_seconds=600, jepa_lambda_max=0.001)
    assert [weight_at(h, step) for step in (0, 2699, 2700, 7200, 8999)] == [0.0] * 5
    assert weight_at(h, 4950) == pytest.approx(0.0005)
    assert weight_at(h, 7199) == pytest.approx(0.001, rel=1e-3)
    assert weight_at(h, 4950, 300.0) == pytest.approx(0.0005)  # the steps are further on
    assert weight_at(h, 4950, 590.0) == 0  # the seconds are
    assert weight_at(tg.replace(h, jepa_chunk_size=0), 4950) == 0


def test_phases_by_progress_survive_the_cap():
    """A run that the cap ends after a tenth of its ITERATIONS."""
    h = settings(**JEPA, iterations=9000, max_wallclock_seconds=600, jepa_lambda_max=1)
    weights = [weight_at(h, n, n * 600 / 900) for n in range(900)]
    assert not any(weights[:270])
    assert not any(weights[720:])
    assert weights[719] == pytest.approx(1, abs=0.01)
    assert weights[270:720] == sorted(weights[270:720])
    by_steps = tg.replace(h, max_wallclock_seconds=0)
    assert weight_at(by_steps, 4950, 1e6) == pytest.approx(0.5)


# ---- SIGReg ----


def reference_sigreg(z: torch.Tensor, directions: torch.Tensor, knots: int, form: str) -> float:
    """SIGReg from its definition, one direction and one knot at a time, in float64.

    LeJEPA's statistic is N times this.
    """
    z = z.double()
    if form == "published":
        z = torch.stack([(c - c.mean()) / max(c.std(), 1e-6) for c in z.T], dim=1)
    low, total = 0.2 if form == "published" else 0.0, 0.0
    for direction in directions.double().T:
        for k in range(knots):
            t = low + (3 - low) * k / (knots - 1)
            phi = sum(complex(math.cos(a), math.sin(a)) for a in (t * (z @ direction)).tolist())
            error = abs(phi / len(z) - math.exp(-t * t / 2)) ** 2
            if form == "published":
                total += error / knots
            else:
                dt = 3 / (knots - 1)
                edge = k in (0, knots - 1)
                total += (1 if edge else 2) * dt * math.exp(-t * t / 2) * error
    return total / directions.size(1)


def unit_columns(rows: int, columns: int) -> torch.Tensor:
    directions = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    return directions / directions.norm(dim=0)


@pytest.mark.parametrize("form", ["published", "lejepa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigreg_equals_its_definition(form, dtype):
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(200, 6, generator=generator) * 1.3 + 0.2).to(dtype)
    directions = unit_columns(6, 10)
    got = tg.sigreg(z, directions, 17, form)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(reference_sigreg(z, directions, 17, form), rel=1e-5)


def faults() -> dict[str, torch.Tensor]:
    """Samples [4096, 16] that a good SIGReg tells from N(0, I)."""
    z = torch.randn(4096, 16, generator=torch.Generator().manual_seed(3))
    correlated = z.clone()
    correlated[:, 8:] = 0.1 * z[:, 8:] + 0.995 * z[:, :8]
    return {
        "collapsed": torch.zeros_like(z) + 0.3,
        "shifted": z + 0.5,
        "scaled": 2 * z,
        "correlated": correlated,
    }


@pytest.mark.parametrize("form", ["published", "lejepa"])
def test_sigreg_tells_other_samples_from_normal_ones(form):
    directions = unit_columns(16, 256)
    normal = torch.randn(4096, 16, generator=torch.Generator().manual_seed(3))
    least = tg.sigreg(normal, directions, 17, form).item()
    scores = {name: tg.sigreg(z, directions, 17, form).item() for name, z in faults().items()}
    # The published form standardises, so it cannot see mean and scale.
    blind = {"shifted", "scaled"} if form == "published" else set()
    for name, distance in scores.items():
        if name in blind:
            assert distance == pytest.approx(least, rel=1e-3)
        else:
            assert distance >= 10 * least, name


def test_sigreg_of_equal_rows_has_a_finite_gradient():
    z = torch.full((8, 4), 0.5, requires_grad=True)
    tg.sigreg(z, unit_columns(4, 8), 17, "published").backward()
    assert z.grad.isfinite().all()


def test_directions_are_units_fixed_as_published_and_new_each_step_in_lejepa():
    for form, same in (("published", True), ("lejepa", False)):
        model = jepa_model(jepa_sigreg=form)
        drawn = [auxiliary(model, 1.0, step).jepa.directions for step in (0, 1, 0)]
        torch.testing.assert_close(drawn[0].norm(dim=0), torch.ones(tg.JEPA.DIRECTIONS))
        assert torch.equal(drawn[0], drawn[1]) == same
        assert torch.equal(drawn[0], drawn[2])  # by seed and step alone


def test_lejepa_multiplies_by_the_latents_of_the_whole_step():
    """TRAIN_BATCH_TOKENS / JEPA_CHUNK_SIZE of them, on any number of ranks."""
    model = jepa_model(jepa_sigreg="lejepa")
    inputs = auxiliary(model, 1.0).jepa
    assert inputs.latents.item() == 1024 / 4
    _, latents, predicted = model.jepa(torch.randn(2, 16, 32))
    _, spread = model.jepa.losses(latents, predicted, inputs)
    mean = tg.sigreg(latents.flatten(0, 1), inputs.directions, tg.JEPA.KNOTS, "lejepa")
    assert spread.item() == pytest.approx(256 * mean.item(), rel=1e-6)


# ---- Whole runs ----


def test_the_published_command_runs_smaller(byte_corpus, tmp_path):
    """Under torchrun, with sizes and steps reduced by further variables."""
    smaller = "NUM_LAYERS=2 MODEL_DIM=128 TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=512 ITERATIONS=6"
    env = os.environ | JEPA_COMMAND | dict(pair.split("=") for pair in smaller.split())
    env |= {"DATA_PATH": str(byte_corpus), "RUN_DIR": str(tmp_path / "run"), "EVAL_STRIDE": "32"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    subprocess.run([*launch, str(ROOT / "train_gpt.py")], env=env, cwd=tmp_path, check=True)
    result = tg.json.loads((tmp_path / "run/result.json").read_text())
    assert result["status"] == "ok"
    assert result["scores"].keys() == {"float", "plain", "sliding"}


def test_a_run_from_bytes_to_a_scored_artifact(byte_corpus, tmp_path):
    env = TINY | {k.upper(): str(v) for k, v in JEPA.items()}
    env |= {"DATA_PATH": str(byte_corpus), "RUN_DIR": str(tmp_path)}
    assert tg.main([], env | {"TRAIN_LOG_EVERY": "1"}) == 0
    log = (tmp_path / "train.log").read_text()
    steps = re.findall(r"^step:(\d+)/30 train_loss:\S+(.*) train_time", log, re.MULTILINE)
    assert [int(step) for step, _ in steps] == list(range(1, 31))
    learned = [int(step) for step, terms in steps if "jepa_error:" in terms]
    assert learned == list(range(11, 25))  # the first step, 9 of 30, has a weight of 0
    result = tg.json.loads((tmp_path / "result.json").read_text())
    _, weights = tg.load_artifact(tmp_path / "final_model.int6.ptz", tg.Hyperparameters())
    assert any(name.startswith("jepa.") for name in weights)
    float_bpb, artifact_bpb = (result["scores"][k]["val_bpb"] for k in ("float", "plain"))
    assert artifact_bpb == pytest.approx(float_bpb, abs=0.05)
    # Scored again it is the same, with no JEPA variable set.
    assert tg.main(["--eval", str(tmp_path / "final_model.int6.ptz")], env) == 0
