"""A training run without Ray: as many processes as ranks, and the loop in each."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console

from mrd_ray.config import UnlearnConfig
from mrd_ray.data.tokens import Limits
from mrd_ray.models.load import load_tokenizer
from mrd_ray.unlearning import engine as engines
from mrd_ray.unlearning import model as trained
from mrd_ray.unlearning import sets
from mrd_ray.unlearning.loop import Loop
from mrd_ray.unlearning.state import State
from mrd_ray.workers.ranks import Ranks


def config(model: Path, data: Path, retain: Path | None, run: Path, **settings: Any) -> UnlearnConfig:
    """Settings as dotted keys with underscores: unlearning__method="npo"."""
    tree: dict = {"model": {"path": str(model)}, "data": {"path": str(data)}, "run": {"dir": str(run)}}
    tree |= {"retain": {"path": retain and str(retain)}, "unlearning": {"batch_size": 4, "learning_rate": 1e-3}}
    tree |= {"scoring": {"estimator": "closed_form", "micro_batch_tokens": 64}, "stopping": {"extraction_n": 0}}
    for key, value in settings.items():
        group, name = key.split("__")
        tree.setdefault(group, {})[name] = value
    return UnlearnConfig.model_validate(tree)


def sets_of(config: UnlearnConfig) -> sets.Sets:
    return sets.build(config, load_tokenizer(config.model), Limits(), Console(quiet=True))


def train(
    config: UnlearnConfig, ranks: Ranks, state: State | None = None, load: Path | None = None, keep=True, **more: Any
):
    """Run the loop on this rank; checkpoints go to run.dir/checkpoints/STEP, unless they are not to be kept.

    Gives why it stopped, the loop, and the scores by step (on rank 0).
    """
    run = Path(config.run.dir)
    model = trained.load(config, torch.device("cpu"))
    engine = engines.Engine(model, config, engines.configuration(config, ranks.size), ranks)
    if load is not None:
        engine.load(load)
        state = State.load(load)
    tables: dict[int, Any] = {}

    def checkpoint(metrics, write):
        if not keep:
            return
        own = run / f"part-{ranks.rank}"
        own.mkdir(parents=True)
        write(own)
        shutil.copytree(own, run / "checkpoints" / str(metrics["step"]), dirs_exist_ok=True)
        shutil.rmtree(own)
        dist.barrier()

    loop = Loop(
        config, sets_of(config), engine, state or State(), log=lambda line: None, keep_scores=tables.__setitem__,
        checkpoint=checkpoint, **more,
    )  # fmt: skip
    reason = loop.run()
    return reason, loop, tables


def on_ranks(size: int, work: Any, *args: Any, threads: int = 1) -> list[Any]:
    """work(ranks, *args) in so many processes, which must be importable; what each gives back."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, args=(size, folder, threads, work, args), nprocs=size)
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, folder: str, threads: int, work: Any, args: tuple) -> None:
    torch.set_num_threads(threads)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.save(work(Ranks(rank, size), *args), f"{folder}/{rank}")
    dist.destroy_process_group()
