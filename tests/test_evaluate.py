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
from conftest import BYTE_TABLE, TINY, byte_tokens, randomize, settings
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


def data_of(text: str) -> tg.Data:
    half = len(text) // 2
    tokens = byte_tokens(text[:half]) + byte_tokens(text[half:])
    return tg.Data(torch.tensor(tokens).int(), BYTE_TABLE, None)


@pytest.mark.fault(56)
@pytest.mark.parametrize(("seq_len", "stride"), [(64, 64), (64, 16), (48, 7), (64, 1)])
def test_the_score_is_one_window_at_a_time_in_float64(model, cpu, seq_len, stride):
    h = settings(val_batch_size=64 * 5 * 8, eval_seq_len=seq_len)
    data = data_of(TEXT)
    total = len(data.val) - 1
    nats, position = 0.0, 0
    while position < total:
        end = seq_len if position == 0 else min(position + stride, total)
        window = data.val[max(end - seq_len, 0) : end + 1].long()
        with torch.inference_mode():
            logits = model.forward_logits(window[None, :-1])[0].double()
        losses = -logits.log_softmax(-1)[torch.arange(seq_len), window[1:]]
        nats += losses[-(end - position) :].sum().item()
        position = end
    score = tg.evaluate(model.forward_logits, data, h, cpu, tg.Log(), stride=stride)
    assert score.stride == stride
    text_bytes = len(TEXT.encode())
    assert score.tokens == total == text_bytes + 1  # a BOS within is scored and has no bytes
    assert score.bytes == text_bytes
    assert score.nats == pytest.approx(nats, rel=1e-6)
    assert score.val_bpb == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    assert score.val_loss == pytest.approx(nats / total, rel=1e-6)


def test_sliding_with_the_whole_stride_is_plain(model, cpu):
    data, h = data_of(TEXT), settings()
    plain = tg.evaluate(model.forward_logits, data, h, cpu, tg.Log())
    whole = tg.evaluate(model.forward_logits, data, h, cpu, tg.Log(), stride=h.train_seq_len)
    assert (plain.nats, plain.tokens, plain.bytes) == (whole.nats, whole.tokens, whole.bytes)


def test_the_batch_changes_no_score(model, cpu):
    data = data_of(TEXT)
    scores = [
        tg.evaluate(
            model.forward_logits, data, settings(val_batch_size=n), cpu, tg.Log(), stride=16
        )
        for n in (1, 64 * 8 * 3, 10**6)
    ]
    assert {s.tokens for s in scores} == {len(data.val) - 1}
    assert max(s.nats for s in scores) == pytest.approx(min(s.nats for s in scores), rel=1e-6)


def test_a_longer_context_is_seen(model, cpu):
    """EVAL_SEQ_LEN, not TRAIN_SEQ_LEN, is the window where it is set."""
    data = data_of(TEXT)
    shapes = set()

    def logits(ids, last):
        shapes.add(tuple(ids.shape))
        return model.forward_logits(ids, last)

    tg.evaluate(logits, data, settings(eval_seq_len=128, val_batch_size=1), cpu, tg.Log())
    assert shapes == {(1, 128)}


@pytest.mark.fault(34)
def test_a_diverged_model_has_no_score(cpu):
    with pytest.raises(tg.DivergenceError, match="no finite number"):
        tg.evaluate(
            lambda ids, last: torch.full((len(ids), last, 260), math.nan),
            data_of(TEXT),
            settings(),
            cpu,
            tg.Log(),
        )


def test_uniform_logits_score_log_of_the_vocabulary(cpu):
    data = data_of(TEXT)
    score = tg.evaluate(
        lambda ids, last: torch.zeros(len(ids), last, 260), data, settings(), cpu, tg.Log()
    )
    assert score.val_loss == pytest.approx(math.log(260), rel=1e-6)


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
    data = tg.Data(torch.tensor(tokens).int(), BYTE_TABLE, None)
    score = tg.evaluate(
        model.forward_logits, data, settings(), cpu, tg.Log(), stride=min(stride, len(tokens) - 1)
    )
    assert score.tokens == len(tokens) - 1
    assert score.bytes == sum(t >= 4 for t in tokens[1:])
    assert math.isfinite(score.val_bpb)


