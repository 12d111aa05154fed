"""The sections of the report beside its perplexities: graph, edits, bytes, time, compute, clients, faults, data.

Each takes the records of a run, perhaps still under way, and gives HTML in which everything is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sam_ds.evaluation.formats import html_note, html_table, show_megabytes, show_seconds
from sam_ds.evaluation.records import BYTES, Records
from sam_ds.evaluation.svg import Edge, arc_diagram, heat_map, short, stacked_bars
from sam_ds.tables import leaves


def graph_section(records: Records) -> str:
    """The expert graph of every layer, before and after, with its edits."""
    model, before, after = records.run["model"], records.run["graph"], records.graph_after()
    used = records.end["used"] if records.end else None
    figures = []
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        old_edges, new_edges = _edges_of(old), _edges_of(new)
        pruned = dict.fromkeys(set(old_edges) - set(new_edges), "pruned")
        promoted = dict.fromkeys(set(new_edges) - set(old_edges), "promoted")
        use = _shares(used[layer]) if used else {}
        drawings = "".join(
            f"<div><small>{when}: {len(edges)} edges</small>"
            + arc_diagram(model["experts"], model["roots"], edges, use, marked, f"layer {layer} {when}")
            + "</div>"
            for when, edges, marked in (("before", old_edges, pruned), ("after", new_edges, promoted))
        )
        figures.append(
            f"<figure><figcaption>layer {layer}: {len(pruned)} pruned, {len(promoted)} promoted"
            f'</figcaption><div class="pair">{drawings}</div></figure>'
        )
    key = (
        '<div class="legend"><span><i class="rootkey"></i>root</span>'
        '<span><i class="prunedkey"></i>pruned</span>'
        '<span><i class="promotedkey"></i>promoted</span></div>'
    )
    shade = (
        "The more a route used an edge, the darker it is."
        if used
        else "Usage is known at the end of the run."
    )
    return (
        key
        + "".join(figures)
        + html_note(f"An arc from p to e: a token that visits p may go on to e. {shade}")
    )


def usage_section(records: Records) -> str:
    """How much the routes used each edge."""
    if records.end is None:
        counts = [r["edges"] for r in records.rounds]
        return html_note(
            f"Edges a layer now: {', '.join(map(str, counts[-1]))}." if counts else "No round yet."
        )
    rows, maps = [], []
    for layer, (used, graph) in enumerate(zip(records.end["used"], records.end["graph"], strict=True)):
        counts = sorted((used[tail][head] for tail, head in _edges_of(graph)), reverse=True)
        total = sum(counts) or 1
        tenth = math.ceil(len(counts) / 10)
        rows.append(
            [
                str(layer),
                str(len(counts)),
                str(sum(c == 0 for c in counts)),
                short(sum(counts)),
                f"{sum(counts[:tenth]) / total:.0%}",
            ]
        )
        maps.append(
            f"<figure><figcaption>layer {layer}</figcaption>"
            f"{heat_map(used, f'usage, layer {layer}')}</figure>"
        )
    header = ["layer", "edges", "never used", "steps of routes", "share of the busiest tenth"]
    return (
        html_table(header, rows)
        + f'<div class="maps">{"".join(maps)}</div>'
        + html_note("Row: tail; column: head.")
    )


def edits_section(records: Records) -> str:
    """Every edit tried, gamma, and both bounds beside the measured gap."""
    rows = [
        [
            str(round_),
            str(edit["layer"]),
            f"{edit['tail']} → {edit['head']}",
            edit["kind"],
            "kept" if edit["kept"] else "rolled back",
            f"{edit['change']:+.2e}",
        ]
        for round_, edit in records.edits
    ]
    header = ["round", "layer", "edge", "kind", "outcome", "change of loss, nats"]
    gammas = [r["gamma"] for r in records.rounds if r["gamma"] is not None]
    text = html_table(header, rows) if rows else '<p class="none">no edits were tried</p>'
    if gammas:
        text += html_note(
            f"gamma: {short(max(gammas))} nats, the largest change seen (a lower estimate of the true one)."
        )
    bounds = records.end["bounds"] if records.end else None
    if bounds is None:
        return text + html_note("No bounds: they are estimated at the end of a run whose losses allow a fit.")
    names = {
        "uncorrected": "uncorrected bound (estimate)",
        "corrected": "corrected bound (estimate)",
        "measured": "measured gap (estimate)",
    }
    estimates = [[label, f"{bounds[name]:.4g}"] for name, label in names.items()]
    return text + html_table(["nats a token", ""], estimates) + html_note(bounds["note"])


def bytes_section(records: Records) -> str:
    """Bytes up and down, counted three ways, by round."""
    if not records.rounds:
        return '<p class="none">no round yet</p>'
    rows = [
        [name, *(f"{record[way][kind]:,}" for way in ("bytes_up", "bytes_down") for kind in BYTES)]
        for name, record in [
            *((f"round {r['round']}", r) for r in records.rounds),
            ("all", {way: records.bytes_total(way) for way in ("bytes_up", "bytes_down")}),
        ]
    ]
    header = ["", *(f"{way} {kind}" for way in ("up", "down") for kind in BYTES)]
    bars = {
        f"round {r['round']}": [r[way]["message"] / 1e6 for way in ("bytes_up", "bytes_down")]
        for r in records.rounds
    }
    base = records.end["bytes_base"] if records.end else 0
    note = "raw: the tensors; encoded: after the codec; message: as serialised, which is what a figure means."
    if base:
        note += f" Clients also need {show_megabytes(base)} of frozen base weights once, not counted above."
    return stacked_bars(bars, ["up", "down"], "MB") + html_table(header, rows) + html_note(note)


def time_section(records: Records) -> str:
    """Where the wall time of each round went, and the weights of the aggregation."""
    bars = {}
    for r in records.rounds:
        work = r["wall_seconds"] - r["evaluation_seconds"] - r["orchestration_seconds"]
        bars[f"round {r['round']}"] = [max(0.0, work), r["evaluation_seconds"], r["orchestration_seconds"]]
    weights = [
        [f"round {r['round']}", short(r["effective_sample_size"]), short(r["largest_weight"])]
        for r in records.trained
        if "effective_sample_size" in r
    ]
    table = html_table(["", "effective sample size", "largest weight 1/p"], weights) if weights else ""
    share = f"Orchestration: {records.orchestration_share():.1%} of the wall time of the rounds."
    return stacked_bars(bars, ["clients", "evaluation", "orchestration"], "s") + html_note(share) + table


def compute_section(records: Records) -> str:
    """FLOPs, tokens and seconds of each client."""
    answered = [record for record in records.clients if record["status"] == "ok"]
    rows, bars = [], {}
    for client in records.run["clients"]:
        own = [record for record in answered if record["client"] == client["client"]]
        if own:
            flops, seconds = sum(r["active_flops"] for r in own), sum(r["train_seconds"] for r in own)
            name = f"{client['client']} {client['domain']}, {client['tier']}"
            bars[name] = [flops / 1e9]
            rows.append(
                [
                    name,
                    str(len(own)),
                    f"{sum(r['tokens'] for r in own):,.0f}",
                    f"{short(flops)}FLOP",
                    show_seconds(seconds),
                    show_seconds(sum(r["load_seconds"] for r in own)),
                    f"{own[0]['loss_first']:.3f}",
                    f"{own[-1]['loss_last']:.3f}",
                ]
            )
    header = ["client", "rounds", "tokens", "active FLOPs", "training", "loading", "first loss", "last loss"]
    note = "Tokens times the FLOPs of the experts that were active, attention and embeddings included."
    return stacked_bars(bars, ["compute"], "GFLOP") + html_table(header, rows) + html_note(note)


def clients_section(records: Records) -> str:
    """Who took part, and on what."""
    run = records.run
    tiers = [
        [str(tier[key]) for key in ("name", "experts", "memory_gib", "precision", "trains", "ds_config")]
        for tier in run["tiers"]
    ]
    clients = [
        [str(client[key]) for key in ("client", "domain", "tier", "examples")] for client in run["clients"]
    ]
    header = ["tier", "experts a layer", "GiB", "precision", "trains", "DeepSpeed"]
    return html_table(header, tiers) + html_table(["client", "domain", "tier", "examples"], clients)


def rejected_section(records: Records) -> str:
    """Replies that were not folded and messages that answered nothing: how many for which reason, then each."""
    rejected, refused = records.rejected, records.refused
    text = "".join(
        html_note(f"Round {r['round']} was void, without a valid answer, {r['void']} times before it was done.")
        for r in records.trained if r.get("void")
    )  # fmt: skip
    if not rejected and not refused:
        return text + '<p class="none">none: every reply was valid</p>'
    reasons: dict[str, list[tuple[int, str]]] = {}
    for r in rejected:
        reasons.setdefault(r["reason"], []).append((r["round"], f"client {r['client']}"))
    for r in refused:
        who = f"node {r['node']}" if r["client"] is None else f"client {r['client']}"
        reasons.setdefault(r["reason"], []).append((r["round"], who))
    counts = [
        [reason, str(len(own)), str(len({round_ for round_, _ in own})), _some(dict.fromkeys(who for _, who in own))]
        for reason, own in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
    text += html_table(["reason", "count", "rounds", "from"], counts)
    if rejected:
        rows = [[str(r["round"]), str(r["client"]), r["domain"], r["tier"], r["status"]] for r in rejected]
        text += html_table(["round", "client", "domain", "tier", "status"], rows)
    if refused:
        rows = [
            [str(r["round"]), str(r["node"]), "" if r["client"] is None else str(r["client"]), r["reason"], r["detail"]]
            for r in refused
        ]
        text += html_table(["round", "node", "client", "refused as", "detail"], rows)
    return text


def warnings_section(records: Records) -> str:
    """What was said of the weights of the rounds."""
    rows = [[str(r["round"]), text] for r in records.rounds for text in r["warnings"]]
    return html_table(["round", "warning"], rows) if rows else '<p class="none">none</p>'


def privacy_section(records: Records) -> str:
    """What the noise is worth so far."""
    epsilon = next((r["epsilon"] for r in reversed(records.rounds) if "epsilon" in r), None)
    if epsilon is None:
        return '<p class="none">no noise: nothing is promised of a client\'s answers</p>'
    rows = [[part, short(value)] for part, value in epsilon.items() if part != "delta"]
    note = f"At delta {epsilon['delta']:g}, of one client's answers in all rounds so far, from who sees what is listed."
    if "run" not in epsilon:
        note += " The rest left the server without noise: of the run as a whole nothing is promised."
    return html_table(["", "epsilon"], rows) + html_note(note)


def data_section(records: Records) -> str:
    """The corpus with its fingerprint, and the model."""
    data, model = records.run["data"], records.run["model"]
    splits = list(dict.fromkeys(split for tokens in data["domains"].values() for split in tokens))
    rows = [
        [name, *(f"{tokens.get(split, 0):,}" for split in splits)] for name, tokens in data["domains"].items()
    ]
    facts = (
        f"{data['name']}, fingerprint {data['fingerprint']}; model {model['name']}, {model['parameters']:,} "
        f"parameters, {model['layers']} layers of {model['experts']} experts."
    )
    return html_note(facts) + html_table(["tokens", *splits], rows)


def config_section(records: Records) -> str:
    """The resolved configuration."""
    rows = [[key, str(value)] for key, value in leaves(records.run["config"])]
    return f"<details><summary>{len(rows)} settings</summary>{html_table(['key', 'value'], rows)}</details>"


def _edges_of(graph: Sequence[Sequence[int]]) -> list[Edge]:
    return [(tail, head) for tail, row in enumerate(graph) for head, edge in enumerate(row) if edge]


def _shares(used: Sequence[Sequence[float]]) -> dict[Edge, float]:
    """Use of every edge over that of the busiest, on a square root scale: few edges do most of the work."""
    largest = max(max(row) for row in used) or 1.0
    return {(p, e): math.sqrt(value / largest) for p, row in enumerate(used) for e, value in enumerate(row)}


def _some(names: Iterable[str], most: int = 8) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
