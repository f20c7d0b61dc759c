"""Runs that end early: the files they leave, the messages, the exit status; none hangs."""

import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY
from launch import KEPT, PROGRAM, Ranks, alive, await_, driver, ranks_of, result_of, torchrun

import train_gpt as tg

ARTIFACT = "final_model.int6.ptz"
SOON = 45  # seconds in which every rank must end


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def env(byte_corpus) -> dict[str, str]:
    return {
        **TINY,
        "DATA_PATH": str(byte_corpus),
        "RUN_DIR": "run",
        "ITERATIONS": "12",
        "WARMDOWN_ITERS": "6",
        "EVAL_STRIDE": "0",
    }


def result() -> dict:
    return result_of(Path("run"))


def there(name: str) -> bool:
    return (Path("run") / name).exists()


def before_steps(monkeypatch, act: Callable[[int], None]) -> None:
    """Calls act(1) before the first training step from now on, act(2) before the second, ..."""
    take_step, count = tg.Trainer.take_step, []

    def watched(*arguments):
        count.append(0)
        act(len(count))
        return take_step(*arguments)

    monkeypatch.setattr(tg.Trainer, "take_step", watched)


def move_clock(monkeypatch, seconds: Callable[[int], float]) -> list[float]:
    """Replaces the clock by a number that step n raises by seconds(n); returns it in a list."""
    now = [0.0]

    def advance(step: int) -> None:
        now[0] += seconds(step)

    monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
    before_steps(monkeypatch, advance)
    return now


def fail_in_training(*_: object) -> None:
    pytest.fail("training began")


def steps_saved() -> int:
    """Returns the number of steps in the run's checkpoint."""
    checkpoint = Path("run/checkpoint.safetensors")
    _, _, tensors = tg.load_checkpoint(checkpoint, tg.Hyperparameters())
    return len(tensors["progress/losses"])


def assert_resumes(env: dict[str, str], step: int | None = None) -> None:
    """One rank continues from the checkpoint of the run that failed, and finishes."""
    steps = steps_saved()
    assert step in (None, steps)
    env = {**env, "ITERATIONS": str(steps + 2), "RUN_DIR": "next"}
    assert tg.main([], {**env, "RESUME": "run/checkpoint.safetensors"}) == 0
    assert f"resume: step {steps}, " in Path("next/train.log").read_text()
    assert result_of(Path("next"))["steps"] == steps + 2


# ---- Several ranks ----

LONG = {"ITERATIONS": "100000", "CHECKPOINT_EVERY": "5"}


def end_by_torchrun(agent: subprocess.Popen, pids: dict[int, int]) -> str:
    """Waits until torchrun has failed and its ranks have ended; returns what was printed."""
    status = agent.wait(SOON)
    assert status != 0
    await_(lambda: not any(map(alive, pids.values())), 10, lambda: f"alive: {pids}")
    return Path("screen.txt").read_text()


def launched(
    env: dict[str, str], script: Path = PROGRAM
) -> tuple[subprocess.Popen, dict[int, int]]:
    """Starts torchrun with two ranks and waits for a checkpoint; returns it and the ranks."""
    agent = torchrun(Path(), script, "--standalone", "--nproc_per_node=2", **{**env, **LONG})
    screen = Path("screen.txt").read_text
    await_(lambda: "bytes in checkpoint.safetensors" in screen() or agent.poll(), 90, screen)
    return agent, ranks_of(agent)


@pytest.mark.fault(47)
def test_a_killed_rank_ends_all_and_is_the_cause_torchrun_names(env):
    agent, pids = launched(env)
    os.kill(pids[1], signal.SIGKILL)
    last = end_by_torchrun(agent, pids).rpartition("Root Cause")[2]
    assert re.search(r"rank +: 1 ", last)
    assert last.rstrip(" =\n").endswith(f"traceback : Signal 9 (SIGKILL) received by PID {pids[1]}")
    assert result()["status"] == "failed"
    assert "rank 0: " in result()["reason"]
    assert "peer" in result()["reason"]  # that another process is gone
    assert there("final_model.safetensors")
    assert_resumes(env)


RAISES = """
take_step, count = tg.Trainer.take_step, []

def raising(*arguments):
    count.append(0)
    if RANK == 1 and len(count) == 8:
        raise ZeroDivisionError("a test raised this")
    return take_step(*arguments)

tg.Trainer.take_step = raising
"""


