"""Settings: where a value comes from, what is refused, what is logged."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_all_four_sources_of_one_value_in_order(monkeypatch):
    """Each source sets another value; removing the strongest one uncovers the next."""
    name, default = "jepa_chunk_size", tg.Hyperparameters.jepa_chunk_size
    assert name in tg.PRESETS["byte_jepa"]
    preset = tg.PRESETS["byte_jepa"][name]
    rule = preset + 1
    monkeypatch.setitem(tg.BYTE_RULES, name, rule)
    env = {"VOCAB_SIZE": "260", "PRESET": "byte_jepa", "JEPA_CHUNK_SIZE": str(preset + 2)}
    found = [getattr(from_env(env), name)]
    for removed in ("JEPA_CHUNK_SIZE", "PRESET", "VOCAB_SIZE"):
        del env[removed]
        found.append(getattr(from_env(env), name))
    assert found == [preset + 2, preset, rule, default]


def test_a_vocabulary_that_a_preset_sets_has_its_rules():
    h = from_env({"PRESET": "byte_jepa"})
    assert h.vocab_size == 260
    assert {name: getattr(h, name) for name in tg.BYTE_RULES} == tg.BYTE_RULES
    assert from_env({"PRESET": "byte_jepa", "VOCAB_SIZE": "1024"}).ve_enabled


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_a_preset_names_settings_only(preset):
    h, kinds = from_env({"PRESET": preset}), tg.Hyperparameters.__dataclass_fields__
    assert h.preset == preset
    for name, value in tg.PRESETS[preset].items():
        assert type(value) is kinds[name].type
        assert getattr(h, name) == value


# ---- A subclass ----


class Tiny(tg.Hyperparameters):
    num_layers = 2


class Tinier(Tiny):
    model_dim = 128


NARROW = {"model_dim": 64, "num_heads": 2, "num_kv_heads": 1}


@pytest.mark.parametrize(
    ("made", "model_dim"),
    [
        (Tiny, 512),
        (Tiny(), 512),
        (Tiny(**NARROW), 64),
        (Tiny.from_env({}), 512),
        (dataclasses.replace(Tiny(), **NARROW), 64),
        (Tinier, 128),
        (Tinier(), 128),
        (Tinier(**NARROW), 64),
    ],
)
def test_an_attribute_of_a_subclass_is_its_default(made, model_dim):
    assert (made.num_layers, made.model_dim) == (2, model_dim)
    assert made.xsa_last_n == 11
    assert isinstance(made, tg.Hyperparameters) or issubclass(made, tg.Hyperparameters)


def test_a_subclass_leaves_its_base_class_as_it_is():
    assert tg.Hyperparameters.num_layers == tg.Hyperparameters().num_layers == 11
    assert Tiny.model_dim == Tiny().model_dim == 512
    names = [f.name for f in dataclasses.fields(tg.Hyperparameters)]
    assert [f.name for f in dataclasses.fields(Tinier)] == names


def test_environment_and_preset_beat_a_subclass():
    assert Tiny.from_env({"NUM_LAYERS": "3"}).num_layers == 3
    assert Tiny.from_env({"PRESET": "byte_jepa"}).num_layers == 13
    assert Tiny(num_layers=5).num_layers == 5


def test_an_annotated_attribute_and_a_model_of_its_own():
    class Annotated(tg.ModelSettings):
        num_layers: int = 3
        bigram_vocab_size: int = 0

    assert (Annotated.num_layers, Annotated().num_layers) == (3, 3)
    assert Annotated().bigram_vocab_size == 0


@pytest.mark.parametrize("name", ["Tiny", "Tinier"])
def test_a_model_has_the_layers_of_a_subclass(name):
    kind = {"Tiny": Tiny, "Tinier": Tinier}[name]
    sizes = set()
    for h in (kind, kind(), tg.Hyperparameters(num_layers=2, model_dim=kind.model_dim)):
        with tg.torch.device("meta"):
            sizes.add(sum(p.numel() for p in tg.GPT(h).parameters()))
    assert len(sizes) == 1


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("num_layers", 0, "NUM_LAYERS=0: must be from 1 to 200"),
        ("num_layers", "2", "NUM_LAYERS='2': must be a whole number"),
        ("num_layers", 2.0, "NUM_LAYERS=2.0: must be a whole number"),
        ("matrix_lr", float("nan"), "MATRIX_LR=nan: must be from 0"),
        ("smear_gate", 1, "SMEAR_GATE=1: must be 0 or 1"),
        ("attn", "fast", "ATTN='fast': must be one of"),
        ("model_dim", 500, "MODEL_DIM=500: must be an even multiple of NUM_HEADS=8"),
        ("corpus", "../x", "CORPUS='../x': must be a name"),
    ],
)
def test_a_bad_value_in_a_subclass_is_refused(name, value, says):
    bad = type("Bad", (Tiny,), {name: value})
    worse = type("Worse", (bad,), {"seed": 5})
    for make in (bad, worse, lambda: bad.from_env({}), lambda: tg.GPT(bad)):
        with pytest.raises(tg.SettingsError) as error:
            make()
        assert str(error.value).startswith(says)


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
        ("BIGRAM_VOCAB_SIZE", "1", "0 (disabled) or at least 2"),
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
    says = r"TRAIN_BATCH_TOKENS=5000: must .*TRAIN_SEQ_LEN=2048 x 1 ranks, such as 4096"
    with pytest.raises(tg.SettingsError, match=says):
        from_env({"TRAIN_BATCH_TOKENS": "5000"})


NO_NAMES = ["../../../x", "..", ".", "/x", "a/b", "a\\b", "a b", ".hidden", "-x", "x\n", "x\0"]


@pytest.mark.fault(52)
@pytest.mark.parametrize("text", NO_NAMES)
@pytest.mark.parametrize("name", ["CORPUS", "RUN_ID"])
def test_what_becomes_part_of_a_path_is_a_plain_name(name, text):
    with pytest.raises(tg.SettingsError) as error:
        from_env({name: text})
    assert str(error.value).startswith(f"{name}={text!r}: must be a name of letters, digits and ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [*NO_NAMES, ""])
def test_a_corpus_is_a_plain_name_wherever_it_comes_from(text):
    """Also where an artifact or a checkpoint stores it."""
    stored = tg.model_settings(tg.Hyperparameters()) | {"corpus": text}
    for make in (
        lambda: from_env({"CORPUS": text}),
        lambda: tg.Hyperparameters(corpus=text),
        lambda: tg.with_model_settings(tg.Hyperparameters(), stored),
    ):
        with pytest.raises(tg.SettingsError, match=re.escape(f"CORPUS={text!r}: ")):
            make()


@pytest.mark.parametrize("text", ["fineweb10B", "seed-5", "v1.2_x+lr=0.1", "7", "día", "x..y"])
def test_plain_names_are_taken(text):
    h = from_env({"CORPUS": text, "RUN_ID": text})
    assert (h.corpus, h.run_id) == (text, text)


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
def test_rules_and_near_misses_are_logged():
    env = {"VOCAB_SIZE": "260", "NUM_LAYER": "9", "HOME": "/root", "LANG": "C", "PATH": "/bin"}
    notes = tg.settings_notes(from_env(env), env)
    assert notes == [
        "rule: VOCAB_SIZE=260 sets VE_ENABLED=0 GPTQ_ENABLED=0 ROPE_TRAIN_SEQ_LEN=4096, "
        "unless given",
        "warning: NUM_LAYER is not a setting; did you mean NUM_LAYERS?",
    ]
    assert not tg.settings_notes(tg.Hyperparameters(), {"HOME": "/root"})


def test_every_setting_is_read():
    """By the program or by a property of the settings, which the program reads."""
    source = Path(tg.__file__).read_text(encoding="utf-8")
    settings, body = source.split("# ---- Runtime", 1)
    properties = re.findall(r"@property\n    def (\w+)(.*?)\n\n", settings, re.DOTALL)
    read = body + "".join(
        text.replace("self.", "h.") for name, text in properties if f"h.{name}" in body
    )
    unread = [
        f.name
        for f in dataclasses.fields(tg.Hyperparameters)
        if not re.search(rf"\bh\.{f.name}\b|\"{f.name}\"", read)
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


@pytest.mark.parametrize("name", ["STP_ENABLED", "SWA_ENABLED"])
def test_a_switch_of_the_published_scripts_is_a_setting(name):
    h = from_env({name: "1"})
    assert tg.changed_settings(h) == {name.lower(): True}
    assert not tg.settings_notes(h, {name: "1"})


@pytest.mark.parametrize(
    ("text", "warns"),
    [("0.15", True), ("1", True), ("on", True), ("0.00", False), ("0", False), ("", False)],
)
def test_late_qat_is_ignored_with_a_warning(text, warns):
    env = {"LATE_QAT_THRESHOLD": text}
    notes = tg.settings_notes(from_env(env), env)
    assert [note.partition(":")[0] for note in notes] == ["warning"] * warns
    assert all("LATE_QAT_THRESHOLD is ignored" in note for note in notes)


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
            "GPTQ_RESERVE_SECONDS=600: must be below MAX_WALLCLOCK_SECONDS=600",
        ),
        ({"STP_ENABLED": "1", "TRAIN_SEQ_LEN": "2"}, "TRAIN_SEQ_LEN=2: STP_ENABLED=1 needs"),
        ({"JEPA_CHUNK_SIZE": "1025"}, "JEPA_CHUNK_SIZE=1025: two chunks must fit"),
        ({"RESUME": "auto"}, "RESUME=auto: needs RUN_ID or RUN_DIR"),
        ({"CHECKPOINT_EVERY": "60m"}, "CHECKPOINT_EVERY='60m': must be steps"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(env, says):
    with pytest.raises(tg.SettingsError, match=says):
        from_env(env)


@pytest.mark.parametrize(("world_size", "near"), [(2, 4096), (3, 6144), (8, 16_384)])
def test_a_batch_is_divided_by_all_ranks(world_size, near):
    h = tg.Hyperparameters(train_batch_tokens=2048)
    tg.check_settings(h)
    says = f"TRAIN_BATCH_TOKENS=2048: .* x {world_size} ranks, such as {near}$"
    with pytest.raises(tg.SettingsError, match=says):
        tg.check_settings(h, world_size)
    tg.check_settings(dataclasses.replace(h, train_batch_tokens=near), world_size)


def test_the_table_has_every_setting_once():
    """A line that continues a meaning begins with a space."""
    lines = tg.settings_table().splitlines()
    names = [f.name.upper() for f in dataclasses.fields(tg.Hyperparameters)]
    assert [line.split()[0] for line in lines if line[0] != " "] == names
    assert max(map(len, lines)) <= 100


# ---- Settings as text ----


def again(h: tg.Hyperparameters) -> tg.Hyperparameters:
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
        *({"PRESET": preset} for preset in tg.PRESETS),
        {"VOCAB_SIZE": "260"},
        {"VOCAB_SIZE": "260", "VE_ENABLED": "1"},  # the default again, against the rule
        {"PRESET": "byte_jepa", "GPTQ_ENABLED": "1"},
        {"PRESET": "cpu", "NUM_LAYERS": "11"},  # the default again, against the preset
        {"PRESET": "cpu", "CORPUS": "fineweb10B", "VOCAB_SIZE": "260", "UNET_SKIPS": "1"},
        {"ADAM_EPS": "1e-12", "MLP_MULT": "2", "ATTN": "math", "DATA_PATH": "a $b 'c' \"d\"\n"},
    ],
)
def test_changed_settings_give_the_same_settings_again(env):
    h = from_env(env)
    assert again(h) == h


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
    assert again(h) == h
