"""Runs that end early: the files they leave, the messages, the exit status; none hangs."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import types
from functools import partial
from pathlib import Path

import launch
import pytest
import torch
from launch import (
    FAILURE,
    KEPT,
    PROGRAM,
    QUICK,
    Ranks,
    advance_clock,
    alive,
    await_,
    before_call,
    fail_in,
    ranks_of,
    result_of,
    signal_in,
    torchrun,
)

import train_gpt as tg

ARTIFACT, CHECKPOINT, FINAL = "final_model.int6.ptz", "checkpoint.safetensors", tg.FINAL_MODEL
SOON = 90  # seconds in which every rank must end
STEPS = {**QUICK, "ITERATIONS": "6", "WARMDOWN_ITERS": "3", "CHECKPOINT_EVERY": "3"}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def env(byte_corpus) -> dict[str, str]:
    return {**STEPS, "DATA_PATH": str(byte_corpus), "RUN_DIR": "run"}


@pytest.fixture(scope="module")
def whole(byte_corpus, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert tg.main([], {**STEPS, "DATA_PATH": str(byte_corpus), "RUN_DIR": str(run)}) == 0
    return run


def result() -> dict:
    return result_of(Path("run"))


def files() -> set[str]:
    return {path.name for path in Path("run").iterdir()}


def artifact(run: str | Path) -> bytes:
    return (Path(run) / ARTIFACT).read_bytes()


def steps_saved(run: str) -> int:
    """Returns the number of steps in a run's checkpoint."""
    tensors = tg.load_checkpoint(Path(run) / CHECKPOINT, tg.Hyperparameters()).tensors
    return len(tensors["progress/losses"])


def assert_resumes(env: dict[str, str], step: int | None = None) -> None:
    """One rank continues from the checkpoint of the run that failed, by two steps."""
    steps = steps_saved("run")
    assert step in (None, steps)
    with pytest.MonkeyPatch.context() as patch:
        signal_in("Trainer.take_step", 2, patch=patch.setattr)
        assert tg.main([], {**env, "RUN_DIR": "next", "RESUME": f"run/{CHECKPOINT}"}) == 5
    assert steps_saved("next") == steps + 2


def assert_can_be_quantized(env: dict[str, str]) -> None:
    assert tg.main(["--quantize", f"run/{FINAL}"], {**env, "RUN_DIR": "next"}) == 0


# ---- Several ranks, none of which ends the others ----

STAGES = (  # functions in which one rank fails
    ("load_data", 0),
    ("parameter_roles", 1),
    ("Trainer.take_step", 0),
    ("score", 1),
    ("collect_hessians", 0),
    ("weight_stacks", 1),
    ("Run.score_artifact", 0),
)


def fail_and_be_signalled(stage: str, call: int, on_rank: int) -> None:
    """Makes a rank fail in a function; torchrun's signal for another rank comes soon after."""

    def act(number: int, *_: object) -> None:
        if (number, launch.rank()) == (call, on_rank):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            raise FAILURE

    before_call(stage, act)


