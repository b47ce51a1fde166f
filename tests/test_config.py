"""`--config FILE.yaml`: what comes first, what is refused, and config.yaml, which repeats a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import FAST, cli, flags, script
from runs import one_thread as one_thread

from wanda_fast import run_config
from wanda_fast.cli import COMMANDS, config, main
from wanda_fast.cli import prune as command
from wanda_fast.cli.parser import Parser, share, whole
from wanda_fast.errors import UserError


def prune_parser() -> Parser:
    made = Parser("wanda-fast prune", command.EXAMPLES)
    command.add_arguments(made)
    return made


def parse(tmp_path: Path, text: str, *words: str):
    (tmp_path / "file.yaml").write_text(text, encoding="utf-8")
    return prune_parser().parse_args(["--config", str(tmp_path / "file.yaml"), *words])


def test_command_line_then_file_then_defaults(tmp_path):
    args = parse(tmp_path, "seed: 3\ncalib-steps: 8\nwanda_time_strategy: max\ndry_run: true\nnum_inference_steps:\n", "--seed", "5")
    assert (args.seed, args.calib_steps, args.time_strategy, args.dry_run, args.num_inference_steps) == (5, 8, "max", True, 50)
    assert vars(parse(tmp_path, "{}")) == vars(prune_parser().parse_args([]))
    assert parse(tmp_path, "").ratio is None


@pytest.mark.parametrize("text", ["target_macs: 56%", "target_macs: 3.4G", "target_macs: 3400000000"])
def test_values_of_text_options(tmp_path, text):
    assert parse(tmp_path, text).target_macs == text.split()[1]


def test_the_command_line_takes_the_place_of_what_excludes_it(tmp_path):
    args = parse(tmp_path, "ratio: 0.4\nseed: 1\n", "--target_macs", "56%")
    assert (args.ratio, args.target_macs, args.seed) == (None, "56%", 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rato: 0.3", "rato: no such option of wanda-fast prune"),
        ("help: true", "help: no such option"),
        ("config: other.yaml", "config: no such option"),
        ("1: 2", "1: no such option"),
        ("seed: many", "seed: must be a whole number of at least 0; got many"),
        ("seed: '3'", "seed: must be a number, not text"),
        ("seed: 1.5", "seed: must be a whole number"),
        ("seed: true", "seed: takes text or a number, not a yes/no value"),
        ("seed: [1, 2]", "seed: takes text or a number, not a list"),
        ("seed: -1", "seed: must be a whole number of at least 0"),
        ("ratio: 2", "ratio: the ratio is the share"),
        ("dry_run: 1", "dry_run: must be true or false, not 1"),
        ("dry_run: 'yes'", "dry_run: must be true or false"),
        ("split: even", "split: invalid choice: 'even'"),
        ("repair: no", "repair: takes text or a number, not a yes/no value"),
        ("seed: 2026-11-23", "seed: takes text or a number, not a date"),
        ("seed: 1\nseed: 2", "seed is given twice"),
        ("ratio: 0.1\npruning_ratio: 0.2", "pruning_ratio: given twice, under two names"),
        ("ratio: 0.1\ntarget_macs: 56%", "ratio and target_macs cannot be given together"),
        ("- seed", "must be a mapping of options to values, not a list"),
        ("seed", "must be a mapping of options to values, not text"),
        ("seed: [", "is not YAML in line 1"),
        ("a: &x 1\n<<: {seed: 1}", "merge keys"),
        ("seed: !!python/object/apply:os.getcwd []", "is not YAML in line 1"),
        ("seed: *nowhere", "is not YAML"),
        ("command: sample", "is for the command sample, not prune"),
        ("[" * 5000, "is not YAML"),
        ("2026-99-99: 1", "file.yaml"),
        ("{[1]: 2}: 3", "file.yaml"),
        ("a: " + "x" * (1 << 20), "larger than 1 MiB"),
    ],
    ids=lambda v: v[:30].replace("\n", "|"),
)
def test_bad_files_end_in_one_line_with_the_name_of_the_file(tmp_path, capsys, text, says):
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, text)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"wanda-fast: error: {tmp_path / 'file.yaml'}: ") and says in error and len(error) < 500


def test_missing_unreadable_and_binary_files(tmp_path, capsys):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00seed")
    for file, says in ((tmp_path / "none.yaml", "no such configuration"), (tmp_path, "no such"), (tmp_path / "binary.yaml", "read")):
        assert cli("--config", file) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(file) in error and says in error


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.text(alphabet="seed:rtio 0.1[]{}&*!|>-\n'\"%#,?", max_size=40).map(str.encode)))
def test_any_bytes_are_options_or_a_refusal(tmp_path, data):
    file = tmp_path / "any.yaml"
    file.write_bytes(data)
    try:
        assert isinstance(config.read(prune_parser(), file), dict)
    except UserError as error:
        assert str(file) in str(error)


def test_required_and_repeated_arguments(tmp_path, capsys):
    def make() -> Parser:
        parser = Parser("wanda-fast compare", "")
        parser.add_argument("folders", nargs="+", metavar="FOLDER")
        parser.add_argument("--names", nargs="+")
        parser.add_argument("--size", nargs=2, type=whole(1))
        parser.add_argument("--share", type=share, required=True)
        return parser

    file = tmp_path / "file.yaml"
    file.write_text("folders: [a, b]\nnames: one\nsize: [3, 4]\nshare: 1e-4\n")
    args = make().parse_args(["--config", str(file)])
    assert (args.folders, args.names, args.size, args.share) == (["a", "b"], ["one"], [3, 4], 1e-4)
    args = make().parse_args(["c", f"--config={file}", "--share", "0.5"])
    assert (args.folders, args.share) == (["c"], 0.5)
    for text, says in (("share: 0.5", "required: FOLDER"), ("folders: a", "required: --share"), ("size: [1]\nshare: 0", "takes 2")):
        file.write_text(text)
        with pytest.raises(SystemExit):
            make().parse_args(["--config", str(file)])
        assert says in capsys.readouterr().err


def test_places_that_a_flag_stands_for_are_not_required(tmp_path, capsys):
    file = tmp_path / "file.yaml"
    file.write_text(f"save_stats: [{tmp_path / 'none'}, {tmp_path / 'out.npz'}]\nfeatures: efficientnet-lite0\n")
    assert main(["fid", "--config", str(file)]) == 2
    assert f"{tmp_path / 'none'}: no such image folder" in capsys.readouterr().err
    file.write_text("features: efficientnet-lite0\n")
    assert main(["fid", "--config", str(file)]) == 2
    assert "give either --save-stats IMAGES OUT.npz, or SAMPLES STATS.npz" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_knows_the_flag(name, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("no_such_thing: 1")
    assert main([name, "--config", str(tmp_path / "x.yaml")]) == 2
    assert f"x.yaml: no_such_thing: no such option of wanda-fast {name}" in capsys.readouterr().err


def test_a_bad_file_is_found_before_torch_is_imported(tmp_path):
    (tmp_path / "x.yaml").write_text("seed: many")
    code = "import sys; from wanda_fast.cli import main; main(['prune', '--config', 'x.yaml']); sys.exit('torch' in sys.modules)"
    done = script(code, cwd=tmp_path)
    assert done.returncode == 0 and "x.yaml: seed" in done.stderr


# ----------------------------------------------------------------------------------------------------------- config.yaml


def test_the_file_that_a_run_writes_repeats_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli("--save_path", "one", *flags(FAST), "--ratio", "0.2", "--seed", "7", "--pruner", "random") == 0
    text = (tmp_path / "one" / "config.yaml").read_text()
    assert str(tmp_path) not in text and "save_path" not in text.split("\n", 1)[1]
    assert cli("--config", "one/config.yaml", "--save_path", "two") == 0
    first, second = (json.loads((tmp_path / name / "pruning.json").read_text()) for name in ("one", "two"))
    assert first["plan"] == second["plan"] and first["settings"] == second["settings"]
    assert (tmp_path / "two" / "config.yaml").read_text() == text
    capsys.readouterr()
    assert cli("--config", "one/config.yaml", "--save_path", "two") == 2  # is there already
    assert cli("--config", "one/config.yaml", "--target_params", "50%", "--dry_run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["asked"]["given_as"] == "50%"


def test_text_of_a_configuration():
    made = run_config.text("prune", {"model": Path("a") / "b", "lr": 1e-5, "many": (1, 2), "seed": None, "quiet": True}, "Note.")
    assert made.splitlines()[1] == "# Note."
    assert yaml.safe_load(made) == {"command": "prune", "model": "a/b", "lr": 1e-5, "many": [1, 2]}
