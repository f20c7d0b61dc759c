"""Several ranks: the gradients, losses, weights and scores of one, and decisions made as one."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, settings
from launch import PROGRAM, Ranks, free_port, result_of, torchrun

import train_gpt as tg

WORLDS = (1, 2, 3, 4)
# 12 sequences a step: whole for each of these numbers of ranks.
SETTINGS = {
    **TINY,
    "TRAIN_BATCH_TOKENS": str(12 * 64),
    "ITERATIONS": "50",
    "GPTQ_ENABLED": "1",
    "GPTQ_CALIB_TOKENS": "640",
    "RUN_DIR": "run",
}

# Each rank writes its first gradient, at the end a checksum of its weights with its seconds of
# training, and all scores of one artifact.
SPY = """
import hashlib
step, train, finish, folder = tg.Optimizers.step, tg.Trainer.train, tg.Run.train, Path(".")

def first_gradient(self, phase):
    path = folder / f"gradient{RANK}.pt"
    if not path.exists():
        torch.save(self.gradient, path)
    step(self, phase)

def weighed(self, *arguments):
    train(self, *arguments)
    digest = hashlib.sha256()
    for p in (*self.average.params.values(), *self.average.weights.values()):
        digest.update(p.numpy().tobytes())
    seconds = f"{self.clock.elapsed} {self.step_log.times}"
    (folder / f"weights{RANK}").write_text(f"{digest.hexdigest()} {seconds}")

def scored(self):
    finish(self)
    scores = {}
    self.h, self.log = tg.replace(self.h, ttt_enabled=True, eval_window=24), tg.Log()
    self.score_artifact(Path(os.environ["ARTIFACT"]), scores)
    (folder / f"scores{RANK}.json").write_text(tg.json.dumps(scores))

tg.Optimizers.step, tg.Trainer.train, tg.Run.train = first_gradient, weighed, scored
"""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, byte_corpus) -> dict[int, Path]:
    """Folders of the same run by different numbers of ranks; all score the first one's artifact."""
    folders = {world: tmp_path_factory.mktemp(f"ranks{world}") for world in WORLDS}
    artifact = folders[1] / "run/final_model.int6.ptz"
    for world, folder in folders.items():
        env = {**SETTINGS, "DATA_PATH": byte_corpus, "ARTIFACT": artifact}
        ranks = Ranks(folder, world=world, first=SPY, **env)
        assert ranks.end(150) == [0] * world, ranks.said()
    return folders


def equal_runs(one: dict, other: dict) -> None:
    """Compares 50 losses and the scores that follow from them, within 0.002."""
    assert len(one["train_losses"]) == 50
    assert other["train_losses"] == pytest.approx(one["train_losses"], abs=2e-3)
    for kind in ("float", "plain", "sliding"):
        assert other["scores"][kind]["val_bpb"] == pytest.approx(
            one["scores"][kind]["val_bpb"], abs=2e-3
        )
    assert other["bytes"]["code"] == one["bytes"]["code"]


@pytest.mark.fault(23)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_any_number_of_ranks_learns_what_one_does(worlds, world):
    """Three too, which do not divide 8."""
    one, some = (torch.load(worlds[w] / "gradient0.pt") for w in (1, world))
    assert (some - one).norm() < 1e-5 * one.norm()
    for rank in range(world):
        assert torch.equal(torch.load(worlds[world] / f"gradient{rank}.pt"), some)
    equal_runs(*(result_of(worlds[w] / "run") for w in (1, world)))


@pytest.mark.parametrize("world", WORLDS[1:])
def test_weights_and_clock_are_the_same_on_all_ranks(worlds, world):
    found = [(worlds[world] / f"weights{r}").read_text().split(" ")[:2] for r in range(world)]
    assert found == [found[0]] * world


@pytest.mark.parametrize("world", WORLDS[1:])
def test_an_artifact_has_the_same_score_on_any_number_of_ranks(worlds, world):
    one = json.loads((worlds[1] / "scores0.json").read_text())
    assert one.keys() == {"plain", "sliding", "window", "ttt"}
    for rank in range(world):
        some = json.loads((worlds[world] / f"scores{rank}.json").read_text())
        for kind, score in some.items():
            # ttt trains; attention with a mask depends on the number of threads in its last digits.
            near = {"ttt": 1e-4, "window": 1e-7}.get(kind, 1e-9)
            for name in ("val_loss", "val_bpb", "nats"):
                assert score[name] == pytest.approx(one[kind][name], rel=near, abs=near)
            assert (score["tokens"], score["bytes"]) == (one[kind]["tokens"], one[kind]["bytes"])


def test_one_rank_writes_the_files_and_the_lines(worlds):
    folders = [{path.name for path in (worlds[w] / "run").iterdir()} for w in WORLDS]
    assert folders == [folders[0]] * 4
    screen = (worlds[4] / "screen0").read_text()
    assert screen.startswith((worlds[4] / "run/train.log").read_text()[:200])
    assert screen.count("step:1/50 ") == screen.count("model_params:") == 1


