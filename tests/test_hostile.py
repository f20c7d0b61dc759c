"""Artifacts, checkpoints and shards that are damaged or forged: refused, or read as stated."""

import contextlib
import io
import json
import lzma
import math
import pickle
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
import zstandard
from bench.harness import quantize_model
from conftest import randomize, shard_bytes, trainer
from hostile import (
    CODECS,
    DEFAULTS,
    TINY_ARRAYS,
    array_count,
    artifact,
    checkpoint,
    compress,
    damage,
    described,
    description,
    judge,
    judge_bytes,
    layout,
    load_checkpoint,
    lzma_filter,
    odd_artifact,
    odd_checkpoint,
    pack,
    parameter_bytes,
    parts,
    peak_memory,
    tiny,
)

import train_gpt as tg

CASES = [200, pytest.param(2000, marks=pytest.mark.slow)]  # mutations
NAME = "blocks.0.mlp.up.weight"  # the tensor that is changed; [48, 16]
DEEP = {"num_layers": 200, "model_dim": 2, "num_heads": 1, "rope_dims": 2}  # the most layers
measured = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


def written(h: tg.Hyperparameters, tensors: dict[str, torch.Tensor], folder: Path) -> bytes:
    """Returns the checkpoint of some tensors."""
    tg.write_tensors(folder / "made", tensors, asdict(h))
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
    """An artifact by every codec; a trellis reads more than a scalar quantizer."""
    h = tiny(quantizer="trellis")
    arrays = quantize_model(randomize(tg.GPT(h)), {})
    blob = tg.pack_artifact(tg.replace(h, compressor=request.param), arrays)
    _, told, raw = described(blob)
    return Made(h, arrays, request.param, blob, *parts(blob), told, raw)


