"""data/prepare.py: the shards it writes, what it refuses, and what a stopped run leaves."""

import codecs
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import subprocess
import sys
import time
from encodings import cp437
from functools import partial
from pathlib import Path

import data_scripts
import numpy as np
import pytest
import sentencepiece
import zstandard
from data_scripts import byte_documents, common, files_of, prepare, read_shard, read_split
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

BYTES = ("--variant", "byte260", "--name", "n")
error_of = partial(data_scripts.error_of, prepare.main)


def byte_tokens(texts):
    return [token for text in texts for token in (1, *(4 + byte for byte in text.encode()))]


def byte_texts(folder, split):
    return [document.decode() for document in byte_documents(read_split(folder, split))]


def make_texts(count, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeioubcdfglmnprstv", k=rng.randint(2, 8))) for _ in range(400)]
    return [
        f"{number}: {'  '.join(rng.choices(words, k=5))}\n\t" + " ".join(rng.choices(words, k=60))
        for number in range(count)
    ]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def make(*args, out):
    """Runs the script; returns the folder of its datasets."""
    assert prepare.main([*map(str, args), "--out", str(out)]) == 0
    return out / "datasets"


@pytest.fixture
def docs(tmp_path):
    return write_jsonl(tmp_path / "docs.jsonl", make_texts(40))


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A tokenizer of 400 pieces made by the script."""
    folder = tmp_path_factory.mktemp("tokenizer")
    path = write_jsonl(folder / "docs.jsonl", make_texts(300))
    make(path, "--vocab-size", 400, "--val-docs", 20, "--name", "small", out=folder)
    return folder / "tokenizers" / "small_400_bpe.model"


@pytest.fixture(scope="session")
def tokenizer(model_path):
    return sentencepiece.SentencePieceProcessor(model_file=str(model_path))


# ---- Shards ----


def test_shard_bytes(tmp_path, monkeypatch):
    path = tmp_path / "shard.bin"
    common.write_shard(path, np.array([0, 1, 65535], dtype=np.uint16))
    assert read_shard(path).tolist() == tg.read_shard(path).tolist() == [0, 1, 65535]
    assert path.read_bytes()[:12] == b"\x88\xd8\x34\x01\1\0\0\0\3\0\0\0"
    monkeypatch.setattr(common, "MAX_SHARD_TOKENS", 2)
    with pytest.raises(common.InputError, match="3 tokens, but a shard holds at most 2"):
        common.write_shard(path, np.array([0, 1, 65535], dtype=np.uint16))


@pytest.mark.parametrize("shard_tokens", [1, 7, 10_000])
def test_documents_cross_shards_and_splits_do_not_mix(tmp_path, shard_tokens):
    texts = ["abc", "déjà vu", "x", "four four", "\U0001f600 end\n"]
    path = write_jsonl(tmp_path / "docs.jsonl", texts)
    options = ("--val-docs", 2, "--shard-tokens", shard_tokens)
    folder = make(path, *BYTES, *options, out=tmp_path) / "n_byte260"
    for split, expected in (("val", texts[:2]), ("train", texts[2:])):
        assert read_split(folder, split).tolist() == byte_tokens(expected)
        sizes = [len(read_shard(p)) for p in sorted(folder.glob(f"fineweb_{split}_*.bin"))]
        assert sizes[:-1] == [shard_tokens] * (len(sizes) - 1)
        assert 0 < sizes[-1] <= shard_tokens


def test_sentencepiece_documents(tmp_path, docs, model_path, tokenizer):
    options = ("--tokenizer", model_path, "--val-docs", 5, "--name", "n")
    folder = make(docs, *options, out=tmp_path) / "n_sp400"
    texts = make_texts(40)
    for split, part in (("val", texts[:5]), ("train", texts[5:])):
        expected = [t for text in part for t in (1, *tokenizer.encode(text))]
        assert read_split(folder, split).tolist() == expected
    copied = tmp_path / "tokenizers" / "small_400_bpe.model"
    assert copied.read_bytes() == model_path.read_bytes()
    rows = copied.with_suffix(".vocab").read_text("utf-8").splitlines()
    assert rows[:4] == ["<pad>\t0", "<s>\t0", "</s>\t0", "<unk>\t0"]
    assert len(rows) >= 400  # a piece may hold a newline


# ---- Tokenizer ----


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0")))
def test_a_trained_tokenizer_decodes_any_text_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)).encode() == text.encode()


def test_a_trained_tokenizer_has_the_ids_of_the_challenge(tokenizer):
    ids = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert ids == (0, 1, 2, 3)
    assert tokenizer.vocab_size() == 400
    assert not tokenizer.encode("ab", out_type=str)[0].startswith("\u2581")
    for text in ("", " ", "  two", "end \n\n", "\r\n\t", "<s></s><unk><0x41>", "1234"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_inexact_documents_are_counted(tmp_path, model_path, capsys):
    path = write_jsonl(tmp_path / "docs.jsonl", ["fine", "a\u2581b", "also fine"])
    make(path, "--tokenizer", model_path, "--val-docs", 1, "--name", "n", out=tmp_path)
    assert "note: 1 documents do not decode" in capsys.readouterr().out


def test_the_tokenizer_learns_from_all_training_text_and_no_other(tmp_path, monkeypatch):
    """The last words of a document longer than the trainer's limit must become pieces."""
    long = " ".join(make_texts(100)) + " shibboleth" * 2000
    texts = ["schlemiel " * 2000, long, *make_texts(200)]
    path = write_jsonl(tmp_path / "docs.jsonl", texts)
    options = (path, "--vocab-size", 400, "--val-docs", 1, "--name", "n")
    make(*options, out=tmp_path)
    model = tmp_path / "tokenizers" / "n_400_bpe.model"
    vocabulary = model.with_suffix(".vocab").read_text("utf-8")
    assert "shibboleth" in vocabulary
    assert "schlemiel" not in vocabulary
    whole = model.read_bytes()
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 50_000)  # of 130,000
    make(*options, out=tmp_path)
    assert model.read_bytes() != whole


