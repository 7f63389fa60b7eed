"""backends/gpu.py against kernels.py, its oracle: codes, scales, unpacking and sums bit for bit, the epilogue within rounding.
Where there is no GPU the kernels, those of backends/gptq_gpu.py too, run in Triton's interpreter, which has no bfloat16 products
and no Gluon. Docstrings name the mutation that a test catches."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from test_kernels import UNIT, gen, grid_weight, operands

import kernels
import layers
import quant
from backends import gpu

triton = pytest.importorskip("triton")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
linear, conv2d = (functools.partial(fn, w4a4=gpu.w4a4) for fn in (kernels.native_linear, kernels.native_conv2d))
CASES = [  # rows, inputs, outputs, rank, group, group_x, dtype of x and of what else is a float
    (5, 100, 40, 1, 64, 16, torch.float16, torch.float32),
    (1, 64, 24, 0, 64, 8, torch.bfloat16, torch.bfloat16),
    (34, 200, 70, 3, 8, 128, torch.float32, torch.bfloat16),
    (33, 136, 70, None, 8, 32, torch.float32, torch.float32),
    (9, 136, 8, 130, 128, 16, torch.float16, torch.float16),
    (7, 100, 40, 3, 8, quant.EIGHT_BITS, torch.float16, torch.float32),
]  # fmt: skip
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1)),
    ((1, 1), (1, 1), (0, 0)),
    ((1, 1), (2, 1), (0, 1)),
    ((2, 3), (1, 2), (0, 2)),
]


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    if INTERPRET:
        monkeypatch.setattr(gpu, "PARTS", 4)  # it runs programs one after the other
    elif not torch.cuda.is_available() and request.function not in WITHOUT:
        pytest.skip("the interpreter has a process of its own")


@pytest.mark.skipif(INTERPRET or torch.cuda.is_available(), reason="this is it, or a GPU is here")
@pytest.mark.slow
@pytest.mark.parametrize("which", ["not slow", "slow"])
def test_all_of_these_in_the_interpreter(which):
    """Triton is told to interpret before it is imported, and for good: in another process."""
    if numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0" and triton.__version__ < "3.8":
        pytest.skip("the interpreter of this Triton needs a NumPy before 2.4")
    files = [__file__, Path(__file__).with_name("test_backends_gptq_gpu.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, *map(str, files)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def packed(*args):
    """The weight for eager and for us."""
    pw = kernels.pack(grid_weight(*args))
    return pw, type(pw)(*on_device(*pw[:3]), *pw[3:])


def layer(O, I, taps, rank, dtype, seed=0):
    """bias, A, B, inv_smooth; A and B are None where rank is."""
    b, A, B, inv = operands(O, I, taps, rank, seed)
    return b.to(dtype), *((None, None) if rank is None else (A.to(dtype), B.to(dtype))), inv


def assert_close(ours, eager, size, dtype):
    """Roundings of a branch as large as `size` to dtype, of the sum to dtype, and of float32 sums."""
    assert ours.dtype == eager.dtype and ours.shape == eager.shape
    ours, eager = ours.double().cpu(), eager.double()
    tol = 3 * UNIT[dtype] * (eager.abs() + size) + 2e-5 * (1 + size)
    assert ((ours - eager).abs() <= tol).all(), ((ours - eager).abs() - tol).max()


def branch_size(low, B):
    return 0 if B is None else low.double().abs() @ B.double().abs().t()


def intermediates(monkeypatch, call):
    """y, and what its layer wrote on the way: {"X", "s", "W8", ..}."""
    seen = {}

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                seen.update(zip(inner.arg_names, args, strict=False))
                return inner[grid](*args, **kwargs)

            return launch

    inner = gpu.prepare
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "prepare", Spy())
        return call(), seen


@pytest.mark.parametrize("size", [1.0, 1e-29, 1e-42, 3e37])
@pytest.mark.parametrize(
    "I,group_x,dtype",
    [(100, 16, torch.float32), (64, 8, torch.bfloat16), (208, 128, torch.float16), (112, quant.EIGHT_BITS, torch.float32)],
)
def test_codes_scales_and_weights_equal_eager_bit_for_bit(monkeypatch, size, I, group_x, dtype):
    """Catches rounding half away from zero, division by a reciprocal, a multiply-add, a straddling group, a floor that is lost, a
    rotation that adds in another order, a shift of channels beyond the last."""
    x = torch.randn(7, I, generator=gen(1)) * size
    x[0], x[1] = 0, (torch.arange(I) % 16 - 8) / 2  # ties
    x, (pw, ours) = x.to(dtype), packed(10, I, 8)
    inv = torch.rand(I, generator=gen(2)) + 0.5
    for inv_smooth, shift, rotated in ((None, None, False), (inv, None, False), (None, inv * size, I % quant.TURN == 0)):
        z = x.float() if inv_smooth is None else x.float() * inv_smooth
        z = z if shift is None else z - shift
        X_TK, s_T = quant.activation_int8(quant.rotate(z) if rotated else z, group_x)
        args = x.to(DEVICE), ours, None, None, None, *on_device(inv_smooth), group_x, *on_device(shift), rotated
        _, seen = intermediates(monkeypatch, lambda args=args: linear(*args))
        good = s_T.isfinite()
        C, width = seen["C"], min(X_TK.shape[1], seen["C"])
        X, W8 = seen["X"].view(-1, C).cpu(), seen["W8"].view(-1, C).cpu()
        assert torch.equal(X[good, :width], X_TK[good, :width]) and not X[good, width:].any()
        assert torch.equal(seen["s"].cpu().view(torch.int32)[good], s_T.view(torch.int32)[good])
        assert torch.equal(seen["s"].cpu().isnan(), s_T.isnan())
        W_OK = kernels.weight_int8(pw)
        assert torch.equal(W8[:, : W_OK.shape[1]], W_OK)


@pytest.mark.parametrize("group", quant.GROUPS)
@pytest.mark.parametrize("taps", [1, 9])
def test_unpacking_equals_eager_bit_for_bit(monkeypatch, group, taps):
    """Catches a half-group in the wrong nibble (an odd number of groups in a row), taps that are not padded."""
    pw, ours = packed(11, 40, group, taps)
    x, kernel = torch.ones(1, 40, 3, 3, device=DEVICE), (3, 3) if taps == 9 else (1, 1)
    _, seen = intermediates(monkeypatch, lambda: conv2d(x, ours, kernel_size=kernel, padding=(0, 0)))
    W8 = seen["W8"].view(11, taps, -1).cpu()
    W_OK = kernels.weight_int8(pw).view(11, taps, -1)
    assert torch.equal(W8[..., : W_OK.shape[2]], W_OK)


@pytest.mark.parametrize("T,I,O,rank,group,group_x,dtype,other", CASES)
def test_linear_equals_eager(T, I, O, rank, group, group_x, dtype, other):
    """Catches swapped scales, a mask of rows, columns or ranks that is off, a branch on the quantized or unsmoothed input."""
    pw, ours = packed(O, I, group)
    b, A, B, inv = layer(O, I, 1, rank, other)
    x = (torch.randn(T, I, generator=gen(3)) * 2).to(dtype)
    for bias, inv_smooth in ((b, inv), (None, None)):
        y = linear(*on_device(x), ours, *on_device(bias, A, B, inv_smooth), group_x)
        low = 0 if A is None else (x.float() * (1 if inv_smooth is None else inv)) @ A.float().t()
        assert_close(y, kernels.w4a4_linear(x, pw, bias, A, B, inv_smooth, group_x), branch_size(low, B), dtype)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    "I,rank,group_x,dtype,memory_format",
    [
        (40, 3, 16, torch.float16, torch.contiguous_format),
        (40, 0, quant.EIGHT_BITS, torch.float32, torch.contiguous_format),
        pytest.param(64, 0, 16, torch.bfloat16, torch.channels_last, marks=pytest.mark.slow),
        pytest.param(70, 16, 16, torch.float32, torch.channels_last, marks=pytest.mark.slow),
    ],
)
def test_conv_equals_eager(geometry, I, rank, group_x, dtype, memory_format):
    """Catches a window that is not cut at the edges, swapped strides, a scale of the neighbouring sample, taps in another order."""
    O, taps = 24, geometry[0][0] * geometry[0][1]
    pw, ours = packed(O, I, 16, taps)
    b, A, B, inv = layer(O, I, taps, rank, torch.float32)
    x = torch.randn(2, I, 5, 4, generator=gen(4)) * torch.tensor([1.0, 30.0])[:, None, None, None]
    x = x.to(dtype, memory_format=memory_format)
    rotated = I % quant.TURN == 0
    y = conv2d(*on_device(x), ours, *on_device(b, A, B, inv), group_x, *geometry, rotated)
    assert y.is_contiguous(memory_format=torch.channels_last)
    size = 0
    if rank:
        A_rIhw = A.unflatten(1, (*geometry[0], -1)).permute(0, 3, 1, 2).abs()
        low = torch.nn.functional.conv2d((x.float() * inv[:, None, None]).abs(), A_rIhw, None, *geometry[1:])
        size = branch_size(low.permute(0, 2, 3, 1), B).permute(0, 3, 1, 2)
    assert_close(y, kernels.w4a4_conv2d(x, pw, b, A, B, inv, group_x, *geometry, rotated), size, dtype)


def test_sums_are_exact_at_the_extremes():
    """Catches sums in float32 or 16 bits: 4,096 products of 5,000 on average, of every last bit."""
    I = 4096
    codes = torch.randint(4, 8, (16, I), generator=gen(0)).to(torch.int8)
    pw = kernels.pack(quant.GridWeight(codes, torch.full((16, I // 64), 15, dtype=torch.uint8), torch.ones(16), I, 1, 64))
    x = torch.rand(3, I, generator=gen(1)) + 1
    ours = type(pw)(*on_device(*pw[:3]), *pw[3:])
    assert torch.equal(linear(*on_device(x), ours).cpu(), kernels.w4a4_linear(x, pw))


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_bad_inputs_make_their_row_or_sample_nan_and_no_other(bad):
    """Catches a maximum that loses a NaN, inf that becomes a large number, poison that spreads."""
    x = torch.randn(4, 40, 3, 3, generator=gen(0))
    x[2, 7, 1, 1] = bad
    y = linear(*on_device(x[..., 1, 1]), packed(8, 40, 16)[1])
    assert y.isnan().all(1).tolist() == [False, False, True, False] and y.isnan().sum() == 8
    y = conv2d(*on_device(x), packed(8, 40, 16, 9)[1])
    assert y.isnan().flatten(1).all(1).tolist() == [False, False, True, False] and y.isnan().sum() == 72


def test_zero_rows_give_the_bias_and_no_rows_nothing():
    """Catches 0 / 0 of an empty row, an empty grid, a division by zero rows, leading dimensions that are lost."""
    _, ours = packed(24, 40, 16)
    (b,) = on_device(torch.randn(24, generator=gen(0)))
    assert torch.equal(linear(torch.zeros(5, 40, device=DEVICE), ours, b), b.expand(5, 24))
    for shape in ((0, 40), (2, 0, 40), (40,)):
        assert linear(torch.zeros(shape, device=DEVICE), ours, b).shape == (*shape[:-1], 24)
    pictures = torch.zeros(0, 40, 3, 3, device=DEVICE)
    assert conv2d(pictures, packed(24, 40, 16, 9)[1]).shape == (0, 24, 3, 3)


def test_tensors_on_a_cpu_do_not_reach_it(monkeypatch):
    """Catches a backend that asks for the machine's GPU and not for the tensor's."""
    monkeypatch.setattr(gpu, "_run", None)
    pw, x = kernels.pack(grid_weight(24, 40, 16)), torch.randn(3, 40, generator=gen(0))
    assert torch.equal(kernels.native(kernels.w4a16_linear)(x, pw), kernels.w4a16_linear(x, pw))
    assert torch.equal(kernels.native(kernels.w4a4_linear)(x, pw), kernels.w4a4_linear(x, pw))


def test_a_row_does_not_depend_on_its_batch(monkeypatch):
    """Catches a tile or a sum that follows the number of rows: many sum K in one program, few in several. (The interpreter's BLAS
    sums the last rows of a tile in another order: no slice moves them to its beginning.)"""
    _, ours = packed(24, 1100, 64)
    args = on_device(*layer(24, 1100, 1, 16, torch.float32))
    (x,) = on_device(torch.randn(40, 1100, generator=gen(7)).half())
    monkeypatch.setattr(gpu, "FEW", 1)
    whole = linear(x, ours, *args)
    for rows in (slice(0, 1), slice(3, 38), slice(32, 40)):
        assert torch.equal(linear(x[rows], ours, *args), whole[rows])


@pytest.mark.slow
def test_a_traced_function_takes_it_without_a_break_and_for_all_batches():
    """Catches an operator without a shape rule, with a wrong one, or with a type that its schema does not know."""
    (_, ours), (_, taps) = packed(24, 40, 16), packed(40, 40, 16, 9)
    args, rest = on_device(*layer(24, 40, 1, 4, torch.float32)), on_device(*layer(40, 40, 9, 4, torch.float32))

    def net(x):
        y = conv2d(x.relu(), taps, *rest, 16, (3, 3), (2, 1), (1, 1))
        return linear(y.permute(0, 2, 3, 1), ours, *args) + 1

    fast = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for N in (2, 3):
            (x,) = on_device(torch.randn(N, 40, 5, 4, generator=gen(N)))
            assert torch.equal(fast(x), net(x))


def compiled(kernel, source_class, known, types, aligned, processor, warps):
    """A kernel as it is launched with these constants and types of pointers; other arguments are int32."""
    from triton.backends.compiler import GPUTarget

    if INTERPRET:
        pytest.skip("the interpreter replaces the compiler")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in known else types.get(name, "i32") for name in names}
    constants = {(names.index(name),): value for name, value in known.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*") or n in aligned}
    source = source_class(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", processor, 32), options={"num_warps": warps})


@pytest.mark.parametrize("RP,taps,bk", [(0, 1, 128), (32, 1, 128), (64, 9, 64), pytest.param(128, 9, 128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tile", gpu.TILES)
def test_the_product_compiles_for_hopper(tile, RP, taps, bk):
    """Without a GPU. Catches what this Triton's Gluon does not know any more, a product without int8 tensor cores, too large a
    tile."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    rows, columns, warps, stages = tile
    bw = 32 if taps > 1 else rows
    known = dict(BM=rows, BN=columns, BK=bk, STAGES=stages, WARPS=warps, RP=RP, TAPS=taps, KW=3 if taps > 1 else 1, BW=bw)
    known |= {} if RP else {"low": None, "B": None}
    four, two = (gl.NVMMASharedLayout(bk, 8, rank) for rank in (4, 2))
    types = {"X": f"tensordesc<i8[1, {rows // bw}, {bw}, {bk}],{four!r}>", "W8": f"tensordesc<i8[{columns}, {bk}],{two!r}>"}
    types |= dict(s="*fp32", scale="*fp32", bias="*bf16", low="*fp32", B="*bf16", Y="*bf16")
    made = compiled(gpu.product_hopper, GluonASTSource, known, types, ("N", "rank"), 90, warps)
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in made.asm["ptx"] and "cp.async.bulk.tensor" in made.asm["ptx"]
    assert made.metadata.shared <= 227 << 10