# ---- One pass, attending over a window (EVAL_WINDOW) ----


def attend_over(window: int):
    """Attention over the last `window` positions, from its definition."""

    def attend(q, k, v):
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
    got = tg.attend_sdpa(q, k, v, window)
    torch.testing.assert_close(got, attend_over(window)(q, k, v), atol=1e-12, rtol=1e-12)


@pytest.fixture
def packed(tmp_path) -> Path:
    """The artifact of a random model."""
    path = tmp_path / "artifact"
    arrays, _ = tg.quantize(randomize(tg.GPT(settings())))
    path.write_bytes(tg.pack(settings(), arrays))
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
    tg.attend_sdpa(q, k, v, 16)
    assert strides == [1] * 6


def test_blocks_compile_whole():
    qkv = [torch.randn(2, 100, heads, 8) for heads in (4, 2, 2)]
    compiled = torch.compile(tg.attend_sdpa, dynamic=False, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*qkv, 16), tg.attend_sdpa(*qkv, 16))


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
    base = tg.replace(h, rope_train_seq_len=10**9)
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
    arrays, _ = tg.quantize(randomize(tg.GPT(h)))
    (tmp_path / "artifact").write_bytes(tg.pack(h, arrays))
    data = data_of(text)
    score = tg.score_artifact(tmp_path / "artifact", h, cpu, data, tg.Log(silent=True))["window"]
    with torch.inference_mode():
        want = nats_of_one_pass(h, tg.dequantize(arrays), data.val)
    assert score.tokens == len(data.val) - 1
    assert score.bytes == len(text.encode())
    assert score.nats == pytest.approx(want, rel=1e-6)


def test_a_window_of_the_whole_text_is_one_plain_sequence(cpu, packed):
    """And the others, TTT among them, do not know of it."""
    data, log = data_of(TEXT), tg.Log(silent=True)
    h, total = settings(eval_stride=16, ttt_enabled=1), len(data.val) - 1
    h = tg.replace(h, ttt_chunk_tokens=128)

    def scores(**changes):
        found = tg.score_artifact(packed, tg.replace(h, **changes), cpu, data, log)
        return {name: score._replace(seconds=0) for name, score in found.items()}

    without, found = scores(), scores(eval_window=total)
    assert list(found) == ["plain", "sliding", "window", "ttt"]
    assert {name: found[name] for name in without} == without
    whole = scores(eval_seq_len=total)["plain"]
    assert found["window"].nats == pytest.approx(whole.nats, rel=1e-6)
    assert abs(found["window"].nats - found["plain"].nats) > 0.1


@pytest.mark.parametrize("features", [{}, {"smear_gate": 0, "bigram_vocab_size": 0}])
def test_a_window_sees_so_many_tokens_a_layer_and_none_that_follows(features):
    """Flip tests: a later token changes nothing; the reach is a window less one for each layer."""
    h = settings(**features, num_layers=2, ve_enabled=0, jepa_chunk_size=0)
    model = randomize(tg.GPT(h, window=WINDOW)).eval()
    ids = torch.randint(4, 260, (1, 96), generator=torch.Generator().manual_seed(5))
    reach = 2 * (WINDOW - 1) + (2 if not features else 0)  # the pair's, smeared
    with torch.inference_mode():
        before = model.forward_logits(ids)
        for t in (0, 7, 8, 40, 95):
            changed = ids.clone()
            changed[0, t] = 4 + (changed[0, t] + 100) % 256
            differ = (
                (model.forward_logits(changed) != before).any(-1)[0].nonzero().flatten().tolist()
            )
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
