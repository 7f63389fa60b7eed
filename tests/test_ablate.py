"""benchmarks/ablate.py: every row is a command that train.py takes, variants do what they say, differences are paired."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import quant
import scores
import tdpt
import train
from benchmarks import ablate
from models import checkpoint
from models.denoiser import FAST, as_cm
from models.pretrained import load_embedded_cm
from run import files
from run.common import UserError


@pytest.mark.parametrize("name", ablate.GROUPS)
def test_every_row_is_a_command_of_its_own(name):
    """Catches a flag that train.py refuses, an unknown variant, and two rows that are one."""
    group, configurations = ablate.GROUPS[name], set()
    for model in ("tiny", "tiny-flux"):
        for flags in group.rows.values():
            for testbed in group.testbeds:
                key = ablate.key_of(model, testbed, flags, group.updates[0], 0).split()
                variants = {flag for flag in key if flag.startswith("@")}
                assert variants <= {*ablate.VARIANTS, "@qsched"}
                cfg = train.parse([flag for flag in key if flag not in variants])
                train.validate(cfg)
                configurations.add((*dataclasses.astuple(cfg), *variants))
    assert len(configurations) == 2 * len(group.rows) * len(group.testbeds)


@given(st.integers(0, 2**31), st.sampled_from([8, 16]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_multipliers_of_the_variant_are_powers_of_two_and_nothing_is_clipped(seed, group, per_sample):
    """Catches a multiplier below the exact one, whose group would be clipped, and codes that were rounded with another step."""
    x = torch.randn(2, 3, 4, 24, generator=torch.Generator().manual_seed(seed))
    exact = quant.quantize_activation
    try:
        ablate.powers_of_two()
        codes, m_G, scale = quant.quantize_activation(x, group, per_sample)
    finally:
        quant.quantize_activation = exact
    assert set(m_G.unique().tolist()) <= {1, 2, 4, 8, 16}
    step_G = m_G * scale.reshape(scale.shape + (1,) * (m_G.dim() - scale.dim()))
    error = (quant.dequantize_activation(codes, m_G, scale, 24) - x).abs()
    assert (error <= step_G.repeat_interleave(group, -1)[..., :24] * 0.5001).all()


def test_fitted_coefficients_undo_a_gain_and_are_those_of_each_step():
    """Catches coefficients of x and p in each other's place, and one pair for all steps."""
    path, gen = tdpt.FlowPath(), torch.Generator().manual_seed(0)
    edges, x = path.grid(4), torch.randn(64, 3, generator=gen)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=gen))[0]

    def fp(x, t, s, cond):
        return x @ turn * (1 + t[:, None])

    def ours(x, t, s, cond):  # less by a factor that depends on the step
        return fp(x, t, s, cond) * (0.7 + 0.2 * t[:, None])

    states = tdpt.rollout_states(fp, path, x, {}, edges)
    repaired = tdpt.rollout_states(ablate.fitted(ours, path, states, {}, edges), path, x, {}, edges)
    torch.testing.assert_close(repaired, states, atol=1e-4, rtol=1e-4)
    assert (tdpt.rollout_states(ours, path, x, {}, edges)[-1] - states[-1]).abs().max() > 0.1


def test_intervals_are_of_paired_prompts_and_of_seeds():
    """Catches seeds that are taken for further prompts, and an interval that leaves out what a seed changes."""
    each_prompt = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, low, high = ablate.interval(each_prompt.expand(3, 500))
    half = 1.96 * each_prompt.std().item() / 500**0.5
    assert mean == pytest.approx(each_prompt.mean().item())
    assert (low, high) == (pytest.approx(mean - half, abs=0.15 * half), pytest.approx(mean + half, abs=0.15 * half))
    _, low, high = ablate.interval(each_prompt + torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64))
    assert low < mean - 0.8 and high > mean + 0.8


