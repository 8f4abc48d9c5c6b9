"""The grid file, what it expands to, what is refused, and the numbers and pages made of finished runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from t2irl import cli
from t2irl.errors import ConfigError, RunError
from t2irl.hacklab.command import hacklab
from t2irl.hacklab.curves import area, at_level, crossing, mean_curve, value_at
from t2irl.hacklab.grid import Cell, Chosen, changed, expand, load_grid
from t2irl.hacklab.results import fitted_peak, proxy_at, read_record, write_results
from t2irl.hacklab.runner import Pool, finished, refuse_changed
from t2irl.loading import dump_run
from tests.conftest import ROOT

GRID: dict[str, Any] = {
    "base": "configs/tiny/demo.yaml",
    "fixed": {"iterations": 20, "rewards": {"correct": None, "clauses": None, "cleanliness": None}},
    "methods": {"grpo": {}, "kl": {"regularizers": {"kl": {"type": "kl", "coefficient": 2}}}},
    "proxies": {
        "vivid": {"rewards": {"vividness": {"type": "vividness", "weight": 2}}},
        "count": {"rewards": {"object_count": {"type": "object_count"}}},
    },
    "seeds": [3, 1],
}
ALL = Chosen()


def cells_of(folder: Path, chosen: Chosen = ALL, overrides: tuple[str, ...] = (), **changes: Any) -> list[Cell]:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID | changes, sort_keys=False))
    grid, layer = load_grid(path)
    return expand(grid, layer, path, folder / "out", chosen, overrides)


def test_a_grid_expands_to_a_round_of_each_seed(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, overrides=("--optimizer.lr", "1e-5"))
    first = ["vivid/grpo/seed3", "vivid/kl/seed3", "count/grpo/seed3", "count/kl/seed3"]
    assert [c.name for c in cells] == first + [name.replace("seed3", "seed1") for name in first]
    run = cells[1].run
    assert (run.seed, run.iterations, run.optimizer.lr, run.run_dir) == (3, 20, 1e-5, tmp_path / "out/vivid/kl/seed3")
    assert list(run.rewards) == ["vividness"] and cells[1].trained == {"vividness": 2}
    assert run.regularizers["kl"].coefficient == 2 and "slow" in run.regularizers
    assert list(cells[0].run.regularizers) == ["slow"]


def test_parts_of_a_grid(tmp_path: Path) -> None:
    names = [c.name for c in cells_of(tmp_path, Chosen(["kl"], ["count"], [1]))]
    assert names == ["count/kl/seed1"]
    assert len(cells_of(tmp_path, skip=["*/kl", "count/grpo/seed1"])) == 3
    with pytest.raises(ConfigError, match=r"the grid has no kll\. Did you mean 'kl'"):
        cells_of(tmp_path, Chosen(methods=["kll"]))
    with pytest.raises(ConfigError, match="skip: 'vivid/no' fits no run"):
        cells_of(tmp_path, skip=["vivid/no"])


def test_methods_may_bring_config_files(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("rollout: {prompts: 3}\noptimizer: {lr: 1e-2}\n")
    method = {"config": "mine.yaml", "optimizer": {"lr": 5e-3}}
    (cell, *_) = cells_of(tmp_path, methods={"mine": method})
    assert cell.run.rollout.prompts == 3 and cell.run.optimizer.lr == 5e-3
    with pytest.raises(ConfigError, match=r"methods.mine.config: no file none.yaml, neither beside"):
        cells_of(tmp_path, methods={"mine": {"config": "none.yaml"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, r"method \(.*grid.yaml:\d+\): unknown key. Did you mean 'methods'"),
        ({"methods": {"a/b": {}}}, "'a/b' should be of letters"),
        ({"methods": {"a": {"optimzer": {"lr": 1}}}}, r"(?s)4 runs cannot start.*optimzer.*grid.yaml:\d+.*Did you mean optimizer"),
        ({"gold": "truth"}, "gold: 'truth' is not among heldout_rewards, which are: gold"),
        ({"proxies": {"p": {"rollout": {"steps": 4}}}}, "(?s)4 runs cannot start.*rewards"),
        ({"seeds": []}, "seeds"),
    ],
)  # fmt: skip
def test_bad_grids_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cells_of(tmp_path, **changes)


def test_a_proxy_without_a_trained_reward_is_refused(tmp_path: Path) -> None:
    proxy = {"p": {"rewards": {"v": {"type": "vividness", "weight": 0}}}}
    with pytest.raises(ConfigError, match="all rewards have weight 0"):
        cells_of(tmp_path, proxies=proxy)
    other = {"m": {"rewards": {"own": {"type": "vividness"}}}}  # of the method, not of the proxy
    with pytest.raises(ConfigError, match=r"proxies.p: no reward of it is trained on"):
        cells_of(tmp_path, proxies=proxy, methods=other)


def write_run(cell: Cell, gold: list[float], proxy: list[float], complete: bool = True) -> None:
    """What a run would leave behind."""
    folder = cell.run.run_dir
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_run(cell.run))
    (name,) = cell.trained
    rows = [
        {
            "iteration": 10 * k,
            "heldout/gold": g,
            f"heldout/{name}": p,
            "policy/kl_reference": float(k),
            "time/rollout_s": 2.0,
        }
        for k, (g, p) in enumerate(zip(gold, proxy, strict=True))
    ]
    rows.insert(1, {"iteration": 5, "time/rollout_s": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if complete:
        (folder / "summary.json").write_text(json.dumps({"iterations": 20}))


def test_changed_entries_are_named(tmp_path: Path) -> None:
    cells = cells_of(tmp_path)
    write_run(cells[0], [0.1], [0.1], complete=False)
    refuse_changed(cells)
    other = cells_of(tmp_path, fixed={**GRID["fixed"], "iterations": 30})
    assert changed(other[0]) == ["iterations: 20 -> 30"]
    with pytest.raises(ConfigError, match=r"(?s)1 runs were started with other settings.*iterations: 20 -> 30"):
        refuse_changed(other)


def test_numbers_of_curves() -> None:
    curve = [(0, 0.0), (10, 1.0), (30, 0.0)]
    assert [value_at(curve, x) for x in (-1, 5, 20, 99)] == [0, 0.5, 0.5, 0]
    assert crossing(curve, 0.25) == 2.5 and crossing(curve, 2) is None and crossing(curve, -1) == 0
    assert area(curve) == pytest.approx(0.5) and area([(0, 3.0)]) == 3
    assert at_level([(0, 0.0), (10, 2.0)], curve, 1.0) == 0.5 and at_level(curve, curve, 5) is None
    assert mean_curve([curve, [(0, 2.0), (30, 4.0)]]) == [(0, 1.0, 0.0, 2.0), (30, 2.0, 0.0, 4.0)]


def test_results_of_a_grid(tmp_path: Path) -> None:
    cells = cells_of(tmp_path)
    by_name = {cell.name: cell for cell in cells}
    write_run(by_name["vivid/grpo/seed3"], [0.4, 0.5, 0.1], [0.0, 1.0, 2.0])
    write_run(by_name["vivid/grpo/seed1"], [0.4, 0.4, 0.2], [0.0, 2.0, 2.0])
    write_run(by_name["vivid/kl/seed3"], [0.4, 0.45, 0.5], [0.0, 0.1, 0.2])
    write_run(by_name["vivid/kl/seed1"], [0.4, 0.45], [0.0, 0.1], complete=False)
    grid, _ = load_grid(tmp_path / "grid.yaml")
    text = write_results(grid, cells, tmp_path / "out", "t2irl hacklab grid.yaml")
    assert "3 of 8 runs are finished" in text
    result = json.loads((tmp_path / "out/results.json").read_text())
    plain, held = result["table"]
    # The weight of the proxy's reward is 2, so half-way from 0 to its best of 4 is 2.
    assert (plain["method"], plain["seeds"], plain["level"], plain["hacked"]) == ("grpo", 2, 2, True)
    stats = plain["stats"]
    assert stats["gold_final"] == {"mean": 0.15, "std": pytest.approx(0.070711), "n": 2}
    assert stats["gold_drop"]["mean"] == pytest.approx(0.3) and stats["gold_peak"]["mean"] == pytest.approx(0.45)
    assert stats["gold_at_level"]["mean"] == pytest.approx((0.5 + 0.4) / 2)
    assert stats["gold_area"]["mean"] == pytest.approx((0.375 + 0.35) / 2) and stats["kl_final"]["mean"] == 2
    assert (held["method"], held["seeds"], held["hacked"]) == ("kl", 1, False)
    assert held["stats"]["gold_at_level"]["mean"] is None and held["stats"]["gold_final"]["std"] is None
    assert len(result["runs"]) == 4 and result["runs"][0]["seconds"] == 7
    page = (tmp_path / "out/hacklab.html").read_text()
    assert "hacked" in page and "<script" not in page and "://" not in page.replace("http://www.w3.org/2000/svg", "")
    table = (tmp_path / "out/table.md").read_text()
    assert "| grpo (hacked) | 2 | 4.000 ± 0.000 | 0.150 ± 0.071 |" in table


def test_the_fitted_peak_is_that_of_the_curve(tmp_path: Path) -> None:
    (cell, *_) = cells_of(tmp_path)
    # d = sqrt(k), gold = d (1 - log d): highest at d = exp(0) = 1, measured to d = 2.
    d = [k**0.5 for k in range(5)]
    write_run(cell, [0.0, *(x * (1 - math.log(x)) for x in d[1:])], [10.0, 12.0, 14.0, 16.0, 18.0])
    grid, _ = load_grid(tmp_path / "grid.yaml")
    record = read_record(cell, grid)
    assert record is not None and fitted_peak([record]) == pytest.approx(1)
    assert [proxy_at(record, x) for x in (0.0, 0.5, 2.0, 2.1)] == [20, 22, 36, None]  # of weight 2
    write_results(grid, [cell], tmp_path / "out", "")
    stats = json.loads((tmp_path / "out/results.json").read_text())["table"][0]["stats"]
    assert stats["fit_peak_proxy"] == {"mean": 24, "std": None, "n": 1}
    assert "| fitted peak, sqrt(kl) | proxy at fitted peak |" in (tmp_path / "out/table.md").read_text()
    assert "| 1.000 | 24.000 |" in (tmp_path / "out/table.md").read_text()
    (other,) = cells_of(tmp_path, Chosen(["kl"], ["vivid"], [3]))
    write_run(other, [0.0, 1.0, 2.0, 3.0], [0.0] * 4)
    straight = read_record(other, grid)
    assert straight is not None and fitted_peak([straight]) is None


def test_a_run_that_measured_nothing_has_no_record(tmp_path: Path) -> None:
    (cell, *_) = cells_of(tmp_path)
    grid, _ = load_grid(tmp_path / "grid.yaml")
    assert read_record(cell, grid) is None and not finished(cell)
    assert "No run of the grid is finished" in write_results(grid, [cell], tmp_path / "out", "")


def test_failed_runs_do_not_stop_others(tmp_path: Path) -> None:
    """The model's folder is missing: `train` itself refuses, and both failures are reported with its words."""
    cells = cells_of(tmp_path, Chosen(["grpo"], None, [3]), ("--model.path", str(tmp_path / "none")))
    said: list[str] = []
    failures = Pool(cells, 2, said.append).run()
    assert [f.name for f in sorted(failures, key=lambda f: f.name)] == ["count/grpo/seed3", "vivid/grpo/seed3"]
    assert all(f.code == 2 and "none" in f.words for f in failures) and sum("FAILED" in line for line in said) == 2


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = cells_of(tmp_path)
    write_run(cells[0], [0.4, 0.5], [0.0, 1.0])
    words = [str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")]
    assert cli.main(["hacklab", *words, "--list", "--seeds", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["done   vivid/grpo/seed3", "open   vivid/kl/seed3"]
    assert hacklab([*words, "--report-only"]) == 0 and (tmp_path / "out/results.json").is_file()
    with pytest.raises(ConfigError, match="expected whole numbers such as 0,1"):
        hacklab([*words, "--seeds", "a"])
    with pytest.raises(ConfigError, match="expected a whole number from 1"):
        hacklab([*words, "--jobs", "0"])
    with pytest.raises(ConfigError, match=r"vivid/kl/seed3: policy.tune.targets: no layer"):
        hacklab(
            [*words, "--methods", "kl", "--proxies", "vivid", "--seeds", "3", "--policy.tune.targets", "[no_layer]"]
        )
    clip = ["--heldout_rewards.clip", f"{{type: tiny_clip, path: {tmp_path}}}"]
    with pytest.raises(ConfigError, match="runs were started with other settings"):
        hacklab([*words, *clip])
    with pytest.raises(RunError, match=r"(?s)1 of 1 runs failed.*vivid/kl/seed1, exit code 2"):
        hacklab([*words[:-1], str(tmp_path / "other"), "--methods", "kl", "--proxies", "vivid", "--seeds", "1", *clip])


@pytest.mark.parametrize("path", sorted((ROOT / "configs/hacklab").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_committed_grid_expands(path: Path, tmp_path: Path) -> None:
    grid, layer = load_grid(path)
    assert len(expand(grid, layer, path, tmp_path)) >= len(grid.methods)
