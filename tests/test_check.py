"""records/check.py: faults planted in good folders, one by one, are found and named."""

import ast
import base64
import json
import lzma
import re
import runpy
import shutil
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest
from conftest import ROOT
from test_submit import as_of_a_record, edit, made, refused

sys.path.insert(0, str(ROOT / "records"))

import check
import figures
import program
import train_gpt
from runs import Defaults, read_run

GUARD = '\nif __name__ == "__main__":\n'


@pytest.fixture(scope="session")
def study(finished, tmp_path_factory):
    """A good folder of one arm."""
    return made(tmp_path_factory.mktemp("records"), finished / "tiny")


@pytest.fixture(scope="session")
def several(finished, tmp_path_factory):
    """A good folder of several arms, of which one failed."""
    return made(tmp_path_factory.mktemp("records"), finished, main="tiny", base="plain")


@pytest.fixture(scope="session")
def record(finished, tmp_path_factory):
    """A good folder of the record track."""
    runs = as_of_a_record(finished / "tiny", tmp_path_factory.mktemp("runs") / "tiny")
    return made(tmp_path_factory.mktemp("records"), runs, track="track_10min_16mb")


@pytest.fixture
def copy(tmp_path):
    """A function that copies a submission with its names."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / folder.parent.name / folder.name))


def test_good_folders_have_no_fault(study, several, record):
    for folder in (study, several, record):
        assert check.faults_of(folder, run=False) == []


def test_a_good_folder_passes_whole(study, capsys):
    before = {path: path.read_bytes() for path in study.rglob("*")}
    assert check.main([str(study)]) == 0
    said = capsys.readouterr().out
    assert re.match(r"ok: files, .*; it was imported and run twice\nnot proven: ", said)
    assert {path: path.read_bytes() for path in study.rglob("*")} == before


def env_of(run):
    """The variables that give a run's settings."""
    settings = json.loads((run / "result.json").read_text(encoding="utf-8"))["settings"]
    return {k.upper(): str(int(x) if isinstance(x, bool) else x) for k, x in settings.items()}


def test_an_arm_may_be_weights_that_other_runs_trained(finished, tmp_path, capsys):
    """It has no steps; the main arm must have been trained."""
    weights = finished / "tiny" / "seed1337" / "final_model.safetensors"
    env = env_of(weights.parent) | {"GPTQ_ENABLED": "0", "EVAL_WINDOW": "32"}
    env |= {"RUN_DIR": str(tmp_path / "rounding" / "seed1337")}
    assert train_gpt.main(["--quantize", str(weights)], env) == 0
    runs = finished / "tiny", tmp_path / "rounding"
    for name in ("records", "others"):
        (tmp_path / name).mkdir()
    folder = made(tmp_path / "records", *runs, main="tiny", base="tiny")
    assert check.faults_of(folder, run=False) == []
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.count("train_gpt.py --quantize final_model_seed1337.safetensors\n") == 1
    env |= {"EVAL_SEQ_LEN": "32", "RUN_DIR": str(tmp_path / "short" / "seed1337")}
    assert train_gpt.main(["--quantize", str(weights)], env) == 0
    (tmp_path / "shorter").mkdir()
    folder = made(tmp_path / "shorter", runs[0], tmp_path / "short", main="tiny", base="tiny")
    assert check.faults_of(folder, run=False) == []
    said = refused(capsys, tmp_path / "others", *runs, main="rounding", base="tiny")
    assert any("0 steps; needed: 6" in line for line in said)
    assert any("needed: 3 verdicts" in line for line in said)


OF_ITS_SEED = "those of a run of its seed, by the score before int6"


def test_an_arm_of_no_steps_at_all(finished, tmp_path):
    env = env_of(finished / "tiny/seed7")
    env |= {"ITERATIONS": "0", "RUN_DIR": str(tmp_path / "untrained" / "seed7")}
    assert train_gpt.main([], env) == 0
    (tmp_path / "out").mkdir()
    folder = made(
        tmp_path / "out", finished / "tiny", tmp_path / "untrained", main="tiny", base="tiny"
    )
    assert check.faults_of(folder, run=False) == []
    assert "--quantize" not in (folder / "README.md").read_text(encoding="utf-8")


def test_an_arm_that_hides_its_steps_is_none_of_others_weights(several, copy):
    folder = copy(several)
    for log in folder.glob("train_plain_*.log"):
        hidden = r"^(step:|stopping_early|limit:train|model_params|resume:).*\n"
        text = re.sub(hidden, "", log.read_text(encoding="utf-8"), flags=re.MULTILINE)
        log.write_text(text, encoding="utf-8")
    faults = check.faults_of(folder, run=False)
    for seed in (42, 1337):
        told = f"train_plain_seed{seed}.log: "
        assert f"{told}weights of no run here; needed: {OF_ITS_SEED}" in faults
        assert any(re.match(rf"{told}\d+\.\d+ s of training; needed: none", x) for x in faults)


def test_no_folder(tmp_path, capsys):
    assert check.main([str(tmp_path / "nowhere")]) == 2
    assert check.main([str(Path(__file__))]) == 2
    assert "no folder" in capsys.readouterr().err


# ---- Plants: each changes a good folder ----


def change(name, pattern, text):
    """A plant: in a file, the one place that the pattern fits becomes the text."""
    return lambda folder: edit(folder / name, pattern, text)


def told(**changes):
    """A plant: other values in submission.json; None removes a key."""

    def plant(folder):
        path = folder / "submission.json"
        values = json.loads(path.read_text(encoding="utf-8")) | changes
        values = {key: value for key, value in values.items() if value is not None}
        path.write_text(json.dumps(values), encoding="utf-8")

    return plant


def told_of(seed, **changes):
    """A plant: other values of a seed in submission.json."""

    def plant(folder):
        path = folder / "submission.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values["seed_results"].setdefault(seed, {}).update(changes)
        path.write_text(json.dumps(values), encoding="utf-8")

    return plant


def without(name):
    """A plant: a file is missing."""
    return lambda folder: (folder / name).unlink()


def write_program(folder, source):
    """Writes a source in both forms of the program."""
    (folder / READABLE).write_text(source, encoding="utf-8")
    (folder / PROGRAM).write_bytes(train_gpt.packed_source(source.encode()))


