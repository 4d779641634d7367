"""Token likelihoods in a form that keeps full relative precision on memorised tokens.

For target x_t with logits l:  a_t = logsumexp_{j != x_t}(l_j) - l_{x_t},  P_t = log p(x_t | x_<t) = -softplus(a_t).
A memorised token has P_t = 0 up to float32 rounding, but its a_t << 0 is still precise, and log(-P_t) -> a_t.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

# Elements of logits held at once. The output layer runs on as many tokens as fit.
LOGITS = 1 << 25
# On a CPU: vocabulary tokens, and logits, processed at once. They fit in the cache together with the float64 copy that
# summing makes.
_VOCABULARY, _CACHED = 1 << 11, 1 << 19


@dataclass(frozen=True)
class MicroBatch:
    """Samples that share one forward, on the device of the model's inputs.

    token_ids: int64 [B, T], padded on the right with any ids: a causal model's real positions never see the padding.
    scored: bool [B, T - 1]; [i, t] says whether target token_ids[i, t + 1] counts. Padding never counts.
    """

    token_ids: torch.Tensor
    scored: torch.Tensor

    @classmethod
    def collate(cls, token_ids: list[list[int]], scored: list[list[bool]], device: torch.device) -> "MicroBatch":
        """Pad samples of different lengths; scored[i][t] belongs to token t, so scored[i][0] is never used."""
        width = max(map(len, token_ids))
        tokens = torch.zeros(len(token_ids), width, dtype=torch.int64)
        mask = torch.zeros(len(token_ids), width, dtype=torch.bool)
        for row, (ids, flags) in enumerate(zip(token_ids, scored, strict=True)):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = torch.tensor(flags)
        return cls(tokens.to(device), mask[:, 1:].contiguous().to(device))


class TokenMeasures:
    """More measures of a batch's samples, computed from the logits at theta while these are in memory.

    entropy: of the predicted distribution, in nats. correct: whether the target is the likeliest token. Both are
    float64 [B, T - 1].
    """

    def __init__(self, batch: MicroBatch) -> None:
        self._scored = batch.scored
        self.entropy = torch.zeros(batch.scored.shape, dtype=torch.float64, device=batch.scored.device)
        self.correct = torch.zeros_like(self.entropy)

    def observe(self, where: Any, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Record logits [..., V] and targets [...], on the same device, for index `where` of [B, T - 1]."""
        log_probs = logits.detach().log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        self.entropy[where] = -(log_probs.exp() * log_probs).sum(-1, dtype=torch.float64).to(self.entropy.device)
        self.correct[where] = (logits.argmax(-1) == targets).double().to(self.entropy.device)

    def means(self) -> dict[str, list[float]]:
        """Mean over each sample's scored tokens, keyed by the name of the measure."""
        means = {"entropy": self.entropy, "memorization_accuracy": self.correct}
        count = self._scored.sum(1)
        return {name: (torch.where(self._scored, x, 0.0).sum(1) / count).tolist() for name, x in means.items()}


def output_layer_is_plain(model: PreTrainedModel) -> bool:
    """Whether logits = output_embeddings(last hidden state), with no cap, scale or shift afterwards.

    Tested on the model itself with a few tokens, because no attribute says so for every architecture.
    """
    head = model.get_output_embeddings()
    if head is None:
        return False
    probe = torch.arange(1, 6, device=model.device)[None]
    with torch.no_grad():
        hidden = getattr(model.base_model(probe, use_cache=False), "last_hidden_state", None)
        logits = model(probe, use_cache=False).logits.double()
        return hidden is not None and torch.allclose(
            head(hidden).double().to(logits.device), logits, rtol=1e-5, atol=1e-5
        )


class Likelihood:
    """Token likelihoods under the weights that the model holds at the time of the call.

    Args:
        model: a transformers causal language model in eval mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # If logits are capped or scaled after the output layer, the model's own code must compute them, all at once.
        self._by_chunks = output_layer_is_plain(model)

    @torch.no_grad()
    def margins(self, batch: MicroBatch, measures: TokenMeasures | None = None) -> torch.Tensor:
        """a_t of every scored target: float64 [B, T - 1], zero where not scored. `measures` receives the logits."""
        a = torch.zeros(batch.scored.shape, dtype=torch.float64, device=batch.scored.device)
        # No attention mask: with padding on the right the causal mask is exact by itself, and takes the fast path.
        if self._by_chunks:
            hidden = self.model.base_model(batch.token_ids, use_cache=False).last_hidden_state[:, :-1]
            hidden = hidden[batch.scored.to(hidden.device)]
            head = self.model.get_output_embeddings()
            rows, device = max(1, LOGITS // head.out_features), head.weight.device
            chunks: Iterator[Iterable[torch.Tensor]] = (self._output_layer(h) for h in hidden.split(rows))
        else:
            logits = self.model(batch.token_ids, use_cache=False).logits[:, :-1][batch.scored]
            rows, device, chunks = max(1, len(logits)), logits.device, iter([[logits]])
        scored = torch.nonzero(batch.scored)
        for positions, slices in zip(scored.split(rows), chunks, strict=True):
            where = tuple(positions.T)
            targets = batch.token_ids[:, 1:][where].to(device)
            if measures is not None:
                slices = list(slices)
                measures.observe(where, slices[0] if len(slices) == 1 else torch.cat(slices, -1), targets)
            found = Margins(targets)
            for logits in slices:
                found.add(_wide(logits))
            a[where] = found.a.to(a.device)
        return a

    def _output_layer(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits of [n, hidden], one slice of the vocabulary after another."""
        head = self.model.get_output_embeddings()
        bare = type(head) is torch.nn.Linear and "forward" not in vars(head)
        bare = bare and not (head._forward_hooks or head._forward_pre_hooks)
        if hidden.is_cuda or not bare:  # a hook may have to fetch the weights first
            yield head(hidden)
            return
        biases = itertools.repeat(None) if head.bias is None else head.bias.split(_VOCABULARY)
        for weight, bias in zip(head.weight.split(_VOCABULARY), biases, strict=False):
            yield torch.nn.functional.linear(hidden, weight, bias)

    def log_neg_log_probs(self, batch: MicroBatch, measures: TokenMeasures | None = None) -> torch.Tensor:
        """log(-P_t) of every scored target: float64 [B, T - 1], meaningless where not scored."""
        return log_neg_log_prob(self.margins(batch, measures))


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """The logits, converted to float32 if they are narrower."""
    return logits if logits.dtype == torch.float64 else logits.float()


