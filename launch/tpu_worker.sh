#!/usr/bin/env bash
# One worker of a TPU slice. tpu_pod.sh calls it there over ssh:
#
#   tpu_worker.sh install        the environment
#   tpu_worker.sh start WORDS…   runs a command that outlives the connection
#   tpu_worker.sh follow LINES   shows the last LINES of its log (+1: all) and what comes, to its end
#   tpu_worker.sh status         says "absent", "running", "ended STATUS", or "stopped": by `stop`
#   tpu_worker.sh stop           asks it to save and end
#
# The log is ~/promptkd_run/log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
here=$HOME/promptkd_run

alive() { [[ -e $here/pid ]] && kill -0 "$(<"$here/pid")" 2>/dev/null; }

# note_down FILE WORDS…: whoever reads the file sees all of the words or no file.
note_down() {
  echo "${@:2}" >"$here/$1.new"
  mv "$here/$1.new" "$here/$1"
}

# What `start` leaves behind: runs the words, passes SIGTERM on to them, and notes how they end.
work() {
  local status=0
  trap 'note_down status "ended $STOPPED"; exit $STOPPED' TERM # until the command is there
  note_down pid $$
  run_beside "$@" || status=$?
  note_down status "ended $status"
}

case ${1:-} in
  install) # Ubuntu 22.04 has Python 3.10; uv brings 3.12
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
    python3 -m uv pip install --quiet --python .venv/bin/python --constraint requirements/lock.txt --editable '.[tpu]'
    ;;
  start)
    program=("${@:2}")
    find_promptkd
    # What an earlier start left would keep the TPU; it may be ending this very moment.
    if alive; then kill -KILL -- "-$(<"$here/pid")" 2>/dev/null || true; fi
    rm -rf "$here"
    mkdir "$here"
    setsid bash launch/tpu_worker.sh work "${program[@]}" </dev/null >"$here/log" 2>&1 &
    while [[ ! -e $here/pid ]] && kill -0 $! 2>/dev/null; do sleep 0.1; done # `stop` reads it
    ;;
  work) work "${@:2}" ;;
  follow)
    while [[ ! -e $here/status ]] && alive; do sleep 0.2; done &
    tail --lines="$2" --follow=name --sleep-interval=0.2 --pid=$! "$here/log"
    ;;
  status)
    if [[ -e $here/status ]]; then
      ended=$(<"$here/status")
      if [[ $ended == "ended $STOPPED" && -e $here/stop ]]; then echo stopped; else echo "$ended"; fi
    elif [[ ! -e $here/pid ]]; then
      echo absent
    elif alive; then
      echo running
    else
      echo "ended 1" # with the machine
    fi
    ;;
  stop)
    alive || fail "no command is running here"
    touch "$here/stop"
    kill -TERM "$(<"$here/pid")" 2>/dev/null || true # where it has not just ended
    ;;
  *) usage ;;
esac
