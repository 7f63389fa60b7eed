"""Mutation check: breaks central lines one at a time in a copy of the code and shows that a test fails for each.

python tests/mutate.py              all of them: 15 minutes on two cores; Triton has to be there for those of backends_gpu
python tests/mutate.py PHRASE       those whose first column holds the phrase
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
JOBS = 2  # at a time, each with its share of the cores
MUTATIONS = [  # what breaks, file, line as it is, line as broken, test file that must notice
    ("sign of the zero point", "kernels.py", ".to(torch.int8) - ZERO", ".to(torch.int8) + ZERO", "kernels"),
    ("nibble order", "kernels.py", "return low | high << 4", "return high | low << 4", "kernels"),
    ("more columns than are exact", "kernels.py", "EXACT = 1024", "EXACT = 4096", "kernels"),
    ("tap order of im2col", "kernels.py", "windows.permute(0, 1, 2, 4, 5, 3)", "windows.permute(0, 1, 2, 5, 4, 3)", "kernels"),
    ("windows that overlap", "kernels.py", "windows.contiguous().view", "windows.view", "kernels"),
    ("nibbles of the C++ kernel", "backends/cpu.cpp", "k = nibbles<0>(p, table", "k = nibbles<4>(p, table", "kernels"),
    ("stale scratch memory", "backends/cpu.cpp", "branch && (border || Cl > s.I)", "false", "kernels"),
    ("attention's offset", "backends/attention.cpp", "minus_j -= OFFSET * codes", "minus_j -= codes", "attention"),
    ("attention's keys beyond the last", "backends/attention.cpp", "j < n ? 0 : -INFINITY", "0", "attention"),
    ("attention's blocks that weigh the same", "backends/attention.cpp", "+= factor * codes", "+= codes", "attention"),
    ("attention's sums after a larger logit", "backends/attention.cpp", "z.Dv + d] *= less", "z.Dv + d] *= 1", "attention"),
    ("attention's outlier channels", "backends/attention.cpp", "square_k[d] > 0 ?", "square_k[d] < 0 ?", "attention"),
    ("attention's scales of other channels", "backends/attention.cpp", "block * z.Dv + (r0 + j)", "block * z.Dv + j", "attention"),
    ("attention that swallows NaN", "backends/attention.cpp", "poison = keys.mean_v[z.Dv] + 0", "poison = 0", "attention"),
    ("order of a GPU's nibbles", "backends/gpu.py", "u >> high * 4", "u >> 4 - high * 4", "backends_gpu"),
    ("a GPU's branch of the last part", "backends/gpu.py", "a += tl.load(low", "a = tl.load(low", "backends_gpu"),
    ("a GPU's GPTQ feeds back the error", "backends/gptq_gpu.py", "w -= u[:, :, None]", "w += u[:, :, None]", "backends_gpu"),
    ("sums of other pixels", "backends/cpu.cpp", "+ tap / s.kw * s.Wp() + tap % s.kw]", "+ tap]", "kernels"),
    ("range of 8-bit activations", "quant.py", "EIGHT_BITS else (-128, 127, 1)", "EIGHT_BITS else (-127, 127, 1)", "quant"),
    ("range of the C++ kernel's 8 bits", "backends/cpu.cpp", "EIGHT_BITS{-128, 127, 1,", "EIGHT_BITS{-128, 119, 1,", "kernels"),
    ("border of 8-bit pictures", "backends/cpu.cpp", "grid.bytes, grid.offset);", "grid.bytes, 8);", "kernels"),
    ("range of a GPU's 8 bits", "backends/gpu.py", "(-128, 127) if EIGHT", "(-128, 119) if EIGHT", "backends_gpu"),
    ("no noise of 8 bits", "hessian.py", "if group_x is not None:", "if group_x:", "hessian"),
    ("noise of 4 bits beside 8", "student.py", "group_x={name: layer.rounded_in for", "group_x={name: cfg.group_x for", "student"),
    ("W4A16 in 8 bits", "student.py", 'layer.kind == "w4a4" and cfg.bits_x == 8', "cfg.bits_x == 8", "student"),
    ("name of the format", "quant.py", "{group == EIGHT_BITS for", "{group != EIGHT_BITS for", "layers"),
    ("transposed GPTQ factor", "quant.py", "H = H.flip(0, 1)  # V", "H = H.flip(0, 1).t()", "quant"),
    ("jumps that are backward passes", "train.py", '"jumps": calls // len(parts)', '"jumps": calls', "faults"),
    ("what updates took in the state", "run/state.py", "lines_of(map(reproducible, self.rows))", "lines_of(self.rows)", "train"),
    ("seconds that are lost", "run/state.py", "measured if measured.items() >= row.items() else row", "row", "faults"),
    ("tensors of another update", "run/files.py", "if version() == before else", "if True else", "faults"),
    ("another update's student", "models/checkpoint.py", "params[name].data.copy_(trained)", "pass", "train"),
    ("pictures of other noises", "sample.py", "self.network.latent, self.cfg.seed)", "self.network.latent, 0 + 1)", "train"),
    ("a shift that decoding forgets", "models/encoders.py", "latents.float().cpu() - shift", "latents.float().cpu()", "real"),
    ("one row overwrites its weight", "quant.py", "clone(memory_format=torch.contiguous_format)", "contiguous()", "quant"),
    ("rotation of a neighbouring block", "quant.py", "x.unflatten(-1, (-1, 2, half))", "x.unflatten(-1, (2, -1, half))", "quant"),
    ("constant of the quantized weight", "layers.py", "constant_O - (B_Or @", "constant_O - 0 * (B_Or @", "layers"),
    ("branch of rotated inputs", "layers.py", "if rotated and A_rK is not None:", "if False:", "layers"),
    ("shift of a merged branch", "layers.py", "merged.bias += B_Or.float()", "merged.bias -= B_Or.float()", "layers"),
    ("order of a rotation's sums", "backends/cpu.cpp", "v[i] * sign2", "v[i] * sign1", "kernels"),
    ("statistics of unchanged inputs", "hessian.py", "self.inputs.get(name, lambda x: x)(x_NI)", "x_NI", "hessian"),
    ("clip range one step short", "quant.py", "MMAX, ZERO = -8, 7, 16, 8", "MMAX, ZERO = -8, 6, 16, 8", "quant"),
    ("tap order of the Hessian", "hessian.py", "permute(0, 1, 2, 4, 5, 3)", "permute(0, 1, 2, 5, 4, 3)", "hessian"),
    ("gradients averaged over rows", "hessian.py", "g_NHWO.reshape(-1, g_N", "len(g) ** -0.25 * g_NHWO.reshape(-1, g_N", "hessian"),
    ("a G that is not mirrored", "hessian.py", "mirror((total_OO / count).float())", "(total_OO / count).float()", "hessian"),
    ("an H that is not mirrored", "hessian.py", "            mirror(self.H_KK)", "            pass", "hessian"),
    ("a diagonal of sums", "hessian.py", "rows_TK.float().square().sum(0", "rows_TK.float().sum(0", "hessian"),
    ("strips above the diagonal", "hessian.py", "total_KK[begin:end, :begin].mT", "total_KK[:begin, begin:end]", "hessian"),
    ("two wide Hessians at a time", "hessian.py", "self.one_in_main_memory = True", "pass", "hessian"),
    ("statistics of one process only", "hessian.py", "dist.is_initialized() and dist.get_world_size() > 1", "False", "hessian"),
    ("one step of subspace iteration", "hgs_lora.py", "for _ in range(4):", "for _ in range(1):", "hgs_lora"),
    ("transposed Cholesky factor", "hgs_lora.py", "cholesky(self.H_KK)", "cholesky(self.H_KK).mT", "hgs_lora"),
    ("gradients' factor transposed", "hgs_lora.py", "cholesky(self.G_OO).mT", "cholesky(self.G_OO)", "hgs_lora"),
    ("gradients of a spectrum transposed", "hgs_lora.py", "cholesky(G_OO).mT", "cholesky(G_OO)", "hgs_lora"),
    ("a tall spectrum without gradients", "hgs_lora.py", "(M if G_OO is None else G_OO.to(dtype) @ M)", "M", "hgs_lora"),
    ("activation noise of the branch", "hgs_lora.py", "[Q_OK * noise_K.sqrt()]", "[E_OK * noise_K.sqrt()]", "hgs_lora"),
    ("a cost of nothing", "hgs_lora.py", "return LEFT * H_K + ", "return 0 * H_K + ", "hgs_lora"),
    ("factors for each copy of a Whitener", "hgs_lora.py", "new = copy.copy(self)", "new = Whitener(self.H_KK)", "hgs_lora"),
    ("slices for the ranks", "student.py", "self.slices(diagonals=True)", "self.slices()", "student"),
    ("anchor is the moving LoRA", "layers.py", "if self.use_anchor", "if not self.use_anchor", "layers"),
    ("budget counts O only", "qra.py", "None else r * sum(shape)", "None else r * shape[0]", "qra"),
    ("a fraction of a rank rounded up", "qra.py", "fromkeys(shapes, int(rank))", "fromkeys(shapes, math.ceil(rank))", "qra"),
    ("a least rank by default", "qra.py", "def bounds(rank, granule=1, least=0,", "def bounds(rank, granule=1, least=1,", "qra"),
    ("16 bits that pay for ranks given back", "qra.py", "there.price - here.price, there", "there.price, there", "qra"),
    ("no exchange after greedy", "qra.py", "gap <= 1e-12 * found", "gap <= found", "qra"),
    ("choices that could win left out", "qra.py", "if its <= gap_or_less", "if 2 * its <= gap_or_less", "qra"),
    ("states that win less kept", "qra.py", "gain_S <= torch.cat", "gain_S >= torch.cat", "qra"),
    ("an exchange above the budget", "qra.py", "~beaten & (price_S <= room)", "~beaten & (price_S >= 0)", "qra"),
    ("16 bits win one rank", "qra.py", '{"spectrum": [known["whole"]]}', '{"spectrum": known["spectrum"][:1]}', "qra"),
    ("16 bits beside 4", "qra.py", "16 * O * K - (4 + 4 / group) * O * K", "12 * O * K - (4 + 4 / group) * O * K", "qra"),
    ("16 bits weighed without gradients", "student.py", "weighed(layer, cfg), dtype", "weighed(layer, cfg)[:2], dtype", "student"),
    ("factors of 8 bits priced as 16", "student.py", "lora_bits=cfg.lora_bits, group", "group", "student"),
    ("16-bit layers are placed as packed", "layers.py", 'if row["kind"] == "16bit":', "if False:", "student"),
    ("W4A16 counted as W4A4", "models/checkpoint.py", '"w4a16" if isinstance(layer, W4A16Linear) else', "", "student"),
    ("branches do no work", "models/checkpoint.py", "rows[name] * r * (O + K)", "0", "student"),
    ("layers that are not let go of", "student.py", "layer.let_go()", "pass", "student"),
    ("factors that are not shared", "student.py", "if device not in shared:", "if True:", "student"),
    ("mean of the unsmoothed input", "student.py", "mean_I if lambda_I is None else mean_I / lambda_I", "mean_I", "student"),
    ("one price for all layers", "qra.py", "shape, prices[name], *limits", "shape, prices[min(prices)], *limits", "qra"),
    ("the fewer of ranks at one price", "qra.py", "price(shape, more) > price(shape, r)]", "True]", "qra"),
    ("8 bits for the cheapest inputs", "student.py", "key=together.get, reverse=True)", "key=together.get)", "student"),
    ("8 bits that ranks do not know of", "student.py", "self.everything = None  # their N", "pass  # their N", "student"),
    ("the exponent that costs most", "student.py", "least = min(changes", "least = max(changes", "student"),
    ("weights that smoothing makes uneven", "student.py", "((z + w) / energy", "(z / energy", "student"),
    ("rows of one place", "hessian.py", "(seen + n) * 40503 % 2**16", "0 * n", "hessian"),
    ("factors of smoothing with a mantissa", "quant.py", "lam, 1.0).log2().round()", "lam, 1.0).log2()", "quant"),
    ("memory without smoothing", "models/memory.py", '(size["inv_smooth"] + size["shift"]) // 2', "0", "memory"),
    ("statistics of the unsmoothed input", "student.py", "x.float() * (1 / self.smooth_I)", "x.float()", "student"),
    ("lambda of one layer of several", "student.py", "for layer in group]).amax(0)", "for layer in group[:1]]).amax(0)", "student"),
    ("lambda of the input before it is centred", "student.py", "middle_I - seen.low_I)", "-seen.low_I)", "student"),
    ("extremes of the last batch", "hessian.py", "torch.maximum(most.get(name, extremes), extremes)", "extremes", "hessian"),
    ("phase edge off by one", "tdpt.py", "(edges >= t[:, None]).sum(1)", "(edges > t[:, None]).sum(1)", "tdpt"),
    ("T' belongs to the late stage", "tdpt.py", "stage_B += t < split_time", "stage_B += t <= split_time", "tdpt"),
    ("guidance convention", "tdpt.py", "return u + w * (c - u)", "return c + w * (c - u)", "tdpt"),
    ("resume forgets the moments", "run/state.py", ".to(p.device, copy=True)", ".mul(0)", "train"),
    ("an update of half of its pictures", "train.py", "        if given_up:\n", "        if False:\n", "train"),
    ("one share for all processes", "run/common.py", "slice(process_index(), None", "slice(0, None", "train"),
    ("share of a micro-batch", "train.py", "(len(rows) * process_count() / cfg.batch)", "1.0", "real"),
    ("damaged state becomes the previous", "run/state.py", "self.good = name == self.path.name", "self.good = True", "faults"),
    ("checksum skips the tail", "run/files.py", "while chunk := file.read(CHUNK):", "while chunk := b'':", "faults"),
    ("weights that changed", "run/files.py", 'b"".join(ends)', 'b""', "real"),
    ("layers of one size taken for alike", "models/memory.py", "geometry, shapes)), self.now", "geometry)), self.now", "memory"),
    ("inputs counted as activations", "models/memory.py", "(*tensors_of(net), *tree_leaves(given))", "tensors_of(net)", "memory"),
    ("choices without the start", "models/plan.py", "teacher_of(cfg), some)", "teacher_of(cfg))", "real"),
    ("guidance of the student", "models/denoiser.py", 'about.get("guidance", denoiser.guidance)', "denoiser.guidance", "real"),
    ("guidance of a network without it", "models/family.py", "classifier_free=False", "classifier_free=True", "pretrained"),
    ("first step of the pipeline", "models/family.py", 'timestep_spacing="trailing"', 'timestep_spacing="leading"', "pipeline"),
    ("one family for another", "models/family.py", 'config.get("addition_embed_type") is None and', "", "pretrained"),
    ("outliers without an inverse", "models/outliers.py", "p[:, : len(scale)] /= scale", "p[:, : len(scale)] *= 1", "outliers"),
    ("outliers that B does not know", "models/outliers.py", ', getattr(producer.layer, "lora_B", None)', "", "outliers"),
    ("outliers that A does not know", "models/outliers.py", ', getattr(reader, "lora_A", None)', ", None", "outliers"),
    ("the 1 of 1 + scale", "models/outliers.py", "part + 1, plus=1.0", "part + 1", "outliers"),
    ("outliers of the other branch", "models/outliers.py", "modulated(norm, part=3)", "modulated(norm)", "outliers"),
    ("outliers of pooled text", "models/outliers.py", "net.add_embedding.linear_1, *(", "*(", "outliers"),
    ("values of cross-attention", "models/outliers.py", "[Producer(second.to_v)]", "[Producer(first.to_v)]", "outliers"),
    ("keys forgotten", "models/outliers.py", "[first.to_q, first.to_k, first.to_v]", "[first.to_q, first.to_v]", "outliers"),
    ("captions' part of the attention", "models/outliers.py", ", Producer(attn.add_v_proj)]", "]", "outliers"),
    ("a single block's MLP", "models/outliers.py", "attn.to_v, block.proj_mlp]", "attn.to_v]", "outliers"),
    ("scales that round", "models/outliers.py", "(32.0, 64.0)", "(33.0, 65.0)", "outliers"),
    ("no outlier in narrow tensors", "models/outliers.py", "math.ceil(SHARE * n)", "math.floor(SHARE * n)", "outliers"),
    ("a flag without effect", "models/pretrained.py", "if cfg.outliers:", "if False:", "outliers"),
    ("scale and alpha of a LoRA file", "models/pretrained.py", "B.float() * scale", "B.float()", "real"),
    ("alpha of a LoRA's metadata", "models/pretrained.py", ', "metadata": metadata}', "}", "pretrained"),
    ("codes taken for weights", "models/headers.py", "scaled or (len(shape) > 1 and", "scaled or (False and", "pretrained"),
    ("scales of weights unheard of", "models/headers.py", '(last == "scale" and', "(False and", "pretrained"),
    ("magnitudes that are filtered out", "models/headers.py", "if other := next((key", "if False and next((key", "pretrained"),
    ("the first of several LoRAs", "models/headers.py", "if len(names) == 1 or LORA_NAME in names:", "if names:", "pretrained"),
    ("half of a LoRA unheard of", "models/pretrained.py", "    if texts:\n", "    if False:\n", "pretrained"),
    ("layers of a LoRA unheard of", "models/pretrained.py", "if 0 < len(factors) < asked:", "if False:", "pretrained"),
    ("a mark of zero noise unheard of", "models/pretrained.py", '"ztsnr": (', '"zero": (', "pretrained"),
    ("one class's defaults for another's", "models/pretrained.py", "return defaults | {", "return {", "pretrained"),
    ("flow matching taken for eps", "models/family.py", 'if "shift" in scheduler or', "if", "pretrained"),
    ("betas taken for flow matching", "models/family.py", 'if "beta_schedule" in scheduler:', "if False:", "pretrained"),
    ("a VAE without its mean", "models/family.py", "z = (z - mean) / std", "z = z / std", "pretrained"),
    ("a VAE without its shift", "models/family.py", "(z - (config.shift_factor or 0.0))", "z", "pretrained"),
    ("an input for guidance that is not filled", "models/family.py", 'config.get("time_cond_proj_dim")', "None", "pretrained"),
    ("features that are not centred", "scores.py", "(x_ND - mean_D) /", "x_ND /", "scores"),
    ("intervals of one standard deviation", "scores.py", "half = 1.96 * found.std().item()", "half = found.std().item()", "scores"),
    ("prompts that are not paired", "scores.py", '"cm", i, j))', '"cm", i[:-1], j))', "scores"),
    ("code inside of weights", "scores.py", 'torch.load(file, "cpu", weights_only=True)', "pass", "scores"),
    ("the base's guidance", "evaluate.py", "family.compare_guidance if name", "1.0 if name", "scores"),
    ("one noise for all pictures", "evaluate.py", "args.seed + i, config", "args.seed, config", "scores"),
    ("a 16-bit model without its LoRA", "models/pipeline.py", "fuse(pretrained.open_cm(", "(pretrained._open_network(", "scores"),
    ("shards of all processes by each", "data/cache.py", "range(process_index(), sys.maxsize", "range(0, sys.maxsize", "cache"),
    ("keys end at the first dot", "data/sources.py", "os.path.splitext(member.name)", 'member.name.split(".")', "data"),
    ("letters that were replaced", "data/sources.py", "= decode(value)", '= value.decode(errors="replace")', "data"),
    ("lines end where Python's do", "data/sources.py", '.split("\\n") if line.strip()]', ".splitlines() if line.strip()]", "data"),
    ("copies of editors", "data/sources.py", 'part.startswith(".") or part in OF_OTHERS', "part in OF_OTHERS", "data"),
    ("linked folders left out", "data/sources.py", "followlinks=True", "followlinks=False", "data"),
    ("captions without a picture unheard of", "data/sources.py", "yield from ((text, ", "yield from () and ((text, ", "data"),
    ("pictures in structs unheard of", "data/sources.py", 'isinstance(kind, dict) and "bytes" in kind]', "False]", "data"),
    ("a cache of the few that are left", "data/cache.py", "used < len(self.skipped) or not used", "not used", "cache"),
    ("a scene of another size", "data/scenes.py", "(2 * side) + 0.5) / fine", "(2 * side) + 0.5) / 2", "data"),
    ("latents of another size", "models/tiny.py", "return math.isqrt(channels // 3)", "return 2", "models"),
    ("intervals without seeds", "benchmarks/ablate.py", "half = math.hypot(mean - low, s)", "half = mean - low", "ablate"),
    ("a scale for each group of a row", "benchmarks/variants.py", "if scale_O is not last[0]:", "if True:", "ablate"),
    ("float scales that are whole", "benchmarks/variants.py", "own_OG).half()", "own_OG).ceil()", "ablate"),
    ("windows of bytes", "benchmarks/variants.py", "*geometry).view(X_NHWC.dtype)", "*geometry)", "ablate"),
    ("text taken for a modulation", "benchmarks/variants.py", ' and layer != "context_embedder"', "", "ablate"),
    ("the teacher with its LoRA", "benchmarks/ablate.py", "set_submodule(name, lora.layer)", "get_submodule(name)", "ablate"),
    ("the start of other code", "benchmarks/ablate.py", '"code": code(), ', "", "ablate"),
    ("errors summed over seeds", "benchmarks/ablate.py", "sum(at_edge) / len(runs)", "sum(at_edge)", "ablate"),
    ("a weight of the smoothed input", "layers.py", "w_OK * self.inv_smooth.float().repeat(self.taps)", "w_OK", "pipeline"),
    ("the mean input twice in a bias", "layers.py", "twice = 0 if self.shift is None", "twice = 0 if True", "pipeline"),
    ("fifty steps of a bare call", "assets/pipeline.py.template", "**defaults | ", "**{} | ", "pipeline"),
    ("paths of this machine in an export", "models/pipeline.py", 'about.pop("_name_or_path", None)', "None", "pipeline"),
    ("taps of an exported convolution", "models/exports.py", "(torch.uint8).movedim(1, 2))", "(torch.uint8))", "exports"),
    ("lanes of nunchaku's codes", "models/exports.py", "(0, 4, 1, 3, 6, 2, 5, 7)", "(0, 4, 1, 3, 6, 5, 2, 7)", "exports"),
    ("lanes of nunchaku's scales", "models/exports.py", "permute(0, 5, 1, 3, 2, 4)", "permute(0, 5, 1, 2, 3, 4)", "exports"),
    ("nunchaku's factor turned over", "models/exports.py", "else 1 / layer.inv_smooth", "else layer.inv_smooth", "exports"),
    ("rotated codes written as they are", "models/exports.py", "lambda layer: layer.rotated}", "lambda layer: False}", "exports"),
    ("an AWQ layer without its branch", "models/exports.py", "changed = layer.rank or", "changed =", "exports"),
    ("LoRA fused into 16-bit layers", "models/quantizer.py", "state_dict, fuse_lora, fuse", "state_dict, fuse", "pipeline"),
    ("a copy that is the first network", "models/quantizer.py", "memo[id(self.net())]", "self.net()", "pipeline"),
    ("solver steps of a few-step model", "train.py", "cfg.rollout == 1 and cfg.trajectory", "cfg.trajectory", "whole"),
    ("a few-step base in 25 steps", "sample.py", "    if config.whole:\n", "    if False:\n", "whole"),
    ("a few-step base with its own scheduler", "sample.py", "{family.part} if pipeline", "{family.part} if not pipeline", "whole"),
    ("a few-step base as a row of 25 steps", "evaluate.py", 'config["cm"] != pretrained.WHOLE', "True", "whole"),
    ("a LoRA in the plan that is not there", "models/plan.py", '{"cm_rank": 0} if', "{} if", "whole"),
    ("captions padded to 512", "models/family.py", '.get("max_sequence_length", self.tokens)', '.get("", self.tokens)', "whole"),
    ("a call without its options", "models/pipeline.py", "| family.call_options(net.config)\n    pipe", "\n    pipe", "whole"),
    ("training said of what had none", "models/card.py", 'if config.get("steps", 1):', "if True:", "whole"),
    ("factors wider than in a file", "models/checkpoint.py", "layer.load_state_dict(kept, assign=True)", "pass", "whole"),
    ("captions wider than a cache's", "data/cache.py", "{name: stored(name, tensor, tuple(captions))", "{name: tensor", "whole"),
    ("the base's scheduler in what was packed", "models/pipeline.py", "    pipe.register_modules(scheduler=", "    (", "whole"),
    ("adapters that are packed", "models/pipeline.py", 'None):\n        raise UserError("adapters cannot',
     'None) and None:\n        raise UserError("adapters cannot', "whole"),
    ("an IP-Adapter that is saved", "models/pipeline.py", 'is not None:\n        raise UserError("an IP-Adapter is not',
     'is 0:\n        raise UserError("an IP-Adapter is not', "pipeline"),
    ("a page of the hub with a file's name", "models/pretrained.py", 'repository.split("/")[:2]', 'repository.split("/")', "whole"),
    ("a path taken for a hub id", "models/pretrained.py", 'return f"./{base}" if base and', "return base if base and", "whole"),
    ("one noise for all shards", "data/cache.py", "step_generator(0, k, stream=4)", "torch.Generator()", "cache"),
]  # fmt: skip


def is_noticed(row: tuple[str, ...]) -> tuple[bool, str]:
    """Whether the test file of a mutation fails on a copy of the code with it, and pytest's last line."""
    _, name, line, broken, test = row
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "code"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", ".hypothesis", "__pycache__", "venv", ".venv"))
        code = (copy / name).read_text()
        if code.count(line) < 1:
            sys.exit(f"mutate.py: {name} has no line {line!r} any more: update MUTATIONS")
        (copy / name).write_text(code.replace(line, broken))
        job = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/test_{test}.py"]
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // JOBS))}
        done = subprocess.run(job, cwd=copy, env=env, capture_output=True, text=True)
    return done.returncode == 1, done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def main() -> None:
    missed, chosen = [], [row for row in MUTATIONS if " ".join(sys.argv[1:]) in row[0]]
    with ThreadPoolExecutor(JOBS) as pool:
        for (what, name, *_), (noticed, last) in zip(chosen, pool.map(is_noticed, chosen), strict=True):
            print(f"{'noticed' if noticed else 'MISSED ':8} {name:14} {what:32} {last}", flush=True)
            missed += [] if noticed else [what]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutations make a test fail")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
