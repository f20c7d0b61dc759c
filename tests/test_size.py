"""The size promise: scales widened until all fits in few packings, or a failure."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TINY, settings

import train_gpt as tg

SHORT = {**TINY, "ITERATIONS": "6", "WARMDOWN_ITERS": "3"}


def entropy_bytes(codes: list[torch.Tensor]) -> float:
    """Order-0 entropy of all codes together, in bytes, by counting them one by one."""
    counts = Counter(int(c) for array in codes for c in array.flatten())
    total = sum(counts.values())
    return -sum(n * math.log2(n / total) for n in counts.values()) / 8


def large_model() -> tg.GPT:
    """A model of some 600,000 weights of different sizes."""
    torch.manual_seed(0)
    model = tg.GPT(settings(model_dim=128, num_layers=4, bigram_vocab_size=512))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * (0.02 + 0.1 * (i % 3)))
    return model


def sizes(log_text: str) -> list[tuple[int, int, float]]:
    """Bytes packed, entropy of the matrices' codes and factor of each packing."""
    line = r"size: (\d+) bytes packed, .* codes (\d+); widened by ([\d.]+)"
    return [(int(m[1]), int(m[2]), float(m[3])) for m in re.finditer(line, log_text)]


def test_the_log_tells_bytes_and_entropy(capsys):
    model = large_model()
    blob = tg.shrink(model, {}, model.h, 10**7, tg.Log())
    ((packed, entropy, factor),) = sizes(capsys.readouterr().out)
    assert (packed, factor) == (len(blob), 1.0)
    _, arrays = tg.unpack(blob, model.h)
    roles = tg.parameter_roles(model)
    matrices = [arrays[f"{name}.codes"] for name, role in roles.items() if role == "matrix"]
    assert entropy == pytest.approx(entropy_bytes(matrices), abs=1)
    assert 0.5 * packed < entropy < packed


@pytest.mark.parametrize("part", [0.995, 0.9, 0.6, 0.5])
def test_one_factor_widens_the_scales_until_it_fits(part, capsys):
    """In a few rounds, even where twice the factor saves less than a bit a code."""
    model = large_model()
    h = model.h
    free = tg.shrink(model, {}, h, 10**7, tg.Log())
    room = int(part * len(free))
    capsys.readouterr()
    blob = tg.shrink(model, {}, h, room, tg.Log())
    assert len(blob) <= room
    assert len(blob) > 0.98 * room  # and no more than that
    told = sizes(capsys.readouterr().out)
    assert told[0][::2] == (len(free), 1.0)
    packed, _, widen = told[-1]
    assert packed == len(blob)
    assert widen > 1
    assert 2 <= len(told) <= 6
    assert all(size > room for size, *_ in told[:-1])  # it stops at the first that fits
    # One factor for all 6-bit scales, none for the others.
    _, before = tg.unpack(free, h)
    _, after = tg.unpack(blob, h)
    roles = tg.parameter_roles(model)
    for name, role in roles.items():
        if f"{name}.scales" in before:
            ratio = after[f"{name}.scales"].float() / before[f"{name}.scales"].float()
            if role == "matrix":
                torch.testing.assert_close(ratio, torch.full_like(ratio, widen), rtol=2e-3, atol=0)
            else:
                assert torch.equal(after[f"{name}.codes"], before[f"{name}.codes"])
        else:
            assert torch.equal(after[name], before[name])


def test_it_gives_up_where_nothing_would_fit(capsys):
    model = tg.GPT(settings())
    tg.shrink(model, {}, model.h, -(10**9), tg.Log())
    tried = [widen for *_, widen in sizes(capsys.readouterr().out)]
    assert tg.WIDEST < tried[-1] < 2 * tg.WIDEST
    assert len(tried) <= 4


def test_a_run_that_overshoots_is_made_to_fit(tmp_path, byte_corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    env = {**SHORT, "DATA_PATH": str(byte_corpus), "GPTQ_ENABLED": "1", "GPTQ_CALIB_TOKENS": "256"}
    assert tg.main([], {**env, "RUN_ID": "free"}) == 0
    free = json.loads(Path("logs/free/result.json").read_text())
    assert [widen for *_, widen in sizes(capsys.readouterr().out)] == [1.0]
    limit = free["bytes"]["total"] - free["bytes"]["model"] // 10
    monkeypatch.setattr(tg, "BYTES_LIMIT", limit)
    assert tg.main([], {**env, "RUN_ID": "tight"}) == 0
    out = capsys.readouterr().out
    tight = json.loads(Path("logs/tight/result.json").read_text())
    assert tight["status"] == "ok"
    assert tight["bytes"]["total"] <= limit
    assert tight["scores"]["float"]["val_bpb"] == free["scores"]["float"]["val_bpb"]
    assert all(math.isfinite(s["val_bpb"]) for s in tight["scores"].values())
    artifact = "logs/tight/final_model.int6.ptz"
    assert tg.main(["--eval", artifact], env) == 0
    bpb = tight["scores"]["plain"]["val_bpb"]
    assert f"final_int6_roundtrip_exact val_loss:{tight['scores']['plain']['val_loss']:.8f}" in out
    assert f"val_bpb:{bpb:.8f}" in capsys.readouterr().out


@pytest.mark.fault(39)
def test_what_cannot_fit_fails_and_says_by_how_much(tmp_path, byte_corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    limit = len(Path(tg.__file__).read_bytes()) + 9000
    monkeypatch.setattr(tg, "BYTES_LIMIT", limit)
    env = {**SHORT, "DATA_PATH": str(byte_corpus), "RUN_ID": "big", "EVAL_STRIDE": "0"}
    assert tg.main([], env) == 1
    result = json.loads(Path("logs/big/result.json").read_text())
    assert (result["status"], result["verdicts"]["total_bytes"]) == ("over a limit", "FAIL")
    total = result["bytes"]["total"]
    assert total > limit
    assert f"limit:total_bytes {total:,} of {limit:,} FAIL" in capsys.readouterr().out
