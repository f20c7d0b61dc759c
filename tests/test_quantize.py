"""Quantizing and packing: quantizers, codecs, and the artifact read by its format alone."""

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
from bench.harness import quantize_model
from conftest import TINY, quantize_matrices, randomize, settings
from hostile import CODECS, MAGIC, artifact, compress, described, description, parts, resigned

import train_gpt as tg

every_codec = pytest.mark.parametrize("codec", CODECS)
every_method = pytest.mark.parametrize("method", ["rounding", "gptq"])
every_quantizer = pytest.mark.parametrize("quantizer", tg.QUANTIZERS)
SCALAR = tg.QUANTIZERS["scalar"]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ---- Quantizers ----


def quantize_one(
    method: str, weight: torch.Tensor, bits: int, quantizer: str = "scalar"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and dequantized weights of one matrix, with an identity as its Hessian."""
    eye = torch.eye(weight.size(1))[None]
    codes, scales = quantize_matrices(method, weight[None], eye, bits, quantizer=quantizer)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float16)
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    values = tg.QUANTIZERS[quantizer].decode(codes[0]).double()
    return codes[0], scales[0], values * scales[0].double()[:, None]


@pytest.mark.parametrize("std", [1.0, 0.0003])
@pytest.mark.parametrize("bits", [6, 8])
def test_each_row_takes_the_clip_of_least_error(bits, std):
    """Small weights are as precise as large ones."""
    weight, limit = normal(4, 2048) * std, 2 ** (bits - 1) - 1
    weight[3, 5] = 30.0 * std if bits == 6 else 120.0 * std  # a row that is better clipped
    codes, scales, back = quantize_one("rounding", weight, bits)
    exact, errors = weight.double().numpy(), []
    for ratio in tg.CLIP_RATIOS:
        scale = np.float16(abs(exact).max(1) * ratio / limit).astype(float)[:, None]
        rounded = np.rint(exact / scale).clip(-limit, limit) * scale
        errors.append(((rounded - exact) ** 2).sum(1))
    got = (back - weight.double()).square().sum(1).numpy()
    np.testing.assert_allclose(got, np.min(errors, axis=0), rtol=1e-4)
    assert (got[:3] / (exact[:3] ** 2).sum(1)).max() < (0.05**2 if bits == 6 else 0.012**2)
    ratios = scales * limit / weight.abs().amax(1)
    assert ratios[0] > 0.85
    assert bits == 8 or ratios[3] < 0.89


@every_method
@pytest.mark.fault(41)
def test_rows_of_zeros_and_of_one_value(method):
    weight = torch.stack((torch.zeros(16), torch.full((16,), 0.3), torch.full((16,), -2e4)))
    codes, scales, back = quantize_one(method, weight, 6)
    assert scales.isfinite().all() and (scales > 0).all()
    assert not codes[0].any()
    torch.testing.assert_close(back.float(), weight, rtol=1e-3, atol=0)


@pytest.mark.fault(40)
def test_more_weights_than_a_quantile_takes_are_quantized():
    """On the meta device: torch.quantile refuses 2^24 + 1 values there too."""
    weight = torch.empty(1, 65_536, 512, device="meta")
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(weight, 0.9)
    codes, scales = quantize_matrices("rounding", weight, bits=8)
    assert (codes.shape, scales.shape) == ((1, 65_536, 512), (1, 65_536))


def test_roles_decide_how_a_tensor_is_stored():
    model = randomize(tg.GPT(settings(tie_embeddings=0, jepa_chunk_size=4)))
    arrays = quantize_model(model, {})
    largest = {"matrix": 31, "untied_embed": 127, "head": 127, "aux": 127}
    for name, role in tg.parameter_roles(model).items():
        if role == "scalar":
            assert arrays[name].dtype == torch.float16
        else:
            assert arrays[f"{name}.codes"].abs().max() == largest[role]
            assert arrays[f"{name}.scales"].shape == (len(arrays[f"{name}.codes"]),)
    with torch.device("meta"):
        layout = tg.artifact_layout(tg.GPT(model.h))
    found, wanted = ([(n, a.shape, a.dtype) for n, a in x.items()] for x in (arrays, layout))
    assert found == wanted


def test_scales_of_rule_std_are_k_standard_deviations():
    """SDClip: scale = k * std(row) / limit, by the bits and the k of matrices and of tables."""
    rules = {"scale_rule": "std", "matrix_bits": 5, "embed_bits": 7}
    rules |= {"matrix_clip_sigmas": 6.0, "embed_clip_sigmas": 11.0}
    model = randomize(tg.GPT(settings(**rules)))
    arrays = quantize_model(model, {})
    weights = dict(model.named_parameters())
    for name, role in tg.parameter_roles(model).items():
        if role != "scalar":
            k, limit = (6.0, 15) if role == "matrix" else (11.0, 63)
            weight = weights[name].detach().double().numpy()
            scales = np.float16(k * weight.std(1, ddof=1) / limit)
            np.testing.assert_allclose(arrays[f"{name}.scales"].numpy(), scales, rtol=1e-3)
            codes = np.rint(weight / arrays[f"{name}.scales"].double().numpy()[:, None])
            found = arrays[f"{name}.codes"].numpy()
            assert (found != codes.clip(-limit, limit)).mean() < 1e-3  # all but ties
    assert arrays["blocks.0.mlp.up.weight.codes"].abs().max() <= 15


@pytest.mark.fault(34)
def test_diverged_weights_are_not_quantized():
    model = tg.GPT(settings())
    model.blocks[1].mlp.up.weight.data[3, 4] = math.nan
    with pytest.raises(tg.DivergenceError, match=r"1\.mlp\.up\.weight is not finite float32"):
        tg.pack_to_fit(model, tg.weight_stacks(model, {}, tg.Ranks()), 10**6, tg.Ranks(), tg.Log())


# ---- Codecs ----


def arrays_like(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Returns arrays of the same shapes and types, full of ones."""
    return [np.ones_like(array) for array in arrays]


def same(arrays: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(arrays, others, strict=True))


@every_codec
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
def test_a_codec_returns_its_arrays_and_no_others(codec, rows):
    codes = (normal(rows, 64) * 5).to(torch.int8).numpy()
    scales = normal(rows).half().numpy()
    arrays = [codes, codes.T[:, :7], scales, np.float16([]), np.array(3, np.float16)]
    packed = tg.CODECS[codec].compress(arrays, SCALAR)
    assert tg.CODECS[codec].compress(arrays, SCALAR) == packed
    for data in (packed, memoryview(packed)):
        read = arrays_like(arrays)
        tg.CODECS[codec].decompress(data, read, SCALAR)
        assert same(read, arrays)
    others = [codes[1:], *arrays[1:]], [*arrays, scales]
    for data, wrong in (
        *((packed, arrays_like(other)) for other in others),
        (packed + b"\0", read),
        (packed + packed, read),
    ):
        with pytest.raises(Exception, match=r"."):
            tg.CODECS[codec].decompress(data, wrong, SCALAR)


@every_codec
def test_codes_compress_to_about_their_entropy(codec):
    codes = (normal(300, 100) * 5).to(torch.int8)
    entropy = tg.code_entropy(codes)
    assert entropy < len(tg.CODECS[codec].compress([codes.numpy()], SCALAR)) < 1.06 * entropy


needs_range = pytest.mark.parametrize("codec", [p for p in CODECS if p.values == ("range",)])


def pseudorandom_codes(rows: int, cols: int) -> np.ndarray:
    """Returns bell-shaped codes int8, larger in later columns, by integer arithmetic alone."""
    x = np.arange(1, rows * cols + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    bell = sum((x >> np.uint64(shift) & np.uint64(15)).astype(np.int64) for shift in (32, 40, 48))
    return ((2 * bell.reshape(rows, cols) - 45) * (1 + np.arange(cols) // 8) // 4).astype(np.int8)


def known_arrays() -> list[np.ndarray]:
    """Returns arrays that the codec `range` stores by column, by row, and otherwise."""
    codes = pseudorandom_codes(48, 32)
    table = np.tile(codes[0], (9, 1))
    return [codes, codes[::-1].T, table, np.arange(40, dtype=np.float16)]


@needs_range
def test_a_file_of_another_machine_is_decoded(codec):
    """tests/golden.range is the payload of known_arrays, written once; a change of the library or
    of the contexts that makes it unreadable would make every artifact unreadable."""
    trellis = tg.QUANTIZERS["trellis"]
    golden, arrays = (Path(__file__).parent / "golden.range").read_bytes(), known_arrays()
    read = arrays_like(arrays)
    tg.CODECS[codec].decompress(golden, read, trellis)
    assert same(read, arrays)
    words = struct.unpack_from("<I", golden)[0]
    assert tg.CODECS[codec].compress(arrays, trellis)[: 12 + 4 * words] == golden[: 12 + 4 * words]


@needs_range
def test_the_range_codec_takes_the_best_way_of_each_array(codec):
    """A spread of the columns, or of the rows, takes the codes below their order-0 entropy."""
    codes = pseudorandom_codes(400, 64)
    repeated = np.tile(codes[0], (99, 1))
    entropy = tg.code_entropy(torch.from_numpy(codes))
    for array, way in (
        (codes, tg.BY_COLUMN),
        (np.ascontiguousarray(codes.T), tg.BY_ROW),
        (repeated, tg.AS_REST),
    ):
        packed = tg.CODECS[codec].compress([array], SCALAR)
        assert packed[8] == way
        assert len(packed) < 0.95 * entropy


# ---- The artifact ----

Packed = tuple[tg.Hyperparameters, tg.GPT, dict[str, torch.Tensor], bytes, str]


@pytest.fixture(scope="module", params=CODECS)
def packed(request) -> Packed:
    """Settings, model, arrays, artifact and codec; a batch that other lengths do not divide."""
    h = settings(train_seq_len=50, train_batch_tokens=1000)
    model = randomize(tg.GPT(h))
    arrays = quantize_model(model, {})
    return (
        h,
        model,
        arrays,
        tg.pack_artifact(tg.replace(h, compressor=request.param), arrays),
        request.param,
    )


def test_the_file_satisfies_its_description_and_repeats(packed):
    """Read by the format alone: header, description, compressed codes, scales and float16."""
    h, model, arrays, blob, codec = packed
    assert tg.pack_artifact(tg.replace(h, compressor=codec), quantize_model(model, {})) == blob
    magic, size = struct.unpack_from("<12sI", blob)
    assert magic == b"PGOLFGPT\3\0\0\0" == MAGIC
    assert resigned(blob) == blob  # by the SHA-256 of all but itself
    stated = json.loads(blob[48 : 48 + size])
    assert stated == {"codec": codec, "quantizer": "scalar", "settings": tg.model_settings(h)}
    names = [name for name, _ in model.named_parameters()]
    order = [f"{n}.codes" for n in names] + [f"{n}.scales" for n in names] + names
    raw = b""
    for name in (name for name in order if name in arrays):
        by_columns = codec == "brotli" and name.endswith(".codes")
        array = arrays[name].numpy()
        raw += np.ascontiguousarray(array.T if by_columns else array).tobytes()
    assert described(blob)[2] == raw


def test_an_artifact_is_read_back_with_its_own_settings(packed, tmp_path):
    """No setting that it does not store may conflict with one that it stores."""
    h, model, arrays, blob, _ = packed
    path = tmp_path / "a.ptz"
    path.write_bytes(blob)
    tg.load_artifact(path, tg.Hyperparameters())
    other = settings(num_layers=7, seed=5, eval_stride=16, compressor="lzma")
    read, weights = tg.load_artifact(path, other)
    assert tg.model_settings(read) == tg.model_settings(h)
    assert (read.seed, read.eval_stride) == (5, 16)
    tg.GPT(read).load_state_dict(weights)
    for name, p in model.named_parameters():
        if name in arrays:
            assert torch.equal(weights[name], p.half().float())
        else:
            scale = arrays[f"{name}.scales"].float()[:, None]
            assert torch.equal(weights[name], arrays[f"{name}.codes"].float() * scale)
    unpacked = tg.unpack_artifact(blob, other)[1]
    assert [*unpacked] == [*arrays]
    assert all(torch.equal(unpacked[name], array) for name, array in arrays.items())


def refused(path: Path, data: bytes) -> str:
    """The message of the error that a damaged artifact raises."""
    path.write_bytes(data)
    with pytest.raises(tg.DataError, match="cannot be read as an artifact") as error:
        tg.load_artifact(path, settings())
    assert str(path) in str(error.value)
    return str(error.value)


def test_damage_and_other_formats_are_refused_by_name(packed, tmp_path):
    """test_hostile.py has many more of these."""
    h, _, _, blob, codec = packed
    text, payload = parts(blob)
    _, told, raw = described(blob)
    old = artifact(json.dumps(told).encode(), compress("zstd", raw), b"PGOLFGPT\1\0\0\0")
    longest = description(codec, told).ljust(tg.MAX_DESCRIPTION)
    cases = [
        (blob[:-1], "checksum"),
        (blob + b"\0", "checksum"),
        (artifact(text, payload, b"PGOLFXXX" + MAGIC[8:]), "it begins with b'PGOLFXXX"),
        (artifact(text, payload, b"PGOLFGPT\3\1\0\0"), "it begins with b'PGOLFGPT"),
        (old, "score it by the train_gpt.py of its own run"),
        (artifact(b"\xff{", payload), "UnicodeDecodeError"),
        (artifact(b'{"codec":"zstd"}', payload), "KeyError('quantizer')"),
        (artifact(description(codec, told, quantizer="?"), payload), "its quantizer is unknown"),
        (artifact(longest + b" ", payload), "its description has 65537 bytes"),
        (artifact(description("gzip", told), payload), "its codec is unknown: 'gzip'"),
        (artifact(description("x" * 50_000, told), payload), "its codec is unknown: 'xxx"),
    ]
    for data, says in cases:
        message = refused(tmp_path / "bad", data)
        assert says in message
        assert len(message) < 500
    (tmp_path / "good").write_bytes(artifact(longest, payload))
    tg.load_artifact(tmp_path / "good", h)


@pytest.mark.fault(35)
def test_an_artifact_whose_codec_is_missing_is_refused_by_its_path(packed, tmp_path, monkeypatch):
    package = tg.CODECS[packed[4]].package
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in refused(tmp_path / "a.ptz", packed[3])


# ---- Packages of codecs ----


@pytest.fixture
def env(byte_corpus, tmp_path) -> dict[str, str]:
    """Settings of a short run, in a folder of its own."""
    return {**TINY, "DATA_PATH": str(byte_corpus), "RUN_DIR": str(tmp_path / "run")}


def brotli_module(process) -> types.ModuleType:
    """A brotli package whose decompressor has the given method."""
    module = types.ModuleType("brotli")
    module.__spec__ = importlib.machinery.ModuleSpec("brotli", None)
    module.compress = lambda data, **_: data
    methods = {"process": process, "is_finished": lambda _: True}
    module.Decompressor = type("Decompressor", (), methods)
    return module


TOO_OLD = brotli_module(lambda self, data: bytes(1000))  # it cannot bound its output
BROKEN = brotli_module(lambda self, data, output_buffer_limit: b"x" * (len(data) // 2))

EMPTY = types.ModuleType("constriction")  # another interface
EMPTY.__spec__ = importlib.machinery.ModuleSpec("constriction", None)


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("codec", "package", "module", "remedy"),
    [
        ("zstd", "zstandard", None, "pip install zstandard"),
        ("brotli", "brotli", None, "pip install brotli"),
        ("range", "constriction", None, "pip install constriction"),
        ("range", "constriction", EMPTY, "pip install --upgrade constriction"),
        ("brotli", "brotli", TOO_OLD, "pip install --upgrade brotli"),
        ("brotli", "brotli", BROKEN, "pip install --upgrade brotli"),
    ],
)
def test_a_codec_that_does_not_work_stops_the_run_before_it_trains(
    codec, package, module, remedy, monkeypatch, env
):
    monkeypatch.setitem(sys.modules, package, module)
    for argv in ([], ["--check"]):
        assert tg.main(argv, {**env, "COMPRESSOR": codec}) == 2
    folder = Path(env["RUN_DIR"])
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "settings"
    assert result["reason"].startswith(f"COMPRESSOR={codec}")
    assert result["reason"].endswith(remedy)
    assert "step:" not in (folder / "train.log").read_text()
