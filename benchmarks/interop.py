"""What diffusers and PEFT can do with a quantized network: ours beside those of other methods, on miniature pipelines.

    pip install -r requirements-bench.txt
    python -m benchmarks.interop

Each method quantizes the denoisers of a small SDXL and a small FLUX as diffusers loads them, and each row below is tried on a fresh
one, in float32 on a CPU. A cell is "yes" or the beginning of the error; with two, the first is SDXL's. A method that fails in
every row is a note. "yes" means that the row's
function ran to its end, and these assert that pictures change or come back as they should. Ours is CMQuantConfig(): what
loads, saves and takes adapters is the same for the checkpoints of train.py.
"""

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path

import diffusers
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks.jobs import MACHINE, each
from benchmarks.tables import ROOT, markdown, write_table
from models.family import FAMILIES

sys.path.append(str(ROOT / "tests"))
import miniature

PROMPT, SIDE = "a large red house on the left", 64
METHODS = ("CMQuant W4A4", "bitsandbytes nf4", "torchao int8", "quanto int8", "SDNQ int4")


def config_of(method: str):
    """What from_pretrained takes as quantization_config."""
    if method.startswith("CMQuant"):
        from models.quantizer import CMQuantConfig

        return CMQuantConfig(backend="eager")
    if method.startswith("bitsandbytes"):
        return diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    if method.startswith("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig

        return diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    if method.startswith("quanto"):
        return diffusers.QuantoConfig(weights_dtype="int8")
    from sdnq import SDNQConfig

    return SDNQConfig(weights_dtype="int4", quant_conv=True)


class Trial:
    """A fresh pipeline with a quantized denoiser."""

    def __init__(self, method: str, name: str, base: Path):
        self.family, self.folder, self.base = FAMILIES[name], base.parent, base
        self.net = self.load(base, quantization_config=config_of(method))
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(base, **{self.family.part: self.net})
        self.pipe.set_progress_bar_config(disable=True)
        self.lora = base.parent / f"{name}.safetensors"

    def load(self, folder: Path, **options) -> nn.Module:
        return self.family.network.from_pretrained(folder, subfolder=self.family.part, torch_dtype=torch.float32, **options)

    def draw(self) -> torch.Tensor:
        net = getattr(self.pipe, self.family.part)
        shape = (1, 4, 8, 8) if self.family.classifier_free else (1, 16, 64)
        x_T = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(net.dtype)
        options = dict(num_inference_steps=2, guidance_scale=self.family.few_step_guidance(None), height=SIDE, width=SIDE)
        drawn = self.pipe(PROMPT, latents=x_T, output_type="latent", **options).images.float()
        assert drawn.isfinite().all(), "inf or NaN"
        return drawn

    def styled(self, **scales: float) -> None:
        for adapter in scales:
            if adapter not in (getattr(self.net, "peft_config", None) or {}):
                self.pipe.load_lora_weights(self.lora, adapter_name=adapter)
        self.pipe.set_adapters([*scales], [*scales.values()])


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------- the rows: each gets a Trial, and raises where it does not work


def draws(trial: Trial) -> None:
    trial.draw()


def convolutions(trial: Trial) -> None:
    """Those of the network are quantized too: it is smaller than its linear layers alone would make it."""
    plain = trial.load(trial.base)
    convs = [name for name, layer in plain.named_modules() if isinstance(layer, nn.Conv2d)]
    assert convs, "no convolutions"
    layers = [trial.net.get_submodule(name) for name in convs]
    kept = [layer for layer in layers if type(layer) is nn.Conv2d and type(layer.weight.data) is torch.Tensor]
    assert len(kept) < len(convs) / 2, f"{len(kept)} of {len(convs)} stay in 16 bits"


def saves(trial: Trial) -> None:
    before = trial.draw()
    trial.net.save_pretrained(trial.folder / "saved")
    net = trial.family.network.from_pretrained(trial.folder / "saved", torch_dtype=torch.float32)
    setattr(trial.pipe, trial.family.part, net)
    assert far(trial.draw(), before) < 1e-3, "other pictures"


def adapter(trial: Trial) -> None:
    before = trial.draw()
    trial.styled(one=1.0)
    assert far(trial.draw(), before) > 0.05, "no effect"


def adapters(trial: Trial) -> None:
    before = trial.draw()
    trial.styled(one=0.5, two=-0.5)
    assert far(trial.draw(), before) < 0.03, "strengths do not add up"  # sums in another order flip codes


def unload(trial: Trial) -> None:
    before = trial.draw()
    trial.styled(one=1.0)
    trial.pipe.unload_lora_weights()
    assert torch.equal(trial.draw(), before), "other pictures"


def fuse(trial: Trial) -> None:
    trial.styled(one=1.0)
    before = trial.draw()
    trial.pipe.fuse_lora()
    trial.pipe.unload_lora_weights()
    assert far(trial.draw(), before) < 0.1, "pictures without the LoRA"


def train(trial: Trial) -> None:
    trial.net.requires_grad_(False)
    trial.net.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"]), "mine")
    trial.net.enable_gradient_checkpointing()
    trial.net.train()
    trial.pipe.__class__.__call__.__wrapped__(
        trial.pipe, PROMPT, num_inference_steps=1, output_type="latent", height=SIDE, width=SIDE, guidance_scale=1.0
    ).images.square().mean().backward()
    grads = [p.grad for name, p in trial.net.named_parameters() if "lora_B.mine" in name]
    assert grads and all(grad is not None and grad.norm() > 0 for grad in grads), "no gradient"


def dequantized(trial: Trial) -> None:
    before = trial.draw()
    trial.net.dequantize()
    assert far(trial.draw(), before) < 0.3, "other pictures"
    trial.net.save_pretrained(trial.folder / "plain")
    assert "quantization_config" not in json.loads((trial.folder / "plain" / "config.json").read_text()), "still called quantized"


def from_pipe(trial: Trial) -> None:
    other, gray = diffusers.AutoPipelineForImage2Image.from_pipe(trial.pipe), Image.new("RGB", (SIDE, SIDE), "gray")
    other.set_progress_bar_config(disable=True)
    other(PROMPT, image=gray, strength=0.5, num_inference_steps=2, guidance_scale=1.0, output_type="latent")


def to_dtype(trial: Trial) -> None:
    trial.pipe.to(torch.bfloat16)
    trial.draw()


def controlnet(trial: Trial) -> None:
    assert trial.family.classifier_free, "UNets alone"
    diffusers.ControlNetModel.from_unet(trial.net)


def controlnet_of_dequantized(trial: Trial) -> None:
    assert trial.family.classifier_free, "UNets alone"
    diffusers.ControlNetModel.from_unet(copy.deepcopy(trial.net).dequantize())


def compiled(trial: Trial) -> None:
    before = trial.draw()
    trial.net.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert far(trial.draw(), before) < 0.01, "other pictures"


def adapter_on_compiled(trial: Trial) -> None:
    trial.net.compile_repeated_blocks(backend="eager")
    before = trial.draw()
    trial.styled(one=1.0)
    assert far(trial.draw(), before) > 0.05, "no effect"


def counts(trial: Trial) -> None:
    found, plain = trial.net.num_parameters(), trial.load(trial.base).num_parameters()
    assert found == plain, f"{found / plain:.2f} of them"


def copies(trial: Trial) -> None:
    before = trial.draw()
    setattr(trial.pipe, trial.family.part, copy.deepcopy(trial.net))
    assert far(trial.draw(), before) < 1e-3, "other pictures"


ROWS = {
    "loads as it is quantized, and draws": draws,
    "quantizes convolutions": convolutions,
    "`save_pretrained`, `from_pretrained`": saves,
    "`load_lora_weights`": adapter,
    "two LoRAs with strengths": adapters,
    "`unload_lora_weights`": unload,
    "`fuse_lora`": fuse,
    "`add_adapter` trains": train,
    "`dequantize()`": dequantized,
    "`from_pipe`: image to image": from_pipe,
    "`pipe.to(dtype)`": to_dtype,
    "`ControlNetModel.from_unet`": controlnet,
    "the same of `dequantize()`": controlnet_of_dequantized,
    "`compile_repeated_blocks`, one graph": compiled,
    "a LoRA after compiling": adapter_on_compiled,
    "`num_parameters()`": counts,
    "`copy.deepcopy`": copies,
}

# ---------------------------------------------------------------- the table


def style(name: str, net: nn.Module) -> dict[str, torch.Tensor]:
    """A LoRA of all linear layers of attention."""
    gen, state = torch.Generator().manual_seed(1), {}
    for key, layer in net.named_modules():
        if key.endswith(("to_q", "to_v")):
            for ab, shape in (("A", (4, layer.in_features)), ("B", (layer.out_features, 4))):
                state[f"{FAMILIES[name].part}.{key}.lora_{ab}.weight"] = torch.randn(shape, generator=gen)
    return state


def attempt(method: str, name: str) -> dict[str, str]:
    """{row: yes, or the beginning of the error}."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        base = miniature.save(name, Path(folder) / name)
        save_file(style(name, FAMILIES[name].network.from_pretrained(base, subfolder=FAMILIES[name].part)), f"{base}.safetensors")
        for row, function in ROWS.items():
            try:
                function(Trial(method, name, base))
                found[row] = "yes"
            except Exception as error:
                words = " ".join(str(error).split()) or type(error).__name__
                found[row] = words if len(words) <= 60 else words[:57] + " .."
            torch.compiler.reset()
    return found


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    cli.add_argument(
        "--run", nargs=3, metavar=("METHOD", "FAMILY", "FILE"), help="one column, into a file: what a process of its own does"
    )
    args = cli.parse_args()
    if args.run:
        method, name, file = args.run
        Path(file).write_text(json.dumps(attempt(method, name)))
        return
    with tempfile.TemporaryDirectory() as folder:
        cells = [(method, name) for method in METHODS for name in ("sdxl", "flux")]

        def column(cell, call):
            file = Path(folder, f"{METHODS.index(cell[0])}-{cell[1]}.json")
            call("-m", "benchmarks.interop", "--run", *cell, str(file))
            return json.loads(file.read_text())

        found = dict(zip(cells, each(column, cells, 1), strict=True))
    failed = {method: next(iter(found[method, "sdxl"].values())) for method in METHODS}
    failed = {method: error for method, error in failed.items() if {*found[method, "sdxl"].values()} == {error} != {"yes"}}
    methods, lines = [method for method in METHODS if method not in failed], []
    for row in ROWS:
        pairs = [[found[method, name][row] for name in ("sdxl", "flux")] for method in methods]
        lines.append([row, *(a if a == b else f"{a}; {b}" for a, b in pairs)])
    notes = [f"diffusers {diffusers.__version__}; {MACHINE}", *(f"{method}: {error}" for method, error in failed.items())]
    write_table("interop", [*markdown(["", *methods], *lines), "\n" + "; ".join(notes)])


if __name__ == "__main__":
    main()
