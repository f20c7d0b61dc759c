"""Data: the shard format, the token stream and its batches, bytes against decoded text."""

import io
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import TINY, byte_tokens, load, settings, shard_bytes
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train_gpt as tg

fault = pytest.mark.fault

# ---- Shards ----


@given(tokens=st.lists(st.integers(0, 65_535), min_size=1, max_size=300))
def test_a_shard_is_written_and_read_as_the_format_says(tmp_path_factory, tokens: list[int]):
    path = tmp_path_factory.mktemp("s") / "shard.bin"
    path.write_bytes(tg.shard_header(len(tokens)) + np.array(tokens, "<u2").tobytes())
    assert path.read_bytes() == shard_bytes(tokens)
    assert tg.read_shard(path).tolist() == tokens
    assert tg.shard_header(2**31 - 1)[8:12] == b"\xff\xff\xff\x7f"  # the largest count


GOOD = shard_bytes([1, 2, 3, 4])


def with_header(index: int, value: int) -> bytes:
    """The shard GOOD with another number in its header."""
    return GOOD[: 4 * index] + struct.pack("<i", value) + GOOD[4 * index + 4 :]


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        pytest.param(b"", "0 tokens need 1024 bytes, the file has 0;", marks=fault(6)),
        pytest.param(GOOD[:1023], "4 tokens need 1032 bytes, the file has 1023;", marks=fault(6)),
        pytest.param(GOOD[:-1], "4 tokens need 1032 bytes, the file has 1031;", marks=fault(4)),
        pytest.param(GOOD + b"x", "4 tokens need 1032 bytes, the file has 1033;", marks=fault(4)),
        pytest.param(with_header(0, 7), "magic 7", marks=fault(5)),
        pytest.param(with_header(1, 2), "version 2", marks=fault(5)),
        pytest.param(with_header(2, 0), "0 tokens", marks=fault(7)),
        pytest.param(with_header(2, -4), "-4 tokens", marks=fault(7)),
        pytest.param(with_header(2, 2**31 - 1), "2147483647 tokens", marks=fault(8)),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, blob: bytes, says: str):
    path = tmp_path / "bad.bin"
    path.write_bytes(blob)
    with pytest.raises(tg.DataError) as error:
        tg.read_shard(path)
    assert str(error.value).startswith(f"{path}: not a complete shard")
    assert says in str(error.value)


@fault(8)
def test_a_large_shard_is_mapped_and_not_copied(tmp_path: Path):
    path, count = tmp_path / "large.bin", 50_000_000
    path.write_bytes(tg.shard_header(count))
    os.truncate(path, 1024 + 2 * count)
    assert isinstance(tg.read_shard(path), np.memmap)


# ---- The token stream and its batches ----


