"""Settings: where a value comes from, what is refused, what is logged."""

import dataclasses
import re
import shlex
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train_gpt as tg

from_env = tg.Hyperparameters.from_env
fault = pytest.mark.fault
NAMES = [f.name.upper() for f in dataclasses.fields(tg.Hyperparameters)]


def message(env: dict[str, str]) -> str:
    """What is said of settings that are refused."""
    with pytest.raises(tg.SettingsError) as error:
        from_env(env)
    return str(error.value)


# ---- Where a value comes from ----


def test_environment_beats_preset_beats_rule_beats_default(monkeypatch):
    """Bytes are rounded unless GPTQ is asked for, as in PR #832."""

    def found(**env: str) -> tuple[int, int, bool, bool, int]:
        h = from_env(env)
        return h.num_layers, h.vocab_size, h.ve_enabled, h.gptq_enabled, h.rope_train_seq_len

    monkeypatch.setitem(tg.PRESETS, "v9", {"vocab_size": 260, "rope_train_seq_len": 5})
    assert found() == (11, 1024, True, True, 1024)
    assert found(VOCAB_SIZE="260") == (11, 260, False, False, 4096)
    assert found(VOCAB_SIZE="0260", VE_ENABLED="1") == (11, 260, True, False, 4096)
    assert found(VOCAB_SIZE="260", GPTQ_ENABLED="1") == (11, 260, False, True, 4096)
    assert found(PRESET="byte_jepa") == (13, 260, False, False, 4096)  # with the rules of its size
    assert found(PRESET="byte_jepa", VOCAB_SIZE="1024") == (13, 1024, True, True, 1024)
    assert found(PRESET="byte_jepa", NUM_LAYERS="7") == (7, 260, False, False, 4096)
    assert found(PRESET="v9") == (11, 260, False, False, 5)


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_a_preset_holds_legal_settings(preset):
    h, kinds = from_env({"PRESET": preset}), tg.Hyperparameters.__dataclass_fields__
    assert h.preset == preset
    for name, value in tg.PRESETS[preset].items():
        assert type(value) is kinds[name].type
        assert getattr(h, name) == value


def test_numbers_may_have_grouped_digits_or_an_exponent():
    assert from_env({"TRAIN_BATCH_TOKENS": "524_288"}).train_batch_tokens == 524_288
    assert from_env({"MLP_MULT": "2"}).mlp_mult == 2.0
    assert from_env({"MAX_WALLCLOCK_SECONDS": "1e3"}).max_wallclock_seconds == 1000.0


# ---- A subclass ----


class Tiny(tg.Hyperparameters):
    num_layers = 2


class Tinier(Tiny):
    model_dim = 128


NARROW = {"model_dim": 64, "num_heads": 2, "num_kv_heads": 1}


@pytest.mark.parametrize(
    ("made", "layers", "model_dim"),
    [
        (Tiny, 2, 512),
        (dataclasses.replace(Tiny(), **NARROW), 2, 64),
        (Tinier(**NARROW), 2, 64),
        (Tiny.from_env({"NUM_LAYERS": "3"}), 3, 512),
        (Tiny.from_env({"PRESET": "byte_jepa"}), 13, 512),
        (tg.Hyperparameters, 11, 512),  # which the subclasses leave as it is
    ],
)
def test_an_attribute_of_a_subclass_is_its_default(made, layers, model_dim):
    assert (made.num_layers, made.model_dim) == (layers, model_dim)
    assert [f.name.upper() for f in dataclasses.fields(made)] == NAMES
    with torch.device("meta"):
        model = tg.GPT(made)
    assert (len(model.blocks), model.tok_emb.weight.size(1)) == (layers, model_dim)


