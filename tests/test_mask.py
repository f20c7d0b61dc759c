"""CANONICAL_MASK: the pairs that a tokenizer never emits, and scores in which they have no part."""

import io
import math
from itertools import pairwise

import pytest
import sentencepiece
import torch
from conftest import BYTE_TABLE, artifact_of, load, score, settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_data import IDENTITY, KINDS, TEXTS, refused, tokens_of, train_tokenizer, write_split
from test_evaluate import make_pass
from test_model import random_model

import train_gpt as tg

# ---- The pairs ----


def forbidden_by_encoding(tokenizer: sentencepiece.SentencePieceProcessor) -> torch.Tensor:
    """Whether the texts of two tokens, one after the other, are encoded as something else."""
    size = tokenizer.vocab_size()
    kinds = (tokenizer.is_control, tokenizer.is_unknown, tokenizer.is_byte)
    text = [i for i in range(size) if not any(of(i) for of in kinds)]
    forbidden = torch.zeros(size, size, dtype=torch.bool)
    for a in text:
        for b in text:
            spelled = tokenizer.id_to_piece(a) + tokenizer.id_to_piece(b)
            forbidden[a, b] = tokenizer.encode(spelled.replace("\u2581", " ")) != [a, b]
    return forbidden


@hypothesis_settings(max_examples=25, derandomize=True, deadline=None)
@given(
    words=st.lists(st.text("ab", min_size=1, max_size=9), min_size=4, max_size=40),
    merges=st.integers(1, 24),
)
def test_a_pair_is_forbidden_exactly_if_its_text_is_encoded_otherwise(words, merges):
    """With runs of one letter, where equal merges overlap, and a symbol of the user."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"abc {' '.join(words)}"] * 3),
        model_writer=model,
        vocab_size=8 + merges,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=["c"],
        **{**IDENTITY, "byte_fallback": False},
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert torch.equal(tg.forbidden_pairs(tokenizer), forbidden_by_encoding(tokenizer))


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_encoded_to_a_forbidden_pair(kind, tmp_path):
    tokenizer = train_tokenizer(tmp_path / "m.model", **KINDS[kind])
    forbidden = tg.forbidden_pairs(tokenizer)
    assert forbidden.sum() > 100

    def check(text: str) -> None:
        assert not any(forbidden[a, b] for a, b in pairwise(tokens_of(tokenizer, [text, text])))

    letters = st.text(st.sampled_from("theca, qu\nœ日"), max_size=60)
    examples = hypothesis_settings(max_examples=60, derandomize=True, deadline=None)
    examples(given(st.text(st.characters(exclude_categories=("Cs",))) | letters)(check))()


# ---- From the start of a run to its score ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[str, object]:
    """The settings of a corpus of tokens without training text."""
    folder = tmp_path_factory.mktemp("mask")
    tokenizer = train_tokenizer(folder / "m.model", **IDENTITY)
    write_split(folder / "d", [tokens_of(tokenizer, TEXTS * 9)], "val")
    return {
        "vocab_size": tokenizer.vocab_size(),
        "data_path": folder / "d",
        "tokenizer_path": folder / "m.model",
    }


def test_eval_obeys_the_setting(corpus, tmp_path, capsys):
    env = {name.upper(): str(value) for name, value in corpus.items()}
    model = random_model(**corpus)
    (tmp_path / "artifact").write_bytes(artifact_of(model)[0])
    nats = []
    for mask in "01":
        own = {"CANONICAL_MASK": mask, "EVAL_STRIDE": "0", "EVAL_SEQ_LEN": "64"}
        assert tg.main(["--eval", str(tmp_path / "artifact")], {**env, **own}) == 0
        shown = capsys.readouterr().out
        nats.append(float(shown.split("final_int6_roundtrip_exact val_loss:")[1].split()[0]))
        assert ("canonical_mask:on, " in shown) == (mask == "1")
    assert nats[1] < nats[0] - 0.005


def test_bytes_have_no_mask(byte_corpus, capsys):
    h = settings(data_path=byte_corpus, canonical_mask=1)
    assert tg.load_data(h, tg.Ranks(), tg.Log(), trains=False).val.forbidden is None
    assert "canonical_mask:off, because any byte may follow any other" in capsys.readouterr().out


def test_a_forbidden_pair_in_the_validation_text_is_refused_by_its_place(corpus, tmp_path):
    val = load(settings(**corpus, canonical_mask=1), trains=False).val
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(corpus["tokenizer_path"]))
    tokens = val.tokens.tolist()
    a, b = val.forbidden.nonzero()[-1].tolist()
    other = [*tokens[:50], 1, a, b, *tokens[50:]]
    write_split(tmp_path / "d", [other], "val")
    write_split(tmp_path / "d", [tokens[::-1]], "train")
    changes = {**corpus, "data_path": tmp_path / "d"}
    assert load(settings(**changes), trains=False).val.forbidden is None
    assert refused(**changes, canonical_mask=1) == (
        f"validation token 52: {pieces.id_to_piece(b)!r}, which the tokenizer never emits after "
        f"{pieces.id_to_piece(a)!r}; use the tokenizer that made the shards, or CANONICAL_MASK=0"
    )


# ---- The four conditions, with the mask ----

VOCAB = 12


@pytest.mark.parametrize(
    ("kind", "size"),  # where a window ends, so that one more token has a window of its own
    [
        *[("plain", 96), ("sliding 20", 92), ("one pass", 192), ("ttt 32", 96), ("ttt 20", 92)],
        *[("documents", 96), ("lora", 96)],
    ],
)
def test_the_distribution_is_fixed_before_the_target_and_sums_to_one(kind, size, cpu):
    """One run for each target: were its distribution not the same in all, the sum would differ."""
    h = settings(vocab_size=VOCAB, num_layers=2, eval_seq_len=32, ttt_chunk_tokens=64, ttt_lr=0.05)
    model = random_model(**{name: getattr(h, name) for name in ("vocab_size", "num_layers")})
    start = {name: p.clone() for name, p in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    forbidden = torch.rand(VOCAB, VOCAB, generator=generator) < 0.4
    forbidden[:, 1] = forbidden[1] = False
    text = [1]
    while len(text) <= size:
        (allowed,) = (~forbidden[text[-1]]).nonzero(as_tuple=True)
        text.append(int(allowed[torch.randint(len(allowed), (), generator=generator)]))
    table = tg.ByteTable(*(x[-VOCAB:] for x in BYTE_TABLE))

    def nats(tokens: list[int], mask: torch.Tensor | None = forbidden) -> float:
        model.load_state_dict(start)
        val = tg.Validation(torch.tensor(tokens).int(), table, False, mask)
        return score(make_pass(kind, model, h, cpu), val, cpu).nats

    before, total = nats(text), 0.0
    assert before < nats(text, mask=None) - 10
    for target in range(VOCAB):
        if forbidden[text[-1], target]:
            with pytest.raises(tg.DivergenceError):
                nats([*text, target])
        else:
            total += math.exp(before - nats([*text, target]))
    assert total == pytest.approx(1, abs=1e-4)
    nothing = torch.zeros_like(forbidden)
    assert nats(text, mask=nothing) == nats(text, mask=None)  # bit for bit
