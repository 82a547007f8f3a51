# The server in a container; compose.yaml runs it, docs/container.md says how.

# An image with Python 3.11 or newer: a mirror's name for it does as well.
ARG BASE_IMAGE=python:3.13-slim
FROM ${BASE_IMAGE}

# The owner of the settings and of the database, the same on every machine.
RUN groupadd --gid 10001 wxgpt \
    && useradd --uid 10001 --gid wxgpt --no-create-home --home-dir /var/lib/wxgpt \
        --shell /usr/sbin/nologin wxgpt \
    && install -d -o wxgpt -g wxgpt -m 700 /var/lib/wxgpt

WORKDIR /opt/wxgpt
# Where pip looks, if not where it always does; the hashes hold for every mirror.
ARG PIP_INDEX_URL=
COPY requirements.lock ./
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --require-hashes -r requirements.lock \
    && .venv/bin/pip uninstall --yes pip

COPY LICENSE providers.toml schema.sql texts.toml wxgpt.example.toml wxgpt.py ./
COPY docs/models.md docs/models.zh-CN.md docs/
COPY owner owner
COPY pages pages
# A checkout may be its owner's alone; and nothing can be compiled at the start.
RUN install -m 755 owner/wxgpt /usr/local/bin/ \
    && chmod -R a+rX -- * \
    && .venv/bin/python -m compileall -q wxgpt.py owner

USER 10001:10001
ENV PYTHONPATH=/opt/wxgpt
WORKDIR /var/lib/wxgpt
VOLUME /var/lib/wxgpt
EXPOSE 8080
STOPSIGNAL SIGTERM
# By the container's own address: where only its loopback is listened on, nobody gets in.
HEALTHCHECK --interval=30s --timeout=10s --start-period=20s CMD [ \
    "/opt/wxgpt/.venv/bin/python", "-c", \
    "import http.client, socket; \
    door = http.client.HTTPConnection(socket.gethostname(), 8080, timeout=8); \
    door.request('GET', '/healthz'); \
    raise SystemExit(door.getresponse().status != 200)"]
# As a module: of a script Python keeps the syntax tree for as long as it runs, 8 MiB.
CMD ["/opt/wxgpt/.venv/bin/python", "-P", "-m", "wxgpt", "--config", "/etc/wxgpt/wxgpt.toml"]
