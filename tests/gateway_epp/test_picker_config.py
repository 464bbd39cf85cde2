"""`EndpointPickerConfig` files: what is accepted, by which rules, and how mistakes are told."""

from pathlib import Path

import pytest
from dynamo_crds.problem import InvalidManifest
from dynamo_epp.admission.settings import PriorityBand
from dynamo_epp.config import API_VERSIONS, KvEvents, given_config, load_config
from dynamo_epp.config.loader import PickerConfig
from dynamo_epp.scheduling.catalogue import ELSEWHERE, MADE, NOT_HERE, RENAMED, SETTINGS
from dynamo_epp.scheduling.filters.label_selector import LabelFilter, LabelParameters

HEAD = f"apiVersion: {API_VERSIONS[0]}\nkind: EndpointPickerConfig\n"


def load(text: str, head: str = HEAD) -> PickerConfig:
    return load_config(head + text, "c.yaml")


def wrong(text: str, head: str = HEAD) -> str:
    with pytest.raises(InvalidManifest) as caught:
        load(text, head)
    return str(caught.value)


def scorers(config: PickerConfig, profile: str = "") -> dict[str, float]:
    chosen = config.scheduler.profiles[profile or config.scheduler.primary]
    return {name: weight for name, weight, _ in chosen.scorers}


@pytest.mark.parametrize("version", API_VERSIONS)
def test_an_empty_configuration_has_the_known_defaults(version: str) -> None:
    config = load("", f"apiVersion: {version}\nkind: EndpointPickerConfig\n")
    assert scorers(config) == {
        "queue-scorer": 2.0,
        "kv-cache-utilization-scorer": 2.0,
        "prefix-cache-scorer": 3.0,
    }
    assert config.flow_control is None
    assert config.notes == ()


def test_without_profiles_there_is_one_of_all_plugins() -> None:
    config = load("plugins: [{type: queue-scorer}, {type: decode-filter}, {type: random-picker}]")
    (profile,) = config.scheduler.profiles.values()
    assert profile.name == "default"
    assert [name for name, _ in profile.filters] == ["decode-filter"]
    assert scorers(config) == {"queue-scorer": 1.0}
    assert type(profile.picker).__name__ == "RandomPicker"
    assert not config.scheduler.reads_prompt


def test_plugins_are_known_by_their_names_and_weighed_by_the_profile() -> None:
    config = load("""
plugins:
- {type: prefix-cache-scorer, name: prefix}
- {type: queue-scorer}
- type: max-score-picker
  parameters: {maxNumOfEndpoints: 2}
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: prefix, weight: 2.5}
  - {pluginRef: queue-scorer}
  - {pluginRef: max-score-picker}
""")
    assert scorers(config) == {"prefix": 2.5, "queue-scorer": 1.0}
    assert config.scheduler.profiles["default"].picker.limit == 2


def test_prefill_and_decode_profiles() -> None:
    config = load("""
plugins:
- {type: prefill-filter}
- {type: decode-filter}
- {type: disagg-profile-handler, parameters: {deciders: {prefill: prefix-based-pd-decider}}}
- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 16}}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}]}
- {name: decode, plugins: [{pluginRef: decode-filter}]}
""")
    assert (config.scheduler.primary, set(config.scheduler.profiles)) == (
        "decode",
        {"prefill", "decode"},
    )
    assert config.parameters["prefix-based-pd-decider"] == {"nonCachedTokens": 16}


def test_what_another_part_does_is_accepted_and_said() -> None:
    config = load("""
plugins:
- {type: token-producer, parameters: {vllm: {url: "http://localhost:8000"}}}
- {type: metrics-data-source}
- {type: core-metrics-extractor}
- {type: openai-parser}
- {type: queue-scorer}
dataLayer:
  sources: [{pluginRef: metrics-data-source, extractors: [{pluginRef: core-metrics-extractor}]}]
requestHandler: {parsers: [{pluginRef: openai-parser}]}
""")
    assert scorers(config) == {"queue-scorer": 1.0}
    assert "plugin token-producer: prompts are tokenized with the engines' own tokenizers" in (
        config.notes
    )


