import dataclasses
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import chipmunk_fx.config as config_module
from chipmunk_fx.config import AttentionConfig, Config, ScheduleConfig, allowed_keys
from chipmunk_fx.config_yaml import ORIGINAL, WITHOUT_EFFECT
from chipmunk_fx.errors import ConfigError
from chipmunk_fx.presets import PRESETS
from chipmunk_fx.schedule import Explicit, Interval, Skipping, policy_from

EXAMPLES = Path(__file__).parents[1] / "examples" / "configs"
MODELS = ("flux", "hunyuan", "wan", "mochi")
SKIPS = (7, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26, 27, 29, 31, 33, 34, 35, 37, 38, 39, 41, 42, 43)

DEFAULTS = {
    "attention.enabled": True,
    "attention.density": 0.165,
    "attention.random_density": 0.01,
    "attention.combine": "scaled",
    "attention.mass_stride": 4,
    "attention.renew_lists": True,
    "attention.text_rows": "sparse",
    "attention.local_window": 0.0,
    "attention.local_voxels": 0,
    "attention.group_rows": "auto",
    "attention.dense_layers": 2,
    "attention.layers": (),
    "mlp.enabled": True,
    "mlp.density": 0.30,
    "mlp.random_density": 0.05,
    "mlp.list_lifetime": 2,
    "mlp.fp8": False,
    "mlp.group_rows": "auto",
    "mlp.dense_layers": 2,
    "mlp.layers": (),
    "schedule.refresh_every": 10,
    "schedule.refresh_steps": None,
    "schedule.dense_steps": None,
    "schedule.skip_steps": None,
    "schedule.skip_threshold": None,
    "schedule.steps": None,
    "schedule.branches": None,
    "tokens.order": "auto",
    "tokens.grid": "auto",
    "tokens.text": "auto",
    "memory.offload": "none",
    "memory.budget_gb": "auto",
    "gate": "auto",
    "lowering": "inductor",
    "strict": False,
    "seed": 0,
}


