#!/usr/bin/env bash
# Methods compared on one GPU, ten minutes a call, without a network:
#
#   benchmarks/gpu_compare.sh OUT --data FOLDER [--wheels FOLDER] [--seconds 580] [-- --config.a=b …]
#
# `promptkd compare` of configs/compare.py:smollm2 with fewer steps, into OUT/comparison. The same
# command goes on where the last one was stopped, run by run and from its last checkpoint, until
# OUT/comparison/report.html is there: what is in OUT has to come along. By an estimate an H100 trains
# about 4 of the 18 runs (six methods, three seeds) in a call, so that 5 or 6 calls are needed.
#
#   --data      a folder with dolly/{train,dev,test}.jsonl and eval/{self_inst,vicuna,s_ni}.jsonl
#   --wheels    Python packages that the image lacks, as wheels, this one's own among them (pip wheel
#               --no-deps .); they are unpacked beside the repository's other caches
#   --seconds   of the call, after which it saves, for a minute at most
#   --          changes of the config, the same in every call, such as --config.seeds='(10,)'
#   PYTHON=…    the interpreter (python3)
set -euo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; }

python=${PYTHON:-python3} out='' data='' wheels='' seconds=580 changes=()
while (($#)); do
  case $1 in
    --data) data=${2:?--data needs a folder}; shift ;;
    --wheels) wheels=${2:?--wheels needs a folder}; shift ;;
    --seconds) seconds=${2:?--seconds needs a number}; shift ;;
    --) shift; changes=("$@"); break ;;
    -*) usage ;;
    *) [[ -z $out ]] || usage; out=$1 ;;
  esac
  shift
done
[[ -n $out && -n $data ]] || usage
mkdir -p "$out"
out=$(realpath "$out") data=$(realpath "$data")
[[ -z $wheels ]] || wheels=$(realpath "$wheels")
cd "$(dirname "$0")/.."

export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1
if [[ -n $wheels ]]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
    --target .cache/gpu/site "$wheels"/*.whl
  PYTHONPATH+=:$PWD/.cache/gpu/site
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
# `compare` measures in its own process while nothing is trained, and trains in another.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
export JAX_COMPILATION_CACHE_DIR=$PWD/.cache/benchmarks/compiled

status=0
# A second signal would end the training before it has saved.
timeout --foreground --signal=TERM --kill-after=60 "$seconds" \
  "$python" -m promptkd_jax compare --config "configs/compare.py:smollm2,data=$data" \
  --workdir "$out/comparison" \
  --config.methods="('seqkd', 'gkd', 'minillm', 'amid', 'promptkd', 'promptkd_amid')" \
  --config.pretraining.teacher.stages[0].steps=200 \
  --config.pretraining.student.stages[0].steps=300 \
  --config.budget.steps=60 \
  "${changes[@]}" || status=$?
trained=$(find "$out" -path "$out/comparison/runs/*/summary.json" | wc -l)
if ((status == 124 || status == 143)); then
  echo "stopped after $seconds seconds, $trained runs are trained; the same command goes on"
  exit 0
fi
exit "$status"
