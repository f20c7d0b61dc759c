"""The program as a user runs it: from shards to a scored artifact, and what it says of failures."""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, TINY, compile_counted, settings
from launch import await_, before_call, torchrun
from safetensors.torch import load_file

import train_gpt as tg

SOURCE = (ROOT / "train_gpt.py").read_bytes()
ARTIFACT, MODEL = "final_model.int6.ptz", "final_model.safetensors"
FIRST = {**TINY, "ITERATIONS": "12", "WARMDOWN_ITERS": "6"}


class Done(NamedTuple):
    """A finished run."""

    folder: Path
    lines: list[str]  # on the screen
    result: dict


def result_of(folder: Path | str) -> dict:
    """The result of a run, of finite numbers alone."""
    return json.loads((Path(folder) / "result.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture
def env(byte_corpus, tmp_path, monkeypatch) -> dict[str, str]:
    """The environment of a short run in the current folder, which is a new one."""
    monkeypatch.chdir(tmp_path)
    run = {"DATA_PATH": str(byte_corpus), "RUN_DIR": "run", "EVAL_STRIDE": "0"}
    return {**TINY, **run, "ITERATIONS": "2"}


@pytest.fixture(scope="module")
def done(tmp_path_factory, byte_corpus) -> Done:
    """A run that most tests look at."""
    folder = tmp_path_factory.mktemp("first")
    screen = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(screen):
        patch.chdir(folder)
        assert tg.main([], {**FIRST, "DATA_PATH": str(byte_corpus), "RUN_ID": "first"}) == 0
    run = folder / "logs/first"
    return Done(run, screen.getvalue().splitlines(), result_of(run))


# ---- What a run leaves ----


def test_a_run_writes_its_files(done):
    files = {"train.log", "events.jsonl", "result.json", ARTIFACT, MODEL}
    files |= {"train_gpt.py", "train_gpt_readable.py"}
    assert {path.name for path in done.folder.iterdir()} == files
    assert (done.folder / "train_gpt_readable.py").read_bytes() == SOURCE
    assert (done.folder / "train_gpt.py").read_bytes() == tg.packed_source(SOURCE)
    assert (done.folder / "train.log").read_text().splitlines() == done.lines
    assert [path.name for path in done.folder.parent.parent.iterdir()] == ["logs"]


def test_the_result_is_what_the_log_says(done):
    result, lines = done.result, done.lines
    assert (result["status"], result["weights"]) == ("ok", "ema")
    assert result["steps"] == len(result["train_losses"]) == 12
    for kind, name in (
        ("float", "DIAGNOSTIC post_ema"),
        ("plain", "final_int6_roundtrip"),
        ("sliding", "final_int6_sliding_window"),
        ("sliding", "final_int8_zlib_roundtrip"),
    ):
        score = result["scores"][kind]
        loss, bpb = score["val_loss"], score["val_bpb"]
        assert f"{name}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}" in lines
    sizes = result["bytes"]
    assert sizes["code"] == (done.folder / "train_gpt.py").stat().st_size
    assert sizes["model"] == (done.folder / ARTIFACT).stat().st_size
    assert sizes["total"] == sizes["code"] + sizes["model"]
    assert f"Code size: {sizes['code']} bytes" in lines
    assert f"Total submission size int6+zstd: {sizes['total']} bytes" in lines
    assert result["code_sha256"] == hashlib.sha256(SOURCE).hexdigest()
    assert set(result["verdicts"].values()) == {"PASS"}
    saved = load_file(done.folder / MODEL)
    assert result["parameters"] == sum(p.numel() for p in saved.values())
    assert f"model_params:{result['parameters']}" in lines


def test_the_log_has_the_conventional_lines(done):
    lines = done.lines
    assert lines[0] == "logs/first/train.log"
    for start in (
        "val_bpb:enabled tokenizer_kind=byte260 vocab_size=260",
        "train_loader:dataset:tiny_byte260 train_shards:2",
        "val_loader:shards pattern=",
        "world_size:1 grad_accum_steps:2",
        "step:1/12 train_loss:5.",
        "step:12/12 val_loss:",
        "ema:applying EMA weights",
        "Serialized model int6+zstd: ",
    ):
        assert [line for line in lines if line.startswith(start)], start
    starts = [line.split()[0] for line in lines]
    sliding = starts.index("final_int6_sliding_window")  # the expected time comes first
    says = r"sliding_window stride:32 expected_time:\d+s of 600.0s"
    assert re.fullmatch(says, lines[sliding - 1])


def test_the_log_states_every_setting_and_those_that_are_changed(done):
    (stated,) = [line for line in done.lines if line.startswith("corpus:")]
    names = [f.name for f in dataclasses.fields(tg.Hyperparameters)]
    assert re.findall(r"(?:^| )([a-z]\w*):", stated) == names
    (changed,) = [line for line in done.lines if line.startswith("changed_settings: ")]
    values = dict(pair.split("=", 1) for pair in shlex.split(changed)[1:])
    again = tg.Hyperparameters.from_env(values)  # as an environment it gives the same settings
    assert dataclasses.asdict(again) == done.result["settings"]


def test_events_are_the_steps_and_scores(done):
    text = (done.folder / "events.jsonl").read_text()
    events = [json.loads(line) for line in text.splitlines()]
    assert [e["step"] for e in events if "train_loss" in e] == list(range(1, 11))
    assert [e["name"] for e in events if e["event"] == "score"][-1] == "final_int8_zlib_roundtrip"


@pytest.mark.fault(31)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_without_a_gpu_says_so(done):
    says = "device:cpu, no CUDA GPU found: times are not comparable with the records"
    assert says in done.lines
    machine = done.result["machine"]
    assert (machine["dtype"], machine["compiled"]) == ("float32", False)
    (line,) = [line for line in done.lines if line.startswith("device:") and " torch:" in line]
    assert line.endswith(f" attention:{machine['attention']}")


# ---- Other commands ----


def test_eval_scores_the_artifact_without_model_variables(done, byte_corpus, env, capsys):
    """Nor does it need the training split, or write a file. A run's folder means its artifact."""
    shard = "fineweb_val_000000.bin"
    Path(shard).symlink_to(byte_corpus / shard)
    variables = {"DATA_PATH": ".", "EVAL_STRIDE": "32", "VAL_BATCH_SIZE": "8192"}
    variables["EVAL_STRIDEE"] = "9"
    assert tg.main(["--eval", str(done.folder)], variables) == 0
    lines = capsys.readouterr().out.splitlines()
    exact = [line for line in done.lines if "final" in line and "exact" in line]
    assert exact == [line for line in lines if "exact" in line]
    assert any("EVAL_STRIDEE is not a setting" in line for line in lines)
    assert not any(line.startswith("rule:") for line in lines)  # the artifact's settings hold
    assert [path.name for path in Path().iterdir()] == [shard]


@pytest.mark.parametrize("window", [64, 2000])
def test_an_artifact_of_any_sequence_length_is_probed_at_the_window(done, env, monkeypatch, window):
    """On a CPU only as far as the probe compares."""
    h, arrays = tg.unpack_artifact((done.folder / ARTIFACT).read_bytes(), tg.Hyperparameters())
    longer = dataclasses.replace(h, train_seq_len=1 << 20)
    Path("long.ptz").write_bytes(tg.pack_artifact(tg.replace(longer, compressor="zstd"), arrays))
    lengths = []
    before_call("attend_sdpa", lambda _, q, *__: lengths.append(q.size(1)), monkeypatch.setattr)
    probed = []
    before_call("probe_attention", lambda *a: probed.append(a[2]), monkeypatch.setattr)
    assert tg.main(["--eval", "long.ptz"], {**env, "EVAL_SEQ_LEN": str(window)}) == 0
    assert {h.train_seq_len for h in probed} == {window}
    assert lengths[0] == min(window, 1024)


def test_a_file_that_is_no_artifact_is_not_scored(env, capsys):
    Path("model.ptz").write_bytes(b"\x80\x04pickle")
    for path in ("model.ptz", "none.ptz"):
        assert tg.main(["--eval", path], {}) == 2
        assert f"error: {path}: cannot be read as an artifact" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["NUM_LAYERS=3", "--num_layers 3"])
def test_an_unknown_argument_is_refused_with_the_place_of_settings(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        tg.main(words.split(), {})
    says = f"unknown arguments: {words}. Settings are environment variables and stand before"
    assert says in " ".join(capsys.readouterr().err.split())


def test_help_lists_every_setting():
    """The main program also tells OpenMP to sleep at barriers, as importing it does not."""
    code = "import os, runpy, sys; sys.argv[1:] = ['--help']\n"
    code += "try: runpy.run_path('train_gpt.py', run_name='__main__')\n"
    code += "except SystemExit as end: print(end.code, os.environ['OMP_WAIT_POLICY'])"
    variables = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    command = [sys.executable, "-c", code]
    help_run = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )
    assert tg.settings_table() in help_run.stdout
    assert help_run.stdout.endswith("\n0 PASSIVE\n")


# ---- Settings from the environment to a score ----


def test_all_switches_together(env, monkeypatch, capsys):
    """Another loss, head, average, codec, quantizer and score at once.

    No package of another codec is needed, nor a variable of the model to score the artifact.
    """
    for package in ("zstandard", "brotli"):
        monkeypatch.setitem(sys.modules, package, None)
    env |= {
        "ITERATIONS": "5",
        "TIE_EMBEDDINGS": "0",
        "LABEL_SMOOTHING": "0.1",
        "STP_ENABLED": "1",
        "JEPA_CHUNK_SIZE": "8",
        "JEPA_PHASE1_FRAC": "0.2",
        "SWA_ENABLED": "1",
        "SWA_EVERY": "3",
        "SWA_START_FRAC": "0.7",
        "WARMDOWN_ITERS": "5",
        "WARMDOWN_MAX_FRACTION": "1",
        "CHECKPOINT_EVERY": "3",
        "COMPRESSOR": "lzma",
        "GPTQ_ENABLED": "1",
        "GPTQ_CALIB": "train",
        "GPTQ_CALIB_TOKENS": "256",
    }
    scoring = {
        "DATA_PATH": env["DATA_PATH"],
        "VAL_BATCH_SIZE": env["VAL_BATCH_SIZE"],
        "EVAL_STRIDE": "32",
        "EVAL_WINDOW": "16",
        "TTT_ENABLED": "1",
        "TTT_CHUNK_TOKENS": "1024",
        "TTT_EPOCHS": "1",
    }
    assert tg.main(["--check"], env | scoring) == 0
    assert tg.main([], env | scoring) == 0
    result, lines = result_of("run"), capsys.readouterr().out.splitlines()
    assert result["weights"] == "swa"
    assert result["scores"].keys() == {"float", "plain", "sliding", "window", "ttt"}
    events = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]
    terms = [e.keys() & {"stp", "jepa_error", "jepa_sigreg"} for e in events if "train_loss" in e]
    assert [len(x) for x in terms] == [1, 1, 3, 3, 1]
    # Step 3 alone is due: a multiple of SWA_EVERY at a low rate. The checkpoint has its weights.
    average, then = load_file(f"run/{MODEL}"), load_file("run/checkpoint.safetensors")
    assert "lm_head.weight" in average
    assert all(torch.equal(p, then[f"model/{name}"]) for name, p in average.items())
    assert "swa:applying averaged 1 checkpoints" in lines
    assert b'{"codec":"lzma"' in Path(f"run/{ARTIFACT}").read_bytes()
    assert f"Total submission size int6+lzma: {result['bytes']['total']} bytes" in lines
    assert tg.main(["--eval", f"run/{ARTIFACT}"], {**scoring, "COMPRESSOR": "zstd"}) == 0
    exact = [line for line in lines if line.startswith(("final", "legal")) and "exact" in line]
    assert len(exact) == 5
    assert set(exact) <= set(capsys.readouterr().out.splitlines())


