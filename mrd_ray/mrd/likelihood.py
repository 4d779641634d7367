"""Token likelihoods in a form that keeps full relative precision on memorised tokens.

For target x_t with logits l:  a_t = logsumexp_{j != x_t}(l_j) - l_{x_t},  P_t = log p(x_t | x_<t) = -softplus(a_t).
A memorised token has P_t = 0 to float32 rounding but a perfectly good a_t << 0, and log(-P_t) -> a_t.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

# Elements of logits held at once. The output layer is applied to as many tokens as fit.
_LOGITS = 1 << 25


@dataclass(frozen=True)
class MicroBatch:
    """Samples that share one forward.

    token_ids: int64 [B, T], padded on the right with anything: a causal model's real positions never see it.
    scored: bool [B, T - 1]; [i, t] says whether target token_ids[i, t + 1] counts. Padding never does.
    """

    token_ids: torch.Tensor
    scored: torch.Tensor

    @classmethod
    def collate(cls, token_ids: list[list[int]], scored: list[list[bool]], device: torch.device) -> "MicroBatch":
        """Pad ragged samples; scored[i][t] belongs to token t, so that scored[i][0] is never used."""
        width = max(map(len, token_ids))
        tokens = torch.zeros(len(token_ids), width, dtype=torch.int64)
        mask = torch.zeros(len(token_ids), width, dtype=torch.bool)
        for row, (ids, flags) in enumerate(zip(token_ids, scored, strict=True)):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = torch.tensor(flags)
        return cls(tokens.to(device), mask[:, 1:].contiguous().to(device))

    def halves(self) -> tuple["MicroBatch", "MicroBatch"]:
        """The first and the second half of the samples."""
        middle = len(self.token_ids) // 2
        return (
            MicroBatch(self.token_ids[:middle], self.scored[:middle]),
            MicroBatch(self.token_ids[middle:], self.scored[middle:]),
        )


def output_layer_is_plain(model: PreTrainedModel) -> bool:
    """Whether logits = output_embeddings(last hidden state), with no cap, scale or shift of them after.

    Asked of the model itself on a few tokens, since no attribute says it for every architecture.
    """
    head = model.get_output_embeddings()
    if head is None:
        return False
    probe = torch.arange(1, 6, device=model.device)[None]
    with torch.no_grad():
        hidden = getattr(model.base_model(probe, use_cache=False), "last_hidden_state", None)
        logits = model(probe, use_cache=False).logits.double()
        return hidden is not None and torch.allclose(head(hidden).double(), logits, rtol=1e-5, atol=1e-5)


class Likelihood:
    """Token likelihoods under the model's present weights, whatever they are.

    Args:
        model: a transformers causal language model in eval mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # If logits are capped or scaled after the output layer, the model's own code must make them, all at once.
        self._by_chunks = output_layer_is_plain(model)

    @torch.no_grad()
    def margins(self, batch: MicroBatch) -> torch.Tensor:
        """a_t of every scored target: float64 [B, T - 1], zero where not scored."""
        a = torch.zeros(batch.scored.shape, dtype=torch.float64, device=batch.scored.device)
        targets = batch.token_ids[:, 1:][batch.scored]
        # No attention mask: with padding on the right the causal mask alone is exact, and takes the fast path.
        if not self._by_chunks:
            logits = self.model(batch.token_ids, use_cache=False).logits[:, :-1][batch.scored]
            a[batch.scored] = _margins_of_logits(logits, targets)
            return a
        hidden = self.model.base_model(batch.token_ids, use_cache=False).last_hidden_state[:, :-1][batch.scored]
        head = self.model.get_output_embeddings()
        rows = max(1, _LOGITS // head.weight.shape[0])
        a[batch.scored] = torch.cat(
            [_margins_of_logits(head(h), x) for h, x in zip(hidden.split(rows), targets.split(rows), strict=True)]
        )
        return a

    def log_neg_log_probs(self, batch: MicroBatch) -> torch.Tensor:
        """log(-P_t) of every scored target: float64 [B, T - 1], of no meaning where not scored.

        A batch that the device's memory does not hold is halved, and so on down to one sample.
        """
        try:
            return log_neg_log_prob(self.margins(batch))
        except torch.OutOfMemoryError:
            if len(batch.token_ids) == 1:
                raise
        torch.cuda.empty_cache()  # outside the handler: the exception holds the failed forward's tensors
        return torch.cat([self.log_neg_log_probs(half) for half in batch.halves()])


def _margins_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[N, V] logits, which it may overwrite, and [N] targets -> float64 [N] a_t."""
    targets = targets[:, None]
    of_target = logits.gather(1, targets)
    others = logits.scatter_(1, targets, -torch.inf)
    highest = others.amax(1, keepdim=True)
    # the exponentials in the model's precision, their sum and everything after in float64
    total = others.sub_(highest).exp_().sum(1, dtype=torch.float64)
    return highest[:, 0].double() + total.log() - of_target[:, 0].double()


def log_neg_log_prob(a: torch.Tensor) -> torch.Tensor:
    """log(-P_t) = log softplus(a_t), elementwise, float64; exact to rounding for any a_t."""
    # below -30, log(log1p(e^a)) = a - e^a / 2 + O(e^2a), and e^2a is under float64's rounding of a
    small = a.clamp(max=-30.0)
    softplus = -torch.nn.functional.logsigmoid(-a.clamp(min=-30.0))  # F.softplus drops e^-a above a threshold
    return torch.where(a < -30.0, small - small.exp() / 2, softplus.log())


def sum_log_probs(log_neg_log_probs: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Sum of P_t over the scored targets of each sample: [B, T - 1] -> float64 [B]."""
    return -torch.where(scored, log_neg_log_probs.exp(), 0.0).sum(1)
