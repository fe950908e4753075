#!/usr/bin/env bash
# The fast tests under the oldest torch that fdiff takes and under the newest, and what Python 3.12 would install.
# bash tests/versions.sh [--torch 2.11|newest|none]... [--python COMMAND] [FOLDER]
# By default both, with python3; none: only what Python 3.12 would install, and whether it compiles the sources.
# Makes an environment a torch (6 GB, minutes) in FOLDER, by default a temporary one, removed at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

declare -A pins=([2.11]="torch==2.11.* torchvision==0.26.*" [newest]="torch torchvision")
wanted=() folder= python=python3
while [[ $# -gt 0 ]]; do
    case $1 in
        --torch) [[ $2 == none || -n ${pins[$2]:-} ]] || { echo "--torch: 2.11, newest or none, not $2" >&2; exit 2; }
            wanted+=("$2"); shift 2 ;;
        --python) python=$2; shift 2 ;;
        -*) echo "$1: no such flag; see the head of $0" >&2; exit 2 ;;
        *) folder=$1; shift ;;
    esac
done
[[ ${#wanted[@]} -gt 0 ]] || wanted=(2.11 newest)
[[ -n $folder ]] || { folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; }
mkdir -p "$folder"

run_fast_tests() {  # under the torch of that name
    local venv=$folder/torch-$1 status=0
    [[ -x $venv/bin/pip ]] || "$python" -m venv "$venv"
    # torch and torchvision are asked for in one call: each release of the one fits one of the other.
    # shellcheck disable=SC2086
    "$venv/bin/pip" install --quiet --no-cache-dir --editable '.[test]' ${pins[$1]}
    "$venv/bin/python" -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")'
    "$venv/bin/python" -m pytest -q -m "not slow and not gpu" || status=$?
    echo "torch $1: the fast tests $([[ $status == 0 ]] && echo pass || echo FAIL)"
    return "$status"
}

resolve_wheels() {  # for Python 3.12, with the torch of that name; downloads metadata only
    # shellcheck disable=SC2086
    python3 -m pip install --quiet --dry-run --ignore-installed --python-version 3.12 --only-binary=:all: \
        --target "$folder/none" --report "$folder/wheels.json" '.[test]' ${pins[$1]} 2>"$folder/wheels.log" ||
        { cat "$folder/wheels.log" >&2; return 1; }
    python3 - "$folder/wheels.json" <<'PYTHON'
import json, sys
wheels = [i["download_info"]["url"] for i in json.load(open(sys.argv[1]))["install"] if i["metadata"]["name"] != "fdiff"]
assert all(url.endswith(".whl") for url in wheels), [url for url in wheels if not url.endswith(".whl")]
torch, = (url.rsplit("/", 1)[1] for url in wheels if "/torch-" in url)
print(f"Python 3.12: all {len(wheels)} packages resolve to wheels, {torch} among them")
PYTHON
}

compile_sources() {  # by Python 3.12 if there is one; else by its grammar, and held against what it took away
    local compiler=python3
    ! python3.12 -c "" 2>/dev/null || compiler=python3.12
    "$compiler" -W error - <<'PYTHON'
import ast, pathlib, platform, subprocess

files = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True).stdout.split()
gone = {"asynchat", "asyncore", "distutils", "imp", "smtpd"}
for file in files:
    tree = ast.parse(source := pathlib.Path(file).read_text(encoding="utf-8"), file, feature_version=(3, 12))
    compile(source, file, "exec")
    imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert not gone & {name.split(".")[0] for name in imported}, file
print(f"Python 3.12: {len(files)} sources compile (found out by Python {platform.python_version()})")
PYTHON
}

failed=0
compile_sources || failed=1
resolve_wheels 2.11 || failed=1
resolve_wheels newest || failed=1
for torch in "${wanted[@]}"; do
    [[ $torch == none ]] || run_fast_tests "$torch" || failed=1
done
exit "$failed"
