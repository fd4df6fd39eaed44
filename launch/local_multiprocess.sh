#!/usr/bin/env bash
# Train with several processes on this machine: to try what a pod does, or to use several GPUs that no scheduler manages.
#
#   launch/local_multiprocess.sh --processes=2 -- --config=configs/demo.py --workdir=runs/two
#
#   --processes=2            how many
#   --port=PORT              of the coordinator on 127.0.0.1; a free one by default
#   --grace-seconds=60       how long the others may take to end after one has failed, and all after a signal, before SIGKILL
#   --program='python -m deepstack_jax.train'    what to start instead, words split at blanks
#   --dry-run                print the commands
#
# Every line of output is marked with its process. SIGINT and SIGTERM go to every process, so that the run saves its state. When one
# fails, the others are stopped. The exit code is the worst one: that of the first failure, else 130, else 75, else 0.
# Process I gets GPU I. On the CPU every process has one device; NPROC=8 XLA_FLAGS=--xla_force_host_platform_device_count=4 gives each four.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

PROCESSES=2 PORT="" GRACE=60 PROGRAM_LINE="python -m deepstack_jax.train"
PROGRAM=() # its words
TRAIN=()
PIDS=()      # of the processes, by number; emptied one by one
LABELLERS=() # of the `sed`s that mark the output
KILLER=""    # the process that ends those who do not end by themselves
WORST=0
FAILED=false

readonly FLAGS="processes=PROCESSES port=PORT grace-seconds=GRACE program=PROGRAM_LINE"

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start() {
  local output command
  # Each would take all GPUs otherwise, as nothing tells jax that they share a machine.
  command=(env JAX_LOCAL_DEVICE_IDS="${JAX_LOCAL_DEVICE_IDS:-$1}" "${PROGRAM[@]}" "${TRAIN[@]}")
  command+=(--coordinator_address=127.0.0.1:"$PORT" --process_count="$PROCESSES" --process_id="$1")
  if $DRY_RUN; then
    quoted "${command[@]}"
    return
  fi
  # `setsid`: a Ctrl-C must not reach a process twice, from the terminal and from here, since the second stops without saving. `env`:
  # bash starts background processes deaf to Ctrl-C.
  exec {output}> >(trap "" INT TERM && exec setsid sed -u "s/^/[$1] /")
  LABELLERS+=($!)
  setsid env --default-signal=INT "${command[@]}" >&"$output" 2>&1 </dev/null &
  PIDS[$1]=$!
  exec {output}>&-
}

signal_all() {
  local pid
  for pid in "${PIDS[@]}"; do
    kill -s "$1" "$pid" 2>/dev/null || true
  done
}

# stop_all SIGNAL: ask, and end whoever has not ended after the grace period, with its data workers.
stop_all() {
  local pid
  signal_all "$1"
  [[ -z $KILLER ]] || return 0
  (
    trap 'kill "$!" && exit' TERM
    sleep "$GRACE" &
    wait "$!"
    for pid in "${PIDS[@]}"; do
      kill -s KILL -- "-$pid" 2>/dev/null || true
    done
  ) >/dev/null 2>&1 &
  KILLER=$!
}

# ended NUMBER CODE: also end the data workers that it left over, which would keep the output open.
ended() {
  kill -s TERM -- "-${PIDS[$1]}" 2>/dev/null || true
  unset "PIDS[$1]"
  $FAILED && return
  case $2 in
    0) ;;
    "$EXIT_PREEMPTED") ((WORST != 0)) || WORST=$2 ;;
    130) WORST=$2 ;;
    *)
      WORST=$2 FAILED=true
      echo "process $1 failed with code $2; stopping the others" >&2
      stop_all TERM
      ;;
  esac
}

# `wait -n` names who ended; where a trapped signal interrupted it, whoever bash has reaped meanwhile is asked for by number.
wait_for_all() {
  local pid code other number
  while ((${#PIDS[@]})); do
    pid="" code=0
    wait -n -p pid "${PIDS[@]}" || code=$?
    for number in "${!PIDS[@]}"; do
      if [[ ${PIDS[$number]} == "${pid:-}" ]]; then
        ended "$number" "$code"
      elif ! kill -0 "${PIDS[$number]}" 2>/dev/null; then
        other=0
        wait "${PIDS[$number]}" || other=$?
        ended "$number" "$other"
      fi
    done
  done
}

main() {
  local number
  if [[ $# == 0 || " $* " == *" --help "* ]]; then
    usage "${BASH_SOURCE[0]}"
    exit 0
  fi
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || die "bash $BASH_VERSION is too old; expected 5.1 or newer"
  parse_flags "$FLAGS" "" "$@"
  read -r -a PROGRAM <<<"$PROGRAM_LINE"
  check_count processes "$PROCESSES"
  check_count grace-seconds "$GRACE"
  [[ -z $PORT || ($PORT =~ ^[1-9][0-9]{0,4}$ && $PORT -lt 65536) ]] || die "--port=$PORT: expected 1 to 65535"
  need_tool "${PROGRAM[0]}" "activate the environment that has it"
  [[ ${PROGRAM[*]} != *deepstack_jax.train ]] || check_train_arguments "${TRAIN[@]}"
  PORT=${PORT:-$(free_port)}
  trap 'stop_all INT' INT
  trap 'stop_all TERM' TERM
  for ((number = 0; number < PROCESSES; number++)); do
    start "$number"
  done
  $DRY_RUN && return
  wait_for_all
  [[ -z $KILLER ]] || kill "$KILLER" 2>/dev/null || true
  wait "${LABELLERS[@]}" || true
  exit "$WORST"
}

main "$@"
