# `environment_ensure [EXTRA]` makes .venv in the current folder, a checkout, installs what is missing, and puts
# .venv/bin first on PATH. A second time takes no time: a stamp in .venv says what is there. To be sourced.

environment_say() { printf '[environment] %s\n' "$*" >&2; }

environment_find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    environment_say "Python 3.11 or 3.12 is needed, and none of python3, python3.12, python3.11, python is one of them" \
        "(python3 is $(python3 --version 2>&1 || true)); install one, or name it: PYTHON=/path/to/python3.12"
    return 2
}

environment_make() { # folder of a new virtual environment
    local python
    python=$(environment_find_python) || return
    "$python" -c 'import ensurepip, venv' 2>/dev/null || {
        environment_say "$python has no venv module; on Debian and Ubuntu: apt install python3-venv"
        return 2
    }
    environment_say "making .venv with $("$python" --version)"
    "$python" -m venv --clear "$1"
}

environment_pip() { # errors alone are heard
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore .venv/bin/python -m pip -qq "$@"
}

# Without a GPU PyTorch's CPU build is wanted: the standard one for Linux brings several GB of CUDA libraries.
# The index in use may offer it (its version ends in "+cpu"); PyTorch's own index does.
environment_install_torch() {
    local torch cpu_index=https://download.pytorch.org/whl/cpu
    torch=$(grep '^torch==' tests/constraints.txt)
    if .venv/bin/python -c 'import torch' 2>/dev/null; then
        return # chosen before; the constraints say below whether it will do
    elif nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
        environment_say "NVIDIA GPU found: installing $torch with CUDA"
    elif environment_pip install --dry-run --no-deps --report - "$torch" 2>/dev/null | grep -q '"version": "[0-9.]*+cpu"'; then
        environment_say "no GPU: installing the CPU build of $torch"
    elif environment_pip install --dry-run --no-deps --index-url "$cpu_index" --retries 0 --timeout 3 "$torch" 2>/dev/null; then
        environment_say "no GPU: installing the CPU build of $torch from $cpu_index"
        environment_pip install --index-url "$cpu_index" "$torch"
        return
    else
        environment_say "no GPU, but no CPU build of $torch within reach: installing the standard build (several GB)"
    fi
    environment_pip install "$torch"
}

environment_install() { # extra
    local began=$SECONDS
    environment_pip install --upgrade pip setuptools wheel || return
    environment_install_torch || return
    environment_say "installing deepspeed and the other requirements${1:+, those of the extra \"$1\" among them}"
    # No build isolation: a source package that wants torch at build time would fetch a second one.
    environment_pip install --no-build-isolation --constraint tests/constraints.txt --editable ".${1:+[$1]}" || return
    environment_say "installed in $((SECONDS - began)) s"
}

environment_ensure() { # extra
    local extra=${1:-} root key stamps
    root=$(pwd -P)
    # The scripts of a virtual environment name its folder: a moved one is of no use.
    if [ ! -x .venv/bin/python ] ||
        { grep -qs '^command = ' .venv/pyvenv.cfg && ! grep -q "^command = .* $root/.venv\$" .venv/pyvenv.cfg; }; then
        environment_make "$root/.venv" || return
    fi
    key=$(cat setup.py tests/constraints.txt tools/environment.sh | sha256sum)
    stamps=(.venv/installed-"${extra:-}"*) # without an extra, what was installed with one will do
    if ! grep -qsxF "$key" "${stamps[@]}"; then
        command -v g++ >/dev/null || environment_say \
            "warning: no C++ compiler (g++): kernels run in plain torch, and DeepSpeed's CPU offload cannot be built;" \
            "on Debian and Ubuntu: apt install g++"
        rm -f .venv/installed-*
        environment_install "$extra" || {
            environment_say "the installation failed"
            return 1
        }
        echo "$key" >".venv/installed-${extra:-base}"
    fi
    export PATH="$root/.venv/bin:$PATH"
}
