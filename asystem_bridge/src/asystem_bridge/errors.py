"""Errors that a user can act on.  Each message says what was found, what is allowed, what to do."""

from __future__ import annotations


class BridgeError(RuntimeError):
    """Base of all: the command line prints the message without a traceback and exits with 1."""


class ConfigError(BridgeError):
    """The configuration is wrong."""


class HostVersionError(BridgeError):
    """vLLM, Megatron-core or another host is missing or of an untested version."""


class ModelError(BridgeError):
    """The model's files are missing, damaged or of an architecture that is not supported."""


class CheckpointError(BridgeError):
    """A checkpoint cannot be written or read."""


class CanaryError(BridgeError):
    """Trainer and engine disagree on fixed tokens: the engine holds other weights."""


class WorkerError(BridgeError):
    """A worker process raised; the message carries its traceback."""


class WorkerDiedError(BridgeError):
    """A worker process is gone; the message carries its exit code and the end of its log."""
