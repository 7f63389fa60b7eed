"""Ranks of SDXL and FLUX at their real size: time and memory of the spectra that they follow, and what is allocated.

    python -m benchmarks.spectra [--models sdxl flux] [--out runs/spectra]        ten minutes on an AVX2 core

Needs no weights and no pictures. Weights are Gaussian; what the spectra read of statistics, the diagonal of H, N and G, is drawn
with the spread that it has on `tiny` and `tiny-flux` (SPREAD). One layer of each shape is worked on at its full size, from G to the
strongest values; the other layers of that shape are counted with its time, and have its values times a strength of their own, as
Gaussian matrices of one size differ in little else. Shapes that are done lie in OUT/MODEL.json and are not done again. The time of
branches is that of one call at the base's own size, by kernels.branch_time, as a share of what uniform ranks would take. Writes
docs/tables/spectra.md.
"""

import argparse
import json
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import evaluate
import hgs_lora
import kernels
import qra
import train
from benchmarks.bench import peak_growth
from benchmarks.jobs import MACHINE
from benchmarks.tables import markdown, write_table
from models import memory, plan
from models.denoiser import float_layers
from models.family import FAMILIES, Family
from run.common import step_generator

RANK, MOST = 16, (64, 256)  # the average rank of these models; how many values are computed
NOISE = 0.008  # N / H, the median on tiny and tiny-flux, 4 bits in groups of 16
SPREAD = {"H": 0.7, "N / H": 0.7, "G": 0.7, "layers": 3.0}  # sd of logarithms: within a layer, and of layers' mean G


def log_normal(n: int, what: str, gen: torch.Generator) -> Tensor:
    return (SPREAD[what] * torch.randn(n, generator=gen)).exp()


def measured(O: int, K: int, kind: str) -> dict:
    """A layer of this shape: its strongest values, and seconds of CPU time and megabytes that they take from W, diag H, N and G,
    for each of MOST."""
    gen, few = step_generator(O, K), min(O, 256)
    w_OK, H_K = torch.randn(O, K, generator=gen) / K**0.5, log_normal(K, "H", gen)
    F_Of = log_normal(O, "G", gen).sqrt()[:, None] * torch.randn(O, few, generator=gen) * torch.arange(1, few + 1) ** -0.5
    G_OO = F_Of @ F_Of.mT
    noise_K = NOISE * H_K * log_normal(K, "N / H", gen) if kind == "w4a4" else None
    found: dict = {"seconds": []}

    def spectra() -> None:
        began = time.process_time()
        white = hgs_lora.Whitener(H_K).of_layer(G_OO, noise_K)
        weighed = w_OK, hgs_lora.grid_cost(white).sqrt(), white.G_OO
        common = time.process_time() - began
        for most in MOST:
            began = time.process_time()
            found["sigma"] = hgs_lora.whitened_spectrum(*weighed, most, dtype=torch.float32).tolist()
            found["seconds"].append(common + time.process_time() - began)

    return found | {"mb": peak_growth(spectra, cuda=False)}


def rows_of(family: Family) -> Counter:
    """{layer: tokens or pixels of its output} in one call of the network for one picture of the base's size."""
    net = family.build_meta()
    given = memory.example_inputs(net, family.latent, family.tokens, 1, torch.bfloat16)
    with torch.no_grad(), evaluate.watched(net) as (rows, _):
        net(**tree_map_only(Tensor, lambda t: t.to("meta"), given), return_dict=False)
    return rows


def allocated(kinds: dict[str, str], shapes: dict[str, tuple], spectra: dict[str, list[float]], model: str) -> list[str]:
    """Ranks of layers whose strengths are drawn -> shares of layers without a branch, of the branches' time and of parameters in
    LoRA, memory ratio."""
    strength = dict(zip(shapes, log_normal(len(shapes), "layers", step_generator(0, 0)).sqrt().tolist(), strict=True))
    sigma = {name: [strength[name] * value for value in spectra[str((*shape, kinds[name]))]] for name, shape in shapes.items()}
    statistics = {name: {"spectrum": sigma[name][: MOST[0]], "energy": 1.0} for name in shapes}
    ranks = qra.allocate(shapes, statistics, "spectrum", RANK, granule=1, least=0, most=MOST[0])
    net = FAMILIES[model].build_meta()
    rows = memory.layer_table(FAMILIES[model], net, ranks, **plan.about_inputs(train.parse(["--model", model])))
    lora = sum(ranks[name] * sum(shape) for name, shape in shapes.items()) / (sum(row.bf16 for row in rows) / 2)
    none, tokens = sum(rank == 0 for rank in ranks.values()) / len(ranks), rows_of(FAMILIES[model])
    time_of = {name: partial(kernels.branch_time, shape, rows=tokens[name]) for name, shape in shapes.items()}
    times = sum(time_of[name](rank) for name, rank in ranks.items()) / sum(call(RANK) for call in time_of.values())
    return [f"{none:.0%}", f"{times:.2f}", f"{lora:.2%}", f"{memory.ratio(rows):.4f}"]


def row_of(model: str, out: Path) -> list:
    """The line of the table; shapes that are done already are read from OUT/MODEL.json."""
    family, path = FAMILIES[model], out / f"{model}.json"
    layers = {name: layer for name, layer in float_layers(family.build_meta()).items() if family.precision(name) != "16bit"}
    shapes = {name: (len(layer.weight), layer.weight[0].numel()) for name, layer in layers.items()}
    kinds = {name: family.precision(name) for name in shapes}
    counts = Counter((*shape, kinds[name]) for name, shape in shapes.items())
    done = json.loads(path.read_text()) if path.exists() else {}
    for shape in sorted(counts, key=lambda shape: shape[0] ** 2 * sum(shape[:2])):  # the quickest first
        if str(shape) not in done:
            done[str(shape)] = one = measured(*shape)
            path.write_text(json.dumps(done))
            print(f"{model} {counts[shape]:4d} x {shape}: {one['seconds']} s, {one['mb']:.0f} MB", flush=True)
    minutes = [sum(n * done[str(shape)]["seconds"][i] for shape, n in counts.items()) / 60 for i in range(len(MOST))]
    gigabytes = max(one["mb"] for one in done.values()) / 1e3
    shares = allocated(kinds, shapes, {shape: one["sigma"] for shape, one in done.items()}, model)
    return [model, f"{len(layers)} ({len(counts)})", *(f"{m:.0f} min" for m in minutes), f"{gigabytes:.1f} GB", *shares]


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    args.add_argument("--models", nargs="+", default=["sdxl", "flux"], choices=["sdxl", "flux", "sd15"])
    args.add_argument("--out", type=Path, default=Path("runs/spectra"), help="folder of what is done")
    args = args.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    head = ["model", "layers (shapes)", *(f"strongest {most}" for most in MOST), "memory", "layers without a branch"]
    head += ["time of branches", "parameters in branches", "packed / bf16"]
    lines = markdown(head, *(row_of(model, args.out) for model in args.models))
    note = f"\nrandom weights and statistics, average rank {RANK}, largest {MOST[0]}; CPU time; {MACHINE}"
    write_table("spectra", [*lines, note])


if __name__ == "__main__":
    main()
