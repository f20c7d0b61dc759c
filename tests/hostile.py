"""Damaged and forged artifacts and checkpoints, and the only two results a reader may have."""

import functools
import hashlib
import importlib.util
import json
import lzma
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zstandard
from conftest import settings

import train_gpt as tg

DEFAULTS = tg.Hyperparameters()
SETTINGS = {
    "num_layers": 1,
    "model_dim": 16,
    "num_heads": 2,
    "num_kv_heads": 1,
    "bigram_vocab_size": 16,
    "bigram_dim": 4,
    "ve_dim": 4,
}


def tiny(**changes: object) -> tg.Hyperparameters:
    """Settings of a model of some 7,000 parameters."""
    return settings(**{**SETTINGS, **changes})


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


def lzma_filter(dictionary: int, **options: int) -> list[dict[str, int]]:
    """The filters of raw LZMA2."""
    return [{"id": lzma.FILTER_LZMA2, "dict_size": dictionary, **options}]


def compress(codec: str, raw: bytes, level: int = 1) -> bytes:
    """The bytes as a payload of an artifact, by the codec's library alone."""
    if codec == "zstd":
        return zstandard.ZstdCompressor(level=level).compress(raw)
    if codec == "lzma":
        options = lzma_filter(1 << 16, preset=min(level, 9))
        return lzma.compress(raw, lzma.FORMAT_RAW, filters=options)
    if codec == "brotli":
        import brotli

        return brotli.compress(raw, quality=min(level, 11))
    raise AssertionError(f"no test knows the codec {codec}")


def decompress(codec: str, payload: bytes) -> bytes:
    """The bytes of a payload, by the codec's library alone."""
    if codec == "zstd":
        return zstandard.ZstdDecompressor().decompress(payload)
    if codec == "lzma":
        return lzma.decompress(payload, lzma.FORMAT_RAW, filters=lzma_filter(1 << 26))
    if codec == "brotli":
        import brotli

        return brotli.decompress(payload)
    raise AssertionError(f"no test knows the codec {codec}")


def pack(model: tg.GPT, codec: str = "zstd") -> bytes:
    """The artifact of a model, its matrices rounded."""
    return tg.pack_artifact(model.h, tg.quantize_model(model, {}, tg.Ranks())[0], codec)


def build_once(patch: Callable = setattr) -> None:
    """Build the model and the layout of some settings once."""
    make, lay_out = tg.GPT, tg.artifact_layout

    @functools.lru_cache(128)
    def built(h: tg.Hyperparameters) -> tuple[tg.GPT, dict[str, torch.Tensor]]:
        model = make(h)
        return model, model.state_dict()

    def model_of(h: tg.Hyperparameters) -> tg.GPT:
        model, blank = built(h)
        model.load_state_dict(blank, assign=True)  # without what has been read into it
        return model

    layout_of = functools.lru_cache(128)(lambda h: lay_out(model_of(h)))
    patch(tg, "GPT", model_of)
    patch(tg, "artifact_layout", lambda model: layout_of(model.h))


MAGIC = b"PGOLFGPT\2\0\0\0"  # with the version


def artifact(text: bytes, payload: bytes, magic: bytes = MAGIC) -> bytes:
    """A file by the format alone, its checksum right whatever its parts are."""
    return resigned(struct.pack("<12sI", magic, len(text)) + bytes(32) + text + payload)


def description(codec: object, settings: object, **more: object) -> bytes:
    """The description of an artifact."""
    return json.dumps({"codec": codec, "settings": settings, **more}).encode()


def described(blob: bytes) -> tuple[str, dict, bytes]:
    """Codec, settings and arrays of an artifact."""
    text, payload = parts(blob)
    told = json.loads(text)
    return told["codec"], told["settings"], decompress(told["codec"], payload)


def resigned(blob: bytes) -> bytes:
    """The bytes with a checksum that fits them."""
    digest = hashlib.sha256(blob[:16] + bytes(32) + blob[48:]).digest()
    return blob[:16] + digest + blob[48:]


def parts(blob: bytes) -> tuple[bytes, bytes]:
    """Description and payload of an artifact."""
    size = struct.unpack_from("<I", blob, 12)[0]
    return blob[48 : 48 + size], blob[48 + size :]