# ---- Input files ----


def test_all_kinds_of_input_in_order(tmp_path):
    """Plain, compressed, several frames in one file, wide windows, split parts, text files."""
    texts = make_texts(12)
    parts = [json.dumps({"text": text, "other": 1}).encode() + b"\n" for text in texts]
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    (tmp_path / "a.jsonl").write_bytes(parts[0] + b"\n" + parts[1].rstrip())
    joined = b"".join(parts[2:4])
    frames = [zstandard.compress(joined[:99]), zstandard.compress(joined[99:])]  # amid a line
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    for number in (0, 1):
        data = b"".join(parts[4 + 3 * number : 7 + 3 * number])
        packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
        packed = packer.compress(data) + packer.flush()
        (tmp_path / f"c.jsonl.zst.{number:02d}").write_bytes(packed)
    (tmp_path / "d.txt").write_bytes(texts[10].encode())
    (tmp_path / "e.txt").write_bytes(b"windows\r\nline")
    names = ["a.jsonl", "b.jsonl.zst", "c.jsonl.zst.00", "c.jsonl.zst.01", "d.txt", "e.txt"]
    paths = (tmp_path / name for name in names)
    folder = make(*paths, *BYTES, "--val-docs", 1, out=tmp_path) / "n_byte260"
    assert byte_texts(folder, "train") == [*texts[1:11], "windows\r\nline"]


