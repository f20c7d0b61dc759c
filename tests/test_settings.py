"""Settings: where a value comes from, what is refused, what is said."""

import dataclasses
import re
from pathlib import Path

import pytest

import train_gpt as tg

from_env = tg.Hyperparameters.from_env
fault = pytest.mark.fault


def test_defaults_are_read_on_the_class_and_on_an_instance():
    assert tg.Hyperparameters.model_dim == 512
    assert (tg.Hyperparameters.num_layers, tg.Hyperparameters.vocab_size) == (11, 1024)
    assert from_env({}) == tg.Hyperparameters()


def test_environment_beats_preset_beats_rule_beats_default():
    assert from_env({}).ve_enabled
    assert not from_env({"VOCAB_SIZE": "260"}).ve_enabled
    assert from_env({"VOCAB_SIZE": "260"}).rope_train_seq_len == 4096
    assert from_env({"VOCAB_SIZE": "260", "VE_ENABLED": "1"}).ve_enabled
    assert not from_env({"VOCAB_SIZE": "0260"}).ve_enabled
    cpu = from_env({"PRESET": "cpu"})
    assert (cpu.num_layers, cpu.max_wallclock_seconds, cpu.corpus) == (2, 0.0, "python")
    assert from_env({"PRESET": "cpu", "NUM_LAYERS": "7"}).num_layers == 7


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_a_preset_names_settings_only(preset):
    given = tg.assignments(tg.PRESETS[preset])
    assert given.keys() <= {f.name.upper() for f in dataclasses.fields(tg.Hyperparameters)}
    h = from_env({"PRESET": preset})
    for name, text in given.items():
        assert float(text) == getattr(h, name.lower()) if name != "CORPUS" else text == h.corpus


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("NUM_LAYERS", "eleven", "whole number"),
        ("NUM_LAYERS", "1e3", "whole number"),
        ("NUM_LAYERS", "", "whole number"),
        ("NUM_LAYERS", "0", "from 1 to 200"),
        ("NUM_LAYERS", "-3", "from 1 to 200"),
        ("MATRIX_LR", "nan", "from 0 to"),
        pytest.param("MAX_WALLCLOCK_SECONDS", "inf", "from 0 to", marks=fault(25)),
        pytest.param("MAX_WALLCLOCK_SECONDS", "-1", "from 0 to", marks=fault(25)),
        ("SMEAR_GATE", "true", "0 or 1"),
        ("SMEAR_GATE", "2", "0 or 1"),
        ("SMEAR_GATE", "False", "0 or 1"),
        ("SMEAR_GATE", "", "0 or 1"),
        ("MATRIX_LR", "", "a number"),
        ("MATRIX_LR", "-0.1", "from 0 to"),
        ("SEED", "1.0", "whole number"),
        pytest.param("MAX_WALLCLOCK_SECONDS", "nan", "from 0 to", marks=fault(25)),
        ("PRESET", "gpu", "one of"),
        ("ATTN", "fast", "one of"),
        pytest.param("MODEL_DIM", "500", "multiple of NUM_HEADS", marks=fault(21)),
        pytest.param("MODEL_DIM", "520", "even multiple of", marks=fault(21)),  # heads of 65
        pytest.param("NUM_HEADS", "0", "from 1 to", marks=fault(21)),
        pytest.param("NUM_KV_HEADS", "3", "must divide NUM_HEADS", marks=fault(21)),
        pytest.param("ROPE_DIMS", "15", "even", marks=fault(21)),
        pytest.param("ROPE_DIMS", "128", "at most 64", marks=fault(21)),
        ("BIGRAM_VOCAB_SIZE", "1", "0 (none) or at least 2"),
        ("VE_LAYERS", "9,11", "below NUM_LAYERS=11"),
        ("VE_LAYERS", "last", "as 9,10"),
        ("VE_LAYERS", "-1", "as 9,10"),
    ],
)
def test_a_bad_value_is_named_with_its_remedy(name, text, says):
    with pytest.raises(tg.SettingsError) as error:
        from_env({name: text})
    assert name in str(error.value)
    assert says in str(error.value)
    assert text in str(error.value)


def test_a_batch_of_whole_sequences_is_asked_for():
    with pytest.raises(tg.SettingsError, match=r"TRAIN_BATCH_TOKENS=5000 must .*=2048"):
        from_env({"TRAIN_BATCH_TOKENS": "5000"})


