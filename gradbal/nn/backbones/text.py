"""Encoders of transformers as feature extractors."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn

from gradbal.nn.backbones._extras import needed

__all__ = ["TextEncoder"]

Pooling = Literal["mean", "first"]


class TextEncoder(nn.Module):
    """A transformers encoder, and one vector a text.

    "mean" is over the tokens that `attention_mask` has; "first" takes the first token's vector, as
    BERT's classifiers do. The model's own pooling layer, where it has one, is left out, since no
    output would depend on it.

    Shapes: token ids ``[N, L]``, or a mapping with ``input_ids [N, L]``, ``attention_mask [N, L]``
    and whatever else the model takes, as tokenizers give it, to ``[N, hidden_size]``.

    Args:
        model: a configuration of transformers, for a model that is made anew, or a model, such as
            ``AutoModel.from_pretrained(folder)``. Nothing is downloaded.
        pooling: "mean" or "first".

    Raises:
        ModuleNotFoundError: transformers is not installed.
        TypeError: neither a configuration nor a model.
        ValueError: another pooling.

    Example:
        >>> import torch
        >>> from transformers import BertConfig
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...     intermediate_size=16,
        ... )
        >>> TextEncoder(config)(torch.tensor([[2, 7, 3]])).shape
        torch.Size([1, 8])
    """

    def __init__(self, model: Any, pooling: Pooling = "mean") -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(
                f"`pooling` must be one of {list(get_args(Pooling))}, found {pooling!r}"
            )
        transformers = needed("transformers", "text", "TextEncoder")
        if not isinstance(model, nn.Module):
            if not isinstance(model, transformers.PretrainedConfig):
                raise TypeError(
                    "`model` must be a configuration or a model of transformers, found "
                    f"{type(model).__name__}"
                )
            model = transformers.AutoModel.from_config(model)
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        self.model = model
        self.pooling = pooling

    def forward(self, x: Tensor | Mapping[str, Any]) -> Tensor:
        """One vector a text, ``[N, hidden_size]``."""
        inputs = dict(x) if isinstance(x, Mapping) else {"input_ids": x}
        hidden: Tensor = self.model(**inputs).last_hidden_state
        if self.pooling == "first":
            return hidden[:, 0]
        mask = inputs.get("attention_mask")
        if mask is None:
            return hidden.mean(1)
        weight = mask.to(hidden.dtype)[..., None]
        return (hidden * weight).sum(1) / weight.sum(1)
