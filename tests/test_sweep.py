"""records/sweep.py: what is run, in which environment, and sweeps that fail or are cut off."""

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from launch import KEPT

sys.path.insert(0, str(ROOT / "records"))

import compare
import plot
import sweep
from runs import read_planned, read_run

# A program in the place of train_gpt.py; TOKENIZER_PATH says how it ends.
STUB = """
import json, os, signal, sys, time
from pathlib import Path
folder, end = Path(os.environ["RUN_DIR"]), os.environ.get("TOKENIZER_PATH", "0")
with open(folder / "train.log", "a" if os.environ.get("RESUME") == "auto" else "x") as log:
    log.write("started\\n")
(folder / "env.json").write_text(json.dumps(dict(os.environ)))
def finish(status, code, **more):
    (folder / "result.json").write_text(json.dumps({"status": status, **more}))
    sys.exit(code)
def stop(*_):
    time.sleep(0.5)  # it saves
    finish("interrupted", 5, reason="a signal")
signal.signal(signal.SIGTERM, stop)
for step in range(1, 21):
    event = {"event": "step", "step": step, "seconds": step / 10, "train_loss": 5.0 - step / 20}
    with open(folder / "events.jsonl", "a") as events:
        events.write(json.dumps(event) + "\\n")
    time.sleep(0.15 if end == "slow" else 0)
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "oom":
    finish("oom", 3, reason="out of\\nmemory")
if end == "raises":
    raise ValueError("no result")
names = "val_loss", "val_bpb", "nats", "tokens", "bytes", "stride", "seconds"
scores = {"plain": dict.fromkeys(names, 1.5)}
losses = [5.0 - step / 20 for step in range(1, 61)]  # of which only 20 were logged
settings = {"seed": int(os.environ["SEED"])}
more = {"steps": 60, "train_losses": losses, "seconds": {"train": 33.0}}
finish("ok", 0, scores=scores, settings=settings, **more)
"""


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A checkout whose train_gpt.py is the stub."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "train_gpt.py").write_text(STUB, encoding="utf-8")
    monkeypatch.setattr(sweep, "ROOT", root)
    monkeypatch.chdir(tmp_path)
    for name in sweep.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return root


@pytest.fixture
def out(tmp_path):
    return tmp_path / "an out"


def states(out):
    """Status and last line of the reason of each trial, by its name and seed."""
    plan = sweep.read_plan(out)
    runs = {(t.name, t.seed): read_planned(plan.folder_of(t)) for t in plan.runs}
    return {key: (run.status, "".join(run.reason.splitlines()[-1:])) for key, run in runs.items()}


def run(out, *argv, env=None):
    return sweep.main([*argv, "--out", str(out)], env or {})


def start(out, *argv):
    """Starts a sweep of the stub in a process of its own."""
    code = f"""
import signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "records")!r})
import sweep
signal.signal(signal.SIGTERM, signal.default_int_handler)
sweep.ROOT = Path({str(sweep.ROOT)!r})
sys.exit(sweep.main(sys.argv[1:], {{}}))
"""
    command = [sys.executable, "-c", code, *argv, "--out", str(out)]
    return subprocess.Popen(command, env=KEPT, stdout=subprocess.PIPE, text=True)


def wait_until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---- What is run ----


