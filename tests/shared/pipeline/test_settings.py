from __future__ import annotations

import string
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, model_validator

from shared.pipeline.settings import (
    HIDDEN,
    Loaded,
    SettingsError,
    describe,
    load_settings,
    markdown_table,
    settings_of,
)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Broker(Section):
    host: str = Field("localhost", min_length=1, json_schema_extra={"env": "RABBITMQ_HOST"})
    """Where the broker runs,
    by name."""
    port: int = Field(5672, ge=1, le=65535, json_schema_extra={"env": "RABBITMQ_PORT"})
    password: SecretStr = Field(SecretStr(""), min_length=3, json_schema_extra={"env": "RABBITMQ_PASSWORD"})


class Limits(Section):
    seconds: float = Field(1.5, gt=0)
    attempts: int | None = Field(None, ge=1)


class Work(Section):
    mode: Literal["fast", "careful"] = "fast"
    colour: Colour = Colour.RED
    levels: tuple[str, ...] = ("L1", "L2")
    pair: tuple[int, float] = (1, 2.0)
    names: dict[str, int] = Field(default_factory=dict)
    verbose: bool = False
    folder: Path = Path("out")
    code: Annotated[str, StringConstraints(pattern=r"^[a-z]+$")] = "abc"
    limits: Limits = Limits()
    low: int = 0
    high: int = 10

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Remote(Section):
    url: str
    token: SecretStr


class Everything(Section):
    broker: Broker = Broker()
    work: Work = Work()
    remote: Remote | None = None


def load(environ: dict[str, str] | None = None, file: Path | None = None, **overrides: str) -> Loaded[Everything]:
    dotted = {name.replace("__", "."): text for name, text in overrides.items()}
    return load_settings(Everything, environ=environ or {}, file=file, overrides=dotted)


