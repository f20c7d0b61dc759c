"""data/prepare.py: the shards it writes, what it refuses, and what survives a broken run."""

import hashlib
import importlib.util
import itertools
import json
import os
import random
import signal
import struct
import subprocess
import sys
from encodings import cp437
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "prepare.py"


def load_script():
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load_script()


# ---- Helpers: the format once more, written from its description and not from the script ----


def read_shard(path):
    data = path.read_bytes()
    header = struct.unpack("<256i", data[:1024])
    assert header[:2] == (20240520, 1)
    assert not any(header[3:])
    assert len(data) == 1024 + 2 * header[2]
    return list(struct.unpack(f"<{header[2]}H", data[1024:]))


def read_split(folder, split):
    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    assert [p.name for p in paths] == [f"fineweb_{split}_{i:06d}.bin" for i in range(len(paths))]
    return [token for path in paths for token in read_shard(path)]


def byte_tokens(texts):
    return [token for text in texts for token in (1, *(4 + byte for byte in text.encode()))]


def byte_texts(tokens):
    data = "".join("\0" if t == 1 else chr(t - 4) for t in tokens).encode("latin-1")
    return data.decode().split("\0")[1:]


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


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(*args):
    return prepare.main([str(arg) for arg in args])


def run_ok(*args):
    assert run(*args) == 0


