"""The size limit: the packed twin of the program, and scales widened until the model fits."""

import base64
import importlib.util
import json
import lzma
import math
import re
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, settings
from hostile import CODECS

import train_gpt as tg

SHORT = {**TINY, "ITERATIONS": "6", "WARMDOWN_ITERS": "3"}


def entropy_bytes(codes: list[torch.Tensor]) -> float:
    """Order-0 entropy of all codes together, in bytes, by counting them one by one."""
    counts = Counter(int(c) for array in codes for c in array.flatten())
    total = sum(counts.values())
    return -sum(n * math.log2(n / total) for n in counts.values()) / 8


def large_model() -> tg.GPT:
    """A model of some 600,000 weights of different sizes."""
    torch.manual_seed(0)
    model = tg.GPT(settings(model_dim=128, num_layers=4, bigram_vocab_size=512))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * (0.02 + 0.1 * (i % 3)))
    return model


def sizes(log_text: str) -> list[tuple[int, int, float]]:
    """Bytes packed, entropy of the matrices' codes and factor of each packing."""
    line = r"size: (\d+) bytes packed, .* codes (\d+) bytes, scale factor ([\d.]+)"
    return [(int(m[1]), int(m[2]), float(m[3])) for m in re.finditer(line, log_text)]


def pack(model: tg.GPT, room: int, codec: str = "zstd") -> bytes:
    """The artifact of a model, made to fit."""
    h = tg.replace(model.h, compressor=codec)
    return tg.pack_to_fit(model, {}, h, room, tg.Ranks(), tg.Log())


def test_the_log_tells_bytes_and_entropy(capsys):
    model = large_model()
    blob = pack(model, 10**7)
    ((packed, entropy, factor),) = sizes(capsys.readouterr().out)
    assert (packed, factor) == (len(blob), 1.0)
    _, arrays = tg.unpack_artifact(blob, model.h)
    roles = tg.parameter_roles(model)
    matrices = [arrays[f"{name}.codes"] for name, role in roles.items() if role == "matrix"]
    assert entropy == pytest.approx(entropy_bytes(matrices), abs=1)
    assert 0.5 * packed < entropy < packed


@pytest.mark.parametrize(
    ("codec", "part"),
    [
        *(pytest.param("zstd", part) for part in (0.995, 0.9, 0.6, 0.5)),
        *(pytest.param(*p.values, 0.7, marks=p.marks) for p in CODECS),
    ],
)
def test_one_factor_widens_the_scales_until_it_fits(codec, part, capsys):
    """In a few rounds, even where twice the factor saves less than a bit a code."""
    model = large_model()
    h = model.h
    free = pack(model, 10**7, codec)
    room = int(part * len(free))
    capsys.readouterr()
    blob = pack(model, room, codec)
    assert len(blob) <= room
    assert len(blob) > 0.98 * room  # and no more than that
    told = sizes(capsys.readouterr().out)
    assert told[0][::2] == (len(free), 1.0)
    packed, _, factor = told[-1]
    assert packed == len(blob)
    assert factor > 1
    assert 2 <= len(told) <= 6
    assert all(size > room for size, *_ in told[:-1])  # it stops at the first that fits
    # One factor for all 6-bit scales, none for the others.
    _, before = tg.unpack_artifact(free, h)
    _, after = tg.unpack_artifact(blob, h)
    roles = tg.parameter_roles(model)
    for name, role in roles.items():
        if f"{name}.scales" in before:
            ratio = after[f"{name}.scales"].float() / before[f"{name}.scales"].float()
            if role == "matrix":
                torch.testing.assert_close(ratio, torch.full_like(ratio, factor), rtol=2e-3, atol=0)
            else:
                assert torch.equal(after[f"{name}.codes"], before[f"{name}.codes"])
        else:
            assert torch.equal(after[name], before[name])


def test_it_gives_up_where_nothing_would_fit(capsys):
    model = tg.GPT(settings())
    pack(model, -(10**9))
    tried = [factor for *_, factor in sizes(capsys.readouterr().out)]
    assert tg.MAX_SCALE_FACTOR < tried[-1] < 2 * tg.MAX_SCALE_FACTOR
    assert len(tried) <= 4


