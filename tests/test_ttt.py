"""Test-time training by SGD. That it learns from scored text only stands in test_evaluate.py."""

import math

import torch
from conftest import BYTE_TABLE, byte_tokens, score, settings
from test_model import random_model, some_ids

import train_gpt as tg

CHANGES = {"num_layers": 2, "train_seq_len": 16, "ttt_enabled": 1, "ttt_chunk_tokens": 64}


def test_it_learns_by_sgd_with_momentum_at_half_a_cosine(cpu):
    """One sequence, two epochs: the update by its formula, the gradient clipped to norm 1."""
    model = random_model(**CHANGES, ttt_epochs=2, ttt_lr=0.1, label_smoothing=0.5)
    twin, ids = random_model(**CHANGES), some_ids(17)
    tg.TestTimeLearner(model, model.h, cpu, tg.Ranks()).learn(ids, 0.25)
    rate, momenta = 0.1 * (1 + math.cos(math.pi / 4)) / 2, [0.0] * 100
    params, ids = list(twin.parameters()), ids.long()
    for _ in range(2):
        logits = twin.forward_logits(ids[None, :-1])[0]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:])  # not smoothed
        grads = torch.autograd.grad(loss, params)
        norm = torch.cat([g.double().flatten() for g in grads]).norm().item()
        assert norm > 1  # so that clipping shows
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            momenta[i] = 0.9 * momenta[i] + g / norm
            p.data -= rate * momenta[i]
    for p, want in zip(model.parameters(), params, strict=True):
        torch.testing.assert_close(p, want, atol=1e-5, rtol=1e-4)


def test_it_helps_on_text_that_repeats(cpu):
    torch.manual_seed(0)
    h = settings(**CHANGES, eval_stride=8, ttt_lr=0.3)
    model = tg.GPT(h).eval()
    text = torch.tensor(byte_tokens("all work and no play makes Jack a dull boy. " * 20)).int()
    val = tg.Validation(text, BYTE_TABLE, canonical=False)
    learner = tg.TestTimeLearner(model, h, cpu, tg.Ranks())
    without = score(tg.sliding_pass(model.forward_logits, h), val, cpu)
    learned = score(tg.sliding_pass(model.forward_logits, h, learner), val, cpu, 48)
    assert learned.tokens == without.tokens == len(text) - 1
    assert learned.val_bpb < without.val_bpb - 0.5
