"""What training adds to cross-entropy, STP, smoothing, late QAT, and that no score knows of it."""

import math
from pathlib import Path

import pytest
import torch
from conftest import BYTE_TABLE, compile_counted, randomize, settings

import train_gpt as tg


def made(**changes: object) -> tg.GPT:
	torch.manual_seed(0)
	return randomize(tg.GPT(settings(**changes)))


def some_ids(*shape: int) -> torch.Tensor:
	return torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(4))


# ---- STP ----


def at_positions(monkeypatch, chosen: list[tuple[int, int, int]]) -> None:
	"""Let bend draw these positions, one triplet a sequence."""

	def rand(shape, device=None):
		drawn = torch.linspace(0, 0.5, shape[1]).repeat(shape[0], 1)
		for row, triplet in zip(drawn, chosen, strict=True):
			row[list(triplet)] = torch.tensor([0.7, 0.9, 0.8])
		return drawn

	monkeypatch.setattr(torch, "rand", rand)


def test_stp_equals_its_formula_in_float64(monkeypatch):
	x = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
	chosen = [(0, 1, 2), (4, 11, 19), (3, 17, 18)]
	at_positions(monkeypatch, chosen)
	want = 0.0
	for row, (s, r, t) in zip(x.double(), chosen, strict=True):
		a, b = row[t] - row[r], row[r] - row[s]
		want += (1 - (a @ b / a.norm() / b.norm()).item()) / 3
	assert tg.bend(x).item() == pytest.approx(want, rel=1e-5)
	assert tg.bend(x.bfloat16()).dtype == torch.float32


def test_stp_draws_every_ordered_triplet():
	x = torch.arange(5.0).square().view(1, 5, 1) * torch.tensor([0.0, 1.0])
	x[..., 0] = torch.arange(5.0)
	torch.manual_seed(0)
	seen = {round(tg.bend(x).item(), 5) for _ in range(400)}
	triplets = [(s, r, t) for t in range(5) for r in range(t) for s in range(r)]
	values = set()
	for s, r, t in triplets:
		a, b = x[0, t] - x[0, r], x[0, r] - x[0, s]
		values.add(round(1 - (a @ b / a.norm() / b.norm()).item(), 5))
	assert max(min(abs(v - w) for w in values) for v in seen) < 1e-4
	assert max(min(abs(v - w) for v in seen) for w in values) < 1e-4


def test_a_straight_path_has_no_stp_and_a_reversed_one_2():
	steps = torch.arange(12.0).view(1, 12, 1)
	assert tg.bend(steps * torch.randn(2, 1, 8)).item() == pytest.approx(0, abs=1e-5)
	there_and_back = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1) * torch.ones(8)
	assert tg.bend(there_and_back).item() == pytest.approx(2, abs=1e-5)


def test_stp_of_equal_states_is_finite_with_its_gradient():
	x = torch.ones(2, 6, 4, requires_grad=True)
	loss = tg.bend(x)
	loss.backward()
	assert loss.isfinite()
	assert x.grad.isfinite().all()


def test_stp_enters_the_loss_by_its_weight_and_teaches_the_backbone():
	model = made(stp_enabled=1, stp_lambda=0.5).train()
	torch.manual_seed(3)
	loss, terms = model.losses(*some_ids(2, 2, 32))
	assert list(terms) == ["train_loss", "stp"]
	assert 0 < terms["stp"] < 2
	want = terms["train_loss"] + 0.5 * terms["stp"]
	assert loss.item() == pytest.approx(want.item(), rel=1e-6)
	terms["stp"].backward()
	for name, p in model.named_parameters():
		learns = name.startswith("blocks.") and name.endswith("weight")
		assert not learns or (p.grad is not None and p.grad.any()), name


# ---- Label smoothing ----


def test_smoothing_equals_its_formula_in_float64():
	model, (ids, targets) = made(label_smoothing=0.1).train(), some_ids(2, 2, 32)
	log_p = model.forward_logits(ids).double().log_softmax(-1)
	of_target = -log_p.gather(-1, targets.unsqueeze(-1)).mean()
	want = 0.9 * of_target - 0.1 * log_p.mean()
	assert model(ids, targets).item() == pytest.approx(want.item(), rel=1e-6)
	assert model.eval()(ids, targets).item() == pytest.approx(of_target.item(), rel=1e-6)


# ---- No score knows of any of it ----

