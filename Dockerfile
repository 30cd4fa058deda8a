# The locked environment and the package. Build: docker build -t nslightning . ; run: docker run --gpus all nslightning fit ...
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git make && rm -rf /var/lib/apt/lists/*
WORKDIR /app
# First what changes rarely, so that a change of the code does not install everything again.
COPY requirements.lock ./
RUN pip install --no-cache-dir uv && uv venv .venv && uv pip sync --require-hashes requirements.lock --python .venv/bin/python
COPY . .
RUN uv pip install --python .venv/bin/python --no-deps --no-build-isolation .

FROM python:3.11-slim
RUN useradd --create-home user
COPY --from=build --chown=user /app/.venv /app/.venv
USER user
WORKDIR /home/user
ENV PATH=/app/.venv/bin:$PATH NSLIGHTNING_DATA_DIR=/home/user/data WANDB_MODE=offline
ENTRYPOINT ["nslightning"]
CMD ["--help"]
