"""Checkpoints: a run that is stopped and resumed ends with the bytes of an undisturbed run."""

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

ARTIFACT, CHECKPOINT, FINAL = "final_model.int6.ptz", "checkpoint.safetensors", tg.FINAL_MODEL
SHORT = {**TINY, "ITERATIONS": "16", "WARMDOWN_ITERS": "8", "EVAL_STRIDE": "0"}
# SWA averages the weights after steps 12, 14 and 16: the rate is below 0.8 from step 11 on.
SWA = {"SWA_ENABLED": "1", "SWA_START_FRAC": "0.8", "SWA_EVERY": "2"}
VARIANTS = {
    "plain": ({}, "ema"),
    "smoothing": ({"LABEL_SMOOTHING": "0.1"}, "ema"),
    "JEPA": ({"JEPA_CHUNK_SIZE": "4", "JEPA_SIGREG": "lejepa", "JEPA_PHASE1_FRAC": "0.1"}, "ema"),
    "STP": ({"STP_ENABLED": "1"}, "ema"),
    "untied": ({"TIE_EMBEDDINGS": "0"}, "ema"),
    "no average": ({"EMA_ENABLED": "0"}, "raw"),
    "SWA": (SWA, "swa"),
}
# Each variant is stopped before SWA averages anything; SWA also after it averaged 1 or 2 weights.
STOPS = [*((variant, 7, 0) for variant in VARIANTS), ("SWA", 13, 1), ("SWA", 14, 2)]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def env(byte_corpus) -> dict[str, str]:
    return {**SHORT, "DATA_PATH": str(byte_corpus)}


