# Sourced by the two run_infer_*.sh, which hold the defaults that differ. Every variable may be set from outside;
# arguments are added to the command.

source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

NUM_NPUS="${NUM_NPUS:-8}"
SP="${SP:-True}"
SP_SIZE="${SP_SIZE:-$NUM_NPUS}"
DEEPSPEED_ZERO_STAGE="${DEEPSPEED_ZERO_STAGE:-3}"
MINDSPORE_MODE="${MINDSPORE_MODE:-0}"
JIT_LEVEL="${JIT_LEVEL:-O1}"
# TRANSFORMER_PATH and LORA_PATH: one of them at most.
TRANSFORMER_PATH="${TRANSFORMER_PATH:-}"
LORA_PATH="${LORA_PATH:-}"
TRANSFORMER_CONFIG="${TRANSFORMER_CONFIG:-}"
PROMPT="${PROMPT:-}"
H="${H:-768}"
W="${W:-1360}"
F="${F:-77}"
MAX_SEQUENCE_LENGTH="${MAX_SEQUENCE_LENGTH:-224}"
OUTPUT_DIR="${OUTPUT_DIR:-./output_infer_${H}_${W}_${F}}"

extra=()
if ((NUM_NPUS > 1)); then
  extra+=(--distributed --zero_stage "$DEEPSPEED_ZERO_STAGE")
else
  SP=False
fi

launch generate --original infer \
  --pretrained_model_name_or_path "$MODEL_NAME_OR_PATH" \
  --prompt "$PROMPT" \
  --image_path "$IMAGE_PATH" \
  --transformer_ckpt_path "$TRANSFORMER_PATH" \
  --lora_ckpt_path "$LORA_PATH" \
  --transformer_config "$TRANSFORMER_CONFIG" \
  --height "$H" \
  --width "$W" \
  --frame "$F" \
  --max_sequence_length "$MAX_SEQUENCE_LENGTH" \
  --video_output_path "$OUTPUT_DIR/output.mp4" \
  --seed 42 \
  --mixed_precision bf16 \
  --mindspore_mode "$MINDSPORE_MODE" \
  --jit_level "$JIT_LEVEL" \
  --enable_sequence_parallelism "$SP" \
  --sequence_parallel_shards "$SP_SIZE" \
  "${extra[@]}" "$@"
