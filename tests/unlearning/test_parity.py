"""The same trajectory whatever shards the model, however many workers there are: that of plain torch."""

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


def plain(config) -> list[tuple[float, float | None]]:
    """Line by line: float32 AdamW, one sample at a time."""
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
    for step in range(STEPS):
        drawn = stream.at(step, 4).tolist()
        forget_loss = retain_loss = torch.zeros(())
        picks = choices(unlearning.seed, step, 4, 3).tolist()
        for i, pick in zip(drawn, picks, strict=True):
            if unlearning.method == "po":
                p, n = log_prob(sets.refusals.slice(i * 3 + pick, 1).to_pylist()[0])
                loss = -p / n
            else:
                p, n = log_prob(forget[i])
                loss = p / n
            if unlearning.method == "npo":
                loss = -2 / 0.1 * torch.log(torch.sigmoid(-0.1 * (p - reference[i])))
            forget_loss = forget_loss + loss / 4
        if unlearning.method != "ga":
            for i in ShuffledStream(len(retain), unlearning.seed).at(step * 4, 4).tolist():
                p, n = log_prob(retain[i])
                retain_loss = retain_loss - p / n / 4
        (forget_loss + retain_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((forget_loss.item(), retain_loss.item()))
    return losses


def trajectories(ranks, configs):
    found = []
    for one in configs:
        _, loop, _ = gang.train(one, ranks, keep=False)
        steps = [line for line in loop.state.log if line["event"] == "step"]
        found.append([(line["forget_loss"], line["retain_loss"] or 0.0) for line in steps])
    return found


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
            assert len(trajectory) == STEPS
            np.testing.assert_allclose(trajectory, expected[method], rtol=1e-5, err_msg=f"{method}, {shards}")
    moved = np.array(expected["npo"])
    assert abs(moved[-1, 0] - moved[0, 0]) > 0.1 * abs(moved[0, 0])