def test_grid_one_at_a_time_and_file(tmp_path):
    grid = sweep.make_runs(["XSA_LAST_N=0,4", "MUON_WD=0.1,0.2"], [1, 2], False)
    assert len(grid) == len(set(grid)) == 8
    assert [t.seed for t in grid] == [1] * 4 + [2] * 4  # every trial once before any twice
    alone = sweep.make_runs(["XSA_LAST_N=0,4", "MUON_WD=0.1"], [7], True)
    assert [t.name for t in alone] == ["base", "XSA_LAST_N=0", "XSA_LAST_N=4", "MUON_WD=0.1"]
    path = tmp_path / "sweep.toml"
    path.write_text(
        "seeds = [3, 4]\n[base]\nSMEAR_GATE = true\nPRESET = 'cpu'\n"
        "[trials.layers]\nVE_LAYERS = '0,1'\n[trials.none]\n",
        encoding="utf-8-sig",
    )
    base, trials = sweep.read_file(path, [])
    assert base == {"SMEAR_GATE": "1", "PRESET": "cpu"}
    names = [(t.name, dict(t.changes), t.seed) for t in trials]
    assert names[:2] == [("layers", {"VE_LAYERS": "0,1"}, 3), ("none", {}, 3)]
    assert [seed for _, _, seed in names] == [3, 3, 4, 4]
    assert {t.seed for t in sweep.read_file(path, [9])[1]} == {9}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "records/studies").glob("*.toml")), ids=lambda path: path.name
)
def test_train_gpt_accepts_the_settings_of_every_study(path, tmp_path):
    plan, _ = sweep.parse(["--file", str(path), "--out", str(tmp_path)], {})
    plan.check()
    assert "none" in {trial.name for trial in plan.runs}


def refused(out, capsys, *argv, env=None):
    """The one line of a sweep that is refused."""
    assert run(out, *argv, env=env) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["NUM_LAYER=2"], "NUM_LAYERS"),
        (["num_layers=2"], "num_layers is not known; did you mean NUM_LAYERS?"),
        (["--num_layers", "3"], "--num_layers: unknown; settings are given as NUM_LAYERS=3"),
        (["WEATHER=1"], "WEATHER is not a setting"),
        (["SEED=1,2"], "--seeds"),
        (["XSA_LAST_N"], "SETTING=VALUE"),
        (["XSA_LAST_N=1", "XSA_LAST_N=2"], "XSA_LAST_N is there twice; give all its values"),
        (["PRESET=cpu,"], "an empty value, or one with commas, belongs into --file"),
        (["VE_LAYERS=0,1"], "VE_LAYERS=0,1: an empty value, or one with commas, belongs into"),
        (["XSA_LAST_N=1", "--seeds", "1,1"], "two runs have the same name"),
        (["XSA_LAST_N=1", "--seeds=-1"], "seed -1"),
        (["XSA_LAST_N=1", "--seeds", "1,b"], "1,b"),
        (["XSA_LAST_N=1", "--seeds", ""], "give whole numbers"),
        (["MUON_WD=a"], "MUON_WD='a'"),
        (["NUM_HEADS=3"], "NUM_HEADS=3"),
        (["MODEL_DIM=512", "--ranks", "7"], "7 ranks"),
        (["--cpu"], "no runs"),
        (["XSA_LAST_N=1", "--file", "a.toml"], "XSA_LAST_N=1: --file has the trials"),
        (["XSA_LAST_N=1"], "--cpu"),  # no GPU is here
        (["XSA_LAST_N=1", "--gpus", "0", "--ranks", "2"], "--ranks 2"),
        (["MUON_WD=0", "--slurm=gpu -p"], "gpu is no option"),
        (["MUON_WD=0", "--slurm=--time=30 # minutes"], "# is no option"),
        (["MUON_WD=0", "--slurm=-J Big simulation"], "simulation is no option"),
        (["MUON_WD=0", "--slurm=--comment='a"], "No closing quotation"),
        (["MUON_WD=0", "--slurm=--array=1-2"], "the sweep sets --array"),
        (["MUON_WD=0", "--slurm=-p gpu --arr 1-2"], "--arr: the sweep sets --array"),
        (["MUON_WD=0", "--slurm=--comment='a\nb'"], "an option has one line"),
        (["MUON_WD=0", "--slurm", "--array-limit", "0"], "at least 1"),
    ],
)
def test_a_sweep_that_cannot_run_is_an_error(stub, out, monkeypatch, capsys, argv, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert message in refused(out, capsys, *argv)


@pytest.mark.parametrize(("name", "message"), [("SEED", "use --seeds"), ("RUN_DIR", "use --out")])
def test_a_variable_that_the_sweep_sets_itself_is_an_error(stub, out, capsys, name, message):
    env = {name: "3", "PATH": "/bin"}
    assert message in refused(out, capsys, "MUON_WD=0", "--cpu", env=env)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NUM_LAYER", "did you mean NUM_LAYERS?"),
        ("num_layers", "did you mean NUM_LAYERS?"),
        ("ROPE_YARN", "a setting of published scripts"),
    ],
)
def test_a_variable_near_a_setting_is_warned_of(stub, out, capsys, name, message):
    env = {name: "3", "PATH": "/bin"}
    assert sweep.main(["MUON_WD=0", "--list", "--out", str(out)], env) == 0
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {name} ")
    assert message in warning


