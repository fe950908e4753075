#!/usr/bin/env bash
# Proves and measures everything on one GPU, in at most 300 s; what was done survives a kill.
#   bash tests/gpu.sh [--dry-run] [--only STEP,...] [--wheels FOLDER] OUT    steps: tests step profile run others
#   bash tests/gpu.sh --pack FOLDER    fills FOLDER, on a machine with a network, with all that a bare one lacks
# Needs a Python with torch, no network and no root. --wheels: what --pack made. --dry-run: tiny, on the CPU.
# Leaves a JSON file a step in OUT, a log, the run's grid, and a table, which is also printed last.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

declare -A limit_s=([tests]=60 [step]=70 [profile]=20 [run]=110 [others]=40)
steps=(tests step profile run others)
dry=() only= wheels= pack= out=

fail() { echo "tests/gpu.sh: $1" >&2; exit 2; }

while [[ $# -gt 0 ]]; do
    case $1 in
        --dry-run) dry=(--dry-run) limit_s=([tests]=200 [step]=200 [profile]=200 [run]=200 [others]=200) ;;
        --only | --wheels | --pack) [[ $# -gt 1 ]] || fail "$1 wants a value"; declare "${1#--}=$2"; shift ;;
        -*) fail "$1: no such flag; see the head of the file" ;;
        *) [[ -z $out ]] || fail "$1: one OUT is enough"; out=$1 ;;
    esac
    shift
done

pack_wheels() {  # into $pack: for Python 3.12, without torch and what comes with it
    mkdir -p "$pack/wheels" "$pack/fashion-mnist"
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest "$pack/wheels" \
        blake3 jsonargparse typeshed-client docstring-parser pytorch-fid submitit cloudpickle
    local source=/usr/share/datasets/fashion-mnist
    [[ -d $source ]] || fail "no $source; apt install dataset-fashion-mnist"
    cp "$source"/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz "$pack/fashion-mnist"
    local size_mib=$(($(du -sk "$pack" | cut -f1) / 1024))
    [[ $size_mib -le 60 ]] || fail "$pack takes $size_mib MiB, more than 60"
    echo "$pack: $(find "$pack/wheels" -name '*.whl' | wc -l) wheels, 4 files of Fashion-MNIST, $size_mib MiB"
}

if [[ -n $pack ]]; then pack_wheels; exit; fi
[[ -n $out ]] || fail "no OUT given; see the head of the file"
for step in ${only//,/ }; do [[ -n ${limit_s[$step]:-} ]] || fail "$step: no such step; there are ${steps[*]}"; done
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
data=()
if [[ -n $wheels ]]; then
    wheels=$(cd "$wheels" && pwd)
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/wheels/*.whl
    export PYTHONPATH=$PYTHONPATH:$site
    data=(--data "$wheels/fashion-mnist")
fi

failed=0
for step in "${steps[@]}"; do
    [[ -z $only || ",$only," == *",$step,"* ]] || continue
    status=0
    timeout --kill-after=5 "${limit_s[$step]}" \
        python3 -m tests.gpu "$step" "$out" "${limit_s[$step]}" "${dry[@]}" "${data[@]}" >>"$out/log.txt" 2>&1 ||
        status=$?
    if [[ $status == 124 || $status == 137 ]]; then  # what it has done is in its file
        echo "$step: cut off after ${limit_s[$step]} s"
    elif [[ $status != 0 ]]; then
        failed=1
        tail -5 "$out/log.txt"
        echo "$step: ended with status $status"
    fi
    grep "^$step: " "$out/log.txt" | tail -1 || true
done
python3 -m tests.gpu.table "$out" | tee "$out/table.md"
exit "$failed"