def code(text, before=GUARD):
    """A plant: the program has more lines, before others."""

    def plant(folder):
        source = (folder / READABLE).read_text(encoding="utf-8")
        assert source.count(before) == 1
        write_program(folder, source.replace(before, f"\n{text}\n{before}"))

    return plant


def source(pattern, text):
    """A plant: in the program's source, the one place that the pattern fits becomes the text."""

    def plant(folder):
        edit(folder / READABLE, pattern, text)
        write_program(folder, (folder / READABLE).read_text(encoding="utf-8"))

    return plant


def log(name, seed, text="", cut=None):
    """A plant: a log is cut at a text, or gets one more line."""

    def plant(folder):
        path = folder / f"{name}_seed{seed}.log"
        kept = path.read_text(encoding="utf-8")
        assert cut is None or cut in kept
        path.write_text(kept.partition(cut)[0] if cut else f"{kept}{text}\n", encoding="utf-8")

    return plant


def copied_log(scores_alone=False, losses_alone=False):
    """A plant: a seed's log is another seed's, with its own seed written in."""

    def plant(folder):
        text = (folder / "train_seed7.log").read_text(encoding="utf-8")
        text = text.replace(" seed:7 ", " seed:42 ")
        if scores_alone:  # its training was another
            text = re.sub(r"(train_loss:\d)\.(\d)", r"\1.9\2", text)
        if losses_alone:
            text = re.sub(r"(val_(?:loss|bpb):)\d", r"\g<1>1", text)
        (folder / "train_seed42.log").write_text(text, encoding="utf-8")

    return plant


def same_size(folder):
    """Packed, it has as many bytes as before."""
    path, size = folder / READABLE, (folder / PROGRAM).stat().st_size
    before = path.read_text(encoding="utf-8")
    assert before.count("151_080_113") == 1
    for number in range(200, 1000):
        write_program(folder, before.replace("151_080_113", f"151_080_{number}"))
        if (folder / PROGRAM).stat().st_size == size:
            return
    raise AssertionError("no number gives the same size")


def oversize(folder):
    """By one byte, and said alike in every line of the log."""
    path = folder / "train_seed7.log"
    size = 16_000_001 - (folder / "train_gpt.py").stat().st_size
    edit(path, r"^(Serialized model int6\+zstd:) \d+", rf"\1 {size}")
    edit(path, r"^(Total submission size int6\+zstd:) \d+", r"\1 16000001")
    edit(path, r"^size: \d+", f"size: {size}")
    edit(path, r"^limit:total_bytes .*", "limit:total_bytes 16,000,001 of 16,000,000 FAIL")


