"""The rules of CONTRIBUTING.md that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from t2irl import registry
from t2irl.loading import dump_run, load_run
from t2irl.types import PromptGroups

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("t2irl", "reward_models")
SOURCES = sorted(p for name in (*PACKAGES, "scripts", "tests") for p in (ROOT / name).rglob("*.py"))
LIBRARY = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in PACKAGES]
FILE_LINES, LOOP_LINES, FUNCTION_LINES = 350, 250, 60

MAY_SCORE = (
    "t2irl/rewards/",
    "t2irl/regularizers/",
    "t2irl/preferences/",
    "t2irl/evaluation/features.py",
    "t2irl/judging.py",
)
MAY_KNOW_SHAPES = ("t2irl/rewards/", "t2irl/evaluation/suites/")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    """For test ids and messages."""
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> Iterator[Function]:
    """Every function and method."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    limit = LOOP_LINES if name_of(path) == "t2irl/train.py" else FILE_LINES
    lines = len(text.splitlines())
    assert lines <= limit, f"{name_of(path)} has {lines} lines, {limit} are allowed: split it"
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions(ast.parse(text))}
    long = {name: n for name, n in lengths.items() if n > FUNCTION_LINES}
    assert not long, f"{name_of(path)}: functions above {FUNCTION_LINES} lines: {long}"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = [] if ast.get_docstring(tree) else ["the module"]

    def look(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, (*Function.__args__, ast.ClassDef)) or node.name.startswith("_"):
                continue
            overload = any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)
            if not ast.get_docstring(node) and not overload:
                bare.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{prefix}{node.name}.")

    look(tree.body, "")
    assert not bare, f"{name_of(path)}: no docstring: {', '.join(bare)}"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    def inside(module: str, package: str) -> bool:
        return module == package or module.startswith(f"{package}.")

    found = imports(path)
    assert not any(inside(m, p) for m in found for p in ("tests", "scripts")), "the library imports tests or scripts"
    if path.relative_to(ROOT).parts[0] == "reward_models":
        assert not any(inside(m, "t2irl") for m in found), "reward_models must not know of t2irl"
    if name_of(path).startswith("t2irl/shapes/"):
        allowed = ("t2irl.shapes", "t2irl.errors", "t2irl.corruptions")  # pictures alone: it imports nothing of ours
        outside = {m for m in found if inside(m, "t2irl") and m != "t2irl" and not any(inside(m, a) for a in allowed)}
        assert not outside, f"the shapes world stands alone, but imports {outside}"
    elif name_of(path).startswith("t2irl/"):
        knows = any(inside(m, "t2irl.shapes") for m in found)
        assert not knows or name_of(path).startswith(MAY_KNOW_SHAPES), "the trainer must not know of the shapes world"
        scores = any(inside(m, "reward_models") for m in found)
        assert not scores or name_of(path).startswith(MAY_SCORE), f"only {MAY_SCORE} may import reward_models"


@pytest.mark.parametrize("module", ["config", "loading", "geometry", "errors", "registry"])
def test_config_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, t2irl.{module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"t2irl.{module} imports torch, so `t2irl check` cannot be quick"


def test_the_word_with_three_meanings_is_not_used() -> None:
    word = re.compile("epo" + "ch", re.IGNORECASE)
    files = [p for p in (ROOT / "t2irl").rglob("*") if p.suffix in (".py", ".md", ".j2", ".html")]
    used = [name_of(p) for p in files if word.search(p.read_text(encoding="utf-8"))]
    assert not used, f"say iteration, update or pass over the prompts instead: {used}"


def config_files() -> list[Path]:
    """Every config of a run; settings of the launcher are not ours, grids have their own form."""
    other = {"accelerate", "eval", "hacklab"}
    return sorted(p for p in (ROOT / "configs").rglob("*.y*ml") if not other & set(p.relative_to(ROOT).parts))


def test_there_are_configs() -> None:
    assert ROOT / "configs/tiny/demo.yaml" in config_files()


@pytest.mark.parametrize("path", config_files(), ids=name_of)
def test_every_config_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    below = [ROOT / "configs/sdxl/flow_grpo.yaml"] if {"methods", "gpus"} & set(path.parts) else []
    run = load_run([*below, path])
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_run(run), encoding="utf-8")
    assert load_run([saved]) == run


@pytest.mark.parametrize(
    "path", [*config_files(), *ROOT.glob("configs/hacklab/*.yaml"), *ROOT.glob("configs/eval/*.yaml")], ids=name_of
)
def test_config_comments_stand_on_every_setting(path: Path) -> None:
    """Each line that sets a value says why, beside it or right above it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    setting = re.compile(r"^\s*[\w-]+:\s*[^\s#]")
    bare = [
        f"{n}: {line.strip()}"
        for n, line in enumerate(lines, 1)
        if setting.match(line) and "#" not in line and not (n > 1 and lines[n - 2].lstrip().startswith("#"))
    ]
    assert not bare, f"{name_of(path)}: settings without a comment: {bare}"


def test_the_readmes_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, config = (
        re.search(r"```python\n(# my_rewards.py.*?)```", text, re.S),
        re.search(r"```yaml\n(.*?)```", text, re.S),
    )
    assert code and config
    (tmp_path / "my_rewards.py").write_text(code[1], encoding="utf-8")
    (tmp_path / "run.yaml").write_text(config[1], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = load_run([tmp_path / "run.yaml"])
    reward = registry.build("rewards", run.rewards["bright"], torch.device("cpu"))
    scores = reward.score(torch.full((2, 3, 8, 8), 0.5), PromptGroups.of(["a cat"], [0, 0], [0, 1]))
    assert torch.allclose(scores, torch.tensor([0.8, 0.8]))
