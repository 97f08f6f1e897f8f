"""Makes a large card small: a process that holds all of its memory but so much, and watches how much of that is used.

The child (`python -m bench.holder --free-gib 8`) allocates until the card reports that much free, then polls the free
memory. `CardHolder` is the parent's side: lines of JSON over pipes. A contender that starts afterwards finds a card
with `free_gib` free, out of which its own CUDA context comes too, as on a card of that size.
Without `--free-gib` the child holds nothing and only watches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from bench.child import ROOT, ChildError, child_command
from bench.spec import GIB

LARGEST_CHUNK_BYTES = GIB
# cudaMalloc hands out whole pages of this size.
PAGE_BYTES = 2 * 1024**2
POLL_S = 0.005
# Freed memory of a process that has ended comes back to the card a moment later.
RETURN_TIMEOUT_S = 20.0
RETURN_TOLERANCE_BYTES = 64 * 1024**2


class CardUse(NamedTuple):
    """Free memory of the whole card: now, and the least since the last reset."""

    free_bytes: int
    lowest_free_bytes: int


class CardHolder:
    """Runs the holding process; a context manager that gives the memory back when it is left.

    `free_gib=None` holds nothing.
    """

    def __init__(self, free_gib: float | None) -> None:
        self.free_gib = free_gib
        arguments = [] if free_gib is None else ["--free-gib", str(free_gib)]
        self._process = subprocess.Popen(
            child_command("holder", arguments), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.start_free_bytes = self._read().free_bytes

    def __enter__(self) -> CardHolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def is_closed(self) -> bool:
        """Whether the process has ended and its memory is given back."""
        return self._process.poll() is not None

    def reset(self) -> CardUse:
        """Forget the lowest free memory seen so far."""
        return self._ask("reset")

    def use(self) -> CardUse:
        return self._ask("report")

    def wait_for_return(self) -> CardUse:
        """Wait until the card has as much free memory as when holding began, then reset.

        Raises ChildError when it has less or more, and ends: the next contender would run on another card than the
        last.
        """
        deadline = time.monotonic() + RETURN_TIMEOUT_S
        while abs((free_bytes := self.use().free_bytes) - self.start_free_bytes) > RETURN_TOLERANCE_BYTES:
            if time.monotonic() > deadline:
                self.close()
                raise ChildError(
                    f"{free_bytes / GIB:.2f} GiB of the card are free and not {self.start_free_bytes / GIB:.2f} GiB: "
                    "another program uses the card, end it and start again"
                )
            time.sleep(0.1)
        return self.reset()

    def close(self) -> None:
        """End the process and give its memory back; may be called twice."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(BrokenPipeError):  # a process that has ended reads nothing more
                self._process.stdin.close()
        self._process.wait()

    def _ask(self, command: str) -> CardUse:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.close()
            raise ChildError("the process that holds the card's memory has ended") from None
        return self._read()

    def _read(self) -> CardUse:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise ChildError("the process that holds the card's memory has ended: its error is printed above")
        return CardUse(**json.loads(line))


def hold(free_bytes: int) -> list:
    """Allocate device memory until the card reports no more than `free_bytes` plus a page free; return what is held.

    Raises RuntimeError when less than that was free to begin with.
    """
    import torch

    held = []
    chunk_bytes = LARGEST_CHUNK_BYTES
    while (surplus_bytes := torch.cuda.mem_get_info()[0] - free_bytes) >= PAGE_BYTES and chunk_bytes >= PAGE_BYTES:
        wanted_bytes = min(chunk_bytes, surplus_bytes // PAGE_BYTES * PAGE_BYTES)
        try:
            held.append(torch.empty(wanted_bytes, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            chunk_bytes = wanted_bytes // 2  # the free memory is in smaller pieces
    if surplus_bytes < 0:
        raise RuntimeError(
            f"only {(free_bytes + surplus_bytes) / GIB:.2f} GiB of the card are free and {free_bytes / GIB:.2f} GiB "
            "were asked for: end other programs or ask for less"
        )
    return held


class FreeMemoryWatch(threading.Thread):
    """Polls the card's free memory and remembers the least."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._lowest_free_bytes = sys.maxsize
        self.sample()

    def run(self) -> None:
        while not self._ended.wait(POLL_S):
            self.sample()

    def end(self) -> None:
        """Stop polling: a thread that is in a call of CUDA's as the interpreter ends has the process abort."""
        self._ended.set()
        self.join()

    def sample(self) -> CardUse:
        """Look once, note the least, and return both."""
        import torch

        free_bytes = torch.cuda.mem_get_info()[0]
        with self._lock:
            self._lowest_free_bytes = min(self._lowest_free_bytes, free_bytes)
            return CardUse(free_bytes, self._lowest_free_bytes)

    def reset(self) -> CardUse:
        with self._lock:
            self._lowest_free_bytes = sys.maxsize
        return self.sample()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--free-gib", type=float, help="memory to leave free; without it nothing is held")
    free_gib = parser.parse_args().free_gib

    # torch's caching would round small remainders up to 20 MiB; without it an allocation is one cudaMalloc.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    import torch

    torch.cuda.init()
    torch.cuda.synchronize()  # the context's own memory is taken before the first look
    held = [] if free_gib is None else hold(int(free_gib * GIB))
    watch = FreeMemoryWatch()
    watch.start()
    print(json.dumps(watch.sample()._asdict()), flush=True)
    for line in sys.stdin:
        use = watch.reset() if line.strip() == "reset" else watch.sample()
        print(json.dumps(use._asdict()), flush=True)
    watch.end()
    del held


if __name__ == "__main__":
    main()
