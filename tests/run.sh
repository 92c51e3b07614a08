#!/usr/bin/env bash
# Set up as fsdp_launch.sh does, then run the tests; arguments go to pytest (./tests/run.sh -k generate).
#
# Tests on the real model and data need SMOLLM2, a folder or hub id of SmolLM2-135M-Instruct, and GSM8K, a folder with
# its train.jsonl and test.jsonl; they are skipped where these are not given and not found.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
source "$here/tests/setup.sh" "$here/tests/requirements.txt"
shared="$here/../shared"
if [ -z "${SMOLLM2:-}" ] && [ -f "$shared/smollm2.py" ]; then
    export SMOLLM2="$here/.venv/smollm2"
    if [ ! -d "$SMOLLM2" ]; then
        "$python" -m pip install --quiet --disable-pip-version-check accelerate gguf
        "$python" "$shared/smollm2.py" "$SMOLLM2"
    fi
fi
if [ -z "${GSM8K:-}" ] && [ -d "$shared/gsm8k" ]; then export GSM8K="$shared/gsm8k"; fi
cd "$here"
OMP_NUM_THREADS=1 exec "$python" -m pytest tests -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
