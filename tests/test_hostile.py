"""Artifacts and checkpoints that are damaged or forged: refused by name, or read as stated."""

import contextlib
import functools
import io
import json
import lzma
import math
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
import zstandard
from conftest import ROOT, randomize, trainer
from hostile import (
    CODECS,
    artifact,
    build_once,
    checkpoint,
    compress,
    damage,
    described,
    description,
    judge,
    layout,
    load_checkpoint,
    lzma_filter,
    odd_checkpoint,
    pack,
    parts,
    resigned_case,
    tiny,
)

import train_gpt as tg

CASES = 1800  # of either kind of mutation of artifacts, for each codec
CHECKPOINTS = 3000


class HangError(BaseException):
    """What no reader can mistake for a fault of its file."""


@contextlib.contextmanager
def in_seconds(limit: float):
    """HangError after `limit` seconds."""

    def stop(*_):
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def written(h: tg.Hyperparameters, tensors: dict[str, torch.Tensor], folder: Path) -> bytes:
    """The checkpoint of some tensors."""
    tg.save_tensors(tg.Log(folder), "made", tensors, h)
    return (folder / "made").read_bytes()


class Made(NamedTuple):
    """An artifact of one tiny model, and its parts."""

    h: tg.Hyperparameters
    arrays: dict[str, torch.Tensor]
    codec: str
    blob: bytes
    text: bytes  # the description
    payload: bytes
    told: dict  # the settings
    raw: bytes  # the arrays' bytes


@pytest.fixture(scope="module", params=CODECS)
def made(request) -> Made:
    """An artifact by every codec."""
    h = tiny()
    model = randomize(tg.GPT(h))
    arrays, _ = tg.quantize_model(model, {}, tg.Ranks())
    blob = tg.pack_artifact(h, arrays, request.param)
    codec, told, raw = described(blob)
    return Made(h, arrays, codec, blob, *parts(blob), told, raw)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    """The weights of one tiny model as a run saves them."""
    model = randomize(tg.GPT(tiny()))
    return written(tiny(), model.state_dict(), tmp_path_factory.mktemp("made"))


