# The unsloth backend on NVIDIA's PyTorch image, for x86-64 and aarch64 (a DGX Spark's GB10: sm_121, CUDA 13). It is the
# trl image with Unsloth on top, so the trl backend runs in it as well.
#   docker build -t nemotron-recipes/trl:25.11 -f containers/trl.Dockerfile containers
#   docker build -t nemotron-recipes/unsloth:25.11 -f containers/unsloth.Dockerfile containers
# Not built on NVIDIA's image yet; see trl.Dockerfile for what was tried.
FROM nemotron-recipes/trl:25.11

# Without its dependencies: Unsloth asks for trl<=1.15 and transformers<=5.17, and pip would replace those of the image,
# and NVIDIA's torch. With trl 1.16 and transformers 5.23 all four methods of the worker ran under Unsloth 2026.10.9
# (on a CPU, 2026-11; docs/backends.md) with nothing else that it names; cut_cross_entropy brings its own fused loss.
#
# Pins, with the reason and the date:
#   unsloth, unsloth_zoo 2026.10.9   2026-11: the version whose signatures the worker follows
#   bitsandbytes 0.50.*              2026-11: 4-bit bases; Unsloth refuses 0.46.0 and 0.48.0
#   cut_cross_entropy 25.1.1         2026-11: the version that unsloth_zoo 2026.10.9 was tried with
# PIP_CONSTRAINT is emptied for the reason that trl.Dockerfile gives.
RUN PIP_CONSTRAINT= python3 -m pip install --no-cache-dir --no-deps \
      "unsloth==2026.10.9" "unsloth_zoo==2026.10.9" "bitsandbytes==0.50.*" "cut_cross_entropy==25.1.1" \
 && python3 -c "from importlib.metadata import version as v; print(v('unsloth'), v('unsloth_zoo'), v('bitsandbytes'))"
