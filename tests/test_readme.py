"""What README.md and the guide promise: their snippets run, their commands parse, their tables are those of the program.

`python tests/test_readme.py` writes the guide's table of parameters anew; `python tests/test_readme.py OUTPUT FOLDER` puts what the first
command printed (a text file) and its pictures (the folder it wrote) in their places too.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from networks import PLAIN, random_unet
from PIL import Image
from runs import one_thread as one_thread
from test_features import Colours, folder_of, pictures

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wanda_fast import checkpoint, cli, features, importance, model_card  # noqa: E402
from wanda_fast.cli import prune as command  # noqa: E402
from wanda_fast.cli.parser import Parser  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
TEXTS = {"README.md": README, "docs/guide.md": GUIDE}
RESULTS_TEXTS = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
PAGES = {**TEXTS, **{file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in RESULTS_TEXTS}}
OUTPUT, OUTPUT_END = "<!-- output:run -->\n", "<!-- output:end -->"
BEGIN, END = "<!-- table:parameters -->\n", "<!-- table:end -->"


def parser() -> Parser:
    made = Parser("wanda-fast prune", command.EXAMPLES)
    command.add_arguments(made)
    return made


def parameter_table() -> str:
    """Markdown of all options, from the parser itself."""
    lines = ["| flag | meaning and default | in Python |", "|---|---|---|"]
    for action in parser()._actions:
        flags = ", ".join(f"`{s}`" for s in action.option_strings)
        value = "" if action.nargs == 0 else " " + ("|".join(action.choices) if action.choices else str(action.metavar))
        meaning = str(action.help).replace("{pruners}", "a registered criterion").replace("%%", "%").replace("<", "&lt;")
        name = {"analyze": "`analyse`", "save_analysis": "", "push_to_hub": "`publish.push`",
                "config": "", "json": "", "quiet": "`progress`, `log`", "==SUPPRESS==": ""}  # fmt: skip
        python = name.get(action.dest, f"`{action.dest}`")
        lines.append(" | ".join(["", flags + value.replace("|", "\\|"), meaning.replace("|", "\\|"), python, ""]).strip())
    return "\n".join(lines) + "\n"


def blocks(text: str, language: str, after: str = "") -> list[str]:
    """Code blocks of a language; with `after`, those that follow this marker line."""
    return re.findall(rf"{re.escape(after)}\n?```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


RUNNABLE = [(name, code) for name, text in TEXTS.items() for code in blocks(text, "python", "<!-- run -->\n")]


@pytest.mark.parametrize("code", [c for _, c in RUNNABLE], ids=[f"{n}-{i}" for i, (n, _) in enumerate(RUNNABLE)])
def test_snippets_run(code, tmp_path, monkeypatch):
    from wanda_fast import importance

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importance, "CRITERIA", dict(importance.CRITERIA))
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    assert not list(tmp_path.iterdir())


def test_there_are_snippets_and_the_others_are_valid():
    assert len(RUNNABLE) >= 5
    for text in TEXTS.values():
        for code in blocks(text, "python"):
            ast.parse(code)


def command_lines(text: str) -> list[list[str]]:
    """The words after the program's name, of every line of a text that starts it."""
    found = []
    for block in blocks(text, "bash") + blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#.*", "", line).split("&& ")[-1]
            match = re.match(r"(?:torchrun .*-m wanda_fast|python -m wanda_fast|wanda-fast|(?=python prune\.py)) ?(.*)", line)
            if match:
                found.append(shlex.split(match[1].replace("python prune.py", "prune")))
    return found


COMMANDS = [words for text in TEXTS.values() for words in command_lines(text)]


def test_commands_are_found():
    assert {words[0] for words in COMMANDS} == set(cli.COMMANDS) and len(COMMANDS) >= 30


