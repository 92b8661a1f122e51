"""Results of verbs as text for people; with --json none of this is read."""

from __future__ import annotations

import json


def show(verb: str, result: dict) -> str:
    """A result for people."""
    if verb == "upcycle":
        from .report import table

        check = "verified" if result["export"]["verified"] else "NOT verified (torch is missing)"
        return (
            f"{table(result)}\n\nkept {result['keep']:.4f} of the parents' parameters; "
            f"export {check}; pool weights "
            + ", ".join(f"{n} {w:.3f}" for n, w in result["pool"].items())
            + f"\n\nsample: {result['sample']!r}"
        )
    if verb == "delphi":
        from .delphi import verbs

        return verbs.show(result)
    if verb == "generate":
        return result["prompt"] + result["text"]
    if verb == "inspect":
        return _inspected(result)
    if verb == "plan" and "presets" in result:
        return "\n".join(f"{name:22}{n:>18,}" for name, n in result["presets"].items())
    if verb == "plan":
        return _plan(result)
    if verb == "data" and "rows" in result:
        return "\n".join(_dataset(row) for row in result["rows"])
    return "\n".join(
        f"{key}: {json.dumps(value) if isinstance(value, (dict, list)) else value}"
        for key, value in result.items()
    )


def _plan(r: dict) -> str:
    """A plan for people."""
    size = r["bytes_per_device"]
    lines = [
        f"{r['target']} ({r['family']}): {r['parameters']:,} parameters"
        + (f", teachers {r['teacher_parameters']:,}" if r["teacher_parameters"] else ""),
        f"FLOPs a token: {r['forward_flops_per_token']:,} forward, "
        f"{r['train_flops_per_token']:,} training",
        f"mesh {', '.join(f'{a}={n}' for a, n in r['mesh'].items())}; batch {r['batch']} x "
        f"{r['window']} tokens, {r['compute']}, {r['optimizer']}",
        "bytes per device: " + ", ".join(f"{k} {v / 2**30:.2f} GiB" for k, v in size.items()),
    ]
    if "teacher_cache" in r:
        said = r["teacher_cache"]
        lines.append(
            f"teachers' answers: {said['file_bytes'] / 2**30:.2f} GiB of disk; while these are "
            f"made, {said['teachers_bytes_per_device'] / 2**30:.2f} GiB of weights per device"
        )
    if "fits" in r:
        lines.append(
            f"{'fits' if r['fits'] else 'does NOT fit'} the memory of one {r['device']}"
            + ("" if r["fits"] else "; try --accumulate, more data= or model=, --shard-sequence")
        )
    if r["tokens"]:
        lines.append(
            f"{r['steps']:,} steps, {r['tokens']:,} tokens, {r['train_flops']:.3g} FLOPs: "
            f"{r['hours']:.1f} hours at {r['mfu']:.0%} of {r['devices']} x {r['device']} "
            f"({r['tokens_per_second']:,.0f} tokens/s)"
        )
    return "\n".join(lines)


def _inspected(r: dict) -> str:
    """What `delve inspect` found, for people."""
    row = lambda name, m: f"{name:24}{m['nll_per_token']:10.4f}{m['bits_per_byte']:12.4f}"  # noqa: E731
    lines = [f"{'':24}{'nats/token':>10}{'bits/byte':>12}", row("hybrid", r)]
    lines += [row(f"{n}, dense", m) for n, m in r["parents"].items()]
    lines += [row(f"{n}, stream", m) for n, m in r["streams"].items()]
    gain, number = r["gain"], r["pool"]["effective_streams"]
    low, high = gain["interval"] or (gain["gain"],) * 2
    lines.append(
        f"better than {r['best']} by {gain['gain']:.4f} [{low:.4f}, {high:.4f}] nats a token "
        f"(95 %, over {r['intervals_over']}); "
        f"effective streams {number['mean']:.2f} of {len(r['streams'])}"
    )
    for name, g in r["by_type"].items():
        lines.append(f"  {name:22}{g['share']:6.1%} of the tokens, gain {g['gain']:.4f}")
    if r["hub"] and r["hub"]["alarms"]:
        where = ", ".join(f"{a['stream']} {a['sync_point']}" for a in r["hub"]["alarms"])
        lines.append(f"hub updates above {r['hub']['alarm_above']} of the stream: {where}")
    if r["parents_missing"]:
        lines.append(f"dense parents not found: {', '.join(r['parents_missing'])}")
    return "\n".join(lines + ([r["path"]] if "path" in r else []))


def _dataset(row: dict) -> str:
    """A named data set or mixture on one line."""
    if row["kind"] == "mixture":
        parts = ", ".join(f"{n} {share:.1%}" for n, share in row["parts"].items())
        return f"{row['name']}: mixture of {parts}"
    where = " ".join(filter(None, (row["hub"], row["config"], row["split"])))
    note = f"; {row['note']}" if row["note"] else ""
    return f"{row['name']}: {where}, field {row['field']}, licence: {row['licence']}{note}"
