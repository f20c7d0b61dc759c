"""Data: the shard format, the token stream and its batches, bytes against decoded text."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import TINY, byte_tokens, load, settings, shard_bytes
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg


def test_a_shard_of_the_description_is_read(tmp_path: Path):
    tokens = [1, 5, 65_535, 0, 260]
    path = tmp_path / "shard.bin"
    path.write_bytes(shard_bytes(tokens))
    assert tg.read_shard(path).tolist() == tokens


@given(tokens=st.lists(st.integers(0, 65_535), min_size=1, max_size=300))
def test_a_shard_under_the_written_header_is_read(tmp_path_factory, tokens: list[int]):
    path = tmp_path_factory.mktemp("s") / "shard.bin"
    path.write_bytes(tg.shard_header(len(tokens)) + np.array(tokens, "<u2").tobytes())
    assert path.read_bytes() == shard_bytes(tokens)
    assert tg.read_shard(path).tolist() == tokens


def test_a_header_holds_the_largest_count():
    header = tg.shard_header(2**31 - 1)
    assert len(header) == 1024
    assert struct.unpack("<256i", header) == (20240520, 1, 2**31 - 1, *[0] * 253)


GOOD = shard_bytes([1, 2, 3, 4])


fault = pytest.mark.fault


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        pytest.param(b"", "0 tokens need 1024 bytes, the file has 0;", marks=fault(6)),
        pytest.param(GOOD[:500], "4 tokens need 1032 bytes, the file has 500;", marks=fault(6)),
        pytest.param(GOOD[:1023], "4 tokens need 1032 bytes, the file has 1023;", marks=fault(6)),
        pytest.param(GOOD[:1024], "4 tokens need 1032 bytes, the file has 1024;", marks=fault(4)),
        pytest.param(GOOD[:-1], "4 tokens need 1032 bytes, the file has 1031;", marks=fault(4)),
        pytest.param(GOOD + b"x", "4 tokens need 1032 bytes, the file has 1033;", marks=fault(4)),
        pytest.param(struct.pack("<i", 7) + GOOD[4:], "magic 7", marks=fault(5)),
        pytest.param(GOOD[:4] + struct.pack("<i", 2) + GOOD[8:], "version 2", marks=fault(5)),
        pytest.param(GOOD[:8] + struct.pack("<i", 0) + GOOD[12:], "0 tokens", marks=fault(7)),
        pytest.param(GOOD[:8] + struct.pack("<i", 0) + GOOD[12:1024], "0 tokens", marks=fault(7)),
        pytest.param(GOOD[:8] + struct.pack("<i", -4) + GOOD[12:], "-4 tokens", marks=fault(7)),
        pytest.param(
            GOOD[:8] + struct.pack("<i", 2**31 - 1) + GOOD[12:], "2147483647 tokens", marks=fault(8)
        ),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, blob: bytes, says: str):
    path = tmp_path / "bad.bin"
    path.write_bytes(blob)
    with pytest.raises(tg.DataError) as error:
        tg.read_shard(path)
    assert "bad.bin" in str(error.value)
    assert says in str(error.value)


def make_split(folder: Path, parts: list[list[int]], split: str = "train") -> tg.TokenStream:
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(parts):
        (folder / f"fineweb_{split}_{i:06d}.bin").write_bytes(shard_bytes(part))
    return tg.TokenStream(folder, split, 260)


@given(
    parts=st.lists(st.lists(st.integers(0, 259), min_size=1, max_size=20), min_size=1, max_size=4),
    position=st.integers(0, 200),
    count=st.integers(1, 100),
)
def test_the_stream_is_the_shards_repeated(tmp_path_factory, parts, position, count):
    stream = make_split(tmp_path_factory.mktemp("s"), parts)
    tokens = [t for part in parts for t in part]
    want = [tokens[i % len(tokens)] for i in range(position, position + count)]
    assert stream.read(position, count).tolist() == want


def test_batches_tile_the_stream_and_targets_are_one_ahead(byte_corpus: Path):
    batches = load(settings(data_path=byte_corpus)).train
    tokens = tg.TokenStream(byte_corpus, "train", 260).read(0, 3 * 1024 + 1)
    for step in (2, 0, 1):  # no step depends on another
        x, y = batches.batch(step)
        at = step * 1024
        assert x.shape == y.shape == (16, 64)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x.flatten(), tokens[at : at + 1024])
        assert torch.equal(y.flatten(), tokens[at + 1 : at + 1025])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_rows_of_all_ranks_are_the_whole_step(byte_corpus: Path, world_size: int):
    """Also for a step that reads past the end of the last shard."""
    stream = tg.TokenStream(byte_corpus, "train", 260)
    for step in (0, 1, len(stream) // 1024):
        tokens = stream.read(step * 1024, 1025)
        parts = [
            tg.TrainingBatches(stream, 1024, 64, tg.Ranks(rank, world_size)).batch(step)
            for rank in range(world_size)
        ]
        assert all(x.shape == y.shape == (16 // world_size, 64) for x, y in parts)
        x, y = (torch.cat(rows) for rows in zip(*parts, strict=True))
        assert torch.equal(x, tokens[:-1].view(16, 64))
        assert torch.equal(y, tokens[1:].view(16, 64))


def test_a_rank_reads_its_own_rows_only(byte_corpus: Path, monkeypatch):
    stream, reads = tg.TokenStream(byte_corpus, "train", 260), []
    read = tg.TokenStream.read
    monkeypatch.setattr(
        tg.TokenStream, "read", lambda *args: reads.append(args[1:3]) or read(*args)
    )
    for rank in range(4):
        tg.TrainingBatches(stream, 1024, 64, tg.Ranks(rank, 4)).batch(3)
    assert reads == [(3 * 1024 + 256 * rank, 257) for rank in range(4)]


@pytest.mark.parametrize("world_size", [1, 4])
def test_sequences_are_those_that_a_step_reads_first(byte_corpus: Path, world_size: int):
    """On every rank, and as many as are asked for, more than a step has or fewer."""
    stream = tg.TokenStream(byte_corpus, "train", 260)
    for rank in range(world_size):
        batches = tg.TrainingBatches(stream, 1024, 64, tg.Ranks(rank, world_size))
        for count in (1, 16, 20):
            tokens = stream.read(2 * 1024, count * 64)
            assert torch.equal(batches.sequences(2, count), tokens.view(count, 64))


@pytest.mark.fault(1, 2)
@pytest.mark.parametrize("split", ["train", "val"])
def test_no_shards_names_the_setting_and_both_remedies(tmp_path: Path, split: str):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(tg.DataError) as error:
            tg.TokenStream(folder, split, 260)
        found = f"DATA_PATH={folder}: no file matches fineweb_{split}_*.bin. "
        assert str(error.value).startswith(found)
        assert "`python data/prepare.py` for the embedded corpus (PRESET=cpu)" in str(error.value)
        assert "`python data/download.py` for the challenge's shards" in str(error.value)


@pytest.mark.fault(1, 2)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_run_without_a_split_ends_before_it_begins(tmp_path, byte_corpus, monkeypatch, split):
    for path in byte_corpus.iterdir():
        if split not in path.name:
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tg.Trainer, "train", lambda *_: pytest.fail("training began"))
    env = {**TINY, "DATA_PATH": str(tmp_path), "RUN_ID": "no_data"}
    assert tg.main([], env) == 2
    result = json.loads(Path("logs/no_data/result.json").read_text())
    assert f"no file matches fineweb_{split}_*.bin" in result["reason"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_link_to_no_file_is_an_error_of_the_data(tmp_path, byte_corpus, monkeypatch, split):
    for path in byte_corpus.iterdir():
        (tmp_path / path.name).symlink_to(path)
    link = tmp_path / f"fineweb_{split}_000000.bin"
    link.unlink()
    link.symlink_to(tmp_path / "gone.bin")
    monkeypatch.chdir(tmp_path)
    assert tg.main([], {**TINY, "DATA_PATH": str(tmp_path), "RUN_ID": "no_file"}) == 2
    result = json.loads(Path("logs/no_file/result.json").read_text())
    assert result["status"] == "data"
    assert str(link) in result["reason"]
    assert "Traceback" not in result["reason"]


@pytest.mark.fault(3)
@pytest.mark.parametrize(
    ("here", "says"),
    [
        ([0], ""),
        ([0, 1], ""),
        ([0, 1, 3], "3 of 4"),
        ([1], "1 of 2"),
        ([0, 7], "2 of 8"),
        ([0, 1, 100_000], "3 of 100001"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_shards_are_told_with_both_counts(tmp_path, capsys, split, here, says):
    """A shard is known to be missing by the number of the last."""
    folder = tmp_path / "tiny_byte260"
    folder.mkdir()
    for name in ("train", "val"):
        for i in here if name == split else [0]:
            tokens = byte_tokens(f"{name} {i} " * 20)
            (folder / f"fineweb_{name}_{i:06d}.bin").write_bytes(shard_bytes(tokens))
    tg.load_data(settings(data_path=folder, corpus="own"), tg.Ranks(), tg.Log(), 0)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == bool(says)
    assert not says or f"fineweb_{split}_*.bin: {says} shards found" in warnings[0]


def test_shards_without_numbers_are_read_without_a_warning(tmp_path, capsys):
    for name in ("train", "val"):
        path = tmp_path / f"fineweb_{name}_last.bin"
        path.write_bytes(shard_bytes(byte_tokens(f"{name} " * 20)))
    tg.load_data(settings(data_path=tmp_path, corpus="own"), tg.Ranks(), tg.Log(), 0)
    assert "warning" not in capsys.readouterr().out


def id_checks(stream: tg.TokenStream) -> list[str]:
    """The errors of checks that reach from 1 token to all of them."""
    found = []
    for reach in range(1, len(stream) + 1):
        try:
            stream.check(tg.Log(), reach, tg.Ranks())
            found.append("")
        except tg.DataError as error:
            found.append(str(error))
    return found


@pytest.mark.fault(9)
def test_an_id_outside_the_vocabulary_names_shard_and_id(tmp_path: Path):
    stream = make_split(tmp_path / "d", [[1, 2, 259], [4, 260, 5], [6, 700]])
    found = id_checks(stream)
    assert found[:3] == [""] * 3
    assert len(set(found[3:])) == 1
    says = "000001.bin: token id 260 is not below VOCAB_SIZE=260; change DATA_PATH or VOCAB_SIZE"
    assert found[3].endswith(says)


@pytest.mark.fault(9)
def test_ranks_together_check_every_shard_within_reach(tmp_path: Path):
    parts = [[300 + i, 1, 1] for i in range(5)]
    stream = make_split(tmp_path / "d", parts)
    for world_size in (1, 2, 3, 8):
        for reach in (1, 3, 4, 15, 99):
            seen = []
            for rank in range(world_size):
                looked = tg.TokenStream(tmp_path / "d", "train", 260)
                looked.shards = [Seen(shard, seen, i) for i, shard in enumerate(stream.shards)]
                looked.check(tg.Log(), reach, tg.Ranks(rank, world_size))
            assert sorted(seen) == list(range(min(-(-reach // 3), 5)))


class Seen:
    """A shard without a token that is too large; it records each check."""

    def __init__(self, shard: np.ndarray, seen: list[int], number: int) -> None:
        self.shard, self.seen, self.number = shard, seen, number

    def __len__(self) -> int:
        return len(self.shard)

    def max(self) -> int:
        self.seen.append(self.number)
        return 0


@pytest.mark.fault(9)
@pytest.mark.parametrize(("iterations", "refused"), [(1, False), (2, True)])
def test_ids_that_a_run_can_reach_are_checked_before_it(tmp_path, iterations, refused):
    """The bad shard begins after 1024 tokens of a step, 64 of calibration and a sequence."""
    make_split(tmp_path / "d", [byte_tokens("what is scored " * 9)], "val")
    make_split(tmp_path / "d", [[7] * (1024 + 64 + 64), [260] * 100])
    h = settings(data_path=tmp_path / "d", iterations=iterations, gptq_calib_tokens=64)
    if refused:
        with pytest.raises(tg.DataError, match=r"000001\.bin: token id 260 is not below"):
            load(h)
    else:
        assert len(load(h).train.stream) == 1252


@pytest.mark.fault(9)
def test_ids_of_the_whole_validation_split_are_checked(tmp_path: Path):
    make_split(tmp_path / "d", [byte_tokens("scored " * 99), [5] * 9, [5, 5, 261]], "val")
    with pytest.raises(tg.DataError, match=r"val_000002\.bin: token id 261 is not below"):
        load(settings(data_path=tmp_path / "d"), steps=None)


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("fineweb10B_byte260", True),
        ("fineweb10B_sp1024", False),
        ("fineweb10B_sp26", False),
        ("fineweb10B_sp2600", False),
        ("byte", True),
        ("my_shards", True),
        ("wisp1024", True),
    ],
)
def test_a_folder_of_another_tokenizer_is_refused_by_its_name(tmp_path, byte_corpus, name, fits):
    (tmp_path / name).symlink_to(byte_corpus)
    h = settings(data_path=tmp_path / name)
    if fits:
        assert load(h).train
    else:
        says = rf"DATA_PATH=.*{name}: its shards are not of VOCAB_SIZE=260;"
        with pytest.raises(tg.DataError, match=says):
            load(h)


@pytest.mark.parametrize(("micro", "parts"), [(10**9, 1), (512, 2), (500, 4), (64, 16), (1, 16)])
def test_a_step_is_cut_into_equal_parts(micro: int, parts: int):
    assert tg.grad_accum_steps(16, 64, micro) == parts


@pytest.mark.parametrize(("world_size", "parts"), [(1, 8), (2, 4), (8, 1)])
def test_the_default_step_has_as_many_parts_as_on_eight_gpus(world_size: int, parts: int):
    h = tg.Hyperparameters
    rows = h.train_batch_tokens // h.train_seq_len // world_size
    assert tg.grad_accum_steps(rows, h.train_seq_len, h.micro_batch_tokens) == parts


# --- bytes ---

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two leading spaces,   runs of spaces and\ta tab\n\n    def f(x):\n        return x\n",
    "naïve café, Ελληνικά, русский, 日本語, 🙂🙃 and ﬁ ligatures ½ …",
    "1234567890 3.14159 0x1F " * 4,
    "x",
    " ",
    "trailing space ",
]


def train_tokenizer(folder: Path, name: str, **options: object) -> object:
    import io

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The cat sat on the mat, the dog ran.", *TEXTS] * 20),
        model_writer=model,
        vocab_size=options.pop("vocab_size", 400),
        model_type="bpe",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (folder / name).write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


IDENTITY = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
}
KINDS = {
    "identity": {**IDENTITY, "add_dummy_prefix": False},
    "challenge": {
        "normalization_rule_name": "nmt_nfkc",
        "add_dummy_prefix": False,
        "byte_fallback": True,
    },
    "dummy_prefix": {**IDENTITY, "add_dummy_prefix": True},
    "no_fallback": {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False},
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("t"), "m.model", **KINDS[request.param])


def counted(table: tg.ByteTable, ids: list[int]) -> int:
    return int(table.text_bytes(torch.tensor([1, *ids[:-1]]), torch.tensor(ids)).sum())


@pytest.mark.fault(13)
def test_the_table_counts_the_bytes_of_decoded_text(tokenizer):
    table = tg.ByteTable.of_tokenizer(tokenizer)

    @given(st.text(st.characters(exclude_characters="\u2581\0", exclude_categories=("Cs",))))
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        if ids and tokenizer.unk_id() not in ids:
            assert counted(table, ids) == len(tokenizer.decode(ids).encode())

    for text in TEXTS:
        check.hypothesis.inner_test(text)
    check()


def test_an_identity_tokenizer_counts_the_documents_own_bytes(tmp_path: Path):
    tokenizer = train_tokenizer(tmp_path, "m.model", **KINDS["identity"])
    table = tg.ByteTable.of_tokenizer(tokenizer)
    for text in TEXTS:
        assert counted(table, tokenizer.encode(text)) == len(text.encode())


@pytest.mark.fault(13)
def test_the_proof_accepts_what_fits_and_refuses_what_does_not(tokenizer):
    tokens = torch.tensor([t for text in TEXTS * 3 for t in (1, *tokenizer.encode(text))]).int()
    table = tg.ByteTable.of_tokenizer(tokenizer)
    total = int(table.text_bytes(tokens[:-1], tokens[1:]).sum())
    assert tg.verify_byte_table(table, tokenizer, tokens) == total
    for wrong in (
        table._replace(size=table.size + (torch.arange(len(table.size)) == int(tokens[2])).short()),
        table._replace(space=1 - table.space),
    ):
        with pytest.raises(tg.DataError, match="use the tokenizer that made the shards"):
            tg.verify_byte_table(wrong, tokenizer, tokens)


def test_nothing_is_proven_where_there_is_no_text(tokenizer):
    table = tg.ByteTable.of_tokenizer(tokenizer)
    assert tg.verify_byte_table(table, tokenizer, torch.tensor([1, 1, 1, 2])) == 0


def test_the_proof_ends_with_a_whole_run(tokenizer, monkeypatch):
    """A character cut by the end of the proof's tokens is no disagreement."""
    ids = [1, *tokenizer.encode("cat 日本語 cat"), 1, *tokenizer.encode("the cat 日本語" * 9)]
    table = tg.ByteTable.of_tokenizer(tokenizer)
    for length in range(len(ids) - 20, len(ids)):
        monkeypatch.setattr(tg, "PROOF_TOKENS", length)
        tg.verify_byte_table(table, tokenizer, torch.tensor(ids))


