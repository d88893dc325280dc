# Sourced by the four train_*.sh, which say what is trained (TASK, METHOD) and hold the defaults that differ: one run
# for each combination of the four lists. Every variable may be set from outside, lists as words: LEARNING_RATES="1e-5 2e-5",
# and H, W and F likewise. A run that is stopped on request saves, and ends the script with its exit code.
# Arguments of the script are added to every run: flags of the original, or of this project (--data.fps-policy resample).

source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

MIXED_PRECISION="${MIXED_PRECISION:-bf16}"
read -ra LEARNING_RATES <<<"$LEARNING_RATES"
read -ra LR_SCHEDULES <<<"${LR_SCHEDULES:-cosine_with_restarts}"
read -ra OPTIMIZERS <<<"${OPTIMIZERS:-adamw_bf16}"
read -ra MAX_TRAIN_STEPS <<<"$MAX_TRAIN_STEPS"
FA_RCP="${FA_RCP:-False}"
ENABLE_DYNAMIC_SHAPE="${ENABLE_DYNAMIC_SHAPE:-0}"
BUCKET_CONFIG="${BUCKET_CONFIG:-$RECIPES/buckets/bucket.yaml}"
VAE_CACHE="${VAE_CACHE:-${LATENTS_CACHE:-1}}"
EMBEDDINGS_CACHE="${EMBEDDINGS_CACHE:-1}"

MINDSPORE_MODE="${MINDSPORE_MODE:-0}"
JIT_LEVEL="${JIT_LEVEL:-O1}"
AMP_LEVEL="${AMP_LEVEL:-O2}"

DATA_ROOT="${DATA_ROOT:-preprocessed-dataset}"
CAPTION_COLUMN="${CAPTION_COLUMN:-prompts.txt}"
VIDEO_COLUMN="${VIDEO_COLUMN:-videos.txt}"
TRANSFORMER_CONFIG="${TRANSFORMER_CONFIG:-}"
TRANSFORMER_CKPT_PATH="${TRANSFORMER_CKPT_PATH:-}"
read -ra H <<<"${H:-768}"
read -ra W <<<"${W:-1360}"
read -ra F <<<"${F:-77}"
MAX_SEQUENCE_LENGTH="${MAX_SEQUENCE_LENGTH:-224}"

((NUM_NPUS > 1)) || SP=False
extra=()
((NUM_NPUS > 1)) && extra+=(--distributed --zero_stage "$DEEPSPEED_ZERO_STAGE")
((VAE_CACHE)) && extra+=(--vae_cache)
((EMBEDDINGS_CACHE)) && extra+=(--embeddings_cache)
((ENABLE_DYNAMIC_SHAPE)) && extra+=(--dynamic_shape --bucket_config "$BUCKET_CONFIG")
[[ -n "$TRANSFORMER_CONFIG" ]] && extra+=(--transformer_config "$TRANSFORMER_CONFIG")
[[ -n "$TRANSFORMER_CKPT_PATH" ]] && extra+=(--transformer_ckpt_path "$TRANSFORMER_CKPT_PATH")
[[ "$TASK" == image-to-video ]] && extra+=(--noised_image_dropout 0.05)

failed=()
code=0
is_stopped() { ((IS_STOP_ASKED || code == 75 || code == 130 || code == 143)); }

for learning_rate in "${LEARNING_RATES[@]}"; do
  for lr_schedule in "${LR_SCHEDULES[@]}"; do
    for optimizer in "${OPTIMIZERS[@]}"; do
      for steps in "${MAX_TRAIN_STEPS[@]}"; do
        name="cogvideox-${METHOD}__optimizer_${optimizer}__steps_${steps}"
        name+="__lr-schedule_${lr_schedule}__learning-rate_${learning_rate}"
        launch train --original "$TASK-$METHOD" \
          --pretrained_model_name_or_path "$MODEL_NAME_OR_PATH" \
          --data_root "$DATA_ROOT" \
          --caption_column "$CAPTION_COLUMN" \
          --video_column "$VIDEO_COLUMN" \
          --height_buckets "${H[@]}" \
          --width_buckets "${W[@]}" \
          --frame_buckets "${F[@]}" \
          --max_sequence_length "$MAX_SEQUENCE_LENGTH" \
          --gradient_accumulation_steps 1 \
          --dataloader_num_workers 2 \
          --seed 42 \
          --mixed_precision "$MIXED_PRECISION" \
          --output_dir "$OUTPUT_ROOT_DIR/$name" \
          --train_batch_size 1 \
          --max_train_steps "$steps" \
          --checkpointing_steps 2000 \
          --gradient_checkpointing \
          --fa_gradient_checkpointing "$FA_RCP" \
          --scale_lr \
          --learning_rate "$learning_rate" \
          --lr_scheduler "$lr_schedule" \
          --lr_warmup_steps 800 \
          --lr_num_cycles 1 \
          --enable_slicing \
          --enable_tiling \
          --optimizer "$optimizer" \
          --beta1 0.9 \
          --beta2 0.95 \
          --weight_decay 0.001 \
          --max_grad_norm 1.0 \
          --report_to tensorboard \
          --mindspore_mode "$MINDSPORE_MODE" \
          --jit_level "$JIT_LEVEL" \
          --amp_level "$AMP_LEVEL" \
          --enable_sequence_parallelism "$SP" \
          --sequence_parallel_shards "$SP_SIZE" \
          "${extra[@]}" "$@" && code=0 || code=$?
        is_stopped && break 4
        ((code == 0)) || failed+=("$name (exit code $code)")
        printf -- '-------------------- Finished executing script --------------------\n\n'
      done
    done
  done
done

((${#failed[@]})) && printf 'FAILED: %s\n' "${failed[@]}" >&2
if is_stopped; then
  echo "Stopped in $name (exit code $code); the same script goes on." >&2
  exit "$((code ? code : 75))"
fi
((${#failed[@]} == 0))
