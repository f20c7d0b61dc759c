"""Several ranks: the gradients, losses, weights and scores of one, and decisions made as one."""

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, quantize_matrices
from launch import (
    PROGRAM,
    QUICK,
    Ranks,
    advance_clock,
    before_call,
    free_port,
    rank,
    result_of,
    torchrun,
)
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as tg

# 12 sequences a step: whole for 1, 2, 3 and 4 ranks.
SETTINGS = {
    **QUICK,
    "TRAIN_BATCH_TOKENS": str(12 * 64),
    "ITERATIONS": "8",
    "WARMDOWN_ITERS": "4",
    "EVAL_STRIDE": "48",
    "GPTQ_ENABLED": "1",
    "GPTQ_CALIB_TOKENS": "640",
    "RUN_DIR": "run",
    # Repeated layers, two lanes, gates.
    "NUM_LOOPS": "1",
    "LOOP_START": "0",
    "LOOP_END": "0",
    "PARALLEL_START_LAYER": "1",
    "SKIP_GATES_ENABLED": "1",
    "SPARSE_ATTN_GATE_ENABLED": "1",
    "MUON_ROW_NORMALIZE": "1",
    # What divides the quantizing among the ranks.
    "QUANTIZER": "trellis",
    "SENSITIVITY_TOKENS": "192",
    "TUNE_SCALES": "3",
}
# By default three ranks, which do not divide the work evenly.
WORLDS = [3, *(pytest.param(world, marks=pytest.mark.slow) for world in (2, 4))]


def record() -> None:
    """Writes this rank's first gradient, and its weights and clock after training."""

    def first_step(call: int, optimizers: tg.Optimizers, _: tg.Phase) -> None:
        if call == 1:
            torch.save(optimizers.gradient, f"gradient{rank()}.pt")

    def after_training(_: int, trainer: tg.Trainer, loops: int) -> None:
        digest = hashlib.sha256()
        for p in (*trainer.average.params.values(), *trainer.average.weights.values()):
            digest.update(p.numpy().tobytes())
        clock, steps = trainer.step_log.elapsed, len(trainer.step_log.seconds)
        Path(f"end{rank()}").write_text(f"{digest.hexdigest()} {clock} {steps}")

    before_call("Optimizers.step", first_step)
    before_call("Trainer.validate", after_training)