@pytest.mark.fault(47)
def test_an_error_of_one_rank_ends_all_and_is_the_last_on_screen(env, tmp_path):
    agent, pids = launched(env, driver(tmp_path, RAISES))
    screen = end_by_torchrun(agent, pids)
    assert screen.rstrip(" =\n").endswith("ZeroDivisionError: a test raised this")
    assert re.search(r"rank +: 1 ", screen.rpartition("Root Cause")[2])
    assert result()["status"] == "failed"
    assert result()["reason"].startswith("rank 1: Traceback")
    assert "ZeroDivisionError: a test raised this" in result()["reason"]
    assert "error: rank 1: Traceback" in screen
    assert there("final_model.safetensors")
    assert_resumes(env, 5)


@pytest.mark.fault(43, 47)
def test_a_signal_to_torchrun_leaves_a_checkpoint(env):
    agent, pids = launched(env)
    agent.terminate()
    end_by_torchrun(agent, pids)
    assert result()["status"] == "interrupted"
    steps = steps_saved()
    more = {"ITERATIONS": str(steps + 2), "RESUME": "auto"}
    assert tg.main([], {**env, **more}) == 0
    assert (result()["status"], result()["steps"]) == ("ok", steps + 2)


SIGNALLED_WHILE_IT_FAILS = """
format_exc = tg.traceback.format_exc

def signalled():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    return format_exc()

tg.traceback.format_exc = signalled
"""


@pytest.mark.fault(47)
def test_a_signal_to_a_rank_that_fails_does_not_hide_its_error(env, tmp_path):
    """As torchrun sends it when another rank has failed first."""
    first = RAISES + SIGNALLED_WHILE_IT_FAILS
    ranks = Ranks(tmp_path, world=2, first=first, **env)
    assert ranks.end(SOON) == [6, 6], ranks.said()
    assert result()["status"] == "failed"
    assert "Traceback" in result()["reason"]
    assert there("final_model.safetensors")


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


# Parts of a run in which one rank raises an error. The other must not wait for it.
PARTS = {
    "data": "tg.load_data",
    "attention": "tg.load_attention",
    "model": "tg.parameter_roles",
    "score": "tg.score",
    "calibration": "tg.collect_hessians",
    "quantization": "tg.quantize_model",
    "artifact": "tg.Run.score_artifact",
}
FAILS = """
def fails(*arguments, **named):
    if RANK == {rank}:
        raise RuntimeError("a test raised this")
    return before(*arguments, **named)

before, {name} = {name}, fails
"""


@pytest.mark.fault(47)
@pytest.mark.parametrize(
    ("part", "rank"),
    [
        ("quantization", 1),
        *(
            pytest.param(part, rank, marks=pytest.mark.slow)
            for part in PARTS
            for rank in (0, 1)
            if part != "attention"  # if it fails on one rank, no rank uses it
        ),
    ],
)
def test_an_error_of_one_rank_anywhere_ends_both(part, rank, env, tmp_path):
    """Without torchrun, which would end the other rank."""
    first = FAILS.format(name=PARTS[part], rank=rank)
    ranks = Ranks(tmp_path, world=2, first=first, **{**env, "GPTQ_ENABLED": "1"})
    statuses = ranks.end(SOON)
    assert all(statuses)
    assert statuses[rank] == 6
    assert f"error: rank {rank}: Traceback" in ranks.said()
    assert result()["status"] == "failed"
    assert "a test raised this" in result()["reason"]
    if part not in ("data", "model"):
        assert there("final_model.safetensors")


@pytest.mark.fault(28, 48)
def test_an_attention_that_fails_on_one_rank_is_used_by_none(env, tmp_path):
    first = (
        FAILS.format(name="tg.attend_sdpa", rank=1)
        + """
tries = []

def load_attention(name):
    tries.append(name)
    return tg.attend_sdpa if len(tries) == 1 else before

tg.load_attention = load_attention
"""
    )
    ranks = Ranks(tmp_path, world=2, first=first, **{**env, "ITERATIONS": "1"})
    assert ranks.end() == [0, 0], ranks.said()
    assert "attention:flash compiled:False not used: it failed on another rank" in ranks.said()
    assert result()["machine"]["attention"] == "cudnn"


SLOW_DISK = """
write = tg.write_atomically

def slow(path, data):
    if path.name == "checkpoint.safetensors" and Path("stop").exists():
        time.sleep(9)
    write(path, data)

tg.write_atomically = slow
"""


