"""DOC_ATTENTION: attention within documents, equal to each document alone in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import choose, compile_counted, settings
from test_evaluate import Recorder, make_pass
from test_model import FEATURES, OFF, ON, random_model, some_ids
from torch.nn.attention import varlen

import train_gpt as tg

# Features with which no position reads another document: the JEPA head mixes chunks of positions.
APART = ON | {"jepa_chunk_size": 0, "doc_attention": 1}
ONE_LESS = [APART | {name: OFF[name]} for name in FEATURES if name != "bos_mask"]


def ids_of(*documents: int, seed: int = 4) -> torch.Tensor:
    """Documents of so many tokens, one after another; all but the first begin with BOS."""
    ids = some_ids(sum(documents), seed=seed)
    ids[torch.tensor(documents).cumsum(0)[:-1]] = tg.BOS_ID
    return ids


def attend_alone(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, window: int
) -> torch.Tensor:
    """Attention of a sequence [T, heads, d], each position by itself, from the definition."""
    rows, start = [], 0
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    for t in range(len(ids)):
        start = t if ids[t] == tg.BOS_ID else start
        seen = slice(max(start, t + 1 - (window or len(ids))), t + 1)
        scores = torch.einsum("hd,shd->hs", q[t], k[seen]) / math.sqrt(q.size(2))
        rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[seen]))
    return torch.stack(rows)


def varlen_by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    offsets_of_keys: torch.Tensor,
    longest: int,
    longest_of_keys: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool = False,  # from torch 2.12 on
) -> torch.Tensor:
    """What PyTorch documents of varlen_attn, a sequence at a time; longer ones are not computed."""
    assert enable_gqa or q.size(1) == k.size(1)
    assert offsets.dtype == torch.int32
    assert torch.equal(offsets, offsets_of_keys)
    assert offsets[-1] == len(q)
    before, after = window_size
    assert after == 0
    y = torch.full_like(q, math.nan)
    for start, end in zip(offsets.tolist(), offsets[1:].tolist(), strict=False):
        assert 0 <= end - start <= longest == longest_of_keys
        part = slice(start, end)
        plain = torch.zeros(end - start)
        y[part] = attend_alone(q[part], k[part], v[part], plain, before + 1) if end > start else 0
    return y


@pytest.mark.parametrize("back_end", ["mask", "varlen", "varlen of torch 2.11"])
@pytest.mark.parametrize("window", [0, 1, 9, 600])
@pytest.mark.parametrize("cuts", [(40,), (1, 1, 20, 18), (530, 70)])
def test_attention_and_gradients_equal_each_document_alone(back_end, window, cuts, monkeypatch):
    """A CPU's kernel reads 512 keys at once, which the last document of 70 does not see at all."""
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_definition)
    monkeypatch.setattr(tg, "VARLEN_HAS_GROUPS", not back_end.endswith("2.11"))
    ids = torch.stack((ids_of(*cuts), ids_of(*cuts[::-1])))
    options = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    qkv = [torch.randn(*ids.shape, heads, 4, **options).requires_grad_() for heads in (4, 2, 2)]
    weights = torch.randn(*ids.shape, 4, 4, **options)
    documents = tg.Documents.of_ids(ids, training=True)
    if back_end == "mask":
        got = tg.attend_sdpa(*qkv, window=window, documents=documents)
    else:
        got = tg.attend_flash(*qkv, window=window, documents=documents)
    parts = zip(*qkv, ids, strict=True)
    want = torch.stack([attend_alone(*part, window) for part in parts])
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    gradients = (torch.autograd.grad(y, qkv, weights, retain_graph=True) for y in (got, want))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_the_variable_length_kernel_takes_the_arguments():
    """On tensors without data: PyTorch's own rules for shapes, forward and backward."""
    ids = ids_of(9, 23)[None].to("meta")
    documents = tg.Documents.of_ids(ids, training=True)
    qkv = [torch.randn(1, 32, heads, 8, device="meta").requires_grad_() for heads in (4, 2, 2)]
    for window in (0, 5):
        y = tg.attend_flash(*qkv, window=window, documents=documents)
        assert y.shape == qkv[0].shape
        gradients = torch.autograd.grad(y.sum(), qkv)
        assert [g.shape for g in gradients] == [x.shape for x in qkv]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("every", [1, 2, 50, 10_000])
