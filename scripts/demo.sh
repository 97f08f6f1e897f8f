#!/usr/bin/env bash
# Shows on this machine that a model larger than its memory budget gives the same image when it is streamed.
#
#   bash scripts/demo.sh [--serve] [--host NAME|FOLDER] [--size narrow|full]
#
# Makes .venv on the first call. Uses the ComfyUI that COMFYUI_PATH names, or ~/comfy/ComfyUI, or installs one.
set -euo pipefail

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "${ROOT}"

make_environment
if [[ -z "${COMFYUI_PATH:-}" ]] && ! "${PY}" -m scripts.hosts "$@" >/dev/null 2>&1; then
    install_host_wheel
fi
host_path="$("${PY}" -m scripts.hosts "$@")"
install_host_requirements "${host_path}"
exec "${PY}" -m scripts.demo "$@"
