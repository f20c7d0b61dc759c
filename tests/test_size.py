"""The size promise: bytes foretold from entropy, scales widened until all fits, or a failure."""

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


def test_entropy_is_that_of_a_count():
	generator = torch.Generator().manual_seed(0)
	codes = [
		(torch.randn(50, 30, generator=generator) * 9).round().clamp(-31, 31).to(torch.int8),
		torch.tensor([[-128, 127, -128, 0]], dtype=torch.int8),
	]
	counts = Counter(int(c) for array in codes for c in array.flatten())
	total = sum(counts.values())
	bits = -sum(n * math.log2(n / total) for n in counts.values())
	assert tg.entropy_bytes(codes) == pytest.approx(bits / 8, rel=1e-6)
	assert tg.entropy_bytes([torch.full((9, 9), 3, dtype=torch.int8)]) == 0
	fair = torch.arange(-128, 128).to(torch.int8)
	assert tg.entropy_bytes([fair]) == pytest.approx(256)


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


def told(log_text: str) -> tuple[int, int]:
	"""Bytes foretold and packed."""
	found = re.search(r"size: (\d+) bytes foretold, (\d+) packed", log_text)
	return int(found[1]), int(found[2])


@pytest.mark.parametrize("compressor", ["zstd", "lzma"])
def test_bytes_are_foretold_within_a_hundredth(compressor, capsys):
	model = large_model()
	h = tg.replace(model.h, compressor=compressor)
	blob, widen = tg.shrink(model, {}, h, 10**7, tg.Log())
	foretold, packed = told(capsys.readouterr().out)
	assert (packed, widen) == (len(blob), 1.0)
	assert packed > 300_000
	assert foretold == pytest.approx(packed, rel=0.01)


@pytest.mark.parametrize(("part", "compressor"), [(0.995, "zstd"), (0.6, "zstd"), (0.5, "lzma")])
def test_one_factor_widens_the_scales_until_it_fits(part, compressor, capsys):
	"""Even where coarse codes compress less well than foretold, as lzma does at a half."""
	model = large_model()
	h = tg.replace(model.h, compressor=compressor)
	free, _ = tg.shrink(model, {}, h, 10**7, tg.Log())
	room = int(part * len(free))
	capsys.readouterr()
	blob, widen = tg.shrink(model, {}, h, room, tg.Log())
	assert len(blob) <= room
	assert len(blob) > 0.96 * room  # and no more than that
	assert widen > 1
	assert f"over {room} bytes" in capsys.readouterr().out
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


def test_a_run_that_overshoots_is_made_to_fit(tmp_path, byte_corpus, monkeypatch, capsys):
	monkeypatch.chdir(tmp_path)
	env = {**SHORT, "DATA_PATH": str(byte_corpus), "GPTQ_ENABLED": "1", "GPTQ_CALIB_TOKENS": "256"}
	assert tg.main([], {**env, "RUN_ID": "free"}) == 0
	free = json.loads(Path("logs/free/result.json").read_text())
	assert "widen" not in capsys.readouterr().out
	limit = free["bytes"]["total"] - free["bytes"]["model"] // 10
	monkeypatch.setattr(tg, "BYTES_LIMIT", limit)
	assert tg.main([], {**env, "RUN_ID": "tight"}) == 0
	out = capsys.readouterr().out
	tight = json.loads(Path("logs/tight/result.json").read_text())
	assert tight["status"] == "ok"
	assert tight["bytes"]["total"] <= limit
	assert tight["scores"]["float"]["val_bpb"] == free["scores"]["float"]["val_bpb"]
	# The cost is over the artifact that would not have fitted.
	cost = tight["scores"]["plain"]["val_bpb"] - free["scores"]["plain"]["val_bpb"]
	assert f"size: the wider scales cost {cost:.4f} bpb" in out
	assert all(math.isfinite(s["val_bpb"]) for s in tight["scores"].values())
	artifact = "logs/tight/final_model.int6.ptz"
	assert tg.main(["--eval", artifact], env) == 0
	bpb = tight["scores"]["plain"]["val_bpb"]
	assert f"final_int6_roundtrip_exact val_loss:{tight['scores']['plain']['val_loss']:.8f}" in out
	assert f"val_bpb:{bpb:.8f}" in capsys.readouterr().out


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
