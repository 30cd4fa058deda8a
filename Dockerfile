# The locked environment and the package. Build: docker build -t nslightning . ; run: docker run --gpus all nslightning fit ...
FROM python:3.11-slim AS build
# Debian keeps only the newest version of a package, so a pinned one would end the build; the lock has the hashes of Python's.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git make && rm -rf /var/lib/apt/lists/*
WORKDIR /app
# The lock comes first: it changes rarely, so a change of the code does not install everything again.
COPY requirements.lock ./
# hadolint ignore=DL3013
RUN pip install --no-cache-dir uv && uv venv .venv && uv pip sync --require-hashes requirements.lock --python .venv/bin/python
COPY . .
RUN uv pip install --python .venv/bin/python --no-deps --no-build-isolation . \
 && XDG_CACHE_HOME=/app/cache .venv/bin/python -m nslightning.ops.kernels.build

FROM python:3.11-slim
# Triton compiles a small C file for the GPU at hand, and torch.compile C++, at the first run.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 user
COPY --from=build --chown=user /app/.venv /app/.venv
# The C++ autograd nodes, built already: no run waits for them.
COPY --from=build --chown=user /app/cache /home/user/.cache
USER 1000
WORKDIR /home/user
ENV PATH=/app/.venv/bin:$PATH NSLIGHTNING_DATA_DIR=/home/user/data WANDB_MODE=offline
ENTRYPOINT ["nslightning"]
CMD ["--help"]
