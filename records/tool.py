"""What the command lines of records/ have in common."""

import functools
import io
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec

from runs import RunError

P = ParamSpec("P")


def describe(error: Exception) -> str:
    """Returns the text of an error; of a file's, path, reason and remedy in one line."""
    if isinstance(error, OSError) and error.strerror:
        name = os.fsdecode(error.filename) if error.filename else "the output"
        return f"{name}: {error.strerror}; give another path, or free, rename or remove it"
    return str(error)


def escape(text: str) -> str:
    """Returns Markdown that shows a text in one line as it is."""
    marks = r"[\\<`*\[\]|~&$]|(?<!\w)_|_(?!\w)"
    return re.sub(marks, lambda mark: f"\\{mark[0]}", " ".join(text.split()))


def tool(main: Callable[P, int]) -> Callable[P, int]:
    """Wraps the main function of a tool, which returns its exit status.

    Text that the terminal cannot show is replaced. A request that cannot be met (RunError), or a
    file or folder that cannot be used, is one line in the place of a traceback; the status is 2.
    After Ctrl-C it is 5.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            status = main(*args, **kwargs)
            print(end="", flush=True)
            return status
        except RunError as error:
            text = str(error)
        except OSError as error:
            text = describe(error)
            if not error.filename:  # the output failed, and would fail again at the end of Python
                with suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            print("interrupted: the same command continues", file=sys.stderr)
            return 5
        with suppress(OSError):
            print(f"error: {text}", file=sys.stderr)
        return 2

    return run
