# Two build contexts work: this folder (docker build .) and the folder above it, in which this one is called PROJECT
# (cd services/orchestrator; docker build -f Dockerfile ..). Targets: server (the default) and local, which adds the
# store and the speech and language stand-ins.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG PROJECT=orchestrator

FROM ${PYTHON_IMAGE} AS source
ARG PROJECT
# From the folder above, the first line brings the whole project; from this folder, the package alone, and the second
# and third bring the rest. The brackets make patterns of the names, so that a missing one is no error.
COPY ${PROJECT} /context/${PROJECT}
COPY ${PROJECT}/pyproject.tom[l] pyproject.tom[l] gunicorn.conf.p[y] READM[E].md /context/
COPY ${PROJECT}/requirement[s]/*.txt requirement[s]/*.txt /context/requirements/
RUN if [ -f "/context/${PROJECT}/pyproject.toml" ]; then mv "/context/${PROJECT}" /src; else mv /context /src; fi

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY --from=source /src/requirements requirements
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip install --require-hashes --only-binary=:all: -r requirements/build.txt \
    && python3 -m venv --without-pip /opt/venv
RUN /opt/build/bin/pip --python /opt/venv/bin/python install \
    --require-hashes --only-binary=:all: -r requirements/server.txt
COPY --from=source /src/pyproject.toml /src/README.md ./
COPY --from=source /src/orchestrator orchestrator
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/build/bin/pip --python /opt/venv/bin/python install --no-deps --no-index /wheels/*.whl

FROM build AS build-local
RUN /opt/build/bin/pip --python /opt/venv/bin/python install \
    --require-hashes --only-binary=:all: -r requirements/run.txt

FROM ${PYTHON_IMAGE} AS runtime
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    LOG_FORMAT=json
RUN groupadd --system --gid 10001 orchestrator \
    && useradd --system --uid 10001 --gid 10001 --home-dir /app --no-create-home --shell /usr/sbin/nologin orchestrator
WORKDIR /app
COPY --from=source /src/gunicorn.conf.py ./
USER 10001:10001
EXPOSE 8004
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ.get('PORT', '8004')}/livez\", timeout=2)"]

FROM runtime AS local
COPY --from=build-local /opt/venv /opt/venv
CMD ["orchestrator", "up", "--run-dir", "/tmp/orchestrator"]

FROM runtime AS server
COPY --from=build /opt/venv /opt/venv
CMD ["gunicorn", "-c", "gunicorn.conf.py"]
