"""Trains the classifier of scenes that evaluate.py scores with.

python -m benchmarks.classifier        writes assets/classifier.safetensors
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import scenes
from evaluate import SceneClassifier, real_pictures, truth
from models.denoiser import FAST
from run import files
from run.common import run_script, step_generator

STEPS, BATCH, RATE = 3000, 128, 2e-3


def main(argv: list[str]) -> None:
    """A little noise in training, so that it reads shapes and not the renderer's exact pixels."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=files.ASSETS / "classifier.safetensors")
    out = parser.parse_args(argv).out
    torch.manual_seed(0)
    classifier = SceneClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=0.01)
    for step in tqdm(range(STEPS)):
        gen = step_generator(7, step)
        scene = scenes.random_scenes(BATCH, gen)
        pictures = scenes.render(scene, gen)
        pictures += 0.03 * torch.randn(pictures.shape, generator=gen) * torch.rand(BATCH, 1, 1, 1, generator=gen)
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        with torch.autocast("cpu", torch.bfloat16, enabled=FAST == torch.bfloat16):
            pairs = zip(classifier.heads(classifier(pictures)), truth(scene), strict=True)
            loss = sum(F.cross_entropy(logits.flatten(0, 1), at.flatten(), ignore_index=-1) for logits, at in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracy, _ = real_pictures(classifier.eval())
    info = {"command": "python -m benchmarks.classifier", "seed": 0, "accuracy_on_real": accuracy}
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}
    files.write_tensors(out, tensors, info)
    print(f"prompt accuracy on real pictures {accuracy:.4f}")


if __name__ == "__main__":
    run_script("benchmarks.classifier", main)
