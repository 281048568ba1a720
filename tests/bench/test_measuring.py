"""The code that measures on a GPU, with a CPU in its place and a clock that is given."""

import gc
import importlib.util
import itertools
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import cpu
from bench.cases import DIRECTIONS, SUITES, Case, full, tiny
from bench.device import Cpu, Cuda
from bench.floors import H200
from bench.providers import PROVIDERS, Provider, by_peft, ours
from bench.records import Record
from bench.runner import Effort, Measurement, interleaved, paired_ratio, quantile
from bench.suites import measure, work_of
from bench.workloads import Workload, common_name, make_base, sharing_copy
from vblora_triton.ops import triton_vblora

ONCE = Effort(least=1, most=1, warm_up=1)
BY_NAME = {provider.name: provider for provider in PROVIDERS}
FEW = ("base", "ours", "ours_reference", "peft", "lora_r32")


def device() -> Cpu:
    """A CPU whose clock moves on by a millisecond each time that it is read."""
    ticks = itertools.count()
    return Cpu(clock=lambda: next(ticks) * 1e-3)


def run(case: Case, direction: str, providers) -> dict[str, Record]:
    ((_, records),) = list(measure([(case, direction)], device(), H200, ONCE, providers))
    return {record.provider: record for record in records}


@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("method", ["vblora", "vera"])
def test_every_provider_that_needs_no_gpu_measures_a_layer(method, direction):
    case = next(c for c in tiny("layer") if c.method == method)
    # Compiled once, because compiling is slow.
    providers = [p for p in PROVIDERS if p.run != "compiled" or (method == "vblora" and direction == "fwd")]
    records = run(case, direction, providers)
    expected = {p.name for p in providers if p.takes_part(case, direction)} | {"base_again"}
    assert records.keys() == expected
    for name, record in records.items():
        assert record.status == "ok", f"{name}: {record.reason}"
        # Only the clock that was given can have said so.
        assert [record.q20_ms, record.median_ms, record.q80_ms] == pytest.approx([1, 1, 1])
        assert [record.ratio_to_base, record.ratio_to_peft] == pytest.approx([1, 1])
        assert record.floor_ms > 0
        assert record.launches > 0
        assert 0 <= record.max_rel_err < 1e-4
    assert records["ours"].max_rel_err > 0


def test_autocast_takes_part_in_half_precision_alone():
    case = replace(tiny("layer")[0], dtype="bf16")
    records = run(case, "fwd_bwd", [BY_NAME[name] for name in ("ours_reference", "peft", "peft_autocast")])
    assert {name: record.status for name, record in records.items()} == dict.fromkeys(records, "ok")
    # It rounds the parameters, which the others do not.
    assert records["peft_autocast"].max_rel_err > records["peft"].max_rel_err
    assert not BY_NAME["peft_autocast"].takes_part(tiny("layer")[0], "fwd")


@pytest.mark.parametrize("suite", ["block", "decode", "model"])
def test_other_suites_run_from_end_to_end(suite):
    case = tiny(suite)[0]
    direction = DIRECTIONS[suite][-1]
    # The interpreter takes its time over a step of a whole model.
    names = [name for name in FEW if suite == "decode" or name != "ours"]
    names += ["base_graph", "peft_graph"] if suite == "decode" else []
    records = run(case, direction, [BY_NAME[name] for name in names])
    assert {name: record.status for name, record in records.items()} == dict.fromkeys([*names, "base_again"], "ok")
    assert records["peft"].median_ms == pytest.approx(1)


def test_files_are_saved_and_loaded_in_every_form_by_either_library():
    ((_, records),) = list(measure(work_of(tiny("load")[:1], lambda i: True), device(), H200, ONCE))
    by_name = {(r.provider, r.direction): r for r in records}
    forms = ("peft_full", "ours_full", "peft_topk", "ours_topk", "lora_r32")
    assert by_name.keys() == {(form, what) for form in forms for what in ("save", "load")}
    assert {r.status for r in records} == {"ok"}, [r.reason for r in records]
    sizes = {form: by_name[form, "save"].bytes_on_disk for form in forms}
    assert sizes["ours_full"] == sizes["peft_full"] > sizes["ours_topk"] == sizes["peft_topk"] > 0
    assert all(r.median_ms > 0 for r in records)


