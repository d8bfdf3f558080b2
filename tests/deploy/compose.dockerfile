# compose.dockerfile - stand-ins for the images of Redis and Prometheus, made of Debian's packages.
# They have what compose.yaml builds upon in the real ones: the users' numbers, who owns the folder
# of the data, and that Prometheus's arguments follow the image's entry point.

ARG DEBIAN
FROM ${DEBIAN} AS redis
RUN apt-get update -q && apt-get install -y -q --no-install-recommends redis-server \
 && rm -rf /var/lib/apt/lists/* && install -d -o 999 -g 999 /data
CMD ["redis-server"]

FROM ${DEBIAN} AS prometheus
RUN apt-get update -q && apt-get install -y -q --no-install-recommends prometheus \
 && rm -rf /var/lib/apt/lists/* && install -d -o 65534 -g 65534 /prometheus
ENTRYPOINT ["prometheus"]
