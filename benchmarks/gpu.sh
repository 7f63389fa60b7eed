#!/usr/bin/env bash
# What waits for a GPU, each part in a process of its own: one that fails or hangs leaves the others a clean device. A training has
# all steps, with random weights.
#
#   benchmarks/gpu.sh                          every part, the shortest first
#   benchmarks/gpu.sh layers tests             some of them
#   MINUTES=5 OUT=folder benchmarks/gpu.sh     how long a part may take (default 60); where rows and what is printed go
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${OUT:-benchmarks/gpu}") runs=$(mktemp -d -p /tmp)  # gigabytes, of which nothing is kept
trap 'rm -rf "$runs"' EXIT
bench="-m benchmarks.bench" large="--rounds 5 --lora-bits 8"
train="train.py --weights random --steps 20 --batch 8 --calibration 8 --eval-n 4 --data $runs/prompts.txt"
parts="layers tests kernels tiny costs train sdxl flux train-sdxl train-flux"
declare -A command=(
  [layers]="-m benchmarks.gpu_layers" [tests]="-m pytest -q -m gpu" [kernels]="$bench kernels" [tiny]="$bench model --model tiny"
  [costs]="$bench costs" [train]="$bench train" [sdxl]="$bench model --model sdxl $large" [flux]="$bench model --model flux $large"
  [train-sdxl]="$train --model sdxl --out $runs/sdxl" [train-flux]="$train --model flux --out $runs/flux"
)
for name in "$@"; do
  [[ -v "command[$name]" ]] || { echo "gpu.sh: there is no part $name, there are $parts" >&2; exit 2; }
done
python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { echo "gpu.sh: torch finds no CUDA device" >&2; exit 2; }
mkdir -p "$out"
printf "%s red houses by a river\n" {0..15} > "$runs/prompts.txt"  # our own list takes minutes
for name in ${*:-$parts}; do
  rows=()
  [[ ${command[$name]} == "$bench"* ]] && rows=(--device cuda --json "$out/$name.json")
  echo "## python ${command[$name]} ${rows[*]}"
  rm -f "$out/$name.json"  # of an earlier run
  timeout -k 60 "${MINUTES:-60}m" python ${command[$name]} "${rows[@]}" > "$out/$name.txt" 2>&1
  said+="$name: exit code $? (124: out of time), $(tail -n 1 "$out/$name.txt")"$'\n'
  tail -n 40 "$out/$name.txt"
done
printf "\n## in short\n\n%s" "$said"
