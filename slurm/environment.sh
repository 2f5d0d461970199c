# shellcheck shell=bash
# Sourced by the batch scripts and interactive.sh, on the first node: the environment that every rank inherits.
# What a cluster may need is named here and off.

# ---- Python ----
# module purge && module load cuda/12.8 python/3.12
# . /path/to/venv/bin/activate
[ ! -x .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH
export PATH
export PYTHONUNBUFFERED=1

# ---- Models and data ----
# export HF_HOME=/scratch/$USER/huggingface   # a file system all nodes see, not a home with a quota
# export HF_HUB_OFFLINE=1                     # compute nodes without internet: download on the login node first

# ---- Starting ----
# export DEEPSPEED_TIMEOUT=60                 # minutes a collective may take: rank 0 reads a large model for all

# ---- NCCL ----
# export NCCL_DEBUG=INFO                      # says which network it chose; WARN for production
# export NCCL_SOCKET_IFNAME=ib0               # interface for its bootstrap, if it picks a wrong one (^lo,docker0 excludes)
# export GLOO_SOCKET_IFNAME=ib0               # the same for gloo
# export NCCL_IB_HCA=mlx5                     # InfiniBand adapters to use
# export NCCL_IB_GID_INDEX=3                  # RoCE v2
# export NCCL_IB_TIMEOUT=22                   # large fabrics, flapping links
# export NCCL_IB_DISABLE=1                    # no InfiniBand: TCP
# export NCCL_NVLS_ENABLE=0                   # NVLink multicast off, where a container or driver cannot do it
# export NCCL_CROSS_NIC=1                     # rails joined by one fabric
# export TORCH_FR_BUFFER_SIZE=2000            # flight recorder: which collective hung (TORCH_NCCL_TRACE_BUFFER_SIZE before)

# ---- Other fabrics ----
# export FI_PROVIDER=efa                      # AWS EFA, through the aws-ofi-nccl plugin
# export FI_EFA_USE_DEVICE_RDMA=1
# export FI_CXI_ATS=0                         # HPE Slingshot, with FI_PROVIDER=cxi
# export UCX_NET_DEVICES=mlx5_0:1             # UCX: which adapter
# export UCX_TLS=rc,cuda_copy,cuda_ipc

if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("fvae_dist") is None)'; then
  echo "error: $(command -v python || echo python): no fvae_dist there; set the environment up in slurm/environment.sh" >&2
  return 2
fi