# What makes a command of the texts a matter of a moment. `analyze`, `compare` and `export` take seconds at any size, and whether a network this
# small can be faster depends on the machine (`--target_latency`): they run in tests of their own.
SMALL = {
    "prune": "--device cpu --calib_steps 8 --repair none --split uniform --num_samples 0 --num_inference_steps 2 --batch_size 8 --align 4 "
    "--dtype fp32",
    "evaluate": "--device cpu --num_samples 4 --num_inference_steps 1 --noise_images 4 --dtype fp32",
    "fid": "--device cpu",
    "sample": "--device cpu --num_samples 2 --num_inference_steps 1",
    "finetune": "--device cpu --steps 1 --batch_size 4 --num_images 4 --validation_images 4 --num_samples 1 --num_inference_steps 1 "
    "--dtype fp32",
}
STAND_INS = {
    **dict.fromkeys(("FOLDER", "DENSE", "DENSE_FOLDER", "OWNER/DENSE", "google/ddpm-cifar10-32", "PRUNED", "RECOVERED"), "model"),
    **dict.fromkeys(("IMAGES", "SAMPLES", "FOLDER_OF_IMAGES", "DATA"), "images"), "efficientnet-lite0": "colours",
    "6": "0",
}  # fmt: skip
RESULTS = ("OUT", "run/small")  # folders whose making is looked at, beside that of the first command


def is_run(words):
    return words[0] in SMALL and "--target_latency" not in words


def in_small(words):
    """A command with the names of the texts replaced by what is there, and small counts; `prune` writes what is looked at."""
    text_to_image = "--prompt_embeds" in words
    more = [*shlex.split(SMALL[words[0]]), "--quiet"]
    if words[0] == "prune" and words != COMMANDS[0] and not any(w in RESULTS for w in words) and "--dry_run" not in words:
        more.append("--dry_run")
    if "--experts" in words:  # that only a repair can tell apart
        more += ["--repair", "lstsq", "--repair_images", "8"]
    words = [STAND_INS.get(word, word) for word in words if word != "--compile"]
    if text_to_image:
        words[words.index("model")] = "text-to-image"
    return words + more


