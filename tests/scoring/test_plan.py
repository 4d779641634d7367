"""Units tile the grid whatever the cluster; what is done is left out; micro-batches depend on samples alone."""

import itertools

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from mrd_ray.config import DataSettings, ModelSettings, RaySettings, ScoringSettings
from mrd_ray.data import samples as samples_table
from mrd_ray.data.micro_batches import lay_out, lengths
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError
from mrd_ray.models import load
from mrd_ray.scoring.cost import ModelCost, gpu_advice
from mrd_ray.scoring.units import _MAX_UNIT_SECONDS, DRAW_TOKENS, Unit, cut_units, missing_units
from mrd_ray.workers.pool import Pool

LENGTHS = np.random.default_rng(0).integers(0, 200, 500)


def cells(units):
    found = [
        (m, k)
        for u in units
        for m in range(u.first_micro_batch, u.stop_micro_batch)
        for k in range(u.first_draw, u.stop_draw)
    ]
    assert len(found) == len(set(found))
    return set(found)


def test_layout_holds_every_sample_once_within_budget():
    layout = lay_out(LENGTHS, 1024)
    assert sorted(layout.order) == sorted(np.flatnonzero(LENGTHS))
    for micro_batch in range(len(layout)):
        members = LENGTHS[layout.samples(micro_batch)]
        assert layout.padded_tokens[micro_batch] == len(members) * members.max() <= 1024
    assert sum(len(layout.samples(m)) for m in range(len(layout))) == len(layout.order)


@pytest.mark.parametrize("budget", [512, 2048, 16384, 10**9])
def test_padding_stays_small_whatever_the_budget(budget):
    lengths = np.random.default_rng(0).lognormal(4, 0.5, 400).astype(np.int64) + 10
    cut = lay_out(lengths, budget)
    assert 1 - lengths.sum() / cut.padded_tokens.sum() < 0.05
    for i in range(len(cut)):
        held = lengths[cut.samples(i)]
        assert held.sum() >= 0.95 * cut.padded_tokens[i] or held[:-1].sum() < 512


@pytest.mark.parametrize("path", ["tofu/forget10.json", "tofu/full.json", "wikitext2/valid.txt"])
def test_padding_of_real_data(shared, stories_dir, path):
    """Questions with answers of many lengths, and a text in windows of one, as they are when scored by default."""
    data, model = DataSettings(path=str(shared / "data" / path)), ModelSettings(path=str(stories_dir))
    samples = samples_table.build(data, load.load_tokenizer(model), Limits())
    tokens = lengths(samples)
    assert len(tokens) >= 400
    for budget in (512, 16384):
        assert 0.95 < tokens.sum() / lay_out(tokens, budget).padded_tokens.sum() <= 1


def test_sample_over_the_budget_goes_alone():
    layout = lay_out(np.array([5, 3000, 5, 7]), 100)
    assert [len(layout.samples(m)) for m in range(len(layout))] == [3, 1]


def test_small_micro_batches_on_a_gpu_are_told():
    small, large = ScoringSettings(), ScoringSettings(micro_batch_tokens=16384)
    on_gpu = Pool(actors=2, cpus=1, gpus=1)
    assert "scoring.micro_batch_tokens: 512" in gpu_advice(on_gpu, small)
    assert gpu_advice(on_gpu, large) is gpu_advice(Pool(actors=2, cpus=1, gpus=0), small) is None


def test_nothing_to_score():
    assert len(lay_out(np.zeros(3, int), 100)) == 0
    assert missing_units(0, 0, range(200), []) == []


@pytest.mark.parametrize("actors", [1, 2, 7, 64])
@pytest.mark.parametrize("rate", [10.0, 3e3, 1e9])
@pytest.mark.parametrize("draws", [1, 3, 200])
def test_units_tile_the_grid(actors, rate, draws):
    layout = lay_out(LENGTHS, 1024)
    units = cut_units(layout, missing_units(0, len(layout), range(draws), []), actors, rate)
    assert cells(units) == set(itertools.product(range(len(layout)), range(draws)))
    if draws == 200:
        assert len(units) >= 4 * actors


def test_units_are_neither_long_nor_mostly_perturbation():
    layout = lay_out(np.full(20_000, 100), 4096)
    rate = 5000.0
    for unit in cut_units(layout, missing_units(0, len(layout), range(200), []), 4, rate):
        tokens = layout.padded_tokens[unit.first_micro_batch : unit.stop_micro_batch].sum()
        assert tokens * (unit.stop_draw - unit.first_draw) / rate <= _MAX_UNIT_SECONDS
        assert DRAW_TOKENS / tokens < 0.03 or unit.stop_micro_batch == len(layout)


def test_missing_is_the_complement_of_what_is_done():
    done = [Unit(0, 0, 2, 0, 50), Unit(0, 2, 5, 10, 60), Unit(0, 0, 1, 50, 90)]
    rectangles = missing_units(0, 6, range(100), done)
    assert cells(rectangles) == set(itertools.product(range(6), range(100))) - cells(done)
    assert Unit(0, 5, 6, 0, 100) in rectangles
    assert missing_units(0, 6, range(100), [*done, *rectangles]) == []


