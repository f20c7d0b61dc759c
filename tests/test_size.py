"""The size limit: the packed twin of the program, and scales widened until the model fits."""

import base64
import lzma
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from bench.harness import synthetic_weights
from conftest import ROOT, settings
from hostile import CODECS

import train_gpt as tg
from figures import unpacked_source

# ---- Scales widened until the model fits ----


def large_model(**changes: object) -> tg.GPT:
    """A model of some 150,000 weights of different sizes."""
    torch.manual_seed(0)
    model = tg.GPT(settings(model_dim=64, num_layers=3, bigram_vocab_size=256, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator) * (0.02 + 0.1 * (i % 3)))
    return model


def pack(model: tg.GPT, room: int, capsys, codec: str = "zstd") -> tuple[bytes, list[list[float]]]:
    """The artifact of a model, made to fit; bytes, entropy, bits a code and factor of each try."""
    capsys.readouterr()
    model.h = tg.replace(model.h, compressor=codec)
    blob = tg.pack_to_fit(
        model, tg.weight_stacks(model, {}, tg.Ranks()), room, tg.Ranks(), tg.Log()
    )
    line = r"size: (\d+) bytes packed, .* codes (\d+) bytes, ([\d.]+) bits .* factor ([\d.]+)"
    return blob, [[*map(float, x)] for x in re.findall(line, capsys.readouterr().out)]


def test_the_log_has_bytes_and_entropy(capsys):
    model = large_model()
    blob, ((packed, entropy, bits, factor),) = pack(model, 10**7, capsys)
    assert (packed, factor) == (len(blob), 1.0)
    _, arrays = tg.unpack_artifact(blob, model.h)
    names = [name for name, role in tg.parameter_roles(model).items() if role == "matrix"]
    codes = torch.cat([arrays[f"{name}.codes"].flatten() for name in names]).tolist()
    counts = Counter(codes).values()
    expected = -sum(n * math.log2(n / len(codes)) for n in counts) / 8
    assert entropy == pytest.approx(expected, abs=1)
    assert bits == pytest.approx(8 * expected / len(codes), abs=1e-3)
    assert 0.5 * packed < entropy < packed


@pytest.mark.parametrize(
    ("rule", "quantizer"), [("search", "scalar"), ("std", "scalar"), ("std", "trellis")]
)
@pytest.mark.parametrize(
    ("codec", "part"),
    [("zstd", 0.95), *(pytest.param(*p.values, 0.6, marks=p.marks) for p in CODECS)],
)
def test_one_factor_widens_the_scales_until_it_fits(codec, part, rule, quantizer, capsys):
    """The overhead of a codec on so small a model is noisy."""
    model = large_model(scale_rule=rule, matrix_clip_sigmas=4.0, quantizer=quantizer)
    free, _ = pack(model, 10**7, capsys, codec)
    room = int(part * len(free))
    blob, tries = pack(model, room, capsys, codec)
    assert 0.96 * room < len(blob) <= room
    assert len(tries) <= 4
    packed, _, _, factor = tries[-1]
    assert packed == len(blob)
    assert factor > 1
    # One factor for all scales of matrices, none for the others.
    _, before = tg.unpack_artifact(free, model.h)
    _, after = tg.unpack_artifact(blob, model.h)
    for name, role in tg.parameter_roles(model).items():
        if role == "matrix":
            ratio = after[f"{name}.scales"].float() / before[f"{name}.scales"].float()
            torch.testing.assert_close(ratio, torch.full_like(ratio, factor), rtol=2e-3, atol=0)
        else:
            codes = f"{name}.codes" if f"{name}.codes" in before else name
            assert torch.equal(after[codes], before[codes])


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["brotli"])  # zstd's overhead varies with the size of its input
def test_a_model_of_millions_of_weights_fits_within_a_thousandth_in_two_packings(codec, capsys):
    """Rows and columns of its matrices differ in size, as those of trained ones do."""
    wide = {"num_layers": 8, "model_dim": 256, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 4.0}
    wide |= {"scale_rule": "std", "matrix_clip_sigmas": 5.0, "bigram_vocab_size": 0}
    model = synthetic_weights(tg.GPT(settings(**wide)))
    room = sum(p.numel() for p in model.parameters()) * 7 // 16  # 3.5 bits a weight
    blob, tries = pack(model, room, capsys, codec)
    assert 0.999 * room <= len(blob) <= room
    assert len(tries) <= 2


