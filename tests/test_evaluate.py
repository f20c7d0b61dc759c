"""Scoring: every position once by every pass, equal to float64, causal; bytes by the text."""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BYTE_TABLE,
    artifact_of,
    byte_tokens,
    randomize,
    score,
    score_artifact,
    settings,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_model import random_model, some_ids
from torch.nn.attention import current_flash_attention_impl

import train_gpt as tg

CPU = tg.Device(torch.device("cpu"), torch.float32, compiled=False)  # for tests with @given
WINDOW = 12
TOKENS = byte_tokens("One document: naïve, é, ü, 日本. " * 5) + byte_tokens("And another. " * 8)
few_examples = hypothesis_settings(max_examples=40, derandomize=True, deadline=None)


def val_of(tokens: list[int] | torch.Tensor) -> tg.Validation:
    return tg.Validation(torch.as_tensor(tokens).int(), BYTE_TABLE, canonical=False)


class Recorder:
    """Nats of each position of a text, from the logits of a pass.

    The windows are found by their tokens, so no part of the text may repeat itself. A window scores
    the positions past the end of the window before.
    """

    def __init__(self, scoring_pass: tg.ScoringPass, tokens: torch.Tensor) -> None:
        self.given, self.tokens = scoring_pass, tokens
        self.nats = torch.full((len(tokens) - 1,), math.nan)
        self.shapes: set[torch.Size] = set()  # of the batches
        self.ends = [0]  # of the windows that scored, and where the first one begins to
        self.first_windows = 0  # that scored in the first batch

    def forward_logits(self, ids: torch.Tensor, last: int) -> torch.Tensor:
        """Records the logits of a batch."""
        logits = self.given.forward_logits(ids, last)
        self.shapes.add(ids.shape)
        starts = self.tokens.unfold(0, ids.size(1), 1)
        for row, of_row in zip(ids, logits, strict=True):
            (start,) = (starts == row).all(1).nonzero().flatten().tolist()
            end, done = start + ids.size(1), self.ends[-1]
            if end > done:
                targets = self.tokens[done + 1 : end + 1]
                nats = F.cross_entropy(of_row[done - end :], targets, reduction="none")
                self.nats[done:end] = nats
                self.ends.append(end)
        self.first_windows = self.first_windows or len(self.ends) - 1
        return logits

    def score(self, device: tg.Device, batch_tokens: int = 96) -> tg.Score:
        """Scores the text by the pass; the sum must be that of the recorded nats."""
        recorded = self.given._replace(forward_logits=self.forward_logits)
        result = score(recorded, val_of(self.tokens), device, batch_tokens)
        assert self.ends[-1] == result.tokens == len(self.tokens) - 1
        assert result.nats == pytest.approx(self.nats.double().sum().item(), rel=1e-6)
        return result


class NotingLearner(tg.TestTimeLearner):
    """Notes what it is given to learn, and how many positions are scored by then."""

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens, self.learned, self.calls = chunk_tokens, 0, []
        self.recorder: Recorder

    def learn(self, tokens: torch.Tensor, fraction: float) -> None:
        self.calls.append((tokens.long(), fraction, self.recorder.ends[-1]))


# ---- Windows ----


