"""Config files, layers, overrides, messages, and the way back to YAML."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from t2irl import registry
from t2irl.config import Run
from t2irl.errors import ConfigError
from t2irl.loading import describe_fields, dump_run, load_run
from tests.unit.conftest import BESIDE, NEEDS

BASE = """\
model: {type: sd3, path: assets/tiny-sd3}
data:
  prompts: train.txt
  heldout: heldout.txt
rewards:
  gold: {type: shapes, measure: gold}
"""


class Files:
    """Config files in a temporary folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, text: str | bytes, name: str = "a.yaml") -> Path:
        path = self.folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def load(self, *texts: str, overrides: tuple[str, ...] = ()) -> Run:
        """BASE, then each text as a layer of its own."""
        return load_run([self.write(t, f"{i}.yaml") for i, t in enumerate((BASE, *texts))], overrides)

    def refusal(self, *texts: str, overrides: tuple[str, ...] = ()) -> str:
        with pytest.raises(ConfigError) as caught:
            self.load(*texts, overrides=overrides)
        return str(caught.value)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_a_small_file_gives_the_defaults(files: Files) -> None:
    run = files.load()
    assert run.model.path == Path("assets/tiny-sd3")
    assert (run.rollout.dynamics.type, run.policy.tune.type, run.rewards["gold"].weight) == ("cps", "lora", 1.0)


@pytest.mark.parametrize(
    "text, value", [("1e-4", 1e-4), ("2E3", 2000.0), ("5", 5.0), (".5", 0.5), ("1.e-2", 0.01), ("+1e0", 1.0)]
)
def test_numbers_that_yaml_1_1_reads_as_text(files: Files, text: str, value: float) -> None:
    run = files.load(f"optimizer: {{lr: {text}}}")
    assert run.optimizer.lr == value


@pytest.mark.parametrize("text", ["no", "on", "12:30", "2024-01-01", "0x10", "1_000", "010", "y"])
def test_words_that_yaml_1_1_changes_stay_text(files: Files, text: str) -> None:
    assert files.load(f"rollout: {{negative_prompt: {text}}}").rollout.negative_prompt == text


def test_files_merge_left_to_right(files: Files) -> None:
    run = files.load(
        "rollout: {prompts: 4, steps: 12}\npolicy: {tune: {targets: [a, b]}}\nrewards: {vivid: {type: vividness}}",
        "rollout: {prompts: 6}\npolicy: {tune: {targets: [c]}}\nrewards: {gold: {weight: 0.5}}",
    )
    assert (run.rollout.prompts, run.rollout.steps) == (6, 12)
    assert run.policy.tune.targets == ("c",)
    assert list(run.rewards) == ["gold", "vivid"]
    assert (run.rewards["gold"].weight, run.rewards["gold"].measure) == (0.5, "gold")


def test_a_mapping_whose_type_changes_is_replaced(files: Files) -> None:
    first = (
        "rollout: {dynamics: {type: cps, density: squared_error, noise_level: 0.3}, window: {type: fixed, start: 2}}"
    )
    run = files.load(first, "rollout: {dynamics: {type: flow_sde}, window: {type: random}}")
    assert run.rollout.dynamics.model_dump() == {"type": "flow_sde", "noise_level": 0.7}
    assert run.rollout.window.model_dump() == {"type": "random", "size": 3, "range": None}
    kept = files.load(first, "rollout: {dynamics: {type: cps}}")
    assert kept.rollout.dynamics.noise_level == 0.3


def test_a_mapping_without_type_keeps_the_type_it_had(files: Files) -> None:
    assert files.load("rollout: {dynamics: {noise_level: 0.5}}").rollout.dynamics.type == "cps"
    run = files.load("rollout: {dynamics: {type: dance_sde}}", "rollout: {dynamics: {noise_level: 0.5}}")
    assert (run.rollout.dynamics.type, run.rollout.dynamics.noise_level) == ("dance_sde", 0.5)


def test_null_removes_an_entry_of_an_earlier_layer(files: Files) -> None:
    both = "regularizers: {near: {type: kl}, far: {type: kl, kind: v_mse}}"
    assert list(files.load(both, "regularizers: {near: null}").regularizers) == ["far"]
    assert list(files.load(both, overrides=("--regularizers.far=null",)).regularizers) == ["near"]
    assert "regularizers.nere = null" in files.refusal(both, "regularizers: {nere: null}")


