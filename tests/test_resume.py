"""Checkpoints: a run that goes on ends at the bytes of one that was never stopped."""

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY
from launch import PROGRAM, Ranks, result_of, start
from safetensors.torch import load
from safetensors.torch import save as write

import train_gpt as tg

ARTIFACT = "final_model.int6.ptz"
SHORT = {**TINY, "ITERATIONS": "16", "WARMDOWN_ITERS": "8", "EVAL_STRIDE": "0"}
VARIANTS = {
    "plain": {},
    "smoothing": {"LABEL_SMOOTHING": "0.1"},
    "JEPA": {"JEPA_CHUNK_SIZE": "4", "JEPA_SIGREG": "lejepa", "JEPA_PHASE1_FRAC": "0.1"},
    "no average": {"EMA_ENABLED": "0"},
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def env(byte_corpus) -> dict[str, str]:
    return {**SHORT, "DATA_PATH": str(byte_corpus)}


def stop_in(step: int, monkeypatch, number: int = signal.SIGTERM) -> None:
    """Send this process a signal within a step, from now on once."""
    train_step, count = tg.train_step, []

    def signalled(*arguments):
        count.append(0)
        if len(count) == step:
            os.kill(os.getpid(), number)
        return train_step(*arguments)

    monkeypatch.setattr(tg, "train_step", signalled)


def artifact(run: Path | str) -> bytes:
    return (Path(run) / ARTIFACT).read_bytes()


def names(run: str) -> set[str]:
    return {path.name for path in Path(run).iterdir()}


@pytest.mark.fault(43)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_goes_on_to_the_same_bytes(variant, env, monkeypatch):
    """By the run's own name, and from its checkpoint to a new run."""
    env |= VARIANTS[variant]
    assert tg.main([], {**env, "RUN_DIR": "whole"}) == 0
    with monkeypatch.context() as patch:
        stop_in(7, patch)
        assert tg.main([], {**env, "RUN_DIR": "a"}) == 5
    stopped = result_of(Path("a"))
    assert stopped["status"] == "interrupted"
    assert "RESUME=auto goes on" in stopped["reason"]
    assert names("a") >= {"checkpoint.safetensors", "final_model.safetensors", "result.json"}
    assert tg.main([], {**env, "RUN_DIR": "b", "RESUME": "a/checkpoint.safetensors"}) == 0
    assert tg.main([], {**env, "RUN_DIR": "a", "RESUME": "auto"}) == 0
    assert "resume: step 7, " in Path("a/train.log").read_text()
    whole = result_of(Path("whole"))
    for run in ("a", "b"):
        assert artifact(run) == artifact("whole")
        result = result_of(Path(run))
        assert (result["status"], result["steps"]) == ("ok", 16)
        assert result["train_losses"] == whole["train_losses"]


STOPS_ONE = """
train_step, count = tg.train_step, []

def signalled(*arguments):
	count.append(0)
	if RANK == 1 and len(count) == 7:
		os.kill(os.getpid(), signal.SIGTERM)
	return train_step(*arguments)

tg.train_step = signalled
"""


@pytest.mark.fault(43, 48)
def test_a_signal_to_one_rank_stops_both_at_one_step(env, tmp_path):
    whole = Ranks(tmp_path, world=2, **{**env, "RUN_DIR": "whole"})
    assert whole.end() == [0, 0], whole.said()
    run = Ranks(tmp_path, world=2, first=STOPS_ONE, **{**env, "RUN_DIR": "run"})
    assert run.end() == [5, 5], run.said()
    assert result_of(Path("run"))["status"] == "interrupted"
    again = Ranks(tmp_path, world=2, **{**env, "RUN_DIR": "run", "RESUME": "auto"})
    assert again.end() == [0, 0], again.said()
    assert "resume: step 7, " in again.said()
    assert artifact("run") == artifact("whole")


def test_seconds_go_on_too(env, monkeypatch):
    """The cap is one of all the parts of a run together."""
    env |= {"MAX_WALLCLOCK_SECONDS": "1000", "RUN_DIR": "run"}
    now, train_step = [0.0], tg.train_step

    def timed(*arguments):
        now[0] += 30.0
        return train_step(*arguments)

    monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tg, "train_step", timed)
    with monkeypatch.context() as patch:
        stop_in(5, patch)
        assert tg.main([], env) == 5
    now[0] += 10_000  # between the two nothing trains
    assert tg.main([], {**env, "RESUME": "auto"}) == 0
    result = result_of(Path("run"))
    assert "resume: step 5, 150.0 s trained" in Path("run/train.log").read_text()
    assert result["seconds"]["train"] == 480.0
    assert result["step_ms"] == {"p50": 30_000.0, "p99": 30_000.0}


