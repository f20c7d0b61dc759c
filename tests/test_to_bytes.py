"""data/to_bytes.py: the bytes it writes, how it proves them, and what it refuses and survives."""

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import shard_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt as tg

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "to_bytes.py"


def load_script():
    spec = importlib.util.spec_from_file_location("to_bytes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["to_bytes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


to_bytes = load_script()

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "the cat sat on the mat, the dog ran",
    "naïve café, Ελληνικά, русский, 日本語, 🙂🙃 and ﬁ ligatures ½ …",
    "日本語",
    "  two leading spaces,   runs of spaces and\ta tab\n\n    def f(x):\n        return x\n",
    "1234567890 3.14159 0x1F " * 4,
    "x",
    "🙂 a replaced character \ufffd and one at the end \ufffd",
    "\ufffd",
    "trailing space ",
]
IDENTITY = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}
NMT = {"normalization_rule_name": "nmt_nfkc"}
KINDS = {
    "identity": {**IDENTITY, "add_dummy_prefix": False},
    "identity_prefix": {**IDENTITY, "add_dummy_prefix": True},
    "nmt": {**NMT, "add_dummy_prefix": False},
    "nmt_prefix": {**NMT, "add_dummy_prefix": True},
    "no_fallback": {**NMT, "add_dummy_prefix": False, "byte_fallback": False},
}


# ---- Helpers: the bytes once more, by the decoder alone ----


def train(byte_fallback=True, **options):
    """Without byte fallback a model that knows too few characters."""
    model, common = io.BytesIO(), ["the cat sat on the mat, the dog ran", *TEXTS[:2]] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(common + TEXTS * byte_fallback),
        byte_fallback=byte_fallback,
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def tokenizers():
    odd = train(**KINDS["identity"], control_symbols=["<mask>"])
    return {"odd": odd, **{kind: train(**options) for kind, options in KINDS.items()}}


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture
def identity(tokenizers):
    return tokenizers["identity"]


def stream_of(tokenizer, texts=TEXTS):
    return [token for text in texts for token in (1, *tokenizer.encode(text))]


def expected_ids(tokenizer, stream):
    """Every run between special tokens by the decoder, special tokens as they are."""
    ids, run = [], []
    for token in [*stream, 2]:
        if token > 3:
            run.append(token)
        else:
            ids += [4 + byte for byte in tokenizer.decode(run).encode()] if run else []
            ids.append(token)
            run = []
    return ids[:-1]


def make_source(root, tokenizer, stream=None, shard_tokens=10**9, split="train", name="fineweb10B"):
    """The project's layout with one split in shards of `shard_tokens`."""
    stream = stream_of(tokenizer) if stream is None else stream
    size = tokenizer.vocab_size()
    folder = root / "datasets" / f"{name}_sp{size}"
    folder.mkdir(parents=True, exist_ok=True)
    for i, start in enumerate(range(0, len(stream), shard_tokens)):
        path = folder / f"fineweb_{split}_{i:06d}.bin"
        path.write_bytes(shard_bytes(stream[start : start + shard_tokens]))
    (root / "tokenizers").mkdir(exist_ok=True)
    model = root / "tokenizers" / f"{name.removesuffix('10B')}_{size}_bpe.model"
    model.write_bytes(tokenizer.serialized_model_proto())
    return folder


def read_split(folder, split="train"):
    shards = [tg.read_shard(path) for path in sorted(folder.glob(f"fineweb_{split}_*.bin"))]
    return np.concatenate(shards).tolist()


def documents(ids):
    """The bytes of each document of a byte stream."""
    parts = bytes(i - 4 if i != 1 else 0 for i in ids).split(b"\0")
    assert not parts[0]
    return parts[1:]


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(*args):
    return to_bytes.main([str(arg) for arg in args])


def convert(*args):
    assert run(*args) == 0


