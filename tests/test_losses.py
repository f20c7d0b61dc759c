"""What training adds to cross-entropy, and that no score contains it."""

import pytest
import torch
from conftest import BYTE_TABLE, randomize, score, settings

import train_gpt as tg


def random_model(**changes: object) -> tg.GPT:
    torch.manual_seed(0)
    return randomize(tg.GPT(settings(**changes)))


def some_ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(4))


# ---- Label smoothing ----


def test_smoothing_equals_its_formula_in_float64():
    model, (ids, targets) = random_model(label_smoothing=0.1).train(), some_ids(2, 2, 32)
    log_p = model.forward_logits(ids).double().log_softmax(-1)
    of_target = -log_p.gather(-1, targets.unsqueeze(-1)).mean()
    want = 0.9 * of_target - 0.1 * log_p.mean()
    assert model(ids, targets).item() == pytest.approx(want.item(), rel=1e-6)
    assert model.eval()(ids, targets).item() == pytest.approx(of_target.item(), rel=1e-6)


# ---- No score contains any of it ----

TWO_ROWS = {"train_batch_tokens": 128}  # a step of two sequences of 64 tokens
HEAD = {"jepa_chunk_size": 4, "jepa_latent_dim": 8, "jepa_proj_hidden": 8, "jepa_lambda_max": 0}
LOSSES = {
    "smoothing": {"label_smoothing": 0.2},
    "jepa": {"jepa_lambda_max": 1},
    "stp": {"stp_enabled": 1, "stp_lambda": 1},
}


def training_loss(model: tg.GPT, ids: torch.Tensor, targets: torch.Tensor) -> float:
    """The loss of a training step, with the auxiliary losses of the settings at their peak."""
    phase = tg.programs(model.h)[-1]
    auxiliary = tg.auxiliary_inputs(phase, model.h, 0, ids.device, tg.Ranks())
    with torch.no_grad():
        return model.train().losses(ids, targets, auxiliary)[0].item()


@pytest.mark.parametrize("name", LOSSES)
def test_a_training_loss_changes_training_and_no_score(name, cpu):
    off = random_model(**HEAD, **TWO_ROWS)
    on = tg.GPT(settings(**{**HEAD, **TWO_ROWS, **LOSSES[name]}))
    on.load_state_dict(off.state_dict())
    ids, targets = some_ids(2, 2, 64)
    val = tg.Validation(some_ids(500).int(), BYTE_TABLE, canonical=False)
    learned, scored, logits = [], [], []
    for model in (off, on):
        learned.append(training_loss(model, ids, targets))
        model.eval()
        with torch.no_grad():
            loss, terms = model.losses(ids, targets)
            logits.append(model.forward_logits(ids))
        nats = score(tg.ScoringPass(model.forward_logits, 64, 16), val, cpu).nats
        assert list(terms) == ["train_loss"]
        scored.append((loss.item(), terms["train_loss"].item(), model(ids, targets).item(), nats))
    assert learned[0] != learned[1]
    assert scored[0] == scored[1]
    assert torch.equal(*logits)
