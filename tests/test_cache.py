"""data/cache.py: buckets are near and inside the picture; caches survive kills, flipped bits, several processes; stale: refused."""

import itertools
import json
import os
import re
import threading
import zlib

import miniature
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data import cache, sources
from data.cache import BATCH, Cache, CacheBuilder, buckets, fit, nearest_size
from run import files as run_files
from run.common import UserError, step_generator

KEY = {"model": "sdxl", "base": "0123"}
SIZES = [(100, 110), (40, 160), (160, 40), (90, 90), (200, 70), (64, 64), (301, 291), (50, 200), (70, 71), (30, 100), (99, 98)]


def pictures(path, sizes=SIZES):
    """A folder of noise with captions, (width, height) each."""
    path.mkdir()
    for i, size in enumerate(sizes):
        Image.effect_noise(size, 60 + i).convert("RGB").save(path / f"{i:02d}.png")
        (path / f"{i:02d}.txt").write_text(f"picture {i}")
    return path


def encode_pictures(x):
    assert x.dtype == torch.float32 and x.abs().max() <= 1 and 1 <= len(x) <= BATCH
    return F.avg_pool2d(x, 8)


def encode_captions(captions):
    numbers = torch.tensor([[zlib.crc32(f"{c}{i}".encode()) % 251 for i in range(6)] for c in captions]).float()
    return {"tokens": numbers.view(-1, 3, 2), "pooled": numbers[:, :4] / 7, "time_ids": torch.full((len(captions), 6), 128.0)}


def build(folder, source, **changes):
    options = {"encode_pictures": encode_pictures, "encode_captions": encode_captions, "key": KEY, "resolution": 128, "shard": 3}
    return CacheBuilder(folder, source, **(options | changes)).open_or_make()


def contents_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix != ".tmp"}


def draw(cond, gen):
    noise = torch.randn(len(cond["tokens"]), 3, 16, 16, generator=gen)
    noise[:, 0] += cond["pooled"][:, 0, None, None]
    return noise


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sources.captioned(str(pictures(tmp_path_factory.mktemp("data") / "a")))


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "c"
    return build(folder, source), contents_of(folder)


def restore(folder, contents):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Buckets


@given(st.integers(1, 32).map(lambda n: 64 * n))
def test_bucket_sizes_are_multiples_of_64_of_nearly_the_square_s_area(resolution):
    """Catches a list that needs more memory than the square, wastes a step of 64, lies on one side only, or lacks the square."""
    sizes = buckets(resolution)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for h, w in sizes:
        assert h % 64 == w % 64 == 0 and min(h, w) >= 64 and (w, h) in sizes and max(h, w) <= 4 * min(h, w)
        assert resolution**2 - 64 * max(h, w) < h * w <= resolution**2


