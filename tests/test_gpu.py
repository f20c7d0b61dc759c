"""What only a CUDA GPU can show; every test is marked gpu."""

import dataclasses
import json
import math
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, choose, randomize, settings
from torch.testing._internal.distributed.fake_pg import FakeStore

import train_gpt as tg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def restored_back_ends(back_ends: None) -> None:
    """Every test may choose an attention, which enables one back end alone."""


@pytest.mark.parametrize("attn", ["fa3", "cudnn", "flash", "math"])
def test_each_back_end_equals_float32_with_gradients(attn):
    try:
        device, _ = choose(tg.Hyperparameters(attn=attn))
    except tg.SettingsError as error:
        pytest.skip(str(error)[:200])
    assert device.attention == attn
    q, k, v = (torch.randn(2, 256, heads, 64, device=GPU) for heads in (8, 4, 4))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        parts = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        if dtype == torch.float32:
            tg.select_attention("math")
        y = tg.attend_sdpa(*parts)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), parts)))
    for got, want in zip(*results, strict=True):
        assert (got.float() - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("compiled", [0, 1])
@pytest.mark.parametrize("attn", ["fa3", "cudnn", "flash", "math"])
@pytest.mark.parametrize(("sequences", "length", "window"), [(1, 1000, 256), (2, 512, 100)])
def test_each_back_end_over_a_window_is_masked_attention(attn, compiled, sequences, length, window):
    try:
        device, _ = choose(tg.Hyperparameters(attn=attn, compile=str(compiled)))
    except tg.SettingsError as error:
        pytest.skip(str(error)[:200])
    assert (device.attention, device.compiled) == (attn, bool(compiled))
    q, k, v = (torch.randn(sequences, length, heads, 64, device=GPU) for heads in (8, 4, 4))
    with torch.inference_mode():
        qkv = [x.bfloat16() for x in (q, k, v)]
        attend = device.compile(lambda q, k, v: tg.attend_sdpa(q, k, v, window=window))
        got = attend(*qkv).float()
        k, v = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
        mask = torch.ones(length, length, dtype=torch.bool, device=GPU).tril().triu(1 - window)
        scores = (q.transpose(1, 2) @ k.mT / 8).masked_fill(~mask, -torch.inf)
        want = (scores.softmax(-1) @ v).transpose(1, 2)
    assert (got - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attn", ["fa3", "flash", "math"])
@pytest.mark.parametrize("window", [0, 100])
def test_each_back_end_keeps_documents_apart(attn, window, training):
    """The kernel of FlashAttention for documents against the mask, with gradients, compiled."""
    torch.compiler.reset()
    try:
        device, _ = choose(tg.Hyperparameters(attn=attn, doc_attention=True))
    except tg.SettingsError as error:
        pytest.skip(str(error)[:200])
    assert device.attention == attn
    ids = torch.randint(0, 200, (8, 512), device=GPU)  # one id in 200 is BOS
    options = {"window": window, "documents": tg.Documents.of_ids(ids, training)}
    qkv = [torch.randn(8, 512, heads, 64, device=GPU) for heads in (8, 4, 4)]
    results = []
    for dtype, attend in (
        (torch.bfloat16, device.compile(tg.attend_on(device))),
        (torch.float32, tg.attend_sdpa),
    ):
        parts = [x.to(dtype).requires_grad_() for x in qkv]
        if dtype == torch.float32:
            tg.select_attention("math")
        y = attend(*parts, **options)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), parts)))
    for got, want in zip(*results, strict=True):
        assert (got.float() - want).norm() / want.norm() < 0.02


def test_bf16_compiled_agrees_with_float32_on_the_cpu():
    h = settings(compile=1, model_dim=128, num_heads=2, num_kv_heads=1, rope_dims=16)
    torch.manual_seed(0)
    tg.select_attention("math")
    slow = randomize(tg.GPT(h)).eval()
    ids, targets = torch.randint(4, 260, (2, 8, 64))
    want = slow(ids, targets).item()  # first: cuDNN, which may be chosen next, has no CPU kernel
    device, _ = choose(h)
    assert (device.device.type, device.dtype, device.compiled) == ("cuda", torch.bfloat16, True)
    fast = tg.GPT(h, tg.attend_on(device), device.dtype).to(GPU)
    fast.load_state_dict(slow.state_dict())
    loss = device.compile(fast)(ids.to(GPU), targets.to(GPU))
    assert loss.item() == pytest.approx(want, rel=0.01)


