"""benchmarks/ablate.py: every row is a command that train.py takes, variants do what they say, differences are paired."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quant
import tdpt
import train
from benchmarks import ablate
from run import files


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


def test_intervals_are_of_prompts_and_not_of_seeds():
    """Catches seeds that are taken for further prompts, and differences that are not paired."""
    gen = torch.Generator().manual_seed(0)
    each_prompt = torch.randn(500, generator=gen, dtype=torch.float64)
    mean, low, high = ablate.interval(each_prompt.expand(3, 500))
    half = 1.96 * each_prompt.std().item() / 500**0.5
    assert mean == pytest.approx(each_prompt.mean().item())
    assert (low, high) == (pytest.approx(mean - half, abs=0.15 * half), pytest.approx(mean + half, abs=0.15 * half))


def test_the_table_has_means_spreads_and_paired_differences(tmp_path):
    """Catches a store that forgets rows, a difference to another seed's run, and one between runs of other dtypes."""
    group = ablate.Group({"first": "", "second": "--rank 4"}, updates=(0,), testbeds=("",), seeds=2)
    store = tmp_path / "store.safetensors"

    def add(flags: str, seed: int, psnr: float, dtype: str = "float32") -> None:
        each = torch.full((8,), round(100 * psnr)).short() + torch.arange(8).short()
        about = {"frechet": 1 + psnr / 1000, "accuracy": 0.5, "psnr": psnr, "edges": [0.0], "dtype": dtype, "n": 8}
        files.write_tensors(tmp_path / "scores.safetensors", {"psnr": each, "right": each > 0}, about)
        ablate.keep(store, ablate.key_of("tiny", "", flags, 0, seed), Path(tmp_path))

    for seed, psnr in enumerate((40.0, 41.0)):
        add("", seed, psnr)
    add("--rank 4", 0, 42.0)
    lines = ablate.table(group, ["tiny"], store)
    assert "| first | `(none)` | 0 | 40.50 +- 0.71 (1.040 +- 0.001) |" in lines
    assert "| second | `--rank 4` | 0 | 42.00 (1.042); +2.00 [+2.00, +2.00] |" in lines
    add("--rank 4", 1, 42.0, "bfloat16")
    assert "| second | `--rank 4` | 0 | 42.00 +- 0.00 (1.042 +- 0.000) |" in ablate.table(group, ["tiny"], store)
