# syntax=docker/dockerfile:1
# Two images of one package:
#   docker build -t megatron-nsr .                      for H200s: CUDA, torch, Transformer Engine, NVIDIA's Apex, megatron-core, vLLM
#   docker build -t megatron-nsr:cpu --target cpu .     for a laptop, a login node, tests
# docs/containers.md says what of this has run. Defaults that are versions stand in versions.toml; tests/unit/test_dockerfile.py holds them equal.
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG CPU_IMAGE=debian:12.12-slim


FROM ${CPU_IMAGE} AS cpu-build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/megatron-nsr
ENV PATH=/opt/megatron-nsr/bin:$PATH
WORKDIR /src
COPY requirements requirements
# pip options that name a source of torch's CPU build, such as "--extra-index-url URL": its default build brings 3 GB of CUDA libraries.
ARG TORCH_SOURCE=
# hadolint ignore=SC2086
RUN pip install --no-cache-dir $TORCH_SOURCE -c requirements/cpu-py311.lock -r requirements/cpu-torch.lock \
    && pip install --no-cache-dir --no-deps -r requirements/cpu-py311.lock -r requirements/mlflow.lock
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation .


FROM ${CPU_IMAGE} AS cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron-nsr" \
      org.opencontainers.image.description="RLVR at Megatron scale, split by the sign of the reward (CPU)" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Triton and torch.compile call a compiler at run time; vLLM's CPU build loads libnuma.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc libc6-dev libnuma1 python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 nsr \
    && install --directory --owner nsr --group nsr /workspace
COPY --from=cpu-build /opt/megatron-nsr /opt/megatron-nsr
ENV PATH=/opt/megatron-nsr/bin:$PATH OMP_NUM_THREADS=1
USER 10001:10001
WORKDIR /workspace
CMD ["megatron-nsr", "doctor"]


FROM ${CUDA_IMAGE} AS cuda-build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends git python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/megatron-nsr
ENV PATH=/opt/megatron-nsr/bin:$PATH
WORKDIR /src
COPY requirements requirements
RUN pip install --no-cache-dir --no-deps -r requirements/cuda-py312.lock -r requirements/mlflow.lock
# What follows is compiled: for H200s and H100s, capability 9.0. cuDNN is torch's own, headers too: beside a second one of another version in
# the base image Transformer Engine would load that, and its parts refuse each other.
ARG MAX_JOBS=8
ENV CUDA_HOME=/usr/local/cuda TORCH_CUDA_ARCH_LIST=9.0 NVTE_CUDA_ARCHS=90 NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS}
ENV CPATH=/opt/megatron-nsr/lib/python3.12/site-packages/nvidia/cudnn/include
ARG TRANSFORMER_ENGINE_VERSION=2.11.0
RUN pip install --no-cache-dir --no-deps --no-build-isolation "transformer-engine-torch==${TRANSFORMER_ENGINE_VERSION}"
# NVIDIA's Apex is on no registry (PyPI's package of that name is another project's). Without these two variables its setup.py leaves the
# CUDA extensions out, so that the imports below are what says whether they are there.
ARG APEX_COMMIT=becbb77cea4cb54f2929f7c938a0a6f7dd1fdc39
RUN APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD="${MAX_JOBS}" \
    pip install --no-cache-dir --no-deps --no-build-isolation "git+https://github.com/NVIDIA/apex@${APEX_COMMIT}" \
    && python -c "import torch, amp_C, fused_layer_norm_cuda, fused_weight_gradient_mlp_cuda; from apex.optimizers import FusedAdam"
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation .


# The devel image again: FlashInfer and DeepGEMM in vLLM compile kernels at run time and look for nvcc.
FROM ${CUDA_IMAGE} AS cuda
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron-nsr" \
      org.opencontainers.image.description="RLVR at Megatron scale, split by the sign of the reward (CUDA 13, H200)" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 nsr \
    && install --directory --owner nsr --group nsr /workspace
COPY --from=cuda-build /opt/megatron-nsr /opt/megatron-nsr
ENV PATH=/opt/megatron-nsr/bin:$PATH CUDA_HOME=/usr/local/cuda OMP_NUM_THREADS=1
USER 10001:10001
WORKDIR /workspace
CMD ["megatron-nsr", "doctor"]
