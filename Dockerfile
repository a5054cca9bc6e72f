# The training image: NVIDIA's PyTorch image plus this package.
#
#   docker build --tag megatron_fp4 .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --volume /data:/data megatron_fp4 \
#     launch/torchrun.sh --nproc-per-node 8 experiment=NAME train.run_dir=/data/runs/NAME
#
# 26.07 is the release whose torch (2.13.0a0, CUDA 13.3, Python 3.12) is of the version that all tests run on. It
# also holds Transformer Engine 2.17 and Apex, both compiled against exactly that torch: another one breaks them.
#
# The image exists for x86-64 (B200, H100) and for arm64, the Grace CPUs of GB200 and GB300: build on a host of the kind
# that runs it, or name it, `docker build --platform linux/arm64`. Nothing below depends on which it is.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.07-py3
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="megatron_fp4" \
      org.opencontainers.image.description="Pretraining of large language models in NVFP4" \
      org.opencontainers.image.licenses="Apache-2.0"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megatron_fp4

# Dependencies first: this layer is rebuilt only when pyproject.toml changes.
#   - the list is pyproject.toml's (with the extras `data` and `export`) without torch, which the image has;
#   - the image constrains every package it ships (PIP_CONSTRAINT), some to versions older than ours; the constraint
#     here is what must not move: torch and all that is compiled against it, numpy included;
#   - the comparison at the end fails the build if torch moved all the same.
COPY pyproject.toml launch/image_requirements.py /tmp/build/
RUN python /tmp/build/image_requirements.py /tmp/build/pyproject.toml > /tmp/build/requirements.txt \
 && python -m pip list --format=freeze \
    | grep -iE '^(torch|torchvision|(pytorch-)?triton|apex|flash.attn|transformer.engine|numpy|nvidia-[^=]+)==' \
    > /tmp/build/constraints.txt \
 && before=$(python -c 'import torch; print(torch.__version__, torch.__file__)') \
 && PIP_CONSTRAINT=/tmp/build/constraints.txt \
    python -m pip install --no-cache-dir --requirement /tmp/build/requirements.txt \
 && after=$(python -c 'import torch; print(torch.__version__, torch.__file__)') \
 && if [[ $before != "$after" ]]; then echo "pip replaced torch: $before -> $after" >&2; exit 1; fi \
 && rm -r /tmp/build

# The kernels of Mamba-2 (model.mamba_kernel=mamba_ssm) have no wheels for this torch and none for arm64: they are compiled
# here against the image's, for the GPUs that their own setup names (sm_75 to sm_121). --no-deps: what mamba-ssm asks for
# beyond einops and transformers serves layers that are not used here. The last line fails the build if either is missing.
RUN MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE MAX_JOBS=8 PIP_CONSTRAINT='' \
    python -m pip install --no-cache-dir --no-deps --no-build-isolation \
      causal-conv1d==1.6.2.post1 mamba-ssm==2.3.2.post1 \
 && python -c 'import torch, causal_conv1d_cuda, selective_scan_cuda'

COPY pyproject.toml README.md LICENSE ./
COPY megatron_fp4 megatron_fp4
COPY data_tools data_tools
COPY configs configs
COPY launch launch
COPY benchmarks benchmarks
# --no-deps: the image's torch lies in the range of pyproject.toml, and nothing of the image is to be replaced
# (`pip check` in this image complains for the same reason). --editable: configs/ and launch/ stay beside the package.
# No constraint here: it would hold back the setuptools of the isolated build.
RUN PIP_CONSTRAINT='' python -m pip install --no-cache-dir --no-deps --editable . \
 && python -c 'import megatron_fp4; from importlib.metadata import version; print(version("transformer_engine"))'

# Training needs no root. Mount run directories that this user may write, or pass --user.
RUN useradd --uid 10001 --create-home --shell /bin/bash trainer
USER 10001

# A batch job is alive as long as its process; the launcher, not docker, restarts it.
HEALTHCHECK NONE
CMD ["megatron-fp4", "--help"]
