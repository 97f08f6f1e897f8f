"""Gives each ComfyUI the browser part that its requirements name, whichever is installed.

A ComfyUI serves the installed `comfyui-frontend-package`, which can be of one version only. The other is downloaded
once and kept unpacked.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .hosts import CACHE, Host, HostError, prepare_host

PACKAGE = "comfyui-frontend-package"
STATIC = Path("comfyui_frontend_package") / "static"


def frontend_arguments(host: Host, cache: Path = CACHE) -> tuple[str, ...]:
    """What `host`'s server must be told to serve its own browser part; nothing where that one is installed.

    Raises:
        HostError: it is not installed and cannot be downloaded.
    """
    version = wanted_version(host)
    try:
        if version in (None, importlib.metadata.version(PACKAGE)):
            return ()
    except importlib.metadata.PackageNotFoundError:
        pass
    folder = cache / "frontends" / str(version)
    if not (folder / STATIC / "index.html").is_file():
        _download(f"{PACKAGE}=={version}", folder)
    return ("--front-end-root", str(folder / STATIC))


def wanted_version(host: Host) -> str | None:
    """The version that the host's requirements pin, None where they pin none."""
    requirements = (prepare_host(host) / "requirements.txt").read_text(encoding="utf-8")
    match = re.search(rf"^{PACKAGE}==(\S+)", requirements, re.MULTILINE)
    return match.group(1) if match else None


def _download(requirement: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", downloads, requirement]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(downloads).glob("*.whl"))
        if process.returncode != 0 or not wheels:
            raise HostError(f"cannot download {requirement}, which this ComfyUI's requirements name: {process.stderr}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(folder)
