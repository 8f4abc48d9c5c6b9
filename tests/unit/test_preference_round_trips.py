"""What formats of preference data carry comes back, whatever it is."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from t2irl.preferences import formats
from t2irl.preferences.record import AXES, Preferences, Record, file_sha
from t2irl.preferences.summary import canonical
from tests.preferences import HOSTILE, PICTURES, with_shas, write_pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few pictures, PNG and JPEG."""
    return write_pool(tmp_path_factory.mktemp("pool"))


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
names = st.sampled_from(["base", "ours", 'naïve "x", y', ""])
times = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(timezone.utc))


@st.composite
def records(draw: st.DrawFn) -> list[Record]:
    """Judgements with anything in their fields."""
    found = []
    for number in range(draw(st.integers(1, 6))):
        a, b = draw(st.permutations(range(PICTURES)))[:2]
        votes = draw(st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)))
        found.append(Record(
            id=f"{number}-{draw(text)}", item=draw(text), prompt=draw(text | st.sampled_from(HOSTILE)), prompt_id=draw(text), image_a=f"{a}", image_b=f"{b}",
            model_a=draw(names), model_b=draw(names), checkpoint_a=draw(text), seed=draw(text), axis=draw(st.sampled_from(AXES)),
            label=draw(st.sampled_from(["a", "b", "tie", "both_bad", None])), votes_a=votes and votes[0], votes_b=votes and votes[1],
            soft_label=draw(st.none() | st.floats(0, 1)), annotator=draw(st.sampled_from(["r", "17", "0a1b2c3d4e5f", "x y", ""])),
            shown_left=draw(st.sampled_from(["a", "b", None])), ms=draw(st.none() | st.integers(0, 10**6)),
            gold=draw(st.sampled_from([None, "a"])), repeat_of=draw(st.none() | text), batch=draw(text), licence=draw(text),
            created_at=draw(st.none() | times),
        ))  # fmt: skip
    return found


def carried(found: list[Record], fields: frozenset[str]) -> Counter[str]:
    """What a format must keep, whatever the order of records and of the two pictures."""
    return Counter(
        json.dumps({f: canonical(r).model_dump(mode="json")[f] for f in sorted(fields)}, default=str) for r in found
    )


@pytest.mark.parametrize("name", formats.names())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=records())
@example(
    drawn=[
        Record(id=axis, prompt="", image_a="0", image_b="1", axis=axis, label="a", soft_label=None, annotator="r")
        for axis in AXES[:2]
    ]
)
def test_what_a_format_carries_comes_back(name: str, drawn: list[Record], pool: Path) -> None:
    kind = formats.find(name)
    if kind.one_axis:  # exports of several are refused
        drawn = [record.model_copy(update={"axis": drawn[0].axis}) for record in drawn]
    prepared = kind.prepared(with_shas(drawn, pool))
    with tempfile.TemporaryDirectory() as place:
        there, back, again = (Path(place) / part for part in ("there", "back", "again"))
        for folder in (there, back, again):
            folder.mkdir()
        kind.write(Preferences(tuple(prepared), pool), there)
        found = list(kind.read(there, back))
        assert carried(found, kind.carries) == carried(prepared, kind.carries)
        for record in found:
            assert file_sha(back / record.image_a) == record.sha_a and file_sha(back / record.image_b) == record.sha_b
        assert len({r.id for r in found}) == len(found)
        # What came back once comes back whole from then on, raters included.
        if found:
            kind.write(Preferences(tuple(kind.prepared(found)), back), again)
            fields = kind.carries | (
                {"annotator"} if name not in ("hpdv3", "trl", "diffusion_dpo", "imagerewarddb") else set()
            )
            assert carried(list(kind.read(again, Path(place) / "last")), fields) == carried(found, fields)
