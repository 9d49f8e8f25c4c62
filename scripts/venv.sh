# Sourced by the other scripts: `use_venv DIRECTORY EXTRAS` creates the virtual environment DIRECTORY once, installs
# this checkout with EXTRAS and the versions of constraints.txt into it, and activates it. Needs bash and
# python3 >= 3.10 with venv. What pip prints goes to DIRECTORY/install.log, and is shown if it fails.
#
# HF_SWD_TORCH_INDEX says where torch comes from: the address of an index of PyTorch's builds, or `default` for pip's own
# index. Without it: PyTorch's builds for CPU on Linux without an NVIDIA driver, where pip's index would give gigabytes
# of CUDA packages; else pip's own.

use_venv() {
    local directory=$1 extras=$2
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "hf-swd needs Python 3.10 or later; set PYTHON to one (now: $("$python" --version))" >&2
        return 1
    }
    echo "Installing into $directory (its log: $directory/install.log) ..."
    [ -x "$directory/bin/python" ] || "$python" -m venv "$directory" || return
    # shellcheck disable=SC1091
    . "$directory/bin/activate"
    : >"$directory/install.log"
    local index=${HF_SWD_TORCH_INDEX:-} why="HF_SWD_TORCH_INDEX=${HF_SWD_TORCH_INDEX:-}"
    [ -n "$index" ] || _choose_torch_index
    [ "$index" != default ] || index=
    # torch first and by its exact version, of which pip prefers the build of an extra index (2.13.0+cpu).
    _pip_install "$directory" ${index:+--extra-index-url "$index"} torch==2.13.0 setuptools || return
    _pip_install "$directory" --no-build-isolation -e ".[$extras]" || return
    echo "torch $(python -c 'import torch; print(torch.__version__)') ($why)"
}

# Sets `index` and `why` of use_venv.
_choose_torch_index() {
    local cpu_builds=https://download.pytorch.org/whl/cpu
    index=default
    if [ "$(uname -s)" != Linux ]; then
        why="from pip's index"
    elif command -v nvidia-smi >/dev/null || [ -e /proc/driver/nvidia/version ]; then
        why="from pip's index, with CUDA: there is an NVIDIA driver; HF_SWD_TORCH_INDEX chooses another index"
    elif python -c "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)" \
        "$cpu_builds/torch/" >/dev/null 2>&1; then
        index=$cpu_builds
        why="for CPU: there is no NVIDIA driver; HF_SWD_TORCH_INDEX chooses another index"
    else
        why="from pip's index, since PyTorch's builds for CPU at $cpu_builds cannot be reached; HF_SWD_TORCH_INDEX \
chooses another index"
    fi
}

_pip_install() {
    local log=$1/install.log
    shift
    pip install --disable-pip-version-check -c scripts/constraints.txt "$@" >>"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        echo "pip install $* failed: above is the end of $log" >&2
        return 1
    }
}
