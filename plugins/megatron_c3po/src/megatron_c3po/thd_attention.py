"""Attention over packed sequences without TransformerEngine.

The local layer spec of megatron-core has no attention that understands ``packed_seq_params``
(``qkv_format="thd"``: sequences of different lengths side by side in one row).  This module is a
``core_attention`` for that spec: torch's scaled-dot-product attention, once per sequence.

Shapes: T tokens of the row, S sequence, B batch, H query heads, G key-value heads (H is a multiple
of G), D head size.  Left out: dropout, context parallelism, masks other than causal.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class ThdSdpaAttention(MegatronModule):
    """Causal attention for packed (T, H, D) and for padded (S, B, H, D) inputs.

    Raises:
        ValueError: the configuration asks for something that this module does not do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout = {dropout}: only 0.0 is supported")
        if config.context_parallel_size != 1:
            raise ValueError(
                f"context_parallel_size = {config.context_parallel_size}: only 1 is supported"
            )
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"attn_mask_type = {attn_mask_type}: only causal masks are supported")
        self.softmax_scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend within each sequence.

        Args:
            query: (T, H, D) with ``packed_seq_params``, else (S, B, H, D); key and value with G
                heads.
            attention_mask: ignored: causal is the only mask, and the packing is in
                ``packed_seq_params.cu_seqlens_q``.

        Returns:
            (T, H * D) or (S, B, H * D).

        Raises:
            ValueError: the packed sequences are not the whole row, or a bias was given.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported")
        if packed_seq_params is None:
            # (S, B, H, D) -> (B, H, S, D)
            output = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return output.permute(2, 0, 1, 3).flatten(2)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        if bounds[0] != 0 or bounds[-1] != query.shape[0]:
            raise ValueError(
                f"cu_seqlens_q runs from {bounds[0]} to {bounds[-1]}, the row has "
                f"{query.shape[0]} tokens: every token must belong to a sequence"
            )
        outputs = [
            # (segment, H, D) -> (1, H, segment, D)
            self._attend(*(x[start:end].transpose(0, 1)[None] for x in (query, key, value)))[0]
            for start, end in itertools.pairwise(bounds)
            if end > start
        ]
        return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
