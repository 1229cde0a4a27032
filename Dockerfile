# syntax=docker/dockerfile:1
# One image for head and workers:
#   docker build --build-arg DEVICE=cpu  -t headrace:0.1.0-cpu  .
#   docker build --build-arg DEVICE=cuda -t headrace:0.1.0-cuda .
# PyPI's torch for Linux x86_64 carries CUDA and also runs without a GPU. For a small CPU image
# give an index that serves torch's "+cpu" wheels: --build-arg TORCH_INDEX=URL.
ARG PYTHON=3.11.14-slim-bookworm
ARG DEVICE=cpu

FROM python:${PYTHON} AS build
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install -c constraints.txt hatchling && python -m venv /opt/headrace
COPY serve serve
COPY deployments deployments
# The wheel, not the checkout: import paths are the same in both, and the versions are those of
# development.
RUN python -m hatchling build -t wheel -d /dist \
    && /opt/headrace/bin/pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        -c constraints.txt "$(ls /dist/headrace-*.whl)[lancedb,minilm,onnx,openvino,otlp,pgvector,postgres,qdrant,redis]"

FROM python:${PYTHON} AS runtime-cpu
# KubeRay's readiness probe of a worker pod calls wget.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 headrace
COPY --from=build /opt/headrace /opt/headrace
WORKDIR /home/headrace
COPY --chown=headrace:headrace config.yaml ./
# Ray starts with token authentication on: give RAY_AUTH_TOKEN, or RAY_AUTH_MODE=disabled where the
# dashboard and job ports cannot be reached by others (docs/operations.md).
ENV PATH=/opt/headrace/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
# config.yaml listens on 127.0.0.1: use --network host, or mount one whose http_options.host is 0.0.0.0.
# Logs are kept: no keys in them. `headrace keys create` makes one.
CMD ["headrace", "serve", "--no-demo-keys", "--profile", "fast"]

FROM runtime-cpu AS runtime-cuda
# What the NVIDIA container runtime reads; CUDA's libraries come with torch.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# A stage of this file, not an image.
# hadolint ignore=DL3006
FROM runtime-${DEVICE}
