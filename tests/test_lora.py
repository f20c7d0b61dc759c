"""Scores by document, and adapters that learn from what is scored of a document (LoRA)."""

import math
import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import BYTE_TABLE, ROOT, artifact_of, score, score_artifact, settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from launch import Ranks
from test_evaluate import CPU
from test_model import OFF, ON, random_model, some_ids
from test_ranks import exact_scores

import train_gpt as tg

sys.path.insert(0, str(ROOT / "records"))

import by_position

WINDOW, CHUNK = 32, 8
SIZES = {"eval_seq_len": WINDOW, "eval_stride": CHUNK, "ttt_chunk_size": CHUNK, "ttt_batch_size": 4}
LORA = SIZES | {"num_layers": 2, "ttt_enabled": 1, "ttt_mode": "lora", "ttt_lora_rank": 3}
FAST = LORA | {"ttt_lora_lr": 0.01}
# Of 20 documents. The window ends some of them, chunks end others.
LENGTHS = (5, 70, 1, 33, 32, 8, 9, 40, 17, 64, 2, 24, 31, 50, 12, 16, 3, 45, 28, 20)
KINDS = pytest.mark.parametrize("adapts", [False, True])


def text_of(*lengths: int, seed: int = 4) -> torch.Tensor:
    """Documents of so many tokens, and the BOS after them."""
    ids = some_ids(sum(lengths) + 1, seed=seed)
    ids[0] = tg.BOS_ID
    ids[torch.tensor(lengths).cumsum(0)] = tg.BOS_ID
    return ids


class Recorder:
    """Log-probabilities of each position of a text [N + 1], as the windows of a pass score them.

    Windows are found by their tokens. They score the first positions of their last ones that are
    not scored yet, up to the end of the document.
    """

    def __init__(self, given: tg.ScoringPass, text: torch.Tensor) -> None:
        self.given, self.text = given, text
        starts = [0, *((text[1:-1] == tg.BOS_ID).nonzero().flatten() + 1).tolist(), len(text) - 1]
        self.starts, self.found = starts, torch.full((len(text) - 1, 260), math.nan).double()

    def forward_logits(self, ids: torch.Tensor, last: int) -> torch.Tensor:
        """Records the logits of a batch."""
        logits = self.given.forward_logits(ids, last)
        padded = F.pad(self.text, (0, ids.size(1)), value=int(self.text[-1]))
        for row, of_row in zip(ids, logits, strict=True):
            places = (padded.unfold(0, len(row), 1) == row).all(1).nonzero().flatten().tolist()
            (start,) = places[:1]
            first, end = start + len(row) - last, start + len(row)
            begin = max(n for n in self.starts if n <= start)
            end = min(end, min(n for n in self.starts if n > start))
            assert start == begin or first - start == WINDOW - CHUNK  # all that the window allows
            assert self.found[first:end].isnan().all()
            self.found[first:end] = of_row.detach().double().log_softmax(-1)[: end - first]
        return logits

    def score(self) -> torch.Tensor:
        """Scores the text; returns the log-probabilities, which must give the score."""
        val = tg.Validation(self.text.int(), BYTE_TABLE, canonical=False)
        result = score(self.given._replace(forward_logits=self.forward_logits), val, CPU, 128)
        want = -self.found.gather(1, self.text[1:, None]).sum().item()
        assert result.nats == pytest.approx(want, rel=1e-6)
        return self.found


def documents_pass(
    model: tg.GPT, h: tg.Hyperparameters, adapts: bool, device: tg.Device = CPU
) -> tg.ScoringPass:
    """The pass over documents, with adapters or without."""
    if adapts:
        return tg.with_adapters(model, h, device, tg.Ranks(), tg.Log(silent=True))
    return tg.by_document(model, h, device)


def recorded(model: tg.GPT, h: tg.Hyperparameters, text: torch.Tensor, adapts: bool):
    """Log-probabilities [N, 260] of every position by the pass over documents."""
    return Recorder(documents_pass(model, h, adapts), text).score()


