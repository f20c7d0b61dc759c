"""data/to_bytes.py: the bytes it writes, how it checks them, what it refuses and resumes."""

import io
import json
from functools import partial

import data_scripts
import numpy as np
import pytest
import sentencepiece
import torch
from conftest import shard_bytes
from data_scripts import byte_documents, common, files_of, prepare, read_split, to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

error_of = partial(data_scripts.error_of, to_bytes.main)
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
    "suffix": {**NMT, "treat_whitespace_as_suffix": True},
    "no_fallback": {**NMT, "add_dummy_prefix": False, "byte_fallback": False},
}


# ---- Helpers: the bytes once more, by the decoder alone ----


def train(byte_fallback=True, **options):
    """A small tokenizer; without byte fallback it lacks most characters of TEXTS."""
    model, texts = io.BytesIO(), ["the cat sat on the mat, the dog ran", *TEXTS[:2]] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts + TEXTS * byte_fallback), model_writer=model,
        byte_fallback=byte_fallback, vocab_size=400, hard_vocab_limit=False, model_type="bpe",
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2, **options,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def tokenizers():
    odd = train(**KINDS["identity"], control_symbols=["<mask>"])  # a special token above id 3
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
    """Every text between special tokens by the decoder, special tokens as they are."""
    ids, text = [], []
    for token in [*stream, 2]:
        if token > 3:
            text.append(token)
        else:
            ids += [4 + byte for byte in tokenizer.decode(text).encode()] if text else []
            ids.append(token)
            text = []
    return ids[:-1]


def make_source(root, tokenizer, stream=None, shard_tokens=10**9, split="train"):
    """The project's layout with one split in shards of `shard_tokens`; returns their folder."""
    stream = stream_of(tokenizer) if stream is None else stream
    size = tokenizer.vocab_size()
    folder = root / "datasets" / f"fineweb10B_sp{size}"
    folder.mkdir(parents=True, exist_ok=True)
    for i, start in enumerate(range(0, len(stream), shard_tokens)):
        path = folder / f"fineweb_{split}_{i:06d}.bin"
        path.write_bytes(shard_bytes(stream[start : start + shard_tokens]))
    (root / "tokenizers").mkdir(exist_ok=True)
    model = root / "tokenizers" / f"fineweb_{size}_bpe.model"
    model.write_bytes(tokenizer.serialized_model_proto())
    return folder


def convert(source, *args):
    """Runs the script; returns the folder that it fills by default."""
    assert to_bytes.main([str(arg) for arg in (source, *args)]) == 0
    return source.with_name("fineweb10B_byte260")


# ---- The bytes ----


def test_bytes_are_the_decoded_text_and_those_that_the_trainer_counts(tmp_path, tokenizer, capsys):
    """For tokens of text, of bytes, with a leading space, special and unknown."""
    stream = [*stream_of(tokenizer), 2, 0, *tokenizer.encode("the cat")]
    ids = read_split(convert(make_source(tmp_path, tokenizer, stream))).tolist()
    assert ids == expected_ids(tokenizer, stream)
    table, tokens = tg.ByteTable.of_tokenizer(tokenizer), torch.tensor(stream)
    assert sum(i >= 4 for i in ids) == table.text_bytes(tokens[:-1], tokens[1:]).sum()
    unknown = stream.count(3)
    warning = f"warning: {unknown} tokens are unknown text"
    assert (warning in capsys.readouterr().out) == (unknown > 0)


def test_the_tokenizers_have_leading_spaces_bytes_and_unknown_tokens(tokenizers):
    first = {kind: t.id_to_piece(t.encode("the cat")[0]) for kind, t in tokenizers.items()}
    assert [kind for kind, piece in first.items() if piece[0] == "\u2581"] == [
        "identity_prefix",
        "nmt_prefix",
    ]
    assert 3 in stream_of(tokenizers["no_fallback"])
    assert any(tokenizers["nmt"].is_byte(token) for token in stream_of(tokenizers["nmt"]))


