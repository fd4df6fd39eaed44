#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster that XPK manages (https://github.com/AI-Hypercomputer/xpk): XPK writes the JobSet.
#
#   launch/xpk.sh create --name=stage2-7b --cluster=CLUSTER --zone=ZONE --topology=v5p:4x4x4 --image=IMAGE --storage=bucket -- \
#     --config=configs/llava15.py:finetune --config.data.root=/gcs/data --workdir=/gcs/runs/stage2-7b
#   launch/xpk.sh list --cluster=CLUSTER --zone=ZONE
#   launch/xpk.sh logs --name=NAME             follow the first host of the first slice
#   launch/xpk.sh delete --name=NAME --cluster=CLUSTER --zone=ZONE
#
#   --topology=v5p:4x4x4  --slices=1           as `plan` writes it, and how many of them
#   --image=IMAGE            of launch/Dockerfile
#   --storage=NAME           a bucket that `xpk storage attach` mounts at /gcs; holds data, weights and workdirs
#   --priority=medium        very-low, low, medium, high, very-high
#   --max-restarts=50        restarts after preemptions and kills, which XPK counts alike; exit code 1, a mistake in the input, ends the run
#   --grace-seconds=120      from SIGTERM to SIGKILL; Spot nodes give less, whatever is asked for
#   --project=PROJECT
#   --dry-run                print the commands
# Everything after -- goes to python -m deepstack_jax.train.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly VERBS="create list logs delete" PRIORITIES="very-low low medium high very-high"
NAME="" CLUSTER="" ZONE="" PROJECT="" SHAPE="" IMAGE="" STORAGE="" SLICES=1 PRIORITY=medium MAX_RESTARTS=50 GRACE_SECONDS=120
TRAIN=()

readonly FLAGS="name=NAME cluster=CLUSTER zone=ZONE project=PROJECT topology=SHAPE slices=SLICES image=IMAGE \
  storage=STORAGE priority=PRIORITY max-restarts=MAX_RESTARTS grace-seconds=GRACE_SECONDS"

check_run() {
  need_flag topology "$SHAPE" v5p:4x4x4
  parse_topology "$SHAPE"
  [[ $SHAPE != v5e:2x2 ]] || die "--topology=v5e:2x2: XPK has no v5e slice below 2x4; take that, or launch/gke.sh"
  need_flag image "$IMAGE" us-docker.pkg.dev/PROJECT/REPOSITORY/deepstack-jax:tpu
  check_image "$IMAGE"
  check_count slices "$SLICES"
  check_count max-restarts "$MAX_RESTARTS"
  check_count grace-seconds "$GRACE_SECONDS"
  [[ " $PRIORITIES " == *" $PRIORITY "* ]] || die "--priority=$PRIORITY; valid: $PRIORITIES"
  check_train_arguments "${TRAIN[@]}"
}

# XPK counts chips or TensorCores, and takes the shape itself where one number stands for several.
xpk_type() {
  case $GENERATION in
    v5p) echo "v5p-$TOPOLOGY" ;;
    *) echo "$TYPE" ;;
  esac
}

# XPK runs --command in a subshell and sends its SIGTERM there: `exec` puts train in its place. It ends a run on exit codes other than
# 42, 127 to 255 and those named. The command is in the Pod's own, where Kubernetes fills in variables before any shell.
create() {
  local options=(--workload="$NAME" --tpu-type="$(xpk_type)" --num-slices="$SLICES" --docker-image="$IMAGE" --priority="$PRIORITY")
  options+=(--max-restarts="$MAX_RESTARTS" --restart-on-exit-codes="$EXIT_PREEMPTED")
  options+=(--termination-grace-period-seconds="$GRACE_SECONDS" --env=PYTHONUNBUFFERED=1)
  if [[ -n $STORAGE ]]; then
    options+=(--storage="$STORAGE" --env=JAX_COMPILATION_CACHE_DIR=/gcs/cache/jax)
  fi
  workload create "${options[@]}" --command="$(escape_for_kubernetes "$(quoted exec python -m deepstack_jax.train "${TRAIN[@]}")")"
}

workload() {
  run xpk workload "$1" --cluster="$CLUSTER" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} "${@:2}"
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
  if [[ $verb != list ]]; then
    need_flag name "$NAME" stage2-7b
    check_name "$NAME"
  fi
  if [[ $verb == logs ]]; then
    need_tool kubectl "install it with: gcloud components install kubectl gke-gcloud-auth-plugin"
    local pods="jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    run kubectl logs --follow --tail=100 --selector="$pods"
    return
  fi
  need_flag cluster "$CLUSTER" my-cluster
  need_flag zone "$ZONE" us-east5-a
  [[ $verb != create ]] || check_run
  need_tool xpk "install it with: pip install xpk"
  case $verb in
    create) create ;;
    list) workload list ;;
    delete) workload delete --workload="$NAME" ;;
  esac
}

main "$@"