def faults(environ: dict[str, str] | None = None, file: Path | None = None, **overrides: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        load(environ, file, **overrides)
    return caught.value.faults


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "settings.toml"


# where values come from ----------------------------------------------------------------------------------------------
def test_without_anything_the_defaults_hold() -> None:
    loaded = load()

    assert loaded.values == Everything()
    assert set(loaded.origins.values()) == {"default"}


def test_each_source_outranks_the_one_below_it(toml: Path) -> None:
    toml.write_text("[broker]\nhost = 'file'\nport = 1\n[work]\nlow = 1\nhigh = 2\n")
    environ = {"RABBITMQ_PORT": "2", "FRACTURE_SWEEP_WORK_HIGH": "3"}

    loaded = load(environ, toml, work__high="4")

    assert (loaded.values.broker.host, loaded.values.broker.port) == ("file", 2)
    assert (loaded.values.work.low, loaded.values.work.high) == (1, 4)
    assert loaded.origins["broker.host"] == f"{toml}: broker.host"
    assert loaded.origins["broker.port"] == "environment RABBITMQ_PORT"
    assert loaded.origins["work.high"] == "command line"
    assert loaded.origins["work.mode"] == "default"


def test_a_secret_may_lie_in_a_file_that_a_variable_names(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("pass word \n")

    loaded = load({"RABBITMQ_PASSWORD_FILE": str(path)})

    assert loaded.values.broker.password.get_secret_value() == "pass word "
    assert loaded.origins["broker.password"] == f"file {path} (environment RABBITMQ_PASSWORD_FILE)"


def test_any_setting_may_lie_in_a_file_that_a_variable_names(tmp_path: Path) -> None:
    (tmp_path / "port").write_text("77\n")

    assert load({"RABBITMQ_PORT_FILE": str(tmp_path / "port")}).values.broker.port == 77


def test_an_empty_variable_is_as_good_as_none() -> None:
    assert load({"RABBITMQ_HOST": "", "RABBITMQ_PASSWORD_FILE": ""}).values == Everything()


def test_an_empty_override_is_a_value() -> None:
    assert (
        load({"FRACTURE_SWEEP_WORK_LIMITS_ATTEMPTS": "3"}, work__limits__attempts="").values.work.limits.attempts
        is None
    )
    assert "broker.host = ''" in faults(broker__host="")[0]


@pytest.mark.parametrize(
    ("text", "value"), [("L1", ("L1",)), ("L1, L3", ("L1", "L3")), ('["L1", "a,b"]', ("L1", "a,b")), (" ", ())]
)
def test_a_list_is_separated_by_commas_or_json(text: str, value: tuple[str, ...]) -> None:
    assert load({"FRACTURE_SWEEP_WORK_LEVELS": text}).values.work.levels == value


def test_every_kind_of_value_is_read_from_text() -> None:
    environ = {
        "FRACTURE_SWEEP_WORK_COLOUR": "blue",
        "FRACTURE_SWEEP_WORK_PAIR": "3, 4.5",
        "FRACTURE_SWEEP_WORK_NAMES": '{"a": 1}',
        "FRACTURE_SWEEP_WORK_VERBOSE": "yes",
        "FRACTURE_SWEEP_WORK_FOLDER": "/data/out",
        "FRACTURE_SWEEP_WORK_LIMITS_SECONDS": " 2.5 ",
        "FRACTURE_SWEEP_WORK_LIMITS_ATTEMPTS": "3",
    }

    work = load(environ).values.work

    assert (work.colour, work.pair, work.names) == (Colour.BLUE, (3, 4.5), {"a": 1})
    assert (work.verbose, work.folder) == (True, Path("/data/out"))
    assert work.limits == Limits(seconds=2.5, attempts=3)


def test_a_section_that_may_be_absent_is_there_when_something_of_it_is_given() -> None:
    assert load().values.remote is None

    remote = load({"FRACTURE_SWEEP_REMOTE_URL": "u", "FRACTURE_SWEEP_REMOTE_TOKEN": "t"}).values.remote
    assert remote is not None
    assert remote.url == "u"


def test_the_file_may_begin_with_a_byte_order_mark(toml: Path) -> None:
    toml.write_bytes(b"\xef\xbb\xbf[broker]\nhost = 'h'\n")

    assert load(file=toml).values.broker.host == "h"


# what can be wrong ---------------------------------------------------------------------------------------------------
def test_all_faults_are_told_together(toml: Path) -> None:
    toml.write_text("[broker]\nport = true\nprot = 1\n[work]\nmode = 'slow'\n[worc]\nlow = 1\n")

    found = faults(
        {
            "RABBITMQ_HOST": "h",
            "FRACTURE_SWEEP_WORK_LIMITS_SECONDS": "-1",
            "FRACTURE_SWEEP_WORK_MOD": "fast",
            "FRACTURE_SWEEP_REMOTE_URL": "u",
        },
        toml,
        work__levls="L1",
    )

    assert sorted(found) == sorted(
        [
            f"broker.port = True ({toml}: broker.port): allowed is a whole number, at least 1, at most 65535",
            f"broker.prot ({toml}): there is no such setting; did you mean broker.port?",
            f"work.mode = 'slow' ({toml}: work.mode): allowed is one of fast, careful",
            f"worc ({toml}): there is no such setting; did you mean work?",
            "work.limits.seconds = '-1' (environment FRACTURE_SWEEP_WORK_LIMITS_SECONDS): "
            "allowed is a number, more than 0",
            "FRACTURE_SWEEP_WORK_MOD (environment): there is no such setting; did you mean FRACTURE_SWEEP_WORK_MODE?",
            "remote.token is needed and not set: set FRACTURE_SWEEP_REMOTE_TOKEN or FRACTURE_SWEEP_REMOTE_TOKEN_FILE, "
            "or remote.token in the settings file (text (secret))",
            "work.levls (command line): there is no such setting; did you mean work.levels?",
        ]
    )


def test_the_error_lists_a_fault_a_line() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"RABBITMQ_PORT": "x"}, work__mode="y")

    assert str(caught.value).splitlines()[0] == "2 settings are wrong:"
    assert len(str(caught.value).splitlines()) == 3


