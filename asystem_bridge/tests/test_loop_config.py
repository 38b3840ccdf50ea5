"""The configuration file: presets are valid, and every mistake is named."""

from __future__ import annotations

import tomllib

import pytest

from asystem_bridge.cli import main
from asystem_bridge.config import PRESETS, LoopConfig, load_config, preset_text
from asystem_bridge.errors import ConfigError

MINIMAL = """
[model]
checkpoint = "somewhere"
[task]
name = "digit_sort"
[c3po]
token_budget = 256
[rollout]
max_num_seqs = 64
"""


def load(text: str, **overrides: dict[str, object]) -> LoopConfig:
    return load_config(text, origin="file.toml", overrides=overrides)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_set_what_they_say(name: str) -> None:
    text = preset_text(name)
    config = load_config(text, origin=name, overrides={})
    assert config.name == name
    assert config.c3po.token_budget == tomllib.loads(text)["c3po"]["token_budget"]


def test_defaults_and_overrides() -> None:
    config = load(MINIMAL, run={"steps": 9}, trainer={"tensor_parallel_size": 2})
    assert config.run.steps == 9
    assert config.trainer.tensor_parallel_size == 2
    assert config.trainer.icepop_alpha == 0.5
    assert config.trainer.icepop_beta == 5.0
    assert str(config.trainer.checkpoint_dir) == str(config.rollout.checkpoint_dir) == "somewhere"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("token_budget = 256", "token_budgett = 256"),
            r"\[c3po\]: unknown key token_budgett; all",
        ),
        (("token_budget = 256", ""), r"\[c3po\]: token_budget is missing"),
        (
            ("token_budget = 256", 'token_budget = "256"'),
            r"\[c3po\]: token_budget = '256': .*integer",
        ),
        (("token_budget = 256", "token_budget = 10"), r"token_budget = 10 .*one whole rollout"),
        (("[c3po]", "[c3po]\ngroup_size = 5"), r"pool_capacity = 32 with group_size = 5"),
        (("[c3po]", "[c3po]\ngroup_size = 1"), r"c3po\.group_size = 1: must be at least 2"),
        (("[c3po]", "[ccpo]"), r"unknown key ccpo; allowed are c3po"),
        (("max_num_seqs = 64", "max_num_seqs = 8"), r"rollout\.max_num_seqs = 8: .*= 32"),
        (("max_num_seqs = 64", "max_model_len = 100"), r"max_model_len = 100: .* 192 \+ 64 = 256"),
        (("max_num_seqs = 64", 'checkpoint_dir = "x"'), r"\[rollout\]: unknown key checkpoint_dir"),
        (("[rollout]", "[trainer]\nrow_tokens = 64\n[rollout]"), r"row_tokens = 64: must hold"),
        (("[rollout]", "[trainer]\nicepop_beta = 0.9\n[rollout]"), r"trainer.*0\.9"),
        (("[rollout]", "[run]\nsteps = 0\n[rollout]"), r"\[run\]: steps = 0: must be at least 1"),
        (("[model]", "run = 3\n[model]"), r"\[run\]: must be a table .* got 3"),
        (("[model]", "[model"), r"not valid TOML"),
    ],
)
def test_mistakes_are_named(change: tuple[str, str], message: str) -> None:
    assert change[0] in MINIMAL
    with pytest.raises(ConfigError, match=message):
        load(MINIMAL.replace(*change))


def test_the_command_line_prints_the_message_and_no_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    assert main(["loop", "--config", f"{tmp_path}/missing.toml"]) == 1
    assert "missing.toml: No such file" in capsys.readouterr().err
    assert main(["loop", "--preset", "tiny", "--print-config"]) == 0
    assert capsys.readouterr().out == preset_text("tiny")
