"""run/report.py: what the page about a run says is what the run folder has, and it needs nothing else."""

import base64
import html
import io
import json
import re

import pytest
from PIL import Image

import evaluate
from run import files, report
from run.common import UserError

LAYERS = {
    "first.conv": {"kind": "w4a4", "shape": [64, 576], "rank": 3, "group_x": 8, "error": 0.0125},
    "middle.<b>": {"kind": "w4a16", "shape": [64, 256], "rank": 0, "group_x": 8, "error": 0.0005},
    "last.to_q": {"kind": "w4a4", "shape": [32, 64], "rank": 1, "group_x": 0, "error": 0.5},
}
FOUND = {
    "n": 3, "steps": 2, "seed": 7, "reference": "cm", "to_reference": ["psnr"],
    "first_prompts": ["a <b>cat</b>", "a dog"], "weights": "",
    "scores": {"cm": {"clip": 20.0, "psnr": 100.0}, "ours": {"clip": 20.5, "psnr": 35.25}},
    "versus": {"ours": {"clip": [0.5, -0.25, 1.25], "psnr": [35.25, 34.0, 36.5]}},
}  # fmt: skip


def pictures_of_page(page: str) -> dict[str, bytes]:
    """{text beside a picture: its RGB bytes}."""
    found = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="([^"]*)">', page)
    pictures = {html.unescape(alt): Image.open(io.BytesIO(base64.b64decode(data))).tobytes() for data, alt in found}
    assert len(pictures) == len(found) == page.count("<img")
    return pictures


@pytest.fixture
def run(tmp_path):
    """A run folder without weights."""
    config = {"model": "sdxl", "seed": 5, "out": "", "data": "<script>"}
    files.write_json(
        tmp_path / "run" / "config.json", {"format": files.FORMAT, "config": config, "layers": LAYERS, "torch": "2", "commit": ""}
    )
    rows = [{"step": k, "loss": 0.5 / (k + 1), "norm": 1.0, "objective": "tdpt" if k % 2 else "rollout"} for k in range(30)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    closing = {"steps": 4, "n": 16, "mb": 25.0, "mb_bf16": 100.0, "branch_parameters": 0.02, "fp": {"frechet": 3.25}}
    closing |= {"w4a4": {"frechet": 3.5, "psnr_to_fp": 41.0}}
    (tmp_path / "run" / "report.json").write_text(json.dumps(closing))
    (tmp_path / "run" / "seconds.json").write_text(json.dumps({"first.conv": 3.0, "last.to_q": 1.0, "conv_out": 4.0}))
    return tmp_path / "run"


def report_of(run) -> str:
    evaluate.main(["report", str(run)])
    return (run / "report.html").read_text()


def text_of(page: str) -> str:
    """The page's words, cells and lines parted by single blanks."""
    body = re.sub(r"<(script|style|svg)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_a_layer_has_its_share_of_time_and_the_bits_of_its_inputs():
    """Catches shares of another total, a layer in 16 bits that is forgotten, outputs and inputs in each other's place."""
    rows = report.layer_rows(LAYERS, {"first.conv": 3.0, "last.to_q": 1.0, "conv_out": 4.0})
    assert rows == [
        ["first.conv", "w4a4", "576", "64", "3", "4", "1.2500", "37.50"],
        ["middle.<b>", "w4a16", "256", "64", "0", "16", "0.0500", ""],
        ["last.to_q", "w4a4", "64", "32", "1", "8", "50.0000", "12.50"],
        ["conv_out", "16bit", "", "", "0", "16", "", "50.00"],
    ]
    assert [row[-1] for row in report.layer_rows(LAYERS, {})] == [""] * 3


def test_losses_are_parted_by_their_objective():
    """Catches a mean over both objectives, one that looks ahead, and the losses of a run that names none."""
    metrics = [{"step": k, "loss": float(k), "objective": "ab"[k % 2]} for k in range(60)]
    steps, losses, means = report.curves_by_objective(metrics)["b"]
    assert steps == list(range(1, 60, 2)) == losses
    assert means[:4] == [1, 2, 3, 5] and means[29] == (55 + 57 + 59) / 3
    assert list(report.curves_by_objective([{"step": 0, "loss": 1.0}])) == ["loss"]


def test_scores_are_shown_with_what_their_rows_differ_by():
    """Catches an interval in another column, and a difference that is shown for a metric which is one."""
    table = report.score_table(FOUND)
    assert table["metrics"] == ["clip", "psnr"]
    assert table["rows"] == [
        ("cm", ["20.000", "100.000"]),
        ("ours", ["20.500", "35.250"]),
        ("difference to cm, 95% interval", ["+0.500 [-0.250, 1.250]", "[34.000, 36.500]"]),
    ]


def test_the_page_says_what_the_folder_has_and_needs_no_other_file(run):
    """Catches text that is taken for HTML, a link to another file or host, and numbers that are lost on the way."""
    picture = Image.new("RGB", (1024, 512), "red")
    page = report.page(run, [], [report.Sheet("caption", ["a <b>cat</b>"], {"ours": [picture]})], ["A note."])
    assert not re.search(r'(src|href)="(?!data:|#)|url\((?!#)|@import|https?://(?!www\.w3\.org/)', page)
    assert "<b>" not in page and page.count("<script>") == 1
    said = text_of(page)
    for words in ("sdxl: run", "30 updates, seed 5, torch 2, commit unknown", "memory ratio 0.250", "A note.", "a <b>cat</b>"):
        assert words in said, words
    assert "fp 3.250 w4a4 3.500 41.000" in said and "python evaluate.py --checkpoint" in said
    assert "first.conv w4a4 576 64 3 4 1.2500 37.50" in said and "data <script>" in said
    assert pictures_of_page(page) == {"ours: a <b>cat</b>": Image.new("RGB", (384, 192), "red").tobytes()}
    assert all(f">{objective}<" in page for objective in ("tdpt", "rollout")) and page.count("<svg") == 1
    (run / "metrics.jsonl").write_text("")
    assert "<svg" not in report.page(run, [], [], [])


def test_pictures_and_scores_of_the_evaluation_are_shown(run):
    """Catches pictures out of order, more than fit, prompts of others, and closing lines in place of better scores."""
    for i in range(report.SHOWN + 2):
        for row in ("cm", "ours"):
            path = run / "evaluation-2" / row / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, 0, row == "cm")).save(path)
    prompts = [f"prompt {i}" for i in range(report.SHOWN)]
    (run / "evaluation-2" / "scores.json").write_text(json.dumps(FOUND | {"first_prompts": prompts}))
    evaluate.main(["report", str(run)])
    page = (run / "report.html").read_text()
    shown = {f"{row}: prompt {i}": bytes((i, 0, row == "cm")) * 64 for row in ("cm", "ours") for i in range(report.SHOWN)}
    assert pictures_of_page(page) == shown
    assert "+0.500 [-0.250, 1.250]" in text_of(page) and "3.250" not in text_of(page)