@pytest.mark.parametrize(
    ("every", "steps"), [("5", [5, 10, 15]), ("4s", [4, 8, 12, 16]), ("0", []), ("0s", [])]
)
def test_checkpoints_come_after_so_many_steps_or_seconds(every, steps, env, monkeypatch):
    now, kept, train_step = [0.0], [], tg.train_step

    def timed(*arguments):
        now[0] += 1.0
        return train_step(*arguments)

    def noted(path, data, write=tg.write_atomically):
        if path.name == "checkpoint.safetensors":
            kept.append(now[0])
        write(path, data)

    monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tg, "train_step", timed)
    monkeypatch.setattr(tg, "write_atomically", noted)
    assert tg.main([], {**env, "RUN_DIR": "run", "CHECKPOINT_EVERY": every}) == 0
    assert kept == steps


@pytest.mark.parametrize("every", ["-5", "5m", "s", "1.5", "", "5 s"])
def test_a_cadence_that_is_none_is_refused(every, env, capsys):
    assert tg.main([], {**env, "RUN_DIR": "run", "CHECKPOINT_EVERY": every}) == 2
    told = f"CHECKPOINT_EVERY={every!r} must be steps, as 500, or seconds, as 60s"
    assert told in capsys.readouterr().out


def test_auto_begins_where_nothing_is(env):
    env |= {"ITERATIONS": "3", "RUN_ID": "new", "RESUME": "auto"}
    assert tg.main([], env) == 0
    assert "resume:" not in Path("logs/new/train.log").read_text().replace(" resume:auto", "")
    assert result_of(Path("logs/new"))["steps"] == 3


def test_auto_needs_the_name_of_a_run(env, capsys):
    assert tg.main([], {**env, "RESUME": "auto"}) == 2
    assert "RESUME='auto' can be auto only with RUN_ID" in capsys.readouterr().out
    assert not Path("logs").exists()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, byte_corpus) -> Path:
    """The folder of a run that was stopped after 3 of 16 steps."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stop_in(3, patch)
        assert tg.main([], {**SHORT, "DATA_PATH": str(byte_corpus), "RUN_DIR": "run"}) == 5
    return folder / "run"


def refusal(path: Path, env: dict[str, str], capsys) -> str:
    capsys.readouterr()
    assert tg.main([], {**env, "RUN_DIR": "next", "RESUME": str(path)}) == 2
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("error: ")]
    assert result_of(Path("next"))["status"] == "data"
    assert not Path("next/final_model.safetensors").exists()
    return line


@pytest.mark.fault(38)
def test_a_checkpoint_of_another_model_is_refused_by_what_differs(stopped, env, capsys):
    env |= {"NUM_LAYERS": "2", "ROPE_BASE": "5000"}
    line = refusal(stopped / "checkpoint.safetensors", env, capsys)
    assert "its model has " in line
    assert "'num_layers': 3" in line
    assert "'rope_base': 10000.0" in line
    assert line.count("': ") == 2
    assert line.endswith("set the same")


def damaged(stopped: Path) -> dict[str, tuple[bytes | None, str]]:
    """Files that are no checkpoint of this run, and what is said of each; some by the library."""
    whole = (stopped / "checkpoint.safetensors").read_bytes()
    saved = load(whole)
    settings = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]

    def without(*starts: str, **instead: torch.Tensor) -> bytes:
        kept = {name: t for name, t in saved.items() if not name.startswith(starts)}
        return write({**kept, **instead}, settings)

    weights = {name: t for name, t in saved.items() if "/" not in name}
    one, shorter = "params/0", saved["clock/steps"][:1].contiguous()
    return {
        "absent": (None, "cannot be read as a checkpoint"),
        "cut": (whole[: len(whole) // 2], "cannot be read as a checkpoint"),
        "foreign": (b"GGUF" + bytes(1000), "cannot be read as a checkpoint"),
        "artifact": (b"PGOLFGPT" + bytes(1000), "cannot be read as a checkpoint"),
        "longer": (whole + b"\0", "cannot be read as a checkpoint"),
        "of another program": (write(weights, {"format": "pt"}), "cannot be read as a checkpoint"),
        "without texts": (write(weights), "cannot be read as a checkpoint"),
        "one weight less": (without("skip_weights"), "cannot be read as a checkpoint"),
        "half floats": (
            write({name: t.half() for name, t in saved.items()}, settings),
            "cannot be read as a checkpoint",
        ),
        "average alone": (
            without("params/", "momenta/", "adamw/", "clock/"),
            "no training state: KeyError('clock/steps')",
        ),
        "no params": (without("params/"), "no training state: KeyError('params/0')"),
        "no momenta": (without("momenta/"), "no training state: KeyError('momenta/0')"),
        "no AdamW": (without("adamw/"), "no training state: KeyError('adamw/0/step')"),
        "no clock": (without("clock/"), "no training state: KeyError('clock/steps')"),
        "half a clock": (without(**{"clock/steps": shorter}), "no training state: ValueError"),
        "other shapes": (without(**{one: torch.ones(3, 3)}), "no training state: RuntimeError"),
    }


def test_what_is_no_checkpoint_is_refused(stopped, env, capsys):
    for name, (data, says) in damaged(stopped).items():
        path = Path(f"{name}.safetensors")
        if data is not None:
            path.write_bytes(data)
        for kept in Path().glob("next/*"):
            kept.unlink()
        line = refusal(path, env, capsys)
        assert str(path) in line, name
        assert says in line, name


def test_the_averaged_model_alone_is_no_state_to_go_on_from(stopped, env, capsys):
    line = refusal(stopped / "final_model.safetensors", env, capsys)
    assert f"RESUME={stopped}/final_model.safetensors: no training state" in line


def test_a_checkpoint_is_quantized_as_its_average(stopped, env):
    for name in ("checkpoint.safetensors", "final_model.safetensors"):
        assert tg.main(["--quantize", str(stopped / name)], {**env, "RUN_DIR": name}) == 0
    assert artifact("checkpoint.safetensors") == artifact("final_model.safetensors")


@pytest.mark.fault(45)
def test_a_full_disk_keeps_the_checkpoint_before_and_the_run(env, monkeypatch, capsys):
    """No file may grow beyond 100,000 bytes after the first checkpoint, of some 500,000."""
    limits, write = resource.getrlimit(resource.RLIMIT_FSIZE), tg.write_atomically
    sizes = []

    def filling(path, data):
        if path.name == "checkpoint.safetensors":
            try:
                resource.setrlimit(
                    resource.RLIMIT_FSIZE, (100_000 if sizes else limits[0], limits[1])
                )
                write(path, data)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                sizes.append(len(data))
        else:
            write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(tg, "write_atomically", filling)
        assert tg.main([], {**env, "RUN_DIR": "run", "CHECKPOINT_EVERY": "5"}) == 0
    assert len(sizes) == 3
    assert min(sizes) > 100_000
    assert (
        capsys.readouterr().out.count("warning: checkpoint.safetensors is not written: [Errno 27]")
        == 2
    )
    assert not [name for name in names("run") if name.endswith(".part")]
    assert tg.main([], {**env, "RUN_DIR": "next", "RESUME": "run/checkpoint.safetensors"}) == 0
    assert "resume: step 5, " in Path("next/train.log").read_text()
    assert artifact("next") == artifact("run")


# Leave the process by SIGKILL in the middle of the second checkpoint's bytes.
KILLED_IN_A_WRITE = """
fsync, count = os.fsync, []

