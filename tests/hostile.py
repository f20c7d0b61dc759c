"""Damaged and forged artifacts and checkpoints, and the only two results a reader may have."""

import ctypes
import hashlib
import importlib.util
import json
import lzma
import math
import random
import re
import struct
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import zstandard
from bench.harness import quantize_model
from conftest import settings

import train_gpt as tg

DEFAULTS = tg.Hyperparameters()


def tiny(**changes: object) -> tg.Hyperparameters:
    """Returns settings of a model of some 7,000 parameters."""
    small = {"num_layers": 1, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "ve_dim": 4}
    return settings(**{**small, "bigram_vocab_size": 16, "bigram_dim": 4, **changes})


def array_count(h: tg.Hyperparameters) -> int:
    """Returns the number of arrays in the artifact of a model."""
    with torch.device("meta"):
        return len(tg.artifact_layout(tg.GPT(h)))


TINY_ARRAYS = array_count(tiny())

# Every codec of the program; one whose package is not installed is skipped.
CODECS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(codec.package) is None, reason=f"needs {codec.package}"
        ),
    )
    for name, codec in tg.CODECS.items()
]


# ---- The formats, by their descriptions alone ----

MAGIC = b"PGOLFGPT\3\0\0\0"  # with the version


def lzma_filter(dictionary: int, **options: int) -> list[dict[str, int]]:
    """Returns the filters of raw LZMA2."""
    return [{"id": lzma.FILTER_LZMA2, "dict_size": dictionary, **options}]


def compress(codec: str, raw: bytes, level: int = 1, arrays: int = TINY_ARRAYS) -> bytes:
    """Returns the bytes of so many arrays as a payload, by the codec's library alone."""
    if codec == "zstd":
        return zstandard.ZstdCompressor(level=level).compress(raw)
    if codec == "lzma":
        options = lzma_filter(1 << 16, preset=min(level, 9))
        return lzma.compress(raw, lzma.FORMAT_RAW, filters=options)
    if codec == "brotli":
        import brotli

        return brotli.compress(raw, quality=min(level, 11))
    if codec == "range":  # no words, and every array as the rest
        head = struct.pack("<II", 0, zlib.crc32(raw)) + bytes([tg.AS_REST]) * arrays
        return head + compress("lzma", raw, level)
    raise AssertionError(f"no test knows the codec {codec}")


def decompress(codec: str, payload: bytes) -> bytes:
    """Returns the bytes of a payload, by the codec's library alone."""
    if codec == "zstd":
        return zstandard.ZstdDecompressor().decompress(payload)
    if codec == "lzma":
        return lzma.decompress(payload, lzma.FORMAT_RAW, filters=lzma_filter(1 << 26))
    if codec == "brotli":
        import brotli

        return brotli.decompress(payload)
    raise AssertionError(f"no test knows the codec {codec}")


def resigned(blob: bytes) -> bytes:
    """Returns an artifact with a checksum that fits its bytes."""
    digest = hashlib.sha256(blob[:16] + bytes(32) + blob[48:]).digest()
    return blob[:16] + digest + blob[48:]


def artifact(text: bytes, payload: bytes, magic: bytes = MAGIC) -> bytes:
    """Returns a file whose checksum is right whatever its description and payload are."""
    return resigned(struct.pack("<12sI", magic, len(text)) + bytes(32) + text + payload)


def description(codec: object, settings: object, **more: object) -> bytes:
    """Returns the description of an artifact."""
    told = {"codec": codec, "quantizer": "scalar", "settings": settings, **more}
    return json.dumps(told).encode()


def parts(blob: bytes) -> tuple[bytes, bytes]:
    """Returns description and payload of an artifact."""
    size = struct.unpack_from("<I", blob, 12)[0]
    return blob[48 : 48 + size], blob[48 + size :]


