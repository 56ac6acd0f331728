# shellcheck shell=bash disable=SC2034,SC2154 # variables go from part to part
# Sourced by tpu_train.sh: the run on the workers of a TPU that is ready.
#   prepare   sets $key, $variables and $arguments of the run
#   is_going  0 if the run is going on on all workers; $cause says it if it cannot be known
#   copy      the checkout to the workers, and its installation
#   start     starts it
#   follow    shows its log until it ends, and sets $ended: the exit code; stopped, by a signal of
#             somebody; asked, by --stop; lost, with no word of why; or '' if the connection is lost

# What the run is told, but for who each process is; and a short name of all that.
prepare() {
  local defaults=("JAX_PLATFORMS=tpu,cpu" "JAX_COMPILATION_CACHE_DIR=$workdir/jax_cache")
  variables=("${defaults[@]}" ${variables[@]+"${variables[@]}"})
  arguments=(${config:+--config "$config"} --workdir "$workdir" ${arguments[@]+"${arguments[@]}"})
  key=$(printf '%s\n' "${variables[@]}" -- "$coordinator" "${arguments[@]}" | cksum)
  key=${key%% *}
}

is_going() {
  local worker=dmd_jax/code/launch/tpu/worker.sh
  : >"$scratch/all"
  explain 'look whether a run is going on'
  run_on all "test ! -e $worker || $(worker_command state)" || return 1
  [ -z "$dry_run" ] || return 1
  case $(grep -c '^going' "$scratch/all") in
    0) return 1 ;;
    "$((workers * slices))")
      [ "$(grep -c "$key\$" "$scratch/all")" = "$((workers * slices))" ] ||
        fail "another run is going on in $name; this ends it with a checkpoint: $(again --stop)"
      ;;
    *)
      # Some workers died, and the others cannot go on without them.
      on_workers all kill || :
      return 1
      ;;
  esac
}

copy() {
  local archive=dmd_jax.tar.gz unpack parts
  parts=(LICENSE README.md configs dmd_jax launch pyproject.toml requirements.txt setup.py)
  case ${config_file:-configs/} in
    configs/*) ;;
    *) parts+=("$config_file") ;;
  esac
  explain "copy ${parts[*]} of $checkout, and install"
  if [ -n "$dry_run" ]; then
    quoted tar -czf "$archive" --exclude=__pycache__ -C "$checkout" "${parts[@]}"
  else
    archive=$scratch/$archive
    # Once: a run that is started again is the same code.
    [ -e "$archive" ] || tar -czf "$archive" --exclude=__pycache__ -C "$checkout" "${parts[@]}" ||
      fail "the checkout $checkout could not be packed"
    say "copying ${parts[*]} of $checkout ($(($(wc -c <"$archive") / 1024)) KiB), and installing"
  fi
  local node
  for node in "${nodes[@]}"; do
    tpus tpu-vm scp "$archive" "$node:dmd_jax.tar.gz" "${where[@]}" --worker=all \
      ${connect_flags[@]+"${connect_flags[@]}"} --quiet || return 1
  done
  unpack='rm -rf dmd_jax/code && mkdir -p dmd_jax/code && '
  unpack+='tar -xzf dmd_jax.tar.gz -C dmd_jax/code && '
  run_on all "$unpack$(worker_command install ${venv:+"$venv"})"
}

start() {
  local node i process=0 words token told
  explain 'start the run on every worker'
  # By which the processes know each other; one of --env takes its place.
  token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
  told=("DMD_JAX_TOKEN=$token" "${variables[@]}")
  for node in "${nodes[@]}"; do
    if [ "$coordinator" = auto ]; then
      words=$(worker_command start "$key" "${told[@]}" -- "${arguments[@]}" --coordinator auto)
      ssh_flags "$node" all "$words"
      tpus tpu-vm ssh "${flags[@]}" || return 1
      continue
    fi
    for ((i = 0; i < workers; i++)); do
      words=$(worker_command start "$key" "${told[@]}" -- "${arguments[@]}" \
        --coordinator "${coordinator/#:/$address:}" \
        --processes "$((workers * slices))" --process "$process")
      ssh_flags "$node" "$i" "$words"
      tpus tpu-vm ssh "${flags[@]}" || return 1
      process=$((process + 1))
    done
  done
}

# On the way the first worker that failed shows the end of its log: the others fail after it.
follow() { # LINE
  local kind who rest pipe=$scratch/pipe
  ended=''
  if [ -n "$dry_run" ]; then
    explain 'wait for the end of every worker, and show the log of process 0 meanwhile'
    stream "$1"
    ended=0
    return
  fi
  rm -f "$pipe"
  mkfifo "$pipe"
  # A process group of its own, so that its connections can be ended together.
  set -m
  stream "$1" >"$pipe" 2>/dev/null </dev/null &
  streams=$!
  set +m
  local left=$((workers * slices)) patience=()
  while IFS=$'\t' read -r ${patience[@]+"${patience[@]}"} kind who rest; do
    case $kind in
      log)
        if [ "$who" -gt "$seen" ]; then
          printf '%s\n' "$rest"
          seen=$who
        fi
        ;;
      tail) [ -n "$ended" ] || printf '%s: %s\n' "$who" "$rest" >&2 ;;
      ended)
        left=$((left - 1))
        if [ "$rest" = 0 ] || [ -n "$ended" ]; then
          continue
        fi
        ended=$rest
        [ "$ended" = asked ] || say "the run on $who ended: $ended"
        # The last lines of the log may be on their way; hanging workers say nothing any more.
        patience=(-t 3)
        ;;
    esac
  done <"$pipe"
  end_streams
  if [ -z "$ended" ] && [ "$left" -le 0 ]; then
    ended=0
  fi
}

stream() { # LINE
  local node
  set +m
  for node in "${nodes[@]}"; do
    ssh_flags "$node" all "$(worker_command await)"
    show_through tpu-vm ssh "${flags[@]}"
  done
  ssh_flags "${nodes[0]}" 0 "$(worker_command follow "$1")"
  show_through tpu-vm ssh "${flags[@]}"
  wait
}

show_through() { # WORD…
  if [ -n "$dry_run" ]; then
    tpus "$@"
  else
    gcloud compute tpus "$@" &
  fi
}

end_streams() {
  if [ -n "$streams" ]; then
    kill -- "-$streams" 2>/dev/null || :
    wait "$streams" 2>/dev/null || :
    streams=''
  fi
}
