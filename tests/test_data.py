"""data/: scenes are what their captions say, batches depend on (seed, step) alone, every kind of --data is read with care."""

import io
import json
import re
import sys
import tarfile
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
import scores
import train
from benchmarks import emoji
from data import scenes, sources
from models import checkpoint, tiny
from models.denoiser import FAST, as_cm, draw, random_denoiser
from models.pretrained import load_embedded_cm
from run import files
from run.common import UserError, step_generator


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 5))
@settings(max_examples=12)
def test_a_batch_is_a_function_of_seed_and_step(seed, step, n):
    """Catches global random state in the renderer."""
    pictures, captions = scenes.Scenes().batch(n, step_generator(seed, step))
    torch.rand(3)
    again, same = scenes.Scenes().batch(n, step_generator(seed, step))
    assert torch.equal(pictures, again) and captions == same
    assert pictures.shape == (n, 3, 32, 32) and pictures.abs().max() <= 1


def test_streams_steps_and_seeds_differ():
    """Catches a generator that ignores one of its arguments."""
    draws = {torch.rand(1, generator=step_generator(*key)).item() for key in ((0, 0), (0, 1), (1, 0), (0, 0, 1))}
    assert len(draws) == 4


def test_two_objects_never_share_a_place():
    """Catches a pair drawn from all places."""
    scene = scenes.random_scenes(2000, step_generator(0, 0))
    two = scene["count"] == 2
    assert (scene["place"][two, 0] != scene["place"][two, 1]).all()
    assert 0.5 < two.float().mean() < 0.7


def test_caption_has_the_words_of_its_scene():
    """Catches an attribute missing from captions, and defaults that are spelled out."""
    scene = scenes.random_scenes(200, step_generator(3, 0))
    for i in range(200):
        caption = scenes.caption_of(scene, i)
        for slot in range(int(scene["count"][i])):
            assert scenes.COLORS[scene["color"][i, slot]] in caption and scenes.PLACES[scene["place"][i, slot]] in caption
        assert {t for t in scenes.TEXTURES[1:] if t in caption} == {scenes.TEXTURES[scene["texture"][i]]} - {"smooth"}
        assert "plain" not in caption and "smooth" not in caption


def test_the_color_of_a_large_plain_circle_is_on_the_picture():
    """Catches swapped channels or x and y: the pixel at the named place has the named colour."""
    scene = {k: torch.zeros(5, dtype=torch.int64) for k in ("background", "texture")}
    scene |= {"count": torch.ones(5, dtype=torch.int64), "place": torch.arange(5)[:, None].expand(5, 2)}
    scene |= {k: torch.zeros(5, 2, dtype=torch.int64) for k in ("shape", "pattern")}
    scene |= {"size": torch.ones(5, 2, dtype=torch.int64), "color": torch.arange(5)[:, None].expand(5, 2)}
    pictures = scenes.render(scene, step_generator(0, 0))
    for i, (x, y) in enumerate(scenes.CENTER.round().int().tolist()):
        assert (pictures[i, :, y, x] - (2 * scenes.RGB[i] - 1)).abs().max() < 0.35


def test_a_scene_is_the_same_scene_at_twice_the_size():
    """Catches lengths in pixels of the picture instead of the scene's, finer grain, and another order of random numbers."""
    scene = scenes.random_scenes(64, step_generator(0, 0))
    plain, large = (scenes.render(scene, step_generator(0, 1), side) for side in (32, 64))
    assert large.shape == (64, 3, 64, 64)
    assert (torch.nn.functional.avg_pool2d(large, 2) - plain).abs().mean() < 0.02  # edges are sampled more finely
    classifier = evaluate.load_classifier()
    assert evaluate.all_right(classifier, classifier(large), scene).float().mean() > 0.95
    pictures, captions = sources.source("", 64).batch(2, step_generator(0, 0))
    assert pictures.shape == (2, 3, 64, 64) and captions == sources.source("").captions(2, step_generator(0, 0))


def test_smooth_wavy_and_grainy_backgrounds_are_what_their_words_say():
    """Catches swapped textures, waves that run level, and grain without grain: differences of neighbours in a corner."""
    n = 90
    scene = scenes.random_scenes(n, step_generator(0, 0))
    scene |= {"count": torch.ones(n, dtype=torch.int64), "place": torch.full((n, 2), 4), "texture": torch.arange(n) % 3}
    corner = scenes.render(scene, step_generator(0, 1))[:, :, :7, :7]
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
    table = sources.Folder(str(write_folder(tmp_path / "a")))
    texts = write_folder(tmp_path / "b", captions=False)
    for i in range(3):
        (texts / f"{i}.txt").write_text(f"picture {i}\n")
    beside = sources.Folder(str(texts))
    assert table.texts == beside.texts == ["picture 0", "picture 1", "picture 2"]
    assert torch.equal(table.pictures, beside.pictures) and table.pictures.shape == (3, 3, 32, 32)
    assert abs(table.pictures[2, 0].mean() - (160 / 127.5 - 1)) < 0.02


