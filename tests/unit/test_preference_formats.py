"""Formats of preference data: round trips, and the loaders of the tools that they are for."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from t2irl.cli import main
from t2irl.errors import DataError
from t2irl.preferences import formats
from t2irl.preferences.formats.base import confidence, sum_up
from t2irl.preferences.formats.tasks import CHOICES
from t2irl.preferences.pairs import Plan
from t2irl.preferences.record import AXES, QUESTIONS, Record, read_records, write_records
from t2irl.preferences.store import Vote, now
from tests.preferences import HOSTILE, with_shas, write_pool, write_study


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few pictures, PNG and JPEG."""
    return write_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study on two axes with three raters' answers, one question unanswered."""
    made = write_study(tmp_path, [*HOSTILE[:4], "a", "b"], Plan(axes=("overall", "quality"), gold=0.2, repeat=0.2))
    with made.store() as store:
        for k, item in enumerate(made.items[:-1]):
            for n, rater in enumerate("rst"):
                answer = list(CHOICES)[(k * (n + 1)) % 4]
                store.cast(
                    Vote(f"{k}{rater}", item.id, rater, answer, made.left(item, store.number(rater)), 900, now())
                )  # type: ignore[arg-type]
    return made.folder


@pytest.fixture
def export(study: Path, tmp_path: Path) -> Callable[..., Path]:
    """`t2irl prefs export` of that study."""

    def run(name: str, *options: str) -> Path:
        out = tmp_path / f"as_{name}"
        assert main(["prefs", "export", str(study), "--format", name, "--out", str(out), *options]) == 0
        return out

    return run


def load(file: Path) -> Any:
    """As a user of `datasets` does."""
    datasets = pytest.importorskip("datasets")
    with tempfile.TemporaryDirectory() as cache:
        return datasets.load_dataset(
            "parquet", data_files=str(file), split="train", cache_dir=cache, keep_in_memory=True
        )


def test_datasets_reads_pick_a_pic_and_diffusion_dpo(export: Callable[..., Path]) -> None:
    rows = load(export("pickapic", "--axis", "overall") / "train.parquet")
    assert set(rows.column_names) == {
        "are_different", "best_image_uid", "caption", "created_at", "has_label", "image_0_uid", "image_0_url", "image_1_uid",
        "image_1_url", "jpg_0", "jpg_1", "label_0", "label_1", "model_0", "model_1", "ranking_id", "user_id", "num_example_per_prompt",
    }  # fmt: skip
    assert len(rows) == 18 and set(rows["label_0"]) == {0.0, 0.5, 1.0} and set(rows["model_0"]) == {"base"}
    # The training script of Diffusion-DPO: decode both pictures, drop ties, put the better one first.
    decided = load(export("diffusion_dpo", "--axis", "overall") / "train.parquet").filter(
        lambda row: row["label_0"] in (0, 1)
    )
    assert 0 < len(decided) < 18
    for row in decided:
        better, worse = (
            Image.open(io.BytesIO(row[f"jpg_{k}"])).convert("RGB") for k in ((0, 1) if row["label_0"] else (1, 0))
        )
        assert better.size == worse.size == (32, 32)
    assert set(decided["caption"]) <= {*HOSTILE, "a", "b"}


def test_datasets_reads_trl_with_its_pictures(export: Callable[..., Path]) -> None:
    rows = load(export("trl") / "train.parquet")
    assert rows.column_names == ["images", "prompt", "chosen", "rejected"]
    for row in rows:
        assert len(row["images"]) == 2 and all(isinstance(image, Image.Image) for image in row["images"])
        assert [m["role"] for m in row["prompt"]] == ["user"]
        assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "image", "text"]
        assert any(row["prompt"][0]["content"][2]["text"].startswith(question) for question in QUESTIONS.values())
        answers = {row[key][0]["content"][0]["text"] for key in ("chosen", "rejected")}
        assert answers == {"A", "B"} and row["chosen"][0]["role"] == "assistant"
    trl = pytest.importorskip("trl.data_utils")
    assert all(trl.is_conversational(row) for row in rows)