def get(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def make(options=None, mode=None):
    """The config and the warnings of making it."""
    warnings = []
    return Config.from_options(options, mode, warn=warnings.append), warnings


def load(tmp_path, text, **options):
    path = tmp_path / "settings.yml"
    path.write_text(text, encoding="utf-8")
    return make({"config": str(path), **options})


def refused(*args, **kwargs) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make(*args, **kwargs)
    return caught.value


def refused_file(tmp_path, text) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert "settings.yml" in str(caught.value)
    return caught.value


def test_defaults_are_those_of_the_table():
    config = Config()
    assert {key: get(config, key) for key in DEFAULTS} == DEFAULTS
    assert set(allowed_keys()) == {*DEFAULTS, "preset", "config", "inductor.mode", "inductor.<name>"}
    assert make() == (config, []) and make({}) == (config, [])


@pytest.mark.parametrize(
    ("key", "given", "kept"),
    [
        ("attention.enabled", False, False),
        ("attention.density", 1, 1.0),
        ("attention.random_density", 0, 0.0),
        ("attention.combine", "additive", "additive"),
        ("attention.mass_stride", 1, 1),
        ("attention.renew_lists", False, False),
        ("attention.text_rows", "dense", "dense"),
        ("attention.local_window", 0.25, 0.25),
        ("attention.local_voxels", 5, 5),
        ("attention.group_rows", 16, 16),
        ("mlp.group_rows", 192, 192),
        ("mlp.dense_layers", 0, 0),
        ("attention.layers", {}, ()),
        ("attention.layers", None, ()),
        ("mlp.layers", "none", ()),
        ("attention.layers", {"10-20": 0.1, 3: "dense"}, ((3, 3, "dense"), (10, 20, 0.1))),
        ("mlp.layers", {"7": 1}, ((7, 7, 1.0),)),
        ("mlp.layers", ((7, 9, 0.5),), ((7, 9, 0.5),)),
        ("mlp.list_lifetime", 1, 1),
        ("mlp.fp8", True, True),
        ("schedule.refresh_every", 1, 1),
        ("schedule.refresh_steps", [0, 1, 10, 40], (0, 1, 10, 40)),
        ("schedule.refresh_steps", {40, 0, 10, 1}, (0, 1, 10, 40)),
        ("schedule.refresh_steps", range(3), (0, 1, 2)),
        ("schedule.refresh_steps", "none", None),
        ("schedule.skip_steps", [], ()),
        ("schedule.dense_steps", [0, 1], (0, 1)),
        ("schedule.skip_threshold", "none", None),
        ("schedule.skip_threshold", 0.05, 0.05),
        ("schedule.steps", 4, 4),
        ("schedule.steps", "inferred", None),
        ("schedule.branches", 2, 2),
        ("tokens.order", "raster", "raster"),
        ("tokens.grid", [1, 32, 32], (1, 32, 32)),
        ("tokens.text", ["first", 512], ("first", 512)),
        ("tokens.text", ("last", 0), ("last", 0)),
        ("memory.offload", "all", "all"),
        ("memory.offload", None, "none"),
        ("memory.budget_gb", 0, 0.0),
        ("memory.budget_gb", 40.5, 40.5),
        ("gate", "off", "off"),
        ("gate", False, "off"),
        ("lowering", "eager", "eager"),
        ("strict", True, True),
        ("seed", 7, 7),
    ],
)
def test_values_that_are_allowed(key, given, kept):
    section, _, name = key.rpartition(".")
    dotted, nested = {key: given}, {section: {name: given}} if section else {key: given}
    for options in (dotted, nested):
        config, warnings = make(options)
        assert get(config, key) == kept and type(get(config, key)) is type(kept)
        assert warnings == []


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("attention.enabled", [1, 0, "true", None]),
        ("attention.density", [0, -0.1, 1.01, math.nan, math.inf, True, "0.1", None, [0.1]]),
        ("attention.random_density", [-0.01, 1.5, False, "x"]),
        ("attention.combine", ["partition", None, 0]),
        ("attention.mass_stride", [0, -1, 1.0, True]),
        ("attention.renew_lists", [0, "no", None]),
        ("attention.text_rows", ["all", True]),
        ("attention.local_window", [-0.1, 1.1]),
        ("attention.local_voxels", [-1, 0.5]),
        ("attention.group_rows", [0, 8, 100, -16, 16.0, True, "automatic", None]),
        ("mlp.density", [0, 2]),
        ("mlp.group_rows", [24]),
        ("mlp.list_lifetime", [0]),
        ("mlp.fp8", [1, "e4m3", None]),
        ("mlp.dense_layers", [-1, True]),
        (
            "attention.layers",
            [3, "3", ["dense"], [3], {"a": 0.1}, {-1: 0.1}, {True: 0.1}, {"5-3": 0.1}, {"3-": "dens"}],
        ),
        ("mlp.layers", [{3: 0}, {3: 1.5}, {3: "sparse"}, {3: None}, {3: 0.1, "2-4": 0.2}, {"1-": 0.1, 1: 0.1}]),
        ("schedule.refresh_every", [0, -1, 2.5, None]),
        ("schedule.refresh_steps", [[1, 0], [0, 0], [-1], [0.5], [True], "0 1", 3, {0: None}, b"01"]),
        ("schedule.skip_steps", [[3, 2], {"a"}]),
        ("schedule.dense_steps", [[3, 2], 4]),
        ("schedule.skip_threshold", [-0.1, "a", True, float("inf")]),
        ("schedule.steps", [0, "many", True]),
        ("schedule.branches", [0, 1.5]),
        ("tokens.order", ["hilbert"]),
        ("tokens.grid", [[1, 2], [0, 1, 1], [1, 1, 1.5], "raster", 3, None]),
        ("tokens.text", [["middle", 3], ["first", -1], ["first"], [3, "first"], "first", ["first", True]]),
        ("memory.offload", ["some", True]),
        ("memory.budget_gb", [-1, math.inf, "60%", None]),
        ("gate", ["on", True, None]),
        ("lowering", ["triton"]),
        ("strict", [0, "false"]),
        ("seed", [-1, 2**63, 0.0]),
        ("preset", ["sdxl", 3]),
        ("config", [3]),
        ("inductor.mode", ["fast", 3]),
        ("inductor.max_autotune", ["yes", 1]),
    ],
)
def test_values_out_of_range_name_key_value_and_what_is_allowed(key, values):
    for value in values:
        error = refused({key: value})
        assert error.key == key and (error.value == value or error.value is value)
        text = str(error)
        assert key in text and repr(value) in text and "Allowed: " in text and error.allowed


