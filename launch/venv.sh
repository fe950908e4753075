# shellcheck shell=bash
# Sourced with the names of extras: makes .venv in the checkout, if it is not there, and installs fdiff into it.
# Leaves the checkout as the working folder. What has been installed once is not installed again.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "fdiff needs Python 3.11 or newer; $(python3 --version 2>/dev/null || echo 'python3 is missing')" >&2
    exit 1
fi
installed=.venv/.fdiff-extras-${1:-none}
if [[ ! $installed -nt setup.py ]]; then
    echo "installing fdiff and what it needs into .venv (torch is large: some minutes)"
    if [[ ! -x .venv/bin/pip ]] && ! python3 -m venv .venv; then
        echo "python3 cannot make virtual environments; on Debian: apt install python3-venv" >&2
        exit 1
    fi
    .venv/bin/pip install --quiet --editable ".${1:+[$1]}"
    touch "$installed"
fi