@hypothesis_settings(max_examples=60, derandomize=True, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12).filter(lambda n: sum(n) > 1),
    first=st.sampled_from([CHUNK, 5, WINDOW]),
    stride=st.sampled_from([CHUNK, 5, WINDOW]),
    rows=st.integers(1, 5),
)
def test_every_position_is_scored_once_with_the_context_of_its_document(
    lengths, first, stride, rows
):
    text, scored = text_of(*lengths), []
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for batch in tg.plan_documents(text, WINDOW, first, stride, rows):
        assert len(batch.windows) <= rows
        for start, skip, count in batch.windows.tolist():
            begin = max(n for n in bounds if n <= start)
            at = start + batch.seq_len - batch.last + skip
            assert start == begin or at - start == WINDOW - stride
            assert at + count <= min(n for n in bounds if n > start)
            assert 0 < count <= batch.last <= batch.seq_len <= WINDOW
            scored += range(at, at + count)
    assert sorted(scored) == [*range(len(text) - 1)]


@KINDS
@pytest.mark.parametrize("features", [ON, OFF], ids=["on", "off"])
def test_no_distribution_depends_on_its_token_a_later_one_or_another_document(adapts, features):
    """Bit for bit; with adapters, tokens in the window or not change later ones by what is learned.

    No adapter learns from a token before its score: the distribution at a position is the same
    whatever the tokens after it are, also those of its chunk and of the documents beside it.
    """
    more = {"bos_mask": 1, "loop_start": 1, "loop_end": 1, "num_layers": 3}
    model = random_model(**features | FAST | more)
    h = settings(**features | FAST | more)
    text = text_of(50, 7, 48, 45)
    before = recorded(model, h, text, adapts)
    torch.testing.assert_close(before.logsumexp(-1), torch.zeros(150).double())
    for t in (1, 8, 49, 60, 149):
        other = text.clone()
        other[t] = 4 + (other[t] + 77) % 256
        same = (before == recorded(model, h, other, adapts)).all(1)
        end = next(n for n in (50, 57, 105, 150) if t < n)
        assert same[:t].all(), t  # position t - 1 predicts token t
        assert same[end:].all(), t
        assert not same[t]
        if t == 1:
            assert same[34:50].all() == (not adapts)


def test_a_bos_more_changes_nothing_before_it():
    """The documents are then others, in other batches; scores differ by rounding alone."""
    model, h, text = random_model(**FAST), settings(**FAST), text_of(50, 7, 48, 45)
    before, other = recorded(model, h, text, True), text.clone()
    other[80] = tg.BOS_ID
    after = recorded(model, h, other, True)
    torch.testing.assert_close(after[:80], before[:80], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after[105:], before[105:], atol=1e-4, rtol=1e-4)


def test_adapters_that_do_not_learn_change_no_bit():
    """And the score is that of the documents in windows."""
    model, text = random_model(**LORA), text_of(*LENGTHS)
    h = settings(**LORA, ttt_lora_lr=0)
    given, batches = documents_pass(model, h, adapts=True), []

    def both(ids: torch.Tensor, last: int) -> torch.Tensor:
        logits = given.forward_logits(ids, last)
        batches.append(len(ids))
        assert torch.equal(logits, model.forward_logits(ids, last, WINDOW))
        return logits

    learned = Recorder(given._replace(forward_logits=both), text).score()
    assert max(batches) == 4
    plain = recorded(model, h, text, adapts=False)
    torch.testing.assert_close(learned, plain, atol=1e-5, rtol=0)
    nats = [-x.gather(1, text[1:, None]).mean().item() for x in (learned, plain)]
    assert nats[0] == pytest.approx(nats[1], abs=1e-6)


# ---- A slow reference ----