TRIALS = "\n[trials.a]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"[Base]\nPRESET='cpu'{TRIALS}", "Base is not known; did you mean base?"),
        (f"[other]{TRIALS}", "other is not one of seeds, base, trials"),
        (f"PRESET = 'cpu'{TRIALS}", "PRESET stands outside [base] and [trials.NAME]"),
        (f"seed = [1]{TRIALS}", "did you mean seeds?"),
        (f"[base.inner]\nMUON_WD=0{TRIALS}", "[base]: inner is not a setting"),
        ("[trials]\nPRESET='cpu'", "trials.PRESET is no table of settings"),
        ("[trials.a.MUON_WD]\nx=0", "[trials.a]: MUON_WD = {'x': 0}: give"),
        ("[[trials]]\nMUON_WD=0", "trials is no table"),
        (f"{TRIALS}MUON_WDD = 0", "[trials.a]: MUON_WDD is not known; did you mean MUON_WD?"),
        (f"{TRIALS}SEED = 6", "use --seeds"),
        (f"{TRIALS}VE_LAYERS = [0, 1]", "VE_LAYERS = [0, 1]: give str, int, float"),
        (f"{TRIALS}NUM_LAYERS = true", "NUM_LAYERS = True: give str, int, float"),
        (f"{TRIALS}NUM_LAYERS = 4.0", "NUM_LAYERS='4.0': must be a whole number"),
        (f"{TRIALS}MUON_WD = 2020-01-01", "MUON_WD = datetime.date(2020, 1, 1): give"),
        (f"seeds = 7{TRIALS}", "seeds = 7: give whole numbers"),
        (f"seeds = '1337'{TRIALS}", "seeds = '1337': give"),
        (f"seeds = [true, 1.5]{TRIALS}", "seeds = [True, 1.5]: give"),
        (f"{TRIALS}MUON_WD = ", "Invalid value"),
        ("[trials.'a[b]']", "[trials.a[b]]: use letters"),
        ("[trials.a_seed7]", "a_seed7: a trial's name ends in no seed"),
        ("[trials.A]\n[trials.a]", "two runs have the same name, in any case, and seed"),
        (b"[trials.a\xff]", "can't decode byte"),
    ],
)
def test_nothing_in_a_file_is_ignored(stub, out, tmp_path, capsys, text, message):
    path = tmp_path / "sweep.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused(out, capsys, "--file", str(path), "--cpu")


COMMAND = "MUON_WD=0/seed1337/command.sh"
FAULTS_OF_FILES = {
    "--file absent": (["--file", "absent"], lambda out: None, "absent: No such file"),
    "--file dangling": (["--file", "d"], lambda out: Path("d").symlink_to("x"), "d: No such"),
    "--file folder": (["--file", "d"], lambda out: Path("d").mkdir(), "d: Is a directory"),
    "full disk": (
        [],
        lambda out: None,
        "an out/sweep.json: No space left on device; give another path",
    ),
    "out is a file": ([], lambda out: out.touch(), "an out/sweep.json: Not a directory"),
    "out dangles": ([], lambda out: out.symlink_to("absent"), "an out: File exists"),
    "plan": ([], lambda out: (out / "sweep.json").mkdir(parents=True), "sweep.json: Is a"),
    "lock": ([], lambda out: (out / "sweep.lock").mkdir(parents=True), "sweep.lock: Is a"),
    "trial is a file": ([], lambda out: [out.mkdir(), (out / "MUON_WD=0").touch()], "MUON_WD=0"),
    "command": ([], lambda out: (out / COMMAND).mkdir(parents=True), "command.sh: Is a directory"),
    "program": ([], lambda out: Path("checkout/train_gpt.py").unlink(), "train_gpt.py: No such"),
    "weights": (["--quantize", "w"], lambda out: None, "w/seed1337/final_model.safetensors: no"),
}


