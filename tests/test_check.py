"""records/check.py finds each fault that is planted in a good folder, and says where it is."""

import base64
import json
import lzma
import re
import shutil
import sys
import tracemalloc
import zlib
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT
from test_submit import as_record, edit, make_entry, refusal, with_small_program

sys.path.insert(0, str(ROOT / "records"))

import check
import figures
import program
import train_gpt
from train_gpt import packed_source as pack

JSON, README, NEEDS = "submission.json", "README.md", "requirements.txt"
SEED7, SEED42 = "train_seed7.log", "train_seed42.log"
PROGRAM, READABLE = "train_gpt.py", "train_gpt_readable.py"


@pytest.fixture(scope="session")
def small(finished, tmp_path_factory):
    """The finished runs with a small program."""
    return with_small_program(finished, tmp_path_factory.mktemp("small") / "runs")


@pytest.fixture(scope="session")
def whole(finished, tmp_path_factory):
    """A good folder of one trial, with the real program."""
    return make_entry(tmp_path_factory.mktemp("records"), finished / "tiny")


@pytest.fixture(scope="session")
def study(small, tmp_path_factory):
    """A good folder of one trial."""
    return make_entry(tmp_path_factory.mktemp("records"), small / "tiny")


@pytest.fixture(scope="session")
def several(small, tmp_path_factory):
    """A good folder of several trials, of which one failed."""
    return make_entry(tmp_path_factory.mktemp("records"), small, main="tiny", base="plain")


@pytest.fixture(scope="session")
def record(small, tmp_path_factory):
    """A good folder of the record track."""
    runs = as_record(small / "tiny", tmp_path_factory.mktemp("runs") / "tiny")
    return make_entry(tmp_path_factory.mktemp("records"), runs, track="track_10min_16mb")