class Slow(torch.nn.Module):
    """A model that learns one document at a time, in float64, from the definitions.

    Keys and head have the weight W + s B A. Maps beside the attention and the MLP add s B A x times
    the scale of the module's output. AdamW is written out.
    """

    def __init__(self, model: tg.GPT, h: tg.Hyperparameters) -> None:
        super().__init__()
        self.model, self.h, self.factor = model.requires_grad_(False), h, 144 / h.ttt_lora_rank
        self.merged = [f"model.blocks.{n}.attn.c_k.weight" for n in range(h.num_layers)]
        self.merged.append("model.lm_head.weight")
        for block in model.blocks:
            block.attn.register_forward_hook(self.add_beside)
            block.mlp.register_forward_hook(self.add_beside)

    def add_beside(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor):
        """Returns the output of a module with that of its adapter."""
        a, b = self.beside[module]
        return output + inputs[1] * self.factor * F.linear(F.linear(inputs[0], a), b)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the logits [T, 260] of a sequence."""
        return self.model.forward_logits(ids[None], window=self.h.window_tokens)[0].double()

    def learn(self, document: torch.Tensor) -> torch.Tensor:
        """Returns the nats [n] of a document [n + 1]."""
        h, found = self.h, []
        draws = torch.Generator().manual_seed(h.seed)

        def pair(fan_out: int) -> list[torch.Tensor]:
            a = torch.empty(h.ttt_lora_rank, h.model_dim).uniform_(-1, 1, generator=draws)
            a = (a / h.model_dim**0.5).double()
            b = torch.zeros(fan_out, h.ttt_lora_rank).double()
            return [a.requires_grad_(), b.requires_grad_()]

        weights, self.beside = [], {}
        for block in self.model.blocks:
            weights.append(pair(h.kv_dim))
            self.beside |= {module: pair(h.model_dim) for module in (block.attn, block.mlp)}
        weights.append(pair(h.vocab_size))
        params = [p for pair in (*weights, *self.beside.values()) for p in pair]
        squares = [torch.zeros_like(p) for p in params]
        for begin in range(0, len(document) - 1, h.ttt_chunk_size):
            end = min(begin + h.ttt_chunk_size, len(document) - 1)
            start = max(0, begin + h.ttt_chunk_size - h.window_tokens)
            own = dict(self.named_parameters())
            changed = {
                name: own[name] + self.factor * b @ a
                for name, (a, b) in zip(self.merged, weights, strict=True)
            }
            # The JEPA head needs its whole last chunk.
            ids = F.pad(document, (0, WINDOW), value=7)[start : begin + h.ttt_chunk_size]
            logits = torch.func.functional_call(self, changed, (ids,))[begin - start : end - start]
            nats = F.cross_entropy(logits, document[begin + 1 : end + 1], reduction="none")
            found.append(nats.detach())
            for p, square, g in zip(
                params, squares, torch.autograd.grad(nats.mean(), params), strict=True
            ):
                square.mul_(h.ttt_beta2).add_((1 - h.ttt_beta2) * g * g)
                mean = square / (1 - h.ttt_beta2 ** len(found))
                p.data.mul_(1 - h.ttt_lora_lr * h.ttt_weight_decay)
                p.data.sub_(h.ttt_lora_lr * g / (mean.sqrt() + 1e-10))
        return torch.cat(found)


@pytest.fixture
def in_float64(monkeypatch) -> Iterator[None]:
    """Makes whatever a test computes float64, also what the model would round."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("features", [OFF, ON], ids=["off", "on"])
def test_adapters_equal_a_document_at_a_time(features, in_float64):
    """All nats of 20 documents in batches of 4; so no document influences another."""
    values = features | LORA | {"bos_mask": 1, "tie_embeddings": 0, "num_layers": 3}
    values |= {"loop_start": 1, "loop_end": 1, "ttt_weight_decay": 3.0, "ttt_lora_lr": 0.003}
    h, text = settings(**values), text_of(*LENGTHS)
    model, slow = (random_model(torch.float64, **values) for _ in range(2))
    found = -recorded(model, h, text, adapts=True).gather(1, text[1:, None]).flatten()
    learner = Slow(slow, h)
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    alone = torch.cat([learner.learn(text[a : b + 1]) for a, b in pairwise([0, *ends])])
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)
    plain = -recorded(model, h, text, adapts=False).gather(1, text[1:, None]).flatten()
    torch.testing.assert_close(found[:CHUNK], plain[:CHUNK])
    assert (found - plain).abs().max() > 0.01


# ---- SGD on the first documents ----

PHASED = LORA | {"phased_ttt_prefix_docs": 7, "global_ttt_chunk_tokens": 70, "global_ttt_lr": 0.3}
# Two whole batches, the first to be scored. Their last chunk is not whole.
EIGHT = sorted(range(20), key=lambda n: -LENGTHS[n])[:8]


def spans() -> list[slice]:
    """The positions of each document."""
    return [slice(a, b) for a, b in pairwise([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])]


