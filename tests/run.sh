#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest: bash tests/run.sh -m "not slow"
# `bash tests/run.sh --all` runs the rare ones too.
# As root it also installs Debian's packages; without root the tests that need those that are missing skip.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/venv.sh" test

packages=(dataset-fashion-mnist slurm-wlm munge iproute2 chromium chromium-driver)
missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing+=("$package")
done
if [[ ${#missing[@]} -gt 0 && $EUID == 0 ]] && command -v apt-get >/dev/null; then
    echo "installing Debian's ${missing[*]}"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
        >/dev/null || echo "that failed; the tests that need ${missing[*]} will skip" >&2
elif [[ ${#missing[@]} -gt 0 ]]; then
    echo "not installed, so that the tests that need them skip: ${missing[*]} (as root: apt install ${missing[*]})" >&2
fi

# Three workers for the two cores of a small machine, because many tests wait; what shares something stays with one.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder "$@"
