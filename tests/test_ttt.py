"""Test-time training: a token is scored before anything learns from it, once, and for good."""

import math

import pytest
import torch
from conftest import BYTE_TABLE, artifact_of, byte_tokens, randomize, score_artifact, settings

import train_gpt as tg

CHANGES = {"eval_seq_len": 16, "ttt_enabled": 1, "ttt_chunk_tokens": 64, "val_batch_size": 8 * 48}
HONEST = tg.TestTimeLearner


def trained(**changes: object) -> tuple[tg.Hyperparameters, tg.GPT]:
    """Settings and a model with every parameter away from its start."""
    h = settings(**{**CHANGES, "train_seq_len": 16, "num_layers": 2, **changes})
    torch.manual_seed(0)
    return h, randomize(tg.GPT(h)).eval()


def some_text(count: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 260, (count,), generator=torch.Generator().manual_seed(seed)).int()


def score(h, model, val, cpu, stride, learner=HONEST, monkeypatch=None, calls=None) -> torch.Tensor:
    """Nats of every position of a text, as they are summed, and the calls of learn."""
    found = torch.full((len(val) - 1,), math.nan)
    cross_entropy, plan = torch.nn.functional.cross_entropy, tg.plan_windows
    batches = []

    def planned(*arguments):
        batches.extend(plan(*arguments))
        return list(batches)

    def kept(logits, targets, reduction="mean", **more):
        nats = cross_entropy(logits, targets, reduction=reduction, **more)
        if reduction == "none":  # that of scoring alone
            batch = batches.pop(0)
            for (start, count), row in zip(batch.tolist(), nats.view(len(batch), -1), strict=True):
                end = start + 16
                assert found[end - count : end].isnan().all()  # never scored twice
                found[end - count : end] = row[len(row) - count :]
        return nats

    learning = learner(model, h, cpu, tg.Ranks())
    learn = learning.learn

    def told(tokens, fraction):
        if calls is not None:
            calls.append((tokens.clone(), fraction, int((~found.isnan()).sum())))
        learn(tokens, fraction)

    learning.learn = told
    scoring_pass = tg.ScoringPass(model.forward_logits, 16, stride, learning)
    with monkeypatch.context() as patch:
        patch.setattr(tg.F, "cross_entropy", kept)
        patch.setattr(tg, "plan_windows", planned)
        text = tg.Validation(val, BYTE_TABLE, canonical=False)
        result = tg.score(scoring_pass, text, tg.Ranks(), cpu, tg.Log(), 48)
    assert not found.isnan().any()  # every position is scored
    assert result.nats == pytest.approx(found.double().sum().item(), rel=1e-6)
    return found


@pytest.mark.parametrize("stride", [16, 8, 5, 3])
def test_only_scored_tokens_are_learned_from(stride, cpu, monkeypatch):
    h, model = trained()
    val, calls = some_text(), []
    score(h, model, val, cpu, stride, monkeypatch=monkeypatch, calls=calls)
    assert len(calls) == 4  # 299 positions: four whole chunks, and the rest, which comes last
    for n, (tokens, done, scored) in enumerate(calls):
        assert torch.equal(tokens, val[64 * n : 64 * n + 65])
        assert scored >= 64 * (n + 1)  # its last target too
        assert done == pytest.approx(64 * n / 299)


@pytest.mark.fault(55)
@pytest.mark.parametrize("every", [0, 2, 7, 64])
def test_documents_without_bos_and_a_bos_at_the_end_are_learned_from(every, cpu, monkeypatch):
    """Chunks are cut by count; where a document starts changes nothing."""
    h, model = trained()
    val, calls = some_text(), []
    if every:
        val[::every] = val[-1] = 1
    score(h, model, val, cpu, 5, monkeypatch=monkeypatch, calls=calls)
    assert [torch.equal(c[0], val[64 * n : 64 * n + 65]) for n, c in enumerate(calls)] == [True] * 4
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_whole_last_chunk_is_not_learned_from(cpu, monkeypatch):
    h, model = trained()
    calls = []
    score(h, model, some_text(257), cpu, 8, monkeypatch=monkeypatch, calls=calls)
    assert len(calls) == 3  # of four whole chunks


def changed_scores(stride, cpu, monkeypatch, learner=HONEST) -> list[int]:
    """Changed tokens that change a score of a position before them."""
    h, model = trained(ttt_lr=0.05, ttt_epochs=1)
    start = {name: p.clone() for name, p in model.state_dict().items()}
    val, early = some_text(257), []
    before = score(h, model, val, cpu, stride, learner, monkeypatch)
    for t in (1, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 199):
        model.load_state_dict(start)
        other = val.clone()
        other[t] = 4 + (other[t] + 77) % 256
        after = score(h, model, other, cpu, stride, learner, monkeypatch)
        assert before[t - 1] != after[t - 1]
        if not torch.equal(before[: t - 1], after[: t - 1]):
            early.append(t)
        if t < 128 and learner is HONEST:  # and learning does carry it on, far beyond a window
            assert not torch.equal(before[200:], after[200:])
    return early