def test_documents_after_the_first_ones_meet_a_trained_model(in_float64):
    """The steps are those of a loop with torch's own SGD and clipping; adapters do not learn."""
    values = PHASED | {"ttt_lora_lr": 0.0, "global_ttt_epochs": 2, "doc_attention": 1}
    h, text = settings(**values), text_of(*LENGTHS)
    model, slow = (random_model(torch.float64, **values) for _ in range(2))
    before = recorded(slow.requires_grad_(False), h, text, adapts=False)
    found = recorded(model, h, text, adapts=True)

    stream = torch.cat([text[spans()[n]] for n in sorted(EIGHT)] + [torch.tensor([tg.BOS_ID])])
    sgd = torch.optim.SGD(slow.requires_grad_(True).parameters(), momentum=0.9)
    for n in range(5):  # 365 tokens, of which 5 chunks have two windows each
        sgd.param_groups[0]["lr"] = 0.15 * (1 + math.cos(math.pi * n / 5))
        inputs, targets = (stream[70 * n + k : 70 * n + k + 64].view(2, WINDOW) for k in (0, 1))
        for _ in range(2):
            sgd.zero_grad()
            slow(inputs, targets).backward()
            torch.nn.utils.clip_grad_norm_(slow.parameters(), 1.0)
            sgd.step()
    after = recorded(slow.requires_grad_(False), h, text, adapts=False)
    for n, span in enumerate(spans()):
        want = before if n in EIGHT else after
        torch.testing.assert_close(found[span], want[span], atol=1e-6, rtol=0)
    assert (after - before).abs().max() > 0.1
    assert not any(p.requires_grad for p in model.parameters())


def test_documents_that_are_all_of_the_text_train_nothing():
    def after(documents: int) -> torch.Tensor:
        h = settings(**PHASED | {"phased_ttt_prefix_docs": documents})
        return recorded(random_model(**PHASED), h, text_of(*LENGTHS), adapts=True)

    assert torch.equal(after(20), after(0))
    assert not torch.equal(after(16), after(0))


def test_training_on_the_first_documents_reaches_later_ones_only():
    """A token of theirs changes the scores of others after them; one of the others never does."""
    values = PHASED | {"ttt_lora_lr": 0.01}
    h, text = settings(**values), text_of(*LENGTHS)
    before = recorded(random_model(**values), h, text, adapts=True)
    for changed in (EIGHT[0], EIGHT[7], next(n for n in range(20) if LENGTHS[n] == 24)):
        other = text.clone()
        t = spans()[changed].start + 1
        other[t] = 4 + (other[t] + 77) % 256
        same = (before == recorded(random_model(**values), h, other, adapts=True)).all(1)
        for n, span in enumerate(spans()):
            if n != changed:
                assert same[span].all() == (n in EIGHT or changed not in EIGHT), n
        assert same[t - 1]


# ---- Runs ----


def test_the_scores_of_an_artifact(tmp_path):
    """What the log says before and after, with the expected time of a slow pass."""
    path, text = tmp_path / "artifact", text_of(*LENGTHS)
    path.write_bytes(artifact_of(random_model(**LORA))[0])
    val = tg.Validation(text.int(), BYTE_TABLE, False)
    sgd = {"phased_ttt_prefix_docs": 4, "global_ttt_chunk_tokens": 100}
    h = settings(**LORA, **sgd, eval_documents=1)
    found = score_artifact(path, h, val, CPU, tg.Log(tmp_path))
    assert list(found) == ["plain", "sliding", "documents", "ttt"]
    assert {of["tokens"] for of in found.values()} == {len(text) - 1}
    assert found["ttt"]["stride"] == CHUNK
    assert 0 < abs(found["ttt"]["nats"] - found["documents"]["nats"]) < 10
    log = (tmp_path / "train.log").read_text()
    for line in (
        f"final_int6_documents_exact val_loss:{found['documents']['val_loss']:.8f} ",
        f"legal_ttt_exact val_loss:{found['ttt']['val_loss']:.8f} ",
        "ttt_sgd after:4 documents gradient and momentum:0 MiB",
        "ttt_lora documents:20 batches:5 adapters:0 MiB",
        "ttt_sgd documents:4 tokens:229 chunks:2",
    ):
        assert f"\n{line}" in log
    assert re.search(r"\nttt_lora expected_time:\d+s of 600.0s\n", log)