@fault(18)
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("num_layers", "2", "NUM_LAYERS='2': must be a whole number"),
        ("num_layers", 2.0, "NUM_LAYERS=2.0: must be a whole number"),
        ("smear_gate", 1, "SMEAR_GATE=1: must be 0 or 1"),
        ("model_dim", 500, "MODEL_DIM=500: must be an even multiple of NUM_HEADS=8"),
    ],
)
def test_a_bad_value_in_python_is_refused(name, value, says):
    """Of a subclass, of a subclass of it, and of an instance."""
    bad = type("Bad", (Tiny,), {name: value})
    worse = type("Worse", (bad,), {"seed": 5})
    instance = partial(Tiny, **{name: value})
    for make in (bad, worse, partial(bad.from_env, {}), partial(tg.GPT, bad), instance):
        with pytest.raises(tg.SettingsError) as error:
            make()
        assert str(error.value).startswith(says)


# ---- What is refused ----


def assert_refused(text: str, says: str) -> None:
    """The message begins with the first setting and its value, and has the remedy."""
    name, _, value = text.split()[0].partition("=")
    said = message(dict(word.split("=") for word in text.split()))
    assert re.match(rf"{name}='?{value}(\.0)?'?: ", said)
    assert says in said


@fault(18)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("NUM_LAYERS=eleven", "must be a whole number"),
        ("NUM_LAYERS=0", "must be from 1 to 200"),
        ("MATRIX_LR=", "must be a number"),
        ("MATRIX_LR=nan", "must be from 0 to 1e+18"),
        ("MATRIX_LR=-0.1", "must be from 0 to 1e+18"),
        pytest.param("MAX_WALLCLOCK_SECONDS=inf", "must be from 0 to", marks=fault(25)),
        pytest.param("MAX_WALLCLOCK_SECONDS=-1", "must be from 0 to", marks=fault(25)),
        ("SMEAR_GATE=true", "must be 0 or 1"),
        ("PRESET=gpu", "must be one of cpu, "),
        ("ATTN=fast", "must be one of auto, "),
    ],
)
def test_a_value_of_another_kind_is_refused(text, says):
    assert_refused(text, says)


