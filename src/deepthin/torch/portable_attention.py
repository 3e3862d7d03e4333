"""Attention of a portable model, whose input projections are products with the code."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from deepthin.errors import ConfigError
from deepthin.torch.layers import ThinMultiheadAttention


class PortableAttention(ThinMultiheadAttention):
    """Attention whose input projections are products with the code."""

    _of_one_width: bool  # whether queries, keys and values share one matrix

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] -- names of torch's arguments
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``, whose arguments these are.

        Args:
            query: Queries.
            key: Keys.
            value: Values.
            key_padding_mask: Which keys are left out.
            need_weights: Whether to return the weights of attention.
            attn_mask: Which keys each query leaves out, or what is added to its scores.
            average_attn_weights: Whether the weights are averaged over the heads.
            is_causal: A hint that the mask is causal.

        Returns:
            The outputs, and the weights or None.

        Raises:
            ConfigError: The layer adds a row of biases or of zeros to the keys.
        """
        if self.bias_k is not None or self.add_zero_attn:
            raise ConfigError("Attention with add_bias_kv or add_zero_attn has no portable form.")
        alone = query.dim() == 2
        q, k, v = (t[None] if alone else t if self.batch_first else t.transpose(0, 1) for t in (query, key, value))
        same = key is value and query is key
        q, k, v = self._projected(q, k, v, same)
        items, targets, heads = q.shape[0], q.shape[1], self.num_heads
        q, k, v = (t.reshape(items, t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
        both: Tensor | None = None
        if attn_mask is not None:
            both = _added(attn_mask, q.dtype)
            both = both.reshape(items, heads, *both.shape[1:]) if both.dim() == 3 else both
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q.dtype).reshape(items, 1, 1, -1)
            both = padding if both is None else both + padding
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3))
        weights = torch.softmax(scores if both is None else scores + both, -1)
        y = self.out_proj(torch.matmul(weights, v).transpose(1, 2).reshape(items, targets, -1))
        y = y[0] if alone else y if self.batch_first else y.transpose(0, 1)
        if not need_weights:
            return y, None
        shown = weights.mean(1) if average_attn_weights else weights
        return y, shown[0] if alone else shown

    def _projected(self, q: Tensor, k: Tensor, v: Tensor, same: bool) -> "tuple[Tensor, Tensor, Tensor]":
        """Queries, keys and values, each by its part of the input projection."""
        width, bias = self.embed_dim, self.in_proj_bias
        biases = [None] * 3 if bias is None else [bias[at * width : (at + 1) * width] for at in range(3)]
        if not self._of_one_width:
            thin, names = cast(Any, self.thin), ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            return tuple(  # pyright: ignore[reportReturnType] -- three
                thin[name].product(x, bias=b) if name in thin else F.linear(x, getattr(self, name), b)
                for x, name, b in zip((q, k, v), names, biases, strict=True)
            )
        named = cast(Any, self.thin)
        thin = named["in_proj_weight"] if "in_proj_weight" in named else None  # noqa: SIM401 -- a ModuleDict has no get

        def project(x: Tensor) -> Tensor:
            return F.linear(x, self.in_proj_weight, bias) if thin is None else thin.product(x, bias=bias)

        if same:
            y = project(q)
            return y[..., :width], y[..., width : 2 * width], y[..., 2 * width :]
        return tuple(  # pyright: ignore[reportReturnType] -- three
            project(x)[..., at * width : (at + 1) * width] for at, x in enumerate((q, k, v))
        )


def _added(mask: Tensor, kind: torch.dtype) -> Tensor:
    """A mask as what is added to the scores: minus infinity where it says to leave a key out."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=kind).masked_fill(mask, float("-inf"))
