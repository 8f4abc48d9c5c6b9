"""Making a study: what is compared, on which side, how raters are checked, and that nothing tells a method."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from t2irl.cli import main
from t2irl.errors import ConfigError, DataError
from t2irl.preferences.pairs import Plan, make_study, read_evaluations, scrambled
from t2irl.preferences.record import Record, read_records, write_records
from t2irl.preferences.store import Vote, VoteStore, now
from t2irl.preferences.study import REPEAT_GAP, Study
from tests.preferences import write_evaluation, write_study

PROMPTS = [f"prompt {k}" for k in range(30)]


def test_pairs_share_noise_and_sides_are_balanced(tmp_path: Path) -> None:
    study = write_study(tmp_path, PROMPTS, Plan(gold=0, repeat=0), images=2, methods=("x", "y", "z"))
    assert len(study.items) == 3 * 60
    systems = {(i.model_a, i.model_b) for i in study.items}
    assert systems == {("x", "y"), ("x", "z"), ("y", "z")}
    for pair in systems:
        left = Counter(i.left for i in study.items if (i.model_a, i.model_b) == pair)
        assert left == {"a": 30, "b": 30}
    for item in study.items:
        assert item.seed == f"{item.prompt_id}/{item.image}" and item.prompt == PROMPTS[int(item.prompt_id)]
    # Every other rater sees the sides swapped.
    assert all(study.left(i, 0) != study.left(i, 1) for i in study.items)


def test_few_pairs_are_spread_over_systems_and_prompts(tmp_path: Path) -> None:
    study = write_study(tmp_path, PROMPTS, Plan(pairs=60, gold=0, repeat=0), images=3, methods=("x", "y", "z"))
    assert set(Counter((i.model_a, i.model_b) for i in study.items).values()) == {20}
    assert max(Counter((i.model_a, i.model_b, i.prompt_id) for i in study.items).values()) == 1
    against = write_study(tmp_path / "two", PROMPTS, Plan(against="y", gold=0, repeat=0), methods=("x", "y", "z"))
    assert {(i.model_a, i.model_b) for i in against.items} == {("x", "y"), ("y", "z")}


def test_gold_pairs_and_repeats(tmp_path: Path) -> None:
    plan = Plan(axes=("overall", "quality"), gold=0.2, repeat=0.3)
    study = write_study(tmp_path, PROMPTS, plan)
    gold = [i for i in study.items if i.gold]
    repeats = [i for i in study.items if i.repeat_of]
    assert (len(gold), len(repeats)) == (2 * 6, 2 * 9)
    assert {i.axis for i in gold} == {i.axis for i in repeats} == {"overall", "quality"}
    known = {
        str(p.file.name): np.asarray(Image.open(p.file))
        for p in read_evaluations([tmp_path / "ours", tmp_path / "base"])
    }
    for item in gold:
        good, bad = (np.asarray(Image.open(study.folder / name)) for name in (item.image_a, item.image_b))
        if item.gold == "b":
            good, bad = bad, good
        assert any(np.array_equal(good, picture) for picture in known.values())
        assert not np.array_equal(good, bad) and sorted(good.flatten()) == sorted(bad.flatten())
    for item in repeats:
        first = study.by_id[item.repeat_of or ""]
        assert (item.image_a, item.image_b, item.axis) == (first.image_a, first.image_b, first.axis)
        assert item.left != first.left and item.id != first.id
    assert len({i.id for i in study.items}) == len(study.items)


@pytest.mark.parametrize("number", range(3))
def test_a_raters_order(tmp_path: Path, number: int) -> None:
    study = write_study(tmp_path, PROMPTS, Plan(axes=("overall", "alignment"), repeat=0.3))
    order = study.order(number)
    assert sorted(i.id for i in order) == sorted(i.id for i in study.items)
    assert [i.pair for i in order[::2]] == [i.pair for i in order[1::2]], "questions on a pair come together"
    assert [i.axis for i in order[:2]] == ["overall", "alignment"]
    place = {i.id: k // 2 for k, i in enumerate(order)}
    plain = sum(i.repeat_of is None for i in order) // 2
    for item in (i for i in order if i.repeat_of):
        first = place[item.repeat_of or ""]
        assert place[item.id] - first >= REPEAT_GAP or place[item.id] >= plain
    assert study.order(number) == order and study.order(number + 1) != order


def test_the_same_seed_makes_the_same_study_and_more_checks_change_no_pair(tmp_path: Path) -> None:
    folders = [write_evaluation(tmp_path / name, name, PROMPTS) for name in ("ours", "base")]
    one, two, other, more = (
        make_study(folders, tmp_path / f"s{k}", plan)
        for k, plan in enumerate([Plan(pairs=10), Plan(pairs=10), Plan(pairs=10, seed=1), Plan(pairs=10, gold=0.5)])
    )
    assert one.items == two.items != other.items
    assert [i for i in one.items if not i.gold] == [i for i in more.items if not i.gold]
    assert one.settings.salt != two.settings.salt and one.rater("Ann") != two.rater("Ann"), "a salt is a secret"
    assert one.rater(" ANN ") == one.rater("ann")


def test_pictures_have_no_metadata_and_equal_ones_are_no_pair(tmp_path: Path) -> None:
    study = write_study(tmp_path, PROMPTS[:3], Plan(gold=0, repeat=0))
    for file in (study.folder / "images").iterdir():
        assert b"ours" not in file.read_bytes() and not Image.open(file).info
        assert file.stem.isalnum()
    folders = [tmp_path / "ours", write_evaluation(tmp_path / "copy", "copy", PROMPTS[:3])]
    for k in range(2):
        (tmp_path / "copy" / f"copy_{k}_0.png").write_bytes((tmp_path / "ours" / f"ours_{k}_0.png").read_bytes())
    said: list[str] = []
    study = make_study(folders, tmp_path / "less", Plan(gold=0, repeat=0), say=said.append)
    assert len(study.items) == 1 and said == ["2 pairs of equal pictures left out"]


@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 5))
def test_scrambling_keeps_every_pixel(height: int, width: int, seed: int) -> None:
    pixels = np.arange(height * width * 3, dtype=np.int64).reshape(height, width, 3)
    found = scrambled(pixels, np.random.default_rng(seed))
    assert found.shape == pixels.shape and sorted(found.flatten()) == sorted(pixels.flatten())


def test_several_checkpoints_of_a_method_are_systems_of_their_own(tmp_path: Path) -> None:
    folders = [write_evaluation(tmp_path / c, "ours", PROMPTS[:2], checkpoint=c) for c in ("10", "20")]
    study = make_study(folders, tmp_path / "s", Plan(gold=0, repeat=0))
    assert {(i.model_a, i.model_b) for i in study.items} == {("ours@10", "ours@20")}


def test_one_base_in_two_evaluations_is_one_system(tmp_path: Path) -> None:
    folders = []
    for name in ("x", "y"):
        folder = write_evaluation(tmp_path / name, name, PROMPTS[:3])
        base = write_evaluation(tmp_path / f"{name}base", "base", PROMPTS[:3])
        for file in base.glob("*.png"):
            file.rename(folder / file.name)
        with (folder / "images.jsonl").open("a") as index:
            index.write((base / "images.jsonl").read_text())
        folders.append(folder)
    study = make_study(folders, tmp_path / "s", Plan(gold=0, repeat=0))
    assert Counter((i.model_a, i.model_b) for i in study.items) == {("base", "x"): 3, ("base", "y"): 3, ("x", "y"): 3}
    (folders[1] / "base_0_0.png").write_bytes((folders[1] / "base_1_0.png").read_bytes())
    with pytest.raises(DataError, match="both image 0 of prompt 0 by base, and differ"):
        make_study(folders, tmp_path / "t", Plan())


def test_bad_evaluations_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_evaluation(tmp_path / "good", "good", PROMPTS[:4])
    other = write_evaluation(tmp_path / "other", "other", PROMPTS[:4])
    index = other / "images.jsonl"
    lines = index.read_text().splitlines()

    def fails(words: str, *options: str, evaluations: tuple[Path, ...] = (good, other)) -> None:
        arguments = ["prefs", "make", *map(str, evaluations), "--out", str(tmp_path / "s"), *options]
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "s").exists() and not list(tmp_path.glob(".s.part"))

    fails("it lacks images.jsonl", evaluations=(good, tmp_path))
    fails("methods found: good. Two are needed", evaluations=(good,))
    fails("no such method; there are good, other", "--against", "base")
    fails("there are only 4 pairs", "--pairs", "5")
    fails("expected some of overall,alignment,quality,artifact", "--axes", "beauty")
    fails("expected a number from 0 to 1", "--gold", "2")
    for line, words in (
        ("{", "line 5: is not JSON"),
        ("[]", "line 5: holds list"),
        (json.dumps({"prompt": "x"}), "line 5: prompt_id"),
    ):
        index.write_text("\n".join([*lines, line]))
        fails(words)
    index.write_text(lines[0].replace("prompt 0", "else") + "\n")
    fails("prompt_id 0 is 'else' here and 'prompt 0'")
    index.write_text("\n".join(lines))
    (other / "other_0_0.png").write_bytes(b"no picture")
    fails("other_0_0.png: cannot be read as a picture")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("")
    assert main(["prefs", "make", str(good), str(other), "--out", str(tmp_path / "s")]) == 2
    assert (tmp_path / "s" / "mine.txt").exists()


# --------------------------------------------------------------------------------------------------------------- votes
def vote(key: str, item: str = "i", rater: str = "r", answer: str = "left") -> Vote:
    return Vote(key, item, rater, answer, "a", 1000, now())  # type: ignore[arg-type]


def test_a_vote_counts_once_and_undoing_can_be_repeated(tmp_path: Path) -> None:
    with VoteStore(tmp_path / "votes.db") as store, VoteStore(tmp_path / "votes.db") as second:
        assert store.cast(vote("k1")) == "stored"
        assert second.cast(vote("k1")) == "known"
        assert second.cast(vote("k2", answer="right")) == "taken"
        assert second.cast(vote("k3", rater="s")) == "stored"
        assert store.revoke("r", "i") and not store.revoke("r", "i")
        # A message that was on its way when the vote was taken back does not bring it back.
        assert store.cast(vote("k1")) == "known"
        assert [v.key for v in store.votes()] == ["k3"]
        assert store.cast(vote("k4", answer="tie")) == "stored"
        assert store.counts() == {"i": 2} and store.items_of("r") == ["i"]
        assert [store.number(r) for r in ("r", "s", "r", "t")] == [0, 1, 0, 2]
    (tmp_path / "bad.db").write_bytes(b"not a database, whatever its name says" * 100)
    with pytest.raises(DataError, match=r"bad\.db"):
        VoteStore(tmp_path / "bad.db")


def test_votes_become_records(tmp_path: Path) -> None:
    study = write_study(tmp_path, PROMPTS[:2], Plan(gold=0, repeat=0))
    item = study.items[0]
    with study.store() as store:
        for rater, answer in (("r", "left"), ("s", "right"), ("t", "tie"), ("u", "both_bad")):
            side = study.left(item, store.number(rater))
            store.cast(Vote(rater, item.id, rater, answer, side, 1500, now()))  # type: ignore[arg-type]
    found = study.preferences(waiting=True)
    labels = {r.annotator: (r.label, r.shown_left) for r in found.records}
    other = "b" if item.left == "a" else "a"
    # The second rater saw the sides swapped: right is the picture that the first one had on the left.
    assert labels == {
        "r": (item.left, item.left),
        "s": (item.left, other),
        "t": ("tie", item.left),
        "u": ("both_bad", other),
        "": (None, study.items[1].left),
    }
    assert found.records[-1].item == study.items[1].id
    assert all(found.picture(r, "a").is_file() and len(r.sha_a) == 64 and r.ms == 1500 for r in found.records[:4])
    path = tmp_path / "records.jsonl"
    write_records(found.records, path)
    assert read_records(path).records == found.records


def test_records_are_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    good = {"id": "1", "prompt": "p", "image_a": "a", "image_b": "b"}
    for entry, words in (({**good, "label": "left"}, "label = 'left'"), ({**good, "lable": "a"}, "lable"), ({**good, "votes_a": 1}, "together"),
                         ({"id": "1"}, "prompt"), ({**good, "created_at": "2020-01-01T00:00:00"}, "created_at")):  # fmt: skip
        path.write_text(json.dumps(entry))
        with pytest.raises(DataError, match="line 1") as caught:
            read_records(path)
        assert words in str(caught.value)
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(good))
    with pytest.raises(DataError, match="line 3: id = '1' stands in line 1"):
        read_records(path)


@given(st.sampled_from(["a", "b", "tie", "both_bad", None]), st.none() | st.floats(0, 1), st.none() | st.integers(0, 9))
def test_swapping_twice_is_nothing_and_once_turns_the_preference(
    label: str | None, soft: float | None, votes: int | None
) -> None:
    record = Record.model_validate(
        dict(id="1", prompt="p", image_a="x", image_b="y", model_a="m", label=label, soft_label=soft, votes_a=votes,
             votes_b=None if votes is None else 3, gold="a", shown_left="b")
    )  # fmt: skip
    turned = record.swapped()
    assert turned.image_a == "y" and turned.model_b == "m" and turned.gold == "b" and turned.shown_left == "a"
    assert turned.swapped().model_copy(update={"soft_label": soft}) == record
    if record.preference is not None:
        assert turned.preference == pytest.approx(1 - record.preference)


def test_a_study_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make one with"):
        Study.load(tmp_path)
    study = write_study(tmp_path, PROMPTS[:2])
    (study.folder / "study.json").write_text("{}")
    with pytest.raises(DataError, match=r"study\.json: name"):
        Study.load(study.folder)
    with pytest.raises(ConfigError, match="something already"):
        make_study([tmp_path / "ours", tmp_path / "base"], study.folder, Plan())
