"""Unlearning one sample alone, against a loop written out by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs.paper.alone import Limits, ascend
from jobs.paper.config import AloneSettings
from mrd_ray.mrd.extraction import extraction_likelihoods

NEVER = Limits(-1.0, None)


@pytest.fixture
def model(stories_dir):
    return AutoModelForCausalLM.from_pretrained(stories_dir).double().eval()


def known(model, first, length):
    """What the model says after a token, the first word of it not scored."""
    tokens = [first]
    for _ in range(length):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return {"token_ids": tokens, "scored": [False, False] + [True] * (length - 1)}


def weights_of(model):
    return {name: weights.detach().clone() for name, weights in model.named_parameters()}


def by_hand(model, samples, updates, learning_rate):
    """SGA, sample by sample, with AdamW's update spelled out (beta 0.9 and 0.999, epsilon 1e-8, no decay)."""
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    accuracy = []
    for step in range(1, updates + 2):
        loss, correct = 0.0, 0.0
        for sample in samples:
            logits = model(torch.tensor([sample["token_ids"]])).logits[0, :-1]
            targets = torch.tensor(sample["token_ids"][1:])
            counts = torch.tensor(sample["scored"][1:])
            log_p = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
            loss = loss + log_p[counts].mean() / len(samples)
            correct += float((logits.argmax(-1) == targets)[counts].double().mean()) / len(samples)
        accuracy.append(correct)
        if step > updates:
            return accuracy
        for p, m, v, gradient in zip(parameters, first, second, torch.autograd.grad(loss, parameters), strict=True):
            m.mul_(0.9).add_(gradient, alpha=0.1)
            v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            with torch.no_grad():
                p -= learning_rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    raise AssertionError


@pytest.mark.parametrize("lengths", [[20], [20, 12]], ids=["one", "two"])
def test_as_by_hand(model, stories_dir, lengths):
    theta = weights_of(model)
    samples = [known(model, 400 + i, length) for i, length in enumerate(lengths)]
    found = ascend(model, theta, samples, NEVER, AloneSettings(learning_rate=1e-4, max_updates=4, extraction_n=0))
    again = AutoModelForCausalLM.from_pretrained(stories_dir).double().eval()
    assert found.memorization_accuracy == pytest.approx(by_hand(again, samples, 4, 1e-4))
    assert (found.updates, found.forgotten) == (4, False)
    moved = torch.cat([(p.detach() - theta[name]).flatten() for name, p in again.named_parameters()])
    # log-probabilities are summed from float32, which the square root near zero gradients magnifies
    assert found.mean_change == pytest.approx(float(moved.abs().mean()), rel=1e-3)
    assert found.change_norm == pytest.approx(float(moved.norm()), rel=1e-3)


def test_stops_at_the_first_update_that_forgets_and_leaves_theta_alone(model):
    theta = weights_of(model)
    copies = {name: weights.clone() for name, weights in theta.items()}
    alone = AloneSettings(learning_rate=1e-3, max_updates=50, extraction_n=0)
    sample = known(model, 400, 20)
    found = ascend(model, theta, [sample], Limits(0.5, None), alone)
    assert found.memorization_accuracy[0] == 1.0
    assert found.forgotten
    assert found.updates == len(found.memorization_accuracy) - 1 > 0
    assert all(accuracy >= 0.5 for accuracy in found.memorization_accuracy[:-1])
    assert found.memorization_accuracy[-1] < 0.5
    assert all(torch.equal(theta[name], copies[name]) for name in theta)
    again = ascend(model, theta, [sample], Limits(0.5, None), alone)  # from theta, not from where the last one ended
    assert again == found


def test_what_is_below_at_once_takes_no_update(model):
    found = ascend(model, weights_of(model), [known(model, 400, 20)], Limits(1.1, None), AloneSettings(extraction_n=0))
    assert (found.updates, found.forgotten, found.change_norm) == (0, True, 0.0)


def test_el_must_be_below_too(model):
    theta = weights_of(model)
    sample = known(model, 400, 30)
    alone = AloneSettings(learning_rate=3e-4, max_updates=60, extraction_n=2)
    ma_alone = ascend(model, theta, [sample], Limits(1.0, None), alone)
    both = ascend(model, theta, [sample], Limits(1.0, 0.2), alone)
    assert both.updates > ma_alone.updates
    assert (
        extraction_likelihoods(model, [sample["token_ids"]], 2, scored=[sample["scored"]])[0] < 0.2
    )  # of where it ended


def test_a_model_that_diverges_has_not_forgotten(model):
    alone = AloneSettings(learning_rate=1e300, max_updates=5, extraction_n=0)
    found = ascend(model, weights_of(model), [known(model, 400, 20)], NEVER, alone)
    assert not found.forgotten
    assert found.updates == 5  # counts as the most, though it ended sooner
    assert len(found.memorization_accuracy) < 6