def training(h: tg.Hyperparameters) -> tg.Trainer:
    """A trainer of a model; it has no data."""
    device = tg.Device(torch.device("cpu"), torch.float32, compiled=False)
    return trainer(randomize(tg.GPT(h)), tg.Data(None, object()), device)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    """The weights of one tiny model as a run saves them."""
    return written(tiny(), randomize(tg.GPT(tiny())).state_dict(), tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> bytes:
    """A checkpoint with the whole state of a training run."""
    run = training(tiny())
    run.step_log.losses, run.step_log.seconds = [3.0, 2.0], [0.5, 1.0]
    return written(tiny(), run.tensors(), tmp_path_factory.mktemp("state"))


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of files are written."""
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


def measure(path: Path, data: bytes, read: Callable = tg.load_artifact) -> tuple[str, int]:
    """Returns the refusal of a file, and the memory that reading it took."""
    path.write_bytes(data)
    said: list[str] = []
    peak = peak_memory(lambda: said.append(judge(path, read)))
    return said[0], peak


@measured
def test_these_tests_write_the_formats_of_the_program(made, good, tmp_path):
    """Without this the refusals below would prove nothing; nor would an unmeasured peak."""
    assert peak_memory(lambda: b"x" * 50_000_000) > 40_000_000
    assert artifact(made.text, made.payload) == made.blob
    assert (
        description(made.codec, made.told, quantizer="trellis")
        == json.dumps(json.loads(made.text)).encode()
    )
    for level in (1, 5, 11):
        payload = compress(made.codec, made.raw, level)
        assert not judge_bytes(tmp_path / "a", artifact(made.text, payload))
    for forged in (good, checkpoint(*layout(good))):
        assert not judge_bytes(tmp_path / "b", forged, load_checkpoint)
    assert "read as a checkpoint" in judge_bytes(tmp_path / "a", made.blob, load_checkpoint)
    assert "read as an artifact" in judge_bytes(tmp_path / "b", good)


# ---- Mutations at random ----


def judge_mutations(
    mutate: Callable, good: bytes, cases: int, path: Path, read: Callable = tg.load_artifact
) -> list[str]:
    """Returns what is said of mutations of a file; reads them in little memory."""
    rng, said = random.Random(1), []
    assert not judge_bytes(path, good, read)  # loads the libraries

    def read_all() -> None:
        said.extend(judge_bytes(path, mutate(rng, good), read) for _ in range(cases))

    assert peak_memory(read_all) < 64 << 20
    assert len(set(said)) > cases // 20  # the cases go to many places
    return said


@measured
@pytest.mark.fault(36)
@pytest.mark.parametrize("cases", CASES)
def test_an_artifact_with_a_right_checksum_is_refused_or_read(cases, made, memory):
    """With any header, description, arrays or frame."""
    said = judge_mutations(odd_artifact, made.blob, cases, memory / "a")
    assert cases // 10 < said.count("") < cases // 2
    assert not any("checksum" in refusal for refusal in said)


def load_as_stated(path: Path, h: tg.Hyperparameters) -> tuple[tg.Hyperparameters, dict]:
    """Reads a checkpoint and asserts that the library of its format reads the same."""
    found, weights, tensors, *_ = tg.load_checkpoint(path, h)
    stated = safetensors.torch.load(path.read_bytes())
    assert tensors.keys() == stated.keys()
    for name, tensor in stated.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0, equal_nan=True)
    prefix = "average/" if f"average/{NAME}" in stated else ""
    for name, weight in weights.items():  # a scalar may be stored as [1]
        assert torch.equal(weight, stated[prefix + name].float().view_as(weight))
    return found, weights


@measured
@pytest.mark.fault(37)
@pytest.mark.parametrize("kind", ["weights", "state"])
@pytest.mark.parametrize("cases", CASES)
def test_damaged_checkpoints_are_refused_or_read_as_stated(cases, kind, good, state, memory):
    """Mutations of the header, of the settings in it, of floats and of any bytes."""
    whole = good if kind == "weights" else state
    said = judge_mutations(odd_checkpoint, whole, cases, memory / "a", load_as_stated)
    assert cases // 20 < said.count("") < cases // 2


@measured
@pytest.mark.fault(4, 8, 36)
@pytest.mark.parametrize("cases", CASES)
def test_damage_of_an_artifact_or_a_shard_is_found(cases, memory):
    """SHA-256 finds it in an artifact. A shard is refused, or read as its bytes state."""
    rng, path, refusals = random.Random(4), memory / "a", []
    blob, shard = pack(randomize(tg.GPT(tiny()))), shard_bytes([*range(500)])

    def read_all() -> None:
        for case in range(cases):
            data = damage(rng, blob)
            assert bool(judge_bytes(path, data)) == (data != blob), case
            data = damage(rng, shard)
            path.write_bytes(data)
            try:
                assert tg.read_shard(path).tobytes() == data[1024:]
            except tg.DataError as error:
                refusals.append(str(error).startswith(f"{path}: not a complete shard"))

    assert peak_memory(read_all) < 16 << 20
    assert all(refusals)
    assert cases // 4 < len(refusals) < cases


# ---- Artifacts ----


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("num_layers", "201", "NUM_LAYERS=201: must be from 1 to 200"),
        ("num_layers", "3.0", "NUM_LAYERS="),
        ("num_layers", "9" * 9000, "4300 digits"),
        ("num_layers", "[" * 60_000, "RecursionError"),
        ("train_seq_len", "1000000000", "TRAIN_SEQ_LEN=1000000000: must be from 2 to"),
        ("rope_base", "NaN", "ROPE_BASE=nan: must be from 1"),
        ("ln_scale", "1", "LN_SCALE=1: must be 0 or 1"),
        ("corpus", '"a\\u0000b"', "CORPUS="),
        ("corpus", '"../../../x"', "CORPUS='../../../x': must be a name"),
        ("ve_layers", '"../x"', "VE_LAYERS='../x'"),
        ("ve_layers", '"' + "9" * 5000 + '"', "cannot be read"),
        ("model_dim", "999999999999999998", "cannot be read"),
        ("model_dim", "65536", "bytes for arrays of"),
        ("bigram_vocab_size", "16777216", "bytes for arrays of"),
        ("corpus", '"' + "x" * 66_000 + '"', "its description has"),
    ],
)
def test_illegal_settings_are_refused_by_name(name, value, says, tmp_path, capsys):
    """The exit status of --eval is 2."""
    codec, told, _ = described(pack(tg.GPT(tiny())))
    text = description(codec, {**told, name: "its value"}).replace(b'"its value"', value.encode())
    path = tmp_path / "a.ptz"
    assert says in judge_bytes(path, artifact(text, parts(pack(tg.GPT(tiny())))[1]))
    assert tg.main(["--eval", str(path)], {}) == 2
    assert capsys.readouterr().out.startswith(f"error: {path}: cannot be read as an artifact")
    assert [*tmp_path.iterdir()] == [path]


def bombs(codec: str, raw: bytes) -> dict[str, bytes]:
    """Returns payloads of a codec that would take memory or time; none is the arrays."""
    found = {"bomb": compress(codec, bytes(100_000_000))}
    if codec == "zstd":
        # One block of a byte repeated, in a window of 2 GB and with no size; the same, stating
        # 4 GB; frames that state the arrays' size, with more blocks, or skippable.
        run = struct.pack("<I", len(raw) << 3 | 1 << 1 | 1)[:3] + b"\0"
        blocks = 50 * (struct.pack("<I", 100_000 << 3 | 1 << 1)[:3] + b"\0") + run
        found["window"] = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + run.ljust(99, b"\0")
        for name, size, body in (
            ("size", 1 << 32, run.ljust(99, b"\0")),
            ("more", len(raw), blocks),
        ):
            found[name] = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + body
        found["skippable"] = struct.pack("<II", 0x184D2A50, len(raw)) + raw
        unsized = zstandard.ZstdCompressor(write_content_size=False)
        found["unsized"] = unsized.compress(bytes(100_000_000))
    if codec == "lzma":
        # A reset of the dictionary before each byte; a window of 64 MiB; a bomb after the arrays.
        found["chunks"] = b"".join(b"\1\0\0" + raw[i : i + 1] for i in range(100)) + b"\0"
        wide = lzma_filter(1 << 26, preset=0)
        found["wide"] = lzma.compress(raw + b"\0", lzma.FORMAT_RAW, filters=wide)
        found["after"] = compress("lzma", raw)[:-1] + compress("lzma", bytes(4_000_000))
    if codec == "brotli":
        import brotli

        # Noise first, so that little of what is decoded is the same byte.
        data = random.Random(0).randbytes(len(raw) // 2) + bytes(20_000_000)
        for window in (10, 24):
            found[f"window {window}"] = brotli.compress(data, quality=5, lgwin=window)
        found["large window"] = b"\x11" + bytes([30]) + compress("brotli", raw)[1:]
    return found


def odd_words(payload: bytes) -> dict[str, bytes]:
    """Returns payloads of the codec `range` whose words or ways are at fault."""
    count, checksum = struct.unpack_from("<II", payload)
    ways, start = payload[8 : 8 + TINY_ARRAYS], 8 + TINY_ARRAYS
    words, rest = payload[start : start + 4 * count], payload[start + 4 * count :]
    assert count and tg.BY_COLUMN in ways

    def made(words: bytes, ways: bytes = ways, count: int | None = None) -> bytes:
        count = len(words) // 4 if count is None else count
        return struct.pack("<II", count, checksum) + ways + words + rest

    noise = random.Random(0).randbytes(len(words))
    return {
        "no words": made(b""),
        "half the words": made(words[: count // 2 * 4]),
        "words of noise": made(noise),
        "words of ones": made(b"\xff" * len(words)),
        "words too many": made(words, count=(1 << 32) - 1),
        "ways of floats": made(words, bytes(TINY_ARRAYS)),
        "unknown ways": made(words, bytes([9]) * TINY_ARRAYS),
        "no ways": payload[:8],
        "a head cut": payload[:7],
        "by row": made(words, bytes([tg.BY_ROW if way == 0 else way for way in ways])),
    }


@measured
@pytest.mark.fault(36)
def test_a_payload_that_is_not_the_arrays_alone_takes_no_memory(made, tmp_path):
    """Bombs, other codecs, and streams that are cut or followed; at most 4 x the parameters' bytes
    and 16 MiB."""
    good = compress(made.codec, made.raw)
    payloads = bombs(made.codec, made.raw) | {
        "nothing": b"",
        "noise": random.Random(0).randbytes(len(made.raw)),
        "much": bytes(40_000_000),
        "more": compress(made.codec, made.raw + b"\0"),
        "less": compress(made.codec, made.raw[:-1]),
        "cut": good[:-9],
        "followed": good + b"\0",
        "twice": good + good,
    }
    others = [codec for codec in ("zstd", "lzma") if codec != made.codec]
    payloads |= {codec: compress(codec, made.raw) for codec in others}
    if made.codec == "range":
        payloads |= odd_words(made.payload)
    judge_bytes(tmp_path / "good", made.blob)  # loads the codec
    for name, payload in payloads.items():
        refusal, peak = measure(tmp_path / "a", artifact(made.text, payload))
        assert "cannot be read as an artifact" in refusal, name
        assert peak < 4 * parameter_bytes(made.h) + (16 << 20), name


@measured
@pytest.mark.fault(36)
@pytest.mark.parametrize("codec", CODECS)
def test_memory_of_an_artifact_is_bounded_by_what_its_settings_declare(codec, tmp_path):
    """Of a larger model, whole and as a bomb."""
    large = tiny(model_dim=128, num_layers=2, bigram_vocab_size=16_000, bigram_dim=128)
    whole = pack(tg.GPT(large), codec)
    raw = described(whole)[2] + bytes(100_000_000)
    bomb = artifact(parts(whole)[0], compress(codec, raw, arrays=array_count(large)))
    for data, is_read in ((whole, True), (bomb, False)):
        refusal, peak = measure(tmp_path / "a", data)
        assert is_read == (not refusal), refusal
        assert peak < 4 * parameter_bytes(large) + (16 << 20)


# ---- Checkpoints ----


@pytest.mark.fault(36)
def test_a_file_of_ten_gigabytes_is_not_read(good, tmp_path):
    for data, read in ((pack(tg.GPT(tiny())), tg.load_artifact), (good, load_checkpoint)):
        for size in (len(data), 8):  # whole and followed; no more than the size of a header
            with (tmp_path / "huge").open("wb") as file:
                file.write(data[:size])
                file.truncate(10_000_000_000)
            assert judge(tmp_path / "huge", read)
        for nothing in (tmp_path / "absent", tmp_path, Path("/dev/null")):
            assert judge(nothing, read)


def headers(good: bytes) -> dict[str, tuple[bytes, str]]:
    """Files whose header is edited, and the fault that is named."""
    head, body = layout(good)
    of, meta = head[NAME], head["__metadata__"]
    (at, to), end = of["data_offsets"], len(body)
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    library = "SafetensorError"  # whose words differ between versions

    def told(**changes: object) -> bytes:
        return checkpoint({**head, NAME: {**of, **changes}}, body)

    def settings(value: object) -> bytes:
        return checkpoint({**head, "__metadata__": value}, body)

    return {
        "overlap": (told(data_offsets=[at - 64, to - 64]), library),
        "past the end": (told(data_offsets=[at, 1 << 63]), library),
        "a terabyte": (told(shape=[1 << 34, 16], data_offsets=[at, at + (1 << 40)]), library),
        "another shape": (told(shape=[16, 48]), NAME),
        "huge": (told(shape=[1 << 62, 1 << 62]), library),
        "F64": (told(dtype="F64", shape=[24, 16]), NAME),
        "I32": (told(dtype="I32"), NAME),
        "all missing": (checkpoint({"__metadata__": meta}, b""), "Missing key"),
        "more": (checkpoint({**head, "more": nothing}, body), "more"),
        "deep settings": (settings({"settings": "[" * 60_000}), "RecursionError"),
        "size of a terabyte": (checkpoint(b"{}", body, 1 << 40), "header"),
        "of 2 MiB of spaces": (checkpoint(b"{}".ljust(1 << 21), body), "header"),
        "of 2 MiB of a list": (checkpoint(b'{"a":[' + b"1," * (1 << 20), body), "header"),
    }


@measured
@pytest.mark.fault(37)
def test_forged_headers_are_refused_and_take_no_memory(good, tmp_path):
    """At most 32 MiB and 4 x the parameters' bytes."""
    judge_bytes(tmp_path / "good", good, load_checkpoint)  # loads the library
    for name, (data, says) in headers(good).items():
        refusal, peak = measure(tmp_path / "a", data, load_checkpoint)
        assert says in refusal, name
        assert peak < 4 * parameter_bytes(tiny()) + (32 << 20), name


@pytest.mark.fault(37)
def test_a_cut_or_extended_checkpoint_is_refused(good, memory):
    size = 8 + int.from_bytes(good[:8], "little")
    ends = [0, 1, 7, 8, 9, size - 1, size, size + 1, *range(0, len(good), 2999), len(good) - 1]
    for data in (*(good[:end] for end in ends), good + b"\0", good + bytes(64), good + good):
        assert judge_bytes(memory / "a", data, load_checkpoint), len(data)


class Trap:
    """What a pickle would run if it were let."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.fault(37)
def test_files_of_other_formats_are_refused_and_execute_nothing(good, tmp_path):
    """Pickles, alone and inside other formats, that execute something when they are loaded."""
    trap, (head, body) = tmp_path / "executed", layout(good)
    files = {f"pickle {n}": pickle.dumps(Trap(trap), protocol=n) for n in range(6)}
    for zipped in (True, False):
        file = io.BytesIO()
        value = {"settings": tg.model_settings(tiny()), "weights": Trap(trap)}
        torch.save(value, file, _use_new_zipfile_serialization=zipped)
        files[f"torch.save {zipped}"] = file.getvalue()
    inner = files["pickle 2"]
    entry = {"dtype": "U8", "shape": [len(inner)], "data_offsets": [len(body), len(body) + 9]}
    others = {
        "within": checkpoint({**head, "a/0": entry}, body + inner),
        "as header": checkpoint(inner, body),
        "of the library": safetensors.torch.save({NAME: torch.zeros(48, 16)}),
    }
    for name, data in {**files, **others}.items():
        for path in (tmp_path / name, tmp_path / f"{name}.pt"):
            assert "read as a checkpoint" in judge_bytes(path, data, load_checkpoint)
            assert "read as an artifact" in judge_bytes(path, data)
        assert not trap.exists(), name
    for name, data in files.items():  # the traps work
        with contextlib.suppress(Exception):
            torch.load(io.BytesIO(data), weights_only=False)
            pickle.loads(data)
        assert trap.exists(), name
        trap.unlink()


@pytest.mark.fault(34, 36, 37)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(value, made, good, tmp_path):
    for name in (f"{NAME}.scales", "smear.gate"):
        bad = made.arrays[name].clone()
        bad[3] = value
        forged = tg.pack_artifact(
            tg.replace(made.h, compressor=made.codec), {**made.arrays, name: bad}
        )
        says = f"{name.removesuffix('.scales')} is not finite float32"
        assert says in judge_bytes(tmp_path / "a", forged)
    weights = safetensors.torch.load(good)
    for name in (NAME, "smear.gate", "value_embedding.scale"):
        bad = weights[name].clone()
        bad.view(-1)[-1] = value
        data = safetensors.torch.save({**weights, name: bad}, layout(good)[0]["__metadata__"])
        says = f"{name} is not finite float32"
        assert says in judge_bytes(tmp_path / "a", data, load_checkpoint)


@pytest.mark.fault(37)
def test_any_file_of_the_library_that_fits_is_read(good, tmp_path):
    """Whatever the order of its tensors, and whatever else a checkpoint holds."""
    head, body = layout(good)
    weights = safetensors.torch.load(good)
    more = {"clock/steps": torch.rand(2, 3, dtype=torch.float64), "more": torch.ones(1, 2, 3)}
    averages = {f"average/{name}": p for name, p in weights.items()}
    for data in (
        checkpoint(dict(reversed(head.items())), body),
        safetensors.torch.save(weights, head["__metadata__"]),
        safetensors.torch.save(averages | more, head["__metadata__"]),
    ):
        (tmp_path / "a").write_bytes(data)
        _, found = load_as_stated(tmp_path / "a", DEFAULTS)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_files_of_the_most_layers_and_many_steps_are_read(tmp_path):
    """A header with the whole state of training is not longer than a header may be."""
    h, steps = tiny(**DEEP, jepa_chunk_size=4), 20_000
    before, after = training(h), training(h)
    before.step_log.elapsed = steps / 7
    before.step_log.seconds = [n / 8 for n in range(steps)]
    before.step_log.losses = [1 / (n + 1) for n in range(steps)]
    tensors = before.tensors()
    data = written(h, tensors, tmp_path)
    longer = 2 * 12 + 2 * 5  # of offsets and shapes of a model that is wider
    assert int.from_bytes(data[:8], "little") + longer * len(tensors) < 1 << 20
    after.restore(tg.load_checkpoint(tmp_path / "made", h).tensors)
    assert after.step == steps
    assert after.step_log.seconds == before.step_log.seconds
    assert after.step_log.losses == before.step_log.losses
    assert after.step_log.elapsed == before.step_log.elapsed
    assert not judge_bytes(tmp_path / "a", pack(tg.GPT(tiny(**DEEP))))
