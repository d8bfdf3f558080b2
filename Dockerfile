# latte-server in a container, with the bundled model. See deploy/README.md.
#
#   docker build -t latte-server --target cpu .               for CPUs
#   docker build -t latte-server:cuda --target cuda .         for NVIDIA GPUs, compute capability 8.0 on
#
# Everything is compiled and run on the same Debian. NVIDIA's image is a source of files alone: its
# compiler while building, one library in the result. The driver's libcuda comes from the host.

# Whole names: podman and buildah ask which registry is meant, or give up.
ARG DEBIAN=docker.io/library/debian:12.12-slim
ARG CUDA_IMAGE=docker.io/nvidia/cuda:13.0.1-devel-ubuntu24.04

FROM ${DEBIAN} AS source
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
COPY deploy/packages.sh /src/deploy/
WORKDIR /src
RUN apt-get update -q && sh deploy/packages.sh build && rm -rf /var/lib/apt/lists/*
COPY Makefile openapi.yaml ./
COPY engine engine
COPY weights weights
COPY server server

FROM source AS build-cpu
ARG REVISION=unknown
RUN make -j"$(nproc)" BUILD=build/image COMMIT="${REVISION}" CUDA=0 build/image/latte-server \
 && install -s -D build/image/latte-server /out/latte-server

FROM ${DEBIAN} AS runtime
RUN apt-get update -q \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
      libcjson1 libhiredis0.14 libmicrohttpd12 libopenblas0-pthread libpcre2-8-0 libutf8proc2 libxxhash0 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin latte \
 && install -d -o latte -g latte -m 0750 /var/lib/latte
COPY LICENSE /usr/share/doc/latte-server/
COPY weights/latte-12m /usr/share/latte/latte-12m
# Options that differ from the defaults; a flag behind the image's name wins over them. The health
# check reads the variables, not the flags: change the port by LATTE_PORT. Sessions outlive the
# container with a volume and LATTE_STORE=/var/lib/latte.
ENV LATTE_MODEL=/usr/share/latte/latte-12m \
    LATTE_HOST=0.0.0.0 \
    LATTE_PORT=8080
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s --retries=3 \
    CMD ["latte-server", "--healthcheck"]
ENTRYPOINT ["latte-server"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="latte-server" \
      org.opencontainers.image.description="HTTP inference server for Latte language models, with the model latte-12m" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-SA-4.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

FROM runtime AS cpu
COPY --from=build-cpu /out/latte-server /usr/local/bin/
USER 10001:10001

# What follows is not read for the target above, not even by builders that build all stages.
FROM ${CUDA_IMAGE} AS nvidia

# The folder is named as it is in NVIDIA's image, not by the link /usr/local/cuda.
FROM source AS build-cuda
ARG CUARCH="80 90"
ARG CUOPT="-O3"
ARG REVISION=unknown
RUN --mount=type=bind,from=nvidia,source=/usr/local/cuda-13.0,target=/usr/local/cuda \
    apt-get update -q && sh deploy/packages.sh build && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && make -j"$(nproc)" BUILD=build/image COMMIT="${REVISION}" CUDA=1 CUARCH="${CUARCH}" CUOPT="${CUOPT}" build/image/latte-server \
 && install -s -D build/image/latte-server /out/latte-server \
 && install -D /usr/local/cuda/lib64/libcublasLt.so.13 /out/lib/libcublasLt.so.13

FROM runtime AS cuda
COPY --from=build-cuda /out/lib/ /usr/local/cuda/lib64/
COPY --from=build-cuda /out/latte-server /usr/local/bin/
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

# What a build without --target makes.
FROM cpu