def test_the_two_forms_of_documents_agree_and_have_one_shape(every, training):
    """With a BOS at every so many positions. Rows stay apart where a batch has too many."""
    ids = some_ids(6, 512)
    ids.view(-1)[::every] = tg.BOS_ID
    numbers, offsets = tg.Documents.of_ids(ids, training)
    other = tg.Documents.of_ids(some_ids(6, 512), training)
    assert (numbers.shape, offsets.shape) == (other.numbers.shape, other.offsets.shape)
    assert set(range(0, 6 * 512 + 1, 512)) <= set(offsets.tolist())
    assert (offsets.diff() >= 0).all()
    starts = [
        row * 512 + t
        for row, of_row in enumerate(numbers.tolist())
        for t in range(512)
        if t == 0 or of_row[t] > of_row[t - 1]
    ]
    kept = sorted({*offsets.tolist()} - {6 * 512})
    if training and every < 50:
        assert set(kept) < set(starts)
        assert len(kept) == 6 + 64 + 6 * 512 // 256
    else:
        assert kept == starts
    assert numbers.max() == min(-(-512 // every), 16 + 512 // 64) if every < 512 else 1


@pytest.mark.parametrize("features", [APART, APART | {"num_layers": 5, "bigram_dim": 6}, *ONE_LESS])
def test_a_model_gives_each_document_what_it_gives_it_alone(features):
    """Logits and gradients; rotary embeddings know distances only. Without crossing, no window."""
    cuts = (7, 1, 30, 10)
    model = random_model(**features).train()
    ids = ids_of(*cuts)[None]
    ids[0, 0] = tg.BOS_ID
    logits = model.forward_logits(ids)
    alone = torch.cat([model.forward_logits(part) for part in ids.split(cuts, dim=1)], dim=1)
    torch.testing.assert_close(logits, alone, atol=2e-5, rtol=1e-5)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    params = [p for p in model.parameters() if p.numel()]
    want = torch.autograd.grad(alone, params, weights, materialize_grads=True)
    got = torch.autograd.grad(logits, params, weights, materialize_grads=True)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("features", [APART, *ONE_LESS])
@pytest.mark.parametrize("window", [0, 12])
def test_no_logit_depends_on_a_later_token_or_another_document(features, window):
    model, ids = random_model(**features), ids_of(20, 16, 28)[None]
    with torch.inference_mode():
        before = model.forward_logits(ids, window=window)
        for t in (0, 3, 19, 21, 35, 37, 63):
            changed = ids.clone()
            changed[0, t] = 4 + (changed[0, t] + 100) % 256
            same = before == model.forward_logits(changed, window=window)
            end = next(end for end in (20, 36, 64) if t < end)
            assert same[:, :t].all()
            assert same[:, end:].all()
            assert not same[:, t].all()


def test_documents_that_move_compile_nothing_anew(byte_corpus, cpu):
    """And the compiled program is the same function, in training and over a window."""
    model = random_model(**APART).train()
    batches = [ids_of(20, 44).view(2, 32), ids_of(1, 3, 50, 10).view(2, 32), some_ids(2, 32)]
    functions: list[Callable[[torch.Tensor], Any]] = [
        lambda ids: model(ids, ids),
        lambda ids: model.forward_logits(ids, window=8),
    ]
    for function in functions:
        compiled, programs = compile_counted(function)
        for ids in batches:
            torch.testing.assert_close(compiled(ids), function(ids))
        assert len(programs) == 1


@pytest.mark.parametrize("kind", ["plain", "sliding 20", "one pass", "ttt 32"])
def test_scores_stay_within_documents(kind, cpu):
    """A changed token changes scores of its own document only, unless the weights learn from it."""
    model = random_model(**APART)
    h = tg.replace(model.h, eval_seq_len=32, ttt_chunk_tokens=64)
    start = {name: p.clone() for name, p in model.state_dict().items()}
    text = ids_of(50, 70, 80)

    def nats(tokens: torch.Tensor) -> torch.Tensor:
        model.load_state_dict(start)
        recorder = Recorder(make_pass(kind, model, h, cpu), tokens)
        recorder.score(cpu)
        return recorder.nats

    before, changed = nats(text), text.clone()
    changed[10] = 4 + (changed[10] + 77) % 256
    same = before == nats(changed)
    assert same[:9].all()
    assert not same[9]
    assert same[50:].all() == ("ttt" not in kind)
    if kind != "plain":  # the only kind in which each position is read once
        return
    cuts = (32, 50, 64, 96, 120, 128, 160, 192)  # ends of windows and of documents
    parts = zip(text.tensor_split(cuts), text[1:].tensor_split(cuts), strict=True)
    alone = torch.cat(
        [
            F.cross_entropy(model.forward_logits(ids[None])[0], targets, reduction="none")
            for ids, targets in list(parts)[:-1]
        ]
    )
    torch.testing.assert_close(before[:192], alone, atol=1e-4, rtol=1e-4)


def test_back_ends_without_a_kernel_for_documents_are_not_tried(cpu, monkeypatch):
    tried = []

    def probe(device: tg.Device, h: tg.Hyperparameters, rows: int) -> str:
        tried.append(device.attention)
        return "" if device.attention == "math" else "no"

    assert choose(settings(doc_attention=1))[1][1:] == []  # flash on a CPU takes a mask
    monkeypatch.setattr(tg, "probe_attention", probe)
    assert choose(settings(doc_attention=1))[0].attention == "math"
    assert tried == ["flash", "math"]
