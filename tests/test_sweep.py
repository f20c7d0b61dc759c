"""Sweeps: what is run, in what isolation, what failures look like, and that nothing is lost."""

import json
import os
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

import sweep
from runs import read_run, read_trial

# A program in the place of train_gpt.py, in milliseconds a run: TOKENIZER_PATH says how it ends.
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
	time.sleep(1)  # it saves
	finish("interrupted", 5, reason="a signal")
signal.signal(signal.SIGTERM, stop)
for step in range(1, 41):
	loss = 5.0 - step / 20 + (step / 10 if end == "bad" else 0) - (step if end == "grows" else 0)
	event = {"event": "step", "step": step, "seconds": step / 10, "train_loss": loss}
	with open(folder / "events.jsonl", "a") as events:
		events.write(json.dumps(event) + "\\n")
	if end in ("bad", "slow"):
		time.sleep(0.2)
if end == "killed":
	os.kill(os.getpid(), signal.SIGKILL)
if end == "oom":
	finish("oom", 3, reason="out of\\nmemory")
if end == "raises":
	raise ValueError("no result")
score = dict.fromkeys(("val_loss", "val_bpb", "tokens", "bytes", "stride", "seconds"), 1.5)
finish("ok", 0, scores={"plain": score}, settings={"seed": int(os.environ["SEED"])})
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


def states(out):
    """What became of each trial of a folder."""
    plan = sweep.read_plan(out)
    runs = {(t.name, t.seed): read_trial(plan.folder_of(t)) for t in plan.trials}
    return {key: (run.status, "".join(run.reason.splitlines()[-1:])) for key, run in runs.items()}