def test_every_command_runs(tmp_path, monkeypatch, capfd):
    """One after the other, as a reader would, on a tiny network that stands for the bundled one."""
    from conditioned import CONDITIONED
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    tiny = {**PLAIN, "sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 4, "add_attention": False,
            "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}  # fmt: skip
    with checkpoint.atomic_folder(tmp_path / "model") as target:
        checkpoint.save_folder(target, random_unet(tiny), DDPMScheduler())
    conditioned = {**CONDITIONED["sd15"][1], "sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 4}
    UNet2DConditionModel(**conditioned).save_pretrained("text-to-image")
    save_file({"prompt_embeds": torch.randn(4, 5, 24), "negative_prompt_embeds": torch.randn(4, 5, 24)}, "prompts.safetensors")
    folder_of(pictures(12, 8), tmp_path / "images")
    Image.fromarray(pictures(1, 128).numpy()[0]).save("sheet.png")
    (yaml,) = (code for code in blocks(GUIDE, "yaml") if "# half.yaml" in code)
    (tmp_path / "half.yaml").write_text(yaml)
    monkeypatch.setattr(checkpoint, "BUNDLED_MODEL", tmp_path / "model")
    monkeypatch.setattr(checkpoint, "BUNDLED_SAMPLES", tmp_path / "sheet.png")
    monkeypatch.setattr(features, "FEATURES", {**features.FEATURES, "colours": Colours})
    pushed = []
    monkeypatch.setattr(command, "push", lambda folder, name, **options: pushed.append(name) or f"https://huggingface.co/{name}")
    for words in COMMANDS:
        if is_run(words):
            assert cli.main(in_small(words)) == 0, (words, capfd.readouterr().err)
    assert pushed == ["OWNER/SMALL"] and all((tmp_path / folder / "model_index.json").is_file() for folder in RESULTS)
    assert "run/ddpm-cifar10-small-wanda-diff-0.3" in README and (tmp_path / "run" / "ddpm-cifar10-small-wanda-diff-0.3").is_dir()


def test_commands_that_are_not_run_parse():
    for words in COMMANDS:
        if not is_run(words):
            module = import_module(f"wanda_fast.cli.{words[0]}")
            made = Parser(words[0], module.EXAMPLES)
            module.add_arguments(made)
            assert made.parse_args(words[1:])


def test_commands_of_the_benchmarks_parse():
    """Of the files that make the tables and pictures, wherever they are named."""
    from benchmarks import main as bench
    from benchmarks import quality

    found = 0
    for text in PAGES.values():
        for name, words in re.findall(r"`(?:[A-Z_]+=\w+ )?python (bench\.py|-m benchmarks\.\w+)([^`]*)`", text):
            words = shlex.split(words.replace("…", "compact"))
            if name.endswith("quality") or "--quality" in words:
                assert quality.parser().parse_args(words)
            elif name == "bench.py":
                assert bench.parser().parse_args(words)
            else:
                assert (ROOT / "benchmarks" / f"{name.split('.')[-1]}.py").is_file(), name
            found += 1
    assert found >= 12


def test_guide_lists_every_parameter():
    assert GUIDE.split(BEGIN)[1].split(END)[0] == parameter_table(), "run: python tests/test_readme.py"


def test_commands_are_two_lines():
    for marker in ("run", "test"):
        (block,) = blocks(README, "bash", f"<!-- command:{marker} -->")
        assert block.count("\n") == 1 and "torch==" in block and "--no-build-isolation" in block
    (run,) = blocks(README, "bash", "<!-- command:run -->")
    assert run.rstrip().endswith("&& python prune.py --ratio 0.3 --pruner wanda-diff")


def test_ci_runs_the_command_of_the_readme():
    """The extraction in .ci/run finds the very line that a reader sees."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extraction = next(line for line in script.splitlines() if line.startswith("command=$("))
    done = subprocess.run(["bash", "-c", f'{extraction}\nprintf "%s\\n" "$command"'], cwd=ROOT, capture_output=True, text=True)
    assert [done.stdout] == blocks(README, "bash", "<!-- command:test -->"), done.stderr


def test_readme_shows_the_output_of_the_command():
    output = README.split(OUTPUT)[1].split(OUTPUT_END)[0]
    for words in ("model: ddpm-cifar10-small (bundled", "device: ", "parameters", "SSIM", "asked: ratio 0.3", "open it with"):
        assert words in output
    assert "/tmp" not in output and "/home" not in output


def anchors(text: str) -> set[str]:
    """What a link to a heading of this text may say, as the hub and GitHub make it."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", outside, re.MULTILINE)}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_anchors_are_those_of_headings():
    assert anchors("# A b: c\n## `d` in E_f (1, 2)?\n```sh\n# no heading\n```\n") == {"a-b-c", "d-in-e_f-1-2"}


def test_contents_of_the_guide_are_its_headings():
    listed = re.findall(r"^- \[([^\]]+)\]\(#[\w-]+\)$", GUIDE, re.MULTILINE)
    assert listed == re.findall(r"^## (.*)$", GUIDE, re.MULTILINE)