@pytest.mark.fault(47)
@pytest.mark.parametrize(
    ("stage", "call", "rank"),
    [
        ("Trainer.take_step", 5, 1),
        *(pytest.param(stage, 1, rank, marks=pytest.mark.slow) for stage, rank in STAGES),
    ],
)
def test_an_error_of_one_rank_ends_both(stage, call, rank, env, tmp_path):
    """A signal that follows does not hide it."""
    env |= {"GPTQ_ENABLED": "1", "GPTQ_CALIB_TOKENS": "640"}
    env |= {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    first = partial(fail_and_be_signalled, stage, call, rank)
    ranks = Ranks(tmp_path, world=2, first=first, **env)
    statuses = ranks.end(SOON)
    assert all(statuses)
    assert statuses[rank] == 6
    assert f"error: rank {rank}: Traceback" in ranks.said()
    assert result()["status"] == "failed"
    assert "ZeroDivisionError: a test raised this" in result()["reason"]
    assert (tmp_path / "error.json").exists()  # where torchrun looks for it
    if stage not in ("load_data", "parameter_roles"):
        assert FINAL in files()
    if call == 5:
        assert_resumes(env, 3)


@pytest.mark.fault(47)
def test_a_killed_rank_ends_the_other(env, tmp_path):
    first = partial(signal_in, "Trainer.take_step", 5, 1, signal.SIGKILL)
    ranks = Ranks(tmp_path, world=2, first=first, **env)
    status, killed = ranks.end(SOON)
    assert (bool(status), killed) == (True, -signal.SIGKILL)
    assert result()["status"] == "failed"
    assert "peer" in result()["reason"]  # that another process is gone
    assert FINAL in files()
    assert_resumes(env)


@pytest.mark.fault(28, 48)
def test_an_attention_that_fails_on_one_rank_is_used_by_none(env, tmp_path):
    first = partial(fail_in, "attend_sdpa", on_rank=1)
    ranks = Ranks(tmp_path, world=2, first=first, **{**env, "ITERATIONS": "1"})
    assert ranks.end() == [0, 0], ranks.said()
    assert "attention:flash compiled:False not used: it failed on another rank" in ranks.said()
    assert result()["machine"]["attention"] != "flash"


def slow_down_the_disk() -> None:
    """Makes a checkpoint take 9 s once the test has asked for the end."""

    def wait(_: int, path: Path, *__: object) -> None:
        if path.name == CHECKPOINT and Path("stop").exists():
            time.sleep(9)

    before_call("write_atomically", wait)


@pytest.mark.slow
@pytest.mark.fault(43)
def test_ranks_wait_for_a_slow_disk(env, tmp_path):
    """Rank 0 writes for longer than the ranks would wait for one that is gone."""
    env |= {"ITERATIONS": "100000", "CHECKPOINT_EVERY": "0"}
    ranks = Ranks(tmp_path, world=2, first=slow_down_the_disk, **env)
    await_(lambda: "step:8/" in ranks.said(), 120, ranks.said)
    Path("stop").touch()
    for rank in ranks.ranks:
        rank.terminate()
    assert ranks.end() == [5, 5], ranks.said()
    assert {CHECKPOINT, FINAL} <= files()
    assert result()["status"] == "interrupted"


def lose_a_rank_and_write_slowly() -> None:
    """Kills rank 1 at its fifth step; rank 0 then needs 9 s to write the weights."""
    signal_in("Trainer.take_step", 5, 1, signal.SIGKILL)
    fsync = os.fsync

    def slow(file: int) -> None:
        if FINAL in str(Path(f"/proc/self/fd/{file}").readlink()):
            time.sleep(9)
        fsync(file)

    os.fsync = slow


@pytest.mark.slow
@pytest.mark.fault(44, 47)
def test_the_watch_for_lost_ranks_lets_a_file_be_finished(env, tmp_path):
    ranks = Ranks(tmp_path, world=2, first=lose_a_rank_and_write_slowly, **env)
    assert ranks.end(SOON)[0]
    assert FINAL in files()
    assert not [name for name in files() if name.endswith(".part")]
    assert_can_be_quantized(env)


# ---- Several ranks by torchrun ----


def launched(
    env: dict[str, str], script: Path = PROGRAM
) -> tuple[subprocess.Popen, dict[int, int]]:
    """Starts torchrun with two ranks and waits for a checkpoint; returns it and the ranks."""
    env["ITERATIONS"] = "100000"
    agent = torchrun(Path(), script, "--standalone", "--nproc_per_node=2", **env)
    screen = Path("screen.txt").read_text
    await_(lambda: f"bytes in {CHECKPOINT}" in screen() or agent.poll(), 180, screen)
    return agent, ranks_of(agent)


def end_by_torchrun(agent: subprocess.Popen, pids: dict[int, int]) -> str:
    """Waits until torchrun has failed and its ranks have ended; returns what was printed."""
    assert agent.wait(SOON) != 0
    await_(lambda: not any(map(alive, pids.values())), 30, lambda: f"alive: {pids}")
    return Path("screen.txt").read_text().rstrip(" =\n")


@pytest.mark.slow
@pytest.mark.fault(47)
def test_a_killed_rank_is_the_cause_that_torchrun_names(env):
    agent, pids = launched(env)
    os.kill(pids[1], signal.SIGKILL)
    screen = end_by_torchrun(agent, pids)
    assert re.search(r"rank +: 1 ", screen.rpartition("Root Cause")[2])
    assert screen.endswith(f"traceback : Signal 9 (SIGKILL) received by PID {pids[1]}")
    assert "rank 0: " in result()["reason"]
    assert_resumes(env)


@pytest.mark.slow
@pytest.mark.fault(47)
def test_an_error_of_one_rank_is_the_last_on_screen(env):
    agent, pids = launched(env, Path(launch.__file__))
    screen = end_by_torchrun(agent, pids)
    assert screen.endswith("ZeroDivisionError: a test raised this")
    assert re.search(r"rank +: 1 ", screen.rpartition("Root Cause")[2])
    assert "error: rank 1: Traceback" in screen
    assert_resumes(env, 6)


@pytest.mark.slow
@pytest.mark.fault(43, 47)
def test_a_signal_to_torchrun_leaves_a_checkpoint(env):
    agent, pids = launched(env)
    agent.terminate()
    end_by_torchrun(agent, pids)
    assert result()["status"] == "interrupted"
    assert_resumes(env)


@pytest.mark.slow
@pytest.mark.fault(47, 48)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_the_run(env, rank):
    """The other rank's watch ends that rank, and torchrun the one that hangs."""
    agent, pids = launched(env)
    os.kill(pids[rank], signal.SIGSTOP)
    try:
        await_(lambda: not alive(pids[1 - rank]), SOON, Path("screen.txt").read_text)
        assert agent.wait(SOON)  # it waits for 30 s before it kills
    finally:
        if alive(pids[rank]):
            os.kill(pids[rank], signal.SIGKILL)
    assert "another rank is gone, or silent" in Path("screen.txt").read_text()
    assert result()["status"] == "failed"
    assert_resumes(env)


# ---- Memory and numbers ----


def limit_windows(most: int, patch: pytest.MonkeyPatch) -> None:
    """Lets at most so many windows be scored at once."""

    def act(_: int, __: tg.GPT, ids: torch.Tensor, *___: object) -> None:
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")

    before_call("GPT.forward_logits", act, patch.setattr)


@pytest.mark.fault(33)
def test_out_of_memory_in_scoring_scores_fewer_windows_at_once(env, whole, monkeypatch, capsys):
    limit_windows(3, monkeypatch)
    assert tg.main([], env) == 0
    tried = re.findall(
        r"out of memory: scoring (\d+) windows at once; lower VAL_BATCH", capsys.readouterr().out
    )
    assert "8" in tried
    assert min(map(int, tried)) <= 3
    for kind, score in result_of(whole)["scores"].items():
        found = result()["scores"][kind]
        assert (found["tokens"], found["bytes"]) == (score["tokens"], score["bytes"])
        assert found["nats"] == pytest.approx(score["nats"], rel=1e-6)
    assert artifact("run") == artifact(whole)


@pytest.mark.fault(33)
def test_without_memory_for_one_window_the_weights_are_saved(env, monkeypatch):
    with monkeypatch.context() as patch:
        limit_windows(0, patch)
        assert tg.main([], env) == 3
    assert result()["status"] == "oom"
    assert "EVAL_SEQ_LEN or EVAL_WINDOW" in result()["reason"]
    assert_can_be_quantized(env)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in its manual"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.fault(32, 34)
@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [
        ("oom", 3, r"memory; peak \d+ MiB; lower MICRO_BATCH_TOKENS, TTT_BATCH_SIZE, EVAL_SEQ_LEN"),
        (
            "nan",
            4,
            r"step 5: the loss is nan: train_loss or its gradient is not finite; lower MATRIX_LR",
        ),
    ],
)
def test_a_failed_training_keeps_the_previous_checkpoint(kind, status, says, env, capsys):
    """It says what to lower. Weights that are saved are finite."""
    assert all(map(tg.is_out_of_memory, OUT_OF_MEMORY))
    assert not tg.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))

    def fail(step: int, trainer: tg.Trainer, *_: object) -> None:
        if step == 5 and kind == "oom":
            raise OUT_OF_MEMORY[2]
        if step == 5:
            trainer.model.tok_emb.weight.data.fill_(float("inf"))

    with pytest.MonkeyPatch.context() as patch:
        before_call("Trainer.take_step", fail, patch.setattr)
        assert tg.main([], env) == status
    assert result()["status"] == kind
    assert re.search(says, result()["reason"])
    assert capsys.readouterr().out.splitlines()[-1] == f"error: {result()['reason']}"
    assert ARTIFACT not in files()
    if kind == "oom" or FINAL in files():
        tg.load_checkpoint(Path("run") / FINAL, tg.Hyperparameters())
    assert_resumes(env, 3)


