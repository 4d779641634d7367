"""Per-sample squared gradient norms, with one rule per type of layer.

A rule takes the layer, its input A and the gradient G at its output, both by sample. For each of the layer's own
parameters, it returns the squared norm of every sample's gradient: float64 [B].

(Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799; Li et al., "Large language models can be
strong differentially private learners", arXiv 2110.05679, for the Gram product.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Embedding, LayerNorm, Linear, Module
from transformers.pytorch_utils import Conv1D

Squares = dict[str, torch.Tensor]
_CHOICE = {"e_score_correction_bias", "expert_bias"}  # added to the experts' scores only to choose between them
# Elements of per-sample gradients that the direct product holds at once.
_DIRECT = 1 << 24


def by_sample(x: torch.Tensor, samples: int, tokens: int) -> torch.Tensor:
    """[B, ..., n] or [B T, n] -> [B, positions, n]. Raises ValueError if rows cannot be assigned to samples."""
    if x.shape[0] == samples:
        return x.reshape(samples, -1, x.shape[-1])
    if x.dim() == 2 and x.shape[0] == samples * tokens:  # some layers flatten their input
        return x.view(samples, tokens, x.shape[-1])
    raise ValueError(f"a layer saw {tuple(x.shape)} for {samples} samples of {tokens} tokens")


class GramCache:
    """Keeps A A^T of the last input: layers that share an input (queries, keys, values) run one after another."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, a: torch.Tensor) -> torch.Tensor:
        """[B, T, n] -> [B, T, T]."""
        # the cached tensor is kept alive, so that no other tensor can have its address
        if self._last is None or self._last[0].data_ptr() != a.data_ptr() or self._last[0].shape != a.shape:
            self._last = (a, gram_of(a))
        return self._last[1]


def gram_of(a: torch.Tensor) -> torch.Tensor:
    """[B, T, n] -> [B, T, T]."""
    if a.dtype not in (torch.float32, torch.float64):
        a = a.float()  # products of bf16 are exact in float32; sums in bf16 are not exact
    return a @ a.mT


def square_sum(x: torch.Tensor) -> torch.Tensor:
    """[B, ...] -> float64 [B]."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64).square()


def square_of_product(a: torch.Tensor, g: torch.Tensor, gram: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """|G^T A|_F^2 = sum_{t,s} (A A^T)_{ts} (G G^T)_{ts}, by whichever side costs less. `gram` computes A A^T."""
    tokens, width = a.shape[1], a.shape[2]
    if tokens * (width + g.shape[2]) <= width * g.shape[2]:
        return (gram(a) * gram_of(g)).sum((1, 2), dtype=torch.float64)
    samples = max(1, _DIRECT // (width * g.shape[2]))
    products = (b.mT @ c for b, c in zip(g.split(samples), a.split(samples), strict=True))
    return torch.cat([square_sum(product) for product in products])


def linear(layer: Module, a: torch.Tensor, g: torch.Tensor, grams: GramCache) -> Squares:
    """The weight's gradient is G^T A, and the bias's gradient is sum_t G_t.

    GPT-2's Conv1D is a linear layer that stores its weight transposed, which does not change the norm.
    """
    found = {"weight": square_of_product(a, g, grams)}
    if getattr(layer, "bias", None) is not None:
        found["bias"] = square_sum(g.sum(1, dtype=torch.float64))
    return found


def embedding(layer: Module, ids: torch.Tensor, g: torch.Tensor, grams: GramCache) -> Squares:
    """The gradient of row v is the sum of G_t over x_t = v, so |.|^2 is the Gram sum over pairs of equal tokens.

    The padding row counts where it is looked up, because noise moves it like any other row (torch's own backward skips
    it).
    """
    same = ids == ids.mT  # ids: [B, T, 1]
    return {"weight": (gram_of(g) * same).sum((1, 2), dtype=torch.float64) * _scale(layer) ** 2}


def embedding_overlap(layer: Module, g: torch.Tensor, hidden: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """<g_embed, g_head> of a weight that an embedding and an output layer share: float64 [B].

    = sum_{s,t} (gradient at logit x_t of position s) (h_s . G_t), where h are the output layer's inputs [B, S, n], G
    the gradients at the embedding's output [B, T, n], and own[b, s, t] is the first factor.
    """
    return (own * (hidden @ g.mT)).sum((1, 2), dtype=torch.float64) * _scale(layer)


def _scale(layer: Module) -> float:
    """The factor by which an embedding multiplies its rows (Gemma 3 and others)."""
    scale = getattr(layer, "embed_scale", None)
    weight: Any = layer.weight
    return 1.0 if scale is None else float(torch.as_tensor(scale).to(weight.dtype))


def layer_norm(layer: Module, a: torch.Tensor, g: torch.Tensor, grams: GramCache) -> Squares:
    """y = w x + b, where x is the standardised input: the gradients are sum_t G_t x_t and sum_t G_t."""
    assert isinstance(layer, LayerNorm)
    x = torch.nn.functional.layer_norm(a, layer.normalized_shape, eps=layer.eps)
    found = {"weight": square_sum((g * x).sum(1, dtype=torch.float64))}
    if layer.bias is not None:
        found["bias"] = square_sum(g.sum(1, dtype=torch.float64))
    return found


def rms_norm(layer: Module, a: torch.Tensor, g: torch.Tensor, grams: GramCache) -> Squares:
    """y = w x, or (1 + w) x in Gemma, with x = input / rms: the gradient is sum_t G_t x_t."""
    eps: Any = layer.variance_epsilon if hasattr(layer, "variance_epsilon") else layer.eps
    x = torch.nn.functional.rms_norm(a, a.shape[-1:], eps=eps)
    return {"weight": square_sum((g * x).sum(1, dtype=torch.float64))}


def is_router(layer: Module) -> bool:
    """Whether the layer computes the experts' logits with F.linear and its weight, and returns more than the logits."""
    own = dict(layer.named_parameters(recurse=False))
    matrix = own.get("weight")
    return (
        type(layer).__name__.endswith(("Router", "Gate"))
        and matrix is not None
        and matrix.dim() == 2
        and own.keys() <= {"weight", "bias", *_CHOICE}
    )


def choice(layer: Module, a: torch.Tensor, g: torch.Tensor, grams: GramCache) -> Squares:
    """Parameters that only decide between experts have no gradient."""
    return {}


Rule = Callable[[Module, torch.Tensor, torch.Tensor, GramCache], Squares]


def rule_of(layer: Module) -> Rule | None:
    """The rule for this type of layer, or None."""
    if isinstance(layer, (Linear, Conv1D)) or is_router(layer):
        return linear
    if isinstance(layer, Embedding):
        return embedding
    if isinstance(layer, LayerNorm):
        return layer_norm
    own = {name for name, _ in layer.named_parameters(recurse=False)}
    # every model in transformers defines its own RMSNorm class
    if type(layer).__name__.endswith("RMSNorm") and own == {"weight"}:
        return rms_norm
    if own and own <= _CHOICE:
        return choice
    return None
