"""bench.py's measuring: what it reports is what ran. Speeds are not judged here."""

import pytest
import torch

import bench


def broken(layer):
    raise RuntimeError("needs another machine")


@pytest.mark.parametrize("kind,shape", [("linear", (64, 128, 48)), ("conv", (36, 9 * 64, 32))])
def test_every_implementation_is_measured_on_the_same_operands(kind, shape, capsys):
    """Catches a peer's failure that ends the table, a convolution with other operands than its linear twin, lost columns."""
    layer = bench.Layer(kind, *shape, "cpu", torch.bfloat16)
    names = ("bf16", "float32", "ours_eager", "int8_ceiling")
    rows = bench.measure(layer, {k: bench.CPU[k] for k in names} | {"peer": broken}, rounds=3, cuda=False)
    by_name = {row["impl"]: row for row in rows}
    assert by_name.keys() >= {"bf16", "float32", "ours_eager"} and "peer" not in by_name
    assert "peer: RuntimeError: needs another machine" in capsys.readouterr().err
    for row in rows:
        assert row["kind"] == kind and row["shape"] == shape and row["compile_s"] >= 0
        assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
    assert by_name["bf16"]["error"] < 0.01 and 0.02 < by_name["ours_eager"]["error"] < 0.2
    assert len(bench.table(rows)) == 2 + len(rows)
