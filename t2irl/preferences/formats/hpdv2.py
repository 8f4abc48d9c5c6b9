"""HPDv2: train.json with one decided pair an entry, test.json with the ranks that each rater gave."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t2irl.errors import DataError
from t2irl.preferences.formats.base import (
    Format,
    Pictures,
    inside,
    json_list,
    record_of,
    source_file,
    taken,
    ties_alike,
    with_pictures,
    write_json,
)
from t2irl.preferences.record import Preferences, Record
from t2irl.preferences.summary import canonical, unit

RANKS = {"a": [1, 2], "b": [2, 1], "tie": [1, 1]}


class HPDv2(Format):
    """See the module. test.json is read if it is there, because it holds more."""

    carries = frozenset({"prompt", "sha_a", "sha_b", "label", "annotator"})
    loses = "Both bad becomes a tie; ties are in test.json alone. Models, times, sides, checks and the axis are lost."

    def prepared(self, records: Sequence[Record]) -> list[Record]:
        """Every judgement; both bad is a tie."""
        return ties_alike(records)

    def write(self, preferences: Preferences, folder: Path) -> None:
        """train.json, test.json and images/."""
        train: list[dict[str, Any]] = []
        test: dict[str, dict[str, Any]] = {}
        for record, a, b in with_pictures(preferences, folder):
            if record.label in ("a", "b"):
                won = [int(record.label == side) for side in ("a", "b")]
                train.append(
                    {
                        "human_preference": won,
                        "prompt": record.prompt,
                        "file_path": [a, b],
                        "user_hash": record.annotator,
                    }
                )
            same = canonical(record)
            paths = [a, b] if same.sha_a == record.sha_a else [b, a]
            entry = test.setdefault(
                unit(record), {"prompt": record.prompt, "image_path": paths, "rank": [], "raw_annotations": []}
            )
            entry["raw_annotations"].append({"rank": RANKS[same.label or "tie"], "user_hash": record.annotator})
        for entry in test.values():
            sums = [sum(answer["rank"][k] for answer in entry["raw_annotations"]) for k in (0, 1)]
            entry["rank"] = RANKS["tie" if sums[0] == sums[1] else "a" if sums[0] < sums[1] else "b"]
        write_json(folder / "train.json", train)
        write_json(folder / "test.json", list(test.values()))

    def read(self, source: Path, folder: Path) -> Iterator[Record]:
        """A folder, or one of the two files; entries of more than two pictures become pairs."""
        file, pictures = source_file(source, "test.json", "train.json"), Pictures(folder)
        for number, entry in enumerate(json_list(file)):
            where = f"{file}, entry {number}"
            ranked = "image_path" in entry
            paths = taken(entry, "image_path" if ranked else "file_path", list, where)
            kept = [pictures.copy(inside(file.parent, path, where), where) for path in paths]
            for k, (ranks, rater) in enumerate(_answers(entry, ranked, where)):
                if len(ranks) != len(kept) or not all(isinstance(rank, int | float) for rank in ranks):
                    raise DataError(f"{where}: {len(ranks)} ranks for {len(kept)} pictures; expected a number for each")
                for i, j in itertools.combinations(range(len(kept)), 2):
                    label = "tie" if ranks[i] == ranks[j] else "a" if ranks[i] < ranks[j] else "b"
                    yield record_of(
                        where, id=f"{number}-{k}-{i}-{j}", prompt=taken(entry, "prompt", str, where), image_a=kept[i][0],
                        image_b=kept[j][0], sha_a=kept[i][1], sha_b=kept[j][1], label=label, annotator=rater,
                    )  # fmt: skip


def _answers(entry: dict[str, Any], ranked: bool, where: str) -> list[tuple[list[float], str]]:
    """Ranks (the smaller the better) and who gave them: each rater's, or those of the entry."""
    if not ranked:
        return [([-x for x in taken(entry, "human_preference", list, where)], str(entry.get("user_hash", "")))]
    raw = entry.get("raw_annotations") or [{"rank": taken(entry, "rank", list, where)}]
    return [(taken(answer, "rank", list, where), str(answer.get("user_hash", ""))) for answer in raw]
