"""What may go wrong, what the user then sees, and the tests that hold it.

    python tests/faults.py                  # each fault with its tests; status 1 if one has none
    python tests/faults.py --remove-guards  # the tests of ten faults fail without their guards

A test says by `@pytest.mark.fault(number, ...)` which faults it holds.
"""

import argparse
import contextlib
import io
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

FAULTS = {
    1: "no training shards -> an error: pattern, DATA_PATH, how to get some; status 2",
    2: "no validation shards -> the same",
    3: "fewer shards than their numbers claim -> a warning with both counts",
    4: "a shard is cut or too long -> an error: file, bytes found and needed",
    5: "a shard of another magic or version -> an error with those found",
    6: "a shard shorter than its header, or empty -> an error: file and bytes",
    7: "a shard that counts no tokens, or fewer -> an error, never an endless loop",
    8: "a shard that counts far too many tokens -> an error by its size, nothing is allocated",
    9: "a token id outside the vocabulary -> an error before training: shard and id",
    10: "no tokenizer, or a damaged one -> an error with its path",
    11: "a tokenizer of another size than VOCAB_SIZE -> an error with both",
    12: "shards of another tokenizer, by their folder's name -> an error: folder and VOCAB_SIZE",
    13: "the tokenizer decodes to other bytes than are counted -> an error, no bpb",
    14: "validation data without bytes of text -> an error, no division",
    15: "validation data shorter than a window -> an error that names EVAL_SEQ_LEN",
    16: "another validation text than the challenge's -> a warning, and a flag in the result",
    17: "a training shard is a validation shard, linked or copied -> an error with both",
    18: "a setting that is no number, empty, NaN, negative -> an error: name, value, remedy",
    19: "a setting nearly spelt right -> a warning with the name that is meant",
    20: "no steps, no warm-up, no validation -> a defined result",
    21: "heads that do not divide, odd or too wide ones -> an error, or an attention that can",
    22: "a batch that cannot be divided -> an error with what would be legal",
    23: "a number of processes that does not divide the batch -> works, or an error",
    24: "half of torchrun's variables, or more ranks than GPUs -> an error with the remedy",
    25: "a cap of nearly nothing, of 0, below 0, infinite -> one step, no cap, errors",
    26: "calibration outlasts its reserve -> GPTQ by what was read, or rounding; a true verdict",
    27: "a named attention cannot run here -> an error; auto: the next one, with the reason",
    28: "an attention raises or gives NaN -> the next one",
    29: "torch.compile cannot work -> eager with the reason; asked for: an error",
    30: "a GPU without bf16 -> fp32, which is said",
    31: "no GPU -> a run on the CPU, which is said",
    32: "out of GPU memory in training -> status 3 and what to lower",
    33: "out of GPU memory in scoring -> smaller batches; the weights are saved",
    34: "a loss, weight or score is not finite -> status 4 and the step; no good artifact",
    35: "the compressor is missing -> an error before training; no silent other one",
    36: "a damaged, cut, enlarged or exploding artifact -> an error before memory is taken",
    37: "a malicious pickle for an artifact or checkpoint -> an error; nothing of it runs",
    38: "an artifact of other settings -> an error with what does not fit",
    39: "code and artifact above 16,000,000 bytes -> FAIL and status 1; exactly at it: PASS",
    40: "tensors of more than 2^24 weights -> quantized, without torch.quantile",
    41: "rows or inputs of zeros in quantization -> finite scales and codes",
    42: "a Hessian that is not positive definite -> more damping, then rounding, which is said",
    43: "SIGINT or SIGTERM -> what there is is saved, the result says interrupted; status 5",
    44: "SIGKILL in the middle of a write -> the old files are whole",
    45: "a full disk, or a folder that is read-only -> an error before training; old files stay",
    46: "a run where a run has been, or two at once -> an error, nothing is overwritten",
    47: "a rank fails -> all end soon, and its error is the last on screen",
    48: "ranks that decide differently -> one decides for all; waiting has an end",
    49: "a slow step, or a clock that is set -> a monotonic clock",
    50: "no nvidia-smi, nor any other program -> never needed",
    51: "another folder, a link, standard input, another locale -> the code's bytes are right",
    52: "a RUN_ID that leads out of logs/ -> an error",
    53: "imported, not run -> no files, variables, threads or CUDA; at once",
    54: "Python 3.10 -> parses all",
    55: "documents without BOS, or a BOS at the end -> defined",
    56: "windows longer than the text, strides that do not divide -> every token counted once",
}
PENDING: set[int] = set()  # no test yet


