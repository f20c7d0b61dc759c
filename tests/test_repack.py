"""A finished run used again: by --quantize, and by RESUME under other settings."""

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import quantize_matrices
from launch import QUICK, result_of

import train_gpt as tg

ARTIFACT, WEIGHTS = "final_model.int6.ptz", "final_model.safetensors"
SETTINGS = {
    **QUICK,
    "ITERATIONS": "4",
    "WARMDOWN_ITERS": "2",
    "CHECKPOINT_EVERY": "3",
    "GPTQ_ENABLED": "1",
    "GPTQ_CALIB_TOKENS": "256",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, byte_corpus) -> Path:
    """The folder of a finished run with GPTQ."""
    folder = tmp_path_factory.mktemp("repack") / "run"
    env = {**SETTINGS, "DATA_PATH": str(byte_corpus), "RUN_DIR": str(folder)}
    assert tg.main([], env) == 0
    return folder


@pytest.fixture
def env(byte_corpus, tmp_path) -> dict[str, str]:
    return {**SETTINGS, "DATA_PATH": str(byte_corpus), "RUN_DIR": str(tmp_path / "again")}


def repack(path: Path, env: dict[str, str]) -> tuple[bytes, dict]:
    """Returns the artifact and the result of --quantize."""
    assert tg.main(["--quantize", str(path)], env) == 0
    return (Path(env["RUN_DIR"]) / ARTIFACT).read_bytes(), result_of(Path(env["RUN_DIR"]))


def test_the_same_settings_give_the_same_bytes_once(run, env, tmp_path):
    files = {path.name: path.read_bytes() for path in run.iterdir()}
    blob, result = repack(run / WEIGHTS, env)
    assert blob == files[ARTIFACT]
    before = json.loads(files["result.json"])
    for name in ("float", "plain"):
        assert result["scores"][name]["nats"] == before["scores"][name]["nats"]
    assert result["status"] == "ok"
    # What was not trained here has no verdict on its time.
    assert before["verdicts"].keys() - result["verdicts"].keys() == {"train_seconds"}
    assert before["seconds"].keys() == {"train", "calibrate", "pack", "diagnose", "eval"}
    assert before["seconds"]["train"] > result["seconds"]["train"] == 0
    written = {path.name for path in (tmp_path / "again").iterdir()}
    assert written == files.keys() - {WEIGHTS, tg.CHECKPOINT}
    for folder in (run, tmp_path / "again"):  # it never overwrites a run
        assert tg.main(["--quantize", str(run / WEIGHTS)], {**env, "RUN_DIR": str(folder)}) == 2
    assert {path.name: path.read_bytes() for path in run.iterdir()} == files


def test_resume_is_of_training_alone(run, env):
    """--quantize with RESUME=auto refuses the folder of a finished run."""
    before = (run / "result.json").read_bytes()
    other = {**env, "RUN_DIR": str(run), "RESUME": "auto"}
    assert tg.main(["--quantize", str(run)], other) == 2
    assert (run / "result.json").read_bytes() == before


@pytest.mark.parametrize("name", ["SEED", "TRAIN_BATCH_TOKENS", "TRAIN_ORDER"])
def test_quantize_calibrates_on_the_text_after_the_last_step_or_not_at_all(name, run, env, capsys):
    other = {"SEED": "3", "TRAIN_BATCH_TOKENS": "512", "TRAIN_ORDER": "sequential"}
    env |= {"GPTQ_CALIB": "train", name: other[name]}
    assert tg.main(["--quantize", str(run)], env) == 2
    assert "it was trained with" in capsys.readouterr().out
    assert not Path(env["RUN_DIR"], tg.PROGRAM).exists()


