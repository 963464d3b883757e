"""The command line, as a user meets it: exit codes, one-line errors, tables, files."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from idiolect import methods
from idiolect.cli import catalog
from idiolect.cli import main as cli
from idiolect.cli.settings import GROUPS, Experiment
from idiolect.storage.run_directory import RunDirectory, read_run

QUICK = ("--clients", "3", "--size", "16", "--rounds", "2", "--lr", "0.1")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("IDIOLECT_DATA", raising=False)


def test_run_trains_writes_and_says_where(tmp_path, capsys):
    (tmp_path / "mine.toml").write_text('method = "fedavg"\nclients = 3\nsize = 16\nrounds = 9\nlr = 0.1\n')
    assert cli.main(["run", "mine.toml", "--rounds", "2", "--directory", "out"]) == 0
    config, records = read_run("out")
    assert len(records) == 2
    assert config["config"]["method"].endswith("'FedAvg', 'samples')")
    table, said = capsys.readouterr()
    assert f"{100 * records[-1]['personalized']['test']['accuracy']['mean']:.2f}" in table
    assert "report: out/report.html" in table
    assert re.fullmatch(r"idiolect: clients are trained in \d+ processes, by explicit kernels\n", said)


def test_compare_reads_methods_and_seeds_from_the_file(tmp_path, capsys):
    (tmp_path / "c.toml").write_text('methods = ["local", "fedbn"]\nseeds = [3]\nclients = 3\nsize = 16\nrounds = 1\n')
    assert cli.main(["compare", "c.toml", "--methods", "fedavg", "--directory", "out"]) == 0
    [row] = json.loads((tmp_path / "out/comparison.json").read_text())
    assert (row["method"], row["seeds"]) == ("FedAvg", 1)
    assert read_run(tmp_path / "out/FedAvg-seed3")[0]["seed"] == 3
    assert "FedAvg, seed 3: accuracy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "which command? see idiolect --help"),
        (["--nothing"], "unknown argument --nothing; see idiolect --help"),
        (["rnu"], "unknown command 'rnu' (did you mean run?); see idiolect --help"),
        (["methods", "more"], "unknown argument more; see idiolect methods --help"),
        (["run", "--local-epoch", "3"], "unknown argument --local-epoch (did you mean --local-epochs?)"),
        (["run", "--rounds"], "argument --rounds: expected one argument"),
        (["run", "--rounds", "many"], "rounds = 'many' is not a whole number"),
        (["run", "--method", "fedbm"], "unknown name 'fedbm' (did you mean fedbn?)"),
        (["run", "nowhere.toml"], "cannot read nowhere.toml: No such file"),
        (["run", "--data", "usps"], "needs the file usps/usps.npz"),
        (["run", "--data", "usps", "--data-dir", "here"], "there is no file here/usps/usps.npz"),
        (["run", "--resume"], "resume needs the directory"),
        (["run", "--resume", "--directory", "none"], "none holds no run to resume"),
        (["compare", "--method", "fedbn"], "unknown argument --method (did you mean --methods?)"),
        (["compare", "--seeds", "one"], "seeds = ['one'] is not a list of whole numbers"),
        (["compare", "--methods", "local", "fedfsa(top=99)", *QUICK], "lower top"),
        (["train"], "unknown command 'train' (did you mean run?)"),
        (["list"], "unknown command 'list' (did you mean methods?)"),
        (["run", "--resume"], "--resume --directory runs/NAME"),
        (["compare", "--methods", "fedbn", "--resume"], "--resume --directory runs/NAME"),
        (["run", "--batch-size", "0"], "batch_size must be at least 1, or all"),
        (["run", "--engine", "quantum"], "no engine 'quantum'; there are auto, sequential, threads, processes, sta"),
        (["run", "--engine", "flowr"], "no engine 'flowr' (did you mean flower?)"),
        (["run", "--method", ""], "method: nothing is written; write it like fedavg + sam(0.05)"),
        (
            ["run", "--method", "fedbn - sam(0.1)"],
            "- does not go with a Method FedBN and sam(rho=0.1, names=None); parts",
        ),
        (["run", "--method", "fedavg + sam(1e999)", *QUICK], "sam: gradient of sam(rho=inf, names=None) gives a gra"),
        (["run", "--test", "-0.1"], "test must be a number 0 … 1, or 'official', got -0.1"),
        (["describe"], "the following arguments are required: METHOD"),
        (["describe", "fedbn", "--model", "fedfsa_cnn"], "fedfsa_cnn needs images"),
        (["data", "digit"], "unknown data set 'digit' (did you mean digits?)"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(arguments, line, capsys, tmp_path):
    assert cli.main(arguments) == 2
    out, said = capsys.readouterr()
    assert line in said
    assert said.startswith("idiolect: ")
    assert said.count("\n") == 1
    assert out == ""
    assert not any(tmp_path.iterdir())


OWN = """
number = 3
def raising(): raise KeyError("n")
def model(): return "net"
"""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--method", "broken:x"], "method: broken cannot be imported: KeyError: 'n' (broken.py, line 2)"),
        (["--model", "broken:x"], "model: broken cannot be imported: KeyError: 'n' (broken.py, line 2)"),
        (["--method", "wrong:x"], "method: wrong cannot be imported: SyntaxError: "),
        (["--method", "needs:x"], "method: needs cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        (["--method", "own:number"], "'number' is an int, not a method"),
        (["--method", "own:raising"], "method: raising raises KeyError: 'n' (own.py, line 3)"),
        (["--method", "own:nothing"], "method: own has no function 'nothing'"),
        (["--model", "own:number"], "model: own:number is an int: give a function that returns a torch.nn.Module"),
        (["--model", "own:raising"], "model: own:raising raises KeyError: 'n' (own.py, line 3)"),
        (["--model", "own:model"], "model: own:model returns text, 'net', not a torch.nn.Module"),
        (["--data", "header.csv"], "header has a header and no rows; give one row per example"),
    ],
)
def test_what_is_wrong_with_files_of_your_own(arguments, line, tmp_path, capsys, monkeypatch):
    files = {"own": OWN, "broken": "x = 1\n{}['n']\n", "wrong": "x = = 1\n", "needs": "import nowhere\n"}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "header.csv").write_text("age,label\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert cli.main(["run", *arguments, *QUICK]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


def test_compare_says_which_methods_nobody_has_chosen(capsys):
    assert cli.main(["compare", "--engine", "quantum"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "idiolect: comparing local, fedavg, fedavg_ft, fedbn, fedfsa; --methods takes others"
    assert cli.main(["compare", "--engine", "quantum", "--methods", "fedbn"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_typo_in_a_file_names_the_file(tmp_path, capsys):
    (tmp_path / "x.toml").write_text("local_epoch = 5\n")
    assert cli.main(["run", "x.toml"]) == 2
    assert capsys.readouterr().err == "idiolect: x.toml: unknown key local_epoch (did you mean local_epochs?)\n"


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_fits_80_columns(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80


def test_help_shows_every_setting_with_its_default(capsys):
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(Experiment.model_fields)
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Experiment.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        if field.default is not None and field.default is not False:
            assert f"(default: {field.default})" in text


def test_help_lists_every_command_on_one_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert f"  {name:10} {command.about}" in lines


HEAVY = ("flwr", "numpy", "plotly", "polars", "pydantic", "rich", "scipy", "sklearn", "torch")


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (None, []),
        (["--version"], []),
        (["--help"], []),
        (["methods"], ["rich"]),
        (["keys", "--help"], []),
        (["run", "--help"], ["pydantic"]),
        (["run", "--rounds", "many"], ["pydantic"]),
        (["rnu"], []),
    ],
    ids=str,
)
def test_what_trains_nothing_starts_without_pytorch(arguments, needed):
    """The modules are counted in a process of its own; None only imports the package."""
    code = "import contextlib, sys, idiolect, idiolect.__main__\n"
    if arguments is not None:
        code += f"with contextlib.suppress(SystemExit): idiolect.__main__.main({arguments})\n"
    code += f"print('loaded', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1].split()[1:] == needed


def test_a_public_name_is_imported_when_it_is_used():
    code = "import sys, idiolect; before = 'torch' in sys.modules; idiolect.fit; print(before, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "True"]


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("idiolect 0.")


def test_methods_lists_the_catalog(capsys):
    assert cli.main(["methods"]) == 0
    legend, _, text = capsys.readouterr().out.partition("\n\n")
    assert legend.startswith("gradients: per local step; down, up: ")
    assert [entry["name"] for entry in catalog.read()] == sorted(methods.__all__, key=text.index)
    assert all(re.search(rf"^ *{name} ", text, re.MULTILINE) for name in methods.__all__)
    assert max(map(len, text.splitlines())) <= 80


def test_describe_tells_arguments_formulas_and_sizes(capsys):
    assert cli.main(["describe", "fedfsa(top=1)"]) == 0
    text = capsys.readouterr().out
    assert "FedFSA (2025)" in text
    assert "Xing et al., AAAI 2025" in text
    assert "r_k = ρ_larger if k ∈ M_i else ρ" in text
    assert "rho_larger 0.2 radius of the sensitive layers" in " ".join(text.split())
    assert "13,930 values" in text
    assert ":math:" not in text
    assert "\\" not in text


def test_describe_takes_what_nobody_has_named(capsys):
    assert cli.main(["describe", "fedbn + sam(0.1)", "--model", "mlp"]) == 0
    text = capsys.readouterr().out
    assert "sam(rho=0.1, names=None)" in text
    assert "share(names=~batch_norm" in text
    assert "On mlp for digits" in text


def test_data_lists_what_is_found(tmp_path, capsys):
    (tmp_path / "usps").mkdir()
    (tmp_path / "usps/usps.npz").touch()
    assert cli.main(["data", "--data-dir", str(tmp_path)]) == 0
    found = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines() if " " in line}
    assert found["digits"].startswith("yes")
    assert found["usps"] == "yes"
    assert found["fashion-mnist"] == "no:"


def test_data_shows_who_holds_what(capsys):
    assert cli.main(["data", "digits", "--clients", "2", "--split", "pathological(1)", "--test", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1,797 examples of 1 x 8 x 8, 10 classes" in lines[0]
    clients = [line for line in lines if line.startswith("client-")]
    assert len(clients) == 2
    for line in clients:
        _, train, test, *cells = line.split()
        held = [int(cell) for cell in cells if cell != "·"]
        assert len(cells) == 10
        assert held == [int(train)]
        assert abs(int(train) - int(test)) <= 1


def test_data_sums_up_where_labels_do_not_fit(tmp_path, capsys):
    rows = [f"{client},{i},{i % 40}" for client in "ab" for i in range(80)]
    (tmp_path / "t.csv").write_text("client,x,label\n" + "\n".join(rows) + "\n")
    assert cli.main(["data", "t.csv", "--test", "0"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("a "))
    assert line.split()[:4] == ["a", "80", "0", "40"]
    assert line.rstrip().endswith(" 2%")


@pytest.mark.parametrize("verb", ["run", "compare"])
def test_ctrl_c_says_how_to_go_on_and_that_works(verb, monkeypatch, capsys):
    arguments = [verb, *QUICK, *(["--methods", "local", "fedavg", "--seeds", "5"] if verb == "compare" else [])]
    last = "FedAvg-seed5/metrics.jsonl" if verb == "compare" else "metrics.jsonl"
    append = RunDirectory.append

    def stop_in_the_second_round(self, record):
        append(self, record)
        if record["round"] == 2:
            raise KeyboardInterrupt

    assert cli.main([*arguments, "--directory", "whole"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", stop_in_the_second_round)
        assert cli.main([*arguments, "--directory", "half"]) == 130
    said = capsys.readouterr().err
    assert said.startswith("\nidiolect: stopped; go on with: idiolect ")
    assert cli.main(shlex.split(said.partition("go on with: idiolect ")[2])) == 0
    whole, half = (Path(name, last).read_text().splitlines() for name in ("whole", "half"))
    assert [scores(line) for line in half] == [scores(line) for line in whole]
    assert len(half) == 2


def scores(line):
    record = json.loads(line)
    return record["train_loss"], record["personalized"]


def test_a_crash_that_is_no_usage_error_keeps_its_traceback(monkeypatch):
    def broken(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(catalog, "show", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["methods"])


def test_the_command_of_a_comparison_can_be_given_again(tmp_path, capsys):
    """Also where the first seed is not the default: what is written is what the command line takes."""
    settings = ["--clients", "4", "--rounds", "1", "--methods", "local", "fedbn", "--seeds", "7"]
    assert cli.main(["compare", *settings, "--directory", str(tmp_path / "one")]) == 0
    line = (tmp_path / "one" / "comparison.md").read_text().splitlines()[-1].strip("`")
    words = shlex.split(line)
    assert words[0] == "idiolect"
    assert cli.main([*words[1:], "--directory", str(tmp_path / "two")]) == 0
    one, two = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("one", "two"))
    assert [row["personalized"] for row in one] == [row["personalized"] for row in two]
