"""`mrd-ray compare`: how far two score tables agree on the same samples."""

from dataclasses import dataclass
from typing import Any, TypedDict

import matplotlib.figure
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.stats

from mrd_ray.config import CompareConfig
from mrd_ray.data import samples
from mrd_ray.errors import UserError
from mrd_ray.mrd.standard_errors import student
from mrd_ray.runs import storage
from mrd_ray.runs.directory import Identified, parsed_json, parsed_table
from mrd_ray.scoring.summary import png
from mrd_ray.scoring.table import SCHEMA

_STANDARD_ERRORS = 3.0
_TEXTS = {"sample_id", "text"}


class ComparedSample(TypedDict):
    """A sample of both runs. a, b: its scores; a_se, b_se: their standard errors. z: see `Comparison`."""

    sample_id: str
    a: float
    b: float
    a_se: float
    b_se: float
    z: float
    text: str | None


@dataclass(frozen=True)
class Comparison:
    """Agreement of two runs over the samples that have a score in both.

    compared: number of these samples. only_a, only_b: number of samples with a score in only one run. spearman,
    kendall: rank correlations (tau-b). median_ratio: median of b / a. judged: number of samples whose difference has a
    standard error. apart: share of these whose scores differ by more than three standard errors; None if there are
    none. paired: number of samples whose difference has a standard error from the eighths of the draws, which is right
    whatever the runs share; the others have the standard error of independent runs. draws: says in words how standard
    errors were found. rows: the samples, each with sample_id, a, b, a_se, b_se, z (the difference in standard errors,
    nan if it has none) and text. The largest differences come first: in standard errors if every row has one, else
    relative to a.
    """

    compared: int
    only_a: int
    only_b: int
    spearman: float
    kendall: float
    median_ratio: float
    judged: int
    apart: float | None
    paired: int
    draws: str
    rows: list[ComparedSample]
    settings: tuple[str, str]

    @property
    def share_apart(self) -> str:
        """`apart` in words."""
        if self.apart is None:
            return "unknown, without standard errors"
        of = "" if self.judged == self.compared else f" of {self.judged:,} that have standard errors"
        return f"{self.apart:.1%}{of}"

    def how_far(self, row: ComparedSample) -> str:
        """How far apart a row's scores are, in the unit by which the rows are sorted."""
        if self.judged == self.compared:
            return f"{row['z']:+.1f} s.e."
        return f"{row['b'] / row['a'] - 1:+.1%}" if row["a"] else "-"


