# CPU:   docker build -t jahubert .
# CUDA:  docker build -t jahubert:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
# Run:   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" jahubert transcribe audio.wav
#        docker run --rm --user "$(id -u):$(id -g)" --gpus all --shm-size 8g -v "$PWD:/data" jahubert:cuda run recipe=demo stage=all
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=train
# A build such as 2.13.0+cpu takes precedence over 2.13.0 from the default index.
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# An arbitrary --user has neither a name nor a home folder.
ENV HOME=/tmp USER=jahubert

# On a GPU, Triton needs a C compiler for its kernels and for train.compile=true.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY jahubert jahubert
COPY conf conf
COPY recipes recipes
RUN pip install --constraint constraints.txt ".[${EXTRAS}]"

USER 1000:1000
WORKDIR /data
ENTRYPOINT ["jahubert"]
CMD ["--help"]