def refused(capsys, *args):
    """The message of a run that must fail: one line, no traceback, exit status 2."""
    capsys.readouterr()
    assert run(*args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert ".partial-" not in error
    return error


# ---- The bytes ----


def test_bytes_are_the_decoded_text(tmp_path, tokenizer):
    stream = stream_of(tokenizer)
    convert(make_source(tmp_path, tokenizer, stream))
    ids = read_split(tmp_path / "datasets" / "fineweb10B_byte260")
    assert ids == expected_ids(tokenizer, stream)
    table, tokens = tg.ByteTable.of_tokenizer(tokenizer), torch.tensor(stream)
    assert sum(i >= 4 for i in ids) == table.text_bytes(tokens[:-1], tokens[1:]).sum()
    assert ids.count(1) == len(TEXTS)
    assert ids.count(3) == stream.count(3)
    if 3 not in stream:
        decoded = [tokenizer.decode(tokenizer.encode(text)).encode() for text in TEXTS]
        assert documents(ids) == decoded


@pytest.mark.parametrize("kind", ["identity", "identity_prefix"])
def test_an_identity_tokenizer_gives_the_documents_own_bytes(tmp_path, tokenizers, kind):
    convert(make_source(tmp_path, tokenizers[kind]))
    ids = read_split(tmp_path / "datasets" / "fineweb10B_byte260")
    assert documents(ids) == [text.encode() for text in TEXTS]


def test_a_prefix_is_really_dropped(tokenizers):
    """The tests above mean something: tokens that open documents do hold a space."""
    for kind, drops in (("identity", False), ("identity_prefix", True), ("nmt_prefix", True)):
        piece = tokenizers[kind].id_to_piece(tokenizers[kind].encode("the cat")[0])
        assert piece.startswith("\u2581") == drops
    assert 3 in stream_of(tokenizers["no_fallback"])


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("shard_tokens", [1, 5, 64])
def test_no_border_changes_the_bytes(tmp_path, monkeypatch, tokenizer, chunk, shard_tokens):
    """Chunks and shards that end in documents, in characters, and between BOS and a space."""
    stream = stream_of(tokenizer, TEXTS[1:4] + TEXTS[7:9] if shard_tokens < 5 else TEXTS)
    monkeypatch.setattr(to_bytes, "CHUNK_TOKENS", chunk)
    source = make_source(tmp_path, tokenizer, stream, shard_tokens)
    converter = to_bytes.Converter(tokenizer)
    shards = to_bytes.plan(source, tmp_path)
    ids = []
    for shard in shards:
        to_bytes.survey(shard, converter)
        parts = [converter.convert(tokens) for tokens in shard.chunks()]
        path = tmp_path / "shard.bin"
        path.write_bytes(shard.header() + np.concatenate(parts).tobytes())
        assert to_bytes.verify(path, shard, converter)
        ids += tg.read_shard(path).tolist() if path.stat().st_size > 1024 else []
    assert ids == expected_ids(tokenizer, stream)


def test_shards_keep_names_and_splits_apart(tmp_path, tokenizers):
    tokenizer = tokenizers["nmt_prefix"]
    streams = {"train": stream_of(tokenizer), "val": stream_of(tokenizer, TEXTS[:3])}
    for split, stream in streams.items():
        source = make_source(tmp_path, tokenizer, stream, 23, split)
    convert(source)
    folder = tmp_path / "datasets" / "fineweb10B_byte260"
    assert {p.name for p in folder.iterdir()} == {p.name for p in source.iterdir()}
    for split, stream in streams.items():
        assert read_split(folder, split) == expected_ids(tokenizer, stream)


text = st.text(st.characters(exclude_characters="\u2581\0", exclude_categories=("Cs",)))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(text, min_size=1), chunk=st.integers(1, 9))
def test_any_documents_come_back(identity, monkeypatch, texts, chunk):
    converter = to_bytes.Converter(identity)
    tokens = np.array([1, *stream_of(identity, texts)])
    whole = converter.convert(tokens)
    assert whole.tolist() == [i for t in texts for i in (1, *(4 + b for b in t.encode()))]
    ends = range(1, len(tokens), chunk)
    parts = [converter.convert(tokens[end - 1 : end + chunk]) for end in ends]
    assert np.array_equal(np.concatenate(parts), whole)
    draw = np.random.default_rng(0)
    for end, part in zip(ends, parts, strict=True):
        assert not converter.fault(tokens[end - 1 : end + chunk], part, draw)


