# shellcheck shell=bash
# What the launch scripts share: their options, --dry-run, and where `promptkd` is.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
  exit 1
}

program=() # the words after --
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

need_program() {
  ((${#program[@]})) || fail "no command to run: … -- promptkd train --config … --workdir …"
}

# The first word `promptkd` is .venv/bin/promptkd of the current folder where that exists, else the
# one on PATH. Words before it may set something: env HF_TOKEN=… promptkd train …
find_promptkd() {
  local index
  [[ -x .venv/bin/promptkd ]] || return 0
  for index in "${!program[@]}"; do
    if [[ ${program[index]} == promptkd ]]; then
      program[index]=.venv/bin/promptkd
      return
    fi
  done
}

# The workdir of a `promptkd train …`, which is finished when summary.json is there; else nothing.
training_workdir() {
  local index workdir=
  [[ " ${program[*]} " == *"promptkd train "* ]] || return 0
  for index in "${!program[@]}"; do
    case ${program[index]} in
      --workdir) workdir=${program[index + 1]:-} ;;
      --workdir=*) workdir=${program[index]#*=} ;;
    esac
  done
  echo "$workdir"
}
