#!/usr/bin/env bash
# Set up .venv with the development tools, then lint, types and tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment "[dev]" installed-dev
cd "$root"
ruff check .
ruff format --check .
mypy
exec python -m pytest -n 2 --dist worksteal "$@"