PACK = {"": bytes, ".gz": gzip.compress, ".ZST": zstandard.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("packing", PACK)
def test_every_format_with_every_compression(tmp_path, packing, mark):
    """Byte order marks, several frames, suffixes in capitals; folders and lists of files."""
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [f"é {number}" for number in range(6)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    pack = PACK[packing]
    (folder / f"a.JSONL{packing}").write_bytes(pack(mark + lines[0]) + pack(mark + lines[1]))
    (folder / f"b.ndjson{packing}").write_bytes(pack(mark + lines[2]))
    whole = mark + json.dumps([{"text": texts[3]}, {"text": texts[4]}], indent=1).encode()
    (folder / f"c.json{packing}").write_bytes(pack(whole))
    (folder / f"d.Txt{packing}").write_bytes(pack(mark + texts[5].encode()))
    (folder / "notes.md").write_text("not a document")
    paths = sorted(path for path in folder.iterdir() if path.name != "notes.md")
    listed = tmp_path / "list"
    listed.write_bytes(mark + b"\r\n".join(str(path).encode() for path in paths))
    for name, inputs in (("files", paths), ("folder", [folder]), ("list", [f"@{listed}"])):
        options = ("--variant", "byte260", "--val-docs", 1, "--name", name)
        datasets = make(*inputs, *options, out=tmp_path)
        assert byte_texts(datasets / f"{name}_byte260", "train") == texts[1:]


def test_a_line_of_many_blocks_is_joined_in_linear_time():
    start, block = time.monotonic(), b"x" * 8192
    line, last = prepare.split_lines(itertools.chain(itertools.repeat(block, 10_000), [b"\n"]))
    assert (line, last) == (block * 10_000, b"")
    assert time.monotonic() - start < 5  # it was 100 s when every block copied those before it


# Text that the encoding of the terminal lacks, and commands that can be pasted.
@pytest.mark.parametrize("name", ["two  spaces", "[/red]", "é", "$(x)'\"", os.fsdecode(b"\xff")])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_path_can_be_printed_and_pasted(tmp_path, docs, monkeypatch, name, encoding):
    streams = {n: io.TextIOWrapper(io.BytesIO(), encoding) for n in ("stdout", "stderr")}
    for stream, file in streams.items():
        monkeypatch.setattr(sys, stream, file)
    folder = make(docs, *BYTES, "--val-docs", 2, out=tmp_path / name) / "n_byte260"
    missing = tmp_path / f"{name}.jsonl"
    assert prepare.main([str(missing), *BYTES, "--out", str(tmp_path / name)]) == 2
    shown, error = (file.buffer.getvalue().decode(encoding) for file in streams.values())
    assert error.startswith("error: ") and error.count("\n") == 1
    command = shown.split("  next: ")[1].replace("python train_gpt.py", "printenv DATA_PATH")
    pasted = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, check=True)
    assert os.fsdecode(pasted.stdout.rstrip(b"\n")) == str(folder)


# What a tokenizer loses, and copies of documents.
@pytest.mark.parametrize(
    ("options", "texts", "note"),
    [
        (
            {"byte_fallback": False},
            ["日本", "日"],
            "warning: 1 of 3 val tokens are unknown and count 0 bytes; "
            "train_gpt.py will not train on this (limit: 0.5% of validation)",
        ),
        ({"byte_fallback": False}, ["a" * 999 + "日", "b"], "train_gpt.py accepts this (limit"),
        ({"normalization_rule_name": "nfkc"}, ["a", "ﬁ a"], "1 documents do not decode to"),
        ({}, ["a", "b", "b"], "note: 1 of 2 train documents are copies of others"),
    ],
)
def test_what_shards_lose_is_told(tmp_path, capsys, options, texts, note):
    model = tmp_path / "m.MODEL"
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(50)), model_writer=data, vocab_size=300,
        model_type="bpe", pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
        **{"byte_fallback": True, "add_dummy_prefix": True, **options},
    )  # fmt: skip
    model.write_bytes(data.getvalue())
    path = write_jsonl(tmp_path / "docs.jsonl", texts)
    make(path, "--tokenizer", model, "--val-docs", 1, "--name", "n", out=tmp_path)
    assert note in capsys.readouterr().out


def test_empty_documents_are_skipped_and_copies_stay(tmp_path, capsys):
    texts = ["", "val", " \n", "same", "", "same"]
    path = write_jsonl(tmp_path / "docs.jsonl", texts)
    folder = make(path, *BYTES, "--val-docs", 1, out=tmp_path) / "n_byte260"
    assert "2 train, 1 val, 3 empty (skipped)" in capsys.readouterr().out
    assert byte_texts(folder, "train") == ["same"] * 2


# ---- Splits ----


