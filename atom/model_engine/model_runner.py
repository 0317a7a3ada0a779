"""One worker on one device: loads the model, sizes the cache, runs steps."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from atom.compilation.cuda_graph import GraphDispatcher, capturable_mode, make_capturer
from atom.compilation.levels import build_forward
from atom.compilation.recorded_steps import RecordedSteps
from atom.config import CompilationLevel, Config, CUDAGraphMode
from atom.forward_context import ForwardContext, set_forward_context
from atom.kernels import unavailable_reason
from atom.layers.attention.layer import Attention
from atom.layers.build import BuildContext
from atom.layers.sampler import Sampler, SamplerOutput, SamplingMetadata
from atom.model_engine import kv_cache
from atom.model_engine.graph_runner import GraphRunner
from atom.model_engine.input_batch import InputBatch, StepInput
from atom.model_engine.profiler import Profiler
from atom.model_engine.prompt_logprobs import PromptLogprobs
from atom.model_engine.protocol import ModelOutput, ScheduledBatch, TokenLogprobs
from atom.model_engine.sampling import SamplingState, to_token_logprobs, worst_case_metadata
from atom.model_engine.static_inputs import StaticInputs
from atom.model_engine.warm_up import warm_up
from atom.model_loader.loader import load_model
from atom.model_loader.progress import ProgressBar
from atom.platforms import select_platform
from atom.sampling_params import SamplingParams
from atom.utils import envs, startup
from atom.utils.logging import get_logger

logger = get_logger(__name__)


class ModelRunner:
    """Driven by an executor: `initialize` once, then `submit` a step at a time."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.platform = select_platform(config.device)
        self.device = self.platform.device()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if self.platform.device_type == "cpu" and envs.ATOM_CPU_THREAD_BINDING == "cores":
            _bind_threads()
        self.profiler = Profiler(config.torch_profiler_dir or "traces", envs.ATOM_PROFILER_MORE)

    def initialize(self) -> kv_cache.MemoryPlan:
        """Load weights, measure what a full step needs, give the rest to the cache."""
        config = self.config
        self._settle_level()
        dtype = config.torch_dtype
        context = BuildContext(
            dtype=dtype,
            kv_cache_dtype=self.platform.fp8_dtype if config.kv_cache_dtype == "fp8" else dtype,
            block_size=config.kv_cache_block_size,
            max_model_len=self._max_model_len,
            attention_backend=config.attention_backend,
            fuses_qkv=envs.ATOM_ENABLE_QK_NORM_ROPE_CACHE_QUANT_FUSION,
            fuses_norm_quant=envs.ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_RMSNORM_QUANT,
            fuses_activation_quant=envs.ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_SILU_MUL_QUANT,
            fuses_norm_linear=self.platform.device_type == "cpu",
            quant_config=config.quant_config if config.quant_config.is_quantized else None,
            fp8_dtype=self.platform.fp8_dtype,
            fusable_backends=("torch",) if self._compiles_kernels() else None,
        )
        logger.info("platform: %s", self.platform.describe())
        started = time.perf_counter()
        with startup.phase("load"):
            self.model = load_model(config, self.device, context)
        logger.info("weights loaded in %.2f s", time.perf_counter() - started)
        self.attention_layers = [m for m in self.model.modules() if isinstance(m, Attention)]
        self.layers = {layer.layer_name: layer for layer in self.attention_layers}
        self.sampler = Sampler()
        self.vocab_size: int = config.hf_config.vocab_size
        with startup.phase("compile"):
            self.forward = build_forward(self.model, config, self.platform, self.device)
        self.compute_logits: Callable[[torch.Tensor], torch.Tensor] = self.model.compute_logits  # type: ignore[assignment]
        self.prompt_logprobs = PromptLogprobs(self.compute_logits)
        self._prompt_logprob_rows: set[int] = set()

        with startup.phase("memory"):
            num_blocks, plan = self.get_num_blocks()
            self.kv_cache_config = kv_cache.allocate(self.attention_layers, num_blocks, self.device)
        cuts = (layer.backend.long_prompts for layer in self.attention_layers)
        static = self._make_static_inputs()
        self.batch = InputBatch(
            config.max_num_seqs,
            self._max_model_len,
            config.kv_cache_block_size,
            self.vocab_size,
            self.device,
            next(filter(None, cuts), None),
            static,
        )
        self.sampling = SamplingState(config.max_num_seqs, self.vocab_size, self.device)
        with startup.phase("capture"):
            self.graph_runner = self._make_graph_runner(static)
        if self.platform.device_type != "cpu":
            started = time.perf_counter()
            with startup.phase("warm up"):
                warm_up(self, plan.num_cached_tokens)
            logger.info("warmed up in %.1f s", time.perf_counter() - started)
        logger.info(
            "KV cache: %d blocks of %d tokens, %.2f GiB (%s)",
            plan.num_blocks,
            plan.block_size,
            plan.cache_bytes / 2**30,
            plan.reason,
        )
        return plan

    def get_num_blocks(self) -> tuple[int, kv_cache.MemoryPlan]:
        """Decide the number of cache blocks; sets the config's derived cache fields.

        Raises CacheMemoryError when not even one request of max_model_len fits.
        """
        config = self.config
        # No stateful-attention model is built yet: no request needs a slot beside its blocks.
        config.per_req_cache_equiv_blocks = 0
        config.num_per_req_cache_groups = 0
        block_size = config.kv_cache_block_size
        block_bytes = kv_cache.bytes_per_block(layer.spec for layer in self.attention_layers)
        weight_bytes = sum(t.numel() * t.element_size() for t in self._all_tensors())
        with startup.phase("profile run"):
            activation_bytes = self._profile_run()
        free, total = self.platform.memory()
        if self.platform.device_type == "cpu":
            setting = "cpu_memory_utilization"
            available = int(free * config.cpu_memory_utilization)
            reason = f"{config.cpu_memory_utilization:g} of {free / 2**30:.1f} GiB free RAM"
        else:
            setting = "gpu_memory_utilization"
            # What a step allocates is free now but not to be had by the cache.
            available = int(total * config.gpu_memory_utilization) - (total - free) - activation_bytes
            reason = f"{config.gpu_memory_utilization:g} of {total / 2**30:.1f} GiB less weights and activations"
        full_context = -(-self._max_model_len // block_size)
        if config.num_kvcache_blocks > 0:
            num_blocks, reason = config.num_kvcache_blocks, "num_kvcache_blocks was given"
            kv_cache.require_blocks(max(available, free), block_bytes, num_blocks, setting)
        else:
            needed = full_context if config.is_user_set("max_model_len") else 1
            num_blocks = kv_cache.require_blocks(available, block_bytes, needed, setting)
            useful = kv_cache.useful_blocks(config.max_num_seqs, self._max_model_len, block_size)
            if useful < num_blocks:
                num_blocks, reason = useful, "max_num_seqs x max_model_len can use no more"
        if num_blocks < full_context:
            self._shrink_max_model_len(num_blocks * block_size)
        config.num_kvcache_blocks = num_blocks
        plan = kv_cache.MemoryPlan(
            num_blocks=num_blocks,
            block_size=block_size,
            bytes_per_block=block_bytes,
            total_bytes=total,
            free_bytes=free,
            weight_bytes=weight_bytes,
            activation_bytes=activation_bytes,
            reason=reason,
        )
        return num_blocks, plan

    @property
    def max_in_flight(self) -> int:
        """On a GPU the host prepares the next step while the device runs this one."""
        return 1 if self.platform.device_type == "cpu" else 2

    @torch.inference_mode()
    def submit(self, batch: ScheduledBatch) -> Callable[[], ModelOutput]:
        """Start one step: update rows, compute the scheduled tokens, sample where a sequence is complete.

        The result waits for the device; nothing before it does.
        """
        self._update_rows(batch)
        step = self.batch.prepare(batch)
        # A GPU's graphs and compiled pieces know one number of rows a step.
        only_sampled = self.platform.device_type == "cpu" and not self._prompt_logprob_rows
        hidden = self.graph_runner.run(step, only_sampled)
        prompt_logprobs = self._collect_prompt_logprobs(step, hidden)
        rows = step.sampled_rows
        if not len(rows):
            self.batch.advance(step, None)
            return lambda: ModelOutput(request_ids=[], token_ids=[])
        if len(rows) != len(hidden):
            hidden = hidden[step.logits_indices]
        metadata = self.sampling.build(rows)
        if batch.token_masks:
            metadata = self._with_masks(metadata, step.request_ids, batch.token_masks)
        sampled = self._sample(hidden, metadata)
        self.sampling.append(rows, sampled.token_ids)
        self.batch.advance(step, sampled.token_ids)
        wanted = [self._params(row).logprobs for row in rows.tolist()] if sampled.logprobs is not None else None
        on_host = self.platform.copy_to_host(
            [sampled.token_ids, sampled.logprob_token_ids, sampled.logprobs, sampled.ranks]
        )

        def result() -> ModelOutput:
            token_ids, logprob_ids, logprobs, ranks = on_host()
            assert token_ids is not None
            output = ModelOutput(
                request_ids=step.request_ids, token_ids=token_ids.tolist(), prompt_logprobs=prompt_logprobs
            )
            if wanted is not None:
                entries = to_token_logprobs(
                    SamplerOutput(token_ids=token_ids, logprob_token_ids=logprob_ids, logprobs=logprobs, ranks=ranks),
                    wanted,
                )
                for name, entry in zip(step.request_ids, entries, strict=True):
                    if entry is not None:
                        output.logprobs[name] = [entry]
            return output

        return result

    def _sample(self, hidden: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        # A GPU writes logits in no time, and its sampler is one kernel already.
        if self.platform.device_type == "cpu" and metadata.only_likeliest:
            return SamplerOutput(token_ids=self.model.likeliest_tokens(hidden))  # type: ignore[operator]
        return self.sampler(self.compute_logits(hidden), metadata)

    def forget_requests(self) -> None:
        """Free every row, however far the last step came."""
        for request_id in list(self.batch.row_of):
            self.batch.remove(request_id)
        self.sampling = SamplingState(self.config.max_num_seqs, self.vocab_size, self.device)
        self.prompt_logprobs = PromptLogprobs(self.compute_logits)
        self._prompt_logprob_rows.clear()

    def start_profile(self) -> None:
        self.profiler.start()

    def stop_profile(self) -> str | None:
        return self.profiler.stop()

    def _update_rows(self, batch: ScheduledBatch) -> None:
        for request_id in batch.removed_request_ids:
            row = self.batch.remove(request_id)
            self.sampling.remove(row)
            if row in self._prompt_logprob_rows:
                self._prompt_logprob_rows.discard(row)
                self.prompt_logprobs.forget(request_id)
        for request in batch.new_requests:
            row = self.batch.add(request)
            prompt = request.num_prompt_tokens
            params = request.sampling_params
            if params.prompt_logprobs is not None:
                self._prompt_logprob_rows.add(row)
            self.sampling.add(
                row, params, request.token_ids[:prompt], request.token_ids[prompt:], params.stop_token_ids
            )
        for request_id, block_ids in batch.new_block_ids.items():
            self.batch.append_blocks(self.batch.row_of[request_id], block_ids)

    @property
    def _max_model_len(self) -> int:
        assert self.config.max_model_len is not None
        return self.config.max_model_len

    def _settle_level(self) -> None:
        """A level that nobody chose is 0 on a CPU: its kernels are whole layers, and compiling takes seconds."""
        compilation = self.config.compilation_config
        if self.platform.device_type == "cpu" and not compilation.is_user_set("level") and compilation.level > 0:
            compilation.level = CompilationLevel.NO_COMPILATION
            self.config.reasons["compilation_config.level"] = "0: not chosen, and a CPU's kernels leave little to fuse"

    def _compiles_kernels(self) -> bool:
        """Whether Inductor generates device code here. On a CPU our C++ kernels are fused further than it would."""
        compilation = self.config.compilation_config
        return compilation.level > 0 and compilation.use_inductor and self.platform.device_type != "cpu"

    def _make_static_inputs(self) -> StaticInputs | None:
        """What CUDA graphs read, for the sizes to capture; None where there are none, and every step runs plainly."""
        config = self.config
        mode = config.compilation_config.cudagraph_mode or CUDAGraphMode.NONE
        if not self.platform.has_graphs:
            mode = CUDAGraphMode.NONE
        backends = [layer.backend for layer in self.attention_layers]
        possible = capturable_mode(
            mode, all(b.can_be_captured for b in backends), all(b.captures_mixed for b in backends)
        )
        if possible is not mode:
            names = ", ".join(sorted({b.name for b in backends}))
            logger.warning("cudagraph_mode: %s -> %s, as attention backend %s allows", mode.name, possible.name, names)
            mode = possible
        sizes = [] if mode is CUDAGraphMode.NONE else config.graph_bs or []
        if not sizes:
            return None
        prompt_sizes = config.prompt_graph_sizes if mode.mixed_mode() is not CUDAGraphMode.NONE else []
        return StaticInputs(
            self.platform,
            GraphDispatcher(mode, sizes, prompt_sizes),
            config.max_num_seqs,
            self._max_model_len,
            config.kv_cache_block_size,
        )

    def _make_graph_runner(self, static: StaticInputs | None) -> GraphRunner:
        """Capture CUDA graphs, if there are to be any."""
        runner = GraphRunner(
            self.forward,
            self.layers,
            static,
            make_capturer(self.platform.has_graphs),
            copy_inputs=self.config.compilation_config.cudagraph_copy_inputs,
            recorded=self._make_recorded_steps(),
        )
        if static is not None:
            dispatcher = static.dispatcher
            started, (free_before, _) = time.perf_counter(), self.platform.memory()
            count = len(dispatcher.captures())
            with torch.inference_mode(), ProgressBar("Capturing CUDA graphs", count, in_bytes=False) as bar:
                runner.capture(bar.advance)
            self.platform.synchronize()
            logger.info(
                "CUDA graphs: %d captured (%s, sizes %s) in %.1f s, %.2f GiB",
                count,
                dispatcher.mode.name,
                dispatcher.mixed_sizes,
                time.perf_counter() - started,
                (free_before - self.platform.memory()[0]) / 2**30,
            )
        return runner

    def _make_recorded_steps(self) -> RecordedSteps | None:
        """What replays decodes on a CPU; None where its kernels don't run, or graphs were turned off."""
        sizes = self.config.graph_bs
        if not sizes or {layer.backend.name for layer in self.attention_layers} != {"cpu"}:
            return None
        return RecordedSteps(self.model, max(sizes))

    def _with_masks(
        self, metadata: SamplingMetadata, request_ids: list[str], masks: dict[str, bytes]
    ) -> SamplingMetadata:
        rows = [i for i, request_id in enumerate(request_ids) if request_id in masks]
        data = bytearray(b"".join(masks[request_ids[i]] for i in rows))
        return replace(
            metadata,
            mask_rows=torch.tensor(rows, device=self.device),
            token_masks=torch.frombuffer(data, dtype=torch.uint8).view(len(rows), -1).to(self.device),
        )

    def _params(self, row: int) -> SamplingParams:
        params = self.batch.params[row]
        assert params is not None
        return params

    def _collect_prompt_logprobs(self, step: StepInput, hidden: torch.Tensor) -> dict[str, list[TokenLogprobs]]:
        """Add this step's chunks; the finished lists of requests that sample their first token now."""
        finished: dict[str, list[TokenLogprobs]] = {}
        if not self._prompt_logprob_rows:
            return finished
        for i, row in enumerate(step.rows.tolist()):
            if row not in self._prompt_logprob_rows:
                continue
            num = self._params(row).prompt_logprobs
            assert num is not None
            request_id = self.batch.request_ids[row]
            num_prompt = int(self.batch.num_prompt[row])
            first = int(self.batch.num_computed[row])
            end = first + int(step.counts[i])
            flat, last = int(step.starts[i]), min(end, num_prompt - 1)
            if first < last:
                following = self.batch.tokens[row, first + 1 : last + 1].tolist()
                self.prompt_logprobs.add_chunk(request_id, hidden[flat : flat + last - first], first, following, num)
            # A resumed request has delivered them already.
            if end == num_prompt == self.batch.num_tokens[row]:
                finished[request_id] = self.prompt_logprobs.take(request_id)
        return finished

    @torch.inference_mode()
    def _profile_run(self) -> int:
        """Bytes that the largest step takes at its peak; 0 on a CPU, where pages come on demand."""
        if self.platform.device_type == "cpu":
            return 0
        self.platform.reset_peak_memory()
        tokens = torch.zeros(self.config.max_num_batched_tokens, dtype=torch.int64, device=self.device)
        with set_forward_context(ForwardContext(None, self.layers)):
            hidden = self.forward(tokens, tokens)
        num_rows = min(self.config.max_num_seqs, len(hidden))
        self.sampler(self.compute_logits(hidden[:num_rows]), worst_case_metadata(num_rows, self.device))
        del hidden, tokens
        return self.platform.peak_memory()

    def _shrink_max_model_len(self, room: int) -> None:
        config = self.config
        if config.is_user_set("max_model_len"):
            raise kv_cache.CacheMemoryError(
                f"max_model_len={config.max_model_len} does not fit the KV cache of {room} tokens "
                f"(num_kvcache_blocks={config.num_kvcache_blocks}); lower max_model_len or raise num_kvcache_blocks"
            )
        logger.warning(
            "max_model_len: %d -> %d, what the KV cache holds (set num_kvcache_blocks or free memory for more)",
            config.max_model_len,
            room,
        )
        config.max_model_len = room
        config.reasons["max_model_len"] = f"{room}: what the KV cache holds"

    def _all_tensors(self) -> list[torch.Tensor]:
        seen = {t.data_ptr(): t for t in [*self.model.parameters(), *self.model.buffers()]}
        return list(seen.values())


def _bind_threads() -> None:
    """Bind the CPU kernels' threads to cores, where there are such kernels."""
    reason = unavailable_reason("cpu")
    if reason is not None:
        logger.warning("ATOM_CPU_THREAD_BINDING: nothing is bound, as the CPU kernels are off (%s)", reason)
        return
    from atom.kernels.cpu.threads import bind_threads

    first, *others = bind_threads(torch.get_num_threads())
    logger.info("CPU threads bound to %s; %d is left to the calling thread", others, first)