def test_ranges_hold_for_direct_construction_and_replace():
    with pytest.raises(ConfigError, match="attention.density"):
        AttentionConfig(density=2.0)
    with pytest.raises(ConfigError, match="schedule.refresh_steps"):
        dataclasses.replace(ScheduleConfig(), refresh_steps=(3, 1))
    with pytest.raises(ConfigError, match="seed"):
        Config(seed=-1)


@pytest.mark.parametrize(
    ("options", "key", "meant"),
    [
        ({"attention.densty": 0.1}, "attention.densty", "attention.density"),
        ({"density": 0.1}, "density", "attention.density"),
        ({"attention": {"top": 1}}, "attention.top", None),
        ({"schedule": {"refresh_evry": 1}}, "schedule.refresh_evry", "schedule.refresh_every"),
        ({"mode": "max-autotune"}, "mode", "inductor.mode"),
        ({"gates": "off"}, "gates", "gate"),
        ({"attention.density.x": 1}, "attention.density.x", "attention.density"),
        ({"inductor.max_autotun": True}, "inductor.max_autotun", "inductor.max_autotune"),
        ({3: 4}, "3", None),
        ({"attentoin": {"density": 0.1}}, "attentoin.density", "attention.density"),
        ({"attentoin": {}}, "attentoin", None),
    ],
)
def test_unknown_keys_are_answered_with_the_closest_and_the_list(options, key, meant):
    error = refused(options)
    assert error.key == key and repr(key) in str(error)
    assert "Allowed: " in str(error)
    assert meant is None or f"Did you mean {meant!r}" in str(error) or f"or {meant!r}" in str(error)


def test_a_section_is_a_mapping():
    error = refused({"attention": False})
    assert error.key == "attention" and "attention.enabled" in str(error)
    assert refused([("seed", 1)]).key == "options"
    assert refused({"inductor": 3}).key == "inductor"


def test_one_key_given_twice_is_refused():
    assert refused({"mlp": {"density": 0.1}, "mlp.density": 0.2}).key == "mlp.density"


def test_precedence_is_defaults_preset_file_options(tmp_path):
    text = "attention: {random_density: 0.5, mass_stride: 2}\nseed: 3\n"
    config, _ = load(tmp_path, text, preset="hunyuan", seed=4)
    assert config.attention.density == 0.05  # preset over default
    assert config.attention.random_density == 0.5  # file over preset
    assert config.seed == 4  # option over file
    assert config.mlp.dense_layers == 2  # default


def test_a_file_may_name_a_preset_and_options_another(tmp_path):
    assert load(tmp_path, "preset: wan\nseed: 3\n")[0].attention.local_voxels == 5
    config, _ = load(tmp_path, "preset: wan\nseed: 3\n", preset="flux")
    assert (config.attention.local_voxels, config.attention.density, config.seed) == (0, 0.165, 3)


@pytest.mark.parametrize("name", [*MODELS, "exact"])
def test_presets_name_valid_settings(name):
    config, warnings = make({"preset": name})
    assert warnings == []
    assert {key: get(config, key) for key in PRESETS[name]} == dict(PRESETS[name])
    assert {key: get(config, key) for key in DEFAULTS if key not in PRESETS[name]} == {
        key: value for key, value in DEFAULTS.items() if key not in PRESETS[name]
    }


