# Installs what tests/javascript/package.json names, where there is npm: OpenAI's client for JavaScript and, for a Linux
# machine without a browser, a Chromium. Sourced by scripts/test; the tests that need what is missing are left out.

need_javascript() {
    local folder="$ROOT/tests/javascript" optional=--omit=optional
    if ! command -v npm >/dev/null || [ ! "$folder/package.json" -nt "$folder/node_modules" ]; then
        return
    fi
    if [ "$(uname -sm)" = "Linux x86_64" ] && ! "$PY" -m tests.support.browser; then
        optional=--include=optional
    fi
    echo "installing the packages of tests/javascript (once; later runs skip this)" >&2
    if ! npm install --prefix "$folder" "$optional" --no-package-lock --no-audit --no-fund --fetch-retries=1 --fetch-timeout=120000 --loglevel=error >&2; then
        echo "npm could not install them; see its message above" >&2
    elif [ "$optional" = --include=optional ]; then
        unpack_chromium "$folder"
    fi
}

# Leaves the program in $1/node_modules/.chromium: its package unpacks it into the folder for temporary files.
unpack_chromium() {
    local place="$1/node_modules/.chromium"
    mkdir "$place"
    if ! (cd "$1" && TMPDIR="$place" node -e 'import("@sparticuz/chromium").then((it) => it.default.executablePath())') ||
        ! "$place/chromium" --version >/dev/null; then
        echo "the Chromium of npm doesn't run here; Debian's and Ubuntu's package chromium brings what it lacks" >&2
        rm -r "$place"
    fi
}