def test_checkpointing_gives_the_same_gradients_and_gets_a_time():
    case = replace(tiny("model")[0], checkpointing=True)
    records = run(case, "step", [BY_NAME[name] for name in ("ours_reference", "peft")])
    assert {name: record.status for name, record in records.items()} == {"ours_reference": "ok", "peft": "ok"}
    assert records["peft"].max_rel_err < 1e-4


def test_a_broken_kernel_is_reported_as_wrong_and_not_timed(monkeypatch):
    kernels = triton_vblora.launchers()
    launch = kernels.launch_expand_fwd

    def broken(*arguments):
        result = launch(*arguments)
        # As if a tile had been left as its memory was found.
        arguments[5][0, :16] = 100
        return result

    monkeypatch.setattr(kernels, "launch_expand_fwd", broken)
    records = run(tiny("layer")[0], "fwd_bwd", [BY_NAME[name] for name in ("base", "ours", "ours_graph", "peft")])
    for name in ("ours", "ours_graph"):
        record = records[name]
        assert record.status == "wrong"
        assert record.reason.startswith("y0: relative error")
        assert record.max_rel_err > 1e-2
        assert [record.median_ms, record.q20_ms, record.q80_ms, record.ratio_to_base, record.launches] == [None] * 5
        assert record.runs == 0
    assert records["peft"].median_ms == pytest.approx(1)


@pytest.mark.parametrize("wrong", ["gradient", "nan", "missing"])
def test_a_wrong_gradient_alone_is_enough_to_be_wrong(wrong):
    def adapt(case, base):
        model = by_peft(case, base)
        parameter = dict(model.named_parameters())["base_model.model.q_proj.vblora_logits_B.default"]
        if wrong == "missing":
            parameter.requires_grad_(False)
        else:
            parameter.register_hook(lambda g: g * (1.001 if wrong == "gradient" else float("nan")))
        return model

    records = run(tiny("layer")[0], "fwd_bwd", [BY_NAME["peft"], Provider("broken", adapt)])
    assert records["broken"].status == "wrong"
    assert records["broken"].reason.startswith("d q_proj.vblora_logits_B: relative error")
    assert records["broken"].median_ms is None


def test_one_that_raises_is_listed_with_its_reason_and_the_others_are_measured():
    def adapt(case, base):
        raise RuntimeError("no such thing")

    records = run(tiny("layer")[0], "fwd", [Provider("raising", adapt), BY_NAME["peft"]])
    assert (records["raising"].status, records["raising"].reason) == ("failed", "RuntimeError: no such thing")
    assert records["peft"].status == "ok"


def test_a_case_that_cannot_be_made_does_not_stop_the_next():
    good = tiny("layer")[0]
    work = [(replace(good, b=7), "fwd"), (good, "fwd")]
    first, second = [records for _, records in measure(work, device(), H200, ONCE, [BY_NAME["peft"]])]
    assert (first[0].provider, first[0].status) == ("all", "failed")
    assert "vector_length" in first[0].reason
    assert second[0].status == "ok"


def test_calls_take_turns_and_inputs_rotate():
    seen = []
    calls = {name: (lambda i, name=name: seen.append((name, i))) for name in "abc"}
    interleaved(calls, device(), Effort(least=3, most=3, warm_up=0))
    timed = seen[3:]
    assert [i for _, i in timed] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all({name for name, at in timed if at == i} == set("abc") for i in range(3))
    case = tiny("layer")[0]
    workload = Workload(case, "fwd", torch.device("cpu"))
    call = workload.call(make_base(case, torch.device("cpu")))
    assert not torch.equal(call(0)["y0"], call(1)["y0"])
    assert torch.equal(call(0)["y0"], call(len(workload.sets))["y0"])