@pytest.mark.parametrize("RP,group_x", [(0, 16), (32, 16), (512, 16), (1024, 16), (0, quant.EIGHT_BITS)])
def test_the_first_launch_compiles_for_small_gpus_at_any_rank(RP, group_x):
    """Without a GPU. Catches a branch of a high rank, which QRA may give, that only large GPUs have the memory for."""
    from triton.compiler import ASTSource

    known = dict(KW=1, TAPS=1, HALF=32, GROUP=group_x, BLOCK=2048, ROWS=2, RP=RP, LOW_ROWS=gpu.LOW_ROWS)
    known |= dict(LOW_BLOCK=128 if RP <= 64 else 32, CHUNK=gpu.CHUNK, PARTS=0, HALVES=128, inv_smooth=None, partial=None)
    known |= dict(shift=None, ROTATED=True)
    known |= {} if RP else {"A": None, "low": None}
    types = dict(x="*bf16", codes="*u8", mult="*u8", A="*fp32", X="*i8", s="*fp32", W8="*i8", low="*fp32")
    made = compiled(gpu.prepare, ASTSource, known, types, ("I", "Cp", "C"), 89, 4)
    assert made.metadata.shared <= 99 << 10


# ------------------------------------------------------------------------------------------------ on a GPU


BIG = [(300, 640, 328, 32), (1, 1280, 1280, 3), (1030, 320, 96, 0), (257, 1280, 2560, 100)]


