"""The command line: spellings, help, exit codes, what goes to which stream."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
from runs import FAST, ROOT, cli, flags, script, tree
from runs import one_thread as one_thread

from wanda_fast import checkpoint, importance, latency, ops, plan, pruning, stats
from wanda_fast.cli import COMMANDS, main, overview
from wanda_fast.cli import prune as command
from wanda_fast.cli.parser import Parser
from wanda_fast.cli.terminal import change, finite, seconds, si, table
from wanda_fast.errors import UserError

OPTIONS = {f.name: f for f in dataclasses.fields(pruning.PruneOptions)}


def parser() -> Parser:
    made = Parser("wanda-fast prune", command.EXAMPLES)
    command.add_arguments(made)
    return made


def parse(line: str):
    return parser().parse_args(shlex.split(line))


# ------------------------------------------------------------------------------------------------------------ arguments


def test_every_option_of_prune_has_a_flag_of_its_name():
    found = {string[2:] for action in parser()._actions for string in action.option_strings}
    assert set(OPTIONS) <= found


def test_defaults_are_those_of_prune():
    args = vars(parse(""))
    for name, field in OPTIONS.items():
        if name != "ratio":  # None, so that a ratio beside a budget is noticed; run() fills in the default
            assert args[name] == field.default, name
    assert args["ratio"] is None


def test_choices_are_those_of_the_library():
    choices = {a.dest: a.choices for a in parser()._actions if a.choices}
    assert choices == {
        "layout": plan.LAYOUTS,
        "split": plan.SPLITS,
        "norm_policy": plan.NORM_POLICIES,
        "combine": importance.COMBINATIONS,
        "timesteps": pruning.TIMESTEPS,
        "time_strategy": stats.TIME_STRATEGIES,
        "activation_strategy": stats.ACTIVATION_STRATEGIES,
        "repair": pruning.REPAIRS,
        "repair_weighting": pruning.WEIGHTINGS,
        "backend": ops.BACKENDS,
        "latency_mode": latency.MODES,
        "dtype": choices["dtype"],
    }
    assert set(choices["dtype"]) == set(pruning._DTYPE_NAMES)


GUIDE = {  # flags of the guide -> (a value, the option it sets)
    "model_path": ("x", "model"), "save_path": ("x", "save_path"), "pruning_ratio": ("0.25", "ratio"),
    "pruner": ("random", "pruner"), "device": ("cpu", "device"), "batch_size": ("3", "batch_size"),
    "dataset": ("x", "dataset"), "data_dir": ("x", "data_dir"), "seed": ("3", "seed"),
    "num_samples": ("3", "num_samples"), "num_inference_steps": ("3", "num_inference_steps"), "dtype": ("bf16", "dtype"),
    "wanda_calib_steps": ("3", "calib_steps"), "wanda_time_strategy": ("max", "time_strategy"),
    "wanda_target_steps": ("10-20", "target_steps"), "wanda_activation_strategy": ("max", "activation_strategy"),
    "wanda_save_analysis": ("x", "save_analysis"), "target_macs": ("56%", "target_macs"),
    "target_params": ("3M", "target_params"), "min_width": ("3", "min_width"), "align": ("3", "align"),
    "layout": ("free", "layout"), "load_stats": ("x", "load_stats"), "plan": ("x", "plan"),
    "timesteps": ("trajectory", "timesteps"), "split": ("uniform", "split"), "repair": ("bias", "repair"),
    "norm_policy": ("groups", "norm_policy"), "combine": ("producers", "combine"), "repair_images": ("3", "repair_images"),
    "backend": ("cpu", "backend"), "target_latency": ("0.6x", "target_latency"), "latency_mode": ("eager", "latency_mode"),
    "trials": ("3", "trials"),
    "repair_weighting": ("last", "repair_weighting"), "experts": ("300,600", "experts"), "latency_batch": ("3", "latency_batch"),
    "stats_memory": ("64M", "stats_memory"), "thr": ("0.1", "thr"),
}  # fmt: skip


@pytest.mark.parametrize("flag", GUIDE)
def test_underscores_and_dashes_mean_the_same(flag):
    value, dest = GUIDE[flag]
    one, other = parse(f"--{flag} {value}"), parse(f"--{flag.replace('_', '-')}={value}")
    assert vars(one) == vars(other)
    assert str(vars(one)[dest]) == value
    assert vars(one) != vars(parse(""))


@pytest.mark.parametrize("flag", ["wanda_analyze_activations", "dry_run", "overwrite", "json", "quiet", "resume", "offload"])
def test_switches_have_both_spellings(flag):
    assert vars(parse(f"--{flag}")) == vars(parse(f"--{flag.replace('_', '-')}")) != vars(parse(""))


def test_short_names():
    assert parse("--model a --out b --ratio 0.1") == parse("--model_path a --save_path b --pruning_ratio 0.1")


def test_a_value_keeps_its_dashes():
    assert parse("--out=my-run --wanda-target-steps 100-200").save_path == "my-run"
    assert parse("--out my-run --wanda-target-steps 100-200").target_steps == "100-200"


def test_flags_are_not_abbreviated(capsys):
    assert cli("--num_sample", "3") == 2
    assert "--num_sample" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["prune --out=", "prune --model ''", "sample --grid ''", "evaluate ''", "compare bundled ''"])
def test_an_empty_value_is_refused(line, capsys, tmp_path, monkeypatch):
    """As from a shell variable that is not set: a path would mean the current folder."""
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 2
    error = capsys.readouterr().err
    assert "is empty" in error and error.count("\n") == 1 and tree(tmp_path) == []


def test_an_error_names_the_long_flag(capsys):
    assert main(["sample", "-n", "0"]) == 2
    assert capsys.readouterr().err.startswith("wanda-fast: error: --num_samples: must be")


IDLE = {
    "fid a b.npz --overwrite": "--overwrite is for the file of --save-stats",
    "fid a b.npz --data_dir .": "--data_dir is where cifar10 lies",
    "evaluate --overwrite": "--overwrite is for --save_path",
    "evaluate --features efficientnet-lite0": "--features measure images",
    "evaluate --real a --data_dir .": "--data_dir is where cifar10 lies",
    "prune --data_dir .": "is where cifar10 lies, and the dataset is self",
    "analyze --data_dir .": "is where cifar10 lies",
    "finetune --data_dir .": "is where cifar10 lies",
    "sample --overwrite": "--overwrite is for --grid",
}


@pytest.mark.parametrize("line", IDLE)
def test_a_flag_without_effect_is_refused(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "load_pipeline", lambda *a, **k: pytest.fail("the model was opened"))
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert IDLE[line] in error and error.count("\n") == 1 and tree(tmp_path) == []


FILES = ["sample --grid", "fid --save-stats images", "compare bundled bundled --save_path", "prune --save_analysis"]


@pytest.mark.parametrize("line", FILES)
def test_a_file_that_cannot_be_written_is_found_before_any_work(line, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(checkpoint, "load_pipeline", lambda *a, **k: pytest.fail("the model was opened"))
    end = {"sample": ".png", "fid": ".npz", "compare": ".html", "prune": ".png"}[line.split()[0]]
    assert main([*line.split(), str(tmp_path / "file" / f"a{end}")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / f"a{end}").write_text("mine")
    assert main([*line.split(), str(tmp_path / f"a{end}")]) == 2
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / f"a{end}").read_text() == "mine"


def test_bundled_is_a_name_of_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint.load_pipeline("bundled").source == "bundled"
    assert command.default_folder(parse("--model bundled")) == command.default_folder(parse(""))
    (tmp_path / "bundled").mkdir()
    with pytest.raises(UserError, match="no UNet2DModel to open"):
        checkpoint.load_pipeline("bundled")


def test_one_way_to_say_how_much(capsys):
    assert cli("--ratio", "0.3", "--target-macs", "56%") == 2
    assert "not allowed with argument" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- help


def test_help_opens_with_commands_that_run(capsys):
    assert cli("--help") == 0
    text = capsys.readouterr().out
    assert text.startswith("python prune.py --ratio 0.3 --pruner wanda-diff ")
    commands = [line.split("  ")[0] for line in text.split("\n\n")[0].splitlines()]
    assert len(commands) == 4
    for line in commands:
        words = shlex.split(line)
        assert words[:2] == ["python", "prune.py"]
        parser().parse_args(words[2:])  # exits, and so fails, on a flag that does not exist


def test_help_names_every_flag_and_criterion(capsys):
    cli("--help")
    text = capsys.readouterr().out
    for action in parser()._actions:
        for string in action.option_strings:
            assert string in text
    assert ", ".join(sorted(importance.CRITERIA)) in text


def test_every_option_with_a_value_states_its_default():
    unstated = {"target_macs", "target_params", "plan", "load_stats", "data_dir", "save_analysis", "config"}  # nothing unless given
    for action in parser()._actions:
        if action.nargs != 0 and action.dest not in unstated:
            assert "(default: " in action.help, action.dest
            if action.default is not None:
                assert f"(default: {action.default})" in action.help, action.dest


def test_overview_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == overview()
    assert all(f"\n  {name} " in overview() for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0


def test_unknown_command(capsys):
    assert main(["prun"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------- exits, streams


def failing(monkeypatch, error):
    def prune(*args, **kwargs):
        raise error

    monkeypatch.setattr(pruning, "prune", prune)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("a\nmistake"), 2, "wanda-fast: error: a mistake\n"),
        (RuntimeError("no backend"), 1, "wanda-fast: error: no backend\n"),
        (MemoryError(), 1, "wanda-fast: error: MemoryError\n"),
        (OSError(5, "I/O error"), 1, "wanda-fast: error: [Errno 5] I/O error\n"),
        (KeyboardInterrupt(), 130, "wanda-fast: interrupted; nothing unfinished is left behind\n"),
        (KeyError("x"), 1, "wanda-fast: error: unexpected KeyError: 'x' (WANDA_FAST_DEBUG=1 shows the traceback)\n"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else "",
)
def test_exit_codes(monkeypatch, capsys, tmp_path, error, code, text):
    monkeypatch.chdir(tmp_path)
    failing(monkeypatch, error)
    assert cli() == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", text)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("prune --ratio 0.3", "nothing unfinished is left behind"),
        ("prune --resume", "what is complete stays beside the target, and the same command goes on"),
        ("sample", "the images that are complete stay"),
        ("sample --grid=a.png", "nothing unfinished"),
        ("finetune --steps 3", "--resume goes on from the newest"),
        ("analyze", "nothing unfinished"),
    ],
)
def test_an_interrupt_says_what_is_left(line, text, monkeypatch, capsys, tmp_path):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "load_pipeline", stop)
    assert main(line.split()) == 130
    assert text in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("WANDA_FAST_DEBUG", "1")
    failing(monkeypatch, UserError("x"))
    with pytest.raises(UserError):
        cli()


def test_json_is_alone_on_stdout(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(*flags(FAST), "--dry_run", "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["pruned"]["params"] < report["dense"]["params"] and report["path"] is None
    assert captured.err.startswith("model: ddpm-cifar10-small (bundled")
    assert tree(tmp_path) == []


def test_quiet_prints_the_result_alone(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(*flags(FAST), "--dry_run", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.split()[:4] == ["slot", "level", "dense", "kept"]


def test_the_first_line_names_the_model_and_the_flag_for_another(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(*flags(FAST), "--dry_run") == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert "ddpm-cifar10-small" in first and "bundled" in first and "--model" in first
    assert second.startswith("device: cpu; backends: reference")


@pytest.mark.parametrize(
    ("line", "folder"),
    [
        ("", "ddpm-cifar10-small-0.3"),
        ("--pruner wanda-diff", "ddpm-cifar10-small-wanda-diff-0.3"),
        ("--ratio 0.50 --pruner random", "ddpm-cifar10-small-random-0.5"),
        ("--model google/ddpm-cat-256 --target_macs 56%", "ddpm-cat-256-macs56pct"),
        ("--model some/where/mine/unet --target_params 3.4M", "mine-params3.4M"),
        ("--plan old/pruning.json", "ddpm-cifar10-small-plan-old"),
        ("--plan old/best.json", "ddpm-cifar10-small-plan-best"),
        ("--target_macs 56% --layout free", "ddpm-cifar10-small-macs56pct-free"),
        ("--layout free --experts 3 --pruner wanda-diff", "ddpm-cifar10-small-wanda-diff-0.3-free-experts3"),
        ("--layout free --experts 300,600", "ddpm-cifar10-small-0.3-free-experts300_600"),
        ("--pruner ../../x", "ddpm-cifar10-small-.._.._x-0.3"),
    ],
)
def test_default_folder(line, folder):
    found = command.default_folder(parse(line))
    assert (found.parent.name, found.name) == ("run", folder)


def test_bad_arguments_are_found_before_torch_is_imported(tmp_path):
    code = "import sys; from wanda_fast.cli import main; main(['prune', '--ratio', '1.5']); sys.exit('torch' in sys.modules)"
    done = script(code, cwd=tmp_path)
    assert done.returncode == 0 and "0 <= ratio < 1" in done.stderr


@pytest.mark.parametrize("start", [["prune.py"], ["-m", "wanda_fast", "prune"]], ids=" ".join)
def test_ways_to_start_it(start, tmp_path):
    done = subprocess.run([sys.executable, *start, "--ratio", "2"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


def test_the_entry_point_names_this_function():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'wanda-fast = "wanda_fast.cli:main"' in text


def test_a_reader_that_goes_away_does_not_stop_the_run(tmp_path):
    """`| head -1` closes the pipe after the first line; the folder is written all the same."""
    words = [sys.executable, ROOT / "prune.py", "--out", tmp_path / "out", *flags(FAST)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("model:")
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(240) == 0, errors
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert (tmp_path / "out" / "pruning.json").is_file()


def test_output_survives_a_terminal_without_unicode(monkeypatch, tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    failing(monkeypatch, UserError("größe"))
    assert cli() == 2
    stream.seek(0)
    assert stream.read() == "wanda-fast: error: gr\\xf6\\xdfe\n"


# ------------------------------------------------------------------------------------------------------------- numbers


def test_numbers_for_people():
    assert [si(v) for v in (6_079_811, 1_025_605_632, 999, 999_999, 35_746_307)] == [
        "6.08 M", "1.03 G", "999", "1 M", "35.7 M",
    ]  # fmt: skip
    assert si(12_159_622, "B") == "12.2 MB"
    assert change(200, 100) == "-50.0 %"
    assert [seconds(v) for v in (0.0123, 4.567, 1234)] == ["12.3 ms", "4.57 s", "1234 s"]
    assert finite({"a": [1.0, float("inf")], "b": float("nan")}) == {"a": [1.0, None], "b": None}
    assert table(["", "b"], [["x", "10"], ["long"]]) == "       b\n--------\nx     10\nlong"


@pytest.mark.parametrize(("number", "ignored", "code", "line"), [
    (signal.SIGINT, False, 130, "wanda-fast: interrupted; "), (signal.SIGINT, True, 2, "wanda-fast: error: not interrupted"),
    (signal.SIGTERM, False, 143, "wanda-fast: terminated; "),
], ids=["int", "ignored", "term"])  # fmt: skip
def test_an_interrupt_that_another_package_makes_an_error_of_is_an_interrupt(monkeypatch, capsys, number, ignored, code, line):
    """As while diffusers is imported: it wraps whatever goes wrong there."""

    def stopped(*args, **kwargs):
        try:
            signal.raise_signal(number)
        except (KeyboardInterrupt, SystemExit) as error:
            raise RuntimeError("failed to import") from error
        raise UserError("not interrupted")

    monkeypatch.setattr(checkpoint, "load_pipeline", stopped)
    handler = signal.SIG_IGN if ignored else signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)
    try:
        assert main(["sample", "--device", "cpu"]) == code
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1


@pytest.mark.parametrize("line", ["analyze --dataset {0} --out {0}", "export --model {0} --out {0}", "evaluate {0} --out {0}",
                                  "evaluate --real {0}/a.npz --out {0}", "finetune --dataset {0} --out {0}",
                                  "prune --model {0} --save_path {0}", "prune --dataset {0} --out {0}"])  # fmt: skip
def test_overwrite_spares_what_a_command_reads(tmp_path, monkeypatch, capsys, line):
    monkeypatch.setattr(checkpoint, "load_pipeline", lambda *a, **k: pytest.fail("a model was loaded"))
    (tmp_path / "a.png").write_text("mine")
    (tmp_path / "a.npz").write_text("mine")
    assert main([*line.format(tmp_path).split(), "--overwrite", "--device", "cpu"]) == 2
    assert "refusing to overwrite what this run reads" in capsys.readouterr().err and tree(tmp_path) == ["a.npz", "a.png"]
