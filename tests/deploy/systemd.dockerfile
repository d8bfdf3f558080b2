# systemd.dockerfile - a machine that systemd runs, with the server installed as deploy/README.md
# says. The context is deploy/systemd.

ARG IMAGE
FROM ${IMAGE}
USER 0
RUN apt-get update -q && apt-get install -y -q --no-install-recommends systemd \
 && rm -rf /var/lib/apt/lists/* && mkdir -p /usr/local/share/latte \
 && ln -s /usr/share/latte/latte-12m /usr/local/share/latte/latte-12m
COPY latte-server.service /etc/systemd/system/
RUN systemctl enable latte-server.service
ENTRYPOINT ["/lib/systemd/systemd"]
STOPSIGNAL SIGRTMIN+3
