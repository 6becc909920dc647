#!/usr/bin/env bash
# Set up .venv with the development tools, then run scripts/check: lint, types, docs and tests. Arguments go to it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment "[dev]" installed-dev
exec "$root/scripts/check" "$@"
