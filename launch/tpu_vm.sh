#!/usr/bin/env bash
# Train on one TPU slice through the Cloud TPU API (queued resources and ssh): the quick path, without a cluster.
# That API is in maintenance and has no chips newer than v6e; for several slices and for long runs see launch/gke.sh.
#
#   launch/tpu_vm.sh up --name=stage2-7b --zone=ZONE --topology=v5p:4x4x4 --spot --bucket=BUCKET -- \
#     --config=configs/llava15.py:finetune --config.data.root=/gcs/data --workdir=/gcs/runs/stage2-7b
#
#   up        create, install, run and watch
#   create    ask for the slice and wait until it is there; interrupted meanwhile, `create` or `up` goes on waiting
#   install   copy HEAD of this repository to every worker and install it
#   run       start train on every worker
#   tail      follow the log of worker 0, or of --worker=N
#   watch     until the run is done, or the slice deleted; after a preemption make the slice again and go on from the last checkpoint
#   status    state of the slice and exit code, or `running`, of every worker
#   stop      SIGTERM to every worker: the state is saved
#   delete    give the slice back; it costs until then
#
#   --name=NAME  --zone=ZONE  --project=PROJECT (gcloud's own otherwise)
#   --topology=v5p:4x4x4     slice, as `plan` writes it
#   --on-demand              create at once or fail, instead of waiting in the queue
#   --spot                   cheaper, and taken away at any time
#   --bucket=BUCKET          mounted at /gcs on every worker; data and workdir must be there, since a slice loses its disks
#   --runtime-version=V      of the VM image; by default the one of the generation
#   --max-restarts=20        how often `watch` goes on after preemptions
#   --poll=30                seconds between two looks at the slice
#   --dry-run                print the commands
# Everything after -- goes to python -m deepstack_jax.train. `watch` and `up` exit with train's code; Ctrl-C leaves the run going.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly VERBS="up create install run tail watch status stop delete" WORKER_SCRIPT="bash deepstack_jax/launch/worker.sh"
readonly MAX_FAILED_CALLS=5 # of gcloud in a row, before waiting or watching ends
FAILED_CALLS=0
NEXT="" # what `watch` has to do before train runs everywhere: request (a new slice in place of this one), install, run; "" = nothing
NAME="" ZONE="" PROJECT="" SHAPE="" BUCKET="" RUNTIME_VERSION="" QUEUED=true SPOT=false WORKER=0 MAX_RESTARTS=20 POLL=30
TRAIN=()

readonly FLAGS="name=NAME zone=ZONE project=PROJECT topology=SHAPE bucket=BUCKET runtime-version=RUNTIME_VERSION \
  worker=WORKER max-restarts=MAX_RESTARTS poll=POLL"
readonly SWITCHES="on-demand=QUEUED=false spot=SPOT=true"