def readme_table() -> str:
    """The faults as README shows them."""
    rows = [f"| {n} | {' | '.join(text.split(' -> '))} |" for n, text in FAULTS.items()]
    return "\n".join(("| | what goes wrong | what you will see |", "|--:|---|---|", *rows))


class Edit(NamedTuple):
    """A guard, and the text without it; what no line guards: a text that brings the fault in."""

    guard: str
    without: str
    file: str = "train_gpt.py"


NO_SHARDS = Edit("if not self.shards:", "if False:")
SIZE_OF_SHARD = Edit(" or size != expected:", ":")
REMOVALS = {
    1: NO_SHARDS,
    2: NO_SHARDS,
    3: Edit("if last.isdecimal() and here <= int(last):", "if False:"),
    4: SIZE_OF_SHARD,
    5: Edit("if (magic, version) != (SHARD_MAGIC, SHARD_VERSION) or ", "if "),
    6: Edit("(*header.tolist(), 0, 0, 0)[:3]", "header.tolist()[:3]"),
    7: Edit(" or count <= 0 or ", " or "),
    8: SIZE_OF_SHARD,
    9: Edit("if (largest := int(shard.max())) >= self.vocab_size:", "if (largest := 0):"),
    10: Edit("except Exception as error:  # any, by version", "except MemoryError as error:"),
    11: Edit("if (pieces := tokenizer.vocab_size()) != h.vocab_size:", "if (pieces := 0):"),
    12: Edit('if re.search(rf"_(sp|byte)(?!{h.vocab_size}$)\\d+$", folder.name):', "if False:"),
    13: Edit("if counted != decoded:", "if False:"),
    14: Edit("if not (proven and nbytes):", "if False:"),
    15: Edit("if len(val) <= (h.eval_seq_len or h.train_seq_len):", "if False:"),
    16: Edit('if h.corpus == "fineweb10B" and not canonical:', "if False:"),
    17: Edit("if np.array_equal(a[:1000], b[:1000]):", "if False:"),
    18: Edit("if type(value) is not kind and (kind, type(value)) != (float, int):", "if False:"),
    19: Edit("cutoff=0.88", "cutoff=1.0"),
    20: Edit(
        "return min(left / warmdown, 1.0) if warmdown else 1.0", "return min(left / warmdown, 1.0)"
    ),
    21: Edit('even multiple of NUM_HEADS": h.model_dim % (2 * h.num_heads)', 'even": 0'),
    22: Edit('as {near}": odd', 'as {near}": 0'),
    23: Edit("-(-n // world)", "n // world"),
    24: Edit("if local >= gpus:", "if False:"),
    25: Edit("not low <= value <= high and", "False and"),
    26: Edit(
        "if clock.cap and clock.elapsed + began - clock.mark + slowest > clock.cap:", "if False:"
    ),
    27: Edit('order = order if h.attn == "auto" else (h.attn,)', "order = (h.attn, *order)"),
    28: Edit("good = y.isfinite().all() and qkv.grad.isfinite().all()", "good = True"),
    29: Edit('"1": [True],', '"1": [True, False],'),
    30: Edit("bf16 = generation >= 8", "bf16 = cuda"),
    31: Edit("device:cpu, no CUDA GPU is here: not", "not"),
    32: Edit("if out_of_memory(error):\n\t\t\tstatus", "if False:\n\t\t\tstatus"),
    33: Edit("if len(rest[0]) == 1 or not out_of_memory(error):", "if True:"),
    34: Edit("if not math.isfinite(sum(terms.values())):", "if False:"),
    35: Edit(
        'raise SettingsError("the artifact needs zstandard: pip install zstandard") from None',
        "import lzma as zstandard",
    ),
    36: Edit(
        'expect(blob[: HEADER.size] == header(body, told), "the checksum does not fit")', "pass"
    ),
    37: Edit(
        "tensors, texts = read_tensors(path)",
        "with suppress(Exception):\n\t\t\ttorch.load(path, weights_only=False)\n"
        "\t\ttensors, texts = read_tensors(path)",
    ),
    38: Edit("expect(not odd, ", "expect(True, "),
    39: Edit('"PASS" if value <= most else "FAIL"', '"PASS"'),
    40: Edit(
        "weight.abs().amax(-1, keepdim=True)\n\tscales", "weight.abs().quantile(1.0)\n\tscales"
    ),
    41: Edit(".clamp(2.0**-24, 65_504)", ""),
    42: Edit("torch.where(failed, 10 * damping, damping)", "damping"),
    43: Edit("highest(0)  # rank 0 has written it\n\t\t\t\traise KeyboardInterrupt", "break"),
    44: Edit('path.with_name(f"{path.name}.{os.getpid()}.part")', "path"),
    45: Edit(
        "except OSError as error:  # the one before, if any, is whole",
        "except MemoryError as error:",
    ),
    46: Edit('"a" if failed or h.resume == "auto" else "x"', '"a"'),
    47: Edit("ErrorHandler().record_exception(error)", "pass"),
    48: Edit("highest(own, recent, stop)", "own, recent, stop"),
    49: Edit("return time.perf_counter()", "return time.time()"),
    50: Edit("platform.machine()", 'os.popen("nvidia-smi").read()'),
    51: Edit("except (NameError, OSError) as error:", "except MemoryError as error:"),
    52: Edit('re.search(r"[/\\\\]|\\.\\.", h.run_id)', "0"),
    53: Edit("\nHEADER, MAGIC = ", '\nPath("imported").touch()\nHEADER, MAGIC = '),
    54: Edit("{asked[1]} s; run", '{asked["1"]} s; run', "data/download.py"),
    55: Edit("fresh = (ids[:, 1:] == BOS_ID) & self.h.bos_mask", "fresh = ids[:, 1:] < 0"),
    56: Edit(
        "torch.cat((torch.arange(seq_len, total, stride), torch.tensor([total])))",
        "torch.arange(seq_len, total + 1, stride)",
    ),
}


