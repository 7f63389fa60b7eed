"""bench.py's measuring: what it reports is what ran. Speeds are not judged here."""

import argparse
import os
import subprocess

import pytest
import torch

import train
from backends import cpu
from benchmarks import bench
from benchmarks.tables import ROOT
from layers import packed_layers, set_backend
from models.denoiser import float_layers
from models.family import FAMILIES


def broken(layer):
    raise RuntimeError("needs another machine")


@pytest.mark.parametrize("kind,shape", [("linear", (64, 128, 48)), ("conv", (64, 9 * 64, 32))])
def test_every_implementation_is_measured_on_the_same_operands(kind, shape, capsys):
    """Catches a peer's failure that ends the table, a convolution with other operands than its linear twin, lost columns."""
    layer = bench.Layer(kind, *shape, "cpu")
    ours = ["ours_eager", *(["ours", "ours_plain", "ours_w4a8"] if cpu.is_available() else [])]
    names = ("bf16", "float32", *ours, "int8_ceiling")
    rows = bench.measure(layer, {k: bench.CPU[k] for k in names} | {"peer": broken}, rounds=3, cuda=False)
    by_name = {row["impl"]: row for row in rows}
    assert by_name.keys() >= {"bf16", "float32", *ours} and "peer" not in by_name
    assert "peer: RuntimeError: needs another machine" in capsys.readouterr().err
    for row in rows:
        assert row["kind"] == kind and row["shape"] == shape and row["compile_s"] >= 0
        assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
    assert by_name["bf16"]["error"] < 0.01 and all(0.003 < by_name[name]["error"] < 0.2 for name in ours)
    lines = bench.table(rows)
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert f"{by_name['bf16']['median_ms']:.2f}" in lines[2] and "ours_eager" in lines[0]


def test_rounds_run_everything_once_in_an_order_that_changes_and_can_be_had_again():
    """Catches a fixed order, in which one implementation always finds what the same other left in the caches."""
    seen = []
    calls = {name: lambda name=name: lambda: seen.append(name) for name in "abcd"}
    for _ in range(2):
        bench.race(calls, rounds=8, cuda=False)
    assert seen[:8] == seen[40:48] == list("aabbccdd")  # a warm-up, which pays for compilation
    rounds = [seen[i : i + 4] for k in (8, 48) for i in range(k, k + 32, 4)]
    assert len(seen) == 80 and all(sorted(order) == list("abcd") for order in rounds)
    assert rounds[:8] == rounds[8:] and len({tuple(order) for order in rounds}) > 3


OPTIONS = argparse.Namespace(model="tiny", rank=4, device="cpu", rounds=1, compile=False, lora_bits=16)


@pytest.mark.slow
def test_the_networks_that_are_compared_have_the_same_architecture_and_the_packed_one_fewer_bytes():
    """Catches layers left in bf16, a packed twin that does not run, NaN from the random fill."""
    dense, packed = bench.networks(OPTIONS)
    assert {name for name, _ in packed_layers(packed.net)} == {
        name for name in float_layers(dense.net) if dense.family.precision(name) != "16bit"
    }
    inputs = bench.step_inputs(dense, 2, "cpu")
    with torch.inference_mode():
        a, b = dense(**inputs), packed(**inputs)
    assert a.shape == b.shape == inputs["x"].shape and a.isfinite().all() and b.isfinite().all()
    builders = {"bf16": lambda: lambda: dense(**inputs), "ours": lambda: lambda: packed(**inputs)}
    rows = bench.timed("one step", builders, {"bf16": dense, "ours": packed}, OPTIONS)
    assert [row["impl"] for row in rows] == ["bf16", "ours"] and len(bench.model_table(rows)) == 4
    assert rows[1]["weights_mb"] < 0.4 * rows[0]["weights_mb"]  # tiny has large text and time embeddings


@pytest.mark.parametrize("name,parameters,linears,convs", [("sdxl", 2.567e9, 743, 51), ("flux", 11.90e9, 504, 0)])
def test_the_large_networks_are_the_published_ones(name, parameters, linears, convs):
    """Catches a wrong width, depth or attention setting, and parts whose arguments changed with the library."""
    with torch.device("meta"):
        net = FAMILIES[name].build().to(torch.bfloat16)
        layers = [type(layer) for layer in float_layers(net).values()]
        assert abs(sum(p.numel() for p in net.parameters()) / parameters - 1) < 1e-3
        assert (layers.count(torch.nn.Linear), layers.count(torch.nn.Conv2d)) == (linears, convs)
        for part in bench.PARTS[name]:
            net.get_submodule(part)(**bench.part_inputs(name, part))


