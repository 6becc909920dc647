"""Everything README shows is run: commands, Python, tables."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mitigate.cli import main
from mitigate.registry import methods
from mitigate.testing.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    inline = re.findall(r"`(mitigate (?:run|compare|plan|list|diagnose|trace) [^`]+)`", README)
    found = [re.sub(r"\s+#.*", "", line).strip() for line in lines + inline]
    return [line for line in found if line and "sharpen" not in line]


#: What keeps a run small; commands that take no such override are left as they are.
SMALL = ["benchmark.limit=2", "decoding.max_new_tokens=8", "tracker=none"]


def small(command, folder):
    words = shlex.split(command)
    name = words[1] if words[0] == "mitigate" else "compare"
    if name in ("diagnose", "trace"):
        size = [word for word in SMALL if name == "diagnose" or word.startswith("decoding")]
        return [*words, *size, f"runs_dir={folder}"]
    if name in ("run", "compare"):
        if "-m" in words:
            words = [word for word in words if not word.startswith("benchmark.limit")]
            return [*words, "benchmark.limit=2", "tracker=none", f"runs_dir={folder}"]
        return [*words, *SMALL, f"runs_dir={folder}"]
    return words


@pytest.mark.parametrize("command", [line for line in commands() if "test.sh" not in line])
def test_command(command, tmp_path, monkeypatch, capsys):
    if "FOLDER" in command:  # a checkpoint of the user's
        tiny = tiny_model("smolvlm")
        for part in (tiny.model, tiny.processor):
            part.save_pretrained(tmp_path / "checkpoint")
        command = command.replace("FOLDER", str(tmp_path / "checkpoint"))
    words = small(command, tmp_path)
    if words[0] == "mitigate":  # in this process: starting one costs more than most of the commands
        monkeypatch.chdir(tmp_path)
        code = main(words[1:])
        written = capsys.readouterr()
        assert code == 0, written.err[-2000:]
        assert written.out
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout


def test_test_command_is_what_ci_runs():
    """This test runs inside `scripts/test.sh`, so the command itself is not run again."""
    assert "bash scripts/test.sh" in commands()
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_python_example():
    example, plugin = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rows_edited" in done.stdout
    assert plugin.startswith("from dataclasses")


def test_plugin_example_is_a_method_that_works():
    import torch

    from mitigate import Stack
    from tests.references.tiny import make_inputs, tiny_llava

    namespace: dict = {"__name__": "readme_plugin"}
    sys.modules["readme_plugin"] = type(sys)("readme_plugin")
    exec(blocks("python")[1], namespace)
    model = tiny_llava(seed=0)
    inputs = make_inputs(model, [(3, 1, 4)])
    plain = model(**inputs).logits
    with Stack([namespace["Sharpen"](power=3.0)]).attach(model) as handle:
        assert not torch.equal(model(**inputs).logits, plain)
        assert handle.telemetry()[0]["sharpen"]["rows_edited"] == 3


def test_method_table_is_complete_and_true():
    """The table is generated (tests/test_docs.py); this reads it as a visitor does."""
    table = README.partition("<!-- method table: begin -->")[2].partition("<!-- method table: end -->")[0]
    rows = dict(re.findall(r"^\| \[?`(\w+)`[^|]* \| ([^|]+?) \|", table, re.MULTILINE))
    assert rows == {name: methods().get(name).summary for name in methods().names()}
    for name in rows:
        line = next(line for line in table.splitlines() if re.match(rf"\| \[?`{name}`", line))
        method = methods().get(name)
        assert f"| {method.fidelity.value} |" in line
        assert (f"[arXiv {method.paper.arxiv}]" if method.paper else "| – |") in line


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
