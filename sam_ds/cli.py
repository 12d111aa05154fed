"""`sam-ds` and `python -m sam_ds`: the commands. Exit codes: 0 done, 2 bad input.

Here is how they are called; what each does is `sam_ds/commands/NAME.py`, imported when it is run, so that `--help`
does not wait for torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from sam_ds.errors import InputError
from sam_ds.experts.config import ROUTERS, SamConfig

_DATA = "folder of <domain>/{train,valid,test}.*, a datasets name, or 'embedded'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="sam-ds", description="Self-assembling expert graphs.")
    commands = parser.add_subparsers(dest="command", required=True)
    _convert(commands.add_parser("convert", help="a plain model to one of expert graphs, with calibration text"))
    _inspect(commands.add_parser("inspect", help="sizes, graphs and use of the experts of a converted model"))
    _assemble(commands.add_parser("assemble", help="the graph and the experts for a text of yours, without training"))
    _perplexity(commands.add_parser("perplexity", help="token-weighted perplexity of a model on held-out text"))
    _plan(commands.add_parser("plan", help="memory, bytes and time of a federation before it runs, without weights"))
    report = commands.add_parser("report", help="write report.html of a run, also of one under way")
    report.add_argument("folder", metavar="RUN", help="the run folder")
    bench = commands.add_parser("bench", help="time one part against a named peer on the same data")
    if arguments[:1] == ["bench"]:
        # Only then: the benchmarks import what they time.
        from sam_ds.bench import add_benchmarks

        add_benchmarks(bench)
    options = parser.parse_args(arguments)
    try:
        if options.command == "bench":
            return int(options.run(options))
        return int(import_module(f"sam_ds.commands.{options.command}").run(options))
    except InputError as error:
        print(f"sam-ds {options.command}: {error}", file=sys.stderr)
        return 2


_SAM_CONFIG = {
    "num_experts": ("--experts", "experts a layer; must divide its neurons"),
    "top_k": ("--active", "experts a token visits, roots included"),
    "roots": ("--roots", "experts that every token visits"),
    "root_choice": ("--root-choice", "neurons become roots whose output varies most: spread; of the largest |w g|: "
                    "saliency"),
    "features": ("--features", "cluster neurons by weights, activations or output; random: not"),
    "regroups": ("--regroups", "rounds of regrouping neurons for the routes after it"),
    "router": ("--router", "what the gate reads: " + ", ".join(ROUTERS)),
    "router_rank": ("--router-rank", "of the routers low_rank and mlp"),
    "routing": ("--routing", "visit --active on average, as scores want it: threshold; always as many: top_k"),
    "standin": ("--standin", "for experts not visited: none, mean or linear"),
    "standin_rank": ("--standin-rank", "of the linear stand-ins"),
    "allocation": ("--allocation", "visit --active in every layer: uniform; on average over them: sensitivity"),
    "density": ("--density", "share of the possible edges in the graph"),
    "graph": ("--graph", "its edges: between experts visited together, coactivation; or random"),
    "semantics": ("--semantics", "an edge lets tokens go on: reach; it carries outputs too, once trained: message"),
    "seed": ("--seed", "of all that is drawn"),
}
"""Field of SamConfig: its flag, and what it means."""


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub id of a dense causal language model")
    parser.add_argument("out", help="folder to write; it must not exist, or be empty")
    parser.add_argument("--calibration", metavar="DATA", required=True, help=_DATA + "; its train text is read")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text, evenly over the domains")
    for field, (flag, text) in _SAM_CONFIG.items():
        default = getattr(SamConfig, field)
        parser.add_argument(flag, dest=field, type=type(default), default=default, help=f"{text} (default {default})")
    parser.add_argument("--distill", metavar="STEPS", type=int, default=0,
                        help="of training the stand-ins towards the dense model after it")  # fmt: skip
    parser.add_argument("--distill-lora", metavar="RANK", type=int, default=0,
                        help="of an update of the experts trained with them and folded in (32 is good; default 0: all "
                             "experts visited stays the dense model)")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where the model is while it is converted, such as cuda")


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub id of a converted model")
    parser.add_argument("--data", metavar="DATA", help=_DATA + "; its valid text is read")
    parser.add_argument("--tokens", type=int, default=16384, help="of that text, evenly over the domains")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--svg", metavar="FILE", help="draw the graphs of all layers")


def _assemble(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub id of a model that a federation has trained")
    parser.add_argument("--data", required=True, help="text file (.txt, .jsonl, .json, .parquet), or " + _DATA
                        + "; its train text is read")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=2048, help="of that text, evenly over the domains")
    parser.add_argument("--experts", metavar="K", type=int,
                        help="to hold in each layer at most, roots included: those over which the text's loss is "
                             "lowest (all, unasked)")  # fmt: skip
    parser.add_argument("--edges", metavar="B", type=int, required=True, help="of each layer's graph, at most")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="TOML file of the run; its model may be a folder with a config.json only")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--ranks", type=int, default=8, help="of the launch (default 8)")
    parser.add_argument("--gib", type=float, default=48.0, help="memory of a rank's device (default 48)")
    parser.add_argument("--tflops", type=float, default=50.0, help="what a rank computes a second (default 50)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _perplexity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub id; a converted model is routed over its graph")
    parser.add_argument("data", help=_DATA)
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test")
    parser.add_argument("--dense", action="store_true", help="visit all experts: the merged model")
    parser.add_argument("--graph", choices=("saved", "full", "random", "zero-shot"), default="saved",
                        help="what a converted model is routed over; zero-shot: the assembler's, from 2048 tokens of "
                             "the domain's train text")  # fmt: skip
    parser.add_argument("--edges", metavar="B", type=int, help="of each layer's random or zero-shot graph")
    parser.add_argument("--seed", type=int, default=0, help="of the random graph")
    parser.add_argument("--window", type=int, default=256, help="tokens the model sees at once")
    parser.add_argument("--stride", type=int, default=256, help="new tokens a window scores")
    parser.add_argument("--batch", type=int, default=8, help="windows at once")
    parser.add_argument("--max-tokens", type=int, default=None, help="per domain; all of them by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
