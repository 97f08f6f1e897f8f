"""Runs every check and test of this repository and sums them up.

The static checks and the tests of the engine, the formats and the benchmarks run once; those of the host and those in a
browser run once for each ComfyUI. Tests run in processes of their own, two at a time: each keeps to one processor.
ComfyUI 0.3.75 out of the wheel is always among them. Ends with the line `N passed, N failed` (and `, N skipped`).
"""

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .hosts import CACHE, COMFYUI_PATH, Host, HostError, find_hosts, find_wheel_tree, read_host
from .pack import ROOT

REPORTS = CACHE / "test-reports"
TYPE_CHECK = CACHE / "type-check"
PACK_PACKAGES = ("streaming", "nodes")
SCRIPT_PACKAGES = ("scripts", "bench")
ENGINE_TESTS = "tests/engine"
FORMATS_TESTS = "tests/formats"
BENCH_TESTS = "tests/bench"
HOST_TESTS = "tests/host"
BROWSER_TESTS = "tests/browser"
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Has glibc take memory in large pages. On a processor a layer's weights are cast into memory that was just taken, and
clearing its pages one by one took the system longer than the layer took."""
KEPT_PAGES = {
    "GLIBC_TUNABLES": f"{LARGE_PAGES['GLIBC_TUNABLES']}"
    ":glibc.malloc.mmap_threshold=4294967296"
    ":glibc.malloc.trim_threshold=2147483648"
}
"""Has it keep them too when they are freed. Processes that run for long hold more of them than they use."""
SLOWEST = ("--durations=5", "--durations-min=10")
"""Has each run name what took it longest: what takes milliseconds on one processor took minutes on another."""
AT_A_TIME = 2
"""How many runs of tests share the machine: each takes one processor and, at its peak, 5 to 10 GiB."""


class Outcome(NamedTuple):
    """What one check or one run of tests found; `failed` counts errors too."""

    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float


def main() -> None:
    """Run everything, print a summary, and exit with status 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list-hosts", action="store_true", help="print the ComfyUI folders, oldest first, and stop")
    options = parser.parse_args()
    try:
        hosts = hosts_under_test()
    except HostError as error:
        sys.exit(f"layerstream: {error}")
    if options.list_hosts:
        print("\n".join(str(host.path) for host in hosts))
        return
    named = {host: {COMFYUI_PATH: str(host.path)} for host in hosts}
    # What takes longest begins first.
    runs = [partial(run_tests, host.name, HOST_TESTS, named[host]) for host in reversed(hosts)]
    # They look for hosts themselves and open each in a process of its own.
    all_named = {COMFYUI_PATH: os.pathsep.join(str(host.path) for host in hosts), **KEPT_PAGES}
    runs += [partial(run_tests, "bench", BENCH_TESTS, all_named), partial(run_tests, "engine", ENGINE_TESTS, {})]
    runs += [partial(run_tests, f"browser {host.version}", BROWSER_TESTS, named[host]) for host in hosts]
    runs.append(partial(run_tests, "formats", FORMATS_TESTS, {}))
    outcomes = [check("ruff", ["ruff", "check", "."]), check_types(), *side_by_side(runs)]
    sys.exit(summarise(outcomes))


def side_by_side(runs: Sequence[Callable[[], Outcome]]) -> list[Outcome]:
    """Do all `runs`, as many at a time as share the machine."""
    with ThreadPoolExecutor(min(AT_A_TIME, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda run: run(), runs))


def hosts_under_test() -> list[Host]:
    """The named or default hosts and the wheel's, each version once, oldest first."""
    wheel = find_wheel_tree()
    found = {host.name: host for host in ([read_host(wheel)] if wheel else [])}
    found |= {host.name: host for host in find_hosts()}
    return sorted(found.values(), key=lambda host: [int(part) for part in host.version.split(".") if part.isdigit()])


def check(name: str, arguments: list[str], environment: Mapping[str, str] | None = None) -> Outcome:
    """Run `python -m` with `arguments` from the repository's root; it passes if it exits with status 0.

    What it prints is shown when it ends: another check may run beside it.
    """
    print(f"... {name}", flush=True)
    begin = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    print(f"\n=== {name}: {' '.join(arguments)}\n{process.stdout}", end="", flush=True)
    passed = process.returncode == 0
    return Outcome(name, int(passed), int(not passed), 0, time.monotonic() - begin)


def check_types() -> Outcome:
    """Check the pack's packages as parts of `layerstream`, whose relative imports cross them, and those that use it."""
    TYPE_CHECK.mkdir(parents=True, exist_ok=True)
    package = TYPE_CHECK / "layerstream"
    if not package.is_symlink():
        package.symlink_to(ROOT, target_is_directory=True)
    names = [f"layerstream.{name}" for name in PACK_PACKAGES] + [n for n in SCRIPT_PACKAGES if (ROOT / n).is_dir()]
    packages = [argument for name in names for argument in ("-p", name)]
    return check(
        "mypy", ["mypy", "--config-file", str(ROOT / "pyproject.toml"), *packages], {"MYPYPATH": str(TYPE_CHECK)}
    )


def run_tests(name: str, folder: str, environment: Mapping[str, str]) -> Outcome:
    """Run the tests of `folder` with pytest and count its report."""
    report = REPORTS / f"{name}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    arguments = ["pytest", folder, f"--junitxml={report}", "-o", f"junit_suite_name={name}", *SLOWEST]
    run = check(name, arguments, {**LARGE_PAGES, **environment})
    counts = count_report(report)
    # Interrupted before its end, or nothing collected: no report, or one without failures, must not look like success.
    failed = counts["failures"] + counts["errors"] or run.failed
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return Outcome(name, passed, failed, counts["skipped"], run.seconds)


def count_report(report: Path) -> dict[str, int]:
    """Tests, failures, errors and skips in a JUnit report; zeros if there is none."""
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if report.is_file():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            for key in totals:
                totals[key] += int(suite.get(key, 0))
    return totals


def summarise(outcomes: list[Outcome]) -> int:
    """Print what each part found and the totals, and return the exit status."""
    print("\n=== summary")
    for outcome in outcomes:
        counts = f"{outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped"
        print(f"{outcome.name:<20} {counts} in {outcome.seconds:.0f} s")
    passed, failed, skipped = (sum(column) for column in list(zip(*outcomes, strict=True))[1:4])
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    main()