def test_unreadable_pictures_are_named_counted_and_skipped(tmp_path, capsys):
    """Catches a crash, an endless retry, and silence."""
    folder = sources.Folder(str(write_folder(tmp_path / "a", broken=7)))
    printed = capsys.readouterr().out
    assert len(folder.texts) == 3 and "broken0.png" in printed and "3 used, 7 skipped: cannot be read (7)" in printed
    pictures, captions = folder.batch(50, step_generator(0, 0))
    assert len(pictures) == 50 and "broken" not in captions


def test_captions_are_what_editors_mean_by_them(tmp_path):
    """Catches a byte order mark that becomes a part of the caption or damns the table, and a caption with a Unicode line end."""
    table = write_folder(tmp_path / "a")
    rows = [{"file_name": f"{i}.png", "text": f"picture\u2028{i}"} for i in range(3)]
    (table / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    assert sources.Folder(str(table)).texts == ["picture\u20280", "picture\u20281", "picture\u20282"]
    beside = write_folder(tmp_path / "b", captions=False)
    (beside / "0.txt").write_text("a cat\r\n", encoding="utf-8-sig")
    assert sources.Folder(str(beside)).texts == ["a cat"]
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "prompts.txt").write_text("a cat\u2028on a mat\r\na dog\x0cby\x85a river\n", encoding=encoding)
        assert sources.read_prompts(tmp_path / "prompts.txt") == ["a cat\u2028on a mat", "a dog\x0cby\x85a river"]


def test_a_small_folder_stands_upright_too_and_16_bit_pictures_are_named(tmp_path, capsys):
    """Catches EXIF's rotation ignored for tiny, and 16-bit gray that is clipped to white."""
    folder = write_folder(tmp_path / "a", captions=False)
    exif, half = Image.Exif(), Image.new("RGB", (64, 64))
    exif[0x0112] = 3  # upside down
    half.paste((255, 255, 255), (0, 0, 64, 32))
    half.save(folder / "x.jpg", exif=exif)
    Image.new("I;16", (64, 64), 9000).save(folder / "y.png")
    for name in ("x", "y"):
        (folder / f"{name}.txt").write_text(name)
    found = sources.Folder(str(folder))
    assert found.texts == ["x"] and "y.png: mode I;16 is no picture of 8 bits" in capsys.readouterr().out
    assert found.pictures[0, :, :12].mean() < -0.9 and found.pictures[0, :, -12:].mean() > 0.9


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
    with pytest.raises(UserError, match=says):
        sources.Folder(str(path))


# ---------------------------------------------------------------------------------------------------------------------
# Live examples of the tiny models


@pytest.mark.parametrize("kind", ["scenes", "folder"])
def test_live_examples_are_those_of_the_source_and_processes_share_them(tmp_path, kind):
    """Catches another order of draws, by which every existing run would change its numbers, and overlapping shares."""
    source = scenes.Scenes() if kind == "scenes" else sources.Folder(str(write_folder(tmp_path / "a")))
    network = random_denoiser("tiny")
    live, gen, same = sources.LiveExamples(source, network), step_generator(1, 2), step_generator(1, 2)
    pictures, captions = source.batch(6, gen)
    x0, cond = live.latents(6, same, slice(1, None, 2))
    assert torch.equal(x0, tiny.to_latents(pictures, 12)[1::2]) and x0.dtype == torch.float32
    assert all(torch.equal(v, cond[k]) for k, v in network.encode(captions[1::2]).items())
    texts, cond = source.captions(6, gen), live.conditions(6, same, slice(0, None, 2))
    assert all(torch.equal(v, cond[k]) for k, v in network.encode(texts[0::2]).items())
    assert torch.equal(torch.rand(3, generator=gen), torch.rand(3, generator=same))
    assert all(torch.equal(v, live.null()[k]) for k, v in network.encode([""]).items())


# ---------------------------------------------------------------------------------------------------------------------
# Sources for SDXL and FLUX