def test_published_settings():
    flux, hunyuan, wan, mochi = (Config.from_options({"preset": name}) for name in MODELS)
    assert [c.attention.density for c in (flux, hunyuan, wan, mochi)] == [0.165, 0.05, 0.10, 0.05]
    assert [c.attention.random_density for c in (flux, hunyuan, wan, mochi)] == [0.0, 0.01, 0.01, 0.01]
    assert [c.mlp.enabled for c in (flux, hunyuan, wan, mochi)] == [True, False, False, False]
    assert [c.schedule.refresh_steps for c in (flux, hunyuan, wan)] == [None, (0, 1, 10, 40), None]
    assert (wan.schedule.branches, wan.attention.local_voxels, wan.tokens.order) == (2, 5, "raster")
    exact = Config.from_options({"preset": "exact"})
    assert (exact.attention.density, exact.mlp.density, exact.gate) == (1.0, 1.0, "off")
    assert (exact.attention.dense_layers, exact.mlp.dense_layers) == (0, 0)


def test_lists_that_are_never_reached_warn_once_a_list(caplog):
    config = Config.from_options({"preset": "hunyuan", "schedule.steps": 30, "schedule.skip_steps": [7, 30, 31]})
    assert config.schedule.refresh_steps == (0, 1, 10, 40)  # literal, not rescaled
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2 and all(record.name.startswith("chipmunk_fx") for record in caplog.records)
    assert "schedule.refresh_steps lists 40," in texts[0] and "schedule.skip_steps lists 30, 31," in texts[1]
    assert make({"preset": "hunyuan", "schedule.steps": 50})[1] == []


def test_mode_is_the_option_inductor_mode():
    config, _ = make(mode="max-autotune")
    assert config == make({"inductor.mode": "max-autotune"})[0]
    assert config.inductor_mode == "max-autotune" and config.inductor_options == {}
    assert Config().inductor_mode is None
    assert make({"inductor.mode": None})[0] == make({"inductor": {"mode": None}})[0] == Config()
    error = refused(mode="fastest")
    assert error.key == "mode" and "max-autotune" in str(error)


def test_inductor_options_keep_their_names():
    options = {"inductor.max_autotune": True, "inductor.triton.cudagraphs": False, "inductor.mode": "default"}
    nested = {"inductor": {"max_autotune": True, "triton": {"cudagraphs": False}, "mode": "default"}}
    config, _ = make(options)
    assert config == make(nested)[0] and hash(config) == hash(make(nested)[0])
    assert config.inductor_options == {"max_autotune": True, "triton.cudagraphs": False}


def test_inductor_values_are_copied_and_may_be_mappings():
    passes = {"batch_linear": {}}
    config, _ = make({"inductor": {"post_grad_fusion_options": passes}})
    passes["more"] = {}
    assert config.inductor_options == {"post_grad_fusion_options": {"batch_linear": {}}}
    assert isinstance(hash(config), int)


def test_settings_need_no_torch(monkeypatch):
    monkeypatch.setattr(config_module, "_inductor_value", None)
    monkeypatch.setattr(config_module, "_is_inductor", None)
    assert make({"preset": "flux", "attention": {"density": 0.2}})[0].attention.density == 0.2


