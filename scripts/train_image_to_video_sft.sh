#!/usr/bin/env bash
# Image to video, every weight. See train.sh for all variables.
set -euo pipefail

TASK=image-to-video
METHOD=sft
NUM_NPUS="${NUM_NPUS:-8}"
SP="${SP:-True}"
SP_SIZE="${SP_SIZE:-$NUM_NPUS}"
DEEPSPEED_ZERO_STAGE="${DEEPSPEED_ZERO_STAGE:-3}"
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-${MODEL_PATH:-THUDM/CogVideoX1.5-5b-I2V}}"
LEARNING_RATES="${LEARNING_RATES:-2e-5}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-100000}"
OUTPUT_ROOT_DIR="${OUTPUT_ROOT_DIR:-./output_sft}"

source "$(dirname -- "${BASH_SOURCE[0]}")/train.sh"