def write_split(folder: Path, parts: list[list[int]], split: str = "train") -> tg.TokenStream:
    """Writes shards of a split; returns their stream."""
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
    stream = write_split(tmp_path_factory.mktemp("s"), parts)
    tokens = [t for part in parts for t in part]
    expected = [tokens[i % len(tokens)] for i in range(position, position + count)]
    assert stream.read(position, count).tolist() == expected


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_rows_of_all_ranks_are_the_sequences_of_the_step(
    byte_corpus: Path, world_size: int, order: str
):
    """In any order of the steps, and past the end of the last shard; targets are one ahead."""
    stream = tg.TokenStream(byte_corpus, "train", 260)
    ranks = [tg.Ranks(rank, world_size) for rank in range(world_size)]
    h = settings(train_batch_tokens=1024, train_seq_len=64, train_order=order, seed=7)
    batches = [tg.TrainingBatches(stream, h, rank) for rank in ranks]
    for step in (2, 0, 1, len(stream) // 1024):
        wanted = batches[0].sequences(step * 16, 16)
        if order == "sequential":
            tokens = stream.read(step * 1024, 1025)
            assert torch.equal(wanted[:, :-1], tokens[:-1].view(16, 64))
        parts = [one.batch(step) for one in batches]
        assert all(x.shape == y.shape == (16 // world_size, 64) for x, y in parts)
        x, y = (torch.cat(rows) for rows in zip(*parts, strict=True))
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(torch.cat([x, y[:, -1:]], 1), wanted)
        assert torch.equal(x[:, 1:], y[:, :-1])
        # Calibration reads what the step would read first.
        assert torch.equal(batches[-1].sequences(step * 16 + 3, 2), wanted[3:5])


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seq_len=st.integers(2, 9),
    rows=st.integers(1, 8),
    seed=st.integers(0, 10**6),
)
def test_shuffled_training_reads_every_window_once_before_any_comes_again(
    tmp_path_factory, lengths, seq_len, rows, seed
):
    """Windows are those of each shard, whole, with the token after; fewer than a step's is fine."""
    ends = np.cumsum(lengths)
    shards = [list(range(end, end + size)) for end, size in zip(ends, lengths, strict=True)]
    windows = sorted(
        shard[start : start + seq_len + 1]
        for shard in shards
        for start in range(0, len(shard) - seq_len, seq_len)
    )
    stream = write_split(tmp_path_factory.mktemp("s"), shards)
    h = settings(train_batch_tokens=rows * seq_len, train_seq_len=seq_len, seed=seed)
    if not windows:
        with pytest.raises(tg.DataError, match=f"TRAIN_SEQ_LEN={seq_len}"):
            tg.TrainingBatches(stream, h, tg.Ranks())
        return
    batches = tg.TrainingBatches(stream, h, tg.Ranks())
    assert batches.count == len(windows)
    steps = -(-3 * len(windows) // rows)
    parts = [torch.cat([x, y[:, -1:]], 1) for x, y in map(batches.batch, range(steps))]
    read = torch.cat(parts).tolist()
    for start in range(0, 3 * len(windows), len(windows)):
        assert sorted(read[start : start + len(windows)]) == windows


def test_a_shuffled_step_reads_all_over_the_text_and_passes_and_seeds_differ(tmp_path):
    stream = write_split(tmp_path, [list(range(s * 2000, s * 2000 + 2000)) for s in range(5)])
    h = settings(train_batch_tokens=64 * 8, train_seq_len=8)
    seeds = [tg.replace(h, seed=seed) for seed in (1, 2)]
    batches = [tg.TrainingBatches(stream, own, tg.Ranks()) for own in seeds]
    first, other = (one.batch(0)[0] for one in batches)
    assert not torch.equal(first, other)
    n = batches[0].count
    starts = first[:, 0].sort().values
    assert starts.diff().max() < 3 * 10_000 / 64  # no large part of the text is left out
    passes = [batches[0].sequences(start, n)[:, 0] for start in (0, n)]
    assert not torch.equal(*passes)
    assert torch.equal(passes[0].sort().values, passes[1].sort().values)


def test_a_step_is_cut_into_the_fewest_equal_parts():
    for micro, parts in ((10**9, 1), (512, 2), (500, 4), (64, 16), (1, 16)):
        assert tg.grad_accum_steps(16, 64, micro) == parts
    h = tg.Hyperparameters  # published: 8 parts on one GPU, one on eight
    for world_size, parts in ((1, 8), (2, 4), (8, 1)):
        rows = h.train_batch_tokens // h.train_seq_len // world_size
        assert tg.grad_accum_steps(rows, h.train_seq_len, h.micro_batch_tokens) == parts


# ---- What is refused or warned of before training ----


@fault(1, 2)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_shards_is_an_error_with_both_remedies(
    tmp_path, byte_corpus, monkeypatch, split
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    for path in byte_corpus.iterdir():
        if split not in path.name:
            (folder / path.name).symlink_to(path)
    assert tg.main([], {**TINY, "DATA_PATH": str(folder), "RUN_DIR": "run"}) == 2
    reason = json.loads(Path("run/result.json").read_text())["reason"]
    assert reason.startswith(f"DATA_PATH={folder}: no file matches fineweb_{split}_*.bin. ")
    assert "`python data/prepare.py` for the embedded corpus (PRESET=cpu)" in reason
    assert "`python data/download.py` for the challenge's shards" in reason
    # A link to no file is found, and named.
    link = folder / f"fineweb_{split}_000000.bin"
    link.symlink_to(tmp_path / "gone.bin")
    assert tg.main([], {**TINY, "DATA_PATH": str(folder), "RUN_DIR": "run"}) == 2
    result = json.loads(Path("run/result.json").read_text())
    assert result["status"] == "data"
    assert result["reason"].startswith(f"{link}: ")


def warnings_of(h: tg.Hyperparameters, capsys) -> list[str]:
    """The warnings with which data is loaded, but for the one that it is not the challenge's."""
    capsys.readouterr()
    tg.load_data(h, tg.Ranks(), tg.Log())
    warnings = re.findall("^warning: .*", capsys.readouterr().out, re.MULTILINE)
    return [line for line in warnings if "not the challenge's" not in line]


@fault(3)
@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_shards_are_counted_by_the_number_of_the_last(tmp_path, capsys, split):
    cases = [(["000000"], ""), (["000000", "000003"], "2 of 4"), (["000001"], "1 of 2")]
    cases += [(["000000", "last"], ""), (["000000", "100000"], "2 of 100001")]
    for n, (numbers, says) in enumerate(cases):
        folder = tmp_path / str(n)
        folder.mkdir()
        for name in ("train", "val"):
            for number in numbers if name == split else ["000000"]:
                tokens = byte_tokens(f"{name} {number} " * 20)
                (folder / f"fineweb_{name}_{number}.bin").write_bytes(shard_bytes(tokens))
        warnings = warnings_of(settings(data_path=folder, corpus="own"), capsys)
        assert len(warnings) == bool(says)
        assert not says or f"fineweb_{split}_*.bin: {says} shards found" in warnings[0]


@fault(9)
def test_ranks_together_check_the_ids_of_every_shard(tmp_path: Path):
    for bad in range(5):
        parts = [[7, 1, 260 if i == bad else 259] for i in range(5)]
        stream = write_split(tmp_path / "d", parts)
        for world_size in (1, 2, 8):
            refused = []
            for rank in range(world_size):
                try:
                    stream.check(tg.Log(), tg.Ranks(rank, world_size))
                except tg.DataError as error:
                    refused.append(str(error))
            [text] = refused
            says = f"{bad:06d}.bin: token id 260 is not below VOCAB_SIZE=260; change DATA_PATH"
            assert says in text


@fault(9)
@pytest.mark.parametrize("split", ["train", "val"])
def test_ids_are_checked_before_a_run(tmp_path: Path, split: str):
    for name in ("train", "val"):
        write_split(tmp_path / "d", [byte_tokens(f"the text of {name} " * 99)], name)
    load(settings(data_path=tmp_path / "d"))
    write_split(tmp_path / "d", [byte_tokens("scored " * 99), [5] * 9, [5, 5, 261]], split)
    assert f"{split}_000002.bin: token id 261 is not below" in refused(data_path=tmp_path / "d")


@fault(12)
def test_a_folder_of_another_tokenizer_is_refused_by_its_name(tmp_path, byte_corpus):
    for name in ("fineweb10B_byte260", "byte", "my_shards", "wisp1024"):
        (tmp_path / name).symlink_to(byte_corpus)
        assert load(settings(data_path=tmp_path / name)).train
    for name in ("fineweb10B_sp1024", "fineweb10B_sp26", "fineweb10B_sp2600"):
        says = rf"DATA_PATH=.*{name}: its shards are not of VOCAB_SIZE=260;"
        with pytest.raises(tg.DataError, match=says):
            load(settings(data_path=tmp_path / name))


@fault(17)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["link", "symbolic link", "copy", "longer copy"])
def test_text_is_used_once(tmp_path: Path, split, kind):
    """Not trained on and scored, nor twice in one split."""
    folder, tokens = tmp_path / "d", [1, *range(4, 100)] * 20
    write_split(folder, [[1, *[5] * 100, 7], tokens], "val")
    write_split(folder, [[1, *[5] * 100, 8]], "train")  # begins alike, but differs
    first, second = folder / "fineweb_val_000001.bin", folder / f"fineweb_{split}_000002.bin"
    assert load(settings(data_path=folder))
    if kind == "link":
        second.hardlink_to(first)
    elif kind == "symbolic link":
        second.symlink_to(first)
    else:
        second.write_bytes(shard_bytes(tokens * (1 + (kind == "longer copy"))))
    says = f"{second}: the same tokens as {first}; remove one of them"
    assert refused(data_path=folder).startswith(says)


def test_paths_follow_corpus_and_vocabulary(text_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for corpus, vocabulary, name in (
        ("fineweb10B", 4096, "fineweb10B_sp4096"),
        ("python", 1024, "python_sp1024"),
        ("python", 260, "python_byte260"),
    ):
        says = f"DATA_PATH=data/datasets/{name}: no file matches fineweb_val_"
        assert refused(corpus=corpus, vocab_size=vocabulary).startswith(says)
    for corpus, name in (("fineweb10B", "fineweb_1024"), ("python", "python_1024")):
        says = refused(data_path=text_corpus["data_path"], corpus=corpus, vocab_size=1024)
        assert says.startswith(f"TOKENIZER_PATH=./data/tokenizers/{name}_bpe.model: ")


# ---- Bytes of text ----

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two leading spaces,   runs of spaces and\ta tab\n\n    def f(x):\n        return x\n",
    "naïve café, Ελληνικά, русский, 日本語, 🙂🙃 and ﬁ ligatures ½ …",
    "1234567890 3.14159 0x1F " * 4,
    "x",
    " ",
    "trailing space ",
]
IDENTITY = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "add_dummy_prefix": False,
}
NFKC = {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False}
KINDS = {
    "identity": IDENTITY,
    "challenge": {**NFKC, "byte_fallback": True},
    "dummy_prefix": {**IDENTITY, "add_dummy_prefix": True},
    "no_fallback": NFKC,
}


def train_tokenizer(path: Path, **options: object) -> sentencepiece.SentencePieceProcessor:
    """Trains a small SentencePiece model on TEXTS and writes it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The cat sat on the mat, the dog ran.", *TEXTS] * 20),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, **options},
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> sentencepiece.SentencePieceProcessor:
    return train_tokenizer(tmp_path_factory.mktemp("t") / "m.model", **KINDS[request.param])


def tokens_of(tokenizer: sentencepiece.SentencePieceProcessor, texts: list[str]) -> list[int]:
    """Documents as shards hold them, each behind a BOS."""
    return [t for text in texts for t in (1, *tokenizer.encode(text))]


def counted_bytes(table: tg.ByteTable, ids: list[int]) -> int:
    """The bytes that the table counts of one document."""
    return int(table.text_bytes(torch.tensor([1, *ids[:-1]]), torch.tensor(ids)).sum())


@fault(13)
def test_the_table_counts_the_bytes_of_decoded_text(tokenizer):
    table = tg.ByteTable.of_tokenizer(tokenizer)

    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        if ids and tokenizer.unk_id() not in ids:
            assert counted_bytes(table, ids) == len(tokenizer.decode(ids).encode())

    for text in TEXTS:
        check(text)
    no_marks = st.characters(exclude_characters="\u2581\0", exclude_categories=("Cs",))
    hypothesis_settings(max_examples=40, derandomize=True)(given(st.text(no_marks))(check))()


@fault(13)
def test_the_table_is_verified_against_decoded_text(tokenizer, monkeypatch):
    """A character that the last verified token cuts is no disagreement; a wrong table is one."""
    tokens = torch.tensor(tokens_of(tokenizer, TEXTS * 3)).int()
    table = tg.ByteTable.of_tokenizer(tokenizer)
    total = int(table.text_bytes(tokens[:-1], tokens[1:]).sum())
    assert tg.verify_byte_table(table, tokenizer, tokens) == total
    assert tg.verify_byte_table(table, tokenizer, torch.tensor([1, 1, 1, 2])) == 0
    one_more = (torch.arange(len(table.size)) == tokens[2]).short()
    for wrong in (
        table._replace(size=table.size + one_more),
        table._replace(space=1 - table.space),
    ):
        with pytest.raises(tg.DataError, match="use the tokenizer that made the shards"):
            tg.verify_byte_table(wrong, tokenizer, tokens)
    cut = torch.tensor(tokens_of(tokenizer, ["cat 日本語 cat", "the cat 日本語" * 9]))
    for length in range(len(cut) - 20, len(cut)):
        monkeypatch.setattr(tg, "PROOF_TOKENS", length)
        tg.verify_byte_table(table, tokenizer, cut)


def test_bytes_are_counted_as_one_and_specials_as_none(byte_corpus):
    ids, table = torch.arange(260), load(settings(data_path=byte_corpus)).val.table
    assert table.text_bytes(ids.roll(1), ids).tolist() == [0] * 4 + [1] * 256


# ---- A corpus of tokens ----


@pytest.fixture(scope="module")
def text_corpus(tmp_path_factory) -> dict[str, object]:
    """The settings of a corpus of tokens; the folder `no_bos` beside it has no BOS."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = train_tokenizer(folder / "m.model", **IDENTITY)
    ids = tokens_of(tokenizer, TEXTS * 9)
    write_split(folder / "d", [ids], "val")
    write_split(folder / "d", [ids[::-1]], "train")
    write_split(folder / "no_bos", [tokenizer.encode(TEXTS[0] * 9)], "val")
    return {
        "vocab_size": tokenizer.vocab_size(),
        "data_path": folder / "d",
        "tokenizer_path": folder / "m.model",
    }


def refused(trains: bool = True, **changes: object) -> str:
    """What is said of data that is refused."""
    with pytest.raises(tg.DataError) as error:
        load(settings(**changes), trains)
    return str(error.value)


def test_a_corpus_of_tokens_is_loaded(text_corpus, capsys):
    data = tg.load_data(settings(**text_corpus), tg.Ranks(), tg.Log())
    val = tg.TokenStream(text_corpus["data_path"], "val", 1024)
    assert data.val.tokens.tolist() == val.read(0, len(val)).tolist()
    total = data.val.table.text_bytes(data.val.tokens[:-1], data.val.tokens[1:]).sum()
    assert total == len("".join(TEXTS * 9).encode())
    shown = capsys.readouterr().out
    assert f"byte_table:proven against {total} bytes of decoded text" in shown
    assert "are unknown" not in shown


def test_unknown_validation_tokens_are_refused_or_warned_of(tmp_path: Path, capsys):
    """A tokenizer that does not cover the text counts 0 bytes for what it does not know."""
    tokenizer = train_tokenizer(tmp_path / "m.model", **NFKC)
    texts = [f"{TEXTS[0]} \u0539 dog"] * 7 + [TEXTS[0]] * 11
    tokens = tokens_of(tokenizer, texts)
    write_split(tmp_path / "d", [tokens], "val")
    write_split(tmp_path / "d", [tokens[::-1]])
    h = settings(
        vocab_size=tokenizer.vocab_size(),
        data_path=tmp_path / "d",
        tokenizer_path=tmp_path / "m.model",
        corpus="own",
    )
    says = f"7 of {len(tokens)} validation tokens are unknown to the tokenizer "
    with pytest.raises(tg.DataError, match=f"{says}.* raise MAX_UNKNOWN_FRACTION=0.005"):
        load(h)
    (warning,) = warnings_of(tg.replace(h, max_unknown_fraction=0.04), capsys)
    assert warning.startswith(f"warning: {says}")
    for unknown in (4, 6):  # of 1,000 bytes
        write_split(tmp_path / "b", [[1, *[tg.BYTE_UNKNOWN_ID] * unknown, *[9] * 994]], "val")
        write_split(tmp_path / "b", [[1, *[8] * 999]])
        h = settings(data_path=tmp_path / "b", corpus="own")
        if unknown == 4:
            assert "4 of " in warnings_of(h, capsys)[0]
        else:
            assert "6 of " in refused(data_path=tmp_path / "b")


@fault(10)
@pytest.mark.parametrize("name", ["none.model", "d", "cut"])
def test_a_file_that_is_no_tokenizer_is_refused_by_its_path(text_corpus, name):
    path = text_corpus["tokenizer_path"]
    (path.parent / "cut").write_bytes(path.read_bytes()[:-500])
    says = refused(**{**text_corpus, "tokenizer_path": path.parent / name})
    assert says.startswith(f"TOKENIZER_PATH={path.parent / name}: ")
    assert says.endswith("make or download it together with its shards")


@fault(11)
def test_a_tokenizer_of_another_size_is_refused_with_both(text_corpus):
    size = text_corpus["vocab_size"]
    says = refused(**{**text_corpus, "vocab_size": size + 1})
    found = f"TOKENIZER_PATH={text_corpus['tokenizer_path']}: it has {size} pieces"
    assert says == f"{found}, VOCAB_SIZE={size + 1}; change one"


def test_a_tokenizer_that_has_text_in_the_place_of_bos_is_refused(tmp_path, text_corpus):
    """The shards begin each document with id 1, which is no special token of this tokenizer."""
    path = tmp_path / "m.model"
    tokenizer = train_tokenizer(path, **IDENTITY, bos_id=-1, eos_id=-1)
    assert not tokenizer.is_control(1)
    changes = {"tokenizer_path": path, "vocab_size": tokenizer.vocab_size()}
    assert "no whole document follows a BOS" in refused(**{**text_corpus, **changes})


@fault(13)
def test_a_tokenizer_that_decodes_to_other_bytes_is_refused(tmp_path):
    """Its decoder writes each c twice, which no table of its pieces can know."""
    rules = tmp_path / "rules.tsv"
    rules.write_text("63\t63 63\n")
    options = {**IDENTITY, "denormalization_rule_tsv": str(rules)}
    tokenizer = train_tokenizer(tmp_path / "m.model", **options)
    write_split(tmp_path / "d", [tokens_of(tokenizer, TEXTS * 9)], "val")
    changes = {"data_path": tmp_path / "d", "tokenizer_path": tmp_path / "m.model"}
    says = refused(trains=False, **changes, vocab_size=tokenizer.vocab_size())
    assert "use the tokenizer that made the shards" in says


@fault(15)
@pytest.mark.parametrize("name", ["eval_seq_len", "train_seq_len"])
def test_validation_shorter_than_a_window_is_refused(text_corpus, name):
    tokens = len(tg.TokenStream(text_corpus["data_path"], "val", 1024))

    def changes(length: int) -> dict[str, object]:
        batch = 1024 if name == "eval_seq_len" else length
        return {**text_corpus, "train_batch_tokens": batch, name: length}

    assert load(settings(**changes(tokens - 1)))
    says = f"{tokens} validation tokens do not fill a window of {tokens}; lower EVAL_SEQ_LEN"
    assert says in refused(**changes(tokens))


@fault(14, 55)
def test_tokens_without_bos_cannot_be_verified(text_corpus):
    """The decoder's text is compared after a special token, so nothing of these is compared."""
    folder = text_corpus["data_path"].parent / "no_bos"
    says = refused(False, **{**text_corpus, "data_path": folder})
    assert "no whole document follows a BOS" in says


@fault(14)
@pytest.mark.parametrize("tokens", [[1] * 200, [0, 1, 2] * 50])
def test_validation_without_text_is_refused_before_training(tmp_path: Path, tokens):
    write_split(tmp_path / "d", [tokens], "val")
    assert "no text" in refused(trains=False, data_path=tmp_path / "d")


@fault(16)
def test_another_validation_text_is_warned_of_and_flagged(tmp_path, monkeypatch, capsys):
    """With the challenge's number scaled down to this text's."""
    size = 100_000
    monkeypatch.setattr(tg, "VAL_BYTES", size)
    older_export = 155_767_000 / 151_080_113
    for factor in (1 - 2e-4, 1 - 5e-5, 1, 1 + 5e-5, 1 + 2e-4, older_export):
        found = round(size * factor)
        write_split(tmp_path / "d", [[1] + [7] * found], "val")
        data = tg.load_data(settings(data_path=tmp_path / "d"), tg.Ranks(), tg.Log(), trains=False)
        assert data.val.canonical is (abs(factor - 1) < 1e-4)
        warning = f"warning: {found} bytes of validation text, not the challenge's"
        assert (warning in capsys.readouterr().out) is not data.val.canonical


def test_the_bytes_of_the_challenge_are_those_of_its_known_exports():
    """Bytes a token and tokens as logged for 1,024 pieces; the window cut off is below 2,048."""
    assert pytest.approx(62_021_632 * 2.43592, rel=1e-5) == tg.VAL_BYTES
    assert tg.VAL_BYTES == 151_130_112 - 49_999  # tokens of bytes less BOS
