#!/bin/bash
# One process a GPU, started by srun itself, so that SLURM's signals reach the training:
#   sbatch --nodes=7 recipes/accelerate/slurm.sh recipes/qwen2.5-3b-uni-x-sft.yaml
# Ten minutes before its time is up, the job writes a checkpoint and stops; submitted again, it goes on from there.
#SBATCH --job-name=uni-x
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --signal=TERM@600
#SBATCH --output=%x-%j.log
set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=16374
export ACCELERATE_USE_DEEPSPEED=true
export ACCELERATE_DEEPSPEED_CONFIG_FILE=recipes/accelerate/zero2.json
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec uni-x train "$@"' uni-x "$@"
