"""Time every op next to its baselines: python bench/run.py --device cpu|cuda [--filter REGEX].

Ours and the baselines take turns in one process over several random input sets, and a row appears
only after its output matched the fp64 reference in the same run. A run of everything writes
bench/results/<device>-<machine>.json and renders bench/RESULTS.md from all results there; with
--filter or --out it writes only the file that --out names, in which it adds or replaces cases.
--render only renders.
"""

import argparse
import datetime
import json
import math
import os
import platform
import re
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import torch

import based_ops
import ceilings
import end_to_end_report
import memory
import overhead
import registry
import report
import suite_cpu
import suite_cuda
import timing
from provenance import commit, slug

SUITES = {"cpu": suite_cpu.cases, "cuda": suite_cuda.cases}
SECONDS = {"cpu": 5.0, "cuda": 0.3}  # for each case, about
HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROTATED_BYTES = 128 << 20  # input sets together outgrow the last cache
# What --filter matches for the rows that are not cases.
MEMORY, OVERHEAD = "linear_attention memory", "eager overhead"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=SUITES, default="cpu")
    parser.add_argument("--filter", default="", metavar="REGEX", help="cases by name")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="time for each case, about")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    parser.add_argument("--render", action="store_true", help="only write RESULTS.md and stop")
    args = parser.parse_args()
    args.seconds = SECONDS[args.device] if args.seconds is None else args.seconds
    if args.render:
        return render()

    cases = [case for case in SUITES[args.device]() if re.search(args.filter, case.name)]
    if args.list:
        return print("\n".join(case.name for case in cases))
    results = run(args, cases)
    print(report.text(results))
    sys.exit(any(case["failures"] for case in results["cases"]))


def run(args, cases):
    torch.set_num_threads(args.threads)
    timer = timing.TIMERS[args.device]()
    machine = describe_machine(args)
    limits = ceilings.measure(timer, args.device, {case.dtype for case in cases})
    results = {
        "device": args.device,
        "machine": machine,
        "date": datetime.date.today().isoformat(),
        "commit": args.commit or commit(),
        "build": based_ops.build_info(),
        "ceilings": limits,
        "cases": [],
        "memory": [],
        "overhead": [],
    }
    missing = without_kernels(args.device)
    for case in cases:
        began = time.perf_counter()
        if case.ops & missing:
            print(f"{case.name}: left out, no CUDA kernel for {sorted(case.ops & missing)}")
            continue
        results["cases"].append(run_case(case, timer, limits, args) | {"commit": results["commit"]})
        if args.device == "cuda":
            torch.cuda.empty_cache()  # what the graphs held
        if args.out:
            write(args.out.with_suffix(".part.json"), results)
        rows = results["cases"][-1]["rows"]
        figures = ", ".join(f"{row['implementation']} {row['median_ms']:.4g}" for row in rows)
        seconds = time.perf_counter() - began
        print(f"{case.name}: {figures} ({seconds:.1f} s)", file=sys.stderr, flush=True)
    if re.search(args.filter, OVERHEAD):
        results["overhead"] = overhead.measure(args.device, missing)
    if re.search(args.filter, MEMORY) and "linear_attention_backward" not in missing:
        results["memory"] = memory.measure(args.device, args.threads)

    if args.out:
        write(args.out, add_to(args.out, results) if args.filter else results)
        args.out.with_suffix(".part.json").unlink(missing_ok=True)
    elif not args.filter:
        write(RESULTS / f"{args.device}-{slug(machine['name'])}.json", results)
        render()
    return results


def without_kernels(device):
    """The torch ops that this build cannot run there."""
    if device == "cpu":
        return set()
    ops = (name.removeprefix("based_ops::") for name in torch._C._dispatch_get_all_op_names())
    return set(ops) - set(based_ops.build_info()["cuda_ops"])