@pytest.mark.parametrize("type_", ["precise-prefix-cache-scorer", "precise-prefix-cache-producer"])
def test_the_port_for_events_of_the_precise_prefix_cache_is_taken_over(type_: str) -> None:
    config = load(f"""
plugins:
- type: {type_}
  parameters:
    tokenProcessorConfig: {{blockSize: 64, hashSeed: "42"}}
    indexerConfig: {{kvBlockIndexConfig: {{enableMetrics: true}}}}
    kvEventsConfig: {{zmqEndpoint: "tcp://*:5557", topicFilter: "kv@", concurrency: 4}}
- {{type: prefix-cache-scorer, name: prefix}}
""")
    assert config.kv_events == KvEvents("tcp://*:5557", "kv@")
    given = {"prefix": 1.0}
    if type_.endswith("scorer"):
        given[type_] = 1.0
    assert scorers(config) == given


def test_engines_that_are_asked_need_no_port() -> None:
    config = load("""
plugins:
- {type: precise-prefix-cache-scorer, parameters: {kvEventsConfig: {discoverPods: true}}}
""")
    assert config.kv_events is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "plugins: [{type: precise-prefix-cache-scorer, "
            "parameters: {kvEventsConfig: {zmqEndpoint: 5557}}}]",
            "plugins[0].parameters.kvEventsConfig.zmqEndpoint: no text: found 5557, expected a "
            "text, such as tcp://*:5557",
        ),
        (
            "plugins: [{type: precise-prefix-cache-producer, "
            'parameters: {kvEventsConfig: {zmqEndpoint: "*:5557"}}}]',
            'plugins[0].parameters.kvEventsConfig.zmqEndpoint: no such address: found "*:5557", '
            "expected tcp://ADDRESS:PORT, such as tcp://*:5557",
        ),
        (
            "plugins:\n- type: queue-scorrer\n",
            'c.yaml:4: plugins[0].type: unknown plugin type: found "queue-scorrer", '
            "expected queue-scorer",
        ),
        (
            "plugins: [{type: latency-scorer}]",
            "plugins[0].type: this picker has no such plugin: latencies are not predicted; use "
            "kv-cost-scorer",
        ),
        (
            "plugins:\n- type: load-aware-scorer\n  parameters:\n    treshold: 5\n",
            "c.yaml:6: plugins[0].parameters.treshold: unknown field: found 5, expected threshold",
        ),
        (
            "plugins: [{type: load-aware-scorer, parameters: {threshold: 0}}]",
            "plugins[0].parameters.threshold: too small: found 0, expected at least 1",
        ),
        (
            "plugins: [{type: prefix-cache-scorer, parameters: {matchLengthWeight: 2}}]",
            "matchLengthWeight: too large: found 2, expected at most 1",
        ),
        ("plugin: []", "plugin: unknown field: found [], expected plugins"),
        (
            "plugins: [{type: queue-scorer}]\n"
            "schedulingProfiles: [{name: default, plugins: [{pluginRef: qeue-scorer}]}]",
            "schedulingProfiles[0].plugins[0].pluginRef: no plugin of that name: found "
            '"qeue-scorer", expected queue-scorer',
        ),
        (
            "plugins: [{type: queue-scorer}, {type: queue-scorer}]",
            "plugins[1].name: two plugins of that name",
        ),
        (
            "plugins: [{type: random-picker}, {type: max-score-picker}]",
            "the profile has several pickers",
        ),
        (
            "plugins: [{type: queue-scorer}]\n"
            "schedulingProfiles: [{name: a, plugins: []}, {name: b, plugins: []}]",
            "none of the profiles is for the worker that answers",
        ),
        ("flowControl: {maxBytes: lots}", "flowControl.maxBytes: malformed"),
        ("flowControl: {defaultRequestTTL: 60}", "expected a duration such as 60s"),
        (
            "plugins: [{type: utilization-filter, parameters: {conditions: "
            "[{metric: kv-cache-utilization, maxValue: 80}]}}]",
            "maxValue: the cache's utilization is a share: found 80.0, expected at most 1",
        ),
    ],
)
def test_mistakes_are_told_with_place_and_remedy(text: str, problem: str) -> None:
    assert problem in wrong(text)


def test_all_mistakes_are_told_at_once() -> None:
    told = wrong(
        "plugins: [{type: nothing-like-it}, {type: load-aware-scorer, parameters: {x: 1}}]"
    )
    assert "plugins[0].type" in told
    assert "plugins[1].parameters.x" in told