@dataclass(frozen=True)
class _Pairs:
    """Both scores of every sample and their standard errors: float64 [n], nan where unknown. both: bool [n]."""

    a: np.ndarray
    b: np.ndarray
    a_se: np.ndarray
    b_se: np.ndarray
    both: np.ndarray

    @classmethod
    def of(cls, tables: list[pa.Table]) -> "_Pairs":
        a, b, a_se, b_se = (table[name].to_numpy().astype(float) for name in ("mrd", "mrd_se") for table in tables)
        return cls(a, b, a_se, b_se, np.isfinite(a) & np.isfinite(b))

    @property
    def relative(self) -> np.ndarray:
        """The differences relative to a."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.a == self.b, 0.0, (self.b - self.a) / self.a)


@dataclass(frozen=True)
class _Differences:
    """How far apart the scores of every sample are.

    z: in standard errors, float64 [n]. judged: bool [n], whether there is a standard error; z is nan elsewhere.
    paired: bool [n], whether it comes from the eighths of the draws. unpaired: how many come from both runs' standard
    errors.
    """

    z: np.ndarray
    judged: np.ndarray
    paired: np.ndarray
    unpaired: int


def compare(config: CompareConfig) -> Comparison:
    """Compare two runs. Raises UserError if they are not of the same samples, or share fewer than three scores."""
    runs = (config.run_a, config.run_b)
    tables, texts = [_scores(run) for run in runs], [_texts(run) for run in runs]
    _refuse_other_samples(config, tables, texts)
    _refuse_other_tokens(config, tables)
    _refuse_other_statistic(config, tables)
    pairs = _Pairs.of(tables)
    if pairs.both.sum() < 3:
        raise UserError(
            f"{config.run_a} and {config.run_b} share {pairs.both.sum()} scores; comparing needs at least 3"
        )
    differences = _differences(tables, pairs)
    judged = differences.judged
    a, b = pairs.a[pairs.both], pairs.b[pairs.both]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(np.nanmedian(b / a))
    return Comparison(
        compared=len(a),
        only_a=int((np.isfinite(pairs.a) & ~pairs.both).sum()),
        only_b=int((np.isfinite(pairs.b) & ~pairs.both).sum()),
        spearman=float(scipy.stats.spearmanr(a, b).statistic),
        kendall=float(scipy.stats.kendalltau(a, b).statistic),
        median_ratio=ratio,
        judged=int(judged.sum()),
        apart=float((np.abs(differences.z[judged]) > _STANDARD_ERRORS).mean()) if judged.any() else None,
        paired=int(differences.paired.sum()),
        draws=_draws(_share_draws(runs, tables), int(judged.sum()), differences.unpaired),
        rows=_rows(tables[0]["sample_id"].to_pylist(), pairs, differences, texts[0]),
        settings=(_settings(tables[0]), _settings(tables[1])),
    )


def _differences(tables: list[pa.Table], pairs: _Pairs) -> _Differences:
    """From the eighths of the draws where both runs have them, else as of independent runs."""
    a, b, both = pairs.a, pairs.b, pairs.both
    difference, noise = b - a, np.sqrt(pairs.a_se**2 + pairs.b_se**2)  # nan if a standard error is unknown
    paired = np.zeros(len(a), bool)
    if len(_estimators(tables)) < 2:
        of_pairs, noise_of_pairs = _of_eighths(tables)
        paired = both & np.isfinite(of_pairs)
        difference, noise = np.where(paired, of_pairs, difference), np.where(paired, noise_of_pairs, noise)
    known = both & (noise > 0)
    judged = known | paired | (both & (noise == 0) & (a == b) & known.any())
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(noise > 0, difference / noise, np.where(a == b, 0.0, np.inf))
    return _Differences(np.where(judged, z, np.nan), judged, paired, int((known & ~paired).sum()))


def _rows(ids: list[str], pairs: _Pairs, differences: _Differences, texts: dict[str, str]) -> list[ComparedSample]:
    """Samples with a score in both runs, the largest differences first."""
    all_judged = differences.judged[pairs.both].all()
    size = np.abs(differences.z if all_judged else pairs.relative)
    return [
        {
            "sample_id": ids[i],
            "a": pairs.a[i],
            "b": pairs.b[i],
            "a_se": pairs.a_se[i],
            "b_se": pairs.b_se[i],
            "z": differences.z[i],
            "text": texts.get(ids[i]),
        }
        for i in sorted(np.flatnonzero(pairs.both), key=lambda i: -size[i])
    ]


def _refuse_other_samples(config: CompareConfig, tables: list[pa.Table], texts: list[dict[str, str]]) -> None:
    """Raises UserError if the runs do not have the same sample ids, or have different texts under them."""
    ids = [table["sample_id"].to_pylist() for table in tables]
    if ids[0] != ids[1]:
        differing = sorted(set(ids[0]) ^ set(ids[1]))
        raise UserError(
            f"{config.run_a} and {config.run_b} are not of the same samples: {len(differing)} id(s) are in only "
            f"one of them, first {differing[0]!r}. Score the same data, with data.id if necessary"
        )
    if texts[0] and texts[1] and (changed := [i for i in ids[0] if texts[0].get(i) != texts[1].get(i)]):
        raise UserError(
            f"{config.run_a} and {config.run_b} are not of the same samples: {len(changed)} of them, first "
            f"{changed[0]!r}, have different texts. Score the same data with the same data.template"
        )


def _refuse_other_statistic(config: CompareConfig, tables: list[pa.Table]) -> None:
    statistics = [_statistic(table) for table in tables]
    if statistics[0] != statistics[1]:
        raise UserError(
            f"the mrd of {config.run_a} is {statistics[0]}, the mrd of {config.run_b} is {statistics[1]}; "
            "run one again with the scoring.statistic of the other, which costs nothing"
        )


def _share_draws(runs: tuple[str, str], tables: list[pa.Table]) -> bool | None:
    """Whether the runs use the same draws; None if unknown, because a run was given as a bare table."""
    estimators = [
        table["estimator"].drop_null()[:1].to_pylist() if _has(table, "estimator") else [] for table in tables
    ]
    if all(estimators) and estimators[0] != estimators[1]:
        return False
    identities = [_identity(run) for run in runs]
    noise = [(identity.get("scoring.seed"), identity.get("noise version")) for identity in identities]
    return None if None in (*noise[0], *noise[1]) else noise[0] == noise[1]


def _estimators(tables: list[pa.Table]) -> set[str]:
    return {
        name for table in tables if _has(table, "estimator") for name in table["estimator"].drop_null()[:1].to_pylist()
    }


def _of_eighths(tables: list[pa.Table]) -> tuple[np.ndarray, np.ndarray]:
    """Difference of each sample's scores, and its standard error, from the eighths of the draws; nan where unknown.

    The eighths' differences are independent of each other, even where the two runs are not, so Student's t applies.
    """
    if not all(_has(table, "mrd_eighths") for table in tables):
        return np.full(len(tables[0]), np.nan), np.full(len(tables[0]), np.nan)
    (a, lengths), (b, other) = (_eighths(table) for table in tables)
    eighths = np.where((lengths == other) & (lengths > 1), lengths, np.nan)
    width = min(a.shape[1], b.shape[1])
    apart = b[:, :width] - a[:, :width]
    mean = np.nansum(apart, 1) / eighths
    variance = np.nansum((apart - mean[:, None]) ** 2, 1) / (eighths - 1)
    factors = np.array([student(max(freedom, 1)) for freedom in range(width + 1)])
    factor = factors[np.where(np.isnan(eighths), 0, eighths - 1).astype(int)]
    return mean, factor * np.sqrt(variance / eighths)


def _eighths(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The column mrd_eighths: float64 [n, most], padded with nan, and the number of eighths of each sample."""
    column = table["mrd_eighths"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(int)
    found = np.full((len(table), lengths.max(initial=0)), np.nan)
    found[np.arange(found.shape[1]) < lengths[:, None]] = column.flatten().to_numpy(zero_copy_only=False)
    return found, lengths


def _has(table: pa.Table, name: str) -> bool:
    return name in table.column_names


def _draws(shared: bool | None, judged: int, unpaired: int) -> str:
    if not judged:
        return "none: the scores of at least one run have no standard errors"
    if not unpaired:
        return "from the differences of eighths of the draws: what the runs share cancels"
    if shared is False:
        return "of independent runs: different seeds, or different estimators"
    sharing = "because the runs share draws" if shared else "if the runs share draws"
    return f"as if independent for {unpaired} unpaired sample(s); too large {sharing}"


def _read(run: str, name: str) -> tuple[str, bytes]:
    """Path and content of a run's file, or of the table that was given instead of a run. Raises UserError."""
    path = run if run.endswith(".parquet") else f"{run.rstrip('/')}/{name}"
    try:
        with storage.open_file(path) as file:
            return path, file.read()
    except (OSError, ValueError, ImportError) as problem:
        raise UserError(f"{path}: cannot read it ({problem}); expected a run directory or a scores.parquet") from None


def _scores(run: str) -> pa.Table:
    required = {"sample_id", "mrd", "mrd_se", "num_tokens"}
    remedy = "expected the scores.parquet of a run"
    table = parsed_table(*_read(run, "scores.parquet"), SCHEMA, required, remedy).sort_by("sample_id")
    if len(pc.unique(table["sample_id"])) < len(table):
        raise UserError(f"{run}: some sample ids appear more than once among its scores; {remedy}")
    return table


def _refuse_other_tokens(config: CompareConfig, tables: list[pa.Table]) -> None:
    """Raises UserError if the runs score different parts of the texts, or different lengths with the same tokenizer."""
    identities = [_identity(run) for run in (config.run_a, config.run_b)]
    if not all(identities):
        return
    parts = [identity.get("data.score_on") for identity in identities]
    if parts[0] != parts[1]:
        raise UserError(
            f"{config.run_a} has data.score_on: {parts[0]}, {config.run_b} has {parts[1]}: their scores are sums over "
            "different tokens. Score both with the same setting"
        )
    if identities[0].get("tokenizer") == identities[1].get("tokenizer"):
        counts = [table["num_tokens"].to_pylist() for table in tables]
        if other := [i for i, x, y in zip(tables[0]["sample_id"].to_pylist(), *counts, strict=True) if x != y]:
            raise UserError(
                f"{config.run_a} and {config.run_b} score different numbers of tokens in {len(other)} samples, first "
                f"{other[0]!r}: was one cut by data.max_tokens? Score both with the same settings"
            )


def _identity(run: str) -> dict[str, Any]:
    """The identity in a run directory's manifest; empty for a bare table."""
    if run.endswith(".parquet"):
        return {}
    found: dict[str, Any] = parsed_json(*_read(run, "manifest.json"), Identified)["identity"]
    return found


def _texts(run: str) -> dict[str, str]:
    """Text by sample_id; empty for a bare table."""
    if run.endswith(".parquet"):
        return {}
    table = parsed_table(*_read(run, "samples.parquet"), samples.SCHEMA, _TEXTS)
    return dict(zip(table["sample_id"].to_pylist(), table["text"].to_pylist(), strict=True))


def _settings(table: pa.Table) -> str:
    scored = table.filter(pc.is_valid(table["mrd"]))
    row = scored.slice(0, 1).to_pylist()[0] if len(scored) else {}
    draws = scored["num_draws"].to_pylist() if "num_draws" in table.column_names else []
    counts = sorted({min(draws), max(draws)} - {0}) if draws else []
    span = f", {' to '.join(map(str, counts))} draws" if counts else ""
    return f"{row.get('estimator')}, {_statistic(table)}, sigma {row.get('sigma', float('nan')):g}{span}"


def _statistic(table: pa.Table) -> str:
    for name in ("mean_abs", "abs_mean"):
        if name in table.column_names and table[name].equals(table["mrd"]):
            return name
    return "unknown"


def figure(found: Comparison, config: CompareConfig) -> bytes:
    """Scatter plot of b against a with standard errors, as PNG; samples far apart have another colour."""
    page = matplotlib.figure.Figure(figsize=(7, 7), layout="constrained")
    axis = page.add_subplot()
    a, b, a_se, b_se, z = (
        np.array([row[name] for row in found.rows], float) for name in ("a", "b", "a_se", "b_se", "z")
    )
    apart = np.abs(z) > _STANDARD_ERRORS  # false where z is nan
    for mask, colour, label in (
        (~apart, "#4878a8", f"{(~apart).sum()} samples"),
        (apart, "#c44e52", f"{apart.sum()} over {_STANDARD_ERRORS:g} standard errors apart"),
    ):
        if mask.any():
            bars = {"xerr": np.nan_to_num(a_se[mask]), "yerr": np.nan_to_num(b_se[mask])}
            axis.errorbar(a[mask], b[mask], **bars, fmt=".", color=colour, ecolor=colour, alpha=0.6, label=label)
    if (np.concatenate([a, b]) > 0).all():
        axis.set(xscale="log", yscale="log")
    ends = [min(a.min(), b.min()), max(a.max(), b.max())]
    axis.plot(ends, ends, color="grey", linewidth=0.8, label="equal")
    axis.set_xlabel(f"MRD in {config.run_a}\n{found.settings[0]}")
    axis.set_ylabel(f"MRD in {config.run_b}\n{found.settings[1]}")
    axis.set_title(f"Spearman {found.spearman:.3f}, Kendall {found.kendall:.3f}, median ratio {found.median_ratio:.3g}")
    axis.legend()
    return png(page)