@pytest.fixture
def quick(monkeypatch) -> None:
    """Build the model of some settings once."""
    build_once(monkeypatch.setattr)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of files are written."""
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


def judge_bytes(path: Path, data: bytes, read=tg.load_artifact, seconds: float = 10.0) -> str:
    path.write_bytes(data)
    with in_seconds(seconds):
        return judge(path, read)


@pytest.mark.fault(36)
def test_damage_is_always_found(made, quick, memory):
    """SHA-256 finds what the mutations do not undo."""
    rng, path = random.Random(1), memory / "a.ptz"
    for case in range(CASES):
        data = damage(rng, made.blob)
        assert bool(judge_bytes(path, data)) == (data != made.blob), case


@pytest.mark.fault(36)
def test_what_passes_the_checksum_is_refused_or_read(made, quick, memory):
    rng, path, loaded, said = random.Random(2), memory / "a.ptz", 0, set()
    for _ in range(CASES):
        refusal = judge_bytes(path, resigned_case(rng, made.text, made.raw))
        loaded += not refusal
        said.add(refusal.removeprefix(str(path))[:75])
    assert CASES // 10 < loaded < CASES // 2
    assert not any("checksum" in refusal for refusal in said)
    assert len(said) > 100  # the cases go to many places


def refused(path: Path, data: bytes, says: str, read=tg.load_artifact) -> None:
    refusal = judge_bytes(path, data, read, seconds=5.0)
    assert says in refusal.removeprefix(str(path)), refusal or "loaded"


def test_the_wrapper_made_here_is_the_programs(made, good, tmp_path):
    """Without this the refusals below would prove nothing."""
    assert artifact(made.text, made.payload) == made.blob
    assert description(made.codec, made.told) == json.dumps(json.loads(made.text)).encode()
    for payload in (made.payload, compress(made.codec, made.raw)):
        for text in (made.text, description(made.codec, made.told)):
            assert not judge_bytes(tmp_path / "a", artifact(text, payload))
    head, body = layout(good)
    pairs = [(name, json.dumps(value)) for name, value in head.items()]
    for forged in (good, checkpoint(head, body), checkpoint(pairs, body)):
        assert not judge_bytes(tmp_path / "b", forged, load_checkpoint)


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("num_layers", "201", "NUM_LAYERS=201: must be from 1 to 200"),
        ("num_layers", "true", "NUM_LAYERS="),
        ("num_layers", "3.0", "NUM_LAYERS="),
        ("num_layers", '"3"', "NUM_LAYERS="),
        ("num_layers", "null", "NUM_LAYERS="),
        ("num_layers", "9" * 4000, "NUM_LAYERS=9999"),
        ("num_layers", "9" * 9000, "4300 digits"),
        ("num_layers", "[" * 60_000, "RecursionError"),
        ("train_seq_len", "1000000000", "TRAIN_SEQ_LEN=1000000000: must be from 2 to"),
        ("train_seq_len", "1000000000000000000", "TRAIN_SEQ_LEN="),
        ("rope_base", "NaN", "ROPE_BASE=nan: must be from 1"),
        ("rope_base", "Infinity", "ROPE_BASE=inf: must be from 1"),
        ("rope_base", "1e999", "ROPE_BASE=inf: must be from 1"),
        ("ln_scale", "1", "LN_SCALE=1: must be 0 or 1"),
        ("corpus", '"\\ud800"', "CORPUS="),
        ("corpus", '"a\\u0000b"', "CORPUS="),
        ("corpus", '"a\\nb"', "CORPUS="),
        ("corpus", '"../../../x"', "CORPUS='../../../x': must be a name"),
        ("corpus", '".."', "CORPUS='..': must be a name"),
        ("corpus", '"/etc"', "CORPUS='/etc': must be a name"),
        ("corpus", '"a/b"', "CORPUS='a/b': must be a name"),
        ("corpus", r'"a\\b"', "must be a name"),
        ("corpus", '""', "CORPUS='': must be a name"),
        ("ve_layers", '"../x"', "VE_LAYERS='../x'"),
        ("ve_layers", '"' + "9" * 5000 + '"', "cannot be read"),
        ("model_dim", "999999999999999998", "cannot be read"),
        ("model_dim", "1048576", "MODEL_DIM=1048576: must be from 2 to 65536"),
        ("model_dim", "65536", "bytes for arrays of"),
        ("vocab_size", "65536", "bytes, not"),
        ("ve_dim", "65536", "bytes for arrays of"),
        ("ve_dim", "99999999", "VE_DIM="),
        ("mlp_mult", "1e17", "cannot be read"),
        ("bigram_vocab_size", "16777216", "bytes for arrays of"),
        ("bigram_vocab_size", "1000000000000", "BIGRAM_VOCAB_SIZE="),
        ("corpus", '"' + "x" * 66_000 + '"', "its description has"),
    ],
)
def test_settings_that_cannot_be(name, value, says, made, quick, tmp_path):
    others = ",".join(f'"{n}":{json.dumps(v)}' for n, v in made.told.items() if n != name)
    changed = f'{{"codec":"{made.codec}","settings":{{{others},"{name}":{value}}}}}'
    if says == "bytes, not" and made.codec != "zstd":
        says = "the arrays do not have"  # zstd alone states its size
    refused(tmp_path / "a", artifact(changed.encode(), made.payload), says)


@pytest.mark.fault(38)
def test_settings_of_another_program_are_named(made, tmp_path):
    less = {name: value for name, value in made.told.items() if name != "rope_base"}
    for told, says in (
        (less, "['rope_base']"),
        ({**made.told, "x": 1}, "['x']"),
        ({**less, "run_dir": "x"}, "['rope_base', 'run_dir']"),  # a setting, but not the model's
        ([1], "AttributeError"),
    ):
        refused(tmp_path / "a", artifact(description(made.codec, told), made.payload), says)


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    ("name", "value"), [("corpus", "../../../x"), ("train_seq_len", 10**9), ("num_layers", 0)]
)
def test_scoring_a_forged_artifact_ends_with_status_2(name, value, made, tmp_path, capsys):
    path = tmp_path / "a.ptz"
    text = description(made.codec, {**made.told, name: value})
    path.write_bytes(artifact(text, made.payload))
    assert tg.main(["--eval", str(path)], {}) == 2
    said = capsys.readouterr().out
    assert said.startswith(f"error: {path}: cannot be read as an artifact")
    assert f"{name.upper()}={value!r}" in said
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("codec", CODECS)
def test_the_most_layers_are_read_quickly(codec, tmp_path):
    h = tiny(num_layers=200, model_dim=2, num_heads=1, rope_dims=2)
    assert not judge_bytes(tmp_path / "a", pack(tg.GPT(h), codec))


SKIPPED = struct.pack("<II", 0x184D2A50, 4) + b"skip"


def zstd_frames(raw: bytes) -> dict[str, tuple[bytes, str]]:
    """Frames of zstd that must not be read, and the fault that is named."""
    good, wrong = compress("zstd", raw), f"bytes, not {len(raw)}"
    unsized = zstandard.ZstdCompressor(write_content_size=False)
    # One block of a byte repeated, in a window of 2 GB and with no size; the same, stating 4 GB.
    run = struct.pack("<I", len(raw) << 3 | 1 << 1 | 1)[:3] + b"\0"
    wide = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + run
    vast = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 32) + run
    # It states the arrays' size, and has a block more.
    more = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", len(raw))
    more += 50 * (struct.pack("<I", 100_000 << 3 | 1 << 1)[:3] + b"\0") + run
    skippable = struct.pack("<II", 0x184D2A50, len(raw)) + raw
    return {
        "window": (wide.ljust(99, b"\0"), wrong),
        "size": (vast.ljust(99, b"\0"), wrong),
        "size of the arrays, bomb": (more, "ZstdError"),
        "unsized": (unsized.compress(raw), wrong),
        "unsized bomb": (unsized.compress(bytes(100_000_000)), wrong),
        "bomb": (compress("zstd", bytes(100_000_000)), wrong),
        "more": (compress("zstd", raw + b"\0"), wrong),
        "less": (compress("zstd", raw[:-1]), wrong),
        "followed": (good + b"\0", "unused data"),
        "then skippable": (good + SKIPPED, "unused data"),
        "after skippable": (SKIPPED + good, wrong),
        "skippable alone": (skippable, "decompressed 0 bytes"),
        "cut": (good[:-9], "ZstdError"),
        "of lzma": (compress("lzma", raw), "ZstdError"),
    }


def lzma_frames(raw: bytes) -> dict[str, tuple[bytes, str]]:
    """Streams of LZMA2 that must not be read, and the fault that is named."""
    good, wrong = compress("lzma", raw), f"the arrays do not have {len(raw)} bytes"
    largest = lzma.compress(raw, lzma.FORMAT_RAW, filters=lzma_filter(1 << 26, preset=0))
    assert len(largest) < 1.01 * len(raw) + 1000
    # A reset of the dictionary before each of a hundred bytes.
    chunks = b"".join(b"\1\0\0" + raw[i : i + 1] for i in range(100))
    far = raw[:4096] + bytes(range(256)) * (1 << 6)
    return {
        "bomb": (compress("lzma", bytes(50_000_000)), wrong),
        "bomb after the arrays": (good[:-1] + compress("lzma", bytes(4_000_000)), wrong),
        "more": (compress("lzma", raw + b"\0"), wrong),
        "less": (compress("lzma", raw[:-1]), wrong),
        "no end": (good[:-1], wrong),
        "followed": (good + b"\0", "bytes follow the arrays"),
        "cut": (good[:-9], wrong),
        "chunks": (chunks + b"\0", wrong),
        "other bytes": (compress("lzma", far), wrong),
        "xz": (lzma.compress(raw, lzma.FORMAT_XZ, preset=0), "LZMAError"),
        "alone": (lzma.compress(raw, lzma.FORMAT_ALONE, preset=0), "LZMAError"),
        "of zstd": (compress("zstd", raw), "LZMAError"),
    }


def brotli_frames(raw: bytes) -> dict[str, tuple[bytes, str]]:
    """Streams of brotli that must not be read, and the fault that is named."""
    import brotli

    good, wrong = compress("brotli", raw), f"the arrays do not have {len(raw)} bytes"
    # Noise first, so that little of what is decoded is the same byte.
    noise = np.random.default_rng(0).integers(0, 256, len(raw) // 2, np.uint8).tobytes()

    def bomb(start: bytes, window: int) -> bytes:
        return brotli.compress(start + bytes(20_000_000), quality=5, lgwin=window)

    return {
        "bomb": (bomb(b"", 24), "cannot be read"),  # by its size, or by that of its window
        "bomb in a small window": (bomb(b"", 10), wrong),
        "bomb in a middle window": (bomb(b"", 16), wrong),
        "bomb of noise": (bomb(noise, 24), "cannot be read"),
        "bomb of noise in a small window": (bomb(noise, 10), wrong),
        "large window": (b"\x11" + bytes([30]) + good[1:], "error"),
        "metadata alone": (metadata(raw), wrong),
        "more": (compress("brotli", raw + b"\0"), wrong),
        "less": (compress("brotli", raw[:-1]), wrong),
        "followed": (good + b"\0", "error"),
        "twice": (good + good, "bytes for arrays"),
        "cut": (good[:-9], wrong),
        "of zstd": (compress("zstd", raw), "error"),
    }


def metadata(raw: bytes) -> bytes:
    """A brotli stream of one metadata block: bytes that are not part of what it decodes to."""
    import brotli

    length = len(raw) - 1
    # Window of 16 bits: 0; not last: 0; nibbles 3: 11; reserved: 0; bytes of the length: 10 (two).
    bits, at = 0, 0
    for value, size in ((0, 1), (0, 1), (3, 2), (0, 1), (2, 2), (length, 16)):
        bits |= value << at
        at += size
    stream = bits.to_bytes(-(-at // 8), "little") + raw + b"\3"  # an empty last block
    assert brotli.decompress(stream) == b""
    return stream


FRAMES = {"zstd": zstd_frames, "lzma": lzma_frames, "brotli": brotli_frames}


@functools.cache
def frames(codec: str, raw: bytes) -> dict[str, tuple[bytes, str]]:
    """Payloads that must not be read, and the fault that is named."""
    short = f"bytes for arrays of {len(raw)} bytes"
    common = {
        "nothing": (b"", short),
        "noise": (random.Random(0).randbytes(len(raw)), "cannot be read"),
        "zeros": (bytes(len(raw)), "cannot be read"),
        "much": (bytes(2 * len(raw) + 2000), short),
        "two": (2 * compress(codec, bytes(len(raw) // 2 + 1)), "cannot be read"),
    }
    return FRAMES[codec](raw) | common


@pytest.mark.fault(36)
def test_frames_that_are_not_the_arrays_alone(made, quick, tmp_path):
    for name, (payload, says) in frames(made.codec, made.raw).items():
        refused(tmp_path / name, artifact(made.text, payload), says)
    for level in (1, 5, 11):
        payload = compress(made.codec, made.raw, level)
        assert not judge_bytes(tmp_path / "good", artifact(made.text, payload))


@pytest.mark.fault(36)
def test_a_payload_of_another_codec_than_its_description_is_refused(made, quick, tmp_path):
    for other in tg.CODECS.keys() - {made.codec}:
        text = description(other, made.told)
        refused(tmp_path / other, artifact(text, made.payload), "cannot be read")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(value, made, quick, tmp_path):
    for name in ("blocks.0.mlp.up.weight.scales", "smear.gate"):
        bad = made.arrays[name].clone()
        bad[3] = value
        weight = name.removesuffix(".scales")
        forged = tg.pack_artifact(made.h, {**made.arrays, name: bad}, made.codec)
        refused(tmp_path / "a", forged, f"{weight} is not finite float32")


def test_any_code_is_worth_itself_times_its_scale(made, quick, tmp_path):
    name, path = "blocks.0.mlp.up.weight", tmp_path / "a"
    codes, scales = (made.arrays[f"{name}.{part}"].clone() for part in ("codes", "scales"))
    codes[0, :4], scales[:3] = torch.tensor([-128, 127, 32, 0]), torch.tensor([65504.0, 0.0, -1.0])
    changed = {**made.arrays, f"{name}.codes": codes, f"{name}.scales": scales}
    path.write_bytes(tg.pack_artifact(made.h, changed, made.codec))
    _, weights = tg.load_artifact(path, made.h)
    assert torch.equal(weights[name], codes.float() * scales.float()[:, None])


@pytest.mark.fault(36)
def test_a_file_of_ten_gigabytes_is_not_read(made, good, quick, tmp_path):
    for data, read in ((made.blob, tg.load_artifact), (good, load_checkpoint)):
        for size in (len(data), 8):  # whole and followed; no more than the size of a header
            with (tmp_path / "huge").open("wb") as file:
                file.write(data[:size])
                file.truncate(10_000_000_000)
            with in_seconds(2.0):
                assert judge(tmp_path / "huge", read)
    for nothing in (tmp_path / "absent", tmp_path, Path("/dev/null")):
        assert judge(nothing)
        assert judge(nothing, load_checkpoint)


NAME = "blocks.0.mlp.up.weight"  # the tensor that is changed; [48, 16]


def headers(good: bytes) -> dict[str, tuple[bytes, str]]:
    """Files whose header is edited, and the fault that is named."""
    head, body = layout(good)
    of, meta = head[NAME], head["__metadata__"]
    names = [name for name in head if name != "__metadata__"]
    at, to = of["data_offsets"]
    before = head[names[names.index(NAME) - 1]]["data_offsets"]
    library = "SafetensorError"  # whose words differ between versions

    def told(**changes: object) -> bytes:
        return checkpoint({**head, NAME: {**of, **changes}}, body)

    def settings(value: object) -> bytes:
        return checkpoint({**head, "__metadata__": value}, body)

    def twice(entry: dict) -> bytes:
        pairs = [(name, json.dumps(value)) for name, value in head.items()]
        return checkpoint([*pairs, (NAME, json.dumps(entry))], body)

    def more(name: str, shape: list, place: tuple, dtype: str = "F32", added: int = 0) -> bytes:
        entry = {"dtype": dtype, "shape": shape, "data_offsets": place}
        return checkpoint({**head, name: entry}, body + bytes(added))

    def retyped(dtype: torch.dtype) -> bytes:
        weights = safetensors.torch.load(good)
        return safetensors.torch.save({**weights, NAME: weights[NAME].to(dtype)}, meta)

    less = {name: value for name, value in head.items() if name != NAME}
    text, end = json.dumps(head).encode(), len(body)
    return {
        "offset before": (told(data_offsets=[at - 4, to]), library),
        "offset after": (told(data_offsets=[at + 4, to]), library),
        "end before": (told(data_offsets=[at, to - 4]), library),
        "end after": (told(data_offsets=[at, to + 4]), library),
        "overlap": (told(data_offsets=before), library),
        "gap": (told(data_offsets=[at + 64, to + 64]), library),
        "past the end": (told(data_offsets=[at, end + 4]), library),
        "far past the end": (told(data_offsets=[at, 1 << 63]), library),
        "negative offset": (told(data_offsets=[-64, to]), library),
        "reversed": (told(data_offsets=[to, at]), library),
        "one offset": (told(data_offsets=[at]), library),
        "offsets as text": (told(data_offsets=[str(at), str(to)]), library),
        "no offsets": (told(data_offsets=None), library),
        "a terabyte": (told(shape=[1 << 34, 16], data_offsets=[at, at + (1 << 40)]), library),
        "more than bytes": (told(shape=[1 << 62, 16], data_offsets=[at, at + (1 << 68)]), library),
        "another shape": (told(shape=[16, 48]), NAME),
        "flat": (told(shape=[768]), NAME),
        "shape of nothing": (told(shape=[0, 1 << 40], data_offsets=[at, at]), library),
        "nothing, at its place": (
            checkpoint(
                {**head, "nothing": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}},
                body,
            ),
            "nothing",
        ),
        "negative": (told(shape=[-48, 16], data_offsets=[at, 2 * at - to]), library),
        "doubly negative": (told(shape=[-48, -16]), library),
        "unknown": (told(shape=[-1], data_offsets=[at, at - 4]), library),
        "huge": (told(shape=[1 << 62, 1 << 62]), library),
        "immense": (told(shape=[1 << 12_000]), library),
        "float": (told(shape=[48.0, 16]), library),
        "many dimensions": (told(shape=[1] * 99 + [768]), NAME),
        "shape as text": (told(shape="48"), library),
        "no shape": (told(shape=None), library),
        "F64": (told(dtype="F64", shape=[24, 16]), NAME),
        "double": (retyped(torch.float64), f"{NAME} is not finite float32"),
        "half": (retyped(torch.float16), f"{NAME} is not finite float32"),
        "bfloat": (retyped(torch.bfloat16), f"{NAME} is not finite float32"),
        "integers": (retyped(torch.int32), "cannot be read"),
        "truths": (retyped(torch.bool), "cannot be read"),
        "complex": (retyped(torch.complex64), f"{NAME} is not finite float32"),
        "F16": (told(dtype="F16", shape=[96, 16]), NAME),
        "BF16": (told(dtype="BF16", shape=[96, 16]), NAME),
        "I32": (told(dtype="I32"), NAME),
        "F8": (told(dtype="F8_E4M3", shape=[192, 16]), NAME),
        "F4": (told(dtype="F4", shape=[384, 16]), "cannot be read"),
        "unknown dtype": (told(dtype="<f4"), library),
        "no dtype": (told(dtype=None), library),
        "dtype as list": (told(dtype=[]), library),
        "twice, elsewhere": (twice({**of, "data_offsets": [to, 2 * to - at]}), library),
        "twice, in another shape": (twice({**of, "shape": [16, 48]}), NAME),
        "missing": (checkpoint(less, body), library),
        "all missing": (checkpoint({"__metadata__": meta}, b""), "Missing key"),
        "renamed": (checkpoint({**less, f"{NAME}s": of}, body), NAME),
        "more": (more("more", [4], (end, end + 16), added=16), "more"),
        "more, as of a checkpoint": (more("a/0", [4], (end, end + 16), added=16), "Unexpected key"),
        "more, unstored": (more("a/0", [4], (end, end + 16)), library),
        "more, untold": (checkpoint(head, body + bytes(16)), library),
        "more, over others": (more("a/0", [-4], (end, end - 16)), library),
        "more, over one other": (more("a/0", [-1], (end, end - 4)), library),
        "no metadata": (checkpoint({n: head[n] for n in names}, body), "it has no settings"),
        "no settings": (settings({}), "it has no settings"),
        "metadata is null": (settings(None), "it has no settings"),
        "settings as object": (settings({"settings": tg.model_settings(tiny())}), library),
        "settings as a list": (settings({"settings": "[1]"}), "AttributeError"),
        "no JSON in settings": (settings({"settings": "{"}), "JSONDecodeError"),
        "metadata as text": (settings("settings"), library),
        "settings of another": (
            settings({"settings": meta["settings"].replace("16", "8")}),
            "size",
        ),
        "deep settings": (settings({"settings": "[" * 60_000}), "RecursionError"),
        "deep header": (checkpoint(b"[" * 60_000, body), library),
        "deep entry": (checkpoint(text[:-1] + b',"a/0":' + b"[" * 60_000, body), library),
        "long number": (checkpoint(b'{"a":' + b"9" * 9000 + b"}", body), library),
        "list": (checkpoint(b"[1]", body), library),
        "no JSON": (checkpoint(b"\xff{", body), library),
        "no header": (checkpoint(b"", body), library),
        "two headers": (checkpoint(text + text, body), library),
        "short size": (checkpoint(text, body, len(text) - 1), library),
        "long size": (checkpoint(text, body, len(text) + 1), library),
        "size of 1 MiB": (checkpoint(text, body, 1 << 20), "cannot be read"),
        "size of a terabyte": (checkpoint(text, body, 1 << 40), "cannot be read"),
        "greatest size": (checkpoint(text, body, (1 << 64) - 1), "cannot be read"),
    }


MORE_HEADER = 20_000_000  # bytes; the library itself allows 100,000,000


def long_headers(good: bytes, size: int) -> dict[str, bytes]:
    """Files with a header of about `size` bytes; the library reads those of spaces and metadata."""
    head, body = layout(good)
    text, meta = json.dumps(head).encode(), head["__metadata__"]
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    entries = {f"average/{n}": nothing for n in range(size // 80)}
    short = {str(n): "x" for n in range(size // 14)}
    return {
        "of spaces": checkpoint(text.ljust(size), body),
        "of entries": checkpoint({**head, **entries}, body),
        "of metadata": checkpoint({**head, "__metadata__": {**short, **meta}}, body),
        "of settings": checkpoint({**head, "__metadata__": {"settings": "x" * size}}, body),
        "of a name": checkpoint({**head, "x" * size: nothing}, body),
        "of a list": checkpoint(b'{"a":[' + b"1," * (size // 2), body),
        "of zeros": checkpoint(bytes(size), body),
    }


@pytest.mark.fault(37)
def test_headers_longer_than_any_checkpoint_has_are_refused(good, tmp_path):
    """A checkpoint of the largest number of layers has less than 1 MiB of header."""
    for name, data in long_headers(good, 1 << 21).items():
        assert judge_bytes(tmp_path / "a", data, load_checkpoint), name


def test_the_order_of_names_in_a_header_has_no_meaning(good, tmp_path):
    head, body = layout(good)
    (tmp_path / "a").write_bytes(good)
    (tmp_path / "b").write_bytes(checkpoint(dict(reversed(head.items())), body))
    _, weights, _ = tg.load_checkpoint(tmp_path / "a", tiny())
    _, swapped, _ = tg.load_checkpoint(tmp_path / "b", tiny())
    assert weights.keys() == swapped.keys()
    assert all(torch.equal(weights[name], swapped[name]) for name in weights)


@pytest.mark.fault(37)
def test_headers_that_do_not_tell_the_truth(good, tmp_path):
    for name, (data, says) in headers(good).items():
        refused(tmp_path / name, data, says, load_checkpoint)


@pytest.mark.fault(37)
def test_whatever_is_cut_off_or_added_is_missed(good, quick, memory):
    size = 8 + int.from_bytes(good[:8], "little")
    ends = {
        *range(0, size, 97),
        *range(size, len(good), 997),
        *(len(good) - n for n in range(1, 9)),
    }
    for end in sorted({0, 1, 7, 8, 9, size - 1, size, size + 1, *ends}):
        assert judge_bytes(memory / "a", good[:end], load_checkpoint), end
    for more in (b"\0", bytes(4), bytes(64), good):
        assert judge_bytes(memory / "a", good + more, load_checkpoint), len(more)


class Trap:
    """What a pickle would run if it were let."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def foreign(good: bytes, trap: Path) -> dict[str, bytes]:
    """Files of other formats, of which some would execute something."""
    told, weights = tg.model_settings(tiny()), {NAME: torch.zeros(48, 16)}
    files = {f"pickle {n}": pickle.dumps(Trap(trap), protocol=n) for n in range(6)}
    for name, value in {
        "weights": {"settings": told, "weights": weights},
        "trap": {"settings": told, "weights": Trap(trap)},
        "trap alone": Trap(trap),
    }.items():
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=zipped)
            files[f"torch.save of {name}, zipped {zipped}"] = file.getvalue()
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as made_tar:
        made_tar.addfile(tarfile.TarInfo("pickle"))
    inner = next(iter(files.values()))
    head, body = layout(good)
    trapped = {**head, "a/0": {"dtype": "U8", "shape": [len(inner)], "data_offsets": [0, 9]}}
    return {
        **files,
        "tar": tar.getvalue(),
        "pickle within": checkpoint(trapped, body + inner),
        "pickle as header": checkpoint(inner, body),
        "library's, bare": safetensors.torch.save(weights),
        "library's, of pieces": safetensors.torch.save(
            weights, metadata={"settings": json.dumps(told)}
        ),
    }