def every_log(pattern, text):
    """A plant: the same change of all logs, and all figures made of them again."""

    def plant(folder):
        for path in folder.glob("*.log"):
            new = re.sub(pattern, text, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            path.write_text(new, encoding="utf-8")
        runs, _ = figures.read_logs(folder)
        told = figures.submission(runs, "", "")
        path = folder / "submission.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        for seed, of_seed in told["seed_results"].items():
            kept = {k: v for k, v in values["seed_results"][seed].items() if k.endswith("_sha256")}
            of_seed |= kept
        path.write_text(json.dumps(values | told), encoding="utf-8")
        tree = ast.parse((folder / READABLE).read_text(encoding="utf-8"))
        made_again = figures.block(runs, "", "", Defaults(tree))
        readme = folder / "README.md"
        old = readme.read_text(encoding="utf-8")
        head, tail = old.partition(figures.BEGIN)[0], old.partition(figures.END)[2]
        readme.write_text(f"{head}{made_again}{tail}", encoding="utf-8")

    return plant


def better(found):
    """A score line whose bits per byte are a tenth less."""
    return f"{found[1]}{float(found[2]) * 0.9:.{len(found[2].partition('.')[2])}f}"


def a_little(found):
    """A score line whose bits per byte are a little more."""
    return f"{found[1]}{float(found[2]) * (1 + 1e-5):.8f}"


def linked(folder):
    (folder.parent / "elsewhere.py").write_bytes((folder / PROGRAM).read_bytes())
    (folder / PROGRAM).unlink()
    (folder / PROGRAM).symlink_to(folder.parent / "elsewhere.py")


def hidden(folder):
    """The true figures where no one looks, others where one does."""
    path = folder / README
    text = path.read_text(encoding="utf-8")
    text = text.replace(figures.BEGIN, f"## Results\n\n1.0 bpb\n\n<details>\n{figures.BEGIN}")
    path.write_text(text, encoding="utf-8")


def renamed(name):
    def plant(folder):
        folder.rename(folder.parent / name)
        return folder.parent / name

    return plant


def moved(folder):
    to = folder.parent.with_name("track_of_mine") / folder.name
    to.parent.mkdir()
    return folder.rename(to)


def beside(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


JSON, README, SEED7 = "submission.json", "README.md", "train_seed7.log"
PROGRAM, READABLE = "train_gpt.py", "train_gpt_readable.py"
ANOTHER_LINE = rf"{READABLE}: line \d+ is another; needed: the source in {PROGRAM}, byte for byte"
NOT_DECODED = rf"{PROGRAM}: the packed source .*; needed: a program, packed with at most 1048576 b"


def not_wrapper(line):
    """The fault of a file that is not the wrapper of a twin."""
    return rf"{PROGRAM}: line {line} is another; needed: the wrapper of a packed program, version 1"


def replace(name, old, new, times=1):
    """A plant: bytes of a file become others."""

    def plant(folder):
        data = (folder / name).read_bytes()
        assert data.count(old) >= 1
        (folder / name).write_bytes(data.replace(old, new, times))

    return plant


def twin_of(packed):
    """The wrapper with raw LZMA2 data as its literal."""
    return (train_gpt.TWIN_TEMPLATE % base64.b85encode(packed).decode()).encode()


def lzma2(data, preset=0):
    """Data as raw LZMA2."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": 1 << 20}]
    return lzma.compress(data, lzma.FORMAT_RAW, filters=filters)


def twin(change):
    """A plant: the twin is another, made of the source."""
    return lambda folder: (folder / PROGRAM).write_bytes(change((folder / READABLE).read_bytes()))


def other_wrapper(folder):
    """The source packed in another way, alone."""
    packed = base64.b64encode(zlib.compress((folder / READABLE).read_bytes())).decode()
    text = f"import base64, zlib\nexec(zlib.decompress(base64.b64decode({packed!r})))\n"
    (folder / PROGRAM).write_text(text, encoding="utf-8")
    (folder / READABLE).unlink()


def counts_source(folder):
    """The log tells the bytes of the source, alike in every line."""
    path, sizes = folder / SEED7, read_run(folder / SEED7).sizes
    code = (folder / READABLE).stat().st_size
    total = sizes["model"] + code
    edit(path, r"^Code size: \d+", f"Code size: {code}")
    edit(path, r"^(Total submission size int6\+zstd:) \d+", rf"\1 {total}")
    edit(path, r"^(limit:total_bytes) \S+", rf"\1 {total:,}")


PLANTS = {
    # The figures
    "bytes_total": (
        "study",
        told(bytes_total=1),
        rf"{JSON}: bytes_total: 1; needed: \d{{5,6}}, by",
    ),
    "bytes_code": (
        "study",
        told(bytes_code=84_000),
        rf"{JSON}: bytes_code: 84000; needed: \d{{5}}, by",
    ),
    "a score in json": ("study", told(val_bpb=1.1), rf"{JSON}: val_bpb: 1.1; needed: 3\.\d+"),
    "a score by a digit": (
        "study",
        change(JSON, r'^(  "val_bpb": \d\.\d{7})\d,', r"\g<1>10,"),
        rf"{JSON}: val_bpb: 3\.\d+; needed: 3\.\d+, by the logs",
    ),
    "a score of a seed": (
        "study",
        told_of("42", val_loss=2.0),
        rf"{JSON}: seed_results.42.val_loss: 2.0; needed: 2\.\d+",
    ),
    "a claim more": ("study", told(claimed=1.0), rf"{JSON}: claimed: 1.0; needed: only what the"),
    "an empty claim": ("study", told(claims={}), rf"{JSON}: claims: {{}}; needed: only what the"),
    "hardware that no log tells": (
        "study",
        lambda folder: (
            every_log("^device:.* dtype:.*$", "")(folder),
            told(hardware="H100")(folder),
        ),
        rf"{JSON}: hardware: H100; needed: null, by the logs",
    ),
    "texts that differ": (
        "study",
        told_of("7", val_sha256="ab" * 32),
        rf"{JSON}: val_sha256 \['.*', '.*'\]; needed: one",
    ),
    "a blurb that hides": (
        "study",
        told(blurb="Small. <details>"),
        rf"{JSON}: blurb: Small. <details>; needed: one line without marks",
    ),
    "results before the figures": ("study", hidden, rf"{README}: first '.*'; needed: name, blurb"),
    "results after the figures": (
        "study",
        change(README, "^## Files", "## Results\n\n1.0 bpb\n\n## Files"),
        rf"{README}: headings \['## Results', '## Results'\]; needed: one",
    ),
    "all scores a tenth less": (
        "study",
        every_log(r"^(.*val_bpb:)(\d+\.\d+)", better),
        rf"{SEED7}: scores of \d+ bytes of text; needed: \d+",
    ),
    "all scores a tenth less, of another corpus": (
        "study",
        lambda folder: [
            every_log(r"^(.*val_bpb:)(\d+\.\d+)", better)(folder),
            every_log("^corpus:fineweb10B ", "corpus:other ")(folder),
        ],
        rf"{SEED7}: scores of \d+ bytes of text; needed: at most \d+, a byte each",
    ),
    "bytes that are proven": (
        "study",
        lambda folder: [
            every_log("^corpus:fineweb10B ", "corpus:other ")(folder),
            every_log(r"^val_loader:", r"byte_table:proven against 3000 bytes of\n\g<0>")(folder),
        ],
        rf"{SEED7}: scores of \d+ bytes of text; needed: 3000",
    ),
    "a score of another arm": (
        "several",
        lambda folder: told(arms={})(folder),
        rf"{JSON}: arms.plain.42.val_bpb: missing; needed: ",
    ),
    "a failed arm that is dropped": (
        "several",
        without("train_lost_seed42.log"),
        rf"{JSON}: arms.lost.42.status: failed; needed: only what the logs have",
    ),
    "a score that is text": ("study", told(val_loss="2.4"), rf"{JSON}: val_loss: 2.4; needed: "),
    "NaN in json": (
        "study",
        change(JSON, r'^(  "val_loss":) [\d.]+', r"\1 NaN"),
        rf"{JSON}: NaN is no number; needed: a file that can be read",
    ),
    "no json": ("study", beside(JSON, "{"), rf"{JSON}: Expecting .*; needed: a file"),
    "json of no object": ("study", beside(JSON, "[]"), rf"{JSON}: author: None; needed: text"),
    "missing key": ("study", told(val_bpb=None), rf"{JSON}: val_bpb: missing; needed: 3\."),
    "missing author": ("study", told(author=None), rf"{JSON}: author: None; needed: text"),
    "a seed more": (
        "study",
        told_of("99", val_bpb=1.0),
        rf"{JSON}: seed_results.99.val_bpb: 1.0; needed: only what the logs have",
    ),
    "hardware": ("study", told(hardware="8x H100"), rf"{JSON}: hardware: 8x H100; needed: 1x "),
    "pytorch": ("study", told(pytorch_version="2.9"), rf"{JSON}: pytorch_version: 2.9; needed: 2"),
    "date": ("study", told(date="25.03.2026"), rf"{JSON}: date: 25.03.2026; needed: YYYY-MM-DD"),
    "another date": (
        "study",
        told(date="2026-03-26"),
        "folder: 2026-03-25_Tiny; needed: 2026-03-26_",
    ),
    "another name": ("study", renamed("2026-03-25_Big"), "folder: 2026-03-25_Big; needed: .*_Tiny"),
    "another track": (
        "study",
        told(track="10min_16mb"),
        rf"{JSON}: track 10min_16mb; needed: track_non_record_16mb",
    ),
    "no track": ("study", moved, "folder: in track_of_mine; needed: track_10min_16mb or track_non"),
    # The README
    "a score in README": (
        "study",
        change(README, r"^\*\*3\.\d+", "**1.10000"),
        rf"{README}: \*\*1.10000 bits .*; needed: \*\*3\.\d+ bits .*, by the logs",
    ),
    "a row less": (
        "study",
        change(README, r"^\| all \| 42 \|.*\n", ""),
        rf"{README}: \| all \| 1337 .*; needed: \| all \| 42 ",
    ),
    "a row of an arm": (
        "several",
        change(README, r"^\| lost \| 42 \| failed: .*?\|", "| lost | 42 | never tried |"),
        rf"{README}: \| lost \| 42 \| never tried .*; needed: .* the loss is nan",
    ),
    "a verdict": (
        "study",
        change(README, r"(?s)(training seconds.*?)PASS", r"\1FAIL"),
        rf"{README}: \| training seconds .*FAIL \|; needed: .*PASS",
    ),
    "no block": (
        "study",
        change(README, "<!-- End of figures. -->", ""),
        rf"{README}: no block of figures; needed: ",
    ),
    "no picture": (
        "study",
        change(README, "## Files", "![loss](loss.png)\n\n## Files"),
        rf"{README}: loss.png, which is missing",
    ),
    "no README": ("study", without(README), rf"{README}: No such file"),
    # The logs
    "log of another seed": (
        "study",
        change(SEED7, " seed:7 ", " seed:8 "),
        rf"{SEED7}: seed 8; needed: 7",
    ),
    "log without a seed": (
        "study",
        change(SEED7, " seed:7 ", " "),
        rf"{SEED7}: seed not told; needed: 7",
    ),
    "rounded line": (
        "study",
        change(SEED7, r"^(final_int6_sliding_window val_loss:\S+ val_bpb:)\S+", r"\g<1>1.1000"),
        rf"{SEED7}: final_int6_sliding_window \[.*, 1.1\]; needed: .*, as of final_int6_sliding",
    ),
    "exact line": (
        "study",
        change(SEED7, r"^(final_int6_sliding_window_exact .* val_bpb:)\d", r"\g<1>1"),
        rf"{SEED7}: final_int6_sliding_window .*; needed: \[.*, 1\.\d+\], as of final_int6_sliding",
    ),
    "the last line": (
        "study",
        change(SEED7, r"^(final_int8_zlib_roundtrip_exact .* val_bpb:\d\.\d{6})\d\d", r"\g<1>00"),
        rf"{SEED7}: last score .*; needed: .*, by sliding",
    ),
    "a score of other text": (
        "study",
        change(SEED7, r"^(DIAGNOSTIC post_ema_exact .* val_bpb:)(\S+)", a_little),
        "train_seed<N>.log: nats a bit .*; needed: one, as of one text",
    ),
    "NaN score": (
        "study",
        change(SEED7, r"^(final_int6_roundtrip_exact val_loss:)\S+", r"\1nan"),
        rf"{SEED7}: .*NaN.*; needed: a train log",
    ),
    "truncated log": (
        "study",
        log("train", 7, cut="final_int6"),
        rf"{SEED7}: ok: its log ends too early; needed: a score",
    ),
    "log cut before scores": (
        "study",
        log("train", 7, cut="DIAGNOSTIC"),
        rf"{SEED7}: cut off: .*; needed: a score",
    ),
    "log cut before verdicts": (
        "study",
        log("train", 7, cut="limit:"),
        rf"{SEED7}: limits: {{}}; needed: 3 verdicts",
    ),
    "failed run": (
        "study",
        log("train", 7, "error: a signal"),
        rf"{SEED7}: failed: a signal; needed: a score",
    ),
    "code size": (
        "study",
        change(SEED7, r"^Code size: \d+", "Code size: 80000"),
        rf"{SEED7}: Code size: 80000; needed: \d+, of train_gpt.py",
    ),
    "packed bytes": (
        "study",
        change(SEED7, r"^size: \d+", "size: 1000"),
        rf"{SEED7}: size: 1000 bytes packed; needed: \d+, as Serialized",
    ),
    "bytes of a limit": (
        "study",
        change(SEED7, r"^(limit:total_bytes) \S+", r"\1 1,000"),
        rf"{SEED7}: limit:total_bytes 1,000 of 16,000,000 PASS; needed: \S+ of 16,000,000",
    ),
    "a limit that is none": (
        "study",
        change(SEED7, r"^(limit:total_bytes \S+ of) \S+", r"\1 99,000,000"),
        rf"{SEED7}: limit:total_bytes \S+ of 99,000,000 PASS; needed: ",
    ),
    "more steps than there were": (
        "study",
        change(SEED7, r" iterations:6 ", " iterations:9000 "),
        rf"{SEED7}: steps of .6.; needed: 9000, by ITERATIONS",
    ),
    "an end too early": (
        "study",
        change(SEED7, r"^step:6/6 val", "step:5/6 val"),
        rf"{SEED7}: 5 steps; needed: 6, where it ended",
    ),
    "steps that are not shown": (
        "study",
        change(SEED7, r"^step:2/6 .*\nstep:3/6 .*\n", ""),
        rf"{SEED7}: no line of steps \[2, 3\]; needed: each",
    ),
    "other tokens": (
        "study",
        change(SEED7, r"^(val_loader:.* tokens:)\d+", r"\g<1>3998"),
        "train_seed<N>.log: tokens {.*}; needed: one, as of one text",
    ),
    "the sum of bytes": (
        "study",
        change(SEED7, r"^(Total submission size int6\+zstd:) \d+", r"\1 100000"),
        rf"{SEED7}: \d+ \+ \d+ = 100000 bytes; needed: the sum",
    ),
    "training seconds": (
        "study",
        change(
            SEED7,
            r"^step:6/6 (val_loss.*) train_time:\d+ms step_avg:\S+",
            r"step:6/6 \1 "
            "train_time:650000ms step_avg:108333.33ms",
        ),
        rf"{SEED7}: \d\.\d s of training; needed: 650.0, as of its steps",
    ),
    "scoring seconds": (
        "study",
        change(SEED7, r"^(final_int6_roundtrip val_loss.*eval_time):\d+", r"\1:700000"),
        rf"{SEED7}: \d\.\d s of scoring; needed: 700\.\d, as of its scores",
    ),
    "other settings": (
        "study",
        change("train_seed42.log", " muon_wd:0.04 ", " muon_wd:0.05 "),
        r"train_seed42.log: {'muon_wd': \(0.05, 0.04\)}; needed: the settings of train_seed7.log",
    ),
    "a copied log": ("study", copied_log(), "train_seed42.log: the scores, the losses of "),
    "copied scores": ("study", copied_log(scores_alone=True), "train_seed42.log: the scores of"),
    "copied losses": ("study", copied_log(losses_alone=True), "train_seed42.log: the losses of"),
    "the same log": (
        "study",
        lambda folder: shutil.copyfile(folder / SEED7, folder / "train_seed42.log"),
        "train_seed7.log: the text, the scores, the losses of train_seed42.log; needed: its own",
    ),
    "missing log": ("study", without(SEED7), rf"{JSON}: seeds: \[7, 42, 1337\]; needed: \[42,"),
    "no log": (
        "study",
        lambda folder: [path.unlink() for path in folder.glob("*.log")],
        "train_seed<N>.log: none; needed: one for each seed",
    ),
    "a path in a log": (
        "study",
        log("train", 7, "warning: /home/alice/data is slow"),
        rf"{SEED7}: /home/alice/data; needed: no path of a machine",
    ),
    "a path in README": (
        "study",
        change(README, "## Files", "In ~alice/runs/x.\n\n## Files"),
        rf"{README}: ~alice/runs/x.?; needed: no path of a machine",
    ),
    # The program
    "other program, same size": ("study", same_size, rf"{JSON}: seed_results.7.code_sha256: "),
    "no program": ("study", without(PROGRAM), rf"{PROGRAM}: No such file"),
    "a character of the source": ("study", replace(READABLE, b"0.025", b"0.026"), ANOTHER_LINE),
    "a line more in the source": ("study", replace(READABLE, b"\n", b"\n\n"), ANOTHER_LINE),
    "line ends of the source": ("study", replace(READABLE, b"\n", b"\r\n", -1), ANOTHER_LINE),
    "a character of the packed source": (
        "study",
        twin(lambda text: train_gpt.packed_source(text.replace(b"0.025", b"0.026", 1))),
        ANOTHER_LINE,
    ),
    "no source": (
        "study",
        without(READABLE),
        rf"{READABLE}: No such file.*; needed: the source in {PROGRAM}",
    ),
    "a statement before the wrapper": (
        "study",
        replace(PROGRAM, b"import base64", b"import os\nimport base64"),
        not_wrapper(2),
    ),
    "a statement in the wrapper": (
        "study",
        replace(PROGRAM, b"\nlinecache", b"\ntext = text.replace('0.025', '0.026')\nlinecache"),
        not_wrapper(5),
    ),
    "a statement after the wrapper": (
        "study",
        replace(PROGRAM, b', "exec"))\n', b', "exec"))\nmain([], {})\n'),
        not_wrapper(7),
    ),
    "a character of the wrapper": (
        "study",
        replace(PROGRAM, b"len(text)", b"len(twin)"),
        not_wrapper(5),
    ),
    "a literal of two parts": ("study", replace(PROGRAM, b'")\n', b'" + "")\n'), NOT_DECODED),
    "a changed wrapper without its source": (
        "study",
        lambda folder: [
            replace(PROGRAM, b"1 << 20", b"1 << 24")(folder),
            without(READABLE)(folder),
        ],
        not_wrapper(4),
    ),
    "a wrapper of another kind": ("study", other_wrapper, not_wrapper(1)),
    "a wrapper of line ends of another kind": (
        "study",
        replace(PROGRAM, b"\n", b"\r\n", -1),
        not_wrapper(1),
    ),
    "a plain program beside its source": ("study", twin(lambda text: text), not_wrapper(1)),
    "a twin without end": (
        "study",
        twin(lambda text: twin_of(lzma2(text + bytes(1 << 20)))),
        NOT_DECODED,
    ),
    "a literal cut short": ("study", replace(PROGRAM, b'")\n', b'\n")\n'), NOT_DECODED),
    "a literal that ends early": (
        "study",
        twin(lambda text: twin_of(lzma2(text)[:-10])),
        NOT_DECODED,
    ),
    "a literal with more behind its end": (
        "study",
        twin(lambda text: twin_of(lzma2(text) + lzma2(b"print(1)"))),
        NOT_DECODED,
    ),
    "a character that base85 has not": (
        "study",
        replace(PROGRAM, b'b85decode("', b'b85decode("\\'),
        NOT_DECODED,
    ),
    "a packed source that is no text": (
        "study",
        lambda folder: [
            (folder / READABLE).write_bytes(b"\xff"),
            (folder / PROGRAM).write_bytes(train_gpt.packed_source(b"\xff")),
        ],
        rf"{READABLE}: .*can't decode.*; needed: a file that can be read by Python 3.10",
    ),
    "a log that counts the source": (
        "study",
        counts_source,
        rf"{SEED7}: Code size: \d{{6}}; needed: \d{{5}}, of train_gpt.py",
    ),
    "no requirements": ("study", without("requirements.txt"), "requirements.txt: No such file"),
    "other torch": (
        "study",
        change("requirements.txt", r"^torch==.*", "torch==1.0"),
        r"requirements.txt: torch==1.0 .*; needed: torch==\d.*, as it ran",
    ),
    "requirement missing": (
        "study",
        change("requirements.txt", r"^zstandard.*\n", ""),
        rf"{READABLE}: line \d+: import zstandard; needed: modules of requirements.txt",
    ),
    "safetensors missing": (
        "study",
        change("requirements.txt", r"^safetensors.*\n", ""),
        rf"{READABLE}: line \d+: import safetensors; needed: modules of requirements.txt",
    ),
    "network": (
        "study",
        code("import urllib.request"),
        rf"{READABLE}: line \d+: import urllib; needed: modules that a program needs",
    ),
    "network in a function": (
        "study",
        code("def fetch():\n\tfrom huggingface_hub import snapshot_download"),
        rf"{READABLE}: line \d+: import huggingface_hub; needed: modules that",
    ),
    "download": (
        "study",
        code("def fetch():\n\ttorch.hub.load_state_dict_from_url('x')"),
        rf"{READABLE}: line \d+: load_state_dict_from_url; needed: no network",
    ),
    "another program": (
        "study",
        code("def fetch():\n\tos.system('curl example.org')"),
        rf"{READABLE}: line \d+: system; needed: no other program",
    ),
    "another program by another name": (
        "study",
        code("def fetch():\n\tfrom os import system as ask\n\task('curl example.org')"),
        rf"{READABLE}: line \d+: system; needed: no other program",
    ),
    "hidden code": (
        "study",
        code("exec(__import__('base64').b64decode('cGFzcw=='))"),
        rf"{READABLE}: line \d+: exec; needed: code that can be read",
    ),
    "Python 3.12": ("study", code("type Alias = int"), rf"{READABLE}: .* by Python 3.10"),
    "a module of its own": (
        "study",
        code("import helpers"),
        rf"{READABLE}: line \d+: import helpers; needed: modules that",
    ),
    "code beside it": ("study", beside("helpers.py", ""), "helpers.py: beside the program"),
    "weights beside it": ("study", beside("weights.bin", "x"), "weights.bin: beside the program"),
    "paths beside it": ("study", beside("a.pth", "import a"), "a.pth: beside the program"),
    "a folder beside it": (
        "study",
        lambda folder: (folder / "lib.png").mkdir(),
        "lib.png: no plain file; needed: files alone",
    ),
    "a link": ("study", linked, rf"{PROGRAM}: no plain file; needed: files alone"),
    "a requirement from elsewhere": (
        "study",
        change("requirements.txt", r"\Z", "my-weights @ https://example.org/x.whl\n"),
        "requirements.txt: my-weights @ .*; needed: a plain name with a version",
    ),
    "scoring that is there again": (
        "study",
        code("def score(*told):\n\treturn told[1].val"),
        rf"{READABLE}: score is there again; needed: one",
    ),
    "placeholder": (
        "study",
        code("def main(argv, env):\n\t'''Soon.'''\n\traise NotImplementedError"),
        rf"{READABLE}: main does nothing; needed: a program",
    ),
    "no guard": (
        "study",
        source(r'^if __name__ == "__main__":$', "if True:"),
        rf"{READABLE}: no guard; needed: if __name__",
    ),
    "validation data in training": (
        "study",
        source(r"^        trainer = Trainer\(", "        len(self.data.val.tokens)\n\\g<0>"),
        rf"{READABLE}: Run.train reads self.data.val; needed: nobody to, but",
    ),
    "validation data in a step": (
        "study",
        source(r"^        device = self.device.device$", "\\g<0>\n        len(self.val.tokens)"),
        rf"{READABLE}: Trainer.take_step reads self.val; needed: nobody to, but",
    ),
    "validation shards in training": (
        "study",
        source(
            r"^        trainer = Trainer\(", "        TokenStream(data_folder(h), 'val', 1)\n\\g<0>"
        ),
        rf"{READABLE}: Run.train reads 'val'; needed: nobody to, but",
    ),
    # The record track
    "two seeds": ("record", without(SEED7), "train_seed<N>.log: 2 seeds; needed: 3 or more"),
    "oversize": (
        "record",
        oversize,
        rf"{SEED7}: 16,000,001 bytes of code and artifact; needed: at most 16,0",
    ),
    "training too long": (
        "record",
        change(SEED7, r"^seconds: train:\S+", "seconds: train:600.1"),
        rf"{SEED7}: 600.1 training seconds; needed: at most 600.0",
    ),
    "scoring too long": (
        "record",
        change(SEED7, r"^(seconds: .*) eval:\S+", r"\1 eval:600.1"),
        rf"{SEED7}: 600.1 scoring seconds; needed: at most 600.0",
    ),
    "a verdict of a log": (
        "record",
        change(SEED7, r"^(limit:eval_seconds .*) PASS", r"\1 FAIL"),
        rf"{SEED7}: over a limit .*; needed: PASS",
    ),
    "no training": (
        "record",
        change(SEED7, r"^(step:.*\n)+(?s:.*)^(step:.*\n)", ""),
        rf"{SEED7}: no training; needed: the steps of its training",
    ),
    "another GPU": (
        "record",
        change(SEED7, "NVIDIA H100 80GB HBM3", "NVIDIA A100"),
        rf"{SEED7}: 8x NVIDIA A100; needed: 8xH100",
    ),
    "fewer GPUs": (
        "record",
        change(SEED7, "^world_size:8", "world_size:4"),
        rf"{SEED7}: 4x NVIDIA H100 .*; needed: 8xH100",
    ),
    "other text": (
        "record",
        change(SEED7, r"^(val_loader:.*) tokens:\d+", r"\1 tokens:62000"),
        rf"{SEED7}: \d+ bytes scored; needed: 151080113",
    ),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_named(request, copy, name):
    good, plant, expected = PLANTS[name]
    folder = copy(request.getfixturevalue(good))
    to = plant(folder)
    faults = check.faults_of(to if isinstance(to, Path) and to.is_dir() else folder, run=False)
    assert any(re.match(expected, fault) for fault in faults), "\n".join(faults)
    assert all("\n" not in fault and "; needed: " in fault for fault in faults)
    assert not any("what can be checked" in fault for fault in faults), "\n".join(faults)


ENTRIES = sorted(ROOT.glob("records/track_*/*/submission.json"))


@pytest.mark.parametrize("told", ENTRIES, ids=lambda path: path.parent.name)
def test_entries_of_this_repository_have_no_fault(told):
    """Some are older than the packed form: their plain file counts."""
    assert check.faults_of(told.parent, run=False) == []


def source_of(folder):
    """The source that is read from a folder, and the faults."""
    faults, found = [], []
    faults = faults_of(lambda expect, _: found.append(program.read_source(expect, folder)), folder)
    return found[0], faults


def test_a_twin_is_decoded_and_not_packed_again(tmp_path, monkeypatch):
    """Another version of the compressor gives other bytes; nothing of the source is executed."""
    text = b"open('made', 'w').close()\n"
    monkeypatch.chdir(tmp_path)
    (tmp_path / READABLE).write_bytes(text)
    for packed in (lzma2(text), lzma2(text, preset=9)):
        (tmp_path / PROGRAM).write_bytes(twin_of(packed))
        monkeypatch.delattr(lzma, "compress", raising=False)
        assert source_of(tmp_path) == (program.Source(READABLE, text), [])
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    assert not (tmp_path / "made").exists()


def test_no_byte_of_the_wrapper_may_change(tmp_path):
    head, tail = train_gpt.TWIN_TEMPLATE.encode().split(b"%s")
    literal = base64.b85encode(lzma2(b"pass\n"))
    (tmp_path / READABLE).write_bytes(b"pass\n")
    for part, join in ((head, b"%s" + literal + tail), (tail, head + literal + b"%s")):
        for n in range(len(part)):
            for other in (b"", bytes([part[n] ^ 1]), part[n : n + 1] * 2):
                changed = part[:n] + other + part[n + 1 :]
                (tmp_path / PROGRAM).write_bytes(join.replace(b"%s", changed))
                found, faults = source_of(tmp_path)
                assert found is None, changed
                assert len(faults) == 1, changed


def test_a_twin_without_end_takes_no_memory(tmp_path):
    """It decodes to 256 MiB, of which a little more than the bound is decoded."""
    (tmp_path / PROGRAM).write_bytes(twin_of(lzma2(bytes(1 << 28))))
    tracemalloc.start()
    try:
        found, faults = source_of(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found is None
    assert re.match(NOT_DECODED, faults[0])
    assert peak < 8 << 20


def test_a_program_that_cannot_be_trusted_is_not_executed(study, copy, tmp_path):
    """A wrapper that does more is not run, even where running is asked for."""
    folder, made = copy(study), tmp_path / "made"
    added = f"\nopen({str(made)!r}, 'w').close()\nlinecache".encode()
    replace(PROGRAM, b"\nlinecache", added)(folder)
    faults = check.faults_of(folder)
    assert any(re.match(not_wrapper(5), fault) for fault in faults), faults
    assert not made.exists()


SOURCES = {
    "os.execlp('curl', 'x')": "execlp",
    "os.spawnlp(0, 'curl', 'x')": "spawnlp",
    "os.fork()": "fork",
    "getattr(os, 'system')('curl')": "system",
    "vars(os)['system']('curl')": "system",
    "import _socket": "import _socket",
    "import _posixsubprocess": "import _posixsubprocess",
    "import imaplib": "import imaplib",
    "import webbrowser": "import webbrowser",
    "import operator": "import operator",
    "torch.hub.load('a', 'b')": "hub",
    "import torch.hub as a": "hub",
    "from torch.hub import x": "hub",
    "torch.utils.model_zoo.load_url('a')": "load_url",
    "np.genfromtxt('a')": "genfromtxt",
    "DATA = 'http' + '://example.org'": "an address",
    "DATA = b'ftp://example.org'": "an address",
    "from torch.utils.cpp_extension import load_inline": "load_inline",
    "torch.ops.load_library('a.bin')": "load_library",
    "torch.load('a', weights_only=False)": "load",
    "np.load('a', allow_pickle=True)": "allow_pickle",
    "torch.jit.load('a')": "jit",
    "__builtins__.exec('a')": "__builtins__",
    "partial.__globals__": "__globals__",
    "getattr(partial, '__globals__')": "__globals__",
    "import types": "import types",
    "import ctypes as c": "import ctypes",
    "from ctypes import CDLL": "import ctypes",
    "import ctypes, shutil": "import ctypes",
    "ctypes.CDLL(None).system(b'curl')": "ctypes",
    "ctypes.CDLL('./a.so').mallopt": "ctypes",
    "getattr(ctypes, 'CDLL')": "ctypes",
    "ctypes.pythonapi": "ctypes",
    "ctypes.CDLL(None).mallopt.errcheck": "ctypes",
    "type(ctypes.CDLL(None).mallopt)((b'system', x))": "ctypes",
    "mallopt = ctypes.CDLL(None).mallopt\ntype(mallopt)": "mallopt",
    "class A:\n\tmallopt = ctypes.CDLL(None).mallopt\ntype(A.mallopt)": "mallopt",
    "mallopt = ctypes.CDLL(None).mallopt\nvars()['mallopt']": "mallopt",
    "getattr(x, b'system'.decode())": "system",
    "sys.modules": "sys.modules",
    "import importlib": "import importlib",
    "import importlib.util as a": "import importlib",
    "from importlib import util": "import importlib",
    "from importlib.util import find_spec": "import importlib",
    "importlib.util.module_from_spec(x)": "importlib",
    "importlib.util.find_spec('socket').loader": "importlib",
    "importlib.import_module('socket')": "importlib",
    "a = importlib.util.find_spec": "importlib",
    "importlib.util.find_spec(torch.load('a')) is None": "load",
    "torch.load('a') is Program.load()": "load",
    "import safetensors_extra": "import safetensors_extra",
}
READERS = {
    "def f(data):\n\td = data\n\treturn d.val": "f reads d.val",
    "def f(data):\n\tx, *_ = data": r"f reads x, \*_ = data",
    "def f(data):\n\treturn data[0]": r"f reads data\[0\]",
    "def f(data):\n\tfor x in data:\n\t\tpass": "f reads for x in data:",
    "def f(data):\n\treturn [*data]": r"f reads \*data",
    "def f(data):\n\treturn data._asdict()": "f reads data._asdict",
    "def f(data):\n\treturn getattr(data, 'val')": "f reads 'val'",
    "f = lambda data: data.val": "the module reads data.val",
    "async def f(data):\n\treturn data.val": "f reads data.val",
    "DATA = Data(0, 0, 0).val": r"the module reads Data\(0, 0, 0\).val",
    "class A:\n\tdef evaluate(self, data):\n\t\treturn data.val": "A.evaluate reads data.val",
    "class A:\n\tdef f(self):\n\t\treturn self.data[0]": r"A.f reads self.data\[0\]",
    "class A:\n\tdef f(self):\n\t\td = self.data": "A.f reads d = self.data",
    "class A:\n\tx = Data(0, 0).val": r"A reads Data\(0, 0\).val",
    "def f(data: Data):\n\treturn data[0]": r"f reads data\[0\]",
    "def f(data: bytes):\n\treturn data.val": "f reads data.val",
    "@use(Data(0, 0).val)\nclass A:\n\tpass": r"A reads Data\(0, 0\).val",
}


@pytest.mark.parametrize("text", [*SOURCES, *READERS])
def test_source_rules(text):
    """Plain ways around each rule."""
    expected = rf"line \d+: {SOURCES[text]}; " if text in SOURCES else f"{READERS[text]}; "
    tree = ast.parse(f"{text}\n{(ROOT / PROGRAM).read_text(encoding='utf-8')}")
    needs = "torch==2.0\nnumpy>=2.0,<3\nsentencepiece>=0.2,<0.3\nzstandard>=0.23\n"
    needs += "safetensors>=0.5\n"
    faults = faults_of(lambda expect, _: program.check_source(expect, tree, needs), None)
    assert any(re.match(f"{PROGRAM}: {expected}", fault) for fault in faults), faults


def test_its_own_source_has_no_fault():
    tree = ast.parse((ROOT / PROGRAM).read_text(encoding="utf-8"))
    needs = (ROOT / "requirements.txt").read_text(encoding="utf-8").partition("# data/")[0]
    assert not faults_of(lambda expect, _: program.check_source(expect, tree, needs), None)


def test_all_faults_at_once(study, copy, capsys):
    folder = copy(study)
    for name in ("a score in json", "a path in a log", "network"):
        PLANTS[name][1](folder)
    assert check.main([str(folder), "--no-run"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for name in ("a score in json", "a path in a log", "network"):
        assert any(re.match(PLANTS[name][2], line) for line in lines), name
    assert not any(line.startswith("ok") for line in lines)


def test_folders_of_others_do_not_stop_it(tmp_path):
    """Whatever is in it, there are faults and no crash."""
    assert check.faults_of(tmp_path, run=False)
    (tmp_path / "submission.json").write_text('{"main": [], "seed_results": 3}')
    (tmp_path / "train_gpt.py").write_bytes(b"\x9e\x00")
    (tmp_path / "README.md").write_bytes(b"\xff")
    (tmp_path / "train.log").write_text("seed:1\nfinal_int6_roundtrip_exact val_loss:1 val_bpb:0\n")
    (tmp_path / "train_seed2.log").mkdir()
    faults = check.faults_of(tmp_path, run=False)
    assert any(fault.startswith("train_gpt.py: ") for fault in faults)


# ---- What its program does ----


def faults_of(part, folder):
    faults = []

    def expect(holds, file, found, needed):
        faults.extend([] if holds else [f"{file}: {found}; needed: {needed}"])

    part(expect, folder)
    return faults


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torch.zeros(1).cuda()", ["import: RuntimeError: CUDA is asked for"]),
        (
            "began = time.process_time()\nopen('made', 'w').close()\nos.environ['MADE'] = '1'\n"
            "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
            "while time.process_time() - began < 1.2:\n\tpass\nHyperparameters.num_heads = None\n",
            [
                "import: writes made, 1 threads, sets MADE; needed: an import that does nothing",
                r"import: [\d.]+ s; needed: below 1.0 s",
                "Hyperparameters without num_heads; needed",
            ],
        ),
        (
            "forward = GPT.forward\nGPT.forward = lambda self, *ids: forward(self, *ids) + 1",
            [r"loss 6\.\d+; needed: about 5.56 of random tokens"],
        ),
    ],
)
def test_imports(study, copy, text, expected):
    folder = copy(study)
    code(text)(folder)
    faults = faults_of(program.check_import, folder)
    assert len(faults) == len(expected), faults
    for fault, pattern in zip(faults, expected, strict=True):
        assert re.match(f"train_gpt.py: {pattern}", fault), fault
    assert not (folder / "made").exists()


def test_weights_that_validation_text_changes(study, copy):
    """And a score that it does not change: neither can be seen in the source."""
    folder = copy(study)
    text = "getattr(self, 'v' + 'al').tokens"
    shifted = rf"*(x.roll(int({text}.sum()) % 1009, 1) for x in \1)"
    source(r"\*(self\.batches\.batch\(self\.step\))", shifted)(folder)
    source(r"^    bpb = nats / .*", "    bpb = 1.0")(folder)
    assert faults_of(program.check_run, folder) == [
        "train_gpt.py: another validation text gives another artifact; needed: the same: training "
        "does not read it",
        "train_gpt.py: another validation text gives the score 1.0; needed: another: scoring reads "
        "it",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("print('soon')", ["a tiny run: status 0, soon; needed: status 0 or 1 and result.json"]),
        ("raise SystemExit(3)", ["a tiny run: status 3, "]),
        (
            "import contextlib, socket\nwith contextlib.suppress(OSError):\n"
            "\tsocket.create_connection(('192.0.2.1', 80))",
            ["a tiny run: status 0, ;", "a tiny run: socket.getaddrinfo 192.0.2.1"],
        ),
        ("import time\ntime.sleep(60)", ["a tiny run: status 124, it lasts longer than 2 s"]),
    ],
)
def test_runs(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(program, "SECONDS", 2)
    (tmp_path / PROGRAM).write_text(text, encoding="utf-8")
    faults = faults_of(program.check_run, tmp_path)
    assert len(faults) == len(expected), faults
    for fault, start in zip(faults, expected, strict=True):
        assert fault.startswith(f"train_gpt.py: {start}"), fault


def test_it_runs_without_what_lies_beside_it(tmp_path):
    (tmp_path / "weights.png").write_text("1.0", encoding="utf-8")
    (tmp_path / PROGRAM).write_text("print(open('weights.png').read())", encoding="utf-8")
    (fault,) = faults_of(program.check_run, tmp_path)
    assert "a tiny run: status 1, FileNotFoundError" in fault


def test_what_was_not_run_is_said(study, capsys):
    assert check.main([str(study), "--no-run"]) == 0
    assert "; nothing of it was run\n" in capsys.readouterr().out


def test_the_command_line(study, copy, capsys, monkeypatch):
    folder = copy(study)
    (folder / README).unlink()
    monkeypatch.setattr(sys, "argv", ["check.py", str(folder), "--no-run"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "records/check.py"), run_name="__main__")
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert said.startswith("README.md: No such file or directory; needed: ")