def png(i):
    file = io.BytesIO()
    Image.new("RGB", (40 + i, 30), (80 * i, 10, 200)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_tars(folder):
    """Two shards, four good pictures of width 40 + i with the caption "picture i"; caption first or last, as .txt or .json."""
    folder.mkdir()
    one = [("d/0.png", png(0)), ("d/0.txt", b"picture 0\n"), ("d/1.cls", b"7"), ("d/1.json", b'{"caption": "picture 1"}')]
    write_tar(folder / "s-0.tar", [*one, ("d/1.png", png(1))])
    two = [("2.txt", b"picture 2"), ("2.png", png(2)), ("3.json", b'{"text": "picture 3"}'), ("3.PNG", png(3))]
    write_tar(folder / "s-1.tar", two)
    return folder


def rows(source):
    return [(caption, picture and picture.width - 40) for _, caption, picture in source]


def write_sub_folders(folder):
    (folder / "x").mkdir(parents=True)
    for i in range(4):
        (folder / ("x" if i % 2 else ".") / f"{i}.png").write_bytes(png(i))
        (folder / ("x" if i % 2 else ".") / f"{i}.txt").write_text(f"picture {i}")
    return folder


def write_tables(folder):
    for name in ("x", "y"):
        (folder / name).mkdir(parents=True)
        table = [json.dumps({"file_name": f"p/{i}.png", "text": f"picture {i}"}) for i in range(4) if (i < 2) == (name == "x")]
        (folder / name / "metadata.jsonl").write_text("\n".join(table))
        (folder / name / "p").mkdir()
        for i in range(4):
            (folder / name / "p" / f"{i}.png").write_bytes(png(i))
    return folder


@pytest.mark.parametrize("layout", [write_sub_folders, write_tables, write_tars], ids=lambda layout: layout.__name__)
def test_every_layout_gives_each_picture_its_caption(tmp_path, layout):
    """Catches captions of the neighbour, sub-folders and .json captions that are not read, and a second pass that differs."""
    source = sources.captioned(str(layout(tmp_path / "a")))
    assert sorted(rows(source)) == [(f"picture {i}", i) for i in range(4)]
    assert rows(source) == rows(source) and len({key for key, _, _ in source}) == 4
    assert sources.captioned(str(tmp_path / "a")).fingerprint == source.fingerprint


def test_tars_are_found_by_folder_by_glob_and_by_name(tmp_path):
    """Catches a glob that is taken for a dataset of the hub, and shards in another order."""
    folder = write_tars(tmp_path / "a")
    whole = rows(sources.captioned(str(folder)))
    assert whole == rows(sources.captioned(f"{folder}/s-*.tar"))
    assert whole[:2] == rows(sources.captioned(f"{folder}/s-0.tar")) and whole[2:] == rows(
        sources.captioned(f"{folder}/s-[1-9].tar")
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252", "cp932", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("layout", ["txt", "jsonl", "tar", "json in a tar"])
def test_captions_of_another_encoding_are_named_and_never_bent(tmp_path, capsys, layout, encoding):
    """Catches replacement characters, byte order marks and null characters that are trained on, wherever a caption stands."""
    text, folder = "\u732b" if encoding == "cp932" else "caf\xe9", tmp_path / "a"
    line = json.dumps({"file_name": "0.png", "text": text}, ensure_ascii=False)
    caption = ("0.json", line.encode(encoding)) if "json" in layout else ("0.txt", text.encode(encoding))
    members = [("0.png", png(0)), caption, ("1.png", png(1)), ("1.txt", b"plain")]
    folder.mkdir()
    if "tar" in layout:
        write_tar(folder / "a.tar", members)
    else:
        for name, content in members:
            (folder / name.replace("0.json", "metadata.jsonl")).write_bytes(content)
    if layout == "jsonl" and encoding in ("utf-16-le", "utf-32"):  # no line can be told from another
        with pytest.raises(UserError, match="line 1: every line must be"):
            sources.captioned(str(folder))
        return
    found, printed = {caption for _, caption, _ in sources.captioned(str(folder))}, capsys.readouterr().out
    assert "plain" in found <= {"plain", text}
    assert (text in found) != bool(re.search(r"skipped (a\.tar/0|0\.png): its caption is not UTF-8\n", printed))
    assert text in found or encoding not in ("utf-8-sig", "utf-16")


def test_keys_of_a_tar_end_at_the_last_dot_and_hidden_members_are_none(tmp_path, capsys):
    """Catches stems with dots that are one sample, a Mac's copies that part samples, and two samples of one key."""
    mac = [(f"./{mark}{i}.{kind}", content) for i in (0, 1) for kind, content in (("png", png(i)), ("txt", b"picture %d" % i))
           for mark in ("._", "")]  # fmt: skip
    stale = [(f"{folder}/2.{kind}", b"stale") for folder in ("__MACOSX", ".cache", "x/@eaDir") for kind in ("png", "txt")]
    dots = [(f"v1.{i}.0.{kind}", content) for i in (2, 3) for kind, content in (("png", png(i)), ("txt", b"picture %d" % i))]
    twice = [("a.txt", b"picture 4"), ("a.png", png(4)), ("a.txt", b"picture 5"), ("a.png", png(5)), ("a.cls", b"7")]
    source = sources.captioned(str(write_tar(tmp_path / "a.tar", [*mac, *stale, *dots, *twice])))
    assert rows(source) == [(f"picture {i}", i) for i in range(6)]
    assert "a.tar: 6 pictures or captions found, 6 used, 0 skipped\n" in capsys.readouterr().out


def test_parts_that_are_not_adjacent_are_said_to_be(tmp_path, capsys):
    """Catches "no caption" for a half and "no picture" for the other; a picture that has none is still said to have none."""
    names = ["0.png", "1.png", "2.png", "0.txt", "1.json", "3.txt", "4.png", "4.txt"]
    content = {".png": png(0), ".txt": b"a cat", ".json": b'{"caption": "a dog"}'}
    source = sources.captioned(str(write_tar(tmp_path / "a.tar", [(name, content[name[1:]]) for name in names])))
    assert [key for key, *_ in source] == ["a.tar/4"]
    printed = capsys.readouterr().out
    for key, why in zip("0123", (sources.NOT_ADJACENT, sources.NOT_ADJACENT, sources.NO_CAPTION, sources.NO_PICTURE), strict=True):
        assert f"skipped a.tar/{key}: {why}\n" in printed
    assert "pack the shard with --sort=name (2), no caption (1), no picture (1)" in printed


def test_a_folder_is_read_without_hidden_parts_and_links_are_followed_once(tmp_path):
    """Catches stale copies of editors and file servers, a dataset made of links that is empty, and a link to a folder above."""
    folder, elsewhere = write_sub_folders(tmp_path / "a"), tmp_path / "elsewhere"
    for name in (".ipynb_checkpoints", "@eaDir", "x/__MACOSX", "x/.git/y"):
        write_sub_folders(folder / name)
        (folder / name / "metadata.jsonl").write_text('{"file_name": "../0.png", "text": "stale"}')
    (folder / "._0.png").write_bytes(png(0))
    elsewhere.mkdir()
    for name, content in (("5.png", png(5)), ("5.txt", b"picture 5")):
        (elsewhere / name).write_bytes(content)
    for link, target in (("l", elsewhere), ("m", elsewhere), ("x/up", folder)):
        (folder / link).symlink_to(target)
    source = sources.captioned(str(folder))
    assert sorted(rows(source)) == [(f"picture {i}", i) for i in (0, 1, 2, 3, 5)]
    assert source.fingerprint == sources.captioned(str(folder)).fingerprint
    assert {file.name for file in scores.pictures_of(str(folder))} == {f"{i}.png" for i in (0, 1, 2, 3, 5)}


def test_everything_in_a_folder_is_read_or_accounted_for(tmp_path, capsys):
    """Catches pictures of Pillow's other formats, empty captions and halves of pairs that are left out without a word."""
    kinds = {"bmp": "BMP", "gif": "GIF", "tif": "TIFF", "TIFF": "TIFF", "avif": "AVIF", "jfif": "JPEG", "webp": "WEBP"}
    for kind, name in kinds.items():
        Image.new("RGB", (40, 30)).save(tmp_path / f"{kind}.{kind}", name)
        (tmp_path / f"{kind}.TXT").write_text(kind)
    (tmp_path / "x").mkdir()
    table = [{"file_name": "0.png", "text": None}, {"file_name": "1.png", "text": " "}, {"file_name": "gone.png", "text": "a cat"}]
    (tmp_path / "x" / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    lost = ("x/0.png", "x/1.png", "2.png", "3.heic")
    for name in lost:
        (tmp_path / name).write_bytes(png(0) if "png" in name else b"no plugin")
    for name in ("3", "4"):
        (tmp_path / f"{name}.txt").write_text("a dog")
    assert {caption for _, caption, _ in sources.captioned(str(tmp_path))} == kinds.keys()
    assert "13 pictures or captions found, 7 used, 6 skipped: no caption (3), cannot be read (2), no picture (1)" in (
        capsys.readouterr().out
    )
    for kind in kinds:
        (tmp_path / f"{kind}.TXT").unlink()
    for name in ("3", "4"):
        (tmp_path / f"{name}.txt").write_text("")
    (tmp_path / "x" / "metadata.jsonl").write_text(json.dumps(table[0]))
    with pytest.raises(UserError, match=r"has no captions that can be used \(no caption \(11\), no picture \(1\)\): give"):
        sources.captioned(str(tmp_path))


@pytest.mark.parametrize(
    "names, says",
    [
        (("a.tar", "0.png"), r"holds both a\.tar and 0\.png"),
        (("x/0.gif", "t.parquet"), r"holds both t\.parquet and x/0\.gif"),
        (("x/t.parquet", "a.tar"), r"holds both a\.tar and x/t\.parquet"),
        (("0.png", "a.zip"), r"a\.zip is not read: unpack it"),
        (("a.7z",), r"a\.7z is not read: unpack it"),
    ],
)
def test_two_kinds_of_data_in_a_folder_are_refused_by_name(tmp_path, names, says):
    """Catches pictures beside a shard, or shards beside a table, that are left out, for either reader of folders."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "0.txt").write_text("a caption")
    for read in (sources.captioned, sources.Folder):
        with pytest.raises(UserError, match=says):
            read(str(tmp_path))


def test_a_tar_is_read_as_a_stream(tmp_path, monkeypatch):
    """Catches a reader that keeps a shard's members, or decodes pictures of rows that nobody asked to see."""
    many = [member for i in range(300) for member in ((f"{i}.png", png(i % 3)), (f"{i}.txt", b"a caption"))]
    source, decoded = sources.captioned(str(write_tar(tmp_path / "a.tar", many))), []
    monkeypatch.setattr(sources, "rgb", lambda picture: decoded.append(1) or picture.convert("RGB"))
    opened, plain = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args: opened.append(plain(*args)) or opened[-1])
    kept = 0
    for i, (_, _, picture) in enumerate(source.rows()):
        kept = max(kept, len(opened[0].members))
        if i == 200:
            assert picture().size == (42, 30)
    assert i == 299 and len(decoded) == 1 and kept <= 3


def test_what_cannot_be_read_in_a_tar_is_named_and_the_rest_is_used(tmp_path, capsys):
    """Catches one bad member that ends the run, and a truncated shard that passes for a whole one."""
    folder = tmp_path / "a"
    folder.mkdir()
    bad = [("0.png", b"nothing"), ("0.txt", b"x"), ("1.png", png(1)), ("1.json", b"{"), ("2.txt", b"alone")]
    write_tar(folder / "0.tar", [*bad, ("3.png", png(3)), ("3.txt", b"picture 3")])
    write_tar(folder / "1.tar", [("2.png", png(2)), ("2.txt", b"picture 2")])
    assert rows(sources.captioned(str(folder))) == [("picture 3", 3), ("picture 2", 2)]
    printed = capsys.readouterr().out
    for name in ("0.tar/0: cannot identify", "0.tar/1: no caption", "0.tar/2: no picture"):
        assert f"skipped {name}" in printed
    assert "5 pictures or captions found, 2 used, 3 skipped" in printed


@pytest.mark.parametrize("end", [0, 300, 700, 1024, 1300, 2048, 2300, 2700, 3072, 3584, 4096])
def test_a_truncated_tar_is_named_and_what_stands_before_is_used(tmp_path, capsys, end):
    """Catches a download that broke off and passes for a whole shard: tarfile takes a header that is cut for the end."""
    folder = tmp_path / "a"
    folder.mkdir()
    cut = write_tar(folder / "0.tar", [("0.txt", b"picture 0"), ("0.png", png(0)), ("1.txt", b"picture 1"), ("1.png", png(1))])
    assert cut.stat().st_size > 4096 and rows(sources.captioned(str(cut))) == [("picture 0", 0), ("picture 1", 1)]
    assert "2 used, 0 skipped\n" in capsys.readouterr().out
    cut.write_bytes(cut.read_bytes()[:end])
    write_tar(folder / "1.tar", [("2.png", png(2)), ("2.txt", b"picture 2")])
    assert rows(sources.captioned(str(folder))) == [("picture 0", 0)] * (end >= 2560) + [("picture 2", 2)]
    assert "skipped 0.tar: the rest of the shard is damaged" in capsys.readouterr().out


def test_pictures_stand_upright_and_are_rgb(tmp_path):
    """Catches a camera's rotation flag that is ignored, palettes, and transparency as a fourth channel."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for name, mode, options in (("a.jpg", "RGB", {"exif": exif}), ("b.png", "P", {}), ("c.png", "RGBA", {}), ("d.webp", "RGB", {})):
        Image.new(mode, (60, 40)).save(tmp_path / name, **options)
        (tmp_path / name).with_suffix(".txt").write_text("caption")
    found = {key: (picture.mode, picture.size) for key, _, picture in sources.captioned(str(tmp_path))}
    assert found == {"a.jpg": ("RGB", (40, 60))} | {name: ("RGB", (60, 40)) for name in ("b.png", "c.png", "d.webp")}


def test_prompts_of_a_file_and_ours(tmp_path):
    """Catches blank lines as prompts, and a default that is not there."""
    (tmp_path / "p.txt").write_text("a cat\n\n  two dogs \n")
    assert list(sources.captioned(str(tmp_path / "p.txt"))) == [("0", "a cat", None), ("1", "two dogs", None)]
    ours = sources.read_prompts(files.ASSETS / "prompts.txt")
    assert [caption for _, caption, _ in sources.captioned()] == [caption for _, caption, _ in sources.captioned("prompts")] == ours


def test_our_prompts_are_many_short_and_different():
    """Catches a duplicate, a paragraph, and a list that says the same with other words: few words are in many prompts."""
    prompts = sources.read_prompts(files.ASSETS / "prompts.txt")
    words = [set(re.findall(r"[a-z]{4,}", prompt.lower())) for prompt in prompts]
    assert len(prompts) >= 400 and len({" ".join(sorted(w)) for w in words}) == len(prompts)
    assert all(3 < len(prompt.split()) < 60 and prompt.isprintable() for prompt in prompts)
    assert len(set().union(*words)) > 1500 and sum('"' in prompt for prompt in prompts) > 20
    for i, one in enumerate(words):
        assert all(len(one & two) <= 0.6 * len(one | two) for two in words[:i])


class FakeDatasets:
    """The part of the `datasets` library that is used, over rows in memory."""

    class Image:
        def __init__(self, decode=True):
            self.decode = decode

        def decode_example(self, value):
            return Image.open(io.BytesIO(value["bytes"]))

    class Table:
        def __init__(self, columns, values):
            self.features, self.values = columns, values

        def cast_column(self, name, kind):
            assert not kind.decode and isinstance(self.features[name], FakeDatasets.Image)
            return self

        def __iter__(self):
            for values in self.values:
                if values is None:
                    raise ConnectionError("connection reset")
                if isinstance(values, Exception):
                    raise values
                yield values

    def __init__(self, columns, values):
        self.table, self.asked = FakeDatasets.Table(columns, values), []

    def load_dataset(self, *args, **options):
        self.asked.append((args, options))
        return {"test": None, "train": self.table}


@pytest.fixture
def hub(monkeypatch):
    """hub(columns, rows) -> the library, as if a dataset "someone/pictures" of these rows were on the hub."""

    def install(columns, values):
        library = FakeDatasets(columns, values)
        monkeypatch.setitem(sys.modules, "datasets", library)
        known = lambda name, revision: SimpleNamespace(sha={None: "sha0", "v2": "sha2"}[revision])  # noqa: E731
        monkeypatch.setattr(huggingface_hub, "dataset_info", known)
        return library

    return install


def test_a_hub_dataset_is_streamed_at_a_pinned_revision(hub):
    """Catches a download of everything, another split, undecodable pictures that end the run, and a revision that is ignored."""
    values = [{"jpg": {"bytes": png(i)}, "caption": [f"picture {i}", "other"]} for i in range(3)]
    values += [{"jpg": {"bytes": b"x"}, "caption": "broken"}, {"jpg": None, "caption": "none"}]
    values += [{"jpg": {"bytes": png(0)}, "caption": ""}]
    library = hub({"id": int, "jpg": FakeDatasets.Image(), "caption": str}, values)
    source, other = sources.captioned("someone/pictures"), sources.captioned("someone/pictures@v2")
    assert rows(source) == [(f"picture {i}", i) for i in range(3)] and source.fingerprint != other.fingerprint
    assert [options for _, options in library.asked] == [{"revision": sha, "streaming": True} for sha in ("sha0", "sha2")]


def test_a_hub_dataset_without_pictures_is_prompts_alone(hub):
    """Catches prompts datasets that are refused."""
    hub({"prompt": str}, [{"prompt": "a cat"}, {"prompt": "a dog"}])
    assert list(sources.captioned("someone/prompts")) == [("0", "a cat", None), ("1", "a dog", None)]


class OfBytes:
    """A column's kind as the library describes one of bytes."""

    dtype = "binary"


class ListOf:
    def __init__(self, feature):
        self.feature = feature


@pytest.mark.parametrize(
    "kind, wrapped",
    [
        ({"bytes": OfBytes(), "path": str}, lambda content: {"bytes": content, "path": None}),
        (OfBytes(), lambda content: content),
        (ListOf(OfBytes()), lambda content: [content, b"other"]),
        (ListOf({"bytes": OfBytes()}), lambda content: [{"bytes": content}]),
    ],
    ids=["struct", "binary", "list of binary", "list of structs"],
)
def test_pictures_in_a_column_of_bytes_are_read(hub, capsys, kind, wrapped):
    """Catches captions alone where pandas or another library wrote the pictures, and bytes of another thing taken for pictures."""
    columns = {"embedding": OfBytes(), "picture": kind, "text": str}
    values = [{"embedding": b"1234", "picture": wrapped(png(i)), "text": f"picture {i}"} for i in range(3)]
    values += [{"embedding": b"1234", "picture": None, "text": "none"}]
    hub(columns, values)
    assert rows(sources.captioned("someone/pictures")) == [(f"picture {i}", i) for i in range(3)]
    assert "3 used, 1 skipped: no picture (1)" in capsys.readouterr().out
    hub({k: v for k, v in columns.items() if k != "picture"}, values)
    assert rows(sources.captioned("someone/pictures")) == [(row["text"], None) for row in values]
    assert "has no column of pictures but embedding, text: its captions alone are used" in capsys.readouterr().out


def test_folders_that_the_datasets_library_knows_are_read_by_it(tmp_path):
    """Catches a change of the library: imagefolder and parquet, with its own decoding (skipped where it is not installed)."""
    pytest.importorskip("datasets")
    (tmp_path / "a" / "train").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "a" / "train" / f"{i}.png").write_bytes(png(i))
    (tmp_path / "a" / "train" / "bad.png").write_bytes(b"nothing")
    table = "file_name,text\n" + "".join(f"{i}.png,picture {i}\n" for i in range(3)) + "bad.png,bad\n"
    (tmp_path / "a" / "train" / "metadata.csv").write_text(table)
    assert rows(sources.captioned(str(tmp_path / "a"))) == [(f"picture {i}", i) for i in range(3)]
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = {"bytes": png(1), "path": "1.png"}
    meta = {b"huggingface": b'{"info": {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}}'}
    arrow = pyarrow.table({"image": [image], "text": ["picture 1"]}).replace_schema_metadata(meta)
    parquet.write_table(arrow, tmp_path / "p.parquet")
    assert rows(sources.captioned(str(tmp_path / "p.parquet"))) == [("picture 1", 1)]


def hub_lost(hub, path):
    hub({"text": str}, [{"text": "a cat"}, None])
    list(sources.captioned("someone/pictures"))


def hub_encoded(hub, path):
    hub({"text": str}, [{"text": "a cat"}, UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "unexpected end of data")])
    list(sources.captioned("someone/pictures"))