@pytest.mark.fault(37)
def test_files_of_other_formats_are_refused_and_execute_nothing(good, tmp_path):
    trap = tmp_path / "executed"
    files = foreign(good, trap)
    for name, data in files.items():
        for path in (tmp_path / name, tmp_path / f"{name}.pt"):
            refused(path, data, "cannot be read as a checkpoint", load_checkpoint)
        refused(path, data, "cannot be read as an artifact")
        assert not trap.exists(), name
    for name, data in files.items():  # the traps work
        trap.unlink(missing_ok=True)
        if "pickle " in name and name[-1].isdigit():
            pickle.loads(data)
            assert trap.exists(), name
        elif "trap" in name:
            with contextlib.suppress(Exception):
                torch.load(io.BytesIO(data), weights_only=False)
            assert trap.exists(), name


@pytest.mark.fault(37)
def test_an_artifact_is_no_checkpoint_nor_the_reverse(made, good, tmp_path):
    refused(tmp_path / "a", made.blob, "cannot be read as a checkpoint", load_checkpoint)
    refused(tmp_path / "b", good, "cannot be read as an artifact")


@pytest.mark.fault(34, 37)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, good, tmp_path):
    head, body = layout(good)
    for name in (NAME, "smear.gate", "value_embedding.scale"):
        for at in (head[name]["data_offsets"][0], head[name]["data_offsets"][1] - 4):
            bad = body[:at] + struct.pack("<f", value) + body[at + 4 :]
            says = f"{name} is not finite float32"
            refused(tmp_path / "a", checkpoint(head, bad), says, load_checkpoint)


