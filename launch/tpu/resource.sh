# shellcheck shell=bash disable=SC2034,SC2154 # variables go from part to part
# Sourced by tpu_train.sh, whose options these functions read: the TPU and its workers, by gcloud.
#   tpus WORD…           runs `gcloud compute tpus WORD…`: 0, or 1 with the cause in $cause. What it
#                        prints is in $scratch/out. With --dry-run it only shows the command.
#   on_workers WHO WORD… has the workers WHO (all, or a number) of each slice run worker.sh WORD…
#   look                 sets $state to ready, waiting, gone, lost or unusable, $detail to gcloud's word
#                        for it, and, of a TPU that is ready, $workers, $address and $ours
#   obtain               returns once the TPU is ready, made if need be, and sets $made
#   remove               deletes the TPU

# Words as a shell reads them, in quotes only where they need some.
quoted() {
  local word text=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    text="$text $word"
  done
  printf '%s\n' "${text# }"
}

explain() {
  if [ -n "$dry_run" ]; then
    printf '# %s\n' "$*"
  fi
}

tpus() {
  if [ -n "$dry_run" ]; then
    quoted gcloud compute tpus "$@"
    : >"$scratch/out"
    return 0
  fi
  if gcloud compute tpus "$@" </dev/null >"$scratch/out" 2>"$scratch/err"; then
    return 0
  fi
  # The worker's own line tells more than gcloud's about it.
  cause=$(grep -h 'error: ' "$scratch/out" "$scratch/err" | head -n 1) ||
    cause=$(sed -n '/ERROR: /,$p' "$scratch/err" | tr '\n' ' ')
  cause=${cause:-$(tail -n 1 "$scratch/err")}
  cause="gcloud compute tpus $1 $2 failed: ${cause:0:500}"
  return 1
}

worker_command() { # WORD…
  quoted bash dmd_jax/code/launch/tpu/worker.sh "$@"
}

ssh_flags() { # NODE WHO COMMAND
  flags=("$1" "${where[@]}" "--worker=$2" "--command=$3"
    --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30
    ${connect_flags[@]+"${connect_flags[@]}"} --quiet)
}

run_on() { # WHO COMMAND
  local node
  for node in "${nodes[@]}"; do
    ssh_flags "$node" "$1" "$2"
    tpus tpu-vm ssh "${flags[@]}" || return 1
    cat "$scratch/out" >>"$scratch/all"
  done
}

on_workers() { # WHO WORD…
  : >"$scratch/all"
  run_on "$1" "$(worker_command "${@:2}")"
}

look() {
  local node
  state=ready
  if [ -n "$queued" ]; then
    look_at_queue
  fi
  for node in "${nodes[@]}"; do
    [ "$state" = ready ] || return 0
    look_at_node "$node"
  done
}

look_at_queue() {
  local format='csv[no-heading](state.state,state.failedData.error.message)' reason
  describe queued-resources "$name" "--format=$format" || return 0
  [ -z "$dry_run" ] || return 0
  IFS=, read -r detail reason <"$scratch/out"
  case $detail in
    ACTIVE) ;;
    SUSPENDED) state=lost ;;
    FAILED) state=unusable detail="FAILED ($reason)" ;;
    *) state=waiting ;;
  esac
}

look_at_node() { # NODE
  local format found_type label
  format='csv[no-heading](state,acceleratorType,networkEndpoints.len(),'
  format+='networkEndpoints[0].ipAddress,labels.dmd_jax)'
  describe tpu-vm "$1" "--format=$format" || return 0
  if [ -n "$dry_run" ]; then
    workers=2 address=ADDRESS_OF_WORKER_0 ours=yes
    return
  fi
  IFS=, read -r detail found_type workers first_address label <"$scratch/out"
  if [ "$1" = "${nodes[0]}" ]; then
    address=$first_address
  fi
  ours=${label:+yes}
  case $detail in
    READY) ;;
    PREEMPTED | TERMINATED) state=lost ;;
    STOPPED | HIDING | HIDDEN) state=unusable ;;
    *) state=waiting ;;
  esac
  if [ -n "$type" ] && [ "${found_type##*/}" != "$type" ]; then
    fail "$1 is there already, a ${found_type##*/}; expected a $type, or another name"
  fi
}

# Shows the resource, or sets $state to gone and returns 1. gcloud's other failures, such as a
# network that is away for a moment, are tried again.
describe() { # KIND NAME FORMAT
  local tries
  for tries in 1 2 3 4 5; do
    if tpus "$1" describe "$2" "${where[@]}" "$3"; then
      if [ -n "$dry_run" ] && [ -z "$made" ]; then
        state=gone
        return 1
      fi
      return 0
    fi
    if grep -q NOT_FOUND "$scratch/err"; then
      state=gone detail=NOT_FOUND
      return 1
    fi
    [ "$tries" = 5 ] || sleep "$poll"
  done
  fail "$cause"
}

obtain() {
  local seen=''
  made=''
  while look; do
    if [ "$state" != ready ] && [ "$detail" != "$seen" ] && [ -z "$dry_run" ]; then
      say "$name: $detail"
      seen=$detail
    fi
    case $state in
      ready) return ;;
      gone) create ;;
      lost) remove ;;
      waiting) sleep "$poll" ;;
      unusable) fail "$name is $detail; expected READY: start it, or delete it with --delete" ;;
    esac
  done
}

create() {
  local arguments=("$name" "${where[@]}" "--accelerator-type=$type")
  if [ -n "$queued" ]; then
    arguments=(queued-resources create "${arguments[@]}" "--runtime-version=$version")
    if [ "$slices" -gt 1 ]; then
      arguments+=("--node-count=$slices" "--node-prefix=$name")
    else
      arguments+=("--node-id=$name")
    fi
  else
    arguments=(tpu-vm create "${arguments[@]}" "--version=$version")
  fi
  arguments+=(${create_flags[@]+"${create_flags[@]}"} --labels=dmd_jax=tpu_train --quiet)
  explain "it is not there: make it${queued:+, and look until it is ACTIVE}"
  [ -n "$dry_run" ] || say "making $name, $slices x $type with $version"
  until tpus "${arguments[@]}"; do
    # A TPU that was taken away may be had again later; at first the user is better asked.
    if [ -z "$ran" ] || ! grep -qiE 'capacity|RESOURCE_EXHAUSTED' "$scratch/err"; then
      fail "$cause$([ -n "$queued" ] || printf '; --queued waits for capacity')"
    fi
    say "no capacity for $name; trying again"
    sleep "$poll"
  done
  made=yes
}

remove() {
  explain 'delete it'
  [ -n "$dry_run" ] || say "deleting $name"
  if [ -n "$queued" ]; then
    tpus queued-resources delete "$name" "${where[@]}" --force --quiet || fail "$cause"
  else
    tpus tpu-vm delete "$name" "${where[@]}" --quiet || fail "$cause"
  fi
}
