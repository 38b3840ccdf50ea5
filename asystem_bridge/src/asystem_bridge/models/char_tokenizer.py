"""The tiny model's tokenizer: one token per character, lower case, digits and a few signs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_ID, EOS_ID, BOS_ID, UNK_ID = range(4)
# Divisible by 64, so that neither tensor parallelism nor an engine's padding changes its size.
VOCAB_SIZE = 64

_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
_CHARACTERS = list("0123456789abcdefghijklmnopqrstuvwxyz+-*=:; ?.,()>")


def char_tokenizer(*, model_max_length: int) -> PreTrainedTokenizerFast:
    """Characters become ids and back unchanged; any other character becomes ``<unk>``.

    Ids that no character needs are named ``<unused0>`` and so on, so every id decodes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _SPECIAL + _CHARACTERS
    tokens += [f"<unused{i}>" for i in range(VOCAB_SIZE - len(tokens))]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z0-9]+>|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