def full_disk(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fault", FAULTS_OF_FILES)
def test_a_file_that_cannot_be_used_is_one_line(stub, out, capsys, monkeypatch, fault):
    argv, arrange, message = FAULTS_OF_FILES[fault]
    arrange(out)
    if fault == "full disk":
        monkeypatch.setattr(os, "fsync", full_disk)
    trials = [] if "--file" in argv else ["MUON_WD=0"]
    error = refused(out, capsys, *trials, *argv, "--cpu")
    assert message in error and error.count("\n") == 1


def test_output_that_fails_is_one_line(stub, out, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    assert "error: the output: No space left" in refused(out, capsys, "MUON_WD=0", "--list")


def test_a_trial_gets_its_own_settings_only(stub, out, monkeypatch):
    argv = ["MODEL_DIM=128,256", "--seeds", "42", "--cpu", "2"]
    monkeypatch.setenv("SMEAR_GATE", "0")  # of this process, not of the environment given
    assert run(out, *argv, env={"NUM_LAYERS": "3", "HOME": "/"}) == 0
    folder = out / "MODEL_DIM=256/seed42"
    seen = json.loads((folder / "env.json").read_text())
    given = {name: seen[name] for name in sweep.SETTINGS if name in seen}
    assert given == {"NUM_LAYERS": "3", "MODEL_DIM": "256", "SEED": "42", "RUN_DIR": str(folder)}
    assert seen["CUDA_VISIBLE_DEVICES"] == "" and seen["PWD"] == str(stub)
    assert (out / "train_gpt.py").read_text() == STUB
    # command.sh repeats the run in any other environment.
    for name in ("train.log", "env.json", "result.json"):
        (folder / name).unlink()
    env = KEPT | {"MODEL_DIM": "1", "TOKENIZER_PATH": "raises"}
    subprocess.run(["bash", str(folder / "command.sh")], env=env, cwd="/", check=True)
    again = json.loads((folder / "env.json").read_text())
    assert {name: again.get(name) for name in sweep.SETTINGS} == {
        name: given.get(name) for name in sweep.SETTINGS
    }


def test_trials_run_at_once_on_their_own_gpus(stub, out, tmp_path, monkeypatch):
    torchrun = tmp_path / "bin/torchrun"  # starts one process of the stub
    torchrun.parent.mkdir()
    torchrun.write_text(f'#!/bin/sh\necho "$@" > "$RUN_DIR/torchrun"\nexec {sys.executable} "$3"\n')
    torchrun.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    argv = ["XSA_LAST_N=1,2,3,4", "--gpus", "0,1,2,3,4", "--ranks", "2", "--out", str(out)]
    plan, args = sweep.parse(argv, {})
    plan.prepare()
    for trial in plan.runs:
        script = plan.folder_of(trial) / "command.sh"
        script.write_text(script.read_text().replace("PATH=", f"PATH={torchrun.parent}:"))
    assert sweep.find_devices(args) == ["0,1", "2,3"]
    sweep.Runner(plan, sweep.find_devices(args), False).run()
    seen = [json.loads(path.read_text()) for path in out.rglob("env.json")]
    assert sorted(env["CUDA_VISIBLE_DEVICES"] for env in seen) == ["0,1", "0,1", "2,3", "2,3"]
    arguments = (out / "XSA_LAST_N=1/seed1337/torchrun").read_text()
    assert arguments == f"--standalone --nproc_per_node=2 {out}/train_gpt.py\n"


def test_weights_of_one_sweep_are_quantized_by_another(stub, out, tmp_path):
    weights = tmp_path / "first/base"
    for seed in (7, 8):
        (weights / f"seed{seed}").mkdir(parents=True)
        (weights / f"seed{seed}/final_model.safetensors").touch()
    argv = ["GPTQ_CALIB=random,train", "--quantize", str(weights), "--seeds", "7,8"]
    plan, _ = sweep.parse([*argv, "--out", str(out)], {})
    plan.prepare()
    script = (out / "GPTQ_CALIB=train/seed8/command.sh").read_text()
    assert f"--quantize {weights}/seed8/final_model.safetensors" in script
    assert sweep.parse(["--out", str(out)], {})[0] == plan  # the folder has all of it


# ---- Failures, and sweeps that continue ----


def test_failures_are_rows_and_nothing_is_run_twice(stub, out, capsys):
    argv = ["TOKENIZER_PATH=0,killed,oom,raises", "--seeds", "1,2", "--cpu", "4"]
    assert run(out, *argv) == 1
    found = states(out)
    for seed in (1, 2):
        assert found["TOKENIZER_PATH=0", seed] == ("ok", "")
        assert found["TOKENIZER_PATH=killed", seed][0] == "failed"
        assert "killed by signal 9" in found["TOKENIZER_PATH=killed", seed][1]
        assert found["TOKENIZER_PATH=oom", seed] == ("oom", "memory")
        assert found["TOKENIZER_PATH=raises", seed][1] == "exit status 1; ValueError: no result"
    shown = capsys.readouterr().out
    assert shown.count("signal 9") == 2 and "no result" in shown
    times = {path: path.stat().st_mtime_ns for path in out.rglob("train.log")}
    assert run(out, *argv) == 1
    assert {path: path.stat().st_mtime_ns for path in out.rglob("train.log")} == times
    # --retry runs failed trials again and keeps their first attempt; finished trials stay.
    assert run(out, *argv, "--retry") == 1
    again = {path: path.stat().st_mtime_ns for path in out.rglob("train.log")}
    good = out / "TOKENIZER_PATH=0/seed1/train.log"
    assert again[good] == times[good] and len(again) == 14
    assert (out / "TOKENIZER_PATH=oom/seed1.cut1/train.log").exists()
    # Another command adds its trials.
    assert run(out, "TOKENIZER_PATH=0,1", "--seeds", "1", "--cpu") == 0
    assert states(out)["TOKENIZER_PATH=1", 1] == ("ok", "") and len(states(out)) == 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_was_cut_off_continues(stub, out, number):
    argv = ("TOKENIZER_PATH=slow", "--seeds", "1,2,3", "--cpu", "2")
    process = start(out, *argv)
    wait_until(lambda: len(list(out.rglob("events.jsonl"))) == 2)
    process.send_signal(number)
    assert process.wait(30) == (5 if number == signal.SIGTERM else -number)
    # After SIGKILL its two trials run on without it; the next command waits for them.
    now = "running" if number == signal.SIGKILL else "interrupted"
    assert [s for s, _ in states(out).values()].count(now) == 2
    assert run(out, *argv) == 0
    assert {s for s, _ in states(out).values()} == {"ok"}
    assert len(list(out.rglob("*.cut1"))) == (0 if number == signal.SIGKILL else 2)
    for log in out.rglob("seed?/train.log"):
        assert log.read_text() == "started\n"


def test_a_trial_with_checkpoints_resumes(stub, out):
    argv = ["TOKENIZER_PATH=0", "--out", str(out)]
    plan, _ = sweep.parse(argv, {"CHECKPOINT_EVERY": "5"})
    plan.prepare()
    folder = plan.folder_of(plan.runs[0])
    (folder / "train.log").write_text("started\n")  # and cut off
    sweep.Runner(plan, [""], False).run()
    assert (folder / "train.log").read_text() == "started\nstarted\n"
    assert json.loads((folder / "env.json").read_text())["RESUME"] == "auto"


def test_a_trial_that_is_killed_with_its_shell_is_started_once_by_each_command(stub, out):
    process = start(out, "TOKENIZER_PATH=slow", "--cpu")
    folder = out / "TOKENIZER_PATH=slow/seed1337"
    wait_until(lambda: (folder / "env.json").exists())
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            own = f"RUN_DIR={folder}".encode() in path.read_bytes().split(b"\0")
        except OSError:
            continue
        if own:
            os.killpg(os.getpgid(int(path.parent.name)), signal.SIGKILL)
            break
    assert process.wait(30) == 1
    assert states(out) == {("TOKENIZER_PATH=slow", 1337): ("cut off", "")}
    assert not list(out.rglob("*.cut1"))


def test_damaged_and_missing_files_are_rows_too(stub, out, capsys):
    argv = ["TOKENIZER_PATH=0,1,2,3", "--cpu", "2"]
    assert run(out, *argv) == 0
    (out / "TOKENIZER_PATH=0/seed1337/result.json").write_text('{"status": "o')
    (out / "TOKENIZER_PATH=1/seed1337/events.jsonl").write_bytes(b'[]\n{"event": \n\xff')
    (out / "TOKENIZER_PATH=2/seed1337/result.json").unlink()
    (out / "TOKENIZER_PATH=2/seed1337/output.txt").unlink()
    shutil.rmtree(out / "TOKENIZER_PATH=3")
    capsys.readouterr()
    assert run(out, "--show") == 0
    assert capsys.readouterr().out.count(" failed ") == 2
    found = [states(out)[f"TOKENIZER_PATH={n}", 1337][0] for n in range(4)]
    assert found == ["failed", "ok", "failed", "waiting"]
    assert run(out, *argv) == 1
    assert states(out)["TOKENIZER_PATH=3", 1337] == ("ok", "")


def test_what_holds_for_all_trials_cannot_change(stub, out, capsys):
    argv = ["TOKENIZER_PATH=0", "--cpu"]
    assert run(out, *argv) == 0
    command = out / "TOKENIZER_PATH=0/seed1337/command.sh"
    before = command.read_text()
    changes = (["--ranks", "2"], {}), (["--quantize", "elsewhere"], {}), ([], {"MUON_WD": "0"})
    for more, env in changes:
        assert run(out, *argv, *more, env=env) == 2
        assert f"--out {out}" in capsys.readouterr().err
    assert run(out, env={"MUON_WD": "0"}) == 2
    assert command.read_text() == before
    assert run(out, "--seeds", "1,2", "--cpu") == 0  # further seeds are further trials
    assert set(states(out)) == {("TOKENIZER_PATH=0", 1337), ("base", 1), ("base", 2)}


# ---- What is printed ----


@pytest.mark.parametrize("name", ["o[/red]x", "o [red]x :smile:", "caf\u00e9 \udcff $HOME 'x'"])
def test_any_name_of_a_folder_is_printed_as_it_is(stub, tmp_path, monkeypatch, name):
    """On a terminal of ASCII, with a table of the last steps, and commands that can be pasted."""
    out = tmp_path / name
    for tool, argv in (
        (run, (out, "TOKENIZER_PATH=0", "--seeds", "1", "--cpu")),
        (compare.main, ([str(out)],)),
        (plot.main, ([str(out), "--kind", "scores", "--out", str(out / "plots")],)),
    ):
        screen = io.TextIOWrapper(io.BytesIO(), "ascii")
        monkeypatch.setattr(sys, "stdout", screen)
        assert tool(*argv) == 0
        printed = screen.buffer.getvalue().decode()
        shown = name.encode("ascii", "backslashreplace").decode()
        times = printed.replace("'\"'\"'", "'").count(shown)
        assert times == {run: 2, plot.main: 1}.get(tool, 0)  # the title, and in a command
        if tool is run:
            assert re.search(r" ok \W*60 \W*2\.0000 \W*1\.5000 plain \W*33 ", printed)
            words = shlex.split(printed.splitlines()[-1])
            assert words == ["python", str(ROOT / "records/compare.py"), f"{tmp_path}/{shown}"]
    assert (out / "plots/scores.png").exists()


# ---- Schedulers ----


def sbatch_words(line):
    """The words that sbatch reads in a line of options, by the rules of its source.

    A backslash escapes the next character, in quotes of both kinds as well. A # outside quotes
    begins a comment, and a colon at the start of a word separates jobs.
    """
    words, word, quote = [], None, ""
    characters = iter(line.removeprefix("#SBATCH"))
    for c in characters:
        if c.isspace() and not quote:
            words += [] if word is None else [word]
            word = None
            continue
        assert not (c in ":#" and word is None), f"{c} begins a word of {line}"
        assert c != "#" or quote, f"a comment begins in {line}"
        word = word or ""
        if c == "\\":
            c = next(characters)
            assert quote or not c.isspace(), f"an escaped space ends a word of {line}"
            word += c
        elif quote == c:
            quote = ""
        elif not quote and c in "'\"":
            quote = c
        else:
            word += c
    assert not quote, f"no closing {quote} in {line}"
    return words + ([] if word is None else [word])


@pytest.mark.parametrize("name", ["an out", "50% o'ut #2", 'back\\slash: "q"'])
@pytest.mark.parametrize(
    "options",
    [
        "--gres=gpu:1 --time=20",
        "-p gpu --time 30 -N1",
        "--comment='a  b' -J \"it's\"",
        "--nice -5 --mail-user=a@b",
        "--comment=#1 -J ':x' --comment 'a\\b' -C 'a|b&[c*2]'",
        "",
    ],
)
def test_sbatch_reads_the_options_as_the_shell_gave_them(stub, tmp_path, options, name):
    assert run(tmp_path / name, "MUON_WD=0", f"--slurm={options}") == 0
    script = (tmp_path / name / "array.sbatch").read_text()
    head, *others = script.partition("\nruns=(")[0].splitlines()
    assert head == "#!/usr/bin/env bash"
    assert all(line.startswith("#SBATCH ") for line in others)  # sbatch stops at another line
    words = [word for line in others for word in sbatch_words(line)]
    assert words[:2] == [f"--job-name={name}", "--array=1-1"]
    pattern = words[2].removeprefix("--output=")
    expanded = re.sub("%(.)", lambda m: {"%": "%", "A": "7", "a": "1"}[m[1]], pattern)
    assert expanded == f"{tmp_path / name}/slurm-7_1.out"
    assert words[3:] == shlex.split(options)


def test_arrays_are_split_at_a_limit_and_failed_trials_can_be_among_them(stub, out, capsys):
    argv = ["TOKENIZER_PATH=0,1,oom,3,4", "--array-limit", "2"]
    assert run(out, "TOKENIZER_PATH=oom", "--cpu") == 1
    assert run(out, *argv, "--retry", "--slurm") == 0
    first, *commands = capsys.readouterr().out.splitlines()[-4:]
    assert first == "# 3 arrays, each of at most 2 runs"
    assert commands == [f"sbatch '{out}/array{n}.sbatch'" for n in (1, 2, 3)]
    texts = [path.read_text() for path in sorted(out.glob("*.sbatch"))]
    assert [re.search(r"--array=(\S+)", text)[1] for text in texts] == ["1-2", "1-2", "1-1"]
    listed = [line.strip("'") for text in texts for line in re.findall(r"^'/.*", text, re.M)]
    assert sorted(listed) == sorted(map(str, out.glob("*/*/command.sh")))
    assert run(out, *argv[:1], "--slurm") == 0  # without the failed trial, in one array
    assert [path.name for path in out.glob("*.sbatch")] == ["array.sbatch"]


def test_a_slurm_array_runs_what_is_due(stub, out, capsys):
    argv = ["TOKENIZER_PATH=0,1,oom"]
    assert run(out, "TOKENIZER_PATH=1", "--cpu") == 0
    assert run(out, *argv, "--slurm=--gres=gpu:1 --time=20") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"sbatch '{out}/array.sbatch'"
    script = (out / "array.sbatch").read_text()
    assert "#SBATCH --array=1-2\n" in script
    assert "#SBATCH --gres=gpu:1\n#SBATCH --time=20\n" in script
    for number in ("1", "2"):
        env = KEPT | {"SLURM_ARRAY_TASK_ID": number}
        subprocess.run(["bash", str(out / "array.sbatch")], env=env, cwd="/", check=True)
    assert [s for s, _ in states(out).values()] == ["ok", "ok", "oom"]
    for how in ("--list", "--slurm"):
        assert run(out, *argv, how) == 2
        assert "nothing is due" in capsys.readouterr().err
    for how, before in (["--list"], ""), (["--list", "--cpu"], "CUDA_VISIBLE_DEVICES= "):
        assert run(out, "TOKENIZER_PATH=1,2", *how) == 0
        listed = capsys.readouterr().out.splitlines()
        assert listed == [f"{before}bash '{out}/TOKENIZER_PATH=2/seed1337/command.sh'"]
    assert run(out, "TOKENIZER_PATH=1,2", "--cpu", "--show") == 0


def test_a_slurm_array_that_is_terminated_ends_when_its_run_has_saved(stub, out):
    """Slurm signals every process of a job, and ends the job when its script has ended."""
    assert run(out, "TOKENIZER_PATH=slow", "--slurm") == 0
    command, env = ["bash", str(out / "array.sbatch")], KEPT | {"SLURM_ARRAY_TASK_ID": "1"}
    process = subprocess.Popen(command, env=env, start_new_session=True)
    wait_until(lambda: (out / "TOKENIZER_PATH=slow/seed1337/events.jsonl").exists())
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)
    assert states(out)["TOKENIZER_PATH=slow", 1337] == ("interrupted", "a signal")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("slurmctld"), reason="no Slurm: install slurm-wlm")