def test_neither_model_variables_nor_training_data_are_needed(run, env, byte_corpus, tmp_path):
    shard = "fineweb_val_000000.bin"
    (tmp_path / shard).write_bytes((byte_corpus / shard).read_bytes())
    keep = ("GPTQ_CALIB_TOKENS", "MICRO_BATCH_TOKENS", "EVAL_STRIDE", "RUN_DIR")
    few = {name: env[name] for name in keep} | {"DATA_PATH": str(tmp_path)}
    assert repack(run, few)[0] == (run / ARTIFACT).read_bytes()  # a folder stands for its weights


TTT = {"TTT_ENABLED": "1", "TTT_CHUNK_TOKENS": "1024"}


@pytest.mark.parametrize("other", [{"GPTQ_ENABLED": "0"}, {"GPTQ_CALIB": "train"}, TTT])
def test_other_settings_change_what_they_name(other, run, env):
    """Other codes of the matrices by another quantizer; another score by test-time training."""
    blob, result = repack(run / WEIGHTS, env | other)
    before = result_of(run)["scores"]
    assert result["scores"]["float"]["nats"] == before["float"]["nats"]
    assert ("ttt" in result["scores"]) == (other == TTT)
    _, old = tg.unpack_artifact((run / ARTIFACT).read_bytes(), tg.Hyperparameters())
    _, new = tg.unpack_artifact(blob, tg.Hyperparameters())
    changed = {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == (set() if other == TTT else {"blocks"})
    if "GPTQ_ENABLED" in other:
        name = "blocks.0.mlp.up.weight"
        weight = safetensors.torch.load_file(run / WEIGHTS)[name]
        codes = quantize_matrices("rounding", weight[None])[0]
        assert torch.equal(new[f"{name}.codes"], codes[0])


def test_a_file_that_is_no_checkpoint_is_refused_in_a_line(run, env, tmp_path, capsys):
    path, whole = tmp_path / "model.pt", (run / WEIGHTS).read_bytes()
    weights = safetensors.torch.load(whole)
    told = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    first = next(iter(weights))
    less = {name: weight for name, weight in weights.items() if name != first}
    illegal = {"settings": json.dumps({**json.loads(told["settings"]), "num_heads": 5})}
    for name, data in {
        "absent": None,
        "text": b"no checkpoint at all",
        "artifact": (run / ARTIFACT).read_bytes(),
        "a weight missing": safetensors.torch.save(less, told),
        "illegal settings": safetensors.torch.save(weights, illegal),
    }.items():
        if data is not None:
            path.write_bytes(data)
        capsys.readouterr()
        assert tg.main(["--quantize", str(path)], env) == 2, name
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"error: {path}: cannot be read as a checkpoint"), name
        assert len(line) < 500
        assert not (tmp_path / "again").exists()  # nor has a run begun


OTHERS = ["null", "[]", "adamw lr=3", '{"lr": 1}', '{"num_layers": 9, "lr": 1}', "3.0"]


@pytest.mark.parametrize("text", OTHERS)
def test_metadata_of_another_program_is_not_read(text, run, tmp_path, capsys):
    """A checkpoint with such settings is refused, because a resume could not compare them."""
    path, h = tmp_path / "other.safetensors", tg.Hyperparameters.from_env(SETTINGS)
    for name in (WEIGHTS, tg.CHECKPOINT):
        tensors = safetensors.torch.load_file(run / name)
        safetensors.torch.save_file(tensors, path, {"settings": text, "format": "pt"})
        if name == WEIGHTS:
            saved = tg.load_checkpoint(path, h)
            assert (saved.h, saved.step) == (h, 0)
        else:
            with pytest.raises(tg.DataError, match=rf"{path}: cannot be read as a checkpoint"):
                tg.load_checkpoint(path, h)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_without_our_metadata_are_packed(dtype, run, env, tmp_path, capsys):
    """Those of another shape are refused by the name of a weight."""
    path, weights = tmp_path / "other.safetensors", safetensors.torch.load_file(run / WEIGHTS)
    safetensors.torch.save_file({name: w.to(dtype) for name, w in weights.items()}, path)
    assert repack(path, env)[1]["status"] == "ok"
    assert tg.main(["--quantize", str(path)], {**env, "NUM_LAYERS": "3"}) == 2
    assert "blocks.2." in capsys.readouterr().out


