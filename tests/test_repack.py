"""--quantize: a saved model packed and scored again, under these settings or others."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TINY
from launch import result_of

import train_gpt as tg

ARTIFACT, WEIGHTS = "final_model.int6.ptz", "final_model.safetensors"
SETTINGS = {
    **TINY,
    "ITERATIONS": "4",
    "WARMDOWN_ITERS": "2",
    "EVAL_STRIDE": "0",
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
    assert {path.name for path in (tmp_path / "again").iterdir()} == files.keys() - {WEIGHTS}
    for folder in (run, tmp_path / "again"):  # it never overwrites a run
        assert tg.main(["--quantize", str(run / WEIGHTS)], {**env, "RUN_DIR": str(folder)}) == 2
    assert {path.name: path.read_bytes() for path in run.iterdir()} == files


def test_neither_model_variables_nor_training_data_are_needed(run, env, byte_corpus, tmp_path):
    shard = "fineweb_val_000000.bin"
    (tmp_path / shard).write_bytes((byte_corpus / shard).read_bytes())
    keep = ("GPTQ_CALIB_TOKENS", "MICRO_BATCH_TOKENS", "EVAL_STRIDE", "RUN_DIR")
    few = {name: env[name] for name in keep} | {"DATA_PATH": str(tmp_path)}
    assert repack(run / WEIGHTS, few)[0] == (run / ARTIFACT).read_bytes()


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
        codes = tg.quantize_rounding(6, 1.0, weight[None], None).codes
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
        "cut": whole[: len(whole) // 2],
        "artifact": (run / ARTIFACT).read_bytes(),
        "a weight missing": safetensors.torch.save(less, told),
        "another shape": safetensors.torch.save({**less, first: torch.ones(3)}, told),
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
