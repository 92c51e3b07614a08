#!/usr/bin/env bash
# Train with one process per GPU, or one on a machine without. Sets itself up: Python >= 3.10 with pip is enough.
#
#   ./fsdp_launch.sh                                     the embedded default, offline
#   ./fsdp_launch.sh --config gsm8k.yaml --seed 1        any arguments of latro.py
#   NPROC=2 ./fsdp_launch.sh                             so many processes
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 ./fsdp_launch.sh …      on each node; under SLURM its own variables do
#
# .env beside this file, if there is one, sets the environment: HF_TOKEN, WANDB_PROJECT, WANDB_API_KEY, …
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/tests/setup.sh" "$here/requirements.txt"
if [ -f "$here/.env" ]; then set -a; source "$here/.env"; set +a; fi
processes=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
# Threads that wait for others sleep soon: where other programs run too, spinning ones made a step 25 times slower.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
# Seconds that torchrun leaves the ranks to end their step and save it, when it is told to stop; 30 by itself.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
# On a GPU: blocks that grow, in place of one per size. On a CPU: freed memory is kept for the next pass, which would else
# get it anew, zeroed page by page.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-${PYTORCH_ALLOC_CONF:-expandable_segments:True}}
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2147483647}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-268435456}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + processes - 1) / processes ))}

nodes=${NNODES:-${SLURM_NNODES:-1}}
if [ "$nodes" = 1 ] && [ "$processes" = 1 ]; then exec "$python" "$here/latro.py" "$@"; fi
where=(--standalone)
if [ "$nodes" -gt 1 ]; then
    number=${NODE_RANK:-${SLURM_NODEID:?is not set, nor is NODE_RANK, the number of this node}}
    address=${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:?is not set, nor is MASTER_ADDR}" | sed -n 1p)}
    where=(--nnodes "$nodes" --node_rank "$number" --master_addr "$address" --master_port "${MASTER_PORT:-29500}")
fi
exec "$here/.venv/bin/torchrun" "${where[@]}" --nproc_per_node "$processes" "$here/latro.py" "$@"