@pytest.fixture
def docs(tmp_path):
    return write_jsonl(tmp_path / "docs.jsonl", make_texts(40))


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A tokenizer of 400 pieces made by the script."""
    folder = tmp_path_factory.mktemp("tokenizer")
    path = write_jsonl(folder / "docs.jsonl", make_texts(300))
    run_ok(path, "--vocab-size", 400, "--val-docs", 20, "--out", folder, "--name", "small")
    return folder / "tokenizers" / "small_400_bpe.model"


@pytest.fixture(scope="session")
def tokenizer(model_path):
    return sentencepiece.SentencePieceProcessor(model_file=str(model_path))


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    run_ok("--out", folder)
    return folder


# ---- Shards ----


def test_shard_bytes(tmp_path):
    path = tmp_path / "shard.bin"
    prepare.write_shard(path, np.array([0, 1, 65535], dtype=np.uint16))
    assert read_shard(path) == tg.read_shard(path).tolist() == [0, 1, 65535]
    assert path.read_bytes()[:1024] == tg.shard_header(3)
    assert path.read_bytes()[:12] == b"\x88\xd8\x34\x01\1\0\0\0\3\0\0\0"


@pytest.mark.parametrize("shard_tokens", [1, 7, 31, 10_000])
def test_documents_cross_shards_and_splits_do_not_mix(tmp_path, shard_tokens):
    texts = ["abc", "déjà vu", "x", "four four", "\U0001f600 end\n"]
    path = write_jsonl(tmp_path / "docs.jsonl", texts)
    options = ("--variant", "byte260", "--val-docs", 2, "--name", "n", "--out", tmp_path)
    run_ok(path, *options, "--shard-tokens", shard_tokens)
    folder = tmp_path / "datasets" / "n_byte260"
    for split, expected in (("val", texts[:2]), ("train", texts[2:])):
        assert read_split(folder, split) == byte_tokens(expected)
        sizes = [len(read_shard(p)) for p in sorted(folder.glob(f"fineweb_{split}_*.bin"))]
        assert sizes[:-1] == [shard_tokens] * (len(sizes) - 1)
        assert 0 < sizes[-1] <= shard_tokens


def test_sentencepiece_documents(tmp_path, docs, model_path, tokenizer):
    run_ok(docs, "--tokenizer", model_path, "--val-docs", 5, "--name", "n", "--out", tmp_path)
    folder = tmp_path / "datasets" / "n_sp400"
    texts = make_texts(40)
    for split, part in (("val", texts[:5]), ("train", texts[5:])):
        assert read_split(folder, split) == [t for x in part for t in (1, *tokenizer.encode(x))]
    copied = tmp_path / "tokenizers" / "small_400_bpe.model"
    assert copied.read_bytes() == model_path.read_bytes()
    rows = copied.with_suffix(".vocab").read_text("utf-8").splitlines()
    assert rows[:4] == ["<pad>\t0", "<s>\t0", "</s>\t0", "<unk>\t0"]
    assert len(rows) >= 400  # a piece may hold a newline


# ---- Tokenizer ----


def test_tokenizer_has_the_challenge_ids_and_the_asked_size(tokenizer):
    ids = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert ids == (0, 1, 2, 3)
    assert tokenizer.vocab_size() == 400
    assert not tokenizer.encode("ab", out_type=str)[0].startswith("\u2581")


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0")))
def test_any_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)).encode() == text.encode()


@pytest.mark.parametrize(
    "text", ["", " ", "  two", "end \n\n", "\r\n\t", "<s></s><unk><0x41>", "e\u0301\u2585", "1234"]
)
def test_edge_texts_decode_to_themselves(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_inexact_documents_are_counted(tmp_path, model_path, capsys):
    path = write_jsonl(tmp_path / "docs.jsonl", ["fine", "a\u2581b", "also fine"])
    run_ok(path, "--tokenizer", model_path, "--val-docs", 1, "--name", "n", "--out", tmp_path)
    assert "note: 1 documents do not decode" in capsys.readouterr().out


def test_tokenizer_learns_from_training_text_only(tmp_path):
    """And from all of a long document: its last words must become pieces."""
    long = " ".join(make_texts(100)) + " shibboleth" * 2000
    texts = [*make_texts(30), long, "schlemiel " * 2000]
    path = write_jsonl(tmp_path / "docs.jsonl", reversed(texts))
    run_ok(path, "--vocab-size", 400, "--val-docs", 1, "--name", "n", "--out", tmp_path)
    vocabulary = (tmp_path / "tokenizers" / "n_400_bpe.vocab").read_text("utf-8")
    assert "shibboleth" in vocabulary
    assert "schlemiel" not in vocabulary


def test_tokenizer_reads_long_documents_and_bounded_samples(tmp_path, monkeypatch):
    """One document longer than any limit of the trainer counts; a small sample changes it."""
    path = write_jsonl(tmp_path / "docs.jsonl", ["first", " ".join(make_texts(3000))])
    options = ("--vocab-size", 400, "--val-docs", 1, "--name", "n", "--out", tmp_path)
    run_ok(path, *options)
    model = tmp_path / "tokenizers" / "n_400_bpe.model"
    assert sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size() == 400
    path = write_jsonl(tmp_path / "docs.jsonl", make_texts(600))
    run_ok(path, *options)
    whole = model.read_bytes()
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 50_000)
    run_ok(path, *options)
    assert model.read_bytes() != whole


# ---- Determinism ----


def test_same_bytes_with_one_and_two_workers(tmp_path):
    """Separate processes, so that the order of Python's own hashes differs too."""
    path = write_jsonl(tmp_path / "docs.jsonl", make_texts(700))
    jobs = []
    for workers in (1, 2):
        options = f"--vocab-size 400 --val-docs 9 --name n --shard-tokens 5000 --workers {workers}"
        command = [sys.executable, SCRIPT, path, *options.split(), "--out", tmp_path / str(workers)]
        jobs.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    assert [job.wait() for job in jobs] == [0, 0]
    first, second = files_of(tmp_path / "1"), files_of(tmp_path / "2")
    assert len(first) > 10
    assert first == second


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
    options = ("--variant", "byte260", "--val-docs", 1, "--name", "n", "--out", tmp_path)
    run_ok(*(tmp_path / name for name in names), *options)
    train = read_split(tmp_path / "datasets" / "n_byte260", "train")
    assert byte_texts(train) == [*texts[1:11], "windows\r\nline"]


