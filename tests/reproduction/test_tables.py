"""The published tables of conf/experiment: their numbers, their protocols, and what a badly written one is told.

``reported.json`` lists the cells that are used: arXiv number, table, model, row, benchmark, metric, value. It was
copied from the papers apart from the experiments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from mitigate.compose import compose_comparison, compose_run
from mitigate.compose.session import Session, session
from mitigate.errors import ConfigError
from mitigate.registry import benchmarks, methods
from mitigate.reproduction import Published, read_protocol, read_tables
from mitigate.reproduction.planning import plan_jobs, read_overrides

CONF = Path(__file__).parents[2] / "conf"
REPORTED = {tuple(cell[:6]): cell[6] for cell in json.loads(Path(__file__).with_name("reported.json").read_text())}
SGRS_COLUMNS = {
    "POPE R": ("POPE", "Recall"), "POPE F1": ("POPE", "F1"), "POPE Acc": ("POPE", "Accuracy"),
    "CHAIR_S": ("CHAIR", "CHAIR_S"), "CHAIR_I": ("CHAIR", "CHAIR_I"),
    "Recall": ("CHAIR", "Recall"), "Len": ("CHAIR", "Length"),
    **{task: ("MME", task) for task in ("Existence", "Count", "Position", "Color", "Total")},
}  # fmt: skip
ADVERSARIAL = {"HR": ("POPE-Adversarial", "HR (%)"), "Acc": ("POPE-Adversarial", "Accuracy (%)")}
#: Experiment -> its table's name in the list, and column -> benchmark and metric as printed.
TABLES: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "sgrs-table1": ("Table 1", SGRS_COLUMNS),
    "sgrs-table2": ("Table 2", SGRS_COLUMNS),
    "sgrs-table3": ("Table 3", SGRS_COLUMNS),
    "sgrs-table5": ("Table 5", SGRS_COLUMNS),
    "scr-main": ("v1 main table", ADVERSARIAL | {"CIDEr": ("COCO captions", "CIDEr")}),
    "scr-pope-splits": (
        "v1 POPE splits",
        {f"HR {split.lower()}": (f"POPE-{split}", "HR (%)") for split in ("Random", "Popular", "Adversarial")},
    ),
    "scr-chair": ("v1 CHAIR", {name: ("CHAIR", name) for name in ("CHAIR-s", "CHAIR-i")}),
    "scr-ablation": ("v1 ablation", ADVERSARIAL),
}
#: Where a row is called otherwise in the list: experiment, stack -> table, row; {} is the model's beta.
ROWS = {
    ("sgrs-table3", "none"): ("Table 3", "alpha=0.0, beta=0.00"),
    ("sgrs-table3", "locore"): ("Table 3", "alpha=0.0, beta={}"),
    ("sgrs-table3", "sgrs"): ("Table 3", "alpha=0.6, beta=0.00"),
    ("sgrs-table3", "sgrs+locore"): ("Table 3", "alpha=0.6, beta={}"),
    ("sgrs-table3", "sgrs+locore-beta-1"): ("Table 3", "alpha=0.6, beta=1.00"),
    ("sgrs-table3", "sgrs+locore-alpha-0.9"): ("text", "SGRS+LocoRE, alpha=0.9"),
    ("sgrs-table5", "sgrs+locore"): ("Table 5", "SGRS+LocoRE, decay r=1.0"),
    ("scr-ablation", "none"): ("v1 main table", "vanilla"),
    ("scr-ablation", "scr"): ("v1 ablation", "SCR 8-connected"),
    ("scr-ablation", "scr-four-connected"): ("v1 ablation", "SCR 4-connected"),
    ("scr-ablation", "scr-radius2"): ("v1 ablation", "SCR radius-2"),
    ("scr-ablation", "scr-gaussian-noise"): ("v1 ablation", "Gaussian-noise control"),
}
BETA = {"llava-1.5-7b": "0.15", "qwen2-vl-7b": "0.20"}


@pytest.fixture
def hydra() -> Iterator[Session]:
    with session() as opened:
        yield opened


@pytest.fixture(scope="module")
def tables() -> dict[str, Published]:
    with session() as opened:
        return read_tables(opened)


def test_every_published_number_is_a_reported_cell_and_none_is_forgotten(tables: dict[str, Published]) -> None:
    assert set(tables) == set(TABLES)
    used = set()
    for name, published in tables.items():
        table, columns = TABLES[name]
        for model, own in published.models.items():
            for stack, row in own.rows.items():
                where, printed = ROWS.get((name, stack), (table, published.names[stack]))
                printed = printed.format(BETA.get(model, ""))
                for column, cell in row.items():
                    key = (published.arxiv.removesuffix("v1"), where, own.printed, printed, *columns[column])
                    assert REPORTED[key] == cell.value, key
                    used.add(key)
    assert used == set(REPORTED)


def test_nothing_is_published_for_methods_whose_tables_nobody_could_read(tables: dict[str, Published]) -> None:
    stacks = {stack for published in tables.values() for stack in published.names}
    assert not {stack for stack in stacks if "dleaf" in stack or "clva" in stack}
    assert "qwen-vl-7b" not in {model for published in tables.values() for model in published.models}


def test_contradictions_are_carried_with_the_value(tables: dict[str, Published]) -> None:
    first, second = (tables[name].models["llava-1.5-7b"].rows["locore"]["CHAIR_I"] for name in list(TABLES)[:2])
    assert (first.value, second.value) == (11.2, 10.2)
    assert "10.2" in first.note
    assert "11.2" in second.note
    stand_ins = {model: own.stand_in for model, own in tables["sgrs-table2"].models.items() if own.stand_in}
    assert set(stand_ins) == {"internvl-7b", "internvl-13b"}


@pytest.mark.parametrize("name", TABLES)
def test_as_an_experiment_it_is_the_comparison_of_one_of_its_models(
    name: str, hydra: Session, tables: dict[str, Published]
) -> None:
    content, published = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text()), tables[name]
    protocol, model = content["defaults"]
    assert protocol in published.protocols
    stacks = published.stacks(model["override /model"], read_protocol(hydra, protocol))
    assert sorted(content["stacks"]) == sorted({"none", *stacks})
    known = hydra.options("stack")
    assert set(content["stacks"]) <= {*known, *methods().names()}


def test_settings_and_columns_exist_and_every_column_is_measured_once(
    hydra: Session, tables: dict[str, Published]
) -> None:
    for published in tables.values():
        protocols = [read_protocol(hydra, name) for name in published.protocols]
        measured = [column for protocol in protocols for column in protocol.columns]
        assert len(measured) == len(set(measured))
        columns = {column for own in published.models.values() for row in own.rows.values() for column in row}
        assert columns <= set(measured)
        for protocol in protocols:
            plugin = benchmarks().get(protocol.benchmark)
            for key in protocol.settings:
                section, _, rest = key.partition(".")
                if section == "benchmark":
                    assert rest in plugin.__dataclass_fields__, f"{protocol.name}: {key}"
                if section == "methods":
                    method, _, parameter = rest.partition(".")
                    assert parameter in ("preset", *methods().get(method).__dataclass_fields__), key
            assert set(protocol.testbed_columns) <= set(protocol.columns)


#: Protocol -> what must come out, written down by hand from the protocol's description.
PINNED: list[tuple[str, dict[str, Any]]] = [
    ("sgrs-protocol-chair", {
        "benchmark.prompt": "Please describe this image in detail.", "benchmark.limit": None,
        "benchmark.manifest": None, "benchmark.lemmatizer": "wordnet",
        "benchmark.drop_incomplete_sentence": False, "benchmark.answer_tokens": None, "decoding.max_new_tokens": 512,
        "decoding.do_sample": False, "decoding.num_beams": 1,
    }),
    ("sgrs-protocol-pope", {
        "benchmark.prompt": "{question} Please just answer yes or no.", "benchmark.answer_tokens": 1024,
        "benchmark.parser": "official", "benchmark.dataset": "coco", "benchmark.limit": None,
        "benchmark.splits": ["random", "popular", "adversarial"], "decoding.do_sample": False,
    }),
    ("sgrs-protocol-mme", {
        "benchmark.tasks": ["existence", "count", "position", "color"], "benchmark.prompt": "{question}",
        "benchmark.limit": None,
    }),
    ("scr-protocol-adversarial", {
        "benchmark.splits": ["adversarial"], "benchmark.prompt": "{question}", "benchmark.parser": "official",
        "benchmark.limit": None, "benchmark.answer_tokens": 10,
    }),
    ("scr-protocol-chair", {
        "benchmark.limit": 3000, "benchmark.prompt": "Provide a one-sentence caption for the provided image.",
        "decoding.max_new_tokens": 64, "benchmark.lemmatizer": "wordnet",
    }),
    ("scr-protocol-cider", {
        "benchmark.prompt": "Provide a one-sentence caption for the provided image.", "benchmark.answer_tokens": 64,
        "benchmark.limit": None, "benchmark.tokenizer": "simple",
    }),
]  # fmt: skip
#: Table -> stack -> method's parameters, by hand from the papers and the official code.
STACKS: dict[str, dict[str, dict[str, Any]]] = {
    "sgrs-table3": {
        "none": {},
        "locore": {"locore.beta": 0.15, "locore.layers": "all", "locore.mode": "post_raw"},
        "sgrs": {"sgrs.alpha": 0.6, "sgrs.top_k": 5, "sgrs.max_resample": 3, "sgrs.window": 5, "sgrs.layers": "6-8"},
        "sgrs+locore": {"sgrs.alpha": 0.6, "locore.beta": 0.15, "sgrs.proposal": "sample"},
        "sgrs+locore-beta-1": {"sgrs.alpha": 0.6, "locore.beta": 1.0},
        "sgrs+locore-alpha-0.9": {"sgrs.alpha": 0.9, "locore.beta": 0.15},
    },
    "scr-ablation": {
        "none": {},
        "scr": {"scr.lam": 1.1, "scr.k_src": 32, "scr.layers": "0-15", "scr.diagnostic_layers": "8-16"},
        "scr-four-connected": {"scr.neighbourhood": "4", "scr.layers": "0-15"},
        "scr-radius2": {"scr.neighbourhood": "radius2", "scr.layers": "0-15"},
        "scr-gaussian-noise": {"scr.injection": "gaussian_noise", "scr.layers": "0-15"},
    },
}


@pytest.mark.parametrize(("protocol", "expected"), PINNED, ids=lambda item: item if type(item) is str else "")
def test_protocols_do_not_change_unnoticed(protocol: str, expected: dict[str, Any]) -> None:
    run = compose_run([f"experiment={protocol}", "model=llava-1.5-7b"])
    for key, value in expected.items():
        section, _, parameter = key.partition(".")
        assert run.config[section][parameter] == value, key
    assert "reproduction" not in run.config  # a record holds nothing that was published


@pytest.mark.parametrize("name", STACKS)
def test_rows_have_the_published_parameters(name: str, tables: dict[str, Published]) -> None:
    model, stacks = next((model, own.rows) for model, own in tables[name].models.items())
    benchmark = "chair" if name == "sgrs-table3" else "pope"
    (job,) = plan_jobs(tables[name], read_overrides([f"model={model}", f"benchmark={benchmark}"]))
    found = {run.stack_name: run for run in job.runs}
    assert set(found) == set(stacks) == set(STACKS[name])
    for stack, parameters in STACKS[name].items():
        assert (not parameters) == (not found[stack].methods)
        for key, value in parameters.items():
            method, _, parameter = key.partition(".")
            assert getattr(found[stack].methods[method], parameter) == value


def test_what_is_published_never_reaches_a_run_and_every_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="reproduction"):
        compose_run(["reproduction.table=x"])
    with session() as hydra:
        assert "models" in hydra.load_raw("experiment/sgrs-table1").reproduction
        assert "reproduction" not in hydra.merge(["experiment=sgrs-table1"])
        monkeypatch.setattr("omegaconf.OmegaConf.load", lambda *_: pytest.fail("a file is read again"))
        assert "reproduction" not in hydra.merge(["experiment=sgrs-table1", "seed=3"])
        assert hydra.load_raw("experiment/sgrs-table1").reproduction.table == "Table 1"


def test_beam_search_is_one_row_and_not_the_others() -> None:
    runs = compose_comparison(["stacks=[none,beam]"])
    assert [run.config["decoding"]["num_beams"] for run in runs] == [1, 5]


MODELS = """
  models:
    testbed:
      printed: Small
      rows: {none: {A: 1.0}}
