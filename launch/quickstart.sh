#!/usr/bin/env bash
# From nothing to images: sets up .venv, then trains two clients on two ranks on the embedded images (preset mini).
# Flags are passed on to `fdiff train`, e.g. bash launch/quickstart.sh --method full
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" ""

export OMP_NUM_THREADS=1 # torchrun would say at length that it sets this
exec .venv/bin/torchrun --standalone --nproc_per_node 2 -m fdiff train --preset mini \
    --run.dir "runs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
