# shellcheck shell=bash
# What the launch scripts share; sourced, not run. Topologies are written as `plan` writes them: v5p:4x4x4.

# shellcheck disable=SC2034  # set here, read by the scripts that source this file
readonly EXIT_PREEMPTED=75 # what `train` exits with after SIGTERM, its state saved
DRY_RUN=false

die() {
  echo "error: $*" >&2
  exit 1
}

# The comment at the head of a script is its help.
usage() {
  awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$1"
}

# Print a command as it could be pasted into a shell; run it unless this is a dry run.
run() {
  if $DRY_RUN; then
    quoted "$@"
  else
    "$@"
  fi
}

quoted() {
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      line+="$word "
    else
      line+="'${word//\'/\'\\\'\'}' "
    fi
  done
  echo "${line% }"
}

# A tool that a dry run does not need either.
need_tool() {
  $DRY_RUN || command -v "$1" >/dev/null || die "$1 is not on PATH; $2"
}

# parse_flags "flag=VARIABLE ..." "switch=VARIABLE=VALUE ..." ARGUMENTS...: sets the variables; what comes after -- becomes TRAIN.
parse_flags() {
  local flags=" $1 " switches=" dry-run=DRY_RUN=true $2 " name found
  shift 2
  while (($#)); do
    name=${1%%=*} name=${name#--}
    if [[ $1 == -- ]]; then
      # shellcheck disable=SC2034  # read by the scripts that source this file
      TRAIN=("${@:2}")
      return
    elif [[ $1 == --?*=* && $flags == *" $name="* ]]; then
      found=${flags#*" $name="}
      printf -v "${found%% *}" %s "${1#*=}"
    elif [[ $1 == --"$name" && $switches == *" $name="* ]]; then
      found=${switches#*" $name="} found=${found%% *}
      printf -v "${found%%=*}" %s "${found#*=}"
    else
      die "unknown argument $1; launch/$(basename "$0") --help lists them"
    fi
    shift
  done
}

# need_flag NAME VALUE EXAMPLE
need_flag() {
  [[ -n $2 ]] || die "--$1 is missing; e.g. --$1=$3"
}

# Kubernetes and TPU names; what follows them (-slice-0-63-abcde) has to fit into 63 characters too.
check_name() {
  [[ $1 =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ && ${#1} -le 40 ]] ||
    die "--name=$1: expected at most 40 lower-case letters, digits and dashes, a letter first; e.g. --name=stage2-7b"
}

check_bucket() {
  [[ $1 =~ ^[a-z0-9][-_.a-z0-9]+$ ]] || die "--bucket=$1: expected the bucket's name alone, without gs:// and folders"
}

check_count() {
  [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || die "--$1=$2: expected a positive whole number; e.g. --$1=2"
}

check_image() {
  [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] || die "--image=$1 is not the name of an image"
}

# What Kubernetes would take for a reference to a variable, $(NAME), and for an escaped dollar sign, $$.
escape_for_kubernetes() {
  printf '%s\n' "${1//\$/\$\$}"
}

# The verb is told what trains; without it there is nothing to launch.
check_train_arguments() {
  local argument have=""
  for argument in "$@"; do
    case $argument in
      --config=*) have+=config ;;
      --workdir=*) have+=workdir ;;
    esac
    case $argument in # the last three are line breaks of Unicode, which YAML folds into a blank
      *[[:cntrl:]]* | *$'\xc2\x85'* | *$'\xe2\x80\xa8'* | *$'\xe2\x80\xa9'*)
        die "an argument of train holds a line break or another control character: ${argument@Q}"
        ;;
    esac
  done
  [[ $have == *config* && $have == *workdir* ]] ||
    die "train needs --config=FILE and --workdir=DIR after --; e.g. -- --config=configs/llava15.py:finetune --workdir=/gcs/runs/stage2"
}

readonly GENERATIONS="v5e v5p v6e"
readonly FLAT="2x2 2x4 4x4 4x8 8x8 8x16 16x16" # of v5e and v6e
readonly MAX_CUBES=96                          # of 4x4x4 chips: the largest v5p slice

# parse_topology v5p:4x4x4: sets GENERATION, TOPOLOGY, CHIPS, HOSTS and what each service calls them.
# Sources: GKE's "Plan TPUs" (accelerator and topology labels, machine types), Cloud TPU's pages on v5e, v5p and v6e (types, versions).
parse_topology() {
  local shape=$1 x y z
  GENERATION=${shape%%:*}
  TOPOLOGY=${shape#*:}
  case $GENERATION in
    v5e) ACCELERATOR=tpu-v5-lite-podslice MACHINE=ct5lp-hightpu-4t RUNTIME=v2-alpha-tpuv5-lite ;;
    v5p) ACCELERATOR=tpu-v5p-slice MACHINE=ct5p-hightpu-4t RUNTIME=v2-alpha-tpuv5 ;;
    v6e) ACCELERATOR=tpu-v6e-slice MACHINE=ct6e-standard-4t RUNTIME=v2-alpha-tpuv6e ;;
    *) die "--topology=$shape: unknown generation '$GENERATION'; valid: $GENERATIONS, e.g. --topology=v5p:4x4x4" ;;
  esac
  valid_topology || die "--topology=$shape: $GENERATION has no slice '$TOPOLOGY'; valid: $(topologies)"
  IFS=x read -r x y z <<<"$TOPOLOGY"
  CHIPS=$((x * y * ${z:-1}))
  CHIPS_PER_HOST=4 # of every machine type above
  HOSTS=$((CHIPS / CHIPS_PER_HOST))
  case $GENERATION in
    v5e) TYPE=v5litepod-$CHIPS ;;
    v5p) TYPE=v5p-$((2 * CHIPS)) ;; # counted in TensorCores
    v6e) TYPE=v6e-$CHIPS ;;
  esac
}

valid_topology() {
  local x y z
  if [[ $GENERATION != v5p ]]; then
    [[ " $FLAT " == *" $TOPOLOGY "* ]]
    return
  fi
  [[ $TOPOLOGY =~ ^(2x2x1|2x2x2|2x2x4|2x4x4)$ ]] && return
  [[ $TOPOLOGY =~ ^([1-9][0-9]{0,2})x([1-9][0-9]{0,2})x([1-9][0-9]{0,2})$ ]] || return
  x=${BASH_REMATCH[1]} y=${BASH_REMATCH[2]} z=${BASH_REMATCH[3]}
  ((x % 4 == 0 && y % 4 == 0 && z % 4 == 0 && x <= y && y <= z && x * y * z <= MAX_CUBES * 64))
}

topologies() {
  if [[ $GENERATION == v5p ]]; then
    echo "2x2x1, 2x2x2, 2x2x4, 2x4x4, or AxBxC with multiples of 4, A <= B <= C, at most $((MAX_CUBES * 64)) chips"
  else
    echo "${FLAT// /, }"
  fi
}

# Of all v5p slices with as many chips the one with the shortest sides: what the accelerator type alone stands for.
compact_topology() {
  local x y z cubes=$((CHIPS / 64)) best=$TOPOLOGY sum=100000
  if [[ $GENERATION == v5p ]] && ((CHIPS % 64 == 0)); then
    for ((x = 1; x <= cubes; x++)); do
      for ((y = x; x * y * y <= cubes; y++)); do
        z=$((cubes / (x * y)))
        if ((x * y * z == cubes && x + y + z < sum)); then
          sum=$((x + y + z)) best=$((4 * x))x$((4 * y))x$((4 * z))
        fi
      done
    done
  fi
  echo "$best"
}