def test_files_that_texts_name_exist():
    """Result files, scripts and documents in backquotes, by path or, in the folder of results, by name."""
    for name, text in PAGES.items():
        for path in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:json|md|txt|py|png))`", text):
            if path.startswith(("benchmarks/", "docs/", "wanda_fast/")):
                assert (ROOT / path).is_file(), (name, path)
            elif name.startswith("benchmarks/results/") and not path.startswith("pruning"):
                assert any((ROOT / folder / path).is_file() for folder in ("benchmarks/results", "benchmarks", ".")), (name, path)


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def notes():
    return PAGES["benchmarks/results/notes.md"]


def test_quality_in_words_is_that_of_the_results():
    """SSIM and Fréchet distance as guide and notes quote them."""
    default = {"pruner": "wanda-diff", "repair": "lstsq", "split": "sensitivity", "budget": "56.3%", "seed": 0}
    large = {row["layout"]: row for row in results("quality.json")["rows"] if default.items() <= row.items()}
    dense = next(row for row in results("quality.json")["rows"] if row["pruner"] == "dense")
    stock, free = large["stock"], large["free"]
    assert f"SSIM {stock['ssim']:.3f} in the stock layout, {free['ssim']:.3f} in the free one" in GUIDE
    assert f"from {dense['fd']:.1f} to {stock['fd']:.1f} and {free['fd']:.1f}" in " ".join(GUIDE.split())
    experts = [row for row in results("quality.json")["rows"] if row["repair"] == "lstsq, experts 3" and row["budget"] == "56.3%"]
    assert [row["seed"] for row in experts] == [0, 1, 2]
    said = f"{experts[0]['fd']:.1f} free layout with three experts; {free['fd']:.1f} free layout, {stock['fd']:.1f} stock |"
    assert f"(dense {dense['fd']:.1f}) | {said} seeds 1 and 2: {experts[1]['fd']:.1f};" in notes()
    ours = {(row["budget"], row["layout"]): row["ssim"] for row in results("quality.json")["rows"]
            if (row["pruner"], row["repair"], row["seed"]) == ("wanda-diff", "lstsq", 0)}  # fmt: skip
    high, low = ours["76%", "free"], ours["24.8%", "free"]
    more = {row["budget"]: row["ssim"] for row in results("quality.json")["rows"]
            if (row["repair"], row["split"], row["seed"]) == ("lstsq, experts 3", "sensitivity", 0)}  # fmt: skip
    assert f"| {high:.3f} and {low:.3f} free; {more['76%']:.3f} and {more['24.8%']:.3f} with three experts |" in notes()
    assert f"{free['ssim']:.3f} against {stock['ssim']:.3f} at 56 % of the MACs;" in GUIDE
    (trained,) = (row for row in results("quality.json")["rows"] if row["repair"] == "lstsq, finetuned")
    said = f"{stock['fd']:.1f} to {trained['fd']:.1f}, SSIM {stock['ssim']:.3f} to {trained['ssim']:.3f}"
    assert f"| {said}, noise MSE {stock['noise_mse']:.5f} to {trained['noise_mse']:.5f} |" in notes()
    assert f"SSIM only from {stock['ssim']:.3f} to {trained['ssim']:.3f}" in GUIDE
    assert f"Fréchet distance from {stock['fd']:.1f} to {trained['fd']:.1f}" in GUIDE
    (lines,) = re.findall(r"\| network \| 1 - SSIM .*?\n\|---.*?\n(.*?)\n\n", notes(), re.DOTALL)
    assert {tuple(cell.strip() for cell in line.split("|")[2:5]) for line in lines.splitlines()} == {
        (f"{1 - row['ssim']:.4f}", f"{row['fd'] - dense['fd']:.1f}", f"{row['noise_mse']:.5f}")
        for row in results("quality.json")["rows"] if row["seed"] == 0 and row["pruner"] != "dense"
    }  # fmt: skip

    found: dict[tuple[str, str], list[float]] = {}
    for row in results("quality-cpu.json")["rows"]:
        if row["budget"] == "56.3%" and row["split"] == "sensitivity" and row["repair"] == "lstsq":
            found.setdefault((row["pruner"], row["layout"]), []).append(row["ssim"])
    (said,) = re.findall(r"three seeds \(\[all rows\].*?\): (.*?)\. In the free layout (.*?)\.\s+Without", GUIDE, re.DOTALL)
    quoted = dict(re.findall(r"`([\w-]+)`\s+(0\.\d{3} ± 0\.\d{3})", said[0]))
    assert quoted == {p: f"{mean(v):.3f} ± {stdev(v):.3f}" for (p, layout), v in found.items() if layout == "stock"}
    free_means = {p: f"{mean(v):.3f}" for (p, layout), v in found.items() if layout == "free"}
    assert set(re.findall(r"0\.9\d\d", said[1])) == set(free_means.values()) and max(free_means, key=free_means.get) == "wanda-diff"


def test_experts_and_the_default_criterion_in_words_are_those_of_the_results():
    main = [row for row in results("quality.json")["rows"] if (row["split"], row["budget"]) == ("sensitivity", "56.3%")]

    def over_seeds(pruner, layout, repair="lstsq"):
        found = [row for row in main if (row["pruner"], row["layout"], row["repair"]) == (pruner, layout, repair)]
        assert [row["seed"] for row in found] == [0, 1, 2]
        return {key: mean(row[key] for row in found) for key in ("fd", "ssim", "psnr", "params")}

    guide = " ".join(GUIDE.split())
    one, three = over_seeds("wanda-diff", "free"), over_seeds("wanda-diff", "free", "lstsq, experts 3")
    dense = next(row["fd"] for row in results("quality.json")["rows"] if row["pruner"] == "dense")
    assert f"falls from {one['fd']:.1f} to {three['fd']:.1f} (dense {dense:.1f})" in guide
    assert f"SSIM rises from {one['ssim']:.3f} to {three['ssim']:.3f}" in guide
    assert f"PSNR from {one['psnr']:.1f} to {three['psnr']:.1f} dB" in guide
    assert f"parameters rise from {one['params'] / 1e6:.1f} to {three['params'] / 1e6:.1f} M" in guide
    small: dict[str, list[float]] = {}
    for row in results("quality-cpu.json")["rows"]:
        if (row["pruner"], row["layout"], row["budget"]) == ("wanda-diff", "free", "56.3%"):
            small.setdefault(row["repair"], []).append(row["ssim"])
    assert f"rises from {mean(small['lstsq']):.3f} to {mean(small['lstsq, experts 3']):.3f}" in " ".join(GUIDE.split())
    best, former = over_seeds("lstsq-residual", "stock")["fd"], over_seeds("wanda-diff", "stock")["fd"]
    assert best < former and f"distance {best:.1f} against {former:.1f} for `wanda-diff`, three seeds" in guide


def test_rivals_in_words_are_those_of_the_results():
    """Three seeds of every criterion, stock layout, as the notes quote them."""
    found: dict[str, list[dict]] = {}
    for row in results("quality.json")["rows"]:
        if (row["repair"], row["layout"], row["split"], row["budget"]) == ("lstsq", "stock", "sensitivity", "56.3%"):
            found.setdefault(row["pruner"], []).append(row)
    assert set(found) == set(importance.CRITERIA)
    (line,) = re.findall(r"^\| wanda-diff best of all criteria.*$", notes().replace("**", ""), re.MULTILINE)
    for pruner, rows in found.items():
        assert sorted(row["seed"] for row in rows) == [0, 1, 2]
        distances = [row["fd"] for row in rows]
        said = re.search(rf"{pruner} (?:FD )?(\d+\.\d ± \d\.\d), (?:SSIM )?(0\.\d{{3}})", line)
        assert said and said.groups() == (f"{mean(distances):.1f} ± {stdev(distances):.1f}", f"{mean(row['ssim'] for row in rows):.3f}"), pruner


def test_conv_gram_in_words_is_that_of_the_results():
    cases: dict[tuple, dict] = {}
    for row in results("h200-conv_gram.json")["rows"]:
        cases.setdefault((*row["shape"], row["dtype"]), {})[row["backend"]] = row
    for (n, c, h, w, c_out, k, dtype), by in cases.items():
        ours = by["triton"]
        extra = ours["peak_mib"] - ours["result_mib"]
        times = " | ".join(f"{by[b]['ms']:.2f}" for b in ("published", "cuda", "triton"))
        case = f"[{n}, {c}, {h}, {w}] -> {c_out}, {k}x{k}" + ("" if dtype == "fp32" else f", {dtype}")
        end = f"{ours['speedup_vs_published']:.1f} | {extra:.0f} | {ours['rel_error'] * 1e6:.1f}e-6 |"
        assert f"| {case} | {times} | {end}" in notes()
        assert extra <= 64 and (ours["speedup_vs_published"] >= 5 or k == 1)


def test_whole_prunes_in_words_are_those_of_the_results():
    found = results("h200-prune.json")
    names = ("load", "images", "calibrate", "plan", "repair", "measure", "save")
    for row in found["rows"]:
        said = [row["clock_s"], row["together_s"], *(row["seconds"][name] for name in names)]
        assert " | ".join(f"{seconds:.1f}" for seconds in said) in notes().replace("**", "")
    first, second, third, _ = (row["clock_s"] for row in found["rows"])
    readme = " ".join(README.split())
    assert f"takes {third:.0f} s on an {found['env']['gpu'].split()[-1]}, {first:.0f} s the first time" in readme
    assert f"{second:.1f} and {third:.1f} s by the clock" in notes()


def test_a_measured_time_in_words_is_that_of_the_report():
    report = results("h200-target_latency-experts.json")
    share, asked = report["latency"]["measured"], report["asked"]["target_latency"]
    (row,) = (row for row in results("quality.json")["rows"] if row["split"] == "latency")
    assert row["macs"] == report["reached"]["macs"] and share <= asked
    guide, readme = " ".join(GUIDE.split()), " ".join(README.split())
    assert f"Measured: {share:.3f}x for {asked}x asked, so {1 / share:.2f} times the images per second" in guide
    assert f"leaves SSIM at {row['ssim']:.3f}" in guide
    assert f"of {1 / share:.2f} times the images per second" in readme and f"with SSIM {row['ssim']:.3f}" in readme
    rounds = ", ".join(f"{r['measured']:.3f}" for r in report["latency"]["rounds"][:-1])
    assert f"{rounds} and **{share:.3f}x, {1 / share:.2f} times as fast**" in notes()
    assert f"SSIM {row['ssim']:.3f}, PSNR {row['psnr']:.1f} dB, FD {row['fd']:.1f}" in notes()


def test_budgets_of_the_large_network_are_those_of_the_results():
    """SSIM of `quality-large-cpu.json` as the guide and both notes quote it."""
    found = {(r["budget"], r["layout"]): r for r in results("quality-large-cpu.json")["rows"] if r["pruner"] == "wanda-diff"}
    budgets = ("76%", "56.3%", "39.6%", "24.8%")
    assert set(found) == {(budget, layout) for budget in budgets for layout in ("stock", "free")}
    cpu_notes, guide = PAGES["benchmarks/results/notes-cpu.md"].replace("**", ""), " ".join(GUIDE.split())
    for budget in budgets:
        stock, free = found[budget, "stock"], found[budget, "free"]
        cells = [f"{row['ssim']:.3f}, {row['psnr']:.1f} dB" for row in (stock, free)]
        assert f"| {stock['macs'] / 1e9:.2f} G | {cells[0]} | {cells[1]} |" in cpu_notes
        if budget != "56.3%":
            assert f"{free['ssim']:.3f} against {stock['ssim']:.3f} at {float(budget[:-1]):.0f} %" in guide
    said = f"{found['76%', 'stock']['ssim']:.3f} and {found['24.8%', 'stock']['ssim']:.3f} |"
    assert f"(notes-cpu.md#the-large-network-at-four-budgets): {said}" in notes()


def test_speed_in_words_is_that_of_the_results():
    """The cost model of the guide, and the targets in the notes."""
    (step,) = (row["ms"] for row in results("h200-calibration_step.json")["rows"] if row["op"] == "calibration_step" and
               (row["mode"], row["backend"], row["dtype"], row["layout"]) == ("graph", "triton", "bf16", "contiguous"))  # fmt: skip
    per_second = 128 / step * 1e3
    assert f"{step:.1f} ms for 128 images (CUDA graph): {round(per_second, -2):,.0f} images/s" in GUIDE
    assert f"{round(1e7 / per_second, -1):.0f} s on 1 GPU, {1e7 / per_second / 64:.0f} s on 64" in GUIDE
    assert f"takes {step:.1f} ms where" in notes()
    rows = {(r["model"], r["network"], r["mode"]): r for r in results("h200-speed.json")["rows"] if r.get("batch_size") == 256 and "ms" in r}
    eager, graph = (rows["ddpm-cifar10-32", "dense", mode]["images_per_s"] for mode in ("eager", "compiled graph"))
    pruned = rows["ddpm-cifar10-32", "56 % of the MACs", "compiled graph"]["images_per_s"]
    assert f"{eager:.0f} images/s eager, {graph:.0f} images/s compiled in a CUDA graph (dense; {pruned:.0f} with 56 % of the MACs)" in GUIDE
    assert f"{1e6 / graph / 60:.0f} minutes on 1 GPU" in GUIDE
    for network, ending in (("56 % of the MACs", " (batch 256)"), ("half of the MACs", ". 256 pixels")):
        plain, replayed = (rows["ddpm-cifar10-32", network, mode]["times_as_fast"] for mode in ("compiled", "compiled graph"))
        assert f"{plain:.2f}x; {replayed:.2f}x from a CUDA graph{ending}" in notes()


def test_table_of_the_large_network_is_that_of_the_results():
    found = results("sdxl-h200.json")
    names = {"plan": "plan", "compact": "compaction", "repair": "repair, 24 samples",
             "calibrate": "calibration, 128 samples of 128 x 128 latents"}  # fmt: skip
    for stage, name in names.items():
        row = found["stages"][stage]
        assert f"| {name} | {row['seconds']:.1f} | {row['share']:.0%} | {row['peak_bytes'] / 2**30:.1f} |".replace("%", " %") in GUIDE
    assert f"({found['model_bytes'] / 2**30:.2f} GiB), cut to {found['sizes']['pruned']['macs_share']:.0%}".replace("%", " %") in GUIDE
    assert f"{found['memory']['peak_less_model_gib']:.1f} GiB above the network's own memory" in GUIDE
    error = found["noise_error_relative"]
    assert f"falls from {error['plain_cut']:.2f} (plain cut) to {error['repaired']:.2f}" in GUIDE


def test_answers_of_the_guide_are_those_of_the_ratios():
    """Rows of ratios-cpu.md, which is written by hand from `pruning.json` of its runs."""
    rows = {}
    for line in PAGES["benchmarks/results/ratios-cpu.md"].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 13 and cells[0].startswith("`"):
            rows[cells[0].strip("`").removeprefix("--ratio ")] = cells[1:]
    table = re.findall(r"^\| (0\.\d) \| (.*?) \|$", GUIDE, re.MULTILINE)
    assert len(table) == 5
    for ratio, cells in table:
        _, params, macs, faster, ssim, psnr = rows[ratio][:6]
        assert cells.replace(" as fast", "").split(" | ") == [params, macs, faster, ssim, psnr]
    for option in ("--repair_images 64", "--batch_size 8", "--calib_steps 128", "--stats_memory 1M", "--repair none"):
        (cells,) = re.findall(rf"^\| `{option}` \| (.*?) \|$", GUIDE, re.MULTILINE)
        _, _, _, _, ssim, _, error, calibrate, plan, repair = rows[f"0.3 {option}"][:10]
        wanted = [repair if repair == "-" else f"{repair} GiB", f"{plan} GiB", f"{calibrate} GiB", ssim.replace("-", "not drawn"), error]
        assert cells.split(" | ") == wanted, option


