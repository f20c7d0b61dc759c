"""Artifacts and checkpoints that somebody damaged or forged: refused by name, or read as told."""

import contextlib
import io
import json
import lzma
import math
import pickle
import random
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import zstandard
from conftest import ROOT, randomize
from hostile import (
    artifact,
    build_once,
    checkpoint,
    damage,
    judge,
    layout,
    load_checkpoint,
    odd_checkpoint,
    parts,
    resigned_case,
    tiny,
)

import train_gpt as tg

CASES = 5200  # of either kind of mutation of artifacts
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
    tg.save("made", h, tensors, tg.Log(folder))
    return (folder / "made").read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[tg.Hyperparameters, dict[str, torch.Tensor], bytes, bytes]:
    """Settings, arrays, artifact and checkpoint of one tiny model."""
    h = tiny()
    model = randomize(tg.GPT(h))
    arrays, _ = tg.quantize(model)
    folder = tmp_path_factory.mktemp("made")
    return h, arrays, tg.pack(h, arrays), written(h, model.state_dict(), folder)


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


def raw_arrays(blob: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(parts(blob)[1])


def judge_bytes(path: Path, data: bytes, read=tg.load_artifact, seconds: float = 10.0) -> str:
    path.write_bytes(data)
    with in_seconds(seconds):
        return judge(path, read)


@pytest.mark.fault(36)
def test_damage_is_always_found(made, quick, memory):
    """SHA-256 finds what the mutations do not undo."""
    _, _, blob, _ = made
    rng, path = random.Random(1), memory / "a.ptz"
    for case in range(CASES):
        data = damage(rng, blob)
        assert bool(judge_bytes(path, data)) == (data != blob), case


@pytest.mark.fault(36)
def test_what_passes_the_checksum_is_refused_or_read(made, quick, memory):
    _, _, blob, _ = made
    text, raw = parts(blob)[0], raw_arrays(blob)
    rng, path, loaded, said = random.Random(2), memory / "a.ptz", 0, set()
    for _ in range(CASES):
        refusal = judge_bytes(path, resigned_case(rng, text, raw))
        loaded += not refusal
        said.add(refusal.removeprefix(str(path))[:75])
    assert CASES // 10 < loaded < CASES // 2
    assert not any("checksum" in refusal for refusal in said)
    assert len(said) > 100  # the cases go to many places


def refused(path: Path, data: bytes, says: str, read=tg.load_artifact) -> None:
    refusal = judge_bytes(path, data, read, seconds=5.0)
    assert says in refusal.removeprefix(str(path)), refusal or "loaded"


def test_the_wrapper_made_here_is_the_programs(made, tmp_path):
    """Else the refusals below would say nothing."""
    _, _, blob, good = made
    assert artifact(*parts(blob)) == blob
    assert not judge_bytes(tmp_path / "a", artifact(*parts(blob)))
    head, body = layout(good)
    pairs = [(name, json.dumps(value)) for name, value in head.items()]
    for forged in (checkpoint(head, body), checkpoint(pairs, body)):
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
        ("rope_base", "NaN", "ROPE_BASE=nan: must be from 1"),
        ("rope_base", "Infinity", "ROPE_BASE=inf: must be from 1"),
        ("rope_base", "1e999", "ROPE_BASE=inf: must be from 1"),
        ("ln_scale", "1", "LN_SCALE=1: must be 0 or 1"),
        ("corpus", '"\\ud800"', "corpus"),
        ("corpus", '"a\\u0000b"', "corpus"),
        ("model_dim", "999999999999999998", "cannot be read"),
        ("model_dim", "1048576", "bytes for arrays of"),
        ("vocab_size", "65536", "bytes of arrays, not"),
        ("ve_dim", "99999999", "bytes for arrays of"),
        ("mlp_mult", "1e17", "cannot be read"),
        ("bigram_vocab_size", "1000000000000", "bytes for arrays of"),
        ("corpus", '"' + "x" * 66_000 + '"', "header"),
    ],
)
def test_settings_that_cannot_be(name, value, says, made, quick, tmp_path):
    text, payload = parts(made[2])
    told = json.loads(text)
    others = ",".join(f'"{n}":{json.dumps(v)}' for n, v in told.items() if n != name)
    changed = f'{{{others},"{name}":{value}}}'
    refused(tmp_path / "a", artifact(changed.encode(), payload), says)


