"""Time every op next to its baselines: python bench/run.py --device cpu [--filter REGEX].

Ours and the baselines take turns in one process over several random input sets, and a row appears
only after its output matched the fp64 reference in the same run. A run of everything writes
bench/results/<device>-<machine>.json and renders bench/RESULTS.md from all results there; with
--filter or --out it writes only the file that --out names. --render only renders.
"""

import argparse
import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles

import torch

import based_ops
import ceilings
import memory
import registry
import report
import suite_cpu
import timing

SUITES = {"cpu": suite_cpu.cases}
HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROTATED_BYTES = 128 << 20  # input sets together outgrow the last cache
MEMORY = "linear_attention memory"  # what --filter matches for the memory rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=SUITES, default="cpu")
    parser.add_argument("--filter", default="", metavar="REGEX", help="cases by name")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5, help="time for each case, about")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    parser.add_argument("--render", action="store_true", help="only write RESULTS.md and stop")
    args = parser.parse_args()

    cases = [case for case in SUITES[args.device]() if re.search(args.filter, case.name)]
    if args.list:
        print("\n".join(case.name for case in cases))
    elif args.render:
        render()
    else:
        results = run(args, cases)
        print(report.text(results))
        sys.exit(any(case["failures"] for case in results["cases"]))


def run(args, cases):
    torch.set_num_threads(args.threads)
    timer = timing.TIMERS[args.device]()
    machine = describe_machine(args)
    limits = ceilings.measure(timer, args.device, {case.dtype for case in cases})
    results = {
        "machine": machine,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "build": based_ops.build_info(),
        "ceilings": limits,
        "cases": [],
        "memory": [],
    }
    for case in cases:
        print(case.name, file=sys.stderr, flush=True)
        results["cases"].append(run_case(case, timer, limits, args))
    if args.device == "cpu" and re.search(args.filter, MEMORY):
        print(MEMORY, file=sys.stderr, flush=True)
        results["memory"] = memory.measure(args.threads)

    slug = re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-")
    if args.out:
        write(args.out, results)
    elif not args.filter:
        write(RESULTS / f"{args.device}-{slug}.json", results)
        render()
    return results


def write(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def run_case(case, timer, limits, args):
    """Check every implementation on the first input set, then time those that passed."""
    generator = torch.Generator(args.device).manual_seed(0)
    sets = [case.inputs(generator)]
    set_bytes = sum(x.nbytes for x in sets[0])
    count = case.input_sets or min(16, max(4, math.ceil(ROTATED_BYTES / set_bytes)))
    sets += [case.inputs(generator) for _ in range(count - 1)]

    expected = case.expected(*sets[0])
    shots, errors, failures = {}, {}, []
    with torch.set_grad_enabled(case.backward):
        for implementation in case.implementations:
            argument_sets = [implementation.prepare(*inputs) for inputs in sets]
            result = implementation.run(*argument_sets[0])
            outputs = implementation.outputs(argument_sets[0], result)
            if implementation.same_function:
                worst = errors[implementation.name] = relative_errors(outputs, expected)
                if not all(error <= case.tolerance(i) for i, error in enumerate(worst)):
                    failures.append(f"{implementation.name} is wrong: errors {worst}")
                    continue
            shots[implementation.name] = timer.bind(implementation.run, argument_sets)
        if registry.OURS not in shots:
            shots = {}
        times = timing.take_turns(timer, shots, args.seconds)

    floor_ms, floor_kind = ceilings.floor(case, limits)
    same = {i.name: i.same_function for i in case.implementations}
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
        "input_sets": len(sets),
        "rows": [
            {
                "implementation": name,
                "same_function": same[name],
                "median_ms": median(own),
                "quartiles_ms": quantiles(own, n=4, method="inclusive")[::2],
                "samples": len(own),
                "errors": errors.get(name),
            }
            for name, own in times.items()
        ],
        "failures": failures,
    }


def relative_errors(outputs, expected):
    """||out - ref|| / ||ref|| of each pair; NaN counts as wrong by failing every comparison."""
    pairs = zip(outputs, expected, strict=True)
    return [((out.double() - ref).norm() / ref.norm()).item() for out, ref in pairs]


def describe_machine(args):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor()
    return {
        "name": name,
        "threads": args.threads,
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }


def commit():
    """Short hash of what was measured, with -dirty for changes on top."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    described = subprocess.run(command, capture_output=True, text=True)
    return described.stdout.strip() or "unknown"


def render():
    """bench/RESULTS.md from every JSON in bench/results."""
    sections = [
        report.markdown(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))
    ]
    header = f"# Ours and the others, measured\n\nWritten by bench/run.py.\n\n{report.NOTES}\n"
    (HERE / "RESULTS.md").write_text("\n".join([header, *sections]))


if __name__ == "__main__":
    main()
