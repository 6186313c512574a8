# The trl backend on NVIDIA's PyTorch image, for x86-64 and aarch64 (a DGX Spark's GB10: sm_121, CUDA 13).
#   docker build -t nemotron-recipes/trl:25.11 -f containers/trl.Dockerfile containers
# Not built on NVIDIA's image yet: written on a machine without access to it. docs/images.md says what was tried instead.
FROM nvcr.io/nvidia/pytorch:25.11-py3

# torch, CUDA and Triton stay as NVIDIA built them for this GPU: a torch from elsewhere has no kernels for sm_121. pip
# gets what is installed of them as constraints, so that nothing below replaces it, and stops where it would have to. They
# take the place of the image's own /etc/pip/constraint.txt ($PIP_CONSTRAINT, since 25.03), which holds all packages to the
# versions that NVIDIA has tested, older than what transformers 5 needs.
# (`pip list`, not `pip freeze`: of packages that were built from files, that says where from, and no version.)
#
# Pins, with the reason and the date:
#   transformers 5.23, trl 1.16, peft 0.21, datasets 5.2
#                     2026-11: what the tests of this project run on (constraints.txt)
#   torchao 0.16.0    2026-11: newer ones break transformers on this image, older ones fail peft's version check
# The others are what data preparation, the gates and the worker import (pyproject.toml: data, gates, trl).
# Left out: flash-attn has no kernels for sm_121 (2026-11): attention runs with attn_implementation "sdpa".
RUN python3 -m pip list --format=freeze \
      | grep -E '^(torch|torchvision|torchaudio|triton|pytorch-triton|numpy)==' > /tmp/kept.txt \
 && grep -q '^torch==' /tmp/kept.txt \
 && PIP_CONSTRAINT=/tmp/kept.txt python3 -m pip install --no-cache-dir \
      "transformers==5.23.*" "trl==1.16.*" "peft==0.21.*" "datasets==5.2.*" "torchao==0.16.0" \
      "accelerate>=1.4" "safetensors>=0.4.3" "tokenizers>=0.20" "huggingface-hub>=1.0" "matplotlib>=3.8" \
      "jsonschema>=4.18" "numpy>=1.26" "jinja2>=3.1" "orjson>=3.10" "zstandard>=0.22" "pillow>=10.1" "httpx>=0.27" \
      "py3langid>=0.4" "phonenumberslite>=8.13" "PyYAML>=6.0" "psutil>=5.9" \
 && rm /tmp/kept.txt \
 && python3 -c "import torch, transformers, trl, peft, orjson; print(torch.__version__, torch.version.cuda)"
