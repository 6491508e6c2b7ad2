# syntax=docker/dockerfile:1
# Three stages: what changes seldom (torch and the other dependencies), our wheel, and what runs. `make image` builds it.
#   CPU (the default)  TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   CUDA               TORCH_INDEX=https://pypi.org/simple: the CUDA libraries come as wheels, the driver is the node's
# BASE may be any image with Python 3.11 and bash.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS dependencies
ARG UV_VERSION=0.13.9
WORKDIR /build
RUN --mount=type=cache,target=/root/.cache \
    python3 -m venv /opt/uv && /opt/uv/bin/pip install -q "uv==${UV_VERSION}"
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG UV_FIND_LINKS=
ENV UV_LINK_MODE=copy UV_SYSTEM_CERTS=true VIRTUAL_ENV=/opt/phlora
COPY pyproject.toml constraints.txt ./
# torch alone from its index, which has old versions of other packages, too. Bytecode is made now: a read-only root
# keeps none. What only compilers, torch's own tests and Java would use goes: 180 MB.
RUN --mount=type=cache,target=/root/.cache \
    /opt/uv/bin/uv venv -q --python python3 /opt/phlora && \
    /opt/uv/bin/uv pip install -q --no-deps --default-index "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)" && \
    /opt/uv/bin/uv pip install -q -c constraints.txt --compile-bytecode -r pyproject.toml && \
    rm -rf /opt/phlora/lib/python3*/site-packages/torch/include /opt/phlora/lib/python3*/site-packages/torch/test \
           /opt/phlora/lib/python3*/site-packages/ray/jars

# Installed beside the dependencies, then taken out again: a layer of its own, of a megabyte.
FROM dependencies AS package
COPY LICENSE README.md ./
COPY phlora_pipeline phlora_pipeline
WORKDIR /opt/phlora
RUN --mount=type=cache,target=/root/.cache \
    /opt/uv/bin/uv pip install -q --no-deps --compile-bytecode /build && \
    mkdir /package && cp -a --parents bin/phlora lib/python3*/site-packages/phlora_pipeline* /package/

FROM ${BASE}
RUN useradd --uid 1000 --user-group --no-create-home --home-dir /tmp --shell /bin/bash phlora
# /tmp is the only place that is written to: Ray's sessions, and whatever looks for a home.
ENV PATH=/opt/phlora/bin:/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
COPY --from=dependencies /opt/phlora /opt/phlora
COPY --from=package /package /opt/phlora
WORKDIR /app
COPY jobs/__init__.py jobs/nightly.py jobs/kuberay.py jobs/
USER 1000:1000
# Last: what differs with every commit makes no layer anew.
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="phlora-pipeline" \
      org.opencontainers.image.description="Full-rank fine-tunes to LoRA adapters, for whole zoos, on Ray" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
CMD ["phlora", "--help"]