# ---- Disks and folders ----


@pytest.mark.fault(45)
@pytest.mark.parametrize(
    ("stage", "call", "size"), [("weight_stacks", 1, 10_000), ("Trainer.take_step", 4, 100_000)]
)
def test_a_full_disk_leaves_no_part_of_a_file(stage, call, size, env, whole, monkeypatch, capsys):
    """From one call on, no file may grow beyond a size.

    Without room for the artifact the run fails. Without room for a second checkpoint it goes on,
    with the first.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def act(number: int, *_: object) -> None:
        if number == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    before_call(stage, act, monkeypatch.setattr)
    try:
        status = tg.main([], env)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().out
    assert "Traceback" not in told
    all_files = {path.name for path in whole.iterdir()}
    if stage == "weight_stacks":
        assert (status, result()["status"]) == (2, "data")
        assert f"run/{ARTIFACT}: File too large" in result()["reason"]
        assert files() == all_files - {ARTIFACT}
        return
    assert (status, artifact("run")) == (0, artifact(whole))
    assert files() == all_files - {FINAL}
    for name in (CHECKPOINT, FINAL):
        assert f"warning: run/{name} could not be written: [Errno 27]" in told
    assert steps_saved("run") == 3


@pytest.mark.fault(45)
@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("ro", "RUN_DIR=disk/run: .*; choose another RUN_ID or RUN_DIR"),
        ("size=8m", r"RUN_DIR=disk/run: its disk has \d{7} bytes free, 17\d{6} are needed"),
        ("", "RUN_DIR=disk/run: .*; choose another RUN_ID or RUN_DIR"),  # a file, not a folder
    ],
)
def test_a_disk_without_room_is_an_error_before_training(option, says, env, capsys):
    disk = Path("disk")
    if option:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no disk can be mounted here")
    else:
        disk.write_text("")
    try:
        assert tg.main([], {**env, "RUN_DIR": "disk/run"}) in (2, 6)
    finally:
        if option:
            subprocess.run(["umount", str(disk)], check=True)
    told = capsys.readouterr().out
    assert re.search(says, told)
    assert "step:1/" not in told


@pytest.mark.fault(46)
def test_of_two_runs_at_once_one_is_refused_or_both_have_a_folder(env, tmp_path):
    env |= {"ITERATIONS": "1"}
    same = [Ranks(tmp_path, **env) for _ in range(2)]
    assert sorted(run.end()[0] for run in same) == [0, 2], [run.said() for run in same]
    assert result()["status"] == "ok"
    lost = next(run for run in same if run.ranks[0].exitcode)
    assert "choose another RUN_ID or RUN_DIR" in lost.said()
    assert lost.said() not in Path("run/train.log").read_text()
    del env["RUN_DIR"]
    other = [Ranks(tmp_path, **env) for _ in range(2)]
    assert [run.end() for run in other] == [[0], [0]]
    assert len([*Path("logs").glob("*/result.json")]) == 2


def close(*names: str) -> None:
    """Leaves this process without standard streams, as Python starts where they are closed."""
    for name in names:
        setattr(sys, name, None)


@pytest.mark.parametrize("names", [["stdout"], ["stderr"], ["stdout", "stderr"]])
def test_a_run_without_a_screen_writes_its_files(names, env, tmp_path):
    run = Ranks(tmp_path, first=partial(close, *names), **{**env, "ITERATIONS": "1"})
    assert run.end() == [0], run.said()
    assert result()["status"] == "ok"
    assert ("step:1/1 " in run.said()) == ("stdout" not in names)


# ---- Signals ----


@pytest.mark.fault(43)
@pytest.mark.parametrize(
    ("name", "number", "kept"),
    [
        ("load_data", signal.SIGINT, set()),
        ("score", signal.SIGTERM, {FINAL}),  # in a validation before the first step
        pytest.param("Trainer.save", signal.SIGTERM, {FINAL}, marks=pytest.mark.slow),
        ("weight_stacks", signal.SIGTERM, {FINAL}),
        pytest.param(
            "Run.score_artifact", signal.SIGTERM, {FINAL, ARTIFACT}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_signal_anywhere_keeps_the_files_and_writes_a_result(name, number, kept, env, tmp_path):
    env |= {"CHECKPOINT_EVERY": "0"}
    env |= {"VAL_LOSS_EVERY": "4"} if name == "score" else {}
    run = Ranks(tmp_path, first=partial(signal_in, name, number=number), **env)
    assert run.end() == [5], run.said()
    assert result()["status"] == "interrupted"
    assert files() & {FINAL, CHECKPOINT, ARTIFACT} == kept
    assert run.said().splitlines()[-1].startswith("error: stopped by a signal")
    if name in ("load_data", "score"):
        assert "step:1/" not in run.said()
    if kept:
        assert_can_be_quantized(env)


# ---- Time ----


@pytest.mark.fault(26)
@pytest.mark.parametrize(("seconds", "batches"), [(0.5, 8), (2.5, 2), (8.0, 1)])
def test_time_for_calibration_on_text_is_kept_and_a_slower_one_ends_with_what_it_read(
    seconds, batches, env, monkeypatch, capsys
):
    """From a batch of 0.5 s at the start, 6 s are kept for 8 batches: the steps end before 14 s."""
    now, calls = advance_clock(lambda _: 1.0, monkeypatch.setattr), []

    def read(*_: object) -> None:
        if calls and calls[-1] == "collect":
            now[0] += seconds if "train" in calls else 0.5

    before_call("collect_hessians", lambda *_: calls.append("collect"), monkeypatch.setattr)
    before_call("GPT.backbone", read, monkeypatch.setattr)
    before_call("Trainer.train", lambda *_: calls.append("train"), monkeypatch.setattr)
    before_call("weight_stacks", lambda *_: calls.append("scales"), monkeypatch.setattr)
    env |= {"GPTQ_ENABLED": "1", "GPTQ_CALIB": "train", "MAX_WALLCLOCK_SECONDS": "20"}
    env |= {"GPTQ_CALIB_TOKENS": "1024", "ITERATIONS": "1000"}
    status = tg.main([], env)
    said, trained = capsys.readouterr().out, 13 + batches * seconds
    assert "gptq: 6.0 s are kept to quantize on training text" in said
    allowed = f"gptq: the time allowed {batches} of 8 calibration batches"
    assert (allowed in said) is (batches < 8)
    assert result()["seconds"]["train"] == trained
    assert result()["verdicts"]["train_seconds"] == ("PASS" if trained <= 20 else "FAIL")
    assert status == (0 if trained <= 20 else 1)
    tg.load_artifact(Path("run") / ARTIFACT, tg.Hyperparameters())


def test_a_cap_that_calibration_alone_would_exceed_is_refused(env, monkeypatch, capsys):
    now = advance_clock(lambda _: 1.0, monkeypatch.setattr)
    before_call("GPT.backbone", lambda *_: now.__setitem__(0, now[0] + 3), monkeypatch.setattr)
    env |= {"GPTQ_ENABLED": "1", "GPTQ_CALIB": "train", "MAX_WALLCLOCK_SECONDS": "20"}
    assert tg.main([], env | {"GPTQ_CALIB_TOKENS": "1024"}) == 2
    said = "MAX_WALLCLOCK_SECONDS=20: quantizing on training text takes about 36.0 s"
    assert said in capsys.readouterr().out
    assert tg.PROGRAM not in files()  # the folder can be used again
    assert tg.main(["--check"], env | {"GPTQ_CALIB_TOKENS": "1024", "RUN_DIR": "other"}) == 2
    assert said in capsys.readouterr().out


@pytest.mark.fault(49)
def test_a_slow_step_and_a_clock_that_is_set(env, monkeypatch):
    """Each call of time.time() is years away from the one before."""
    jumps = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 1e9 + (-1) ** next(jumps) * 1e8)
    advance_clock(lambda step: 9.0 if step == 4 else 1.0, monkeypatch.setattr)
    assert tg.main([], {**env, "MAX_WALLCLOCK_SECONDS": "500"}) == 0
    assert (result()["steps"], result()["seconds"]["train"]) == (6, 14.0)
    assert result()["step_ms"]["p50"] == 1000.0
    assert 8000.0 < result()["step_ms"]["p99"] < 9000.0


# ---- The bytes of the code, and --check ----


@pytest.mark.slow
@pytest.mark.fault(51)
def test_a_link_another_folder_the_twin_and_another_locale_count_the_same_bytes(env):
    twin = tg.packed_source(PROGRAM.read_bytes())
    Path("sub").mkdir()
    Path("link.py").symlink_to(PROGRAM)
    Path("twin.py").write_bytes(twin)
    plain = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for program in ("../link.py", "../twin.py"):
        command = [sys.executable, program, "--check"]
        done = subprocess.run(
            command, cwd="sub", env={**KEPT, **env, **plain}, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert f"check:ok code:{len(twin)} bytes".encode() in done.stdout
    assert not list(Path("sub").iterdir())


@pytest.mark.fault(51)
@pytest.mark.parametrize("file", [None, "archive.pyz/__main__.py"])
def test_a_program_that_is_not_a_file_is_refused_before_training(file, env, monkeypatch, capsys):
    """It was read from standard input, or from an archive."""
    module = types.ModuleType("not_a_file")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    if file:
        module.__file__ = file
    exec(PROGRAM.read_text(encoding="utf-8"), vars(module))
    assert module.main([], env) == 2
    told = capsys.readouterr().out
    assert "run this program from a file, because its bytes count" in told
    assert "step:1/" not in told


@pytest.mark.parametrize("bad", [{}, {"DATA_PATH": "nowhere"}, {"NUM_LAYERS": "0"}])
def test_check_reports_whether_a_run_could_start_and_writes_no_file(bad, env, capsys):
    assert tg.main(["--check"], env | bad) == (2 if bad else 0)
    lines = capsys.readouterr().out.splitlines()
    assert not list(Path().iterdir())
    if bad:
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return
    size = len(tg.packed_source(PROGRAM.read_bytes()))
    assert re.fullmatch(rf"check:ok code:{size} bytes folder:\w+", lines[-1])
    assert [line for line in lines if re.match(r"device:\S+ dtype:float32 .* attention:\w+$", line)]
    for start_of in ("val_bpb:enabled", "val_loader:shards", "train_loader:dataset"):
        assert [line for line in lines if line.startswith(start_of)], start_of
