"""Every option of every config group composes and fits what it builds."""

import copy
import functools

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from dori_lightning import config
from dori_lightning.types import InputError

OPTIONS = [(group, option) for group, options in config.groups().items() for option in options]
#: Groups that a checkout without its yaml files would silently drop from the tests.
GROUPS = {
    "attack", "attack/budget", "checkpoint", "corpus", "experiment", "logger", "metrics",
    "mitigation", "mitigation/criterion", "pairs", "paths", "report", "sampling", "task",
    "trainer", "utility",
}  # fmt: skip


def composed(*overrides):
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose("config", list(overrides))


@functools.cache
def chosen(group, option):
    """A config that several tests look at, and that none may change."""
    above = ["mitigation=nemo"] if group.startswith("mitigation/") else []
    return composed(*above, f"{'+' if group == 'experiment' else ''}{group}={option}")


def test_every_group_is_found():
    assert {group for group, _ in OPTIONS} >= GROUPS
    assert all(config.groups()[group] for group in GROUPS)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_composes_and_resolves(group, option):
    cfg = copy.deepcopy(chosen(group, option))
    OmegaConf.resolve(cfg)
    assert OmegaConf.get_type(cfg) is config.Config


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_binds_to_what_it_builds(group, option):
    cfg = chosen(group, option)
    config.check_targets(cfg)
    config.check_signatures(cfg)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_says_what_it_is(group, option):
    assert config.groups()[group][option], f"conf/{group}/{option}.yaml begins without a comment"


@pytest.mark.parametrize("option", config.groups()["mitigation"])
def test_mitigations_have_the_name_that_run_folders_are_called_by(option):
    assert chosen("mitigation", option).mitigation.name


def test_checkpoints_of_a_sweep_over_unets_have_a_name_each():
    name = 'checkpoint.name="sd14-${folder_name:${checkpoint.unet}}"'
    cfg = composed("checkpoint=sd14", "checkpoint.unet=unets/a.safetensors", name)
    assert cfg.checkpoint.name == "sd14-unets.a.safetensors"
    assert cfg.name == "audit-sd14-unets.a.safetensors"


def test_every_kind_of_experiment_runs_without_a_mitigation():
    for experiment in ("removal_audit", "locality"):
        cfg = composed(f"+experiment={experiment}", "mitigation=none")
        assert cfg.name == f"{experiment}-dori_tiny-none"


def test_no_task_needs_a_config_of_its_own():
    assert {chosen("task", name).task.name for name in config.groups()["task"]} == set(
        config.groups()["task"]
    )


@pytest.mark.parametrize(
    ("checkpoint", "images", "guidance"),
    [
        ("dori_tiny", 4, 2.0),
        ("dori_tiny_twin", 4, 2.0),
        ("dori_tiny_flow", 4, 2.0),
        *((name, 10, 7.0) for name in ("sd14", "sd15", "sd20", "sd20_base", "sd21")),
    ],
)
def test_checkpoint_brings_its_sampling(checkpoint, images, guidance):
    sampling = composed(f"checkpoint={checkpoint}").sampling
    assert (sampling.images_per_pair, sampling.guidance) == (images, guidance)


def test_what_is_planted_brings_a_sampler_of_its_family():
    assert composed("task=plant").sampling.sampler == "dpm++"
    assert composed("task=plant", "planting=flow").sampling.sampler == "flow_euler"
    chosen_by_user = composed("task=plant", "planting=flow", "sampling.sampler=flow_dpm++")
    assert chosen_by_user.sampling.sampler == "flow_dpm++"


def test_users_sampling_beats_the_checkpoints():
    assert composed("checkpoint=sd14", "sampling=light").sampling.images_per_pair == 4


def test_experiment_keeps_the_checkpoints_sampling():
    assert composed("+experiment=audit", "checkpoint=sd14").sampling.images_per_pair == 10


def test_checkpoint_brings_its_metrics():
    assert composed("checkpoint=sd14").metrics == composed("metrics=sscd").metrics
    assert composed().metrics == composed("metrics=structure").metrics


def test_name_is_deterministic_and_needs_no_hydra():
    assert composed().name == composed("+experiment=audit").name == "audit-dori_tiny"
    assert composed("checkpoint=sd15").name == "audit-sd15"