@pytest.fixture(scope="module")
def run_by(tmp_path_factory, byte_corpus) -> Callable[[int], Path]:
    """A function that returns the folder of the same run by so many ranks."""

    @functools.cache
    def run(world: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        ranks = Ranks(folder, world=world, first=record, **SETTINGS, DATA_PATH=byte_corpus)
        assert ranks.end(150) == [0] * world, ranks.said()
        return folder

    return run


def assert_equal_runs(one: dict, other: dict) -> None:
    """Compares the losses and the scores that follow from them, within 0.002."""
    assert len(one["train_losses"]) == 8
    assert other["train_losses"] == pytest.approx(one["train_losses"], abs=2e-3)
    for kind in ("float", "plain", "sliding"):
        bpb = one["scores"][kind]["val_bpb"]
        assert other["scores"][kind]["val_bpb"] == pytest.approx(bpb, abs=2e-3)
    assert other["bytes"]["code"] == one["bytes"]["code"]


@pytest.mark.fault(23)
@pytest.mark.parametrize("world", WORLDS)
def test_any_number_of_ranks_learns_what_one_does(world, run_by):
    """One of them writes the files and the lines."""
    alone, folder = run_by(1), run_by(world)
    one = torch.load(alone / "gradient0.pt")
    some = [torch.load(folder / f"gradient{number}.pt") for number in range(world)]
    assert (some[0] - one).norm() < 1e-5 * one.norm()
    assert all(torch.equal(gradient, some[0]) for gradient in some)
    ends = {(folder / f"end{number}").read_text() for number in range(world)}
    assert len(ends) == 1  # the weights and the clock are the same on all ranks
    assert_equal_runs(result_of(alone / "run"), result_of(folder / "run"))
    written, expected = ({path.name for path in (at / "run").iterdir()} for at in (folder, alone))
    assert written == expected
    screen = (folder / "screen0").read_text()
    assert screen.startswith((folder / "run/train.log").read_text()[:200])
    assert screen.count("step:1/8 ") == screen.count("model_params:") == 1


def exact_scores(text: str) -> dict[str, list[float]]:
    """Returns loss and bpb by the names of their lines."""
    found = re.findall(r"^(\w+)_exact val_loss:(\S+) val_bpb:(\S+)$", text, re.MULTILINE)
    return {name: [float(loss), float(bpb)] for name, loss, bpb in found}


@pytest.mark.parametrize("world", WORLDS)
def test_an_artifact_has_the_same_score_on_any_number_of_ranks(
    world, run_by, byte_corpus, tmp_path, capsys
):
    command = ["--eval", str(run_by(1) / "run/final_model.int6.ptz")]
    env = {"DATA_PATH": str(byte_corpus), "EVAL_STRIDE": "48", "VAL_BATCH_SIZE": "8192"}
    env |= {"EVAL_WINDOW": "24", "EVAL_DOCUMENTS": "1"}
    env |= {"TTT_ENABLED": "1", "TTT_CHUNK_TOKENS": "1024"}
    assert tg.main(command, env) == 0
    one = exact_scores(capsys.readouterr().out)
    ranks = Ranks(tmp_path, *command, world=world, **env)
    assert ranks.end() == [0] * world, ranks.said()
    some = exact_scores(ranks.said())
    assert some.keys() == one.keys()
    assert len(one) == 6  # plain, sliding, window, documents, test-time training, the last again
    for name, values in one.items():
        trains = name in ("legal_ttt", "final_int8_zlib_roundtrip")
        assert some[name] == pytest.approx(values, abs=1e-3 if trains else 2e-7), name
    first = exact_scores((run_by(1) / "run/train.log").read_text())
    for name in ("final_int6_roundtrip", "final_int6_sliding_window"):
        assert one[name] == pytest.approx(first[name], abs=2e-7)


# ---- Collectives ----


# Functions of a stack whose outputs have every dtype, and other shapes.
ODD = (
    lambda x: (x > 0)[:, 0, 0],
    lambda x: x > 0,
    lambda x: (x * 9).to(torch.int8),
    lambda x: x.half().sum(1),
    lambda x: x.double(),
    lambda x: tg.newton_schulz(x, 5),
)


def search(method: Callable[..., tg.Quantized], *stacks: torch.Tensor) -> torch.Tensor:
    """The scales of matrices by a search."""
    return tg.search_scales(functools.partial(method, tg.QUANTIZERS["scalar"], 31), 31, *stacks)


def quantize_codes(
    method: str, quantizer: str, weight: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """The codes of matrices alone."""
    return quantize_matrices(method, weight, hessian, quantizer=quantizer)[0]


def collectives() -> None:
    """Calls every collective once, and divides work among the ranks, in place of the program."""
    dist.init_process_group("gloo")
    ranks = tg.Ranks(dist.get_rank(), dist.get_world_size())
    world, own, made = ranks.world_size, ranks.rank, []
    assert ranks.all_reduce_(torch.tensor([1.0, own])).tolist() == [world, sum(range(world))]
    assert ranks.all_reduce_max(own, -own, own == 1) == [world - 1, 0, 1]
    assert ranks.broadcast_from_rank0(lambda: made.append(own) or f"by {own}") == "by 0"
    assert made == [0] * (own == 0)
    draw = torch.Generator().manual_seed(0)
    methods = (tg.quantize_rounding, tg.quantize_gptq)
    quantizers = [functools.partial(search, method) for method in methods]
    quantizers += [
        functools.partial(quantize_codes, method, quantizer)
        for method in ("rounding", "gptq")
        for quantizer in tg.QUANTIZERS
    ]
    for n in (1, 2, 3, 5, 8):
        x = torch.randn(n, 6, 4, generator=draw)
        inputs = torch.randn(n, 9, 4, generator=draw)
        jobs = [(quantize, (x, inputs.mT @ inputs)) for quantize in quantizers]
        jobs += [(quantizers[0], (x, x[:, :0])), *((function, (x,)) for function in ODD)]
        for function, stacks in jobs:
            whole, part = function(*stacks), ranks.map_over_ranks(function, *stacks)
            assert (whole.dtype, whole.shape) == (part.dtype, part.shape)
            torch.testing.assert_close(part, whole, rtol=1e-6, atol=1e-6)
    print("all hold", flush=True)
    os._exit(0)


@pytest.mark.parametrize("world", WORLDS)
def test_collectives_and_work_divided_among_ranks(world, tmp_path):
    """Stacks that the ranks do not divide, one without elements, outputs of every dtype."""
    ranks = Ranks(tmp_path, world=world, first=collectives)
    assert ranks.end() == [0] * world, ranks.said()
    assert ranks.said().count("all hold") == world


class Operations(TorchDispatchMode):
    """Notes the operations of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        self.names.append(str(function))
        return function(*arguments, **(named or {}))


def test_dividing_work_copies_nothing_from_the_cpu(monkeypatch):
    """Such a copy would wait for the GPU, for which a device without data stands here."""
    for name in ("all_gather_into_tensor", "all_gather_single"):  # as torch calls it
        monkeypatch.setattr(dist, name, lambda *_, **__: None, raising=False)
    stack = torch.empty(3, 4, device="meta")
    with Operations() as operations:
        out = tg.Ranks(1, 2).map_over_ranks(lambda x: x, stack)
    assert (out.shape, out.device) == (stack.shape, stack.device)
    assert operations.names
    assert not [name for name in operations.names if "copy" in name]


def test_collectives_of_one_rank_return_their_inputs():
    ranks, tensor, calls = tg.Ranks(), torch.arange(3.0), []
    assert ranks.all_reduce_(tensor) is tensor
    assert tensor.tolist() == [0, 1, 2]
    assert ranks.all_reduce_max(3, 0.5, True) == [3, 0.5, 1]
    assert ranks.broadcast_from_rank0(lambda: "made") == "made"
    out = ranks.map_over_ranks(lambda x: calls.append(x) or x, tensor)
    assert out.tolist() == [0, 1, 2]
    assert len(calls) == 1


# ---- Settings and torchrun's variables ----


@pytest.mark.fault(22)
def test_ranks_that_cannot_divide_the_batch_end_before_any_file(tmp_path, byte_corpus):
    ranks = Ranks(tmp_path, world=3, **TINY, DATA_PATH=byte_corpus, RUN_DIR="run")
    assert ranks.end() == [2, 2, 2]
    assert "error: rank 0: TRAIN_BATCH_TOKENS=1024: must be a multiple of " in ranks.said()
    assert not (tmp_path / "run").exists()


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    "given", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}]
)
def test_half_of_torchruns_variables_are_an_error(given, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert tg.main([], {**TINY, **given}) == 2
    told = capsys.readouterr().out
    assert "expected, but not set; launch several processes with torchrun" in told
    assert not list(tmp_path.iterdir())


def wait_briefly() -> None:
    """Gives the ranks little time to find each other."""
    tg.JOIN_TIMEOUT = tg.timedelta(seconds=2)


@pytest.mark.fault(24, 48)
@pytest.mark.parametrize(
    "wrong",
    [
        {"MASTER_PORT": "abc"},
        {"MASTER_PORT": "99999"},
        {"WORLD_SIZE": "two"},
        {"MASTER_ADDR": "no.such.host.invalid"},
        {},  # the address is right, but the other rank never starts
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_ranks_that_find_no_group_end_with_their_variables(number, wrong, tmp_path):
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"RANK": str(number), **wrong}
    alone = Ranks(tmp_path, first=wait_briefly, **TINY, **env)
    assert alone.end() == [2]
    line = alone.said().splitlines()[-1]
    assert line.startswith("error: ")
    assert line.endswith("; launch several processes with torchrun")
    assert all(f"{name}={value}" in line for name, value in env.items())


@pytest.mark.fault(24)
def test_more_ranks_than_gpus_are_an_error_that_torchrun_shows(tmp_path, monkeypatch, capsys):
    """In the file where torchrun looks for the error of a rank."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "told.json"))
    env = {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "none"}
    assert tg.main([], {**TINY, **env}) == 2
    told = json.loads((tmp_path / "told.json").read_text())["message"]["message"]
    assert "LOCAL_RANK=2" in told
    assert "this machine has 2 GPUs; lower --nproc_per_node" in told
    assert capsys.readouterr().out == ""  # of a rank but the first


@pytest.mark.parametrize("env", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_joins_no_group(env):
    assert tg.join_ranks(env, lambda: pytest.fail("lost")) == tg.Ranks()
    assert not dist.is_initialized()


def test_tensors_on_a_cpu_travel_by_gloo_where_there_are_gpus(monkeypatch):
    backends = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr(dist, "new_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    assert tg.join_ranks(env, lambda: None) == tg.Ranks(1, 2)
    assert backends == ["cpu:gloo,cuda:nccl", "gloo"]


def differ() -> None:
    """Makes rank 1 slow, with another learning rate and other initial weights."""
    record()
    advance_clock(lambda _: 60.0 if rank() == 1 else 10.0)
    if rank() == 1:
        os.environ["MATRIX_LR"] = "0.3"
        manual_seed = torch.manual_seed
        torch.manual_seed = lambda seed: manual_seed(seed + 1)


@pytest.mark.fault(25, 48)
def test_ranks_that_differ_agree_on_weights_settings_and_stops(tmp_path, byte_corpus):
    """Rank 0 gives weights and settings; the slowest decides stops and checkpoints."""
    env = {**SETTINGS, "DATA_PATH": byte_corpus, "ITERATIONS": 100, "CHECKPOINT_EVERY": "200s"}
    env |= {"MAX_WALLCLOCK_SECONDS": 500, "EVAL_STRIDE": 0, "GPTQ_ENABLED": 0}
    ranks = Ranks(tmp_path, world=2, first=differ, **env)
    assert ranks.end() == [0, 0], ranks.said()
    assert (tmp_path / "end0").read_text() == (tmp_path / "end1").read_text()
    result = result_of(tmp_path / "run")
    assert (result["steps"], result["seconds"]["train"]) == (8, 480.0)
    assert result["verdicts"]["train_seconds"] == "PASS"
    assert "stopping_early: wallclock_cap" in ranks.said()
    assert ranks.said().count("bytes in checkpoint.safetensors") >= 1


def read_elsewhere() -> None:
    """Gives rank 1 another working directory."""
    if rank() == 1:
        os.chdir("other")


@pytest.mark.parametrize("split", ["train", "val"])
def test_ranks_that_see_different_shards_end_before_training(split, tmp_path, byte_corpus):
    for folder in ("data", "other/data"):
        shutil.copytree(byte_corpus, tmp_path / folder)
    shard = next((tmp_path / "other" / "data").glob(f"fineweb_{split}_*.bin"))
    tokens = tg.read_shard(shard)[:-1]
    shard.write_bytes(tg.shard_header(len(tokens)) + tokens.tobytes())
    ranks = Ranks(tmp_path, world=2, first=read_elsewhere, **SETTINGS, DATA_PATH="data")
    assert ranks.end() == [2, 2], ranks.said()
    assert f"data/fineweb_{split}_*.bin: ranks see different shards" in ranks.said()
    assert "step:" not in ranks.said()


@pytest.mark.slow
def test_two_nodes_of_two_ranks_are_four_ranks(run_by, byte_corpus, tmp_path):
    how = ["--nnodes=2", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-id=test"]
    how += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    env = {**SETTINGS, "DATA_PATH": byte_corpus, "RUN_DIR": tmp_path / "run"}
    nodes = [tmp_path / "a", tmp_path / "b"]
    for node in nodes:
        node.mkdir()
    agents = [torchrun(node, PROGRAM, *how, **env) for node in nodes]
    assert [agent.wait(200) for agent in agents] == [0, 0], [
        (node / "screen.txt").read_text() for node in nodes
    ]
    assert_equal_runs(result_of(run_by(1) / "run"), result_of(tmp_path / "run"))
    four, scores = result_of(run_by(4) / "run"), result_of(tmp_path / "run")["scores"]
    nats = four["scores"]["float"]["nats"]
    assert scores["float"]["nats"] == pytest.approx(nats, rel=1e-9)
