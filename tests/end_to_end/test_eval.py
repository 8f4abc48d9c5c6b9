"""`t2irl eval`, `grid` and `compare` through the command line, on the smallest model."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from t2irl import cli
from t2irl.evaluation.glossary import lookup
from tests.end_to_end.runs import HELDOUT, PLUGINS, base_config, call, metrics, snapshot, spawn, train

pytestmark = pytest.mark.slow
BRIGHT = {"bright": {"type": f"{PLUGINS}:Brightness"}, "flat": {"type": f"{PLUGINS}:PartlyFlat"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, sd3_folder: Callable[..., Path]) -> Path:
    """A folder with the runs `run` (two checkpoints, with a held-out reward) and `other`."""
    folder = tmp_path_factory.mktemp("runs")
    config = base_config(folder, sd3_folder())
    held = [f"--heldout_rewards.gold.type={PLUGINS}:PartlyFlat", "--evaluation.images=6", "--optimizer.lr=0.01"]
    assert train(config, *held) == 0
    assert train(config, *held, "--seed=1", f"--run_dir={folder / 'other'}") == 0
    return folder


@pytest.fixture
def config(runs: Path, tmp_path: Path) -> Path:
    """An evaluation of the held-out prompts, three pictures each, in `tmp_path`/eval."""
    path, references = tmp_path / "eval.yaml", tmp_path / "real"
    references.mkdir()
    for k in range(4):
        noise = np.random.default_rng(k).integers(0, 256, (16 + 4 * k, 20, 3), np.uint8)
        Image.fromarray(noise).save(references / f"{k}.png")
    settings = {
        "out": str(tmp_path / "eval"),
        "suite": {"type": "prompts", "path": str(runs / "heldout.txt"), "images": 3},
        "batch_size": 2,
        "rewards": BRIGHT,
        "proxy": "bright",
        "features": {"pixels": {"type": "pixels"}},
        "distances": {"cmmd": True, "neighbours": 2, "subsets": 5},
        "reference_images": str(references),
        "statistics": {"resamples": 99},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def evaluate(config: Path, *words: object) -> int:
    """`t2irl eval` in this process; the exit code."""
    return cli.main(["eval", str(config), *map(str, words)])


def images(out: Path) -> dict[str, bytes]:
    """Every picture of an evaluation."""
    return {name: data for name, data in snapshot(out / "images").items() if name.endswith(".png")}


def lines(out: Path) -> list[dict[str, object]]:
    """images.jsonl."""
    return [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]


def test_from_checkpoints_to_tables(
    runs: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every picture once, with its scores; every measure in the glossary; asked again, nothing is drawn or scored."""
    out = tmp_path / "eval"
    subjects = ("base", f"{runs}/run@all", f"again={runs}/run")
    assert evaluate(config, *subjects) == 0
    found = lines(out)
    assert len(found) == 4 * 3 * 3 and len({line["path"] for line in found}) == len(found) == len(images(out))
    assert all((out / str(line["path"])).is_file() and set(line["scores"]) == {"bright", "flat"} for line in found)  # type: ignore[call-overload]
    rows = [("base", "base"), ("run", "iteration 1"), ("run", "iteration 2"), ("again", "iteration 2")]
    assert list(dict.fromkeys((line["method"], line["checkpoint"]) for line in found)) == rows
    with Image.open(out / str(found[-1]["path"])) as picture:
        notes = picture.info
    assert (notes["prompt"], notes["seed"], notes["image"]) == (HELDOUT[2], "0", "2") and notes["config"]
    table = json.loads((out / "table.json").read_text())
    assert not [name for name in table["measures"] if lookup(name) is None]
    kinds = {name.partition("/")[0] for name in table["measures"]}
    assert kinds == {"score", "spread", "diversity", "drift", "quality"}
    with (out / "table.csv").open() as file:
        measured = {row["measure"] for row in csv.DictReader(file)}
    assert measured == set(table["measures"])
    last, same = table["rows"][-2]["measures"], table["rows"][-1]["measures"]
    assert last["score/bright"] == same["score/bright"]
    assert last["drift/pixels/kid"]["mean"] != 0 and last["score/bright"]["difference"]["p"] is not None
    by_hand = np.mean([np.mean([line["scores"]["bright"] for line in found[k : k + 3]]) for k in range(0, 9, 3)])  # type: ignore[index]
    assert table["rows"][0]["measures"]["score/bright"]["mean"] == pytest.approx(by_hand)
    assert "<script" not in (out / "report.html").read_text() and "lowest flat" in (out / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.parts[-2] not in (out.name,)}
    capsys.readouterr()
    assert evaluate(config, *subjects) == 0
    assert "drawn" not in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.parts[-2] not in (out.name,)}