@pytest.mark.slow
@pytest.mark.fault(43)
def test_ranks_wait_for_a_slow_disk(env, tmp_path):
    """Rank 0 writes for longer than the ranks would wait for one that is gone."""
    ranks = Ranks(tmp_path, world=2, first=SLOW_DISK, **{**env, "ITERATIONS": "100000"})
    ranks.until("step:8/")
    Path("stop").touch()
    for rank in ranks.ranks:
        rank.terminate()
    assert ranks.end() == [5, 5], ranks.said()
    assert there("checkpoint.safetensors")
    assert there("final_model.safetensors")
    assert result()["status"] == "interrupted"


# ---- Memory ----


def limit_windows(most: int, monkeypatch) -> list[int]:
    """Lets at most so many windows be scored at once; returns the list of the sizes tried."""
    sizes, forward_logits = [], tg.GPT.forward_logits

    def limited(model, ids, last=0, window=0):
        sizes.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")
        return forward_logits(model, ids, last, window)

    monkeypatch.setattr(tg.GPT, "forward_logits", limited)
    return sizes


@pytest.mark.fault(33)
@pytest.mark.parametrize("most", [1, 3, 5])
def test_out_of_memory_in_scoring_scores_fewer_windows_at_once(most, env, monkeypatch, capsys):
    env |= {"EVAL_STRIDE": "32"}
    assert tg.main([], {**env, "RUN_DIR": "whole"}) == 0
    capsys.readouterr()
    sizes = limit_windows(most, monkeypatch)
    assert tg.main([], env) == 0
    told = capsys.readouterr().out
    sizes_told = re.findall(r"out of memory: scoring (\d+) windows at once; lower VAL_BATCH", told)
    assert max(sizes) == 16
    assert "8" in sizes_told
    assert min(map(int, sizes_told)) <= most
    for kind, score in result_of(Path("whole"))["scores"].items():
        found = result()["scores"][kind]
        assert (found["tokens"], found["bytes"]) == (score["tokens"], score["bytes"])
        assert found["nats"] == pytest.approx(score["nats"], rel=1e-6)
    assert (Path("run") / ARTIFACT).read_bytes() == (Path("whole") / ARTIFACT).read_bytes()