def test_overrides_are_the_last_layer(files: Files) -> None:
    run = files.load(
        "rollout: {prompts: 4}\npolicy: {ema: null}",
        overrides=(
            "--rollout.prompts", "8", "--rewards.gold.weight=2e-1", "--rollout.dynamics.type", "flow_sde",
            "--rollout.dynamics.noise_level", "0.9", "--policy.ema.decay", "0.5", "--optimizer.betas", "[0.8, 0.9]",
            "--update.skip_zero_advantage", "false", "--seed", "3", "--seed", "4",
        ),
    )  # fmt: skip
    assert (run.rollout.prompts, run.rewards["gold"].weight, run.seed) == (8, 0.2, 4)
    assert run.rollout.dynamics.model_dump() == {"type": "flow_sde", "noise_level": 0.9}
    assert run.policy.ema is not None and (run.policy.ema.decay, run.optimizer.betas) == (0.5, (0.8, 0.9))
    assert run.update.skip_zero_advantage is False


@pytest.mark.parametrize("text", ["blurry, low: quality #1", "[", "", "null", "'quoted'", "*", "1e5", "a=b", "-x"])
def test_text_and_paths_are_taken_as_typed(files: Files, text: str) -> None:
    assert files.load(overrides=("--rollout.negative_prompt", text)).rollout.negative_prompt == text
    assert files.load(overrides=(f"--rollout.negative_prompt={text}",)).rollout.negative_prompt == text
    if text:
        assert files.load(overrides=("--data.prompts", text)).data.prompts == Path(text)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (("--seed",), ["--seed", "value is missing"]),
        (("--seed", "--iterations", "3"), ["--seed", "value is missing"]),
        (("more.yaml",), ["more.yaml", "config files come first"]),
        (("--rollout..prompts", "3"), ["--rollout..prompts", "dotted key"]),
        (("--seed", "[1"), ["--seed [1", "not valid YAML"]),
        (("--rollout.promts", "3"), ["rollout.promts = 3 (--rollout.promts)", "Did you mean rollout.prompts?"]),
        (("--lr", "3"), ["Did you mean optimizer.lr?"]),
        (("--rewards.gld.weight", "3"), ["rewards.gld", "Did you mean 'gold'?"]),
        (("--rollout.prompts.x", "3"), ["(--rollout.prompts.x)", "expected integer > 0"]),
        (("--rollout.window.range", "[1, 3]"), ["belongs to type: random"]),
        (("--run_dir", ""), ["run_dir", "not empty"]),
        (("--zebra", "1"), ["unknown key. Known keys: run_dir, seed"]),
    ],
)
def test_wrong_overrides(files: Files, overrides: tuple[str, ...], said: list[str]) -> None:
    message = files.refusal(overrides=overrides)
    assert all(words in message for words in said), message


def test_all_problems_are_told_at_once(files: Files) -> None:
    message = files.refusal(
        "rollout:\n  group_size: 1\n  stepps: 3\n  dynamics: {type: cps, noise_level: 2}\nrewards:\n  gold: {measure: goold}\n",
        "optimizer: {lr: fast}\nmodel:\n  type: sd33\n",
        overrides=("--policy.tune.rank", "0", "--advantage.std=groups", "--rollout.window.type", "slidng"),
    )
    lines = message.splitlines()
    assert lines[0] == "9 problems in the config"
    expected = [
        "rollout.group_size = 1 (%s/1.yaml:2): must be greater than or equal to 2",
        "rollout.stepps = 3 (%s/1.yaml:3): unknown key. Did you mean rollout.steps?",
        "rollout.dynamics.noise_level = 2 (%s/1.yaml:4): must be less than or equal to 1",
        "rewards.gold.measure = \"goold\" (%s/1.yaml:6): must be one of 'clauses', 'correct', 'cleanliness' or 'gold'. Did",
        'optimizer.lr = "fast" (%s/2.yaml:1): expected number > 0',
        "model.type = \"sd33\" (%s/2.yaml:3): no models of type 'sd33'. Did you mean 'sd3'?",
        "policy.tune.rank = 0 (--policy.tune.rank): must be greater than 0",
        "advantage.std = \"groups\" (--advantage.std): must be one of 'group', 'global' or 'none'. Did you mean 'group'?",
        "rollout.window.type = \"slidng\" (--rollout.window.type): must be one of 'fixed', 'random', 'sliding'. Did you mean",
    ]
    for line in expected:
        wanted = line.replace("%s", str(files.folder))
        assert any(found.startswith(wanted) for found in lines), f"{wanted}\nis not in\n{message}"


