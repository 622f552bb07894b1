#!/usr/bin/env bash
# What ten minutes at one GPU show, without a network:
#
#   benchmarks/gpu.sh OUT [--wheels FOLDER] [--seconds 580] [--rehearse]
#
# Writes OUT/gpu.json after every part and every side of it, and OUT/gpu.log. The same command goes
# on with what is missing there. benchmarks/README.md says what the parts are.
#
#   --wheels    Python packages that the image lacks, as wheels; they are unpacked beside the
#               repository's other caches, and nothing is installed
#   --seconds   of all parts together
#   --rehearse  the same on the CPU, with models of some hundred thousand parameters
#   PYTHON=…    the interpreter (python3)
set -euo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; }

python=${PYTHON:-python3} out='' wheels='' seconds=580 rehearse=''
while (($#)); do
  case $1 in
    --wheels) wheels=${2:?--wheels needs a folder}; shift ;;
    --seconds) seconds=${2:?--seconds needs a number}; shift ;;
    --rehearse) rehearse=yes ;;
    -*) usage ;;
    *) [[ -z $out ]] || usage; out=$1 ;;
  esac
  shift
done
[[ -n $out ]] || usage
mkdir -p "$out"
out=$(realpath "$out")
[[ -z $wheels ]] || wheels=$(realpath "$wheels")
cd "$(dirname "$0")/.."

export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1
if [[ -n $wheels ]]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
    --target .cache/gpu/site "$wheels"/*.whl
  PYTHONPATH+=:$PWD/.cache/gpu/site
fi
if [[ -n $rehearse ]]; then
  cases=rehearsal of='rehearsal of '
  export JAX_PLATFORMS=cpu PROMPTKD_REHEARSE_GPU=1 OMP_NUM_THREADS=1
else
  cases=gpu of=''
  # The CPU too: tests compare with its numbers. Without a GPU JAX refuses.
  export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false
  # One process at a time may have nearly all of the memory.
  export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
  export XLA_FLAGS=${XLA_FLAGS-} # not those that make tests on a CPU quick
fi
export JAX_COMPILATION_CACHE_DIR=$PWD/.cache/benchmarks/compiled

part() { printf '%s %s' "$1" "$2"; printf ' %q' "$python" "${@:3}"; echo; }
bench() { part "$1" "$2" benchmarks/bench.py --cases "$cases" --output "$out/gpu.json" "${@:3}"; }
spots() { part "$1" "$2" benchmarks/hotspots.py --cases "$cases" "${@:3}"; }
list() {
  bench seen 60 --only seen
  part tests 220 -m pytest -p no:cacheprovider --no-header -vv -rA --tb=short tests/runs/test_gpu.py
  bench xl 220 --missing --case "${of}GPT-2 XL into base" --sides ours theirs \
    --parts iteration rollout update matmul stream
  bench rollout 120 --missing \
    --case "${of}GPT-2 base writes 256 rows" "${of}GPT-2 base writes 64 rows"
  spots rollout-spots 60 --case "${of}GPT-2 base writes 64 rows" --part rollout
  bench llama 260 --missing --case "${of}Llama 3B into 1B" --sides ours theirs \
    --parts iteration rollout update matmul stream --repeats 2
  spots update-spots 60 --case "${of}GPT-2 XL into base" --part update
}
# In place of this shell, so that a signal reaches who knows what runs.
exec "$python" benchmarks/parts.py "$out/gpu.json" --seconds "$seconds" < <(list)