@pytest.fixture
def add(tmp_path):
    """Adds a row to tmp_path's store."""

    def add(flags: str, seed: int, psnr: float, dtype: str = ablate.DTYPE, n: int = 8, model: str = "tiny") -> None:
        each = torch.full((n,), round(100 * psnr)).short() + torch.arange(n).short()
        about = {"x fp": 1 + psnr / 1000, "accuracy": 0.5, "psnr": psnr, "edges": [0.0], "n": n, "commit": ""}
        files.write_tensors(tmp_path / "scores.safetensors", {"psnr": each}, about)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ablate, "DTYPE", dtype)
            ablate.keep(tmp_path / "store", ablate.key_of(model, "", flags, 0, seed), tmp_path / "scores.safetensors")

    return add


def test_the_table_has_means_spreads_and_paired_differences(tmp_path, add):
    """Catches a store that forgets rows, a difference to another seed's run, and means over runs of two dtypes."""
    group, store = ablate.Group({"first": "", "second": "--rank 4"}, updates=(0,), testbeds=("",), seeds=2), tmp_path / "store"
    for seed, psnr in enumerate((40.0, 41.0)):
        add("", seed, psnr)
    add("--rank 4", 0, 42.0)
    lines = ablate.table(group, store)
    assert "| first | `(none)` | 0 | 40.50 +- 0.71 (1.040 +- 0.001, 0.500 +- 0.000) |" in lines
    assert "| second | `--rank 4` | 0 | 42.00 (1.042, 0.500); +2.00 [+2.00, +2.00] |" in lines
    add("--rank 4", 1, 52.0, "another")
    assert ablate.table(group, store) == lines
    add("", 0, 30.0, model="tiny-flux")
    assert "|  | flags | updates | tiny | tiny-flux |" in ablate.table(group, store)
    with pytest.raises(UserError, match="has rows of 8 pictures: give --n 8, or another --store"):
        add("", 2, 40.0, n=9)


@pytest.mark.slow
def test_a_cell_is_trained_scored_and_kept_once(tmp_path, monkeypatch):
    """Catches a ratio upside down, pictures of other prompts, a cell that is made again, and one that fails and ends the others."""
    rows = {"bad": "--rank 0", "nearest": f"{ablate.NO_BRANCH} --rounding rtn"}
    monkeypatch.setattr(ablate, "GROUPS", {"trial": ablate.Group(rows, updates=(0,), testbeds=("",), seeds=1)})
    monkeypatch.setattr(ablate, "write_table", lambda name, lines, show: written.append(lines))
    written, calls = [], []

    def each(function, items, jobs):
        def call(*command):
            calls.append(command)
            if "--rank-least" not in command and len(command) > 6:
                raise SystemExit("failed")
            ablate.main(list(command[2:]))

        return [function(item, call) for item in items]

    monkeypatch.setattr(ablate, "each", each)
    command = f"trial --models tiny-flux --n 6 --out {tmp_path}/runs --store {tmp_path}/store".split()
    ablate.main(command)
    assert len(calls) == 3  # fp, and two rows
    ablate.main(command)
    assert len(calls) == 4  # the one that failed, again
    (row,) = ablate.read_store(tmp_path / "store")[1].values()
    judge, network = evaluate.Judge(6, ablate.SEED), load_embedded_cm("tiny-flux").to(FAST)
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("report.json"))
    student, _ = checkpoint.load_checkpoint(folder)
    fp, ours = judge.draw("", as_cm(network), network, 4), judge.draw("", student, student, 4)
    assert row["psnr"] == pytest.approx(scores.psnr(ours, fp), abs=1e-3)
    assert row["x fp"] == pytest.approx(judge.score(ours)["frechet"] / judge.score(fp)["frechet"], rel=1e-6)
    assert len(row["edges"]) == 5 and row["edges"][0] == 0 < row["edges"][4] < 1
    assert f"{row['psnr']:.2f}" in written[-1][2] and len(written[-1]) == 4
