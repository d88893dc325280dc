# Sourced by the scripts beside it: which program runs, in how many processes.
#   launch train --original text-to-video-sft ...
# PYTHON names another interpreter. Above 8 cards every node runs the script, with its own NODE_RANK.

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
RECIPES="$SCRIPT_DIR/../recipes"
PYTHON="${PYTHON:-python}"

launch() {
  local command=("$PYTHON")
  if ((NUM_NPUS > 1)); then
    command+=(-m torch.distributed.run --nproc-per-node "$((NUM_NPUS < 8 ? NUM_NPUS : 8))")
    if ((NUM_NPUS > 8)); then
      ((NUM_NPUS % 8 == 0)) || { echo "NUM_NPUS=$NUM_NPUS: above 8 give a multiple of 8" >&2; return 2; }
      command+=(--nnodes "$((NUM_NPUS / 8))" --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-127.0.0.1}")
    else
      command+=(--standalone)
    fi
  fi
  command+=(-m cogvideox_factory "$@")
  printf 'Running command:'
  printf ' %q' "${command[@]}"
  printf '\n'
  "${command[@]}"
}