def test_every_call_follows_every_other_one_about_as_often():
    seen = []
    calls = {name: (lambda i, name=name: seen.append(name)) for name in "abcd"}
    interleaved(calls, device(), Effort(least=120, most=120, warm_up=0))
    timed = seen[4:]
    followed = Counter(itertools.pairwise(timed))
    # 120 rounds: 30 rounds begin with each, and 90 turns of each follow one of three others.
    assert all(20 <= followed[pair] <= 50 for pair in itertools.permutations("abcd", 2))
    assert all(20 <= timed[::4].count(name) <= 40 for name in "abcd")


def test_ratios_and_quantiles_are_those_of_the_rounds():
    # A burst that slows the first round for both leaves the ratio as it is.
    assert paired_ratio([20.0, 1.0, 1.0], [40.0, 2.0, 2.0]) == 0.5
    assert [quantile([3.0, 1.0, 2.0, 4.0, 5.0], q) for q in (0.2, 0.5, 0.8)] == pytest.approx([1.8, 3.0, 4.2])


def test_every_library_gets_the_same_parameters_on_the_same_base():
    case = tiny("block")[0]
    base = make_base(case, torch.device("cpu"))
    found = []
    for adapt in (ours("reference"), by_peft):
        model = adapt(case, sharing_copy(base))
        assert model.base_model.model.q_proj.base_layer.weight is base.q_proj.weight
        found.append({common_name(n): p for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 15
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_forward_keeps_is_counted_without_inputs_and_parameters():
    class Square(torch.nn.Module):
        def forward(self, x):
            # Keeps x and exp(x) alone.
            return (x * x.exp(),)

    case = tiny("layer")[0]
    assert Workload(case, "fwd_bwd", torch.device("cpu")).saved_kib(Square()) == case.M * 64 * 4 / 1024


def test_launches_on_a_gpu_are_the_kernels_that_it_ran():
    def event(key, device=DeviceType.CUDA, is_user_annotation=False):
        return SimpleNamespace(key=key, device_type=device, is_user_annotation=is_user_annotation)

    assert Cuda.is_launch(event("_shrink_fwd_kernel"))
    others = [event("cudaLaunchKernel", DeviceType.CPU), event("aten::mm", DeviceType.CPU)]
    others += [
        event("Memcpy HtoD (Pageable -> Device)"),
        event("Memset (Device)"),
        event("step", DeviceType.CUDA, True),
    ]
    assert not any(map(Cuda.is_launch, others))
    # The profiler's events have what is asked of them.
    with profile(activities=[ProfilerActivity.CPU]) as found:
        torch.ones(2) + 1
    assert not any(map(Cuda.is_launch, found.key_averages()))
    assert any(map(Cpu.is_launch, found.key_averages()))


def test_each_run_on_a_gpu_begins_with_an_empty_queue(monkeypatch):
    seen = []
    event = lambda **_: SimpleNamespace(record=lambda: seen.append("event"))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    cuda = Cuda.__new__(Cuda)
    cuda._flush = SimpleNamespace(zero_=lambda: seen.append("flush"))
    cuda.time(lambda i: seen.append("run"), 0)
    assert seen == ["wait", "flush", "event", "run", "event"]


def test_launches_are_counted_after_the_times_and_memory_of_a_graph_not_at_all():
    seen = []

    class Counting(Cpu):
        def time(self, function, i):
            seen.append("time")
            return super().time(function, i)

        def launches(self, function):
            seen.append("launches")
            return 5

        def peak_bytes(self, function):
            return 2**20

    work = [(tiny("layer")[0], "fwd")]
    names = ("base", "ours_reference", "ours_graph")
    ((_, records),) = list(measure(work, Counting(), H200, ONCE, [BY_NAME[name] for name in names]))
    assert seen == ["time"] * 4 + ["launches"] * 3
    assert [record.launches for record in records] == [5] * 4
    assert [record.peak_mib is None for record in records] == [False, False, False, True]


def test_what_compiling_holds_is_let_go_before_memory_is_collected(monkeypatch):
    seen = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: seen.append("reset"))
    work = [(tiny("layer")[0], "fwd")]
    steps = measure(work, device(), H200, ONCE, [BY_NAME["base"]])
    next(steps)
    monkeypatch.setattr(gc, "collect", lambda: seen.append("collect"))
    assert list(steps) == []
    assert seen == ["reset", "collect"]


def test_without_peft_its_providers_and_files_are_unavailable(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    monkeypatch.setitem(sys.modules, "peft", None)
    ((_, records),) = list(measure(work_of(tiny("load")[:1], lambda i: True), device(), H200, ONCE))
    status = {record.provider: record.status for record in records}
    rivals = dict.fromkeys(("peft_full", "peft_topk", "lora_r32"), "unavailable")
    assert status == {"ours_full": "ok", "ours_topk": "ok", **rivals}
    (record,) = run(tiny("layer")[0], "fwd", [BY_NAME["peft"]]).values()
    assert (record.status, record.reason) == ("unavailable", "peft is not installed")


def test_a_cpu_compares_small_and_large_layers_on_one_thread_and_on_two():
    found = {
        (case.shape, case.threads, case.M, case.method, direction)
        for case, direction in cpu.work_on_cpu(lambda identifier: True, ["layer"])
        if case.threads
    }
    sizes = itertools.product(("square_384", "square_1024"), (1, 2), (16, 384, 2048), ("vblora", "vera"))
    assert found == {(*size, direction) for size in sizes for direction in ("fwd", "fwd_grad", "bwd")}


@pytest.mark.parametrize("direction", ["fwd", "fwd_grad", "bwd"])
def test_a_case_has_the_threads_that_it_says_and_its_own_pass_alone(direction, monkeypatch):
    seen = []
    forward = torch.nn.functional.linear

    def watched(*arguments):
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
        return forward(*arguments)

    providers = tuple(replace(p, adapt=by_peft) for p in cpu.COMPARED if p.name == "peft")
    monkeypatch.setattr(cpu, "COMPARED", providers)
    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    before = torch.get_num_threads()
    case = replace(tiny("layer")[1], threads=2)
    times = []
    monkeypatch.setattr(cpu.Timer, "time", lambda self, call, i: times.append(timed(call, i, seen)) or (lambda: 1.0))
    ((record,),) = list(cpu.compare(ONCE, [(case, direction)]))
    assert record.id() == f"cpu_layer/{direction}/tiny-r8-t2/M12/fp32/vera/peft"
    assert (record.status, torch.get_num_threads()) == ("ok", before)
    assert {threads for threads, _ in seen} == {2}
    # The base, A and B.
    assert times == [[] if direction == "bwd" else [(2, direction != "fwd")] * 3]


def timed(call, i, seen):
    """What is seen of one call."""
    before = len(seen)
    call(i)
    return seen[before:]


def test_a_cpu_compares_what_its_users_run(monkeypatch):
    assert [provider.name for provider in cpu.COMPARED] == ["base", "ours", "peft", "peft_patched"]
    model = cpu.COMPARED[1].adapt(tiny("layer")[0], make_base(tiny("layer")[0], torch.device("cpu")))
    assert {module.backend for module in model.modules() if hasattr(module, "backend")} == {"auto"}


def test_cases_have_ids_of_their_own_and_sizes_that_fit():
    cases = [case for suite in SUITES for case in full(suite)]
    ids = [case.id(direction) for case in cases for direction in DIRECTIONS[case.suite]]
    assert len(set(ids)) == len(ids)
    for case in cases:
        assert len(case.adapted()) == len(case.shapes())
        if case.method == "vblora":
            assert all(K % case.b == 0 and N % case.b == 0 for K, N in case.shapes())
    assert "layer/fwd_bwd/llama2_7b_q-r4-h256/M4096/bf16/vblora" in ids
    assert "model/step/llama32_3b-r4-h256-qv/M3072/bf16/vblora" in ids


def test_effort_fits_the_time_that_one_run_takes():
    effort = Effort(least=5, most=100, seconds=0.5)
    assert [effort.runs(one) for one in (10.0, 0.01, 1e-9)] == [5, 50, 100]


def test_measurement_judges_the_definition_itself():
    case = tiny("layer")[0]
    measurement = Measurement(case, "fwd", device(), H200, ONCE, make_base(case, torch.device("cpu")))
    (record,) = measurement.run([BY_NAME["ours_reference"]])
    assert record.status == "ok"
    assert 0 < record.max_rel_err < 1e-5
