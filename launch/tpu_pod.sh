#!/usr/bin/env bash
# A command on all workers of a Cloud TPU slice, until it is done. From the root of the repository:
#
#   launch/tpu_pod.sh --name my-run --type v5litepod-64 --zone us-west4-a [--project P] [--spot]
#       [--runtime V] [--poll 30] [--delete-when-done] [--no-check] [--dry-run]
#       -- promptkd train --config configs/llama.py:student=7b --workdir gs://bucket/run
#   launch/tpu_pod.sh --name my-run --zone us-west4-a --stop     the run saves and ends; the slice stays
#   launch/tpu_pod.sh --name my-run --zone us-west4-a --delete   the slice; nothing is billed any more
#
# Has `promptkd plan` check the command for this slice, asks for the slice (a queued resource and its
# node, both called --name) or takes the one that is there, copies the working tree (what git tracks or would track, edits included), installs it,
# starts the command on every worker and shows the log of worker 0; those of the others are in
# ~/promptkd_run/log there. A preempted slice is deleted and asked for again, and the command, which
# continues from its bucket, started again; so it is where a signal of the machine stopped it.
# Otherwise the exit status of worker 0 decides.
#
# The run does not need this terminal: after Ctrl-C or a lost connection the same command follows it
# again. THE SLICE IS BILLED UNTIL IT IS DELETED.
#
#   --runtime V   software of the VMs; by default the one for the generation
#   --poll S      seconds between two looks at the state of the slice
#   --no-check    goes without the check, which needs promptkd here
#   --dry-run     checks, and prints the commands of a first launch; runs none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name='' type='' zone='' project='' runtime='' poll=30
spot='' delete='' delete_when_done='' stop=''
read_options "name type zone project runtime poll" "spot delete delete-when-done stop no-check" "$@"
[[ $name && $zone ]] || fail "--name and --zone are needed"
need_cloud_name 63 name
need_zone "$zone"
need_whole 0 poll
where=(--zone="$zone" ${project:+--project="$project"})
archive=${TMPDIR:-/tmp}/promptkd_jax-$name.tgz
worker='bash promptkd_jax/launch/tpu_worker.sh'

tpus() { run gcloud compute tpus "$@" "${where[@]}"; }

# on WORKER COMMAND
on() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }

remove() { tpus queued-resources delete "$name" --force --quiet; }

create() {
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" ${spot:+--spot}
}

default_runtime() {
  case $type in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5e-*) fail "--type $type: Google's name for it is v5litepod-${type#v5e-}" ;;
    *) fail "--type '$type' is none of v4-N, v5litepod-N, v5p-N, v6e-N: give its --runtime too" ;;
  esac
}

# What gcloud says, or ABSENT.
answer() {
  local errors
  errors=$(mktemp)
  if "$@" 2>"$errors"; then
    :
  elif grep -q NOT_FOUND "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
    return 1
  fi
}

# Sets state: ABSENT, READY, or what keeps the queued resource or its node from being ready. UNKNOWN
# where gcloud fails, if it has worked before.
assumed=(ABSENT READY) answered=''
read_state() {
  local resource=(gcloud compute tpus queued-resources describe "$name" "${where[@]}"
    --format='value(state.state)')
  local node=(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)')
  if [[ $dry_run ]]; then
    state=${assumed[0]} assumed=("${assumed[@]:1}")
    quoted "${resource[@]}"
    [[ $state == ABSENT ]] || quoted "${node[@]}"
    return
  fi
  state=$(answer "${resource[@]}") || state=UNKNOWN
  if [[ $state == ACTIVE ]]; then
    state=$(answer "${node[@]}") || state=UNKNOWN
    [[ $state != ABSENT ]] || state=NODE_DELETED
  fi
  [[ $state != UNKNOWN || $answered ]] || exit 1
  answered=yes
}

# Returns when the slice is ready.
obtain() {
  while true; do
    read_state
    case $state in
      READY) return ;;
      ABSENT) create ;;
      SUSPENDED | PREEMPTED | TERMINATED | NODE_DELETED)
        note "$name is $state: deleting it and asking for another"
        remove
        ;;
      FAILED)
        fail "the request $name FAILED (no quota, no capacity, no such type in $zone?). See" \
          "'gcloud compute tpus queued-resources describe $name ${where[*]}'; --delete removes it"
        ;;
      *)
        note "$name is $state; looking again in $poll s"
        sleep "$poll"
        ;;
    esac
  done
}

# Sets progress, of the command on worker 0: absent, running, ended STATUS, stopped (by --stop), or
# unreachable.
read_progress() {
  local words=(tpu-vm ssh "$name" --worker=0 --command="$worker status 2>/dev/null || echo absent")
  if [[ $dry_run ]]; then
    tpus "${words[@]}"
    progress=$1
  else
    progress=$(tpus "${words[@]}" | tail -n 1) || progress=unreachable
  fi
}

pack='git ls-files -z --cached --others --exclude-standard -- . :!runs | tar --create --gzip'
pack+=" --file=$archive --null --files-from=- --ignore-failed-read"

prepare() {
  run bash -o pipefail -c "$pack" &&
    tpus tpu-vm scp "$archive" "$name:promptkd_jax.tgz" --worker=all &&
    on all "mkdir -p promptkd_jax && tar -xzf promptkd_jax.tgz -C promptkd_jax && $worker install" &&
    on all "$worker start $(quoted "${program[@]}")"
}

finished() {
  [[ ! $workdir ]] || run gcloud storage ls "$workdir/summary.json"
}

# Whether the slice is gone; a preemption is seen with a delay.
lost() {
  for _ in 1 2 3; do
    read_state
    [[ $state == READY ]] || return 0
    sleep "$poll"
  done
  return 1
}

# leave STATUS MESSAGE
leave() {
  note "$2"
  if [[ $delete_when_done ]]; then
    remove
  elif [[ ! $dry_run ]]; then
    note "$name is billed until it is deleted: $0 --name $name ${where[*]} --delete"
  fi
  exit "$1"
}

if [[ $delete ]]; then
  remove
  exit
elif [[ $stop ]]; then
  on all "$worker stop"
  exit
fi

need_program
runtime=${runtime:-$(default_runtime)}
workdir=$(training_workdir)
need_bucket "the workers share no disk"
need_no_flags_of_processes
[[ -e setup.py ]] || fail "run this from the root of the repository: there is no setup.py in $PWD"
check_command --topology "$type"
trap 'note "the run goes on; the same command follows it again, --stop ends it"; exit 130' INT

lines=+1
while true; do
  obtain
  read_progress absent
  if [[ $progress != running ]]; then
    prepare || { lost && continue; } || leave 1 "the command could not be started, see above"
    lines=+1
  fi
  on 0 "$worker follow $lines" || true
  read_progress "ended 0"
  lines=10
  case $progress in
    running) continue ;; # only the connection broke
    "ended 0") finished && leave 0 "done" ;;
    stopped) leave $STOPPED "stopped before its end; the same command continues it" ;;
  esac
  lost && continue
  case $progress in
    "ended $STOPPED") note "the machine stopped the run, which has saved: starting it again" ;;
    "ended 0") leave 1 "worker 0 ended with status 0, but $workdir/summary.json cannot be seen" ;;
    ended*) leave "${progress#ended }" "worker 0 ended with status ${progress#ended }" ;;
    *) leave 1 "worker 0 cannot be reached, though $name is $state; the same command tries again" ;;
  esac
done
