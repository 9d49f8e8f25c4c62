#!/usr/bin/env bash
# The test suite in a virtual environment of its own: bash scripts/test.sh [--all] [pytest arguments]
# --all adds the long variants (marker "slow"). HF_SWD_VENV names another folder for the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/venv.sh
. scripts/venv.sh
use_venv "${HF_SWD_VENV:-.venv-test}" "test,deepspeed"

if [ "${1:-}" = "--all" ]; then
    export PYTEST_ADDOPTS="-m 'not gpu'"
    shift
fi
# DeepSpeed compiles its CPU kernels at first use; a build that is cut off leaves a lock behind, so keep it to this
# environment.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VIRTUAL_ENV/torch_extensions}"
export HF_SWD_TEST_COMPLETE=1
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
python -m pytest -n 2 --dist loadfile --ignore tests/distributed
# These start two and four processes themselves.
python -m pytest tests/distributed
