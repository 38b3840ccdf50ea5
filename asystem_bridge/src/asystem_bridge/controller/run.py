"""A run from configuration to report: put the parts together, run the loop, say what came out."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from asystem_bridge.compat import require_supported_vllm
from asystem_bridge.config import LoopConfig
from asystem_bridge.controller.fleet import Fleet, peak_memory_bytes
from asystem_bridge.controller.loop import AsystemLoop
from asystem_bridge.controller.run_directory import RunDirectory
from asystem_bridge.durable_files import write_synced
from asystem_bridge.errors import ConfigError, HostVersionError
from asystem_bridge.models.named import checkpoint_folder
from asystem_bridge.report.metrics import StepRecord
from asystem_bridge.report.progress import Progress, make_progress
from asystem_bridge.report.summary import print_summary, write_report
from asystem_bridge.tasks.registry import build_task
from megatron_c3po.compat import UnsupportedHostError, check_megatron_version


def run_loop(config: LoopConfig, config_text: str, run_path: Path, *, resume: bool) -> Path:
    """Run the loop to its end and write the report; returns the report's folder.

    Raises:
        BridgeError: see the classes in ``asystem_bridge.errors``; every process has ended then.
    """
    _check_hosts()
    run_directory = RunDirectory(run_path)
    try:
        last_step = run_directory.resume_step(resume=resume)
        write_synced(run_path / "config.toml", config_text)
        with make_progress(total_steps=config.run.steps) as progress:
            progress.message(f"run folder: {run_path}")
            records, facts = _run(config, run_directory, progress, last_step)
        if not records:
            raise ConfigError(
                "the prompts ran out before the first step: there is nothing to report"
            )
        report = write_report(run_path, config_text, records, facts)
        print_summary(Console(), records, facts, report)
        return report
    finally:
        run_directory.close()


def _check_hosts() -> None:
    """Before anything starts: are vLLM and Megatron there, in versions that were tried?"""
    require_supported_vllm()
    try:
        check_megatron_version()
    except UnsupportedHostError as error:
        raise HostVersionError(str(error)) from None


def _run(
    config: LoopConfig, run_directory: RunDirectory, progress: Progress, last_step: int | None
) -> tuple[list[StepRecord], dict[str, str]]:
    task = build_task(config.task.name, config.task.options)
    with progress.phase("checkpoint of the model"):
        checkpoint = checkpoint_folder(config.model.checkpoint)
    config = dataclasses.replace(
        config,
        trainer=dataclasses.replace(config.trainer, checkpoint_dir=checkpoint),
        rollout=dataclasses.replace(config.rollout, checkpoint_dir=checkpoint),
    )
    with progress.phase("trainer and engine start"):
        fleet = Fleet(config, run_path=run_directory.path)
    with fleet:
        facts = _facts(config, fleet)
        loop = AsystemLoop(
            config,
            run_directory=run_directory,
            fleet=fleet,
            task=task,
            tokenizer=_tokenizer(config),
            progress=progress,
        )
        records = loop.run(last_step)
        peak_gib = peak_memory_bytes([os.getpid(), *fleet.pids]) / 2**30
    return records, facts | {"peak memory, all processes": f"at most {peak_gib:.1f} GiB"}


def _facts(config: LoopConfig, fleet: Fleet) -> dict[str, str]:
    """What the report says about the run beside its figures."""
    trainer, engine = fleet.trainer_facts, fleet.engine_facts
    return {
        "model": f"{config.model.checkpoint} ({trainer['parameters'] / 1e6:.1f} M parameters)",
        "task": config.task.name,
        "trainer": f"megatron-core {trainer['megatron']}, "
        f"TP {config.trainer.tensor_parallel_size}, DP {config.trainer.data_parallel_size}, "
        "float32",
        "engine": f"{engine['vllm']}, {engine['dtype']}",
        "logits against transformers": f"max |difference| {trainer['logits_max_abs_diff']:.1e}",
        "IcePop band": f"[{config.trainer.icepop_alpha:g}, {config.trainer.icepop_beta:g}]",
    }


def _tokenizer(config: LoopConfig) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        config.trainer.checkpoint_dir, trust_remote_code=config.model.trust_remote_code
    )
