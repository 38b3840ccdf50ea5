"""The rollout engine's process: vLLM in process, called by the controller method by method.

Ring-1T section 2.5: a worker of the runtime.  Weights come through a shared-memory segment, control
through this class.  Left out here: tensor parallelism and several engines.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from asystem_bridge import compat
from asystem_bridge.errors import BridgeError, ModelError
from asystem_bridge.vllm_backend.options import RolloutOptions
from asystem_bridge.vllm_backend.plugin import BACKEND
from asystem_bridge.vllm_backend.tensor_report import TensorReport
from megatron_c3po.engine import Delta, Submission

if TYPE_CHECKING:
    from pathlib import Path

    from asystem_bridge.vllm_backend.step_engine import StepEngine


class VllmRolloutWorker:
    """Methods are called through ``runtime.worker_client``; arguments and results are pickled.

    Set ``VLLM_ENABLE_V1_MULTIPROCESSING=0`` in its environment (see ``client.vllm_environment``).
    """

    def __init__(self) -> None:
        self._engine: Any = None
        self._steps: StepEngine | None = None

    def setup(self, options: RolloutOptions) -> dict[str, Any]:
        """Start the engine on the checkpoint's weights.

        Returns:
            vllm: distribution and version; dtype; eos_token_ids; num_kv_blocks, block_size: the
            cache holds their product in tokens.

        Raises:
            HostVersionError: vLLM is missing or untested.
            ModelError: the checkpoint does not say which token ends a text.
        """
        version = compat.require_supported_vllm()
        eos_token_ids = read_eos_token_ids(options.checkpoint_dir)

        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from asystem_bridge.vllm_backend.plugin import register
        from asystem_bridge.vllm_backend.step_engine import StepEngine

        register()  # VLLM_PLUGINS may exclude entry points; this process asked for the backend
        kv_cache_bytes = None if options.kv_cache_gib is None else int(options.kv_cache_gib * 2**30)
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(options.checkpoint_dir),
                skip_tokenizer_init=True,
                trust_remote_code=options.trust_remote_code,
                dtype=options.dtype,
                seed=options.seed,
                max_model_len=options.max_model_len,
                max_num_seqs=options.max_num_seqs,
                max_num_batched_tokens=options.max_num_batched_tokens,
                enable_chunked_prefill=compat.chunked_prefill(),
                kv_cache_memory_bytes=kv_cache_bytes,
                enable_prefix_caching=True,
                async_scheduling=False,  # else a poll returns the tokens of the step before
                enforce_eager=options.enforce_eager,
                disable_log_stats=True,
                weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            )
        )
        self._steps = StepEngine(self._engine, eos_token_ids)
        cache = self._engine.vllm_config.cache_config
        return {
            "vllm": version,
            "dtype": options.dtype,
            "eos_token_ids": eos_token_ids,
            "num_kv_blocks": cache.num_gpu_blocks,
            "block_size": cache.block_size,
        }

    def step(self, submissions: list[Submission], aborts: list[str]) -> list[Delta]:
        """Abort, then submit, then one scheduler step."""
        steps = self._started()
        steps.abort(aborts)
        steps.submit(submissions)
        return steps.poll()

    def abort(self, uids: list[str]) -> None:
        """Abort without a step."""
        self._started().abort(uids)

    def attach_weights(self, segment_path: str, layout_state: dict[str, Any]) -> None:
        """Map the segment that later updates are read from."""
        self._started()
        self._engine.collective_rpc(
            "init_weight_transfer_engine",
            kwargs={"init_info": {"path": segment_path, "layout": layout_state}},
        )

    def update_weights(self, version: int) -> dict[str, float]:
        """Load what the segment holds now, and forget everything computed with older weights.

        Returns:
            Seconds of ``start``, ``update`` and ``finish``.

        Raises:
            BridgeError: rollouts are under way, or the prefix cache could not be cleared.
            WeightSegmentError: a tensor was ignored or is missing.
        """
        self._refuse_while_rolling_out("update_weights")
        seconds = {}
        for phase, method, kwargs in (
            ("start", "start_weight_update", {}),
            ("update", "update_weights", {"update_info": {"version": version}}),
            ("finish", "finish_weight_update", {}),
        ):
            begin = time.perf_counter()
            self._engine.collective_rpc(method, kwargs=kwargs)
            seconds[phase] = time.perf_counter() - begin
        self._engine.set_weight_version(str(version))
        if not self._engine.reset_prefix_cache():
            raise BridgeError(
                f"vLLM kept its prefix cache after the update to version {version}: some request "
                "still holds blocks, so tokens of two versions would mix"
            )
        return seconds

    def weight_version(self) -> str:
        """What vLLM reports: ``"default"`` before the first update."""
        self._started()
        return str(self._engine.get_weight_version())

    def prompt_logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-prob of tokens 1 .. n-1 of each sequence; see ``StepEngine``."""
        return self._started().prompt_logprobs(sequences)

    def greedy(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The most likely completions; see ``StepEngine``."""
        return self._started().greedy(prompts, max_new_tokens)

    def diagnose(self) -> list[TensorReport]:
        """Compare every tensor of the attached segment with what the engine computes with."""
        self._refuse_while_rolling_out("diagnose")
        from asystem_bridge.vllm_backend.probe import diagnose_worker

        reports: list[TensorReport] = self._engine.collective_rpc(diagnose_worker)[0]
        return reports

    def close(self) -> None:
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine = self._steps = None

    def _started(self) -> StepEngine:
        if self._steps is None:
            raise BridgeError("the rollout engine is not started; call setup first")
        return self._steps

    def _refuse_while_rolling_out(self, method: str) -> None:
        unfinished = self._started().unfinished
        if unfinished:
            raise BridgeError(
                f"{method} while {len(unfinished)} rollouts are under way; abort them first"
            )


def read_eos_token_ids(checkpoint_dir: Path) -> list[int]:
    """End-of-text tokens: of ``generation_config.json``, else of ``config.json``.

    Raises:
        ModelError: neither names one.
    """
    for name in ("generation_config.json", "config.json"):
        path = checkpoint_dir / name
        if not path.is_file():
            continue
        eos = json.loads(path.read_text()).get("eos_token_id")
        if eos is not None:
            return [eos] if isinstance(eos, int) else [int(token_id) for token_id in eos]
    raise ModelError(
        f"{checkpoint_dir}: neither generation_config.json nor config.json has an eos_token_id; "
        "completions would never end"
    )