def test_val_docs_and_val_file_agree(tmp_path):
    texts = make_texts(30)
    whole = write_jsonl(tmp_path / "whole.jsonl", texts)
    val = write_jsonl(tmp_path / "val.jsonl", texts[:7])
    train = write_jsonl(tmp_path / "train.jsonl", texts[7:])
    variant = ("--variant", "byte260", "--name")
    make(whole, *variant, "a", "--val-docs", 7, out=tmp_path)
    datasets = make(train, *variant, "b", "--val-file", val, out=tmp_path)
    assert byte_texts(datasets / "a_byte260", "val") == texts[:7]
    assert files_of(datasets / "a_byte260") == files_of(datasets / "b_byte260")


def test_validation_by_hash_selects_whole_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "VAL_BYTES", 3000)
    texts = make_texts(50)
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    expected, size = set(), 0
    while size < 3000:
        expected.add(by_hash[len(expected)])
        size = sum(len(text.encode()) for text in expected)
    # Copies are in the same split, and their bytes count once.
    copies = [by_hash[0], by_hash[1], by_hash[-1]]
    path = write_jsonl(tmp_path / "docs.jsonl", [*copies, *texts])
    folder = make(path, *BYTES, out=tmp_path) / "n_byte260"
    val, train = (byte_texts(folder, split) for split in ("val", "train"))
    assert set(val) == expected
    assert len(val) == len(expected) + 2
    assert not expected & set(train)
    assert len(val) + len(train) == 53


@pytest.mark.parametrize(("rule", "count", "line"), [("--val-docs", 2, 11), ("--val-file", 4, 1)])
def test_a_text_in_both_splits_is_refused(tmp_path, capsys, rule, count, line):
    texts = make_texts(10)
    path = write_jsonl(tmp_path / "docs.jsonl", [*texts, texts[0], texts[1], texts[9]])
    val = write_jsonl(tmp_path / "val.jsonl", texts[:2])
    value = 2 if rule == "--val-docs" else val
    error = error_of(capsys, path, *BYTES, rule, value, "--out", tmp_path)
    assert f"{count} training documents are also in the validation split" in error
    assert f"{path}:{line} equals" in error
    assert not list(tmp_path.rglob("*.bin"))


# ---- Embedded corpus ----


def test_embedded_corpus(tmp_path):
    """Its texts, their tokens and bytes, their split, and the manifest."""
    datasets = make(out=tmp_path)
    model = tmp_path / "tokenizers" / "python_1024_bpe.model"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert tokenizer.vocab_size() == 1024
    texts = {}
    for split in ("train", "val"):
        stream = read_split(datasets / "python_sp1024", split)
        texts[split] = byte_texts(datasets / "python_byte260", split)
        ids = [part[1:].tolist() for part in np.split(stream, np.flatnonzero(stream == 1))[1:]]
        assert tokenizer.decode(ids) == texts[split]
    size = {split: sum(len(t.encode()) for t in texts[split]) for split in texts}
    assert 1_000_000 <= size["val"] < 1_500_000
    assert 5_000_000 < size["train"] < 20_000_000
    every = texts["val"] + texts["train"]
    assert sorted(set(every), key=lambda t: hashlib.sha256(t.encode()).digest()) == every
    assert Path(json.__file__).read_bytes().decode() in every  # a module
    assert any(t.startswith('The "assert" statement') for t in every)  # a topic
    assert Path(cp437.__file__).read_bytes().decode() not in every  # a code table
    assert not any("\nbuild_time_vars = {" in text for text in every)  # of this machine
    assert not any("\u2581" in text or "\0" in text for text in every)

    manifest = json.loads((tmp_path / "manifest.json").read_text("utf-8"))
    assert [d["name"] for d in manifest["datasets"]] == ["python_sp1024", "python_byte260"]
    for entry in manifest["datasets"]:
        for split in ("train", "val"):
            counts = [len(tg.read_shard(p)) for p in tmp_path.glob(entry[f"{split}_glob"])]
            assert entry["stats"][f"files_{split}"] == len(counts) > 0
            assert entry["stats"][f"tokens_{split}"] == sum(counts)
            assert entry["stats"][f"docs_{split}"] == len(texts[split])
            assert entry["stats"][f"bytes_{split}"] == size[split]
        assert entry["tokenizer_name"] in [t["name"] for t in manifest["tokenizers"]]
    assert (tmp_path / manifest["tokenizers"][0]["model_path"]).is_file()
    assert (tmp_path / manifest["tokenizers"][0]["vocab_path"]).is_file()


