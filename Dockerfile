# CPU:   docker build -t jahubert .
# CUDA:  docker build -t jahubert:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
# Run:   docker run --rm -v "$PWD:/data" jahubert transcribe audio.wav
#        docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" jahubert:cuda run recipe=demo stage=all
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=train
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN pip install torch --index-url "${TORCH_INDEX}"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY jahubert jahubert
COPY conf conf
COPY recipes recipes
RUN pip install ".[${EXTRAS}]"

RUN useradd --create-home jahubert
USER jahubert
WORKDIR /data
ENTRYPOINT ["jahubert"]
CMD ["--help"]