@pytest.mark.fault(56)
@hypothesis_settings(max_examples=100, derandomize=True, deadline=None)
@given(
    total=st.integers(1, 255),
    seq_len=st.integers(1, 64),
    stride=st.integers(1, 64),
    batch_tokens=st.integers(1, 500),
    longer=st.integers(0, 200),
)
def test_every_position_is_scored_once_and_then_learned_from(
    total, seq_len, stride, batch_tokens, longer
):
    """With any windows; the learner gets every chunk of the text but those that end it."""
    generator = torch.Generator().manual_seed(0)
    tokens = 4 + torch.randperm(256, generator=generator)[: total + 1]  # all different
    table = torch.randn(260, 260, generator=generator)
    learner = NotingLearner(chunk_tokens=seq_len + longer)
    scoring_pass = tg.ScoringPass(
        lambda ids, last: table[ids[:, ids.size(1) - last :]], seq_len, stride, learner
    )
    learner.recorder = recorder = Recorder(scoring_pass, tokens)
    result = recorder.score(CPU, batch_tokens)
    seq_len = min(seq_len, total)
    stride = min(stride, seq_len)
    assert recorder.ends == [0, *range(seq_len, total, stride), total]
    assert len(recorder.shapes) == 1  # one shape, so one compiled program for the windows
    assert recorder.shapes.pop()[0] <= max(batch_tokens // seq_len, 1)
    assert stride == seq_len or recorder.first_windows == 1  # it needs more logits than others
    assert (result.stride, result.bytes) == (stride, total)
    assert result.val_loss == pytest.approx(result.nats / total)
    assert result.val_bpb == pytest.approx(result.nats / math.log(2) / total)
    chunk = learner.chunk_tokens
    assert len(learner.calls) == recorder.ends[-2] // chunk
    for n, (learned, fraction, scored) in enumerate(learner.calls):
        assert torch.equal(learned, tokens[chunk * n : chunk * (n + 1) + 1])
        assert scored >= chunk * (n + 1)  # its last target too
        assert fraction == pytest.approx(chunk * n / total)


@pytest.mark.fault(55, 56)
@few_examples
@given(
    tokens=st.lists(st.sampled_from((1, 1, 50, 60)), min_size=2, max_size=90).filter(
        lambda tokens: any(tokens[1:])
    ),
    stride=st.integers(1, 64),
)
def test_uniform_logits_score_the_logarithm_of_the_vocabulary_on_any_stream(tokens, stride):
    """Whatever BOS is where, and with windows that nothing fills or no stride divides."""
    if tokens[1:].count(1) == len(tokens) - 1:
        tokens = [*tokens, 50]  # a text without bytes has no bits per byte
    uniform = tg.ScoringPass(lambda ids, last: torch.zeros(len(ids), last, 260), 64, stride)
    result = score(uniform, val_of(tokens), CPU)
    assert result.tokens == len(tokens) - 1
    assert result.bytes == sum(t >= 4 for t in tokens[1:])
    assert result.val_loss == pytest.approx(math.log(260), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "seq_len", "stride"),
    [
        ({"eval_stride": 0}, 64, 64),
        ({"eval_stride": 1000}, 64, 64),
        ({"eval_seq_len": 128, "eval_stride": 48}, 128, 48),
    ],
)
def test_settings_choose_window_and_stride(changes, seq_len, stride):
    h = settings(**changes)
    assert (h.window_tokens, h.stride_tokens) == (seq_len, stride)


@pytest.mark.parametrize(("kind", "tokens"), [("cpu", 4096), ("cuda", 65_536)])
def test_a_gpu_scores_an_eighth_of_the_batch_and_a_cpu_what_its_caches_hold(kind, tokens):
    device = tg.Device(torch.device(kind), torch.float32, compiled=False)
    h = tg.Hyperparameters()
    assert tg.scoring_batch_tokens(h, device) == tokens
    assert tg.scoring_batch_tokens(tg.replace(h, val_batch_size=800), device) == 100
    less = tg.replace(h, micro_batch_tokens=10_000)  # no more than training holds
    assert tg.scoring_batch_tokens(less, device) == min(tokens, 10_000)


@pytest.mark.fault(34)
def test_a_diverged_model_has_no_score(cpu):
    diverged = tg.ScoringPass(lambda ids, last: torch.full((len(ids), last, 260), math.nan), 64, 64)
    with pytest.raises(tg.DivergenceError, match="the score is not finite"):
        score(diverged, val_of(TOKENS), cpu)


# ---- Causality of every pass ----


def sliding(
    model: tg.GPT, h: tg.Hyperparameters, learner: tg.TestTimeLearner | None = None
) -> tg.ScoringPass:
    """The sliding pass of some settings."""
    return tg.ScoringPass(model.forward_logits, h.window_tokens, h.stride_tokens, learner)


def make_pass(kind: str, model: tg.GPT, h: tg.Hyperparameters, cpu: tg.Device) -> tg.ScoringPass:
    """A pass over windows of 32 tokens, or with an attention window of 12."""
    if kind == "plain":
        return tg.ScoringPass(model.forward_logits, 32, 32)
    if kind == "one pass":
        return tg.one_pass(model, WINDOW, cpu)
    if kind == "documents":
        return tg.by_document(model, h, cpu)
    if kind == "lora":
        return tg.with_adapters(model, h, cpu, tg.Ranks(), tg.Log(silent=True))
    learner = tg.TestTimeLearner(model, h, cpu, tg.Ranks()) if "ttt" in kind else None
    h = tg.replace(h, eval_stride=int(kind.split()[-1]))
    return sliding(model, h, learner)