def test_configs_are_values():
    one, other = make({"preset": "wan"})[0], make(dict(PRESETS["wan"]))[0]
    assert one == other and hash(one) == hash(other) and len({one, other, Config()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.seed = 3  # type: ignore[misc]


def test_yaml_that_holds_a_callable_says_so():
    config, _ = make({"inductor.post_grad_custom_pre_pass": print})
    with pytest.raises(ConfigError, match="inductor.post_grad_custom_pre_pass"):
        config.to_yaml()


_share, _count = st.floats(0.0, 1.0), st.integers(0, 9)
_steps = st.sets(st.integers(0, 99)).map(sorted)
_rows = st.one_of(st.just("auto"), st.integers(1, 30).map(lambda n: 16 * n))
_density = st.floats(0.0, 1.0, exclude_min=True)
_layers = st.dictionaries(
    st.one_of(st.integers(0, 9), st.integers(10, 19).map(str), st.integers(20, 40).map(lambda n: f"{n}-{2 * n}")),
    st.just("dense") | _density,
).filter(lambda given: sum(isinstance(key, str) and "-" in key for key in given) < 2)
_strategies = {
    "attention.enabled": st.booleans(),
    "attention.density": _density,
    "attention.random_density": _share,
    "attention.combine": st.sampled_from(["scaled", "additive"]),
    "attention.mass_stride": st.integers(1, 64),
    "attention.renew_lists": st.booleans(),
    "attention.text_rows": st.sampled_from(["sparse", "dense"]),
    "attention.local_window": _share,
    "attention.local_voxels": _count,
    "attention.group_rows": _rows,
    "attention.dense_layers": _count,
    "attention.layers": _layers,
    "mlp.enabled": st.booleans(),
    "mlp.density": _density,
    "mlp.random_density": _share,
    "mlp.list_lifetime": st.integers(1, 9),
    "mlp.fp8": st.booleans(),
    "mlp.group_rows": _rows,
    "mlp.dense_layers": _count,
    "mlp.layers": _layers,
    "schedule.refresh_every": st.integers(1, 99),
    "schedule.refresh_steps": st.none() | _steps,
    "schedule.dense_steps": st.none() | _steps,
    "schedule.skip_steps": st.none() | _steps,
    "schedule.skip_threshold": st.none() | st.floats(0, 10),
    "schedule.steps": st.none() | st.integers(1, 99),
    "schedule.branches": st.none() | st.integers(1, 4),
    "tokens.order": st.sampled_from(["auto", "raster"]),
    "tokens.grid": st.just("auto") | st.lists(st.integers(1, 99), min_size=3, max_size=3),
    "tokens.text": st.just("auto") | st.tuples(st.sampled_from(["first", "last"]), st.integers(0, 999)),
    "memory.offload": st.sampled_from(["none", "auto", "all"]),
    "memory.budget_gb": st.just("auto") | st.floats(0, 1e6),
    "gate": st.sampled_from(["auto", "off"]),
    "lowering": st.sampled_from(["inductor", "eager"]),
    "strict": st.booleans(),
    "seed": st.integers(0, 2**63 - 1),
    "inductor": st.fixed_dictionaries(
        {},
        optional={
            "mode": st.sampled_from(["default", "max-autotune"]),
            "max_autotune": st.booleans(),
            "compile_threads": st.integers(1, 64),
            "max_autotune_gemm_backends": st.text(max_size=9),
        },
    ),
}


def test_every_setting_takes_part_in_the_round_trip():
    assert set(_strategies) == {*DEFAULTS, "inductor"}


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=_strategies))
def test_round_trip_through_mapping_and_yaml(tmp_path_factory, options):
    config, _ = make(options)
    assert make(config.to_dict())[0] == config
    assert make(yaml.safe_load(config.to_yaml()))[0] == config
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    again = Config.from_yaml(path, warn=lambda _: None)
    assert again == config and hash(again) == hash(config)


# Files


@pytest.mark.parametrize("name", MODELS)
def test_example_in_our_format_is_the_preset(name):
    config, warnings = make({"config": EXAMPLES / f"{name}.yaml"})
    assert config == make({"preset": name})[0] and warnings == []


def test_a_whole_schedule_means_the_same_in_both_formats(tmp_path):
    ours = (EXAMPLES / "hunyuan.yaml").read_text()
    (tmp_path / "ours.yaml").write_text(ours.replace("  # skip_steps:", "  steps: 50\n  skip_steps:"))
    config, warnings = make({"config": tmp_path / "ours.yaml"})
    assert config == make({"config": EXAMPLES / "hunyuan-original.yaml"})[0] and warnings == []
    assert config.schedule.skip_steps == SKIPS and config.schedule.steps == 50


