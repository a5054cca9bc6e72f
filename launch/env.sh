# shellcheck shell=bash
# Environment of every rank, sourced by launch/torchrun.sh and launch/slurm.sbatch.
#
# One idea: a variable is here only with its reason, and a value that you exported before stays. Rank, world size and
# rendezvous are not set here: the launchers do that, and only megatron_fp4/comm/launch.py reads them.

# The last lines of a killed rank must be in the log: Python buffers stdout when it is a file.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}

# A rank that dies of SIGSEGV, SIGABRT or SIGBUS prints its Python stack first.
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}

# CPU threads of one rank. Unset, every rank would start one thread a core, and the ranks of a node would fight for
# the cores. Slurm knows the share of a rank; without slurm one thread is the safe value.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# cuBLAS is reproducible run to run only with a fixed workspace (cuBLAS manual, "Results reproducibility"); a resumed
# run must give the same bits as an uninterrupted one.
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}

# Grow segments instead of adding new ones: sizes that change (evaluation, the last micro-batch) fragment the default
# allocator over days until a step that used to fit does not.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# NCCL reports errors and topology problems only; INFO writes thousands of lines at the start of a large job.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Triton compiles kernels into ~/.triton by default; a home directory on NFS makes hundreds of ranks race for its
# locks. A folder on the node's own disk, one for each user.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-${UID}}

# Not set here, on purpose: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME. On a node with several networks export the name
# of the fast one (`ip -br addr` lists them); a guess here would be wrong on the next cluster.
