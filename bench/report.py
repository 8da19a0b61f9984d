"""Results (the JSON's contents) -> an aligned table for the terminal, or markdown."""

from registry import OURS

CASE_COLUMNS = ("op", "work", "shape", "dtype")
COLUMNS = (*CASE_COLUMNS, "implementation", "ms", "quartiles", "ours is", "of floor", "target")
MEMORY_COLUMNS = ("op", "work", "T", "peak over inputs, MiB", "bytes per token")
OVERHEAD_COLUMNS = ("eager call of", "work", "us", "quartiles", "target")
NOTES = """\
ms: median. ours is: the baseline's median over ours; in our own row, the best baseline's.
of floor: the least time at the ceilings (bytes moved or flops, the larger) over the median.
backward: forward and backward together, less the forward.
cached: one state, which the last call left in the cache; the floor is the memory's all the same.
A baseline's output may differ from the reference ten times as much as ours.
* computes another function (softmax attention): its output was not compared with the reference."""


def text(results):
    """The whole run as plain text."""
    parts = [_headline(results), *_tables(results, _aligned), NOTES, _score(results)]
    return "\n\n".join(parts)


def markdown(results):
    """The whole run as a section of a markdown file."""
    title = f"## {results['machine']['name']}"
    return "\n\n".join([title, _headline(results), *_tables(results, _piped)]) + "\n"


def _tables(results, layout):
    yield layout(_with_header(results))
    yield from _lengths(results["cases"])
    if results.get("overhead"):
        yield layout([OVERHEAD_COLUMNS, *map(_overhead_row, results["overhead"])])
    memory = [row for row in results["memory"] if "seqlen" in row]
    if memory:
        yield layout([MEMORY_COLUMNS, *_memory_rows(memory)])
        yield _linearity(memory)
    for row in results["memory"]:
        if "share" in row:
            met = _yes(row["share"] <= row["target"])
            yield (
                f"backward of {row['shape']}: {row['share']:.3f} x its inputs beyond inputs, out, "
                f"dout and gradients (<= {row['target']:g}: {met})"
            )
    yield from _failures(results)


def _score(results):
    """One line: how many of the cases' targets were met, and which were not."""
    outcomes = []
    for case in results["cases"]:
        ours = next((r["median_ms"] for r in case["rows"] if r["implementation"] == OURS), None)
        for row in case["rows"]:
            for target in _targets(case, row["implementation"], row["median_ms"], ours):
                outcomes.append((f"{case['op']} {case['work']} {case['shape']} {target}", target))
    missed = [name for name, target in outcomes if not target.endswith("yes")]
    met = len(outcomes) - len(missed)
    return f"targets met: {met} of {len(outcomes)}; " + ("; ".join(missed) or "none missed")


def _with_header(results):
    return [COLUMNS, *(row for case in results["cases"] if case["rows"] for row in _rows(case))]


def _rows(case):
    """The cells of a case: our row first, with the case's name, then the baselines'."""
    ours = next(row["median_ms"] for row in case["rows"] if row["implementation"] == OURS)
    best = min((r["median_ms"] for r in case["rows"] if r["implementation"] != OURS), default=None)
    for row in case["rows"]:
        name, median = row["implementation"], row["median_ms"]
        against = best if name == OURS else median
        yield (
            *(case[column] if name == OURS else "" for column in CASE_COLUMNS),
            name if row["same_function"] else f"{name} *",
            _digits(median),
            " - ".join(_digits(ms) for ms in row["quartiles_ms"]),
            "" if against is None else f"{against / ours:.2f}x{' best' * (name == OURS)}",
            f"{case['floor_ms'] / median:.0%} {case['floor_kind']}",
            "; ".join(_targets(case, name, median, ours)),
        )


def _targets(case, name, median, ours):
    """What was asked for of a row, and whether it was met."""
    ratio = case["targets"].get(name)
    if ratio is not None:
        yield f">= {ratio:g}x {_yes(median / ours >= ratio)}"
    if name != OURS:
        return
    if case.get("target_ms"):
        yield f"<= {case['target_ms']:g} ms {_yes(median <= case['target_ms'])}"
    if case.get("target_floor"):
        share = case["floor_ms"] / median
        yield f">= {case['target_floor']:.0%} of floor {_yes(share >= case['target_floor'])}"


def _lengths(cases):
    """How the time of the longest sequence compares with an eighth of it."""
    ours = {
        (case["op"], case["work"], case["shape"]): case["rows"][0]["median_ms"]
        for case in cases
        if case["rows"]
    }
    for (op, work, shape), ms in ours.items():
        if " T1048576 " in shape:
            short = ours.get((op, work, shape.replace("T1048576", "T131072")))
            if short:
                ratio, met = ms / short, _yes(ms / short <= 8.5)
                yield f"{op} {work}: 8 x the tokens, {ratio:.2f} x the time (<= 8.5: {met})"


def _overhead_row(row):
    target = row["target_us"]
    return (
        row["op"],
        row["work"],
        f"{row['median_us']:.1f}",
        " - ".join(f"{us:.1f}" for us in row["quartiles_us"]),
        "" if target is None else f"<= {target:g} us {_yes(row['median_us'] <= target)}",
    )


def _memory_rows(rows):
    for row in rows:
        mib, per_token = f"{row['bytes'] / 2**20:.1f}", f"{row['bytes_per_token']:.0f}"
        yield ("linear_attention", row["work"], str(row["seqlen"]), mib, per_token)


def _linearity(rows):
    """The longest sequence's cost of a token over the shortest's."""
    ratios = []
    for work in dict.fromkeys(row["work"] for row in rows):
        costs = [row["bytes_per_token"] for row in rows if row["work"] == work]
        ratios.append(f"{work} x{costs[-1] / costs[0]:.2f} ({_yes(costs[-1] <= 1.1 * costs[0])})")
    return "memory linear in T (bytes per token, longest over shortest, <= 1.1): " + ", ".join(
        ratios
    )


def _failures(results):
    return [
        f"LEFT OUT, {case['op']} {case['work']} {case['shape']}: {failure}"
        for case in results["cases"]
        for failure in case["failures"]
    ]


def _headline(results):
    machine, ceilings = results["machine"], results["ceilings"]
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in ceilings["gemm_tflop_s"].items())
    where = f"{machine['name']}, torch {machine['torch']}"
    if "threads" in machine:
        where = (
            f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}, "
            f"load average before the run {machine['load_before']:.1f}"
        )
    return (
        f"{where}, {results['date']}, {_commits(results)}. "
        f"Ceilings: {ceilings['bandwidth_gb_s']:.1f} GB/s (copy {ceilings['copy_gb_s']:.1f}, "
        f"into a new tensor {ceilings['new_tensor_gb_s']:.1f}); matrix product, TFLOP/s: {rates}."
    )


def _commits(results):
    """What was measured: one commit, or the ops of each where parts were measured again."""
    ops = {}
    for case in results["cases"]:
        ops.setdefault(case.get("commit", results["commit"]), {})[case["op"]] = None
    if len(ops) < 2:
        return f"commit {next(iter(ops), results['commit'])}"
    return "; ".join(f"commit {commit}: {', '.join(names)}" for commit, names in ops.items())


def _digits(ms):
    """Four significant digits, without an exponent."""
    return f"{ms:.{max(0, 3 - len(str(int(ms))) + (ms < 1))}f}"


def _yes(met):
    return "yes" if met else "NO"


def _aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _piped(rows):
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
