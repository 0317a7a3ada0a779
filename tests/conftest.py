"""Shared set-up: tests never reach a model hub; without a GPU, Triton kernels run in Triton's interpreter."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait take the cores from whoever they wait for, as soon as there is other work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Chosen before anything imports Triton, as torch's compiler does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
