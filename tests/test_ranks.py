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

# Each rank keeps its first gradient and, of the end, a checksum of its weights and all scores of
# one artifact.
SPY = """
import hashlib
step, run, score, folder = tg.Optimizers.step, tg.run, tg.score_artifact, Path(".")

def first_gradient(self, n, scale):
	if n == 0:
		torch.save(self.gradient, folder / f"gradient{RANK}.pt")
	step(self, n, scale)

def weighed(model, *rest):
	clock, average = train(model, *rest)
	digest = hashlib.sha256()
	for p in (*average.params, *average.weights.values()):
		digest.update(p.numpy().tobytes())
	(folder / f"weights{RANK}").write_text(f"{digest.hexdigest()} {clock.elapsed} {clock.times}")
	return clock, average

def scored(h, rt, data, log):
	result = run(h, rt, data, log)
	artifact = Path(os.environ["ARTIFACT"])
	scores = score(artifact, tg.replace(h, ttt_enabled=True, eval_window=24), rt, data, tg.Log())
	told = {kind: s._asdict() for kind, s in scores.items()}
	(folder / f"scores{RANK}.json").write_text(tg.json.dumps(told))
	return result

train, tg.train, tg.run, tg.Optimizers.step = tg.train, weighed, scored, first_gradient
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
    """50 losses within 0.002, and scores that tell of it."""
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
            # ttt trains; attention under a mask is summed in another order by another thread count.
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


# Muon, GPTQ and rounding of stacks, each shared out by ranks and by one alone.
SHARED = """
import torch.distributed as dist
dist.init_process_group("gloo")
world, draw = dist.get_world_size(), torch.Generator().manual_seed(0)

def odd(x, y):
	return (x > 0)[:, 0, 0], x > 0, (x * 9).to(torch.int8), x.half(), x.half().sum(1), x.double()

for n in (1, 2, 3, 5, 7, 8):
	x = torch.randn(n, 6, 4, generator=draw)
	inputs = torch.randn(n, 9, 4, generator=draw)
	hessian, how = inputs.mT @ inputs, {"bits": 6, "widen": 1.0}
	for function, stacks in (
		(odd, (x, None)),
		(tg.partial(tg.round_rows, **how), (x, None)),
		(tg.partial(tg.gptq, **how), (x, hessian)),
		(lambda g: [tg.newton_schulz(g, 5)], (x,)),
	):
		alone, shared = function(*stacks), tg.shared_out(function, *stacks)
		assert len(alone) == len(shared)
		for one, part in zip(alone, shared):
			assert (one.dtype, one.shape) == (part.dtype, part.shape)
			torch.testing.assert_close(part, one, rtol=1e-6, atol=1e-6)
print("all equal", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("world", WORLDS[1:])
def test_what_is_shared_out_equals_what_one_computes(world, tmp_path):
    """Stacks that the ranks do not divide, None among them, outputs of every type."""
    ranks = Ranks(tmp_path, world=world, first=SHARED)
    assert ranks.end() == [0] * world, ranks.said()
    assert ranks.said().count("all equal") == world


def test_one_rank_alone_shares_nothing_out():
    calls = []
    assert tg.shared_out(lambda *x: calls.append(x) or [x[0]], torch.ones(3), None)[0].sum() == 3
    assert len(calls) == 1
    assert len(calls[0][0]) == 3


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("tokens", "world", "legal"), [(1024, 3, 960), (1088, 3, 1152), (64, 2, 128), (640, 4, 512)]
)
def test_a_batch_that_the_ranks_cannot_divide_is_refused(tokens, world, legal):
    """By one line, which names the nearest that is legal."""
    says = f"TRAIN_BATCH_TOKENS={tokens} must be a multiple of TRAIN_SEQ_LEN=64 x {world} ranks"
    with pytest.raises(tg.SettingsError, match=f"^{says}, as {legal}$"):
        tg.check_settings(settings(train_batch_tokens=tokens), world)
    tg.check_settings(settings(train_batch_tokens=legal), world)


@pytest.mark.fault(22)
def test_ranks_that_cannot_divide_the_batch_end_before_any_file(tmp_path, byte_corpus):
    env = {**TINY, "DATA_PATH": byte_corpus, "RUN_DIR": "run"}
    ranks = Ranks(tmp_path, world=3, **env)
    assert ranks.end() == [2, 2, 2]
    said = "error: rank 0: TRAIN_BATCH_TOKENS=1024 must be a multiple of TRAIN_SEQ_LEN=64 x 3 ranks"
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
    assert "expected, but not set; launch several processes by torchrun" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(24)
def test_more_ranks_than_gpus_are_an_error_that_torchrun_shows(tmp_path):
    """By the file in which it looks for what a rank that failed has to say."""
    env = {**TINY, "RANK": 2, "LOCAL_RANK": 2, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1"}
    env |= {"TORCHELASTIC_ERROR_FILE": tmp_path / "told.json", "MASTER_PORT": free_port()}
    ranks = Ranks(tmp_path, first="torch.cuda.device_count = lambda: 2", **env)
    assert ranks.end() == [2]
    told = json.loads((tmp_path / "told.json").read_text())["message"]["message"]
    assert told.endswith("LOCAL_RANK=2: 2 GPUs are here; lower --nproc_per_node")
    assert ranks.said() == ""  # of a rank but the first


@pytest.mark.parametrize(("gpus", "backend"), [(0, "gloo"), (2, "cpu:gloo,cuda:nccl")])
def test_what_lies_on_a_cpu_travels_by_gloo_with_gpus_too(gpus, backend, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(tg.dist, "init_process_group", asked.append)
    monkeypatch.setattr(tg.dist, "new_group", lambda **how: asked.append(how["backend"]))
    monkeypatch.setattr(tg.threading.Thread, "start", lambda _: None)
    tg.join_ranks({"LOCAL_RANK": "1"}, lambda: None)
    assert asked == [1] * (gpus > 0) + [backend, "gloo"]


# The second is slow, was told another rate and draws other initial weights.
SLOW = """
taken, slept, init = tg.train_step, 0.06 * (RANK == 1), tg.GPT.__init__
if RANK == 1:
	os.environ["MATRIX_LR"] = "0.3"

def drawn(self, *arguments):
	init(self, *arguments)
	if RANK == 1 and not self.tok_emb.weight.is_meta:
		self.tok_emb.weight.data.mul_(2)

tg.GPT.__init__ = drawn

def slower(*arguments):
	time.sleep(slept)
	return taken(*arguments)

tg.train_step = slower
"""


@pytest.mark.fault(25, 48)
def test_ranks_that_differ_go_as_one(tmp_path, byte_corpus):
    """Weights and settings by the first; stops and checkpoints by the slowest, before the cap."""
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