@pytest.mark.fault(18)
def test_all_bad_values_come_in_one_error():
    env = {"NUM_LAYERS": "x", "MATRIX_LR": "-1", "SMEAR_GATE": "yes", "SEED": "1"}
    with pytest.raises(tg.SettingsError) as error:
        from_env(env)
    assert [line.split("=")[0] for line in sorted(str(error.value).splitlines())] == [
        "MATRIX_LR",
        "NUM_LAYERS",
        "SMEAR_GATE",
    ]


def test_grouped_digits_and_whole_floats_are_numbers():
    assert from_env({"TRAIN_BATCH_TOKENS": "524_288"}).train_batch_tokens == 524_288
    assert from_env({"MLP_MULT": "2"}).mlp_mult == 2.0
    assert from_env({"MAX_WALLCLOCK_SECONDS": "1e3"}).max_wallclock_seconds == 1000.0


@pytest.mark.fault(19)
def test_rules_and_near_misses_are_said():
    env = {"VOCAB_SIZE": "260", "NUM_LAYER": "9", "HOME": "/root", "LANG": "C", "PATH": "/bin"}
    notes = tg.settings_notes(from_env(env), env)
    assert notes[0] == f"rule: VOCAB_SIZE=260 sets {tg.BYTE_RULES}, unless given"
    assert [n for n in notes if "NUM_LAYER " in n and "NUM_LAYERS" in n]
    assert len([n for n in notes if n.startswith("warning")]) == 1
    assert not tg.settings_notes(tg.Hyperparameters(), {"HOME": "/root"})


def test_every_setting_is_read_outside_its_class():
    source = Path(tg.__file__).read_text(encoding="utf-8")
    body = source[source.index("# ---- Runtime") :]
    unread = [
        f.name
        for f in dataclasses.fields(tg.Hyperparameters)
        if not re.search(rf"\bh\.{f.name}\b|\"{f.name}\"", body)
    ]
    assert set(unread) <= {"preset"}  # read by from_env


@pytest.mark.fault(18)
@pytest.mark.parametrize("value", [float("nan"), "3", None])
def test_an_instance_is_checked_however_it_is_made(value):
    with pytest.raises(tg.SettingsError, match="MATRIX_LR"):
        tg.Hyperparameters(matrix_lr=value)


def test_all_that_the_published_command_asks_for_is_built():
    env = {"GPTQ_ENABLED": "1", "LABEL_SMOOTHING": "0.0", "TTT_ENABLED": "0"}
    assert env.keys() <= {name.upper() for name in tg.Hyperparameters.__dataclass_fields__}
    off = {"STP_ENABLED": "0", "SWA_ENABLED": "0", "LATE_QAT_THRESHOLD": "0.00"}
    assert not tg.settings_notes(from_env(env | off), env | off)
    assert from_env(env | off) == tg.Hyperparameters()  # GPTQ too is a default


@pytest.mark.parametrize("name", ["STP_ENABLED", "SWA_ENABLED", "LATE_QAT_THRESHOLD"])
def test_a_switch_of_the_published_scripts_that_is_not_built_is_named(name):
    env = {name: "0.15" if name.startswith("LATE") else "1"}
    assert tg.settings_notes(from_env(env), env) == [f"warning: {name} is not built"]


def test_bytes_are_rounded_unless_gptq_is_asked_for():
    """PR #832 rounds; the other vocabularies have GPTQ."""
    assert not from_env({"VOCAB_SIZE": "260"}).gptq_enabled
    assert from_env({"VOCAB_SIZE": "260", "GPTQ_ENABLED": "1"}).gptq_enabled
    assert from_env({"VOCAB_SIZE": "1024"}).gptq_enabled


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"TRAIN_SEQ_LEN": "1"}, "TRAIN_SEQ_LEN=1: must be from 2"),
        (
            {"GPTQ_CALIB": "train", "GPTQ_RESERVE_SECONDS": "600"},
            "GPTQ_RESERVE_SECONDS=600.0 must be below MAX_WALLCLOCK_SECONDS=600",
        ),
    ],
)
def test_what_cannot_go_together_is_said(env, says):
    with pytest.raises(tg.SettingsError, match=says):
        from_env(env)


def test_the_table_has_every_setting_once():
    lines = tg.settings_table().splitlines()
    names = [f.name.upper() for f in dataclasses.fields(tg.Hyperparameters)]
    assert [line.split()[0] for line in lines] == names
    assert max(map(len, lines)) <= 100