@pytest.mark.fault(20, 50)
@pytest.mark.parametrize("iterations", [0, 1])
def test_zeros_give_a_score_and_no_program_is_called(env, monkeypatch, iterations):
    """Without warm-up, warm-down, log lines, an average, or a folder of programs."""
    monkeypatch.setenv("PATH", "")
    for module, name in ((subprocess, "Popen"), (os, "system"), (os, "popen")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("called a program"))
    names = ("WARMUP_STEPS", "WARMDOWN_ITERS", "WARMDOWN_MAX_FRACTION", "VAL_LOSS_EVERY")
    more = ("TRAIN_LOG_EVERY", "GRAD_CLIP_NORM", "EMA_DECAY", "MUON_MOMENTUM_WARMUP_STEPS")
    zeros = dict.fromkeys((*names, *more, "CHECKPOINT_EVERY"), "0")
    assert tg.main([], {**env, **zeros, "ITERATIONS": str(iterations)}) == 0
    result = result_of("run")
    assert (result["steps"], len(result["train_losses"])) == (iterations, iterations)
    assert result["scores"].keys() == {"float", "plain"}
    if not iterations:
        assert result["step_ms"] == {}
        assert result["scores"]["plain"]["val_loss"] == pytest.approx(math.log(260), abs=0.2)


