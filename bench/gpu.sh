#!/usr/bin/env bash
# What a GPU with 80 GB has to show, in calls of at most 8 minutes each: bash bench/gpu.sh N, N
# from 1 to 7. JPEGs for call 5 in $DATA. Results: $OUT/gpu-N*.json, of which
# `python -m bench table gpu-*.json` makes the rows of docs/performance.md.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${LIMITED:-}" ] || LIMITED=1 exec timeout 480 bash bench/gpu.sh "$@"
out=${OUT:-.}
step() {
    python -m bench step "$1" --batch_size_per_gpu "$2" --precision bf16 --steps 30 \
        --json "$out/gpu-$3.json" "${@:4}"
}
attention() {
    python -m bench attention "$1" --batch_size_per_gpu "$2" --precision bf16 --steps 30 \
        --json "$out/gpu-$3.json"
}
# A GPU of 80 GB holds 80e9 bytes, 74.5 times 2**30. What ours needs is estimated by, for example,
# python -m bench plan dino_vits16 --batch_size_per_gpu 448 --gpus 1 --precision bf16
# as 64 of them in call 2, 60 in call 4, 69 in call 6. The versions in calls 3 and 7 are counted
# by tests/bench/test_table.py: 36 and 47 for the plain ones. Compiling saves some of all these;
# buffers of single operations come to them.
#
# All versions are timed by turns, so there is nothing to write before the last turn: a call that
# is cut off after 8 minutes leaves no JSON of the step that was running. Give fewer --steps then.
case ${1:?which call, 1 to 7} in
1)  pytest -m gpu
    attention dino_vits16 512 1s
    attention dinov2_vitl14 64 1l ;;
2)  step dino_vits16 448 2 ;;
3)  step dino_vits16 256 3 --plain --without each ;;
4)  step dinov2_vitl14 64 4 ;;
5)  step dino_vits16 448 5 --data "folder:${DATA:?a folder of JPEGs}" --num_workers 16
    python -m bench data dino_vits16 --data "folder:$DATA" --json "$out/gpu-5d.json" ;;
6)  step dinov2_vitg14 24 6 ;;
7)  step dinov2_vitl14 32 7 --plain --without each ;;
esac