def test_equals_the_bytes_prepared_from_the_documents(tmp_path, identity):
    texts = [text for text in TEXTS if text.strip()]
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    model = tmp_path / "m.model"
    model.write_bytes(identity.serialized_model_proto())
    options = ["--val-docs", "3", "--out", str(tmp_path), "--shard-tokens", "50", "--name"]
    for more in (["a", "--variant", "byte260"], ["b", "--tokenizer", str(model)]):
        assert to_bytes.prepare.main([str(path), *options, *more]) == 0
    datasets = tmp_path / "datasets"
    convert(datasets / f"b_sp{identity.vocab_size()}", "--tokenizer", model)
    for split in ("train", "val"):
        assert read_split(datasets / "b_byte260", split) == read_split(
            datasets / "a_byte260", split
        )
    manifest = json.loads((tmp_path / "manifest.json").read_text("utf-8"))
    stats = {entry["name"]: entry["stats"] for entry in manifest["datasets"]}
    for key, count in stats["a_byte260"].items():
        assert key.startswith("files") or stats["b_byte260"][key] == count
    assert [t["name"] for t in manifest["tokenizers"]][-1] == "b_pure_byte_260"


# ---- The proof ----


def wrong_piece(tokenizer, token, special, real=to_bytes.piece_ids):
    ids = real(tokenizer, token, special)
    return [*ids[:-1], ids[-1] ^ 1] if token == tokenizer.encode("the cat")[-1] else ids


def wrong_special(tokenizer, token, special, real=to_bytes.piece_ids):
    return [2] if token == 1 else real(tokenizer, token, special)


def lost_byte(tokenizer, token, special, real=to_bytes.piece_ids):
    ids = real(tokenizer, token, special)
    return ids[:-1] if token == tokenizer.encode("the cat")[-1] else ids


FAULTS = [
    (wrong_piece, "the decoder gives another text"),
    (wrong_special, "the special tokens are not the same"),
    (lost_byte, "the byte table counts other bytes"),
]


@pytest.mark.parametrize("chunk", [3, 1 << 18])
@pytest.mark.parametrize(("fault", "says"), FAULTS)
def test_a_wrong_conversion_is_found(tmp_path, monkeypatch, capsys, tokenizer, fault, says, chunk):
    monkeypatch.setattr(to_bytes, "CHUNK_TOKENS", chunk)
    source = make_source(tmp_path, tokenizer, stream_of(tokenizer, TEXTS[:2]))
    monkeypatch.setattr(to_bytes, "piece_ids", fault)
    error = refused(capsys, source)
    assert says in error
    assert f"{source}/fineweb_train_000000.bin" in error
    assert not list((tmp_path / "datasets" / "fineweb10B_byte260").iterdir())
    monkeypatch.undo()
    convert(source)


def test_a_kept_space_is_found(tmp_path, monkeypatch, capsys, tokenizers):
    def kept(self, tokenizer, real=to_bytes.Converter.__init__):
        real(self, tokenizer)
        self.space = self.space * 0

    monkeypatch.setattr(to_bytes.Converter, "__init__", kept)
    error = refused(capsys, make_source(tmp_path, tokenizers["nmt_prefix"]))
    assert "the byte table counts other bytes" in error


def test_a_fault_of_the_disk_is_found(tmp_path, monkeypatch, capsys, identity):
    """A bit turned after the write; the first shard is right and stays."""
    source = make_source(tmp_path, identity, shard_tokens=100)
    done = []

    def turn(number):
        if done:
            os.pwrite(number, b"\x55", 1024 + 60)
        done.append(number)

    monkeypatch.setattr(to_bytes.os, "fsync", turn)
    error = refused(capsys, source)
    assert "fineweb10B_byte260/fineweb_train_000001.bin: reads back other than written" in error
    folder = tmp_path / "datasets" / "fineweb10B_byte260"
    assert [path.name for path in folder.iterdir()] == ["fineweb_train_000000.bin"]


# ---- Runs that follow another ----


