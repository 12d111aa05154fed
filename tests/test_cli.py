"""The commands: what they print and their exit codes."""

import json

from sam_ds.cli import main


def test_perplexity_of_a_converted_model_sparse_and_dense(tiny, capsys):
    headlines = {}
    for name, flags in (("sparse", []), ("dense", ["--dense"])):
        sizes = ["--window", "32", "--stride", "32"]
        assert main(["perplexity", str(tiny.base), str(tiny.corpus), "--json", *sizes, *flags]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["sparse"] is (name == "sparse") and set(result["domains"]) == {"gardens", "numbers", "ships"}
        headlines[name] = result["headline"]
    main(["perplexity", str(tiny.model), str(tiny.corpus), "--json", "--window", "32", "--stride", "32"])
    plain = json.loads(capsys.readouterr().out.splitlines()[-1])["headline"]
    assert abs(headlines["dense"] / plain - 1) < 1e-4 < abs(headlines["sparse"] / plain - 1)


def test_bad_input_ends_with_2_and_says_what(tiny, tmp_path, capsys):
    for arguments, words in (
        (["perplexity", str(tiny.base), str(tmp_path / "none")], "none"),
        (["perplexity", str(tmp_path / "none"), str(tiny.corpus)], "cannot be loaded"),
        (["perplexity", str(tiny.base), str(tiny.corpus), "--stride", "999"], "--stride"),
        (["report", str(tmp_path)], "no metrics.jsonl"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