def test_buckets_at_1024_are_in_sdxl_s_list():
    """Catches another rounding: sizes of SDXL's paper, appendix I, that people train and draw at; ratios to 2:1 and beyond."""
    known = {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (640, 1536), (512, 2048)}
    sizes = buckets(1024)
    assert known <= set(sizes) and max(w / h for h, w in sizes) >= 2


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 20).map(lambda n: 64 * n))
@example(190, 100, 128).via("nearer to 1 by difference, nearer to 3 by quotient")
def test_a_picture_goes_to_the_nearest_ratio(h, w, resolution):
    """Catches differences of ratios instead of quotients, and h with w exchanged."""
    sizes = buckets(resolution)
    H, W = nearest_size(h, w, sizes)
    distance = {(a, b): max(a * w / (b * h), b * h / (a * w)) for a, b in sizes}
    assert distance[H, W] <= min(distance.values()) * (1 + 1e-12)


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from((64, 128, 256)))
@example(1, 4000, 128).via("a picture that would have to grow to millions of pixels")
@example(64, 64, 64).via("nothing to do")
def test_the_cut_is_the_middle_of_the_picture_and_time_ids_say_where(h, w, resolution):
    """Catches a cut beside the picture, one that is stretched, and top exchanged with left: pixels tell where they come from."""
    across = torch.linspace(0, 255, w).round().byte() if w > 1 else torch.full((1,), 128, dtype=torch.uint8)
    down = torch.linspace(0, 255, h).round().byte() if h > 1 else torch.full((1,), 128, dtype=torch.uint8)
    image = torch.stack([across.expand(h, w), down[:, None].expand(h, w), torch.zeros(h, w, dtype=torch.uint8)], 2)
    pixels, (oh, ow, top, left, H, W) = fit(Image.fromarray(image.numpy()), buckets(resolution))
    assert (oh, ow) == (h, w) and pixels.shape == (3, H, W) and (H, W) in buckets(resolution)
    scale = max(H / h, W / w)
    assert 0 <= top and top + H <= h * scale + 1e-6 and 0 <= left and left + W <= w * scale + 1e-6
    assert abs(top - (h * scale - H) / 2) <= 1 and abs(left - (w * scale - W) / 2) <= 1 and min(top, left) == 0
    x, y = (left + W / 2) / scale, (top + H / 2) / scale  # where the middle of the cut comes from
    step = 255 / max(1, min(h, w) - 1)
    for channel, place, size in ((0, x, w), (1, y, h)):
        expected = 255 * (place - 0.5) / (size - 1) if size > 1 else 128
        assert abs(pixels[channel, H // 2 - 1 : H // 2 + 1, W // 2 - 1 : W // 2 + 1].float().mean() - expected) < 2 + step / 2


# ---------------------------------------------------------------------------------------------------------------------
# What is stored, and how it is drawn


def test_the_cache_gives_back_what_the_encoders_gave(source, finished):
    """Catches rows of one picture beside the caption of another, a lost row, and time_ids that were rounded to bfloat16."""
    made, _ = finished
    expected = {}
    for _, caption, picture in source:
        pixels, ids = fit(picture, buckets(128))
        expected[caption] = encode_pictures(pixels[None].float() / 127.5 - 1), encode_captions([caption]), ids
    assert int(made.ends[-1]) == len(SIZES) and len(made.last) > 2
    seen = set()
    for step in range(80):
        x0, cond = made.latents(4, step_generator(0, step))
        assert x0.dtype == torch.float32 and cond["tokens"].dtype == torch.bfloat16 and cond["time_ids"].dtype == torch.float32
        for b in range(4):
            caption = next(c for c, e in expected.items() if torch.equal(e[1]["tokens"][0], cond["tokens"][b].float()))
            latents, text, ids = expected[caption]
            assert torch.equal(x0[b], latents[0].half().float()) and torch.equal(cond["pooled"][b], text["pooled"][0].bfloat16())
            assert cond["time_ids"][b].tolist() == ids
            seen.add(caption)
    assert len(seen) == len(SIZES)


@given(st.integers(0, 10**6), st.integers(2, 9))
@settings(max_examples=15)
def test_a_batch_is_a_function_of_the_generator_and_processes_share_it(finished, step, n):
    """Catches global random state, a bucket drawn by each process for itself, and shares that overlap."""
    made = finished[0]

    def ask(local_rows=slice(None)):
        x0, cond = made.latents(n, step_generator(1, step), local_rows)
        prompts = made.conditions(n, step_generator(1, step), local_rows)
        return {"x0": x0} | cond | {f"prompts/{k}": v for k, v in prompts.items()}

    whole = ask()
    torch.rand(3)
    again, shares = ask(), [ask(slice(index, None, 2)) for index in range(2)]
    for k, v in whole.items():
        assert len(v) == n and torch.equal(v, again[k])
        assert all(torch.equal(v[index::2], shares[index][k]) for index in range(2))


def test_buckets_are_drawn_by_their_size(finished):
    """Catches buckets drawn with equal probability: a lone panorama would be seen as often as all squares together."""
    made = finished[0]
    shapes = [tuple(made.latents(1, step_generator(2, step))[0].shape[2:]) for step in range(500)]
    for first, (bucket, last) in zip((0, *made.last.values()), made.last.items(), strict=False):
        h, w = (int(side) // 8 for side in bucket.split("x"))
        assert abs(shapes.count((h, w)) / 500 - (last - first) / len(SIZES)) < 0.07


def test_conditions_reach_every_caption_and_are_told_a_whole_square(source, finished):
    """Catches captions of rare buckets that are never drawn, and a picture's crop told to a rollout from square noise."""
    made = finished[0]
    cond = made.conditions(300, step_generator(3, 0))
    assert len({tuple(row) for row in cond["pooled"].tolist()}) == len(SIZES)
    assert (cond["time_ids"] == 128).all() and torch.equal(made.null()["tokens"], encode_captions([""])["tokens"].bfloat16())
    assert "latents" not in cond and len(made.null()["time_ids"]) == 1


def test_prompts_alone_get_drawn_latents_or_none(tmp_path):
    """Catches a draw without its caption, noise that depends on the run or comes back in every shard, and latents from nothing."""
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(11)))
    prompts = sources.captioned(str(tmp_path / "p.txt"))
    made = build(tmp_path / "a", prompts, draw=draw)
    build(tmp_path / "b", prompts, draw=draw, encode_pictures=None)
    assert contents_of(tmp_path / "a") == contents_of(tmp_path / "b")
    x0, cond = made.latents(40, step_generator(0, 0))
    assert x0.shape == (40, 3, 16, 16) and len(x0[:, 1:].flatten(1).unique(dim=0)) == 11
    assert (x0[:, 0].mean((1, 2)) - cond["pooled"][:, 0].float()).abs().max() < 0.5
    without = build(tmp_path / "c", prompts, encode_pictures=None)
    assert len(without.conditions(5, step_generator(0, 0))["tokens"]) == 5
    with pytest.raises(UserError, match="prompts alone"):
        without.latents(5, step_generator(0, 0))


def test_unreadable_pictures_are_named_in_the_manifest_and_left_out(tmp_path, capsys):
    """Catches a crash in the middle of a night's encoding, and captions that move to the next picture."""
    folder = pictures(tmp_path / "a", SIZES[:5])
    (folder / "01.png").write_bytes(b"no picture")
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:300])
    made = build(tmp_path / "c", sources.captioned(str(folder)))
    assert [line[:6] for line in made.skipped] == ["01.png", "03.png"]
    printed = capsys.readouterr().out
    assert (
        "skipped 01.png" in printed and f"{folder}: 5 pictures or captions found, 3 used, 2 skipped: cannot be read (2)" in printed
    )
    cond = made.conditions(60, step_generator(0, 0))
    expected = encode_captions(["picture 0", "picture 2", "picture 4"])["tokens"].bfloat16()
    assert torch.equal(cond["tokens"].unique(dim=0), expected.unique(dim=0))