def test_bytes_are_counted_as_one_and_specials_as_none(byte_corpus):
    ids = torch.arange(260)
    for table in (tg.ByteTable.of_bytes(), load(settings(data_path=byte_corpus)).val.table):
        assert table.text_bytes(ids.roll(1), ids).tolist() == [0] * 4 + [1] * 256


@pytest.fixture(scope="module")
def text_corpus(tmp_path_factory) -> dict[str, object]:
    """The settings of a corpus of tokens; the folder `no_bos` beside it has no BOS."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = train_tokenizer(folder, "m.model", **KINDS["identity"])
    ids = [t for text in TEXTS * 9 for t in (1, *tokenizer.encode(text))]
    make_split(folder / "d", [ids], "val")
    make_split(folder / "d", [ids[::-1]], "train")
    make_split(folder / "no_bos", [tokenizer.encode(TEXTS[0] * 9)], "val")
    return {
        "vocab_size": tokenizer.vocab_size(),
        "data_path": folder / "d",
        "tokenizer_path": folder / "m.model",
    }


def refused(**changes: object) -> str:
    with pytest.raises(tg.DataError) as error:
        load(settings(**changes))
    return str(error.value)


def test_a_corpus_of_tokens_is_loaded(text_corpus, capsys):
    data = tg.load_data(settings(**text_corpus), tg.Ranks(), tg.Log(), 0)
    val = tg.TokenStream(text_corpus["data_path"], "val", 1024)
    assert data.val.tokens.tolist() == val.read(0, len(val)).tolist()
    counted_bytes = data.val.table.text_bytes(data.val.tokens[:-1], data.val.tokens[1:]).sum()
    shown = capsys.readouterr().out
    assert f"byte_table:proven against {counted_bytes} bytes of decoded text" in shown
    assert "are unknown" not in shown


@pytest.mark.parametrize("unknown", [0, 1, 7])
def test_unknown_validation_tokens_are_warned_of(tmp_path: Path, capsys, unknown: int):
    """A tokenizer that does not cover the text counts 0 bytes for what it does not know."""
    tokenizer = train_tokenizer(tmp_path, "m.model", **KINDS["no_fallback"])
    texts = [text.strip() for text in TEXTS[:2]] * 9
    texts[:unknown] = [f"{text} \u0539 dog" for text in texts[:unknown]]
    tokens = [t for text in texts for t in (1, *tokenizer.encode(text))]
    assert tokens.count(tokenizer.unk_id()) == unknown
    make_split(tmp_path / "d", [tokens], "val")
    h = settings(
        vocab_size=tokenizer.vocab_size(),
        data_path=tmp_path / "d",
        tokenizer_path=tmp_path / "m.model",
        corpus="own",
    )
    tg.load_data(h, tg.Ranks(), tg.Log(), steps=None)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    says = f"warning: {unknown} of {len(tokens)} validation tokens are unknown to the tokenizer "
    assert [line.startswith(says) for line in warnings] == [True] * bool(unknown)


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"VOCAB_SIZE": "4096"}, "fineweb10B_sp4096"),
        ({"PRESET": "cpu"}, "python_sp1024"),
        ({"PRESET": "cpu", "VOCAB_SIZE": "260"}, "python_byte260"),
    ],
)
def test_the_folder_follows_corpus_and_vocabulary(env, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tg.DataError) as error:
        load(tg.Hyperparameters.from_env(env))
    says = f"DATA_PATH=data/datasets/{name}: no file matches fineweb_val_"
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("corpus", "name"),
    [("fineweb10B", "fineweb_1024_bpe.model"), ("python", "python_1024_bpe.model")],
)
def test_the_tokenizer_follows_corpus_and_vocabulary(
    text_corpus, corpus, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    says = refused(data_path=text_corpus["data_path"], corpus=corpus, vocab_size=1024)
    assert says.startswith(f"TOKENIZER_PATH=./data/tokenizers/{name}: ")


@pytest.mark.fault(10)
@pytest.mark.parametrize("name", ["none.model", "d", "d/fineweb_val_000000.bin", "empty", "cut"])
def test_what_is_no_tokenizer_is_refused_by_its_path(text_corpus, name):
    path = text_corpus["tokenizer_path"]
    (path.parent / "empty").write_bytes(b"")
    (path.parent / "cut").write_bytes(path.read_bytes()[:-500])
    says = refused(**{**text_corpus, "tokenizer_path": path.parent / name})
    assert says.startswith(f"TOKENIZER_PATH={path.parent / name}: ")
    assert says.endswith("make or download it together with its shards")


@pytest.mark.fault(11)
def test_a_tokenizer_of_another_size_is_refused_with_both(text_corpus):
    size = text_corpus["vocab_size"]
    says = refused(**{**text_corpus, "vocab_size": size + 1})
    found = f"TOKENIZER_PATH={text_corpus['tokenizer_path']}: it has {size} pieces"
    assert says == f"{found}, VOCAB_SIZE={size + 1}; change one"


@pytest.mark.fault(13)
@pytest.mark.parametrize("wrong", ["size", "space"])
def test_no_bpb_is_printed_of_a_byte_table_that_decoding_refutes(text_corpus, monkeypatch, wrong):
    """As with a tokenizer whose pieces do not decode to their own characters."""
    right = tg.ByteTable.of_tokenizer

    def of_tokenizer(tokenizer):
        table = right(tokenizer)
        return table._replace(**{wrong: getattr(table, wrong) + (table.size > 0)})

    monkeypatch.setattr(tg.ByteTable, "of_tokenizer", of_tokenizer)
    assert "use the tokenizer that made the shards" in refused(**text_corpus)


@pytest.mark.fault(15)
@pytest.mark.parametrize("name", ["eval_seq_len", "train_seq_len"])
def test_validation_shorter_than_a_window_is_refused(text_corpus, name):
    tokens = len(tg.TokenStream(text_corpus["data_path"], "val", 1024))
    for length, fits in ((tokens - 1, True), (tokens, False), (10**6, False)):
        h = {**text_corpus, "train_batch_tokens": length, name: length}
        if name == "eval_seq_len":
            h["train_batch_tokens"] = 1024
        if fits:
            assert load(settings(**h))
        else:
            says = f"{tokens} validation tokens do not fill a window of {length}; "
            assert f"{says}lower EVAL_SEQ_LEN" in refused(**h)


@pytest.mark.fault(14, 55)
def test_tokens_without_bos_cannot_be_proven(text_corpus):
    """The decoder's text is compared after a special token, so nothing of these is compared."""
    folder = text_corpus["data_path"].parent / "no_bos"
    with pytest.raises(tg.DataError, match=f"{folder}: .*BOS"):
        load(settings(**{**text_corpus, "data_path": folder}), steps=None)