@pytest.mark.fault(25)
def test_a_cap_below_one_step_gives_an_artifact_and_says_fail(env, capsys):
    assert tg.main([], {**env, "MAX_WALLCLOCK_SECONDS": "0.000001"}) == 1
    result = result_of("run")
    assert (result["steps"], result["verdicts"]["train_seconds"]) == (1, "FAIL")
    assert result["status"] == "over a limit"
    assert re.search(r"limit:train_seconds .* FAIL", capsys.readouterr().out)
    tg.load_artifact(Path(f"run/{ARTIFACT}"), tg.Hyperparameters())


# ---- The limits ----


@pytest.mark.fault(39)
def test_an_artifact_is_made_to_fit_or_the_run_fails(done, env, monkeypatch, capsys):
    def quantize(limit: int) -> tuple[int, dict]:
        """Exit status and result of packing the run's weights again under a limit in bytes."""
        monkeypatch.setattr(tg, "BYTES_LIMIT", limit)
        run = {**env, "GPTQ_ENABLED": "1", "GPTQ_CALIB_TOKENS": "256", "RUN_DIR": str(limit)}
        status = tg.main(["--quantize", str(done.folder / MODEL)], run)
        return status, result_of(str(limit))

    status, free = quantize(16_000_000)
    assert status == 0
    limit = free["bytes"]["total"] - free["bytes"]["model"] // 10
    status, tight = quantize(limit)
    assert (status, tight["status"]) == (0, "ok")
    assert 0.97 * limit < tight["bytes"]["total"] <= limit
    assert tight["scores"]["float"]["nats"] == free["scores"]["float"]["nats"]
    limit = free["bytes"]["code"] + 9000
    status, large = quantize(limit)
    assert (status, large["status"]) == (1, "over a limit")
    assert large["verdicts"]["total_bytes"] == "FAIL"
    total = large["bytes"]["total"]
    assert f"limit:total_bytes {total:,} of {limit:,} FAIL" in capsys.readouterr().out
    assert large["bytes"]["model"] == Path(f"{limit}/{ARTIFACT}").stat().st_size


