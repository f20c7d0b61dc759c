"""Quantizing and packing: rounding by its definition, the container by taking it apart."""

import hashlib
import json
import math
import struct
import sys

import numpy as np
import pytest
import torch
import zstandard
from conftest import TINY, randomize, settings

import train_gpt as tg


def round_one(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of one matrix, as a stack of one."""
    codes, scales, only_rounded = tg.round_rows(weight[None], None, bits, 1.0)
    assert only_rounded.tolist() == [True]
    return codes[0], scales[0]


def reference_rows(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Best of the clips for each row, one weight at a time, in float64."""
    limit = 2 ** (bits - 1) - 1
    rows = []
    for row in weight.double():
        candidates = []
        for clip in tg.CLIPS:
            scale = float(np.float16(float(row.abs().max()) * clip / limit))
            codes = [max(-limit, min(limit, round(float(w) / scale))) for w in row]
            values = torch.tensor([c * scale for c in codes], dtype=torch.float64)
            candidates.append((float((values - row).square().sum()), values))
        rows.append(min(candidates, key=lambda c: c[0])[1])
    return torch.stack(rows)


@pytest.mark.parametrize("bits", [6, 8])
def test_rounding_is_the_best_clip_of_each_row(bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 2048, generator=generator)
    weight[3, 5] = 30.0 if bits == 6 else 120.0  # a row that is better clipped
    codes, scales = round_one(weight, bits)
    got = (codes.double() * scales.double()[:, None] - weight.double()).square().sum(1)
    want = (reference_rows(weight, bits) - weight.double()).square().sum(1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-9)
    clips = scales * (2 ** (bits - 1) - 1) / weight.abs().amax(1)
    assert bits == 8 or clips[3] < 0.9
    assert clips[0] > 0.9
    assert codes.abs().max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("std", [1.0, 0.01, 0.0003])
@pytest.mark.parametrize(("bits", "relative"), [(6, 0.03), (8, 0.008)])
def test_small_weights_are_as_precise_as_large_ones(std, bits, relative):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * std
    codes, scales = round_one(weight, bits)
    error = codes.float() * scales.float()[:, None] - weight
    assert error.norm() / weight.norm() < relative


@pytest.mark.fault(41)
def test_rows_of_zeros_and_of_one_value():
    weight = torch.stack((torch.zeros(16), torch.full((16,), 0.3), torch.full((16,), -2e4)))
    codes, scales = round_one(weight, 6)
    assert scales.isfinite().all() and (scales > 0).all()
    assert not codes[0].any()
    back = codes.float() * scales.float()[:, None]
    torch.testing.assert_close(back, weight, rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def packed() -> tuple[tg.Hyperparameters, tg.GPT, dict[str, torch.Tensor], bytes]:
    h = settings()
    model = randomize(tg.GPT(h))
    arrays, rounded = tg.quantize(model)
    assert not rounded  # none was to be more than rounded
    return h, model, arrays, tg.pack(h, arrays)


def test_roles_decide_how_a_tensor_is_stored(packed):
    _, model, arrays, _ = packed
    assert arrays["blocks.0.attn.c_q.weight.codes"].abs().max() == 31
    assert arrays["tok_emb.weight.codes"].abs().max() == 127
    for name in ("bigram.proj.weight", "smear.gate", "skip_weights", "blocks.1.resid_mix"):
        assert arrays[name].dtype == torch.float16
    coded = [n for n in arrays if n.endswith(".codes")]
    assert len(coded) == 3 * 6 + 3  # 6 matrices a block; tokens, bigram and value tables


def test_the_file_satisfies_its_description(packed):
    """Read by the format alone: header, settings, zstd payload of codes, scales, float16."""
    h, model, arrays, blob = packed
    magic, n_settings = struct.unpack_from("<12sI", blob)
    assert magic == b"PGOLFGPT\1\0\0\0"
    assert blob[16:48] == hashlib.sha256(blob[:16] + bytes(32) + blob[48:]).digest()
    assert json.loads(blob[48 : 48 + n_settings]) == tg.model_settings(h)
    raw = zstandard.ZstdDecompressor().decompress(blob[48 + n_settings :])
    names = [name for name, _ in model.named_parameters()]
    order = [f"{n}.codes" for n in names] + [f"{n}.scales" for n in names] + names
    want = b"".join(arrays[n].numpy().tobytes() for n in order if n in arrays)
    assert raw == want


def test_packing_and_reading_back(packed, tmp_path):
    h, model, arrays, blob = packed
    path = tmp_path / "a.ptz"
    path.write_bytes(blob)
    other = settings(num_layers=7, seed=5, eval_stride=16)  # the artifact's own settings win
    read, weights = tg.load_artifact(path, other)
    assert tg.model_settings(read) == tg.model_settings(h)
    assert (read.seed, read.eval_stride) == (5, 16)
    assert weights.keys() == model.state_dict().keys()
    for name, p in model.state_dict().items():
        if name in arrays:
            assert torch.equal(weights[name], p.half().float())
        else:
            scale = arrays[f"{name}.scales"].float()[:, None]
            assert torch.equal(weights[name], arrays[f"{name}.codes"].float() * scale)
    tg.GPT(read).load_state_dict(weights)


def test_the_bytes_repeat(packed):
    h, model, _, blob = packed
    assert tg.pack(h, tg.quantize(model)[0]) == blob


def resigned(blob: bytes) -> bytes:
    """The bytes with a checksum that fits them."""
    digest = hashlib.sha256(blob[:16] + bytes(32) + blob[48:]).digest()
    return blob[:16] + digest + blob[48:]


def parts(blob: bytes) -> tuple[bytes, bytes, bytes]:
    n = struct.unpack_from("<I", blob, 12)[0]
    return blob[:48], blob[48 : 48 + n], blob[48 + n :]


def with_settings(blob: bytes, text: bytes) -> bytes:
    head, _, payload = parts(blob)
    return resigned(head[:12] + struct.pack("<I", len(text)) + head[16:] + text + payload)


def with_payload(blob: bytes, payload: bytes) -> bytes:
    head, told, _ = parts(blob)
    return resigned(head + told + payload)


def refused(path, data: bytes, h: tg.Hyperparameters) -> str:
    path.write_bytes(data)
    with pytest.raises(tg.DataError) as error:
        tg.load_artifact(path, h)
    assert str(path) in str(error.value)
    return str(error.value)


def test_damage_is_found(packed, tmp_path):
    h, _, _, blob = packed
    _, told, payload = parts(blob)
    told = json.loads(told)
    raw_size = len(zstandard.ZstdDecompressor().decompress(payload))
    zstd = zstandard.ZstdCompressor()
    unsized = zstandard.ZstdCompressor(write_content_size=False)
    bad = {
        "empty": b"",
        "cut": blob[:-1],
        "cut in the header": blob[:40],
        "extended": blob + b"\0",
        "flipped": blob[:200] + bytes([blob[200] ^ 1]) + blob[201:],
        "magic": resigned(b"PGOLFXXX" + blob[8:]),
        "version": resigned(blob[:8] + b"\2\0" + blob[10:]),
        "codec": resigned(blob[:10] + b"\7\0" + blob[12:]),
        "length of settings": resigned(blob[:12] + struct.pack("<I", 2**32 - 1) + blob[16:]),
        "other settings": with_settings(blob, json.dumps({**told, "num_layers": 4}).encode()),
        "wrong type": with_settings(blob, json.dumps({**told, "num_layers": "3"}).encode()),
        "not a number": with_settings(blob, json.dumps({**told, "rope_base": math.nan}).encode()),
        "illegal settings": with_settings(blob, json.dumps({**told, "num_heads": 5}).encode()),
        "unknown settings": with_settings(blob, json.dumps({**told, "extra": 1}).encode()),
        "missing settings": with_settings(blob, b"{}"),
        "no object": with_settings(blob, b"[1]"),
        "no JSON": with_settings(blob, b"\xff{"),
        "bomb": with_payload(blob, zstd.compress(bytes(200_000_000))),
        "small payload": with_payload(blob, zstd.compress(bytes(5))),
        "unsized bomb": with_payload(blob, unsized.compress(bytes(200_000_000))),
        "one byte more": with_payload(blob, zstd.compress(bytes(raw_size + 1))),
        "garbage after the frame": with_payload(blob, payload + b"garbage"),
        "two frames": with_payload(blob, payload + payload),
        "no frame": with_payload(blob, b"not a frame at all"),
        "cut frame": with_payload(blob, payload[:-9]),
        "pickle": b"\x80\x04\x95" + bytes(100),
    }
    for name, data in bad.items():
        assert "cannot be read as an artifact" in refused(tmp_path / name, data, h)


def test_any_training_length_can_be_read_without_variables(tmp_path):
    """Nothing that the artifact does not carry may stand against what it carries."""
    h = settings(train_seq_len=50, train_batch_tokens=1000)
    path = tmp_path / "a.ptz"
    path.write_bytes(tg.pack(h, tg.quantize(tg.GPT(h))[0]))
    read, _ = tg.load_artifact(path, tg.Hyperparameters())
    assert read.train_seq_len == 50


@pytest.mark.fault(34)
def test_diverged_weights_are_not_quantized():
    model = tg.GPT(settings())
    model.blocks[1].mlp.up.weight.data[3, 4] = math.nan
    with pytest.raises(
        tg.DivergenceError, match=r"1\.mlp\.up\.weight is not float32 or not finite"
    ):
        tg.quantize(model)


@pytest.mark.fault(35)
def test_a_missing_compressor_stops_the_run_before_it_trains(monkeypatch, byte_corpus, tmp_path):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(tg.SettingsError, match=r"zstandard: pip install zstandard"):
        tg.zstd()
    env = {**TINY, "DATA_PATH": str(byte_corpus), "RUN_DIR": str(tmp_path / "run")}
    monkeypatch.setattr(tg, "run", lambda *_: pytest.fail("training began"))
    for argv in ([], ["--check"]):
        assert tg.main(argv, env) == 2
    reason = json.loads((tmp_path / "run" / "result.json").read_text())["reason"]
    assert "pip install zstandard" in reason


@pytest.mark.fault(35)
def test_an_artifact_of_another_compressor_is_refused_by_its_path(packed, tmp_path, monkeypatch):
    h, _, _, blob = packed
    for codec in (2, 9, 65_535):
        refused(tmp_path / "a.ptz", resigned(blob[:10] + struct.pack("<H", codec) + blob[12:]), h)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install zstandard" in refused(tmp_path / "a.ptz", blob, h)


@pytest.mark.fault(40)
def test_more_weights_than_a_quantile_takes_are_quantized():
    """On no device: torch.quantile refuses 2^24 + 1 values there too."""
    with torch.device("meta"):
        model = tg.GPT(settings(vocab_size=65_536, model_dim=512, num_layers=1))
    assert model.tok_emb.weight.numel() > 2**24
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(model.tok_emb.weight, 0.9)
    arrays, _ = tg.quantize(model)
    assert arrays["tok_emb.weight.codes"].shape == (65_536, 512)
