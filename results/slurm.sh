#!/bin/bash
# Trains on many machines under Slurm, and goes on by itself until it is done. From this project's folder:
#
#     sbatch results/slurm.sh train_tokenizer.py --preset in1k-256 --data-path imagenet --num-workers 8 \
#         --mixed-precision bf16 --channels-last --compile --results-dir runs/in1k-256
#
# `make test-slurm` runs this file under a real Slurm. Flags of sbatch before its name outweigh these lines:

#SBATCH --nodes=4                   # machines; --results-dir must lie on a disk that all of them share
#SBATCH --ntasks-per-node=1         # one torchrun each, which starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=72          # 8 for each GPU, to load data, and one for the process that trains
#SBATCH --time=24:00:00             # of one turn; as many follow as it takes
#SBATCH --requeue                   # permits more turns: by the end of this file, and after preemption
#SBATCH --open-mode=append          # they write to one slurm-JOB.out, each below those before it
#SBATCH --signal=B:USR1@180         # 180 s before the limit (Slurm may be 60 s early), to this shell alone

# . .venv/bin/activate              # where torchrun is, if it is in no other place
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"        # which srun does not take from sbatch since 22.05

again=no
near_the_limit() {                  # what USR1 does
    again=yes
    trap '' USR1                    # a second one would end the wait for the save
    scancel --signal=TERM "$SLURM_JOB_ID"       # to what srun has started, not to this shell: all ranks save
}
trap near_the_limit USR1

# --rdzv-id: without it, two jobs that meet on a machine would become one.
# --rdzv-endpoint: the first machine, which this shell runs on; a port of the job's own, for the same reason.
# --shutdown-timeout: how long a save may take, of the 180 s; torchrun gives 30 s by itself.
# --resume: the first turn finds nothing to resume and starts, the others go on.
# & and wait: a shell that waits hears USR1 at once; in front of an srun without &, only after its end.
port=$((20000 + SLURM_JOB_ID % 10000))
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d --rdzv-endpoint="$(hostname):$port" --shutdown-timeout=150 "$@" --resume &
wait $!                             # until srun ends, or USR1 comes
status=$?
if [ $again = yes ]; then
    wait $!                         # until all ranks have saved
    status=$?
    [ $status = 0 ] || scontrol requeue "$SLURM_JOB_ID"     # 0: training was done by then
fi
exit $status                        # 1 of torchrun, whatever its ranks say