@pytest.mark.fault(33)
def test_without_memory_for_one_window_the_status_is_3_and_the_weights_are_saved(
    env, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        limit_windows(0, patch)
        assert tg.main([], env) == 3
    assert result()["status"] == "oom"
    assert "EVAL_SEQ_LEN or EVAL_WINDOW" in result()["reason"]
    assert "out of memory: scoring 1 windows at once" in capsys.readouterr().out
    again = {**env, "RUN_DIR": "next"}
    assert tg.main(["--quantize", "run/final_model.safetensors"], again) == 0


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_out_of_memory_in_training_says_what_to_lower(error, env, monkeypatch, capsys):
    def heavy(step):
        if step == 8:
            raise error

    with monkeypatch.context() as patch:
        before_steps(patch, heavy)
        assert tg.main([], {**env, "CHECKPOINT_EVERY": "5"}) == 3
    assert result()["status"] == "oom"
    assert re.search(
        r"; peak \d+ MiB; lower MICRO_BATCH_TOKENS, EVAL_SEQ_LEN or EVAL_WINDOW", result()["reason"]
    )
    assert str(error) in result()["reason"]
    assert capsys.readouterr().out.splitlines()[-1] == f"error: {result()['reason']}"
    assert not there(ARTIFACT)
    assert there("final_model.safetensors")
    assert_resumes(env, 5)


# ---- Numbers ----


@pytest.mark.fault(34)
@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_not_finite_keeps_the_previous_checkpoint(loss, env, monkeypatch, capsys):
    losses, count = tg.GPT.losses, []

    def diverging(model, *inputs):
        count.append(0)
        value, terms = losses(model, *inputs)
        if len(count) >= 2 * 8:  # two micro-batches a step
            value = value * float(loss)
            terms["train_loss"] = value
        return value, terms

    with monkeypatch.context() as patch:
        patch.setattr(tg.GPT, "losses", diverging)
        assert tg.main([], {**env, "CHECKPOINT_EVERY": "5"}) == 4
    assert result()["status"] == "nan"
    assert result()["reason"] == (f"step 8: the loss is {loss}; lower MATRIX_LR and SCALAR_LR")
    assert result()["reason"] in capsys.readouterr().out.splitlines()[-1]
    assert not there(ARTIFACT)
    assert_resumes(env, 5)
    for name in ("checkpoint.safetensors", "final_model.safetensors"):
        if there(name):  # then its weights are finite
            tg.load_checkpoint(Path("run") / name, tg.Hyperparameters())


# ---- Disks and folders ----


@pytest.mark.fault(45)
def test_a_full_disk_at_the_artifact_leaves_no_part_of_it(env, monkeypatch, capsys):
    """The artifact may not grow beyond 20,000 bytes."""
    limits, write = resource.getrlimit(resource.RLIMIT_FSIZE), tg.write_atomically

    def full(path, data):
        try:
            if path.name == ARTIFACT:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            write(path, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(tg, "write_atomically", full)
    assert tg.main([], env) == 6
    assert result()["status"] == "failed"
    assert "File too large" in result()["reason"]
    assert "error: Traceback" in capsys.readouterr().out
    assert {path.name for path in Path("run").iterdir()} == {
        "events.jsonl",
        "final_model.safetensors",
        "result.json",
        "train.log",
        "train_gpt.py",
        "train_gpt_readable.py",
    }
    again = {**env, "RUN_DIR": "next", "GPTQ_ENABLED": "0"}
    monkeypatch.setattr(tg, "write_atomically", write)
    assert tg.main(["--quantize", "run/final_model.safetensors"], again) == 0


@pytest.mark.fault(45)
def test_a_folder_that_cannot_be_created_is_an_error_before_training(env, monkeypatch, capsys):
    monkeypatch.setattr(tg.Trainer, "train", fail_in_training)
    Path("file").write_text("")
    assert tg.main([], {**env, "RUN_DIR": "file/run"}) == 2
    told = capsys.readouterr().out
    assert "RUN_DIR=file/run: " in told
    assert told.splitlines()[-1].endswith("choose another RUN_ID or RUN_DIR")


def mounted(where: Path, *options: str) -> bool:
    """Mounts a small disk in memory; returns whether that is allowed."""
    where.mkdir()
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(where)]
    try:
        return not subprocess.run(command, capture_output=True, check=False).returncode
    except OSError:
        return False


@pytest.mark.fault(45)
@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("ro", "Read-only file system"),
        ("size=16k", "No space left on device"),
        ("size=8m", r"RUN_DIR=disk/run: its disk has \d{7} bytes free, 17\d{6} are needed"),
    ],
)
def test_a_disk_without_room_is_an_error_before_training(option, says, env, monkeypatch, capsys):
    monkeypatch.setattr(tg.Trainer, "train", fail_in_training)
    if not mounted(Path("disk"), "-o", option):
        pytest.skip("no disk can be mounted here")
    try:
        assert tg.main([], {**env, "RUN_DIR": "disk/run"}) in (2, 6)
    finally:
        subprocess.run(["umount", "disk"], check=True)
    told = capsys.readouterr().out
    assert re.search(says, told)
    assert "step:1/" not in told


@pytest.mark.fault(45)
def test_a_disk_that_others_fill_ends_no_run(env, monkeypatch, capsys):
    """From the first step on there is room for the logs and about one checkpoint."""
    if not mounted(Path("disk"), "-o", "size=20m"):
        pytest.skip("no disk can be mounted here")

    def fill(step):
        if step == 1:
            free = shutil.disk_usage("disk").free
            Path("disk/of-others").write_bytes(bytes(free - 700_000))

    before_steps(monkeypatch, fill)
    try:
        status = tg.main([], {**env, "RUN_DIR": "disk/run", "CHECKPOINT_EVERY": "5"})
        files = {path.name: path.stat().st_size for path in Path("disk/run").iterdir()}
    finally:
        subprocess.run(["umount", "disk"], check=True)
    told = capsys.readouterr().out
    warning = "warning: disk/run/checkpoint.safetensors could not be written: [Errno 28] No space"
    assert warning in told
    assert told.count("bytes in checkpoint.safetensors") == 1  # the first, which stays
    assert files["checkpoint.safetensors"] > 400_000
    assert not [name for name in files if name.endswith(".part")]
    assert status in (0, 6)
    assert (ARTIFACT in files) == (status == 0)


@pytest.mark.fault(46)
def test_a_second_run_overwrites_nothing_in_the_folder_of_the_first(env, capsys):
    env |= {"ITERATIONS": "1"}
    assert tg.main([], env) == 0
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert tg.main([], env) == 2
    assert "RUN_DIR=run: " in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