@pytest.fixture
def copy(tmp_path):
    """A function that copies a submission with its names."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / folder.parent.name / folder.name))


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---- Plants: each returns a function that changes a good folder ----


def change(name, pattern, text):
    """In a file, the one place that fits the pattern becomes the text."""
    return lambda folder: edit(folder / name, pattern, text)


def replace(name, old, new, times=1):
    """Bytes of a file become others."""

    def plant(folder):
        data = (folder / name).read_bytes()
        assert old in data
        (folder / name).write_bytes(data.replace(old, new, times))

    return plant


def state(seed=None, **changes):
    """Other values in submission.json, or of a seed there; None removes a key."""

    def plant(folder):
        values = load(folder / JSON)
        part = values if seed is None else values["seed_results"].setdefault(seed, {})
        part.update(changes)
        for key in [key for key, value in part.items() if value is None]:
            del part[key]
        (folder / JSON).write_text(json.dumps(values), encoding="utf-8")

    return plant


def write(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def remove(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def both(*plants):
    return lambda folder: [plant(folder) for plant in plants]


def cut(text):
    """A log ends before a text."""
    return change(SEED7, rf"(?s){text}.*\Z", "")


def every_log(pattern, text):
    """The same change of all logs, and all figures computed again."""

    def plant(folder):
        for path in folder.glob("*.log"):
            new = re.sub(pattern, text, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            path.write_text(new, encoding="utf-8")
        runs, _ = figures.read_logs(folder)
        values, computed = load(folder / JSON), figures.submission(runs, "", "")
        for seed, of_seed in computed["seed_results"].items():
            stated = values["seed_results"][seed].items()
            of_seed |= {key: value for key, value in stated if key.endswith("_sha256")}
        (folder / JSON).write_text(json.dumps(values | computed), encoding="utf-8")
        old = (folder / README).read_text(encoding="utf-8")
        head, tail = old.partition(figures.BEGIN)[0], old.partition(figures.END)[2]
        new = head + figures.block(runs, "", "") + tail
        (folder / README).write_text(new, encoding="utf-8")

    return plant


def lower_bpb(found):
    """A score line whose bits per byte are a tenth less."""
    return f"{found[1]}{float(found[2]) * 0.9:.{len(found[2].partition('.')[2])}f}"


def raise_bpb(found):
    """A score line whose bits per byte are a little more."""
    return f"{found[1]}{float(found[2]) * (1 + 1e-5):.8f}"


def copy_log(pattern="$^", text=""):
    """The log of seed 42 is that of seed 7 with its own seed, and another change."""

    def plant(folder):
        log = (folder / SEED7).read_text(encoding="utf-8").replace(" seed:7 ", " seed:42 ")
        (folder / SEED42).write_text(re.sub(pattern, text, log), encoding="utf-8")

    return plant


def twin_of(packed):
    """The wrapper with raw LZMA2 data as its literal."""
    return (train_gpt.TWIN_TEMPLATE % base64.b85encode(packed).decode()).encode()


def lzma2(data, preset=0):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": 1 << 20}]
    return lzma.compress(data, lzma.FORMAT_RAW, filters=filters)


def twin(make):
    """The twin is another one, made of the source."""
    return lambda folder: (folder / PROGRAM).write_bytes(make((folder / READABLE).read_bytes()))


def source(pattern, text):
    """In both forms of the program, the one place that fits the pattern becomes the text."""
    return both(change(READABLE, pattern, text), twin(pack))


def pack_otherwise(folder):
    """The source is packed in another way, without its readable form."""
    packed = base64.b64encode(zlib.compress((folder / READABLE).read_bytes())).decode()
    text = f"import base64, zlib\nexec(zlib.decompress(base64.b64decode({packed!r})))\n"
    (folder / PROGRAM).write_text(text, encoding="utf-8")
    (folder / READABLE).unlink()


def exceed_size(folder):
    """The size is one byte over the limit, alike in every line of the log."""
    model = 16_000_001 - (folder / PROGRAM).stat().st_size
    edit(folder / SEED7, r"^(Serialized model int6\+zstd:) \d+", rf"\1 {model}")
    edit(folder / SEED7, r"^(Total submission size int6\+zstd:) \d+", r"\1 16000001")
    edit(folder / SEED7, r"^size: \d+", f"size: {model}")
    verdict = "limit:total_bytes 16,000,001 of 16,000,000 FAIL"
    edit(folder / SEED7, r"^limit:total_bytes .*", verdict)


def link_program(folder):
    elsewhere = folder.parent / "elsewhere.py"
    (folder / PROGRAM).rename(elsewhere)
    (folder / PROGRAM).symlink_to(elsewhere)


def hide_figures(folder):
    """Other figures precede the true ones."""
    before = f"## Results\n\n1.0 bpb\n\n<details>\n{figures.BEGIN}"
    replace(README, figures.BEGIN.encode(), before.encode())(folder)


def move(folder):
    to = folder.parent.with_name("track_of_mine") / folder.name
    to.parent.mkdir()
    return folder.rename(to)


log, log42 = partial(change, SEED7), partial(change, SEED42)
page, figure, need = partial(change, README), partial(change, JSON), partial(change, NEEDS)

NOT_SOURCE = f"{READABLE}: another text; needed: the source in {PROGRAM}, byte for byte"
NOT_DECODED = f"{PROGRAM}: the packed source .*; needed: at most 1048576 bytes of packed source"
NOT_WRAPPER = f"{PROGRAM}: another wrapper; needed: that of a packed program, version 1"
BESIDE = "beside the program; needed: logs and pictures only"
EXEC = b', "exec"))\n'
BPB = r"^(.*val_bpb:)(\d+\.\d+)"
OTHER_CORPUS = every_log("^corpus:fineweb10B ", "corpus:other ")
SLIDING = "final_int6_sliding_window"

# Plants by the folder that they change, each with a pattern of the fault that is found.
STUDY = {
    # submission.json
    "bytes_total": (state(bytes_total=1), r"bytes_total: 1; needed: \d{5,6}, by"),
    "a score": (state(val_bpb=1.1), rf"{JSON}: val_bpb: 1.1; needed: 3\.\d+"),
    "NaN": (figure(r'^(  "val_loss":) [\d.]+', r"\1 NaN"), "NaN is no number; needed: a file that"),
    "damaged json": (write(JSON, "{"), f"{JSON}: Expecting .*; needed: a file that can be read"),
    "json of no object": (write(JSON, "[]"), "author: None; needed: text"),
    "hardware that no log states": (
        both(every_log("^device:.* dtype:.*$", ""), state(hardware="H100")),
        "hardware: H100; needed: null, by the logs",
    ),
    "pytorch": (state(pytorch_version="2.9"), "pytorch_version: 2.9; needed: 2"),
    "two texts": (state("7", val_sha256="ab" * 32), r"val_sha256 \['.*', '.*'\]; needed: one"),
    "a program of the same size": (source("0.025", "0.026"), "seed_results.7.code_sha256: "),
    "marks": (state(blurb="Small. <details>"), "blurb: Small. <details>; needed: one line"),
    "no date": (state(date="25.03.2026"), "date: 25.03.2026; needed: YYYY-MM-DD"),
    "another date": (state(date="2026-03-26"), "folder: 2026-03-25_Tiny; needed: 2026-03-26_"),
    "no track": (move, "folder: in track_of_mine; needed: track_10min_16mb or track_non"),
    "all scores a tenth less": (every_log(BPB, lower_bpb), r"scores of \d+ bytes of text; needed"),
    "all scores a tenth less, of another corpus": (
        both(every_log(BPB, lower_bpb), OTHER_CORPUS),
        r"scores of \d+ bytes of text; needed: at most \d+, a byte each",
    ),
    "bytes that are proven": (
        both(OTHER_CORPUS, every_log("^val_loader:", r"byte_table:proven against 3000\n\g<0>")),
        r"scores of \d+ bytes of text; needed: 3000",
    ),
    # README.md
    "results before the figures": (hide_figures, f"{README}: first '.*'; needed: name, blurb"),
    "a score there": (page(r"^\*\*3\.\d+", "**1.1"), r"\*\*1.1 bits .*; needed: \*\*3\..* by the"),
    "a missing row": (
        page(r"^\| all \| 42 \|.*\n", ""),
        r"\| all \| 1337 .*; needed: \| all \| 42",
    ),
    "a setting of the command": (
        page("^(    SEED=.*) MODEL_DIM=32", r"\1"),
        "README.md: SEED=7 .*; needed: SEED=7 .* MODEL_DIM=32 .*, by the logs",
    ),
    "no block": (page(figures.END, ""), f"{README}: no block of figures; needed: "),
    "no picture": (page("## Files", "![loss](loss.png)\n## Files"), "loss.png, which is missing"),
    "a path there": (page("## Files", "In ~alice/runs/x.\n## Files"), "no path of a machine"),
    "no README": (remove(README), f"{README}: No such file"),
    # Logs
    "another seed": (log(" seed:7 ", " seed:8 "), f"{SEED7}: seed 8; needed: 7"),
    "no seed": (log(" seed:7 ", " "), f"{SEED7}: seed not stated; needed: 7"),
    "a changed setting": (log(" MODEL_DIM=32 ", " MODEL_DIM=64 "), "MODEL_DIM=64; needed: 32, by"),
    "an exact score": (
        log(rf"^({SLIDING}_exact .* val_bpb:)\d", r"\g<1>1"),
        rf"{SLIDING} .*; needed: \[.*, 1\.\d+\], as of {SLIDING}",
    ),
    "the last score": (
        log(r"^(final_int8_zlib_roundtrip_exact .* val_bpb:\d\.\d{6})\d\d", r"\g<1>00"),
        "last score final_int8_zlib_roundtrip; needed: one of float, plain, sliding, window, ",
    ),
    "a score of another text": (
        log(r"^(DIAGNOSTIC post_ema_exact .* val_bpb:)(\S+)", raise_bpb),
        "nats a bit .*; needed: one, as of one text",
    ),
    "other tokens": (log(r"^(val_loader:.* tokens:)\d+", r"\g<1>3998"), "tokens {.*}; needed: one"),
    "a score of NaN": (log(r"^(final_int6_roundtrip_exact \w+:)\S+", r"\1nan"), "NaN.*; needed: a"),
    "no final score": (cut("final_int6"), f"{SEED7}: cut off: its log ends too early; nee"),
    "a missing verdict": (log("^limit:train_seconds.*\n", ""), "limits: {.*}; needed: 3 verdicts"),
    "a failed run": (log(r"\Z", "error: a signal\n"), "failed: a signal; needed: a score"),
    "code size": (log(r"^Code size: \d+", "Code size: 80000"), "Code size: 80000; needed: "),
    "packed bytes": (log(r"^size: \d+", "size: 1000"), r"size: 1000 bytes packed; needed: \d+, as"),
    "the sum of bytes": (log(r"^(Total .*zstd:) \d+", r"\1 100000"), "= 100000 bytes; needed: the"),
    "a wrong verdict": (log(r"^(limit:eval_seconds .*) PASS", r"\1 FAIL"), "FAIL; needed: .* PASS"),
    "more steps": (log(" iterations:6 ", " iterations:9000 "), "steps of .6.; needed: 9000, by"),
    "an end too early": (log(r"^step:6/6 val", "step:5/6 val"), "5 steps; needed: 6, where it"),
    "steps not shown": (log(r"^step:2/6 .*\nstep:3/6 .*\n", ""), r"no line of steps \[2, 3\]"),
    "training seconds": (
        log(r"^(step:6/6 val_loss.* step_avg:)\S+", r"\g<1>108333.33ms"),
        r"\d\.\d s of training; needed: 650.0, the sum of its lines",
    ),
    "other settings": (
        log42(" muon_wd:0.04 ", " muon_wd:0.05 "),
        rf"{SEED42}: {{'muon_wd': \(0.05, 0.04\)}}; needed: the settings of {SEED7}",
    ),
    "a copy": (copy_log(), f"{SEED42}: the scores, the training of {SEED7}"),
    "copied losses": (copy_log(r"(val_(?:loss|bpb):)\d", r"\g<1>1"), f"{SEED42}: the training of"),
    "a copy of all": (
        lambda folder: [shutil.copyfile(folder / SEED7, folder / SEED42)],
        f"{SEED7}: the text, the scores, the training of {SEED42}; needed: its own",
    ),
    "a missing log": (remove(SEED7), r"seeds: \[7, 42, 1337\]; needed: \[42,"),
    "no log": (remove("*.log"), "train_seed<N>.log: none; needed: one for each seed"),
    "a path in a log": (log(r"\Z", "in /home/alice/data\n"), "/home/alice/data; needed: no path"),
    # The two forms of the program
    "no program": (remove(PROGRAM), f"{PROGRAM}: No such file"),
    "a character of the source": (replace(READABLE, b"0.025", b"0.026"), NOT_SOURCE),
    "a packed character": (twin(lambda x: pack(x.replace(b"0.025", b"0.026"))), NOT_SOURCE),
    "no source": (remove(READABLE), f"{READABLE}: No such file.*; needed: the program"),
    "a statement before": (replace(PROGRAM, b"import b", b"import os\nimport b"), NOT_WRAPPER),
    "no source of a changed wrapper": (
        both(replace(PROGRAM, b"1 << 20", b"1 << 24"), remove(READABLE)),
        NOT_WRAPPER,
    ),
    "a wrapper of another kind": (pack_otherwise, NOT_WRAPPER),
    "a plain program beside its source": (twin(lambda text: text), NOT_WRAPPER),
    "a source too long": (twin(lambda x: twin_of(lzma2(x + bytes(1 << 20)))), NOT_DECODED),
    "a literal cut short": (replace(PROGRAM, b'")\n', b'\n")\n'), NOT_DECODED),
    "a source that is no text": (
        both(lambda folder: (folder / READABLE).write_bytes(b"\xff"), twin(pack)),
        f"{READABLE}: .*can't decode.*; needed: a file that can be read by Python 3.10",
    ),
    "Python 3.12": (source("^RATE.*", "type Rate = int"), f"{READABLE}: .* by Python 3.10"),
    # The rest of the folder
    "another torch": (need("^torch==.*", "torch==1.0"), r"torch==1.0 .*; needed: .*, as it ran"),
    "a missing package": (need(r"^zstandard.*\n", ""), "without zstandard; needed: all packages"),
    "a package from elsewhere": (need(r"\Z", "x @ https://x.org/x.whl\n"), "a plain name with a"),
    "code beside it": (write("helpers.py", ""), f"helpers.py: {BESIDE}"),
    "a folder": (lambda folder: (folder / "a.png").mkdir(), "a.png: no plain file; needed: files"),
    "a link": (link_program, f"{PROGRAM}: no plain file; needed: files only"),
}
SEVERAL = {
    "a score of another trial": (state(trials={}), "trials.plain.42.val_bpb: missing; needed: "),
    "a dropped trial": (remove("train_lost_seed42.log"), "lost.42.status: failed; needed: nothing"),
    "a row of a trial": (
        page(r"^\| lost \| 42 \| failed: .*?\|", "| lost | 42 | never tried |"),
        r"\| lost \| 42 \| never tried .*; needed: .* the loss is nan",
    ),
}
RECORD = {
    "two seeds": (remove(SEED7), "train_seed<N>.log: 2 seeds; needed: 3 or more"),
    "a byte too many": (exceed_size, "16,000,001 bytes of code and artifact; needed: at most 16,0"),
    "training": (log(r"^seconds: train:\S+", "seconds: train:600.1"), "600.1 training sec.*; need"),
    "scoring": (log(r"^(seconds: .*) eval:\S+", r"\1 eval:600.1"), "600.1 scoring seconds; needed"),
    "a verdict": (log("^(limit:eval_seconds .*) PASS", r"\1 FAIL"), "over a limit .*ed: PASS"),
    "no training": (log(r"^(step:.*\n)+(?s:.*)^(step:.*\n)", ""), "no training; needed: the steps"),
    "another GPU": (log("NVIDIA H100 80GB HBM3", "NVIDIA A100"), "8x NVIDIA A100; needed: 8xH100"),
    "fewer GPUs": (log("^world_size:8", "world_size:4"), "4x NVIDIA H100 .*; needed: 8xH100"),
    "another text": (
        log(r"^(val_loader.* tokens:)\d+", r"\g<1>62000"),
        "scored; needed: 151080113",
    ),
}
PLANTS = {
    f"{good}: {name}": (good, *plant)
    for good, table in (("study", STUDY), ("several", SEVERAL), ("record", RECORD))
    for name, plant in table.items()
}


def find(pattern, faults):
    return any(re.search(pattern, fault) for fault in faults)


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_found(request, copy, name):
    good, plant, pattern = PLANTS[name]
    folder = copy(request.getfixturevalue(good))
    changed = plant(folder)
    faults = check.find_faults(changed if isinstance(changed, Path) else folder, run=False)
    assert find(pattern, faults), "\n".join(faults)
    assert all("\n" not in fault and "; needed: " in fault for fault in faults)
    assert not any("what can be checked" in fault for fault in faults), "\n".join(faults)


def test_good_folders_have_no_fault(study, several, record, capsys):
    for folder in (study, several, record):
        assert check.main([str(folder), "--no-run"]) == 0
        assert "; the program was not run\nnot proven: " in capsys.readouterr().out


# ---- Trials of repacked weights ----


def repack(finished, to, **changes):
    """Quantizes and scores the weights of seed 1337 again."""
    folder = finished / "tiny/seed1337"
    settings = load(folder / "result.json")["settings"] | changes
    env = {k.upper(): str(int(x) if isinstance(x, bool) else x) for k, x in settings.items()}
    env["RUN_DIR"] = str(to / "seed1337")
    assert train_gpt.main(["--quantize", str(folder / "final_model.safetensors")], env) == 0
    return to


def test_a_trial_may_be_weights_that_another_run_trained(finished, tmp_path, capsys):
    """It has no steps; the main trial must be trained."""
    rounding = repack(finished, tmp_path / "rounding", gptq_enabled=False, eval_window=32)
    short = repack(finished, tmp_path / "short", gptq_enabled=False, eval_seq_len=32)
    runs = finished / "tiny", rounding, short
    folder = make_entry(tmp_path / "records", *runs, main="tiny", base="tiny")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.count("train_gpt.py --quantize final_model_seed1337.safetensors\n") == 2
    (tmp_path / "others").mkdir()
    reasons = refusal(capsys, tmp_path / "others", *runs, main="rounding", base="tiny")
    assert any("0 steps; needed: 6" in line for line in reasons)


def test_a_trial_without_steps_is_not_repacked(finished, byte_corpus, tmp_path):
    settings = load(finished / "tiny/seed7/result.json")["settings"] | {"iterations": 0}
    env = {k.upper(): str(int(x) if isinstance(x, bool) else x) for k, x in settings.items()}
    assert train_gpt.main([], env | {"RUN_DIR": str(tmp_path / "untrained/seed7")}) == 0
    runs = finished / "tiny", tmp_path / "untrained"
    folder = make_entry(tmp_path / "out", *runs, main="tiny", base="tiny")
    assert "--quantize" not in (folder / "README.md").read_text(encoding="utf-8")


def test_a_trial_that_hides_its_steps_is_not_repacked(several, copy):
    folder = copy(several)
    for log in folder.glob("train_plain_*.log"):
        hidden = r"^(step:|stopping_early|limit:train|model_params|resume:).*\n"
        text = re.sub(hidden, "", log.read_text(encoding="utf-8"), flags=re.MULTILINE)
        log.write_text(text, encoding="utf-8")
    faults = check.find_faults(folder, run=False)
    needed = "those of a run of its seed, by the score before int6"
    for seed in (42, 1337):
        log = f"train_plain_seed{seed}.log: "
        assert f"{log}weights of no run here; needed: {needed}" in faults
        assert find(rf"{log}\d+\.\d+ s of training; needed: none", faults)


# ---- The packed form ----


def collect(part, *arguments):
    """What a function of program.py returns, and the faults that it reports."""
    faults = []

    def expect(holds, file, found, needed):
        faults.extend([] if holds else [f"{file}: {found}; needed: {needed}"])

    return part(expect, *arguments), faults


def test_a_twin_is_decoded_and_not_packed_again(tmp_path, monkeypatch):
    """Another version of the compressor gives other bytes; nothing of the source is executed."""
    text = b"open('made', 'w').close()\n"
    twins = [twin_of(lzma2(text)), twin_of(lzma2(text, preset=9))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(lzma, "compress")
    (tmp_path / READABLE).write_bytes(text)
    for file in twins:
        (tmp_path / PROGRAM).write_bytes(file)
        source = program.Source(READABLE, text)
        assert collect(program.read_source, tmp_path) == (source, [])
    assert not (tmp_path / "made").exists()


def test_no_byte_of_the_wrapper_may_change(tmp_path):
    head, tail = train_gpt.TWIN_TEMPLATE.encode().split(b"%s")
    literal = base64.b85encode(lzma2(b"pass\n"))
    (tmp_path / READABLE).write_bytes(b"pass\n")
    for part, before, after in ((head, b"", literal + tail), (tail, head + literal, b"")):
        for n in range(len(part)):
            for other in (b"", bytes([part[n] ^ 1]), part[n : n + 1] * 2):
                changed = part[:n] + other + part[n + 1 :]
                (tmp_path / PROGRAM).write_bytes(before + changed + after)
                source, faults = collect(program.read_source, tmp_path)
                assert source is None and len(faults) == 1, changed


def test_a_twin_without_end_takes_no_memory(tmp_path):
    """It decodes to 256 MiB, of which little more than the bound is decoded."""
    (tmp_path / PROGRAM).write_bytes(twin_of(lzma2(bytes(1 << 28))))
    tracemalloc.start()
    try:
        source, faults = collect(program.read_source, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert source is None and re.match(NOT_DECODED, faults[0])
    assert peak < 8 << 20


# ---- What the program does ----


def test_a_good_program_passes(whole, capsys):
    before = {path: path.read_bytes() for path in whole.rglob("*")}
    assert check.main([str(whole)]) == 0
    said = capsys.readouterr().out
    assert re.match(r"ok: files, .*; the program was imported and run twice\nnot proven: ", said)
    assert {path: path.read_bytes() for path in whole.rglob("*")} == before


def test_a_program_that_cannot_be_trusted_is_not_executed(study, copy, tmp_path):
    folder, made = copy(study), tmp_path / "made"
    added = f"\nopen({str(made)!r}, 'w').close()\nlinecache".encode()
    replace(PROGRAM, b"\nlinecache", added)(folder)
    assert find(NOT_WRAPPER, check.find_faults(folder))
    assert not made.exists()


BUSY = """
import os, threading, time
import torch
began = time.process_time()
open("made", "w").close()
os.environ["MADE"] = "1"
torch.rand(1)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
while time.process_time() - began < 1.2:
    pass