@pytest.mark.fault(38)
def test_settings_of_another_program_are_named(made, tmp_path):
    text, payload = parts(made[2])
    told = json.loads(text)
    less = {name: value for name, value in told.items() if name != "rope_base"}
    refused(tmp_path / "a", artifact(json.dumps(less).encode(), payload), "['rope_base']")
    refused(tmp_path / "a", artifact(json.dumps({**told, "x": 1}).encode(), payload), "['x']")
    refused(tmp_path / "a", artifact(b"[1]", payload), "TypeError")


def test_the_most_layers_are_read_quickly(tmp_path):
    h = tiny(num_layers=200, model_dim=2, num_heads=1, rope_dims=2)
    blob = tg.pack(h, tg.quantize(tg.GPT(h))[0])
    assert not judge_bytes(tmp_path / "a", blob)


SKIPPED = struct.pack("<II", 0x184D2A50, 4) + b"skip"


def frames(raw: bytes) -> dict[str, tuple[bytes, str]]:
    """Frames that must not be read, and what is said of them."""
    zstd = zstandard.ZstdCompressor(level=1)
    good, wrong = zstd.compress(raw), f"bytes of arrays, not {len(raw)}"
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(raw)
    # One block of a byte repeated, in a window of 2 GB and with no size; the same, telling 4 GB.
    run = struct.pack("<I", len(raw) << 3 | 1 << 1 | 1)[:3] + b"\0"
    wide = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + run
    vast = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 32) + run
    skippable = struct.pack("<II", 0x184D2A50, len(raw)) + raw
    return {
        "window": (wide.ljust(99, b"\0"), wrong),
        "size": (vast.ljust(99, b"\0"), wrong),
        "unsized": (unsized, wrong),
        "unsized bomb": (
            zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100_000_000)),
            wrong,
        ),
        "bomb": (zstd.compress(bytes(100_000_000)), wrong),
        "more": (zstd.compress(raw + b"\0"), wrong),
        "less": (zstd.compress(raw[:-1]), wrong),
        "twice": (good + good, "bytes for arrays"),
        "followed": (good + b"\0", "unused data"),
        "then skippable": (good + SKIPPED, "unused data"),
        "after skippable": (SKIPPED + good, wrong),
        "skippable alone": (skippable, "decompressed 0 bytes"),
        "cut": (good[:-9], "ZstdError"),
        "nothing": (b"", "bytes for arrays"),
        "of lzma": (lzma.compress(raw, preset=0), "ZstdError"),
    }


