"""Builds a model and fills it from a checkpoint. Knows no architecture: the parameters load themselves."""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from atom.layers.build import BuildContext
from atom.model_loader.checkpoint import CheckpointTensor
from atom.model_loader.dummy import fill_dummy
from atom.model_loader.mapping import Shard, WeightMapper, loadable_tensors
from atom.model_loader.progress import ProgressBar
from atom.model_loader.read_ahead import ReadAhead
from atom.model_loader.staging import Staging
from atom.utils import startup
from atom.utils.errors import ModelLoadError

if TYPE_CHECKING:
    from atom.config import Config

_MAX_LISTED = 10
_MAX_WORKERS = 8


def load_model(
    config: "Config", device: torch.device, context: BuildContext, show_progress: bool | None = None
) -> nn.Module:
    """The model of `config.hf_config` on `device`, filled, processed and in evaluation mode.

    show_progress: None shows the bar when stderr is a terminal. Raises ModelLoadError.
    """
    from atom.models.registry import get_model_class

    with startup.phase("build model"):
        model_class = get_model_class(config.hf_config)
        if context.quant_config is not None:  # whose names are the checkpoint's, not those of merged layers
            packed = getattr(model_class, "packed_modules_mapping", {})
            merged = {name: list(parts) for name, parts in packed.items()}
            context.quant_config.remap_layer_name(config.hf_config, merged)
        model = build_model(model_class, config.hf_config, device, context)
    if config.load_dummy:
        fill_with_dummies(model)
    else:
        tied = bool(getattr(config.hf_config, "tie_word_embeddings", False))
        checkpoint = open_checkpoint(config.model, context.dtype)
        load_weights(model, checkpoint, tie_word_embeddings=tied, source=config.model, show_progress=show_progress)
    with startup.phase("pack weights"):
        return finalize(model)


def build_model(model_class: type, hf_config: Any, device: torch.device, context: BuildContext) -> nn.Module:
    """Allocates the model on `device` in `context.dtype`; layers leave their memory uninitialized."""
    with _default_dtype(context.dtype), torch.device(device), torch.no_grad():
        return model_class(hf_config, context)


def open_checkpoint(model: str, dtype: torch.dtype) -> list[CheckpointTensor]:
    """The tensors of a model's folder or GGUF file, under Hugging Face names."""
    from atom.utils.model_path import resolve_model

    location = resolve_model(model)
    if location.gguf_file is not None:
        from atom.model_loader.gguf import read_gguf_tensors

        return list(read_gguf_tensors(location.gguf_file, dtype))
    from atom.model_loader.safetensors import read_safetensors

    return list(read_safetensors(location.directory))


def load_weights(
    model: nn.Module,
    checkpoint: Iterable[CheckpointTensor],
    *,
    tie_word_embeddings: bool = False,
    source: str = "checkpoint",
    show_progress: bool | None = False,
    staging: Staging | None = None,
) -> None:
    """Fills every parameter and persistent buffer exactly once, in the order of the files.

    A few tensors are in flight at a time, so memory stays near the model's own size; the system reads ahead of them.
    staging: how plain tensors come to the parameters' device; None lets it be a GPU's. Raises one ModelLoadError
    that lists what is missing, surplus or of a wrong shape.
    """
    filling = _Filling(WeightMapper(model, tie_word_embeddings))
    jobs = []
    for tensor in checkpoint:
        shards = filling.plan(tensor)
        if shards:
            jobs.append((tensor, shards))
    jobs.sort(key=lambda job: _place(job[0]))
    total = sum(_num_bytes(tensor) for tensor, _ in jobs)
    staging = staging or _staging_for(model)
    started = time.perf_counter()
    spans = [tensor.span for tensor, _ in jobs if tensor.span is not None]
    with ReadAhead(spans) as ahead, ProgressBar("Loading weights", total, show_progress) as bar:

        def fill(tensor: CheckpointTensor, shards: list[Shard]) -> None:
            if staging is not None and tensor.span is not None and tensor.span.plain:
                with staging.budget.take(_num_bytes(tensor)):
                    filling.fill(tensor, shards, staging)
            else:
                filling.fill(tensor, shards, None)
            bar.advance(_num_bytes(tensor))
            if tensor.span is not None:
                ahead.advance(tensor.span.size)

        try:
            _run_all(fill, jobs)
        finally:
            if staging is not None:
                staging.finish()
    seconds = time.perf_counter() - started
    text = f"{total / 1e9:.2f} GB"
    if staging is not None:
        text += f"; reading took {staging.read_seconds:.2f} of {seconds * _num_threads():.2f} thread seconds"
    startup.note("load", text)
    filling.check(source)


def fill_with_dummies(model: nn.Module) -> None:
    """Each tensor once; tied ones under the first of their names."""
    seen: set[int] = set()
    jobs = []
    for name, tensor in loadable_tensors(model).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            jobs.append((name, tensor.data))
    _run_all(fill_dummy, jobs)


def finalize(model: nn.Module) -> nn.Module:
    """Let layers repack what they loaded; then the model is only read."""
    for module in model.modules():
        process = getattr(module, "process_weights_after_loading", None)
        if process is not None:
            process()
    return model.eval().requires_grad_(False)