def test_embedded_corpus_leaves_out_what_tokens_cannot_represent(monkeypatch):
    data = [b"one", "a \u2581 bar".encode(), b"latin \xe9", b"nul \0", b"one", b"two \xef\xbf\xbd"]
    files = [(f"module{number}.py", content) for number, content in enumerate(data)]
    monkeypatch.setattr(prepare, "library_files", lambda: files)
    monkeypatch.setattr("pydoc_data.topics.topics", {"topic": "three"})
    texts = [text for _, text in prepare.embedded_documents()]
    assert sorted(texts) == ["one", "three", "two \ufffd"]


def test_a_python_without_its_reference(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "without its language reference" in error_of(capsys, "--out", tmp_path)


# ---- Manifest and runs that replace others ----


def test_manifest_keeps_other_entries(tmp_path, docs):
    others = {
        "version": "10B",
        "tokenizers": [{"name": "sp_bpe_1024", "vocab_size": 1024}],
        "datasets": [{"name": "fineweb10B_sp1024"}, {"name": "n_byte260", "old": True}],
    }
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(others), "utf-8")
    for _ in range(2):
        make(docs, *BYTES, "--val-docs", 4, out=tmp_path)
    merged = json.loads(path.read_text("utf-8"))
    names = {key: [entry["name"] for entry in merged[key]] for key in ("tokenizers", "datasets")}
    assert names == {
        "tokenizers": ["sp_bpe_1024", "n_pure_byte_260"],
        "datasets": ["fineweb10B_sp1024", "n_byte260"],
    }
    assert (merged["version"], merged["tokenizers"][0]) == ("10B", others["tokenizers"][0])
    assert "old" not in merged["datasets"][1]
    assert merged["datasets"][1]["stats"]["docs_total"] == 40


def test_a_shorter_run_removes_old_shards_and_nothing_else(tmp_path, docs):
    options = (docs, *BYTES, "--val-docs", 4)
    folder = make(*options, "--shard-tokens", 1000, out=tmp_path) / "n_byte260"
    assert len(list(folder.iterdir())) > 5
    (folder / "notes.txt").write_text("mine")
    make(*options, out=tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "notes.txt"]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OSError(28, "No space left on device"), 2, "; make room, then run again"),
        (KeyboardInterrupt(), 130, "error: interrupted; unfinished shards are removed"),
    ],
)
def test_a_run_that_fails_leaves_the_old_dataset(
    tmp_path, docs, monkeypatch, capsys, error, status, line
):
    options = (docs, *BYTES, "--val-docs", 4, "--shard-tokens")
    make(*options, 1000, out=tmp_path)
    before = files_of(tmp_path)
    data_scripts.fail_to_sync(monkeypatch, 3, error)
    assert prepare.main([*map(str, options), "900", "--out", str(tmp_path)]) == status
    assert line in capsys.readouterr().err
    assert files_of(tmp_path) == before


# ---- Bad input ----

