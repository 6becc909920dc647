# Sourced by run.sh and test.sh: make .venv once, from pinned versions, and put it first on PATH.
# Needs python >= 3.11 and a package index; nothing else. A stamp makes a second start free.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "mitigate needs Python 3.11 or newer, and none was found: install one, or name it with PYTHON=/path/to/python3" >&2
    return 1
}

# prepare_environment EXTRAS STAMP...: EXTRAS is empty or "[dev]"; any STAMP that is current means there is nothing to do.
prepare_environment() {
    local extras="$1" python wanted stamp
    shift
    wanted="$(cat "$root/pyproject.toml" "$root/scripts/constraints.txt" | cksum) $root"
    for stamp in "$@"; do
        if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.$stamp" 2>/dev/null)" = "$wanted" ]; then
            export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
            return
        fi
    done
    if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)" || return 1
        echo "Creating .venv with $("$python" --version)" >&2
        "$python" -m venv "$venv" || {
            echo "python -m venv failed: install your system's venv package (Debian, Ubuntu: python3-venv)" >&2
            return 1
        }
    fi
    rm -f "$venv"/.installed-*
    echo "Installing pinned versions into .venv (once)" >&2
    # torch by itself first: its build (CPU or CUDA) is the index's choice and must not be decided by other requirements
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 || return 1
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c "$root/scripts/constraints.txt" -e "$root$extras" || return 1
    echo "$wanted" >"$venv/.$1"
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
}