def test_three_ranks_give_the_score_of_one(byte_corpus, tmp_path, capsys):
    """Whatever documents a rank takes."""
    (tmp_path / "artifact").write_bytes(artifact_of(random_model(num_layers=2))[0])
    command = ["--eval", str(tmp_path / "artifact")]
    sgd = {"phased_ttt_prefix_docs": 4, "global_ttt_lr": 0.1, "global_ttt_chunk_tokens": 32}
    env = {name.upper(): str(value) for name, value in (FAST | sgd).items()}
    env |= {"DATA_PATH": str(byte_corpus), "EVAL_DOCUMENTS": "1", "EVAL_STRIDE": "0"}
    assert tg.main(command, env) == 0
    one = exact_scores(capsys.readouterr().out)
    assert tg.main(command, env | {"PHASED_TTT_PREFIX_DOCS": "0"}) == 0
    without = exact_scores(capsys.readouterr().out)["legal_ttt"]
    assert abs(one["legal_ttt"][0] - without[0]) > 1e-3
    ranks = Ranks(tmp_path, *command, world=3, **env)
    assert ranks.end() == [0] * 3, ranks.said()
    assert one["legal_ttt"] != one["final_int6_documents"]
    for name, values in exact_scores(ranks.said()).items():
        assert values == pytest.approx(one[name], abs=1e-5 if name == "legal_ttt" else 2e-7), name


@pytest.mark.parametrize("rate", [0.03, 0.0])
def test_the_gain_by_position(rate, byte_corpus, tmp_path, capsys, monkeypatch):
    """Its sums are the scores of equal context; adapters that do not learn gain nothing."""
    (tmp_path / "artifact").write_bytes(artifact_of(random_model(num_layers=2))[0])
    values = FAST | {"eval_seq_len": 8, "eval_stride": 4, "ttt_chunk_size": 4, "ttt_lora_lr": rate}
    env = {name.upper(): str(value) for name, value in values.items()}
    env |= {"DATA_PATH": str(byte_corpus), "EVAL_DOCUMENTS": "1"}
    assert tg.main(["--eval", str(tmp_path / "artifact")], env) == 0
    want = exact_scores(capsys.readouterr().out)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "gain.png"
    assert by_position.main([str(tmp_path / "artifact"), "--out", str(out)]) == 0
    rows = {}
    for line in capsys.readouterr().out.replace(",", "").splitlines():
        name, *cells = (cell.strip(" %") for cell in line.strip("│ ").split("│"))
        if len(cells) == 5:
            rows[name] = [float(cell) for cell in cells]
    for name, column in (("final_int6_documents", 1), ("legal_ttt", 2)):
        assert rows["all"][column] == pytest.approx(want[name][1], abs=6e-5)
    assert all((abs(row[3]) < 0.01) == (rate == 0) for row in rows.values() if row[0])
    assert sum(row[0] for name, row in rows.items() if name != "all") == rows["all"][0]
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapts", "sgd_after", "most"), [(False, 0, 4), (True, 0, 3), (True, 7, 4)]
)
def test_documents_of_all_lengths_share_few_programs(adapts, sgd_after, most, monkeypatch):
    """And the compiled programs give the same score. SGD adds one, and changes none."""
    values = PHASED | FAST | {"phased_ttt_prefix_docs": sgd_after}
    h, text = settings(**values), text_of(*LENGTHS)
    val = tg.Validation(text.int(), BYTE_TABLE, canonical=False)
    compiled, programs = [], []

    def compile_(function: Callable, dynamic: bool = False) -> Callable:
        compiled.append(dynamic)

        def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
            programs.append(graph)
            return graph

        return torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)

    want = score(documents_pass(random_model(**values), h, adapts), val, CPU)
    device = tg.replace(CPU, compiled=True)
    monkeypatch.setattr(tg.Device, "compile", lambda _, *given, **how: compile_(*given, **how))
    torch.compiler.reset()
    found = score(documents_pass(random_model(**values), h, adapts, device), val, device)
    assert found.nats == pytest.approx(want.nats, rel=1e-6)
    assert compiled == [False] * (sgd_after > 0) + [True]
    assert 1 < len(programs) <= most