def test_image_reward_groups_have_ranks(export: Callable[..., Path]) -> None:
    folder = export("imagerewarddb", "--axis", "quality")
    rows = load(folder / "metadata-train.parquet").to_pandas()
    # As its training code groups them: consecutive rows of a prompt, `image_amount_in_total` of them.
    for _, group in rows.groupby("prompt_id"):
        assert len(group) == group.image_amount_in_total.iloc[0] == 2
        assert sorted(group["rank"]) in ([1, 2], [1, 1])
        assert all(Image.open(folder / path).size == (32, 32) for path in group.image_path)


def test_ratings_of_image_reward_become_axes(tmp_path: Path, pool: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "images").mkdir()
    rows = [
        {"image_path": f"images/{k}.png", "prompt_id": "7", "prompt": "p", "rank": rank, "image_text_alignment_rating": rating,
         "fidelity_rating": 4}
        for k, (rank, rating) in enumerate([(2, 6), (1, 5), (3, 6)])
    ]  # fmt: skip
    for k in range(3):
        Image.open(pool / str(k)).save(tmp_path / f"images/{k}.png")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata-train.parquet")
    found = list(formats.find("imagerewarddb").read(tmp_path, tmp_path / "out"))
    labels = {axis: [r.label for r in found if r.axis == axis] for axis in AXES}
    assert labels == {
        "overall": ["b", "a", "a"],
        "alignment": ["a", "tie", "b"],
        "quality": ["tie"] * 3,
        "artifact": [],
    }


def test_hpd_files_are_as_its_loaders_take_them(export: Callable[..., Path]) -> None:
    folder = export("hpdv2", "--axis", "overall")
    for entry in json.loads((folder / "train.json").read_text()):
        assert sorted(entry["human_preference"]) == [0, 1] and all(
            (folder / path).is_file() for path in entry["file_path"]
        )
    for entry in json.loads((folder / "test.json").read_text()):
        assert len(entry["image_path"]) == len(entry["rank"]) == 2 and len(entry["raw_annotations"]) == 3
        assert all({"rank", "user_hash"} <= set(answer) for answer in entry["raw_annotations"])
    folder = export("hpdv3", "--axis", "overall")
    entries = json.loads((folder / "train.json").read_text())
    for entry in entries:
        assert entry["choice_dist"][0] > entry["choice_dist"][1] and 0.5 < entry["confidence"] < 1
        assert (folder / entry["path1"]).is_file() and {entry["model1"], entry["model2"]} == {"base", "ours"}
    assert entries


def test_hpdv2_ranks_of_many_pictures_become_pairs(tmp_path: Path, pool: Path) -> None:
    for k in range(3):
        Image.open(pool / str(k)).save(tmp_path / f"{k}.png")
    entry = {"prompt": "p", "image_path": ["0.png", "1.png", "2.png"], "rank": [1, 2, 3],
             "raw_annotations": [{"rank": [2, 1, 3], "user_hash": "u"}, {"rank": [1, 2, 2], "user_hash": "v"}]}  # fmt: skip
    (tmp_path / "test.json").write_text(json.dumps([entry]))
    found = list(formats.find("hpdv2").read(tmp_path, tmp_path / "out"))
    assert [(r.annotator, r.label) for r in found] == [
        ("u", "b"),
        ("u", "a"),
        ("u", "a"),
        ("v", "a"),
        ("v", "a"),
        ("v", "tie"),
    ]