def test_a_caption_that_no_tokenizer_takes_and_exif_that_is_none_end_no_build(tmp_path, capsys):
    """Catches a night's encoding that ends at one row, and at the same one each time."""

    def strict(captions):
        for caption in captions:
            caption.encode()  # as tokenizers do
        return encode_captions(captions)

    def broken():
        raise AttributeError("'IFDRational' object has no attribute 'encode'")

    def whole():
        return Image.new("RGB", (128, 128))

    rows = [("a", "a cat \ud83d", whole), ("caf\udce9", "a dog", broken), ("c", "a tree", whole)]
    made = build(tmp_path / "c", sources.Source("x", "y", lambda: iter(rows)), encode_captions=strict)
    assert [line.split(":")[0] for line in made.skipped] == ["caf\udce9"] and "skipped caf?" in capsys.readouterr().out
    expected = encode_captions(["a cat ?", "a tree"])["tokens"].bfloat16()
    assert torch.equal(made.conditions(40, step_generator(0, 0))["tokens"].unique(dim=0), expected.unique(dim=0))


def test_a_cache_removes_its_own_halves_and_no_others(source, tmp_path):
    """Catches --cache . that deletes a user's .tmp files, halves that stay for ever, and those of a run that is at work."""
    (folder := tmp_path / "c").mkdir()
    for name in ("mine.tmp", "000001.7.tmp", "000002.8.tmp"):
        (folder / name).write_text("half")
        os.utime(folder / name, (1, 1))
    (folder / "000003.9.tmp").write_text("at work")
    for _ in range(2):  # the first makes it a cache
        build(folder, source)
    assert {file.name for file in folder.glob("*.tmp")} == {"mine.tmp", "000003.9.tmp"}