"""
TABLE = """# @package _global_
reproduction:
  paper: A paper
  arxiv: 2600.00001v1
  table: Table 1
  protocols: [toy]
  vanilla: none
  names: {none: baseline}
"""


class Files:
    """Stands for a Hydra session over experiments given as text."""

    def __init__(self, **files: str) -> None:
        self.files = files

    def options(self, group: str) -> list[str]:
        return sorted(self.files)

    def load_raw(self, path: str) -> Any:
        return OmegaConf.create(yaml.safe_load(self.files[path.removeprefix("experiment/")]) or {})

    def defaults_of(self, path: str) -> list[Any]:
        return []


def read(text: str) -> dict[str, Published]:
    return read_tables(Files(mine=text))  # type: ignore[arg-type]


def test_a_table_is_read() -> None:
    published = read(TABLE + MODELS)["mine"]
    assert published.models["testbed"].rows["none"]["A"].value == 1.0
    assert read(TABLE) == {}  # without models it is no table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE.replace("  vanilla: none\n", "") + MODELS, "reproduction.vanilla is missing"),
        (TABLE + "  nots: [x]" + MODELS, "reproduction.nots is unknown; known: paper, arxiv"),
        (TABLE + MODELS.replace("1.0", "abc"), "models.testbed.rows.none.A must be a number"),
        (TABLE + MODELS.replace("1.0", "true"), "models.testbed.rows.none.A must be a number"),
        (TABLE + MODELS.replace("1.0", "{value: 1, remark: x}"), "rows.none.A.remark is unknown"),
        (TABLE + MODELS.replace("none:", "other:"), "models.testbed.rows.other has no name in `names`"),
        (TABLE + MODELS.replace("{none: {A: 1.0}}", "3"), "models.testbed.rows must be a mapping"),
        (TABLE + "  notes: [{a: 1}]" + MODELS, "reproduction.notes must be a list of texts"),
    ],
)
def test_a_badly_written_table_names_file_and_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value).startswith("conf/experiment/mine.yaml: ")
    assert message in str(caught.value)


def test_a_protocol_needs_columns_a_benchmark_and_known_sources() -> None:
    with pytest.raises(ConfigError, match=r"protocol 'absent' is no experiment"):
        read_protocol(Files(), "absent")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs columns, and `override /benchmark`"):
        read_protocol(Files(toy="reproduction: {columns: {A: a}}"), "toy")  # type: ignore[arg-type]
