"""Quantizing and packing: rounding by its definition, the container by taking it apart."""

import hashlib
import json
import lzma
import struct

import numpy as np
import pytest
import torch
import zstandard
from conftest import randomize, settings

import train_gpt as tg


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
    codes, scales = tg.round_rows(weight, bits)
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
    codes, scales = tg.round_rows(weight, bits)
    error = codes.float() * scales.float()[:, None] - weight
    assert error.norm() / weight.norm() < relative


def test_rows_of_zeros_and_of_one_value():
    weight = torch.stack((torch.zeros(16), torch.full((16,), 0.3), torch.full((16,), -2e4)))
    codes, scales = tg.round_rows(weight, 6)
    assert scales.isfinite().all()
    assert not codes[0].any()
    back = codes.float() * scales.float()[:, None]
    torch.testing.assert_close(back, weight, rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def packed() -> tuple[tg.Hyperparameters, tg.GPT, dict[str, torch.Tensor], bytes]:
    h = settings(tie_embeddings=0)
    model = randomize(tg.GPT(h))
    arrays = tg.quantize(model)
    return h, model, arrays, tg.pack(h, arrays)


def test_roles_decide_how_a_tensor_is_stored(packed):
    _, model, arrays, _ = packed
    assert arrays["blocks.0.attn.c_q.weight.codes"].abs().max() == 31
    assert arrays["tok_emb.weight.codes"].abs().max() == 127
    assert arrays["lm_head.weight.codes"].abs().max() == 127
    for name in ("bigram.proj.weight", "smear.gate", "skip_weights", "blocks.1.resid_mix"):
        assert arrays[name].dtype == torch.float16
    coded = [n for n in arrays if n.endswith(".codes")]
    assert len(coded) == 3 * 6 + 4  # 6 matrices a block; tokens, head, bigram and value tables


def test_the_file_satisfies_its_description(packed):
    """Read by the format alone: header, settings, zstd payload of codes, scales, float16."""
    h, model, arrays, blob = packed
    magic, version, codec, n_settings, n_payload, n_raw = struct.unpack_from("<8sHHIQQ", blob)
    head = 32 + 32
    assert (magic, version, codec) == (b"PGOLFGPT", 1, 0)
    assert len(blob) == head + n_settings + n_payload
    assert blob[32:64] == hashlib.sha256(blob[:32] + bytes(32) + blob[64:]).digest()
    assert json.loads(blob[head : head + n_settings]) == tg.model_settings(h)
    raw = zstandard.ZstdDecompressor().decompress(blob[head + n_settings :])
    assert len(raw) == n_raw
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
    assert tg.pack(h, tg.quantize(model)) == blob


def test_lzma_too(packed):
    h, _, arrays, blob = packed
    other = settings(tie_embeddings=0, compressor="lzma")
    blob_lzma = tg.pack(other, arrays)
    assert blob_lzma[10] == 1
    _, got = tg.unpack(blob_lzma, h)
    _, want = tg.unpack(blob, h)
    assert all(np.array_equal(got[name], want[name]) for name in want)


def resigned(blob: bytes) -> bytes:
    """The bytes with a checksum that fits them."""
    digest = hashlib.sha256(blob[:32] + bytes(32) + blob[64:]).digest()
    return blob[:32] + digest + blob[64:]


def with_settings(blob: bytes, text: bytes) -> bytes:
    n = struct.unpack_from("<I", blob, 12)[0]
    return resigned(blob[:12] + struct.pack("<I", len(text)) + blob[16:64] + text + blob[64 + n :])


def with_payload(blob: bytes, payload: bytes) -> bytes:
    n = struct.unpack_from("<I", blob, 12)[0]
    head = blob[:16] + struct.pack("<Q", len(payload)) + blob[24 : 64 + n]
    return resigned(head + payload)


def test_damage_is_found(packed):
    h, _, _, blob = packed
    n = struct.unpack_from("<I", blob, 12)[0]
    told = json.loads(blob[64 : 64 + n])
    raw_size = struct.unpack_from("<Q", blob, 24)[0]
    bomb = zstandard.ZstdCompressor().compress(bytes(200_000_000))
    small = zstandard.ZstdCompressor().compress(bytes(5))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(raw_size))
    bad = {
        "empty": b"",
        "cut": blob[:-1],
        "cut in the header": blob[:40],
        "extended": blob + b"\0",
        "flipped": blob[:200] + bytes([blob[200] ^ 1]) + blob[201:],
        "magic": resigned(b"PGOLFXXX" + blob[8:]),
        "version": resigned(blob[:8] + b"\2\0" + blob[10:]),
        "codec": resigned(blob[:10] + b"\7\0" + blob[12:]),
        "raw size": resigned(blob[:24] + struct.pack("<Q", raw_size + 1) + blob[32:]),
        "other settings": with_settings(blob, json.dumps({**told, "num_layers": 4}).encode()),
        "wrong type": with_settings(blob, json.dumps({**told, "num_layers": "3"}).encode()),
        "illegal settings": with_settings(blob, json.dumps({**told, "num_heads": 5}).encode()),
        "unknown settings": with_settings(blob, json.dumps({**told, "extra": 1}).encode()),
        "missing settings": with_settings(blob, b"{}"),
        "no object": with_settings(blob, b"[1]"),
        "no JSON": with_settings(blob, b"\xff{"),
        "bomb": with_payload(blob, bomb),
        "small payload": with_payload(blob, small),
        "unsized payload": with_payload(blob, unsized),
        "no frame": with_payload(blob, b"not a frame at all"),
        "cut frame": with_payload(blob, blob[64 + n : -9]),
        "pickle": b"\x80\x04\x95" + bytes(100),
    }
    for name, data in bad.items():
        with pytest.raises(tg.ArtifactError):
            tg.unpack(data, h)
            pytest.fail(f"{name} was accepted")


def test_lzma_damage_is_found(packed):
    _, _, arrays, _ = packed
    h = settings(tie_embeddings=0, compressor="lzma")
    blob = tg.pack(h, arrays)
    n = struct.unpack_from("<I", blob, 12)[0]
    bomb = lzma.compress(bytes(50_000_000))
    for payload in (bomb, lzma.compress(b"x"), b"no stream", blob[64 + n : -9]):
        with pytest.raises(tg.ArtifactError):
            tg.unpack(with_payload(blob, payload), h)


def test_a_missing_compressor_stops_the_run_before_it_trains(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(tg.SettingsError, match=r"COMPRESSOR=zstd.*pip install zstandard.*lzma"):
        tg.require_compressor("zstd")
    tg.require_compressor("lzma")
