"""What may go wrong, what the user then sees, and the tests that hold it.

    python tests/faults.py               # each fault with its tests
    python tests/faults.py --markdown    # the table of tests/README.md

A test names the faults that it holds by `@pytest.mark.fault(number, ...)`. The exit status is 1 if
the default suite holds a fault by no test.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

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
    20: "no steps, no warm-up, no validation -> a run with scores",
    21: "heads that do not divide, odd or too wide ones -> an error, or another attention back end",
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
    42: "a Hessian of few inputs is damped; one that is not finite -> rounding, which is said",
    43: "SIGINT or SIGTERM -> checkpoint and average are saved, the result says so; status 5",
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


def markdown() -> str:
    """Returns the faults as tests/README.md shows them."""
    rows = [f"| {number} | {text.replace(' -> ', ' | ')} |" for number, text in FAULTS.items()]
    return "\n".join(("| | what goes wrong | what the user sees |", "|--:|---|---|", *rows))


def holders(items: Iterable[pytest.Item]) -> dict[int, dict[str, str]]:
    """Returns for each fault its test functions, and why the default suite leaves them out, if so.

    A function counts as part of the default suite if one of its cases is.
    """
    found: dict[int, dict[str, str]] = {number: {} for number in FAULTS}
    for item in items:
        name = item.nodeid.partition("[")[0]
        left_out = " ".join(kind for kind in ("slow", "gpu") if item.get_closest_marker(kind))
        for mark in item.iter_markers("fault"):
            for number in mark.args:
                found[number][name] = left_out and found[number].get(name, left_out)
    return found


def without_test(found: dict[int, dict[str, str]]) -> list[int]:
    """Returns the faults that no test of the default suite holds."""
    return [number for number, tests in found.items() if all(tests.values())]


class Collector:
    """A pytest plugin that keeps the collected tests."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Keeps the tests."""
        self.items = session.items


def main(argv: list[str]) -> int:
    """Prints a table; returns 1 if a fault has no test or the tests cannot be collected."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--markdown", action="store_true", help="print the table of README.md")
    if parser.parse_args(argv).markdown:
        print(markdown())
        return 0
    collector, said = Collector(), io.StringIO()
    arguments = ["--collect-only", "-qq", "-o", "addopts=", "-p", "no:cacheprovider", str(TESTS)]
    with contextlib.redirect_stdout(said):
        status = pytest.main(arguments, plugins=[collector])
    if status != pytest.ExitCode.OK:
        print(said.getvalue())
        return 1
    found = holders(collector.items)
    for number, text in FAULTS.items():
        print(f"{number:2}  {text}")
        for name, left_out in found[number].items():
            print(f"      {name} {left_out}".rstrip())
    missing = without_test(found)
    print(f"{len(FAULTS) - len(missing)} of {len(FAULTS)} are held; no test: {missing or 'none'}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
