"""HPDv3: one entry a question, the better picture first, with how many raters were for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from t2irl.errors import DataError
from t2irl.preferences.formats.base import (
    Format,
    Pictures,
    confidence,
    inside,
    json_list,
    record_of,
    source_file,
    sum_up,
    taken,
    with_pictures,
    write_json,
)
from t2irl.preferences.record import Preferences, Record


class HPDv3(Format):
    """See the module. `confidence` is the probability that most raters are with the majority, 0.5 without any vote."""

    carries = frozenset({"prompt", "sha_a", "sha_b", "model_a", "model_b", "label", "votes_a", "votes_b"})
    loses = "Answers to a question are counted; questions without a majority, ties, raters, times, sides and the axis are lost."

    def prepared(self, records: Sequence[Record]) -> list[Record]:
        """One record for each question with a majority, which is for a."""
        return sum_up(records)

    def write(self, preferences: Preferences, folder: Path) -> None:
        """train.json and images/."""
        entries = []
        for r, a, b in with_pictures(preferences, folder):
            votes = [r.votes_a or 0, r.votes_b or 0]
            entries.append({
                "prompt": r.prompt, "path1": a, "path2": b, "confidence": confidence(*votes), "choice_dist": votes, "model1": r.model_a,
                "model2": r.model_b,
            })  # fmt: skip
        write_json(folder / "train.json", entries)

    def read(self, source: Path, folder: Path) -> Iterator[Record]:
        """A folder with train.json, or any such file."""
        file, pictures = source_file(source, "train.json", "test.json"), Pictures(folder)
        for number, entry in enumerate(json_list(file)):
            where = f"{file}, entry {number}"
            kept = [
                pictures.copy(inside(file.parent, taken(entry, key, str, where), where), where)
                for key in ("path1", "path2")
            ]
            votes = entry.get("choice_dist") or None
            if votes is not None and (not isinstance(votes, list) or len(votes) != 2):
                raise DataError(f"{where}: choice_dist = {votes!r}; expected the numbers of votes for path1 and path2")
            # The better picture comes first; its votes are the larger number.
            more, fewer = sorted(votes, reverse=True) if votes else (None, None)
            yield record_of(
                where, id=str(number), prompt=taken(entry, "prompt", str, where), image_a=kept[0][0], image_b=kept[1][0],
                sha_a=kept[0][1], sha_b=kept[1][1], model_a=str(entry.get("model1") or ""), model_b=str(entry.get("model2") or ""),
                label="a", votes_a=more, votes_b=fewer,
            )  # fmt: skip
