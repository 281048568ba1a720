"""The command, its files, tables and pictures, and the README's part."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import plot, report, table
from bench.__main__ import main
from bench.providers import by_peft
from bench.records import Record, Results, load

ROOT = Path(__file__).parents[2]
FIELDS = {"suite", "case", "M", "dtype", "method", "provider", "direction", "median_ms", "q20_ms", "q80_ms"}
FIELDS |= {"ratio_to_base", "ratio_to_peft", "floor_ms", "launches", "peak_mib", "max_rel_err"}
HEADER = {"gpu": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "peft": "0.21", "transformers": "5.17"}
HEADER |= {"commit": "0123456789abcdef", "date": "2026-11-21T00:00:00", "copy_gb_s": 4300.0, "matmul_tflop_s": 790.0}


def some_records() -> list[Record]:
    made = []
    for M in (256, 4096):
        for provider, ratio in (("base", 1.0), ("ours", 1.25), ("peft", 2.0)):
            counted = {"operations": 10**9 * M, "bytes_moved": 10**6 * M, "peak_mib": 100 * ratio, "runs": 5}
            times = {"median_ms": ratio, "q20_ms": ratio, "q80_ms": ratio, "ratio_to_base": ratio}
            key = ("block", "llama2_7b-r4-h256", M, "bf16", "vblora", provider, "fwd_bwd")
            made.append(Record(*key, **counted, **times, ratio_to_peft=ratio / 2, launches=7))
    key = ("block", "llama2_7b-r4-h256", 4096, "bf16", "vblora", "ours_graph", "fwd_bwd")
    return [*made, Record(*key, status="wrong", reason="y0: relative error 1")]


def test_results_are_on_disk_after_each_case_and_read_back_the_same(tmp_path):
    path = tmp_path / "new" / "results.json"
    results = Results(HEADER, path)
    assert json.loads(path.read_text()) == {"header": HEADER, "records": []}
    for i, record in enumerate(some_records(), 1):
        results.add([record])
        assert len(json.loads(path.read_text())["records"]) == i
    assert json.loads(path.read_text())["records"][0].keys() >= FIELDS
    assert load(path) == (HEADER, some_records())
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_results_go_where_a_link_leads_and_leave_it_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "there" / "file.json")
    Results(HEADER, link).add(some_records())
    assert link.is_symlink()
    assert load(tmp_path / "there" / "file.json") == (HEADER, some_records())


@pytest.mark.parametrize("rich", [True, False])
def test_table_shows_times_ratios_and_why_there_is_no_time(rich, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setattr(table, "has_rich", lambda: False)
    stream = io.StringIO()
    table.show(some_records(), stream)
    text = stream.getvalue()
    assert text.count("block/fwd_bwd/llama2_7b-r4-h256/M4096/bf16/vblora") == 1
    assert {"1.250", "0.62", "2.00"} <= set(text.replace("│", " ").split())
    assert "y0: relative error 1" in text
    assert "wrong" in text


def test_pictures_are_drawn_of_what_there_is(tmp_path):
    paths = plot.plot(HEADER, some_records(), tmp_path)
    names = ["overhead-block-llama2_7b-r4-h256-bf16-vblora-fwd_bwd.png", "roofline.png", "memory.png"]
    assert [path.name for path in paths] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert plot.plot({}, some_records()[-1:], tmp_path) == []


class TestReport:
    @pytest.fixture
    def readme(self, tmp_path):
        for page, names in report.PAGES.items():
            (tmp_path / page).write_text(
                "\n".join(["before", *(report.marked(name, "old") for name in names), "after\n"])
            )
        (tmp_path / "bench" / "results").mkdir(parents=True)
        return tmp_path / "README.md"

    def results(self, readme):
        return readme.parent / "bench" / "results"

    def run(self, readme, *options) -> int:
        return report.main(["--folder", str(readme.parent), *options])

    def test_without_results_of_a_gpu_it_says_so(self, readme):
        # A run on a CPU, and a file of another shape.
        Results({**HEADER, "gpu": None, "cpu": "a CPU"}, self.results(readme) / "cpu.json").add(some_records())
        (self.results(readme) / "demo.json").write_text('{"loss_before": 1}')
        assert self.run(readme) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{report.marked('bench', report.NOTHING)}\n<!-- cpu: begin -->\n")
        assert text.endswith(f"\n<!-- cpu: end -->\n{report.marked('quality', 'Not made yet.')}\nafter\n")

    def test_a_table_of_quality_has_mean_and_spread_of_each_method(self, readme):
        runs = [
            {
                "method": "VeRA",
                "library": "peft",
                "rate": 1e-2,
                "seed": seed,
                "accuracy": found,
                "trained": 1234,
                "bytes": 56789,
            }
            for seed, found in enumerate((0.75, 0.8, 0.82))
        ]
        quality = {"model": "m==1", "texts": "t==2", "held_out": 1000, "steps": 8, "batch": 4, "positive": 0.5}
        content = {"quality": quality, "environment": HEADER, "runs": runs}
        (self.results(readme) / "quality.json").write_text(json.dumps(content))
        assert self.run(readme) == 0
        assert "| VeRA | PEFT | 0.790 | 0.750 to 0.820 | 1,234 | 56,789 |" in readme.read_text()
        assert "mean over 3 seeds, after 8 steps of 4 texts: `m==1`" in readme.read_text()
        assert self.run(readme, "--check") == 0

    def test_check_fails_until_the_report_is_made_and_changes_nothing(self, readme, capsys):
        Results(HEADER, self.results(readme) / "block.json").add(some_records())
        before = readme.read_text()
        assert self.run(readme, "--check") == 1
        assert "run `make report`" in capsys.readouterr().err
        assert readme.read_text() == before
        assert self.run(readme) == 0
        assert self.run(readme, "--check") == 0
        text = readme.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "| ours | 1.250 | 1.25 | 0.62 | 7 | 125 |" in text
        assert "| ours_graph | wrong | | | | |" in text
        assert "NVIDIA H200" in text
        assert "commit 0123456789ab," in text

    def test_a_dirty_commit_and_a_case_that_failed_whole_are_shown(self, readme):
        failed = Record("block", "large", 1, "bf16", "vera", "all", "fwd", status="failed", reason="no memory")
        results = Results({**HEADER, "commit": "0123456789abcdef-dirty"}, self.results(readme) / "block.json")
        results.add([failed])
        assert self.run(readme) == 0
        assert "commit 0123456789ab-dirty," in readme.read_text()
        assert "| all | failed | | | | |" in readme.read_text()

    def test_missing_markers_are_an_error(self, readme):
        readme.write_text("no markers")
        with pytest.raises(ValueError, match="must have one line"):
            self.run(readme)

    def test_layers_on_a_cpu_have_their_ratios_to_peft_and_steps_theirs(self, readme):
        def record(suite, case, M, method, direction, ratio, provider="ours"):
            return Record(suite, case, M, "fp32", method, provider, direction, median_ms=1.0, ratio_to_peft=ratio)

        records = [
            record("cpu_layer", "square_384-r4-h256-t1", 16, "vblora", "fwd", 0.932),
            record("cpu_layer", "square_384-r4-h256-t1", 16, "vblora", "fwd_grad", 0.7, provider="base"),
            record("cpu_layer", "square_384-r4-h256-t1", 16, "vblora", "bwd", 0.839),
            record("cpu_layer", "square_384-r256-t1", 16, "vera", "fwd", 0.879),
            record("cpu_layer", "square_1024-r4-h2048", 512, "vblora", "fwd_bwd", 0.5),
            record("cpu_model", "small-r4-h256", 256, "vblora", "step", 0.81),
        ]
        Results({**HEADER, "gpu": None, "cpu": "a CPU"}, self.results(readme) / "cpu.json").add(records)
        assert self.run(readme) == 0
        assert "| 384 x 384 | 1 | 16 | 0.93 |  | 0.84 | 0.88 |  |  |\n<!-- cpu: end -->" in readme.read_text()
        assert "A training step of a small Llama: VB-LoRA 0.81. " in readme.read_text()

    def test_contributing_has_the_forecast_as_such_and_the_hosts_times(self, readme, capsys):
        made = {
            "cpu": "a CPU",
            "python": "3",
            "torch": "2",
            "triton": "3",
            "peft": "0",
            "commit": "a" * 40,
            "date": "2026",
        }
        row = {"method": "vblora", "r": 4, "tokens": 4096, "side": "backward"}
        blocks = [row | {"ratio": 1.161, "hidden": 1.124, "floors": 1.083}]
        (self.results(readme) / "forecast.json").write_text(json.dumps({"made_by": made, "blocks": blocks}))
        times = {"vera: layer": {"forward": 104.4, "forward and backward": 254.6}}
        (self.results(readme) / "host.json").write_text(json.dumps({"made_by": made, "times": times}))
        assert self.run(readme, "--check") == 1
        assert "CONTRIBUTING.md does not show" in capsys.readouterr().err
        assert self.run(readme) == 0
        assert self.run(readme, "--check") == 0
        text = (readme.parent / "CONTRIBUTING.md").read_text()
        assert "A forecast, and no measurement; torch 2, triton 3, commit aaaaaaaaaaaa, 2026." in text
        assert "| vblora | 4 | 4,096 | backward | 1.16 | 1.12 | 1.08 |" in text
        assert "| vera: layer | 104 | 255 |" in text

    def test_the_pages_of_this_checkout_are_up_to_date(self):
        assert report.main(["--check"]) == 0


class TestCommand:
    def test_list_names_cases_and_providers_and_runs_nothing(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert main(["layer", "--list", "--filter", "*/llama2_7b_q-r4-h256/M4096/bf16/*"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [f"layer/{d}/llama2_7b_q-r4-h256/M4096/bf16/vblora" for d in ("fwd", "fwd_bwd")]
        assert lines[3].startswith("providers: base, ours, ours_graph, ours_compiled, ours_reference, peft, ")

    def test_quick_has_few_cases_and_compiles_nothing(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert main(["--quick", "--list"]) == 0
        *lines, _, providers = capsys.readouterr().out.splitlines()
        assert len(lines) == 10
        assert "compiled" not in providers

    @pytest.mark.parametrize("arguments", [["layers"], ["--providers", "lora"], ["--providers", "loha"]])
    def test_unknown_names_are_refused_and_known_ones_named(self, arguments, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        code = main([*arguments, "--list"])
        if arguments[-1] == "lora":
            assert code == 0
            assert capsys.readouterr().out.splitlines()[-1] == "providers: base, peft, lora"
        else:
            assert code == 2
            assert "there are" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "options", [["--filter", "nosuch"], ["decode"], ["--rehearse", "--filter", "llama2_7b"]], ids=str
    )
    def test_no_case_is_one_line_that_names_list_and_exit_2(self, options, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(options) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "--list" in err

    def test_without_a_gpu_list_has_what_a_cpu_runs_and_its_ids_are_filters(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["--list"]) == 0
        *ids, _, providers = capsys.readouterr().out.splitlines()
        assert providers == "providers: base, ours, peft, peft_patched"
        assert {identifier.partition("/")[0] for identifier in ids} == {"cpu_layer", "cpu_model", "cpu_load"}
        for identifier in [*ids, ids[-1].replace("/files/", "/save/")]:
            for pattern in (identifier, identifier.removeprefix("cpu_")):
                assert main(["--list", "--filter", pattern]) == 0
                assert capsys.readouterr().out.splitlines()[0] == identifier.replace("/save/", "/files/")
        assert main(["model", "--list"]) == 0
        assert capsys.readouterr().out.splitlines()[:2] == [i for i in ids if i.startswith("cpu_model/")]

    @pytest.mark.parametrize("what", ["folder", "under_a_file", "device", "no_matplotlib"])
    def test_what_cannot_be_written_is_said_before_measuring(self, what, tmp_path, capsys, monkeypatch):
        (tmp_path / "file").write_text("kept")
        paths = {"folder": tmp_path, "under_a_file": tmp_path / "file" / "x.json", "device": Path(os.devnull)}
        options = ["--plot", str(tmp_path)] if what == "no_matplotlib" else ["--json", str(paths[what])]
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else find(n, *a))
        monkeypatch.setattr(command, "run_suites", lambda *_: pytest.fail("it measures"))
        assert main(["--rehearse", *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        assert Path(os.devnull).exists()

    @pytest.mark.parametrize(("name", "code"), [("ours_reference", 1), ("peft_patched", 1), ("lora", 0)])
    @pytest.mark.parametrize("fault", ["wrong", "failed"])
    def test_one_of_ours_that_is_wrong_or_failed_makes_it_exit_1(self, name, code, fault, monkeypatch, capsys):
        by_name = {provider.name: provider for provider in command.PROVIDERS}

        def broken(case, base):
            if fault == "failed":
                raise RuntimeError("broken")
            model = by_peft(case, base)
            model.base_model.model.q_proj.register_forward_hook(lambda module, args, out: out * 2)
            return model

        # One whose results are the definition's, so that they can be wrong.
        made = replace(by_name[name], adapt=broken, same_function=True)
        monkeypatch.setattr(command, "PROVIDERS", (by_name["base"], made, by_name["peft"]))
        assert main(["layer", "--rehearse", "--filter", "fwd/tiny-r4-h12/M12/fp32"]) == code
        assert (f"{name}: {fault}" in capsys.readouterr().err) == bool(code)

    def test_rehearsal_without_the_interpreter_starts_itself_again_with_it(self, tmp_path):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
        options = ["--filter", "layer/fwd/tiny-r4-h12/M12/fp32", "--providers", "ours", "--json", "here.json"]
        arguments = [sys.executable, "-m", "bench", "--rehearse", *options]
        result = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        by_name = {record.provider: record for record in load(tmp_path / "here.json")[1]}
        assert by_name["ours"].status == "ok"

    def test_floors_are_printed(self, capsys):
        assert main(["--floors"]) == 0
        assert "1.11 / 1.19" in capsys.readouterr().out

    def test_rehearsal_writes_results_pictures_and_a_header(self, tmp_path, capsys):
        path = tmp_path / "results.json"
        options = ["--rehearse", "layer", "--filter", "fp32/vblora", "--providers", "ours_reference"]
        assert main([*options, "--json", str(path), "--plot", str(tmp_path / "plots"), "--commit", "abc"]) == 0
        header, records = load(path)
        assert header["commit"] == "abc"
        assert header["torch"] == torch.__version__
        assert min(header[key] for key in ("copy_gb_s", "matmul_tflop_s", "matmul_fp32_tflop_s")) > 0
        assert {record.provider for record in records} == {"base", "base_again", "ours_reference", "peft"}
        assert (tmp_path / "plots" / "roofline.png").exists()
        assert "layer/fwd/tiny-r4-h12/M12/fp32/vblora" in capsys.readouterr().out

    def test_no_case_is_begun_after_the_time_is_up(self, tmp_path, capsys):
        path = tmp_path / "results.json"
        assert main(["--rehearse", "layer", "--minutes", "0", "--json", str(path)]) == 0
        assert load(path)[1] == []
        assert "6 of 6 cases were not begun" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_prints_ratios_and_succeeds(tmp_path):
    path = tmp_path / "cpu.json"
    options = ["--quick", "--filter", "cpu_layer/fwd_bwd/square_1024-r4-h256/*", "--json", str(path)]
    options += ["--seconds", "1", "--minutes", "1"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    arguments = [sys.executable, "-m", "bench", *options]
    result = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("There is no GPU here: the GPU suites")
    lines = [line for line in result.stdout.splitlines() if line.startswith("cpu_layer/")]
    assert [line.split()[1] for line in lines] == ["ours", "peft_patched"]
    assert "these do not apply: --seconds, --minutes." in result.stdout
    assert result.stdout.count(": right") >= 2
    assert "WRONG" not in result.stdout
    header, records = load(path)
    assert header["machine"].startswith(f"{header['cpu']}, {header['threads']} thread")
    by_name = {record.provider: record for record in records}
    for line in lines:
        name, *cells = line.split()[1:5]
        mine = by_name[name]
        assert cells == [table.number(v) for v in (mine.median_ms, by_name["peft"].median_ms, mine.ratio_to_peft)]
    # What a user gets keeps less than PEFT; the definition keeps more.
    assert 0 < by_name["ours"].saved_kib < by_name["peft"].saved_kib


def test_a_table_of_ratios_pairs_each_of_ours_with_its_rival_and_says_what_failed_whole():
    def record(provider, suite="cpu_load", **fields):
        return Record(suite, "small", 0, "fp32", "vblora", provider, "save", **fields)

    files = [record(name, median_ms=ms, ratio_to_peft=0.5) for name, ms in (("peft_full", 2.0), ("ours_full", 1.0))]
    stream = io.StringIO()
    table.show_ratios([*files, record("all", "cpu_model", status="failed", reason="no memory")], stream)
    first, second = [line.split() for line in stream.getvalue().splitlines()[1:]]
    assert first[1:] == ["ours_full", "1.000", "2.000", "0.500"]
    assert second[1:] == ["all", "failed:", "no", "memory"]


@pytest.mark.parametrize(("interpreter", "made"), [(None, True), ("python3", False)])
@pytest.mark.parametrize("target", ["bench", "report"])
def test_make_makes_a_venv_for_its_own_interpreter_alone(target, interpreter, made, tmp_path):
    arguments = ["make", "-n", "-B", target, "VENV=" + str(tmp_path / "venv")]
    arguments += [f"PY={interpreter}"] if interpreter else []
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert ("-m venv" in result.stdout) == made
