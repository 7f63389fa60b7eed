"""Attention in 8 bits: the kernel against its definition in PyTorch, both against softmax in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from backends import attention, cpu
from models.denoiser import random_denoiser

if not cpu.is_available():
    pytest.skip("backends/attention.cpp needs an x86 CPU with AVX2 and a C++ compiler", allow_module_level=True)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    return torch.softmax(logits if mask is None else logits + mask.double(), -1) @ v.double()


def draw(kind: str, B: int, H: int, T: int, S: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, n, D, generator=gen) for n in (T, S, S))
    if kind == "one huge key":
        k[:, :, S // 2] *= 50
    elif kind == "constant keys":
        k = k[:, :, :1].expand_as(k).clone()
    elif kind == "offsets":
        k, v = k + 10 * torch.randn(D, generator=gen), v + 10 * torch.randn(D, generator=gen)
    elif kind == "sharp":
        q = 8 * q
    elif kind == "zeros":
        q, k, v = 0 * q, 0 * k, 0 * v
    elif kind == "outlier channel":
        k[..., 0], v[..., 0] = 20 * k[..., 0], 20 * v[..., 0]
    return q, k, v


KINDS = {  # the largest error against softmax, over the root mean square of v without its mean: twice what 7 bits have
    "normal": 0.014, "one huge key": 0.15, "constant keys": 0.006, "offsets": 0.014, "sharp": 0.13, "zeros": 0.0,
    "outlier channel": 0.06,
}  # fmt: skip


@settings(max_examples=15)
@given(
    kind=st.sampled_from(list(KINDS)),
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    T=st.integers(1, 130),
    S=st.integers(1, 300),
    D=st.sampled_from((8, 16, 40, 64, 72, 80, 128, 160)),
    masked=st.booleans(),
)
@example(kind="normal", B=1, H=1, T=49, S=65, D=40, masked=True)
@example(kind="one huge key", B=1, H=1, T=3, S=4608, D=64, masked=False)
def test_the_kernel_is_its_definition_and_near_softmax(kind, B, H, T, S, D, masked):
    """Catches an offset that is not taken off, scales of other keys or channels, padding that is seen, a block that is not
    weighted, columns of a narrow head, strides that are ignored."""
    q, k, v = draw(kind, B, H, T, S, D)
    mask = torch.zeros(B, 1, 1, S).masked_fill_(torch.rand(B, 1, 1, S) < 0.3, -math.inf) if masked else None
    if masked:
        mask[..., 0] = 0.5
    o = attention.attention(q, k, v, mask)
    defined = attention.eager(q, k, v, mask, D**-0.5)
    assert o.shape == q.shape and o.dtype == q.dtype
    wanted, size = exact(q, k, v, mask), (v - v.mean(2, keepdim=True)).norm() / math.sqrt(v.numel())
    off = (o - defined).norm() / math.sqrt(o.numel())
    assert off <= 0.01 * size + 1e-5 * defined.abs().amax(), "another rounding of some codes of p is all that differs"
    if not masked:  # the means are then those of keys that are seen
        assert (o - wanted).norm() / math.sqrt(o.numel()) <= KINDS[kind] * size + 1e-5 * wanted.abs().amax()


@pytest.mark.parametrize("kind", ["normal", "offsets", "outlier channel"])
def test_the_error_is_some_percent_of_what_attention_adds_to_the_mean_value(kind):
    """Catches codes of too few bits (3% with the 7 of AVX2), and outlier channels that are not shared (7%; without lambda 26%)."""
    q, k, v = draw(kind, 1, 2, 200, 1024, 64)
    wanted = exact(q, k, v)
    error = (attention.attention(q, k, v) - wanted).norm() / (wanted - v.mean(2, keepdim=True)).norm()
    assert error < (0.1 if kind == "outlier channel" else 0.04)


def test_flat_tails_keep_their_mass():
    """Catches one range of codes for a whole row: of a key whose logit is 7 above those of 4,607 others these would leave nothing,
    and they are four fifths of the sum."""
    q, k, v = draw("normal", 1, 1, 6, 4608, 64)
    q, k = q[:, :, :1].expand_as(q), 0.01 * (k - k.mean(2, keepdim=True))
    k[:, :, 0] = 8 * 7 * q[:, :, 0] / q[:, :, 0].square().sum()
    wanted, ours = exact(q, k, v), attention.attention(q, k, v)
    assert (ours - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_add_up_to_one(dtype):
    """Catches a sum of unrounded weights: equal values must come out as they are."""
    q, k, _ = (t.to(dtype) for t in draw("sharp", 1, 2, 70, 333, 64))
    v = torch.randn(64).to(dtype).expand_as(k).contiguous()
    assert torch.allclose(
        attention.attention(q, k, v).float(), v[:, :, :1].float().expand(q.shape), rtol=1e-2 if dtype == torch.bfloat16 else 2e-3
    )


def test_rows_depend_on_nothing_else():
    """Catches sums in another order with other batches, other threads, or another place of a row."""
    q, k, v = draw("normal", 2, 3, 131, 300, 40)
    whole = attention.attention(q, k, v)
    assert torch.equal(whole[1:, :, 50:97], attention.attention(q[1:, :, 50:97], k[1:], v[1:]))
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(whole, attention.attention(q, k, v))
    finally:
        torch.set_num_threads(threads)
    apart = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))  # as diffusers makes them
    assert torch.equal(whole, attention.attention(*apart))
    order = torch.randperm(300)
    moved = attention.attention(q, k[:, :, order], v[:, :, order])  # blocks of other keys
    assert (moved - whole).norm() < 0.05 * (whole - v.mean(2, keepdim=True)).norm()


def test_masks_hide_keys_and_what_is_no_number_is_seen():
    """Catches a mask of one row for all, a hidden key that is counted, and a NaN that rounding swallows."""
    q, k, v = draw("normal", 2, 2, 60, 300, 64)
    seen = torch.rand(2, 1, 60, 300) < 0.5
    seen[..., 7] = True
    added = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)
    o = attention.attention(q, k, v, seen)
    assert torch.equal(o, attention.attention(q, k, v, added))
    assert (o - exact(q, k, v, added)).norm() < 0.05 * exact(q, k, v, added).norm()
    seen[1, :, 3] = False
    hidden = attention.attention(q, k, v, seen).isnan().all(-1)
    assert hidden[1, :, 3].all() and hidden.sum() == 2
    for index, tensor in enumerate((q, k, v)):
        given = [q.clone(), k.clone(), v.clone()]
        given[index][0, 1, 5, 3] = math.inf if index else math.nan
        wrong = attention.attention(*given).isnan()
        assert wrong[0, 1, 5].all() and wrong.sum() == (64 if tensor is q else 60 * 64)


def test_gradients_are_those_of_torch_s_own():
    """Catches a scale or mask that the backward pass forgets."""
    q, k, v = (t.requires_grad_() for t in draw("normal", 1, 2, 40, 300, 64))
    mask = torch.zeros(1, 1, 1, 300).masked_fill_(torch.arange(300) > 200, -math.inf)
    grad = torch.randn(q.shape)
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, mask, scale=0.3), (q, k, v), grad)
    given = torch.autograd.grad(attention.attention(q, k, v, mask, 0.3), (q, k, v), grad)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(given, wanted, strict=True))


@pytest.mark.parametrize("name", ["tiny", "tiny-flux"])
@torch.no_grad()
def test_a_network_of_diffusers_uses_it(name, monkeypatch):
    """Catches calls that pass it by, and those that it cannot answer."""
    monkeypatch.setattr(attention, "FEWEST_KEYS", 32)
    denoiser, asked, answer = random_denoiser(name), [], attention.attention
    monkeypatch.setattr(attention, "attention", lambda *args: asked.append(args[0].shape) or answer(*args))
    if name == "tiny":
        denoiser.net.set_attn_processor(AttnProcessor2_0())
    x, t = torch.randn(2, *denoiser.latent), torch.full((2,), 0.5)
    cond = denoiser.encode(["a red ring", "a blue square"])
    before = denoiser(x, t, 0 * t, cond)
    attention.in_8_bits(denoiser.net)
    after = denoiser(x, t, 0 * t, cond)
    assert asked and 0 < (after - before).norm() < 0.05 * before.norm()
    monkeypatch.setattr(attention, "FEWEST_KEYS", 10**6)
    assert torch.equal(denoiser(x, t, 0 * t, cond), before)


@pytest.mark.parametrize(
    "change", [{"is_causal": True}, {"dropout_p": 0.5}, {"attn_mask": torch.zeros(300, requires_grad=True)}, {"enable_gqa": True}]
)
def test_what_it_does_not_compute_is_left_to_torch(change):
    q, k, v = draw("normal", 1, 2, 300, 300, 8)
    assert attention.fits(q, k, v) and not attention.fits(q, k, v, **change)
    assert (
        not attention.fits(q, k, v[..., :4])
        and not attention.fits(q.double(), k, v)
        and not attention.fits(q, k[:, :, :9], v[:, :, :9])
    )