@pytest.mark.fault(46)
def test_of_two_runs_at_once_one_is_refused_or_both_have_a_folder(env, tmp_path):
    same = [Ranks(tmp_path, **{**env, "ITERATIONS": "1"}) for _ in range(2)]
    assert sorted(run.end()[0] for run in same) == [0, 2], [run.said() for run in same]
    assert result()["status"] == "ok"
    lost = next(run for run in same if run.ranks[0].exitcode)
    assert "choose another RUN_ID or RUN_DIR" in lost.said()
    assert lost.said() not in Path("run/train.log").read_text()
    own = {name: value for name, value in env.items() if name != "RUN_DIR"} | {"ITERATIONS": "1"}
    other = [Ranks(tmp_path, **own) for _ in range(2)]
    assert [run.end() for run in other] == [[0], [0]]
    assert len([*Path("logs").glob("*/result.json")]) == 2


@pytest.mark.fault(52)
@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", "a\\b", ".x", "a b"])
def test_a_name_that_leads_elsewhere_is_refused(name, env, capsys):
    del env["RUN_DIR"]
    assert tg.main([], {**env, "RUN_ID": name}) == 2
    told = f"RUN_ID={name!r}: must be a name of letters, digits and - _ . + ="
    assert told in capsys.readouterr().out
    assert not list(Path().iterdir())


# ---- Signals ----

SIGNALS_ITSELF = """
def signalled(*arguments, **named):
    os.kill(os.getpid(), signal.{number})
    time.sleep(0.2)
    return before(*arguments, **named)

before, {name} = {name}, signalled
"""


@pytest.mark.fault(43)
@pytest.mark.parametrize(
    ("name", "number", "kept"),
    [
        ("tg.load_data", "SIGINT", set()),
        ("tg.save_tensors", "SIGTERM", {"final_model.safetensors"}),
        ("tg.quantize_model", "SIGTERM", {"final_model.safetensors"}),
        ("tg.Run.score_artifact", "SIGTERM", {"final_model.safetensors", ARTIFACT}),
    ],
)
def test_a_signal_anywhere_keeps_the_files_and_writes_a_result(name, number, kept, env, tmp_path):
    """While the data are loaded, the final weights saved, the model quantized or scored."""
    first = SIGNALS_ITSELF.format(name=name, number=number)
    run = Ranks(tmp_path, first=first, **env)
    assert run.end() == [5], run.said()
    assert result()["status"] == "interrupted"
    assert {path.name for path in Path("run").iterdir()} & {
        "final_model.safetensors",
        "checkpoint.safetensors",
        ARTIFACT,
    } == kept
    assert run.said().splitlines()[-1].startswith("error: stopped by a signal")
    if kept == {"final_model.safetensors"}:
        again = {**env, "RUN_DIR": "next"}
        assert tg.main(["--quantize", "run/final_model.safetensors"], again) == 0


# ---- Time ----


@pytest.mark.fault(26)
@pytest.mark.parametrize(("batches", "seconds"), [(2, 2.5), (0, 7.0)])
def test_a_calibration_beyond_its_reserve_ends_with_what_it_read(
    batches, seconds, env, monkeypatch, capsys
):
    """Two batches of 2.5 s fit between 14 s and 20 s. If it starts 7 s late, none does: all
    matrices are rounded."""
    now, backbone = move_clock(monkeypatch, lambda _: 1.0), tg.GPT.backbone
    calibrating, collect, solved = [], tg.collect_hessians, []

    def slow(model, ids, window=0):
        now[0] += seconds * len(calibrating)
        return backbone(model, ids, window)

    def collected(*arguments):
        if not batches:
            now[0] += seconds
        calibrating.append(True)
        hessians, used = collect(*arguments)
        calibrating.clear()
        solved.append((len(hessians), used))
        return hessians, used

    monkeypatch.setattr(tg.GPT, "backbone", slow)
    monkeypatch.setattr(tg, "collect_hessians", collected)
    env |= {"GPTQ_ENABLED": "1", "GPTQ_CALIB": "train", "MAX_WALLCLOCK_SECONDS": "20"}
    env |= {"GPTQ_RESERVE_SECONDS": "5", "ITERATIONS": "1000", "MICRO_BATCH_TOKENS": "128"}
    status = tg.main([], env | {"GPTQ_CALIB_TOKENS": "1024"})
    told = capsys.readouterr().out
    allowed = f"gptq: the time allowed {batches} of 8 calibration batches; raise GPTQ_RESERVE_SECO"
    assert allowed in told
    assert solved == [(18 if batches else 0, batches)]
    trained = result()["seconds"]["train"]
    assert result()["verdicts"]["train_seconds"] == ("PASS" if trained <= 20 else "FAIL")
    assert status == (0 if trained <= 20 else 1)
    assert trained == 14 + max(batches, 1) * seconds
    tg.load_artifact(Path("run") / ARTIFACT, tg.Hyperparameters())