def check_against_its_header(path: Path) -> None:
    """Asserts that the program reads what a file's header states."""
    _, weights, tensors = tg.load_checkpoint(path, tiny())
    head, body = layout(path.read_bytes())
    assert tensors.keys() == head.keys() - {"__metadata__"}
    kinds = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "U8": np.uint8, "I32": np.int32}
    for name, tensor in tensors.items():
        of = head[name]
        if of["dtype"] in kinds:
            array = np.frombuffer(body[slice(*of["data_offsets"])], kinds[of["dtype"]])
            want = array.reshape(of["shape"])
            assert np.array_equal(tensor.numpy(), want, equal_nan=of["dtype"].startswith("F"))
    prefix = "average/" if f"average/{NAME}" in tensors else ""
    for name, weight in weights.items():
        assert torch.equal(weight, tensors[prefix + name].view_as(weight))  # a scalar may be [1]


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> tuple[dict[str, torch.Tensor], bytes]:
    """The whole state of a training run, and its checkpoint."""
    device = tg.Device(torch.device("cpu"), torch.float32, compiled=False)
    model = randomize(tg.GPT(tiny()))
    training = trainer(model, tg.Data(None, object()), tiny(), device)
    training.step_log.losses, training.step_log.times = [3.0, 2.0], [0.5, 1.0]
    tensors = training.tensors()
    return tensors, written(tiny(), tensors, tmp_path_factory.mktemp("state"))