def test_peak_growth_sees_a_buffer_that_is_gone_after_the_call():
    """Catches a measure of what stays rather than of the peak."""
    growth = bench.peak_growth(lambda: torch.ones(50_000_000).sum(), cuda=False)
    assert growth is None or 190 < growth < 260


def test_the_deployed_form_is_what_lora_bits_8_measures():
    """Catches a benchmark of layers whose factors nothing has to compute."""
    _, packed = bench.networks(argparse.Namespace(**vars(OPTIONS) | {"lora_bits": 8}))
    layers = [layer for _, layer in packed_layers(packed)]
    assert {layer.lora_A.dtype for layer in layers} == {torch.int8} and {layer.scale_O.dtype for layer in layers} == {torch.uint8}
    with torch.inference_mode():
        assert packed(**bench.step_inputs(packed, 1, "cpu")).isfinite().all()


def sweep(name, sizes, ms):
    """Rows of `bench costs`."""
    return [
        {"sweep": name, "what": str(size), "size": size, "impl": impl, "median_ms": ms(size)}
        for size in sizes
        for impl in ("bf16", "ours")
    ]


def test_a_point_that_one_side_lacks_is_left_out():
    """Catches a sweep of half an hour that is lost because memory did not suffice for one of its points."""
    rows = sweep("rank", (0, 8, 16, 32), lambda r: 1 + 10 * r)
    del rows[5]  # ours at rank 16
    rows[4]["median_ms"] = 1e6
    assert all(abs(bench.slope(rows, "rank", name) - 10) < 1e-9 for name in ("bf16", "ours"))
    assert bench.ratio(bench.pivot(rows)["16"], "bf16", "ours") == "-"


def test_slopes_are_those_of_powers_and_lines():
    """Catches a slope over the wrong axis."""
    rows = sweep("width", (1, 2, 4, 8), lambda v: 3 * v**1.5) + sweep("rank", (1, 2, 4, 8), lambda v: 3 * v + 1)
    assert abs(bench.slope(rows, "width", "ours") - 1.5) < 1e-9 and abs(bench.slope(rows, "rank", "bf16") - 3) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "compile", "native"])
def test_a_packed_block_is_one_graph(backend):
    """Catches a graph break in a layer: the choice of a backend, the build of backends/cpu.cpp, autocast, the branch."""
    _, packed = bench.networks(OPTIONS)
    block, calls = packed.net.mid_block, []  # convolutions, W4A16 projections of the time, attention
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.inference_mode():
        packed(**bench.step_inputs(packed, 1, "cpu"))
        hook.remove()
        ((args, kwargs),) = calls
        set_backend(packed, backend)
        traced = torch.compile(block, fullgraph=True, backend="eager")(*args, **kwargs)
        set_backend(packed, "native" if backend == "native" else "eager")
        assert torch.equal(traced, block(*args, **kwargs))


def gpu_script(*parts, **options):
    command = ["bash", ROOT / "benchmarks/gpu.sh", *parts]
    done = subprocess.run(command, env=os.environ | options, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_without_a_gpu_or_with_an_unknown_part_its_script_is_one_sentence():
    """Catches ten tracebacks, or success, where nothing ran."""
    assert gpu_script("cost")[::2] == (2, "gpu.sh: there is no part cost, there are " + " ".join(PARTS) + "\n")
    if not torch.cuda.is_available():
        assert gpu_script()[::2] == (2, "gpu.sh: torch finds no CUDA device\n")


PARTS = "layers tests kernels tiny costs train sdxl flux train-sdxl train-flux".split()
PYTHON = """#!/bin/sh
echo "$@" >> "$SEEN"
echo some words; echo last words
case "$*" in *flux*) exit 3; esac
"""


def test_the_gpu_script_gives_each_part_a_process_and_a_line(tmp_path):
    """Catches a part whose flags are not understood, one that ends the others, and rows that are not where they are looked for."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    options = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEN": str(tmp_path / "seen"), "OUT": str(tmp_path / "out")}
    code, said, _ = gpu_script(**options)
    assert code == 0
    _, *commands = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]  # the first asks for a GPU
    lines = said.split("## in short\n\n")[1].splitlines()
    assert [line.partition(":")[0] for line in lines] == PARTS and len(commands) == len(PARTS)
    assert lines[0] == "layers: exit code 0 (124: out of time), last words" and "exit code 3" in lines[-1]
    for part, command in zip(PARTS, commands, strict=True):
        if command[1] == "benchmarks.bench":
            parsed = bench.arguments(command[2:])
            assert parsed.device == "cuda" and parsed.json == f"{tmp_path}/out/{part}.json"
        elif command[0] == "train.py":
            train.validate(train.parse([*command[1:], "--device", "cpu"]))
    (tmp_path / "seen").unlink()
    assert gpu_script("costs", **options)[0] == 0 and len((tmp_path / "seen").read_text().splitlines()) == 2
