#!/usr/bin/env bash
# Clips and captions -> the cache that train_*.sh read as DATA_ROOT. Every variable may be set from outside; arguments are
# added to the command. H, W and F may be several words each: buckets.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

NUM_NPUS="${NUM_NPUS:-8}"
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-${MODEL_ID:-THUDM/CogVideoX1.5-5b}}"
DATA_ROOT="${DATA_ROOT:-/path/to/my/datasets/video-dataset}"
CAPTION_COLUMN="${CAPTION_COLUMN:-prompt.txt}"
VIDEO_COLUMN="${VIDEO_COLUMN:-videos.txt}"
OUTPUT_DIR="${OUTPUT_DIR:-preprocessed-dataset}"
read -ra H <<<"${H:-${HEIGHT_BUCKETS:-768}}"
read -ra W <<<"${W:-${WIDTH_BUCKETS:-1360}}"
read -ra F <<<"${F:-${FRAME_BUCKETS:-77}}"
MAX_NUM_FRAMES="${MAX_NUM_FRAMES:-}"
MAX_SEQUENCE_LENGTH="${MAX_SEQUENCE_LENGTH:-224}"
TARGET_FPS="${TARGET_FPS:-8}"
BATCH_SIZE="${BATCH_SIZE:-1}"
DTYPE="${DTYPE:-bf16}"
VAE_CACHE="${VAE_CACHE:-1}"
EMBEDDINGS_CACHE="${EMBEDDINGS_CACHE:-1}"
SAVE_IMAGE_LATENTS="${SAVE_IMAGE_LATENTS:-0}"

extra=()
((NUM_NPUS > 1)) && extra+=(--distributed)
((VAE_CACHE)) && extra+=(--vae_cache)
((EMBEDDINGS_CACHE)) && extra+=(--embeddings_cache)
((SAVE_IMAGE_LATENTS)) && extra+=(--save_image_latents)
[[ -n "$MAX_NUM_FRAMES" ]] && extra+=(--max_num_frames "$MAX_NUM_FRAMES")

launch prepare --original prepare-dataset \
  --pretrained_model_name_or_path "$MODEL_NAME_OR_PATH" \
  --data_root "$DATA_ROOT" \
  --caption_column "$CAPTION_COLUMN" \
  --video_column "$VIDEO_COLUMN" \
  --output_dir "$OUTPUT_DIR" \
  --height_buckets "${H[@]}" \
  --width_buckets "${W[@]}" \
  --frame_buckets "${F[@]}" \
  --max_sequence_length "$MAX_SEQUENCE_LENGTH" \
  --target_fps "$TARGET_FPS" \
  --batch_size "$BATCH_SIZE" \
  --dtype "$DTYPE" \
  "${extra[@]}" "$@"