def layout(blob: bytes) -> tuple[dict, bytes]:
    """Header and tensors' bytes of a checkpoint."""
    size = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + size]), blob[8 + size :]


def checkpoint(head: dict | list | bytes, body: bytes, size: int | None = None) -> bytes:
    """A file by the format alone; a list of pairs of names and JSON can have a name twice.

    `size` is what the file states as its header's bytes, if not the truth.
    """
    if isinstance(head, list):
        pairs = (f"{json.dumps(name)}:{text}" for name, text in head)
        head = ("{" + ",".join(pairs) + "}").encode()
    elif isinstance(head, dict):
        head = json.dumps(head).encode()
    return (len(head) if size is None else size).to_bytes(8, "little") + head + body


def load_checkpoint(path: Path, h: tg.Hyperparameters) -> tuple[tg.Hyperparameters, dict]:
    """Settings and weights of a checkpoint."""
    h, weights, _ = tg.load_checkpoint(path, h)
    return h, weights


def judge(path: Path, read: Callable = tg.load_artifact) -> str:
    """Empty if it loads as its settings declare, else the refusal; AssertionError at all else."""
    try:
        h, weights = read(path, DEFAULTS)
    except tg.DataError as error:
        assert str(error).startswith(f"{path}: ")
        assert len(str(error)) < len(str(path)) + 400
        return str(error)
    with torch.device("meta"):
        model = tg.GPT(h).state_dict()
    assert weights.keys() == model.keys()
    for name, p in model.items():
        assert (weights[name].shape, weights[name].dtype) == (p.shape, torch.float32)
        assert weights[name].isfinite().all()
    return ""


# JSON that is no setting, or one that may be legal alone and is not together, or is enormous.
VALUES = [
    *"0 1 -1 2 3 17 260 100000 2147483648 4294967297 1000000000000000000 1e18 0.5 -0.0".split(),
    *"1e-300 1e999 NaN Infinity -Infinity null true false [] {} [1] 1.0".split(),
    *'"" "0" "0,0" "../x" "\\ud800" "\\u0000"'.split(),
    *("9" * 4000, "9" * 9000, "[" * 9000, "[" * 9000 + "]" * 9000, '"' + "x" * 60_000 + '"'),
]


