"""Checkpoints: a run that is stopped and resumed ends with the bytes of an undisturbed run."""

import json
import os
import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from launch import QUICK, Ranks, advance_clock, await_, before_call, result_of, signal_in
from safetensors.torch import load, save

import train_gpt as tg

ARTIFACT, CHECKPOINT, FINAL = "final_model.int6.ptz", "checkpoint.safetensors", tg.FINAL_MODEL
SHORT = {**QUICK, "ITERATIONS": "16", "WARMDOWN_ITERS": "8"}
SWITCHES = {
    "smoothing": {"LABEL_SMOOTHING": "0.1"},
    "JEPA": {"JEPA_CHUNK_SIZE": "4", "JEPA_PHASE1_FRAC": "0.1"},
    "STP": {"STP_ENABLED": "1"},
    "untied": {"TIE_EMBEDDINGS": "0"},
    # Averages the weights after steps 12, 14 and 16: the rate is below 0.8 from step 11 on.
    "SWA": {"SWA_ENABLED": "1", "SWA_START_FRAC": "0.8", "SWA_EVERY": "2"},
}
# The layers repeat from step 8 on.
FRONTIER = dict(
    pair.split("=")
    for pair in (
        "NUM_LOOPS=1 LOOP_START=0 LOOP_END=0 ENABLE_LOOPING_AT=0.5 PARALLEL_START_LAYER=1 "
        "SKIP_GATES_ENABLED=1 SPARSE_ATTN_GATE_ENABLED=1 SMEAR_GATE=0 SMEAR_GATE_ENABLED=1 "
        "MUON_ROW_NORMALIZE=1 MUON_COEFFICIENTS=polar_express WARMDOWN_FRAC=0.5 MIN_LR=0.1"
    ).split()
)
ALL_ON = {name: value for switch in SWITCHES.values() for name, value in switch.items()}
STOPS = [  # changes, the step of the signal, weights averaged by then, kind of the last weights
    pytest.param({"EMA_ENABLED": "0"}, 7, 0, "raw", id="all off"),
    pytest.param(ALL_ON, 14, 2, "swa", id="all on"),
    pytest.param(FRONTIER, 7, 0, "ema", id="before the layers repeat"),
    pytest.param(FRONTIER, 9, 0, "ema", id="after", marks=pytest.mark.slow),
    pytest.param(SWITCHES["SWA"], 7, 0, "swa", id="SWA", marks=pytest.mark.slow),
    *(
        pytest.param(SWITCHES[name], 7, 0, "ema", id=name, marks=pytest.mark.slow)
        for name in ("smoothing", "JEPA", "STP", "untied")
    ),
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def env(byte_corpus) -> dict[str, str]:
    return {**SHORT, "DATA_PATH": str(byte_corpus), "RUN_DIR": "run"}


@pytest.fixture(scope="module")
def whole(byte_corpus, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert tg.main([], {**SHORT, "DATA_PATH": str(byte_corpus), "RUN_DIR": str(run)}) == 0
    return run


@pytest.fixture(scope="module")
def stopped(byte_corpus, tmp_path_factory) -> Path:
    """The folder of a run that was stopped after 3 of 16 steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    stop(3, {**SHORT, "DATA_PATH": str(byte_corpus), "RUN_DIR": str(run)})
    return run


def stop(step: int, env: dict[str, str]) -> None:
    """A run that gets a signal during one training step."""
    with pytest.MonkeyPatch.context() as patch:
        signal_in("Trainer.take_step", step, patch=patch.setattr)
        assert tg.main([], env) == 5


def artifact(run: Path | str) -> bytes:
    return (Path(run) / ARTIFACT).read_bytes()


@pytest.mark.fault(43)
@pytest.mark.parametrize(("changes", "step", "averaged", "weights"), STOPS)
def test_a_resumed_run_ends_with_the_same_bytes(changes, step, averaged, weights, env):
    """By RESUME=auto in the run's own folder, and from its checkpoint in a new folder."""
    env |= changes
    assert tg.main([], {**env, "RUN_DIR": "whole"}) == 0
    stop(step, env)
    assert result_of(Path("run"))["status"] == "interrupted"
    assert "continue with RESUME=auto" in result_of(Path("run"))["reason"]
    assert (Path("run") / FINAL).exists()
    saved = load((Path("run") / CHECKPOINT).read_bytes())
    assert (len(saved["progress/losses"]), saved["progress/averaged"].item()) == (step, averaged)
    assert tg.main([], {**env, "RUN_DIR": "other", "RESUME": f"run/{CHECKPOINT}"}) == 0
    assert tg.main([], {**env, "RESUME": "auto"}) == 0
    assert f"resume: step {step}, " in Path("run/train.log").read_text()
    losses = result_of(Path("whole"))["train_losses"]
    final = load((Path("whole") / FINAL).read_bytes())
    for run in map(Path, ("run", "other")):
        assert artifact(run) == artifact("whole")
        found = load((run / FINAL).read_bytes())
        assert found.keys() == final.keys()
        assert all(torch.equal(found[name], final[name]) for name in final)
        result = result_of(run)
        assert (result["status"], result["steps"], result["weights"]) == ("ok", 16, weights)
        assert result["train_losses"] == losses


@pytest.mark.fault(43, 48)
def test_a_signal_to_one_rank_stops_both_at_one_step(env, whole, tmp_path):
    first = partial(signal_in, "Trainer.take_step", 7, 1)
    run = Ranks(tmp_path, world=2, first=first, **env)
    assert run.end() == [5, 5], run.said()
    assert result_of(Path("run"))["status"] == "interrupted"
    again = Ranks(tmp_path, world=2, **{**env, "RESUME": "auto"})
    assert again.end() == [0, 0], again.said()
    assert "resume: step 7, " in again.said()
    losses = result_of(whole)["train_losses"]
    assert result_of(Path("run"))["train_losses"] == pytest.approx(losses, abs=2e-3)


@pytest.mark.parametrize(("limit", "steps"), [(1000, 16), (170, 5)])
def test_the_training_time_of_all_parts_of_a_run_is_added(limit, steps, env, monkeypatch):
    """Neither the time between two parts nor that of reading a checkpoint is training. The run
    knows from its checkpoint that a sixth step would end at 180 s, beyond the limit."""
    env |= {"MAX_WALLCLOCK_SECONDS": str(limit)}
    now = advance_clock(lambda _: 30.0, monkeypatch.setattr)

    def read_slowly(*_: object) -> None:
        now[0] += 1000

    before_call("load_checkpoint", read_slowly, monkeypatch.setattr)
    stop(5, env)
    now[0] += 10_000
    assert tg.main([], {**env, "RESUME": "auto"}) == 0
    result = result_of(Path("run"))
    assert "resume: step 5, 150.0 s trained" in Path("run/train.log").read_text()
    assert (result["steps"], result["seconds"]["train"]) == (steps, 30.0 * steps)
    assert result["step_ms"] == {"p50": 30_000.0, "p99": 30_000.0}
    assert result["verdicts"]["train_seconds"] == "PASS"


@pytest.mark.parametrize(("every", "steps"), [("5", [5]), ("4s", [4, 8]), ("0s", [])])
def test_checkpoints_come_after_so_many_steps_or_seconds(every, steps, env, monkeypatch):
    """A step takes a second."""
    advance_clock(lambda _: 1.0, monkeypatch.setattr)
    assert tg.main([], {**env, "ITERATIONS": "9", "CHECKPOINT_EVERY": every}) == 0
    text = Path("run/train.log").read_text()
    before = text.split(f"bytes in {CHECKPOINT}")[:-1]
    assert [re.findall(r"^step:(\d+)/", part, re.MULTILINE)[-1] for part in before] == [
        str(step) for step in steps
    ]


def test_auto_starts_a_new_run_where_there_is_none_and_needs_its_name(env):
    assert tg.main([], {**env, "ITERATIONS": "1", "RESUME": "auto"}) == 0
    assert not re.search("^resume: ", Path("run/train.log").read_text(), re.MULTILINE)
    with pytest.raises(tg.SettingsError, match="RESUME=auto: needs RUN_ID or RUN_DIR"):
        tg.Hyperparameters.from_env({"RESUME": "auto"})


def test_a_checkpoint_names_its_tensors_by_parameter(stopped, env):
    """It is quantized as its average, which is also saved alone."""
    h, weights, tensors, *_ = tg.load_checkpoint(stopped / CHECKPOINT, tg.Hyperparameters())
    parameters = dict(tg.GPT(h).named_parameters())
    for kind in ("model", "average"):
        found = {name.removeprefix(f"{kind}/") for name in tensors if name.startswith(f"{kind}/")}
        assert found == parameters.keys()
    optimized = {name.partition("/")[2] for name in tensors if name.startswith(("muon", "adamw"))}
    assert {name.rpartition("/")[0] or name for name in optimized} == parameters.keys()
    final = load((stopped / FINAL).read_bytes())
    assert final.keys() == weights.keys()
    for name, parameter in parameters.items():
        assert tensors[f"model/{name}"].shape == weights[name].shape == parameter.shape
        assert torch.equal(tensors[f"average/{name}"], weights[name])
        assert torch.equal(final[name], weights[name])
    for name in (CHECKPOINT, FINAL):
        assert tg.main(["--quantize", str(stopped / name)], {**env, "RUN_DIR": name}) == 0
    assert artifact(CHECKPOINT) == artifact(FINAL)


# ---- Files that are no checkpoint of the run ----


def refusal(path: Path, env: dict[str, str], capsys) -> str:
    """Returns the error of a run that would continue from a file."""
    capsys.readouterr()
    shutil.rmtree("run", ignore_errors=True)
    assert tg.main([], {**env, "RESUME": str(path)}) == 2
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("error: ")]
    assert not (Path("run") / FINAL).exists()
    return line


@pytest.mark.fault(38)
def test_a_checkpoint_of_other_settings_is_refused_by_what_differs(stopped, env, capsys):
    env |= {"NUM_LAYERS": "3", "ROPE_BASE": "5000"}
    line = refusal(stopped / CHECKPOINT, env, capsys)
    assert line.startswith(f"error: RESUME={stopped / CHECKPOINT}: ")
    assert " NUM_LAYERS=2 ROPE_BASE=10000.0; set the same" in line


def damaged(whole: bytes, final: bytes) -> dict[str, tuple[bytes | None, str]]:
    """Files that are no checkpoint of a run, and a part of the error for each."""
    saved = load(whole)
    settings = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    unreadable, no_state = "cannot be read", "not a training state of this model"

    def changed(without: str = "-", **tensors: torch.Tensor) -> bytes:
        kept = {name: t for name, t in saved.items() if not name.startswith(without)}
        return save({**kept, **tensors}, settings)

    return {
        "absent": (None, unreadable),
        "cut": (whole[: len(whole) // 2], unreadable),
        "foreign": (b"PGOLFGPT" + bytes(1000), unreadable),
        "longer": (whole + b"\0", unreadable),
        "one weight less": (changed("average/skip_weights"), unreadable),
        "one weight more": (changed(**{"average/other": torch.ones(3)}), unreadable),
        "the average alone": (final, "it has weights only; name a checkpoint"),
        "no weights": (changed("model/"), f"{no_state}: KeyError('model/"),
        "no momenta": (changed("muon/"), f"{no_state}: KeyError('muon/"),
        "no AdamW": (changed("adamw/"), f"{no_state}: KeyError('adamw/"),
        "no progress": (changed("progress/"), "it has weights only; name a checkpoint"),
        "another shape": (
            changed(**{"model/tok_emb.weight": torch.ones(3, 3)}),
            f"{no_state}: ValueError('model/tok_emb.weight has shape [3, 3]')",
        ),
    }


@pytest.mark.fault(38)
def test_a_file_that_is_no_checkpoint_of_the_run_is_refused(stopped, env, capsys):
    files = damaged(*((stopped / name).read_bytes() for name in (CHECKPOINT, FINAL)))
    for name, (data, says) in files.items():
        path = Path(f"{name}.safetensors")
        if data is not None:
            path.write_bytes(data)
        line = refusal(path, env, capsys)
        assert str(path) in line, name
        assert says in line, name


# ---- SIGKILL ----


def kill_in_a_write() -> None:
    """Leaves the process by SIGKILL in the middle of the second checkpoint's bytes."""
    fsync = os.fsync

    def killed(number: int) -> None:
        writes_checkpoint = CHECKPOINT in str(Path(f"/proc/self/fd/{number}").readlink())
        if writes_checkpoint and Path("run", CHECKPOINT).exists():
            os.ftruncate(number, 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(number)

    os.fsync = killed


@pytest.mark.fault(44)
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the file by Linux's /proc")
def test_a_kill_in_the_middle_of_a_write_keeps_the_previous_file(env, whole, tmp_path):
    env |= {"CHECKPOINT_EVERY": "5"}
    ranks = Ranks(tmp_path, first=kill_in_a_write, **env)
    assert ranks.end() == [-signal.SIGKILL], ranks.said()
    (part,) = Path("run").glob("*.part")
    assert part.name.startswith(CHECKPOINT)
    assert tg.main([], {**env, "RESUME": "auto"}) == 0
    assert "resume: step 5, " in Path("run/train.log").read_text()
    assert artifact("run") == artifact(whole)


def await_printed(run: Ranks, lines: int) -> None:
    """Waits until a run of one rank has printed so many lines, or has ended."""

    def true() -> bool:
        return run.said().count("\n") >= lines or not run.ranks[0].is_alive()

    await_(true, 120, run.said)


@pytest.mark.slow
@pytest.mark.fault(44)
def test_killed_at_any_moment_a_run_resumes_to_the_same_bytes(env, tmp_path):
    """At 10 moments between the first step and scoring, chosen by what the run has printed."""
    env |= {"CHECKPOINT_EVERY": "3", "RESUME": "auto", "GPTQ_ENABLED": "1", "ITERATIONS": "20"}
    whole = Ranks(tmp_path, **{**env, "RUN_DIR": "whole"})
    assert whole.end() == [0], whole.said()
    lines = whole.said().splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("step:1/"))
    rng, tried = random.Random(0), 0
    for n in range(10):
        run, statuses = tmp_path / f"run{n}", [0]
        while statuses == [0]:  # it was done before the moment came
            shutil.rmtree(run, ignore_errors=True)
            killed = Ranks(tmp_path, **{**env, "RUN_DIR": run})
            await_printed(killed, rng.randrange(first, len(lines)))
            time.sleep(rng.uniform(0, 0.1))
            killed.ranks[0].kill()
            statuses, tried = killed.end(), tried + 1
        assert statuses == [-signal.SIGKILL]
        again = Ranks(tmp_path, **{**env, "RUN_DIR": run})
        assert again.end() == [0], again.said()
        assert artifact(run) == artifact(tmp_path / "whole")
        assert (result_of(run)["status"], result_of(run)["steps"]) == ("ok", 20)
    assert tried < 40
