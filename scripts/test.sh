#!/usr/bin/env bash
# Runs every check of this repository: ruff, mypy, the engine's tests, and the host tests in each ComfyUI found.
#
#   bash scripts/test.sh
#
# Makes .venv on the first call and always installs ComfyUI 0.3.75 in it; tests ~/comfy/ComfyUI too, or what COMFYUI_PATH
# names, where they exist. The last line reads "N passed, N failed"; the exit status is 0 only when none failed.
set -euo pipefail

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "${ROOT}"

make_environment
install_once test-tools -r requirements-test.txt
install_host_wheel
host_paths=()
# Not a pipe: a failure to list them must stop this script.
listed="$("${PY}" -m scripts.test --list-hosts)"
while IFS= read -r line; do
    host_paths+=("${line}")
done <<<"${listed}"
install_host_requirements "${host_paths[@]}"
exec "${PY}" -m scripts.test