def damage(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut out, cut off, put in, doubled, zeroed or exchanged."""
    data, many = bytearray(data), rng.choice((1, 1, 2, 8))
    for _ in range(many):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((1, 1, 2, 4, 16, 300)))
        other = rng.randrange(len(data) + 1)
        how = rng.randrange(8)
        if how < 3 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 3:
            del data[at:to]
        elif how == 4:
            data[at:at] = rng.randbytes(to - at)
        elif how == 5:
            data[other:other] = data[at:to]
        elif how == 6:
            data[at:to] = rng.choice((b"\0", b"\xff")) * (to - at)
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def odd_settings(rng: random.Random, told: dict) -> bytes:
    """Settings of which one is another, there twice, missing or unknown, or JSON damaged."""
    pairs = [f'"{name}":{json.dumps(value)}' for name, value in told.items()]
    at, how = rng.randrange(len(pairs)), rng.randrange(8)
    name = list(told)[rng.randrange(len(pairs))]
    if how < 4:
        pairs[at] = f'"{list(told)[at]}":{rng.choice(VALUES)}'
    elif how == 4:
        pairs.append(f'"{name}":{rng.choice(VALUES)}')
    elif how == 5:
        del pairs[at]
    elif how == 6:
        pairs.append(f'"more":{rng.choice(VALUES)}')
    text = ("{" + ",".join(pairs) + "}").encode()
    return damage(rng, text) if how == 7 else text


def odd_description(rng: random.Random, text: bytes) -> bytes:
    """A description with odd settings, another codec, more keys or fewer, or damaged JSON."""
    told, how = json.loads(text), rng.randrange(8)
    settings, codec = json.dumps(told["settings"]), json.dumps(told["codec"])
    if how < 5:
        settings = odd_settings(rng, told["settings"]).decode(errors="surrogateescape")
    elif how == 5:
        codec = rng.choice((*VALUES, *map(json.dumps, ("", "ZSTD", "zlib", *tg.CODECS))))
    pairs = [f'"codec":{codec}', f'"settings":{settings}']
    if how == 6:
        rng.choice((pairs.pop, lambda: pairs.append(f'"more":{rng.choice(VALUES)}')))()
    text = ("{" + ",".join(pairs) + "}").encode(errors="surrogateescape")
    return damage(rng, text) if how == 7 else text


def odd_arrays(rng: random.Random, raw: bytes) -> bytes:
    """Arrays with another number: any code, or a scale or float16 of NaN, infinity, 0 or less."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 5))):
        at = rng.randrange(len(data) - 1)
        value = rng.choice((math.nan, math.inf, -math.inf, 0.0, -1.0, 65504.0, 2.0**-24))
        data[at : at + 2] = rng.choice((struct.pack("<e", value), rng.randbytes(2)))
    return bytes(data)


def any_frame(rng: random.Random, codec: str, raw: bytes) -> bytes:
    """A payload as any encoder of the codec, and of its neighbours, may write it."""
    if codec == "zstd":
        return zstandard.ZstdCompressor(
            level=rng.choice((1, 3, 19)),
            write_content_size=rng.random() < 0.7,
            write_checksum=rng.random() < 0.5,
        ).compress(raw)
    if codec == "lzma":
        if rng.random() < 0.2:
            return lzma.compress(raw, rng.choice((lzma.FORMAT_XZ, lzma.FORMAT_ALONE)), preset=0)
        bits = {"lc": rng.randrange(5), "lp": 0, "pb": rng.randrange(5)}
        options = lzma_filter(1 << rng.choice((12, 16, 20)), preset=rng.choice((0, 6)), **bits)
        return lzma.compress(raw, lzma.FORMAT_RAW, filters=options)
    if codec == "brotli":
        import brotli

        quality, window = rng.choice((0, 1, 5, 11)), rng.choice((10, 16, 22, 24))
        return brotli.compress(raw, quality=quality, lgwin=window)
    raise AssertionError(f"no test knows the codec {codec}")


def odd_frame(rng: random.Random, codec: str, raw: bytes) -> bytes:
    """The arrays, or a byte more or less, in a frame of any kind, size and surroundings."""
    raw = raw if rng.random() < 0.7 else raw[:-1] if rng.random() < 0.5 else raw + b"\0"
    how, frame = rng.randrange(5), any_frame(rng, codec, raw)
    if how == 0:
        frame = damage(rng, frame)
    elif how == 1:  # where frames state their sizes
        data = bytearray(frame)
        data[rng.randrange(18)] = rng.randrange(256)
        frame = bytes(data)
    elif how == 2:
        skipped = struct.pack("<II", 0x184D2A50, 4) + b"skip"  # of zstd
        frame = rng.choice(
            (frame + frame, frame + b"\0" * 4, skipped + frame, frame + skipped, b"")
        )
    return frame


def odd_header(rng: random.Random, blob: bytes) -> bytes:
    """Another magic, version or length of the description."""
    at, form = rng.choice(((0, "<Q"), (8, "<H"), (10, "<H"), (12, "<I"), (12, "<I")))
    data, size = bytearray(blob), struct.unpack_from("<I", blob, 12)[0]
    near = rng.choice((0, 1, 2, size - 1, size + 1, len(blob), 65_535, 65_536, rng.getrandbits(64)))
    struct.pack_into(form, data, at, near % 256 ** struct.calcsize(form))
    return bytes(data)


def resigned_case(rng: random.Random, text: bytes, raw: bytes) -> bytes:
    """An artifact with header, description, arrays or frame at fault, and a right checksum."""
    how, codec = rng.randrange(5), json.loads(text)["codec"]
    if how == 0:
        return resigned(odd_header(rng, artifact(text, compress(codec, raw))))
    if how == 1:
        return artifact(odd_description(rng, text), compress(codec, raw))
    if how == 2:
        return artifact(text, compress(codec, odd_arrays(rng, raw)))
    frame = odd_frame(rng, codec, raw)
    return artifact(text if how == 3 else odd_description(rng, text), frame)


# Numbers that are no size, or an enormous one, or one of another tensor.
NUMBERS = "0 1 -1 -4 2 3 16 64 1.0 16.0 true null 1e9 4294967296 1000000000000000000000 [] {}"
NUMBERS = [*NUMBERS.split(), '""', "9" * 4000]
TYPES = "F16 BF16 F8_E4M3 F64 F32 I32 I64 U8 BOOL f32 F Q".split()


def odd_tensor(rng: random.Random, of: dict, other: dict) -> str:
    """JSON of a tensor's entry with another type, shape or place, or none of these."""
    of = {name: json.dumps(value) for name, value in of.items()}
    shape, (at, to) = json.loads(of["shape"]), json.loads(of["data_offsets"])
    how = rng.randrange(8)
    if how == 0:
        of["dtype"] = rng.choice(("null", "32", "[]", "{}", *(f'"{name}"' for name in TYPES)))
    elif how == 1:
        shapes = (
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            [math.prod(shape)],
            shape[1:],
            other["shape"],
        )
        of["shape"] = json.dumps(rng.choice(shapes))
    elif how == 2:
        numbers = [*map(str, shape)] or ["1"]
        numbers[rng.randrange(len(numbers))] = rng.choice(NUMBERS)
        of["shape"] = f"[{','.join(numbers)}]"
    elif how == 3:
        by = rng.choice((-64, -4, -1, 1, 4, 64))
        places = (at + by, to + by), (at + by, to), (at, to + by), (to, at), (at,), (at, to, to), ()
        of["data_offsets"] = json.dumps(rng.choice((*places, other["data_offsets"])))
    elif how == 4:
        place = [str(at), str(to)]
        place[rng.randrange(2)] = rng.choice(NUMBERS)
        of["data_offsets"] = f"[{','.join(place)}]"
    elif how == 5:
        del of[rng.choice([*of])]
    elif how == 6:
        of[rng.choice([*of])] = rng.choice(VALUES)
    else:
        of["more"] = rng.choice(VALUES)
    return "{" + ",".join(f'"{name}":{text}' for name, text in of.items()) + "}"


def odd_checkpoint(rng: random.Random, blob: bytes) -> bytes:
    """A checkpoint with its header, the size of that, its settings, floats or length at fault."""
    head, body = layout(blob)
    pairs = [[name, json.dumps(value)] for name, value in head.items()]
    names, size = [name for name in head if name != "__metadata__"], None
    name, other = rng.sample(names, 2)
    at, how = [*head].index(name), rng.randrange(12)
    if how < 3:
        pairs[at][1] = odd_tensor(rng, head[name], head[other])
    elif how == 3:
        pairs[at][0] = rng.choice((other, f"{name}s", "a/0", "", "\ud800", "\0", "x" * 60_000))
    elif how == 4:
        rng.choice((pairs.reverse, lambda: rng.shuffle(pairs), lambda: pairs.pop(at)))()
    elif how == 5:  # one twice, or one more, with its bytes or without
        entry = odd_tensor(rng, head[name], head[other])
        there = {"dtype": "F32", "shape": [4], "data_offsets": [len(body), len(body) + 16]}
        pairs.append([rng.choice((name, "more", "a/0")), rng.choice((entry, json.dumps(there)))])
        body += bytes(rng.choice((0, 16)))
    elif how == 6:
        texts = (
            rng.choice(VALUES),
            json.dumps({"settings": json.loads(rng.choice(("3", "null", "{}")))}),
        )
        pairs[0] = rng.choice((["__metadata__", rng.choice(texts)], pairs[1]))
    elif how == 7:
        settings = odd_settings(rng, json.loads(head["__metadata__"]["settings"]))
        text = json.dumps(settings.decode(errors="replace"))
        pairs[0][1] = f'{{"settings":{text},"more":"text"}}'
    elif how == 8:
        true = len(checkpoint(pairs, b"")) - 8
        near = (
            true - 1,
            true + 1,
            true + 4,
            len(body),
            1 << 20,
            (1 << 20) - 8,
            1 << 40,
            (1 << 64) - 1,
        )
        size = rng.choice((*near, 0, 1, 2, rng.getrandbits(64)))
    elif how == 9:
        data, value = bytearray(body), rng.choice((math.nan, math.inf, -math.inf, 0.0, 1e-45, 3e38))
        struct.pack_into("<f", data, 4 * rng.randrange(len(body) // 4), value)
        body = bytes(data)
    elif how == 10:
        ends = body[:-4], body[:-1], body + b"\0", body + bytes(4), body * 2, b""
        body = rng.choice(ends)
    else:
        return damage(rng, blob)
    return checkpoint(pairs, body, size)