def test_a_real_slurm_runs_the_array(byte_corpus, out, tmp_path):
    """Controller and node on the loopback of this machine, and three real trials."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    conf = tmp_path / "slurm.conf"
    general = f"""
    ClusterName=loop SlurmctldHost=localhost(127.0.0.1) SlurmctldPort={ports[0]}
    SlurmdPort={ports[1]} AuthType=auth/none CredType=cred/none SlurmUser=root SlurmdUser=root
    StateSaveLocation={tmp_path}/state SlurmdSpoolDir={tmp_path}/spool
    SlurmctldPidFile={tmp_path}/slurmctld.pid SlurmdPidFile={tmp_path}/slurmd.pid
    SlurmctldLogFile={tmp_path}/slurmctld.log SlurmdLogFile={tmp_path}/slurmd.log
    ProctrackType=proctrack/pgid TaskPlugin=task/none SelectType=select/cons_tres
    SelectTypeParameters=CR_Core
    """
    host = socket.gethostname().split(".")[0]
    node = f"NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2"
    partition = "PartitionName=main Nodes=localhost Default=YES"
    conf.write_text("\n".join([*general.split(), node, partition, ""]))
    (tmp_path / "state").mkdir()
    (tmp_path / "spool").mkdir()
    env = dict(os.environ, SLURM_CONF=str(conf))
    env |= TINY | {"DATA_PATH": str(byte_corpus), "ITERATIONS": "5", "EVAL_STRIDE": "0"}

    def output(*command):
        return subprocess.run(command, env=env, capture_output=True, text=True).stdout

    tool = sys.executable, str(ROOT / "records/sweep.py"), "--out", str(out)
    daemons = [
        subprocess.Popen(["slurmctld", "-D", "-c"], env=env),
        subprocess.Popen(["slurmd", "-D", "-N", "localhost"], env=env),
    ]
    try:
        submit = output(*tool, "MUON_WD=0.02,0.04,0.08", "--slurm=--cpus-per-task=1 --time=5")
        wait_until(lambda: output("sinfo", "-h"))
        assert output("bash", "-c", submit).startswith("Submitted batch job")
        wait_until(lambda: {s for s, _ in states(out).values()} == {"ok"}, 120)
        wait_until(lambda: not output("squeue", "--noheader"))
    finally:
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(20)
    assert output(*tool, "--show").count(" ok ") == 3
    scores = {read_run(path.parent).scores["plain"].val_bpb for path in out.rglob("result.json")}
    assert len(scores) == 3