def test_scores_of_other_weights_are_left_out(run, capsys):
    """Catches pictures and scores of a student that was trained again in the same folder since, and more pictures than prompts."""
    for i in range(3):
        (run / "evaluation" / "ours").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(run / "evaluation" / "ours" / f"{i:05}.png")
    (run / "evaluation" / "scores.json").write_text(json.dumps(FOUND))
    assert len(pictures_of_page(report_of(run))) == len(FOUND["first_prompts"]) == 2
    files.write_tensors(run / "model.safetensors", {}, {})
    page = report_of(run)
    assert not pictures_of_page(page) and "+0.500" not in page and "scores.json is of other weights" in capsys.readouterr().out
    weights = files.recorded_checksum(run / "model.safetensors")
    (run / "evaluation" / "scores.json").write_text(json.dumps(FOUND | {"weights": weights}))
    assert len(pictures_of_page(report_of(run))) == 2


def test_what_is_missing_or_damaged_is_one_sentence(run, capsys):
    """Catches tracebacks, and a page of a run that has not ended."""
    evaluate.main(["report", str(run), "--out", str(run / "page.html")])
    assert f"report: {run / 'page.html'}" in capsys.readouterr().out and "Pictures are drawn by" in (run / "page.html").read_text()
    (run / "evaluation" / "ours").mkdir(parents=True)
    (run / "evaluation" / "ours" / "00000.png").write_bytes(b"no picture")
    (run / "evaluation" / "scores.json").write_text(json.dumps(FOUND))
    with pytest.raises(UserError, match=r"00000.png cannot be read .*: delete it, and draw it again"):
        evaluate.main(["report", str(run)])
    (run / "evaluation" / "scores.json").write_text("{}")
    with pytest.raises(UserError, match=r"scores.json cannot be read: delete it, and run evaluate.py again"):
        evaluate.main(["report", str(run)])
    (run / "evaluation" / "scores.json").unlink()
    (run / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"lacks a file or has a damaged one .*: run its train.py command again"):
        evaluate.main(["report", str(run)])
    (run / "report.json").unlink()
    with pytest.raises(UserError, match=r"lacks a file or has a damaged one .*: run its train.py command again"):
        evaluate.main(["report", str(run)])
    about = files.read_config(run)
    files.write_json(run / "config.json", about | {"config": about["config"] | {"bits": 16}})
    with pytest.raises(UserError, match=r"holds 16-bit weights, no packed student"):
        evaluate.main(["report", str(run)])
    about.pop("layers")
    files.write_json(run / "config.json", about)
    with pytest.raises(UserError, match=r"is an unfinished run: run its train.py command again"):
        evaluate.main(["report", str(run)])
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluate.main(["report", str(run / "nothing")])
