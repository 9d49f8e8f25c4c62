#!/usr/bin/env bash
# Style and types, in the active environment: bash scripts/quality.sh
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy
pyright --pythonpath "$(command -v python)"