def described(blob: bytes) -> tuple[str, dict, bytes]:
    """Returns codec, settings and arrays of an artifact."""
    text, payload = parts(blob)
    told = json.loads(text)
    if told["codec"] == "range":
        arrays = tg.unpack_artifact(blob, DEFAULTS)[1].values()
        raw = b"".join(array.numpy().tobytes() for array in arrays)
        return told["codec"], told["settings"], raw
    return told["codec"], told["settings"], decompress(told["codec"], payload)


def pack(model: tg.GPT, codec: str = "zstd") -> bytes:
    """Returns the artifact of a model, its matrices rounded."""
    return tg.pack_artifact(tg.replace(model.h, compressor=codec), quantize_model(model, {}))


def layout(blob: bytes) -> tuple[dict, bytes]:
    """Returns header and tensors' bytes of a checkpoint."""
    size = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + size]), blob[8 + size :]


def checkpoint(head: dict | bytes, body: bytes, size: int | None = None) -> bytes:
    """Returns a file that states `size` bytes of header, by default the truth."""
    head = head if isinstance(head, bytes) else json.dumps(head).encode()
    return (len(head) if size is None else size).to_bytes(8, "little") + head + body


# ---- What a reader may do ----


def load_checkpoint(path: Path, h: tg.Hyperparameters) -> tuple[tg.Hyperparameters, dict]:
    """Returns settings and weights of a checkpoint."""
    saved = tg.load_checkpoint(path, h)
    return saved.h, saved.weights


def judge(path: Path, read: Callable = tg.load_artifact) -> str:
    """Returns "" if a file loads as its settings declare, else the refusal without the path.

    Raises AssertionError at all else, and at 10 s of processor time.
    """
    began = time.process_time()
    try:
        h, weights = read(path, DEFAULTS)
    except tg.DataError as error:
        refusal = str(error).removeprefix(f"{path}: ")
        assert refusal != str(error)
        assert len(refusal) < 400
        return refusal
    finally:
        assert time.process_time() - began < 10
    with torch.device("meta"):
        model = tg.GPT(h).state_dict()
    assert weights.keys() == model.keys()
    for name, p in model.items():
        assert (weights[name].shape, weights[name].dtype) == (p.shape, torch.float32)
        assert weights[name].isfinite().all()
    return ""


def judge_bytes(path: Path, data: bytes, read: Callable = tg.load_artifact) -> str:
    """Writes a file and returns what `judge` says of it."""
    path.write_bytes(data)
    return judge(path, read)


def peak_memory(call: Callable[[], object]) -> int:
    """Returns by how many bytes a call raises the resident memory of this process. Linux only."""

    def status(name: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().partition(name)[2].split()[0])

    ctypes.CDLL(None).malloc_trim(0)  # memory that is free would hide what is allocated
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    call()
    return status("VmHWM:") - before


def parameter_bytes(h: tg.Hyperparameters) -> int:
    """Returns the bytes of a model's parameters in float32."""
    with torch.device("meta"):
        return sum(4 * p.numel() for p in tg.GPT(h).parameters())


# ---- Mutations ----

# JSON that is no setting and no size, or one that may be legal alone and is not together.
VALUES = [
    *"0 1 -1 2 3 17 260 100000 2147483648 4294967297 1000000000000000000 1e18 0.5 -0.0".split(),
    *"1e-300 1e999 NaN Infinity -Infinity null true false [] {} [1] 1.0".split(),
    *'"" "0" "0,0" "../x" "\\ud800" "\\u0000" "F16" "I32" "Q" "zstd" "lzma" "zlib"'.split(),
    *("9" * 4000, "9" * 9000, "[" * 9000, "[" * 9000 + "]" * 9000, '"' + "x" * 60_000 + '"'),
]
SCALAR = re.compile(r'"(?:[^"\\]|\\.)*"|[-+.\w]+')  # a name or a value
ENTRY = re.compile(r'"[^"\\]*": ?("[^"\\]*"|[-+.\w]+), ?')  # a name with its value