def unread_table(hub, path):
    (path / "t.parquet").write_bytes(b"no parquet")

    def load(*args, **options):
        raise ValueError("Parquet magic bytes not found")

    hub({}, []).load_dataset = load
    sources.captioned(f"{path}/t.parquet")


def hub_columns(hub, path):
    hub({"image": FakeDatasets.Image(), "label": int}, [])
    sources.captioned("someone/pictures")


def hub_unknown(hub, path):
    hub({}, [])
    sources.captioned("someone/pictures@v3")


def hub_no_library(hub, path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        sources.captioned("someone/pictures")


def no_spec(hub, path):
    sources.captioned(str(path / "nothing" / "here"))


def no_tar(hub, path):
    sources.captioned(str(path / "*.tar"))


def no_prompt(hub, path):
    (path / "p.txt").write_text("\n \n")
    sources.captioned(str(path / "p.txt"))


def no_text(hub, path):
    (path / "p.txt").write_bytes(b"\xff\xfe\xfa")
    sources.captioned(str(path / "p.txt"))


def no_prompts_file(hub, path):
    sources.captioned(str(path / "missing.txt"))


def no_captions(hub, path):
    (path / "0.png").write_bytes(png(0))
    sources.captioned(str(path))


def bad_line(hub, path):
    (path / "metadata.jsonl").write_text('{"file_name": 5, "text": "x"}')
    sources.captioned(str(path))


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (hub_lost, "run the same command again"),
        (hub_encoded, "has a table that is not UTF-8 .*: save it as UTF-8"),
        (unread_table, r"t.parquet cannot be read by the library datasets \(Parquet magic bytes not found\): check its files"),
        (hub_columns, "no column text, caption or prompt but image, label"),
        (hub_unknown, "check the name and the network"),
        (hub_no_library, "pip install datasets"),
        (no_spec, "is no folder"),
        (no_tar, "matches no .tar"),
        (no_prompt, "holds no prompt"),
        (no_text, "give a UTF-8 file"),
        (no_prompts_file, "cannot be read"),
        (no_captions, "has no captions"),
        (bad_line, "line 1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_data_that_cannot_serve_are_one_sentence(hub, tmp_path, case, says):
    """Catches tracebacks of libraries, and a wrong path that is taken for an empty source."""
    with pytest.raises(UserError, match=says) as caught:
        case(hub, tmp_path)
    assert "\n" not in str(caught.value)


def test_emoji_of_a_package_become_captioned_pictures(tmp_path):
    """Catches transparent pixels that turn black, a variation without its tone, an entry that has no picture."""
    entries = [
        {"name": "WAVING HAND", "short_name": "wave", "image": "a.png", "has_img_google": True, "skin_variations": {
            "1F3FB-1F3FE": {"image": "b.png", "has_img_google": True}, "1F3FF": {"image": "c.png", "has_img_google": False}}},
        {"name": None, "short_name": "red_ball", "image": "d.png", "has_img_google": True},
    ]  # fmt: skip
    clear = io.BytesIO()
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(clear, "png")
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as package:
        contents = {f"img/google/64/{name}.png": clear.getvalue() for name in "abd"} | {"emoji.json": json.dumps(entries).encode()}
        for name, content in contents.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    emoji.main(["--package", str(tmp_path / "package.tgz"), "--out", str(tmp_path / "out")])
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    said = {"a.png": "waving hand", "b.png": "waving hand, light and medium-dark skin tone", "d.png": "red ball"}
    assert {line["file_name"]: line["text"] for line in lines} == said
    pictures, captions = sources.source(str(tmp_path / "out")).batch(4, torch.Generator().manual_seed(0))
    assert (pictures == 1).all() and set(captions) <= set(said.values())
    with pytest.raises(UserError, match=r"give --package FILE\.tgz to make the folder, or --score RUN"):
        emoji.main([])
    (tmp_path / "other.tgz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="is not emoji-datasource-google: make it with npm pack"):
        emoji.main(["--package", str(tmp_path / "other.tgz")])


def test_pictures_of_a_run_on_a_folder_are_for_its_captions(tmp_path):
    """Catches a model of other pictures that is shown drawing scenes, and a folder that has moved away since."""
    folder = write_folder(tmp_path / "a")
    assert sources.sample_prompts({"data": str(folder)}) == ["picture 0", "picture 1", "picture 2"]
    for i in range(30):
        Image.new("RGB", (8, 8)).save(tmp_path / "a" / f"more{i}.png")
        (tmp_path / "a" / f"more{i}.txt").write_text(f"more {i}")
    (folder / "metadata.jsonl").unlink()
    assert len(sources.sample_prompts({"data": str(folder)})) == 8
    assert (
        sources.sample_prompts({"data": str(tmp_path / "gone")}) == sources.sample_prompts({"data": ""}) == sources.SAMPLE_PROMPTS
    )


@pytest.mark.slow
def test_scores_on_real_pictures_are_those_of_what_is_drawn(tmp_path, monkeypatch):
    """Catches captions beside other pictures, a student that is scored for the model it is compared with, and a run on scenes that
    is scored all the same. The features stand for those of the ImageNet network."""
    folder = write_folder(tmp_path / "pictures")
    write_folder(folder / "more")  # captions in folders below count too
    flags = "--model tiny-flux --steps 0 --calibration 2 --init zero --ranks uniform --rounding rtn --eval-n 2".split()
    train.main([*flags, "--data", str(folder), "--out", str(tmp_path / "run")])
    monkeypatch.setattr(emoji, "imagenet_features", lambda: lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))
    cells = [line.strip("| ").split(" | ") for line in emoji.score(tmp_path / "run", 12)[:-1]]
    rows = {(name, steps): (float(distance), psnr) for name, steps, distance, psnr in cells[2:]}
    texts = sources.Folder(str(folder)).texts
    order = torch.randperm(len(texts), generator=step_generator(emoji.SEED, 0))
    asked = [texts[order[i % len(texts)]] for i in range(12)]
    (student, _), network = checkpoint.load_checkpoint(tmp_path / "run"), load_embedded_cm("tiny-flux").to(FAST)
    models = ((as_cm(network), network), (student, student))  # each with its text encoder, the student's in bfloat16
    fp, ours = (draw(*model, asked, 4, 1_000_000 * emoji.SEED) for model in models)
    real, drawn = (torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1) for x in (sources.Folder(str(folder)).pictures, ours))
    assert rows["W4A4 CM", "4"][0] == pytest.approx(scores.frechet(real, drawn), abs=0.02)
    assert rows["W4A4 CM", "4"][1] == f"{scores.psnr(ours, fp):.2f}" and rows["fp CM", "4"][1] == "-"
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda run: (student, {"config": about["config"] | {"data": ""}}))
    with pytest.raises(UserError, match=r"was trained on scenes: score it with evaluate\.py"):
        emoji.score(tmp_path / "run", 12)