def test_empty_documents_are_skipped_and_counted(tmp_path, capsys):
    path = write_jsonl(tmp_path / "docs.jsonl", ["", "val", " \n", "train", ""])
    options = ("--variant", "byte260", "--val-docs", 1, "--name", "n", "--out", tmp_path)
    run_ok(path, *options)
    assert "1 train, 1 val, 3 empty (skipped)" in capsys.readouterr().out
    assert byte_texts(read_split(tmp_path / "datasets" / "n_byte260", "train")) == ["train"]


# ---- Splits ----


def test_val_docs_and_val_file_agree(tmp_path):
    texts = make_texts(30)
    whole = write_jsonl(tmp_path / "whole.jsonl", texts)
    val = write_jsonl(tmp_path / "val.jsonl", texts[:7])
    train = write_jsonl(tmp_path / "train.jsonl", texts[7:])
    run_ok(whole, "--variant", "byte260", "--val-docs", 7, "--name", "a", "--out", tmp_path)
    run_ok(train, "--variant", "byte260", "--val-file", val, "--name", "b", "--out", tmp_path)
    datasets = tmp_path / "datasets"
    assert byte_texts(read_split(datasets / "a_byte260", "val")) == texts[:7]
    assert files_of(datasets / "a_byte260") == files_of(datasets / "b_byte260")


def test_hash_rule_draws_whole_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "VAL_BYTES", 3000)
    texts = make_texts(50)
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    expected, size = set(), 0
    while size < 3000:
        expected.add(by_hash[len(expected)])
        size = sum(len(text.encode()) for text in expected)
    # Copies of validation and training texts: each must follow its twin, counted once.
    copies = [by_hash[0], by_hash[1], by_hash[-1]]
    path = write_jsonl(tmp_path / "docs.jsonl", [*copies, *texts])
    run_ok(path, "--variant", "byte260", "--name", "n", "--out", tmp_path)
    folder = tmp_path / "datasets" / "n_byte260"
    val, train = (byte_texts(read_split(folder, split)) for split in ("val", "train"))
    assert set(val) == expected
    assert len(val) == len(expected) + 2
    assert not expected & set(train)
    assert len(val) + len(train) == 53


@pytest.mark.parametrize("rule", ["--val-docs", "--val-file"])
def test_overlap_is_refused(tmp_path, capsys, rule):
    texts = make_texts(10)
    path = write_jsonl(tmp_path / "docs.jsonl", [*texts, texts[0], texts[1], texts[9]])
    val = write_jsonl(tmp_path / "val.jsonl", texts[:2])
    value = 2 if rule == "--val-docs" else val
    status = run(path, "--variant", "byte260", rule, value, "--name", "n", "--out", tmp_path)
    error = capsys.readouterr().err
    assert status == 2
    count, line = (2, 11) if rule == "--val-docs" else (4, 1)
    assert f"{count} training documents stand in the validation set" in error
    assert f"{path}:{line} equals" in error
    assert not list(tmp_path.rglob("*.bin"))


def test_copies_within_training_are_fine(tmp_path):
    path = write_jsonl(tmp_path / "docs.jsonl", ["val", "same", "same"])
    options = ("--variant", "byte260", "--val-docs", 1, "--name", "n", "--out", tmp_path)
    run_ok(path, *options)
    assert byte_texts(read_split(tmp_path / "datasets" / "n_byte260", "train")) == ["same"] * 2


# ---- Embedded corpus ----


