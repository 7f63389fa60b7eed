"""backends/gptq_gpu.py, GPTQ in Triton, against quant.round_gptq: same codes, same multipliers, same error.

Where Triton is installed: on a CUDA device, or without one under TRITON_INTERPRET=1 (skipped otherwise)."""

import pytest
import torch

import quant
from backends import gptq_gpu

triton = pytest.importorskip("triton")
if not gptq_gpu.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)
INTERPRET = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRET else "cuda"


def round_gptq(w_OGg, scale_O, U_KK):
    return gptq_gpu.round_gptq(w_OGg, scale_O, U_KK, quant.QMIN, quant.QMAX, quant.MMAX, quant.BLOCK)


def problem(O, K, g, seed, correlated=True, dead=slice(0)):
    """What quantize_weight hands to a rounding: w_OGg with a row of zeros (O > 1), scale_O, m_OG, H, U."""
    gen = torch.Generator().manual_seed(seed)
    w_OK = torch.randn(O, K, generator=gen)
    w_OK[:, ::16] *= 4
    w_OK[O // 2] *= O == 1
    x = torch.randn(2 * K, K, generator=gen)
    if correlated:
        x = x @ (torch.randn(K, K, generator=gen) * torch.linspace(0, 3, K).exp())
    H = (x.t() @ x / len(x)).to(DEVICE)
    H += 0.01 * H.diagonal().mean() * torch.eye(K, device=DEVICE)
    H[:, dead] = H[dead] = 0
    w_OGg = w_OK.to(DEVICE).unflatten(1, (-1, g))
    scale_O = quant.round_scale(quant.step_bound(w_OGg).amax(1) / quant.MMAX)
    H, U = quant.inverse_factor(H, g)
    return w_OGg, scale_O, quant.choose_multipliers(w_OGg, scale_O), H, U


def compare(monkeypatch, O, K, g, seed, correlated=True, dead=slice(0), strict=INTERPRET):
    """Rows of which a code differs: none under the interpreter, whose float32 does not contract; few on a GPU."""
    w, scale, m0, H, U = problem(O, K, g, seed, correlated, dead)
    inputs = [t.clone() for t in (w, scale, m0, U)]
    q, m = round_gptq(w, scale, U)
    assert all(map(torch.equal, inputs, (w, scale, m0, U))), "an argument was written to"
    with monkeypatch.context() as patch:
        patch.setattr(gptq_gpu, "is_available", lambda: False)  # quant's own, on a GPU too
        q0, m0 = quant.round_gptq(w.clone(), scale, m0, True, U)
    assert q.shape == q0.shape and m.shape == m0.shape and q.dtype == m.dtype == torch.float32
    assert q.min() >= quant.QMIN and q.max() <= quant.QMAX and m.min() >= 1 and m.max() <= quant.MMAX
    assert torch.equal(q, q.round()) and torch.equal(m, m.round())
    assert O == 1 or ((q[O // 2] == 0).all() and (m[O // 2] == 1).all())
    rows = ((q != q0).flatten(1).any(1) | (m != m0).any(1)).float().mean().item()
    assert rows <= (0 if strict else 0.05)
    e, e0 = (quant._h_error(w, a, b, scale, H).double().sum() for a, b in ((q, m), (q0, m0)))
    assert abs(e / e0 - 1) < 1e-3
    return e, quant._h_error(w, *quant.round_rtn(w, scale, m0, True, U), scale, H).double().sum()


@pytest.mark.parametrize("O,K,g", [(11, 192, 64), (5, 144, 16), (3, 256, 128), (4, 136, 8), (1, 64, 32)])
@pytest.mark.parametrize("correlated", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_kernel_rounds_as_quant_does(monkeypatch, O, K, g, correlated):
    """Short last blocks, rows that do not fill a program, a group as wide as a block. Would catch: a mask, a column that is
    updated twice or not at all, an update that a group's search does not see, a code rounded half up."""
    compare(monkeypatch, O, K, g, seed=K + g, correlated=correlated)


def test_ties_round_half_to_even_and_to_the_smaller_multiplier():
    """H = 1: nothing is pushed on, so this is rounding to nearest, with values in the middle of two codes."""
    g = 16
    w = torch.linspace(-8, 7.5, 2 * g, device=DEVICE).reshape(1, 2, g) * torch.tensor([1.0, 2.0, 3.0], device=DEVICE)[:, None, None]
    scale, U = torch.tensor([1.0, 2.0, 0.5], device=DEVICE), torch.eye(2 * g, device=DEVICE)
    q, m = round_gptq(w, scale, U)
    m0 = quant.choose_multipliers(w, scale, torch.ones(2, g, device=DEVICE))
    assert torch.equal(m, m0) and torch.equal(q, quant.round_rtn(w, scale, m0, True, U)[0])


def test_dead_channels_and_a_factor_stored_by_rows(monkeypatch):
    """inverse_factor gives U column by column; channels that never fire are decoupled, with 1 on the diagonal."""
    compare(monkeypatch, 7, 128, 32, seed=1, dead=slice(40, 70))
    w, scale, _, _, U = problem(7, 128, 32, seed=1, dead=slice(40, 70))
    assert not U.is_contiguous()
    a, b = (round_gptq(w, scale, u) for u in (U, U.contiguous()))
    assert all(map(torch.equal, a, b))


@pytest.mark.gpu
@pytest.mark.parametrize("search", [False, True])
def test_quant_leaves_the_search_to_the_kernel_and_nothing_else(monkeypatch, search):
    """Catches a dispatch that hands over what the kernel does not do, or one that never reaches it."""
    w, scale, m0, _, U = problem(4, 64, 16, seed=2)
    monkeypatch.setattr(gptq_gpu, "round_gptq", lambda *_: "the kernel")
    assert (quant.round_gptq(w, scale, m0, search, U) == "the kernel") == search


@pytest.mark.gpu
@pytest.mark.parametrize("O,K,g", [(1280, 1280, 64), (640, 2880, 64), (2563, 1160, 8), (5120, 640, 128)])
def test_the_kernel_rounds_as_quant_does_on_a_gpu(monkeypatch, O, K, g):
    """Real sizes; contraction to FMA changes few rows, and not the error."""
    error, nearest = compare(monkeypatch, O, K, g, seed=O, strict=False)
    assert error < nearest