@pytest.mark.parametrize("name", MODELS)
def test_example_in_the_original_format_means_the_preset(name):
    config, _ = make({"config": EXAMPLES / f"{name}-original.yaml"})
    schedule = dataclasses.replace(config.schedule, skip_steps=None, steps=None)
    assert dataclasses.replace(config, schedule=schedule) == make({"preset": name})[0]


def test_original_skips_and_steps():
    schedule = Config.from_yaml(EXAMPLES / "hunyuan-original.yaml").schedule
    assert (schedule.skip_steps, schedule.steps, schedule.refresh_steps) == (SKIPS, 50, (0, 1, 10, 40))


def test_what_an_original_file_loses_is_named_in_one_warning(caplog):
    Config.from_yaml(EXAMPLES / "flux-original.yaml")
    (record,) = caplog.records
    text = record.getMessage()
    assert record.levelname == "WARNING" and "flux-original.yaml" in text
    assert "attn.pad_qkv_before_kernel" in text and "Not honoured" not in text
    assert "is_fp8" not in text and "world_size" not in text


@pytest.mark.parametrize("name", MODELS)
def test_both_formats_of_a_published_file_are_one_config(name):
    """The original's HunyuanVideo file also lists steps to skip of 50: `skip_steps` and `steps` are set beside ours."""
    original = make({"config": EXAMPLES / f"{name}-original.yaml"})[0]
    beside = {"schedule.skip_steps": list(SKIPS), "schedule.steps": 50} if name == "hunyuan" else {}
    assert make({"config": EXAMPLES / f"{name}.yaml", **beside}) == (original, [])


# What a key of the original is set to, where another value of its type will not do, and what has to stand beside it.
_OTHER = {
    "num_model_invocations_per_inference_step": 2,
    "steps": 28,
    "attn.random_keys": 0.02,
    "attn.full_step_schedule": [0, 5],
    "attn.full_attn_from_3d_tail": False,
    "attn.coverage": 0.7,
    "step_caching.skip_step_schedule": [7],
}
_HERE = {"offloading.attn.out_cache": False, "offloading.attn.indices": False}
_BESIDE = {
    "attn.should_keep_tail_dense": {"attn.full_attn_from_3d_tail": False},
    "step_caching.skip_step_schedule": {"step_caching.is_enabled": True},
    **{f"offloading.mlp.{cache}": _HERE for cache in ("out_cache", "indices", "sparse_act_T")},
}


@pytest.mark.parametrize("key", [*ORIGINAL, *sorted(WITHOUT_EFFECT)])
def test_every_key_of_the_original_is_honoured_or_named(tmp_path, key):
    default, beside = ORIGINAL.get(key), _BESIDE.get(key, {})
    other = not default if isinstance(default, bool) else (default or 0) + 1 if default in (0, 1, 2, 8, 4, 10) else 0.5
    base, said = load(tmp_path, yaml.safe_dump({"world_size": 1, **beside}))
    given, warnings = load(tmp_path, yaml.safe_dump({"world_size": 1, **beside, key: _OTHER.get(key, other)}))
    assert given != base or (warnings != said and key in warnings[0])


def test_original_defaults_hold_for_keys_left_out(tmp_path):
    config, warnings = load(tmp_path, "world_size: 1\n")
    assert warnings == []
    assert (config.attention.density, config.attention.random_density) == (0.05, 0.01)
    assert (config.mlp.enabled, config.mlp.density, config.mlp.random_density) == (True, 0.3, 0.05)
    assert (config.schedule.refresh_every, config.schedule.skip_steps) == (10, None)
    assert (config.memory.offload, config.tokens.order) == ("all", "auto")