def test_it_measures_what_the_run_measured(runs: Path, config: Path) -> None:
    """The same prompts, noise and weights: the run's own held-out means."""
    assert evaluate(config, f"{runs}/run", "--suite.images=2") == 0
    table = json.loads((config.with_name("eval") / "table.json").read_text())
    own = [line for line in metrics(runs / "run") if "heldout/gold" in line][-1]
    measured = table["rows"][0]["measures"]
    assert measured["score/bright"]["mean"] == pytest.approx(own["heldout/bright"], abs=2e-3)
    assert measured["score/flat"]["mean"] == pytest.approx(own["heldout/gold"], abs=2e-3)


@pytest.fixture(scope="module")
def whole(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """An evaluation by one process that was never interrupted: its config and its pictures."""
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "eval.yaml"
    suite = {"type": "prompts", "path": str(runs / "heldout.txt"), "images": 7}
    rewards = BRIGHT | {"all": {"type": f"{PLUGINS}:WholeSet"}}
    path.write_text(yaml.safe_dump({"out": str(folder / "eval"), "suite": suite, "batch_size": 2, "rewards": rewards}))
    assert evaluate(path, "base", f"{runs}/run") == 0
    return path, images(folder / "eval")


def test_two_processes_draw_the_same_bits(runs: Path, whole: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "t2irl", "eval"]
    words = [str(whole[0]), "base", f"{runs}/run", "--out", str(tmp_path / "two")]
    code, said, err = call(sys.executable, *launcher, *words, CUDA_VISIBLE_DEVICES="")
    assert code == 0, err
    assert images(tmp_path / "two") == whole[1] and said.count("report.html") == 1
    assert lines(tmp_path / "two") == lines(whole[0].with_name("eval"))
    tables = [json.loads((out / "table.json").read_text()) for out in (tmp_path / "two", whole[0].with_name("eval"))]
    assert tables[0]["rows"] == tables[1]["rows"]
    measures = tables[0]["rows"][1]["measures"]
    assert measures["set/all"]["mean"] == pytest.approx(255 * measures["score/bright"]["mean"])


@pytest.mark.parametrize("killed_after", [12])
def test_killed_at_any_moment_it_goes_on(
    runs: Path, whole: tuple[Path, dict[str, bytes]], tmp_path: Path, killed_after: int
) -> None:
    """SIGKILL as soon as so many pictures are there; the next command draws the rest, to the same bits."""
    out = tmp_path / "cut"
    words = [str(whole[0]), "base", f"{runs}/run", "--out", str(out)]
    process = spawn(sys.executable, "-m", "t2irl", "eval", *words)
    deadline = time.monotonic() + 200
    while process.poll() is None and len(list(out.glob("images/**/*.png"))) < killed_after:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert cli.main(["eval", *words]) == 0
    assert images(out) == whole[1]
    assert lines(out) == lines(whole[0].with_name("eval"))


def test_whatever_is_missing_or_cut_off_is_made_again(
    runs: Path, whole: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """Pictures deleted at random, a half-written one, a score line cut in the middle, a line twice."""
    source, out = whole[0].with_name("eval"), tmp_path / "cut"
    shutil.copytree(source, out)
    dice = random.Random(3)
    for name in dice.sample(sorted(whole[1]), 11):
        (out / "images" / name).unlink()
    (out / "images/base/base/deployment/.00000_000.png.part").write_bytes(b"half")
    file = next((out / "scores").glob("bright-*")) / "0000.jsonl"
    text = file.read_text()
    file.write_text(text[: len(text) // 2] + "\n" + text.splitlines()[0] + '\n["images/ba')
    assert evaluate(whole[0], "base", f"{runs}/run", "--out", out) == 0
    assert images(out) == whole[1] and not list(out.rglob(".*.part"))
    assert lines(out) == lines(source)


def test_prompts_that_were_trained_on_are_told_of(runs: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(config, f"{runs}/run", f"--suite.path={runs}/train.txt", "--limit=2", "--stage=generate") == 0
    assert "run was trained on 2 of the suite's 2 different prompts" in capsys.readouterr().out


def test_batch_size_and_order_do_not_matter(runs: Path, whole: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """The same noise in another batch: the same picture up to rounding, whichever subjects stand beside it."""
    assert evaluate(whole[0], f"{runs}/run", "--batch_size=5", "--out", tmp_path / "five", "--stage=generate") == 0
    for name in images(tmp_path / "five"):
        a, b = (
            np.asarray(Image.open(root / "images" / name)).astype(int)
            for root in (tmp_path / "five", whole[0].with_name("eval"))
        )
        assert abs(a - b).max() <= 1


def test_exports_and_samplers(runs: Path, config: Path, tmp_path: Path) -> None:
    """An exported file draws what its checkpoint draws; the training sampler draws something else from the same noise."""
    lora = shutil.copy(runs / "run/export/pytorch_lora_weights.safetensors", tmp_path / "mine.safetensors")
    samplers = ["--samplers.deployment.type=deployment", "--samplers.fast.type=training", "--weights=both"]
    assert evaluate(config, "base", f"{runs}/run", f"{runs}/run/export", lora, *samplers, "--stage=generate") == 0
    folder = tmp_path / "eval/images"

    def drawn(row: str) -> np.ndarray:
        return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted((folder / row).glob("*.png"))])

    checkpoint, fast = drawn("run/iteration_2/deployment"), drawn("run/iteration_2/fast")
    assert abs(checkpoint - drawn("run/export/deployment")).max() <= 2
    np.testing.assert_array_equal(drawn("run/export/deployment"), drawn("mine/export/deployment"))
    assert abs(checkpoint - fast).max() > 5
    assert abs(checkpoint - drawn("base/base/deployment")).max() > 2
    assert (checkpoint != drawn("run/iteration_2_raw_weights/deployment")).any()


def test_full_fine_tuning_and_adapters_of_others(
    runs: Path, config: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole denoiser, as a checkpoint and as an export; a LoRA file that says nothing of where it comes from."""
    assert (
        train(runs / "config.yaml", "--policy.tune.type=full", "--iterations=1", f"--run_dir={tmp_path / 'full'}") == 0
    )
    foreign = tmp_path / "foreign.safetensors"
    save_file(load_file(runs / "run/export/pytorch_lora_weights.safetensors"), foreign)
    subjects = (f"{tmp_path}/full", f"{tmp_path}/full/export", f"{runs}/run", foreign)
    options = ("--stage=generate", "--samplers.deployment.steps=4")
    assert evaluate(config, *subjects, *options) == 2
    assert "foreign.safetensors does not say which model it was made for; set model" in capsys.readouterr().err
    base = ["--model.type=sd3", f"--model.path={model}", "--model.max_sequence_length=0"]
    assert evaluate(config, *subjects, *options, *base) == 0
    drawn = {
        name: np.stack(
            [np.asarray(Image.open(p)).astype(int) for p in sorted((tmp_path / "eval/images" / name).rglob("*.png"))]
        )
        for name in ("full/iteration_1", "full/export", "run/iteration_2", "foreign/export")
    }
    assert abs(drawn["full/iteration_1"] - drawn["full/export"]).max() <= 2
    assert abs(drawn["run/iteration_2"] - drawn["foreign/export"]).max() <= 2


def test_a_grid_and_a_comparison(runs: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(
        ["compare", f"{runs}/run", f"second={runs}/other", "--out", str(tmp_path / "c"), "--prompts=3", "--images=2"]
    ) == 0  # fmt: skip
    found = json.loads((tmp_path / "c/compare.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["run", "second"]
    assert found["differing"] == {"seed": {"run": "0", "second": "1"}}
    assert {(p["first"], p["second"]) for p in found["pairs"]} == {
        ("base", "run, iteration 2"), ("base", "second, iteration 2"), ("run, iteration 2", "second, iteration 2")
    }  # fmt: skip
    assert {p["measure"] for p in found["pairs"]} == {"bright", "gold"}
    assert "against the root of the divergence" in (tmp_path / "c/compare.html").read_text()
    capsys.readouterr()
    for show in ("checkpoints", "first-last", "seeds"):
        assert cli.main(["grid", str(tmp_path / "c/eval"), "--show", show]) == 0
        with Image.open(capsys.readouterr().out.strip()) as page:
            cells = json.loads(page.info["cells"])
            assert json.loads(page.info["config"]) != ["unknown"]
        assert {cell["prompt"] for cell in cells} == set(HELDOUT) and all("bright" in cell["scores"] for cell in cells)
    assert cli.main(["grid", str(tmp_path / "c/eval"), "--show", "worst", "--by", "gold", "--prompts", "2"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate"),
        (["runs/none"], "there is no such file or folder"),
        (["{runs}/run@7"], "no checkpoint of iteration 7; there are 1, 2"),
        (["{runs}/run@newest"], "no checkpoint of iteration newest; there are 1, 2"),
        (["{runs}/run", "{runs}/run/checkpoints/iteration_000002"], "would both be called run, iteration 2"),
        (["{runs}/heldout.txt"], "is no .safetensors file"),
        (["base"], "set model"),
        (["{runs}/run", "--suite.imgaes=2"], "Did you mean suite.images"),
        (["{runs}/run", "--limit=9"], "has only 3 prompts"),
        (["{runs}/run", "--distances.fd=true"], "takes 2000"),
        (["{runs}/run", "--proxy=none"], "proxy 'none' is not among rewards"),
        (["{runs}/run", "--stage=report"], "not drawn yet"),
        (["{runs}/run", "--features.v.type=vision", "--features.v.path=none", "--limit=1"], "features.v.path = none"),
    ],
)
def test_bad_input_is_refused(
    runs: Path, config: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert evaluate(config, *(word.format(runs=runs) for word in words)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_other_settings_in_the_same_folder_are_refused(
    runs: Path, whole: tuple[Path, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    for change, message in (("--seed=1", "seed: 0 -> 1"), ("--suite.images=2", "images: 7 -> 2")):
        assert evaluate(whole[0], f"{runs}/run", change) == 2
        assert message in capsys.readouterr().err
    assert images(whole[0].with_name("eval")) == whole[1]


def test_official_scores_come_back_into_the_table(
    runs: Path, whole: tuple[Path, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval"
    shutil.copytree(whole[0].with_name("eval"), out)
    assert cli.main(["eval", "export", str(out), "--row", "run, iteration 2", "--out", str(tmp_path / "layout")]) == 0
    assert "now run any scorer" in capsys.readouterr().out
    told = [json.loads(line) for line in (tmp_path / "layout/pictures.jsonl").read_text().splitlines()]
    scored = "".join(json.dumps(entry | {"scores": {"judge": 0.25 + entry["image"]}}) + "\n" for entry in told)
    (tmp_path / "scores.jsonl").write_text(scored)
    words = ["eval", "import", str(out), "--row", "run, iteration 2", "--results", str(tmp_path / "scores.jsonl")]
    assert cli.main(words) == 0
    table = json.loads((out / "table.json").read_text())
    assert table["rows"][1]["measures"]["score/judge"]["mean"] == pytest.approx(3.25)
    assert "score/judge" not in table["rows"][0]["measures"]
    assert cli.main([*words[:3], "--row", "nobody", *words[5:]]) == 2
    assert "the evaluation has base; run, iteration 2" in capsys.readouterr().err
