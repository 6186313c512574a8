# The trl backend on NVIDIA's PyTorch image, for x86-64 and aarch64 (a DGX Spark's GB10: sm_121, CUDA 13).
#   docker build -t nemotron-recipes/trl:25.11 -f containers/trl.Dockerfile containers
# Not built or run yet: written on a machine without access to the base image.
FROM nvcr.io/nvidia/pytorch:25.11-py3

# torch, CUDA and Triton stay as NVIDIA built them for this GPU: a torch from elsewhere has no kernels for sm_121. pip
# gets what is installed as constraints, so that nothing below replaces it.
#
# Pins, with the reason and the date:
#   torchao==0.16.0   2026-11: newer ones break transformers on this image, older ones fail peft's version check
# Left out: flash-attn has no kernels for sm_121 (2026-11): attention runs with attn_implementation "sdpa".
RUN pip freeze | grep -E '^(torch|triton|pytorch-triton|torchvision|numpy)==' > /tmp/kept.txt || true \
 && pip install --no-cache-dir --constraint /tmp/kept.txt \
      "transformers==5.23.*" "trl==1.16.*" "peft==0.21.*" "accelerate>=1.4" "datasets==5.2.*" \
      "tokenizers>=0.20" "jinja2>=3.1" "safetensors>=0.4.3" "huggingface-hub>=1.0" "matplotlib>=3.8" \
      "jsonschema>=4.18" "PyYAML>=6.0" "psutil>=5.9" "torchao==0.16.0" \
 && python3 -c "import torch, transformers, trl, peft; print(torch.__version__, torch.version.cuda)"