@pytest.mark.fault(36)
def test_frames_that_are_not_the_arrays_alone(made, quick, tmp_path):
    text, raw = parts(made[2])[0], raw_arrays(made[2])
    for name, (payload, says) in frames(raw).items():
        refused(tmp_path / name, artifact(text, payload), says)
    assert not judge_bytes(tmp_path / "good", artifact(text, zstandard.compress(raw)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(value, made, quick, tmp_path):
    h, arrays, _, _ = made
    for name in ("blocks.0.mlp.up.weight.scales", "smear.gate"):
        bad = arrays[name].clone()
        bad[3] = value
        weight = name.removesuffix(".scales")
        refused(
            tmp_path / "a", tg.pack(h, {**arrays, name: bad}), f"{weight} is not float32 or not"
        )


def test_any_code_is_worth_itself_times_its_scale(made, quick, tmp_path):
    h, arrays, _, _ = made
    name, path = "blocks.0.mlp.up.weight", tmp_path / "a"
    codes, scales = arrays[f"{name}.codes"].clone(), arrays[f"{name}.scales"].clone()
    codes[0, :4], scales[:3] = torch.tensor([-128, 127, 32, 0]), torch.tensor([65504.0, 0.0, -1.0])
    path.write_bytes(tg.pack(h, {**arrays, f"{name}.codes": codes, f"{name}.scales": scales}))
    _, weights = tg.load_artifact(path, h)
    assert torch.equal(weights[name], codes.float() * scales.float()[:, None])


@pytest.mark.fault(36)
def test_a_file_of_ten_gigabytes_is_not_read(made, quick, tmp_path):
    for data, read in ((made[2], tg.load_artifact), (made[3], load_checkpoint)):
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
    """Files whose header is edited, and what is said of them."""
    head, body = layout(good)
    of, meta = head[NAME], head["__metadata__"]
    names = [name for name in head if name != "__metadata__"]
    at, to = of["data_offsets"]
    before = head[names[names.index(NAME) - 1]]["data_offsets"]
    place, short = f"{NAME} is not in its place", "buffer is too small"

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

    less = {name: value for name, value in head.items() if name != NAME}
    text, end = json.dumps(head).encode(), len(body)
    swapped = {name: head[name] for name in ("__metadata__", *names[::-1])}
    return {
        "offset before": (told(data_offsets=[at - 4, to]), place),
        "offset after": (told(data_offsets=[at + 4, to]), place),
        "end before": (told(data_offsets=[at, to - 4]), place),
        "end after": (told(data_offsets=[at, to + 4]), place),
        "overlap": (told(data_offsets=before), place),
        "gap": (told(data_offsets=[at + 64, to + 64]), place),
        "past the end": (told(data_offsets=[at, end + 4]), place),
        "far past the end": (told(data_offsets=[at, 1 << 63]), place),
        "negative offset": (told(data_offsets=[-64, to]), place),
        "reversed": (told(data_offsets=[to, at]), place),
        "one offset": (told(data_offsets=[at]), place),
        "offsets as text": (told(data_offsets=[str(at), str(to)]), place),
        "no offsets": (told(data_offsets=None), place),
        "a terabyte": (told(shape=[1 << 34, 16], data_offsets=[at, at + (1 << 40)]), short),
        "more than bytes": (
            told(shape=[1 << 62, 16], data_offsets=[at, at + (1 << 68)]),
            "too big",
        ),
        "another shape": (told(shape=[16, 48]), NAME),
        "flat": (told(shape=[768]), NAME),
        "shape of nothing": (told(shape=[0, 1 << 70], data_offsets=[at, at]), "ValueError"),
        "negative": (told(shape=[-48, 16], data_offsets=[at, 2 * at - to]), "negative"),
        "doubly negative": (told(shape=[-48, -16]), "negative"),
        "unknown": (told(shape=[-1], data_offsets=[at, at - 4]), place),
        "huge": (told(shape=[1 << 62, 1 << 62]), "too big"),
        "immense": (told(shape=[1 << 12_000]), "Maximum allowed dimension"),
        "float": (told(shape=[48.0, 16]), "float"),
        "many dimensions": (told(shape=[1] * 99 + [768]), "ValueError"),
        "shape as text": (told(shape="48"), "TypeError"),
        "no shape": (told(shape=None), "TypeError"),
        "F64": (told(dtype="F64", shape=[24, 16]), NAME),
        "double": (
            checkpoint({**less, NAME: {**of, "dtype": "F64"}}, body + bytes(to - at)),
            "not in its place",
        ),
        "F16": (told(dtype="F16", shape=[96, 16]), "F16"),
        "BF16": (told(dtype="BF16", shape=[96, 16]), "BF16"),
        "I32": (told(dtype="I32"), "I32"),
        "unknown dtype": (told(dtype="<f4"), "<f4"),
        "no dtype": (told(dtype=None), "KeyError"),
        "dtype as list": (told(dtype=[]), "TypeError"),
        "twice, elsewhere": (twice({**of, "data_offsets": [to, 2 * to - at]}), place),
        "twice, in another shape": (twice({**of, "shape": [16, 48]}), NAME),
        "missing": (checkpoint(less, body), "not in its place"),
        "all missing": (checkpoint({"__metadata__": meta}, b""), "Missing key"),
        "renamed": (checkpoint({**less, f"{NAME}s": of}, body), "not in its place"),
        "another order": (checkpoint(swapped, body), "not in its place"),
        "more": (more("more", [4], (end, end + 16), added=16), "more"),
        "more, unstored": (more("a/0", [4], (end, end + 16)), short),
        "more, untold": (checkpoint(head, body + bytes(16)), "bytes, not"),
        "more, over others": (more("a/0", [-4], (end, end - 16)), "negative"),
        "more, over one other": (more("a/0", [-1], (end, end - 4)), "a/0 is not in its place"),
        "no metadata": (checkpoint({n: head[n] for n in names}, body), "__metadata__"),
        "no settings": (settings({}), "settings"),
        "settings as object": (settings({"settings": tg.model_settings(tiny())}), "TypeError"),
        "metadata as text": (settings("settings"), "TypeError"),
        "settings of another": (
            settings({"settings": meta["settings"].replace("16", "8")}),
            "size",
        ),
        "deep settings": (settings({"settings": "[" * 60_000}), "RecursionError"),
        "deep header": (checkpoint(b"[" * 60_000, body), "RecursionError"),
        "deep entry": (checkpoint(text[:-1] + b',"a/0":' + b"[" * 60_000, body), "RecursionError"),
        "long number": (checkpoint(b'{"a":' + b"9" * 9000 + b"}", body), "4300 digits"),
        "list": (checkpoint(b"[1]", body), "TypeError"),
        "no JSON": (checkpoint(b"\xff{", body), "UnicodeDecodeError"),
        "no header": (checkpoint(b"", body), "JSONDecodeError"),
        "two headers": (checkpoint(text + text, body), "Extra data"),
        "short size": (checkpoint(text, body, len(text) - 1), "JSONDecodeError"),
        "long size": (checkpoint(text, body, len(text) + 1), "cannot be read"),
        "size of 1 MiB": (checkpoint(text, body, 1 << 20), "header is too long"),
        "size of a terabyte": (checkpoint(text, body, 1 << 40), "header is too long"),
        "greatest size": (checkpoint(text, body, (1 << 64) - 1), "header is too long"),
        "long header": (checkpoint(text.ljust(1 << 20), body), "header is too long"),
    }


@pytest.mark.fault(37)
def test_headers_that_do_not_tell_the_truth(made, tmp_path):
    for name, (data, says) in headers(made[3]).items():
        refused(tmp_path / name, data, says, load_checkpoint)


@pytest.mark.fault(37)
def test_whatever_is_cut_off_or_added_is_missed(made, quick, memory):
    good = made[3]
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


def foreign(made, trap: Path) -> dict[str, bytes]:
    """Files of other formats, of which some would execute something."""
    told, weights = tg.model_settings(made[0]), {NAME: torch.zeros(48, 16)}
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
    head, body = layout(made[3])
    trapped = {**head, "a/0": {"dtype": "U8", "shape": [len(inner)], "data_offsets": [0, 9]}}
    return {
        **files,
        "tar": tar.getvalue(),
        "artifact": made[2],
        "pickle within": checkpoint(trapped, body + inner),
        "pickle as header": checkpoint(inner, body),
        "library's, bare": safetensors.torch.save(weights),
        "library's, of pieces": safetensors.torch.save(
            weights, metadata={"settings": json.dumps(told)}
        ),
    }


@pytest.mark.fault(37)
def test_files_of_other_formats_are_refused_and_execute_nothing(made, tmp_path):
    trap = tmp_path / "executed"
    files = foreign(made, trap)
    for name, data in files.items():
        for path in (tmp_path / name, tmp_path / f"{name}.pt"):
            refused(path, data, "cannot be read as a checkpoint", load_checkpoint)
        if name != "artifact":
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


@pytest.mark.fault(34, 37)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, made, tmp_path):
    head, body = layout(made[3])
    for name in (NAME, "smear.gate", "value_embedding.scale"):
        for at in (head[name]["data_offsets"][0], head[name]["data_offsets"][1] - 4):
            bad = body[:at] + struct.pack("<f", value) + body[at + 4 :]
            says = f"{name} is not float32 or not finite"
            refused(tmp_path / "a", checkpoint(head, bad), says, load_checkpoint)


def same_as_the_library_reads(path: Path) -> bool:
    """Whether the library reads it too, to the same; what it refuses is not JSON as it has it."""
    _, weights, state = tg.load_checkpoint(path, tiny())
    try:
        theirs = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:  # NaN, half surrogates or numbers like 1e999
        assert "invalid JSON in header" in str(error)
        return False
    assert theirs.keys() == weights.keys() | state.keys()
    for name, p in (weights | state).items():
        assert torch.equal(p.flatten(), theirs[name].flatten()[: p.numel()])  # a scalar: the first
    return True


@pytest.mark.fault(37)
def test_damaged_checkpoints_are_refused_or_read_as_the_library_does(made, quick, memory):
    """Mutations of the header, of the settings in it, of floats and of any bytes."""
    good, rng, loaded, said = made[3], random.Random(3), 0, set()
    for _ in range(CHECKPOINTS):
        refusal = judge_bytes(memory / "a", odd_checkpoint(rng, good), load_checkpoint)
        if not refusal:
            loaded += same_as_the_library_reads(memory / "a")
        said.add(refusal.removeprefix(str(memory / "a"))[:75])
    assert CHECKPOINTS // 20 < loaded < CHECKPOINTS // 3
    assert len(said) > 100  # the cases go to many places


@pytest.mark.fault(37)
def test_any_file_of_the_library_with_our_metadata_is_read(made, tmp_path):
    """Which orders tensors by type and name, where the trainer has its own order."""
    h, _, _, good = made
    head, _ = layout(good)
    (tmp_path / "ours").write_bytes(good)
    theirs = safetensors.torch.load_file(tmp_path / "ours")
    with safetensors.safe_open(tmp_path / "ours", "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["settings"]) == tg.model_settings(h)
    state = {"clock/steps": torch.rand(2, 3, dtype=torch.float64), "momenta/0": torch.ones(1, 2, 3)}
    safetensors.torch.save_file(theirs | state, tmp_path / "theirs", metadata=metadata)
    assert (tmp_path / "theirs").read_bytes()[: len(good)] != good
    assert not judge(tmp_path / "theirs", load_checkpoint)
    _, weights, kept = tg.load_checkpoint(tmp_path / "theirs", h)
    assert weights.keys() | {"__metadata__"} == head.keys()
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name], state[name]) for name in state)


