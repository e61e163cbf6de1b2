import logging
import os
import pickle
import subprocess
import sys

import pytest

from chipmunk_fx import errors, log
from chipmunk_fx.errors import ArgumentError, ChipmunkError, ConfigError, FallbackError, NotCompiledError, closest


def test_every_error_is_a_chipmunk_error():
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type):
            assert issubclass(kind, ChipmunkError)


def test_unknown_key_is_answered_with_the_closest_and_all_names():
    error = ConfigError.unknown("attention.densty", 0.1, ["seed", "mlp.density", "attention.density"])
    assert (error.key, error.value) == ("attention.densty", 0.1)
    assert error.allowed == ("seed", "mlp.density", "attention.density")
    text = str(error)
    assert "'attention.densty'" in text and "0.1" in text
    assert "Did you mean 'attention.density'" in text
    assert "seed, mlp.density, attention.density" in text


def test_invalid_value_is_answered_with_what_is_allowed_and_where_it_was_given():
    error = ConfigError.invalid("seed", -1, "an integer of at least 0", source="my.yaml")
    assert str(error) == "my.yaml: seed = -1 is not allowed. Allowed: an integer of at least 0."
    assert (error.key, error.value, error.allowed) == ("seed", -1, "an integer of at least 0")


def test_unlisted_value_is_answered_with_the_closest_name():
    assert "Did you mean 'hunyuan'?" in str(ConfigError.unlisted("preset", "hunyan", ["flux", "hunyuan"]))
    assert "Did you mean" not in str(ConfigError.unlisted("preset", 3, ["flux", "hunyuan"]))


def test_long_values_and_lists_are_cut():
    text = str(ConfigError.unknown("x", "y" * 500, [f"name{i}" for i in range(100)]))
    assert "y" * 200 not in text and "and 40 more" in text


def test_closest_finds_the_same_last_part():
    assert closest("density", ["seed", "mlp.density", "attention.density"]) == ["mlp.density", "attention.density"]
    assert closest("nothing like it", ["seed"]) == []


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(ConfigError.invalid("seed", -1, "an integer")))
    assert (type(error), error.key, error.value, error.allowed) == (ConfigError, "seed", -1, "an integer")


def test_not_compiled_names_the_class_and_the_remedy():
    text = str(NotCompiledError.of([]))
    assert text.startswith("list ") and 'backend="chipmunk"' in text


def test_what_is_no_module_is_answered_with_what_to_pass():
    for error in (NotCompiledError, ArgumentError):
        arguments = ([],) if error is NotCompiledError else ("model", [])
        assert "Pass the module itself" in str(error.no_module(*arguments, parts=[]))
        assert "(transformer, vae)" in str(error.no_module(*arguments, parts=["transformer", "vae"]))


def test_arguments_are_caught_as_types_and_as_values():
    error = ArgumentError.of("branch", -1, "an integer")
    assert isinstance(error, ChipmunkError) and isinstance(error, TypeError) and isinstance(error, ValueError)
    assert str(error) == "branch = -1 is not allowed. Allowed: an integer."


def test_fallback_names_the_site_and_the_reason():
    text = str(FallbackError.of("blocks.0.attn", "a dense mask"))
    assert "blocks.0.attn" in text and "a dense mask" in text and "strict=False" in text


def test_notices_say_each_thing_once_to_each_owner(caplog):
    one, other = log.Notices(), log.Notices()
    assert one.once(log.logger("plan"), "nothing matched 100 %")
    assert not one.once(log.logger("plan"), "nothing matched 100 %")
    assert one.once(log.logger("plan"), "same words", key="another matter")
    assert other.once(log.logger("plan"), "nothing matched 100 %")
    assert [record.getMessage() for record in caplog.records] == [
        "nothing matched 100 %",
        "same words",
        "nothing matched 100 %",
    ]
    assert {record.name for record in caplog.records} == {"chipmunk_fx.plan"}


def test_unknown_area_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="graph, plan, runtime"):
        log.logger("graphs")


@pytest.fixture
def restored():
    yield
    log.configure(None)


def test_configure_switches_areas_and_can_be_repeated(restored, capsys):
    log.configure("graph, runtime")
    log.configure("graph")
    assert log.logger("graph").level == logging.DEBUG
    assert log.logger("runtime").level == logging.NOTSET
    assert [len(log.logger(area).handlers) for area in log.AREAS] == [1, 0, 0]
    log.configure("")
    assert [len(log.logger(area).handlers) for area in log.AREAS] == [0, 0, 0]


def test_configure_warns_of_unknown_names(restored, caplog):
    log.configure("grph,plan")
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert "CHIPMUNK_LOGS" in text and "'grph'" in text and "'graph'" in text and "graph, plan, runtime" in text
    assert log.logger("plan").level == logging.DEBUG


PROGRAM = """
import logging
from chipmunk_fx import log
{before}
log.logger("plan").info("a plan")
log.logger("graph").info("a graph")
print(sum(len(logging.getLogger(name).handlers) for name in ("chipmunk_fx", *("chipmunk_fx." + a for a in log.AREAS))))
"""


def printed(value, before=""):
    """(handlers, stderr) of a fresh process with CHIPMUNK_LOGS = value."""
    variables = {key: text for key, text in os.environ.items() if key != "CHIPMUNK_LOGS"}
    variables |= {} if value is None else {"CHIPMUNK_LOGS": value}
    command = [sys.executable, "-P", "-c", PROGRAM.format(before=before)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return int(done.stdout), done.stderr


def test_variable_shows_the_named_areas_only():
    assert printed(None) == (0, "")
    assert printed("plan") == (1, "[chipmunk_fx.plan] INFO a plan\n")


def test_nothing_is_printed_twice_where_the_application_logs():
    count, text = printed("plan", before="logging.basicConfig(level=logging.WARNING)")
    assert count == 1 and text == "INFO:chipmunk_fx.plan:a plan\n"


def test_unknown_name_in_the_variable_warns():
    count, text = printed("planes")
    assert count == 0 and "unknown name 'planes'" in text and "Did you mean 'plan'?" in text
