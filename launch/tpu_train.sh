#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU: makes the TPU, or takes the one of that name; copies this
# checkout to it; installs; starts `dmd-jax train` on every worker; shows the log of process 0. A
# worker that dies or a TPU that is preempted is replaced, and the run goes on from its newest
# checkpoint. The exit code is the run's. The same command again follows a run that is going on.
#
#   launch/tpu_train.sh NAME --zone ZONE --type v5e-256 --config configs/X.py \
#                       --workdir gs://BUCKET/RUN [OPTION…] [-- ARGUMENT of dmd-jax train…]
#   launch/tpu_train.sh NAME --zone ZONE --stop      a checkpoint, and the end of the run
#   launch/tpu_train.sh NAME --zone ZONE --delete    the end of the TPU, and of its cost
#
#   --project P          of Google Cloud (default: gcloud's)
#   --type TYPE          accelerator type: v5e-256, v6e-64 (chips), v4-128, v5p-128 (cores, 2 a chip)
#   --version RUNTIME    of the TPU's software (default: by the type)
#   --queued             ask for it as a queued resource, and wait for it
#   --slices N           so many TPUs of the type as one run (queued)
#   --spot, --preemptible
#                        cheap, and taken away at any time
#   --keep               do not delete the TPU that was made here when the run has finished
#   --env NAME=VALUE     in the environment of the run; again for more
#   --coordinator HOST:PORT
#                        where the processes meet, :PORT of worker 0's internal address (default:
#                        auto, what the TPU's metadata say)
#   --venv DIR           an environment that the workers have; nothing is installed
#   --create-flag FLAG   of gcloud's create, such as --create-flag=--network=NET; again for more
#   --connect-flag FLAG  of gcloud's ssh and scp, such as --connect-flag=--internal-ip
#   --retries N          how often in a row a run that failed is started again (default: 3)
#   --poll SECONDS       between two looks at a TPU that is not ready (default: 20)
#   --dry-run            prints every command, and runs none
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/tpu/arguments.sh
source "$checkout/launch/tpu/arguments.sh"
# shellcheck source=launch/tpu/resource.sh
source "$checkout/launch/tpu/resource.sh"
# shellcheck source=launch/tpu/run.sh
source "$checkout/launch/tpu/run.sh"

usage() {
  sed -n '2,/^[^#]/s/^#[ ]\{0,1\}//p' "${BASH_SOURCE[0]}"
}

clean_up() {
  end_streams
  rm -rf "$scratch"
}

again() { # OPTION, as a command that can be pasted
  local words=("$name" "${where[@]}" ${queued:+--queued})
  [ "$slices" = 1 ] || words+=("--slices=$slices")
  quoted launch/tpu_train.sh "${words[@]}" "$1"
}

interrupted() {
  trap '' INT TERM
  if [ -n "$ran" ]; then
    say "the run goes on in $name, and so does its cost. The same command again follows it;" \
      "this ends it with a checkpoint: $(again --stop); and this deletes the TPU: $(again --delete)"
  else
    say "interrupted; this deletes $name: $(again --delete)"
  fi
  exit 130
}

give_up() { # CODE CAUSE
  say "error: $2; $name stays, and so does its cost, until: $(again --delete)"
  exit "$1"
}

# Sets $ended, as follow does; failed, with $cause, where the run could not be started.
attempt() {
  local line=1 lost=0
  began=$SECONDS ended=failed seen=0
  if is_going; then
    say "the run is going on in $name already; the last lines of its log:"
    line=0
  else
    [ -z "$cause" ] && copy && start || return 0
  fi
  ran=yes
  [ -n "$dry_run" ] || say "the run has started on $((workers * slices)) workers of $name"
  follow "$line"
  while [ -z "$ended" ] && [ "$lost" -lt 5 ]; do
    sleep "$poll"
    look
    [ "$state" = ready ] || return 0
    say "lost the connection to $name; following its log again"
    line=$seen
    follow "$((seen + 1))"
    # Five times in a row without a line of the log.
    lost=$((seen > line ? 0 : lost + 1))
  done
  cause="the run ended: ${ended:=lost}"
}

train() {
  local failures=0
  prepare
  while :; do
    obtain
    cause=''
    attempt
    case $ended in
      0) break ;;
      asked) say "the run has a checkpoint and was stopped, as --stop asked; $name stays" && exit ;;
    esac
    sleep "$poll"
    look
    if [ "$state" != ready ]; then
      say "$name is $detail; the run goes on in another"
      continue
    fi
    [ "$ended" != 2 ] || give_up 2 'dmd-jax train does not take what it is given (exit code 2)'
    [ -n "$ran" ] || give_up 1 "$cause"
    # Failures far apart have causes of their own.
    [ "$((SECONDS - began))" -lt 3600 ] || failures=0
    failures=$((failures + 1))
    if [ "$failures" -gt "$retries" ]; then
      [[ $ended =~ ^[1-9][0-9]*$ ]] || ended=1
      give_up "$ended" "$cause, after $retries retries"
    fi
    say "$cause; starting it again from its newest checkpoint ($failures of $retries)"
    on_workers all kill || :
  done
  [ -n "$dry_run" ] || say 'the run has finished'
  if [ -n "$ours" ] && [ -z "$keep" ]; then
    remove
  elif [ -z "$dry_run" ]; then
    say "$name stays, and so does its cost, until: $(again --delete)"
  fi
}

stop() {
  on_workers all stop 900 || fail "$cause"
  [ -n "$dry_run" ] || grep -q '^stopped' "$scratch/all" || fail "no run is going on in $name"
  [ -n "$dry_run" ] || say "the run has a checkpoint and has ended; $name stays, and so does its cost"
}

delete() {
  if [ -z "$dry_run" ] && [ -z "$queued" ]; then
    # One that was queued cannot be deleted but with its place in the queue.
    if describe queued-resources "$name" '--format=value(state.state)'; then
      queued=yes
    elif ! describe tpu-vm "$name" '--format=value(state)'; then
      fail "there is no TPU $name in $zone"
    fi
  fi
  remove
}

streams='' ran='' made='' ours='' cause='' state='' detail='' config_file=''
read_arguments "$@"
scratch=$(mktemp -d)
trap clean_up EXIT
trap interrupted INT TERM
"$action"
