#!/usr/bin/env bash
# A command in a pod that may be taken away: restartable.sh WORDS…
#
# Passes SIGTERM on. A run that was stopped has saved and ends with 143, also where another pod got
# the signal; then this script ends with 42, at which xpk's JobSet starts all pods again and the run
# continues. So it does when the command fails after a SIGTERM: pods that go away together fail by
# one another. Otherwise the exit status is the command's own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1-} in
  '' | -h | --help) usage && exit "$((!$#))" ;;
esac
status=0
run_beside "$@" || status=$?
if ((status == STOPPED)) || { [[ $told_to_stop ]] && ((status)); }; then exit 42; fi
exit "$status"
