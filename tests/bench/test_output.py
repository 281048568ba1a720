"""The command, its files, tables and pictures, and the README's part."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import plot, report, table
from bench.__main__ import main
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
        path = tmp_path / "README.md"
        path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
        (tmp_path / "results").mkdir()
        return path

    def run(self, readme, *options) -> int:
        return report.main(["--readme", str(readme), "--results", str(readme.parent / "results"), *options])

    def test_without_results_of_a_gpu_it_says_so(self, readme):
        # A run on a CPU, and a file of another shape.
        Results({**HEADER, "gpu": None}, readme.parent / "results" / "cpu.json").add(some_records())
        (readme.parent / "results" / "demo.json").write_text('{"loss_before": 1}')
        assert self.run(readme) == 0
        assert readme.read_text() == f"before\n{report.BEGIN}\n{report.NOTHING}\n{report.END}\nafter\n"

    def test_check_fails_until_the_report_is_made_and_changes_nothing(self, readme, capsys):
        Results(HEADER, readme.parent / "results" / "block.json").add(some_records())
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

    def test_missing_markers_are_an_error(self, readme):
        readme.write_text("no markers")
        with pytest.raises(ValueError, match="must have one line"):
            self.run(readme)

    def test_the_readme_of_this_checkout_is_up_to_date(self):
        assert report.main(["--check"]) == 0


class TestCommand:
    def test_list_names_cases_and_providers_and_runs_nothing(self, capsys):
        assert main(["layer", "--list", "--filter", "*/llama2_7b_q-r4-h256/M4096/bf16/*"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [f"layer/{d}/llama2_7b_q-r4-h256/M4096/bf16/vblora" for d in ("fwd", "fwd_bwd")]
        assert lines[3].startswith("providers: base, ours, ours_graph, ours_compiled, ours_reference, peft, ")

    def test_quick_has_few_cases_and_compiles_nothing(self, capsys):
        assert main(["--quick", "--list"]) == 0
        *lines, _, providers = capsys.readouterr().out.splitlines()
        assert len(lines) == 10
        assert "compiled" not in providers

    @pytest.mark.parametrize("arguments", [["layers"], ["--providers", "lora"], ["--providers", "loha"]])
    def test_unknown_names_are_refused_and_known_ones_named(self, arguments, capsys):
        code = main([*arguments, "--list"])
        if arguments[-1] == "lora":
            assert code == 0
            assert capsys.readouterr().out.splitlines()[-1] == "providers: base, peft, lora"
        else:
            assert code == 2
            assert "there are" in capsys.readouterr().err

    def test_floors_are_printed(self, capsys):
        assert main(["--floors"]) == 0
        assert "1.11 / 1.14" in capsys.readouterr().out

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
    options = ["--quick", "--filter", "fwd_bwd/square_1024-r4-h256", "--json", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench", *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("There is no GPU here: the GPU suites")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("cpu_layer/")]
    ours, peft, ratio = map(float, line.split()[1:4])
    assert ratio == pytest.approx(ours / peft, rel=0.5)
    assert result.stdout.count(": right") >= 2
    assert "WRONG" not in result.stdout
    by_name = {record.provider: record for record in load(path)[1]}
    assert by_name["ours_reference"].saved_kib > 0
