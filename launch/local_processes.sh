#!/usr/bin/env bash
# N processes with D virtual CPU devices each on this machine, to rehearse a pod on a laptop:
#
#   launch/local_processes.sh [--processes 2] [--devices 2] [--port P] [--logs DIR] [--grace 60]
#       [--dry-run] -- promptkd train --config … --workdir …
#
#   --processes N   stand for hosts
#   --devices D     of each, stand for its chips
#   --port P        of process 0, where the others find it; by default one that is free
#   --logs DIR      gets process_1.log, … (by default a new folder); process 0 has the terminal
#   --grace S       seconds that the others have to end once one has failed; then they are killed
#   --dry-run       prints the commands, runs none
#
# Ctrl-C and SIGTERM reach all processes as SIGTERM, at which a run saves and ends; a second one
# kills. The exit status is that of the first process to fail; else 130 or 143 where a signal stopped
# the run before its end; else 0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

processes=2 devices=2 port='' logs='' grace=60
read_options "processes devices port logs grace" "" "$@"
need_program
need_whole 1 processes devices
need_whole 0 grace
[[ ! $port ]] || need_whole 1 port
need_no_flags_of_processes
find_promptkd

# Below the ports that outgoing connections take.
free_port() {
  local candidate
  for _ in {1..50}; do
    candidate=$((20000 + RANDOM % 12000))
    (: <"/dev/tcp/localhost/$candidate") 2>/dev/null || break
  done
  echo "$candidate"
}

port=${port:-$(free_port)}
flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
running=() # process → its id

# start I [LOG]
start() {
  local words=(env JAX_PLATFORMS=cpu XLA_FLAGS="$flags" "${program[@]}"
    --coordinator "localhost:$port" --processes "$processes" --process "$1")
  if [[ $dry_run ]]; then
    quoted "${words[@]}"
  elif (($1 == 0)); then
    "${words[@]}" &
    running[0]=$!
  else
    "${words[@]}" >"$logs/process_$1.log" 2>&1 &
    running[$1]=$!
  fi
}

signal_all() { kill -"$1" "${running[@]}" 2>/dev/null || true; }

# stop_all STATUS: that this script ends with where the run stops before its end.
stop_all() {
  asked=$1
  note "asking all processes to stop; once more kills them"
  trap 'signal_all KILL' INT TERM
  signal_all TERM
}

# show_failure I STATUS
show_failure() {
  note "process $1 ended with status $2"
  (($1 == 0)) || sed "s/^/process $1: /" <(tail -n 20 "$logs/process_$1.log") >&2
}

early='' asked='' stopped=''
if [[ ! $dry_run ]]; then
  logs=${logs:-$(mktemp -d)}
  mkdir -p "$logs"
  note "process 0 of $processes is at localhost:$port; logs of the others: $logs"
  trap 'early=130' INT # until the ids of all are known
  trap 'early=143' TERM
  trap 'signal_all KILL' EXIT
fi
set -m # groups of their own: Ctrl-C reaches them through this script alone, and so once
for ((process = 0; process < processes; process++)); do
  start "$process"
done
set +m
if [[ ! $dry_run ]]; then
  trap 'stop_all 130' INT
  trap 'stop_all 143' TERM
  [[ ! $early ]] || stop_all "$early"
fi

first_failure='' deadline=''
while ((${#running[@]})); do
  sleep 0.2 &
  wait $! || true # unlike sleep itself, it lets a signal through at once
  for process in "${!running[@]}"; do
    kill -0 "${running[process]}" 2>/dev/null && continue
    status=0
    wait "${running[process]}" || status=$?
    unset "running[process]"
    ((status)) || continue
    if ((status == STOPPED)); then # it has saved, and the others do the same
      stopped=${asked:-$STOPPED}
    else
      show_failure "$process" "$status"
      first_failure=${first_failure:-$status}
    fi
    deadline=${deadline:-$((SECONDS + grace))}
  done
  if [[ $deadline ]] && ((SECONDS >= deadline && ${#running[@]})); then
    note "processes ${!running[*]} did not end within $grace s of that: killed"
    signal_all KILL
  fi
done
exit "${first_failure:-${stopped:-0}}"