def test_a_checkpoint_of_the_most_layers_is_read(cpu, tmp_path):
    """Its header must not be longer than it may be, with the whole state of training."""
    h = tiny(num_layers=200, model_dim=2, num_heads=1, rope_dims=2)
    model = tg.GPT(h)
    optimizers, average = tg.Optimizers(model, h), tg.WeightAverage(model, h)
    clock = tg.TrainingClock(cpu, h, tg.Log())
    state = tg.training_state(optimizers, average, clock)
    data = written(h, state, tmp_path)
    longer = 2 * 12 + 2 * 5  # of offsets and shapes of a model that is wider
    assert int.from_bytes(data[:8], "little") + longer * len(state) < 1 << 20
    _, weights, kept = tg.load_checkpoint(tmp_path / "made", h)
    assert weights.keys() | kept.keys() == state.keys()


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
	ctypes.CDLL(None).malloc_trim(0)  # what is free must not hide what comes
	Path("/proc/self/clear_refs").write_text("5")
	before = kilobytes("VmRSS")
	refusal = judge(Path(path), read)
	print(kilobytes("VmHWM") - before, bool(refusal), Path(path).name, sep="\\t")
"""


@pytest.mark.fault(36, 37)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux")
def test_memory_is_bounded_by_what_the_settings_declare(made, tmp_path):
    """At most 4 x the parameters' bytes and 16 MiB, measured as peak resident memory."""
    h, _, blob, good = made
    text, raw = parts(blob)[0], raw_arrays(blob)
    head, body = layout(good)
    files = {"0good.ptz": blob, "0good.pt": good}
    for name, (payload, _) in frames(raw).items():
        if "bomb" in name or "window" in name or "size" in name:
            files[f"{name}.ptz"] = artifact(text, payload)
    for name, (data, _) in headers(good).items():
        if any(
            word in name for word in ("size", "header", "deep", "long", "byte", "huge", "nothing")
        ):
            files[f"{name}.pt"] = data
    for name, data in foreign(made, tmp_path / "executed").items():
        if "trap" in name:
            files[f"{name}.pt"] = data
    size = len(body)
    vast = {"dtype": "F32", "shape": [10_000_000], "data_offsets": [size, size + 40_000_000]}
    state = checkpoint({**head, "momenta/0": vast}, body + bytes(40_000_000))
    files["with state.pt"] = state  # which is mapped, not read
    files["cut state.pt"] = state[:-4]
    files["no state.pt"] = checkpoint({**head, "more": vast}, body + bytes(40_000_000))
    files["junk.ptz"] = artifact(text, bytes(100_000_000))
    files["junk.pt"] = good[:40] + bytes(100_000_000) + good[40:]
    deep = tiny(num_layers=200, model_dim=2, num_heads=1, rope_dims=2)
    files["deep.ptz"] = tg.pack(deep, tg.quantize(tg.GPT(deep))[0])
    large = tiny(model_dim=256, num_layers=10, bigram_vocab_size=40_000, bigram_dim=128)
    model = randomize(tg.GPT(large))
    whole = b"".join(a.numpy().tobytes() for a in tg.quantize(model)[0].values())
    told = tg.model_settings(large)
    payload = zstandard.ZstdCompressor(level=1).compress(whole)
    files["large.ptz"] = artifact(json.dumps(told).encode(), payload)
    files["large.pt"] = written(large, model.state_dict(), tmp_path)
    read = {"0good.ptz": h, "0good.pt": h, "with state.pt": h, "deep.ptz": deep}
    read |= {"large.ptz": large, "large.pt": large}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    script = MEASURE.format(root=str(ROOT), tests=str(ROOT / "tests"))
    done = subprocess.run(
        [sys.executable, "-c", script, *sorted(str(tmp_path / name) for name in files)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == len(files)
    sizes = {of: sum(4 * p.numel() for p in tg.GPT(of).parameters()) for of in (h, deep, large)}
    for kilobytes, refusal, name in lines:
        declared = sizes[read.get(name, h)]
        assert int(kilobytes) * 1024 <= 4 * declared + (16 << 20), (name, kilobytes)
        assert (refusal == "True") == (name not in read), name
        assert (read.get(name) == large) == (4 * declared > 100 << 20)  # beyond the 16 MiB


def test_a_checkpoint_of_many_steps_is_read(made, cpu, tmp_path):
    """What every step leaves behind takes no place in the header."""
    h, steps = made[0], 20_000
    model = tg.GPT(h)
    clock = tg.TrainingClock(cpu, h, tg.Log())
    optimizers, average = tg.Optimizers(model, h), tg.WeightAverage(model, h)
    clock.times, clock.elapsed = [n / 7 for n in range(steps)], steps / 7
    clock.losses = [1 / (n + 1) for n in range(steps)]
    state = tg.training_state(optimizers, average, clock)
    tg.save("checkpoint.safetensors", h, state, tg.Log(tmp_path))
    _, weights, kept = tg.load_checkpoint(tmp_path / "checkpoint.safetensors", h)
    done = tg.replace(h, iterations=steps)
    again, _ = tg.train(model, None, done, cpu, tg.Log(), weights | kept)
    assert (again.times, again.losses) == (clock.times, clock.losses)
    assert clock.elapsed <= again.elapsed < clock.elapsed + 60
