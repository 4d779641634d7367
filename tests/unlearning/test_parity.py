"""The same trajectory whatever shards the model, however many workers there are: that of plain torch."""

import math

import gang
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mrd_ray.unlearning.sampling import ForgetStream, ShuffledStream, choices

METHODS = ["ga", "graddiff", "po", "npo"]
STAGES = [0, 1, 2, 3]
STEPS = 20


def config(files, run, method, stage=0, **more):
    model, forget, retain, refusals = files
    settings = {
        "unlearning__method": method, "unlearning__steps": STEPS, "unlearning__micro_batch_size": 2,
        "unlearning__weighting": "uniform", "deepspeed__zero_stage": stage, "stopping__forgotten": "never",
        "stopping__max_retain_loss_ratio": None, "stopping__evaluate_every": 1000, "unlearning__learning_rate": 3e-4,
        "unlearning__refusals": str(refusals) if method == "po" else None,
    }  # fmt: skip
    return gang.config(model, forget, retain, run, **(settings | more))


def plain(config) -> list[tuple[float, float, float]]:
    """Line by line: float32 AdamW, one sample at a time. Losses, and the gradient's norm before clipping."""
    sets, unlearning = gang.sets_of(config), config.unlearning
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=unlearning.learning_rate, weight_decay=0.01)

    def log_prob(row):
        tokens = torch.tensor([row["token_ids"]])
        p = model(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
        scored = torch.tensor(row["scored"][1:])
        return p[scored].sum(), int(scored.sum())

    forget, retain = sets.forget.to_pylist(), sets.retain.to_pylist()
    reference = [log_prob(row)[0].item() for row in forget]
    stream = ForgetStream(np.full(len(forget), 1 / len(forget)), unlearning.seed)
    losses = []
    batch = unlearning.batch_size
    for step in range(config.unlearning.steps):
        drawn = stream.at(step, batch).tolist()
        forget_loss = retain_loss = torch.zeros(())
        picks = choices(unlearning.seed, step, batch, 3).tolist()
        for i, pick in zip(drawn, picks, strict=True):
            if unlearning.method == "po":
                p, n = log_prob(sets.refusals.slice(i * 3 + pick, 1).to_pylist()[0])
                loss = -p / n
            else:
                p, n = log_prob(forget[i])
                loss = p / n
            if unlearning.method == "npo":
                loss = -2 / 0.1 * torch.log(torch.sigmoid(-0.1 * (p - reference[i])))
            forget_loss = forget_loss + loss / batch
        if unlearning.method != "ga":
            for i in ShuffledStream(len(retain), unlearning.seed).at(step * batch, batch).tolist():
                p, n = log_prob(retain[i])
                retain_loss = retain_loss - p / n / batch
        (forget_loss + retain_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), unlearning.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append((forget_loss.item(), retain_loss.item(), norm.item()))
    return losses


def trajectories(ranks, configs):
    found = []
    for one in configs:
        _, loop, _ = gang.train(one, ranks, keep=False)
        steps = [line for line in loop.state.log if line["event"] == "step"]
        found.append(
            [(line["forget_loss"], line["retain_loss"] or 0.0, line["grad_norm"] or math.nan) for line in steps]
        )
    return found


def check(trajectory, expected, name):
    assert len(trajectory) == len(expected)
    found, expected = np.array(trajectory), np.array(expected)
    np.testing.assert_allclose(found[:, :2], expected[:, :2], rtol=1e-5, err_msg=name)
    if not np.isnan(found[0, 2]):  # stage 0 in float32 knows no norm
        np.testing.assert_allclose(found[:, 2], expected[:, 2], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_method_and_stage_follows_plain_torch(files, tmp_path, size):
    cases = [(method, stage, {}) for method in METHODS for stage in STAGES]
    cases += [("npo", stage, {"deepspeed__offload_optimizer": "cpu"}) for stage in (1, 3)]
    cases += [("npo", 3, {"deepspeed__offload_parameters": "cpu"})]
    configs = [config(files, tmp_path, method, stage, **more) for method, stage, more in cases]
    found = gang.on_ranks(size, trajectories, configs)
    expected = {method: plain(config(files, tmp_path, method)) for method in METHODS}
    for rank in found:
        for (method, *shards), trajectory in zip(cases, rank, strict=True):
            check(trajectory, expected[method], f"{method}, {shards}")
    moved = np.array(expected["npo"])
    assert abs(moved[-1, 0] - moved[0, 0]) > 0.1 * abs(moved[0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_uneven_last_micro_batch_weighs_no_more(files, tmp_path, clip):
    """Two ranks of three samples each, in passes of two and of one; the norm shows the gradient's scale."""
    more = {"unlearning__batch_size": 6, "unlearning__steps": 4, "unlearning__max_grad_norm": clip}
    configs = [config(files, tmp_path, "graddiff", stage, **more) for stage in (1, 2, 3)]
    expected = plain(configs[0])
    for rank in gang.on_ranks(2, trajectories, configs):
        for one, trajectory in zip(configs, rank, strict=True):
            assert not math.isnan(trajectory[0][2])
            check(trajectory, expected, f"stage {one.deepspeed.zero_stage}")


@pytest.mark.slow
def test_bfloat16_trains_float32_masters_alike_at_every_stage(files, tmp_path):
    """The first updates show a wrong step count in Adam's bias correction, or masters that are not in float32."""
    settings = {"model__dtype": "bfloat16", "unlearning__steps": 4, "unlearning__learning_rate": 1e-3}
    configs = [config(files, tmp_path, "ga", stage, **settings) for stage in STAGES]
    for rank in gang.on_ranks(2, trajectories, configs):
        losses = np.array([[step[0] for step in trajectory] for trajectory in rank])
        np.testing.assert_allclose(losses, np.broadcast_to(losses[2], losses.shape), rtol=1e-4)


def stopped(ranks, one):
    reason, loop, _ = gang.train(one, ranks, keep=False)
    return reason, loop.state.log


def test_a_default_run_stops_before_it_wrecks_the_model(files, tmp_path):
    """Too large a learning rate: twice the perplexity ends it, though all is forgotten by then."""
    model, forget, retain, _ = files
    one = gang.config(model, forget, retain, tmp_path, unlearning__learning_rate=3e-2, unlearning__steps=6,
                      stopping__evaluate_every=1)  # fmt: skip
    for reason, log in gang.on_ranks(2, stopped, one):
        before, *_, after = (math.log(line["retain_perplexity"]) for line in log if line["event"] == "evaluation")
        assert after > before + math.log(2)
        assert reason.startswith("utility floor")