LINE = b'{"text": "hello"}\n'
BAD_FILES = [
    ("a.jsonl", LINE * 2 + b'{"text": "x"\n', ["a.jsonl:3", "delimiter", "JSON object"]),
    ("a.jsonl", LINE + b"[1, 2]\n", ["a.jsonl:2", "[1, 2]", 'string "text"']),
    ("a.jsonl", LINE + b'{"text": null}\n', ["a.jsonl:2", "None", 'string "text"']),
    ("a.jsonl", LINE + b'{"text": "x\\ud83d"}\n', ["a.jsonl:2", "surrogate pair"]),
    ("a.jsonl", LINE + b'{"text": "\xff"}\n', ["a.jsonl:2", "byte 0xff", "UTF-8"]),
    ("a.jsonl", LINE + b"[" * 100_000 + b"\n", ["a.jsonl:2", "recursion", "JSON object"]),
    ("a.txt", b"caf\xe9", ["a.txt", "perhaps WINDOWS-1252, not UTF-8", "convert it"]),
    ("a.jsonl", LINE.decode().encode("utf-16"), ["a.jsonl:1", "perhaps UTF-16, not", "convert it"]),
    ("a.txt", "text".encode("utf-16"), ["a.txt", "perhaps UTF-16, not UTF-8", "convert it"]),
    ("a.json", "[]".encode("utf-16-le"), ["a.json", "perhaps UTF-16-LE, not UTF-8", "convert it"]),
    (
        "a.txt.gz",
        gzip.compress("text".encode("utf-32"), mtime=0),
        ["a.txt.gz", "perhaps UTF-32, not UTF-8"],
    ),
    ("a.jsonl", b"", ["no train documents among the 0"]),
    ("a.jsonl", LINE, ["no train documents among the 1"]),
    ("a.jsonl.zst", zstandard.compress(LINE * 999)[:-3], ["a.jsonl.zst", "truncated"]),
    ("a.jsonl.zst.00", zstandard.compress(LINE)[:6], ["a.jsonl.zst.00", "truncated"]),
    ("a.jsonl.zst", b"", ["a.jsonl.zst", "truncated"]),
    ("a.jsonl.zst", LINE * 9, ["a.jsonl.zst", "damaged .zst"]),
    ("a.jsonl.gz", gzip.compress(LINE, mtime=0)[:-3], ["a.jsonl.gz", "truncated"]),
    ("a.txt.xz", b"text", ["a.txt.xz", "damaged .xz", "correct its suffix"]),
    ("a.jsonl", gzip.compress(LINE, mtime=0), ["a.jsonl: holds .gz data; correct its suffix"]),
    ("a.txt", zstandard.compress(LINE), ["a.txt: holds .zst data; correct its suffix"]),
    ("a.json.gz", lzma.compress(LINE), ["a.json.gz: holds .xz data; correct its suffix"]),
    ("a.json", b'[{"text": "a"}, 5]', ["a.json: item 2", "5 has no string"]),
    ("a.parquet", b"", ["a.parquet", "unknown suffix", ".jsonl"]),
]


@pytest.mark.parametrize(("name", "data", "expected"), BAD_FILES)
def test_bad_files_are_refused(tmp_path, capsys, name, data, expected):
    (tmp_path / name).write_bytes(data)
    error = error_of(capsys, tmp_path / name, *BYTES, "--val-docs", 1, "--out", tmp_path)
    assert all(part in error for part in expected), error
    assert not list(tmp_path.rglob("*.bin"))