@pytest.mark.parametrize(("shard_tokens", "chunk"), [(9, 1), (9, 3), (64, 7), (64, 1 << 18)])
def test_no_border_changes_the_bytes(tmp_path, monkeypatch, tokenizer, shard_tokens, chunk):
    """Shards and chunks that end in documents, in characters, and between BOS and a space."""
    stream = stream_of(tokenizer)
    monkeypatch.setattr(to_bytes, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(common, "write_atomically", lambda path, data: path.write_bytes(data))
    monkeypatch.setattr(to_bytes, "refuse_duplicates", lambda *streams: None)  # short shards repeat
    folder = convert(make_source(tmp_path, tokenizer, stream, shard_tokens))
    data = b"".join(path.read_bytes()[1024:] for path in sorted(folder.glob("*.bin")))
    assert np.frombuffer(data, "<u2").tolist() == expected_ids(tokenizer, stream)


text = st.text(st.characters(exclude_characters="\u2581\0", exclude_categories=("Cs",)))


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(text, min_size=1))
def test_an_identity_tokenizer_gives_the_documents_own_bytes(tokenizers, texts):
    for kind in ("identity", "identity_prefix"):
        converter = to_bytes.Converter(tokenizers[kind])
        tokens = np.array([1, *stream_of(tokenizers[kind], texts)])
        ids = converter.convert(tokens)
        assert byte_documents(ids) == [text.encode() for text in texts]
        assert not converter.find_error(tokens, ids, np.random.default_rng(0))


def test_equals_the_bytes_prepared_from_the_documents(tmp_path, identity):
    texts = [text for text in TEXTS if text.strip()]
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    model = tmp_path / "m.model"
    model.write_bytes(identity.serialized_model_proto())
    options = ["--val-docs", "3", "--out", str(tmp_path), "--shard-tokens", "50", "--name"]
    for more in (["a", "--variant", "byte260"], ["b", "--tokenizer", str(model)]):
        assert prepare.main([str(path), *options, *more]) == 0
    datasets = tmp_path / "datasets"
    convert(datasets / f"b_sp{identity.vocab_size()}", "--tokenizer", model)
    prepared, converted = datasets / "a_byte260", datasets / "b_byte260"
    for split in ("train", "val"):
        assert np.array_equal(read_split(prepared, split), read_split(converted, split))
    stream = tg.TokenStream(converted, "train", 260)  # as the trainer reads it
    assert np.array_equal(stream.read(0, len(stream)), read_split(prepared))
    manifest = json.loads((tmp_path / "manifest.json").read_text("utf-8"))
    stats = {entry["name"]: entry["stats"] for entry in manifest["datasets"]}
    for key, count in stats["a_byte260"].items():
        assert key.startswith("files") or stats["b_byte260"][key] == count


# ---- The check ----


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda ids: np.where(ids == 1, 2, ids), "the special tokens differ"),
        (lambda ids: np.delete(ids, 1), "the byte table counts another number of bytes"),
        (lambda ids: np.where(ids == 4 + ord("h"), 99, ids), "the decoder gives another text"),
    ],
)
def test_wrong_bytes_are_found(tokenizer, damage, reason):
    converter = to_bytes.Converter(tokenizer)
    tokens = np.array([1, *stream_of(tokenizer, TEXTS[:2]), 1])
    ids, random = converter.convert(tokens), np.random.default_rng(0)
    assert converter.find_error(tokens, ids, random) == ""
    assert converter.find_error(tokens, damage(ids), random).startswith(reason)


def test_a_tokenizer_that_decodes_to_another_text_is_refused(tmp_path, capsys):
    rule = tmp_path / "rule.tsv"
    rule.write_text("63\t64\n")  # decoded text has d for c
    tokenizer = train(**KINDS["identity"], denormalization_rule_tsv=str(rule))
    source = make_source(tmp_path, tokenizer, stream_of(tokenizer, TEXTS[:3]))
    error = error_of(capsys, source)
    assert f"{source}/fineweb_train_000000.bin" in error
    assert "the decoder gives another text" in error
    assert not list(source.with_name("fineweb10B_byte260").iterdir())


# ---- Runs that follow another ----


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-2] + b"cc", "differs from the bytes of"),
        (lambda data: data[:8] + b"\xff" + data[9:], "not a complete shard"),
        (lambda data: data[:-2], "not a complete shard"),
        (lambda data: b"", "not a complete shard"),
    ],
)
def test_a_different_file_is_refused_before_anything_is_written(
    tmp_path, identity, capsys, damage, reason
):
    source = make_source(tmp_path, identity, shard_tokens=100)
    folder = convert(source)
    path = folder / "fineweb_train_000002.bin"
    (folder / "fineweb_train_000000.bin").unlink()
    path.write_bytes(damage(path.read_bytes()))
    before = files_of(folder)
    error = error_of(capsys, source)
    assert f"{path}: {reason}" in error
    assert files_of(folder) == before
    path.unlink()
    convert(source)
    assert read_split(folder).tolist() == expected_ids(identity, stream_of(identity))