LOSSES = {
	"smoothing": {"label_smoothing": 0.2},
	"stp": {"stp_enabled": 1, "stp_lambda": 1},
	"jepa": {"jepa_lambda_max": 1, "jepa_backbone_grad": 1},
	"qat": {"late_qat_threshold": 1},
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_training_loss_changes_training_and_no_score(name, cpu):
	head = {"jepa_chunk_size": 4, "jepa_latent_dim": 8, "jepa_proj_hidden": 8}
	off = made(**head, jepa_lambda_max=0)
	on = tg.GPT(settings(**{**head, "jepa_lambda_max": 0, **LOSSES[name]}))
	on.load_state_dict(off.state_dict())
	ids, targets = some_ids(2, 2, 64)
	data = tg.Data(some_ids(500).int(), BYTE_TABLE, None)
	found = []
	for model in (off, on):
		h = model.h
		model.prepare(h.jepa_lambda_max, h.late_qat_threshold > 0, 0)
		with torch.no_grad():
			learned = model.train()(ids, targets).item()
			model.eval()
			loss, terms = model.losses(ids, targets)
			logits = model.forward_logits(ids)
		score = tg.evaluate(model.forward_logits, data, h, cpu, tg.Log(), stride=16)
		assert list(terms) == ["train_loss"]
		found.append((learned, loss.item(), terms["train_loss"].item(), score.nats, logits))
	assert found[0][0] != found[1][0]
	assert found[0][1:4] == found[1][1:4]
	assert torch.equal(found[0][4], found[1][4])


# ---- Late QAT ----


def rounded(model: tg.GPT) -> tg.GPT:
	"""A copy whose block matrices are rounded to 63 levels of their row's largest weight."""
	copy = tg.GPT(model.h)
	copy.load_state_dict(model.state_dict())
	roles = tg.parameter_roles(model)
	with torch.no_grad():
		for name, p in copy.named_parameters():
			if roles[name] == "matrix":
				scale = p.double().abs().max(dim=1, keepdim=True).values / 31
				p.copy_(((p.double() / scale).round() * scale).float())
	return copy


def gradients(model: tg.GPT, ids: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
	model.zero_grad()
	model(ids, targets).backward()
	return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_late_qat_runs_on_rounded_weights_and_moves_the_true_ones():
	model, (ids, targets) = made().train(), some_ids(2, 2, 32)
	twin = rounded(model).train()
	as_it_is = model(ids, targets).item()
	model.prepare(0.0, True, 0)
	assert model(ids, targets).item() == pytest.approx(twin(ids, targets).item(), rel=1e-5)
	assert abs(model(ids, targets).item() - as_it_is) > 1e-4
	# Straight through: the gradient at the rounded weights, given to those that are not.
	for got, want in zip(
		gradients(model, ids, targets), gradients(twin, ids, targets), strict=True
	):
		torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)
	model.prepare(0.0, False, 0)
	assert model(ids, targets).item() == as_it_is


@pytest.mark.fault(41)
def test_late_qat_of_rows_of_zeros_is_finite():
	model = made().train()
	with torch.no_grad():
		model.blocks[0].attn.proj.weight.zero_()
	model.prepare(0.0, True, 0)
	assert all(g.isfinite().all() for g in gradients(model, *some_ids(2, 2, 32)))


def test_late_qat_is_two_programs_and_none_is_folded_away():
	model, (ids, targets) = made().train(), some_ids(2, 2, 32)
	losses_of, compiled = compile_counted(model.losses)
	losses = []
	for step, rounds in enumerate((False, False, True, True, False, True)):
		model.prepare(0.0, rounds, step)
		losses.append(losses_of(ids, targets)[0].item())
	assert len(compiled) == 2
	assert losses[0] == losses[1] == losses[4]
	assert losses[2] == losses[3] == losses[5]
	assert losses[0] == pytest.approx(model.eval()(ids, targets).item(), rel=1e-5)
	assert losses[2] == pytest.approx(rounded(model)(ids, targets).item(), rel=1e-5)
	assert abs(losses[2] - losses[0]) > 1e-4


@pytest.mark.parametrize(("threshold", "first"), [(0, math.inf), (0.5, 16), (1, 11)])
def test_training_rounds_below_the_threshold(threshold, first, byte_corpus: Path, cpu, monkeypatch):
	"""The rate falls from 1 to 0 in the last 10 of 20 steps; step 11 is the first below 1."""
	h = settings(
		data_path=byte_corpus,
		iterations=20,
		warmdown_iters=10,
		late_qat_threshold=threshold,
		num_layers=1,
	)
	model, seen = tg.GPT(h), []
	train_step = tg.train_step

	def noting(*arguments):
		seen.append((arguments[4], model.blocks[0].mlp.up.rounds, model.training))
		return train_step(*arguments)

	monkeypatch.setattr(tg, "train_step", noting)
	tg.train(model, tg.load_data(h, tg.Log()), h, cpu, tg.Log())
	assert [rounds for _, rounds, _ in seen] == [n >= first for n in range(20)]
	assert [rounds for _, rounds, _ in seen] == [scale < threshold for scale, _, _ in seen]
	assert all(training for _, _, training in seen)