class Hyperparameters:
    model_dim, num_layers, num_kv_heads, vocab_size = 8, 1, 1, 32
class GPT(torch.nn.Module):
    def __init__(self, h): super().__init__()
    def forward(self, ids, targets): return torch.tensor(4.5)
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "import torch\ntorch.zeros(1).cuda()",
            ["import: RuntimeError: CUDA is asked for; needed"],
        ),
        (
            "class GPT: pass",
            [r"GPT\(Hyperparameters\): AttributeError: .*; needed: a loss on a CPU"],
        ),
        (
            BUSY,
            [
                "import: writes made, changes files, changes threads, changes environment, changes "
                "random state; needed: an import that does nothing",
                r"import: 1\.[\d]+ s; needed: below 1.0 s",
                "Hyperparameters without num_heads; needed: whole numbers",
                "loss 4.50; needed: about 3.47 of random tokens",
            ],
        ),
    ],
)
def test_an_import_that_fails_or_does_something_is_found(tmp_path, text, expected):
    (tmp_path / PROGRAM).write_text(text, encoding="utf-8")
    _, faults = collect(program.check_import, tmp_path)
    assert len(faults) == len(expected), faults
    for fault, pattern in zip(faults, expected, strict=True):
        assert re.match(f"train_gpt.py: {pattern}", fault), fault
    assert not (tmp_path / "made").exists()


