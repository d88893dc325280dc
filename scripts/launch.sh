# Sourced by the scripts beside it: which program runs, in how many processes.
#   launch train --original text-to-video-sft ...
# PYTHON names another interpreter, ENGINE=mindspore the other engine. Above 8 cards every node runs the script, with its own NODE_RANK.
# With ENGINE=mindspore what several processes of prepare and inference print lies in LOG_DIR, and they meet at MASTER_PORT.

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
RECIPES="$SCRIPT_DIR/../recipes"
PYTHON="${PYTHON:-python}"
IS_STOP_ASKED=0
STOP_SIGNAL= # what a program is sent, whatever this script was

launch() {
  [[ -z "${ENGINE:-}" ]] || set -- "$@" --engine "$ENGINE"
  local command=("$PYTHON" -m cogvideox_factory "$@")
  local per_node=$((NUM_NPUS < 8 ? NUM_NPUS : 8)) num_nodes=$(((NUM_NPUS + 7) / 8))
  local node=(--node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-127.0.0.1}")
  ((NUM_NPUS <= 8 || NUM_NPUS % 8 == 0)) || { echo "NUM_NPUS=$NUM_NPUS: above 8 give a multiple of 8" >&2; return 2; }
  if ((NUM_NPUS > 1)) && [[ "$1" == train ]]; then # torchrun answers 1 whatever happened, and leaves no time to save
    command=("$PYTHON" -m cogvideox_factory launch --nproc "$per_node" --restarts 0)
    ((num_nodes == 1)) || command+=(--nodes "$num_nodes" "${node[@]}")
    command+=(-- "$@")
  elif ((NUM_NPUS > 1)) && [[ "${ENGINE:-}" == mindspore ]]; then # msrun starts the `python` of PATH, and leaves it behind but at SIGINT
    local -x PATH="$(dirname -- "$(command -v -- "$PYTHON")"):$PATH"
    STOP_SIGNAL=INT
    command=("$PYTHON" -m mindspore.parallel.cluster.run --join=True --log_dir="${LOG_DIR:-msrun-logs}")
    command+=(--worker_num="$NUM_NPUS" --local_worker_num="$per_node" --master_port="${MASTER_PORT:-8118}")
    ((num_nodes == 1)) || command+=(--node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}")
    command+=(python -m cogvideox_factory "$@")
  elif ((NUM_NPUS > 1)); then
    command=("$PYTHON" -m torch.distributed.run --nproc-per-node "$per_node")
    if ((num_nodes == 1)); then command+=(--standalone); else command+=(--nnodes "$num_nodes" "${node[@]}"); fi
    command+=(-m cogvideox_factory "$@")
  fi
  printf 'Running command:'
  printf ' %q' "${command[@]}"
  printf '\n'
  watch_over "${command[@]}"
}

# Run a program and return its exit code. Requests to stop are passed on and waited for: bash would end at once and leave
# the program behind. In a process group of its own it hears Ctrl-C once, from here.
watch_over() {
  local child code signal
  set -m
  "$@" &
  child=$!
  set +m
  for signal in INT TERM HUP USR1; do
    trap "IS_STOP_ASKED=1; kill -${STOP_SIGNAL:-$signal} $child 2>/dev/null || true" "$signal"
  done
  wait "$child" || true
  while kill -0 "$child" 2>/dev/null; do # a signal has ended `wait`, not the program
    wait "$child" || true
  done
  wait "$child" && code=0 || code=$?
  trap - INT TERM HUP USR1
  [[ -n "$STOP_SIGNAL" ]] && ((IS_STOP_ASKED && code == 0)) && code=130 # msrun calls that done
  return "$code"
}
