"""What only a CUDA GPU can show; every test is marked gpu."""

import dataclasses
import json
import sys

import pytest
import torch
from conftest import TINY, randomize, settings

import train_gpt as tg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")


@pytest.mark.parametrize("attn", ["fa3", "cudnn", "flash", "math"])
def test_each_back_end_equals_float32_with_gradients(attn):
    h = tg.Hyperparameters(attn=attn)
    try:
        attend = tg.Runtime.start(h).attend
    except tg.SettingsError as error:
        pytest.skip(str(error)[:200])
    q, k, v = (torch.randn(2, 256, heads, 64, device=GPU) for heads in (8, 4, 4))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        parts = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        if dtype == torch.float32:
            tg.load_attention("math")
        y = (attend if dtype == torch.bfloat16 else tg.attend_sdpa)(*parts)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), parts)))
    for got, want in zip(*results, strict=True):
        assert (got.float() - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("compiled", [0, 1])
@pytest.mark.parametrize("attn", ["fa3", "cudnn", "flash", "math"])
@pytest.mark.parametrize(("sequences", "length", "window"), [(1, 1000, 256), (2, 512, 100)])
def test_each_back_end_over_a_window_is_masked_attention(attn, compiled, sequences, length, window):
    try:
        rt = tg.Runtime.start(tg.Hyperparameters(attn=attn, compile=str(compiled)))
    except tg.SettingsError as error:
        pytest.skip(str(error)[:200])
    q, k, v = (torch.randn(sequences, length, heads, 64, device=GPU) for heads in (8, 4, 4))
    with torch.inference_mode():
        qkv = [x.bfloat16() for x in (q, k, v)]
        got = rt.compile(lambda *x: rt.attend(*x, window=window))(*qkv).float()
        k, v = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
        mask = torch.ones(length, length, dtype=torch.bool, device=GPU).tril().triu(1 - window)
        scores = (q.transpose(1, 2) @ k.mT / 8).masked_fill(~mask, -torch.inf)
        want = (scores.softmax(-1) @ v).transpose(1, 2)
    assert (got - want).norm() / want.norm() < 0.02


def test_bf16_compiled_agrees_with_float32_on_the_cpu():
    h = settings(compile=1, model_dim=128, num_heads=2, num_kv_heads=1, rope_dims=16)
    rt = tg.Runtime.start(h)
    assert (rt.device.type, rt.dtype, rt.compiled) == ("cuda", torch.bfloat16, True)
    torch.manual_seed(0)
    slow = randomize(tg.GPT(h)).eval()
    fast = tg.GPT(h, rt.attend, rt.dtype).to(GPU)
    fast.load_state_dict(slow.state_dict())
    ids, targets = torch.randint(4, 260, (2, 8, 64))
    loss = rt.compile(fast)(ids.to(GPU), targets.to(GPU))
    assert loss.item() == pytest.approx(slow(ids, targets).item(), rel=0.01)


@pytest.mark.fault(27)
def test_auto_goes_on_without_fa3_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    rt = tg.Runtime.start(settings(compile=0))
    assert rt.attention in ("cudnn", "flash", "math")
    assert "attention:fa3 compiled:False not used: " in rt.notes[0]
    assert "flash_attn_interface" in rt.notes[0]


@pytest.mark.fault(21)
def test_heads_too_wide_for_flash_get_another_attention():
    h = settings(model_dim=1024, num_heads=2, num_kv_heads=1, attn="flash", compile=0)
    with pytest.raises(tg.SettingsError, match="ATTN=flash COMPILE=0: cannot run here"):
        tg.Runtime.start(h)
    rt = tg.Runtime.start(dataclasses.replace(h, attn="auto"))
    assert rt.attention != "flash"
    assert any("attention:flash" in note for note in rt.notes) or rt.attention == "cudnn"


@pytest.mark.fault(29)
def test_a_compiler_that_fails_leaves_all_eager(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no Triton here")

    monkeypatch.setattr(torch, "compile", fails)
    rt = tg.Runtime.start(settings())
    assert (rt.device.type, rt.compiled) == ("cuda", False)
    assert any("compiled:True not used" in note and "no Triton" in note for note in rt.notes)
    with pytest.raises(tg.SettingsError, match=r"COMPILE=1.*\n(.*\n)*.*no Triton"):
        tg.Runtime.start(settings(compile=1))


def test_newton_schulz_in_bf16_stays_in_its_band():
    stack = torch.randn(22, 512, 512, device=GPU)
    ends = torch.linalg.svdvals(tg.newton_schulz(stack.bfloat16(), 5).float())
    relative = torch.linalg.svdvals(stack) / stack.norm(dim=(1, 2))[:, None]
    assert ends[relative > 0.002].min() > 0.65
    assert ends.max() < 1.23


@pytest.mark.parametrize("jepa", [{}, {"JEPA_CHUNK_SIZE": "4", "JEPA_SIGREG": "lejepa"}])
@pytest.mark.parametrize("compiled", ["0", "1"])
def test_a_whole_run(tmp_path, byte_corpus, monkeypatch, compiled, jepa):
    monkeypatch.chdir(tmp_path)
    env = {
        **TINY,
        **jepa,
        "COMPILE": compiled,
        "MODEL_DIM": "64",
        "NUM_HEADS": "2",
        "NUM_KV_HEADS": "1",
        "ROPE_DIMS": "16",
        "DATA_PATH": str(byte_corpus),
        "RUN_ID": "gpu",
        "WARMUP_STEPS": "2",
        "EVAL_WINDOW": "64",
    }
    assert tg.main([], env) == 0
    result = json.loads((tmp_path / "logs/gpu/result.json").read_text())
    assert result["scores"]["plain"]["val_loss"] < 3.5
    assert abs(result["scores"]["plain"]["val_bpb"] - result["scores"]["float"]["val_bpb"]) < 0.05
    assert (
        abs(result["scores"]["window"]["val_bpb"] - result["scores"]["sliding"]["val_bpb"]) < 0.05
    )
    assert result["verdicts"]["eval_seconds"] == "PASS"
