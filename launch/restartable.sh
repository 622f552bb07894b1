#!/usr/bin/env bash
# A command in a pod that may be taken away: restartable.sh WORDS…
#
# Passes SIGTERM on; a command that got one ends with 42, at which xpk's JobSet starts all pods again
# and the run continues. Otherwise the exit status is the command's own.
set -euo pipefail

asked='' child='' status=0
trap 'asked=yes; [[ ! $child ]] || kill -TERM "$child"' TERM
"$@" &
child=$!
until
  status=0
  wait "$child" || status=$?  # also of a child that has ended already; a signal ends it early
  ! kill -0 "$child" 2>/dev/null
do :; done
[[ ! $asked ]] || exit 42
exit $status