@pytest.mark.fault(39)
def test_a_limit_itself_is_within_the_limit(capsys):
    run = tg.Run({"MAX_WALLCLOCK_SECONDS": "500"}, tg.Log(), {})
    at = run.check_limits({"train": 500.0, "eval": 600.0}, 16_000_000)
    above = run.check_limits({"train": 500.1, "eval": 600.1}, 16_000_001)
    names = {"train_seconds", "eval_seconds", "total_bytes"}
    assert at == dict.fromkeys(names, "PASS")
    assert above == dict.fromkeys(names, "FAIL")
    lines = capsys.readouterr().out.splitlines()
    assert "limit:total_bytes 16,000,000 of 16,000,000 PASS" in lines
    assert "limit:total_bytes 16,000,001 of 16,000,000 FAIL" in lines


# ---- Failures ----


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"NUM_LAYERS": "many"}, "settings", "NUM_LAYERS='many': must be a whole number"),
        ({"DATA_PATH": "nowhere"}, "data", "DATA_PATH=nowhere: no file matches fineweb_val_*.bin"),
        ({"ATTN": "fa3"}, "settings", "ATTN=fa3 COMPILE=auto: cannot run here"),
        ({"WORLD_SIZE": "2"}, "settings", "RANK expected, but not set; launch several processes"),
        ({"RUN_DIR": "file/run"}, "settings", "RUN_DIR=file/run: "),
        ({"RUN_ID": "../run"}, "settings", "RUN_ID='../run': "),
        ({"RESUME": "nowhere"}, "data", "nowhere: cannot be read as a checkpoint"),
    ],
)
def test_failures_have_their_status_and_reason(env, capsys, changes, status, says):
    """--check refuses the same."""
    Path("file").write_text("")
    for argv in (["--check"], []):
        assert tg.main(argv, {**env, **changes}) == 2
        assert says in capsys.readouterr().out
    if Path("run").exists():
        result = result_of("run")
        assert says in result["reason"]
        assert "Traceback" not in result["reason"]
        assert (result["status"], result["settings"]["run_dir"]) == (status, "run")


