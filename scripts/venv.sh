# Sourced by the other scripts: `use_venv DIRECTORY EXTRAS` creates the virtual environment DIRECTORY once, installs
# this checkout with EXTRAS and the versions of constraints.txt into it, and activates it. Needs bash and
# python3 >= 3.10 with venv.

use_venv() {
    local directory=$1 extras=$2
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "hf-swd needs Python 3.10 or later; set PYTHON to one (now: $("$python" --version))" >&2
        return 1
    }
    [ -x "$directory/bin/python" ] || "$python" -m venv "$directory"
    # shellcheck disable=SC1091
    . "$directory/bin/activate"
    # torch first and by its exact version: a range would let pip choose the build with several GB of CUDA packages.
    pip install --quiet --disable-pip-version-check -c scripts/constraints.txt torch==2.13.0 setuptools
    pip install --quiet --disable-pip-version-check -c scripts/constraints.txt --no-build-isolation -e ".[$extras]"
}
