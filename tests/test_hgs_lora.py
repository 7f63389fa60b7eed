"""Properties of the Hessian-guided split and of the layers that carry it.

Oracles: float64 closed forms through the symmetric square root of H (no Cholesky), the deployed kernel for the layers'
forward, and a float64 straight-through surrogate written here for their backward.
"""

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

import hessian
import hgs_lora
import kernels
import quant
from layers import (
    W4A4Conv2d,
    W4A4Linear,
    W4A16Linear,
    anchor_state,
    anchored,
    dequantize_lora,
    load_anchor_state,
    merged_layer,
    mix_lora,
    packed_layers,
    quantize_lora,
    replace_layer,
    set_backend,
    store_8bit,
)

SIBLINGS = ["zero", "pissa", "svdquant", "principal", "loftq", "qera"]


def make_H(K: int, kind: str, seed: int, rows: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, K, generator=generator, dtype=torch.float64)
    if kind == "outlier":
        x[:, :: max(1, K // 3)] *= 30
    elif kind == "correlated":
        x = x @ torch.randn(K, K, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, K, dtype=torch.float64)
    elif kind == "few rows":
        x = x[: max(1, K // 3)]
    elif kind == "offset":
        x = x + 5
    elif kind == "zero":
        x = x * 0
    return x.mT @ x / len(x)


def make_W(O: int, K: int, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    w = torch.randn(O, K, generator=generator)
    if kind == "outlier":
        w[:, :1] *= 20
    return {"zero": w * 0, "constant": torch.full_like(w, 0.1), "tiny": w * 1e-12}.get(kind, w)


H_KINDS = st.sampled_from(["normal", "outlier", "correlated", "few rows", "offset", "zero"])
W_KINDS = st.sampled_from(["normal", "outlier", "zero", "constant", "tiny"])


def h_norm(E: torch.Tensor, H: torch.Tensor) -> float:
    """tr(E H E^T): the H-norm without any factor of H."""
    return float(((E.double() @ H) * E.double()).sum())


def reference(E: torch.Tensor, H: torch.Tensor, rank: int) -> torch.Tensor:
    """The best rank-r approximation of E in the H-norm, through the symmetric square root of H."""
    values, vectors = torch.linalg.eigh(H)
    U, S, Vt = torch.linalg.svd(E.double() @ (vectors * values.sqrt()) @ vectors.mT, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank] @ (vectors / values.sqrt()) @ vectors.mT


# ---------------------------------------------------------------- reference math


@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("rank", [0, 16])
def test_subspace_iteration_leaves_what_the_exact_eigenvectors_leave(decay, rank):
    """Catches too few iterations or vectors, a basis that is not orthonormal, eigenvalues in another order. Flat spectra, where
    it converges slowest, and falling ones."""
    n = hgs_lora.EXACT + 64
    gen = torch.Generator().manual_seed(0)
    M = torch.randn(n, n, generator=gen, dtype=torch.float64) * torch.arange(1, n + 1) ** -decay
    gram, exact = M @ M.mT, torch.linalg.eigvalsh(M @ M.mT).flip(0)
    energy, basis = hgs_lora.strongest(gram, rank)
    assert energy.shape == (rank,) and torch.equal(energy, energy.sort(descending=True).values)
    assert torch.allclose(basis.mT @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-10)
    left = gram.trace() - (basis.mT @ gram @ basis).trace()
    assert exact[rank:].sum() * (1 - 1e-9) <= left <= 1.001 * exact[rank:].sum()
    M, few = M.float(), min(rank, 8)
    spectrum = hgs_lora.whitened_spectrum(M, torch.eye(n, dtype=torch.float64), rank=rank)
    assert len(spectrum) == rank and torch.allclose(spectrum[:few], exact[:few].sqrt(), rtol=0.01)


@pytest.mark.parametrize("O", (8, 48))
@pytest.mark.parametrize("on_grid", (False, True))
def test_a_layer_of_zeros_or_on_the_grid_with_a_dead_input_has_a_split(O, on_grid):
    """Catches a cost of 0 that is divided by: a pruned or zero-initialised layer, an input that never fires and costs nothing."""
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    N_K = (x - quant.dequantize_activation(*quant.quantize_activation(x, 16), 24)).square().mean(0)
    white = hgs_lora.Whitener(x.T @ x / len(x)).of_layer(torch.eye(O), N_K)
    W = quant.dequantize(quant.quantize_weight(make_W(O, 24, "normal", 0), 16)) if on_grid else torch.zeros(O, 24)
    gw, A, B = hgs_lora.decompose(W, white, 2, group=16)
    assert torch.isfinite(A).all() and torch.isfinite(B).all()
    assert hgs_lora.relative_error(W, white.L_KK, gw, A, B) < 1e-2
    cost_K = hgs_lora.grid_cost(W, white, gw)
    assert torch.isfinite(hgs_lora.whitened_spectrum(W, cost_K.sqrt(), white.R_OO, 8)).all()


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 24), H_KINDS, st.integers(0, 999))
@example(O=3, K=9, r=2, kind="correlated", seed=0)
@example(O=9, K=3, r=2, kind="correlated", seed=0)
def test_closed_form_equals_the_float64_reference_on_both_gram_sides(O, K, r, kind, seed):
    """Catches: a transposed Cholesky factor, L where L^-1 belongs, the smallest instead of the largest components."""
    rank, white, E = min(r, O, K), hgs_lora.Whitener(make_H(K, kind, seed)), make_W(O, K, "normal", seed).double()
    A, B = hgs_lora.whitened_svd(E, white.L_KK, rank)
    assert A.shape == (rank, K) and B.shape == (O, rank) and A.dtype == B.dtype == torch.float64
    best = reference(E, white.H_KK, rank)
    assert h_norm(B @ A - best, white.H_KK) <= 1e-10 * h_norm(E, white.H_KK)
    spectrum = hgs_lora.whitened_spectrum(E, white.L_KK)
    assert torch.isclose(
        spectrum[rank:].square().sum(), torch.tensor(h_norm(E - B @ A, white.H_KK)).double(), rtol=1e-6, atol=1e-12
    )
    assert (spectrum.diff() <= 0).all()


def gh_norm(E: torch.Tensor, G: torch.Tensor, H: torch.Tensor) -> float:
    """tr(G E H E^T): the norm of G (x) H without any factor."""
    return float((G.double() @ E.double() @ H * E.double()).sum())


@given(st.integers(1, 16), st.integers(1, 16), H_KINDS, H_KINDS, st.floats(1e-8, 1e8), st.integers(0, 999))
def test_closed_form_with_gradients_is_optimal_in_the_kronecker_norm(O, K, kind, g_kind, unit, seed):
    """Catches: R on the wrong side or transposed, R for R^-1, factors whose balance depends on the unit of G."""
    rank, E = (min(O, K) + 1) // 2, make_W(O, K, "normal", seed).double()
    G = unit * make_H(O, g_kind, seed + 7)
    white = hgs_lora.Whitener(make_H(K, kind, seed)).of_layer(G)
    damped = white.R_OO.mT @ white.R_OO
    assert not G.any() or torch.allclose(damped, hessian.damp(G, 0.01), rtol=1e-9, atol=1e-12 * unit)
    A, B = hgs_lora.whitened_svd(E, white.L_KK, rank, white.R_OO)
    error, spectrum = gh_norm(E - B @ A, damped, white.H_KK), hgs_lora.whitened_spectrum(E, white.L_KK, white.R_OO)
    total = gh_norm(E, damped, white.H_KK)
    assert abs(error - float(spectrum[rank:].square().sum())) <= 1e-7 * total + 1e-300
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        dA, dB = (1e-2 * torch.randn(m.shape, generator=generator).double() * m.abs().mean() for m in (A, B))
        assert gh_norm(E - (B + dB) @ (A + dA), damped, white.H_KK) >= error - 1e-9 * total
    other = hgs_lora.whitened_svd(E, white.L_KK, rank, 1e3 * white.R_OO)
    assert all(torch.isclose(new.norm(), old.norm(), rtol=1e-5) for new, old in zip(other, (A, B), strict=True))


@given(st.integers(2, 12), st.integers(2, 20), H_KINDS, st.integers(0, 999))
def test_kept_error_is_the_mean_squared_error_that_reaches_the_picture(O, K, kind, seed):
    """Catches: noise through BA instead of through Q, R forgotten on one of the two parts."""
    W, H, G = make_W(O, K, "normal", seed), make_H(K, kind, seed), make_H(O, "normal", seed + 3)
    noise = torch.rand(K, generator=torch.Generator().manual_seed(seed)).double()
    white = hgs_lora.Whitener(H).of_layer(G, noise)
    gw, A, B = hgs_lora.decompose(W, white, 1, "pissa", group=8)
    Q = quant.dequantize(gw).double()
    damped = white.R_OO.mT @ white.R_OO
    expected = gh_norm(W - Q - B.double() @ A.double(), damped, white.H_KK) + gh_norm(Q, damped, torch.diag(noise))
    assert abs(hgs_lora.split_error(W, white.L_KK, gw, A, B, white.R_OO, noise) - expected) <= 1e-9 * expected + 1e-12


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", ["normal", "outlier", "correlated"])
def test_hgs_with_gradients_and_noise_beats_every_sibling_in_that_norm(kind, rounding):
    """Catches a search that keeps the best by another error than the one it is asked for."""
    O, K, rank = 24, 32, 4
    W, G = make_W(O, K, "outlier", 1), make_H(O, "correlated", 5)
    H = make_H(K, kind, 1)
    white = hgs_lora.Whitener(H).of_layer(G, 0.01 * H.diagonal())
    error = {
        method: hgs_lora.split_error(W, white.L_KK, *split, white.R_OO, white.noise_K)
        for method in hgs_lora.METHODS
        for split in [hgs_lora.decompose(W, white, rank, method, group=8, rounding=rounding)]
    }
    assert error["hgs"] == min(error.values()) and error["hgs"] < 0.9 * min(error[m] for m in SIBLINGS)


def test_gradients_of_a_layer_without_influence_or_of_another_shape():
    """Catches a Cholesky factor of zero, and a G that belongs to another layer."""
    W, white = make_W(6, 8, "normal", 0), hgs_lora.Whitener(make_H(8, "normal", 0))
    dead = white.of_layer(torch.zeros(6, 6))
    assert hgs_lora.whitened_spectrum(W, dead.L_KK, dead.R_OO).max() < 1e-4 and white.R_OO is None
    assert all(torch.isfinite(part).all() for part in hgs_lora.decompose(W, dead, 2, group=8)[1:])
    with pytest.raises(ValueError, match="gradients must be 6 x 6"):
        hgs_lora.decompose(W, white.of_layer(torch.eye(5)), 2, group=8)
    with pytest.raises(ValueError, match="gradients contain inf"):
        white.of_layer(torch.full((6, 6), torch.inf))


@given(st.integers(2, 16), st.integers(2, 16), H_KINDS, st.integers(0, 999))
def test_factors_are_balanced_in_the_h_norm(O, K, kind, seed):
    """Catches: S on one side only, S^1/2 forgotten, unsorted components, strengths of other components."""
    rank, white = (min(O, K) + 1) // 2, hgs_lora.Whitener(make_H(K, kind, seed))
    E = make_W(O, K, "normal", seed)
    A, B = hgs_lora.whitened_svd(E, white.L_KK, rank)
    S = torch.linalg.svdvals(E.double() @ white.L_KK)[:rank]
    assert torch.allclose(B.mT @ B, torch.diag(S), atol=1e-6 * S[0])
    assert torch.allclose(A @ white.H_KK @ A.mT, torch.diag(S), atol=1e-6 * S[0])


@given(H_KINDS, st.integers(1, 20), st.integers(0, 99))
def test_whitener_factors_the_damped_hessian_with_a_lower_triangle(kind, K, seed):
    """Catches: L^T instead of L, damping left out of one of the two."""
    H = make_H(K, kind, seed)
    white = hgs_lora.Whitener(H)
    assert torch.equal(white.L_KK, white.L_KK.tril())
    assert torch.allclose(white.L_KK @ white.L_KK.mT, hessian.damp(H, 0.01), rtol=1e-9)
    assert torch.equal(white.H_KK, hessian.damp(H, 0.01))


@given(st.integers(2, 16), st.integers(2, 16), H_KINDS, st.integers(0, 999))
def test_hgs_correction_beats_50_random_rank_r_alternatives(O, K, kind, seed):
    """Catches: any suboptimal correction. The rivals have the best B for their random A, or are neighbours of the answer."""
    generator = torch.Generator().manual_seed(seed)
    white = hgs_lora.Whitener(make_H(K, kind, seed))
    H, W, rank = white.H_KK, make_W(O, K, "normal", seed).double(), max(1, min(O, K) // 3)
    E = W - quant.dequantize(quant.quantize_weight(W.float(), group=8))
    A, B = hgs_lora.whitened_svd(E, white.L_KK, rank)
    mine = h_norm(E - B @ A, H)
    for i in range(50):
        noise_A = torch.randn(rank, K, generator=generator, dtype=torch.float64)
        rival_A = noise_A if i % 2 else A + 10.0 ** -(i % 5) * A.norm() * noise_A
        rival_B = torch.linalg.lstsq(rival_A @ H @ rival_A.mT, rival_A @ H @ E.mT).solution.mT
        assert mine <= h_norm(E - rival_B @ rival_A, H) * (1 + 1e-9) + 1e-25


# ---------------------------------------------------------------- decomposition


@given(st.integers(4, 20), st.integers(4, 40), H_KINDS, W_KINDS, st.sampled_from(["rtn", "gptq"]), st.integers(0, 99))
def test_hgs_is_never_worse_than_qera_or_zero_on_any_input(O, K, kind, w_kind, rounding, seed):
    """Catches: a missing first candidate, keeping the last instead of the best."""
    W, H, rank = make_W(O, K, w_kind, seed), make_H(K, kind, seed), max(1, min(O, K) // 4)
    white = hgs_lora.Whitener(H)
    errors = {
        method: h_norm(W.double() - quant.dequantize(gw).double() - B.double() @ A.double(), white.H_KK)
        for method in ("hgs", "qera", "zero")
        for gw, A, B in [hgs_lora.decompose(W, white, rank, method, group=8, rounding=rounding)]
    }
    slack = 1e-6 * h_norm(W, white.H_KK)
    assert errors["hgs"] <= errors["qera"] + slack and errors["qera"] <= errors["zero"] + slack


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", ["normal", "outlier", "correlated", "offset"])
@pytest.mark.parametrize("shape", [(96, 64, 1), (64, 128, 1), (32, 16, 9)])
def test_hgs_keeps_less_error_than_every_sibling_at_equal_rank(shape, kind, rounding):
    """Catches: alternation switched off, the plain norm used for the start, GPTQ missing at the end."""
    O, I, taps = shape
    W, white = make_W(O, I * taps, "normal", 0), hgs_lora.Whitener(make_H(I * taps, kind, 0))
    options = dict(rank=8, group=32, taps=taps, rounding=rounding, generator=torch.Generator().manual_seed(0))
    errors = {
        m: hgs_lora.relative_error(W, white.L_KK, *hgs_lora.decompose(W, white, method=m, **options)) for m in hgs_lora.METHODS
    }
    assert set(errors) == {"hgs", *SIBLINGS}
    assert all(errors["hgs"] < errors[m] for m in SIBLINGS), errors


@given(st.integers(4, 16), st.integers(4, 40), H_KINDS, W_KINDS, st.sampled_from(["rtn", "gptq"]), st.integers(0, 99))
def test_alternation_never_increases_the_kept_error(O, K, kind, w_kind, rounding, seed):
    """Catches: keeping the last candidate, comparing with the wrong sign, storing the error of another candidate."""
    seen, true = [], hgs_lora.split_error

    def spy(*args):
        seen.append(true(*args))
        return seen[-1]

    W, white = make_W(O, K, w_kind, seed), hgs_lora.Whitener(make_H(K, kind, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hgs_lora, "split_error", spy)
        gw, A, B = hgs_lora.decompose(W, white, 3, "hgs", group=8, rounding=rounding, iters=6)
    assert len(seen) == 7
    assert true(W, white.L_KK, gw, A, B) <= min(seen) + 1e-6 * h_norm(W, white.H_KK)


def test_alternation_pays():
    """Catches: a loop that never accepts a candidate."""
    W, white = make_W(64, 64, "normal", 0), hgs_lora.Whitener(make_H(64, "correlated", 0))
    error = {n: hgs_lora.relative_error(W, white.L_KK, *hgs_lora.decompose(W, white, 8, group=32, iters=n)) for n in (0, 2, 8)}
    assert error[8] < error[2] < error[0]


@given(st.sampled_from(["loftq", "pissa", "principal", "zero", "qera"]), H_KINDS, st.integers(0, 99))
def test_closed_form_improves_the_correction_of_every_sibling(method, kind, seed):
    """Catches: a BA-step that is not optimal for the Q it is given."""
    W, white = make_W(24, 16, "normal", seed), hgs_lora.Whitener(make_H(16, kind, seed))
    gw, A, B = hgs_lora.decompose(W, white, 4, method, group=8)
    E = W.double() - quant.dequantize(gw).double()
    best_A, best_B = hgs_lora.whitened_svd(E, white.L_KK, 4)
    assert h_norm(E - best_B @ best_A, white.H_KK) <= h_norm(E - B.double() @ A.double(), white.H_KK) * (1 + 1e-6)


def test_siblings_are_what_their_papers_say():
    """Catches: methods swapped in the table, W - BA rounded where W is meant, B not zero for QLoRA."""
    W, white = make_W(16, 24, "normal", 0), hgs_lora.Whitener(make_H(24, "correlated", 0))

    def split(method, **options):
        gw, A, B = hgs_lora.decompose(W, white, 4, method, group=8, rounding="rtn", **options)
        return quant.dequantize(gw), B @ A

    def low_rank(E):
        U, S, Vt = torch.linalg.svd(E.double(), full_matrices=False)
        return ((U[:, :4] * S[:4]) @ Vt[:4]).float()

    def to_grid(E):
        return quant.dequantize(quant.quantize_weight(E, 8, 1, white.H_KK, "rtn"))

    close = dict(rtol=1e-4, atol=1e-5)
    Q, BA = split("zero")
    assert torch.equal(Q, to_grid(W)) and not BA.any()
    for method in ("pissa", "svdquant"):
        Q, BA = split(method)
        assert torch.allclose(BA, low_rank(W), **close) and (Q - to_grid(W - low_rank(W))).norm() <= 1e-3 * Q.norm()
    Q, BA = split("loftq", iters=1)
    assert torch.equal(Q, to_grid(W)) and torch.allclose(BA, low_rank(W - to_grid(W)), **close)
    Q, BA = split("qera")
    assert torch.equal(Q, to_grid(W)) and torch.allclose(BA, reference(W - Q, white.H_KK, 4).float(), **close)
    Q, BA = split("principal")
    assert torch.allclose(BA, reference(W, white.H_KK, 4).float(), **close)
    assert all(torch.equal(a, b) for a, b in zip(split("hgs", iters=0), split("qera"), strict=True))


@given(st.sampled_from(sorted(hgs_lora.METHODS)), st.sampled_from(["zero", "tiny"]))
def test_no_rank_is_born_dead_and_the_draw_is_reproducible(method, w_kind):
    """Catches: A = 0 and B = 0 together (their gradients vanish for ever), a global random stream."""
    W, H = make_W(8, 16, w_kind, 0), make_H(16, "normal", 0)
    draws = [hgs_lora.decompose(W, H, 4, method, group=8, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(draws[0][1:], draws[1][1:], strict=True))
    _, A, B = draws[0]
    assert A.any(1).all() and A.isfinite().all() and B.isfinite().all()
    if w_kind == "zero":
        assert not (B @ A).any()


def test_layers_that_share_an_input_share_one_factorization(monkeypatch):
    """Catches: a Cholesky per layer (minutes for a whole model), a cached factor of another padding."""
    calls, true = [], quant.inverse_factor
    monkeypatch.setattr(quant, "inverse_factor", lambda *a: calls.append(a[1:]) or true(*a))
    H, W = make_H(24, "correlated", 0), make_W(8, 24, "normal", 0)
    white = hgs_lora.Whitener(H)
    shared = [hgs_lora.decompose(W, white, 2, group=16) for _ in range(3)]
    assert calls == [(16, 1)]
    gw, A, B = hgs_lora.decompose(W, H, 2, group=16)
    assert torch.equal(gw.codes_OK, shared[0][0].codes_OK) and torch.equal(A, shared[0][1]) and torch.equal(B, shared[0][2])
    hgs_lora.decompose(W, white, 2, group=16, taps=2)
    assert calls[-1] == (16, 2)


def test_bad_requests_are_one_clear_sentence():
    """Catches: a silent cap of the rank, NaN factors from a NaN Hessian, a KeyError for an unknown method."""
    W, H = make_W(8, 16, "normal", 0), make_H(16, "normal", 0)
    for bad, message in [
        (dict(rank=9), r"rank 9 is outside 0\.\.8 of a 8 x 16 layer"),
        (dict(rank=-1), "rank -1"),
        (dict(rank=2, method="best"), "init method must be one of zero, pissa"),
        (dict(rank=2, rounding="up"), "rounding must be one of"),
        (dict(rank=2, group=24), "group size"),
    ]:
        with pytest.raises(ValueError, match=message):
            hgs_lora.decompose(W, H, **{"group": 8, **bad})
    with pytest.raises(ValueError, match="the Hessian contains inf or nan"):
        hgs_lora.decompose(W, H * float("nan"), 2, group=8)
    with pytest.raises(ValueError, match="weights contain inf or NaN"):
        hgs_lora.decompose(W / 0, H, 2, group=8)
    with pytest.raises(ValueError, match="must be 16 x 16"):
        hgs_lora.decompose(W, make_H(8, "normal", 0), 2, group=8)


# ---------------------------------------------------------------- layers


def make_layer(kind: str, seed: int = 0, rank: int = 3, smooth: bool = True, bias: bool = True, I: int = 20, O: int = 12):
    """(float layer, its packed twin with a trained-looking branch, an input batch)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Conv2d(I, O, 3, stride=2, padding=1, bias=bias) if kind == "conv" else nn.Linear(I, O, bias=bias)
    x = torch.randn(*((2, I, 7, 6) if kind == "conv" else (2, 5, I)), generator=generator)
    x.select(1 if kind == "conv" else 2, 0).mul_(15)
    w = layer.weight.detach()
    w_OK, taps = (quant.flatten_conv(w), 9) if kind == "conv" else (w, 1)
    lam = torch.rand(I, generator=generator) + 0.5 if smooth else None
    w_OK = w_OK * lam.repeat(taps) if smooth else w_OK
    gw, A, B = hgs_lora.decompose(w_OK, torch.eye(len(w_OK[0])), rank, group=16, taps=taps, rounding="rtn", iters=2)
    cls = {"linear": W4A4Linear, "conv": W4A4Conv2d, "w4a16": W4A16Linear}[kind]
    return layer, cls.from_float(layer, gw, A if rank else None, B if rank else None, lam, group_x=8), x


def deployed(kind: str, layer, x):
    """The kernel, called as a deployment would call it."""
    branch = (layer.lora_A, layer.lora_B) if layer.rank else (None, None)
    with torch.no_grad():
        if kind == "conv":
            args = (layer.inv_smooth, layer.group_x, (3, 3), (2, 2), (1, 1))
            return kernels.w4a4_conv2d(x, layer.packed, layer.bias, *branch, *args)
        if kind == "linear":
            return kernels.w4a4_linear(x, layer.packed, layer.bias, *branch, layer.inv_smooth, layer.group_x)
        x = x if layer.inv_smooth is None else (x.float() * layer.inv_smooth).to(x.dtype)
        return kernels.w4a16_linear(x, layer.packed, layer.bias, *branch)


KINDS = ["linear", "conv", "w4a16"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank,smooth,bias", [(3, True, True), (0, False, True), (3, False, False)])
def test_training_layer_equals_the_packed_layer_bit_for_bit(kind, dtype, rank, smooth, bias):
    """Catches: fake quantization in training, autocast inside the layer, a branch on another input, another dtype."""
    _, layer, x = make_layer(kind, rank=rank, smooth=smooth, bias=bias)
    x = x.to(dtype)
    expected = deployed(kind, layer, x)
    trained = layer.train()(x.clone().requires_grad_())
    assert trained.requires_grad and trained.dtype == expected.dtype == dtype and torch.equal(trained, expected)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x.clone().requires_grad_()), expected)


def surrogate(kind: str, layer, x, A, B):
    """float64 straight-through surrogate: the quantizer of activations replaced by the identity."""
    w = kernels.dequantize(layer.packed).double()
    inv = torch.ones(layer.channels).double() if layer.inv_smooth is None else layer.inv_smooth.double()
    weight = w + B @ A if layer.rank else w
    bias = None if layer.bias is None else layer.bias.double()
    if kind != "conv":
        return F.linear(x * inv, weight, bias)
    return F.conv2d(x * inv[:, None, None], weight.reshape(layer.out, 3, 3, -1).permute(0, 3, 1, 2), bias, 2, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank,smooth", [(3, True), (3, False), (0, True)])
def test_gradients_equal_finite_differences_of_the_straight_through_surrogate(kind, rank, smooth):
    """Catches: smoothing forgotten or applied once in dx, A and B swapped, a tap order, a missing branch in dx."""
    _, layer, x = make_layer(kind, rank=rank, smooth=smooth)
    generator = torch.Generator().manual_seed(9)
    x.requires_grad_()
    y = layer(x)
    R = torch.randn(y.shape, generator=generator)
    y.backward(R)
    point = {"x": x} | ({"A": layer.lora_A, "B": layer.lora_B} if rank else {})
    base = {k: v.detach().double() for k, v in point.items()}

    def loss(moved):
        return float((surrogate(kind, layer, moved["x"], moved.get("A"), moved.get("B")) * R).sum())

    for name, leaf in point.items():
        h = 1e-4  # the surrogate is linear in each argument: no truncation error
        for i in torch.randperm(leaf.numel(), generator=generator)[:40].tolist():
            step = torch.zeros(leaf.numel(), dtype=torch.float64)
            step[i] = h
            step = step.view(leaf.shape)
            slope = (loss(base | {name: base[name] + step}) - loss(base | {name: base[name] - step})) / (2 * h)
            assert abs(slope - leaf.grad.flatten()[i].item()) <= 1e-4 * leaf.grad.abs().max().item(), (name, i)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gradients_follow_the_float32_ones(kind):
    """Catches: LoRA gradients accumulated or returned in bfloat16, dx in float32."""
    _, layer, x = make_layer(kind)
    x16 = x.bfloat16()
    grads = []
    for value in (x16.float(), x16):
        value = value.clone().requires_grad_()
        layer.zero_grad()
        y = layer(value)
        y.backward(torch.ones_like(y))
        assert value.grad.dtype == value.dtype and layer.lora_A.grad.dtype == torch.float32
        grads.append([value.grad.float(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
    for exact, rounded in zip(*grads, strict=True):
        assert (exact - rounded).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_only_lora_and_the_input_receive_gradients(kind):
    """Catches: a bias or scale that trains, work for a gradient that nobody asked for."""
    _, layer, x = make_layer(kind)
    assert [name for name, _ in layer.named_parameters()] == ["lora_A", "lora_B"]
    assert all(p.dtype == torch.float32 for p in layer.parameters())
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    layer(x).sum().backward()  # the input needs no gradient
    assert layer.lora_A.grad.any() and layer.lora_B.grad.any()
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_through_safetensors_restores_the_layer_bit_for_bit(kind):
    """Catches: state outside of buffers (scale, smoothing), non-contiguous tensors, an anchor in the deployed checkpoint."""
    layer, packed, x = make_layer(kind)
    state = packed.state_dict()
    assert set(state) == {"codes_OP", "mult_P", "scale_O", "inv_smooth", "bias", "lora_A", "lora_B"}
    assert state["codes_OP"].dtype == state["mult_P"].dtype == torch.uint8
    twin = type(packed)(layer, rank=3, group=16, group_x=8, smooth=True)
    twin.load_state_dict(load(save(state)))
    assert torch.equal(twin(x), packed(x))


@pytest.mark.parametrize("kind", KINDS)
def test_casting_a_model_moves_the_layer_but_keeps_its_numbers(kind):
    """Catches: model.to(bfloat16) rounding scales, smoothing or LoRA."""
    _, layer, x = make_layer(kind)
    before, expected = copy.deepcopy(layer.state_dict()), layer(x.bfloat16())
    nn.Sequential(layer).to(torch.bfloat16)
    assert all(torch.equal(v, layer.state_dict()[k]) and v.dtype == layer.state_dict()[k].dtype for k, v in before.items())
    assert torch.equal(layer(x.bfloat16()), expected)
    assert copy.deepcopy(layer).to("meta").scale_O.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_anchor_equals_the_initial_layer_after_the_student_moved(kind):
    """Catches: an anchor that aliases the parameters, a flag that stays on, gradients into the student through the anchor."""
    _, layer, x = make_layer(kind)
    model = nn.Sequential(layer)
    initial = model(x).detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    moved = model(x).detach()
    assert not torch.equal(moved, initial)
    with anchored(model):
        assert torch.equal(model(x), initial) and not model(x).requires_grad
        with anchored(model):
            pass
        assert torch.equal(model(x), initial)
    assert torch.equal(model(x), moved)
    with pytest.raises(KeyError), anchored(model):
        raise KeyError
    assert torch.equal(model(x), moved)


def test_anchor_state_round_trips_and_its_absence_is_named():
    """Catches: resuming with the moved A, B as anchor, a deployed model silently its own anchor."""
    _, layer, x = make_layer("linear")
    model = nn.ModuleDict({"a": layer, "plain": nn.Linear(2, 2), "flat": make_layer("linear", rank=0)[1]})
    with anchored(model):
        initial = layer(x)
    state = load(save(anchor_state(model)))
    assert set(state) == {"a.anchor_A", "a.anchor_B"}
    layer.set_anchor()
    layer.anchor_A.zero_()
    load_anchor_state(model, state)
    with anchored(model):
        assert torch.equal(layer(x), initial)
    with pytest.raises(ValueError, match="does not fit layer 'a'"):
        load_anchor_state(model, {})
    layer.anchor_A = None
    with pytest.raises(ValueError, match="layer 'a' has no anchor"), anchored(model):
        pass


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_merged_layer_is_the_requantized_sum_without_a_branch(kind):
    """Catches: A B for B A, merging into the float weight, a branch that survives, the original changed."""
    _, layer, x = make_layer(kind, rank=3)
    before = layer(x).detach()
    merged = merged_layer(layer)
    target = kernels.dequantize(layer.packed) + layer.lora_B.detach() @ layer.lora_A.detach()
    expected = quant.quantize_weight(target, layer.group, layer.taps)
    assert torch.equal(kernels.dequantize(merged.packed), quant.dequantize(expected))
    assert merged.rank == 0 and merged.lora_A is None and not list(merged.parameters())
    assert set(merged.state_dict()) == {"codes_OP", "mult_P", "scale_O", "inv_smooth", "bias"}
    assert torch.equal(layer(x), before)
    x64 = x.double()
    exact = surrogate(kind, layer, x64, layer.lora_A.detach().double(), layer.lora_B.detach().double())
    branch_error, merged_error = ((y.double() - exact).norm() / exact.norm() for y in (before, merged(x)))
    assert branch_error < merged_error < 0.3, "merging costs rounding error, but remains the same function"


FACTORS = st.sampled_from(["normal", "outlier", "zero", "constant", "tiny", "zero component"])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), FACTORS, st.integers(0, 999))
@example(O=3, K=5, rank=0, kind="normal", seed=0)
@example(O=1, K=1, rank=2, kind="zero component", seed=0)
def test_lora_in_8_bits_moves_no_entry_by_more_than_half_a_step(O, K, rank, kind, seed):
    """Catches: one scale for all ranks, scales of the other axis, codes that wrap at 128, NaN from a component of zeros."""
    A, B = make_W(rank, K, kind, seed) * 3e-3, make_W(O, rank, kind, seed + 7)
    if rank and kind == "zero component":
        A[0], B[:, -1] = 0, 0
    qA, qB, scale = quantize_lora(A, B)
    assert qA.dtype == qB.dtype == torch.int8 and scale.dtype == torch.float32
    assert (qA.shape, qB.shape, scale.shape) == ((rank, K), (O, rank), (2, rank))
    A8, B8 = dequantize_lora(qA, qB, scale)
    assert A8.shape == A.shape and B8.shape == B.shape and A8.dtype == B8.dtype == torch.float32
    a_r, b_r = scale.double()
    slack = 1 + 1e-5  # float32 division by the scale
    assert ((A8 - A).abs() <= a_r[:, None] / 2 * slack).all() and ((B8 - B).abs() <= b_r / 2 * slack).all()
    if rank:
        assert torch.allclose(a_r, A.double().abs().amax(1) / 127) and torch.allclose(b_r, B.double().abs().amax(0) / 127)
        assert qA.abs().max() <= 127 and qB.abs().max() <= 127
        moved = (B8.double()[:, :, None] * A8.double() - B.double()[:, :, None] * A.double()).abs()
        assert (moved <= (a_r * b_r * 127.25 * slack)[None, :, None]).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), FACTORS, st.integers(0, 999))
@example(O=1, K=2, rank=3, kind="normal", seed=0)
def test_mixing_keeps_the_product_and_the_shapes(O, K, rank, kind, seed):
    """Catches: a rotation on one side only, components lost where the rank is larger than the layer."""
    A, B = make_W(rank, K, kind, seed), make_W(O, rank, kind, seed + 7)
    mixed_A, mixed_B = mix_lora(A, B)
    assert (mixed_A.shape, mixed_B.shape) == (A.shape, B.shape) and mixed_A.dtype == mixed_B.dtype == torch.float32
    product = B.double() @ A.double()
    assert (mixed_B.double() @ mixed_A.double() - product).norm() <= 1e-5 * product.norm() + 1e-30


def test_mixing_lowers_the_error_of_8_bits_where_components_are_unequal():
    """Catches: an identity for a rotation, strong components left in one row."""
    torch.manual_seed(0)
    strength = torch.logspace(0, -2, 16)
    A, B = strength[:, None].sqrt() * torch.randn(16, 300), torch.randn(200, 16) * strength.sqrt()

    def error(A1, B1):
        A8, B8 = dequantize_lora(*quantize_lora(A1, B1))
        return (B8 @ A8 - B @ A).norm()

    expected = strength.sum() / (16**0.5 * strength.norm())  # of the module docstring
    assert error(*mix_lora(A, B)) < 1.2 * expected * error(A, B)


def test_lora_that_is_no_number_is_refused_in_8_bits():
    """Catches: int8 codes of NaN, which are ordinary numbers."""
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="LoRA factors contain inf or NaN"):
            quantize_lora(A * bad, B)
        with pytest.raises(ValueError, match="LoRA factors contain inf or NaN"):
            quantize_lora(A, B * bad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank,smooth,bias", [(3, True, True), (0, False, False)])
def test_deployed_form_is_the_kernel_with_factors_in_8_bits(kind, rank, smooth, bias):
    """Catches: scales of weights that change in their byte, factors in another dtype than x, a Parameter that stays behind."""
    layer, packed, x = make_layer(kind, rank=rank, smooth=smooth, bias=bias)
    stored = copy.deepcopy(packed)
    stored.store_8bit()
    stored.store_8bit()  # once is enough
    reference = copy.deepcopy(packed).requires_grad_(False)
    if rank:
        A8, B8 = dequantize_lora(*quantize_lora(*mix_lora(packed.lora_A, packed.lora_B)))
        reference.lora_A.data, reference.lora_B.data = A8, B8
        assert not torch.equal(A8, packed.lora_A)
    for dtype in (torch.float32, torch.bfloat16):
        for model in (stored, copy.deepcopy(stored).to(torch.bfloat16)):  # casts nothing
            assert torch.equal(model(x.to(dtype)), deployed(kind, reference, x.to(dtype)))
    assert not list(stored.parameters())
    state = stored.state_dict()
    lora = {"lora_A", "lora_B", "lora_scale"} if rank else set()
    optional = ({"inv_smooth"} if smooth else set()) | ({"bias"} if bias else set())
    assert set(state) == {"codes_OP", "mult_P", "scale_O"} | lora | optional
    assert state["scale_O"].dtype == torch.uint8 and all(state[k].dtype == torch.int8 for k in lora - {"lora_scale"})
    twin = type(stored)(layer, rank, 16, 8, smooth, lora_bits=8)
    twin.load_state_dict(load(save(state)))
    assert torch.equal(twin(x), stored(x))
    on_meta = type(stored)(copy.deepcopy(layer).to("meta"), rank, 16, 8, smooth, lora_bits=8).state_dict()
    assert {k: (v.shape, v.dtype) for k, v in on_meta.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_deployed_form_has_a_gradient_for_its_input_alone(kind):
    """Catches: a backward without the branch, with int8 factors, or one that asks for their gradients."""
    _, packed, x = make_layer(kind)
    stored = copy.deepcopy(packed)
    store_8bit(nn.Sequential(stored))
    packed.lora_A.data, packed.lora_B.data = stored.factors()
    for layer in (packed, stored):
        assert not layer(x).requires_grad or layer is packed
    grads = []
    for layer in (packed.requires_grad_(False), stored):
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert grads[0].any() and torch.equal(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_deployed_form_merges_and_anchors_like_the_layer_with_its_factors(kind):
    """Catches: a merge of int8 codes as if they were numbers, a float scale in a merged deployed layer, an anchor in int8."""
    _, packed, x = make_layer(kind)
    stored = copy.deepcopy(packed)
    stored.store_8bit()
    packed.lora_A.data, packed.lora_B.data = stored.factors()
    merged, expected = merged_layer(stored), merged_layer(packed)
    assert torch.equal(merged(x), expected(x)) and merged.lora_A is None and merged.lora_scale is None
    assert merged.scale_O.dtype == torch.uint8 and torch.equal(kernels.unpack_scales(merged.scale_O), expected.scale_O)
    with pytest.raises(ValueError, match="has no anchor"), anchored(stored):
        pass
    packed.set_anchor()
    load_anchor_state(stored, anchor_state(packed))
    with anchored(stored):
        assert torch.equal(stored(x), packed(x))
    stored.set_anchor()
    assert stored.anchor_A.dtype == torch.float32 and torch.equal(stored.anchor_A, packed.anchor_A)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("rank", [16, 64])
def test_8_bits_of_lora_add_less_than_2_percent_to_the_error_of_4_bits(rank, smooth):
    """Catches: a scale for all ranks (weak components lost), 7 bits, a scale that is rounded. Rank 64 carries most of this W."""
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 192), torch.randn(512, 256)
    lam = torch.rand(256) + 0.5 if smooth else None
    w, x1 = (layer.weight.detach(), x) if lam is None else (layer.weight.detach() * lam, x / lam)
    gw, A, B = hgs_lora.decompose(w, x1.mT @ x1 / len(x), rank)
    packed = W4A4Linear.from_float(layer, gw, A, B, lam)
    with torch.no_grad():
        four = packed(x)
        packed.store_8bit()
        eight, exact = packed(x), layer(x)
    assert not torch.equal(eight, four)
    assert (eight - exact).norm() < 1.02 * (four - exact).norm()


def test_native_backend_runs_the_deployed_form():
    """Catches: bytes of scales or int8 factors handed to C++."""
    for kind in KINDS:
        _, layer, x = make_layer(kind)
        layer.store_8bit()
        eager = layer(x)
        set_backend(layer, "native")
        assert torch.allclose(layer(x), eager, rtol=1e-5, atol=1e-5)


def test_replace_finds_nested_and_numbered_modules_and_names_a_missing_one():
    """Catches: setattr with dots in the name, a typo that adds a new module."""
    model = nn.Sequential(nn.ModuleDict({"to_q": nn.Linear(20, 12)}), nn.Linear(12, 2))
    _, layer, _ = make_layer("linear")
    replace_layer(model, "0.to_q", layer)
    assert model[0]["to_q"] is layer and [name for name, _ in packed_layers(model)] == ["0.to_q"]
    with pytest.raises(ValueError, match=r"'0\.to_k' is not in the model"):
        replace_layer(model, "0.to_k", layer)
    assert "to_k" not in model[0]


def test_constructors_refuse_what_the_kernels_cannot_do():
    """Catches: silent drop of dilation or groups, a rank above the layer, a grid weight of another layer."""
    for conv in (nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, dilation=2), nn.Conv2d(8, 8, 3, padding="same")):
        with pytest.raises(ValueError, match="W4A4Conv2d needs"):
            W4A4Conv2d(conv, 2, 8)
    with pytest.raises(ValueError, match="rank 5"):
        W4A4Linear(nn.Linear(8, 4), 5, 8)
    with pytest.raises(ValueError, match="group size"):
        W4A4Linear(nn.Linear(8, 4), 2, 8, group_x=12)
    with pytest.raises(ValueError, match="8 or 16 bits, not 4"):
        W4A4Linear(nn.Linear(8, 4), 2, 8, lora_bits=4)
    with pytest.raises(ValueError, match="8 channels and 1 taps"):
        W4A4Linear.from_float(nn.Linear(16, 4), quant.quantize_weight(torch.randn(4, 8), 8))


def test_set_backend_selects_the_kernel_in_training_and_inference(monkeypatch):
    """Catches: a switch that reaches only one of the two paths, or not every layer."""
    used = []

    def other(fn):
        def call(*args):
            used.append(fn.__name__)
            return fn(*args)

        return call

    monkeypatch.setitem(kernels.BACKENDS, "other", other)
    for kind in KINDS:
        _, layer, x = make_layer(kind)
        eager = layer(x)
        set_backend(nn.Sequential(layer), "other")
        assert torch.equal(layer(x), eager)
        with torch.no_grad():
            layer(x)
        set_backend(layer, "eager")
        layer(x)
    assert used == ["w4a4_linear"] * 2 + ["w4a4_conv2d"] * 2 + ["w4a16_linear"] * 2


@pytest.mark.slow
def test_compiled_layer_equals_eager_bit_for_bit():
    """Catches: a kernel call that torch.compile cannot trace through the layer, or evaluates differently."""
    _, layer, x = make_layer("linear")
    eager = layer(x)
    set_backend(layer, "compile")
    assert torch.equal(layer(x), eager)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_kept_error_is_the_measured_output_error_of_the_calibration_set(kind):
    """Catches: the Hessian, the flattened weight and the convolution disagreeing about the order of K; undamped H here."""
    layer, _, x = make_layer(kind, bias=False)
    stats = hessian.collect(layer, [""], lambda set_bin: [layer(half) for half in x.split(1)])[""]
    w_OK, taps = (quant.flatten_conv(layer.weight), 9) if kind == "conv" else (layer.weight, 1)
    gw, A, B = hgs_lora.decompose(w_OK.detach(), stats.H_KK, 4, group=16, taps=taps)
    kept = quant.dequantize(gw) + B @ A
    kept = kept if kind == "linear" else quant.unflatten_conv(kept, (3, 3))
    with torch.no_grad():
        difference = layer(x).double() - (F.linear(x, kept) if kind == "linear" else F.conv2d(x, kept, None, 2, 1)).double()
    measured = difference.square().sum() / stats.count
    values, vectors = torch.linalg.eigh(stats.H_KK.double())
    root = vectors * values.clamp_min(0).sqrt()  # few rows: H is singular, and any square root gives the same norm
    assert hgs_lora.split_error(w_OK.detach(), root, gw, A, B) == pytest.approx(float(measured), rel=1e-3)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_hgs_layer_is_closer_to_the_float_layer_than_zero_init(kind):
    """Catches: any slip between decompose and forward (smoothing not folded, branch on the wrong input)."""
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 32, 3, padding=1) if kind == "conv" else nn.Linear(64, 64)
    x = torch.randn(8, 32, 8, 8) if kind == "conv" else torch.randn(256, 64) @ torch.randn(64, 64)
    x[:, :2] *= 20
    stats = hessian.collect(layer, [""], lambda set_bin: layer(x))[""]
    w_OK, taps = (quant.flatten_conv(layer.weight), 9) if kind == "conv" else (layer.weight, 1)
    cls, error = (W4A4Conv2d if kind == "conv" else W4A4Linear), {}
    for method in ("zero", "hgs"):
        for alpha in (None, 0.5):
            lam, w, H = None, w_OK.detach(), stats.H_KK
            if alpha:
                lam = quant.smoothing_factors(stats.xmax_I, w.unflatten(1, (taps, -1)).abs().amax((0, 1)), alpha)
                w, H = w * lam.repeat(taps), hessian.smooth(H, lam)
            gw, A, B = hgs_lora.decompose(w, H, 8, method, group=32, taps=taps)
            packed = cls.from_float(layer, gw, A, B, lam)
            with torch.no_grad():
                error[method, alpha] = float((packed(x) - layer(x)).norm() / layer(x).norm())
    assert error["hgs", None] < 0.85 * error["zero", None] and error["hgs", 0.5] < 0.7 * error["zero", 0.5], error