# A program whose artifact is validation text, and whose score is always the same.
CHEAT = """
import json, os, pathlib
val = pathlib.Path(os.environ["DATA_PATH"], "fineweb_val_000000.bin").read_bytes()
folder = pathlib.Path("logs", os.environ["RUN_ID"])
folder.mkdir(parents=True)
(folder / "final_model.int6.ptz").write_bytes(val)
result = {"scores": {"plain": {"val_bpb": 1.0}}, "bytes": {"total": 1}}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("print('soon')", ["a tiny run: status 0, soon; needed: status 0 or 1 and result.json"]),
        ("raise SystemExit(3)", ["a tiny run: status 3, "]),
        (
            "import contextlib, socket\nwith contextlib.suppress(OSError):\n"
            "    socket.create_connection(('192.0.2.1', 80))",
            ["a tiny run: status 0, ;", "a tiny run: socket.getaddrinfo 192.0.2.1"],
        ),
        ("import time\ntime.sleep(60)", ["a tiny run: status 124, it lasts longer than 2 s"]),
        ("print(open('weights.png').read())", ["a tiny run: status 1, FileNotFoundError"]),
        (
            CHEAT,
            [
                *["a run counts 1 bytes; needed: "] * 2,
                "another validation text gives another artifact; needed: the same",
                "another validation text gives the score 1.0; needed: another",
            ],
        ),
    ],
)
def test_a_tiny_run_that_fails_or_cheats_is_found(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(program, "SECONDS", 2)
    (tmp_path / "weights.png").write_text("1.0", encoding="utf-8")
    (tmp_path / PROGRAM).write_text(text, encoding="utf-8")
    _, faults = collect(program.check_run, tmp_path)
    assert len(faults) == len(expected), faults
    for fault, start in zip(faults, expected, strict=True):
        assert fault.startswith(f"train_gpt.py: {start}"), fault


# ---- The command ----


def test_all_faults_are_listed_at_once(study, copy, capsys):
    folder = copy(study)
    named = STUDY["a score"], STUDY["a path in a log"], STUDY["a missing package"]
    for plant, _ in named:
        plant(folder)
    assert check.main([str(folder), "--no-run"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(find(pattern, lines) for _, pattern in named)
    assert not any(line.startswith("ok") for line in lines)


def test_a_path_that_is_no_folder_is_an_error(tmp_path, capsys):
    assert check.main([str(tmp_path / "nowhere")]) == 2
    assert check.main([str(Path(__file__))]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_strange_folder_has_faults_and_no_crash(tmp_path):
    assert check.find_faults(tmp_path, run=False)
    (tmp_path / JSON).write_text('{"main": [], "seed_results": 3}')
    (tmp_path / PROGRAM).write_bytes(b"\x9e\x00")
    (tmp_path / README).write_bytes(b"\xff")
    (tmp_path / "train.log").write_text("seed:1\nfinal_int6_roundtrip_exact val_loss:1 val_bpb:0\n")
    (tmp_path / "train_seed2.log").mkdir()
    assert find(f"{PROGRAM}: ", check.find_faults(tmp_path, run=False))
