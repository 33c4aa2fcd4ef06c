# The operator's image: the operator and what it imports, without torch.
#
#   docker build --file docker/operator.Dockerfile --tag opensora-operator:0.1.0 .
#
# BASE_IMAGE may carry a digest (python:3.12-slim-bookworm@sha256:…), so that the same build gives the same image.
# PIP_INDEX_URL and PIP_EXTRA_INDEX_URL name other registries of Python packages.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
# Without pip: the finished image installs nothing.
RUN python -m venv --without-pip /opt/opensora
COPY docker/requirements.py docker/
COPY pyproject.toml requirements.lock ./
RUN python docker/requirements.py operator > requirements.txt \
    && pip --python /opt/opensora/bin/python install --constraint requirements.lock --requirement requirements.txt
COPY LICENSE README.md ./
COPY operator operator
# The command line is not in this image, so its script is not either.
RUN pip --python /opt/opensora/bin/python install --no-deps . && rm /opt/opensora/bin/osctl

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="opensora-operator" \
      org.opencontainers.image.description="Runs TrainingRun, SampleJob and BatchSearch as Kubernetes Jobs" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/opensora /opt/opensora
# All that is written is temporary: the root file system is read-only in a cluster.
ENV PATH=/opt/opensora/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /tmp
# Progress of runs, metrics, health.
EXPOSE 9443 8080 8081
ENTRYPOINT ["opensora-operator"]
