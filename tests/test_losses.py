"""What training adds to cross-entropy, and that no score knows of it."""

import pytest
import torch
from conftest import BYTE_TABLE, randomize, settings

import train_gpt as tg


def made(**changes: object) -> tg.GPT:
    torch.manual_seed(0)
    return randomize(tg.GPT(settings(**changes)))


def some_ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(4))


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
    "jepa": {"jepa_lambda_max": 1, "jepa_backbone_grad": 1},
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
        model.prepare(h.jepa_lambda_max, 0)
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