PACKAGES = {
    "sentencepiece": {"VOCAB_SIZE": "512", "DATA_PATH": "tokens"},
    "safetensors": {},
    "zstandard": {},
    "brotli": {"COMPRESSOR": "brotli"},
}


@pytest.mark.fault(35)
@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named_before_training(package, env, byte_corpus, monkeypatch, capsys):
    Path("tokens").symlink_to(byte_corpus)
    monkeypatch.setitem(sys.modules, package, None)
    for argv in (["--check"], []):
        assert tg.main(argv, {**env, **PACKAGES[package]}) == 2
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.endswith(f"needs the {package} package: pip install {package}")


@pytest.mark.parametrize("name", ["result.json", "train.log", ARTIFACT, MODEL])
def test_a_folder_in_the_place_of_a_file_is_refused_before_training(env, capsys, name):
    Path("run", name).mkdir(parents=True)
    for argv in (["--check"], []):
        assert tg.main(argv, env) == 2
        assert re.search("RUN_DIR=run: .*; choose another RUN_ID", capsys.readouterr().out)
    assert [path.name for path in Path("run").iterdir()] == [name]


def test_a_run_that_never_began_leaves_its_folder_free(done, env):
    """Once it has begun, no other run gets the folder. Another seed gives other weights."""
    env |= {"ITERATIONS": "1", "SEED": "1"}
    for folder in ("elsewhere", "nowhere"):
        assert tg.main([], {**env, "DATA_PATH": folder}) == 2
    assert "DATA_PATH=nowhere" in result_of("run")["reason"]
    assert tg.main([], env) == 0
    failed, _, good = Path("run/train.log").read_text().rpartition("\nerror: ")
    assert "step:1/1 " in good
    assert "nowhere" not in failed + good.partition("\n")[2]
    assert result_of("run")["train_losses"][0] != done.result["train_losses"][0]
    assert tg.main([], env) == tg.main(["--check"], env) == 2


@pytest.mark.fault(34)
def test_weights_that_diverge_in_the_last_step_are_no_success(env):
    """The loss of the only step is finite: it is taken before the update."""
    rates = dict.fromkeys(("MATRIX_LR", "SCALAR_LR", "TIED_EMBED_LR", "MUON_WD"), "1e17")
    env |= {"ITERATIONS": "1", "GRAD_CLIP_NORM": "0", "WARMDOWN_ITERS": "0"}
    assert tg.main([], {**env, **rates}) == 4
    assert result_of("run")["status"] == "nan"
    assert Path("run", MODEL).exists()
    assert not Path("run", ARTIFACT).exists()