BAD_OPTIONS = [
    (
        "gone.jsonl --variant byte260 --val-docs 1 --name n",
        ["gone.jsonl: No such file", "check the path"],
    ),
    ("--val-docs 5", ["--val-docs", "needs INPUT"]),
    ("DOCS --variant byte260 --val-docs 40 --name n", ["no train documents among the 40"]),
    ("DOCS --variant byte260 --name n", ["INPUT", "1,000,000", "--val-docs"]),
    ("DOCS --variant byte260 --val-docs 2 --val-file DOCS --name n", ["--val-docs", "--val-file"]),
    (
        "DOCS --variant byte260 --val-file none.jsonl --name n",
        ["none.jsonl: No such file", "check the path"],
    ),
    ("DOCS --variant byte260 --val-file empty.jsonl --name n", ["no val documents"]),
    ("DOCS --variant sp400 --val-docs 2 --name n", ["--tokenizer", "--vocab-size"]),
    ("DOCS --variant byte260 --vocab-size 400 --name n", ["byte260", "--vocab-size"]),
    ("DOCS --variant sp512 --vocab-size 400 --name n", ["--variant", "sp512", "sp400"]),
    ("DOCS --vocab-size 512 --tokenizer GOOD --name n", ["--vocab-size", "--tokenizer"]),
    ("DOCS --vocab-size 70000 --val-docs 2 --name n", ["--vocab-size", "70000", "65536"]),
    ("DOCS --vocab-size 262 --val-docs 2 --name n", ["--vocab-size", "262", "or more"]),
    ("DOCS --vocab-size 60000 --val-docs 2 --name n", ["--vocab-size", "60000", "at most"]),
    ("DOCS --tokenizer none.model --val-docs 2 --name n", ["--tokenizer", "none.model"]),
    ("DOCS --tokenizer docs.jsonl --val-docs 2 --name n", ["--tokenizer", "docs.jsonl", ".model"]),
    ("DOCS --tokenizer cut.model --val-docs 2 --name n", ["--tokenizer", "cut.model", "not a"]),
    ("DOCS --tokenizer no.model --val-docs 2 --name n", ["no.model: 0 bytes, but not a Sent"]),
    ("DOCS --variant byte260 --shard-tokens 2147483648 --name n", ["--shard-tokens"]),
    ("DOCS --variant byte260 --val-docs 2 --name ../n", ["--name", "../n"]),
    ("DOCS --variant byte260 --val-docs 2", ["--name", "''"]),
    ("DOCS --variant byte260 --val-docs 2 --name n --out docs.jsonl/x", ["--out", "docs.jsonl"]),
    ("DOCS --variant byte260 --val-docs 2 --name n --out bad", ["manifest.json", "move it away"]),
    # Files of which the operating system says something; a file twice.
    ("loop.jsonl --variant byte260 --name n", ["loop.jsonl: Too many levels", "replace the link"]),
    ("dangling.jsonl --variant byte260 --name n", ["dangling.jsonl: No such file", "check the"]),
    ("pipe.jsonl --variant byte260 --name n", ["pipe.jsonl: not a regular file"]),
    ("folder --variant byte260 --name n", ["folder/again: a link to a folder that was read"]),
    ("@gone --variant byte260 --name n", ["gone: No such file", "check the path"]),
    ("@folder --variant byte260 --name n", ["folder: Is a directory; a file is needed"]),
    ("DOCS --val-docs 2 --name n --tokenizer loop.model", ["loop.model", "existing"]),
    (
        "DOCS --variant byte260 --val-docs 2 --name n --out loop.jsonl",
        ["loop.jsonl", "Too many levels"],
    ),
    ("DOCS --variant byte260 --val-docs 2 --name n --out used", ["manifest.json: Is a directory"]),
    ("DOCS ./DOCS --variant byte260 --name n", ["docs.jsonl: is given twice"]),
    # Inputs that name nothing are not the embedded corpus, nor a selection by hash.
    ("vacant --variant byte260 --name n", ["vacant: no input file in this folder", ".jsonl"]),
    ("notes --variant byte260 --name n", ["notes: no input file in this folder", ".jsonl"]),
    ("DOCS --variant byte260 --name n --val-file vacant", ["vacant: no input file in this folder"]),
    ("@empty.jsonl --variant byte260 --name n", ["empty.jsonl: need one path per line"]),
    ("DOCS --variant byte260 --name n --val-file @empty.jsonl", ["need one path per line"]),
    ("@zeros --variant byte260 --name n", ["zeros: need one path per line", "zero bytes"]),
    ("EMPTY --variant byte260 --name n", ["INPUT: the path is empty"]),
    ("DOCS --variant byte260 --name n --out EMPTY", ["--out: the path is empty"]),
    # Files whose content the operating system cannot read.
    ("eio.jsonl --variant byte260 --name n", ["eio.jsonl: Input/output error; check its disk"]),
    ("eio.txt.gz --variant byte260 --name n", ["eio.txt.gz: Input/output error; check its disk"]),
    ("@eio.list --variant byte260 --name n", ["eio.list: Input/output error; check its disk"]),
    ("DOCS --name n --tokenizer eio.model", ["eio.model: Input/output error; check its disk"]),
    ("--out failing", ["manifest.json: Input/output error; check its disk"]),
    # Folders where files will be written.
    ("--out used1", ["used1/datasets/python_byte260/fineweb_val_000000.bin: is a folder"]),
    ("--out used2", ["used2/tokenizers/python_1024_bpe.vocab: is a folder"]),
    ("--out used3", ["used3/tokenizers: Not a directory; choose a writable folder"]),
]


