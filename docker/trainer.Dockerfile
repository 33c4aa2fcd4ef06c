# The trainer's image: the training core with torch, and the configs.
#
#   docker build --file docker/trainer.Dockerfile --tag opensora-trainer:0.1.0 .
#
# EXTRAS    extras of pyproject.toml, with commas: train,text-minilm,wandb
# BASE_IMAGE may carry a digest (python:3.12-slim-bookworm@sha256:…), so that the same build gives the same image.
# PIP_INDEX_URL and PIP_EXTRA_INDEX_URL name other registries of Python packages, for instance one with another build
# of torch. The registry's own build for Linux has CUDA inside; a machine needs NVIDIA's driver and nothing else of it.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG EXTRAS=train,text-minilm
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
RUN python -m venv --without-pip /opt/opensora
COPY docker/requirements.py docker/
COPY pyproject.toml requirements.lock ./
RUN python docker/requirements.py --base "${EXTRAS}" > requirements.txt \
    && pip --python /opt/opensora/bin/python install --constraint requirements.lock --requirement requirements.txt
COPY LICENSE README.md ./
COPY opensora opensora
# Neither the operator nor the command line is in this image, so their scripts are not either.
RUN pip --python /opt/opensora/bin/python install --no-deps . \
    && rm /opt/opensora/bin/opensora-operator /opt/opensora/bin/osctl

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="opensora-trainer" \
      org.opencontainers.image.description="Trains and samples video diffusion models" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/opensora /opt/opensora
# Where `spec.config.file` starts from: configs/stdit3/train/quickstart.yaml.
COPY configs /workspace/configs
# The device plugin says which GPUs a container sees; NVIDIA_VISIBLE_DEVICES here would show them all.
ENV PATH=/opt/opensora/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
WORKDIR /workspace
# PID 1: starts the ranks, forwards signals, reaps orphans, ends as the rank that failed first.
ENTRYPOINT ["python", "-m", "opensora.launch"]