def test_shards_of_a_longer_run_are_refused(tmp_path, identity, capsys):
    source = make_source(tmp_path, identity, shard_tokens=100)
    convert(source)
    last = max(source.iterdir())
    last.unlink()
    before = files_of(tmp_path)
    error = error_of(capsys, source)
    assert f"fineweb10B_byte260/{last.name}" in error
    assert "no shard of that name; delete it" in error
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OSError(28, "No space left on device"), 2, "; make room, then run again"),
        (KeyboardInterrupt(), 130, "error: interrupted; run again to convert the other shards"),
    ],
)
def test_a_failed_run_leaves_complete_shards_and_the_next_ones_keep_them(
    tmp_path, identity, capsys, monkeypatch, error, status, line
):
    source = make_source(tmp_path, identity, shard_tokens=100)
    folder = source.with_name("fineweb10B_byte260")
    with monkeypatch.context() as patch:
        data_scripts.fail_to_sync(patch, 2, error)
        assert to_bytes.main([str(source)]) == status
    assert line in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["fineweb_train_000000.bin"]
    assert not (tmp_path / "manifest.json").exists()
    for unchanged in (1, len(list(source.iterdir()))):
        times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        convert(source)
        assert f" {unchanged} unchanged" in capsys.readouterr().out
        assert all(path.stat().st_mtime_ns == time for path, time in times.items())
        assert read_split(folder).tolist() == expected_ids(identity, stream_of(identity))


# ---- Bad input ----


BAD = [
    ("empty_sp9 --tokenizer m.model", ["--tokenizer", "m.model", "tokens of 9"]),
    ("none --tokenizer m.model --out o", ["none", "no file matches", "data/prepare.py"]),
    ("x_byte260", ["x_byte260", "holds bytes already", "NAME_spV"]),
    ("plain", ["plain", "NAME_spV", "--tokenizer and --out"]),
    ("plain --tokenizer m.model", ["plain", "--tokenizer and --out"]),
    ("plain --tokenizer m.model --out ./x/../plain", ["--out", "folder of the tokens"]),
    ("plain --tokenizer m.model --out text.model/y", ["--out", "text.model", "writable"]),
    ("plain --tokenizer none.model --out o", ["--tokenizer", "none.model", "existing"]),
    ("plain --tokenizer text.model --out o", ["--tokenizer", "text.model", "not a"]),
    ("plain --tokenizer odd.model --out o", ["--tokenizer", "neither text nor"]),
    ("x_sp9", ["--tokenizer", "tokenizers/x_9_bpe.model", "existing"]),
    ("large --tokenizer m.model --out o", ["large/fineweb_val_000001.bin", "65535", "--tokenizer"]),
    ("cut --tokenizer m.model --out o", ["cut/fineweb_train_000000.bin", "not a complete shard"]),
    ("plain --tokenizer m.model --out broken/datasets/o", ["manifest.json", "move it away"]),
    ("plain --nonsense", ["--nonsense"]),
    # Files of which the operating system says something; two shards of the same tokens.
    ("twice --tokenizer m.model --out o", ["twice/fineweb_train_000000 (1).bin", "same tokens"]),
    ("dangling --tokenizer m.model --out o", ["dangling/fineweb_train_000000.bin", "No such file"]),
    ("m.model --tokenizer m.model --out o", ["m.model: Not a directory; a folder is needed"]),
    ("plain --tokenizer loop.model --out o", ["--tokenizer: loop.model", "existing"]),
    ("plain --tokenizer m.model --out loop.model", ["--out", "loop.model", "writable folder"]),
    ("plain --tokenizer eio.model --out o", ["eio.model: Input/output error; check its disk"]),
    ("eio --tokenizer m.model --out o", ["eio/fineweb_train_000000.bin"]),
    ("plain --tokenizer m.model --out taken", ["taken/fineweb_train_000000.bin", "Is a directory"]),
    (" --tokenizer m.model --out o", ["SOURCE: the path is empty"]),
]