def test_another_object_is_refused() -> None:
    told = wrong("", "apiVersion: llm-d.ai/v1\nkind: EndpointPicker\n")
    assert 'kind: another kind of object: found "EndpointPicker"' in told
    assert "expected llm-d.ai/v1alpha1 or inference.networking.x-k8s.io/v1alpha1" in told


def test_flow_control_becomes_settings_of_admission() -> None:
    config = load("""
featureGates: [flowControl]
plugins:
- {type: global-strict-fairness-policy}
- {type: utilization-detector, parameters: {queueDepthThreshold: 7, kvCacheUtilThreshold: 0.9}}
flowControl:
  maxBytes: 1Gi
  defaultRequestTTL: 1m30s
  priorityBands:
  - {priority: 10, maxRequests: 5k, fairnessPolicyRef: global-strict-fairness-policy}
  saturationDetector: {pluginRef: utilization-detector}
""")
    settings = config.flow_control
    assert settings is not None
    assert settings.enabled
    assert (settings.max_bytes, settings.default_request_ttl) == (1 << 30, 90.0)
    assert settings.priority_bands == (
        PriorityBand(priority=10, max_requests=5000, fairness="global-strict"),
    )
    assert settings.saturation.queue_depth_threshold == 7
    assert settings.saturation.kv_cache_util_threshold == 0.9


def test_flow_control_needs_its_feature_gate_and_stale_figures_their_time() -> None:
    config = load("""
plugins: [{type: utilization-detector, parameters: {metricsStalenessThreshold: 200ms}}]
flowControl: {saturationDetector: {pluginRef: utilization-detector}}
""")
    assert config.flow_control is not None
    assert not config.flow_control.enabled
    assert config.flow_control.saturation.metrics_staleness_s == 5.0
    assert any("featureGates: [flowControl]" in note for note in config.notes)
    assert any("up to a second old" in note for note in config.notes)


def test_a_command_line_gives_a_file_or_a_text(tmp_path: Path) -> None:
    file = tmp_path / "picker.yaml"
    file.write_text(HEAD + "plugins: [{type: queue-scorer}]")
    from_file = given_config(file, "")
    assert from_file is not None
    assert scorers(from_file) == {"queue-scorer": 1.0}
    assert given_config(None, "") is None
    assert given_config(None, HEAD) is not None
    with pytest.raises(ValueError, match="exclude each other"):
        given_config(file, HEAD)
    with pytest.raises(ValueError, match="No such file"):
        given_config(tmp_path / "none.yaml", "")


def test_every_type_has_one_meaning() -> None:
    kinds = [set(MADE), set(SETTINGS), set(RENAMED), set(ELSEWHERE), set(NOT_HERE)]
    assert sum(map(len, kinds)) == len(set.union(*kinds))
    assert set(RENAMED.values()) <= set(MADE)


def test_what_dynamo_gives_its_picker_is_taken() -> None:
    label = "nvidia.com/dynamo-component-type"
    config = load(f"""
plugins:
- {{type: disagg-profile-handler}}
- name: prefill-filter
  type: label-filter
  parameters: {{label: {label}, validValues: [prefill], allowsNoLabel: false}}
- name: decode-filter
  type: label-filter
  parameters: {{label: {label}, validValues: [decode], allowsNoLabel: false}}
- {{name: picker, type: max-score-picker}}
- {{name: dyn-prefill, type: dyn-prefill-scorer}}
- {{name: dyn-decode, type: dyn-decode-scorer}}
schedulingProfiles:
- name: prefill
  plugins: [{{pluginRef: prefill-filter}}, {{pluginRef: dyn-prefill}}, {{pluginRef: picker}}]
- name: decode
  plugins: [{{pluginRef: decode-filter}}, {{pluginRef: dyn-decode}}, {{pluginRef: picker}}]
""")
    assert config.scheduler.primary == "decode"
    (scorer,) = config.scheduler.profiles["decode"].scorers
    assert type(scorer[2]).__name__ == "KvCostScorer"


@pytest.mark.parametrize(
    ("without", "labels", "reason"),
    [
        (False, {"role": "a"}, ""),
        (False, {"role": "c"}, "label role is 'c', none of a, b"),
        (False, {}, "label role is not there"),
        (True, {}, ""),
    ],
)
def test_pods_are_kept_by_the_values_of_a_label(
    without: bool, labels: dict[str, str], reason: str
) -> None:
    parameters = LabelParameters(label="role", valid_values=["b", "a"], allows_no_label=without)
    assert LabelFilter(parameters).reason(labels) == reason
