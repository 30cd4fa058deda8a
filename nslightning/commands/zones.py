"""Counts how often the gradients of two Jacobian choices differ, over initialisations and mini-batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nslightning.commands.dashes import spelled_with_dashes, with_new_spellings
from nslightning.commands.devices import check_device
from nslightning.commands.endings import ended
from nslightning.exact_csv import read_exactly
from nslightning.files import expanded, write_text
from nslightning.text_table import aligned

if TYPE_CHECKING:
    # jsonargparse runs these lines for --help: nothing heavy among them.
    from jsonargparse import ArgumentParser

__all__ = ["main", "make_parser", "zones"]

_RENAMED = {"--options": "--backbone-options", "--choice": "--choices"}
_WIDEST = 10_000  # draws, where nothing else stops
_KINDS = ("regular", "compensation", "bifurcation")


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: The command line from the subcommand on.

    Returns:
        0; 1 where data are missing or a cell failed, 2 where the call is mistaken, 130 after an interruption.

    Raises:
        SystemExit: After ``--help`` (0) and for arguments that are not understood (2).
    """
    parser = make_parser(f"nslightning {argv[0]}")
    options = parser.parse_args(with_new_spellings(parser, argv[1:], _RENAMED)).as_dict()
    options.pop("config")

    return ended(parser.prog, lambda: _each(**options), go_on="the same command goes on")


def make_parser(prog: str) -> ArgumentParser:
    """The command's parser.

    Args:
        prog: Name of the command in its usage and error messages.

    Returns:
        The parser.
    """
    from nslightning.commands.config_parser import HelpfulErrors

    parser = HelpfulErrors(prog=prog, description=__doc__)
    parser.add_argument("--config", action="config", help="A YAML file with any of these arguments.")
    parser.add_function_arguments(zones, skip={"choice", "precisions"})
    parser.add_argument(
        "--choices", nargs="+", type=str, default=["relu1:relu=1"], metavar="NAME:FIELD=VALUE",
        help="The choices that are compared with the reference, as relu1:relu=1 or minimal:max_pool=minimal; a preset "
        "by its name, as jax. Each of several has its own folder in --output. (default: relu1:relu=1)",
    )  # fmt: skip
    parser.add_argument(
        "--precisions", nargs="+", type=Literal[16, 32, 64], default=[16, 32, 64], metavar="BITS",
        help="Bits of parameters, images and arithmetic. (default: 16 32 64)",
    )  # fmt: skip
    spelled_with_dashes(parser)
    return parser


def _each(choices: list[str], output: str, **options: Any) -> int:
    """A measurement for each choice; each of several has its own folder."""
    from nslightning.choices import named_choices

    names = named_choices(choices)
    folders = [output] if len(names) == 1 else [f"{output}/{name}" for name in names]
    status = 0
    for choice, folder in zip(choices, folders, strict=True):
        status = max(status, zones(choice, output=folder, **options))
    return status