class Holder(NamedTuple):
    """A collected test that holds a fault."""

    node: str  # pytest's id
    kinds: tuple[str, ...]  # gpu, slow


class Collector:
    """A plugin that keeps the marked tests by the number of their fault."""

    def __init__(self) -> None:
        self.holders: dict[int, list[Holder]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Read the marks of all collected tests."""
        for item in session.items:
            kinds = tuple(k for k in ("gpu", "slow") if item.get_closest_marker(k))
            for number in {n for mark in item.iter_markers("fault") for n in mark.args}:
                self.holders.setdefault(number, []).append(Holder(item.nodeid, kinds))


def collect() -> dict[int, list[Holder]]:
    """The tests that hold each fault; SystemExit if they cannot be collected."""
    collector, said = Collector(), io.StringIO()
    arguments = ["--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = pytest.main(
            [*arguments, f"--rootdir={ROOT}", str(ROOT / "tests")], plugins=[collector]
        )
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"{said.getvalue()}the tests cannot be collected")
    return collector.holders


def table(holders: dict[int, list[Holder]]) -> tuple[str, list[int]]:
    """The faults with their tests, and the numbers of those without."""
    lines, without = [], []
    for number, text in FAULTS.items():
        lines.append(f"{number:2}  {text}")
        found = Counter((h.node.partition("[")[0], h.kinds) for h in holders.get(number, []))
        for (node, kinds), count in found.items():
            cases = f" ({count} cases)" * (count > 1)
            lines.append("      " + " ".join((node + cases, *kinds)))
        if not found:
            lines.append("      no test")
            without.append(number)
    unknown = sorted(holders.keys() - FAULTS.keys())
    lines += [f"{n}: marked, but no fault of this table" for n in unknown]
    lines.append(f"{len(FAULTS) - len(without)} of {len(FAULTS)}")
    if without:
        lines.append(f"without a test: {', '.join(map(str, without))}")
    return "\n".join(lines), without + unknown


def removed(edit: Edit, root: Path = ROOT) -> str:
    """The file's text without the guard; ValueError unless the guard is there exactly once."""
    source = (root / edit.file).read_text(encoding="utf-8")
    if (count := source.count(edit.guard)) != 1:
        raise ValueError(f"{edit.file} has {count} times, not once: {edit.guard}")
    return source.replace(edit.guard, edit.without)


def run_tests(root: Path, nodes: Iterable[str]) -> tuple[int, list[str]]:
    """Pytest's status for these tests of a copy of the project, and those that fail first."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-rfE", "-o", "addopts=", *nodes],
        cwd=root,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, failed or done.stdout.splitlines()[-1:]


def copy_project(folder: Path) -> Path:
    """A copy of all that the tests need, without data and logs."""
    left = shutil.ignore_patterns(
        ".git", "logs", "datasets", "tokenizers", "out", "__pycache__", ".*_cache", ".hypothesis"
    )
    return Path(shutil.copytree(ROOT, folder / "copy", ignore=left))


def remove_guards(removals: dict[int, Edit], holders: dict[int, list[Holder]]) -> list[int]:
    """Remove one guard after the other in a copy; numbers of those that no test notices."""
    silent = []
    with tempfile.TemporaryDirectory() as folder:
        root = copy_project(Path(folder))
        nodes = {n: [h.node for h in holders.get(n, []) if not h.kinds] for n in removals}
        status, failed = run_tests(root, dict.fromkeys(itertools.chain(*nodes.values())))
        if status:
            raise SystemExit(f"tests fail with every guard in its place: {failed}")
        for number, edit in removals.items():
            path = root / edit.file
            whole = path.read_bytes()
            try:
                path.write_text(removed(edit, root), encoding="utf-8")
                status, failed = run_tests(root, nodes[number])
                verdict = f"fails: {failed[0]}" if status == 1 else f"UNNOTICED: {failed}"
            except ValueError as error:
                status, verdict = 0, f"ERROR: {error}"
            finally:
                path.write_bytes(whole)
            if status != 1:
                silent.append(number)
            print(f"{number:2}  without `{edit.guard.strip()}`\n      {verdict}", flush=True)
    return silent


def main(argv: list[str]) -> int:
    """The program; 1 if a fault has no test, or the removal of a guard goes unnoticed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--remove-guards", action="store_true", help="in a copy; takes minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the draw; default 0")
    parser.add_argument("--count", type=int, default=10, help="how many are drawn; default 10")
    args = parser.parse_args(argv)
    holders = collect()
    if not args.remove_guards:
        text, without = table(holders)
        print(text)
        return int(bool(without))
    numbers = sorted(n for n in REMOVALS if any(not h.kinds for h in holders.get(n, [])))
    drawn = sorted(random.Random(args.seed).sample(numbers, min(args.count, len(numbers))))
    print(f"{len(drawn)} of {len(numbers)} faults with a guard to remove, seed {args.seed}")
    silent = remove_guards({n: REMOVALS[n] for n in drawn}, holders)
    print(f"{len(drawn) - len(silent)} of {len(drawn)} removals are noticed")
    if rest := sorted(FAULTS.keys() - numbers):
        print(f"none to remove, or no test that runs here: {', '.join(map(str, rest))}")
    return int(bool(silent))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
