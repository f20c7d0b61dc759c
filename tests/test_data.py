"""Data: the shard format both ways, the endless stream, bytes against decoded text."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import settings, shard_bytes
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg


def test_a_shard_of_the_description_is_read(tmp_path: Path):
	tokens = [1, 5, 65_535, 0, 260]
	path = tmp_path / "shard.bin"
	path.write_bytes(shard_bytes(tokens))
	assert tg.read_shard(path).tolist() == tokens


GOOD = shard_bytes([1, 2, 3, 4])


@pytest.mark.parametrize(
	("blob", "says"),
	[
		(b"", "no whole shard"),
		(GOOD[:500], "500 bytes, but 4 tokens need 1032"),
		(GOOD[:-1], "1031 bytes, but 4 tokens need 1032"),
		(GOOD + b"x", "1033 bytes, but 4 tokens need 1032"),
		(struct.pack("<i", 7) + GOOD[4:], "magic 7"),
		(GOOD[:4] + struct.pack("<i", 2) + GOOD[8:], "version 2"),
		(GOOD[:8] + struct.pack("<i", 0) + GOOD[12:], "0 tokens"),
		(GOOD[:8] + struct.pack("<i", -4) + GOOD[12:], "-4 tokens"),
		(GOOD[:8] + struct.pack("<i", 2**31 - 1) + GOOD[12:], "2147483647 tokens"),
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
	h = settings()
	stream = tg.TokenStream(byte_corpus, "train", 260)
	tokens = stream.read(0, 3 * h.train_batch_tokens + 1)
	for step in (2, 0, 1):  # no step depends on another
		x, y = stream.batch(step, h)
		at = step * h.train_batch_tokens
		assert x.shape == y.shape == (16, 64)
		assert torch.equal(x.flatten(), tokens[at : at + 1024])
		assert torch.equal(y.flatten(), tokens[at + 1 : at + 1025])


def test_no_shards_names_the_setting_and_the_remedy(tmp_path: Path):
	with pytest.raises(tg.DataError, match=r"DATA_PATH=.*fineweb_train_.*prepare\.py"):
		tg.TokenStream(tmp_path, "train", 260)


def test_an_id_outside_the_vocabulary_names_shard_and_id(tmp_path: Path):
	stream = make_split(tmp_path / "d", [[1, 2, 3], [4, 700, 5]])
	assert stream.read(0, 3).tolist() == [1, 2, 3]
	with pytest.raises(tg.DataError, match=r"000001\.bin: token id 700 is outside VOCAB_SIZE=260"):
		stream.read(0, 6)


@pytest.mark.parametrize(("micro", "parts"), [(10**9, 1), (512, 2), (500, 4), (64, 16), (1, 16)])
def test_a_step_is_cut_into_equal_parts(micro: int, parts: int):
	assert tg.micro_batches(settings(micro_batch_tokens=micro)) == parts


def test_default_steps_are_cut_as_on_eight_gpus():
	assert tg.micro_batches(tg.Hyperparameters()) == 8


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
	return int(table.count(torch.tensor([1, *ids[:-1]]), torch.tensor(ids)).sum())


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


def test_the_proof_accepts_what_fits_and_refuses_what_does_not(tokenizer):
	tokens = torch.tensor([t for text in TEXTS * 3 for t in (1, *tokenizer.encode(text))]).int()
	table = tg.ByteTable.of_tokenizer(tokenizer)
	total = int(table.count(tokens[:-1], tokens[1:]).sum())
	assert tg.prove_byte_table(table, tokenizer, tokens) == total
	for wrong in (
		table._replace(size=table.size + (torch.arange(len(table.size)) == int(tokens[2])).short()),
		table._replace(space=1 - table.space),
	):
		with pytest.raises(tg.DataError, match="no bpb of these data"):
			tg.prove_byte_table(wrong, tokenizer, tokens)


def test_nothing_is_proven_where_there_is_no_text(tokenizer):
	table = tg.ByteTable.of_tokenizer(tokenizer)
	assert tg.prove_byte_table(table, tokenizer, torch.tensor([1, 1, 1, 2])) == 0


def test_the_proof_ends_with_a_whole_run(tokenizer, monkeypatch):
	"""A character cut by the end of the proof's tokens is no disagreement."""
	ids = [1, *tokenizer.encode("cat 日本語 cat"), 1, *tokenizer.encode("the cat 日本語" * 9)]
	table = tg.ByteTable.of_tokenizer(tokenizer)
	for length in range(len(ids) - 20, len(ids)):
		monkeypatch.setattr(tg, "PROOF_TOKENS", length)
		tg.prove_byte_table(table, tokenizer, torch.tensor(ids))