@pytest.mark.fault(37)
@pytest.mark.parametrize("kind", ["weights", "checkpoint"])
def test_damaged_checkpoints_are_refused_or_read_as_stated(kind, good, state, quick, memory):
    """Mutations of the header, of the settings in it, of floats and of any bytes."""
    rng, loaded, said = random.Random(3), 0, set()
    whole = good if kind == "weights" else state[1]
    for _ in range(CHECKPOINTS):
        refusal = judge_bytes(memory / "a", odd_checkpoint(rng, whole), load_checkpoint)
        if not refusal:
            loaded += 1
            check_against_its_header(memory / "a")
        said.add(refusal.removeprefix(str(memory / "a"))[:140])
    assert CHECKPOINTS // 20 < loaded < CHECKPOINTS // 2
    assert len(said) > 100  # the cases go to many places


@pytest.mark.fault(37)
@pytest.mark.parametrize("name", ["average", "model", "muon", "adamw", "progress/elapsed"])
def test_a_training_state_with_a_tensor_missing_or_of_another_shape_is_refused(
    name, state, cpu, tmp_path
):
    """By reading the checkpoint, or by continuing from it."""
    tensors, _ = state
    path = tmp_path / "made"
    victim = next(n for n in tensors if n.startswith(name) and tensors[n].numel() != 3)
    for change in ({}, {victim: torch.ones(3)}):
        written(tiny(), {n: t for n, t in tensors.items() if n != victim} | change, tmp_path)
        training = trainer(tg.GPT(tiny()), tg.Data(None, object()), tiny(), cpu)
        with pytest.raises(tg.DataError):
            training.restore(tg.load_checkpoint(path, tiny())[2])