@pytest.mark.parametrize("kind", ["plain", "sliding 20", "one pass", "ttt 32", "ttt 5"])
def test_a_token_changes_no_score_before_it(kind, cpu):
    """With all features; bit for bit. Test-time training carries its influence on."""
    h = settings(eval_seq_len=32, jepa_chunk_size=4, ttt_chunk_tokens=64, ttt_epochs=1, ttt_lr=0.05)
    h = tg.replace(h, num_layers=2, jepa_latent_dim=8, jepa_proj_hidden=8)
    model = randomize(tg.GPT(h)).eval()
    start = {name: p.clone() for name, p in model.state_dict().items()}
    text = some_ids(200)

    def nats(tokens: torch.Tensor) -> torch.Tensor:
        model.load_state_dict(start)
        recorder = Recorder(make_pass(kind, model, h, cpu), tokens)
        recorder.score(cpu)
        return recorder.nats

    before = nats(text)
    for t in (1, 32, 33, 64, 65, 129, 199):
        other = text.clone()
        other[t] = 4 + (other[t] + 77) % 256
        after = nats(other)
        assert torch.equal(before[: t - 1], after[: t - 1]), t
        assert before[t - 1] != after[t - 1]
        if t < 64:
            carried = not torch.equal(before[150:], after[150:])
            assert carried == ("ttt" in kind)


# ---- Attention over a window, and the pass that reads the text once ----