def test_missing_keys_are_named(files: Files) -> None:
    path = files.write("model: {type: sd3}\ndata: {prompts: a.txt}\n")
    with pytest.raises(ConfigError) as caught:
        load_run([path])
    for key in ("model.path", "data.heldout", "rewards"):
        assert f"{key} is missing in {path}: expected" in str(caught.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("iterations: true", "iterations = true"),
        ("rollout: {steps: 3.5}", "rollout.steps = 3.5"),
        ("optimizer: {max_grad_norm: .inf}", "finite"),
        ("advantage: {eps: .nan}", "advantage.eps"),
        ("optimizer: {betas: [0.9, 0.99, 0.999]}", "expected [number >= 0 and < 1, number >= 0 and < 1]"),
        ("optimizer: {betas: [0.9, 1.0]}", "less than 1"),
        ("rollout: {window: {type: random, range: [1]}}", "rollout.window.range = [1]"),
        ("policy: {ema: 5}", "expected mapping | null"),
        ("rewards: {gold: 5}", "mapping with a `type`"),
        ("rewards: {a/b: {type: vividness}}", "letters, digits, _ and -"),
        ("rewards: {total: {type: vividness}}", "not total"),
        ("heldout_rewards: {gold: {type: vividness}}", "share the name 'gold'"),
        ("{policy: {ema: null}, regularizers: {slow: {type: kl, anchor: average}}}", "regularizers.slow needs"),
        ("rewards: null", "rewards = null"),
        ("data: {prompts: 5}", "data.prompts = 5"),
        ("tracking: {trackers: [tensorbord]}", "Did you mean 'tensorboard'?"),
    ],
)
def test_wrong_values(files: Files, text: str, said: str) -> None:
    assert said in files.refusal(text)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty"),
        ("# nothing but a comment\n", "is empty"),
        ("- a\n- b\n", 'holds ["a", "b"]'),
        ("just words", 'holds "just words"'),
        ("seed: 1\nrollout: {prompts: 3\n", "a.yaml:3:1: not valid YAML"),
        ("seed: 1\n\tx: 2\n", "a.yaml:2:1: not valid YAML"),
        ("seed: 1\niterations: 2\nseed: 3\n", "a.yaml:3: the key seed is set twice (first in line 1)"),
        ("rollout:\n  steps: 1\n  steps: 2\n", "a.yaml:3: the key rollout.steps is set twice (first in line 2)"),
        ("seed: 1\n1: 2\n", "a.yaml:2: a key must be text"),
        ("[a]: 2\n", "a.yaml:1: a key must be text"),
        ("x: &x\n  y: *x\n", "an alias that contains itself"),
        ("seed: *nowhere\n", "a.yaml:1:7: not valid YAML"),
        ("seed: !python/object:os.system 1\n", "a.yaml:1:7: not valid YAML"),
        ("seed: !!int x\n", "a.yaml:1:"),
        ("seed: 1\n---\nseed: 2\n", "a.yaml:2:1: not valid YAML"),
        ("seed: 1\nx: \x01\n", "a.yaml:2: not valid YAML: the character"),
        ("<<: 5\n", "`<<` takes a mapping"),
        ("[" * 3000, "nested too deeply"),
        ("seed: 1\nname: caf\u00e9\n".encode("latin-1"), "a.yaml:2: not UTF-8"),
        ("seed: 1\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_files_that_are_no_config(files: Files, text: str | bytes, said: str) -> None:
    path = files.write(text)
    with pytest.raises(ConfigError) as caught:
        load_run([path])
    assert said in str(caught.value) and "a.yaml" in str(caught.value)


def test_files_that_cannot_be_read(files: Files) -> None:
    files.write(BASE, "demo.yaml")
    for path, said in (
        (files.folder / "deno.yaml", "Did you mean"),
        (files.folder / "x.yaml", "no such file"),
        (files.folder, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_run([path])
    with pytest.raises(ConfigError, match="no config file given"):
        load_run([])


def test_byte_order_mark_and_windows_line_ends(files: Files) -> None:
    path = files.write(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    assert load_run([path]) == files.load()


def test_merge_keys_and_anchors(files: Files) -> None:
    run = files.load(
        "rewards:\n  one: &one {type: shapes, measure: correct, weight: 2}\n"
        "  two:\n    weight: 3\n    <<: *one\n  three: {<<: [{measure: gold}, *one]}\n"
    )
    assert (run.rewards["two"].measure, run.rewards["two"].weight) == ("correct", 3)
    assert (run.rewards["three"].measure, run.rewards["three"].weight) == ("gold", 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1e-4",
        "yes",
        "null",
        "12:30",
        "a: b # c",
        "'",
        '"',
        "two\nlines\n",
        "tab\tend ",
        "\u2028\x85\x07",
        "円 🎨",
        "0o17",
        "<<",
    ],
)
def test_dump_and_load_give_an_equal_run(files: Files, text: str) -> None:
    run = files.load(
        "optimizer: {lr: 1e-9, eps: 1e-30}\npolicy: {ema: null}", overrides=("--rollout.negative_prompt", text)
    )
    dumped = dump_run(run)
    assert load_run([files.write(dumped, "dump.yaml")]) == run
    plain = yaml.safe_load(dumped)  # other programs read it with a YAML 1.1 reader
    assert plain["rollout"]["negative_prompt"] == text and plain["optimizer"]["lr"] == 1e-9


@pytest.mark.parametrize("kind, name", [(k, n) for k in registry.KINDS if "." not in k for n in registry.names(k)])
def test_every_plugin_survives_a_round_trip(files: Files, kind: str, name: str) -> None:
    required = {key: "x" for key, field in registry.find(kind, name).Config.model_fields.items() if field.is_required()}
    entry = required | {"type": name} | NEEDS.get(name, {})
    places: dict[str, Any] = {
        "models": {"model": entry},
        **{f"{key}{s}": {"rollout": {key: entry}} for key, s in (("dynamics", ""), ("engine", "s"))},
        "algorithms": {"algorithm": entry},
        "rewards": {"rewards": {"mine": entry}, "heldout_rewards": {"other": entry}},
        "regularizers": {"regularizers": {"mine": entry}},
    }
    run = files.load(yaml.safe_dump(BESIDE.get(name, {})), yaml.safe_dump(places[kind]))
    assert (again := load_run([files.write(dump_run(run), "dump.yaml")])) == run
    assert yaml.safe_load(dump_run(again)) == run.model_dump(mode="json")


def test_a_plugin_from_outside(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write(
        "from t2irl.rewards.base import Reward\n\nclass Mine(Reward):\n    class Config(Reward.Config):\n"
        "        strength: float = 2.0\n\nclass Other:\n    pass\n",
        "my_lab_rewards.py",
    )
    monkeypatch.syspath_prepend(files.folder)
    text = "rewards: {mine: {type: 'my_lab_rewards:Mine', strength: 3}}"
    run = files.load(text)
    assert run.rewards["mine"].strength == 3
    assert load_run([files.write(dump_run(run), "dump.yaml")]) == run
    assert "Did you mean rewards.mine.strength?" in files.refusal(text.replace("strength", "strenght"))
    for wrong, said in (
        ("my_lab_rewards:Other", "not a subclass of t2irl.rewards.base.Reward"),
        ("my_lab_rewards:Nobody", "cannot import"),
        ("my_lab_missing:Mine", "cannot import"),
        ("..:Mine", "not of the form"),
    ):
        assert said in files.refusal(text.replace("my_lab_rewards:Mine", wrong))


def test_the_list_of_fields_is_complete() -> None:
    text = describe_fields()
    for path, field, choice in registry.fields_of(Run):
        assert field.description or choice, f"{path} has no doc"
        assert f"{path}  " in text or choice
    assert "rollout.group_size  integer >= 2  (default: 8)\n    Images of one prompt" in text
    assert "rollout.window.dwell  [type sliding]  integer > 0  (default: 25)" in text
    assert "rewards.NAME.measure  [type shapes]  clauses | correct | cleanliness | gold" in text
    assert "data.prompts  path  (required)" in text


def test_plugin_modules_can_be_imported_first() -> None:
    """The config classes look plugins up, and plugins import the config classes."""
    done = subprocess.run([sys.executable, "-c", "import t2irl.dynamics.cps"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
