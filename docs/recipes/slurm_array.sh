#!/bin/bash
# sklformat cache as an array of Slurm jobs, each of which is a rank:
#
#     sbatch docs/recipes/slurm_array.sh --teacher my-teacher --text my-text --out /shared/my-cache
#
# Jobs start when there is room, in any order, and those that are requeued resume. The last to end writes the manifest.
#SBATCH --job-name=sklformat-cache
#SBATCH --array=0-15
#SBATCH --gpus-per-node=1
#SBATCH --requeue
set -eu
sklformat cache "$@" \
  --run "slurm-$SLURM_ARRAY_JOB_ID" --rank "$SLURM_ARRAY_TASK_ID" --world-size "$SLURM_ARRAY_TASK_COUNT"