def test_bytes_are_counted_as_one_and_specials_as_none():
	table = tg.ByteTable.of_bytes()
	ids = torch.arange(260)
	assert table.count(ids.roll(1), ids).tolist() == [0] * 4 + [1] * 256


def test_loading_checks_tokenizer_and_data(tmp_path: Path, capsys):
	tokenizer = train_tokenizer(tmp_path, "m.model", **KINDS["identity"])
	size = tokenizer.vocab_size()
	ids = [t for text in TEXTS * 9 for t in (1, *tokenizer.encode(text))]
	make_split(tmp_path / "d", [ids], "val")
	make_split(tmp_path / "d", [ids], "train")
	make_split(tmp_path / "no_bos", [tokenizer.encode(TEXTS[0] * 9)], "val")
	h = settings(vocab_size=size, data_path=tmp_path / "d", tokenizer_path=tmp_path / "m.model")
	data = tg.load_data(h, tg.Log())
	assert data.val.tolist() == ids
	assert "byte_table:proven" in capsys.readouterr().out

	for change, says in (
		({"tokenizer_path": tmp_path / "none.model"}, "fetch it with its data"),
		({"tokenizer_path": tmp_path / "d/fineweb_val_000000.bin"}, "fetch it with its data"),
		({"vocab_size": size + 1}, f"{size} pieces, VOCAB_SIZE={size + 1}"),
		({"eval_seq_len": 10**6}, "lower EVAL_SEQ_LEN"),
		({"data_path": tmp_path / "no_bos"}, "no text that follows BOS"),
	):
		env = {
			"vocab_size": size,
			"data_path": tmp_path / "d",
			"tokenizer_path": tmp_path / "m.model",
		}
		with pytest.raises(tg.DataError) as error:
			tg.load_data(settings(**{**env, **change}), tg.Log())
		assert says in str(error.value)


@pytest.mark.parametrize("tokens", [[1] * 200, [0, 1, 2, 3] * 50])
def test_validation_without_text_is_refused_before_training(tmp_path: Path, tokens):
	make_split(tmp_path / "d", [tokens], "val")
	make_split(tmp_path / "d", [tokens], "train")
	with pytest.raises(tg.DataError, match="no text"):
		tg.load_data(settings(data_path=tmp_path / "d"), tg.Log())


def test_what_is_trained_on_is_not_scored(tmp_path: Path):
	make_split(tmp_path / "d", [[1, *range(4, 100)]], "val")
	(tmp_path / "d/fineweb_train_000000.bin").hardlink_to(tmp_path / "d/fineweb_val_000000.bin")
	with pytest.raises(tg.DataError, match="cannot be scored"):
		tg.load_data(settings(data_path=tmp_path / "d"), tg.Log())


def test_unknown_text_is_said(tmp_path: Path, capsys):
	tokenizer = train_tokenizer(tmp_path, "m.model", **KINDS["no_fallback"])
	ids = [t for text in [*TEXTS * 9, "\u2603 snowman"] for t in (1, *tokenizer.encode(text))]
	unknown = ids.count(tokenizer.unk_id())
	assert unknown
	for split in ("val", "train"):
		make_split(tmp_path / "d", [ids], split)
	h = settings(
		vocab_size=tokenizer.vocab_size(),
		data_path=tmp_path / "d",
		tokenizer_path=tmp_path / "m.model",
	)
	tg.load_data(h, tg.Log())
	assert f"warning: {unknown} validation tokens are unknown text" in capsys.readouterr().out


def test_reading_maps_the_file_and_copies_nothing(tmp_path: Path):
	path = tmp_path / "large.bin"
	count = 50_000_000
	with open(path, "wb") as file:
		file.write(np.array([tg.SHARD_MAGIC, 1, count] + [0] * 253, "<i4").tobytes())
		os.truncate(file.fileno(), 1024 + 2 * count)
	assert isinstance(tg.read_shard(path), np.memmap)
