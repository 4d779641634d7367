"""mu = E Delta, second order in sigma, from the curvature of the likelihood (Theorem 3.2 of arXiv 2504.06658).

    E Delta -> -(sigma^2 / 2) sum_t Tr(H_t) / P_t,  with H_t the Hessian of P_t at theta

Hutchinson's estimate of a trace is the mean of v^T H v over random probes v with E v v^T = I. Here v = sign(z), where z
is the noise of a draw: signs have less variance than normals, and none from the diagonal. v^T H_t v is the second
derivative of P_t(theta + eps v) in eps, the product of v with the Hessian-vector product H_t v. Two nested forward-mode
derivatives compute it for every token of a batch at once, and no Hessian-vector product is stored.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from mrd_ray.mrd.first_order import ForwardMode
from mrd_ray.mrd.likelihood import LOGITS, MicroBatch, log_neg_log_prob
from mrd_ray.mrd.noise import standard_normal_like


class TraceEstimator:
    """Probes of mu / sigma^2 for the samples of a batch, at the model's current weights.

    Memory: besides the model, a direction, the moved weights and their derivatives; four copies of theta in total.

    Args:
        model: a transformers causal language model in eval mode.
        selected: the parameters theta, by name; all if None.
    """

    def __init__(self, model: PreTrainedModel, selected: Collection[str] | None = None) -> None:
        self.model = model
        self._theta = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if selected is None or name in selected
        }
        self._direction: dict[str, torch.Tensor] = {}

    def aim(self, noise_key: int) -> None:
        """Use the signs of this key's noise as the direction of the next probes."""
        self._direction = {
            name: standard_normal_like(tensor, noise_key, name).sign_().to(tensor.dtype)
            for name, tensor in self._theta.items()
        }

    def probe(self, batch: MicroBatch) -> torch.Tensor:
        """One probe: float64 [B], with mean mu / sigma^2 = -1/2 sum_t Tr(H_t) / P_t over seeds.

        Raises NotImplementedError if torch cannot differentiate one of the model's functions twice in forward mode, or
        if one has a kink or a jump. Where sigma moves inputs across it, it adds to mu at order sigma^2 or lower, and no
        derivative at theta sees that.
        """
        vocabulary = self.model.config.get_text_config().vocab_size
        samples = max(1, LOGITS // (vocabulary * batch.token_ids.shape[1]))  # limits the memory of logits
        pieces = zip(batch.token_ids.split(samples), batch.scored.split(samples), strict=True)
        return torch.cat([self._probe(MicroBatch(*piece)) for piece in pieces])

    def _probe(self, batch: MicroBatch) -> torch.Tensor:
        targets = batch.token_ids[:, 1:, None]

        def margins(eps: torch.Tensor) -> torch.Tensor:
            moved = {
                name: tensor + eps.to(tensor.device) * self._direction[name] for name, tensor in self._theta.items()
            }
            inputs = {"input_ids": batch.token_ids, "use_cache": False}
            logits = torch.func.functional_call(self.model, moved, kwargs=inputs, tie_weights=True).logits[:, :-1]
            others = logits.scatter(2, targets, -torch.inf).logsumexp(2)
            return others.double() - logits.gather(2, targets)[..., 0].double()

        def slope(eps: torch.Tensor) -> Any:
            return torch.func.jvp(margins, (eps,), (torch.ones_like(eps),))

        zero = torch.zeros((), dtype=self.model.dtype, device=batch.token_ids.device)
        with torch.no_grad(), _TwiceDifferentiable():
            nested: Any = torch.func.jvp(slope, (zero,), (torch.ones_like(zero),))
        (a, first), (_, second) = nested
        # P = -softplus(a):  (d^2 P / d eps^2) / P = c (a'' + (1 - s) a'^2), with s = sigmoid(a), c = s / softplus(a)
        c = (torch.nn.functional.logsigmoid(a) - log_neg_log_prob(a)).exp()
        relative = c * (second + torch.sigmoid(-a) * first.square())
        return torch.where(batch.scored, -0.5 * relative, 0.0).sum(1)


_KINKED = {
    getattr(of, name)
    for of in (torch, torch.Tensor, torch.nn.functional)
    for name in ("relu", "relu_", "relu6", "leaky_relu", "prelu", "threshold", "hardtanh", "hardswish", "hardsigmoid")
    if hasattr(of, name)
}


class _TwiceDifferentiable(ForwardMode):
    """Refuses functions with kinks or jumps, and replaces what torch 2.13 cannot differentiate twice in forward mode.

    torch refuses silu, and returns a wrong second derivative of layer_norm: it treats mean and variance as constants.
    """

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KINKED:
            raise NotImplementedError(f"{func.__name__} has a kink; no second derivative sees what it adds to E Delta")
        if func in (torch.topk, torch.Tensor.topk):
            raise NotImplementedError("topk jumps, for example where experts change, and no derivative sees that")
        if func is torch.nn.functional.silu:
            return args[0] * torch.sigmoid(args[0])
        if func is torch.nn.functional.layer_norm:
            return _layer_norm(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def _layer_norm(
    x: torch.Tensor,
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    dims = list(range(-len(normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