@pytest.mark.fault(49)
def test_setting_the_system_clock_changes_nothing(env, monkeypatch):
    """Each call of time.time() is years away from the one before."""
    wall, jumps = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: wall() + (-1) ** next(jumps) * 1e8)
    assert tg.main([], {**env, "MAX_WALLCLOCK_SECONDS": "500"}) == 0
    assert result()["steps"] == 12
    assert 0 < result()["seconds"]["train"] < 60
    assert "time.time(" not in PROGRAM.read_text(encoding="utf-8")


@pytest.mark.fault(49)
def test_a_slow_step_is_in_the_result(env, monkeypatch):
    move_clock(monkeypatch, lambda step: 9.0 if step == 7 else 1.0)
    assert tg.main([], env) == 0
    assert result()["step_ms"]["p50"] == 1000.0
    assert 8000.0 < result()["step_ms"]["p99"] < 9000.0


# ---- The bytes of the code ----


def ran(
    *command: object, cwd: str = ".", given: bytes | None = None, **env: str
) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**KEPT, **env},
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace")


@pytest.mark.fault(51)
def test_a_link_another_folder_the_twin_and_another_locale_count_the_same_bytes(env):
    Path("sub").mkdir()
    Path("link.py").symlink_to(PROGRAM)
    twin = tg.packed_source(PROGRAM.read_bytes())
    Path("twin.py").write_bytes(twin)
    plain = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for script in ("../link.py", "../twin.py"):
        code, told = ran(script, "--check", cwd="sub", **env, **plain)
        assert code == 0, told
        assert f"check:ok code:{len(twin)} bytes" in told
    assert not list(Path("sub").iterdir())


@pytest.mark.fault(51)
def test_a_program_that_is_not_a_file_is_refused_before_training(env):
    source = PROGRAM.read_bytes()
    code, told = ran("-", given=source, **env)
    assert code == 2, told
    assert "run this program from a file, because its bytes count" in told
    assert "step:1/" not in told
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("__main__.py", source)
    Path("wrapped.pyz").write_bytes(archive.getvalue())
    shutil.rmtree("run", ignore_errors=True)
    code, told = ran("wrapped.pyz", **env)
    assert code == 2, told
    assert "run this program from a file, because its bytes count" in told
    Path("exec.py").write_text(f"exec(open({str(PROGRAM)!r}, encoding='utf-8').read())")
    shutil.rmtree("run", ignore_errors=True)
    code, told = ran("exec.py", **{**env, "ITERATIONS": "0"})
    # The file that runs is the wrapper: its packed twin is counted, or it is refused.
    assert code in (0, 2), told
    if code == 0:
        twins = [tg.packed_source(data) for data in (Path("exec.py").read_bytes(), source)]
        assert result()["bytes"]["code"] in map(len, twins)


# ---- --check ----


@pytest.mark.parametrize("bad", [{}, {"DATA_PATH": "nowhere"}, {"NUM_LAYERS": "0"}])
def test_check_reports_whether_a_run_could_start_and_writes_no_file(bad, env, monkeypatch, capsys):
    monkeypatch.setattr(tg.Trainer, "train", fail_in_training)
    assert tg.main(["--check"], env | bad) == (2 if bad else 0)
    lines = capsys.readouterr().out.splitlines()
    assert not list(Path().iterdir())
    if bad:
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return
    size = len(tg.packed_source(PROGRAM.read_bytes()))
    assert re.fullmatch(rf"check:ok code:{size} bytes disk:\d+ MiB", lines[-1])
    assert re.match(r"device:\S+ dtype:float32 .* attention:\w+$", lines[-4])
    for start_of in ("val_bpb:enabled", "val_loader:shards", "train_loader:dataset"):
        assert [line for line in lines if line.startswith(start_of)], start_of


@pytest.mark.fault(43)
def test_a_signal_ends_a_validation_during_training_at_once(env, monkeypatch):
    went_on = []

    def signalled(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        went_on.append("validation")
        raise MemoryError

    monkeypatch.setattr(tg, "score", signalled)
    assert tg.main([], {**env, "VAL_LOSS_EVERY": "5"}) == 5
    assert not went_on
    assert result()["status"] == "interrupted"
    assert Path("run/final_model.safetensors").exists()