def test_counting_votes(pool: Path) -> None:
    base = dict(prompt="p", image_a="0", image_b="1", model_a="x", model_b="y")
    said = [Record(id=f"{k}", label=label, **base) for k, label in enumerate(["a", "b", "b", "tie", "both_bad"])]
    said[2] = said[2].swapped().model_copy(update={"label": "a"})  # the same answer with the names exchanged
    (found,) = sum_up(with_shas(said, pool))
    assert (found.label, found.votes_a, found.votes_b, found.model_a) == ("a", 2, 1, "y")
    assert sum_up(with_shas(said[:2], pool)) == []
    # Beta(1 + 3, 1 + 0) above one half: 1 - (1/2)^4.
    assert confidence(3, 0) == pytest.approx(15 / 16) and confidence(2, 2) == pytest.approx(0.5)


def test_label_studio_files_fit_each_other_and_tell_no_method(export: Callable[..., Path]) -> None:
    folder = export("label_studio", "--waiting", "--checks")
    view = ElementTree.fromstring((folder / "config.xml").read_text())
    tags = {tag.get("name"): tag for tag in view.iter() if tag.get("name")}
    choices = {tag.get("value") for tag in view.iter("Choice")}
    tasks = json.loads((folder / "tasks.json").read_text())
    waiting = [task for task in tasks if not task["annotations"]]
    assert len(waiting) == 1
    for task in tasks:
        wanted = {tag.get("value", "").removeprefix("$") for tag in view.iter() if tag.get("value", "").startswith("$")}
        assert wanted <= set(task["data"]) and all(isinstance(value, str) for value in task["data"].values())
        assert (folder / task["data"]["left"].split("?d=")[1]).is_file()
        assert not {"ours", "base", "gold"} & set(task["data"]) and "ours" not in json.dumps(task)
        for annotation in task["annotations"]:
            (result,) = annotation["result"]
            control = tags[result["from_name"]]
            assert control.tag.lower() == result["type"] and control.get("toName") == result["to_name"] in tags
            assert set(result["value"][result["type"]]) <= choices
    label_studio = pytest.importorskip("label_studio_sdk.label_interface")
    interface = label_studio.LabelInterface((folder / "config.xml").read_text())
    for task in tasks:
        assert interface.validate_task({"data": task["data"]})
        assert all(interface.validate_annotation(a) for a in task["annotations"])


def test_label_studio_answers_come_home(export: Callable[..., Path], tmp_path: Path) -> None:
    folder = export("label_studio", "--waiting", "--axis", "overall")
    tasks = json.loads((folder / "tasks.json").read_text())
    # As Label Studio exports what its own users said; one by the Pairwise tag, one skipped.
    said = [
        {"result": [{"type": "pairwise", "from_name": "pw", "to_name": "left,right", "value": {"selected": "left"}}],
         "completed_by": 3, "lead_time": 1.5, "created_at": "2026-01-02T03:04:05.678Z", "was_cancelled": False},
        {"result": [{"type": "choices", "from_name": "answer", "to_name": "left", "value": {"choices": ["both_bad"]}}],
         "completed_by": {"id": 4, "email": "z@example.org"}, "was_cancelled": False},
        {"result": [], "was_cancelled": True},
    ]  # fmt: skip
    (folder / "export.json").write_text(json.dumps([{**tasks[0], "annotations": said}]))
    out = tmp_path / "home"
    assert main(["prefs", "import", str(folder / "export.json"), "--format", "label_studio", "--out", str(out)]) == 0
    found = read_records(out / "records.jsonl").records
    assert [(r.annotator, r.ms) for r in found] == [("3", 1500), ("z@example.org", None)]
    assert found[0].label == found[0].shown_left and found[1].label == "both_bad"
    assert {found[0].model_a, found[0].model_b} == {"ours", "base"}


