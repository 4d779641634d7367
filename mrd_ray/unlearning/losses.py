"""Losses of the unlearning methods, one value per sample, from log p(sample) = sum_t P_t over its scored tokens.

GA and GradDiff (Maini et al., arXiv 2401.06121), PO (ibid.), NPO (Zhang et al., arXiv 2404.05868). Likelihoods are
means over tokens, so that long samples weigh as much as short ones; NPO compares whole sequences, as its paper does.
"""

import torch
from torch.nn.functional import cross_entropy, logsigmoid

from mrd_ray.mrd.likelihood import MicroBatch


def log_probs(logits: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """log p of each sample's scored tokens, differentiable: [B, T, V] -> float64 [B].

    Tokens in float32, their sum in float64.
    """
    targets = batch.token_ids[:, 1:].masked_fill(~batch.scored, -100)
    nll = cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return -nll.double().sum(1)


def ascent(log_prob: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """Gradient ascent on the negative log-likelihood: mean_t P_t, to be minimised. [B] -> [B]."""
    return log_prob / num_tokens


def descent(log_prob: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """Ordinary training: -mean_t P_t. [B] -> [B]."""
    return -log_prob / num_tokens


def npo(log_prob: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """Negative preference: -(2 / beta) log sigmoid(-beta (log p - log p_ref)). [B], [B] -> [B].

    For beta -> 0 its gradient tends to gradient ascent on whole sequences. It vanishes as log p falls.
    """
    return -2 / beta * logsigmoid(-beta * (log_prob - reference))