@pytest.mark.parametrize("stride", [16, 8, 5])
def test_a_token_changes_no_score_before_it(stride, cpu, monkeypatch):
    assert not changed_scores(stride, cpu, monkeypatch)


def test_learning_before_scoring_would_be_caught(cpu, monkeypatch):
    """A learner that takes the next chunk instead of the scored one."""
    texts, honest_score = [], tg.score

    def noting(scoring_pass, val, *arguments):
        texts.append(val.tokens)
        return honest_score(scoring_pass, val, *arguments)

    class Cheat(HONEST):
        def learn(self, tokens, fraction):
            begin = round(fraction * (len(texts[-1]) - 1)) + 64
            super().learn(texts[-1][begin : begin + 65], fraction)

    monkeypatch.setattr(tg, "score", noting)
    assert changed_scores(8, cpu, monkeypatch, Cheat) == [100, 127, 128, 199]


@pytest.mark.parametrize("stride", [16, 5])
def test_scores_of_a_chunk_know_nothing_of_later_tokens(stride, cpu, monkeypatch):
    """Bit for bit the same when all that follows is another text of the same length."""
    h, model = trained(ttt_lr=0.05)
    start = {name: p.clone() for name, p in model.state_dict().items()}
    val = some_text(300)
    before = score(h, model, val, cpu, stride, monkeypatch=monkeypatch)
    for chunk in range(4):
        model.load_state_dict(start)
        end = 64 * (chunk + 1)
        other = torch.cat((val[: end + 1], some_text(300, seed=9)[end + 1 :]))
        after = score(h, model, other, cpu, stride, monkeypatch=monkeypatch)
        assert torch.equal(before[:end], after[:end])
        assert not torch.equal(before[end:], after[end:])


def test_every_parameter_learns(cpu):
    h, model = trained()
    before = {name: p.clone() for name, p in model.named_parameters()}
    HONEST(model, h, cpu, tg.Ranks()).learn(some_text(65), 0.0)
    same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not same


def test_it_learns_by_sgd_with_momentum_on_half_a_cosine(cpu):
    """One sequence, two epochs: the update by its formula, the gradient clipped to norm 1."""
    h, model = trained(ttt_epochs=2, ttt_lr=0.1, label_smoothing=0.5)
    _, twin = trained()
    tokens, done = some_text(17), 0.25
    HONEST(model, h, cpu, tg.Ranks()).learn(tokens, done)
    rate, momenta = 0.1 * (1 + math.cos(math.pi * done)) / 2, {}
    ids = tokens.long()
    for _ in range(2):
        logits = twin.forward_logits(ids[None, :-1])[0]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:])  # not smoothed
        grads = torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True)
        grads = [torch.zeros(1) if g is None else g for g in grads]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        assert norm > 1  # so that clipping is seen
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(twin.parameters(), grads, strict=True)):
                momenta[i] = 0.9 * momenta.get(i, 0) + g / norm
                p -= rate * momenta[i]
    for p, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, want, atol=1e-5, rtol=1e-4)


def test_it_helps_on_text_that_repeats_and_leaves_the_artifact_as_it_was(cpu, tmp_path):
    h = settings(**CHANGES, train_seq_len=16, eval_stride=8, ttt_lr=0.3)
    torch.manual_seed(0)
    path = tmp_path / "a.ptz"
    path.write_bytes(artifact_of(tg.GPT(h))[0])
    before = path.read_bytes()
    text = byte_tokens("all work and no play makes Jack a dull boy. " * 30)
    val = tg.Validation(torch.tensor(text).int(), BYTE_TABLE, canonical=False)
    scores = score_artifact(path, h, val, cpu, tg.Log(tmp_path))
    assert scores.keys() == {"plain", "sliding", "ttt"}
    assert scores["ttt"]["tokens"] == scores["plain"]["tokens"] == len(text) - 1
    assert scores["ttt"]["val_bpb"] < scores["sliding"]["val_bpb"] - 0.5
    assert path.read_bytes() == before
    log = (tmp_path / "train.log").read_text()
    assert f"legal_ttt_exact val_loss:{scores['ttt']['val_loss']:.8f}" in log
    assert f"final_int8_zlib_roundtrip_exact val_loss:{scores['ttt']['val_loss']:.8f}" in log
    off = score_artifact(path, tg.replace(h, ttt_enabled=False), val, cpu, tg.Log())
    for name, of in off.items():
        assert of | {"seconds": 0} == scores[name] | {"seconds": 0}