def test_it_gives_up_where_nothing_would_fit(capsys):
    _, tries = pack(tg.GPT(settings()), -(10**9), capsys)
    assert tries[-1][3] == pytest.approx(tg.MAX_SCALE_FACTOR)
    assert len(tries) == 1


# ---- The packed twin ----

SOURCE = b'print("b\xc3\xa4r %s %d")  # a comment\n' * 20
PROGRAM = (ROOT / "train_gpt.py").read_bytes()


def wrap(literal: bytes) -> bytes:
    """A twin with another literal."""
    head, tail = tg.TWIN_TEMPLATE.encode().split(b"%s")
    return head + literal + tail


def lzma2(data: bytes) -> bytes:
    """Raw LZMA2."""
    options = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    return lzma.compress(data, lzma.FORMAT_RAW, filters=options)


def literal_of(twin: bytes) -> bytes:
    """The literal of a twin, found by what decodes it."""
    return re.search(rb'b85decode\("([^"]*)"\)', twin)[1]


@pytest.mark.parametrize(
    "source",
    [SOURCE, b"", bytes(range(256)) * 40, b'x = 1  # a quote: " and \\ and %s\r\n' * 3, PROGRAM],
    ids=["small", "empty", "bytes", "quotes", "program"],
)
def test_the_twin_holds_the_source_byte_for_byte(source):
    """With LF line ends, whatever those of the source are."""
    twin, plain = tg.packed_source(source), source.replace(b"\r\n", b"\n")
    assert twin == tg.packed_source(plain) == tg.packed_source(plain.replace(b"\n", b"\r\n"))
    assert unpacked_source(twin) == plain
    twin.decode("ascii")
    assert b"\r" not in twin
    assert twin.count(b"\n") == 6
    options = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    packed = base64.b85decode(literal_of(twin))
    assert lzma.decompress(packed, lzma.FORMAT_RAW, filters=options) == plain


def test_a_file_that_is_not_a_twin_gives_none():
    twin = tg.packed_source(SOURCE)
    others = {
        "the program": PROGRAM,
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
        assert unpacked_source(data) is None, name


def test_a_damaged_literal_is_a_value_error():
    literal = literal_of(tg.packed_source(SOURCE))
    packed = base64.b85decode(literal)
    at = len(literal) // 2
    bad = {
        "no literal": b"",
        "a letter missing": literal[:at] + literal[at + 1 :],
        "code after the literal": literal + b'"); import os; ("',
        "a line end": literal[:at] + b"\n" + literal[at:],
        "not ASCII": literal[:at] + b"\xff" + literal[at + 1 :],
        "followed": base64.b85encode(packed + b"\0"),
        "another stream": base64.b85encode(b"not a stream at all"),
        "another format": base64.b85encode(lzma.compress(SOURCE)),
    }
    for name, text in bad.items():
        with pytest.raises(ValueError, match="packed source"):
            unpacked_source(wrap(text))
            pytest.fail(name)
    assert unpacked_source(wrap(literal)) == SOURCE


def kilobytes(name: str) -> int:
    """A figure of this process's memory, as Linux reports it."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


def test_no_literal_decodes_to_more_than_the_dictionary():
    """Nor does decoding it take much more memory than that."""
    most = tg.TWIN_DICTIONARY
    assert len(unpacked_source(wrap(base64.b85encode(lzma2(bytes(most)))))) == most
    for size in (most + 1, 64 * most):
        bomb = wrap(base64.b85encode(lzma2(bytes(size))))
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak
            before = kilobytes("VmRSS")
        with pytest.raises(ValueError, match="does not end where it should"):
            unpacked_source(bomb)
        if Path("/proc/self/clear_refs").exists():
            assert kilobytes("VmHWM") - before < 16 << 10