def test_embedded_corpus(embedded):
    bytes_folder = embedded / "datasets" / "python_byte260"
    tokens_folder = embedded / "datasets" / "python_sp1024"
    model = embedded / "tokenizers" / "python_1024_bpe.model"
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert sp.vocab_size() == 1024
    seen = {}
    for split in ("train", "val"):
        stream = read_split(tokens_folder, split)
        seen[split] = byte_texts(read_split(bytes_folder, split))
        starts = [i for i, token in enumerate(stream) if token == 1] + [len(stream)]
        ids = [stream[a + 1 : b] for a, b in itertools.pairwise(starts)]
        assert sp.decode(ids) == seen[split]
    texts = seen["train"] + seen["val"]
    size = {split: sum(len(t.encode()) for t in seen[split]) for split in seen}
    assert len(set(texts)) == len(texts)
    assert 1_000_000 <= size["val"] < 1_500_000
    assert 5_000_000 < size["train"] < 20_000_000
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert by_hash == seen["val"] + seen["train"]
    assert Path(json.__file__).read_bytes().decode() in texts  # a module
    assert any(t.startswith('The "assert" statement') for t in texts)  # a topic
    assert Path(cp437.__file__).read_bytes().decode() not in texts  # a code table
    assert not any("\nbuild_time_vars = {" in text for text in texts)  # of this machine
    assert not any("\u2581" in text or "\0" in text for text in texts)


def test_embedded_corpus_drops_what_tokens_cannot_give_back(monkeypatch, capsys):
    data = [b"one", "a \u2581 bar".encode(), b"latin \xe9", b"nul \0", b"one", b"two \xef\xbf\xbd"]
    files = [(f"module{number}.py", content) for number, content in enumerate(data)]
    monkeypatch.setattr(prepare, "library_files", lambda: files)
    monkeypatch.setattr("pydoc_data.topics.topics", {"topic": "three"})
    texts = {text for _, text in prepare.embedded_documents()}
    assert texts == {"one", "two \ufffd", "three"}
    assert "dropped 1 copies and 3 texts" in capsys.readouterr().out


def test_a_python_without_its_reference_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(prepare.InputError, match="without its language reference"):
        prepare.embedded_documents()


def test_embedded_manifest(embedded):
    manifest = json.loads((embedded / "manifest.json").read_text("utf-8"))
    assert [d["name"] for d in manifest["datasets"]] == ["python_sp1024", "python_byte260"]
    for entry in manifest["datasets"]:
        for split in ("train", "val"):
            paths = sorted(embedded.glob(entry[f"{split}_glob"]))
            counts = [len(read_shard(path)) for path in paths]
            assert entry["stats"][f"files_{split}"] == len(counts) > 0
            assert entry["stats"][f"tokens_{split}"] == sum(counts)
        assert entry["tokenizer_name"] in [t["name"] for t in manifest["tokenizers"]]
    assert (embedded / manifest["tokenizers"][0]["model_path"]).is_file()
    assert (embedded / manifest["tokenizers"][0]["vocab_path"]).is_file()
    assert not [p for p in embedded.rglob("*") if p.is_dir() and p.name.startswith("fineweb")]


# ---- Manifest ----


def test_manifest_merges(tmp_path, docs):
    others = {
        "version": "10B",
        "num_docs": 5,
        "tokenizers": [{"name": "sp_bpe_1024", "vocab_size": 1024}],
        "datasets": [{"name": "fineweb10B_sp1024"}, {"name": "n_byte260", "old": True}],
    }
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(others), "utf-8")
    for _ in range(2):
        options = ("--variant", "byte260", "--val-docs", 4, "--name", "n", "--out", tmp_path)
        run_ok(docs, *options)
    merged = json.loads(path.read_text("utf-8"))
    assert (merged["version"], merged["num_docs"]) == ("10B", 5)
    assert merged["tokenizers"][0] == others["tokenizers"][0]
    assert [t["name"] for t in merged["tokenizers"]] == ["sp_bpe_1024", "n_pure_byte_260"]
    assert merged["datasets"][0] == {"name": "fineweb10B_sp1024"}
    assert [d["name"] for d in merged["datasets"][1:]] == ["n_byte260"]
    assert "old" not in merged["datasets"][1]
    assert merged["datasets"][1]["stats"]["docs_total"] == 40


# ---- Broken runs ----