@pytest.mark.fault(14)
@pytest.mark.parametrize("tokens", [[1] * 200, [0, 1, 2, 3] * 50])
def test_validation_without_text_is_refused_before_training(tmp_path: Path, tokens):
    make_split(tmp_path / "d", [tokens], "val")
    make_split(tmp_path / "d", [tokens], "train")
    assert "no text" in refused(data_path=tmp_path / "d")


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("factor", "canonical"),
    [
        (1 - 2e-4, False),
        (1 - 5e-5, True),
        (1, True),
        (1 + 5e-5, True),
        (1 + 2e-4, False),
        (155_767_000 / 151_080_113, False),  # an older export, of 63,779,840 tokens
    ],
)
def test_another_validation_text_is_warned_of_and_flagged(
    tmp_path, monkeypatch, capsys, factor, canonical
):
    """With the challenge's number scaled down to this text's."""
    size = 100_000
    make_split(tmp_path / "d", [[1] + [7] * round(size * factor)], "val")
    monkeypatch.setattr(tg, "VAL_BYTES", size)
    data = tg.load_data(settings(data_path=tmp_path / "d"), tg.Ranks(), tg.Log(), steps=None)
    assert data.train is None
    assert data.val.canonical is canonical
    warning = f"warning: {round(size * factor)} bytes of validation text, not the challenge's"
    assert (warning in capsys.readouterr().out) is not canonical