@pytest.mark.parametrize(("options", "expected"), BAD)
def test_bad_input_is_refused(tmp_path, monkeypatch, capsys, tokenizers, options, expected):
    root = tmp_path / "sets"
    for name in ("empty_sp9", "x_byte260", "x_sp9", "plain", "large", "cut", "broken"):
        (root / name).mkdir(parents=True)
    monkeypatch.chdir(root)
    for name in ("plain", "x_sp9", "x_byte260", "large"):
        (root / name / "fineweb_train_000000.bin").write_bytes(shard_bytes([1, 5]))
    (root / "cut" / "fineweb_train_000000.bin").write_bytes(shard_bytes([1, 5])[:-1])
    for number in range(2):
        path = root / "large" / f"fineweb_val_{number:06d}.bin"
        path.write_bytes(shard_bytes([1, 5, 65_535 * number]))
    for name, kind in (("m.model", "identity"), ("odd.model", "odd")):
        (root / name).write_bytes(tokenizers[kind].serialized_model_proto())
    (root / "text.model").write_bytes(b"hello\n")
    (root / "loop.model").symlink_to("loop.model")
    (root / "taken/fineweb_train_000000.bin").mkdir(parents=True)
    (root / "eio").mkdir()
    for name in ("eio.model", "eio/fineweb_train_000000.bin"):
        (root / name).symlink_to("/proc/self/mem")  # its first byte cannot be read
    for folder, number in (("twice", ""), ("twice", " (1)"), ("dangling", "")):
        path = root / folder / f"fineweb_train_000000{number}.bin"
        path.parent.mkdir(exist_ok=True)
        path.symlink_to("none") if folder == "dangling" else path.write_bytes(shard_bytes([1, 5]))
    (root / "broken/manifest.json").write_text("[", "utf-8")
    before = set(tmp_path.rglob("*"))
    error = error_of(capsys, *options.split(" "))
    assert all(part in error for part in expected), error
    assert set(tmp_path.rglob("*")) == before


# ---- Summary, manifest, defaults ----


def test_summary_manifest_and_defaults(tmp_path, identity, capsys, monkeypatch):
    """Two splits in several shards; the source is the default one."""
    monkeypatch.setattr(common, "DATA", tmp_path)
    manifest = tmp_path / "manifest.json"
    others = {"version": "10B", "tokenizers": [], "datasets": [{"name": "fineweb10B_sp1024"}]}
    manifest.write_text(json.dumps(others), "utf-8")
    streams = {"train": stream_of(identity), "val": stream_of(identity, TEXTS[:3])}
    for split, stream in streams.items():
        source = make_source(tmp_path, identity, stream, 100, split)
    folder = convert(source)
    shown = capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {p.name for p in source.iterdir()}
    ids = {split: expected_ids(identity, stream) for split, stream in streams.items()}
    for split, expected in ids.items():
        assert read_split(folder, split).tolist() == expected
    total, size = sum(map(len, streams.values())), sum(i >= 4 for i in ids["train"] + ids["val"])
    assert f"{total:,} tokens -> {size:,} bytes, {size / total:.4f} bytes per token" in shown
    assert f"DATA_PATH={folder} VOCAB_SIZE=260 python train_gpt.py" in shown
    assert "warning" not in shown
    merged = json.loads(manifest.read_text("utf-8"))
    assert (merged["version"], merged["datasets"][0]) == ("10B", others["datasets"][0])
    assert merged["tokenizers"][0]["name"] == "fineweb_pure_byte_260"
    stats = merged["datasets"][1]["stats"]
    assert merged["datasets"][1]["name"] == "fineweb10B_byte260"
    assert (stats["tokens_train"], stats["tokens_val"]) == (len(ids["train"]), len(ids["val"]))
    assert stats["tokens_total"] == stats["tokens_train"] + stats["tokens_val"]
    assert (stats["bytes_total"], stats["docs_train"]) == (size, len(TEXTS))
    assert stats["files_total"] == len(list(folder.iterdir()))
    args = to_bytes.parse_arguments([])
    assert args.source == tmp_path / "datasets" / "fineweb10B_sp1024"
    assert args.tokenizer == tmp_path / "tokenizers" / "fineweb_1024_bpe.model"
    assert args.out == folder


def test_other_folders_get_no_manifest(tmp_path, identity):
    source, out = make_source(tmp_path / "in", identity), tmp_path / "out"
    convert(source, "--out", out)
    assert read_split(out).tolist() == expected_ids(identity, stream_of(identity))
    assert not list(tmp_path.rglob("manifest.json"))


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        to_bytes.main(["--help"])
    assert stop.value.code == 0
    assert "Example:\n    python data/to_bytes.py data/datasets/" in capsys.readouterr().out
