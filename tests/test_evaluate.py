"""Scoring: every position once, equal to one window at a time in float64, bytes by decoding."""

import json
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BYTE_TABLE,
    TINY,
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

import train_gpt as tg


@pytest.mark.fault(56)
@given(
    total=st.integers(1, 300),
    seq_len=st.integers(1, 64),
    stride=st.integers(1, 64),
    size=st.integers(1, 7),
    longer=st.integers(0, 400),
)
def test_every_position_is_scored_once_with_its_context(total, seq_len, stride, size, longer):
    seq_len, stride = min(seq_len, total), min(stride, seq_len, total)
    chunk = seq_len + longer
    scored, chunks = np.zeros(total, int), []
    for n, batch in enumerate(tg.plan_windows(total, seq_len, stride, size, chunk)):
        assert batch[0, 1] > 0  # filler comes last
        real = batch[batch[:, 1] > 0]
        of_batch = {int(start + seq_len - count) // chunk for start, count in real}
        assert len(of_batch) == 1  # all windows of a batch begin to score in one chunk
        chunks += of_batch
        for start, count in batch.tolist():
            assert 0 <= start <= total - seq_len
            assert count <= (stride if n else seq_len)  # as many as there are logits of
            assert not start or count <= stride  # the rest is context
            scored[start + seq_len - count : start + seq_len] += 1
    assert np.all(scored == 1)
    assert chunks == sorted(chunks)
    assert set(chunks) >= set(range(chunks[-1]))  # no chunk is left out: each is learned in turn


def test_batches_have_two_shapes():
    sliding = tg.plan_windows(1000, 64, 16, 8, 1000)
    assert {len(batch) for batch in sliding} == {8}
    assert [int(batch[:, 1].max()) for batch in sliding] == [64] + [16] * 8
    plain = tg.plan_windows(1000, 64, 64, 8, 1000)
    assert [batch.shape for batch in plain] == [(8, 2)] * 2
    assert [batch.shape for batch in tg.plan_windows(100, 64, 64, 8, 100)] == [(2, 2)]


@pytest.fixture(scope="module")
def model() -> tg.GPT:
    return randomize(tg.GPT(settings())).eval()


TEXT = "Bits per byte, naïvely: one window at a time — é, ü, 日本. " * 6


def val_of(text: str) -> tg.Validation:
    half = len(text) // 2
    tokens = byte_tokens(text[:half]) + byte_tokens(text[half:])
    return val_of_tokens(tokens)


def val_of_tokens(tokens: list[int]) -> tg.Validation:
    return tg.Validation(torch.tensor(tokens).int(), BYTE_TABLE, canonical=False)


@pytest.mark.fault(56)
@pytest.mark.parametrize(("seq_len", "stride"), [(64, 64), (64, 16), (48, 7), (64, 1)])
def test_the_score_is_one_window_at_a_time_in_float64(model, cpu, seq_len, stride):
    val = val_of(TEXT)
    total = len(val.tokens) - 1
    nats, position = 0.0, 0
    while position < total:
        end = seq_len if position == 0 else min(position + stride, total)
        window = val.tokens[max(end - seq_len, 0) : end + 1].long()
        with torch.inference_mode():
            logits = model.forward_logits(window[None, :-1])[0].double()
        losses = -logits.log_softmax(-1)[torch.arange(seq_len), window[1:]]
        nats += losses[-(end - position) :].sum().item()
        position = end
    result = score(tg.ScoringPass(model.forward_logits, seq_len, stride), val, cpu, 64 * 5)
    assert result.stride == stride
    text_bytes = len(TEXT.encode())
    assert result.tokens == total == text_bytes + 1  # a BOS within is scored and has no bytes
    assert result.bytes == text_bytes
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.val_bpb == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    assert result.val_loss == pytest.approx(nats / total, rel=1e-6)


@pytest.mark.parametrize("stride", [0, 64, 1000])
def test_sliding_with_no_stride_or_a_whole_one_is_plain(model, cpu, stride):
    val, h = val_of(TEXT), settings(eval_stride=stride)
    plain = score(tg.plain_pass(model.forward_logits, h), val, cpu)
    whole = score(tg.sliding_pass(model.forward_logits, h), val, cpu)
    assert plain._replace(seconds=0) == whole._replace(seconds=0)


def test_the_batch_changes_no_score(model, cpu):
    val = val_of(TEXT)
    scoring_pass = tg.ScoringPass(model.forward_logits, 64, 16)
    scores = [score(scoring_pass, val, cpu, tokens) for tokens in (1, 64 * 3, 10**6)]
    assert {s.tokens for s in scores} == {len(val.tokens) - 1}
    assert max(s.nats for s in scores) == pytest.approx(min(s.nats for s in scores), rel=1e-6)


def test_a_longer_context_is_seen(model, cpu):
    """EVAL_SEQ_LEN, not TRAIN_SEQ_LEN, is the window where it is set."""
    shapes = set()

    def logits(ids, last):
        shapes.add(tuple(ids.shape))
        return model.forward_logits(ids, last)

    score(tg.plain_pass(logits, settings(eval_seq_len=128)), val_of(TEXT), cpu, 1)
    assert shapes == {(1, 128)}


@pytest.mark.parametrize(("kind", "tokens"), [("cpu", 4096), ("cuda", 65_536)])
def test_a_gpu_scores_an_eighth_of_the_batch_and_a_cpu_what_its_caches_hold(kind, tokens):
    device = tg.Device(torch.device(kind), torch.float32, compiled=False)
    assert tg.scoring_batch_tokens(524_288, device) == tokens
    assert tg.scoring_batch_tokens(800, device) == 100


@pytest.mark.fault(34)
def test_a_diverged_model_has_no_score(cpu):
    def logits(ids, last):
        return torch.full((len(ids), last, 260), math.nan)

    with pytest.raises(tg.DivergenceError, match="the score is not finite"):
        score(tg.ScoringPass(logits, 64, 64), val_of(TEXT), cpu)


def test_uniform_logits_score_log_of_the_vocabulary(cpu):
    def logits(ids, last):
        return torch.zeros(len(ids), last, 260)

    result = score(tg.ScoringPass(logits, 64, 64), val_of(TEXT), cpu)
    assert result.val_loss == pytest.approx(math.log(260), rel=1e-6)


STREAMS = {
    "no BOS": [50] * 90,
    "BOS at the end": [1, *[50] * 88, 1],
    "BOS alone": [1] * 40 + [50],
    "BOS within a window": ([1] + [50] * 6) * 20,
    "shorter than a window": [1, 50, 60],
    "two tokens": [1, 50],
}


@pytest.mark.fault(55, 56)
@pytest.mark.parametrize("stride", [64, 48, 17, 1])
@pytest.mark.parametrize("name", STREAMS)
def test_any_stream_is_scored_token_by_token(model, cpu, name, stride):
    """Whatever BOS is where, and of windows that nothing fills or no stride divides."""
    tokens = STREAMS[name]
    scoring_pass = tg.ScoringPass(model.forward_logits, 64, stride)
    result = score(scoring_pass, val_of_tokens(tokens), cpu)
    assert result.tokens == len(tokens) - 1
    assert result.bytes == sum(t >= 4 for t in tokens[1:])
    assert math.isfinite(result.val_bpb)


# ---- One pass, attending over a window (EVAL_WINDOW) ----


def attend_over(window: int):
    """Attention over the last `window` positions, from its definition."""

    def attend(q, k, v, **_):
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.size(3))
        at = torch.arange(q.size(1))
        distance = at[:, None] - at
        seen = (distance >= 0) & (distance < window)
        part = scores.masked_fill(~seen, -math.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", part, v)

    return attend


@hypothesis_settings(deadline=None)
@given(sequences=st.integers(1, 2), length=st.integers(1, 70), window=st.integers(1, 40))
def test_attention_in_blocks_is_attention_over_the_window(sequences, length, window):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sequences, length, heads, 4, generator=draw, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    got = tg.attend_sdpa(q, k, v, window=window)
    torch.testing.assert_close(got, attend_over(window)(q, k, v), atol=1e-12, rtol=1e-12)


@pytest.fixture
def packed(tmp_path) -> Path:
    """The artifact of a random model."""
    path = tmp_path / "artifact"
    path.write_bytes(artifact_of(randomize(tg.GPT(settings())))[0])
    return path


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_blocks_are_laid_out_for_the_fast_kernels(sequences, monkeypatch):
    """They want the width of a head to lie together, else all scores are written to memory."""
    attend, strides = F.scaled_dot_product_attention, []

    def noting(*qkv, **how):
        strides.extend(x.stride(-1) for x in qkv[:3])
        return attend(*qkv, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    q, k, v = (torch.randn(sequences, 96, heads, 8) for heads in (4, 2, 2))
    tg.attend_sdpa(q, k, v, window=16)
    assert strides == [1] * 6


def test_blocks_compile_whole():
    qkv = [torch.randn(2, 100, heads, 8) for heads in (4, 2, 2)]
    compiled = torch.compile(tg.attend_sdpa, dynamic=False, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*qkv, window=16), tg.attend_sdpa(*qkv, window=16))


def test_flash_attention_is_told_the_window(monkeypatch):
    """It counts the positions before a query; -1: all."""
    told = []

    def flash_attn_func(q, k, v, causal, window_size):
        told.append((causal, window_size))
        return q, None

    module = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    attend, x = tg.load_attention("fa3"), torch.zeros(1, 4, 2, 8)
    assert attend(x, x, x) is x
    attend(x, x, x, window=3)
    assert told == [(True, (-1, 0)), (True, (2, 0))]


WINDOW = 8


def nats_of_one_pass(h: tg.Hyperparameters, weights: dict, tokens: torch.Tensor) -> float:
    """What EVAL_WINDOW says of itself, a sequence at a time, dense masks, float64 to the logits."""
    base = tg.replace(h, rope_train_seq_len=1 << 20)
    stretch = max(WINDOW / h.rope_train_seq_len, 1) ** (h.rope_dims / (h.rope_dims - 2))
    base = tg.replace(base, rope_base=h.rope_base * stretch)
    model = tg.GPT(base, attend_over(WINDOW), torch.float64).double().eval()
    model.load_state_dict(weights)
    total, done, nats = len(tokens) - 1, 0, 0.0
    while done < total:
        end = min(done + (15 if done else 16) * WINDOW, total)
        start = max(end - 16 * WINDOW, 0)
        logits = model.forward_logits(tokens[None, start:end].long())[0].double()
        losses = F.cross_entropy(logits, tokens[start + 1 : end + 1].long(), reduction="none")
        nats += losses[done - end :].sum().item()
        assert not done or done - start >= WINDOW  # of context, for the first that is scored
        done = end
    return nats


@pytest.mark.parametrize("rope", [4, 64])
@pytest.mark.parametrize("head", [0, 4])
@pytest.mark.parametrize("text", [TEXT, TEXT[:90], TEXT * 2])
def test_one_pass_is_one_sequence_at_a_time_in_float64(cpu, tmp_path, text, head, rope):
    changes = {"rope_train_seq_len": rope, "jepa_chunk_size": head, "val_batch_size": 8 * 3 * 128}
    h = settings(
        **changes, jepa_latent_dim=8, jepa_proj_hidden=8, eval_window=WINDOW, eval_stride=0
    )
    blob, arrays = artifact_of(randomize(tg.GPT(h)))
    (tmp_path / "artifact").write_bytes(blob)
    val = val_of(text)
    found = score_artifact(tmp_path / "artifact", h, val, cpu, tg.Log(silent=True))["window"]
    with torch.inference_mode():
        want = nats_of_one_pass(h, tg.dequantize(arrays), val.tokens)
    assert found["tokens"] == len(val.tokens) - 1
    assert found["bytes"] == len(text.encode())
    assert found["nats"] == pytest.approx(want, rel=1e-6)


def test_a_window_of_the_whole_text_is_one_plain_sequence(cpu, packed):
    """And the other scores, TTT among them, do not depend on it."""
    val = val_of(TEXT)
    total = len(val.tokens) - 1
    h = settings(eval_stride=16, ttt_enabled=1, ttt_chunk_tokens=128)

    def scores(**changes):
        found = score_artifact(packed, tg.replace(h, **changes), val, cpu, tg.Log(silent=True))
        return {name: of | {"seconds": 0} for name, of in found.items()}

    without, found = scores(), scores(eval_window=total)
    assert list(found) == ["plain", "sliding", "window", "ttt"]
    assert {name: found[name] for name in without} == without
    whole = scores(eval_seq_len=total)["plain"]
    assert found["window"]["nats"] == pytest.approx(whole["nats"], rel=1e-6)
    assert abs(found["window"]["nats"] - found["plain"]["nats"]) > 0.1


@pytest.mark.parametrize("features", [{}, {"smear_gate": 0, "bigram_vocab_size": 0}])
def test_a_window_sees_so_many_tokens_a_layer_and_none_that_follows(features):
    """Flip tests: a later token changes nothing; the reach is a window less one for each layer."""
    h = settings(**features, num_layers=2, ve_enabled=0, jepa_chunk_size=0)
    model = randomize(tg.GPT(h)).eval()
    ids = torch.randint(4, 260, (1, 96), generator=torch.Generator().manual_seed(5))
    reach = 2 * (WINDOW - 1) + (2 if not features else 0)  # the pair's, smeared
    with torch.inference_mode():
        before = model.forward_logits(ids, window=WINDOW)
        for t in (0, 7, 8, 40, 95):
            changed = ids.clone()
            changed[0, t] = 4 + (changed[0, t] + 100) % 256
            differ = (model.forward_logits(changed, window=WINDOW) != before).any(-1)[0]
            differ = differ.nonzero().flatten().tolist()
            assert differ[0] == t
            assert differ[-1] == min(t + reach, 95)


def test_a_window_in_the_log_is_the_last_score(tmp_path, byte_corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    env = {**TINY, "DATA_PATH": str(byte_corpus), "ITERATIONS": "2", "EVAL_WINDOW": "64"}
    assert tg.main([], {**env, "RUN_ID": "run"}) == 0
    out = capsys.readouterr().out
    exact = dict(re.findall(r"^(\S+)_exact (.*)$", out, re.MULTILINE))
    assert exact["final_int6_window"] == exact["final_int8_zlib_roundtrip"]
    assert exact["final_int6_window"] != exact["final_int6_sliding_window"]
    scores = json.loads(Path("logs/run/result.json").read_text())["scores"]
    assert scores["window"]["tokens"] == scores["plain"]["tokens"]
    assert scores["window"]["bytes"] == scores["plain"]["bytes"]