def test_eval_of_two_ranks_says_what_one_does(worlds, byte_corpus, tmp_path):
    artifact, env = str(worlds[1] / "run/final_model.int6.ptz"), {"DATA_PATH": byte_corpus}
    env |= {"EVAL_STRIDE": 32, "VAL_BATCH_SIZE": 8192}
    ranks = Ranks(tmp_path, "--eval", artifact, world=2, **env)
    assert ranks.end() == [0, 0], ranks.said()
    exact = [line for line in ranks.said().splitlines() if "_exact" in line]
    first = (worlds[1] / "run/train.log").read_text().splitlines()
    assert exact == [line for line in first if "final" in line and "_exact" in line]


# Muon and every quantizer on stacks, divided among the ranks and by one alone.
DIVIDED = """
import torch.distributed as dist
dist.init_process_group("gloo")
ranks = tg.Ranks(dist.get_rank(), dist.get_world_size())
draw = torch.Generator().manual_seed(0)

def odd(x, y):
    return (x > 0)[:, 0, 0], x > 0, (x * 9).to(torch.int8), x.half(), x.half().sum(1), x.double()

for n in (1, 2, 3, 5, 7, 8):
    x = torch.randn(n, 6, 4, generator=draw)
    inputs = torch.randn(n, 9, 4, generator=draw)
    hessian = inputs.mT @ inputs
    quantizers = [tg.partial(quantize, 6, 1.0) for quantize in tg.QUANTIZERS.values()]
    for function, stacks in (
        (odd, (x, None)),
        *((quantize, (x, hessian)) for quantize in quantizers),
        (tg.partial(tg.quantize_rounding, 6, 1.0), (x, None)),
        (lambda g: [tg.newton_schulz(g, 5)], (x,)),
    ):
        alone, divided = function(*stacks), ranks.map_over_ranks(function, *stacks)
        assert len(alone) == len(divided)
        for one, part in zip(alone, divided):
            assert (one.dtype, one.shape) == (part.dtype, part.shape)
            torch.testing.assert_close(part, one, rtol=1e-6, atol=1e-6)
print("all equal", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("world", WORLDS[1:])
def test_work_divided_among_ranks_equals_what_one_computes(world, tmp_path):
    """Stacks that the ranks do not divide, None among them, outputs of every dtype."""
    ranks = Ranks(tmp_path, world=world, first=DIVIDED)
    assert ranks.end() == [0] * world, ranks.said()
    assert ranks.said().count("all equal") == world


def test_one_rank_alone_divides_nothing():
    calls = []
    (out,) = tg.Ranks().map_over_ranks(lambda *x: calls.append(x) or [x[0]], torch.ones(3), None)
    assert out.sum() == 3
    assert len(calls) == 1
    assert len(calls[0][0]) == 3


def test_collectives_of_one_rank_return_their_inputs():
    ranks, tensor = tg.Ranks(), torch.arange(3.0)
    assert ranks.all_reduce_(tensor) is tensor
    assert tensor.tolist() == [0, 1, 2]
    assert ranks.all_reduce_max(3, 0.5, True) == [3, 0.5, 1]
    assert ranks.broadcast_from_rank0(lambda: "made") == "made"
    ranks.all_reduce_max(0.0)


# Every collective once, by several ranks.
COLLECTIVES = """
import torch.distributed as dist
dist.init_process_group("gloo")
ranks = tg.Ranks(dist.get_rank(), dist.get_world_size())
world, made = ranks.world_size, []
assert ranks.all_reduce_(torch.tensor([1.0, RANK])).tolist() == [world, sum(range(world))]
assert ranks.all_reduce_max(RANK, -RANK, RANK == 1) == [world - 1, 0, 1]
assert ranks.broadcast_from_rank0(lambda: made.append(RANK) or f"by {RANK}") == "by 0"
assert made == [0] * (RANK == 0)
time.sleep(0.3 * (RANK == 1))
Path(f"came{RANK}").touch()
ranks.all_reduce_max(0.0)
assert len(list(Path().glob("came*"))) == world
print("all hold", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("world", (2, 3))
def test_collectives_of_several_ranks(world, tmp_path):
    ranks = Ranks(tmp_path, world=world, first=COLLECTIVES)
    assert ranks.end() == [0] * world, ranks.said()
    assert ranks.said().count("all hold") == world


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("tokens", "world", "legal"), [(1024, 3, 960), (1088, 3, 1152), (64, 2, 128), (640, 4, 512)]
)
def test_a_batch_that_the_ranks_cannot_divide_is_refused(tokens, world, legal):
    """By one line, which names the nearest legal value."""
    says = f"TRAIN_BATCH_TOKENS={tokens}: must be a multiple of TRAIN_SEQ_LEN=64 x {world} ranks"
    with pytest.raises(tg.SettingsError, match=f"^{says}, such as {legal}$"):
        tg.check_settings(settings(train_batch_tokens=tokens), world)
    tg.check_settings(settings(train_batch_tokens=legal), world)