def killed(number):
	count.append(number)
	if len(count) == 3:  # the copy of the source, a checkpoint, a checkpoint
		os.ftruncate(number, 1000)
		os.kill(os.getpid(), signal.SIGKILL)
	fsync(number)

os.fsync = killed
"""


@pytest.mark.fault(44)
def test_a_kill_in_the_middle_of_a_write_leaves_the_file_before(env, tmp_path):
    env |= {"RUN_DIR": "run", "CHECKPOINT_EVERY": "5"}
    ranks = Ranks(tmp_path, first=KILLED_IN_A_WRITE, **env)
    assert ranks.end() == [-signal.SIGKILL], ranks.said()
    assert [name for name in names("run") if name.endswith(".part")]
    assert tg.main([], {**env, "RESUME": "auto"}) == 0
    assert "resume: step 5, " in Path("run/train.log").read_text()
    assert tg.main([], {**env, "RUN_DIR": "whole"}) == 0
    assert artifact("run") == artifact("whole")


@pytest.mark.slow
@pytest.mark.fault(44)
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(byte_corpus, tmp_path):
    """Between start-up and scoring, at 20 moments."""
    env = {**TINY, "DATA_PATH": byte_corpus, "CHECKPOINT_EVERY": "3", "RESUME": "auto"}
    env |= {"GPTQ_ENABLED": "1", "ITERATIONS": "40"}

    began = time.monotonic()
    whole = start(tmp_path, PROGRAM, **{**env, "RUN_DIR": "whole"})
    assert whole.wait(200) == 0, (tmp_path / "screen.txt").read_text()
    seconds = time.monotonic() - began
    rng, tried = random.Random(0), 0
    for n in range(20):
        run, status = tmp_path / f"run{n}", 0
        while status == 0:  # it was done before the moment came
            shutil.rmtree(run, ignore_errors=True)
            killed = start(tmp_path, PROGRAM, **env, RUN_DIR=run)
            time.sleep(rng.uniform(0, seconds))
            killed.kill()
            status, tried = killed.wait(60), tried + 1
        assert status == -signal.SIGKILL
        again = start(tmp_path, PROGRAM, **env, RUN_DIR=run)
        assert again.wait(200) == 0, (tmp_path / "screen.txt").read_text()
        assert artifact(run) == artifact(tmp_path / "whole")
        assert (result_of(run)["status"], result_of(run)["steps"]) == ("ok", 40)
    assert tried < 60