@fault(21)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("MODEL_DIM=500", "must be an even multiple of NUM_HEADS=8"),
        ("NUM_HEADS=0", "must be from 1 to 4096"),
        ("NUM_KV_HEADS=3", "must divide NUM_HEADS=8"),
        ("ROPE_DIMS=15", "must be even and at most 64"),
    ],
)
def test_heads_that_do_not_fit_are_refused(text, says):
    assert_refused(text, says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("BIGRAM_VOCAB_SIZE=1", "must be 0 (disabled) or at least 2"),
        ("VE_LAYERS=9,11", "must be layers below NUM_LAYERS=11, as 9,10"),
        ("TRAIN_SEQ_LEN=1", "must be from 2"),
        ("TRAIN_SEQ_LEN=2 STP_ENABLED=1", "STP_ENABLED=1 needs at least 3"),
        ("TRAIN_BATCH_TOKENS=5000", "TRAIN_SEQ_LEN=2048 x 1 ranks, such as 4096"),
        ("JEPA_CHUNK_SIZE=1025", "two chunks must fit in TRAIN_SEQ_LEN=2048"),
        ("RESUME=auto", "needs RUN_ID or RUN_DIR"),
        ("CHECKPOINT_EVERY=60m", "must be steps, such as 500, or seconds"),
        ("CHECKPOINT_EVERY=-5", "must be steps, such as 500, or seconds"),
        ("CHECKPOINT_EVERY=1.5", "must be steps, such as 500, or seconds"),
        ("LOOP_START=3 LOOP_END=9 NUM_LOOPS=2 NUM_LAYERS=9", "below NUM_LAYERS=9"),
        ("LOOP_START=5 LOOP_END=4 NUM_LOOPS=2", "must be at most LOOP_END=4"),
        ("SENSITIVITY_TOKENS=9 GPTQ_CALIB_TOKENS=8", "must be at most GPTQ_CALIB_TOKENS=8"),
        ("PARALLEL_START_LAYER=4", "at least 5 and below NUM_LAYERS=11"),
        ("PARALLEL_START_LAYER=5 NUM_LOOPS=1", "at least 6 and below NUM_LAYERS=11"),
        ("SMEAR_GATE=1 SMEAR_GATE_ENABLED=1", "must be 0 with SMEAR_GATE_ENABLED=1"),
        ("GATE_WINDOW=513 SPARSE_ATTN_GATE_ENABLED=1", "at most MODEL_DIM=512"),
        ("ENABLE_LOOPING_AT=1 NUM_LOOPS=1", "must be below 1"),
        ("MIN_LR=0.3 SWA_ENABLED=1", "must be below SWA_START_FRAC=0.2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(text, says):
    assert_refused(text, says)


@fault(18)
def test_all_bad_values_come_in_one_error():
    said = message({"NUM_LAYERS": "x", "MATRIX_LR": "-1", "SMEAR_GATE": "yes", "SEED": "1"})
    names = [line.split("=")[0] for line in said.splitlines()]
    assert sorted(names) == ["MATRIX_LR", "NUM_LAYERS", "SMEAR_GATE"]


@fault(52)
@pytest.mark.parametrize("text", ["../x", "..", "/x", "a\\b", ".hidden", "-x", "x\n"])
def test_what_becomes_part_of_a_path_is_a_plain_name(text):
    for name in ("CORPUS", "RUN_ID"):
        said = message({name: text})
        assert said == f"{name}={text!r}: must be a name of letters, digits and - _ . + ="
    with pytest.raises(tg.SettingsError, match="CORPUS="):  # as where an artifact has it
        dataclasses.replace(tg.Hyperparameters(), corpus=text)


def test_plain_names_are_taken():
    for text in ("fineweb10B", "seed-5", "v1.2_x+lr=0.1", "7", "día", "x..y"):
        h = from_env({"CORPUS": text, "RUN_ID": text})
        assert (h.corpus, h.run_id) == (text, text)


@fault(22, 23)
@pytest.mark.parametrize(("world_size", "near"), [(3, 6144), (8, 16_384)])
def test_a_batch_is_divided_by_all_ranks(world_size, near):
    h = tg.Hyperparameters(train_batch_tokens=2048)
    says = f"TRAIN_BATCH_TOKENS=2048: .* x {world_size} ranks, such as {near}$"
    with pytest.raises(tg.SettingsError, match=says):
        tg.check_settings(h, world_size)
    tg.check_settings(dataclasses.replace(h, train_batch_tokens=near), world_size)


# ---- What is logged ----


def test_a_setting_that_the_preset_makes_useless_is_logged():
    env = {"PRESET": "frontier", "WARMDOWN_ITERS": "1000"}
    says = "warning: WARMDOWN_ITERS is ignored, because WARMDOWN_FRAC=0.85; set WARMDOWN_FRAC=0"
    assert says in tg.settings_notes(from_env(env), env)
    env |= {"WARMDOWN_FRAC": "0"}
    assert says not in tg.settings_notes(from_env(env), env)


@fault(19)
def test_rules_and_near_misses_are_logged():
    env = {"VOCAB_SIZE": "260", "NUM_LAYER": "9", "matrix_lr": "1", "MTP_NUM_HEADS": "1"}
    env |= {"LATE_QAT_THRESHOLD": "0.15"}
    env |= {"EVAL_STRIDE": "2048", "HOME": "/root", "LANG": "C", "PATH": "/bin"}
    notes = tg.settings_notes(from_env(env), env)
    (ignored,) = [note for note in notes if "LATE_QAT" in note]
    assert ignored.startswith("warning: LATE_QAT_THRESHOLD is ignored")
    assert [note for note in notes if note != ignored] == [
        "rule: VOCAB_SIZE=260 sets VE_ENABLED=0 GPTQ_ENABLED=0 ROPE_TRAIN_SEQ_LEN=4096, "
        "unless given",
        "warning: NUM_LAYER is not a setting; did you mean NUM_LAYERS?",
        "warning: matrix_lr is not a setting; did you mean MATRIX_LR?",
        "warning: MTP_NUM_HEADS is a setting of published scripts that is not built here",
        "warning: EVAL_STRIDE=2048 is not below the window of 2048 tokens, so there is no sliding "
        "score",
    ]
    assert not tg.settings_notes(tg.Hyperparameters(), {"HOME": "/root"})


def test_the_published_command_is_the_defaults():
    """Of PR #1124, with the variables that only its script has."""
    env = {"GPTQ_ENABLED": "1", "LABEL_SMOOTHING": "0.0", "TTT_ENABLED": "0", "XSA_LAST_N": "11"}
    env |= {"EVAL_STRIDE": "64", "SEED": "1337", "STP_ENABLED": "0", "LATE_QAT_THRESHOLD": "0.00"}
    assert env.keys() - set(NAMES) == {"LATE_QAT_THRESHOLD"}
    assert from_env(env) == tg.Hyperparameters()
    assert not tg.settings_notes(from_env(env), env)


def test_the_table_for_help_has_every_setting_once():
    """A line that continues a meaning begins with a space."""
    lines = tg.settings_table().splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == NAMES
    assert max(map(len, lines)) <= 100


def read_again(h: tg.Hyperparameters) -> tg.Hyperparameters:
    """The settings that the logged text of those that are changed gives."""
    text = tg.env_form(tg.changed_settings(h))
    return from_env(dict(word.split("=", 1) for word in shlex.split(text)))


def test_only_changed_settings_are_logged():
    assert tg.changed_settings(tg.Hyperparameters()) == {}
    h = from_env({"NUM_LAYERS": "9", "SMEAR_GATE": "0", "SEED": "1337", "RUN_DIR": "my runs/it's"})
    changed = {"num_layers": 9, "smear_gate": False, "run_dir": "my runs/it's"}
    assert tg.changed_settings(h) == changed
    assert tg.env_form(changed) == "NUM_LAYERS=9 SMEAR_GATE=0 RUN_DIR='my runs/it'\"'\"'s'"


@pytest.mark.parametrize(
    "env",
    [
        {"PRESET": "cpu", "CORPUS": "fineweb10B", "VOCAB_SIZE": "260", "UNET_SKIPS": "1"},
        {"VOCAB_SIZE": "260", "VE_ENABLED": "1"},  # the default again, against the rule
        {"PRESET": "cpu", "NUM_LAYERS": "11"},  # the default again, against the preset
        {"PRESET": "byte_jepa", "GPTQ_ENABLED": "1"},
    ],
)
def test_changed_settings_give_the_same_settings_again(env):
    assert read_again(from_env(env)) == from_env(env)


@hypothesis_settings(max_examples=30, derandomize=True, deadline=None)
@given(
    path=st.text(),
    rate=st.floats(0, 1e18),
    seed=st.integers(0, 10**18),
    gate=st.booleans(),
    std=st.floats(0, 1),
)
def test_any_values_are_read_again_from_their_text(path, rate, seed, gate, std):
    h = tg.Hyperparameters(
        data_path=path, matrix_lr=rate, seed=seed, smear_gate=gate, tied_embed_init_std=std
    )
    assert read_again(h) == h


@pytest.mark.parametrize("text", ["MUON_MOMENTUM=1", "MUON_MOMENTUM_WARMUP_START=1", "EMA_DECAY=1"])
def test_a_decay_that_would_never_forget_is_refused(text):
    name, value = text.split("=")
    with pytest.raises(tg.SettingsError, match=name):
        tg.Hyperparameters.from_env({name: value})


def test_defaults_of_test_time_training_are_those_of_pr_549():
    h = tg.Hyperparameters()
    assert (h.ttt_chunk_tokens, h.ttt_epochs, h.ttt_lr) == (32_768, 3, 0.002)