@pytest.mark.parametrize(
    "override",
    ["seeed=1", "sampling.stepz=1", "attack.budget.radios=1", "seed=one", "report.images=some"],
)
def test_unknown_keys_and_wrong_types_do_not_compose(override):
    with pytest.raises(HydraException):
        composed(override)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("sampling._target_", "os.system", "refused to build 'os.system'"),
        ("sampling._target_", "builtins.eval", "refused to build"),
        ("sampling._target_", "dori_lightningx.y", "refused to build"),
        ("sampling._target_", ["os.system"], "refused to build"),
    ],
)
def test_targets_outside_the_allow_list(key, value, part):
    cfg = composed()
    OmegaConf.update(cfg, key, value)
    with pytest.raises(InputError, match=part) as refused:
        config.check_targets(cfg)
    assert key in str(refused.value)


def test_controls_of_the_benchmark_are_a_number_or_all():
    for given in ("all", "25"):
        config.check_signatures(composed(f"pairs.controls={given}"))
    with pytest.raises(InputError, match=r"pairs.controls cannot be 'some'"):
        config.check_signatures(composed("pairs.controls=some"))


def test_a_target_may_not_be_reached_through_an_allowed_module():
    cfg = composed("sampling._target_=dori_lightning.cli.os.getcwd")
    config.check_targets(cfg)
    with pytest.raises(InputError, match="refused to build"):
        config.check_signatures(cfg)


def test_nested_targets_are_checked():
    cfg = composed("+logger.x.inner=[{_target_: subprocess.Popen}]")
    with pytest.raises(InputError, match=r"logger\.x\.inner\[0\]\._target_"):
        config.check_targets(cfg)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("+sampling.step=3", "did you mean sampling.steps"),
        ("~sampling.sampler", None),
        ("sampling.sampler=heun", "one of ddim, dpm"),
        ("sampling.steps=many", "a whole number"),
        ("sampling.steps=1.5", "a whole number"),
        ("sampling.guidance=true", "a number"),
        ("sampling.guidance=3", None),
        ("sampling._target_=dori_lightning.models.protocol.Nothing", "cannot import"),
        ("sampling._target_=dori_lightning.types.Pair", "unknown key sampling.sampler"),
    ],
)
def test_values_against_signatures(override, part):
    cfg = composed(override)
    sampling = OmegaConf.create({"sampling": cfg.sampling})
    if part is None:
        config.check_signatures(sampling)
        return
    with pytest.raises(InputError, match=part):
        config.check_signatures(sampling)


def test_a_lone_value_is_put_into_the_list_it_belongs_to():
    attack = OmegaConf.create({"attack": composed("attack.inits=prompt").attack})
    with pytest.raises(InputError, match=r"fix:   give a list: 'attack\.inits=\[prompt\]'"):
        config.check_signatures(attack)
    attack.attack.inits = ["prompts"]
    with pytest.raises(InputError, match=r"each of it one of prompt, random, control_prompt"):
        config.check_signatures(attack)


def test_missing_values_are_all_named():
    with pytest.raises(InputError, match=r"checkpoint\.source=VALUE pairs\.manifest=VALUE"):
        config.check_missing(
            OmegaConf.create(
                {"checkpoint": {"source": "???"}, "pairs": {"manifest": "???"}, "seed": 1}
            )
        )


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_what_an_option_leaves_open_is_explained(group, option):
    cfg = chosen(group, option)
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        with pytest.raises(InputError) as refused:
            config.check_missing(cfg)
        lines = str(refused.value).splitlines()
        # a line for each besides what, where and how
        assert len(lines) == 3 + len(missing), missing


@pytest.mark.parametrize(
    "text", ["", "attack/budget=l2_small,seed=1", "a=/x/../y", "k=" + "v" * 500]
)
def test_folder_names_are_one_safe_part(text):
    name = config._folder_name(text)
    assert name
    assert "/" not in name
    assert len(name) <= 120
    assert name == config._folder_name(text)


def test_long_folder_names_stay_apart():
    assert config._folder_name("k=" + "v" * 500) != config._folder_name("k=" + "v" * 501)