def test_two_runs_fill_one_cache(source, finished, tmp_path, monkeypatch):
    """Catches temporary files of one name, where the one that is renamed first takes the other's away."""
    write, inner = run_files.save_file, []

    def slow(tensors, file, metadata):
        write(tensors, file, metadata)
        if not inner:  # another run makes the same shard meanwhile
            inner.append(1)
            monkeypatch.setattr(os, "getpid", lambda: 1)
            build(tmp_path / "c", source)
            monkeypatch.undo()
            monkeypatch.setattr(run_files, "save_file", slow)

    monkeypatch.setattr(run_files, "save_file", slow)
    build(tmp_path / "c", source)
    assert contents_of(tmp_path / "c") == finished[1]


# ---------------------------------------------------------------------------------------------------------------------
# Nothing lost


class Killed(BaseException):
    pass


def test_a_build_killed_at_any_file_operation_goes_on_to_the_same_bytes(source, finished, tmp_path, monkeypatch):
    """Catches a shard that counts although it was not finished, and one that depends on where the run began."""
    replace, unlink = os.replace, type(tmp_path).unlink
    for stop in itertools.count():
        folder, operations = tmp_path / f"{stop}", itertools.count()

        def step(do, *args, operations=operations, stop=stop, **options):
            if next(operations) == stop:
                raise Killed
            return do(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *a, step=step: step(replace, *a))
            patch.setattr(type(tmp_path), "unlink", lambda *a, step=step, **o: step(unlink, *a, **o))
            try:
                build(folder, source)
            except Killed:
                pass
            else:
                break
        build(folder, source)
        assert contents_of(folder) == finished[1]
    assert stop > 12


def test_a_resumed_build_encodes_only_what_is_missing(source, finished, tmp_path):
    """Catches a resume that begins again, and a finished cache that asks the encoders or the source for anything."""
    seen = []

    def count(captions):
        seen.extend(captions)
        if len(seen) > 7:
            raise Killed
        return encode_captions(captions)

    with pytest.raises(Killed):
        build(tmp_path / "c", source, encode_captions=count)
    done = len(list((tmp_path / "c").glob("0*.safetensors")))
    seen.clear()
    build(tmp_path / "c", source, encode_captions=lambda captions: seen.extend(captions) or encode_captions(captions))
    assert 0 < done < 4 and set(seen) == {f"picture {i}" for i in range(3 * done, len(SIZES))}
    assert contents_of(tmp_path / "c") == finished[1]
    blind = sources.Source(source.spec, source.fingerprint, None)
    assert build(tmp_path / "c", blind, encode_pictures=None, encode_captions=None).last == finished[0].last


@given(st.data())
@settings(max_examples=40)
def test_a_flipped_bit_anywhere_is_noticed(source, finished, tmp_path_factory, data):
    """Catches damage that is trained on: a shard is named and made again with the same bytes, a damaged manifest is refused."""
    contents = finished[1]
    name = data.draw(st.sampled_from(sorted(contents)))
    flipped = bytearray(contents[name])
    flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    folder = restore(tmp_path_factory.mktemp("flip"), contents | {name: bytes(flipped)})
    if name == "manifest.json":
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            build(folder, source)
    else:
        build(folder, source)
        assert contents_of(folder) == contents


