#!/bin/bash
# The training step on a GPU, for a machine with neither network nor lerobot: checks, then a table, in ten minutes.
#
#   benchmarks/gpu_suite.sh --collect          where this project is installed (.venv) and python3 is 3.12, with its pip
#                                              and a network: wheels to .wheels/
#   benchmarks/gpu_suite.sh [gpu_suite.py's]   on the GPU machine, from a copy of the project with .wheels/ in it
#
# Taken to be on the GPU machine already, since they are large: Python 3.12 with torch, triton, torchvision, Pillow, numpy,
# pandas, pyarrow and OpenCV. Everything else that `pusht_act.training.train_step` and stock's step import is carried,
# 64 MiB at most.
set -euo pipefail
cd "$(dirname "$0")/.."
WHEELS=.wheels
MOST_MIB=60

if [ "${1:-}" = --collect ]; then
  rm -rf "$WHEELS"
  mkdir "$WHEELS"
  PYTHONPATH="$PWD" .venv/bin/python benchmarks/gpu_suite.py --list-packages >"$WHEELS/requirements.txt"
  python3 -m pip wheel --quiet --no-deps --wheel-dir "$WHEELS" --requirement "$WHEELS/requirements.txt"
  rm "$WHEELS/requirements.txt"
  size=$(du -sm "$WHEELS" | cut -f1)
  echo "$(find "$WHEELS" -name '*.whl' | wc -l) wheels, $size MiB in $WHEELS/"
  if [ "$size" -gt "$MOST_MIB" ]; then
    echo "more than $MOST_MIB MiB: take what is large for granted instead (ASSUMED in gpu_suite.py)" >&2
    exit 1
  fi
  exit
fi

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
PYTHONPATH="$PWD:$site" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 python3 benchmarks/gpu_suite.py "$@"
