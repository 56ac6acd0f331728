# shellcheck shell=bash disable=SC2034,SC2154 # variables go from part to part
# Sourced by tpu_train.sh: read_arguments WORD… sets what its options say.

read_arguments() {
  name='' zone='' project='' type='' version='' config='' workdir='' venv='' coordinator=auto
  queued='' slices=1 keep='' retries=3 poll=20 dry_run='' action=train
  create_flags=() connect_flags=() variables=() arguments=()
  local option value spot=''
  while [ "$#" -gt 0 ]; do
    option=$1
    shift
    case $option in
      --) arguments=("$@") && break ;;
      -h | --help) usage && exit ;;
      --queued) queued=yes ;;
      --keep) keep=yes ;;
      --dry-run) dry_run=yes ;;
      --stop | --delete) action=${option#--} ;;
      --spot | --preemptible) spot=$option && create_flags+=("$option") ;;
      --*)
        case $option in
          --*=*) value=${option#*=} option=${option%%=*} ;;
          *)
            [ "$#" -gt 0 ] || fail "$option is given without its value; see --help"
            value=$1
            shift
            ;;
        esac
        set_option "$option" "$value"
        ;;
      *)
        [ -z "$name" ] || fail "unexpected argument $option; arguments of dmd-jax train come after --"
        name=$option
        ;;
    esac
  done
  check_arguments "$spot"
}

set_option() { # OPTION VALUE
  case $1 in
    --zone) zone=$2 ;;
    --project) project=$2 ;;
    --type) type=$2 ;;
    --version) version=$2 ;;
    --config) config=$2 ;;
    --workdir) workdir=$2 ;;
    --venv) venv=$2 ;;
    --coordinator) coordinator=$2 ;;
    --slices) slices=$2 ;;
    --retries) retries=$2 ;;
    --poll) poll=$2 ;;
    --create-flag) create_flags+=("$2") ;;
    --connect-flag) connect_flags+=("$2") ;;
    --env)
      [[ $2 =~ ^[A-Za-z_][A-Za-z_0-9]*= ]] || fail "--env $2; expected NAME=VALUE"
      variables+=("$2")
      ;;
    *) fail "unknown option $1; see --help" ;;
  esac
}

check_arguments() { # SPOT
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail "the TPU's name is '$name'; expected small letters, digits and hyphens; see --help"
  [ -n "$zone" ] || fail "--zone is missing, such as --zone us-west4-a"
  [[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices $slices; expected a number from 1"
  [[ $retries =~ ^[0-9]+$ ]] || fail "--retries $retries; expected a number from 0"
  [[ $poll =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--poll $poll; expected seconds"
  [ -n "$dry_run" ] || command -v gcloud >/dev/null ||
    fail "gcloud is not on the PATH; expected the Google Cloud CLI"
  where=("--zone=$zone" ${project:+"--project=$project"})
  nodes=("$name")
  if [ "$slices" -gt 1 ]; then
    queued=yes nodes=()
    local i
    for ((i = 0; i < slices; i++)); do
      nodes+=("$name-$i")
    done
  fi
  [ "$action" = train ] || return 0
  [ -n "$workdir" ] || fail "--workdir is missing, such as --workdir gs://BUCKET/RUN"
  if [ -n "$queued" ] && [ "$1" = --preemptible ]; then
    fail "--preemptible is not for queued resources; expected --spot"
  fi
  [[ $coordinator =~ ^(auto|[^:]*:[0-9]+)$ ]] ||
    fail "--coordinator $coordinator; expected auto, HOST:PORT or :PORT"
  read_type
  read_config
}

# gcloud's name of the type, and the software for its generation.
read_type() {
  type=${type/#v5e-/v5litepod-}
  local default=''
  case $type in
    v2-[1-9]* | v3-[1-9]* | v4-[1-9]*) default=tpu-ubuntu2204-base ;;
    v5litepod-[1-9]*) default=v2-alpha-tpuv5-lite ;;
    v5p-[1-9]*) default=v2-alpha-tpuv5 ;;
    v6e-[1-9]*) default=v2-alpha-tpuv6e ;;
  esac
  version=${version:-$default}
  [ -n "$type" ] || fail "--type is missing, such as --type v5e-256"
  [ -n "$version" ] || fail "--type $type; expected v4-N, v5e-N, v5p-N or v6e-N, or a --version too"
}

# The config's path in the checkout, which is what the workers get.
read_config() {
  local file=${config%%:*} path
  [ -n "$config" ] || return 0
  [ -f "$file" ] || fail "--config $file: no such file"
  path=$(cd "$(dirname "$file")" && pwd -P)/$(basename "$file")
  [ "${path#"$checkout"/}" != "$path" ] ||
    fail "--config $file is not in $checkout, which is what the workers get a copy of"
  config_file=${path#"$checkout"/}
  config=$config_file${config#"$file"}
}