def test_a_wrong_secret_is_named_and_not_shown(toml: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("zq")
    toml.write_text("[broker]\npassword = 'zq'\n")

    for found in (
        faults({"RABBITMQ_PASSWORD": "zq"}),
        faults({"RABBITMQ_PASSWORD_FILE": str(tmp_path / "secret")}),
        faults(file=toml),
        faults(broker__password="zq"),
    ):
        assert found[0].startswith(f"broker.password = {HIDDEN} (")
        assert "of length 3 or more" in found[0]
        assert "zq" not in found[0].replace(str(tmp_path), "")


def test_a_variable_and_its_file_together_are_a_fault(tmp_path: Path) -> None:
    (tmp_path / "port").write_text("1")

    assert faults({"RABBITMQ_PORT": "1", "RABBITMQ_PORT_FILE": str(tmp_path / "port")}) == (
        "broker.port: both RABBITMQ_PORT and RABBITMQ_PORT_FILE are set; keep one of them",
    )


def test_a_secret_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")

    for path, why in ((tmp_path / "none", "No such file"), (tmp_path, "directory"), (tmp_path / "binary", "UTF-8")):
        found = faults({"RABBITMQ_HOST_FILE": str(path)})
        assert len(found) == 1
        assert f"RABBITMQ_HOST_FILE = {path}" in found[0]
        assert why in found[0]


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e999"])
def test_a_number_is_finite(text: str) -> None:
    assert "allowed is a number" in faults({"FRACTURE_SWEEP_WORK_LIMITS_SECONDS": text})[0]


def test_two_settings_that_do_not_go_together_are_told_in_the_words_of_the_model() -> None:
    assert faults(work__low="11") == ("work: low is above high",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[broker\n", "is not TOML"),
        (b"\xff", "is not UTF-8"),
        (b"broker = 3\n", "write [broker]"),
        (b"[broker.port]\na = 1\n", "broker.port = {'a': 1}"),
        (b"[[work]]\nlow = 1\n", "write [work]"),
        (b"work.limits = 'none'\n", "write [work.limits]"),
    ],
)
def test_a_file_that_is_none_or_of_another_shape_is_one_clear_sentence(toml: Path, content: bytes, said: str) -> None:
    toml.write_bytes(content)

    found = faults(file=toml)

    assert len(found) == 1
    assert said in found[0]
    assert str(toml) in found[0]


def test_a_settings_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in faults(file=tmp_path / "none.toml")[0]


def test_what_kubernetes_puts_into_the_environment_is_no_fault_unless_it_takes_a_name_of_ours() -> None:
    links = {
        "FRACTURE_SWEEP_REPORT_SERVICE_HOST": "10.0.0.1",
        "FRACTURE_SWEEP_REPORT_SERVICE_PORT_HTTP": "80",
        "FRACTURE_SWEEP_REPORT_PORT": "tcp://10.0.0.1:80",
        "FRACTURE_SWEEP_REPORT_PORT_80_TCP_ADDR": "10.0.0.1",
    }

    assert load(links).values == Everything()
    assert "enableServiceLinks: false" in faults({"RABBITMQ_PORT": "tcp://10.0.0.1:5672"})[0]


@pytest.mark.parametrize("wrong", ["FRACTURE_SWEEP_RABBITMQ_HOTS", "FRACTURE_SWEEP_BROKER_HOST"])
def test_a_variable_that_has_a_name_by_convention_is_named_by_it(wrong: str) -> None:
    assert faults({wrong: "h"}) == (f"{wrong} (environment): there is no such setting; did you mean RABBITMQ_HOST?",)


def test_variables_of_the_entry_point_itself_and_of_others_are_left_alone() -> None:
    environ = {"FRACTURE_SWEEP_SETTINGS": "x", "PATH": "/bin", "RABBITMQ_NODENAME": "n"}

    loaded = load_settings(
        Everything, environ=environ, file=None, overrides={}, ignored_variables=("FRACTURE_SWEEP_SETTINGS",)
    )

    assert loaded.values == Everything()


def test_two_settings_of_one_name_are_refused_when_the_model_is_read() -> None:
    class Clash(BaseModel):
        key: str = ""
        key_file: str = ""

    with pytest.raises(TypeError, match="share the variable"):
        settings_of(Clash)


# showing -------------------------------------------------------------------------------------------------------------
def test_what_holds_is_described_with_its_origin_and_secrets_hidden() -> None:
    loaded = load({"RABBITMQ_PASSWORD": "sentinel"}, work__levels="L1,L2")

    rows = {row.setting: row for row in describe(loaded)}

    assert list(rows) == [setting.name for setting in settings_of(Everything)]
    assert rows["broker.password"].value == HIDDEN
    assert rows["broker.password"].origin == "environment RABBITMQ_PASSWORD"
    assert rows["broker.host"].doc == "Where the broker runs, by name."
    assert rows["work.levels"].value == "L1, L2"
    assert rows["work.verbose"].value == "false"
    assert rows["work.colour"].value == "red"
    assert rows["work.colour"].allowed == "one of red, blue"
    assert rows["work.pair"].allowed == "2 values separated by commas: a whole number, a number"
    assert rows["work.code"].allowed == "text, matching ^[a-z]+$"
    assert rows["work.limits.attempts"].allowed == "a whole number, at least 1 (or nothing)"
    assert rows["remote.token"].value == ""
    assert "sentinel" not in repr(list(rows.values())) + repr(loaded)


def test_the_table_for_the_documentation_has_a_line_a_setting() -> None:
    lines = markdown_table(Everything).splitlines()

    assert len(lines) == 2 + len(settings_of(Everything))
    assert lines[3] == ("| `broker.port` | `RABBITMQ_PORT` | `5672` | a whole number, at least 1, at most 65535 |  |")


# any input -----------------------------------------------------------------------------------------------------------
ENV_NAMES = [setting.env for setting in settings_of(Everything)]
TEXTS = st.text(st.characters(exclude_characters="\x00"), max_size=20) | st.sampled_from(
    ["1", "-1", "1.5", "true", "[1]", "{}", "[", "{" * 500, "red", "9" * 5000, "\udcff", "1_0", "٣", "a,b", ""]
)


def outcome(
    environ: dict[str, str], file: Path | None, overrides: dict[str, str]
) -> Loaded[Everything] | tuple[str, ...]:
    """What was loaded, or the faults."""
    try:
        return load_settings(Everything, environ=environ, file=file, overrides=overrides)
    except SettingsError as error:
        return error.faults


@given(
    environ=st.dictionaries(
        st.sampled_from([*ENV_NAMES, *(name + "_FILE" for name in ENV_NAMES), "FRACTURE_SWEEP_X", "OTHER"]), TEXTS
    ),
    overrides=st.dictionaries(st.sampled_from([setting.name for setting in settings_of(Everything)]) | TEXTS, TEXTS),
)
def test_any_texts_give_settings_or_faults_and_nothing_else(environ: dict[str, str], overrides: dict[str, str]) -> None:
    loaded = outcome(environ, None, overrides)

    if isinstance(loaded, tuple):
        assert loaded
        return
    assert set(loaded.origins) == {setting.name for setting in settings_of(Everything)}
    assert loaded.values.work.low <= loaded.values.work.high


LEAVES = (
    st.integers()
    | st.floats()
    | st.booleans()
    | st.text(string.ascii_letters, max_size=5)
    | st.lists(st.integers(), max_size=2)
)


def as_toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f"'{value}'"
        case list():
            return "[" + ", ".join(map(as_toml, value)) + "]"
        case _:
            return str(value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.dictionaries(
        st.sampled_from([setting.name for setting in settings_of(Everything)] + ["broker.x", "y.z"]), LEAVES, max_size=6
    )
)
def test_any_file_gives_settings_or_a_fault_for_what_is_wrong(toml: Path, table: dict[str, object]) -> None:
    toml.write_text("".join(f"{name} = {as_toml(value)}\n" for name, value in table.items()))

    loaded = outcome({}, toml, {})

    if isinstance(loaded, tuple):
        assert loaded
        return
    given_names = {name for name, origin in loaded.origins.items() if origin != "default"}
    assert given_names == set(table)


@given(port=st.integers(1, 65535), seconds=st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_numbers_come_through_text_unchanged(port: int, seconds: float) -> None:
    loaded = load({"RABBITMQ_PORT": str(port), "FRACTURE_SWEEP_WORK_LIMITS_SECONDS": repr(seconds)})

    assert loaded.values.broker.port == port
    assert loaded.values.work.limits.seconds == seconds