def attend_over(window: int):
    """Attention to the last `window` positions, from its definition."""

    def attend(q, k, v, **_):
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.size(3))
        at = torch.arange(q.size(1))
        distance = at[:, None] - at
        seen = (distance >= 0) & (distance < window)
        share = scores.masked_fill(~seen, -math.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", share, v)

    return attend


@few_examples
@given(sequences=st.integers(1, 3), length=st.integers(1, 70), window=st.integers(1, 40))
def test_attention_in_blocks_equals_attention_over_the_window(sequences, length, window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sequences, length, heads, 4, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    got = tg.attend_sdpa(q, k, v, window=window)
    torch.testing.assert_close(got, attend_over(window)(q, k, v), atol=1e-12, rtol=1e-12)


def test_attention_in_blocks_compiles_whole_and_for_the_fast_kernels():
    """The kernels need the width of a head to lie together, or all scores are written to memory."""
    qkv, strides = [torch.randn(3, 96, heads, 8) for heads in (4, 2, 2)], []

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            if "scaled_dot_product" in str(node.target) and len(node.args) == 4:
                strides.extend(x.meta["example_value"].stride(-1) for x in node.args[:3])
        return graph

    torch.compiler.reset()
    compiled = torch.compile(tg.attend_sdpa, dynamic=False, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*qkv, window=16), tg.attend_sdpa(*qkv, window=16))
    assert strides == [1] * 3


@pytest.mark.parametrize("module", ["flash_attn_interface", "flash_attn_3.flash_attn_interface"])
def test_fa3_of_either_packaging_replaces_the_flash_kernel_until_another_is_loaded(
    module, monkeypatch
):
    operators = torch.library.Library("flash_attn_3", "DEF")
    for name in ("fwd", "bwd"):
        operators.define(f"{name}(Tensor x) -> Tensor")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_3", types.ModuleType("flash_attn_3"))
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        tg.select_attention("fa3")
        assert current_flash_attention_impl() == "FA3"
    finally:
        tg.select_attention("flash")
    assert current_flash_attention_impl() is None


def test_one_pass_starts_a_window_before_the_first_token_that_it_scores(cpu):
    """Sequences are 16 windows long. Logits with a window are held in test_model.py."""
    model, tokens = random_model(jepa_chunk_size=4), some_ids(400)
    scoring_pass = tg.one_pass(model, WINDOW, cpu)
    recorder = Recorder(scoring_pass, tokens)
    recorder.score(cpu)
    assert {shape[1] for shape in recorder.shapes} == {16 * WINDOW}
    assert recorder.ends == [0, *range(16 * WINDOW, 399, 15 * WINDOW), 399]
    with torch.inference_mode():
        logits = model.forward_logits(tokens[None, : 16 * WINDOW], window=WINDOW)[0]
    want = F.cross_entropy(logits, tokens[1 : 16 * WINDOW + 1], reduction="none")
    torch.testing.assert_close(recorder.nats[: 16 * WINDOW], want)


def test_the_scores_of_an_artifact_are_independent_and_the_last_is_the_one_that_counts(
    cpu, tmp_path
):
    """A window of the whole text is one plain sequence; TTT leaves the artifact as it was."""
    path, val = tmp_path / "artifact", val_of(TOKENS)
    path.write_bytes(artifact_of(random_model())[0])
    before, total = path.read_bytes(), len(TOKENS) - 1
    h = settings(eval_stride=16, ttt_enabled=1, ttt_chunk_tokens=128)

    def scores(folder=None, **changes) -> dict[str, dict]:
        log = tg.Log(folder)
        found = score_artifact(path, tg.replace(h, **changes), val, cpu, log)
        return {name: of | {"seconds": 0} for name, of in found.items()}

    found = scores(tmp_path, eval_window=total)
    assert list(found) == ["plain", "sliding", "window", "ttt"]
    assert {(of["tokens"], of["bytes"]) for of in found.values()} == {(total, total - 1)}
    less = scores(ttt_enabled=False)
    assert less == {name: found[name] for name in ("plain", "sliding")}
    whole = scores(eval_seq_len=total, ttt_enabled=False)["plain"]
    assert found["window"]["nats"] == pytest.approx(whole["nats"], rel=1e-6)
    assert abs(found["window"]["nats"] - found["plain"]["nats"]) > 0.1
    assert path.read_bytes() == before
    log = (tmp_path / "train.log").read_text()
    names = ["final_int6_roundtrip", "final_int6_sliding_window", "final_int6_window", "legal_ttt"]
    for name, of in zip(names, found.values(), strict=True):
        assert f"{name}_exact val_loss:{of['val_loss']:.8f} val_bpb:{of['val_bpb']:.8f}" in log
    last = f"final_int8_zlib_roundtrip_exact val_loss:{found['ttt']['val_loss']:.8f}"
    assert last in log


# ---- Test-time training by SGD ----

LEARNER = {"num_layers": 2, "train_seq_len": 16, "ttt_enabled": 1, "ttt_chunk_tokens": 64}


def test_test_time_training_learns_by_sgd_with_momentum_at_half_a_cosine(cpu):
    """One sequence, two epochs: the update by its formula, the gradient clipped to norm 1."""
    model = random_model(**LEARNER, ttt_epochs=2, ttt_lr=0.1, label_smoothing=0.5)
    twin, ids = random_model(**LEARNER), some_ids(17)
    tg.TestTimeLearner(model, model.h, cpu, tg.Ranks()).learn(ids, 0.25)
    rate, momenta = 0.1 * (1 + math.cos(math.pi / 4)) / 2, [0.0] * 100
    params, ids = list(twin.parameters()), ids.long()
    for _ in range(2):
        logits = twin.forward_logits(ids[None, :-1])[0]
        loss = F.cross_entropy(logits, ids[1:])  # not smoothed
        grads = torch.autograd.grad(loss, params)
        norm = torch.cat([g.double().flatten() for g in grads]).norm().item()
        assert norm > 1  # so that clipping shows
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            momenta[i] = 0.9 * momenta[i] + g / norm
            p.data -= rate * momenta[i]
    for p, want in zip(model.parameters(), params, strict=True):
        torch.testing.assert_close(p, want, atol=1e-5, rtol=1e-4)


def test_test_time_training_helps_on_text_that_repeats(cpu):
    torch.manual_seed(0)
    h = settings(**LEARNER, eval_stride=8, ttt_lr=0.3)
    model = tg.GPT(h).eval()
    text = torch.tensor(byte_tokens("all work and no play makes Jack a dull boy. " * 20)).int()
    val = val_of(text)
    learner = tg.TestTimeLearner(model, h, cpu, tg.Ranks())
    without = score(sliding(model, h), val, cpu)
    learned = score(sliding(model, h, learner), val, cpu, 48)
    assert learned.tokens == without.tokens == len(text) - 1
    assert learned.val_bpb < without.val_bpb - 0.5
