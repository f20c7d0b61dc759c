"""Quantizing and packing: rounding by its definition, the container by taking it apart."""

import importlib.machinery
import json
import math
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, randomize, settings
from hostile import (
    CODECS,
    MAGIC,
    artifact,
    compress,
    decompress,
    described,
    description,
    parts,
    resigned,
)

import train_gpt as tg

every_codec = pytest.mark.parametrize("codec", CODECS)
every_quantizer = pytest.mark.parametrize("quantizer", tg.QUANTIZERS)


def quantize_one(quantizer: str, weight: torch.Tensor, bits: int) -> tuple:
    """Codes and scales of one matrix, as a stack of one with an identity for its Hessian."""
    eye = torch.eye(weight.size(1))[None]
    codes, scales, failed = tg.QUANTIZERS[quantizer](bits, 1.0, weight[None], eye)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float16
    assert failed.tolist() == [False]
    return codes[0], scales[0]


def reference_rows(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Best of the clips for each row, one weight at a time, in float64."""
    limit = 2 ** (bits - 1) - 1
    rows = []
    for row in weight.double():
        candidates = []
        for clip in tg.CLIP_RATIOS:
            scale = float(np.float16(float(row.abs().max()) * clip / limit))
            codes = [max(-limit, min(limit, round(float(w) / scale))) for w in row]
            values = torch.tensor([c * scale for c in codes], dtype=torch.float64)
            candidates.append((float((values - row).square().sum()), values))
        rows.append(min(candidates, key=lambda c: c[0])[1])
    return torch.stack(rows)


@every_quantizer
@pytest.mark.parametrize("bits", [6, 8])
def test_each_row_takes_the_clip_of_least_error(quantizer, bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 2048, generator=generator)
    weight[3, 5] = 30.0 if bits == 6 else 120.0  # a row that is better clipped
    codes, scales = quantize_one(quantizer, weight, bits)
    got = (codes.double() * scales.double()[:, None] - weight.double()).square().sum(1)
    want = (reference_rows(weight, bits) - weight.double()).square().sum(1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-9)
    clips = scales * (2 ** (bits - 1) - 1) / weight.abs().amax(1)
    assert bits == 8 or clips[3] < 0.9
    assert clips[0] > 0.9
    assert codes.abs().max() <= 2 ** (bits - 1) - 1


@every_quantizer
@pytest.mark.parametrize("std", [1.0, 0.01, 0.0003])
@pytest.mark.parametrize(("bits", "relative"), [(6, 0.03), (8, 0.008)])
def test_small_weights_are_as_precise_as_large_ones(quantizer, std, bits, relative):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * std
    codes, scales = quantize_one(quantizer, weight, bits)
    error = codes.float() * scales.float()[:, None] - weight
    assert error.norm() / weight.norm() < relative


@every_quantizer
@pytest.mark.fault(41)
def test_rows_of_zeros_and_of_one_value(quantizer):
    weight = torch.stack((torch.zeros(16), torch.full((16,), 0.3), torch.full((16,), -2e4)))
    codes, scales = quantize_one(quantizer, weight, 6)
    assert scales.isfinite().all() and (scales > 0).all()
    assert not codes[0].any()
    back = codes.float() * scales.float()[:, None]
    torch.testing.assert_close(back, weight, rtol=1e-3, atol=0)


@every_quantizer
def test_a_scale_factor_multiplies_every_scale(quantizer):
    weight = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(16).expand(2, -1, -1)
    _, before, _ = tg.QUANTIZERS[quantizer](6, 1.0, weight, hessian)
    codes, after, _ = tg.QUANTIZERS[quantizer](6, 1.7, weight, hessian)
    torch.testing.assert_close(after.float(), 1.7 * before.float(), rtol=1e-3, atol=0)
    error = codes.float() * after.float()[..., None] - weight
    assert error.abs().max() <= 0.5 * after.max() or codes.abs().max() == 31


Packed = tuple[tg.Hyperparameters, tg.GPT, dict[str, torch.Tensor], bytes, str]


@pytest.fixture(scope="module", params=CODECS)
def packed(request) -> Packed:
    """Settings, model, arrays, artifact and codec."""
    h = settings()
    model = randomize(tg.GPT(h))
    arrays, failed = tg.quantize_model(model, {}, tg.Ranks())
    assert not failed  # none was to be quantized by GPTQ
    return h, model, arrays, tg.pack_artifact(h, arrays, request.param), request.param


def test_roles_decide_how_a_tensor_is_stored():
    model = randomize(tg.GPT(settings(tie_embeddings=0, jepa_chunk_size=4)))
    arrays, _ = tg.quantize_model(model, {}, tg.Ranks())
    assert arrays["blocks.0.attn.c_q.weight.codes"].abs().max() == 31
    for name in ("tok_emb.weight", "lm_head.weight", "value_embedding.embed.weight"):
        assert arrays[f"{name}.codes"].abs().max() == 127
    for name in ("bigram.proj.weight", "smear.gate", "skip_weights", "blocks.1.resid_mix"):
        assert arrays[name].dtype == torch.float16
    roles = tg.parameter_roles(model)
    coded = {n.removesuffix(".codes") for n in arrays if n.endswith(".codes")}
    assert coded == {n for n, role in roles.items() if role != "scalar"}
    matrices = [n for n, role in roles.items() if role == "matrix"]
    assert len(matrices) == 3 * 6  # six in a block
    layout = {n: (a.shape, a.dtype) for n, a in tg.artifact_layout(model).items()}
    assert layout == {n: (a.shape, a.dtype) for n, a in arrays.items()}
    assert [*layout] == [*arrays]


def test_the_file_satisfies_its_description(packed):
    """Read by the format alone: header, description, compressed codes, scales and float16."""
    h, model, arrays, blob, codec = packed
    magic, n_description = struct.unpack_from("<12sI", blob)
    assert magic == b"PGOLFGPT\2\0\0\0" == MAGIC
    assert resigned(blob) == blob  # by the SHA-256 of all but itself
    told = json.loads(blob[48 : 48 + n_description])
    assert told == {"codec": codec, "settings": tg.model_settings(h)}
    raw = decompress(codec, blob[48 + n_description :])
    names = [name for name, _ in model.named_parameters()]
    order = [f"{n}.codes" for n in names] + [f"{n}.scales" for n in names] + names
    by_columns = codec == "brotli"  # which stores the codes column by column
    want = b""
    for name in order:
        if name in arrays:
            array = arrays[name]
            array = array.mT if by_columns and name.endswith(".codes") else array
            want += np.ascontiguousarray(array.numpy()).tobytes()
    assert raw == want


def test_packing_and_reading_back(packed, tmp_path):
    h, model, arrays, blob, codec = packed
    path = tmp_path / "a.ptz"
    path.write_bytes(blob)
    # The artifact's own settings win, and its codec.
    other = settings(num_layers=7, seed=5, eval_stride=16, compressor="lzma")
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
    again, unpacked = tg.unpack_artifact(blob, other)
    assert again == read
    assert [*unpacked] == [*arrays]
    assert all(torch.equal(unpacked[name], array) for name, array in arrays.items())


def test_the_bytes_repeat(packed):
    h, model, _, blob, codec = packed
    assert tg.pack_artifact(h, tg.quantize_model(model, {}, tg.Ranks())[0], codec) == blob


def with_settings(blob: bytes, told: object) -> bytes:
    """The artifact with other settings in its description."""
    codec, _, _ = described(blob)
    return artifact(description(codec, told), parts(blob)[1])


def refused(path: Path, data: bytes, h: tg.Hyperparameters) -> str:
    path.write_bytes(data)
    with pytest.raises(tg.DataError) as error:
        tg.load_artifact(path, h)
    assert str(path) in str(error.value)
    assert "cannot be read as an artifact" in str(error.value)
    return str(error.value)


def test_damage_is_found(packed, tmp_path):
    h, _, _, blob, codec = packed
    text, payload = parts(blob)
    _, told, raw = described(blob)
    assert artifact(text, payload) == blob
    bad = {
        "empty": b"",
        "cut": blob[:-1],
        "cut in the header": blob[:40],
        "extended": blob + b"\0",
        "flipped": blob[:200] + bytes([blob[200] ^ 1]) + blob[201:],
        "magic": artifact(text, payload, b"PGOLFXXX" + MAGIC[8:]),
        "length of description": resigned(blob[:12] + struct.pack("<I", 2**32 - 1) + blob[16:]),
        "other settings": with_settings(blob, {**told, "num_layers": 4}),
        "wrong type": with_settings(blob, {**told, "num_layers": "3"}),
        "not a number": with_settings(blob, {**told, "rope_base": math.nan}),
        "illegal settings": with_settings(blob, {**told, "num_heads": 5}),
        "unknown settings": with_settings(blob, {**told, "extra": 1}),
        "missing settings": with_settings(blob, {}),
        "settings that are a list": with_settings(blob, [1]),
        "no JSON": artifact(b"\xff{", payload),
        "bomb": artifact(text, compress(codec, bytes(200_000_000))),
        "small payload": artifact(text, compress(codec, bytes(5))),
        "one byte more": artifact(text, compress(codec, raw + b"\0")),
        "one byte less": artifact(text, compress(codec, raw[:-1])),
        "garbage after the frame": artifact(text, payload + b"garbage"),
        "two frames": artifact(text, payload + payload),
        "no frame": artifact(text, b"not a frame at all".ljust(1000)),
        "cut frame": artifact(text, payload[:-9]),
        "pickle": b"\x80\x04\x95" + bytes(100),
    }
    for name, data in bad.items():
        refused(tmp_path / name, data, h)
    (tmp_path / "good").write_bytes(artifact(text, compress(codec, raw)))
    tg.load_artifact(tmp_path / "good", h)


def test_an_artifact_of_another_version_names_the_program_that_reads_it(packed, tmp_path):
    """Version 1 had the settings alone for a description, and always zstd."""
    h, _, _, blob, codec = packed
    _, told, raw = described(blob)
    old = artifact(json.dumps(told).encode(), compress("zstd", raw), b"PGOLFGPT\1\0\0\0")
    refusal = refused(tmp_path / "1", old, h)
    assert "version is 1" in refusal
    assert "train_gpt.py of its own folder" in refusal
    for version in (b"\0\0\0\0", b"\3\0\0\0", b"\2\1\0\0", b"\2\0\0\1"):
        refused(tmp_path / "other", artifact(*parts(blob), b"PGOLFGPT" + version), h)


def test_a_description_has_a_codec_and_settings_and_nothing_else(packed, tmp_path):
    h, _, _, blob, codec = packed
    _, payload = parts(blob)
    _, told, _ = described(blob)
    texts = {
        "no object": (b"[1]", "description"),
        "a list of the keys": (b'["codec","settings"]', "TypeError"),
        "text": (b'"codec"', "description"),
        "a number": (b"3", "TypeError"),
        "null": (b"null", "TypeError"),
        "empty": (b"", "JSONDecodeError"),
        "no keys": (b"{}", "description"),
        "no codec": (json.dumps({"settings": told}).encode(), "description"),
        "no settings": (json.dumps({"codec": codec}).encode(), "description"),
        "another key": (description(codec, told, more=1), "description"),
        "too long": (description(codec, told).ljust(tg.MAX_DESCRIPTION + 1), "65537 bytes"),
        "settings are text": (description(codec, "x"), "AttributeError"),
        "settings are null": (description(codec, None), "AttributeError"),
        "codec unknown": (description("gzip", told), "its codec is unknown: 'gzip'"),
        "codec empty": (description("", told), "its codec is unknown"),
        "codec in capitals": (description(codec.upper(), told), "its codec is unknown"),
        "codec with a long name": (description("x" * 50_000, told), "its codec is unknown"),
        "codec null": (description(None, told), "its codec is unknown"),
        "codec is a list": (description([codec], told), "TypeError"),
        "codec is an object": (description({codec: 1}, told), "TypeError"),
    }
    for name, (text, says) in texts.items():
        assert says in refused(tmp_path / name, artifact(text, payload), h), name
    longest = description(codec, told).ljust(tg.MAX_DESCRIPTION)
    (tmp_path / "longest").write_bytes(artifact(longest, payload))
    tg.load_artifact(tmp_path / "longest", h)


@every_codec
def test_any_training_length_can_be_read_without_variables(codec, tmp_path):
    """No setting that the artifact does not store may conflict with one that it stores."""
    h = settings(train_seq_len=50, train_batch_tokens=1000)
    path = tmp_path / "a.ptz"
    arrays, _ = tg.quantize_model(tg.GPT(h), {}, tg.Ranks())
    path.write_bytes(tg.pack_artifact(h, arrays, codec))
    read, _ = tg.load_artifact(path, tg.Hyperparameters())
    assert read.train_seq_len == 50


@pytest.mark.fault(34)
def test_diverged_weights_are_not_quantized():
    model = tg.GPT(settings())
    model.blocks[1].mlp.up.weight.data[3, 4] = math.nan
    with pytest.raises(tg.DivergenceError, match=r"1\.mlp\.up\.weight is not finite float32"):
        tg.quantize_model(model, {}, tg.Ranks())


# ---- Codecs ----


@every_codec
@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 70_001])
def test_a_codec_returns_what_it_was_given_and_no_other_size(codec, size):
    generator = torch.Generator().manual_seed(size)
    raw = (torch.randn(size, generator=generator) * 5).to(torch.int8).numpy().tobytes()
    made = tg.CODECS[codec].compress(raw)
    assert tg.CODECS[codec].compress(raw) == made
    for data in (made, memoryview(made)):
        assert tg.CODECS[codec].decompress(data, size) == raw
    assert decompress(codec, made) == raw
    for other in (size - 1, size + 1, 2 * size, 10**9):
        with pytest.raises(Exception, match=r"."):
            tg.CODECS[codec].decompress(made, other)
    for more in (b"\0", made):
        with pytest.raises(Exception, match=r"."):
            tg.CODECS[codec].decompress(made + more, size)


@every_codec
def test_code_arrays_compress_to_about_their_entropy(codec):
    codes = (torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 5).to(torch.int8)
    entropy, count = tg.code_entropy(codes)
    assert count == 100_000
    made = tg.CODECS[codec].compress(codes.numpy().tobytes())
    assert entropy < len(made) < 1.06 * entropy


@pytest.fixture
def env(byte_corpus, tmp_path) -> dict[str, str]:
    """Settings of a short run, in a folder of its own."""
    short = {"ITERATIONS": "6", "WARMDOWN_ITERS": "3", "NUM_LAYERS": "2"}
    return {**TINY, **short, "DATA_PATH": str(byte_corpus), "RUN_DIR": str(tmp_path / "run")}


def result_of(env: dict[str, str]) -> dict:
    return json.loads((Path(env["RUN_DIR"]) / "result.json").read_text())


def line_with(name: str, log: str) -> str:
    """The part of a log's line that tells the scores after a name."""
    (line,) = [line for line in log.splitlines() if line.startswith(f"{name} ")]
    return line.removeprefix(f"{name} ")


@pytest.fixture(scope="module")
def zstd_run(byte_corpus, tmp_path_factory) -> dict:
    """The result of a short run with the default codec."""
    folder = tmp_path_factory.mktemp("zstd") / "run"
    short = {"ITERATIONS": "6", "WARMDOWN_ITERS": "3", "NUM_LAYERS": "2", "GPTQ_ENABLED": "1"}
    short |= {"GPTQ_CALIB_TOKENS": "256", "DATA_PATH": str(byte_corpus), "RUN_DIR": str(folder)}
    assert tg.main([], {**TINY, **short}) == 0
    return json.loads((folder / "result.json").read_text())


@every_codec
def test_every_codec_takes_a_run_from_the_environment_to_the_same_score(
    codec, zstd_run, env, capsys
):
    env |= {"COMPRESSOR": codec, "GPTQ_ENABLED": "1", "GPTQ_CALIB_TOKENS": "256"}
    assert tg.main([], env) == 0
    log = capsys.readouterr().out
    result, path = result_of(env), Path(env["RUN_DIR"]) / "final_model.int6.ptz"
    assert result["status"] == "ok"
    assert result["settings"]["compressor"] == codec
    assert described(path.read_bytes())[0] == codec
    assert result["bytes"]["model"] == path.stat().st_size
    assert f"Serialized model int6+{codec}: {path.stat().st_size} bytes" in log.splitlines()
    for kind in ("float", "plain", "sliding"):
        for value in ("val_loss", "val_bpb"):
            assert result["scores"][kind][value] == zstd_run["scores"][kind][value]
    # Read back with another codec in the environment, to the same scores.
    scores = {
        n: line_with(f"{n}_exact", log) for n in ("final_int6_roundtrip", "DIAGNOSTIC post_ema")
    }
    assert tg.main(["--eval", str(path)], {**env, "COMPRESSOR": "zstd"}) == 0
    again = capsys.readouterr().out
    assert line_with("final_int6_roundtrip_exact", again) == scores["final_int6_roundtrip"]


def too_old() -> types.ModuleType:
    """The brotli package before it could bound its output."""
    module = types.ModuleType("brotli")
    module.__spec__ = importlib.machinery.ModuleSpec("brotli", None)

    class Decompressor:
        def process(self, data: bytes) -> bytes:
            return bytes(1000)

        def is_finished(self) -> bool:
            return True

    module.compress = lambda data, **_: data
    module.Decompressor = Decompressor
    return module


def broken() -> types.ModuleType:
    """A brotli package that does not return what it was given."""
    module = too_old()
    module.Decompressor.process = lambda self, data, output_buffer_limit: b"x" * (len(data) // 2)
    return module


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("codec", "package", "module", "remedy"),
    [
        ("zstd", "zstandard", lambda: None, "pip install zstandard"),
        ("brotli", "brotli", lambda: None, "pip install brotli"),
        ("brotli", "brotli", too_old, "pip install --upgrade brotli"),
        ("brotli", "brotli", broken, "pip install --upgrade brotli"),
    ],
)
def test_a_codec_that_does_not_work_stops_the_run_before_it_trains(
    codec, package, module, remedy, monkeypatch, env
):
    monkeypatch.setitem(sys.modules, package, module())
    with pytest.raises(tg.SettingsError, match=f"^COMPRESSOR={codec}.*{remedy}$"):
        tg.load_codec(codec)
    monkeypatch.setattr(tg.Trainer, "train", lambda *_: pytest.fail("training began"))
    for argv in ([], ["--check"]):
        assert tg.main(argv, {**env, "COMPRESSOR": codec}) == 2
    result = result_of(env)
    assert result["status"] == "settings"
    assert result["reason"].startswith(f"COMPRESSOR={codec}")
    assert result["reason"].endswith(remedy)
    assert not [*Path(env["RUN_DIR"]).glob("*.ptz")]


def test_no_package_of_another_codec_is_needed(monkeypatch, env):
    monkeypatch.setitem(sys.modules, "brotli", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert tg.main(["--check"], {**env, "COMPRESSOR": "lzma"}) == 0


@pytest.mark.fault(18)
@pytest.mark.parametrize("name", ["", "zlib", "ZSTD", "0"])
def test_a_codec_that_does_not_exist_is_an_error_with_those_that_do(name):
    fault = f"COMPRESSOR='{name}': must be one of {', '.join(tg.CODECS)}"
    with pytest.raises(tg.SettingsError, match=f"^{fault}$"):
        settings(compressor=name)


@pytest.mark.fault(35)
def test_an_artifact_whose_codec_is_missing_is_refused_by_its_path(packed, tmp_path, monkeypatch):
    h, _, _, blob, codec = packed
    package = tg.CODECS[codec].package
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in refused(tmp_path / "a.ptz", blob, h)


def test_an_artifact_can_be_scored_without_the_package_of_another_codec(
    byte_corpus, env, tmp_path, monkeypatch
):
    h = settings(num_layers=2, data_path=byte_corpus)
    path = tmp_path / "a.ptz"
    arrays, _ = tg.quantize_model(tg.GPT(h), {}, tg.Ranks())
    path.write_bytes(tg.pack_artifact(h, arrays, "lzma"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert tg.main(["--eval", str(path)], env) == 0


@pytest.mark.fault(40)
def test_more_weights_than_a_quantile_takes_are_quantized():
    """On no device: torch.quantile refuses 2^24 + 1 values there too."""
    with torch.device("meta"):
        model = tg.GPT(settings(vocab_size=65_536, model_dim=512, num_layers=1))
    weight = model.tok_emb.weight
    assert weight.numel() > 2**24
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(weight, 0.9)
    codes, scales, _ = tg.quantize_rounding(8, 1.0, weight[None], None)
    assert codes.shape == (1, 65_536, 512)
    assert scales.shape == (1, 65_536)
