# sslfast with torch for CUDA 13; the compiler stays in the first stage.
#   docker build -t sslfast .                                      CPU and CUDA kernels
#   docker build -t sslfast --build-arg SSLFAST_CUDA=0 .           CPU kernels alone
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/data:/data" sslfast pretrain /data --recipe pirl-paper --output /data/run
FROM nvidia/cuda:13.0.0-devel-ubuntu24.04 AS build
ARG SSLFAST_CUDA=1
ARG TORCH=2.11.0
ARG TORCHVISION=0.26.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv g++ git && \
    rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/sslfast
ENV PATH=/opt/sslfast/bin:$PATH
RUN pip install torch==$TORCH torchvision==$TORCHVISION
COPY . /src
RUN SSLFAST_CUDA=$SSLFAST_CUDA pip install "/src[train,evaluation,export,parquet,deepcluster,dali,bench]"

# torch brings CUDA's libraries; the driver is the host's.
FROM ubuntu:24.04
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 && \
    rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/sslfast /opt/sslfast
ENV PATH=/opt/sslfast/bin:$PATH
RUN sslfast info
ENTRYPOINT ["sslfast"]
CMD ["--help"]