def big_layer(I, O, rank, dtype, taps=1):
    pw, ours = packed(O, I, 64, taps)
    ops = layer(O, I, taps, rank, torch.float32)
    return pw, ours, ops, on_device(*ops)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T,I,O,rank", BIG)
def test_both_tiles_give_the_same_bits_and_equal_eager(monkeypatch, T, I, O, rank, dtype):
    """Catches a tile that reads or writes beside itself, a race of the copies with the products, a sum in another order."""
    pw, ours, ops, args = big_layer(I, O, rank, dtype)
    x = torch.randn(T, I, generator=gen(5)).to(dtype)
    results = []
    for tile in gpu.TILES:
        monkeypatch.setattr(gpu, "TILES", [tile] * 2)
        results += [linear(x.cuda(), ours, *args) for _ in range(3)]
    low = (x.float() * ops[3]) @ ops[1].t() if rank else 0
    assert_close(results[0], kernels.w4a4_linear(x, pw, *ops), branch_size(low, ops[2]), dtype)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.gpu
@pytest.mark.parametrize("N,I,O", [(2, 320, 320), (1, 640, 1280)])
@pytest.mark.parametrize("side,stride", [((16, 16), (1, 1)), ((32, 32), (2, 2)), ((18, 13), (1, 1)), ((5, 40), (1, 1))])
def test_both_tiles_of_a_convolution_give_the_same_bits_and_equal_eager(monkeypatch, N, I, O, side, stride):
    """Catches what only K-blocks of 64 and of 128 in several taps show, a tile over the edge, one that cannot stride."""
    pw, ours, ops, args = big_layer(I, O, 32, torch.bfloat16, 9)
    x, results = torch.randn(N, I, *side, generator=gen(6)).bfloat16(), []
    for tile in gpu.TILES:
        monkeypatch.setattr(gpu, "TILES", [tile] * 2)
        results.append(conv2d(x.cuda(), ours, *args, 16, (3, 3), stride, (1, 1)))
    y, eager = results[0].cpu().float(), kernels.w4a4_conv2d(x, pw, *ops, 16, (3, 3), stride, (1, 1)).float()
    assert (y - eager).norm() < 4e-3 * eager.norm() and (y - eager).abs().max() < 0.05 * eager.abs().max()
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.gpu
def test_compiled_functions_take_it_in_one_graph_for_all_batches():
    """Catches an operator without a shape rule, a graph break, a graph for each size."""
    _, ours, _, args = big_layer(320, 320, 16, torch.bfloat16)
    _, taps, _, rest = big_layer(320, 320, 16, torch.bfloat16, 9)
    linear, conv = (kernels.native(fn) for fn in (kernels.w4a4_linear, kernels.w4a4_conv2d))

    def net(x):
        y = conv(x.relu(), taps, *rest)
        return linear(y.permute(0, 2, 3, 1), ours, *args) + 1

    fast, before = torch.compile(net, fullgraph=True, dynamic=True), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        for N in (2, 3, 5):
            x = torch.randn(N, 320, 8, 8, generator=gen(N)).bfloat16().cuda().contiguous(memory_format=torch.channels_last)
            assert torch.equal(fast(x), net(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.gpu
def test_layers_train_with_it():
    """Catches an operator that grad mode refuses."""

    dense = torch.nn.Linear(64, 32)
    made = layers.W4A4Linear.from_float(dense, quant.quantize_weight(dense.weight), torch.randn(4, 64), torch.randn(32, 4)).cuda()
    made.backend, x = "native", torch.randn(9, 64, device="cuda", requires_grad=True)
    made(x).square().sum().backward()
    assert x.grad.isfinite().all() and made.lora_A.grad.isfinite().all() and made.lora_B.grad.any()


# of the tests above those that need neither a GPU nor the interpreter
WITHOUT = (
    test_all_of_these_in_the_interpreter,
    test_the_product_compiles_for_hopper,
    test_the_first_launch_compiles_for_small_gpus_at_any_rank,
)
