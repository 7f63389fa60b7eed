"""data.py: scenes are what their captions say, batches depend on (seed, step) alone, folders are read with care."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
import models


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 9))
def test_a_batch_is_a_function_of_seed_and_step(seed, step, n):
    """Catches global random state in the renderer."""
    pictures, captions = data.Scenes().batch(n, data.step_generator(seed, step))
    torch.rand(3)
    again, same = data.Scenes().batch(n, data.step_generator(seed, step))
    assert torch.equal(pictures, again) and captions == same
    assert pictures.shape == (n, 3, 32, 32) and pictures.abs().max() <= 1


def test_streams_steps_and_seeds_differ():
    """Catches a generator that ignores one of its arguments."""
    draws = {torch.rand(1, generator=data.step_generator(*key)).item() for key in ((0, 0), (0, 1), (1, 0), (0, 0, 1))}
    assert len(draws) == 4


def test_two_objects_never_share_a_place():
    """Catches a pair drawn from all places."""
    scene = data.random_scenes(2000, data.step_generator(0, 0))
    two = scene["count"] == 2
    assert (scene["place"][two, 0] != scene["place"][two, 1]).all()
    assert 0.5 < two.float().mean() < 0.7


def test_caption_has_the_words_of_its_scene():
    """Catches an attribute missing from captions, and defaults that are spelled out."""
    scene = data.random_scenes(200, data.step_generator(3, 0))
    for i in range(200):
        caption = data.caption_of(scene, i)
        for slot in range(int(scene["count"][i])):
            assert data.COLORS[scene["color"][i, slot]] in caption and data.PLACES[scene["place"][i, slot]] in caption
        assert {t for t in data.TEXTURES[1:] if t in caption} == {data.TEXTURES[scene["texture"][i]]} - {"smooth"}
        assert "plain" not in caption and "smooth" not in caption


def test_the_color_of_a_large_plain_circle_is_on_the_picture():
    """Catches swapped channels or x and y: the pixel at the named place has the named colour."""
    scene = {k: torch.zeros(5, dtype=torch.int64) for k in ("background", "texture")}
    scene |= {"count": torch.ones(5, dtype=torch.int64), "place": torch.arange(5)[:, None].expand(5, 2)}
    scene |= {k: torch.zeros(5, 2, dtype=torch.int64) for k in ("shape", "pattern")}
    scene |= {"size": torch.ones(5, 2, dtype=torch.int64), "color": torch.arange(5)[:, None].expand(5, 2)}
    pictures = data.render(scene, data.step_generator(0, 0))
    for i, (x, y) in enumerate(data.CENTER.round().int().tolist()):
        assert (pictures[i, :, y, x] - (2 * data.RGB[i] - 1)).abs().max() < 0.35


def test_smooth_wavy_and_grainy_backgrounds_are_what_their_words_say():
    """Catches swapped textures, waves that run level, and grain without grain: differences of neighbours in a corner."""
    n = 90
    scene = data.random_scenes(n, data.step_generator(0, 0))
    scene |= {"count": torch.ones(n, dtype=torch.int64), "place": torch.full((n, 2), 4), "texture": torch.arange(n) % 3}
    corner = data.render(scene, data.step_generator(0, 1))[:, :, :7, :7]
    across, down = corner.diff(dim=3).square().mean((1, 2, 3)), corner.diff(dim=2).square().mean((1, 2, 3))
    smooth, wavy, grainy = ((across[i::3].mean(), down[i::3].mean()) for i in range(3))
    assert max(smooth) < 1e-3 < wavy[0] and wavy[1] < 1e-3
    assert min(grainy) > 5e-3 and 0.5 < grainy[0] / grainy[1] < 2


def write_folder(path, captions=True, broken=0):
    path.mkdir()
    rows = []
    for i in range(3):
        Image.new("RGB", (40, 30 + i), (80 * i, 10, 200)).save(path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"picture {i}"})
    for i in range(broken):
        (path / f"broken{i}.png").write_bytes(b"\x89PNG no picture")
        rows.append({"file_name": f"broken{i}.png", "text": "broken"})
    if captions:
        (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def test_folder_with_metadata_and_with_text_files_agree(tmp_path):
    """Catches a caption beside the wrong picture."""
    table = data.Folder(str(write_folder(tmp_path / "a")))
    texts = write_folder(tmp_path / "b", captions=False)
    for i in range(3):
        (texts / f"{i}.txt").write_text(f"picture {i}\n")
    beside = data.Folder(str(texts))
    assert table.texts == beside.texts == ["picture 0", "picture 1", "picture 2"]
    assert torch.equal(table.pictures, beside.pictures) and table.pictures.shape == (3, 3, 32, 32)
    assert abs(table.pictures[2, 0].mean() - (160 / 127.5 - 1)) < 0.02


def test_unreadable_pictures_are_named_counted_and_skipped(tmp_path, capsys):
    """Catches a crash, an endless retry, and silence."""
    folder = data.Folder(str(write_folder(tmp_path / "a", broken=7)))
    printed = capsys.readouterr().out
    assert len(folder.texts) == 3 and "broken0.png" in printed and "skipped 7 unreadable pictures" in printed
    pictures, captions = folder.batch(50, data.step_generator(0, 0))
    assert len(pictures) == 50 and "broken" not in captions


@pytest.mark.parametrize("case", ["no folder", "no captions", "bad line", "all broken"])
def test_a_folder_that_cannot_serve_is_one_sentence(tmp_path, case):
    """Catches training on nothing."""
    path = tmp_path / "a"
    if case == "no captions":
        write_folder(path, captions=False)
    elif case == "bad line":
        write_folder(path)
        (path / "metadata.jsonl").write_text('{"file_name": "0.png"}')
    elif case == "all broken":
        path.mkdir()
        (path / "0.png").write_bytes(b"nothing")
        (path / "0.txt").write_text("a caption")
    says = {"no folder": "not a folder", "no captions": "has no captions", "bad line": "line 1", "all broken": "be read"}[case]
    with pytest.raises(models.UserError, match=says):
        data.Folder(str(path))