FOLDERS_OF_FILES = (
    "used/manifest.json",
    "used1/datasets/python_byte260/fineweb_val_000000.bin",
    "used2/tokenizers/python_1024_bpe.vocab",
)


@pytest.mark.parametrize(("options", "expected"), BAD_OPTIONS)
def test_bad_options_are_refused(
    tmp_path, monkeypatch, capsys, docs, model_path, options, expected
):
    monkeypatch.chdir(tmp_path)
    for name in ("empty.jsonl", "no.model"):
        Path(name).touch()
    Path("cut.model").write_bytes(model_path.read_bytes()[:3000])
    for name in ("loop.jsonl", "loop.model"):
        Path(name).symlink_to(name)
    Path("dangling.jsonl").symlink_to("nothing")
    os.mkfifo("pipe.jsonl")
    for name in ("eio.jsonl", "eio.txt.gz", "eio.list", "eio.model", "failing/manifest.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to("/proc/self/mem")  # its first byte cannot be read
    for name in ("bad", "folder", "vacant", "notes", "used3", *FOLDERS_OF_FILES):
        Path(name).mkdir(parents=True)
    for name in ("notes/a.md", "notes/.a.txt", "used3/tokenizers"):
        Path(name).touch()
    Path("zeros").write_bytes(b"docs.jsonl\0empty.jsonl\0")
    Path("folder/again").symlink_to(".")
    Path("bad/manifest.json").write_text('{"datasets": [')
    monkeypatch.setattr(common, "DATA", tmp_path)
    before = set(tmp_path.rglob("*"))
    arguments = options.replace("GOOD", str(model_path)).replace("DOCS", docs.name).split()
    error = error_of(capsys, *("" if word == "EMPTY" else word for word in arguments))
    assert all(part in error for part in expected), error
    assert set(tmp_path.rglob("*")) == before


def test_tokenizers_that_do_not_fit(tmp_path, capsys, docs, model_path):
    """One whose name another one has in the output folder, and one with another BOS id."""
    other = tmp_path / "tokenizers" / model_path.name
    other.parent.mkdir()
    other.write_bytes(b"another")
    options = (docs, "--val-docs", 2, "--name", "n", "--out", tmp_path, "--tokenizer")
    assert str(other) in error_of(capsys, *options, model_path)
    assert other.read_bytes() == b"another"
    model = tmp_path / "odd"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(50)), model_prefix=str(model), vocab_size=300,
        model_type="bpe", unk_id=0, bos_id=5, eos_id=2, minloglevel=2,
    )  # fmt: skip
    assert "BOS id 5" in error_of(capsys, *options, f"{model}.model")


# ---- Command line ----


def test_summary_and_default_name(tmp_path, docs, capsys):
    folder = make(docs, *BYTES[:2], "--val-docs", 2, out=tmp_path / "novels") / "novels_byte260"
    out = capsys.readouterr().out
    size = sum(len(text.encode()) for text in make_texts(40)[2:])
    assert f"38 documents, {size:,} bytes, {size + 38:,} tokens\n" in out
    assert f"DATA_PATH={folder} VOCAB_SIZE=260 python train_gpt.py" in out


def test_the_number_of_threads_changes_nothing(tmp_path, capsys):
    path = write_jsonl(tmp_path / "docs.jsonl", make_texts(600))
    options = (path, "--vocab-size", 400, "--val-docs", 9, "--name", "n", "--shard-tokens", 5000)
    for workers in (1, 2):
        make(*options, "--workers", workers, out=tmp_path / str(workers))
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    assert len(files_of(tmp_path / "1")) > 10
    assert capsys.readouterr().err == ""


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--help"])
    assert stop.value.code == 0
    assert "Example:\n    python data/prepare.py docs.jsonl" in capsys.readouterr().out
