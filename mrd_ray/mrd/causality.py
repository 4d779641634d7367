"""Whether a model's predictions depend on nothing but the tokens before, as every likelihood here takes for granted."""

import torch
from transformers import PreTrainedModel

_TOKENS = [1, 2, 3, 4, 2, 3, 5, 1]  # of the probe; every vocabulary has these
_WITH_PADDING = 13  # tokens in all
_TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}  # of the logits' spread; others: 1e-3


def dependence(model: PreTrainedModel) -> str | None:
    """What the logits of a token depend on that they must not: "later tokens", "padding", or None.

    Measured on a few tokens: with another last one, and with padding on the right beside another sample.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _WITH_PADDING
    context = context if context > 0 else _WITH_PADDING  # XLNet has -1, for none
    tokens = torch.tensor([_TOKENS[:context]], device=model.device)
    count = tokens.shape[1]
    other = tokens.clone()
    other[0, -1] += 1
    padded = torch.ones(2, min(context, _WITH_PADDING), dtype=torch.int64, device=model.device)
    padded[0, :count] = tokens[0]
    alone = _logits(model, tokens)
    if not alone.isfinite().all():
        return None  # each sample's error will say so
    tolerance = _TOLERANCE.get(model.dtype, 1e-3) * alone.std()
    for what, logits in (("later tokens", _logits(model, other)), ("padding", _logits(model, padded))):
        seen = count - (what == "later tokens")
        if not (logits[:seen] - alone[:seen]).abs().max() <= tolerance:
            return what
    return None


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Of the first sample, [T, V], as the likelihoods ask for them: without a mask."""
    return model(tokens, use_cache=False).logits[0].double()
