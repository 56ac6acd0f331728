#!/usr/bin/env bash
# What tpu_train.sh has each worker of a TPU do, by ssh. The checkout's copy is ~/dmd_jax/code; the
# environment, the log and the state of the run lie beside it.
#   install [VENV]      makes the environment and installs into it; a VENV is used as it is
#   start KEY [NAME=VALUE…] -- ARGUMENT…
#                       starts `dmd-jax train ARGUMENT…`, which outlives the connection
#   state               prints the KEY of the run that is going on, if one is
#   follow LINE         prints the log from that line on until the run ends; from 0 its last lines
#   await               waits for the run's end, and prints how it ended and the end of a bad log
#   stop SECONDS        asks for a checkpoint and the end, waits for it, and prints that it came
#   kill                ends the run at once; its checkpoints stay
# follow, await, state and stop print lines of words with tabs in between, which tpu_train.sh reads.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

home=$(dirname "$checkout")
run=$home/run

install() { # [VENV]
  printf '%s\n' "${1:-$home/venv}" >"$home/environment"
  if [ -n "${1:-}" ]; then
    [ -x "$1/bin/python" ] || fail "--venv $1: no $1/bin/python on $HOSTNAME"
    return
  fi
  unset VIRTUAL_ENV
  if [ ! -e "$home/venv/bin/python" ] && ! find_python; then
    # The images of TPUs come with an older Python, and may be busy with updates of their own.
    say "installing python3.11"
    sudo -n apt-get -qq update >&2
    sudo -n apt-get -qq -o DPkg::Lock::Timeout=600 install python3.11 python3.11-venv >&2
  fi
  use_environment "$home/venv"
  install_requirements requirements.txt '.[tpu,gcs]'
}

# Sets $pid. A number alone may be another process's after a reboot.
is_alive() {
  pid=$(cat "$run/pid" 2>/dev/null) && grep -qs tpu/worker.sh "/proc/$pid/cmdline"
}

start() { # KEY [NAME=VALUE…] -- ARGUMENT…
  is_alive && fail "a run is going on on $HOSTNAME already"
  mkdir -p "$run"
  if [ -e "$run/log" ]; then
    cat "$run/log" >>"$run/earlier.log"
  fi
  rm -f "$run/ended" "$run/stop"
  printf '%s\n' "$1" >"$run/key"
  shift
  # A session of its own, so that one signal reaches all of it and the connection's end none.
  setsid bash "${BASH_SOURCE[0]}" run "$@" >"$run/log" 2>&1 </dev/null &
  printf '%s\n' "$!" >"$run/pid"
}

train() { # [NAME=VALUE…] -- ARGUMENT…
  local code=0 variables=()
  while [ "$1" != -- ]; do
    variables+=("$1")
    shift
  done
  shift
  # Signals are for Python alone; what it makes of them is written down here.
  trap : TERM INT HUP
  cd "$checkout"
  env "${variables[@]}" "$(cat "$home/environment")/bin/python" -m dmd_jax train "$@" || code=$?
  if [ "$code" = 0 ] && tail -n 5 "$run/log" | grep -q '^dmd-jax: stopped at step '; then
    code=stopped
  fi
  printf '%s\n' "$code" >"$run/ended"
}

follow() { # LINE
  local line number=$1 length
  length=$(wc -l <"$run/log")
  if [ "$number" = 0 ]; then
    number=$((length > 20 ? length - 19 : 1))
  fi
  if is_alive; then
    tail -n "+$number" -F --pid "$pid" "$run/log" 2>/dev/null
  else
    tail -n "+$number" "$run/log"
  fi | while IFS= read -r line; do
    printf 'log\t%d\t%s\n' "$number" "$line"
    number=$((number + 1))
  done
}

await() {
  local how
  while is_alive; do
    sleep 0.5
  done
  how=$(cat "$run/ended" 2>/dev/null) || how=lost
  if [ "$how" = stopped ] && [ -e "$run/stop" ]; then
    how=asked
  fi
  case $how in
    0 | stopped | asked) ;;
    *) tail -n 20 "$run/log" | while IFS= read -r line; do
      printf 'tail\t%s\t%s\n' "$HOSTNAME" "$line"
    done ;;
  esac
  printf 'ended\t%s\t%s\n' "$HOSTNAME" "$how"
}

stop() { # SECONDS
  local until=$((SECONDS + $1))
  is_alive || return 0
  touch "$run/stop"
  kill -TERM -- "-$pid"
  while is_alive; do
    [ "$SECONDS" -lt "$until" ] || fail "the run on $HOSTNAME has not ended in $1 seconds"
    sleep 0.5
  done
  printf 'stopped\t%s\n' "$HOSTNAME"
}

finish() {
  is_alive || return 0
  kill -KILL -- "-$pid"
  while is_alive; do
    sleep 0.5
  done
}

command=$1
shift
case $command in
  install | start | follow | await | stop) "$command" "$@" ;;
  state) if is_alive; then printf 'going\t%s\t%s\n' "$HOSTNAME" "$(cat "$run/key")"; fi ;;
  kill) finish ;;
  run) train "$@" ;;
  *) fail "unknown command $command" ;;
esac