def zones(
    choice: str,
    backbone: str = "paper/fc",
    backbone_options: dict[str, Any] | None = None,
    data: str = "MNIST",
    data_options: dict[str, Any] | None = None,
    download: bool = False,
    reference: str = "pytorch",
    precisions: list[Literal[16, 32, 64]] = [16, 32, 64],  # noqa: B006 # never changed; jsonargparse shows it
    normalise: bool = True,
    batch_size: int = 128,
    batches: int | None = 8,
    norm: Literal["zone", "bitwise_first_layer", "linf_sum", "l1_sum"] = "zone",
    tau: float | None = None,
    of: Literal["draws", "batches"] = "draws",
    half_width: float = 0.05,
    draws: int | None = None,
    chunk: int = 10,
    workers: int = 1,
    device: str = "cpu",
    arithmetic: str = "native",
    estimator: Literal["sampling", "exact"] = "sampling",
    as_published: bool = False,
    seed: int = 0,
    output: str = "runs/zones",
) -> int:
    """Draw initialisations, take mini-batches without training, and count where two choices give different gradients.

    For each precision draws are added, a chunk at a time, until the 95 % confidence interval of the share of draws (or
    of mini-batches) on which the gradients differ is as narrow as asked. A call keeps the draws of
    earlier calls: after an interruption it goes on, and for a narrower interval it adds draws. A folder holds one
    measurement.

    Args:
        choice: The choice that is compared, as relu1:relu=1 or minimal:max_pool=minimal; a preset by its name, as jax.
        backbone: As for fit, such as paper/fc, paper/lenet5 or torchvision/resnet18.
        backbone_options: Its further arguments, as {"batch_norm":true} or {"hidden":[256,256,256]}.
        data: A data set: MNIST, CIFAR10, SVHN, FashionMNISTSample, ...
        data_options: Its arguments, as {"holdout":0}.
        download: Fetch the data that are not there.
        reference: The choice that the others are compared with.
        precisions: Bits of parameters, images and arithmetic.
        normalise: Subtract the data set's mean and divide by its deviation; false leaves pixels in [0, 1].
        batch_size: Images in a mini-batch.
        batches: Mini-batches per draw; null goes through all training images.
        norm: The criterion for a difference. zone: the gradients differ in any bit, and whether over the reals
            (bifurcation) or by rounding alone (compensation) is decided in float64, without a threshold.
            bitwise_first_layer: any bit of the first layer's gradient (the ReLU'(0) paper). linf_sum and l1_sum: the
            sum over the parameters of the difference's norm exceeds tau (the MaxPool paper).
        tau: The threshold of linf_sum and l1_sum; null is the MaxPool paper's for the precision.
        of: Count draws (with a difference on any of their mini-batches) or mini-batches in the reported share.
        half_width: Half the width that the interval is to have.
        draws: Largest number of draws per precision.
        chunk: Draws computed together, by one process.
        workers: Processes side by side, one thread each.
        device: cpu, cuda, cuda:1, ...
        arithmetic: How sums are ordered and rounded, and PyTorch's switches, joined by +: bias_last, sequential,
            split_k=4, random_rounding, tf32, ... (nslightning.arithmetic). By default float32 means float32: no TF32.
            Where a gradient that is computed twice differs from itself, as under random_rounding, norm=zone prints that
            noise floor (relative to the gradient), and on how many mini-batches the choices differ by no more.
        estimator: sampling draws weights and biases. exact draws weights and counts the biases that put some ReLU input
            at 0 on some training image: a few draws give the share to a point. It applies to paper/fc in 32 bits, a
            choice of relu, and batches=null.
        as_published: The released procedure: its rule, whose pooling computes another forward, and nothing held out;
            with bitwise_first_layer, a mini-batch whose gradients are NaN under both choices counts. For a norm of the
            papers: they measured no zones.
        seed: Seed of the first chunk; chunk i uses seed + i.
        output: Folder of zones.csv, zones.png, zones.pdf and of what was computed.

    Returns:
        0, or 1 where a chunk failed.

    Raises:
        ValueError: If an argument is not admissible.
        OSError: If the output cannot be written.
    """
    from nslightning.choices import named_choice
    from nslightning.experiments import run
    from nslightning.experiments.data import download as fetch
    from nslightning.experiments.grid import Experiment
    from nslightning.figures import zone_shares

    if not 0 < half_width < 0.5:
        raise ValueError(f"half_width is between 0 and 0.5; given {half_width}")
    for name, value in {"chunk": chunk, "draws": draws, "batch_size": batch_size, "batches": batches}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is at least 1; given {value}")
    check_device(device)
    if not precisions:
        raise ValueError("precisions names at least one of 16, 32, 64")
    if tau is not None and norm not in ("linf_sum", "l1_sum"):
        raise ValueError(f"tau is the threshold of linf_sum and l1_sum; norm={norm} has none")
    if as_published and norm == "zone" and estimator == "sampling":
        raise ValueError(
            "--as-published takes a norm of the papers: --norm=bitwise_first_layer, linf_sum or l1_sum; given zone, "
            "which no paper measured"
        )
    (name, other), (reference_name, base) = named_choice(choice), named_choice(reference)
    against = {k: v for k, v in other.to_dict().items() if v != getattr(base, k)}
    if not against:
        raise ValueError(f"{name} and {reference_name} are the same choice")
    fixed: dict[str, Any] = {
        "backbone": backbone,
        "backbone_options": backbone_options or {},
        "data": data,
        "data_options": data_options or {},
        "relu": base.relu,
        "max_pool": base.max_pool,
        "rule": base.rule,
        "against": against,
        "batch_size": batch_size,
        "batches": batches,
        "normalise": normalise,
        "norm": "bitwise_first_layer" if estimator == "exact" else norm,
        "thetas": chunk,
        "arithmetic": arithmetic,
        "estimator": estimator,
        "shuffle": estimator == "sampling",
    }
    if download:
        fetch(data, tuple(sorted((data_options or {}).items())))
    _try(fixed | {"precision": precisions[0]}, as_published)
    chunks = dict.fromkeys(precisions, 1)
    most = -(-(draws or _WIDEST) // chunk)
    folder = expanded(output)
    while True:
        experiment = Experiment(
            name=folder.name,
            kind="zones",
            scale="zones",
            title=f"{name} against {reference_name}: {backbone} on {data}",
            fixed=fixed,
            as_published=as_published,
            grids=tuple(
                {"precision": [bits], "tau": [_tau(norm, tau, bits)], "seed": list(range(seed, seed + n))}
                for bits, n in chunks.items()
            ),
        )
        report = run(experiment, folder.parent, workers=workers, device=device, progress=sys.stderr)
        if report.failed:
            print(f"nslightning zones: {report.failed[0][1]}; {report.folder}/cells/*.error say more", file=sys.stderr)
            return 1
        shares = _shares(experiment, report.folder, of)
        wide = shares[(shares["high"] - shares["low"]) / 2 > half_width]["precision"]
        again = [bits for bits in wide if chunks[bits] < most]
        if not again:
            break
        for bits in again:  # at the rate of 1 / sqrt(draws), at most twice as many at once
            chunks[bits] = min(most, chunks[bits] * 2)
    return _show(shares, experiment, folder, of, zone_shares)


def _try(fixed: dict[str, Any], as_published: bool) -> None:
    """Load the data and build the network once, so that a mistake is named before anything is written."""
    import torch

    from nslightning.experiments.cells import settings
    from nslightning.experiments.networks import build, loaded

    cell, cpu = settings("zones", fixed), torch.device("cpu")
    cell = cell.as_published() if as_published else cell
    with torch.random.fork_rng():
        build(cell, loaded(cell, cpu), cpu, None)


def _tau(norm: str, tau: float | None, bits: int) -> float:
    """The threshold: as given, or the MaxPool paper's."""
    if norm not in ("linf_sum", "l1_sum"):
        return 0.0
    from nslightning.experiments.precision import PRECISIONS
    from nslightning.probes import THRESHOLDS

    return THRESHOLDS[PRECISIONS[bits]] if tau is None else tau


def _shares(experiment: Any, folder: Path, of: str) -> Any:  # a pandas.DataFrame
    """Per precision, how many draws, and the share that differs with its 95 % interval.

    Draws are independent: Wilson's interval. The mini-batches of one draw are not: Student's interval of the draws'
    own shares. Chances that were counted are shares of draws already: Student's interval of their mean.
    """
    import pandas as pd

    from nslightning.experiments.figures.results import share_interval

    table = read_exactly(folder / "results.csv")
    wide = table.pivot_table(index=["precision", "cell", "theta"], columns="metric", values="value").reset_index()
    rows = []
    for bits, drawn in wide.groupby("precision", sort=False):
        n = len(drawn)
        if "probability" in drawn:
            share, low, high = _mean(drawn["probability"])
            zeros = float(drawn["expected_zeros"].mean())
            rows.append({"precision": bits, "draws": n, "share": share, "low": low, "high": high, "zeros": zeros})
            continue
        differing = drawn["differing"].sum()
        if of == "draws":
            share = float((drawn["differing"] > 0).mean())
            low, high = share_interval(int((drawn["differing"] > 0).sum()), n)
        else:
            each = drawn["differing"] / drawn["batches"]
            share, low, high = _mean(each)
            if n > 1 and each.std() == 0:  # all alike: this number of draws bounds the share no closer
                low, high = (0.0, 1 - 0.05 ** (1 / n)) if share == 0 else (0.05 ** (1 / n), 1.0)
        kinds = {k: float(drawn[k].sum() / drawn["batches"].sum()) for k in (*_KINDS, "within_noise") if k in drawn}
        if "noise_floor" in drawn:
            kinds["noise_floor"] = float(drawn["noise_floor"].max())
        batches, odd = int(drawn["batches"].sum()), int(drawn["not_finite"].sum())
        rows.append(
            {"precision": bits, "draws": n, "batches": batches, "differing_batches": int(differing), "share": share}
            | {"low": low, "high": high, "not_finite": odd}
            | kinds
        )
    order = {p.varied["precision"]: i for i, p in enumerate(experiment.cells())}
    return pd.DataFrame(rows).sort_values("precision", key=lambda column: column.map(order)).reset_index(drop=True)


def _mean(each: Any) -> tuple[float, float, float]:
    """The mean of the draws' own shares, with Student's 95 % interval."""
    from scipy import stats

    n, share = len(each), float(each.mean())
    half = float(stats.t.ppf(0.975, n - 1) * each.std() / n**0.5) if n > 1 else 1.0
    return share, max(0.0, share - half), min(1.0, share + half)


def _show(shares: Any, experiment: Any, folder: Path, of: str, draw: Any) -> int:
    """Print the shares, and write them as a table and a figure."""
    whose = "draws" if of == "draws" else "mini-batches"
    kinds = [k for k in _KINDS if k in shares]
    noisy = "noise_floor" in shares and bool((shares["noise_floor"] > 0).any())
    counted = "zeros" in shares
    head: tuple[str, ...] = ("bits", "draws", f"{whose} that differ", "95 % interval")
    head += ("zeros expected",) if counted else ("mini-batches", *kinds, "not finite")
    head += ("noise floor", "within it") if noisy else ()
    rows: list[tuple[str, ...]] = [head]
    for row in shares.to_dict("records"):
        more = (
            [f"{row['zeros']:.3g}"]
            if counted
            else [f"{row['batches']:,}", *(f"{row[k]:.1%}" for k in kinds), str(row["not_finite"])]
        )
        more += [f"{row['noise_floor']:.2g}", f"{row['within_noise']:.1%}"] if noisy else []
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        rows.append((str(row["precision"]), f"{row['draws']:,}", f"{row['share']:.1%}", interval, *more))
    print("\n".join([experiment.title, "", *aligned(rows, texts=0)]))
    write_text(folder / "zones.csv", shares.to_csv(index=False, float_format="%.6g"))
    for ending in ("pdf", "png"):
        draw(shares, experiment.title, whose, folder / f"zones.{ending}")
    print(f"Written to {folder}: zones.csv, zones.pdf, zones.png; each draw in zones/results.csv")
    return 0