check_arguments() {
  need_flag name "$NAME" stage2-7b
  check_name "$NAME"
  need_flag zone "$ZONE" us-east5-a
  [[ $WORKER =~ ^([0-9]+|all)$ ]] || die "--worker=$WORKER: expected a number or all"
  check_count max-restarts "$MAX_RESTARTS"
  [[ $POLL =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "--poll=$POLL: expected seconds, e.g. --poll=30"
  if [[ $1 == create || $1 == up || $1 == watch ]]; then
    need_flag topology "$SHAPE" v5p:4x4x4
    parse_topology "$SHAPE"
    local compact
    compact=$(compact_topology)
    [[ $compact == "$TOPOLOGY" ]] || die "--topology=$SHAPE: the Cloud TPU API makes $TYPE as $compact; take that, or launch/gke.sh"
  fi
  if [[ $1 == run || $1 == up || $1 == watch ]]; then
    check_train_arguments "${TRAIN[@]}"
  fi
  [[ -z $BUCKET ]] || check_bucket "$BUCKET"
  if [[ $1 == up || $1 == watch ]]; then # which install, on a new slice too
    [[ -n $BUCKET || " ${TRAIN[*]}" != *=/gcs/* ]] || die "--bucket is missing: train is given paths in /gcs; e.g. --bucket=my-bucket"
  fi
  need_tool gcloud "install it from https://cloud.google.com/sdk/docs/install"
}

# tpu COMMAND...: gcloud compute tpus COMMAND... in the zone and project of this slice.
tpu() {
  run gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet
}

on_all() {
  tpu tpu-vm ssh "$NAME" --worker=all --command="$1"
}

create() {
  local condition=missing
  $DRY_RUN || condition=$(slice_condition)
  request "$condition"
  $DRY_RUN || wait_until_ready
}

# request CONDITION: ask for the slice, if it is not there or asked for already.
request() {
  local options=(--accelerator-type="$TYPE")
  $SPOT && options+=(--spot)
  case $1 in
    ready) echo "$NAME is there already" ;;
    waiting) echo "$NAME is in the queue already" ;;
    *)
      if $QUEUED; then
        tpu queued-resources create "$NAME" --node-id="$NAME" --runtime-version="${RUNTIME_VERSION:-$RUNTIME}" "${options[@]}"
      else
        tpu tpu-vm create "$NAME" --version="${RUNTIME_VERSION:-$RUNTIME}" "${options[@]}"
      fi
      ;;
  esac
}

wait_until_ready() {
  local condition
  while true; do
    condition=$(slice_condition)
    count_failed_calls "$condition" "$NAME stays in the queue, and the same command goes on waiting"
    case $condition in
      ready) return ;;
      unknown) ;;
      waiting) echo "$(date +%T) $NAME waits for its chips" ;;
      *) die "$NAME did not come up ($condition); launch/tpu_vm.sh status shows why, delete gives it back" ;;
    esac
    sleep "$POLL"
  done
}

# count_failed_calls CONDITION HOW_IT_STANDS: the network may be gone for a moment, and must not be for long.
count_failed_calls() {
  if [[ $1 == unknown ]]; then
    ((++FAILED_CALLS < MAX_FAILED_CALLS)) || die "gcloud failed $FAILED_CALLS times in a row; $2"
  else
    FAILED_CALLS=0
  fi
}

# What gcloud says of the queue entry and the node, in one word: waiting, ready, preempted, missing (or taken down by a user),
# unknown (gcloud failed). A slice that was taken away keeps its entry, as SUSPENDED, and its node, as PREEMPTED.
slice_condition() {
  local queue=ACTIVE initiator="" node
  if $QUEUED; then
    read -r queue initiator <<<"$(state queued-resources "state.state,state.stateInitiator")"
  fi
  case $queue in
    ACTIVE) ;;
    ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES | SUSPENDING | DELETING) echo waiting && return ;;
    SUSPENDED)
      if [[ $initiator == USER ]]; then echo missing; else echo preempted; fi
      return
      ;;
    *) echo "${queue,,}" && return ;;
  esac
  node=$(state tpu-vm "state")
  case $node in
    READY) echo ready ;;
    PREEMPTED | TERMINATED | STOPPED) echo preempted ;;
    MISSING | UNKNOWN) echo "${node,,}" ;;
    *) echo waiting ;;
  esac
}

# A call that fails for want of a network must not look like a slice that is gone.
state() {
  local answer
  if answer=$(tpu "$1" describe "$NAME" --format="value($2)" 2>&1); then
    tail -n 1 <<<"$answer"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo MISSING
  else
    echo UNKNOWN
  fi
}

install() {
  local archive failed=0
  archive=$(mktemp --suffix=.tar.gz)
  [[ -z $(git -C "$REPOSITORY" status --porcelain 2>/dev/null) ]] || echo "warning: changes that are not committed are not installed" >&2
  run git -C "$REPOSITORY" archive --prefix=deepstack_jax/ --output="$archive" HEAD &&
    tpu tpu-vm scp "$archive" "$NAME:deepstack_jax.tar.gz" --worker=all &&
    on_all "rm -rf deepstack_jax && tar xzf deepstack_jax.tar.gz && $WORKER_SCRIPT install ${BUCKET:+"--bucket=$BUCKET"}" ||
    failed=$?
  rm -f "$archive"
  return "$failed"
}

# run_train [OPTION]: of worker.sh start.
run_train() {
  on_all "$WORKER_SCRIPT start ${1:+"$1 "}-- $(quoted "${TRAIN[@]}")"
}

delete() {
  if $QUEUED; then
    tpu queued-resources delete "$NAME" --force
  else
    tpu tpu-vm delete "$NAME"
  fi
}

status() {
  if $QUEUED; then
    tpu queued-resources describe "$NAME" --format="value(state)"
  fi
  tpu tpu-vm describe "$NAME" --format="value(state,health)"
  on_all "$WORKER_SCRIPT status"
}

# What the workers say, in one word: running, done, stopped (by hand), again (all ended, at least one by SIGTERM or lost; whoever
# loses another ends with an error for that alone), failed:CODE, unknown (gcloud failed).
run_condition() {
  local answer code ended="done"
  answer=$(on_all "$WORKER_SCRIPT status" 2>/dev/null) || { echo unknown && return; }
  answer=$(grep -o 'exit=[a-z0-9]*' <<<"$answer" | cut -d= -f2) || { echo unknown && return; }
  for code in $answer; do
    [[ $code =~ ^(0|running|stopped|none|$EXIT_PREEMPTED)$ || $answer == *lost* ]] || { echo "failed:$code" && return; }
  done
  for code in $answer; do
    case $code in
      running) echo running && return ;;
      stopped) ended=stopped ;;
      0) ;;
      *) [[ $ended == stopped ]] || ended=again ;;
    esac
  done
  echo "$ended"
}

# next_step CONDITION: fails where ssh does not answer yet, or the slice is taken away meanwhile; then it is to be tried again.
next_step() {
  case $1 in
    preempted) delete ;;
    missing) request missing && NEXT=install ;;
    ready)
      if [[ $NEXT != run ]]; then
        install || return
        NEXT=run
      fi
      run_train --unless-running && NEXT=""
      ;;
  esac
}

watch() {
  local restarts=0 condition
  while true; do
    condition=$(slice_condition)
    case $condition:$NEXT in
      ready:) condition=$(run_condition) ;;
      ready:* | preempted:request | missing:request)
        next_step "$condition" && FAILED_CALLS=0 && continue
        condition=unknown
        ;;
    esac
    count_failed_calls "$condition" "the slice costs until launch/tpu_vm.sh delete, a run may go on: launch/tpu_vm.sh status"
    case $condition in
      done) echo "$NAME is done; launch/tpu_vm.sh delete gives the slice back" && return ;;
      stopped) echo "$NAME was stopped by hand; launch/tpu_vm.sh run goes on, delete gives the slice back" && exit "$EXIT_PREEMPTED" ;;
      waiting) echo "$(date +%T) $NAME waits for its chips" ;;
      missing) [[ $NEXT == request ]] || die "$NAME was deleted, or is not in $ZONE; launch/tpu_vm.sh up makes it again" ;;
      again | preempted)
        ((++restarts <= MAX_RESTARTS)) || die "$NAME was stopped more than $MAX_RESTARTS times; --max-restarts allows more"
        echo "$(date +%T) $NAME: $condition; restart $restarts of $MAX_RESTARTS"
        [[ $condition == preempted ]] && NEXT=request || NEXT=run
        ;;
      failed:*)
        echo "error: train failed on $NAME with code ${condition#*:}; launch/tpu_vm.sh tail shows why" >&2
        on_all "$WORKER_SCRIPT stop"
        exit "${condition#*:}"
        ;;
      failed) die "the queue entry of $NAME failed; launch/tpu_vm.sh status shows why" ;;
    esac
    sleep "$POLL"
  done
}

up() {
  local condition
  if $DRY_RUN; then
    create
    install
    run_train --unless-running
  else
    condition=$(slice_condition)
    [[ $condition != ready || $(run_condition) != running ]] ||
      die "a run goes on already on $NAME; launch/tpu_vm.sh watch follows it, stop ends it"
    if [[ $condition == preempted ]]; then
      NEXT=request # which deletes what is left of it first
    else
      request "$condition"
      NEXT=install
    fi
    watch
  fi
}

main() {
  local verb=${1:-}
  if [[ $# == 0 || " $* " == *" --help "* ]]; then
    usage "${BASH_SOURCE[0]}"
    exit 0
  fi
  [[ " $VERBS " == *" $verb "* ]] || die "unknown verb '$verb'; valid: $VERBS"
  shift
  parse_flags "$FLAGS" "$SWITCHES" "$@"
  check_arguments "$verb"
  case $verb in
    up) up ;;
    run) run_train ;;
    tail) tpu tpu-vm ssh "$NAME" --worker="$WORKER" --command="tail -n 100 -F run/log" ;;
    watch) if $DRY_RUN; then status; else watch; fi ;;
    stop) on_all "$WORKER_SCRIPT stop" ;;
    *) "$verb" ;;
  esac
}

main "$@"
