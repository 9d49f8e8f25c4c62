#!/usr/bin/env bash
# The documentation site in build/docs, in the active environment: bash scripts/docs.sh
set -euo pipefail
cd "$(dirname "$0")/.."
sphinx-build -q -W docs build/docs