@pytest.mark.fault(22)
def test_ranks_that_cannot_divide_the_batch_end_before_any_file(tmp_path, byte_corpus):
    env = {**TINY, "DATA_PATH": byte_corpus, "RUN_DIR": "run"}
    ranks = Ranks(tmp_path, world=3, **env)
    assert ranks.end() == [2, 2, 2]
    said = (
        "error: rank 0: TRAIN_BATCH_TOKENS=1024: must be a multiple of TRAIN_SEQ_LEN=64 x 3 ranks"
    )
    assert said in ranks.said()
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


@pytest.mark.fault(24)
def test_more_ranks_than_gpus_are_an_error_that_torchrun_shows(tmp_path):
    """In the file where torchrun looks for the error of a rank."""
    env = {**TINY, "RANK": 2, "LOCAL_RANK": 2, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1"}
    env |= {"TORCHELASTIC_ERROR_FILE": tmp_path / "told.json", "MASTER_PORT": free_port()}
    ranks = Ranks(tmp_path, first="torch.cuda.device_count = lambda: 2", **env)
    assert ranks.end() == [2]
    told = json.loads((tmp_path / "told.json").read_text())["message"]["message"]
    assert told.endswith("LOCAL_RANK=2: this machine has 2 GPUs; lower --nproc_per_node")
    assert ranks.said() == ""  # of a rank but the first


@pytest.mark.parametrize(("gpus", "backend"), [(0, "gloo"), (2, "cpu:gloo,cuda:nccl")])
def test_tensors_on_a_cpu_travel_by_gloo_with_gpus_too(gpus, backend, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(tg.dist, "init_process_group", asked.append)
    monkeypatch.setattr(tg.dist, "new_group", lambda **how: asked.append(how["backend"]))
    monkeypatch.setattr(tg.threading.Thread, "start", lambda _: None)
    monkeypatch.setattr(tg.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(tg.dist, "get_world_size", lambda: 2)
    env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    assert tg.join_ranks(env, lambda: None) == tg.Ranks(1, 2)
    assert asked == [1] * (gpus > 0) + [backend, "gloo"]


@pytest.mark.parametrize("env", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_joins_no_group(env):
    assert tg.join_ranks(env, lambda: pytest.fail("lost")) == tg.Ranks()
    assert not tg.dist.is_initialized()


# Rank 1 is slow, has another learning rate and draws other initial weights.
SLOW = """
take_step, init = tg.Trainer.take_step, tg.GPT.__init__
if RANK == 1:
    os.environ["MATRIX_LR"] = "0.3"

def drawn(self, *arguments):
    init(self, *arguments)
    if RANK == 1 and not self.tok_emb.weight.is_meta:
        self.tok_emb.weight.data.mul_(2)

def slower(self, *arguments):
    time.sleep(0.06 * (RANK == 1))
    return take_step(self, *arguments)

tg.GPT.__init__, tg.Trainer.take_step = drawn, slower
"""


@pytest.mark.fault(25, 48)
def test_ranks_that_differ_go_as_one(tmp_path, byte_corpus):
    """Rank 0 gives weights and settings; the slowest decides stops and checkpoints."""
    env = {**SETTINGS, "DATA_PATH": byte_corpus, "ITERATIONS": 100_000, "CHECKPOINT_EVERY": "1s"}
    env |= {"MAX_WALLCLOCK_SECONDS": 3, "EVAL_STRIDE": 0, "ARTIFACT": "run/final_model.int6.ptz"}
    env |= {"JEPA_CHUNK_SIZE": 4, "WARMDOWN_ITERS": 15}
    ranks = Ranks(tmp_path, world=2, first=SLOW + SPY, **env)
    assert ranks.end() == [0, 0], ranks.said()
    found = [(tmp_path / f"weights{rank}").read_text().split(" ", 2) for rank in range(2)]
    assert found[0][:2] == found[1][:2]
    assert found[0][2].count(",") == found[1][2].count(",")
    result = result_of(tmp_path / "run")
    assert 5 < result["steps"] < 3 / 0.06
    assert result["seconds"]["train"] < 3
    assert result["verdicts"]["train_seconds"] == "PASS"
    assert "stopping_early: wallclock_cap" in ranks.said()
    assert ranks.said().count("bytes in checkpoint.safetensors") == 2


@pytest.mark.slow
def test_two_nodes_of_two_ranks_are_four_ranks(worlds, byte_corpus, tmp_path):
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
    equal_runs(result_of(worlds[1] / "run"), result_of(tmp_path / "run"))
    four = result_of(worlds[4] / "run")
    scores = result_of(tmp_path / "run")["scores"]
    assert scores["float"]["nats"] == pytest.approx(four["scores"]["float"]["nats"], rel=1e-9)