# ---- RESUME ----


OTHER = {
    "SEED": "3",
    "TRAIN_BATCH_TOKENS": "512",
    "MATRIX_LR": "0.5",
    "STP_ENABLED": "1",
    "TRAIN_ORDER": "sequential",
    "ITERATIONS": "2",
}


@pytest.mark.parametrize("name", OTHER)
def test_resume_under_other_settings_is_refused(name, run, env, capsys):
    path = run / tg.CHECKPOINT
    assert tg.main([], {**env, "RESUME": str(path), name: OTHER[name]}) == 2
    shown = capsys.readouterr().out
    assert f"RESUME={path}" in shown
    assert name in shown
    assert not Path(env["RUN_DIR"], tg.PROGRAM).exists()  # the same folder can be used again


@pytest.mark.parametrize("argv", [[], ["--check"]])
def test_resume_from_weights_alone_is_refused(argv, run, env, capsys):
    assert tg.main(argv, {**env, "RESUME": str(run / WEIGHTS)}) == 2
    assert f"RESUME={run / WEIGHTS}: it has weights only" in capsys.readouterr().out
    assert not Path(env["RUN_DIR"], tg.PROGRAM).exists()


@pytest.mark.parametrize("change", [{"SEED": "3"}, {"DATA_PATH": "nowhere"}, {"ATTN": "fa3"}])
def test_a_refused_resume_keeps_the_result_of_the_run(change, run, env):
    folder = shutil.copytree(run, env["RUN_DIR"])
    assert tg.main([], {**env, "RESUME": "auto", **change}) == 2
    assert (Path(folder) / tg.RESULT).read_bytes() == (run / tg.RESULT).read_bytes()


@pytest.mark.parametrize("argv", [[], ["--check"]])
def test_resume_on_other_shards_is_refused(argv, run, env, byte_corpus, tmp_path, capsys):
    shutil.copytree(byte_corpus, tmp_path / "data")
    shard = tmp_path / "data" / "fineweb_train_000000.bin"
    tokens = tg.read_shard(shard)[:-1]
    shard.write_bytes(tg.shard_header(len(tokens)) + tokens.tobytes())
    other = {**env, "DATA_PATH": str(tmp_path / "data"), "RESUME": str(run)}
    assert tg.main(argv, other) == 2
    says = r"it was trained with SHARDS=\d+; set the same \(SHARDS by DATA_PATH\)"
    assert re.search(says, capsys.readouterr().out)


def test_a_checkpoint_that_states_no_order_was_trained_in_sequence(run, env, tmp_path, capsys):
    tensors, settings = tg.read_tensors(run / tg.CHECKPOINT)
    added = ("train_order", "step", "shards", "scale_rule", "matrix_bits", "gptq_embed")
    older = {k: v for k, v in settings.items() if k not in added} | {"gptq_reserve_seconds": 14.0}
    tg.write_tensors(tmp_path / "older", tensors, older)
    env |= {"RESUME": str(tmp_path / "older"), "ITERATIONS": "5"}
    assert tg.main([], env) == 2
    assert "it was trained with TRAIN_ORDER=sequential" in capsys.readouterr().out
    assert tg.main([], {**env, "TRAIN_ORDER": "sequential"}) == 0
    result = result_of(Path(env["RUN_DIR"]))
    assert (result["resumed"]["step"], result["steps"]) == (3, 5)


def test_a_longer_resume_is_allowed_and_recorded(run, env):
    longer = {"ITERATIONS": "6", "EVAL_STRIDE": "16", "MICRO_BATCH_TOKENS": "256"}
    assert tg.main([], {**env, "RESUME": str(run), **longer}) == 0
    result = result_of(Path(env["RUN_DIR"]))
    assert (result["resumed"]["step"], result["steps"]) == (3, 6)
    assert result["resumed"]["changed"]["iterations"] == 4