@pytest.mark.fault(37)
def test_any_file_of_the_library_with_our_metadata_is_read(good, tmp_path):
    """Whatever the order of its tensors, and whatever else a checkpoint holds."""
    h, (head, _) = tiny(), layout(good)
    (tmp_path / "ours").write_bytes(good)
    theirs = safetensors.torch.load_file(tmp_path / "ours")
    with safetensors.safe_open(tmp_path / "ours", "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["settings"]) == tg.model_settings(h)
    safetensors.torch.save_file(theirs, tmp_path / "theirs", metadata=metadata)
    assert not judge(tmp_path / "theirs", load_checkpoint)
    _, weights, _ = tg.load_checkpoint(tmp_path / "theirs", h)
    assert weights.keys() | {"__metadata__"} == head.keys()
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)
    more = {"clock/steps": torch.rand(2, 3, dtype=torch.float64), "more": torch.ones(1, 2, 3)}
    averages = {f"average/{name}": p for name, p in theirs.items()}
    safetensors.torch.save_file(averages | more, tmp_path / "state", metadata=metadata)
    _, weights, kept = tg.load_checkpoint(tmp_path / "state", h)
    assert weights.keys() == theirs.keys()
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)
    assert kept.keys() == averages.keys() | more.keys()
    assert all(torch.equal(kept[name], more[name]) for name in more)


