"""`turboquant-hf neighbours`: nearest-neighbour search over quantized vectors, beside faiss's codecs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from turboquant_hf.evaluation.harness.flags import whole
from turboquant_hf.evaluation.harness.folder import check_output, write_run
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.tables import format_table
from turboquant_hf.evaluation.harness.vectors import load_vectors, round_trip
from turboquant_hf.quantizers import QUANTIZERS

RANKS = (1, 2, 4, 8, 16, 32, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vectors", type=Path, help="embeddings [rows, channels] in a .npy or .pt file; default: synthetic clusters"
    )
    parser.add_argument("--rows", type=whole(1), default=10_000, help="vectors to index (%(default)s)")
    parser.add_argument("--queries", type=whole(1), default=500, help="rows to search for (%(default)s)")
    parser.add_argument("--dim", type=whole(1), default=128, help="channels of the synthetic vectors (%(default)s)")
    parser.add_argument("--bits", type=whole(1), nargs="+", default=[2, 4], help="widths of the codecs (default: 2 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of rows and queries (%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=None, help="folder for config.yaml, metrics.json and neighbours.png"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write metrics.json and neighbours.png. Returns 0."""
    asked = Run.of(args)
    check_output(asked)
    base, queries = read_vectors(asked)
    results = measure(base, queries, asked.bits)
    rows = [[r["codec"], r["bits"], *(r["recall"][str(k)] for k in (1, 4, 16, 64)), r["seconds"]] for r in results]
    print(format_table(rows, ["codec", "bits", "1@1", "1@4", "1@16", "1@64", "index s"]))
    write_run(asked, {"rows": len(base), "dim": base.shape[1], "queries": len(queries), "results": results})
    if asked.output is not None:
        plot(results, asked.output / "neighbours.png")
    return 0


def read_vectors(asked: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """(base [rows, D], queries [n, D]), all of norm 1. No query is in the base."""
    needed = asked.rows + asked.queries
    if asked.vectors is None:
        x = clusters(needed, asked.dim, asked.seed)
    else:
        x = load_vectors(asked.vectors)
        if len(x) <= asked.queries:
            raise ValueError(f"queries={asked.queries} is not supported by {len(x)} rows; allowed: fewer")
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(asked.seed))[:needed]]
    x = torch.nn.functional.normalize(x, dim=-1)
    return x[asked.queries :], x[: asked.queries]


def clusters(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Points around 64 centres with a decaying spectrum, like embeddings."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1).pow(-0.5)
    centres = torch.randn(64, dim, generator=generator) * spectrum
    members = torch.randint(64, (count,), generator=generator)
    return centres[members] + 0.7 * torch.randn(count, dim, generator=generator) * spectrum


def measure(base: torch.Tensor, queries: torch.Tensor, widths: Sequence[int]) -> list[dict[str, Any]]:
    """Recall 1@k of the nearest row by inner product, real bits per channel, and seconds to index all rows."""
    truth = (queries @ base.T).argmax(dim=1, keepdim=True)
    results = []
    for name, bits, index in codecs(base.shape[1], widths):
        start = time.perf_counter()
        search = index(base)
        seconds = time.perf_counter() - start
        found = search(queries, max(RANKS)) == truth
        recall = {str(k): found[:, :k].any(dim=1).float().mean().item() for k in RANKS}
        results.append({"codec": name, "bits": bits, "seconds": seconds, "recall": recall})
    return results


Search = Callable[[torch.Tensor, int], torch.Tensor]


def codecs(dim: int, widths: Sequence[int]) -> list[tuple[str, float, Callable[[torch.Tensor], Search]]]:
    """(name, real bits per channel, base -> search) of all available codecs. Prints a line if faiss is missing."""
    found = []
    for width in widths:
        ours = {"mse": QUANTIZERS["mse"](bits=width, scale="unbiased")}
        if width > 1:
            ours["prod"] = QUANTIZERS["prod"](bits=width)
            ours["prod, orthogonal"] = QUANTIZERS["prod"](bits=width, sketch="orthogonal")
        ours["qjl"] = QUANTIZERS["qjl"](bits=width)
        for name, quantizer in ours.items():
            found.append((f"{name} {width}", quantizer.bits_per_channel(dim, 128), _ours(quantizer)))
    try:
        import faiss
    except ImportError:
        print("Product quantization and RaBitQ are left out: they need `pip install faiss-cpu`")
        return found
    for width in widths:
        if dim * width % 8 == 0 and dim % (dim * width // 8) == 0:
            make = lambda width=width: faiss.IndexPQ(dim, dim * width // 8, 8, faiss.METRIC_INNER_PRODUCT)  # noqa: E731
            found.append((f"PQ {width}", 8 * make().code_size / dim, _faiss(make)))
        bits = 8 * faiss.IndexRaBitQ(dim, faiss.METRIC_INNER_PRODUCT, width).code_size / dim
        found.append((f"RaBitQ {width}", bits, _faiss(lambda width=width: _rabitq(faiss, dim, width))))
    return found


def _ours(quantizer) -> Callable[[torch.Tensor], Search]:
    def index(base: torch.Tensor) -> Search:
        # A linear estimator is q times the decoded vector, so a search is one matrix product.
        decoded = round_trip(quantizer, base[None])[0]
        return lambda queries, k: (queries @ decoded.T).topk(k, dim=1).indices

    return index


def _rabitq(faiss, dim: int, width: int):
    # faiss leaves RaBitQ's random rotation to the caller.
    codec = faiss.IndexRaBitQ(dim, faiss.METRIC_INNER_PRODUCT, width)
    return faiss.IndexPreTransform(faiss.RandomRotationMatrix(dim, dim), codec)


def _faiss(make) -> Callable[[torch.Tensor], Search]:
    def index(base: torch.Tensor) -> Search:
        built = make()
        built.train(base.numpy())
        built.add(base.numpy())
        return lambda queries, k: torch.from_numpy(built.search(queries.numpy(), k)[1])

    return index


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw recall against rank, and indexing time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    recall, seconds = figure.subplots(1, 2)
    for index, row in enumerate(results):
        style = {"marker": "os^vDPX*"[index % 8], "color": f"C{index % 10}", "linestyle": "-" if index < 10 else "--"}
        recall.plot(
            RANKS, [row["recall"][str(k)] for k in RANKS], label=f"{row['codec']} ({row['bits']:.2f} bits)", **style
        )
    recall.set(xscale="log", xticks=RANKS, xticklabels=RANKS, xlabel="k", ylabel="nearest row among the first k")
    recall.minorticks_off()
    recall.set_title("Recall of the nearest neighbour")
    recall.grid(alpha=0.3)
    recall.legend(fontsize=8)
    # Points, not bars: on a log axis a bar's length means nothing.
    seconds.plot([row["seconds"] for row in results], [row["codec"] for row in results], "o")
    seconds.invert_yaxis()
    seconds.grid(alpha=0.3)
    seconds.set(xscale="log", xlabel="seconds", title="Indexing, training included")
    figure.savefig(path, dpi=110)
