"""llama.cpp on a BF16 GGUF, through llama-cpp-python's low-level batch interface.

Options: slots (sequences decoded together, refilled as they finish, all in one unified KV cache), flash_attn.
"""

import ctypes
from collections import deque

from common import Job, run


class Engine:
    def __init__(self, job: Job) -> None:
        import llama_cpp

        self.lib = lib = llama_cpp
        self.version = f"llama-cpp-python {lib.__version__}"
        self.slots = 1 if job.single_stream else int(job.options.get("slots", 16))
        longest = max(len(p) for p in job.prompts) + job.max_tokens
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(job.gguf.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx = -(-self.slots * longest // 256) * 256
        params.n_batch = params.n_ubatch = 2048
        if "n_ubatch" in job.options:
            params.n_ubatch = job.options["n_ubatch"]
        params.n_seq_max = self.slots
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = job.num_threads
        params.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[job.options.get("flash_attn", "auto")]
        self.n_batch = params.n_batch
        self.ctx = lib.llama_init_from_model(self.model, params)
        self.n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.memory = lib.llama_get_memory(self.ctx)
        self.batch = lib.llama_batch_init(self.n_batch, 0, 1)
        if not self.model or not self.ctx:
            raise RuntimeError("llama.cpp could not load the model")

    def _put(self, token: int, position: int, slot: int, want_logits: bool) -> int:
        """Appends one token to the batch; returns its row."""
        batch, row = self.batch, self.batch.n_tokens
        batch.token[row] = token
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = slot
        batch.logits[row] = want_logits
        batch.n_tokens = row + 1
        return row

    def _greedy(self, index: int) -> int:
        import numpy as np

        logits = self.lib.llama_get_logits_ith(self.ctx, index)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.argmax(np.ctypeslib.as_array(address, shape=(self.n_vocab,))))

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """Continuous batching: each decode call holds one token of every running slot and the prompts that start."""
        lib, batch = self.lib, self.batch
        lib.llama_memory_clear(self.memory, True)
        waiting = deque(range(len(prompts)))
        free = list(range(self.slots))
        running: dict[int, int] = {}  # slot -> request
        outputs: list[list[int]] = [[] for _ in prompts]
        while waiting or running:
            batch.n_tokens = 0
            logits_at: dict[int, int] = {}  # slot -> row of its logits
            for slot, request in running.items():
                produced = outputs[request]
                logits_at[slot] = self._put(produced[-1], len(prompts[request]) + len(produced) - 1, slot, True)
            while waiting and free and batch.n_tokens + len(prompts[waiting[0]]) <= self.n_batch:
                request, slot = waiting.popleft(), free.pop()
                running[slot] = request
                last = len(prompts[request]) - 1
                for position, token in enumerate(prompts[request]):
                    logits_at[slot] = self._put(token, position, slot, position == last)
            if lib.llama_decode(self.ctx, batch) != 0:
                raise RuntimeError("llama_decode failed")
            for slot, row in logits_at.items():
                request = running[slot]
                outputs[request].append(self._greedy(row))
                if len(outputs[request]) == max_tokens:
                    lib.llama_memory_seq_rm(self.memory, slot, -1, -1)
                    del running[slot]
                    free.append(slot)
        return outputs


if __name__ == "__main__":
    run(Engine)
