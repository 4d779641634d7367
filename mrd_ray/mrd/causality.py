"""Whether a model's predictions depend only on earlier tokens, as every likelihood here assumes."""

import torch
from transformers import PreTrainedModel

_TOKENS = [1, 2, 3, 4, 2, 3, 5, 1]  # the probe; every vocabulary has these ids
_WITH_PADDING = 13  # length of the padded probe, in tokens
_TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}  # relative to the logits' spread; other types: 1e-3


def dependence(model: PreTrainedModel) -> str | None:
    """What the logits of a token wrongly depend on: "later tokens", "padding", or None.

    Measured on a few tokens: once with a different last token, once padded on the right in a batch of two samples.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _WITH_PADDING
    context = context if context > 0 else _WITH_PADDING  # XLNet says -1 for no limit
    tokens = torch.tensor([_TOKENS[:context]], device=model.device)
    count = tokens.shape[1]
    other = tokens.clone()
    other[0, -1] += 1
    padded = torch.ones(2, min(context, _WITH_PADDING), dtype=torch.int64, device=model.device)
    padded[0, :count] = tokens[0]
    alone = _logits(model, tokens)
    if not alone.isfinite().all():
        return None  # each sample's error will report it
    tolerance = _TOLERANCE.get(model.dtype, 1e-3) * alone.std()
    for what, logits in (("later tokens", _logits(model, other)), ("padding", _logits(model, padded))):
        seen = count - (what == "later tokens")
        if not (logits[:seen] - alone[:seen]).abs().max() <= tolerance:
            return what
    return None


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the first sample, [T, V], computed without a mask, as the likelihoods do."""
    return model(tokens, use_cache=False).logits[0].double()
