#!/usr/bin/env bash
# A video of PROMPT. See infer.sh for all variables.
set -euo pipefail

MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-${MODEL_PATH:-THUDM/CogVideoX1.5-5b}}"
IMAGE_PATH=""

source "$(dirname -- "${BASH_SOURCE[0]}")/infer.sh"