def write(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def add_to(path, results):
    """A file's results, with those of this part added or in the place of older ones."""
    if not path.exists():
        return results
    whole = json.loads(path.read_text())

    def name(case):
        return tuple(case[key] for key in report.CASE_COLUMNS)

    cases = {name(case): {"commit": whole["commit"]} | case for case in whole["cases"]}
    whole["cases"] = list((cases | {name(case): case for case in results["cases"]}).values())
    for part in ("memory", "overhead"):
        whole[part] = results[part] or whole[part]
    whole["date"], whole["commit"] = results["date"], results["commit"]
    whole["ceilings"]["gemm_tflop_s"] |= results["ceilings"]["gemm_tflop_s"]
    return whole


def run_case(case, timer, limits, args):
    """Check every implementation on the first input set, then time those that passed."""
    times, errors, failures = {}, {}, []
    try:
        count = measure(case, timer, args, times, errors, failures)
    except Exception as error:  # one case must not take the others with it
        failures.append(describe(error))
        count = 0
    floor_ms, floor_kind = ceilings.floor(case, limits)
    return {
        "op": case.op,
        "work": case.work,
        "shape": case.shape,
        "dtype": registry.dtype_name(case.dtype),
        "bytes": case.bytes,
        "flops": case.flops,
        "floor_ms": floor_ms,
        "floor_kind": floor_kind,
        "targets": case.targets,
        "target_ms": case.target_ms,
        "target_floor": case.target_floor,
        "input_sets": count,
        "rows": [row(case, i, times, errors) for i in case.implementations if i.name in times],
        "failures": failures,
    }


def measure(case, timer, args, times, errors, failures):
    """Fills the last three; returns the number of input sets."""
    generator = torch.Generator(args.device).manual_seed(0)
    sets = [case.inputs(generator)]
    set_bytes = sum(x.nbytes for x in sets[0])
    count = case.input_sets or min(16, max(4, math.ceil(ROTATED_BYTES / set_bytes)))
    sets += [case.inputs(generator) for _ in range(count - 1)]

    expected = case.expected(*sets[0])
    shots = {}
    with torch.set_grad_enabled(case.backward):
        for implementation in case.implementations:
            name = implementation.name
            try:
                argument_sets = [implementation.prepare(*inputs) for inputs in sets]
                errors[name] = check(case, implementation, argument_sets[0], expected)
                shots[name] = timer.bind(implementation.run, argument_sets)
                if case.work == "backward":
                    shots[name, "forward"] = timer.bind(implementation.forward, argument_sets)
            except Exception as error:
                shots.pop(name, None)
                failures.append(f"{name}: {describe(error)}")
        if registry.OURS in shots:
            times |= timing.take_turns(timer, shots, args.seconds)
    return count


def describe(error):
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first[:300]}"


def check(case, implementation, arguments, expected):
    """Its relative errors, None when they cannot be compared; raises on a wrong output."""
    outputs = implementation.outputs(arguments, implementation.run(*arguments))
    if not implementation.same_function:
        return None
    errors = relative_errors(map(case.sample, outputs), expected)
    # A baseline has to compute the same thing, not as exactly.
    slack = 1 if implementation.name == registry.OURS else 10
    if not all(error <= slack * case.tolerance(i) for i, error in enumerate(errors)):
        raise ValueError(f"wrong, errors {errors}")
    return errors


def row(case, implementation, times, errors):
    own = [ms / case.steps for ms in times[implementation.name]]
    # A backward's time is what is left of forward and backward together.
    forward = times.get((implementation.name, "forward"))
    rest = median(forward) if forward else 0.0
    return {
        "implementation": implementation.name,
        "same_function": implementation.same_function,
        "median_ms": median(own) - rest,
        "quartiles_ms": [ms - rest for ms in quantiles(own, n=4, method="inclusive")[::2]],
        "forward_ms": rest,
        "samples": len(own),
        "errors": errors[implementation.name],
    }


def relative_errors(outputs, expected):
    """||out - ref|| / ||ref|| of each pair; NaN counts as wrong by failing every comparison."""
    pairs = zip(outputs, expected, strict=True)
    return [((out.double() - ref).norm() / ref.norm()).item() for out, ref in pairs]


def describe_machine(args):
    if args.device == "cuda":
        return {"name": torch.cuda.get_device_name(), "torch": torch.__version__}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor()
    return {
        "name": name,
        "threads": args.threads,
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }


def render():
    """bench/RESULTS.md from every JSON in bench/results."""
    sections = [
        end_to_end_report.render(path)
        if path.name.startswith("end-to-end")
        else report.markdown(json.loads(path.read_text()))
        for path in sorted(RESULTS.glob("*.json"))
    ]
    header = f"# Ours and the others, measured\n\nWritten by bench/run.py.\n\n{report.NOTES}\n"
    (HERE / "RESULTS.md").write_text("\n".join([header, *sections]))


if __name__ == "__main__":
    main()
