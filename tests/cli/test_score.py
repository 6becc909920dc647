"""``mitigate score``: answers of any tool, scored without a model, all or nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from mitigate.benchmarks.testbed import Testbed
from mitigate.cli import main
from mitigate.records import SampleRecord
from mitigate.registry import benchmarks
from mitigate.statistics import intervals, mcnemar, paired_differences
from tests.data.toy import CONTENT, OLDER, ToyFiles, write_data

ANSWERS = {"set/1": "yes", "set/2": "yes", "set/3": "no"}
PLAIN = {"set/1": "no", "set/2": "yes", "set/3": "yes"}


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("MITIGATE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    write("answers.jsonl", ANSWERS)
    write("plain.jsonl", PLAIN)
    benchmarks().register("toyfiles", ToyFiles)
    yield
    benchmarks().unregister("toyfiles")


def write(path: str, answers: dict[str, str]) -> None:
    lines = [json.dumps({"id": key, "text": text}) + "\n" for key, text in answers.items()]
    Path(path).write_text("".join(lines))


def scored(capsys: pytest.CaptureFixture[str], *argv: str, benchmark: str = "toyfiles") -> dict[str, Any]:
    code = main(["score", benchmark, "--predictions", "answers.jsonl", "--json", *argv])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_scores_are_those_of_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    found = scored(capsys)
    assert {name: item["value"] for name, item in found["metrics"].items()} == {"accuracy": 2 / 3, "yes_rate": 2 / 3}
    about = found["metrics"]["accuracy"]
    assert (about["title"], about["percent"], about["higher_is_better"]) == ("Accuracy", True, True)
    assert found["metrics"]["yes_rate"]["higher_is_better"] is None
    assert (found["n_samples"], found["n_images"], found["warnings"]) == (3, 2, [])
    assert found["params"]["word"] == "yes"
    assert list(found["data"]) == ["data/toyfiles/questions.json"]
    assert found["data"]["data/toyfiles/questions.json"] == ToyFiles.sources[0].sha256


def test_testbed_answers_get_the_intervals_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = Testbed(limit=3, parser="official", tasks=("pope",))
    records = [
        SampleRecord(**vars(sample), text="No." if number % 3 else "yes", tokens=1, finished=True)
        for number, sample in enumerate(benchmark.samples())
    ]
    write("answers.jsonl", {record.id: record.text for record in reversed(records)})
    argv = ["--limit", "3", "benchmark.parser=official", "tasks=[pope]", "--resamples=500", "--seed", "7"]
    found = scored(capsys, *argv, benchmark="testbed")
    expected = intervals(benchmark.counts(records), benchmark.all_metrics(), 500, 7)
    assert list(found["metrics"]) == list(expected)
    for name, interval in expected.items():
        got = found["metrics"][name]
        assert (got["value"], got["low"], got["high"]) == (interval.value, interval.low, interval.high)
    assert found["unparsed_rate"] == expected["unparsed_rate"].value
    assert found["data"] == {}


@pytest.mark.parametrize(
    "argv",
    [
        ["--word", "no", "--shout"],
        ["word=no", "shout=true"],
        ["benchmark.word=no", "--shout=true"],
        ["--word=no", "--shout", "true"],
    ],
)
def test_parameters_are_given_in_three_ways(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    found = scored(capsys, *argv)
    assert (found["params"]["word"], found["params"]["shout"]) == ("no", True)
    assert found["metrics"]["yes_rate"]["value"] == 0  # "NO" does not hold "no"


@pytest.mark.parametrize("text", ["tasks=[dog,cow]", "--tasks=dog,cow", "tasks=['dog', cow]"])
def test_lists_need_no_brackets(capsys: pytest.CaptureFixture[str], text: str) -> None:
    write("answers.jsonl", {"set/1": "yes", "set/3": "no"})
    found = scored(capsys, text)
    assert (found["params"]["tasks"], found["n_samples"]) == (["dog", "cow"], 2)


def test_text_is_taken_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("true", "3", "a,b", "(x", "null"):
        assert scored(capsys, f"word={text}")["params"]["word"] == text
    assert scored(capsys, "data_dir=data", "limit=null")["params"] == {
        **ToyFiles().params(),
        "data_dir": "data",
    }


def test_a_baseline_gives_paired_differences(capsys: pytest.CaptureFixture[str]) -> None:
    found = scored(capsys, "--baseline", "plain.jsonl", "--resamples", "200")["baseline"]
    benchmark = ToyFiles()
    records = [
        [
            SampleRecord(**vars(sample), text=answers[sample.id], tokens=0, finished=True)
            for sample in benchmark.samples()
        ]
        for answers in (PLAIN, ANSWERS)
    ]
    counts = [benchmark.counts(each) for each in records]
    expected = paired_differences(*counts, benchmark.all_metrics(), 200, 0)
    assert found["differences"]["accuracy"]["value"] == pytest.approx(2 / 3)
    for name, difference in expected.items():
        for part in ("value", "low", "high", "p"):
            assert found["differences"][name][part] == getattr(difference, part)
    test = mcnemar(*({record.id: benchmark.correct(record) for record in each} for each in records))
    assert (
        (found["mcnemar"]["only_first"], found["mcnemar"]["only_second"])
        == (0, 2)
        == (
            test.only_first,
            test.only_second,
        )
    )
    assert found["mcnemar"]["p"] == test.p
    assert found["metrics"]["accuracy"]["value"] == 0
    assert main(["score", "toyfiles", "--predictions", "answers.jsonl", "--baseline", "plain.jsonl"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Accuracy │ 66.67 % │" in out
    assert "+66.67" in out
    assert "right only in plain.jsonl 0, only in answers.jsonl 2, p = 0.500" in out
    caution = "only 2 images count: the interval is too narrow (fewer than 30)"
    assert found["differences"]["accuracy"]["caution"] == caution
    assert found["cautions"] == [f"Accuracy: {caution}"]
    assert f"! difference of Accuracy: {caution}" in out


def test_partial_scores_what_is_there_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    write("answers.jsonl", {"set/1": "yes", "set/2": "no"})
    found = scored(capsys, "--partial")
    assert found["metrics"]["accuracy"]["value"] == 1
    assert (found["n_samples"], found["n_samples_of_benchmark"], found["n_images"]) == (2, 3, 1)
    assert found["warnings"] == ["only 2 of 3 samples have an answer; the others are left out"]
    assert main(["score", "toyfiles", "--predictions", "answers.jsonl"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "has no answer for 1 of 3 samples, the first is 'set/3'" in err


def test_a_part_of_what_counts_together_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyFiles, "grouped", True)
    write("answers.jsonl", {"set/3": "no", "set/1": "yes"})
    assert main(["score", "toyfiles", "--predictions", "answers.jsonl", "--partial", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "answers.jsonl:2: the 2 answers of a.png count together, but there is none for 'set/2'" in err
    write("answers.jsonl", {"set/1": "yes", "set/2": "no"})
    assert scored(capsys, "--partial")["n_samples"] == 2


def test_a_sample_that_failed_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"id": "set/1", "text": "yes"}, {"id": "set/2", "text": "", "error": "out of memory"}]
    Path("answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = scored(capsys, "--partial")
    assert (found["n_samples"], found["metrics"]["accuracy"]["value"]) == (1, 1)
    assert found["warnings"] == [
        "only 1 of 3 samples have an answer; the others are left out", "1 of those without an answer failed"
    ]  # fmt: skip


def test_answers_come_from_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(json.dumps({"n": int(key[4:]), "said": answer}) + "\n" for key, answer in ANSWERS.items())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    argv = ["--predictions", "-", "--id-field", "n", "--text-field=said", "--json"]
    assert main(["score", *argv[2:], "TOYFILES", *argv[:2]]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["accuracy"]["value"] == 2 / 3


def test_other_versions_of_the_data_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_data(tmp_path / "data", OLDER)
    assert "questions.json is an older version, of last year" in scored(capsys)["warnings"][0]
    write_data(tmp_path / "data", CONTENT.replace(b"dog", b"fox"))
    assert "questions.json is not the pinned file" in scored(capsys, "tasks=fox,cat,cow")["warnings"][0]
    write("answers.jsonl", {**ANSWERS, "set/4": ""})
    assert main(["score", "toyfiles", "--predictions", "answers.jsonl", "tasks=fox,cat,cow"]) == 2
    err = capsys.readouterr().err
    assert "no sample 'set/4'" in err
    assert "is not the pinned file" in err


def test_a_judge_is_asked_once_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    class Judged(ToyFiles):
        folders: ClassVar[list[Path]] = []

        def graded(self, records: Sequence[SampleRecord], folder: Path, report: Any = None) -> list[SampleRecord]:
            self.folders.append(folder)
            changed = [{**vars(record), "meta": {**record.meta, "judge": "gpt", "label": "no"}} for record in records]
            return [SampleRecord(**record) for record in changed]

    benchmarks().unregister("toyfiles")
    benchmarks().register("toyfiles", dataclass(frozen=True, kw_only=True)(Judged))
    found = scored(capsys, "--baseline=plain.jsonl")
    assert found["judge"] == "gpt"
    assert found["metrics"]["accuracy"]["value"] == 1 / 3
    assert Judged.folders == [Path("plain.jsonl.verdicts"), Path("answers.jsonl.verdicts")]
    scored(capsys, "--verdicts", "kept")
    assert Judged.folders[-1] == Path("kept")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["toyfile", "--predictions", "answers.jsonl"], "unknown benchmark 'toyfile'; did you mean 'toyfiles'?"),
        (["--word", "yes", "toyfiles"], "name the benchmark first: mitigate score BENCHMARK --word yes toyfiles"),
        (["--predictions", "toyfiles"], "name the benchmark first"),
        (["toyfiles"], "--predictions FILE is missing"),
        (["toyfiles", "--predictions"], "--predictions needs a value"),
        (["toyfiles", "--predictions="], "--predictions needs a value"),
        (["toyfiles", "--predictions", "--json"], "--predictions needs a value"),
        (["toyfiles", "--predictions", "no.jsonl"], "no.jsonl does not exist"),
        (["toyfiles", "--predictions", "data"], "data is a folder"),
        (["toyfiles", "--predictions", "-", "--baseline", "-"], "only one of --predictions and --baseline"),
        (["toyfiles", "answers.jsonl"], "'answers.jsonl': write KEY=VALUE for a parameter, and --predictions FILE"),
        (["toyfiles", "--prediction", "x"], "no option '--prediction'; did you mean '--predictions'?"),
        (["toyfiles", "--wrod", "yes"], "no option '--wrod'; did you mean '--word'?"),
        (["toyfiles", "wrod=yes"], "benchmark toyfiles has no parameter 'wrod'; did you mean 'word'?"),
        (["toyfiles", "model=yes"], "benchmark toyfiles has no parameter 'model'"),
        (["toyfiles", "word=a", "--word", "b"], "--word b: word is given twice"),
        (["toyfiles", "--limit", "many"], "--limit many has the wrong type: limit is int | None"),
        (["toyfiles", "shout=loud"], "shout=loud has the wrong type: shout is bool"),
        (["toyfiles", "tasks=[dog"], "cannot be read as a value"),
        (["toyfiles", "limit=0"], "benchmark.limit=0 must be at least 1"),
        (["toyfiles", "--resamples", "0"], "--resamples 0: must be a whole number, at least 1"),
        (["toyfiles", "--seed", "-1"], "--seed -1: must be a whole number, at least 0"),
        (["toyfiles", "--partial=yes"], "--partial=yes: --partial takes no value"),
        (["toyfiles", "--json", "--json"], "--json is given twice"),
        (["toyfiles", "--data", "x", "data_dir=y"], "data_dir is given twice"),
        (["toyfiles", "--data", "x"], "x/toyfiles/questions.json does not exist"),
        (["testbed", "--data", "x"], "--data x: this benchmark needs no files"),
        (["toyfiles", "--extra-metrics", "nothing"], "unknown metric 'nothing'"),
    ],
)
def test_wrong_input_is_one_clear_line(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    if "--predictions" not in argv and len(argv) > 1 and argv[0] in ("toyfiles", "testbed"):
        argv = [*argv, "--predictions", "answers.jsonl"]
    code = main(["score", *argv])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err


def test_help_says_ids_files_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--help"]) == 0
    assert "--predictions FILE" in capsys.readouterr().out
    assert main(["score", "toyfiles", "--help"]) == 0
    out = capsys.readouterr().out
    for part in ("set/1 (set/question_id)", "toyfiles/questions.json in the data folder", "mitigate data fetch toyf"):
        assert part in out
    for parameter in fields(ToyFiles):
        assert f"  {parameter.name} " in out
    assert "Any of ``dog``, ``cat`` and ``cow``. (default [dog,cat,cow])" in out
    assert main(["score"]) == 2


def test_scoring_imports_no_torch(tmp_path: Path) -> None:
    ids = [sample.id for sample in Testbed(limit=2).samples()]
    write("answers.jsonl", dict.fromkeys(ids, "yes, a red ball"))
    program = (
        "import sys; from mitigate.cli import main; "
        "code = main(['score', 'testbed', '--predictions', 'answers.jsonl', 'limit=2', '--json']); "
        "heavy = {'torch', 'transformers', 'wandb', 'PIL', 'matplotlib'} & set(sys.modules); "
        "sys.exit(code or ' '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["n_samples"] == len(ids)
