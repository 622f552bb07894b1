# shellcheck shell=bash
# What the launch scripts share: their options, --dry-run, checks, where `promptkd` is, and a command
# that gets the signals of its script.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
  exit 1
}

program=() # the words after --
# The exit status of a run that SIGTERM stopped and that saved: the same command continues it.
# shellcheck disable=SC2034 # scripts read it
readonly STOPPED=143
dry_run=

note() { echo "launch: $*" >&2; }

fail() {
  note "$*"
  exit 1
}

# The comment at the top of the script.
usage() { sed -n '2,/^[^#]/ { s/^# //p; s/^#$//p; }' "$0"; }

# read_options "VALUES" "SWITCHES" "$@": sets a variable for each option given (--tpu-type x sets
# tpu_type=x, --spot sets spot=yes), and program.
read_options() {
  local _values=" $1 " _switches=" $2 dry-run " _name # no option has such a name
  shift 2
  while (($#)); do
    _name=${1#--}
    if [[ $1 == -- ]]; then
      program=("${@:2}")
      return
    elif [[ $1 == -h || $1 == --help ]]; then
      usage
      exit 0
    elif [[ $1 == --*=* && $_values == *" ${_name%%=*} "* ]]; then
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
    elif [[ $1 == --* && $_values == *" $_name "* ]]; then
      (($# > 1)) || fail "--$_name needs a value"
      printf -v "${_name//-/_}" %s "$2"
      shift 2
    elif [[ $1 == --* && $_switches == *" $_name "* ]]; then
      printf -v "${_name//-/_}" yes
      shift
    else
      fail "no option '$1' here (the command to run comes after --); --help lists them"
    fi
  done
}

# need_whole MINIMUM NAMES…: each option has a whole number, at least that.
need_whole() {
  local _option _value # no option has such a name
  for _option in "${@:2}"; do
    _value=${_option//-/_} _value=${!_value}
    if [[ ! $_value =~ ^[0-9]{1,9}$ ]] || ((10#$_value < $1)); then
      fail "--$_option $_value is not a whole number, at least $1"
    fi
  done
}

# need_cloud_name LENGTH NAMES…: each option has what Google's services take for a name.
need_cloud_name() {
  local _option _value # no option has such a name
  for _option in "${@:2}"; do
    _value=${!_option}
    [[ $_value =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ && ${#_value} -le $1 ]] ||
      fail "--$_option $_value: a name has lowercase letters, digits and hyphens, begins with a letter," \
        "ends with a letter or digit, and is at most $1 long"
  done
}

# need_zone ZONE
need_zone() {
  [[ $1 =~ ^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$ ]] ||
    fail "--zone $1 is no zone, such as us-west4-a: a region and a letter"
}

# The words as a line that can be pasted into a shell.
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  echo "${line% }"
}

# Runs a command; with --dry-run prints it.
run() {
  if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# The same, in place of this script.
become() {
  if [[ $dry_run ]]; then quoted "$@"; else exec "$@"; fi
}

# run_beside WORDS…: runs a command, passes every SIGTERM on to it, and returns its exit status.
# Sets told_to_stop if there was one. From the end of the command on the script ignores SIGTERM.
told_to_stop=''
# shellcheck disable=SC2034 # scripts read told_to_stop
run_beside() {
  local child early='' status=0
  trap 'early=yes' TERM # no process is there yet to pass it on to
  "$@" &
  child=$!
  # It may have ended already when the signal comes.
  trap 'told_to_stop=yes; kill -TERM "$child" 2>/dev/null || true' TERM
  if [[ $early ]]; then
    told_to_stop=yes
    kill -TERM "$child" 2>/dev/null || true
  fi
  while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true # a signal ends it early
  done
  trap '' TERM
  wait "$child" || status=$? # bash remembers it
  return "$status"
}

need_program() {
  ((${#program[@]})) || fail "no command to run: … -- promptkd train --config … --workdir …"
}

# The `promptkd` of the current folder's environment, where that exists, else the one on PATH.
promptkd_here() { if [[ -x .venv/bin/promptkd ]]; then echo .venv/bin/promptkd; else echo promptkd; fi; }

# The place of the word `promptkd` in program; fails where there is none. Words before it may set
# something: env HF_TOKEN=… promptkd train …
promptkd_place() {
  local index
  for index in "${!program[@]}"; do
    if [[ ${program[index]} == promptkd || ${program[index]} == */promptkd ]]; then
      echo "$index"
      return
    fi
  done
  return 1
}

find_promptkd() {
  local index
  index=$(promptkd_place) || return 0
  [[ ${program[index]} == */* ]] || program[index]=$(promptkd_here)
}

# check_command OPTIONS…: `promptkd plan` reads the command, for the devices that the options name,
# before anything is asked for. With --no-check it does not.
no_check=''
check_command() {
  local index here
  if [[ $no_check ]] || ! index=$(promptkd_place); then
    note "the command is not checked"
    return
  fi
  here=${program[index]}
  [[ $here == */* ]] || here=$(promptkd_here)
  type "$here" >/dev/null 2>&1 ||
    fail "promptkd, which checks the command, is not installed here (make venv); --no-check goes without"
  note "checking the command with promptkd plan …"
  "${program[@]:0:index}" "$here" plan --no-compile "$@" -- "${program[@]:index}" >&2 ||
    fail "nothing was asked for; mend the command (--no-check goes without this check)"
}

# option_of_program NAMES…: the value of the last of these options (--workdir), or nothing.
option_of_program() {
  local index name value=''
  for index in "${!program[@]}"; do
    for name in "$@"; do
      case ${program[index]} in
        "$name") value=${program[index + 1]:-} ;;
        "$name="*) value=${program[index]#*=} ;;
      esac
    done
  done
  echo "$value"
}

# The folder that a promptkd command writes, where it has one.
written_folder() { if promptkd_place >/dev/null; then option_of_program --workdir --output; fi; }

# need_bucket WHY: the machines share no disk.
need_bucket() {
  local folder
  folder=$(written_folder)
  [[ ! $folder || $folder == gs://?* ]] ||
    fail "$folder: $1; give a folder in a bucket, gs://…"
}

# need_no_flags_of_processes: where the cluster tells each process which one it is.
need_no_flags_of_processes() {
  local name
  promptkd_place >/dev/null || return 0
  for name in --coordinator --processes --process; do
    [[ " ${program[*]} " != *" $name"[=\ ]* ]] ||
      fail "$name: the processes find each other here; leave --coordinator, --processes and --process out"
  done
}

# The word after promptkd: train, evaluate, …
subcommand() {
  local index
  if index=$(promptkd_place); then echo "${program[index + 1]:-}"; fi
}

# The workdir of a `promptkd train …`, which is finished when summary.json is there; else nothing.
training_workdir() { if [[ $(subcommand) == train ]]; then option_of_program --workdir; fi; }
