"""Child processes of a benchmark: run one to its end, or say in a few lines why it failed.

In: a module of this package and its arguments. Out: its last line of JSON, or `ChildError` with the end of its output.
Each measurement has its own process, because a CUDA context, an allocator and a host's patched classes outlive
whatever used them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ERROR_LINES = 12


class ChildError(RuntimeError):
    """A child process failed; the message is the end of what it printed."""


@contextmanager
def saying_why(name: str) -> Iterator[None]:
    """The scope of a command's work: what a person can mend ends it with a sentence instead of a trace."""
    from scripts.hosts import HostError

    try:
        yield
    except (ChildError, HostError, ValueError) as error:
        raise SystemExit(f"bench.{name}: {error}") from error


def child_command(module: str, arguments: Sequence[str]) -> list[str]:
    """Command line that runs `bench.<module>` with this interpreter; its working directory must be `ROOT`."""
    return [sys.executable, "-m", f"bench.{module}", *arguments]


def last_lines(text: str, count: int = ERROR_LINES) -> str:
    """The last `count` lines of `text` that say something."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])


def run_child(
    module: str,
    arguments: Sequence[str],
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    log_path: Path | None = None,
) -> dict:
    """Run `bench.<module>` and return the JSON object that it printed last.

    Its whole output goes to `log_path` when given.
    Raises ChildError when it exits with an error, prints no JSON, or runs longer than `timeout_s`.
    """
    try:
        done = subprocess.run(
            child_command(module, arguments),
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as expired:
        printed = _write_log(log_path, expired.stdout, expired.stderr)
        raise ChildError(f"bench.{module} was stopped after {timeout_s:.0f} s\n{last_lines(printed)}") from None
    printed = _write_log(log_path, done.stdout, done.stderr)
    if done.returncode != 0:
        raise ChildError(last_lines(printed) or f"bench.{module} ended with status {done.returncode}")
    try:
        return json.loads(last_lines(done.stdout.decode(errors="replace"), 1))
    except ValueError:
        raise ChildError(f"bench.{module} printed no result\n{last_lines(printed)}") from None


def _write_log(path: Path | None, stdout: bytes | None, stderr: bytes | None) -> str:
    """Keep what a child printed and return it, its errors last."""
    printed = ((stdout or b"") + (stderr or b"")).decode(errors="replace")
    if path is not None:
        path.write_text(printed, encoding="utf-8")
    return printed