def test_a_checkpoint_of_the_most_layers_is_read(cpu, tmp_path):
    """Its header, with the whole state of training, must not be longer than a header may be."""
    h = tiny(num_layers=200, model_dim=2, num_heads=1, rope_dims=2, jepa_chunk_size=4)
    state = trainer(tg.GPT(h), tg.Data(None, object()), h, cpu).tensors()
    data = written(h, state, tmp_path)
    longer = 2 * 12 + 2 * 5  # of offsets and shapes of a model that is wider
    assert int.from_bytes(data[:8], "little") + longer * len(state) < 1 << 20
    _, weights, kept = tg.load_checkpoint(tmp_path / "made", h)
    assert weights.keys() == tg.GPT(h).state_dict().keys()
    assert kept.keys() == state.keys()


MEASURE = """
import ctypes, gc, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import train_gpt as tg
from pathlib import Path
from hostile import judge, load_checkpoint
torch.set_num_threads(1)

def kilobytes(name):
    status = Path("/proc/self/status").read_text()
    return int(status.partition(name + ":")[2].split()[0])

for path in sys.argv[1:]:
    read = load_checkpoint if path.endswith(".pt") else tg.load_artifact
    if "good" in path:  # the first of a kind loads libraries
        judge(Path(path), read)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free must not hide what is allocated
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    refusal = judge(Path(path), read)
    print(kilobytes("VmHWM") - before, bool(refusal), Path(path).name, sep="\\t")
"""


class Measured(NamedTuple):
    """What reading a file took."""

    peak: int  # bytes
    refused: bool


