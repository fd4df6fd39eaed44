#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every worker of a slice; of no use anywhere else.
#
#   launch/worker.sh install [--bucket=BUCKET]   Python 3.12, the package with its TPU extra in ~/venv, the bucket at /gcs
#   launch/worker.sh start -- TRAIN ARGUMENTS    mount the bucket if it is not, and train in the background; ~/run holds what is known of it
#   launch/worker.sh start --unless-running -- TRAIN ARGUMENTS   leave a run alone that goes on already, which is an error else
#   launch/worker.sh status                      running, stopped (by `stop`), lost (gone without an exit code), none, or the exit code
#   launch/worker.sh stop                        SIGTERM: the state is saved
#   --dry-run after the verb prints the commands
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly RUN=$HOME/run MOUNT=/gcs UV=$HOME/.local/uv KEY=/usr/share/keyrings/cloud.google.asc
readonly GCSFUSE=3.11.2 # as Google's own package source has it, whose key signs it
readonly BOOT=/proc/sys/kernel/random/boot_id # another after every start of the machine, when process ids begin again
readonly BUCKET=$HOME/bucket                  # name of the one to mount
readonly WAIT=(-o DPkg::Lock::Timeout=600)    # for the updates that a new machine begins with
UNLESS_RUNNING=false

install_package() {
  # The system's Python is older than the package asks for. uv brings another, whose checksum it knows; its own is in uv.txt.
  if ! python3 -m pip --version >/dev/null 2>&1; then
    run sudo apt-get update -qq "${WAIT[@]}"
    run sudo apt-get install -qq "${WAIT[@]}" python3-pip
  fi
  run python3 -m pip install --quiet --upgrade --target="$UV" --require-hashes --only-binary=:all: --requirement="$REPOSITORY/launch/uv.txt"
  run "$UV/bin/uv" venv --quiet --clear --python=3.12 "$HOME/venv"
  run "$UV/bin/uv" pip install --quiet --python="$HOME/venv/bin/python" --constraints="$REPOSITORY/constraints.txt" \
    --build-constraints="$REPOSITORY/constraints.txt" "${REPOSITORY}[tpu]"
}

mount_bucket() {
  mountpoint -q "$MOUNT" && return
  if ! command -v gcsfuse >/dev/null; then
    local scratch
    scratch=$(mktemp -d)
    echo "deb [signed-by=$KEY] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" >"$scratch/list"
    run curl --fail --silent --show-error --location --proto =https --output "$scratch/key" https://packages.cloud.google.com/apt/doc/apt-key.gpg
    run sudo install -m 644 "$scratch/key" "$KEY"
    run sudo install -m 644 "$scratch/list" /etc/apt/sources.list.d/gcsfuse.list
    rm -rf "$scratch"
    run sudo apt-get update -qq "${WAIT[@]}"
    run sudo apt-get install -qq "${WAIT[@]}" "gcsfuse=$GCSFUSE"
  fi
  run sudo mkdir -p "$MOUNT"
  # Everything in it belongs to whoever mounts it, root, unless told otherwise, and nobody else may write.
  run sudo gcsfuse --implicit-dirs --uid="$(id -u)" --gid="$(id -g)" -o allow_other "$1" "$MOUNT"
}

# The shell around `train` outlives the SIGTERM that its whole group gets, to write the exit code down.
start() {
  local cache=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jax} script
  if [[ $(status) == running ]]; then
    $UNLESS_RUNNING || die "a run goes on already on $(hostname); launch/tpu_vm.sh stop ends it"
    return
  fi
  [[ ! -s $BUCKET ]] || mount_bucket "$(<"$BUCKET")" # which does not outlive a restart of the machine
  mountpoint -q "$MOUNT" && cache=$MOUNT/cache/jax
  script="cd $(quoted "$REPOSITORY"); trap : TERM; cat $BOOT > $(quoted "$RUN/boot"); echo \$\$ > $(quoted "$RUN/pid")"
  script+="; $(quoted env PYTHONUNBUFFERED=1 "JAX_COMPILATION_CACHE_DIR=$cache" "$HOME/venv/bin/python" -m deepstack_jax.train "$@")"
  script+="; echo \$? > $(quoted "$RUN/exit")"
  if $DRY_RUN; then
    quoted setsid bash -c "$script"
    return
  fi
  mkdir -p "$RUN"
  chmod 700 "$RUN" # the log may tell what is nobody else's business
  rm -f "$RUN/exit" "$RUN/pid" "$RUN/stopped"
  setsid bash -c "$script" >>"$RUN/log" 2>&1 </dev/null &
  until [[ -s $RUN/pid ]]; do
    kill -0 "$!" 2>/dev/null || die "the run did not start on $(hostname); launch/tpu_vm.sh tail shows why"
    sleep 0.05
  done
}

status() {
  if [[ -s $RUN/exit && $(<"$RUN/exit") == "$EXIT_PREEMPTED" && -e $RUN/stopped ]]; then
    echo stopped
  elif [[ -s $RUN/exit ]]; then
    cat "$RUN/exit"
  elif [[ ! -s $RUN/pid ]]; then
    echo none
  elif [[ $(cat "$RUN/boot" 2>/dev/null) == "$(<"$BOOT")" ]] && kill -0 "$(<"$RUN/pid")" 2>/dev/null; then
    echo running
  else
    echo lost
  fi
}

stop() {
  [[ $(status) == running ]] || return 0
  run touch "$RUN/stopped"
  run kill -TERM -- "-$(<"$RUN/pid")"
}

main() {
  local verb=${1:-} bucket=""
  if [[ $# == 0 || " $* " == *" --help "* ]]; then
    usage "${BASH_SOURCE[0]}"
    exit 0
  fi
  shift
  while (($#)); do
    case $1 in
      --bucket=*) bucket=${1#*=} ;;
      --dry-run) DRY_RUN=true ;;
      --unless-running) UNLESS_RUNNING=true ;;
      --)
        shift
        break
        ;;
      *) die "unknown argument $1; launch/worker.sh --help lists them" ;;
    esac
    shift
  done
  [[ -z $bucket ]] || check_bucket "$bucket"
  case $verb in
    install)
      install_package
      rm -f "$BUCKET"
      if [[ -n $bucket ]]; then
        $DRY_RUN || echo "$bucket" >"$BUCKET"
        mount_bucket "$bucket"
      fi
      ;;
    start) start "$@" ;;
    status) echo "exit=$(status)" ;;
    stop) stop ;;
    *) die "unknown verb '$verb'; valid: install start status stop" ;;
  esac
}

main "$@"