def test_fp8_of_an_original_file_is_honoured(tmp_path):
    config, warnings = load(tmp_path, "mlp: {is_fp8: true}\n")
    assert config.mlp.fp8 and warnings == []
    assert not load(tmp_path, "world_size: 1\n")[0].mlp.fp8
    assert not any(make({"preset": preset})[0].mlp.fp8 for preset in PRESETS)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("world_size: 8", "world_size = 8"),
        ("attn: {coverage: 0.7}", "attn.coverage = 0.7"),
        ("attn: {top_keys: 0, local_voxels: 5}", "attn.top_keys = 0"),
        ("attn: {full_attn_to_3d_tail: false}", "attn.full_attn_to_3d_tail = False"),
        ("attn: {full_step_every: 5}\nmlp: {full_step_every: 10}", "mlp.full_step_every = 10"),
        ("attn: {full_step_schedule: [0, 5]}\nmlp: {full_step_every: 10}", "mlp.full_step_every = 10"),
        ("patchify: {chunk_size_1: 2, chunk_size_2: 2}", "patchify.chunk_size_1 = 2"),
        ("offloading: {text_encoders: true}", "offloading.text_encoders = True"),
        ("offloading: {attn.indices: false}", "offloading.attn.indices = False"),
        ("tea_cache: {is_enabled: true, threshold: 0.1}", "tea_cache.is_enabled = True"),
        ("attn: {counts_multiple_of: 112}", "attn.counts_multiple_of"),
        ("attn: {bogus: 3}", "attn.bogus = 3 (unknown)"),
        ("patchify: {}\nbogus: 3", "bogus = 3 (unknown)"),
    ],
)
def test_original_keys_that_cannot_be_honoured_are_named(tmp_path, text, name):
    _, warnings = load(tmp_path, text)
    assert len(warnings) == 1 and name in warnings[0] and "settings.yml" in warnings[0]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("mlp: {is_enabled: false}", "mlp.enabled", False),
        ("attn: {is_enabled: false}", "attention.enabled", False),
        ("attn: {is_enabled: false}\nmlp: {full_step_every: 7}", "schedule.refresh_every", 7),
        ("attn: {is_enabled: false, full_step_schedule: [0, 5]}", "schedule.refresh_steps", None),
        ("attn: {full_step_every: 5}\nmlp: {full_step_every: 5}", "schedule.refresh_every", 5),
        ("attn: {full_step_schedule: ~, full_step_every: 3}\nmlp: {is_enabled: false}", "schedule.refresh_every", 3),
        ("attn: {full_step_schedule: !!set {40, 0, 10}}", "schedule.refresh_steps", (0, 10, 40)),
        ("attn: {local_1d_window: 0.05}", "attention.local_window", 0.05),
        ("attn: {local_voxels: 3}", "attention.local_voxels", 3),
        ("attn: {recompute_mask: false}", "attention.renew_lists", False),
        ("attn: {first_n_dense_layers: 4}", "attention.dense_layers", 4),
        ("mlp: {block_mask_cache: 4}", "mlp.list_lifetime", 4),
        ("attn: {full_attn_from_3d_tail: true}", "attention.text_rows", "dense"),
        ("attn: {full_attn_from_3d_tail: false}", "attention.text_rows", "sparse"),
        ("attn: {should_compress_indices: false}", "attention.random_density", 0.0),
        ("attn: {should_compress_indices: false, random_keys: 0.02}", "attention.random_density", 0.02),
        ("patchify: {is_enabled: false}", "tokens.order", "raster"),
        ("patchify: {chunk_size_1: 1, chunk_size_2: 1}", "tokens.order", "raster"),
        ("offloading: {global_disable_offloading: true}", "memory.offload", "none"),
        ("offloading: {attn.out_cache: false, attn.indices: false}", "memory.offload", "none"),
        ("offloading: {attn.out_cache: false, attn.indices: false, mlp.out_cache: true}", "memory.offload", "all"),
        ("step_caching: {is_enabled: true}", "schedule.skip_steps", SKIPS),
        ("step_caching: {is_enabled: false, skip_step_schedule: !!set {7, 11}}", "schedule.skip_steps", None),
        ("step_caching: {is_enabled: true, skip_step_schedule: !!set {11, 7}}", "schedule.skip_steps", (7, 11)),
        ("num_model_invocations_per_inference_step: 2", "schedule.branches", 2),
        ("steps: 28", "schedule.steps", 28),
    ],
)
def test_original_keys_mean_the_same(tmp_path, text, key, value):
    assert get(load(tmp_path, text)[0], key) == value


