# Serves an export with vLLM.  Build from the repository root:
# docker build -f docker/serving.Dockerfile -t moiie-serving .
#
# The base is vLLM's own image of a version that serving/pyproject.toml accepts; it brings torch,
# CUDA and transformers, and nothing here adds to them.
ARG VLLM=v0.32.0
FROM vllm/vllm-openai:${VLLM}

COPY serving /opt/moiie-vllm
RUN python3 -m pip install --no-cache-dir --no-deps /opt/moiie-vllm \
    && python3 -c "from importlib.metadata import entry_points as e; import moiie_vllm.supported; \
assert 'moiie' in e(group='vllm.general_plugins').names"

ARG UID=1000
RUN getent passwd "${UID}" || useradd --create-home --uid "${UID}" moiie
USER ${UID}
# Nothing is fetched: the model is a directory.
ENV HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1
# The base's entry point is the server; what follows the image's name are its options.
