"""The GPU battery: a part that fails or hangs does not stop the others; its inputs."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_prepare
from conftest import ROOT

import train_gpt as tg

# Stands in for Python in the battery: the tests fail, one run hangs, the benchmarks are quick.
STUB = """#!/usr/bin/env bash
case "$*" in
*"-m pytest"*) echo "2 failed"; exit 1 ;;
*train_gpt.py*)
	mkdir "$RUN_DIR"
	echo {} >"$RUN_DIR/result.json"
	echo "run $PRESET"
	sleep $HANG
	;;
*"-m bench"*) echo "written" ;;
esac
"""


def battery(folder, *parts, **env):
    """The battery's exit status, screen and files, with a stub in Python's place."""
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "tests/gpu.sh"), str(folder / "out"), *parts],
        env={"PATH": os.environ["PATH"], "PYTHON": str(stub), "DEVICE": "cpu", **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout, sorted(p.name for p in (folder / "out").iterdir())


def test_the_battery_reports_every_part_and_keeps_its_files(tmp_path):
    status, screen, files = battery(tmp_path, LIMIT="4", HANG="60")
    ends = screen.partition("== summary")[2].splitlines()
    end = dict(line.split(": ", 1) for line in ends if ": " in line)
    assert status == 1
    assert end["setup"].startswith("ok, ")
    assert end["tests"].startswith("failed, status 1, ")
    assert end["v9"].startswith("timed out, ")
    assert end["byte_jepa"] == end["bench"] == "not begun, no time is left"
    assert files == ["summary.txt", "tests.log", "v9.json", "v9.log"]
    assert (tmp_path / "out/v9.log").read_text().startswith("run v9")
    assert "2 failed" in (tmp_path / "out/tests.log").read_text()


def test_parts_of_the_battery_can_be_named(tmp_path):
    status, screen, files = battery(tmp_path, "byte_jepa", "bench", HANG="0")
    assert status == 0
    assert "run byte_jepa" in screen
    assert files == ["bench.log", "byte_jepa.json", "byte_jepa.log", "summary.txt"]
    assert battery(tmp_path, "gpu1", "frontier", HANG="0")[0] == 0
    assert (tmp_path / "out/frontier.log").read_text() == "run frontier\n"
    assert battery(tmp_path, "nonsense")[0] == 2


def test_the_battery_gets_documents_tokenizer_and_wheels_up_to_a_limit(
    tmp_path, monkeypatch, capsys
):
    run = subprocess.run

    def offline(command, **how):
        if "pip" not in command:
            return run(command, **how)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / "zstandard.whl").write_bytes(b"wheel")
        assert command[-len(gpu_prepare.PACKAGES) :] == [*gpu_prepare.PACKAGES]
        return None

    monkeypatch.setattr(subprocess, "run", offline)
    monkeypatch.setattr(gpu_prepare, "ROOT", tmp_path)
    run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text("/.gpu/\nignored\n")
    (tmp_path / "ignored").write_bytes(b"0" * 5000)
    given = tmp_path / "given"
    given.mkdir()
    (given / "a.jsonl").write_bytes(b"1" * 700)
    (given / "b.model").write_bytes(b"2" * 30)
    argv = [str(given / "a.jsonl"), "--tokenizer", str(given / "b.model")]
    (tmp_path / ".gpu").mkdir()
    (tmp_path / ".gpu/old").write_bytes(b"")
    assert gpu_prepare.main(argv) == 0
    here = {str(p.relative_to(tmp_path / ".gpu")) for p in (tmp_path / ".gpu").rglob("*.*")}
    assert here == {"docs/a.jsonl", "b.model", "wheels/zstandard.whl"}
    assert gpu_prepare.tree_bytes() == 2 * 730 + len("wheel") + len("/.gpu/\nignored\n")
    monkeypatch.setattr(gpu_prepare, "LIMIT", 1000)
    assert gpu_prepare.main(argv) == 2
    assert "give fewer documents" in capsys.readouterr().err


def test_both_scripts_name_every_package_that_the_program_may_need():
    script = (ROOT / "tests/gpu.sh").read_text(encoding="utf-8")
    assert f"for package in {' '.join(gpu_prepare.PACKAGES)}; do" in script
    codecs = {codec.package for codec in tg.CODECS.values()}
    needed = (codecs | {"safetensors", "sentencepiece"}) - sys.stdlib_module_names
    assert needed <= {*gpu_prepare.PACKAGES}
