"""The README keeps its promises: the example runs as it is printed, and there are exactly two set-up commands."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_example_runs(tiny, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    words = (tiny.corpus / "ships" / "train.jsonl").read_text()
    (tmp_path / "CALIBRATION.txt").write_text(words * 20)
    monkeypatch.chdir(tmp_path)
    seen = {}
    # The tiny model's hidden size leaves no room for the default rank of the stand-ins, nor its context for 256.
    code = code.replace("PATH_OR_HUB_ID", str(tiny.model)).replace("256", "32")
    code = code.replace("top_k=12)", "top_k=12, standin_rank=4)")
    exec(code, seen)
    assert type(seen["dense"]).__name__ == "LlamaForCausalLM"
    assert (tmp_path / "sam-model" / "sam_config.json").is_file()


def test_there_are_two_set_up_commands_of_one_line():
    section = README.split("## Set up")[1].split("\n## ")[0]
    blocks = re.findall(r"```\n(.*?)```", section, flags=re.DOTALL)
    assert [block.count("\n") for block in blocks] == [1, 1]
    assert "launch/run_federation.py" in blocks[0] and "pytest" in blocks[1]