@pytest.mark.parametrize("damage", ["gone", "truncated", "swapped"])
def test_damaged_shards_are_named_and_made_again(source, finished, tmp_path, capsys, damage):
    """Catches a check of sizes or of presence alone, and one that is silent."""
    folder = restore(tmp_path / "c", finished[1])
    one, two = folder / "00001.safetensors", folder / "00002.safetensors"
    if damage == "gone":
        one.unlink()
    elif damage == "truncated":
        one.write_bytes(one.read_bytes()[:-10])
    else:
        content = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(content)
    build(folder, source)
    assert contents_of(folder) == finished[1]
    assert re.search(f"{one} (is gone|is truncated|was swapped).*made again", capsys.readouterr().out)


def test_two_processes_make_the_cache_that_one_makes(source, finished, tmp_path, monkeypatch):
    """Catches a shard that two processes or none make, and reading before all have written; also on a damaged cache."""
    process = threading.local()  # threads stand for processes
    monkeypatch.setattr(cache, "process_index", lambda: process.index)
    monkeypatch.setattr(cache, "process_count", lambda: 2)
    monkeypatch.setattr(cache, "wait_for_all", threading.Barrier(2, timeout=30).wait)
    for contents in ({}, finished[1] | {"00000.safetensors": b"", "00001.safetensors": b"", "null.safetensors": b""}):
        folder, made, errors = tmp_path / f"{len(contents)}", {}, []
        if contents:
            restore(folder, contents)
        captions = {0: [], 1: []}

        def work(index, folder=folder, made=made, captions=captions, errors=errors):
            process.index = index

            def encode(texts):
                captions[index].extend(texts)
                return encode_captions(texts)

            try:
                made[index] = build(folder, source, encode_captions=encode)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and contents_of(folder) == finished[1]
        assert captions[0] and captions[1] and not set(captions[0]) & set(captions[1])
        x, y = (made[index].latents(4, step_generator(0, 0))[0] for index in range(2))
        assert torch.equal(x, y)


STALE = {
    "base": {"key": KEY | {"base": "4567"}}, "model": {"key": KEY | {"model": "flux"}}, "vae": {"key": KEY | {"vae": "x"}},
    "resolution": {"resolution": 192}, "shard": {"shard": 4}, "drawn latents": {"draw": draw},
}  # fmt: skip


@pytest.mark.parametrize("changed", sorted(STALE))
def test_a_cache_of_another_key_is_refused_by_name(source, finished, tmp_path, changed):
    """Catches latents of another VAE or size that go on being used: finished or not, the message names what differs."""
    folder = restore(tmp_path / "c", finished[1])
    with pytest.raises(UserError, match=f"made with another {changed}: delete the folder or choose another --cache"):
        build(folder, source, **STALE[changed])
    assert contents_of(folder) == finished[1]


def test_a_cache_of_changed_pictures_is_refused(tmp_path):
    """Catches a fingerprint of names alone: the picture, its caption, or the number of pictures has changed."""
    folder = pictures(tmp_path / "a", SIZES[:3])
    build(tmp_path / "c", sources.captioned(str(folder)))
    for change in (
        lambda: os.utime(folder / "01.png", (1, 1)),
        lambda: (folder / "02.txt").write_text("another caption"),
        lambda: (folder / "00.txt").unlink(),
    ):
        before = sources.captioned(str(folder)).fingerprint
        assert before == sources.captioned(str(folder)).fingerprint
        change()
        assert sources.captioned(str(folder)).fingerprint != before
    with pytest.raises(UserError, match="another fingerprint of the data: delete"):
        build(tmp_path / "c", sources.captioned(str(folder)))


def refused_resolution(source, folder):
    build(folder, source, resolution=100)


