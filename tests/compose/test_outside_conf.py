"""Configuration files of other packages: presets, models, tuned values, and what two packages both bring."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mitigate.cli import main
from mitigate.compose import compose_comparison, compose_run
from mitigate.compose.packages import brought_files
from mitigate.compose.session import session
from mitigate.errors import ConfigError, DuplicateName, UnknownName
from tests.outside import install, method, visible

See = Callable[..., None]
PRESET = "# @package _global_\ndefaults:\n  - override /methods: [foo]\nmethods:\n  foo:\n    gain: 2.0\n"
EXPERIMENT = "# @package _global_\ndefaults:\n  - override /stack: mitigate_foo_strong\nseed: 5\n"
MODEL = "name: small\npath: a/b\nfamily: llava\nlayers: 4\nheads: 2\nkv_heads: 2\n"
FILES = {
    "foo.py": method(),
    "conf/stack/mitigate_foo_strong.yaml": PRESET,
    "conf/model/small.yaml": MODEL,
    "conf/experiment/foo_sweep.yaml": EXPERIMENT,
    "conf/tuned/llava-1.5-7b.yaml": "foo:\n  gain: 0.5\n",
    "conf/tuned/small.yaml": "foo: {layers: 1-2}\n",
}
POINTS = {"methods": {"foo": "{}.foo:Foo"}, "configs": {"conf": "{}.conf"}}
LLAVA = ["model=llava-1.5-7b", "methods=[foo]"]


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> Iterator[See]:
    """Make folders of packages visible until the test ends."""
    with ExitStack() as undo:
        yield lambda *sites: undo.enter_context(visible(monkeypatch, *sites))


@pytest.fixture
def foo(tmp_path: Path, see: See) -> Path:
    package = install(tmp_path, "mitigate-foo", FILES, POINTS)
    see(tmp_path)
    return package


def bar(site: Path, **files: str) -> None:
    """Install a second package; ``stack__x`` is the file ``conf/stack/x.yaml``."""
    paths = {f"conf/{name.replace('__', '/')}.yaml": text for name, text in files.items()}
    install(site, "mitigate-bar", {"conf/__init__.py": "", **paths}, {"configs": {"conf": "{}.conf"}})


@pytest.mark.usefixtures("foo")
def test_presets_models_and_experiments_come_from_the_package() -> None:
    run = compose_run(["model=small", "experiment=foo_sweep"])
    assert run.facts is not None
    assert (run.facts.layers, run.config["seed"], run.stack_name) == (4, 5, "mitigate_foo_strong")
    assert run.methods["foo"].params() == {"gain": 2.0, "layers": "1-2"}
    assert run.provenance["methods.foo.gain"] == "stack mitigate_foo_strong"
    assert run.provenance["methods.foo.layers"] == "model small (mitigate-foo)"
    assert run.provenance["model.path"] == "model small"
    both = compose_comparison(["stacks=[none,foo+clva,mitigate_foo_strong]"])
    assert [item.stack_name for item in both] == ["none", "foo+clva", "mitigate_foo_strong"]


@pytest.mark.usefixtures("foo")
def test_tuned_values_rank_as_those_of_the_models_file() -> None:
    """Above the default, below a preset and the command line; and they are part of what the run is."""
    run = compose_run(LLAVA)
    assert run.methods["foo"].params()["gain"] == run.config["methods"]["foo"]["gain"] == 0.5
    assert run.provenance["methods.foo.gain"] == "model llava-1.5-7b (mitigate-foo)"
    assert compose_run([*LLAVA, "methods.foo.gain=0.5"]).digest == run.digest
    assert compose_run([*LLAVA, "methods.foo.gain=0.6"]).digest != run.digest
    assert compose_run(["methods=[foo]"]).config["methods"]["foo"]["gain"] == 1.0
    preset = compose_run(["model=llava-1.5-7b", "stack=mitigate_foo_strong"])
    assert (preset.config["methods"]["foo"]["gain"], preset.provenance["methods.foo.gain"]) == (
        2.0,
        "stack mitigate_foo_strong",
    )
    copy = compose_run([*LLAVA, "+methods.late={name: foo}"])
    assert copy.config["methods"]["late"]["gain"] == 0.5
    assert "tuned" not in run.config["model"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fooo: {gain: 1}", "mitigate-foo: fooo: unknown method; did you mean 'foo'"),
        ("foo: {gian: 1}", "mitigate-foo: foo has no parameter 'gian'; did you mean 'gain'"),
        ("foo: {gain: much}", "mitigate-foo: foo.gain=much has the wrong type: gain is float"),
        ("foo: 3", r"mitigate-foo must hold METHOD: \{PARAMETER: VALUE\}"),
        ("- foo", r"mitigate-foo must hold METHOD: \{PARAMETER: VALUE\}"),
        ("foo: {gain: [", "mitigate-foo cannot be read"),
    ],
)
def test_a_wrong_file_of_tuned_values_is_named_with_its_package(foo: Path, text: str, message: str) -> None:
    (foo / "conf" / "tuned" / "llava-1.5-7b.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"conf/tuned/llava-1.5-7b.yaml of {message}") as refused:
        compose_run(LLAVA)
    assert len(str(refused.value).splitlines()) <= 2
    assert compose_run(["methods=[foo]"]).config["methods"]["foo"]["gain"] == 1.0


def test_a_refused_value_names_the_package_it_came_from(tmp_path: Path, see: See) -> None:
    source = method() + "\n    def __post_init__(self):\n        self.require(self.gain < 9, 'gain', 'be below 9')\n"
    files = {**FILES, "foo.py": source, "conf/tuned/llava-1.5-7b.yaml": "foo: {gain: 10}"}
    install(tmp_path, "mitigate-foo", files, POINTS)
    see(tmp_path)
    with pytest.raises(ConfigError, match=r"must be below 9\nthe value comes from model llava-1.5-7b \(mitigate-foo\)"):
        compose_run(LLAVA)


def test_enums_and_literals_are_written_by_name_or_value(tmp_path: Path, see: See) -> None:
    """The defaults are enum members; what is no choice is refused with the choices and where it came from."""
    source = "import enum\nfrom typing import Literal\nclass Colour(enum.Enum):\n    RED = 'red'\n    BLUE = 'blue'\n"
    fields = "    colour: Colour = Colour.RED\n    mode: Literal['a', 'b'] = 'a'\n    gain: float = 1.0\n"
    tuned = {"conf/tuned/small.yaml": "foo: {mode: c}", "conf/stack/red.yaml": PRESET.replace("gain: 2.0", "mode: d")}
    files = {**FILES, **tuned, "foo.py": source + method().replace("    gain: float = 1.0\n", fields)}
    install(tmp_path, "mitigate-foo", files, POINTS)
    see(tmp_path)
    assert compose_run(["methods=[foo]"]).config["methods"]["foo"]["colour"] == "red"
    named, valued = (compose_run(["methods=[foo]", f"methods.foo.colour={word}"]) for word in ("BLUE", "blue"))
    assert named.methods == valued.methods
    assert named.digest == valued.digest
    for overrides, message in (
        (["methods=[foo]", "methods.foo.colour=green"], r"^methods.foo.colour=green is none of red, blue$"),
        (["model=small", "methods=[foo]"], r"of mitigate-foo: foo.mode=c is none of a, b"),
        (["stack=red"], r"^methods.foo.mode=d \(from stack red\) is none of a, b$"),
    ):
        with pytest.raises(ConfigError, match=message):
            compose_run(overrides)


def test_a_mapping_is_planned_with_its_source(tmp_path: Path, see: See, capsys: pytest.CaptureFixture[str]) -> None:
    field = "    table: dict[str, float] = field(default_factory=lambda: {'a': 1.0})\n    gain: float = 1.0\n"
    source = "from dataclasses import field\n" + method().replace("    gain: float = 1.0\n", field)
    install(tmp_path, "mitigate-foo", {**FILES, "foo.py": source}, POINTS)
    see(tmp_path)
    assert main(["plan", "methods=[foo]", "methods.foo.table={b: 2}"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "methods.foo.table.b" in line)
    assert "2.0" in row
    assert "command line" in row


def test_one_value_from_two_packages(tmp_path: Path, see: See) -> None:
    """Refused with both; another parameter of the same method is no clash, nor is a run without the method."""
    install(tmp_path, "mitigate-foo", FILES, POINTS)
    bar(tmp_path, **{"tuned__llava-1.5-7b": "foo: {gain: 0.7}", "tuned__small": "foo: {gain: 0.7}"})
    see(tmp_path)
    file = "conf/tuned/llava-1.5-7b.yaml of mitigate"
    with pytest.raises(
        ConfigError, match=rf"gain is tuned twice: {file}-(foo|bar): foo and {file}-(foo|bar): foo; take"
    ):
        compose_run(LLAVA)
    assert compose_run(["model=llava-1.5-7b", "stack=clva"]).stack_name == "clva"
    assert compose_run(["model=small", "methods=[foo]"]).methods["foo"].params() == {"gain": 0.7, "layers": "1-2"}


def test_a_value_of_the_models_own_file_and_of_a_package(tmp_path: Path, see: See) -> None:
    install(tmp_path, "mitigate-foo", {**FILES, "conf/model/small.yaml": MODEL + "tuned: {foo: {layers: '0'}}"}, POINTS)
    see(tmp_path)
    both = r"conf/model/small.yaml of mitigate-foo: tuned.foo and conf/tuned/small.yaml of mitigate-foo: foo"
    with pytest.raises(ConfigError, match=f"layers is tuned twice: {both}"):
        compose_run(["model=small", "methods=[foo]"])


@pytest.mark.parametrize(
    ("files", "choice", "file"),
    [
        ({"stack__mitigate_foo_strong": PRESET}, "stack=mitigate_foo_strong", "stack/mitigate_foo_strong"),
        ({"stack__mitigate_foo_strong": PRESET}, "experiment=foo_sweep", "stack/mitigate_foo_strong"),
        ({"model__small": MODEL}, "model=small", "model/small"),
        ({"model__testbed": MODEL}, "model=testbed", "model/testbed"),
        ({"experiment__foo_sweep": "# @package _global_\nseed: 6\n"}, "experiment=foo_sweep", "experiment/foo_sweep"),
    ],
)
def test_one_file_of_two_packages(tmp_path: Path, see: See, files: dict[str, str], choice: str, file: str) -> None:
    """Hydra would take the first without a word."""
    install(tmp_path, "mitigate-foo", FILES, POINTS)
    bar(tmp_path, **files)
    see(tmp_path)
    with pytest.raises(DuplicateName, match=rf"conf/{file}.yaml comes from both mitigate\S* and mitigate-\w+; rename"):
        compose_run([choice])
    assert compose_run(["stack=none", "model=llava-1.5-7b"]).methods == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: [\n", r"cannot be read: \S+mitigate_bar_x.yaml, line 2: expected the node"),
        ("# @package _global_\ndefaults:\n  - override /methods: [clva, 3]\n", "cannot be read: .* must be strings"),
        ("# @package _global_\n# caf\xe9\n", "cannot be read: 'utf-8' codec"),
        ("defaults:\n  - override /methods: [clva]\n", "must begin with the line: # @package _global_"),
    ],
)
def test_a_preset_that_cannot_be_read(tmp_path: Path, see: See, text: str, message: str) -> None:
    """Named with its package where it is chosen; an error of the command at least where another file chooses it."""
    bar(tmp_path, stack__mitigate_bar_x="", experiment__mitigate_bar_e=EXPERIMENT.replace("foo_strong", "bar_x"))
    (tmp_path / "mitigate_bar" / "conf" / "stack" / "mitigate_bar_x.yaml").write_text(text, encoding="latin-1")
    see(tmp_path)
    with pytest.raises(ConfigError, match=f"conf/stack/mitigate_bar_x.yaml of mitigate-bar {message}"):
        compose_run(["stack=mitigate_bar_x"])
    with pytest.raises(ConfigError) as refused:
        compose_run(["experiment=mitigate_bar_e"])
    assert len(str(refused.value).splitlines()) <= 2
    assert compose_run(["stack=clva"]).stack_name == "clva"


def test_a_preset_that_names_no_file(tmp_path: Path, see: See) -> None:
    bar(tmp_path, stack__bar="# @package _global_\ndefaults:\n  - gone\n")
    see(tmp_path)
    with pytest.raises(ConfigError, match=r"^In 'stack/bar': Could not load 'stack/gone'\.$"):
        compose_run(["stack=bar"])


def test_a_file_where_options_are_generated(tmp_path: Path, see: See) -> None:
    bar(tmp_path, methods__clva="weight: 3\n")
    see(tmp_path)
    with pytest.raises(ConfigError, match=r"conf/methods/clva.yaml of mitigate-bar stands in the way"):
        compose_run(["methods=[clva]"])


def test_only_what_a_run_selects_is_imported(tmp_path: Path, see: See) -> None:
    install(tmp_path, "mitigate-foo", {**FILES, "foo.py": "raise SystemExit(1)"}, POINTS)
    see(tmp_path)
    assert list(compose_run(["methods=[clva]", "model=llava-1.5-7b"]).methods) == ["clva"]
    assert "mitigate_foo.foo" not in sys.modules
    with pytest.raises(Exception, match="'foo' of mitigate-foo cannot be imported: SystemExit: 1"):
        compose_run(["stack=mitigate_foo_strong"])


def test_an_unreadable_package_of_files_is_named_when_one_of_its_options_is_missed(tmp_path: Path, see: See) -> None:
    install(tmp_path, "mitigate-foo", {**FILES, "conf/__init__.py": "import no_such_module"}, POINTS)
    see(tmp_path)
    assert compose_run(["methods=[foo]"]).config["methods"]["foo"]["gain"] == 1.0
    with pytest.raises(UnknownName, match=r"(?s)stack=mitigate_foo_strong is unknown.*mitigate-foo cannot be imported"):
        compose_run(["stack=mitigate_foo_strong"])
    with session() as hydra:
        assert "mitigate:mitigate-foo" not in {place.provider for place in hydra.search_path()}


def test_the_search_path_names_every_package(foo: Path) -> None:
    (foo / "conf" / "__init__.py").unlink()  # a folder of files is a package for Python without it, too
    with session() as hydra:
        places = {place.provider: place for place in hydra.search_path()}
    assert places["mitigate:mitigate-foo"].path == "pkg://mitigate_foo.conf"
    assert places["mitigate:mitigate-foo"].folder == str(foo / "conf")
    assert places["main"].path == "pkg://mitigate.conf"


def test_files_that_nothing_reads_are_told(tmp_path: Path, see: See) -> None:
    bar(tmp_path, stacks__x="a: 1", tuned__llava="foo: {}", config="seed: 3", stack__bar_x=PRESET)
    see(tmp_path)
    (tmp_path / "mitigate_bar" / "conf" / "stack" / "y.yml").touch()
    with session() as hydra:
        found = {item.distribution: item for item in brought_files(hydra)}
    assert found["mitigate"].unused == []
    assert found["mitigate-bar"].files == ["stack/bar_x"]
    assert [told.partition(":")[0] for told in found["mitigate-bar"].unused] == [
        "config.yaml",
        "stack/y.yml",
        "stacks/x.yaml",
        "tuned/llava.yaml",
    ]
    assert "no model of that name" in found["mitigate-bar"].unused[-1]