def test_a_shorter_run_removes_stale_shards_and_nothing_else(tmp_path, docs):
    options = ("--variant", "byte260", "--val-docs", 4, "--name", "n", "--out", tmp_path)
    folder = tmp_path / "datasets" / "n_byte260"
    run_ok(docs, *options, "--shard-tokens", 1000)
    assert len(list(folder.iterdir())) > 5
    (folder / "notes.txt").write_text("mine")
    run_ok(docs, *options)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "notes.txt"]


def test_a_failing_writer_leaves_the_old_dataset(tmp_path, docs, monkeypatch, capsys):
    options = ("--variant", "byte260", "--val-docs", 4, "--name", "n", "--out", tmp_path)
    run_ok(docs, *options, "--shard-tokens", 1000)
    before = files_of(tmp_path)
    real = prepare.write_shard

    def failing(path, tokens):
        if path.name == "fineweb_train_000001.bin":
            raise OSError(28, "No space left on device", str(path))
        real(path, tokens)

    monkeypatch.setattr(prepare, "write_shard", failing)
    assert run(docs, *options, "--shard-tokens", 900) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert files_of(tmp_path) == before


# Runs the script, but stops for ever in the middle of the second shard.
STUCK_WRITER = """
import runpy, sys, time, signal
from pathlib import Path
script, *sys.argv[1:] = sys.argv[1:]
flag = Path(sys.argv.pop())
real = Path.open
def stuck(self, *args, **kwargs):
    file = real(self, *args, **kwargs)
    if self.name.endswith("000001.bin"):
        file.write(b"half a header")
        file.flush()
        flag.touch()
        time.sleep(60)
    return file
Path.open = stuck
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_leaves_the_old_dataset(tmp_path, docs, sent):
    out, flag = tmp_path / "out", tmp_path / "stuck"
    options = ("--variant", "byte260", "--val-docs", 4, "--name", "n", "--out", out)
    run_ok(docs, *options, "--shard-tokens", 1000)
    before = files_of(out)
    command = [sys.executable, "-c", STUCK_WRITER, SCRIPT, docs, *options, "--shard-tokens", 900]
    job = subprocess.Popen(
        [str(c) for c in (*command, flag)],
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background may have SIGINT ignored, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not flag.exists():
        assert job.poll() is None
    job.send_signal(sent)
    error = job.communicate()[1]
    after = files_of(out)
    if sent == signal.SIGKILL:  # nothing can clean up, but no good name is touched
        assert [name for name in after if name not in before]
        after = {name: data for name, data in after.items() if ".partial-" not in name}
    else:
        assert job.returncode == 130
        assert error == "error: interrupted; unfinished shards are removed\n"
    assert after == before


# ---- Bad input ----

BYTES = "--variant byte260 --val-docs 1 --name n"
LINE = b'{"text": "hello"}\n'
BAD_FILES = [
    ("a.jsonl", LINE * 2 + b'{"text": "x"\n', ["a.jsonl:3", "invalid JSON"]),
    ("a.jsonl", LINE + b"[1, 2]\n", ["a.jsonl:2", "[1, 2]", 'string "text"']),
    ("a.jsonl", LINE + b'{"txt": "x"}\n', ["a.jsonl:2", "txt", 'string "text"']),
    ("a.jsonl", LINE + b'{"text": 7}\n', ["a.jsonl:2", "7", 'string "text"']),
    ("a.jsonl", LINE + b'{"text": null}\n', ["a.jsonl:2", "None", 'string "text"']),
    ("a.jsonl", LINE + b'{"text": "x\\ud83d"}\n', ["a.jsonl:2", "lone surrogate \\ud83d"]),
    ("a.jsonl", LINE + b'{"text": "\xff"}\n', ["a.jsonl:2", "not UTF-8"]),
    ("a.jsonl", LINE + b"[" * 100_000 + b"\n", ["a.jsonl:2", "invalid JSON"]),
    ("a.txt", b"caf\xe9", ["a.txt", "not UTF-8"]),
    ("a.jsonl", b"", ["no train documents among the 0"]),
    ("a.jsonl", LINE, ["no train documents among the 1"]),
    ("a.jsonl.zst", zstandard.compress(LINE * 999)[:-3], ["a.jsonl.zst", "truncated"]),
    ("a.jsonl.zst.00", zstandard.compress(LINE)[:6], ["a.jsonl.zst.00", "truncated"]),
    ("a.jsonl.zst", b"", ["a.jsonl.zst", "truncated"]),
    ("a.jsonl.zst", LINE * 9, ["a.jsonl.zst", "damaged zstd"]),
    ("a.csv", b"text\nhello\n", ["a.csv", "unknown suffix", ".jsonl"]),
    ("a.zst.jsonl.gz", b"", ["a.zst.jsonl.gz", "unknown suffix"]),
]


def refused(capsys, *args):
    """The message of a run that must fail: one line, no traceback, exit status 2."""
    assert run(*args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(("name", "data", "expected"), BAD_FILES)
def test_bad_files_are_refused(tmp_path, capsys, name, data, expected):
    (tmp_path / name).write_bytes(data)
    error = refused(capsys, tmp_path / name, *BYTES.split(), "--out", tmp_path)
    assert all(part in error for part in expected), error
    assert not list(tmp_path.rglob("*.bin"))


BAD_OPTIONS = [
    ("--variant byte260 --val-docs 40 --name n", ["no train documents among the 40"]),
    ("--variant byte260 --name n", ["INPUT", "1,000,000", "--val-docs"]),
    ("--variant byte260 --val-docs 0 --name n", ["--val-docs", "0"]),
    ("--variant byte260 --val-docs 2 --val-file docs.jsonl --name n", ["--val-docs", "--val-file"]),
    ("--variant byte260 --val-file nowhere.jsonl --name n", ["nowhere.jsonl", "no such file"]),
    ("--variant byte260 --val-file empty.jsonl --name n", ["no val documents"]),
    ("--variant byte260 --val-file docs.jsonl --name n", ["40 training documents"]),
    ("--variant sp400 --val-docs 2 --name n", ["--tokenizer", "--vocab-size"]),
    ("--variant bytes --vocab-size 400 --val-docs 2 --name n", ["--variant", "bytes"]),
    ("--variant byte260 --vocab-size 400 --val-docs 2 --name n", ["byte260", "--vocab-size"]),
    ("--variant sp512 --vocab-size 400 --val-docs 2 --name n", ["--variant", "sp512", "sp400"]),
    ("--variant sp512 --tokenizer GOOD --val-docs 2 --name n", ["--variant", "sp512", "sp400"]),
    ("--vocab-size 512 --tokenizer GOOD --val-docs 2 --name n", ["--vocab-size", "512", "400"]),
    ("--vocab-size 70000 --val-docs 2 --name n", ["--vocab-size", "70000", "65536"]),
    ("--vocab-size 260 --val-docs 2 --name n", ["--vocab-size", "260"]),
    ("--vocab-size 262 --val-docs 2 --name n", ["--vocab-size", "262", "or more"]),
    ("--vocab-size 60000 --val-docs 2 --name n", ["--vocab-size", "60000", "pieces at most"]),
    ("--vocab-size many --val-docs 2 --name n", ["--vocab-size", "many"]),
    ("--tokenizer nowhere.model --val-docs 2 --name n", ["--tokenizer", "nowhere.model"]),
    ("--tokenizer docs.jsonl --val-docs 2 --name n", ["--tokenizer", "docs.jsonl", ".model"]),
    ("--tokenizer bad.model --val-docs 2 --name n", ["--tokenizer", "bad.model", "not a"]),
    ("--tokenizer cut.model --val-docs 2 --name n", ["--tokenizer", "cut.model", "not a"]),
    ("--variant byte260 --val-docs 2 --name n --shard-tokens 0", ["--shard-tokens", "0"]),
    ("--variant byte260 --val-docs 2 --name n --shard-tokens 2147483648", ["--shard-tokens"]),
    ("--variant byte260 --val-docs 2 --name ../n", ["--name", "../n"]),
    ("--variant byte260 --val-docs 2 --name n --shards 5", ["--shards"]),
    ("--variant byte260 --val-docs 2", ["--name", "''"]),
    ("--variant byte260 --val-docs 2 --name n --out docs.jsonl/below", ["--out", "docs.jsonl"]),
    ("--variant byte260 --val-docs 2 --name n --out empty.jsonl", ["--out", "empty.jsonl"]),
    ("--variant byte260 --val-docs 2 --name n --out broken", ["manifest.json", "move it away"]),
]


@pytest.mark.parametrize(("options", "expected"), BAD_OPTIONS)
def test_bad_options_are_refused(
    tmp_path, monkeypatch, capsys, docs, model_path, options, expected
):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("bad.model").write_bytes(b"hello\n")
    Path("cut.model").write_bytes(model_path.read_bytes()[:3000])
    Path("broken").mkdir()
    Path("broken/manifest.json").write_text('{"datasets": [')
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "data" / "prepare.py"))
    arguments = options.replace("GOOD", str(model_path)).split()
    error = refused(capsys, docs.name, *arguments)
    assert all(part in error for part in expected), error
    assert not list(tmp_path.rglob("*.bin"))


def test_the_embedded_corpus_takes_no_options_of_other_input(tmp_path, capsys):
    assert "--val-docs: needs INPUT" in refused(capsys, "--val-docs", 5, "--out", tmp_path)


def test_missing_input_is_refused(tmp_path, capsys):
    error = refused(capsys, tmp_path / "gone.jsonl", *BYTES.split(), "--out", tmp_path)
    assert "gone.jsonl: no such file" in error


def test_another_tokenizer_of_the_same_name_is_kept(tmp_path, capsys, docs, model_path):
    other = tmp_path / "tokenizers" / model_path.name
    other.parent.mkdir()
    other.write_bytes(b"another")
    options = ("--tokenizer", model_path, "--val-docs", 2, "--name", "n", "--out", tmp_path)
    assert str(other) in refused(capsys, docs, *options)
    assert other.read_bytes() == b"another"


def test_tokenizer_with_another_bos_is_refused(tmp_path, capsys, docs):
    model = tmp_path / "odd"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(50)), model_prefix=str(model), vocab_size=300,
        model_type="bpe", unk_id=0, bos_id=5, eos_id=2, minloglevel=2,
    )  # fmt: skip
    options = ("--tokenizer", f"{model}.model", "--val-docs", 2, "--name", "n", "--out", tmp_path)
    assert "BOS id 5" in refused(capsys, docs, *options)


# ---- Command line ----


def test_name_is_the_last_part_of_out(tmp_path, docs):
    run_ok(docs, "--variant", "byte260", "--val-docs", 2, "--out", tmp_path / "novels")
    assert (tmp_path / "novels" / "datasets" / "novels_byte260").is_dir()


def test_summary_and_next_command(tmp_path, docs, capsys):
    options = ("--variant", "byte260", "--val-docs", 2, "--name", "n", "--out", tmp_path)
    run_ok(docs, *options)
    out = capsys.readouterr().out
    size = sum(len(text.encode()) for text in make_texts(40)[2:])
    assert f"38 documents, {size:,} bytes, {size + 38:,} tokens, " in out
    assert f"DATA_PATH={tmp_path}/datasets/n_byte260 VOCAB_SIZE=260 python train_gpt.py" in out


def test_help_shows_an_example_and_progress_is_quiet(tmp_path, docs):
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, str(SCRIPT), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "python data/prepare.py docs.jsonl" in shown.stdout
    options = [docs, *BYTES.split(), "--out", tmp_path]
    shown = subprocess.run([*command[:2], *options], capture_output=True, text=True, check=True)
    assert shown.stderr == ""