def test_guide_and_model_cards_name_every_criterion():
    section = GUIDE.split("## Choosing a criterion")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `(\w[\w-]*)` \|", section, re.MULTILINE))
    built_in = {name for name, criterion in importance.CRITERIA.items() if criterion.__module__.startswith("wanda_fast.")}
    assert listed == set(model_card._METHODS) == built_in


def test_pictures_are_small():
    for which in ("before", "after"):
        file = ROOT / "docs" / f"{which}_pruning.png"
        assert file.stat().st_size < 300_000
        assert min(Image.open(file).size) >= 200


def main(arguments: list[str]) -> None:
    head, rest = GUIDE.split(BEGIN)
    (ROOT / "docs" / "guide.md").write_text(head + BEGIN + parameter_table() + END + rest.split(END)[1], encoding="utf-8")
    if arguments:
        printed, folder = Path(arguments[0]), Path(arguments[1])
        head, rest = README.split(OUTPUT)
        text = f"{head}{OUTPUT}```text\n{printed.read_text(encoding='utf-8').strip()}\n```\n{OUTPUT_END}{rest.split(OUTPUT_END)[1]}"
        (ROOT / "README.md").write_text(text, encoding="utf-8")
        for which in ("before", "after"):
            shutil.copyfile(folder / "vis" / f"{which}_pruning.png", ROOT / "docs" / f"{which}_pruning.png")


if __name__ == "__main__":
    main(sys.argv[1:])
