#!/usr/bin/env bash
# All GPUs of this machine, in one process:
#
#   launch/local_gpu.sh [--memory 0.92] [--dry-run] -- promptkd train --config … --workdir …
#
#   --memory F   share of each GPU's memory that JAX takes at the start (JAX's own default is 0.75)
#   --dry-run    prints the commands, runs none
#
# CUDA_VISIBLE_DEVICES chooses among the GPUs; XLA_FLAGS of yours come last and win. The mesh is the
# config's, all GPUs on `data`; for models that do not fit one GPU add
# --config.mesh.data=1 --config.mesh.fsdp=-1.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

memory=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
read_options "memory" "" "$@"
need_program
[[ $memory =~ ^(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)$ ]] || fail "--memory $memory is no share, above 0 and at most 1"
find_promptkd

# The network between GPUs works while they compute. The rest of XLA's GPU defaults suit; a flag
# that the installed jaxlib does not know ends the process, so there are no others here.
flags="--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}"

run nvidia-smi -L || fail "nvidia-smi finds no GPU here; without one run the command after -- by itself"
note "XLA_PYTHON_CLIENT_MEM_FRACTION=$memory XLA_FLAGS=$flags"
# Without a job JAX does not take this process for a Slurm task, which would get one GPU only.
become env --unset=SLURM_JOB_ID XLA_PYTHON_CLIENT_MEM_FRACTION="$memory" XLA_FLAGS="$flags" "${program[@]}"
