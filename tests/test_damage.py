"""Any one file may be lost or damaged: every command then ends without a traceback."""

import contextlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, shard_bytes
from test_data import TEXTS, tokens_of, train_tokenizer

sys.path[:0] = [str(ROOT / "records")]

import check
import compare
import plot
import submit
import sweep
import train_gpt as tg

DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
OUT = "logs/first"
RUN = f"{OUT}/base/seed1"
NEW = {"RUN_DIR": "logs/again"}
Command = Callable[[dict[str, str]], int]
OF_DATA: list[Command] = [
    lambda env: tg.main([], env | NEW),
    lambda env: tg.main(["--check"], env | NEW),
    lambda env: tg.main(["--eval", RUN], env),
]
OF_A_RUN: list[Command] = [
    lambda env: tg.main([], env | NEW | {"RESUME": RUN}),
    lambda env: tg.main(["--quantize", RUN], env | NEW),
    lambda env: tg.main(["--eval", RUN], env),
    lambda env: sweep.main(["--out", OUT, "--show"], env),
    lambda env: compare.main([OUT]),
    lambda env: plot.main([OUT, "--out", "plots"]),
    lambda env: submit.main(submit_arguments("again")),
]
OF_AN_ENTRY: list[Command] = [lambda env: check.main(["--no-run", str(entry_of("entry"))])]


def submit_arguments(folder: str) -> list[str]:
    words = f"{OUT} --name Mine --author A --github-id a --blurb b --date 2026-01-01 --plots"
    return [*words.split(), "--out", folder]


def entry_of(folder: str) -> Path:
    return Path(folder, "track_non_record_16mb", "2026-01-01_Mine")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with data, tokenizer, a sweep of three seeds and an entry; and its environment."""
    home = tmp_path_factory.mktemp("home")
    data, model = home / "data" / "mine", home / "data" / "mine.model"
    data.mkdir(parents=True)
    tokenizer = train_tokenizer(model)
    for split, repeats in (("val", 40), ("train", 400)):
        tokens = tokens_of(tokenizer, [split, *TEXTS] * repeats)
        (data / f"fineweb_{split}_000000.bin").write_bytes(shard_bytes(tokens))
    env = {name: value for name, value in TINY.items() if not name.startswith("VE_")}
    env |= {"VOCAB_SIZE": str(tokenizer.vocab_size()), "VE_ENABLED": "0", "ITERATIONS": "2"}
    env |= {"CHECKPOINT_EVERY": "1", "GPTQ_CALIB_TOKENS": "512", "MAX_UNKNOWN_FRACTION": "1"}
    env |= {"CORPUS": "mine", "DATA_PATH": "data/mine", "TOKENIZER_PATH": "data/mine.model"}
    with contextlib.chdir(home):
        absolute = {"DATA_PATH": str(data), "TOKENIZER_PATH": str(model)}
        arguments = ["--seeds", "1,2,3", "--cpu", "--out", OUT]
        assert sweep.main(arguments, env | absolute) == 0
        assert submit.main(submit_arguments("entry")) == 0
    return home, env


def assert_plain_end(command: Command, env: dict[str, str], capsys, what: str) -> None:
    """Runs a command; it may fail, with a documented status and without a traceback."""
    try:
        status = command(env)
    except SystemExit as error:
        status = error.code
    shown = "".join(capsys.readouterr())
    assert status in (0, 1, 2), f"{what}: status {status}\n{shown}"
    assert "Traceback" not in shown, f"{what}\n{shown}"
    if status == 2:
        assert shown.strip(), what


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "commands"),
    [("data", OF_DATA), (RUN, OF_A_RUN), ("entry", OF_AN_ENTRY)],
    ids=["data", "run", "entry"],
)
def test_one_damaged_file_ends_in_plain_words(
    folder, commands, home, tmp_path, monkeypatch, capsys
):
    """Each file meets each command; the damages take turns, so that each meets each of both."""
    origin, env = home
    paths = [path for path in sorted((origin / folder).rglob("*")) if path.is_file()]
    for number, original in enumerate(paths):
        for turn, command in enumerate(commands):
            damages = [*DAMAGES] if folder != RUN else [[*DAMAGES][(number + turn) % len(DAMAGES)]]
            for damage in damages:
                copy = tmp_path / f"{number}-{turn}-{damage}"
                shutil.copytree(origin, copy)
                monkeypatch.chdir(copy)
                path = original.relative_to(origin)
                DAMAGES[damage](copy / path)
                assert_plain_end(command, env, capsys, f"{path} {damage}, command {turn}")
                shutil.rmtree(copy)
