"""Runs a real ComfyUI server with this pack installed, for tests and the demo.

The server gets a folder of its own (models, custom nodes, output, user data) and a free port on the loopback device;
nothing of a person's ComfyUI is touched. Its output goes to a log file, whose end every error quotes.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .client import Client, ServerError
from .hosts import CACHE, Host, prepare_host
from .pack import ROOT

PACK_FOLDER = "ComfyUI-LayerStream"
"""The pack's folder under `custom_nodes`, and its name in `/extensions/...`."""

NOT_INSTALLED = (".git", ".venv", ".cache", "__pycache__", "output", "node_modules")
LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.25
LOG_TAIL_LINES = 40


@dataclass(frozen=True)
class Server:
    """A server that accepts prompts."""

    client: Client
    folder: Path
    log: Path
    process: subprocess.Popen[bytes]

    def add_models(self, models: Mapping[str, Path]) -> None:
        """Put files at their places under the models folder, in the stead of what lies there."""
        _link_models(models, self.folder)

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The last `lines` lines that the server printed."""
        return _tail(self.log, lines)


@contextmanager
def run_server(
    host: Host,
    models: Mapping[str, Path],
    *,
    arguments: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    packs: Sequence[Path] = (),
    port: int | None = None,
    pack: Path = ROOT,
    cache: Path = CACHE,
) -> Iterator[Server]:
    """Start `host`'s server, yield it when it accepts prompts, and stop it with everything it started.

    `models` maps places under the models folder (`vae/ae.safetensors`) to files. `arguments` follow the server's own
    command line; `environment` adds variables; `packs` are further custom nodes, files or folders; `port` is any free
    one by default; `pack` is where this pack lies. Without a GPU it runs with `--cpu`, and does as a GPU would what
    ComfyUI does otherwise there: weights stay in the file's bfloat16, and attention is torch's own.

    Raises:
        ServerError: the server ended or did not answer in time; the message ends with its log's last lines.
    """
    tree = prepare_host(host, cache)
    servers = cache / "servers"
    servers.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{host.name}-", dir=servers))
    try:
        _fill_folder(folder, models, pack, packs)
        with _process(tree, folder, arguments, environment or {}, port or _free_port()) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fill_folder(folder: Path, models: Mapping[str, Path], this_pack: Path, packs: Sequence[Path]) -> None:
    for name in ("custom_nodes", "models", "input", "output", "user"):
        (folder / name).mkdir()
    _link_models(models, folder)
    _link(this_pack, folder / "custom_nodes" / PACK_FOLDER)
    for pack in packs:
        _link(pack, folder / "custom_nodes" / pack.name)


def _link_models(models: Mapping[str, Path], folder: Path) -> None:
    for place, file in models.items():
        target = folder / "models" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        _link(file.resolve(), target)


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        # Windows lets only privileged users make links.
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_INSTALLED))
        else:
            shutil.copy2(source, target)


@contextmanager
def _process(
    tree: Path, folder: Path, arguments: tuple[str, ...], environment: Mapping[str, str], port: int
) -> Iterator[Server]:
    command = [sys.executable, "main.py", "--listen", LOOPBACK, "--port", str(port), "--disable-api-nodes"]
    command += ["--base-directory", str(folder)]
    command += ["--database-url", f"sqlite:///{(folder / 'user' / 'comfyui.db').as_posix()}"]
    if not torch.cuda.is_available():
        # Its other attention works in pieces as large as what RAM is free allows, and their size changes bits.
        command += ["--cpu", "--bf16-unet", "--use-pytorch-cross-attention"]
    command += arguments
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=tree,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A group of its own, so that stopping it stops its children too, and Ctrl-C reaches only us.
            start_new_session=True,
        )
    server = Server(Client(f"http://{LOOPBACK}:{port}"), folder, log, process)
    try:
        _wait_until_ready(server)
        yield server
    except ServerError as error:
        raise ServerError(f"{error}\n--- end of the server's log ---\n{server.log_tail()}") from error
    finally:
        stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        status = server.process.poll()
        if status is not None:
            raise ServerError(f"the server ended with status {status} before it was ready")
        try:
            server.client.get_json("/system_stats")
            return
        except ServerError:
            time.sleep(POLL_S)
    raise ServerError(f"the server did not answer within {START_TIMEOUT_S:.0f} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and everything it started; twice does no harm."""
    _signal_group(process, signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
    if os.name == "posix":
        # Children may outlive the leader; the group exists as long as one of them does.
        _signal_group(process, signal.SIGKILL)
    process.wait(STOP_TIMEOUT_S)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if sys.platform == "win32":
        process.terminate()
        return
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _tail(log: Path, lines: int) -> str:
    if not log.is_file():
        return "(no log)"
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