@pytest.mark.fault(45)
def test_a_result_that_cannot_be_written_is_a_failure(env, monkeypatch, capsys):
    def fsync(file: int) -> None:
        if "result.json" in str(Path(f"/proc/self/fd/{file}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert tg.main([], env) == 6
    says = "^error: run/result.json: .*No space left on device"
    assert re.search(says, capsys.readouterr().out, re.MULTILINE)
    assert not any("result.json" in path.name for path in Path("run").iterdir())


# ---- The packed twin as a program ----


def import_file(path: Path, name: str) -> types.ModuleType:
    """Imports a file under a name, without an entry in sys.modules."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def twin(done, tmp_path) -> Path:
    """The packed twin that a run has written, alone in a folder."""
    (tmp_path / "alone").mkdir()
    path = tmp_path / "alone/train_gpt.py"
    path.write_bytes((done.folder / "train_gpt.py").read_bytes())
    return path


@pytest.mark.fault(51)
def test_the_twin_alone_gives_the_run_of_its_source(done, twin, byte_corpus):
    """The same artifact, scores and code size; its folder holds both forms too."""
    variables = {**FIRST, "DATA_PATH": str(byte_corpus), "RUN_ID": "first", "OMP_NUM_THREADS": "1"}
    again = subprocess.run(
        [sys.executable, twin.name],
        cwd=twin.parent,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path.name for path in twin.parent.iterdir()} == {"logs", "train_gpt.py"}
    other_folder = twin.parent / "logs/first"
    for name in (ARTIFACT, "train_gpt.py", "train_gpt_readable.py"):
        assert (other_folder / name).read_bytes() == (done.folder / name).read_bytes(), name
    other = result_of(other_folder)
    for name in ("bytes", "code_sha256", "train_losses", "settings", "status"):
        assert other[name] == done.result[name], name
    for kind, score in done.result["scores"].items():
        assert other["scores"][kind] | {"seconds": 0} == score | {"seconds": 0}


@pytest.mark.slow
def test_two_ranks_of_torchrun_run_the_twin(done, twin, byte_corpus, tmp_path):
    variables = {**FIRST, "DATA_PATH": byte_corpus, "RUN_DIR": "run", "OMP_NUM_THREADS": 1}
    agent = torchrun(tmp_path, twin, "--standalone", "--nproc_per_node=2", **variables)
    screen = tmp_path / "screen.txt"
    await_(lambda: agent.poll() is not None, 200, screen.read_text)
    assert agent.returncode == 0, screen.read_text()
    result = result_of(tmp_path / "run")
    assert result["status"] == "ok"
    assert "world_size:2 " in screen.read_text()
    assert (tmp_path / "run/train_gpt.py").read_bytes() == twin.read_bytes()
    assert (tmp_path / "run/train_gpt_readable.py").read_bytes() == SOURCE
    assert result["train_losses"] == pytest.approx(done.result["train_losses"], abs=2e-3)
    assert result["bytes"]["code"] == done.result["bytes"]["code"]


def test_the_twin_imported_under_any_name_is_its_source(twin):
    """The same definitions and constants; a model of a subclass has the same loss, and compiles."""
    paths = (ROOT / "train_gpt.py", twin)
    source, module = (import_file(path, "a.dotted.name") for path in paths)
    wrapper = {"base64", "linecache", "lzma", "text"}  # names of the lines that decode it
    assert vars(module).keys() - wrapper == vars(source).keys() - wrapper
    assert module.__doc__ == source.__doc__
    for key, value in vars(source).items():
        other = getattr(module, key)
        assert type(other).__qualname__ == type(value).__qualname__, key
        assert getattr(other, "__module__", None) == getattr(value, "__module__", None), key
        if isinstance(value, (bool, int, float, str, bytes, tuple)) and not key.startswith("__"):
            texts = (re.sub(" at 0x[0-9a-f]+", "", repr(x)) for x in (other, value))
            assert next(texts) == next(texts), key

    class Tiny(module.Hyperparameters):
        vocab_size, num_layers, model_dim, num_heads, num_kv_heads = 260, 2, 32, 4, 2
        rope_dims, bigram_vocab_size, bigram_dim, ve_dim, train_seq_len = 4, 64, 8, 8, 64

    ids = torch.randint(4, 260, (2, 65), generator=torch.Generator().manual_seed(0))
    losses = []
    for model_class, h in ((tg.GPT, settings(num_layers=2)), (module.GPT, Tiny)):
        torch.manual_seed(0)
        model = model_class(h)
        losses.append(model(ids[:, :-1], ids[:, 1:]).item())
    assert losses[0] == losses[1] == pytest.approx(math.log(260), abs=0.2)
    compiled, programs = compile_counted(model.losses)
    assert compiled(ids[:, :-1], ids[:, 1:])[0].item() == pytest.approx(losses[1], abs=1e-6)
    assert len(programs) == 1


def test_an_error_inside_the_twin_shows_the_line_of_its_source(env, capsys):
    """A bug of the program has status 6 and a traceback, which does not end at the wrapper."""
    line = b"        self.source, self.twin = read_program()\n"
    assert SOURCE.count(line) == 1
    broken = SOURCE.replace(line, b"        1 / 0  # a bug in this line\n")
    file = Path("broken.py").absolute()
    file.write_bytes(tg.packed_source(broken))
    module = import_file(file, "submission_under_review")
    assert module.main([], env) == 6
    number = broken[: broken.index(b"1 / 0")].count(b"\n") + 1
    where = f'  File "{file}", line {number}, in prepare\n    1 / 0  # a bug in this line\n'
    for said in (capsys.readouterr().out, result_of("run")["reason"]):
        assert where in said
        assert "ZeroDivisionError: division by zero" in said


@pytest.mark.fault(51)
def test_line_ends_change_no_byte_of_the_program(tmp_path):
    """A checkout with CRLF line ends counts, hashes and ships the same bytes, of either form."""
    twin, path = tg.packed_source(SOURCE), tmp_path / "train_gpt.py"
    for program in (SOURCE, twin):
        for data in (program, program.replace(b"\n", b"\r\n")):
            path.write_bytes(data)
            assert import_file(path, "any_name").read_program() == (SOURCE, twin)
