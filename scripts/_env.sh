# Makes the environment .venv at the project's root from nothing but Python and the package registry.
# Sourced by the other scripts; `need_env EXTRAS` (EXTRAS may be empty) leaves the interpreter's path in $PY.
# A run with nothing to do only compares a hash.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PY="$ROOT/.venv/bin/python"
# Python compiles a module when it is first imported, and keeps that: pip would compile thousands that nothing imports.
unset PYTHONDONTWRITEBYTECODE

fits() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))' >/dev/null 2>&1
}

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if fits "$name"; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python between 3.10 and 3.14 found; install one and run this again" >&2
    return 1
}

need_env() {
    local extras="$1" base want
    # The stamp names the folder too: an environment copied or moved with its project points to the old place.
    want="$ROOT $(cksum <"$ROOT/pyproject.toml")"
    if fits "$PY" && [ "$(cat "$ROOT/.venv/made-for-[$extras]" 2>/dev/null)" = "$want" ]; then
        return
    fi
    if ! fits "$PY"; then
        base="$(find_python)" || return 1
        echo "making .venv with $("$base" --version)" >&2
        if ! "$base" -m venv --clear "$ROOT/.venv" >&2; then
            echo "error: '$base -m venv' failed; on Debian and Ubuntu install the package python3-venv" >&2
            return 1
        fi
    fi
    echo "installing mlx_mtp${extras:+ with the extra $extras} into .venv (once; later runs skip this)" >&2
    if ! "$PY" -m pip install --quiet --disable-pip-version-check --no-compile --editable "$ROOT${extras:+[$extras]}" >&2; then
        echo "error: pip could not install the project; see its message above" >&2
        return 1
    fi
    echo "$want" >"$ROOT/.venv/made-for-[$extras]"
    # Whatever has an extra has the plain package as well.
    echo "$want" >"$ROOT/.venv/made-for-[]"
}
