# The gateway and the control loop; `forgetd migrate` too. No torch, no model code.
#
#   docker build -t forgetd .
#   gateway:       docker run --memory 2560m --stop-timeout 30 forgetd
#   control loop:  docker run forgetd python -m worker.control
#   migrations:    docker run forgetd forgetd migrate
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --system --uid 10001 --user-group --home-dir /nonexistent --shell /usr/sbin/nologin forgetd
WORKDIR /app

# The libraries alone first: a change of our code does not install them again.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# The files stay root's and the process can change none of them.
COPY README.md LICENSE ./
COPY api/ api/
COPY cli/ cli/
COPY services/ services/
COPY worker/ worker/
RUN PIP_CONSTRAINT=constraints.txt pip install --no-deps --editable . \
    && python -m compileall -q api cli services worker

USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/healthz', timeout=2)"]
CMD ["uvicorn", "api.app:app", "--host", "0.0.0.0", "--port", "8080", "--no-server-header", \
     "--timeout-graceful-shutdown", "20"]
