# The service on a CPU:
#   docker build -t maskwright .
#   docker run --rm --read-only -p 127.0.0.1:8000:8000 -e MASKWRIGHT_TOKEN=... -v ./models:/models:ro maskwright street=/models/model.safetensors

FROM python:3.11-slim-bookworm AS build
# PyTorch without CUDA comes from its own index, at the pinned versions; everything else is pinned by hash.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/maskwright
ENV PATH=/opt/maskwright/bin:$PATH
COPY requirements/serve.txt /build/
WORKDIR /build
RUN grep -oE '^(torch|torchvision)==[^ ]+' serve.txt > torch.txt \
    && awk '/^[a-z0-9]/ { skip = /^(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/ } !skip' serve.txt > others.txt
RUN pip install --no-deps --index-url "$TORCH_INDEX" -r torch.txt \
    && pip install --no-deps --require-hashes -r others.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-deps --no-build-isolation . && pip check

FROM python:3.11-slim-bookworm
COPY --from=build /opt/maskwright /opt/maskwright
# TMPDIR: importing PyTorch needs a folder that it could write to, and with a read-only root there is no other.
ENV PATH=/opt/maskwright/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TMPDIR=/dev/shm
USER 65532:65532
WORKDIR /
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["maskwright", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["nuclei"]