@pytest.mark.fault(16)
def test_a_corpus_of_ones_own_is_flagged_without_a_warning(byte_corpus, capsys):
    h = settings(data_path=byte_corpus, corpus="own")
    assert tg.load_data(h, tg.Ranks(), tg.Log(), 0).val.canonical is False
    assert "warning" not in capsys.readouterr().out


def test_the_challenges_bytes_are_those_of_its_known_exports():
    """Bytes a token and tokens as logged for 1,024 pieces; the window cut off is below 2,048."""
    assert pytest.approx(62_021_632 * 2.43592, rel=1e-5) == tg.VAL_BYTES
    assert tg.VAL_BYTES == 151_130_112 - 49_999  # tokens of bytes less BOS


@pytest.mark.fault(17)
@pytest.mark.parametrize("kind", ["link", "symbolic link", "copy", "longer copy"])
def test_what_is_trained_on_is_not_scored(tmp_path: Path, kind):
    folder, tokens = tmp_path / "d", [1, *range(4, 100)] * 20
    make_split(folder, [[5] * 100, tokens], "val")
    make_split(folder, [[6] * 100], "train")
    val, train = folder / "fineweb_val_000001.bin", folder / "fineweb_train_000001.bin"
    h = {"data_path": folder}
    assert load(settings(**h))
    if kind == "link":
        train.hardlink_to(val)
    elif kind == "symbolic link":
        train.symlink_to(val)
    else:
        train.write_bytes(shard_bytes(tokens * (1 + (kind == "longer copy"))))
    says = refused(**h)
    assert says == f"{train}: the same tokens as {val}; training text cannot be scored"


@pytest.mark.fault(17)
def test_shards_that_begin_alike_but_differ_are_two(tmp_path: Path):
    for split, last in (("val", 7), ("train", 8)):
        make_split(tmp_path / "d", [[1, *[5] * 100, last]], split)
    assert load(settings(data_path=tmp_path / "d"))


@pytest.mark.fault(8)
def test_reading_maps_the_file_and_copies_nothing(tmp_path: Path):
    path = tmp_path / "large.bin"
    count = 50_000_000
    with open(path, "wb") as file:
        file.write(tg.shard_header(count))
        os.truncate(file.fileno(), 1024 + 2 * count)
    assert isinstance(tg.read_shard(path), np.memmap)