@pytest.mark.fault(27)
def test_auto_goes_on_without_fa3_and_says_why(monkeypatch):
    for name in ("flash_attn_interface", "flash_attn_3"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    device, notes = choose(settings(compile=0))
    assert device.attention in ("cudnn", "flash", "math")
    assert "attention:fa3 compiled:False not used: " in notes[0]
    assert "flash_attn_3" in notes[0]


@pytest.mark.fault(21)
def test_heads_too_wide_for_flash_get_another_attention():
    h = settings(model_dim=1024, num_heads=2, num_kv_heads=1, attn="flash", compile=0)
    with pytest.raises(tg.SettingsError, match="ATTN=flash COMPILE=0: cannot run here"):
        choose(h)
    device, notes = choose(dataclasses.replace(h, attn="auto"))
    assert device.attention != "flash"
    assert any("attention:flash" in note for note in notes) or device.attention == "cudnn"


def test_newton_schulz_in_bf16_stays_in_its_band():
    stack = torch.randn(22, 512, 512, device=GPU)
    ends = torch.linalg.svdvals(tg.newton_schulz(stack.bfloat16(), 5).float())
    relative = torch.linalg.svdvals(stack) / stack.norm(dim=(1, 2))[:, None]
    assert ends[relative > 0.002].min() > 0.65
    assert ends.max() < 1.23


@pytest.fixture
def eight_ranks():
    """The first of eight ranks; collectives return at once and change nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield tg.Ranks(0, 8)
    dist.destroy_process_group()


@pytest.mark.parametrize("auxiliary", [{}, {"jepa_chunk_size": 4, "stp_enabled": 1}])
def test_a_step_never_waits_for_the_gpu(byte_corpus, eight_ranks, auxiliary):
    h = settings(
        data_path=byte_corpus,
        compile=0,
        model_dim=64,
        num_heads=2,
        num_kv_heads=1,
        rope_dims=16,
        **auxiliary,
    )
    device, _ = choose(h)
    data = tg.load_data(h, eight_ranks, tg.Log(silent=True))
    model = tg.GPT(h, tg.attend_on(device), device.dtype).to(device.device)
    trainer = tg.Trainer(model, data, eight_ranks, device, tg.Log(silent=True), math.inf)
    phase, batch = tg.programs(h)[-1], trainer.batches.batch(0)
    trainer.take_step(phase, *batch)  # the first step allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.take_step(phase, *batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


AUXILIARY = {"JEPA_CHUNK_SIZE": "4", "STP_ENABLED": "1"}


@pytest.mark.parametrize("auxiliary", [{}, AUXILIARY], ids=["plain", "jepa and stp"])
@pytest.mark.parametrize("compiled", ["0", "1"])
def test_a_whole_run(tmp_path, byte_corpus, monkeypatch, compiled, auxiliary):
    monkeypatch.chdir(tmp_path)
    env = {
        **TINY,
        **auxiliary,
        "COMPILE": compiled,
        "MODEL_DIM": "64",
        "NUM_HEADS": "2",
        "NUM_KV_HEADS": "1",
        "ROPE_DIMS": "16",
        "DATA_PATH": str(byte_corpus),
        "RUN_ID": "gpu",
        "WARMUP_STEPS": "2",
        "EVAL_WINDOW": "64",
        "GPTQ_ENABLED": "1",
        "QUANTIZER": "trellis",
        "SENSITIVITY_TOKENS": "1024",
        "TUNE_SCALES": "4",
        "MAX_WALLCLOCK_SECONDS": "600",
    }
    assert tg.main([], env) == 0
    result = json.loads((tmp_path / "logs/gpu/result.json").read_text())
    assert result["scores"]["plain"]["val_loss"] < 3.5
    assert abs(result["scores"]["plain"]["val_bpb"] - result["scores"]["float"]["val_bpb"]) < 0.05
    assert (
        abs(result["scores"]["window"]["val_bpb"] - result["scores"]["sliding"]["val_bpb"]) < 0.05
    )
    assert result["verdicts"]["eval_seconds"] == "PASS"