def damage(rng: random.Random, data: bytes) -> bytes:
    """Returns bytes flipped, cut out, cut off, put in, doubled or zeroed."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed) + 1)
        to = min(len(changed), at + rng.choice((1, 1, 2, 4, 16, 300)))
        how = rng.randrange(7)
        if how < 3 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 3:
            del changed[at:to]
        elif how == 4:
            changed[at:at] = rng.choice((rng.randbytes(to - at), changed[at:to]))
        elif how == 5:
            changed[at:to] = rng.choice((b"\0", b"\xff")) * (to - at)
        elif rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def odd_json(rng: random.Random, text: str) -> str:
    """Returns JSON with one name or value replaced, or one entry missing or there twice."""
    if rng.randrange(4) == 0:
        entry = rng.choice([*ENTRY.finditer(text)])
        times = rng.choice((0, 2))
        return text[: entry.start()] + times * entry[0] + text[entry.end() :]
    old, other = rng.choices([*SCALAR.finditer(text)], k=2)
    new = [rng.choice(VALUES), other[0]]
    if old[0].isdigit():
        new.append(str(int(old[0]) + rng.choice((-64, -4, -1, 1, 4, 64))))
    return text[: old.start()] + rng.choice(new) + text[old.end() :]


def odd_numbers(rng: random.Random, raw: bytes, form: str) -> bytes:
    """Returns arrays with a number of NaN, infinity, 0, or any bytes."""
    data, size = bytearray(raw), struct.calcsize(form)
    value = rng.choice((math.nan, math.inf, -math.inf, 0.0, -1.0, 65504.0, 2.0**-24))
    at = size * rng.randrange(len(data) // size)
    data[at : at + size] = rng.choice((struct.pack(form, value), rng.randbytes(size)))
    return bytes(data)


def odd_artifact(rng: random.Random, blob: bytes) -> bytes:
    """Returns an artifact with one part at fault, and a checksum that fits."""
    text, payload = parts(blob)
    codec, told, raw = described(blob)
    pack = partial(compress, codec, arrays=array_count(tg.replace(DEFAULTS, **told)))
    how = rng.randrange(6)
    if how == 0:  # magic, version, length of the description
        at, near = rng.choice((0, 8, 10, 12)), rng.choice((0, 1, len(text) + 1, 65_536, 1 << 31))
        return resigned(blob[:at] + struct.pack("<I", near) + blob[at + 4 :])
    if how == 1:
        return artifact(odd_json(rng, text.decode()).encode(), payload)
    if how == 2:
        return artifact(text, pack(odd_numbers(rng, raw, "<e")))
    if how == 3:
        return artifact(text, damage(rng, payload))
    if how == 4:  # another frame of the same arrays, or of a byte more or less
        raw = rng.choice((raw, raw, raw + b"\0", raw[:-1]))
        return artifact(text, pack(raw, rng.choice((1, 3, 5))))
    return artifact(text, rng.choice((payload * 2, payload + b"\0", b"", b"skip" + payload)))


def odd_checkpoint(rng: random.Random, blob: bytes) -> bytes:
    """Returns a checkpoint with its header, settings, floats or length at fault."""
    head, body = layout(blob)
    text = json.dumps(head)
    how = rng.randrange(6)
    if how < 2:
        return checkpoint(odd_json(rng, text).encode(), body)
    if how == 2:
        told = odd_json(rng, head["__metadata__"]["settings"])
        return checkpoint({**head, "__metadata__": {"settings": told}}, body)
    if how == 3:
        sizes = (0, 1, len(text) - 1, len(text) + 4, len(body), 1 << 20, 1 << 40, (1 << 64) - 1)
        return checkpoint(text.encode(), body, rng.choice(sizes))
    if how == 4:
        odd = (body[:-4], body + b"\0", body * 2, b"", *3 * [odd_numbers(rng, body, "<f")])
        return checkpoint(head, rng.choice(odd))
    return damage(rng, blob)
