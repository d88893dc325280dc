#!/usr/bin/env bash
# Image to video, a LoRA. See train.sh for all variables.
set -euo pipefail

TASK=image-to-video
METHOD=lora
NUM_NPUS="${NUM_NPUS:-8}"
SP="${SP:-False}"
SP_SIZE="${SP_SIZE:-1}"
DEEPSPEED_ZERO_STAGE="${DEEPSPEED_ZERO_STAGE:-0}"
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-${MODEL_PATH:-THUDM/CogVideoX1.5-5b-I2V}}"
LEARNING_RATES="${LEARNING_RATES:-2e-5}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-3000}"
OUTPUT_ROOT_DIR="${OUTPUT_ROOT_DIR:-./output_lora}"

source "$(dirname -- "${BASH_SOURCE[0]}")/train.sh"