def test_a_second_run_finds_all_right_and_changes_nothing(tmp_path, identity, capsys):
    source = make_source(tmp_path, identity, shard_tokens=40)
    convert(source)
    before = files_of(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.bin")}
    capsys.readouterr()
    convert(source)
    assert f"0 shards made, {len(list(source.iterdir()))} found right" in capsys.readouterr().out
    assert files_of(tmp_path) == before
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.bin")} == times


def spoil(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


SPOILED = {
    "a byte": lambda data: data.__setitem__(-1, data[-1] ^ 1) or data.__setitem__(-2, 99),
    "the header": lambda data: data.__setitem__(8, data[8] ^ 1),
    "the end": lambda data: data.__delitem__(slice(-2, None)),
    "more": lambda data: data.extend(b"xx"),
    "empty": lambda data: data.clear(),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_file_that_is_another_is_refused_before_anything_is_written(
    tmp_path, identity, capsys, kind
):
    source = make_source(tmp_path, identity, shard_tokens=40)
    convert(source)
    folder = tmp_path / "datasets" / "fineweb10B_byte260"
    (folder / "fineweb_train_000000.bin").unlink()
    spoil(folder / "fineweb_train_000002.bin", SPOILED[kind])
    before = files_of(folder)
    error = refused(capsys, source)
    assert f"{folder}/fineweb_train_000002.bin: not what {source}" in error
    assert "delete it, or give another --out" in error
    assert files_of(folder) == before
    (folder / "fineweb_train_000002.bin").unlink()
    convert(source)
    assert read_split(folder) == expected_ids(identity, stream_of(identity))


def test_bytes_of_other_tokens_or_of_another_tokenizer_are_refused(tmp_path, identity, capsys):
    """Even where no count differs: two tokens change places; two pieces change their ids."""
    stream = stream_of(identity, ["the cat", "a dog"])
    source = make_source(tmp_path, identity, stream)
    convert(source)
    other = [1, *identity.encode("a dog"), 1, *identity.encode("the cat")]
    assert sorted(other) == sorted(stream)
    make_source(tmp_path, identity, other)
    assert "not what" in refused(capsys, source)

    c, g = identity.piece_to_id("c"), identity.piece_to_id("g")
    shutil.rmtree(tmp_path / "datasets")
    source = make_source(tmp_path, identity, [1, c, g])
    convert(source)
    model = next((tmp_path / "tokenizers").iterdir())
    proto = model.read_bytes().replace(b"\n\x01c", b"\n\x01?").replace(b"\n\x01g", b"\n\x01c")
    model.write_bytes(proto.replace(b"\n\x01?", b"\n\x01g"))
    assert "not what" in refused(capsys, source)


def test_shards_of_a_longer_run_are_refused(tmp_path, identity, capsys):
    source = make_source(tmp_path, identity, shard_tokens=40)
    convert(source)
    last = max(source.iterdir())
    last.unlink()
    before = files_of(tmp_path)
    error = refused(capsys, source)
    assert f"fineweb10B_byte260/{last.name}" in error
    assert "no shard of that name; delete it" in error
    assert files_of(tmp_path) == before


# Runs the script, but stops for ever before the second shard is on the disk.
STUCK = """
import os, runpy, sys, time
from pathlib import Path
script, *sys.argv[1:] = sys.argv[1:]
flag = Path(sys.argv.pop())
count = 0
def stuck(number):
    global count
    count += 1
    if count == 2:
        flag.touch()
        time.sleep(60)
os.fsync = stuck
runpy.run_path(script, run_name="__main__")
"""


def test_a_killed_run_leaves_whole_shards_and_the_next_goes_on(tmp_path, identity, capsys):
    jobs = {}
    for sent in (signal.SIGKILL, signal.SIGTERM):
        root = tmp_path / sent.name
        source = make_source(root, identity, shard_tokens=100)
        command = [sys.executable, "-c", STUCK, SCRIPT, source, root / "stuck"]
        command = [str(part) for part in command]
        jobs[sent] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True), root, source
    for sent, (job, root, source) in jobs.items():
        while not (root / "stuck").exists():
            assert job.poll() is None
            time.sleep(0.01)
        job.send_signal(sent)
        error = job.communicate()[1]
        folder = root / "datasets" / "fineweb10B_byte260"
        assert [path.name for path in folder.glob("*.bin")] == ["fineweb_train_000000.bin"]
        assert not (root / "manifest.json").exists()
        if sent == signal.SIGTERM:
            assert job.returncode == 130
            assert error.startswith("error: interrupted; run again")
            assert not list(folder.glob(".partial-*"))
        capsys.readouterr()
        convert(source)
        assert "1 found right" in capsys.readouterr().out
        assert read_split(folder) == expected_ids(identity, stream_of(identity))


def test_an_interrupt_is_one_line(tmp_path, identity, capsys, monkeypatch):
    def interrupt(number):
        raise KeyboardInterrupt

    monkeypatch.setattr(to_bytes.os, "fsync", interrupt)
    assert run(make_source(tmp_path, identity)) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert not list((tmp_path / "datasets" / "fineweb10B_byte260").iterdir())


# ---- Bad input ----


BAD = [
    ("empty_sp9 --tokenizer m.model", ["empty_sp9", "no fineweb_*_*.bin", "fetch or prepare"]),
    ("none_sp9 --tokenizer m.model", ["none_sp9", "no fineweb_*_*.bin"]),
    ("x_byte260", ["x_byte260", "holds bytes already", "NAME_spV"]),
    ("plain", ["plain", "NAME_spV", "--tokenizer and --out"]),
    ("plain --tokenizer m.model", ["plain", "--tokenizer and --out"]),
    ("plain --tokenizer m.model --out plain", ["--out", "plain", "folder of the tokens"]),
    ("plain --tokenizer m.model --out ./x/../plain", ["--out", "folder of the tokens"]),
    ("plain --tokenizer m.model --out text.model/y", ["--out", "text.model", "writable"]),
    ("plain --tokenizer none.model --out o", ["--tokenizer", "none.model", "existing"]),
    ("plain --tokenizer text.model --out o", ["--tokenizer", "text.model", "not a"]),
    ("plain --tokenizer odd.model --out o", ["--tokenizer", "odd.model", "no text"]),
    ("x_sp9", ["--tokenizer", "tokenizers/x_9_bpe.model", "existing"]),
    ("x_sp9 --tokenizer m.model", ["--tokenizer", "m.model", "tokens of 9", "tokens' own"]),
    ("large --tokenizer m.model --out o", ["large/fineweb_val_000001.bin", "65535", "--tokenizer"]),
    ("cut --tokenizer m.model --out o", ["cut/fineweb_train_000000.bin", "not a complete shard"]),
    ("plain --tokenizer m.model --out broken/datasets/o", ["manifest.json", "move it away"]),
    ("plain --nonsense", ["--nonsense"]),
]


@pytest.mark.parametrize(("options", "expected"), BAD)
def test_bad_input_is_refused(tmp_path, monkeypatch, capsys, tokenizers, options, expected):
    root = tmp_path / "sets"
    for name in ("empty_sp9", "x_byte260", "x_sp9", "plain", "large", "cut", "broken"):
        (root / name).mkdir(parents=True)
    monkeypatch.chdir(root)
    for name in ("plain", "x_sp9", "x_byte260", "large", "cut"):
        (root / name / "fineweb_train_000000.bin").write_bytes(shard_bytes([1, 5]))
    for number in range(2):
        path = root / "large" / f"fineweb_val_{number:06d}.bin"
        path.write_bytes(shard_bytes([1, 5, 65_535 * number]))
    spoil(root / "cut" / "fineweb_train_000000.bin", lambda data: data.pop())
    Path("m.model").write_bytes(tokenizers["identity"].serialized_model_proto())
    Path("text.model").write_bytes(b"hello\n")
    Path("odd.model").write_bytes(tokenizers["odd"].serialized_model_proto())
    Path("broken/manifest.json").write_text("[", "utf-8")
    before = files_of(tmp_path)
    error = refused(capsys, *options.split())
    assert all(part in error for part in expected), error
    assert files_of(tmp_path) == before


def test_a_full_disk_is_told_before_the_first_shard(tmp_path, identity, capsys, monkeypatch):
    source = make_source(tmp_path, identity)
    size = 1024 + 2 * len(expected_ids(identity, stream_of(identity)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    error = refused(capsys, source)
    assert f"{size:,} bytes needed, {size - 1:,} free; make room" in error
    assert not list((tmp_path / "datasets" / "fineweb10B_byte260").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    convert(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    convert(source)  # nothing to write


def test_a_disk_that_fills_meanwhile_leaves_nothing(tmp_path, identity, capsys, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_bytes.os, "fsync", full)
    assert "No space left on device" in refused(capsys, make_source(tmp_path, identity))
    assert not list((tmp_path / "datasets" / "fineweb10B_byte260").iterdir())


def test_more_bytes_than_a_header_counts_are_refused(tmp_path, identity, capsys, monkeypatch):
    source = make_source(tmp_path, identity)
    total = len(expected_ids(identity, stream_of(identity)))
    monkeypatch.setattr(to_bytes, "MAX_COUNT", total - 1)
    assert f"{source}/fineweb_train_000000.bin: {total:,} bytes" in refused(capsys, source)
    monkeypatch.setattr(to_bytes, "MAX_COUNT", total)
    convert(source)


# ---- What is told ----


def test_summary_manifest_and_defaults(tmp_path, identity, capsys, monkeypatch):
    monkeypatch.setattr(to_bytes, "__file__", str(tmp_path / "to_bytes.py"))
    manifest = tmp_path / "manifest.json"
    others = {"version": "10B", "tokenizers": [], "datasets": [{"name": "fineweb10B_sp1024"}]}
    manifest.write_text(json.dumps(others), "utf-8")
    stream = stream_of(identity)
    source = make_source(tmp_path, identity, stream, 100)
    make_source(tmp_path, identity, stream[:50], split="val")
    convert(source)
    shown = capsys.readouterr().out
    total = len(stream) + 50
    ids = expected_ids(identity, stream) + expected_ids(identity, stream[:50])
    size = sum(i >= 4 for i in ids)
    assert f"{total:,} tokens -> {size:,} bytes, {size / total:.4f} bytes per token" in shown
    assert "million tokens a minute" in shown
    folder = tmp_path / "datasets" / "fineweb10B_byte260"
    assert f"DATA_PATH={folder} VOCAB_SIZE=260 python train_gpt.py" in shown
    assert "warning" not in shown
    told = json.loads(manifest.read_text("utf-8"))
    assert (told["version"], told["datasets"][0]) == ("10B", others["datasets"][0])
    assert told["tokenizers"][0]["name"] == "fineweb_pure_byte_260"
    stats = told["datasets"][1]["stats"]
    assert told["datasets"][1]["name"] == "fineweb10B_byte260"
    assert stats["tokens_total"] == len(ids) == stats["tokens_train"] + stats["tokens_val"]
    assert stats["bytes_total"] == size
    assert stats["docs_train"] == len(TEXTS)
    assert (stats["files_train"], stats["files_val"]) == (len(stream) // 100 + 1, 1)
    parsed = to_bytes.parse_arguments([])
    assert parsed.source == tmp_path / "datasets" / "fineweb10B_sp1024"
    assert parsed.tokenizer == tmp_path / "tokenizers" / "fineweb_1024_bpe.model"
    assert parsed.out == folder


def test_other_folders_get_no_manifest(tmp_path, identity):
    source, out = make_source(tmp_path / "in", identity), tmp_path / "out"
    model = next((tmp_path / "in" / "tokenizers").iterdir())
    convert(source, "--tokenizer", model, "--out", out)
    assert read_split(out) == expected_ids(identity, stream_of(identity))
    assert not list(tmp_path.rglob("manifest.json"))


def test_unknown_text_is_said(tmp_path, tokenizers, capsys):
    tokenizer = tokenizers["no_fallback"]
    convert(make_source(tmp_path, tokenizer))
    unknown = stream_of(tokenizer).count(3)
    assert f"warning: {unknown} tokens are unknown text" in capsys.readouterr().out


def test_the_trainer_reads_the_shards(tmp_path, identity):
    convert(make_source(tmp_path, identity))
    stream = tg.TokenStream(tmp_path / "datasets" / "fineweb10B_byte260", "train", 260)
    assert stream.read(0, len(stream)).tolist() == expected_ids(identity, stream_of(identity))
