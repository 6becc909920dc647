#!/usr/bin/env bash
# Set up .venv, then compare method stacks on the embedded testbed. Arguments are overrides of `mitigate compare`:
#   bash scripts/run.sh 'stacks=[none,locore]' benchmark.limit=50
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment "" installed-run installed-dev
exec "$venv/bin/mitigate" compare "$@"