def refused_foreign(source, folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("")
    build(folder, source)


def refused_overflow(source, folder):
    build(folder, source, encode_pictures=lambda x: encode_pictures(x) * float("inf"))


def refused_nothing(source, folder):
    build(folder, sources.Source("x", "y", lambda: iter([("a", "b", sources._unreadable("no"))])))


def refused_most(source, folder):
    whole = lambda: Image.new("RGB", (128, 128))  # noqa: E731
    reasons = (sources.NO_CAPTION, "broken", sources.NO_CAPTION)
    lost = [(key, "", sources._unreadable(why)) for key, why in zip("abc", reasons, strict=True)]
    made = sources.Source("x", "y", lambda: iter([*lost, ("d", "a cat", whole), ("e", "a dog", whole)]))
    for _ in range(2):  # a second command does not let it pass
        with pytest.raises(UserError, match="only 2 of 5"):
            build(folder, made)
    build(folder, made)


def refused_no_cache(source, folder):
    Cache(folder)


def refused_full(source, folder):
    def full(*args):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_files, "save_file", full)
        build(folder, source)


def refused_file(source, folder):
    folder.write_text("")
    build(folder, source)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (refused_resolution, "multiple of 64"),
        (refused_foreign, "not empty and no cache"),
        (refused_overflow, "not finite"),
        (
            refused_nothing,
            r"only 0 of 1 pictures and captions of --data could be used \(cannot be read \(1\)\), such as a: no: mend",
        ),
        (refused_most, r"only 2 of 5 .* \(no caption \(2\), cannot be read \(1\)\)"),
        (refused_no_cache, "no finished cache"),
        (refused_full, "free some space"),
        (refused_file, "cannot make the cache folder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_user_can_cause_is_one_sentence(source, tmp_path, case, says):
    """Catches tracebacks, a foreign folder that is filled, and NaN latents that are kept for training."""
    with pytest.raises(UserError, match=says) as caught:
        case(source, tmp_path / "c")
    assert "\n" not in str(caught.value)


def test_a_shard_that_vanishes_during_training_is_one_sentence(source, finished, tmp_path):
    """Catches a traceback of the file format."""
    made = Cache(restore(tmp_path / "c", finished[1]))
    for file in (tmp_path / "c").glob("0*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="run the same command again"):
        made.latents(2, step_generator(0, 0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_real_vae_and_real_text_encoders_fill_a_cache(source, tmp_path, name):
    """Catches shapes that only the stand-ins have: three-channel latents, one text encoder."""
    pipe = miniature.PIPELINES[name]()

    def encode(captions):
        if name == "sdxl":
            tokens, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
            return {"tokens": tokens, "pooled": pooled, "time_ids": torch.full((len(captions), 6), 64.0)}
        tokens, pooled, _ = pipe.encode_prompt(captions, captions, max_sequence_length=32)
        return {"tokens": tokens, "pooled": pooled}

    made = build(tmp_path / "c", source, encode_pictures=lambda x: pipe.vae.encode(x).latent_dist.mode(), encode_captions=encode)
    x0, cond = made.latents(2, step_generator(0, 1))
    assert x0.shape[1] == pipe.vae.config.latent_channels and x0.isfinite().all() and ("time_ids" in cond) == (name == "sdxl")
    assert cond["tokens"].shape[1:] == made.null()["tokens"].shape[1:] and x0.shape[2] * x0.shape[3] <= 256


def test_an_unfinished_cache_of_an_older_version_is_finished_and_stays_whole(source, finished, tmp_path, capsys):
    """Catches a manifest that ends with another key than its shards name: all of them would be made again."""
    folder = restore(tmp_path / "c", finished[1])
    key = json.loads((folder / "manifest.json").read_text())["key"]
    run_files.write_json(folder / "manifest.json", {"key": key, "shards": None})
    for _ in range(2):
        build(folder, source, key=KEY | {"files of the base": "89ab"})
    assert "it is made again" not in capsys.readouterr().out and contents_of(folder) == finished[1]
