#!/usr/bin/env bash
# A video of PROMPT that begins with IMAGE_PATH. See infer.sh for all variables.
set -euo pipefail

MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-${MODEL_PATH:-THUDM/CogVideoX1.5-5b-I2V}}"
IMAGE_PATH="${IMAGE_PATH:?give IMAGE_PATH, the picture the video begins with}"

source "$(dirname -- "${BASH_SOURCE[0]}")/infer.sh"