def measure(folder: Path, files: dict[str, bytes]) -> dict[str, Measured]:
    """Peak resident memory of reading each file, all in one process, the good ones first."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    script = MEASURE.format(root=str(ROOT), tests=str(ROOT / "tests"))
    done = subprocess.run(
        [sys.executable, "-c", script, *sorted(str(folder / name) for name in files)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == len(files)
    return {name: Measured(1024 * int(kb), refusal == "True") for kb, refusal, name in lines}


def parameter_bytes(h: tg.Hyperparameters) -> int:
    with torch.device("meta"):
        return sum(4 * p.numel() for p in tg.GPT(h).parameters())


measured_by_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="measured by Linux"
)
DEEP = {"num_layers": 200, "model_dim": 2, "num_heads": 1, "rope_dims": 2}
LARGE = {"model_dim": 256, "num_layers": 10, "bigram_vocab_size": 40_000, "bigram_dim": 128}


@pytest.mark.fault(36)
@measured_by_linux
def test_memory_of_an_artifact_is_bounded_by_what_its_settings_declare(made, tmp_path):
    """At most 4 x the parameters' bytes and 16 MiB, measured as peak resident memory."""
    files = {"0good.ptz": made.blob}
    for name, (payload, _) in frames(made.codec, made.raw).items():
        files[f"{name}.ptz"] = artifact(made.text, payload)
    files["junk.ptz"] = artifact(made.text, bytes(40_000_000))
    files["long.ptz"] = artifact(made.text.ljust(40_000_000), made.payload)
    deep, large = tiny(**DEEP), tiny(**LARGE)
    files["deep.ptz"] = pack(tg.GPT(deep), made.codec)
    arrays, _ = tg.quantize_model(randomize(tg.GPT(large)), {}, tg.Ranks())
    by_columns = tg.CODECS[made.codec].transpose
    whole = b"".join(
        (a.mT if by_columns and name.endswith(".codes") else a).contiguous().numpy().tobytes()
        for name, a in arrays.items()
    )
    text = description(made.codec, tg.model_settings(large))
    files["large.ptz"] = artifact(text, compress(made.codec, whole))
    payload = compress(made.codec, whole + bytes(100_000_000))
    files["large bomb.ptz"] = artifact(text, payload)
    read = {"0good.ptz": made.h, "deep.ptz": deep, "large.ptz": large}
    assert 4 * parameter_bytes(large) > 100 << 20  # beyond the 16 MiB
    too_much = {}
    for name, (peak, refusal) in measure(tmp_path, files).items():
        assert refusal == (name not in read), name
        declared = parameter_bytes(large if name.startswith("large") else read.get(name, made.h))
        if peak > 4 * declared + (16 << 20):
            too_much[name] = peak
    assert not too_much


@pytest.mark.fault(37)
@measured_by_linux
def test_memory_of_a_checkpoint_is_bounded_by_what_its_settings_declare(good, tmp_path):
    """At most 4 x the parameters' bytes and 32 MiB, of which the header takes most.

    The rest of a training state is mapped.
    """
    head, body = layout(good)
    files = {"0good.pt": good}
    for name, (data, _) in headers(good).items():
        if re.search("size|header|deep|long|byte|huge|nothing|immense|dimensions", name):
            files[f"{name}.pt"] = data
    for name, data in foreign(good, tmp_path / "executed").items():
        if "trap" in name:
            files[f"{name}.pt"] = data
    for size in ((1 << 20) - 100_000, MORE_HEADER):
        files |= {f"{size} {name}.pt": d for name, d in long_headers(good, size).items()}
    size = len(body)
    vast = {"dtype": "F32", "shape": [10_000_000], "data_offsets": [size, size + 40_000_000]}
    averages = {n if n == "__metadata__" else f"average/{n}": of for n, of in head.items()}
    state = checkpoint({**averages, "muon/0": vast}, body + bytes(40_000_000))
    files["with state.pt"] = state
    files["cut state.pt"] = state[:-4]
    files["no state.pt"] = checkpoint({**head, "more": vast}, body + bytes(40_000_000))
    files["junk.pt"] = good[:40] + bytes(40_000_000) + good[40:]
    large = tiny(**LARGE)
    files["large.pt"] = written(large, randomize(tg.GPT(large)).state_dict(), tmp_path)
    short = f"{(1 << 20) - 100_000} of"
    read = {"0good.pt", "with state.pt", "large.pt", f"{short} spaces.pt", f"{short} metadata.pt"}
    too_much = {}
    for name, (peak, refusal) in measure(tmp_path, files).items():
        assert refusal == (name not in read) or name.startswith(str(MORE_HEADER)), name
        if peak > 4 * parameter_bytes(large if name == "large.pt" else tiny()) + (32 << 20):
            too_much[name] = peak
    assert not too_much


def test_a_checkpoint_of_many_steps_is_read(cpu, tmp_path):
    """What every step leaves behind takes no place in the header."""
    h, steps = tiny(), 20_000
    before = trainer(tg.GPT(h), tg.Data(None, object()), h, cpu)
    before.step = steps
    before.clock.elapsed = steps / 7
    before.step_log.times = [n / 7 for n in range(steps)]
    before.step_log.losses = [1 / (n + 1) for n in range(steps)]
    data = written(h, before.tensors(), tmp_path)
    assert int.from_bytes(data[:8], "little") < 20_000
    _, _, kept = tg.load_checkpoint(tmp_path / "made", h)
    after = trainer(tg.GPT(h), tg.Data(None, object()), h, cpu)
    after.restore(kept)
    assert after.step == steps
    assert (after.step_log.times, after.step_log.losses) == (
        before.step_log.times,
        before.step_log.losses,
    )
    assert after.clock.elapsed == before.clock.elapsed
