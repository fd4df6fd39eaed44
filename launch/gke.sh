#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster with the JobSet of gke_jobset.yaml; docs/pods.md goes through it step by step.
#
#   launch/gke.sh create --name=stage2-7b --topology=v5p:4x4x4 --image=IMAGE --bucket=BUCKET -- \
#     --config=configs/llava15.py:finetune --config.data.root=/gcs/data --workdir=/gcs/runs/stage2-7b
#   launch/gke.sh render ...          print the manifest and do nothing
#   launch/gke.sh logs --name=NAME    follow the first host of the first slice
#   launch/gke.sh status --name=NAME
#   launch/gke.sh stop --name=NAME    suspend it: SIGTERM, state saved; launch/gke.sh resume --name=NAME goes on
#   launch/gke.sh delete --name=NAME
#
#   --topology=v5p:4x4x4     slice, as `plan` writes it
#   --slices=1               how many of them
#   --image=IMAGE            of launch/Dockerfile
#   --bucket=BUCKET          mounted at /gcs by Cloud Storage FUSE; holds data, weights, workdirs and JAX's compilation cache
#   --service-account=default    Kubernetes service account that may use the bucket
#   --user=1000              user of the processes in the Pods; 0 where the cluster hands its chips to root alone
#   --queue=NAME             Kueue's LocalQueue; without it no queue
#   --max-restarts=10        restarts after failures; after a preemption (exit code 75, or the node is gone) it always restarts
#   --grace-seconds=120      from SIGTERM to SIGKILL; Spot nodes give less, whatever is asked for
#   --namespace=default
#   --dry-run                print the commands and the manifest
# Everything after -- goes to python -m deepstack_jax.train.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MANIFEST="$(dirname "${BASH_SOURCE[0]}")/gke_jobset.yaml"
readonly VERBS="render create logs status stop resume delete"
# shellcheck disable=SC2034  # read through ${!variable} in render
MOUNT=/gcs
NAME="" SHAPE="" IMAGE="" BUCKET="" QUEUE="" SERVICE_ACCOUNT=default NAMESPACE=default RUN_AS=1000 SLICES=1 MAX_RESTARTS=10 GRACE_SECONDS=120
TRAIN=()

readonly FLAGS="name=NAME topology=SHAPE slices=SLICES image=IMAGE bucket=BUCKET service-account=SERVICE_ACCOUNT \
  user=RUN_AS queue=QUEUE max-restarts=MAX_RESTARTS grace-seconds=GRACE_SECONDS namespace=NAMESPACE"

check_run() {
  need_flag topology "$SHAPE" v5p:4x4x4
  parse_topology "$SHAPE"
  need_flag image "$IMAGE" us-docker.pkg.dev/PROJECT/REPOSITORY/deepstack-jax:tpu
  need_flag bucket "$BUCKET" my-bucket
  check_bucket "$BUCKET"
  check_image "$IMAGE"
  [[ -z $QUEUE || $QUEUE =~ ^[a-z0-9]([-a-z0-9]*[a-z0-9])?$ ]] || die "--queue=$QUEUE is not the name of a LocalQueue"
  [[ $SERVICE_ACCOUNT =~ ^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$ ]] || die "--service-account=$SERVICE_ACCOUNT is not a Kubernetes service account"
  [[ $RUN_AS =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "--user=$RUN_AS: expected the number of a user; e.g. --user=1000"
  check_count slices "$SLICES"
  check_count max-restarts "$MAX_RESTARTS"
  check_count grace-seconds "$GRACE_SECONDS"
  ((SLICES == 1 || HOSTS > 1)) || die "--slices=$SLICES: GKE joins slices of several hosts only, and $SHAPE has one host; take a larger topology"
  check_train_arguments "${TRAIN[@]}"
}

# The train verb's arguments as a YAML flow list of double-quoted strings.
train_arguments() {
  local argument list=""
  for argument in "${TRAIN[@]}"; do
    argument=$(escape_for_kubernetes "${argument//\\/\\\\}")
    list+="\"${argument//\"/\\\"}\", "
  done
  echo "[${list%, }]"
}

# The manifest with every ${VARIABLE} filled in; the line of the queue goes where there is none.
# shellcheck disable=SC2016,SC2034  # dollar signs that are the manifest's; variables read through ${!variable}
render() {
  local line filled variable TRAIN_ARGUMENTS RUN_AS_NON_ROOT=true CAPABILITIES="[]"
  TRAIN_ARGUMENTS=$(train_arguments)
  # Only root keeps a capability that it is given; with it the TPU's driver may lock the memory that it shares with the chips.
  [[ $RUN_AS != 0 ]] || RUN_AS_NON_ROOT=false CAPABILITIES="[SYS_RESOURCE]"
  while IFS= read -r line; do
    [[ $line == *'${QUEUE}'* && -z $QUEUE ]] && continue
    filled=""
    while [[ ! $line =~ ^' '*'#' && $line =~ ^([^\$]*)'${'([A-Z_]+)'}'(.*)$ ]]; do
      variable=${BASH_REMATCH[2]}
      filled+=${BASH_REMATCH[1]}${!variable} line=${BASH_REMATCH[3]}
    done
    echo "$filled$line"
  done <"$MANIFEST"
}

create() {
  local manifest
  manifest=$(render)
  if $DRY_RUN; then
    quoted kubectl --namespace="$NAMESPACE" create --filename=-
    echo "$manifest"
  else
    kubectl --namespace="$NAMESPACE" create --filename=- <<<"$manifest"
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
  parse_flags "$FLAGS" "" "$@"
  need_flag name "$NAME" stage2-7b
  check_name "$NAME"
  if [[ $verb == render || $verb == create ]]; then
    check_run
  fi
  if [[ $verb != render ]]; then
    need_tool kubectl "install it with: gcloud components install kubectl gke-gcloud-auth-plugin"
  fi
  local of_run="jobset.sigs.k8s.io/jobset-name=$NAME" kubectl=(kubectl --namespace="$NAMESPACE")
  case $verb in
    render) render ;;
    create) create ;;
    logs)
      run "${kubectl[@]}" logs --follow --container=train --tail=100 \
        --selector="$of_run,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
      ;;
    status)
      run "${kubectl[@]}" get jobset "$NAME" --output=wide
      run "${kubectl[@]}" get pods --selector="$of_run" --output=wide
      ;;
    stop) run "${kubectl[@]}" patch jobset "$NAME" --type=merge --patch='{"spec":{"suspend":true}}' ;;
    resume) run "${kubectl[@]}" patch jobset "$NAME" --type=merge --patch='{"spec":{"suspend":false}}' ;;
    delete) run "${kubectl[@]}" delete jobset "$NAME" ;;
  esac
}

main "$@"