def test_grid_one_at_a_time_and_file(tmp_path):
    grid = sweep.trials_of_axes(["XSA_LAST_N=0,4", "MUON_WD=0.1,0.2"], [1, 2], False)
    assert len(grid) == len(set(grid)) == 8
    assert {dict(t.changes)["XSA_LAST_N"] for t in grid} == {"0", "4"}
    assert [t.seed for t in grid] == [1] * 4 + [2] * 4  # every trial once before any twice
    alone = sweep.trials_of_axes(["XSA_LAST_N=0,4", "MUON_WD=0.1"], [7], True)
    assert [t.name for t in alone] == ["base", "XSA_LAST_N=0", "XSA_LAST_N=4", "MUON_WD=0.1"]
    path = tmp_path / "sweep.toml"
    path.write_text(
        "seeds = [3, 4]\n[base]\nSMEAR_GATE = true\nPRESET = 'cpu'\n"
        "[trials.layers]\nVE_LAYERS = '0,1'\n[trials.none]\n"
    )
    base, trials = sweep.trials_of_file(path, [])
    assert base == {"SMEAR_GATE": "1", "PRESET": "cpu"}
    assert [(t.name, dict(t.changes), t.seed) for t in trials] == [
        ("layers", {"VE_LAYERS": "0,1"}, 3),
        ("none", {}, 3),
        ("layers", {"VE_LAYERS": "0,1"}, 4),
        ("none", {}, 4),
    ]
    assert {t.seed for t in sweep.trials_of_file(path, [9])[1]} == {9}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "records" / "studies").glob("*.toml")), ids=lambda path: path.name
)
def test_the_program_takes_the_settings_of_every_study(path, tmp_path):
    plan, _ = sweep.parse(["--file", str(path), "--out", str(tmp_path)], {})
    plan.check()
    assert "none" in {trial.name for trial in plan.trials}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["NUM_LAYER=2"], "NUM_LAYERS"),
        (["SEED=1,2"], "--seeds"),
        (["RUN_ID=a"], "--out"),
        (["XSA_LAST_N"], "SETTING=VALUE"),
        (["XSA_LAST_N=1,1"], "XSA_LAST_N=1, seed 1337"),
        (["XSA_LAST_N=1", "--seeds", "1,1"], "seed 1: seeds are from 0, each once"),
        (["XSA_LAST_N=1", "--seeds=-1"], "seed -1"),
        (["MUON_WD=a"], "MUON_WD='a'"),
        (["NUM_HEADS=3"], "MODEL_DIM=512: must be an even multiple of NUM_HEADS=3"),
        (["XSA_LAST_N=1", "--stop-worse", "-1"], "--stop-worse -1"),
        (["XSA_LAST_N=1"], "--cpu"),  # no GPU is here
        (["XSA_LAST_N=1", "--seeds", "1,b"], "1,b"),
        (["--cpu"], "no trials"),
        (["--file", "absent.toml"], "absent.toml"),
        (["XSA_LAST_N=1", "--cpu", "0"], "--cpu"),
        (["XSA_LAST_N=1", "--gpus", "0", "--ranks", "2"], "--ranks 2"),
    ],
)
def test_what_cannot_be_run_is_said(stub, monkeypatch, capsys, argv, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep.main(argv, {}) == 2
    assert said in capsys.readouterr().err


def test_a_trial_has_its_settings_alone(stub, tmp_path, monkeypatch):
    env = {"NUM_LAYERS": "3", "SEED": "5", "RUN_ID": "mine"}
    out = tmp_path / "a sweep's folder"
    argv = ["MODEL_DIM=128,256", "--seeds", "42", "--out", str(out), "--cpu"]
    monkeypatch.setenv("SMEAR_GATE", "0")  # of this process; not of the shell that asked
    assert sweep.main(argv, env) == 0
    seen = json.loads((out / "MODEL_DIM=256/seed42/env.json").read_text())
    given = {name: seen[name] for name in sweep.SETTINGS if name in seen}
    folder = str(out / "MODEL_DIM=256/seed42")
    assert given == {"NUM_LAYERS": "3", "MODEL_DIM": "256", "SEED": "42", "RUN_DIR": folder}
    assert seen["CUDA_VISIBLE_DEVICES"] == "" and seen["PWD"] == str(stub)
    assert (out / "train_gpt.py").read_text() == STUB
    # The same command under other settings for all would mix two experiments.
    assert sweep.main(argv, {"NUM_LAYERS": "4"}) == 2
    # Its command.sh makes the run again, under any other environment.
    before = json.loads((out / "MODEL_DIM=128/seed42/env.json").read_text())
    for name in ("train.log", "env.json", "result.json"):
        (out / "MODEL_DIM=128/seed42" / name).unlink()
    command = ["bash", str(out / "MODEL_DIM=128/seed42/command.sh")]
    subprocess.run(
        command, env=KEPT | {"MODEL_DIM": "1", "TOKENIZER_PATH": "raises"}, cwd="/", check=True
    )
    after = json.loads((out / "MODEL_DIM=128/seed42/env.json").read_text())
    assert {n: after.get(n) for n in sweep.SETTINGS} == {n: before.get(n) for n in sweep.SETTINGS}


def test_failures_are_rows_and_nothing_is_run_twice(stub, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["TOKENIZER_PATH=0,killed,oom,raises", "--seeds", "1,2", "--out", str(out), "--cpu", "4"]
    assert sweep.main(argv, {}) == 1
    found = states(out)
    for seed in (1, 2):
        assert found["TOKENIZER_PATH=0", seed] == ("ok", "")
        assert found["TOKENIZER_PATH=killed", seed][0] == "failed"
        assert "signal 9" in found["TOKENIZER_PATH=killed", seed][1]
        assert found["TOKENIZER_PATH=oom", seed] == ("oom", "memory")
        assert found["TOKENIZER_PATH=raises", seed][1] == "exit status 1; ValueError: no result"
    shown = capsys.readouterr().out
    assert shown.count("signal 9") == 2 and "no result" in shown
    times = {path: path.stat().st_mtime_ns for path in out.rglob("train.log")}
    assert len(times) == 8
    assert sweep.main(argv, {}) == 1
    assert {path: path.stat().st_mtime_ns for path in out.rglob("train.log")} == times
    # Failed ones run again when asked, the earlier attempt kept aside; good ones never.
    assert sweep.main([*argv, "--retry"], {}) == 1
    again = {path: path.stat().st_mtime_ns for path in out.rglob("train.log")}
    good = out / "TOKENIZER_PATH=0/seed1/train.log"
    assert again[good] == times[good]
    assert (out / "TOKENIZER_PATH=oom/seed1.cut1/train.log").exists()
    assert len(again) == 14
    # A sweep grows by another command in the same folder.
    assert sweep.main(["TOKENIZER_PATH=0,1", "--seeds", "1", "--out", str(out), "--cpu"], {}) == 0
    assert states(out)["TOKENIZER_PATH=1", 1] == ("ok", "") and len(states(out)) == 9


def test_at_most_so_many_at_once_each_on_its_own_device(stub, tmp_path, monkeypatch):
    out = tmp_path / "out"
    argv = ["XSA_LAST_N=1,2,3,4", "--gpus", "0,1,2,3,4", "--ranks", "2", "--out", str(out)]
    slow = STUB.replace('os.environ.get("TOKENIZER_PATH", "0")', '"slow"').replace("0.2)", "0.03)")
    torchrun = tmp_path / "bin" / "torchrun"  # that starts one process of the stub
    torchrun.parent.mkdir()
    torchrun.write_text(f'#!/bin/sh\necho "$@" > "$RUN_DIR/torchrun"\nexec {sys.executable} "$3"\n')
    torchrun.chmod(0o755)
    (stub / "train_gpt.py").write_text(slow, encoding="utf-8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plan, args = sweep.parse(argv, {})
    plan.prepare()
    for trial in plan.trials:
        script = plan.folder_of(trial) / "command.sh"
        script.write_text(script.read_text().replace("PATH=", f"PATH={torchrun.parent}:"))
    assert sweep.devices(args) == ["0,1", "2,3"]
    runner, most = sweep.Runner(plan, sweep.devices(args), None, False), []
    start = runner.start

    def watch(trial, device):
        start(trial, device)
        most.append(sorted(device for _, device in runner.running.values()))

    runner.start = watch
    runner.run()
    assert max(most, key=len) == ["0,1", "2,3"]
    seen = [json.loads(path.read_text()) for path in out.rglob("env.json")]
    assert sorted(env["CUDA_VISIBLE_DEVICES"] for env in seen) == ["0,1", "0,1", "2,3", "2,3"]
    asked = (out / "XSA_LAST_N=1/seed1337/torchrun").read_text()
    assert asked == f"--standalone --nproc_per_node=2 {out}/train_gpt.py\n"


def start(out, *argv):
    """A sweep of the stub in a process of its own."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "records")!r})
import sweep
from pathlib import Path
import signal
signal.signal(signal.SIGTERM, signal.default_int_handler)
sweep.ROOT = Path({str(sweep.ROOT)!r})
sys.exit(sweep.main(sys.argv[1:], {{}}))
"""
    command = [sys.executable, "-c", code, *argv, "--out", str(out)]
    return subprocess.Popen(command, env=KEPT, stdout=subprocess.PIPE, text=True)


def until(true, seconds=30):
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_cut_off_goes_on_and_runs_nothing_twice(stub, tmp_path, number):
    out = tmp_path / "out"
    argv = ("TOKENIZER_PATH=slow", "--seeds", "1,2,3", "--cpu", "2")
    process = start(out, *argv)
    until(lambda: len(list(out.rglob("events.jsonl"))) == 2)
    process.send_signal(number)
    assert process.wait(30) == (5 if number == signal.SIGTERM else -number)
    # Killed outright, its two trials run on without it, and are waited for.
    now = "running" if number == signal.SIGKILL else "interrupted"
    assert [s for s, _ in states(out).values()].count(now) == 2
    process = start(out, *argv)
    assert process.wait(60) == 0, process.stdout.read()
    assert {s for s, _ in states(out).values()} == {"ok"}
    aside = len(list(out.rglob("*.cut1")))
    assert aside == (0 if number == signal.SIGKILL else 2)
    for log in out.rglob("seed?/train.log"):
        assert log.read_text() == "started\n"


def test_checkpoints_are_gone_on_with(stub, tmp_path):
    out = tmp_path / "out"
    plan, _ = sweep.parse(["TOKENIZER_PATH=0", "--out", str(out)], {"CHECKPOINT_EVERY": "5"})
    plan.prepare()
    folder = plan.folder_of(plan.trials[0])
    (folder / "train.log").write_text("started\n")  # and cut off
    sweep.Runner(plan, [""], None, False).run()
    assert (folder / "train.log").read_text() == "started\nstarted\n"
    assert json.loads((folder / "env.json").read_text())["RESUME"] == "auto"


def test_hopeless_and_diverging_trials_are_stopped_when_asked(stub, tmp_path):
    out = tmp_path / "out"
    argv = ["TOKENIZER_PATH=0,bad", "--out", str(out), "--cpu"]
    assert sweep.main([*argv, "--stop-worse", "1.5"], {}) == 1
    assert states(out)["TOKENIZER_PATH=0", 1337] == ("ok", "")
    status, why = states(out)["TOKENIZER_PATH=bad", 1337]
    assert status == "stopped" and why.startswith(("hopeless: loss 5", "hopeless: loss 6"))
    assert len(sweep.read_events(out / "TOKENIZER_PATH=bad/seed1337")) < 40
    assert sweep.main(argv, {}) == 1  # it stays stopped


@pytest.mark.parametrize(
    ("changes", "stopped"),
    [
        # Terms of the loss that are not in what is logged as train_loss, the cross-entropy.
        ("JEPA_CHUNK_SIZE=8 JEPA_LAMBDA_MAX=1 JEPA_BACKBONE_GRAD=1 JEPA_SIGREG=lejepa", True),
        ("STP_ENABLED=1", True),
        ("LABEL_SMOOTHING=0.1", False),
        ("VOCAB_SIZE=2048", False),
        # By what the settings come to, however they are given.
        ("PRESET=v9 LABEL_SMOOTHING=0", True),
        ("PRESET=byte_jepa", False),
    ],
)
def test_trials_are_judged_by_those_whose_loss_means_the_same(stub, tmp_path, changes, stopped):
    pairs = tuple(tuple(pair.split("=")) for pair in changes.split())
    changed = sweep.Trial("changed", pairs, 1)
    plan = sweep.Sweep(tmp_path / "out", {}, [sweep.Trial("base", (), 1), changed])
    plan.prepare()
    for trial, loss in zip(plan.trials, (3.0, 9.0), strict=True):
        event = json.dumps({"step": 40, "seconds": 1.0, "train_loss": loss})
        (plan.folder_of(trial) / "events.jsonl").write_text(event)
    runner = sweep.Runner(plan, [""], 1.0, False)
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    runner.running[changed] = process, ""
    try:
        runner.stop_hopeless()
        assert (plan.folder_of(changed) / "stopped").exists() == stopped
        assert (process.poll() is not None) == stopped
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("losses", "rivals", "said"),
    [
        ({1: 7.0, 20: 9.1}, [], "diverged"),
        ({1: 7.0, 20: 8.9}, [], ""),
        ({1: 7.0, 19: 99.0}, [], ""),  # too early to tell
        ({20: 99.0}, [], ""),  # its first was not logged
        ({1: 7.0, 40: 6.0}, [{40: 3.9}], "hopeless: loss 6.000 at step 40, another trial's 3.900"),
        ({1: 7.0, 40: 6.0}, [{40: 4.1}, {50: 1.0}], ""),
    ],
)
def test_what_is_hopeless(losses, rivals, said):
    found = sweep.hopeless(losses, rivals, 2.0)
    assert found.startswith(said) and bool(found) == bool(said)


def test_weights_of_one_sweep_are_repacked_by_another(stub, tmp_path):
    out, weights = tmp_path / "out", tmp_path / "first" / "base"
    argv = ["GPTQ_CALIB=random,train", "--quantize", str(weights), "--seeds", "7,8"]
    plan, _ = sweep.parse([*argv, "--out", str(out)], {})
    plan.prepare()
    script = (out / "GPTQ_CALIB=train/seed8/command.sh").read_text()
    assert f"--quantize {weights}/seed8/final_model.safetensors" in script
    again, _ = sweep.parse(["--out", str(out)], {})  # the folder alone says it all
    assert again == plan


def test_slurm_array_runs_what_is_due(stub, tmp_path, capsys):
    out = tmp_path / "an out"
    argv = ["TOKENIZER_PATH=0,1,oom", "--out", str(out)]
    assert sweep.main(["TOKENIZER_PATH=1", "--out", str(out), "--cpu"], {}) == 0
    assert sweep.main([*argv, "--slurm=--gres=gpu:1 --time=20"], {}) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"sbatch '{out}/array.sbatch'"
    script = (out / "array.sbatch").read_text()
    assert (
        "#SBATCH --array=1-2\n" in script and "#SBATCH --gres=gpu:1\n#SBATCH --time=20\n" in script
    )
    for number in ("1", "2"):
        env = KEPT | {"SLURM_ARRAY_TASK_ID": number}
        subprocess.run(["bash", str(out / "array.sbatch")], env=env, cwd="/", check=True)
    assert {name: s for (name, _), (s, _) in states(out).items()} == {
        "TOKENIZER_PATH=0": "ok",
        "TOKENIZER_PATH=1": "ok",
        "TOKENIZER_PATH=oom": "oom",
    }
    capsys.readouterr()
    for how in ("--list", "--slurm"):
        assert sweep.main([*argv, how], {}) == 2
        assert "nothing is due" in capsys.readouterr().err
    assert sweep.main(["TOKENIZER_PATH=1,2", "--out", str(out), "--list"], {}) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed == [f"bash '{out}/TOKENIZER_PATH=2/seed1337/command.sh'"]


def test_damaged_and_missing_files_are_rows_too(stub, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["TOKENIZER_PATH=0,1,2,3", "--out", str(out), "--cpu"]
    assert sweep.main(argv, {}) == 0
    (out / "TOKENIZER_PATH=0/seed1337/result.json").write_text('{"status": "o')
    (out / "TOKENIZER_PATH=1/seed1337/events.jsonl").write_text('[]\n{"event": \n\xff')
    (out / "TOKENIZER_PATH=2/seed1337/result.json").unlink()
    (out / "TOKENIZER_PATH=2/seed1337/output.txt").unlink()
    shutil.rmtree(out / "TOKENIZER_PATH=3")
    assert sweep.main(["--out", str(out), "--show"], {}) == 0
    assert capsys.readouterr().out.count("failed") == 2
    found = {name: status for (name, _), (status, _) in states(out).items()}
    assert found == {
        "TOKENIZER_PATH=0": "failed",
        "TOKENIZER_PATH=1": "ok",
        "TOKENIZER_PATH=2": "failed",
        "TOKENIZER_PATH=3": "waiting",
    }
    assert sweep.main(argv, {}) == 1
    assert states(out)["TOKENIZER_PATH=3", 1337] == ("ok", "")


def test_a_trial_that_runs_elsewhere_is_neither_started_nor_moved(stub, tmp_path):
    out = tmp_path / "out"
    argv = ["TOKENIZER_PATH=slow", "--out", str(out)]
    plan, _ = sweep.parse(argv, {})
    plan.prepare()
    folder = plan.folder_of(plan.trials[0])
    by_hand = subprocess.Popen(["bash", folder / "command.sh"], env=KEPT)
    until(lambda: (folder / "train.log").exists())
    assert states(out) == {("TOKENIZER_PATH=slow", 1337): ("running", "")}
    assert sweep.main([*argv, "--slurm"], {}) == 2  # nothing is due
    assert sweep.main([*argv, "--cpu"], {}) == 0  # waits for it
    assert by_hand.wait(30) == 0
    assert states(out) == {("TOKENIZER_PATH=slow", 1337): ("ok", "")}
    assert not list(out.rglob("*.cut1"))


def test_a_trial_killed_whole_is_started_once_by_each_command(stub, tmp_path):
    out = tmp_path / "out"
    process = start(out, "TOKENIZER_PATH=slow", "--cpu")
    folder = out / "TOKENIZER_PATH=slow" / "seed1337"
    until(lambda: (folder / "env.json").exists())
    for path in Path("/proc").glob("[0-9]*/environ"):  # as by a system that kills all of it
        try:
            mine = f"RUN_DIR={folder}".encode() in path.read_bytes().split(b"\0")
        except OSError:
            continue
        if mine:
            os.killpg(os.getpgid(int(path.parent.name)), signal.SIGKILL)
            break
    assert process.wait(30) == 1
    assert states(out) == {("TOKENIZER_PATH=slow", 1337): ("cut off", "")}
    assert not list(out.rglob("*.cut1"))


def test_what_holds_for_all_trials_cannot_change(stub, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["TOKENIZER_PATH=0", "--out", str(out), "--cpu"]
    assert sweep.main(argv, {}) == 0
    command = out / "TOKENIZER_PATH=0/seed1337/command.sh"
    before = command.read_text()
    for more, env in (
        (["--ranks", "2"], {}),
        (["--quantize", "elsewhere"], {}),
        ([], {"MUON_WD": "0"}),
    ):
        assert sweep.main([*argv, *more], env) == 2
        assert f"--out {out}" in capsys.readouterr().err
    assert sweep.main(["--out", str(out)], {"MUON_WD": "0"}) == 2
    assert command.read_text() == before
    # Further seeds, of the settings as they are, are further trials.
    assert sweep.main(["--seeds", "1,2", "--out", str(out), "--cpu"], {}) == 0
    assert set(states(out)) == {("TOKENIZER_PATH=0", 1337), ("base", 1), ("base", 2)}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("slurmctld"), reason="no Slurm: install slurm-wlm")
def test_a_real_slurm_runs_the_array(byte_corpus, tmp_path):
    """Controller and node on the loopback of this machine; three real trials land in the table."""
    conf, ports = tmp_path / "slurm.conf", []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    conf.write_text(f"""ClusterName=loop
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={tmp_path}/state
SlurmdSpoolDir={tmp_path}/spool
SlurmctldPidFile={tmp_path}/slurmctld.pid
SlurmdPidFile={tmp_path}/slurmd.pid
SlurmctldLogFile={tmp_path}/slurmctld.log
SlurmdLogFile={tmp_path}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=localhost NodeHostname={socket.gethostname().split(".")[0]} NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes=localhost Default=YES
""")
    (tmp_path / "state").mkdir()
    (tmp_path / "spool").mkdir()
    env = dict(os.environ, SLURM_CONF=str(conf))
    env |= TINY | {"DATA_PATH": str(byte_corpus), "ITERATIONS": "5", "EVAL_STRIDE": "0"}
    out, tool = tmp_path / "out", [sys.executable, ROOT / "records" / "sweep.py"]
    daemons = [
        subprocess.Popen(["slurmctld", "-D", "-c"], env=env),
        subprocess.Popen(["slurmd", "-D", "-N", "localhost"], env=env),
    ]
    try:
        argv = ["MUON_WD=0.02,0.04,0.08", "--out", out, "--slurm=--cpus-per-task=1 --time=5"]
        printed = subprocess.run(
            [*tool, *argv], env=env, capture_output=True, text=True, check=True
        )
        command = printed.stdout.strip()
        until(lambda: subprocess.run(["sinfo", "-h"], env=env, capture_output=True).stdout, 60)
        said = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
        assert said.stdout.startswith("Submitted batch job"), said.stderr
        until(lambda: {s for s, _ in states(out).values()} == {"ok"}, 120)
        queue = ["squeue", "--noheader"]
        until(lambda: not subprocess.run(queue, env=env, capture_output=True).stdout, 60)
    finally:
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(20)
    shown = subprocess.run([*tool, "--out", out, "--show"], env=env, capture_output=True, text=True)
    assert shown.stdout.count(" ok ") == 3
    scores = {read_run(path.parent).scores["plain"].val_bpb for path in out.rglob("result.json")}
    assert len(scores) == 3