def stop_in(step: int, monkeypatch, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal during one training step."""
    take_step, count = tg.Trainer.take_step, []

    def signalled(*arguments):
        count.append(0)
        if len(count) == step:
            os.kill(os.getpid(), number)
        return take_step(*arguments)

    monkeypatch.setattr(tg.Trainer, "take_step", signalled)


def move_clock(monkeypatch, seconds: float) -> list[float]:
    """Replaces the clock by a number that each training step raises by so many seconds."""
    now, take_step = [0.0], tg.Trainer.take_step

    def timed(*arguments):
        now[0] += seconds
        return take_step(*arguments)

    monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tg.Trainer, "take_step", timed)
    return now


def artifact(run: Path | str) -> bytes:
    return (Path(run) / ARTIFACT).read_bytes()


def names(run: str) -> set[str]:
    return {path.name for path in Path(run).iterdir()}


@pytest.mark.fault(43)
@pytest.mark.parametrize(("variant", "step", "averaged"), STOPS)
def test_a_resumed_run_ends_with_the_same_bytes(variant, step, averaged, env, monkeypatch):
    """By RESUME=auto in the run's own folder, and from its checkpoint in a new folder."""
    changes, weights = VARIANTS[variant]
    env |= changes
    assert tg.main([], {**env, "RUN_DIR": "whole"}) == 0
    with monkeypatch.context() as patch:
        stop_in(step, patch)
        assert tg.main([], {**env, "RUN_DIR": "a"}) == 5
    stopped = result_of(Path("a"))
    assert stopped["status"] == "interrupted"
    assert "continue with RESUME=auto" in stopped["reason"]
    assert names("a") >= {CHECKPOINT, FINAL, "result.json"}
    saved = load((Path("a") / CHECKPOINT).read_bytes())
    assert (len(saved["progress/losses"]), saved["progress/averaged"].item()) == (step, averaged)
    assert tg.main([], {**env, "RUN_DIR": "b", "RESUME": f"a/{CHECKPOINT}"}) == 0
    assert tg.main([], {**env, "RUN_DIR": "a", "RESUME": "auto"}) == 0
    assert f"resume: step {step}, " in Path("a/train.log").read_text()
    whole = result_of(Path("whole"))
    for run in ("a", "b"):
        for name in (ARTIFACT, FINAL):
            assert (Path(run) / name).read_bytes() == (Path("whole") / name).read_bytes()
        result = result_of(Path(run))
        assert (result["status"], result["steps"], result["weights"]) == ("ok", 16, weights)
        assert result["train_losses"] == whole["train_losses"]


STOPS_ONE = """
take_step, count = tg.Trainer.take_step, []

def signalled(*arguments):
    count.append(0)
    if RANK == 1 and len(count) == 7:
        os.kill(os.getpid(), signal.SIGTERM)
    return take_step(*arguments)

tg.Trainer.take_step = signalled
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


def test_the_seconds_of_all_parts_of_a_run_are_added(env, monkeypatch):
    """The limit on seconds holds for all parts of a run together."""
    env |= {"MAX_WALLCLOCK_SECONDS": "1000", "RUN_DIR": "run"}
    now = move_clock(monkeypatch, 30.0)
    with monkeypatch.context() as patch:
        stop_in(5, patch)
        assert tg.main([], env) == 5
    now[0] += 10_000  # between the two parts nothing trains
    assert tg.main([], {**env, "RESUME": "auto"}) == 0
    result = result_of(Path("run"))
    assert "resume: step 5, 150.0 s trained" in Path("run/train.log").read_text()
    assert result["seconds"]["train"] == 480.0
    assert result["step_ms"] == {"p50": 30_000.0, "p99": 30_000.0}


def test_a_resumed_run_stops_before_the_limit(env, monkeypatch):
    """It knows from its checkpoint how long a step takes: a fourth one would end at 120 s."""
    env |= {"MAX_WALLCLOCK_SECONDS": "100", "RUN_DIR": "run"}
    move_clock(monkeypatch, 30.0)
    with monkeypatch.context() as patch:
        stop_in(3, patch)
        assert tg.main([], env) == 5
    assert tg.main([], {**env, "RESUME": "auto"}) == 0
    result = result_of(Path("run"))
    assert (result["steps"], result["seconds"]["train"]) == (3, 90.0)
    assert result["verdicts"]["train_seconds"] == "PASS"


def test_reading_a_checkpoint_is_not_training(env, monkeypatch):
    env |= {"RUN_DIR": "run"}
    now, load_checkpoint = move_clock(monkeypatch, 30.0), tg.load_checkpoint

    def slow(*arguments):
        now[0] += 1000.0
        return load_checkpoint(*arguments)

    monkeypatch.setattr(tg, "load_checkpoint", slow)
    with monkeypatch.context() as patch:
        stop_in(5, patch)
        assert tg.main([], env) == 5
    assert tg.main([], {**env, "RESUME": "auto"}) == 0
    assert result_of(Path("run"))["seconds"]["train"] == 480.0


@pytest.mark.parametrize(
    ("every", "steps"), [("5", [5, 10, 15]), ("4s", [4, 8, 12, 16]), ("0", []), ("0s", [])]
)
def test_checkpoints_come_after_so_many_steps_or_seconds(every, steps, env, monkeypatch):
    now, kept = move_clock(monkeypatch, 1.0), []

    def noted(path, data, write=tg.write_atomically):
        if path.name == CHECKPOINT:
            kept.append(now[0])
        write(path, data)

    monkeypatch.setattr(tg, "write_atomically", noted)
    assert tg.main([], {**env, "RUN_DIR": "run", "CHECKPOINT_EVERY": every}) == 0
    assert kept == steps


@pytest.mark.parametrize("every", ["-5", "5m", "s", "1.5", "", "5 s"])
def test_a_malformed_checkpoint_every_is_refused(every, env, capsys):
    assert tg.main([], {**env, "RUN_DIR": "run", "CHECKPOINT_EVERY": every}) == 2
    told = f"CHECKPOINT_EVERY={every!r}: must be steps, such as 500, or seconds, such as 60s"
    assert told in capsys.readouterr().out


def test_auto_starts_a_new_run_where_there_is_none(env):
    env |= {"ITERATIONS": "3", "RUN_ID": "new", "RESUME": "auto"}
    assert tg.main([], env) == 0
    assert "resume:" not in Path("logs/new/train.log").read_text().replace(" resume:auto", "")
    assert result_of(Path("logs/new"))["steps"] == 3


def test_auto_needs_the_name_of_a_run(env, capsys):
    assert tg.main([], {**env, "RESUME": "auto"}) == 2
    assert "RESUME=auto: needs RUN_ID or RUN_DIR" in capsys.readouterr().out
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


def test_a_checkpoint_names_its_tensors_by_parameter(stopped):
    h, weights, tensors = tg.load_checkpoint(stopped / CHECKPOINT, tg.Hyperparameters())
    model = tg.GPT(h)
    roles = tg.parameter_roles(model)
    matrices = {name for name, role in roles.items() if role == "matrix"}
    progress = {"elapsed", "losses", "times", "averaged"}
    moments = {f"{n}/{key}" for n in roles for key in ("step", "exp_avg", "exp_avg_sq")}
    want = {
        "model": {*roles},
        "average": {*roles},
        "muon": matrices,
        "adamw": {n for n in moments if n.rpartition("/")[0] not in matrices},
        "progress": progress,
    }
    found = {kind: set() for kind in want}
    for name in tensors:
        kind, _, rest = name.partition("/")
        found[kind].add(rest)
    assert found == want
    for name, p in model.named_parameters():
        assert tensors[f"model/{name}"].shape == weights[name].shape == p.shape
        assert torch.equal(tensors[f"average/{name}"], weights[name])
    final = load((stopped / FINAL).read_bytes())
    assert final.keys() == weights.keys()
    assert all(torch.equal(final[name], weight) for name, weight in weights.items())


def refusal(path: Path, env: dict[str, str], capsys) -> str:
    capsys.readouterr()
    assert tg.main([], {**env, "RUN_DIR": "next", "RESUME": str(path)}) == 2
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("error: ")]
    assert result_of(Path("next"))["status"] == "data"
    assert not (Path("next") / FINAL).exists()
    return line


@pytest.mark.fault(38)
def test_a_checkpoint_of_another_model_is_refused_by_what_differs(stopped, env, capsys):
    env |= {"NUM_LAYERS": "2", "ROPE_BASE": "5000"}
    line = refusal(stopped / CHECKPOINT, env, capsys)
    before, _, told = line.partition(": its model has ")
    assert before == f"error: RESUME={stopped / CHECKPOINT}"
    assert told == "NUM_LAYERS=3 ROPE_BASE=10000.0; set the same"


UNREADABLE, NO_STATE = "cannot be read as a checkpoint", "not a training state of this model"


def damaged(stopped: Path) -> dict[str, tuple[bytes | None, str]]:
    """Files that are no checkpoint of this run, and a part of the error for each."""
    whole = (stopped / CHECKPOINT).read_bytes()
    saved = load(whole)
    settings = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]

    def without(*starts: str, **instead: torch.Tensor) -> bytes:
        kept = {name: t for name, t in saved.items() if not name.startswith(starts or "?")}
        return write({**kept, **instead}, settings)

    weights = {
        name.removeprefix("average/"): t for name, t in saved.items() if name.startswith("average/")
    }
    shorter = saved["progress/times"][:1].clone()
    return {
        "absent": (None, UNREADABLE),
        "cut": (whole[: len(whole) // 2], UNREADABLE),
        "foreign": (b"GGUF" + bytes(1000), UNREADABLE),
        "artifact": (b"PGOLFGPT" + bytes(1000), UNREADABLE),
        "longer": (whole + b"\0", UNREADABLE),
        "of another program": (write(weights, {"format": "pt"}), UNREADABLE),
        "without metadata": (write(weights), UNREADABLE),
        "without some settings": (write(weights, {"settings": "{}"}), UNREADABLE),
        "one weight less": (without("average/skip_weights"), UNREADABLE),
        "one weight more": (without(**{"average/other": torch.ones(3)}), UNREADABLE),
        "half floats": (write({name: t.half() for name, t in saved.items()}, settings), UNREADABLE),
        "average alone": (
            without("model/", "muon/", "adamw/", "progress/"),
            f"{NO_STATE}: KeyError('progress/elapsed')",
        ),
        "no weights": (without("model/"), f"{NO_STATE}: KeyError('model/"),
        "no momenta": (without("muon/"), f"{NO_STATE}: KeyError('muon/"),
        "no AdamW": (without("adamw/"), f"{NO_STATE}: KeyError('adamw/"),
        "no progress": (without("progress/"), f"{NO_STATE}: KeyError('progress/elapsed')"),
        "another shape": (
            without(**{"model/tok_emb.weight": torch.ones(3, 3)}),
            f"{NO_STATE}: ValueError('model/tok_emb.weight has shape [3, 3]')",
        ),
        "fewer times than losses": (without(**{"progress/times": shorter}), NO_STATE),
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


def test_averaged_weights_alone_cannot_be_resumed(stopped, env, capsys):
    line = refusal(stopped / FINAL, env, capsys)
    assert f"RESUME={stopped / FINAL}: {NO_STATE}" in line


def test_a_checkpoint_is_quantized_as_its_average(stopped, env):
    for name in (CHECKPOINT, FINAL):
        assert tg.main(["--quantize", str(stopped / name)], {**env, "RUN_DIR": name}) == 0
    assert artifact(CHECKPOINT) == artifact(FINAL)


@pytest.mark.fault(45)
def test_a_full_disk_keeps_the_previous_checkpoint_and_the_run(env, monkeypatch, capsys):
    """After the first checkpoint no file may grow beyond 100,000 bytes, of about 500,000."""
    limits, write = resource.getrlimit(resource.RLIMIT_FSIZE), tg.write_atomically
    sizes = []

    def filling(path, data):
        if path.name == CHECKPOINT:
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
    warning = f"warning: run/{CHECKPOINT} could not be written: [Errno 27]"
    assert capsys.readouterr().out.count(warning) == 2
    assert not [name for name in names("run") if name.endswith(".part")]
    assert tg.main([], {**env, "RUN_DIR": "next", "RESUME": f"run/{CHECKPOINT}"}) == 0
    assert "resume: step 5, " in Path("next/train.log").read_text()
    assert artifact("next") == artifact("run")


# Leaves the process by SIGKILL in the middle of the second checkpoint's bytes.
KILLED_IN_A_WRITE = """
fsync, count = os.fsync, []

def killed(number):
    count.append(number)
    if len(count) == 4:  # the program's two forms, a checkpoint, a checkpoint
        os.ftruncate(number, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(number)

os.fsync = killed
"""


@pytest.mark.fault(44)
def test_a_kill_in_the_middle_of_a_write_keeps_the_previous_file(env, tmp_path):
    env |= {"RUN_DIR": "run", "CHECKPOINT_EVERY": "5"}
    ranks = Ranks(tmp_path, first=KILLED_IN_A_WRITE, **env)
    assert ranks.end() == [-signal.SIGKILL], ranks.said()
    (part,) = [name for name in names("run") if name.endswith(".part")]
    assert part.startswith(CHECKPOINT)
    assert tg.main([], {**env, "RESUME": "auto"}) == 0
    assert "resume: step 5, " in Path("run/train.log").read_text()
    assert tg.main([], {**env, "RUN_DIR": "whole"}) == 0
    assert artifact("run") == artifact("whole")


@pytest.mark.slow
@pytest.mark.fault(44)
def test_killed_at_any_moment_a_run_resumes_to_the_same_bytes(byte_corpus, tmp_path):
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