def test_options_stand_over_an_original_file(tmp_path):
    config, _ = load(tmp_path, "attn: {top_keys: 0.1}", **{"attention.density": 0.2, "preset": "wan"})
    assert config.attention.density == 0.2
    assert config.attention.local_voxels == 0  # the file's own default stands over the preset


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("attn: {top_keys: dd}", "attn.top_keys"),
        ("attn: {top_keys: 1.5}", "attn.top_keys"),
        ("attn: {is_enabled: 3}", "attn.is_enabled"),
        ("attn: {full_step_schedule: !!set {a, b}}", "attn.full_step_schedule"),
        ("attn: {full_step_every: 0}", "attn.full_step_every"),
        ("mlp: {block_mask_cache: 0}", "mlp.block_mask_cache"),
        ("num_model_invocations_per_inference_step: two", "num_model_invocations_per_inference_step"),
    ],
)
def test_original_values_out_of_range_are_refused_by_their_own_name(tmp_path, text, key):
    assert refused_file(tmp_path, text).key == key


@pytest.mark.parametrize("text", ["mlp: {density: 0.2}", "mlp:\n  enabled: false", "mlp:\n", "", "attention:\n"])
def test_files_in_our_format_are_told_by_their_names(tmp_path, text):
    assert load(tmp_path, text)[0].attention.density == 0.165


def test_two_formats_in_one_file_are_refused(tmp_path):
    error = refused_file(tmp_path, "attn: {top_keys: 0.1}\nattention: {density: 0.1}\n")
    assert "attn" in str(error) and "attention" in str(error)


def test_a_whole_number_given_as_text_is_to_be_written_as_one():
    with pytest.raises(ConfigError) as error:
        Config.from_options({"schedule.steps": "50"})
    assert str(error.value).endswith("write the number as 50.")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1, 2\n", "not plain YAML"),
        ("seed: !!python/object/apply:os.getcwd []\n", "not plain YAML"),
        ("gate: !!python/name:os.system\n", "not plain YAML"),
        ("- 1\n- 2\n", "list, not a mapping"),
        ("just words", "str, not a mapping"),
        ("when: 2024-13-45\n", "not plain YAML"),
        ("attention: {density: 1e-1}", "write the number as 0.1"),
        ("attention: {densty: 0.1}", "Did you mean 'attention.density'"),
        ("attention: {density: 3}", "attention.density = 3 is not allowed"),
        ("attention: 3", "attention = 3 is not allowed"),
        ("config: other.yml", "no further file"),
        ("preset: sdxl", "preset = 'sdxl'"),
        ("1: 2", "unknown key '1'"),
        ("mlp: {density: 0.1}\nmlp: {list_lifetime: 3}", "'mlp' stands twice"),
        ("attention: {density: 0.1, density: 0.2}", "'density' stands twice"),
    ],
)
def test_files_that_cannot_be_used_name_the_file_and_the_problem(tmp_path, text, problem):
    assert problem in str(refused_file(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path):
    assert "there is no such file" in str(refused({"config": tmp_path / "absent.yml"}))
    assert "cannot be read" in str(refused({"config": str(tmp_path)}))
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00\x81")
    assert "UTF-8" in str(refused({"config": tmp_path / "binary.yml"}))


def test_yaml_off_and_null_are_read_as_meant(tmp_path):
    config, _ = load(tmp_path, "gate: off\nmemory: {offload: null}\nschedule: {refresh_steps: !!set {0, 3}}\n")
    assert (config.gate, config.memory.offload, config.schedule.refresh_steps) == ("off", "none", (0, 3))


def test_policy_comes_from_the_schedule_section():
    assert policy_from(Config().schedule) == Interval(10)
    assert policy_from(make({"preset": "hunyuan"})[0].schedule) == Explicit((0, 1, 10, 40))
    config, _ = make({"schedule.skip_steps": [3]})
    assert policy_from(config.schedule) == Skipping(Interval(10), (3,))
