#!/usr/bin/env bash
# Builds the wheel and the sdist into FOLDER (default dist) and checks them: bash scripts/package.sh [FOLDER]
# Needs the extra "quality", a git checkout, and the package index for the build's own environment.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-dist}"
rm -rf "$folder"
python -m build --outdir "$folder"
ls "$folder"/hf_swd-*-py3-none-any.whl "$folder"/hf_swd-*.tar.gz
twine check --strict "$folder"/*
check-manifest
# There is no common e-mail address of all contributors.
pyroma --min 10 --skip-tests AuthorEmail,CheckManifest .
