"""From a file to a scheduler and settings, by the rules of llm-d's loader.

A plugin's name is its type unless given. Without profiles there is one, ``default``, of all
filters, scorers and pickers; without plugins too, it is queue 2, KV cache utilization 2, prefix 3.
A profile without picker gets ``max-score-picker``, a scorer without weight 1. Every mistake of the
file is told at once, with its line, and nothing is made of a file that has one.
Source: `pkg/epp/config/loader` of llm-d-router.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path as FilePath
from typing import Any

from dynamo_crds.load import Document, read_documents
from dynamo_crds.problem import Finding, InvalidManifest, Problem, findings, or_list, under
from dynamo_crds.schema import Path

from dynamo_epp.admission.settings import FlowControlSettings
from dynamo_epp.config import flow_control, kv_events
from dynamo_epp.config.kv_events import KvEvents
from dynamo_epp.config.model import API_VERSIONS, KIND, EndpointPickerConfig, PluginSpec
from dynamo_epp.scheduling import catalogue
from dynamo_epp.scheduling.approximate import ApproximateParameters, ApproximatePrefixes
from dynamo_epp.scheduling.parameters import Parameters
from dynamo_epp.scheduling.plugin import Filter, Picker, Scorer
from dynamo_epp.scheduling.profile import Profile
from dynamo_epp.scheduling.scheduler import Scheduler
from dynamo_epp.scheduling.topology import Topology, TopologyLabels

DEFAULT_PLUGINS = (
    ("queue-scorer", 2.0),
    ("kv-cache-utilization-scorer", 2.0),
    ("prefix-cache-scorer", 3.0),
)
DEFAULT_PICKER = "max-score-picker"
DEFAULT_PROFILE = "default"
DECODE_PROFILE = "decode"
KNOWN_GATES = frozenset({flow_control.FEATURE_GATE})


@dataclass(frozen=True, slots=True)
class PickerConfig:
    """What a file says. ``scheduler`` remembers things: it is for one picker."""

    file: str
    scheduler: Scheduler
    flow_control: FlowControlSettings | None
    """None: the file says nothing of it."""
    kv_events: KvEvents | None
    """Where engines bring their KV events; None: they are asked."""
    notes: tuple[str, ...]
    """What is accepted and does something else here, or nothing; one sentence each."""
    parameters: Mapping[str, Mapping[str, Any]]
    """By type: parameters of the plugins whose job another part of the picker does."""


def given_config(path: FilePath | None, text: str) -> PickerConfig | None:
    """The configuration of a command line: a file, a text, or neither.

    Raises ValueError (`InvalidManifest` for what is wrong in it) with a message for its user.
    """
    if path is not None and text:
        raise ValueError("--config-file and --config-text exclude each other")
    if path is None:
        return load_config(text, "--config-text") if text else None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"--config-file {path}: {error.strerror or error}") from error
    return load_config(text, str(path))


def load_config(text: str, file: str) -> PickerConfig:
    """``file`` is the name that problems show. Raises `InvalidManifest`."""
    documents, problems = read_documents(text, file)
    for document in documents:
        problems.extend(document.problems)
    if problems:
        raise InvalidManifest(problems)
    if len(documents) != 1:
        found = "the file holds no object" if not documents else "the file holds several objects"
        raise InvalidManifest([Problem(file, 0, "", None, f"one {KIND}", found)])
    return load_document(documents[0])


def load_document(document: Document) -> PickerConfig:
    """Raises `InvalidManifest`."""
    found = _head(document) or findings(EndpointPickerConfig, document.data)
    if found:
        raise InvalidManifest(map(document.problem, found))
    loading = _Loading(EndpointPickerConfig.model_validate(document.data, by_alias=True))
    config = loading.run(document.file)
    if config is None:
        raise InvalidManifest(map(document.problem, loading.found))
    return config


def _head(document: Document) -> list[Finding]:
    """Whether the object is one of ours at all."""
    found = []
    if document.kind != KIND:
        found.append(Finding(("kind",), document.kind or None, KIND, "another kind of object"))
    if document.api_version not in API_VERSIONS:
        expected = " or ".join(API_VERSIONS)
        version = document.api_version or None
        found.append(Finding(("apiVersion",), version, expected, "unknown version"))
    return found


@dataclass(slots=True)
class _Loading:
    config: EndpointPickerConfig
    found: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)  # plugin's name -> type
    parameters: dict[str, Parameters] = field(default_factory=dict)  # name -> checked parameters
    made: dict[str, Any] = field(default_factory=dict)  # name -> filter, scorer or picker
    kv_events: KvEvents | None = None

    def run(self, file: str) -> PickerConfig | None:
        """None if there are mistakes; they are in ``found``."""
        config = self.config
        for at, spec in enumerate(config.plugins):
            self._register(spec, ("plugins", at))
        self._references()
        if self.found:
            return None
        topology = Topology(self._of(TopologyLabels))
        self.made = {
            name: catalogue.make(self.types[name], parameters, topology)
            for name, parameters in self.parameters.items()
            if self.types[name] in catalogue.MADE
        }
        profiles = dict(self._profiles(topology))
        primary = self._primary(profiles)
        section = config.flow_control
        settings, notes = flow_control.settings(
            section, config.feature_gates, self.types, self._detector()
        )
        self.notes += notes
        if self.found:
            return None
        return PickerConfig(
            file,
            Scheduler(
                profiles,
                primary,
                ApproximatePrefixes(self._of(ApproximateParameters)),
                reads_prompt=self._reads_prompt(),
            ),
            settings,
            self.kv_events,
            tuple(self.notes),
            {
                spec.type: spec.parameters
                for spec in config.plugins
                if spec.type in catalogue.ELSEWHERE
            },
        )

    # --- plugins

    def _register(self, spec: PluginSpec, path: Path) -> None:
        name = spec.name or spec.type
        type_ = catalogue.RENAMED.get(spec.type, spec.type)
        if type_ != spec.type:
            self.notes.append(f"plugin type {spec.type} is called {type_} now")
        if name in self.types:
            self._wrong((*path, "name"), name, "a name of its own", "two plugins of that name")
            return
        self.types[name] = type_
        given = spec.parameters
        if spec.type in kv_events.PLUGINS:
            mistakes = list(kv_events.wrong(given, (*path, "parameters")))
            self.found += mistakes
            if not mistakes:
                self.kv_events = self.kv_events or kv_events.settings(given)
            given = {}  # all else that they say is about how llm-d indexes
        model: type[Parameters]
        if type_ in catalogue.MADE:
            model = catalogue.MADE[type_].parameters
        elif type_ in catalogue.SETTINGS:
            model = catalogue.SETTINGS[type_]
        elif type_ in flow_control.DETECTORS:
            model = flow_control.DETECTORS[type_]
        elif type_ in catalogue.ELSEWHERE:
            self.notes.append(f"plugin {name}: {catalogue.ELSEWHERE[type_]}")
            return
        else:
            self._unknown_type(type_, (*path, "type"))
            return
        wrong = findings(model, given)
        self.found += (under(finding, (*path, "parameters")) for finding in wrong)
        if not wrong:
            self.parameters[name] = model.model_validate(given, by_alias=True)

    def _unknown_type(self, type_: str, path: Path) -> None:
        instead = catalogue.NOT_HERE.get(type_)
        if instead is not None:
            message = f"this picker has no such plugin: {instead}"
            self._wrong(path, type_, "a type that it has", message)
        else:
            self._wrong(path, type_, _hint(type_, catalogue.known_types()), "unknown plugin type")

    def _of(self, model: type[Any]) -> Any:
        """The parameters of the plugin that has this model; None if there is no such plugin."""
        return next((p for p in self.parameters.values() if type(p) is model), None)

    # --- references

    def _references(self) -> None:
        config = self.config
        for at, profile in enumerate(config.scheduling_profiles):
            for use, plugin in enumerate(profile.plugins):
                path: Path = ("schedulingProfiles", at, "plugins", use, "pluginRef")
                self._refers(plugin.plugin_ref, path)
        for path, reference in self._other_references():
            self._refers(reference, path)
        for gate in config.feature_gates:
            if gate not in KNOWN_GATES:
                self.notes.append(f"featureGates: {gate} changes nothing here")
        if config.flow_control is not None:
            for where, reference, right in flow_control.policies(config.flow_control):
                type_ = self.types.get(reference, reference)
                if type_ not in right and type_ not in catalogue.NOT_HERE:
                    self._wrong(
                        ("flowControl", *where), reference, " or ".join(right), "no such policy"
                    )

    def _other_references(self) -> Iterator[tuple[Path, str]]:
        config, detector = self.config, self._detector_reference()
        if detector:
            yield detector
        if config.request_handler is not None:
            for at, parser in enumerate(config.request_handler.parsers):
                yield ("requestHandler", "parsers", at, "pluginRef"), parser.plugin_ref
        if config.data_layer is not None:
            for at, source in enumerate(config.data_layer.sources):
                path: Path = ("dataLayer", "sources", at)
                yield (*path, "pluginRef"), source.plugin_ref
                for use, extractor in enumerate(source.extractors):
                    yield (*path, "extractors", use, "pluginRef"), extractor.plugin_ref

    def _refers(self, reference: str, path: Path) -> bool:
        if reference in self.types:
            return True
        self._wrong(path, reference, _hint(reference, self.types), "no plugin of that name")
        return False

    def _detector_reference(self) -> tuple[Path, str] | None:
        """Where the saturation detector is named, and its name."""
        config = self.config
        section = config.flow_control
        if section is not None and section.saturation_detector is not None:
            path: Path = ("flowControl", "saturationDetector", "pluginRef")
            return path, section.saturation_detector.plugin_ref
        if config.saturation_detector is not None:
            return ("saturationDetector", "pluginRef"), config.saturation_detector.plugin_ref
        return None

    def _detector(self) -> Parameters | None:
        named = self._detector_reference()
        if named is not None:
            return self.parameters.get(named[1])
        detectors = tuple(flow_control.DETECTORS.values())
        return next((p for p in self.parameters.values() if isinstance(p, detectors)), None)

    # --- profiles

    def _profiles(self, topology: Topology) -> Iterator[tuple[str, Profile]]:
        written = self.config.scheduling_profiles
        for at, profile in enumerate(written):
            if profile.name in {earlier.name for earlier in written[:at]}:
                path: Path = ("schedulingProfiles", at, "name")
                self._wrong(path, profile.name, "a name of its own", "two profiles of that name")
            uses = [(use.plugin_ref, use.weight) for use in profile.plugins]
            yield profile.name, self._profile(profile.name, uses, ("schedulingProfiles", at))
        if not written:
            uses = [(name, None) for name in self.made]
            if not self.made:
                for type_, weight in DEFAULT_PLUGINS:
                    self._default(type_, topology)
                    uses.append((type_, weight))
            yield DEFAULT_PROFILE, self._profile(DEFAULT_PROFILE, uses, ("plugins",))

    def _profile(self, name: str, uses: Iterable[tuple[str, float | None]], path: Path) -> Profile:
        filters: list[tuple[str, Filter]] = []
        scorers: list[tuple[str, float, Scorer]] = []
        pickers: list[Picker] = []
        for at, (reference, weight) in enumerate(uses):
            plugin = self.made.get(reference)
            if isinstance(plugin, Filter):
                filters.append((reference, plugin))
            if isinstance(plugin, Scorer):
                scorers.append((reference, 1.0 if weight is None else weight, plugin))
            if isinstance(plugin, Picker):
                pickers.append(plugin)
            if plugin is None and self.types[reference] not in catalogue.ELSEWHERE:
                self._wrong(
                    (*path, "plugins", at, "pluginRef"),
                    reference,
                    "a filter, scorer or picker",
                    "a plugin that profiles have no use for",
                )
        if len(pickers) > 1:
            self._wrong(path, name, "one picker", "the profile has several pickers")
        if not pickers:
            pickers.append(self._default(DEFAULT_PICKER))
        return Profile(name, tuple(filters), tuple(scorers), pickers[0])

    def _default(self, type_: str, topology: Topology | None = None) -> Any:
        """A plugin that the file does not mention."""
        parameters = catalogue.MADE[type_].parameters()
        self.types.setdefault(type_, type_)
        return self.made.setdefault(
            type_, catalogue.make(type_, parameters, topology or Topology())
        )

    def _primary(self, profiles: Mapping[str, Profile]) -> str:
        for name in (DEFAULT_PROFILE, DECODE_PROFILE):
            if name in profiles:
                return name
        if len(profiles) > 1:
            self._wrong(
                ("schedulingProfiles",),
                list(profiles),
                f"one that is called {DEFAULT_PROFILE} or {DECODE_PROFILE}",
                "none of the profiles is for the worker that answers",
            )
        return next(iter(profiles))

    def _reads_prompt(self) -> bool:
        types = map(self.types.__getitem__, self.made)
        return any(catalogue.MADE[type_].reads_prompt for type_ in types)

    def _wrong(self, path: Path, value: Any, expected: str, message: str) -> None:
        self.found.append(Finding(path, value, expected, message))


def _hint(word: str, known: Iterable[str]) -> str:
    """The nearest of ``known``, or all of them."""
    names = sorted(known)
    near = get_close_matches(word.lower(), names, n=3, cutoff=0.5)
    if near:
        return f"{or_list(near)} (nearest known names)" if len(near) > 1 else f"{near[0]} (nearest)"
    return "one of " + ", ".join(names) if names else "a plugin that is listed under plugins"