def test_a_run_that_overshoots_is_made_to_fit(tmp_path, byte_corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    env = {**SHORT, "DATA_PATH": str(byte_corpus), "GPTQ_ENABLED": "1", "GPTQ_CALIB_TOKENS": "256"}
    assert tg.main([], {**env, "RUN_ID": "free"}) == 0
    free = json.loads(Path("logs/free/result.json").read_text())
    assert [factor for *_, factor in sizes(capsys.readouterr().out)] == [1.0]
    limit = free["bytes"]["total"] - free["bytes"]["model"] // 10
    monkeypatch.setattr(tg, "BYTES_LIMIT", limit)
    assert tg.main([], {**env, "RUN_ID": "tight"}) == 0
    out = capsys.readouterr().out
    tight = json.loads(Path("logs/tight/result.json").read_text())
    assert tight["status"] == "ok"
    assert tight["bytes"]["total"] <= limit
    assert tight["scores"]["float"]["val_bpb"] == free["scores"]["float"]["val_bpb"]
    assert all(math.isfinite(s["val_bpb"]) for s in tight["scores"].values())
    artifact = "logs/tight/final_model.int6.ptz"
    assert tg.main(["--eval", artifact], env) == 0
    bpb = tight["scores"]["plain"]["val_bpb"]
    assert f"final_int6_roundtrip_exact val_loss:{tight['scores']['plain']['val_loss']:.8f}" in out
    assert f"val_bpb:{bpb:.8f}" in capsys.readouterr().out


@pytest.mark.fault(39)
def test_what_cannot_fit_fails_and_says_by_how_much(tmp_path, byte_corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    limit = len(tg.packed_source(Path(tg.__file__).read_bytes())) + 9000
    monkeypatch.setattr(tg, "BYTES_LIMIT", limit)
    env = {**SHORT, "DATA_PATH": str(byte_corpus), "RUN_ID": "big", "EVAL_STRIDE": "0"}
    assert tg.main([], env) == 1
    result = json.loads(Path("logs/big/result.json").read_text())
    assert (result["status"], result["verdicts"]["total_bytes"]) == ("over a limit", "FAIL")
    total = result["bytes"]["total"]
    assert total > limit
    assert f"limit:total_bytes {total:,} of {limit:,} FAIL" in capsys.readouterr().out
    assert result["bytes"]["code"] == limit - 9000


# ---- The packed twin ----


SOURCE = b'''"""Says where it is."""

import sys

NAME = "b\xc3\xa4r %s %d"


def fail() -> None:
    """Raises an error that a traceback must show with its line."""
    raise ValueError(NAME)  # this line


if __name__ == "__main__":
    print(__file__, NAME, sys.argv[1:])
'''


def wrap(literal: bytes) -> bytes:
    """A twin with another literal."""
    head, tail = tg.TWIN_TEMPLATE.encode().split(b"%s")
    return head + literal + tail


def lzma2(data: bytes, dictionary: int = 1 << 20) -> bytes:
    """Raw LZMA2."""
    options = [{"id": lzma.FILTER_LZMA2, "dict_size": dictionary}]
    return lzma.compress(data, lzma.FORMAT_RAW, filters=options)


def literal_of(twin: bytes) -> bytes:
    """The literal of a twin, found by what decodes it."""
    return re.search(rb'b85decode\("([^"]*)"\)', twin)[1]


@pytest.mark.parametrize(
    "source",
    [
        SOURCE,
        b"",
        b"x",
        b"\n" * 5000,
        bytes(range(256)) * 40,
        b'x = 1  # a quote: " and \\ and %s\n' * 3,
        b"no line end at the end",
        Path(tg.__file__).read_bytes(),
    ],
    ids=["small", "empty", "one byte", "lines", "bytes", "quotes", "no line end", "program"],
)
def test_the_twin_holds_the_source_byte_for_byte(source):
    twin = tg.packed_source(source)
    assert twin == tg.packed_source(source)  # deterministic
    assert tg.unpacked_source(twin) == source.replace(b"\r\n", b"\n")
    twin.decode("ascii")
    assert b"\r" not in twin
    assert twin.count(b"\n") == 6
    packed = base64.b85decode(literal_of(twin))
    options = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    plain = lzma.decompress(packed, lzma.FORMAT_RAW, filters=options)
    assert plain == source.replace(b"\r\n", b"\n")


def test_the_twin_of_the_program_is_far_smaller_than_the_program():
    source = Path(tg.__file__).read_bytes()
    assert len(tg.packed_source(source)) < 0.45 * len(source)


def test_bytes_repeat_in_another_process():
    """Hash seeds, locales and folders change nothing."""
    code = f"import sys, train_gpt as tg; sys.stdout.buffer.write(tg.packed_source({SOURCE!r}))"
    env = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert done.stdout == tg.packed_source(SOURCE)


def test_line_ends_become_lf():
    windows = SOURCE.replace(b"\n", b"\r\n")
    assert tg.packed_source(windows) == tg.packed_source(SOURCE)
    assert tg.unpacked_source(tg.packed_source(windows)) == SOURCE
    mixed = SOURCE.replace(b"\n", b"\r\n", 3)
    assert tg.packed_source(mixed) == tg.packed_source(SOURCE)


def test_a_file_that_is_not_a_twin_gives_none():
    twin = tg.packed_source(SOURCE)
    others = {
        "the source": SOURCE,
        "the program": Path(tg.__file__).read_bytes(),
        "nothing": b"",
        "another comment": twin.replace(b"# train_gpt.py", b"# train_gpt_2.py", 1),
        "another version": twin.replace(b"(version 1)", b"(version 2)", 1),
        "a line before": b"import os\n" + twin,
        "a line after": twin + b"import os\n",
        "another line": twin.replace(b"exec(compile", b"print(compile"),
        "no line end": twin.rstrip(b"\n"),
        "Windows line ends": twin.replace(b"\n", b"\r\n"),
        "cut": twin[: len(twin) // 2],
    }
    for name, data in others.items():
        assert data != twin, name
        assert tg.unpacked_source(data) is None, name


def test_a_damaged_literal_is_a_value_error():
    literal = literal_of(tg.packed_source(SOURCE))
    packed = base64.b85decode(literal)
    at = len(literal) // 2
    bad = {
        "no literal": b"",
        "a letter missing": literal[:at] + literal[at + 1 :],
        "cut": literal[:at],
        "cut by five": literal[:-5],
        "code after the literal": literal + b'"); import os; ("',
        "a line end": literal[:at] + b"\n" + literal[at:],
        "not ASCII": literal[:at] + b"\xff" + literal[at + 1 :],
        "an overflow": b"~~~~~" + literal[5:],
        "followed": base64.b85encode(packed + b"\0"),
        "twice": literal + literal,
        "another stream": base64.b85encode(b"not a stream at all"),
        "another format": base64.b85encode(lzma.compress(SOURCE)),
        "zeros": base64.b85encode(b"\xff" * 100),
    }
    for name, text in bad.items():
        with pytest.raises(ValueError, match="packed source"):
            tg.unpacked_source(wrap(text))
            pytest.fail(name)
    assert tg.unpacked_source(wrap(literal)) == SOURCE


def test_no_literal_decodes_to_more_than_the_dictionary():
    """Whatever it decodes to, no more than that is decoded."""
    most = tg.TWIN_DICTIONARY
    assert len(tg.unpacked_source(wrap(base64.b85encode(lzma2(bytes(most)))))) == most
    for size in (most + 1, 64 * most):
        bomb = wrap(base64.b85encode(lzma2(bytes(size))))
        with pytest.raises(ValueError, match="does not end where it should"):
            tg.unpacked_source(bomb)


def test_decoding_a_bomb_takes_little_memory(tmp_path):
    """Measured as peak resident memory in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("measured by Linux")
    (tmp_path / "bomb").write_bytes(wrap(base64.b85encode(lzma2(bytes(64 << 20)))))
    code = """
import sys
from pathlib import Path
import train_gpt as tg

def kilobytes(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0])

tg.unpacked_source(tg.packed_source(b"x"))
Path("/proc/self/clear_refs").write_text("5")
before, bomb = kilobytes("VmRSS"), Path(sys.argv[1]).read_bytes()
try:
    tg.unpacked_source(bomb)
except ValueError:
    print(kilobytes("VmHWM") - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bomb")],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 16 << 10


def test_the_twin_acts_as_its_source(tmp_path):
    """Run, imported under another name, and in a traceback."""
    path = tmp_path / "some_twin.py"
    path.write_bytes(tg.packed_source(SOURCE))
    done = subprocess.run(
        [sys.executable, str(path), "a"],
        capture_output=True,
        encoding="utf-8",
        check=True,
        env={"PYTHONIOENCODING": "utf-8"},
    )
    assert done.stdout == f"{path} b\u00e4r %s %d ['a']\n"
    spec = importlib.util.spec_from_file_location("under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__doc__ == "Says where it is."
    assert (module.__name__, module.__file__) == ("under_test", str(path))
    assert module.fail.__module__ == "under_test"
    with pytest.raises(ValueError, match="%s %d") as error:
        module.fail()
    told = "".join(traceback.format_exception(error.value))
    line = SOURCE[: SOURCE.index(b"raise")].count(b"\n") + 1
    assert f'File "{path}", line {line}, in fail' in told
    assert "raise ValueError(NAME)  # this line" in told