def default_weight_loader(
    param: torch.Tensor, loaded: torch.Tensor, shard_id: int | None, expert_id: int | None
) -> None:
    """For parameters that are stored as they are used."""
    assert (shard_id, expert_id) == (None, None), "a parameter made of parts needs a weight_loader of its own"
    if param.shape != loaded.shape:
        raise ValueError(f"expected {_shape(param)}")
    param.copy_(loaded)


class _Filling:
    """What has been loaded so far, and what was wrong with the rest."""

    def __init__(self, mapper: WeightMapper) -> None:
        self.mapper = mapper
        self.loaded: dict[int, set[tuple[int | None, int | None]]] = {}
        self.surplus: list[str] = []
        self.misshapen: list[str] = []
        self.lock = threading.Lock()

    def plan(self, tensor: CheckpointTensor) -> list[Shard]:
        shards = self.mapper.resolve(tensor.name, tensor.shape)
        if shards is None:
            self.surplus.append(tensor.name)
            return []
        for shard in shards:
            key = (shard.shard_id, shard.expert_id)
            parts = self.loaded.setdefault(id(self.mapper.targets[shard.target]), set())
            if key in parts:
                self.surplus.append(f"{tensor.name} (a second source of {shard.target})")
                return []
            parts.add(key)
        return shards

    @torch.no_grad()
    def fill(self, tensor: CheckpointTensor, shards: list[Shard], staging: Staging | None) -> None:
        param = self.mapper.targets[shards[0].target]
        problem = _dtype_problem(tensor.dtype, param.dtype)
        if problem is None and shards[0].select is not None and shards[0].select[1] is not None and tensor.shape[1] % 2:
            problem = "dimension 1 must hold the gate and up halves"
        if problem is None:
            load = getattr(param, "weight_loader", default_weight_loader)
            with nullcontext() if staging is None else staging.stream():
                whole = tensor.load() if staging is None else staging.load(tensor)
                try:
                    for shard in shards:
                        load(param, _select(whole, shard), shard.shard_id, shard.expert_id)
                except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                    reason = str(error).splitlines()[0] if str(error) else "rejected"
                    problem = f"{reason} (for {shards[0].target} {_shape(param)})"
        if problem is not None:
            with self.lock:
                self.misshapen.append(f"{tensor.name} {_shape(tensor)}: {problem}")

    def check(self, source: str) -> None:
        missing = []
        seen: set[int] = set()
        for name, target in self.mapper.targets.items():
            if id(target) in seen:
                continue
            seen.add(id(target))
            needed = getattr(target, "num_shards", 1)
            parts = self.loaded.get(id(target), set())
            if not parts:
                missing.append(name)
            elif len(parts) < needed and (None, None) not in parts:
                missing.append(f"{name} (parts {self.mapper.part_names(name, parts, needed)})")
        problems = [
            _listed("missing", missing),
            _listed("not in the model", self.surplus),
            _listed("misshapen", self.misshapen),
        ]
        found = [problem for problem in problems if problem]
        if found:
            raise ModelLoadError(f"model {source}: the checkpoint doesn't fit its config: {'; '.join(found)}")


def _select(whole: torch.Tensor, shard: Shard) -> torch.Tensor:
    if shard.select is None:
        return whole
    expert, half = shard.select
    matrix = whole[expert]
    return matrix if half is None else matrix.chunk(2, dim=0)[half]


def _dtype_problem(stored: torch.dtype, wanted: torch.dtype) -> str | None:
    """Widening and narrowing between plain floats is meant; anything else would change the numbers' meaning."""
    if stored == wanted:
        return None
    if stored.is_floating_point and wanted.is_floating_point and stored.itemsize > 1:
        return None
    return f"stored as {stored}, which can't be read as {wanted}".replace("torch.", "")


def _listed(title: str, items: list[str]) -> str:
    if not items:
        return ""
    shown = ", ".join(sorted(items)[:_MAX_LISTED])
    more = f", and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return f"{len(items)} {title}: {shown}{more}"


def _shape(tensor: Any) -> str:
    return str(list(tensor.shape))


def _num_bytes(tensor: CheckpointTensor) -> int:
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def _place(tensor: CheckpointTensor) -> tuple[str, int]:
    return ("", 0) if tensor.span is None else (str(tensor.span.file.path), tensor.span.offset)


def _staging_for(model: nn.Module) -> Staging | None:
    """On a GPU: what is copied straight from a mapped file waits for each of its pages."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Staging(device) if device.type == "cuda" and hasattr(os, "preadv") else None


def _num_threads() -> int:
    return min(_MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _run_all(function: Any, jobs: list[tuple]) -> None:
    """Calls function(*job) for all jobs on a few threads; the first error ends it.

    Reading, decoding and copying release the GIL. Only as many jobs as threads hold a tensor at any time.
    """
    workers = _num_threads()
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            function(*job)
        return
    waiting: Iterator[tuple] = iter(jobs)
    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool:
        running: set[Future] = set()
        try:
            while True:
                running |= {pool.submit(function, *job) for job in islice(waiting, workers - len(running))}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        finally:
            for future in running:
                future.cancel()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