def test_a_later_round_begins_where_the_one_before_ended():
    done = [Unit(1, 0, 2, 50, 70)]
    assert missing_units(1, 2, range(50, 100), done) == [Unit(1, 0, 2, 70, 100)]


def test_few_are_short_and_of_different_lengths():
    layout = lay_out(LENGTHS, 1024)
    few = LENGTHS[layout.few(4)]
    assert len(set(few)) == 4
    assert few.max() <= np.median(LENGTHS[LENGTHS > 0])
    assert len(lay_out(np.array([7, 0]), 1024).few(4)) == 1


@pytest.mark.parametrize("stray", [Unit(0, 4, 7, 0, 10)])
def test_a_unit_that_cannot_be_of_this_run_is_named(stray):
    with pytest.raises(UserError, match=rf"units/{stray.unit_id} is not a unit of this run"):
        missing_units(0, 6, range(100), [stray])


def test_units_of_few_draws_take_their_time_too():
    """Scheduling would cost more than a unit of a single forward on a fast device."""
    layout = lay_out(np.full(200_000, 100), 4096)
    of_one, of_many = (cut_units(layout, missing_units(0, len(layout), range(k), []), 4, 1e5) for k in (1, 200))
    assert len(of_one) < 25 < len(of_many)


def test_fewer_draws_than_done_is_refused():
    with pytest.raises(UserError, match=r"scoring\.num_draws: 40.*up to 50"):
        missing_units(0, 2, range(40), [Unit(0, 0, 2, 0, 50)])


def test_overlapping_units_are_noticed():
    one, other = Unit(0, 0, 2, 0, 50), Unit(0, 1, 2, 40, 60)
    with pytest.raises(UserError, match=f"units/{one.unit_id} and units/{other.unit_id} hold the same draws"):
        missing_units(0, 2, range(100), [other, one])


def test_unit_ids():
    unit = Unit(2, 3, 70, 0, 200)
    assert Unit.of_id(unit.unit_id) == unit


@pytest.mark.parametrize(
    "stray",
    [
        "stray", "r00_m00000000-00000001_k00000006-00000003", "r00_m00000000-00000001_k00000008-00000008",
        "r00_m00000003-00000003_k00000000-00000010", "r00_m00000005-00000004_k00000000-00000010",
        "r0_m00000000-00000001_k00000000-00000003", "r00_m00000000-00000001_k00000000-0000000\u0663",
    ],
)  # fmt: skip
def test_what_is_no_units_name(stray):
    with pytest.raises(UserError, match=f"units/{stray} is not a unit of mrd_ray"):
        Unit.of_id(stray)


@pytest.mark.parametrize("tied", [True, False])
def test_model_cost_without_weights(tied):
    config = LlamaConfig(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    cost = ModelCost.of(model)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.flops_per_token == 2 * (cost.parameters - (0 if tied else 500 * 32))


def test_pool_takes_what_the_cluster_has():
    assert Pool.of(RaySettings(), [{"CPU": 8.0}]) == Pool(8, 1.0, 0.0)
    assert Pool.of(RaySettings(cpus_per_process=2), [{"CPU": 8.0, "GPU": 2.0}]) == Pool(2, 2.0, 1.0)
    assert Pool.of(RaySettings(gpus_per_actor=0.5), [{"CPU": 8.0, "GPU": 2.0}]).actors == 4
    assert Pool.of(RaySettings(cpus_per_process=0.5), [{"CPU": 2.0}]).threads == 1


def test_an_actor_fits_on_one_node():
    nodes = [{"CPU": 3.0}, {"CPU": 3.0}, {"memory": 1e9}]
    assert Pool.of(RaySettings(cpus_per_process=2), nodes) == Pool(
        2, 2.0, 0.0
    )  # not the three that six CPUs would hold
    with pytest.raises(UserError, match=r"ray.actors: 1 requested, but .* 6 CPU.* on 3 node"):
        Pool.of(RaySettings(cpus_per_process=4), nodes)


def test_a_cluster_that_grows_may_have_no_room_yet():
    config = RaySettings(actors=8, gpus_per_actor=1)
    pool = Pool.of(config, [{"CPU": 0.0}], grows=True)
    assert pool == Pool(8, 1.0, 1.0)
    assert pool.room([{"CPU": 0.0}, {"CPU": 8.0, "GPU": 2.0}]) == 2


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (RaySettings(gpus_per_actor=1), "ray.gpus_per_actor"),
        (RaySettings(cpus_per_process=3), "ray.cpus_per_process"),
        (RaySettings(actors=9), "ray.actors"),
    ],
)
def test_pool_refuses_what_has_no_room(config, key):
    with pytest.raises(UserError, match=key):
        Pool.of(config, [{"CPU": 2.0}])