def test_argilla_files_are_what_its_client_builds(export: Callable[..., Path]) -> None:
    folder = export("argilla", "--axis", "overall")
    records = json.loads((folder / "records.json").read_text())
    layout = json.loads((folder / "settings.json").read_text())
    fields = {f["name"]: f["settings"]["type"] for f in layout["fields"]}
    options = {o["value"] for o in layout["questions"][0]["settings"]["options"]}
    for record in records:
        assert set(record["fields"]) == set(fields) and record["fields"]["left"].startswith("data:image/png;base64,")
        given = record["responses"][layout["questions"][0]["name"]]
        assert {r["value"] for r in given} <= options and len({r["user_id"] for r in given}) == len(given)
        assert "ours" not in json.dumps({**record, "fields": {**record["fields"], "left": "", "right": ""}})
    argilla = pytest.importorskip("argilla")
    from unittest.mock import MagicMock

    argilla.Argilla._default_client = MagicMock()  # settings ask for a server even when they are read from a file
    built = argilla.Settings.from_json(folder / "settings.json")
    assert {f.name for f in built.fields} == set(fields)
    assert [argilla.Record.from_dict(r).id for r in records] == [r["id"] for r in records]


def test_battles_are_what_rating_tools_read(export: Callable[..., Path]) -> None:
    pandas = pytest.importorskip("pandas")
    battles = pandas.read_json(export("arena", "--axis", "overall") / "battles.jsonl", lines=True)
    assert {"model_a", "model_b", "winner", "judge", "tstamp"} <= set(battles)
    assert set(battles.winner) <= {"model_a", "model_b", "tie", "both_bad"} and len(battles) == 18


# -------------------------------------------------------------------------------------------------------------- commands
@pytest.mark.parametrize("name", formats.names())
def test_files_that_are_none_of_the_format_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for k, (file, content) in enumerate(
        [
            ("records.json", b"{"),
            ("x.parquet", b"PAR1"),
            ("train.json", b"[1]"),
            ("r.jsonl", b'{"winner": 3}'),
            ("empty", b""),
        ]
    ):
        if content:
            (tmp_path / file).write_bytes(content)
        out = tmp_path / f"out{k}"
        assert main(["prefs", "import", str(tmp_path / file), "--format", name, "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert file in said and "Traceback" not in said and not out.exists()


def test_paths_that_lead_out_of_the_data_are_refused(tmp_path: Path, pool: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "secret.png").write_bytes((pool / "1").read_bytes())
    (data / "train.json").write_text(json.dumps([{"prompt": "p", "path1": "../secret.png", "path2": "../secret.png"}]))
    with pytest.raises(DataError, match="no path below"):
        list(formats.find("hpdv3").read(data, tmp_path / "out"))


def test_export_and_import_say_what_is_wrong(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(words: str, *arguments: str) -> None:
        assert main(["prefs", *arguments]) == 2
        assert words in capsys.readouterr().err

    out = str(tmp_path / "out")
    fails("Did you mean 'hpdv3'?", "export", str(study), "--format", "hpd3", "--out", out)
    fails("choose one with --axis", "export", str(study), "--format", "hpdv3", "--out", out)
    fails("expected one of overall", "export", str(study), "--format", "trl", "--axis", "x", "--out", out)
    fails("label_studio, records hold pairs", "export", str(study), "--format", "trl", "--waiting", "--out", out)
    fails("nothing to write", "export", str(study), "--format", "trl", "--axis", "artifact", "--out", out)
    fails("something already", "export", str(study), "--format", "trl", "--out", str(study))
    fails("no such file", "import", "nowhere", "--format", "trl", "--out", out)
    assert not (tmp_path / "out").exists()


def test_licences_survive_mixing(tmp_path: Path, pool: Path) -> None:
    base = dict(prompt="p", image_a="0", image_b="1", label="a")
    write_records([Record(id="1", licence="MIT", **base), Record(id="2", **base)], pool / "mixed.jsonl")
    out = tmp_path / "out"
    assert (
        main(
            ["prefs", "import", str(pool / "mixed.jsonl"), "--format", "records", "--out", str(out), "--licence", "CC0"]
        )
        == 0
    )
    assert [r.licence for r in read_records(out / "records.jsonl").records] == ["MIT", "CC0"]