class Margins:
    """a_t of some targets, from logits that arrive one slice of the vocabulary after another.

    Args:
        targets: int64 [n].
    """

    def __init__(self, targets: torch.Tensor) -> None:
        self._targets = targets[:, None]  # relative to the start of the next slice
        self._highest = self._of_target = torch.tensor(-torch.inf, device=targets.device)
        self.total = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)

    def add(self, logits: torch.Tensor) -> None:
        """Process the next slice, [n, V'], and overwrite its memory with e^{l_j - max} for j != x, and 0 for x.

        max is the maximum over all j != x so far. `total` becomes sum_{j != x} e^{l_j - max}.
        """
        width = logits.shape[1]
        here, index = (self._targets >= 0) & (self._targets < width), self._targets.clamp(0, width - 1)
        there = logits.gather(1, index)
        self._of_target = torch.where(here, there, self._of_target)
        logits.scatter_(1, index, torch.where(here, -torch.inf, there))
        lowest = torch.finfo(logits.dtype).min  # used for -inf, because -inf minus -inf is nan
        highest = torch.maximum(logits.amax(1, keepdim=True), self._highest).clamp(min=lowest)
        self.total *= (self._highest - highest)[:, 0].double().exp()
        # exponentials are computed in the model's precision, their sum and everything after it in float64
        rows = len(logits) if logits.is_cuda else max(1, _CACHED // width)
        sums = [
            piece.sub_(high).exp_().sum(1, dtype=torch.float64)
            for piece, high in zip(logits.split(rows), highest.split(rows), strict=True)
        ]
        self.total += torch.cat(sums)
        self._highest = highest
        self._targets = self._targets - width

    @property
    def a(self) -> torch.Tensor:
        """a_t from all slices: float64 [n]."""
        return self._highest[:, 0].double() + self.total.log() - self._of_target[:, 0].double()


def log_neg_log_prob(a: torch.Tensor) -> torch.Tensor:
    """log(-P_t) = log softplus(a_t), elementwise, float64; exact to rounding for any a_t."""
    # below -30, log(log1p(e^a)) = a - e^a / 2 + O(e^2a), and e^2a is smaller than float64's rounding of a
    small = a.clamp(max=-30.0)
    softplus = -torch.nn.functional.logsigmoid(-a.clamp(min=-30.0))  # F.softplus drops e^-a above a threshold
    return torch.where(a < -30.0, small - small.exp() / 2, softplus.log())


def sum_log_probs(log_neg_log_probs: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Sum of P_t over the scored targets of each sample: [B, T - 1] -> float64 [B]."""
    return -torch.where(scored, log_neg_log_probs.exp(), 0.0).sum(1)


class LogNegLogProb(torch.autograd.Function):
    """log(-P_t) from logits, differentiable once: [..., n, V], [..., n] -> float64 [..., n].

    The gradient at logit j is c e^{l_j} / sum_{i != x} e^{l_i}, and -c at the target x, with
    c = sigmoid(a) / softplus(a) -> 1 for a << 0. Forward and backward together need only one buffer of logits.

    Args of apply:
        logits, targets: as above.
        overwrite: whether the logits' own memory may be that buffer; then nothing else may use them.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, overwrite: bool) -> torch.Tensor:  # noqa: D102
        wide = _wide(logits)
        buffer = (wide.clone() if wide is logits and not overwrite else wide.detach()).flatten(0, -2)
        found = Margins(targets.flatten())
        found.add(buffer)
        ctx.buffer, ctx.dtype = buffer.view_as(wide), logits.dtype
        total, a = (values.view_as(targets) for values in (found.total, found.a))
        ctx.save_for_backward(targets, total, a)
        return log_neg_log_prob(a)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # noqa: D102
        targets, total, a = ctx.saved_tensors
        buffer, ctx.buffer = ctx.buffer, None
        slope = gradient * (torch.nn.functional.logsigmoid(a) - log_neg_log_prob(a)).exp()
        buffer.mul_((slope / total).to(buffer.dtype)[..., None])
        buffer.scatter_(-1, targets[..., None], -slope.to(buffer.dtype)[..., None])
        return buffer.to(ctx.dtype), None, None
